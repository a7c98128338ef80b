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
