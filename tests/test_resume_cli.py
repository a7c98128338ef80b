"""Runs that are stopped or killed and started again end as if nothing had happened."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_diffusion.signals import RUN_AGAIN
from tests import cli

NUM_STEPS = 24
# Saving as a run ends is slow beside 24 steps, hence seldom where it is not what is tested.
ARGS = cli.digits(
    "diffmoe",
    data__source="synthetic",  # saves the seconds that scikit-learn takes to import
    train__num_steps=NUM_STEPS,
    checkpoint__every=NUM_STEPS,
)


def arguments(workdir: Path, **changes) -> list[str]:
    overrides = [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return [*ARGS, "--workdir", str(workdir), *overrides]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    cli.succeed("train", *arguments(workdir))
    return workdir


def assert_same_run(workdir: Path, undisturbed: Path) -> None:
    """Bitwise: parameters, averages, router state, optimizer state; and data and metrics."""
    (state, data), (expected, expected_data) = (
        cli.read_checkpoint(folder, NUM_STEPS) for folder in (workdir, undisturbed)
    )
    kinds = {name.partition("/")[0] for name in expected}
    assert kinds == {"step", "params", "emas", "router_state", "opt_state"}
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    assert data == expected_data == {"next_index": NUM_STEPS}
    assert cli.metrics(workdir) == cli.metrics(undisturbed)
    assert [line["step"] for line in cli.metrics(workdir)] == list(range(1, NUM_STEPS + 1))


def wait_until(process, moment: Callable[[], bool]) -> None:
    """The process must not end before `moment()` is true."""
    while not moment():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.001)


def saving(workdir: Path, step: int) -> Callable[[], bool]:
    """Whether a checkpoint of `step` or later is being written."""

    def is_being_written() -> bool:
        unfinished = (workdir / "checkpoints").glob("*.orbax-*")
        return any(int(path.name.split(".")[0]) >= step for path in unfinished)

    return is_being_written


def resumed_at(output: str) -> int:
    return int(re.search(r"(?:resuming after|starting at) step (\d+)", output)[1])


def check_killed(workdir: Path, least: int) -> int:
    """The newest whole checkpoint of a killed run, which must be good and not before `least`."""
    newest = max(cli.saved_steps(workdir), default=0)
    assert newest >= least
    if newest:
        state, data = cli.read_checkpoint(workdir, newest)
        assert state["step"] == newest and data == {"next_index": newest}
        assert all(np.isfinite(value).all() for value in state.values())
    return newest


@pytest.mark.slow
def test_a_terminated_run_resumes(tmp_path, undisturbed):
    # Writing at some later steps makes the run long enough to be caught in the middle.
    slow = {"checkpoint__every": 7, "checkpoint__asynchronous": "false"}
    with cli.started("train", *arguments(tmp_path, **slow)) as process:
        cli.read_until(process, "step 4/")
        process.send_signal(signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait() == RUN_AGAIN == 75, output
    told = re.search(rf"^stopped by SIGTERM after step (\d+) of {NUM_STEPS}, which is saved; run "
                     "the same command again to resume$", output, re.MULTILINE)  # fmt: skip
    step = int(told[1])
    assert 4 <= step < NUM_STEPS and max(cli.saved_steps(tmp_path)) == step
    assert resumed_at(cli.succeed("train", *arguments(tmp_path))) == step
    assert_same_run(tmp_path, undisturbed)


def test_a_killed_run_resumes(tmp_path, undisturbed):
    with cli.started("train", *arguments(tmp_path, checkpoint__every=3)) as process:
        cli.read_until(process, "step 8/")  # the lines past the checkpoint are written anew
        process.kill()
    newest = check_killed(tmp_path, least=3)
    assert newest % 3 == 0

    for step, seconds in ((newest + 2, 0.0), (newest + 5, 0.05)):
        with cli.started("train", *arguments(tmp_path, checkpoint__every=1)) as process:
            assert resumed_at(cli.read_until(process, "resuming")) == newest
            wait_until(process, saving(tmp_path, step))
            time.sleep(seconds)
            process.kill()
        newest = check_killed(tmp_path, least=newest + 1)

    output = cli.succeed("train", *arguments(tmp_path))
    assert resumed_at(output) == newest
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_any_moment_resumes(tmp_path, undisturbed, seed):
    """Each kill comes some random time after the start of training, or of a write."""
    rng = random.Random(seed)
    newest, found_half = 0, False
    for number in range(12):
        with cli.started("train", *arguments(tmp_path, checkpoint__every=1)) as process:
            output = cli.read_until(process, "resuming" if newest else "starting")
            assert resumed_at(output) == newest
            if number % 2:  # a loaded machine may write late
                wait_until(process, saving(tmp_path, newest + 1))
            time.sleep(rng.uniform(0, 0.05 if number % 2 else 1.5))
            process.kill()
        found_half |= any((tmp_path / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        newest = check_killed(tmp_path, least=newest)
        if newest >= NUM_STEPS - 1:
            break
    assert found_half
    cli.succeed("train", *arguments(tmp_path))
    assert_same_run(tmp_path, undisturbed)
