"""A workdir of an earlier version (0.1: label in place of conditions, older keys) goes on.

tests/fixtures/old_workdir was written by that version's `train` up to step 2, and what the same
version then logged for steps 3 and 4 lies beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion.sampling.load import load_workdir
from tests import cli

FIXTURES = cli.ROOT / "tests" / "fixtures"
# Of the parameters of step 2, in the order of their paths, as the earlier version read them.
DIGEST = "5216f3f27ca7ad52"


@pytest.fixture
def workdir(tmp_path):
    return shutil.copytree(FIXTURES / "old_workdir", tmp_path / "run")


def test_its_config_is_read_under_todays_names(workdir):
    config = configs.load_json(workdir / "config.json")
    assert config.model.architecture == "dit" and config.model.router.group == "batch"
    assert config.loss_weights.capacity_predictor == 0.01
    assert config.diffusion.cond_dropout == 0.1


def test_its_weights_are_read_bit_for_bit(workdir):
    _, _, variables, note = load_workdir(workdir, ema="none")
    digest = hashlib.sha256()
    for _, leaf in sorted(jax.tree_util.tree_leaves_with_path(variables), key=lambda x: str(x[0])):
        digest.update(np.asarray(leaf).tobytes())
    assert note["step"] == 2 and digest.hexdigest()[:16] == DIGEST


def test_a_run_that_began_without_flips_goes_on_without_them(tmp_path):
    """What its config.json says stays; the command must say so, too, or is refused by name."""
    spec, without = "configs/diffmoe_s.py", ["data.augment=none", "model.router.max_capacity=4"]
    configs.save_json(configs.load(spec, without), tmp_path / "config.json")
    old = configs.load_json(tmp_path / "config.json")
    assert (old.data.augment, old.model.router.max_capacity) == ("none", 4.0)
    assert configs.compare(old, configs.load(spec, without)) == []
    assert configs.compare(old, configs.load(spec)) == [
        "data.augment: none -> flip",
        "model.router.max_capacity: 4.0 -> 0.0",
    ]


def test_it_resumes_with_the_same_numbers(workdir):
    changes = {"loss_weights__capacity_predictor": 0.01, "model__router__group": "batch"}
    changes |= {"train__num_steps": 4, "checkpoint__keep_last": 1}
    output = cli.succeed("train", *cli.digits("diffmoe", **changes), "--workdir", workdir)
    assert "resuming after step 2 of 4" in output
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    expected = (FIXTURES / "old_workdir_steps_3_and_4.jsonl").read_text().splitlines()
    for line, old in zip(lines[2:], map(json.loads, expected), strict=True):
        old["capacity_predictor"] = old.pop("capacity")
        for name in old.keys() - {"images_per_sec"}:
            # The same machine gives the same bits; another may round a product otherwise.
            np.testing.assert_allclose(line[name], old[name], rtol=2e-5, err_msg=name)
