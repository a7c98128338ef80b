"""A model that knows more classes than its data has: every command draws what was trained."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion import routing, sample, train
from moe_diffusion.data import sources
from moe_diffusion.evaluation import protocol, runs
from moe_diffusion.figures import images as figures
from moe_diffusion.models import build
from moe_diffusion.sampling import hooks
from tests import cli

NAMES = ["cat", "grey owl", "me@home:7"]


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """6, 7 and 8 pictures of 8x8 pixels, and a hidden folder."""
    folder = tmp_path_factory.mktemp("data") / "pets"
    rng = np.random.default_rng(0)
    for number, name in enumerate([*NAMES, ".ipynb_checkpoints"]):
        (folder / name).mkdir(parents=True)
        for i in range(6 + number):
            pixels = rng.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def arguments(pets, workdir, **changes):
    changes = {
        "data__source": f"folder:{pets}",
        "data__augment": "none",
        "sampling__steps": 2,
    } | changes
    return [*cli.digits(**changes), "--workdir", str(workdir)]


@pytest.fixture(scope="module")
def trained(pets, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train.main(arguments(pets, workdir))
    return workdir


def test_a_run_keeps_its_classes(trained, pets):
    assert json.loads((trained / "data.json").read_text()) == {
        "source": f"folder:{pets}",
        "records": 21,
        "num_values": {"label": 3},
        "class_names": NAMES,
        "class_counts": [6, 7, 8],
    }


def test_pictures_during_training_show_what_is_trained(pets, tmp_path, monkeypatch):
    shown = []
    grid = hooks.image_grid
    monkeypatch.setattr(hooks, "image_grid", lambda *a, **k: shown.append(a[1]) or grid(*a, **k))
    config = configs.load("configs/digits.py", ["train.samples=6"])
    source = sources.open_images(f"folder:{pets}", (8, 8, 1))
    hook = hooks.SampleHook(config, build(config.model), tmp_path, source)
    assert hook._samples.cond["label"].tolist() == [0, 0, 1, 1, 2, 2]
    monkeypatch.setattr(hook._samples, "draw", lambda state: np.zeros((6, 8, 8, 1)))
    hook(1, None)
    assert shown == [[name for name in NAMES for _ in range(2)]]


def test_training_says_what_the_data_is_and_refuses_other_classes(trained, pets, tmp_path, capfd):
    workdir = shutil.copytree(trained, tmp_path / "run")
    capfd.readouterr()
    train.main(arguments(pets, workdir))
    output = capfd.readouterr()
    table = ["classes        3", "fewest images  6  cat", "most images    8  me@home:7"]
    table += ["the data has 3 of the 10 classes that the model knows: only these are drawn"]
    assert output.out.splitlines()[1:5] == table
    assert output.err.count(f"left out of {pets}: .ipynb_checkpoints") == 1
    more = shutil.copytree(pets, tmp_path / "pets")
    (more / ".ipynb_checkpoints").rename(more / "bat")
    stored = (workdir / "data.json").read_text()
    (workdir / "data.json").write_text(stored.replace(str(pets), str(more)))
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace(str(pets), str(more)))
    before = cli.contents(workdir)
    message = cli.refused(capfd, train.main, arguments(more, workdir, train__num_steps=4))
    assert "has other classes than when" in message and "class 0 was cat, now it is bat" in message
    assert cli.contents(workdir) == before


def draw(trained, tmp_path, *args):
    files = ["--out", tmp_path / "grid.png", "--npz", tmp_path / "samples.npz"]
    sample.main([str(a) for a in ("--workdir", trained, "--num", 6, *files, *args)])
    with np.load(tmp_path / "samples.npz") as arrays:
        return arrays["labels"].tolist()


def test_samples_are_of_what_was_trained(trained, tmp_path, capfd, monkeypatch):
    shown = []
    grid = figures.image_grid
    monkeypatch.setattr(figures, "image_grid", lambda *a, **k: shown.append(a[1]) or grid(*a, **k))
    assert draw(trained, tmp_path) == [0, 0, 1, 1, 2, 2]
    assert "the data has 3 of the 10 classes" in capfd.readouterr().out
    assert draw(trained, tmp_path, "--labels", "me@home:7,1") == [2, 2, 2, 1, 1, 1]
    assert "classes: 1 grey owl, 2 me@home:7" in capfd.readouterr().out
    assert shown == [[n for n in NAMES for _ in range(2)], [NAMES[2]] * 3 + [NAMES[1]] * 3]
    (tmp_path / "names").write_text("Katze\nEule\nHaus\n")
    names = ["--class-names", tmp_path / "names"]
    assert draw(trained, tmp_path, *names, "--labels", "Eule") == [1] * 6
    common = ["--workdir", trained, "--out", tmp_path / "no.png"]
    for flags, message in (
        (["--labels", "7"], "--labels: 7 is no class; the data of this run has 0 to 2"),
        (["--labels", "gray owl"], "--labels: no class is called 'gray owl'; nearest: grey owl"),
        ([*names, "--labels", "cat"], "--labels: no class is called 'cat'; nearest: Katze"),
        (["--class-names", tmp_path / "grid.png"], "grid.png cannot be read"),
    ):
        assert message in cli.refused(capfd, sample.main, [*common, *flags])
    assert not (tmp_path / "no.png").exists()


def test_without_a_record_everything_is_drawn_as_before(trained, tmp_path, capfd):
    """As of runs of earlier versions and of converted weights."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "data.json").unlink()
    assert draw(workdir, tmp_path) == [0, 1, 2, 3, 4, 5]
    (tmp_path / "names").write_text("\n".join("abcdefghij"))
    names = ["--class-names", tmp_path / "names"]
    assert draw(workdir, tmp_path, *names, "--labels", "j,4") == [9, 9, 9, 4, 4, 4]
    (workdir / "data.json").write_text("{")
    args = ["--workdir", workdir, "--out", tmp_path / "no.png"]
    assert "data.json is not valid JSON" in cli.refused(capfd, sample.main, args)


