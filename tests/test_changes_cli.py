"""`train --allow-change`: what may change as a run is resumed, and what is written about it."""

from __future__ import annotations

import datetime
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion import train
from moe_diffusion.config.changes import ORDER, record_changes
from moe_diffusion.config.defaults import COMPUTATION, DEFAULTS, FIXED, RUN_CONTROL
from moe_diffusion.errors import UserError
from tests import cli

RATE = "optim.learning_rate"


def arguments(workdir, data, **changes):
    """A run on the images of `data`, with no memory but its parameters and moments."""
    options = {"data__source": f"folder:{data}", "ema__decays": "()", "checkpoint__every": 2}
    return [*cli.digits("dense", **options | changes), "--workdir", str(workdir)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "here"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def two_steps(images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    train.main(arguments(workdir, images, train__num_steps=2))
    return workdir


def changes_of(workdir):
    return [json.loads(line) for line in (workdir / "changes.jsonl").read_text().splitlines()]


def test_moved_data_go_on_bit_for_bit(images, two_steps, tmp_path, capfd):
    """The same records under another path: the run ends as one that nobody disturbed."""
    plain, moved = tmp_path / "plain", tmp_path / "moved"
    shutil.copytree(two_steps, plain)
    shutil.copytree(two_steps, moved)
    there = shutil.copytree(images, tmp_path / "there")
    train.main(arguments(plain, images, train__num_steps=4))
    args = arguments(moved, there, train__num_steps=4)
    before = cli.contents(moved)
    error = cli.refused(capfd, train.main, args)
    assert f"(data.source: folder:{images} -> folder:{there}): choose another workdir" in error
    assert error.endswith("set these back to resume, or go on with --allow-change data.source")
    assert cli.contents(moved) == before

    train.main([*args, "--allow-change", "data.source,optim.b1"])  # the second need not change
    out = capfd.readouterr().out
    assert f"changed: data.source: folder:{images} -> folder:{there}\n" in out
    assert "the data's order: batch n is now batch n of the new settings" in out
    assert cli.metrics(moved) == cli.metrics(plain)
    states = [cli.read_checkpoint(workdir, 4) for workdir in (plain, moved)]
    for path, array in states[0][0].items():
        np.testing.assert_array_equal(array, states[1][0][path], err_msg=path)
    assert states[0][1] == states[1][1] == {"next_index": 4}

    (line,) = changes_of(moved)
    time = datetime.datetime.fromisoformat(line.pop("time"))
    assert abs(datetime.datetime.now(datetime.UTC) - time) < datetime.timedelta(hours=1)
    values = {"old": f"folder:{images}", "new": f"folder:{there}"}
    assert line == {"step": 2, "key": "data.source", **values}
    assert configs.load_json(moved / "config.json").data.source == f"folder:{there}"
    assert not (plain / "changes.jsonl").exists()
    # From now on the new value is the run's own.
    train.main(arguments(moved, there, train__num_steps=5))
    assert len(changes_of(moved)) == 1
    error = cli.refused(capfd, train.main, arguments(moved, images, train__num_steps=5))
    assert f"folder:{there} -> folder:{images}" in error


def test_another_learning_rate(images, two_steps, tmp_path):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    args = arguments(workdir, images, train__num_steps=3, optim__learning_rate=0.02)
    train.main([*args, "--allow-change", RATE])
    # After a warm-up of 2 steps the rate of the third is the whole one.
    assert [line["learning_rate"] for line in cli.metrics(workdir)] == pytest.approx(
        [0, 0.05, 0.02]
    )
    (line,) = changes_of(workdir)
    assert (line["step"], line["key"], line["old"], line["new"]) == (2, RATE, 0.1, 0.02)


@pytest.mark.parametrize(
    ("allowed", "changes", "message"),
    [
        (
            "optim.lr",
            {},
            "--allow-change: unknown config key 'optim.lr'; the nearest is optim.lear",
        ),
        ("optim", {}, "--allow-change: 'optim' is a section of the config, not a key; set one in"),
        (
            "model.hidden_size",
            {"model__hidden_size": 32},
            "--allow-change model.hidden_size: model.hidden_size: 16 -> 32 cannot be, because the "
            "stored weights are those of that model: set it back to resume, or begin another run",
        ),
        ("ema.decays", {"ema__decays": "0.5"}, "ema.decays: () -> (0.5,) cannot be, because these"),
        (
            RATE,
            {"model__hidden_size": 32, "seed": 1, "optim__learning_rate": 0.5},
            "(model.hidden_size: 16 -> 32; seed: 0 -> 1): choose another workdir, or set these "
            "back to resume, or go on with --allow-change seed",
        ),
        ("", {"model__hidden_size": 32}, "(model.hidden_size: 16 -> 32): choose another workdir, "),
    ],
)
def test_what_is_refused(images, two_steps, capfd, allowed, changes, message):
    before = cli.contents(two_steps)
    args = [*arguments(two_steps, images, train__num_steps=3, **changes), "--allow-change", allowed]
    error = cli.refused(capfd, train.main, args)
    assert message in error and error.count("--allow-change") <= 1
    assert cli.contents(two_steps) == before


def test_no_key_of_the_tables_is_unknown():
    """And a key that decides over stored arrays is in none that may change."""
    known = configs.settle(DEFAULTS).to_dict() | {
        "model": DEFAULTS["model"] | {"jit": {"dropout": 0}}
    }

    def exists(key):
        place = known
        for name in key.strip(".").split("."):
            if name not in place:
                return False
            place = place[name]
        return True

    for key in (*COMPUTATION, *FIXED, *ORDER, *RUN_CONTROL):
        assert exists(key), key
    assert not any(key.startswith(RUN_CONTROL) for key in (*COMPUTATION, *FIXED, *ORDER))


def test_a_change_of_how_to_compute_is_no_change_of_the_model():
    old = configs.load("configs/digits.py")
    new = configs.load("configs/digits.py", ["model.remat=full", "model.moe.backend=blocked"])
    keys = ["model.remat", "model.moe.backend"]
    changes = configs.allowed_changes(old, new, keys, "run")
    assert [str(change) for change in changes] == [
        "model.moe.backend: auto -> blocked",
        "model.remat: none -> full",
    ]
    wide = configs.load("configs/digits.py", ["model.moe.hidden_size=8"])
    with pytest.raises(UserError, match="cannot be, because the stored weights are those of that"):
        configs.allowed_changes(old, wide, ["model.moe.hidden_size"], "run")


def test_a_line_is_written_once(tmp_path):
    """A run that is killed between the record and its config.json repeats the change."""
    changes = [configs.Change("data.augment", "none", "flip"), configs.Change("x", (0.5,), None)]
    record_changes(tmp_path, 2, changes)
    record_changes(tmp_path, 2, changes)
    record_changes(tmp_path, 4, changes[:1])
    record_changes(tmp_path, 5, [])
    lines = changes_of(tmp_path)
    assert [(line["step"], line["key"], line["old"], line["new"]) for line in lines] == [
        (2, "data.augment", "none", "flip"),
        (2, "x", [0.5], None),
        (4, "data.augment", "none", "flip"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["changes.jsonl"]
    for text in ('{"step": 2', "[1]"):
        (tmp_path / "changes.jsonl").write_text(text + "\n")
        with pytest.raises(
            UserError, match="^.*changes.jsonl is damaged .*: mend it, or move it aw"
        ):
            record_changes(tmp_path, 2, changes)
        assert (tmp_path / "changes.jsonl").read_text() == text + "\n"
