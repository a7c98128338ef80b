"""The real commands as one, two and four processes: the same losses, images, scores and weights.

`python -m tests.campaign.processes` trains configs/digits.py at its own size, on more devices.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests import cli
from tests.campaign import processes as table

CHANGES = {"optim__learning_rate": 1e-2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of one process with one device, by router."""
    folder = tmp_path_factory.mktemp("alone")
    routers = table.ROUTERS
    return {r: table.train(folder / r, cli.digits(r, **CHANGES), 1, 1) for r in routers}


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset,router,processes",
    [("fsdp", "diffmoe", 4), ("fsdp_ep", "token_choice", 2)],
)
def test_processes_train_as_one(tmp_path, alone, preset, router, processes):
    args = cli.digits(router, **CHANGES, parallel__preset=preset)
    losses = table.train(tmp_path, args, processes, 1)
    assert list(losses) == list(alone[router]) == list(range(1, table.STEPS + 1))
    np.testing.assert_allclose(
        [*losses.values()], [*alone[router].values()], atol=table.CLOSE, rtol=0
    )
    assert len(set(losses.values())) == table.STEPS


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run, its images, and what `evaluate` says, made by one process."""
    folder = tmp_path_factory.mktemp("run")
    cli.together("train", *cli.digits("diffmoe"), "--workdir", folder / "run", processes=1)
    return folder / "run", *made_by(1, folder / "run", folder)


def made_by(processes: int, run: Path, folder: Path) -> tuple[np.ndarray, dict]:
    args = ["--workdir", run, "--num", 24, "--steps", 3, "--out", folder / "grid.png"]
    args += ["--npz", folder / "images.npz"]
    outputs = cli.together("sample", *args, processes=processes)
    assert sum("24 images" in output for output in outputs) == 1
    images = np.load(folder / "images.npz")["arr_0"]
    args = ["--workdir", run, "--num", 64, "--steps", 3, "--json"]
    first, *others = cli.together("evaluate", *args, processes=processes)
    assert not any("fd_digits" in output for output in others)
    return images, json.loads(first.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_draw_and_judge_as_one(tmp_path, drawn, processes):
    run, images, judged = drawn
    evaluations = (run / "evaluations.jsonl").read_text().count("\n")
    several, told = made_by(processes, run, tmp_path)
    np.testing.assert_allclose(several, images, atol=2e-5)
    assert told.keys() == judged.keys() and told["num_samples"] == 64
    assert told["metrics"].keys() == judged["metrics"].keys() >= {"fd_digits"}
    for name, value in judged["metrics"].items():
        assert told["metrics"][name] == pytest.approx(value, rel=1e-3), name
    assert (run / "evaluations.jsonl").read_text().count("\n") == evaluations + 1  # one writer
