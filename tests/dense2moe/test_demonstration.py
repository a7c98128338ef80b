"""The demonstration: rivals of equal size, what its rows say, and all of it in two minutes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion.dense2moe import comparison, demonstration
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.models.accounting import parameter_counts
from tests import cli


def activated(spec):
    return parameter_counts(build(configs.load(spec).model))["total"].activated


@pytest.mark.parametrize("match", ["l", "m"])
@pytest.mark.parametrize("how", ["mlp", "depth"])
def test_a_pruned_rival_has_no_fewer_activated_parameters(how, match):
    ours = activated(f"digits_flux_moe:level={match}")
    theirs = activated(f"digits_flux_pruned:how={how},match={match}")
    assert 0.995 * ours < theirs < 1.025 * ours


def test_a_rival_trains_for_as_many_steps():
    for match, stages in (("l", 2), ("m", 3)):
        ours = configs.load(f"digits_flux_moe:level={match}").distill
        theirs = configs.load(f"digits_flux_pruned:match={match}").distill
        assert theirs.shared.steps == stages * ours.shared.steps == stages * ours.experts.steps


def test_distance_by_hand():
    """Pixels in [-1, 1] count in [0, 1]; beyond they are clipped: differences 0.5 and 1, then 0."""
    a = np.array([[[[0.0], [-3.0]]], [[[1.0], [1.0]]]])
    b = np.array([[[[1.0], [1.0]]], [[[1.0], [2.0]]]])
    assert comparison.rms(a, b) == pytest.approx((np.sqrt((0.25 + 1) / 2) + 0) / 2)


def test_means_over_seeds():
    row = {"name": "L", "distance": 0.1, "right": 1.0}
    means = comparison.mean_rows([[row], [row | {"distance": 0.3}]])
    assert means[0]["distance"] == pytest.approx(0.2)
    assert means[0]["from_to"]["distance"] == (0.1, 0.3)
    text = comparison.mean_table(means, ("right", "distance"))
    assert "0.2000 (0.1000-0.3000)" in text and "1.0000" in text


def test_a_row_is_flat():
    row = comparison.Row("L", 2, 1, 3.0, 0.5, {"prompt_accuracy": 0.9}, 0.1)
    told = row.told()
    assert told["prompt_accuracy"] == 0.9 and "scores" not in told and told["name"] == "L"


def test_some_students():
    some = demonstration.FLUX.only(["random", "mlp_m"])
    assert list(some.runs) == ["random", "mlp_m"]
    assert list(some.rows) == ["MLPs pruned, as M", "shared only, random"]
    assert list(demonstration.DIT.only(["scratch"]).rows) == ["experts from scratch"]
    with pytest.raises(UserError, match=r"no student is called \['mop'\]: there are moe, random"):
        demonstration.FLUX.only(["mop"])


@pytest.mark.slow
def test_two_minutes_of_it(tmp_path):
    """A teacher of 200 steps; after 25 steps Taylor's split is nearer to it than a random one."""
    teacher, workdir = tmp_path / "teacher", tmp_path / "demo"
    short = {"train.num_steps": 200, "optim.warmup_steps": 20, "data.batch_size": 64}
    short |= {"train.sample_every": 0, "sampling.steps": 6}
    flags = [f"--config.{key}={value}" for key, value in short.items()]
    options = {"optimize": True, "timeout": 900}
    train = ["--config", "configs/digits_flux.py", "--workdir", teacher, *flags]
    cli.succeed("train", *train, **options)
    steps = {"shared": 25, "experts": 30, "groups": 0}
    flags = [f"--config.distill.{stage}.steps={number}" for stage, number in steps.items()]
    flags += ["--config.distill.shared.learning_rate=5e-4"]
    flags += ["--config.distill.importance_batches=8", "--students=moe,random", "--images=100"]
    output = cli.succeed(
        "distill_demo", "--teacher", teacher, "--workdir", workdir, *flags, **options
    )
    told = json.loads(output.splitlines()[-1])
    rows = {row["name"]: row for row in told["rows"]}
    names = ["L: experts", "shared only, Taylor", "shared only, random"]
    assert list(rows) == ["teacher", *names]
    fields = {field.name for field in dataclasses.fields(comparison.Row)} - {"scores"}
    assert all(fields | {"prompt_accuracy", "fd_digits"} == set(row) for row in rows.values())
    assert rows["teacher"]["distance"] == 0 < rows["L: experts"]["distance"]
    taylor, random = (rows[f"shared only, {name}"]["distance"] for name in ("Taylor", "random"))
    assert taylor < random
    assert rows["L: experts"]["activated"] < 0.65 * rows["teacher"]["activated"]
    with Image.open(told["picture"]) as image:
        assert image.width > 600
