"""The three stages: what each trains, resuming in any, and errors before anything is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from moe_diffusion import distill
from moe_diffusion.dense2moe.stage_configs import dense_of, stage_named, stages
from moe_diffusion.errors import UserError
from moe_diffusion.sampling.load import load_config, load_workdir
from moe_diffusion.training.checkpoint import saved_steps
from tests import cli
from tests.dense2moe.tiny import DENSE, EXPERTS, GROUPS, STEPS, config_of, teacher

MOE = (*DENSE, *EXPERTS, *STEPS, "model.adaln_rank=4")


def test_the_stages_of_a_config():
    config = config_of(*EXPERTS, *GROUPS, *STEPS, "model.adaln_rank=4", "model.moe.skip_first=0")
    config.model.mob.groups = ("0-1", "2-4")
    found = {stage.name: stage.config for stage in stages(config)}
    assert list(found) == ["shared", "experts", "groups1", "groups2"]
    groups = [tuple(c.model.mob.groups) for c in found.values()]
    assert groups == [("none",), ("none",), ("0-1",), ("0-1", "2-4")]
    assert [c.model.router.top_k for c in found.values()] == [0, 2, 2, 2]
    weights = [set(c.loss_weights) for c in found.values()]
    assert weights == [
        set(),
        {"balance"},
        {"balance", "block_balance"},
        {"balance", "block_balance"},
    ]
    assert found["shared"].optim.trainable == ("*/shared/*", "layers_*adaLN/*")
    assert found["experts"].optim.trainable == ("*/experts/*", "*/router/*")
    assert found["groups1"].optim.trainable == ("*/members/*", "*/block_router/*")


def test_modulation_is_trained_in_the_stage_that_is_named():
    for when, expected in (
        ("both", [True, True]),
        ("experts", [False, True]),
        ("none", [False] * 2),
    ):
        config = config_of(*EXPERTS, *STEPS, "model.adaln_rank=4", f"distill.adaln_stage={when}")
        config.distill.groups.steps = 0
        trained = ["layers_*adaLN/*" in stage.config.optim.trainable for stage in stages(config)]
        assert trained == expected


def test_a_planned_teacher_is_dense_and_whole():
    config = dense_of(config_of(*EXPERTS, *GROUPS, "model.adaln_rank=4"))
    assert (config.model.router.name, config.model.adaln_rank) == ("dense", 0)
    assert tuple(config.model.mob.groups) == ("none",)


def test_a_stage_that_is_not_there():
    config = config_of(*EXPERTS, *STEPS)
    with pytest.raises(UserError, match="has no stage 'groups1'; it has shared, experts"):
        stage_named(config, "groups1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("distill.teacher=",), "distill.teacher names no folder"),
        (("distill.teacher=nowhere",), "nowhere is not a workdir"),
        (("model.moe.num_experts=11",), "60, but the teacher's MLPs have 64"),
        (("model.hidden_size=32", "model.num_heads=4"), "is another model"),
        (("model.mob.groups=1-3",), "has blocks of several kinds"),
        (("model.mob.groups=2-3,3-4",), "overlaps the group before it"),
        (("model.mob.groups=2-5",), "leaves the model, whose blocks are 0-4"),
        (("model.mob.groups=2-4", "model.mob.active=4"), "exceeds the 3 blocks of the group"),
        (("distill.shared.trainable=nothing",), "'nothing' matches no parameter"),
        (("distill.shared.steps=0", "distill.experts.steps=0"), "has no stage with steps"),
    ],
)
def test_errors_before_anything_is_written(tmp_path, changes, message):
    source = teacher(tmp_path / "teacher")
    said = (*MOE, f"distill.teacher={source}", "distill.groups.steps=0", *changes)
    with pytest.raises(UserError, match=message):
        distill.run("configs/flux_tiny.py", str(tmp_path / "w"), said)
    assert not (tmp_path / "w").exists()


def test_a_router_without_top_k_is_refused(tmp_path):
    source = teacher(tmp_path / "teacher")
    said = [x for x in MOE if not x.startswith("model.router.")]
    said += ["model.router.name=expert_choice", "model.router.capacity=3.0"]
    said += [f"distill.teacher={source}"]
    with pytest.raises(UserError, match="set model.router.name=token_choice"):
        distill.run("configs/flux_tiny.py", str(tmp_path / "w"), said)


def arrays(folder):
    _, _, variables, _ = load_workdir(folder, ema="none")
    return {k: np.asarray(x) for k, x in flatten_dict(variables["params"], sep="/").items()}


@pytest.mark.slow
def test_all_stages_in_turn_and_resumed(tmp_path):
    """First stage (a) alone, then all; each stage trains its own part alone."""
    source = teacher(tmp_path / "teacher")
    workdir = tmp_path / "w"
    said = (*MOE, *GROUPS, f"distill.teacher={source}")
    only = (*said, "distill.experts.steps=0", "distill.groups.steps=0")
    first = distill.run("configs/flux_tiny.py", str(workdir), only)
    assert first["stage"] == str(workdir / "shared") and first["step"] == 2
    before = arrays(workdir / "shared")
    change = ("distill.experts.steps", "distill.groups.steps")
    last = distill.run("configs/flux_tiny.py", str(workdir), said, change)
    assert last["stage"] == str(workdir / "groups1")
    assert [p.name for p in sorted(workdir.iterdir()) if p.is_dir()] == [
        *("experts", "groups1", "shared", "student")
    ]
    student, shared, experts = (arrays(workdir / n) for n in ("student", "shared", "experts"))
    for path, value in before.items():
        np.testing.assert_array_equal(shared[path], value)

    def changed(a, b):
        return {path for path in a if not np.array_equal(a[path], b[path])}

    moved = changed(student, shared)
    assert moved and all("/shared/" in p or "adaLN/" in p for p in moved)
    moved = changed(shared, experts)
    assert moved and all("/experts/" in p or "/router/" in p for p in moved)
    groups, start = arrays(workdir / "groups1"), arrays(workdir / "groups1" / "start")
    moved = changed(start, groups)
    assert moved and all("/members/" in p or "/block_router/" in p for p in moved)
    assert saved_steps(workdir / "groups1") == [2]
    assert tuple(load_config(workdir / "groups1").model.mob.groups) == ("2-4",)
    again = distill.run("configs/flux_tiny.py", str(workdir), said)
    assert again == last
    lines = (workdir / "groups1" / "metrics.jsonl").read_text().splitlines()
    named = set(json.loads(lines[-1]))
    assert {"distill", "feature", "balance", "block_balance", "load_max"} <= named


@pytest.mark.slow
def test_the_command(tmp_path):
    source = teacher(tmp_path / "teacher")
    flags = [f"--config.{change}" for change in (*MOE, f"distill.teacher={source}")]
    flags += ["--config.distill.groups.steps=0"]
    name = ("distill", "--config", "configs/flux_tiny.py", "--workdir", str(tmp_path / "w"))
    result = cli.run(*name, *flags, "--json")
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["stage"].endswith("experts") and told["step"] == told["num_steps"] == 2
    assert "importance of hidden units, 3 batches" in result.stdout
