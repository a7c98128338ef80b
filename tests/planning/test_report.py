from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import pytest

from moe_diffusion import config as configs
from moe_diffusion.chips import CHIPS
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.moe.dispatch import BACKENDS
from moe_diffusion.planning import report
from moe_diffusion.planning.compile import Compiled, OutOfMemory, needed_bytes, state_bytes
from moe_diffusion.planning.hlo import Program
from moe_diffusion.planning.kernels import dispatch_of
from moe_diffusion.planning.presets import ORDER
from moe_diffusion.planning.topologies import Topology, describe
from tests import cli
from tests.compiler import COMPILER

QUIET = [].append
DISPATCH = "cpu" if COMPILER else "slots"  # of expert choice on CPUs
V6E = Topology("v6e:2x4", CHIPS["v6e"], (2, 4), tuple(jax.devices()))  # CPUs that pass for TPUs


def load(**changes):
    _, spec, *overrides = cli.digits("expert_choice", ema__decays="()", **changes)
    return configs.load(spec, overrides)


@pytest.fixture(scope="module")
def trained():
    """Compiled for dp and, to compare, for fsdp."""
    plan = report.make_plan(load(), "train", describe("local"), QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "ORDER", ("dp", "fsdp"))
        report.compare_presets(plan, load(), QUIET)
    return plan


def params_bytes():
    """Of the state with gradients, four copies; besides, two counts of steps."""
    return (state_bytes(load(), "train", jax.devices()[:1]) - 8) / 4


def test_memory_and_collectives_of_data_parallel_training(trained):
    whole = params_bytes()
    # The state: parameters and two moments; besides, a batch and a key.
    assert 3 * whole < trained.memory["arguments"] < 3 * whole + 4096
    assert trained.memory["aliased"] == pytest.approx(3 * whole, rel=0.01)
    assert trained.fits and trained.needed > trained.memory["arguments"] + whole
    # Gradients all-reduced over 8 devices; metrics and the like beside them.
    assert trained.collectives["all-reduce"] == pytest.approx(2 * 7 / 8 * whole, rel=0.05)
    assert (trained.batch_size, trained.micro_batch) == (16, 2)
    assert trained.flops == pytest.approx(trained.to_json()["flops_per_chip"])


def test_presets_are_compared(trained):
    assert set(trained.outcomes) == {"dp", "fsdp"}
    assert trained.outcomes["fsdp"].needed < trained.outcomes["dp"].needed
    assert trained.recommended == "dp" and "fsdp sends" in trained.reason


def test_all_presets_that_could_make_a_difference_are_tried(monkeypatch):
    monkeypatch.setattr(report, "compile_program", refusing(V6E.hbm_bytes_per_chip))

    def tried(what, **changes):
        plan = report.make_plan(load(**changes), what, V6E, QUIET)
        report.compare_presets(plan, load(**changes), QUIET)
        return set(plan.outcomes)

    everything = {name for name in ORDER if name in report.rules.PRESETS}
    assert tried("train") == everything - {"tp"}  # no device is idle
    assert tried("sample") == everything - {"zero1", "tp"}


def test_dispatch_is_recognised(trained):
    assert trained.dispatch.backend == DISPATCH and trained.dispatch.as_intended
    text = trained.dispatch.describe()
    assert ("calls of our kernels" if DISPATCH == "cpu" else "plain XLA") in text
    missing = report.Dispatch("blocked", "tpu", {})
    assert not missing.as_intended and "NOT tpu" in missing.describe()


@pytest.mark.parametrize(
    ("what", "dropout", "wanted"),
    [("train", 0.0, "tpu"), ("train", 0.2, "blocked"), ("sample", 0.2, "tpu")],
)
def test_experts_with_dropout_are_not_meant_for_our_kernels(what, dropout, wanted):
    _, spec, *overrides = cli.digits("token_choice", model__moe__dropout=dropout)
    config = configs.load(spec, overrides).model
    program = Program(files=(f"/x/moe_diffusion/kernels/{BACKENDS[wanted].source}",))
    found = dispatch_of(program, build(config), config, what, "tpu")
    assert (found.wanted, found.as_intended) == (wanted, True)


def test_table_and_json_say_the_same(trained):
    values, text = json.loads(json.dumps(trained.to_json())), report.table(trained)
    assert values["fits"] and values["preset"] == "dp" and values["recommended_preset"] == "dp"
    assert values["hbm_limit_bytes"] is None and values["chips"] == 8
    assert values["hbm_bytes_per_chip"] == trained.needed
    assert report.amount(values["hbm_bytes_per_chip"]) in text
    assert "recommended: dp" in text and f"dispatch: {DISPATCH}" in text


