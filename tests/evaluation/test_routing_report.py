"""The folder of numbers and pictures on the use of experts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from moe_diffusion.classes import Classes
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import expert_tables, routing_report
from moe_diffusion.figures import routing as pictures

ALL = ["routing.json", "capacity.png", "experts.png", "experts_over_time.png"]
ALL += ["experts_by_class.png", "tokens.png", "hardest.png", "easiest.png"]


def make_stats(num_experts=4, layers=3, classes=6, times=5, fixed=False):
    """Statistics as the observer returns them, with random numbers."""
    rng = np.random.default_rng(0)
    shape = classes + 1, layers, num_experts
    selection = rng.uniform(0, 1, shape)
    if fixed:
        selection /= selection.sum(-1, keepdims=True)
    by_time = rng.uniform(0, 1, (times, layers, num_experts))
    at = np.linspace(0, 1, times)
    names = [*map(str, range(classes)), "null"]
    stats = {"blocks": list(range(1, 2 * layers, 2)), "num_experts": num_experts, "dropped": 0.0}
    stats |= expert_tables.tables(at, by_time, np.ones(times))
    stats["conditional"] = expert_tables.tables(at, by_time, np.ones(times))
    stats |= expert_tables.by_class(names, selection, np.ones(classes + 1))
    maps = rng.integers(-1, num_experts, (2, layers, 3, 2, 4))
    used = (maps >= 0) * (1 if fixed else 2)
    return stats | {
        "tokens": {"times": [0.0, 0.5, 1.0], "strongest": maps.tolist(), "used": used.tolist()}
    }


def write(folder, stats, labels):
    images = np.linspace(-1, 1, len(labels) * 8 * 16).reshape(-1, 8, 16, 1).astype(np.float32)
    texts = None if labels is None else list(map(str, labels))
    cond = {"label": np.asarray(labels, np.int32)}
    return routing_report.write_report(folder, stats, [1, 5], images, cond, texts)


def num_colours(path) -> int:
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


def test_a_folder_of_everything_and_then_of_less(tmp_path):
    folder, stats = tmp_path / "new", make_stats()
    files, missing = write(folder, stats, [0, 1, 2, 3, 4, 5, 0, 1])
    assert files == ALL and missing == {}
    assert sorted(path.name for path in folder.iterdir()) == sorted(ALL)
    for name in ALL[1:]:
        assert num_colours(folder / name) > 20, name
    read = json.loads((folder / "routing.json").read_text())
    assert read.keys() == stats.keys()
    np.testing.assert_allclose(read["selection"], stats["selection"], rtol=1e-4)
    np.testing.assert_allclose(np.sum(read["selection"], -1), read["per_layer"], rtol=1e-4)

    stats = make_stats(fixed=True)
    del stats["tokens"]
    (folder / "hardest.png").write_text("a picture of the user")
    (folder / "experts.png").write_text("another")
    files, missing = write(folder, stats, [0, 1, 2, 3, 4, 5])
    renamed = ["experts-2.png" if name == "experts.png" else name for name in ALL[:-3]]
    assert files == renamed and list(missing) == ALL[-3:]
    assert missing["hardest.png"] == missing["easiest.png"] == "all classes use 1 experts per token"
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted([*files, "experts.png", "hardest.png"])
    assert (folder / "hardest.png").read_text() == "a picture of the user"
    assert (folder / "experts.png").read_text() == "another"


def test_a_model_without_labels(tmp_path):
    stats = {name: value for name, value in make_stats().items() if "class" not in name}
    images = np.zeros((2, 8, 16, 1), np.float32)
    files, missing = routing_report.write_report(tmp_path, stats, [1], images, {}, None)
    assert files == [*ALL[:4], "tokens.png"]
    assert set(missing.values()) == {"the model takes no labels"}


def test_one_class_has_no_extremes():
    stats, labels = {"per_class": {"3": 1.0, "null": 2.0}}, np.array([3, 3])
    missing = routing_report._extreme_pictures(stats, np.zeros((2, 8, 8, 1)), labels)
    assert missing == dict.fromkeys(ALL[-2:], "there is only one class")


def test_the_images_of_the_extremes():
    """Classes 1 and 2 are the hardest; each image has the grey level of its class."""
    labels = np.array([2, 0, 1, 3, 1, 2, 3, 0, 1])
    levels = np.array([-1, -0.5, 0, 0.5], np.float32)
    images = np.broadcast_to(levels[labels, None, None, None], (9, 64, 64, 1))
    stats = {"per_class": {"0": 1.0, "1": 3.0, "2": 2.0, "3": 1.5, "null": 0.1}}
    made = routing_report._extreme_pictures(stats, images, labels)
    greys = {level: round((level + 1) * 127.5) for level in levels.tolist()}

    def levels_of(picture):
        pixels = np.asarray(picture().convert("L"))
        return [level for level, grey in greys.items() if (pixels == grey).sum() >= 64 * 64 * 2]

    assert levels_of(made["hardest.png"]) == [-0.5, 0]
    assert levels_of(made["easiest.png"]) == [-1, 0.5]


def test_the_extremes_have_the_names_of_their_classes(monkeypatch):
    shown = []
    monkeypatch.setattr(
        routing_report, "image_grid", lambda images, texts, **_: shown.append(texts)
    )
    stats = {"per_class": {"0": 1.0, "1": 3.0, "2": 2.0, "3": 1.5, "null": 0.1}}
    images, labels = np.zeros((4, 8, 8, 1)), np.arange(4)
    known = Classes({"label": 4}, ("ant", "bee", "cow", "dog"))
    for draw in routing_report._extreme_pictures(stats, images, labels, known).values():
        draw()
    assert shown == [["bee: 3.000", "cow: 2.000"], ["ant: 1.000", "dog: 1.500"]]


def test_many_experts_are_a_heat_map():
    stats = make_stats(num_experts=20, layers=2, classes=30)
    lines = pictures.experts_over_time_picture(make_stats(num_experts=16, layers=2), [1, 3])
    heat = pictures.experts_over_time_picture(stats, [1, 3])
    white = [(np.asarray(p) == 255).all(-1).mean() for p in (lines, heat)]
    assert white[0] > 0.6 > 0.5 > white[1]
    assert pictures.experts_by_class_picture(stats, [3]).width > 400


def test_blocks_that_are_shown():
    blocks = list(range(1, 24, 2))
    assert routing_report.chosen_blocks("", blocks) == [1, 9, 15, 23]  # places 0, 11/3, 22/3, 11
    assert routing_report.chosen_blocks("", [2, 5]) == [2, 5]
    assert routing_report.chosen_blocks("7,1,7", blocks) == [7, 1]
    with pytest.raises(UserError, match="block 2 has no experts; those with experts are 1, 3"):
        routing_report.chosen_blocks("1,2", blocks)
    with pytest.raises(UserError, match="not a list of numbers"):
        routing_report.chosen_blocks("first", blocks)


def test_conditions_are_shuffled_together():
    cond = {"label": np.arange(50) // 5, "other": np.arange(50)}
    mixed = routing_report.shuffled(cond, seed=3)
    np.testing.assert_array_equal(mixed["label"], mixed["other"] // 5)
    assert sorted(mixed["other"]) == list(range(50)) and len(set(mixed["label"][:10])) > 4
    again = routing_report.shuffled(cond, seed=3)
    np.testing.assert_array_equal(mixed["other"], again["other"])
