"""Programs really compiled for accelerators that are not there; see docs/plan.md for what it needs.

pytest -m tpu_aot tests/planning
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moe_diffusion import config as configs
from moe_diffusion.planning.report import make_plan, with_keys
from moe_diffusion.planning.topologies import describe

pytestmark = pytest.mark.tpu_aot
CONFIGS = sorted(
    path.stem
    for path in (Path(__file__).resolve().parents[2] / "configs").glob("*.py")
    if "def get_config(" in path.read_text() and not path.stem.startswith("eval_")
)
QUIET = [].append


def tiny(router="expert_choice", **keys):
    changes = ["model.depth=2", "model.hidden_size=64", "data.batch_size=64", "model.dtype=auto"]
    changes += [f"{key.replace('__', '.')}={value}" for key, value in keys.items()]
    return configs.load(f"configs/digits.py:router={router}", changes)


@pytest.mark.parametrize(
    "topology",
    ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "a100:8", "h100:8", "h200:8"],
)
def test_a_training_step_for_every_kind_of_chip(topology):
    plan = make_plan(tiny(), "train", describe(topology), QUIET)
    assert plan.fits and plan.needed < 2**30
    assert plan.dispatch.as_intended
    assert bool(plan.dispatch.kernels) == (plan.dispatch.backend in ("tpu", "gpu"))
    assert plan.collectives["all-reduce"] > 0 and plan.floor_seconds > 0


@pytest.mark.parametrize("topology", ["v5e:2x2", "a100:2", "h100:2"])
def test_token_choice_uses_our_kernels(topology):
    plan = make_plan(tiny("token_choice"), "train", describe(topology), QUIET)
    assert plan.fits and plan.dispatch.as_intended and plan.dispatch.kernels


def test_sampling_on_one_chip_sends_nothing():
    plan = make_plan(tiny(sampling__steps=3), "sample", describe("v5e:1x1"), QUIET)
    assert plan.fits and plan.collectives == {} and plan.memory["aliased"] == 0


def test_the_compilers_refusal_is_a_number():
    plan = make_plan(tiny(data__batch_size=2**20), "train", describe("v5e:1x1"), QUIET)
    assert not plan.fits and plan.needed > plan.limit


@pytest.mark.slow
def test_dsmoe_l_e48_for_256_chips_in_three_minutes():
    start = time.process_time()
    config = configs.load("configs/dsmoe_l.py")
    plan = make_plan(config, "train", describe("v5e:16x16"), QUIET)
    assert plan.fits and plan.micro_batch == 2
    assert (time.process_time() - start) / 2 < 180  # two cores


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_fits_somewhere(name):
    config = with_keys(configs.load(f"configs/{name}.py"), optim__accumulate=1)
    for topology in map(describe, ("v5e:4x4", "v5p:4x4x4")):
        config = with_keys(config, data__batch_size=len(topology.devices))
        plan = make_plan(config, "train", topology, QUIET)
        if plan.fits:
            break
    assert plan.fits and plan.dispatch.as_intended


def flux(name="configs/flux_tiny.py", **keys):
    keys = {"parallel.preset": "tp", "data.batch_size": 1} | keys
    return configs.load(name, [f"{key.replace('__', '.')}={value}" for key, value in keys.items()])


VECTORS = {f"{name}_embed/dense_{i}" for name in ("time", "pooled", "guidance") for i in (0, 1)}


def test_chips_share_one_sample():
    """Four chips, four heads: all computes once but the vectors of the sample, on every chip."""
    keys = {"model__num_heads": 4, "model__flux__rope_axes": "(4,6,6)", "model__image_size": 32}
    config = flux(**keys, sampling__steps=2)
    plan = make_plan(config, "sample", describe("v5e:2x2"), QUIET)
    assert plan.fits and plan.collectives and plan.micro_batch == 1 / 4
    assert "time_embed/dense_1" in plan.repeats and set(plan.repeats) <= VECTORS
    assert plan.repeats["time_embed/dense_1"] == pytest.approx(4, rel=0.01)


def test_heads_that_chips_do_not_divide_are_named():
    keys = {"model__num_heads": 2, "model__image_size": 32}
    plan = make_plan(flux(**keys, sampling__steps=2), "sample", describe("v5e:2x2"), QUIET)
    maps = {"double (attention maps)", "single (attention maps)"}
    assert maps <= set(plan.repeats) <= maps | VECTORS


def test_a_training_step_repeats_nothing():
    config = flux(parallel__preset="fsdp", data__batch_size=8, model__remat="full")
    assert make_plan(config, "train", describe("v5e:2x2"), QUIET).repeats == {}


def test_flux_dev_draws_one_image_on_eight_v5e():
    """At full size, 1024 x 1024 pixels and 28 steps, with weights in bfloat16."""
    config = flux("configs/flux_dev.py", model__param_dtype="bfloat16")
    plan = make_plan(config, "sample", describe("v5e:2x4"), QUIET)
    assert plan.fits and plan.micro_batch == 1 / 8 and plan.times == 1
    # An eighth of 11.9B parameters in 2 bytes and what is not split: embedders, biases, norms.
    assert 11_901_408_320 * 2 / 8 < plan.memory["arguments"] < 1.05 * 11_901_408_320 * 2 / 8
    assert set(plan.repeats) == {"time_embed/dense_0", "time_embed/dense_1"}