def test_sampling_needs_only_weights(trained):
    plan = report.make_plan(load(sampling__steps=3), "sample", describe("local"), QUIET)
    assert plan.memory["arguments"] == pytest.approx(params_bytes(), rel=0.05)
    assert plan.memory["aliased"] == 0
    assert plan.flops == pytest.approx(trained.flops / 3 * 3 * 2 * 2)  # 3 Heun steps, guided


def refusing(limit, tried=None):
    """In the place of the compiler: needs 1 GB and 1 GB more for each image on a device."""

    def compile_program(config, what, devices):
        images = config.data.batch_size // config.optim.accumulate // len(devices)
        if tried is not None:
            tried.append((config.parallel.preset, images))
        size = (1 + images) * 2**30
        if size > limit:
            return OutOfMemory(size, "Ran out of memory", 0.1)
        return result(size)

    return compile_program


def result(size):
    analysis = SimpleNamespace(
        argument_size_in_bytes=0,
        output_size_in_bytes=0,
        alias_size_in_bytes=0,
        temp_size_in_bytes=size,
        generated_code_size_in_bytes=0,
    )
    text = "ENTRY %main (x: f32[]) -> f32[] {\n  ROOT %x = f32[] parameter(0)\n}"
    return Compiled(text, analysis, 0.1)


def test_too_large_a_batch_does_not_fit_and_remedies_are_named(monkeypatch):
    monkeypatch.setattr(report, "compile_program", refusing(V6E.hbm_bytes_per_chip))
    config = load(data__batch_size=8 * 64)
    plan = report.make_plan(config, "train", V6E, QUIET)
    assert not plan.fits and plan.needed == 65 * 2**30 and plan.memory == {}
    report.compare_presets(plan, config, QUIET)
    assert plan.recommended is None
    for remedy in ("more chips", "remat=cheap", "remat=full", "accumulate=2", "mu_dtype=bfloat16"):
        assert remedy in plan.reason
    assert "does not fit (208% of it)" in report.table(plan)


def test_a_state_that_cannot_fit_is_not_compiled(monkeypatch):
    tried = []
    monkeypatch.setattr(report, "compile_program", refusing(V6E.hbm_bytes_per_chip, tried))
    monkeypatch.setattr(
        report, "state_bytes", lambda config, *_: 40 * 2**30 * (config.parallel.preset == "zero1")
    )
    config = load()
    plan = report.make_plan(config, "train", V6E, QUIET)
    report.compare_presets(plan, config, QUIET)
    assert "zero1" not in {preset for preset, _ in tried}
    assert "zero1 does not fit (42.9 GB for the state and gradients alone" in plan.reason


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_largest_batch(monkeypatch, accumulate):
    tried = []
    monkeypatch.setattr(report, "compile_program", refusing(V6E.hbm_bytes_per_chip, tried))
    config = load(optim__accumulate=accumulate)
    plan = report.make_plan(config, "train", V6E, QUIET)
    report.search_batch(plan, config, QUIET)
    assert plan.largest_micro_batch == 24  # 25 GiB of 31.25; the next size, 32, needs 33
    assert len(tried) <= 6


def test_a_chip_of_two_devices_takes_and_has_twice_as_much(monkeypatch):
    chip = CHIPS["tpu7x"]
    tpu7x = Topology("tpu7x:2x2x1", chip, (2, 2, 1), tuple(jax.devices()))
    monkeypatch.setattr(report, "compile_program", refusing(chip.hbm_bytes))
    plan = report.make_plan(load(), "train", tpu7x, QUIET)
    assert (tpu7x.num_chips, plan.micro_batch) == (4, 4)
    assert plan.limit == 2 * chip.hbm_bytes
    assert plan.needed == 2 * 3 * 2**30  # 1 + 2 images on each device
    report.search_batch(plan, load(), QUIET)
    assert plan.largest_micro_batch == 2 * 64  # 65 GiB of 94.75; the next size, 96, needs 97


def test_no_search_without_a_limit(trained):
    with pytest.raises(UserError, match="memory limit"):
        report.search_batch(trained, load(), QUIET)


def test_a_batch_that_cannot_be_split_over_the_chips():
    with pytest.raises(UserError, match="multiple of 8"):
        report.make_plan(load(data__batch_size=12), "train", V6E, QUIET)


@pytest.mark.parametrize(
    "message,size",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.",
            20.5 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (199.5G) exceeds available HBM (30.75G).",
            199.5 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_needed_bytes(message, size):
    assert needed_bytes(message) == size
