"""Roads of the pages with models of labels: `demo`, a DiT that becomes experts, all families."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from docs import draw_families
from moe_diffusion import config as configs
from moe_diffusion import demo, distill, train
from moe_diffusion.models import build
from tests import cli


@pytest.mark.slow
def test_digits_by_their_labels(tmp_path, capfd):
    flags = ["--config.sampling.steps=1", "--config.sampling.sampler=euler"]
    demo.main([*cli.digits(), *flags, "--workdir", str(tmp_path)])
    *lines, last = capfd.readouterr().out.splitlines()
    result = json.loads(last)
    assert {"class_accuracy", "nearest_train_distance", "seconds"} <= result.keys()
    assert lines[-1].startswith("120 of 1000 drawn digits: ")
    Image.open(result["picture"]).verify()


@pytest.mark.slow
def test_a_dit_becomes_experts(tmp_path, capfd):
    """`distill` with the config of the pages: a dense teacher, its units dealt to experts."""
    teacher, workdir = tmp_path / "teacher", tmp_path / "moe"
    small = ["model.depth=2", "model.hidden_size=16", "model.num_heads=2", "data.batch_size=8"]
    small += ["train.sample_every=0", "train.eval_samples=0", "ema.decays=()"]
    dense = [*small, "train.num_steps=2", "optim.warmup_steps=1"]
    train.run("digits:router=dense", str(teacher), dense)
    changes = [*small, f"distill.teacher={teacher}", "distill.importance_batches=2"]
    changes += [f"distill.{stage}.steps=2" for stage in ("shared", "experts")]
    changes += ["optim.warmup_steps=1"]
    changes += ["model.moe.shared_hidden_size=16", "model.moe.hidden_size=4"]  # 16 + 12 * 4 = 64
    flags = [f"--config.{change}" for change in changes]
    distill.main(["--config", "configs/digits_moe.py", "--workdir", str(workdir), *flags, "--json"])
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert told["stage"] == str(workdir / "experts") and told["step"] == told["num_steps"] == 2
    assert sorted(path.name for path in workdir.iterdir() if path.is_dir()) == [
        *("experts", "shared", "student"),
    ]


@pytest.mark.parametrize("name", draw_families.FAMILIES)
def test_families_of_the_picture_are_small(name):
    spec, changes = draw_families.FAMILIES[name]
    config = configs.load(spec, [*changes, "train.num_steps=600"])
    assert build(config.model, sorted(config.loss_weights)).input_shape == (8, 8, 1)


@pytest.mark.slow
def test_a_picture_of_families(tmp_path, monkeypatch, capsys):
    few = {name: draw_families.FAMILIES[name] for name in ("DSMoE", "JiT")}
    monkeypatch.setattr(draw_families, "FAMILIES", few)
    out, changes = tmp_path / "x.png", ["--config.sampling.steps=1", "--config.model.depth=2"]
    changes += ["--config.optim.warmup_steps=1", "--config.data.batch_size=8", "--steps", "2"]
    changes += ["--config.train.eval_samples=0", "--config.model.jit.in_context_start=1"]
    places = ["--workdir", str(tmp_path), "--flux", str(tmp_path / "none"), "--out", str(out)]
    draw_families.main([*places, *changes])
    assert capsys.readouterr().out.split() == ["DSMoE", "JiT", str(out)]
    with Image.open(out) as picture:
        assert picture.height > 2 * 32
