"""What a model says about its dispatch, before it runs and in a plan."""

from __future__ import annotations

import pytest

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.kernels.cpu import library
from moe_diffusion.models import build
from moe_diffusion.moe.dispatch import BACKENDS
from moe_diffusion.planning.hlo import Program
from moe_diffusion.planning.kernels import backends_of, dispatch_line, dispatch_of
from tests import cli


def model_of(router, **changes):
    _, spec, *overrides = cli.digits(router, **changes)
    config = configs.load(spec, overrides).model
    return build(config), config


@pytest.mark.parametrize(
    ("router", "platform", "changes", "line"),
    [
        ("token_choice", "cpu", {}, "cpu (C++ kernels, float32)"),
        ("token_choice", "tpu", {"model__dtype": "bfloat16"}, "tpu (Pallas kernels)"),
        ("expert_choice", "cuda", {}, "slots (plain XLA, fixed slots)"),
        (
            "expert_choice",
            "cpu",
            {"model__dtype": "bfloat16"},
            "slots (plain XLA, fixed slots; not cpu, which computes in float32, not bfloat16)",
        ),
        (
            "token_choice",
            "tpu",
            {"model__moe__backend": "blocked"},
            "blocked (plain XLA, sorted rows; named by model.moe.backend)",
        ),
        ("dense", "cpu", {}, "none, a dense model"),
    ],
)
def test_the_line_at_the_start_of_a_run(router, platform, changes, line, monkeypatch):
    monkeypatch.setattr(library, "available", lambda: True)
    assert dispatch_line(*model_of(router, **changes), platform) == f"dispatch of experts: {line}"


def test_diffmoe_has_fixed_slots_in_training_alone():
    model, config = model_of("diffmoe")
    assert list(backends_of(model, config, "cuda", train=True)) == ["slots"]
    assert list(backends_of(model, config, "cuda", train=False)) == ["gpu"]


def test_a_named_backend_that_does_not_suit_is_refused():
    model, config = model_of("token_choice", model__moe__backend="gpu")
    with pytest.raises(UserError, match="model.moe.backend = gpu does not run on a TPU"):
        dispatch_line(model, config, "tpu")


@pytest.mark.parametrize("name", list(BACKENDS))
def test_a_backend_is_recognised_by_its_files(name, monkeypatch):
    monkeypatch.setattr(library, "available", lambda: True)
    model, config = model_of("token_choice", model__moe__backend=name)
    source = BACKENDS[name].source
    files = (f"/x/moe_diffusion/kernels/{source}", "/x/moe_diffusion/kernels/rows.py")
    platform = name if name in ("cpu", "tpu", "gpu") else "cpu"
    found = dispatch_of(Program(files=files), model, config, "sample", platform)
    assert (found.backend, found.wanted) == (name, name) and name in found.describe()
    other = dispatch_of(Program(files=files[1:]), model, config, "sample", platform)
    assert not other.as_intended and f"NOT {name}" in other.describe()
