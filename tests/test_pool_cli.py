"""DiffMoE at the command lines: who competes for experts, and what its bound drops, is said."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe_diffusion import evaluate, sample, train
from tests import cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    keys = {"sampling__steps": 1, "sampling__sampler": "euler", "sampling__joint": "true"}
    _, spec, *overrides = cli.digits("diffmoe", train__num_steps=12, **keys)
    train.run(spec, str(workdir), overrides)
    return workdir


def run(capsys, command, *args):
    """What --json prints, the lines before it, and stderr."""
    command.main([*map(str, args), "--json"])
    printed = capsys.readouterr()
    *lines, last = printed.out.splitlines()
    return json.loads(last), lines, printed.err


def test_a_result_names_the_pool_and_what_was_dropped(trained, tmp_path, capsys):
    """On eight devices, of which each draws whole pools of 6."""
    flags = ["--workdir", trained, "--num", 16, "--batch", 6]
    bounded, lines, errors = run(capsys, evaluate, *flags, "--config.model.router.max_capacity=1")
    assert bounded["pool"] == 6 and "pool" not in bounded["sampling"]
    assert 0 < bounded["dropped"] < 1
    assert f"; pool 6; dropped {bounded['dropped']:g}; " in lines[-1]
    (text,) = [text for text in bounded["warnings"] if "max_capacity" in text]
    assert "model.router.max_capacity = 1 dropped" in text and f"warning: {text}" in errors
    assert text.endswith("--config.model.router.max_capacity=0 serves everything")

    changed = ["--config.model.router.max_capacity=0", "--config.sampling.pool=3"]
    free, lines, _ = run(capsys, evaluate, *flags, *changed)
    assert free["pool"] == 3 and "dropped" not in free and "dropped" not in lines[-1]
    assert not any("max_capacity" in text for text in free["warnings"])
    assert free["metrics"]["fd_digits"] != bounded["metrics"]["fd_digits"]


def test_sample_says_so_too(trained, tmp_path, capsys):
    files = ["--out", tmp_path / "grid.png", "--npz", tmp_path / "samples.npz"]
    flags = ["--workdir", trained, "--num", 6, *files]
    result, lines, _ = run(capsys, sample, *flags, "--config.model.router.max_capacity=1")
    assert result["pool"] == 6 and 0 < result["dropped"] < 1
    assert lines[0].startswith("model.router.max_capacity = 1 dropped ")
    off = ["--config.model.router.threshold=off", "--config.sampling.pool=4"]
    result, lines, _ = run(capsys, sample, *flags, *off)
    assert result["pool"] == 4 and result["dropped"] is None and len(lines) == 1
    with np.load(tmp_path / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (6, 8, 8, 1)


@pytest.mark.slow
def test_a_result_does_not_depend_on_the_devices(trained, tmp_path):
    """The features of 20 images, by processes with one, two and eight devices."""
    vectors = []
    for devices in (1, 2, 8):
        path = tmp_path / f"{devices}.npz"
        flags = ["--workdir", trained, "--num", 20, "--batch", 8, "--save-features", path]
        cli.succeed("evaluate", *flags, devices=devices)
        with np.load(path) as arrays:
            vectors.append(arrays["features"])
    assert vectors[0].shape == (20, 32)
    for other in vectors[1:]:
        np.testing.assert_allclose(other, vectors[0], atol=1e-4)
