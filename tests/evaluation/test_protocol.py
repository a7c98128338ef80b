"""Published protocols by name, what a result says of them, and labels."""

from __future__ import annotations

import numpy as np
import pytest

from moe_diffusion import config as configs
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
    assert set(protocol.known()) == {name.partition(":")[0] for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_protocols(name):
    found = protocol.load(name)
    assert (found.sampling.sampler, found.sampling.steps, found.cfg) == PUBLISHED[name]
    assert found.num_samples == 50_000 and found.name == name and "arXiv" in found.source
    config = configs.default()  # every key that a protocol sets is one of the config's
    assert set(found.sampling) <= set(config.sampling)


def test_jit_guides_in_an_interval_and_ends_with_euler():
    sampling = protocol.load("jitmoe").sampling
    assert sampling.final_euler and sampling.cfg_interval == (0.1, 1.0)


def test_deviations_name_what_differs_and_nothing_else():
    published = protocol.load("dsmoe")
    used = {
        "num_samples": 50_000, "labels": "random", "batch_size": 256, "seed": 0, "ema": "0.9999",
        "sampler": "euler", "steps": 250, "cfg_interval": (0.0, 1.0), "cfg": 1.5,
        "resize": "pytorch-fid", "quantize": "none",
    }  # fmt: skip
    assert protocol.deviations(published, used) == []
    other = used | {"num_samples": 64, "cfg": 2.0, "resize": "tensorflow"}
    assert protocol.deviations(published, other) == [
        "num_samples: 64 instead of 50000",
        "resize: tensorflow instead of pytorch-fid",
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
    ],
    ids=["unknown", "broken", "key", "value"],
)  # fmt: skip
def test_bad_protocols(text, message, tmp_path):
    if text:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        protocol.load(str(tmp_path / "mine.py") if text else "nothing")
