"""A run on eight devices has the numbers of a run on one."""

from __future__ import annotations

import math

import jax
import pytest

from moe_diffusion import train
from tests import cli

TOLERANCE = 1e-5  # relative


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """router -> metrics of every step; each run is made once."""
    done = {}

    def metrics(router):
        if router not in done:
            workdir = tmp_path_factory.mktemp(router) / "run"
            output = cli.succeed("train", *arguments(router), "--workdir", workdir, devices=1)
            assert ", 1 x cpu, preset dp" in output
            done[router] = cli.metrics(workdir)
        return done[router]

    return metrics


@pytest.fixture(autouse=True)
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def arguments(router, **changes):
    return cli.digits(router, train__num_steps=4, **changes)


@pytest.mark.parametrize(
    "router, preset",
    [
        ("token_choice", "fsdp"),
        ("diffmoe", "zero1"),
        pytest.param("diffmoe", "dp", marks=pytest.mark.slow),
        pytest.param("token_choice", "dp", marks=pytest.mark.slow),
        pytest.param("token_choice", "zero1", marks=pytest.mark.slow),
        pytest.param("diffmoe", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_the_same_numbers_on_eight_devices(router, preset, on_one_device, tmp_path, capsys):
    """Losses, router losses, expert loads and the norm of the gradient of four steps."""
    train.main([*arguments(router, parallel__preset=preset), "--workdir", str(tmp_path)])
    assert f", 8 x cpu, preset {preset}" in capsys.readouterr().out
    found, expected = cli.metrics(tmp_path), on_one_device(router)
    assert len(found) == len(expected) == 4
    for line, wanted in zip(found, expected, strict=True):
        assert line.keys() == wanted.keys() >= {"loss", "mse", "grad_norm", "load_max"}
        for name, value in wanted.items():
            assert math.isclose(line[name], value, rel_tol=TOLERANCE), (name, line, wanted)
    assert len({line["loss"] for line in found}) == 4
