"""Two processes distil as one."""

from __future__ import annotations

import numpy as np
import pytest

from moe_diffusion import distill
from tests import cli
from tests.dense2moe.test_stages import MOE, arrays
from tests.dense2moe.tiny import GROUPS, teacher


@pytest.mark.slow
def test_two_processes_distil_as_one(tmp_path):
    """Importance, conversion and all stages; one of them counted twice would change the weights."""
    source = teacher(tmp_path / "teacher")
    flags = [f"--config.{change}" for change in (*MOE, *GROUPS, f"distill.teacher={source}")]
    args = ["--config", "configs/flux_tiny.py", *flags]
    stages = ("student", "shared", "experts", "groups1")
    outputs = cli.together("distill", *args, "--workdir", tmp_path / "two", processes=2)
    assert "stage groups1" in outputs[0] and "stage" not in outputs[1]
    distill.main([*args, "--workdir", str(tmp_path / "one")])  # on eight devices
    for stage in stages:
        one, two = (arrays(tmp_path / name / stage) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for path, value in one.items():
            np.testing.assert_allclose(two[path], value, atol=1e-5, err_msg=f"{stage} {path}")