@pytest.mark.parametrize("kind", ["balanced", "random"])
def test_evaluation_draws_what_was_trained(kind, trained, monkeypatch):
    drawn = []
    monkeypatch.setattr(runs, "generate_batches", lambda *a, **k: drawn.append(a[2]["label"]) or [])
    settings = protocol.default()
    settings.labels = kind
    run = runs.RunImages(trained, settings)
    assert list(run.batches(64, 60)) == []
    labels, counts = np.unique(drawn, return_counts=True)
    assert labels.tolist() == [0, 1, 2] and counts.sum() == 60
    assert kind == "random" or counts.tolist() == [20] * 3
    (warning,) = run.warnings
    assert warning.startswith("the data has 3 of the 10 classes that the model knows")


@pytest.mark.slow
def test_the_report_on_experts_names_the_classes(trained, tmp_path, capfd):
    args = ["--workdir", trained, "--num", 12, "--steps", 2, "--out", tmp_path / "report"]
    routing.main(list(map(str, args)))
    stats = json.loads((tmp_path / "report" / "routing.json").read_text())
    assert sorted(stats["per_class"]) == ["0", "1", "2", "null"]
    assert "the data has 3 of the 10 classes" in capfd.readouterr().out


def test_a_source_may_have_any_path(pets, tmp_path):
    """`folder:me@host/val` and so on are paths, not splits."""
    for name in ("me@host", "a:b", "two words", "comma,semicolon;"):
        place = shutil.copytree(pets, tmp_path / name / "val")
        override = f"--config.data.source=folder:{place}"
        config = configs.load("configs/digits.py", [override])
        assert config.data.source == f"folder:{place}"
        source = sources.open_images(config.data.source, (8, 8, 1))
        assert source.class_names == NAMES and len(source) == 21
