"""The real commands as one, two and four processes: the same losses, images, scores and files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests import cli

STEPS = 50
DEVICES = 4  # in all


def trained(workdir, preset, router, processes):
    changes = {"train__num_steps": STEPS, "checkpoint__every": STEPS, "parallel__preset": preset}
    changes |= {"optim__learning_rate": 1e-2}
    args = [*cli.digits(router, **changes), "--workdir", workdir]
    outputs = cli.together("train", *args, processes=processes, devices=DEVICES // processes)
    assert all("step" not in output for output in outputs[1:])  # the first process speaks
    return {line["step"]: line["loss"] for line in cli.metrics(workdir)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset,router,processes",
    [("dp", "token_choice", 2), ("fsdp", "diffmoe", 4), ("fsdp_ep", "token_choice", 2)],
)
def test_processes_train_as_one(tmp_path, preset, router, processes):
    """The whole table, 1, 2 and 4 processes of each preset and router, is in reliability.md."""
    alone = trained(tmp_path / "alone", preset, router, 1)
    several = trained(tmp_path / "several", preset, router, processes)
    assert list(alone) == list(several) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([*several.values()], [*alone.values()], atol=1e-5, rtol=0)
    assert len(set(alone.values())) == STEPS


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    cli.together("train", *cli.digits("diffmoe"), "--workdir", folder, processes=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_draw_and_judge_as_one(tmp_path, workdir, processes):
    def drawn(name, count):
        args = ["--workdir", workdir, "--num", 24, "--steps", 3, "--out", tmp_path / f"{name}.png"]
        args += ["--npz", tmp_path / f"{name}.npz"]
        outputs = cli.together("sample", *args, processes=count)
        assert sum("24 images" in output for output in outputs) == 1
        return np.load(tmp_path / f"{name}.npz")["arr_0"]

    def judged(count):
        args = ["--workdir", workdir, "--num", 64, "--steps", 3, "--json"]
        outputs = cli.together("evaluate", *args, processes=count)
        told = [json.loads(output.splitlines()[-1]) for output in outputs[:1]][0]
        assert not any("fd_digits" in output for output in outputs[1:])
        return told

    np.testing.assert_allclose(drawn("several", processes), drawn("alone", 1), atol=2e-5)
    several, alone = judged(processes), judged(1)
    assert several.keys() == alone.keys()
    numbers = [name for name, value in alone.items() if isinstance(value, float)]
    assert "fd_digits" in numbers
    for name in numbers:
        if "seconds" not in name:
            assert several[name] == pytest.approx(alone[name], rel=1e-3), name
