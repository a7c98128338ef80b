"""Two processes distil as one."""

from __future__ import annotations

import numpy as np
import pytest

from tests import cli
from tests.dense2moe.test_stages import MOE, arrays
from tests.dense2moe.tiny import GROUPS, teacher


@pytest.mark.slow
def test_two_processes_distil_as_one(tmp_path):
    """Importance and conversion, losses and gradients of all stages, and the weights.

    One element in ten thousand may be further away: Adam divides a gradient by its own size, so
    that where it is nearly nothing (1e-10 where 2e-5 is usual), its rounding becomes a step.
    """
    source = teacher(tmp_path / "teacher")
    flags = [f"--config.{change}" for change in (*MOE, *GROUPS, f"distill.teacher={source}")]
    args = ["--config", "configs/flux_tiny.py", *flags]
    two, one = tmp_path / "two", tmp_path / "one"
    outputs = cli.together("distill", *args, "--workdir", two, processes=2, devices=2)
    assert "stage groups1" in outputs[0] and "stage" not in outputs[1]
    cli.together("distill", *args, "--workdir", one, processes=1, devices=4)
    student, whole = (arrays(place / "student") for place in (two, one))
    assert student.keys() == whole.keys()
    for path, value in whole.items():
        np.testing.assert_allclose(student[path], value, atol=1e-6, err_msg=path)
    for stage in ("shared", "experts", "groups1"):
        ours, theirs = (_steps(place / stage) for place in (two, one))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=stage)
        trained, whole = (arrays(place / stage) for place in (two, one))
        assert trained.keys() == whole.keys()
        distances = {path: np.abs(trained[path] - value) for path, value in whole.items()}
        assert {path: d.mean() for path, d in distances.items() if d.mean() >= 1e-6} == {}, stage
        far = np.concatenate([d.ravel() for d in distances.values()]) > 1e-5
        assert far.mean() < 1e-4, stage


def _steps(workdir):
    """(loss, norm of the gradient) of every step."""
    found = [(line["loss"], line["grad_norm"]) for line in cli.metrics(workdir)]
    assert found
    return found
