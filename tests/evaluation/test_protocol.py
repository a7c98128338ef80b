"""Published protocols by name, what a result says of them, and labels."""

from __future__ import annotations

import re

import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion import shipped
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import protocol

PUBLISHED = {  # sampler, steps, guidance scales
    "diffmoe_flow": ("euler", 250, (1.0,)),
    "diffmoe_ddpm": ("ddpm", 250, (1.0,)),
    "dsmoe": ("euler", 250, (1.0, 1.5)),
    "jitmoe": ("heun", 50, (2.9,)),
    "jit": ("heun", 50, (3.0,)),
    "jit:size=h": ("heun", 50, (2.2,)),
    "dit": ("ddpm", 250, (1.0, 1.5)),
    "sit": ("heun", 125, (1.0, 1.5)),
    "sit:sampler=sde": ("sde", 250, (1.0, 1.5)),
    "promoe": ("euler", 250, (1.0, 1.5)),
}


def test_every_protocol_is_listed_above():
    assert set(shipped.protocols()) == {name.partition(":")[0] for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_protocols(name):
    found = protocol.load(name)
    assert (found.sampling.sampler, found.sampling.steps, found.cfg) == PUBLISHED[name]
    assert found.num_samples == 50_000 and found.name == name and "arXiv" in found.source
    config = configs.default()  # every key that a protocol sets is one of the config's
    assert set(found.sampling) <= set(config.sampling)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_protocol_scores_and_computes_as_its_authors(name):
    """torch-fidelity's shuffle for JiT's balanced classes, ADM's parts for classes at random."""
    found, is_jit = protocol.load(name), name.startswith("jit")
    assert (found.labels, found.score) == (
        ("balanced", "torch-fidelity") if is_jit else ("random", "adm")
    )
    assert found.model.dtype == ("auto" if is_jit else "float32")
    assert found.matmul == ("float32" if name == "promoe" else "tf32")


# Table 2's FIDs are found again in Tables 13 and 14: 9.60 at batch 10, 2.13 at 75, 9.17 at 125,
# 2.30 at 50. Argument -> sampler, steps, scale, pool, decoder.
DIFFMOE = {
    "diffmoe_flow": ("euler", 250, 1.0, 125, "mse"),
    "diffmoe_flow:cfg=1.43,sampler=heun,decoder=ema": ("heun", 125, 1.43, 125, "ema"),
    "diffmoe_flow:sampler=dopri5,decoder=ema,batch=250": ("dopri5", 250, 1.0, 250, "ema"),
    "diffmoe_flow:batch=10": ("euler", 250, 1.0, 10, "mse"),
    "diffmoe_flow:table2": ("heun", 125, 1.0, 10, "ema"),
    "diffmoe_flow:table2,cfg=1.5": ("heun", 125, 1.5, 75, "ema"),
    "diffmoe_flow:table2,cfg=1.43": ("heun", 125, 1.43, 125, "ema"),
    "diffmoe_flow:table2,batch=50,sampler=euler": ("euler", 250, 1.0, 50, "ema"),
    "diffmoe_ddpm": ("ddpm", 250, 1.0, 125, "mse"),
    "diffmoe_ddpm:table2": ("ddpm", 250, 1.0, 125, "ema"),
    "diffmoe_ddpm:table2,cfg=1.5": ("ddpm", 250, 1.5, 50, "ema"),
    "diffmoe_ddpm:decoder=ema,cfg=1.5,batch=75": ("ddpm", 250, 1.5, 75, "ema"),
}


@pytest.mark.parametrize("name", DIFFMOE)
def test_the_tables_of_diffmoe_are_arguments(name):
    found = protocol.load(name)
    sampling, decoder = found.sampling, found.autoencoder.removeprefix("sd-vae-ft-")
    given = (sampling.sampler, sampling.steps, found.cfg[0], sampling.pool, decoder)
    assert given == DIFFMOE[name] and len(found.cfg) == 1
    assert found.model.router.max_capacity == 0.0
    one_pass = name.startswith("diffmoe_ddpm")
    assert (sampling.joint, sampling.cfg_channels) == ((True, 3) if one_pass else (False, 0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diffmoe_flow:batch=-1", "batch=-1 is no pool of images: it must be at least 1"),
        ("diffmoe_flow:sampler=rk4", "sampler=rk4 is not possible; choose euler | heun | dopri5"),
        ("diffmoe_ddpm:sampler=heun", "unknown argument 'sampler'"),
        ("diffmoe_flow:decoder=best", "choose mse | ema"),
    ],
)
def test_impossible_arguments(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        protocol.load(name)


def test_guidance_of_sit_is_that_of_forward_with_cfg():
    for name in ("sit", "sit:sampler=sde", "dit"):
        sampling = protocol.load(name).sampling
        assert (sampling.cfg_channels, sampling.joint) == (3, True)


def test_what_a_protocol_fixes_becomes_overrides_of_a_run():
    found = protocol.overrides(protocol.load("diffmoe_flow"))
    for text in ("model.dtype=float32", "model.router.max_capacity=0.0", "sampling.pool=125"):
        assert text in found
    config = configs.load("configs/digits.py:router=diffmoe", ("model.dtype=bfloat16", *found))
    assert config.model.dtype == "float32" and config.model.router.max_capacity == 0
    assert tuple(config.sampling.cfg_interval) == (0.0, 1.0)
    # A router without a bound does not get one.
    other = configs.load("configs/digits.py:router=token_choice", found)
    assert other.model.dtype == "float32" and "max_capacity" not in other.model.router


def test_deviations_of_the_model():
    published = protocol.load("diffmoe_flow")
    config = configs.load("configs/digits.py:router=diffmoe", protocol.overrides(published))
    model = protocol.model_settings(config.model)
    assert protocol.deviations(published, model) == []
    changed = model | {"model.dtype": "bfloat16", "model.router.max_capacity": 4.0}
    assert protocol.deviations(published, changed | {"pool": 10, "matmul": "fast"}) == [
        "matmul: fast instead of tf32",
        "pool: 10 instead of 125",
        "model.dtype: bfloat16 instead of float32",
        "model.router.max_capacity: 4.0 instead of 0.0",
    ]
    # On a CPU "auto" is float32, whichever of the two the run says.
    assert protocol.deviations(protocol.load("jit"), model) == []
    dense = configs.load("configs/digits.py:router=dense", protocol.overrides(published))
    assert protocol.deviations(published, protocol.model_settings(dense.model)) == []


def test_jit_guides_in_an_interval_and_ends_with_euler():
    sampling = protocol.load("jitmoe").sampling
    assert sampling.final_euler and sampling.cfg_interval == (0.1, 1.0)


def test_deviations_name_what_differs_and_nothing_else():
    published = protocol.load("dsmoe")
    used = {
        "num_samples": 50_000, "labels": "random", "batch_size": 256, "seed": 0, "ema": "0.9999",
        "sampler": "euler", "steps": 250, "cfg_interval": (0.0, 1.0), "cfg": 1.5,
        "resize": "pytorch-fid", "quantize": "none", "score": "adm", "matmul": "tf32", "pool": 32,
        "autoencoder": "sd-vae-ft-mse", "reference": "VIRTUAL_imagenet256_labeled.npz",
    }  # fmt: skip
    assert protocol.deviations(published, used) == []
    other = used | {"num_samples": 64, "cfg": 2.0, "resize": "tensorflow"}
    other |= {"autoencoder": "sd-vae-ft-ema"}
    assert protocol.deviations(published, other) == [
        "num_samples: 64 instead of 50000",
        "resize: tensorflow instead of pytorch-fid",
        "autoencoder: sd-vae-ft-ema instead of sd-vae-ft-mse",
        "cfg: 2 instead of 1 or 1.5",
    ]
    # A file of images does not tell how it was sampled.
    assert protocol.deviations(published, {"num_samples": 50_000}) == []


def test_labels_are_balanced_or_drawn():
    balanced = protocol.make_labels("balanced", 30, 10, seed=0)
    assert balanced.tolist() == sorted(balanced) and (np.bincount(balanced) == 3).all()
    drawn = protocol.make_labels("random", 3000, 10, seed=0)
    assert drawn.dtype == np.int32 and set(drawn) == set(range(10))
    np.testing.assert_array_equal(drawn, protocol.make_labels("random", 3000, 10, seed=0))
    assert (drawn != protocol.make_labels("random", 3000, 10, seed=1)).mean() > 0.8


def test_the_line_states_metrics_and_conditions():
    result = {
        "metrics": {"fid": 2.345678}, "warnings": ["many"], "checkpoint": "runs/x", "step": 7,
        "cfg": 1.5, "cfg_interval": [0.1, 1.0], "autoencoder": None, "sampling": {"eta": 0.0},
        "features": {"file": "w.pth", "resize": "tensorflow"},
    }  # fmt: skip
    assert protocol.describe(result) == (
        "fid 2.3457 (checkpoint runs/x; step 7; cfg 1.5; cfg_interval 0.1,1; "
        "features file=w.pth resize=tensorflow)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no protocol 'nothing'; known are: diffmoe_ddpm, diffmoe_flow, dit"),
        ("x = 1 / 0", "fails: ZeroDivisionError"),
        ("from moe_diffusion.evaluation import protocol as p\n"
         "def get_protocol(arg):\n  c = p.default()\n  c.stpes = 3\n  return c", "stpes"),
        ("from moe_diffusion.evaluation import protocol as p\n"
         "def get_protocol(arg):\n  c = p.default()\n  c.resize = 'cubic'\n  return c",
         "--resize 'cubic' is unknown; choose tensorflow | pytorch-fid"),
        ("from moe_diffusion.evaluation import protocol as p\n"
         "def get_protocol(arg):\n  c = p.default()\n  c.score = 'mine'\n  return c",
         "--score 'mine' is unknown; choose torch-fidelity | adm"),
    ],
    ids=["unknown", "broken", "key", "value", "score"],
)  # fmt: skip
def test_bad_protocols(text, message, tmp_path):
    if text:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        protocol.load(str(tmp_path / "mine.py") if text else "nothing")
