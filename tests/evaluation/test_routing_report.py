"""The folder of numbers and pictures on the use of experts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import expert_tables, routing_report
from moe_diffusion.evaluation.categories import Categories
from moe_diffusion.evaluation.observed import ExpertLayer
from moe_diffusion.figures import blocks as block_pictures
from moe_diffusion.figures import routing as pictures

ALL = ["routing.json", "capacity.png", "experts.png", "experts_over_time.png"]
ALL += ["experts_by_class.png", "selection.png", "tokens.png", "hardest.png", "easiest.png"]
ALL += ["blocks.png", "groups.png"]


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
    tokens = {"blocks": stats["blocks"], "times": [0.0, 0.5, 1.0]}
    stats["tokens"] = tokens | {"strongest": maps.tolist(), "used": used.tolist()}
    looked_into = stats["blocks"][::2]
    stats |= {"looked_into": looked_into, "class_of_image": [names[i % 6] for i in range(12)]}
    stats["selection_by_image"] = rng.uniform(0, 1, (len(looked_into), 12, num_experts)).tolist()
    stats["selection_by_token"] = [rng.uniform(0, 1, (10, num_experts)).tolist()] * len(looked_into)
    return stats | block_stats(rng, names[:-1], times)


def block_stats(rng, names, times):
    """Four blocks, then a group of three, of which a sample passes one."""
    mse = 10 ** rng.uniform(-3, 0, (times, 5))
    share = rng.dirichlet([1, 1, 1], times)
    group = {"blocks": [4, 5, 6], "share": share.mean(0), "share_by_time": share}
    group["share_by_class"] = dict(zip(names, rng.dirichlet([1, 1, 1], len(names)), strict=True))
    found = {"layers": [0, 1, 2, 3, "4-6"], "block_mse": mse.mean(0), "block_mse_by_time": mse}
    found["block_mse_by_class"] = {name: rng.permutation(mse[0]) for name in names}
    found["groups"] = {"4-6": group}
    return json.loads(json.dumps(found, default=np.ndarray.tolist))


def categories_of(labels, number=6, shown=None):
    names = tuple(map(str, range(number)))
    return Categories("class", names, np.asarray(labels), shown or names)


def write(folder, stats, labels):
    images = np.linspace(-1, 1, len(labels) * 8 * 16).reshape(-1, 8, 16, 1).astype(np.float32)
    texts = list(map(str, labels))
    return routing_report.write_report(folder, stats, images, categories_of(labels), texts)


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
    del stats["tokens"], stats["groups"]
    (folder / "hardest.png").write_text("a picture of the user")
    (folder / "experts.png").write_text("another")
    files, missing = write(folder, stats, [0, 1, 2, 3, 4, 5])
    absent = ["tokens.png", "hardest.png", "easiest.png", "groups.png"]
    renamed = ["experts-2.png" if name == "experts.png" else name for name in ALL]
    assert files == [name for name in renamed if name not in absent] and list(missing) == absent
    assert missing["hardest.png"] == missing["easiest.png"] == "all classes use 1 experts per token"
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted([*files, "experts.png", "hardest.png"])
    assert (folder / "hardest.png").read_text() == "a picture of the user"
    assert (folder / "experts.png").read_text() == "another"


@pytest.mark.slow
def test_a_model_without_labels(tmp_path):
    stats = {name: value for name, value in make_stats().items() if "class" not in name}
    stats["class_of_image"] = []
    images = np.zeros((2, 8, 16, 1), np.float32)
    files, missing = routing_report.write_report(tmp_path, stats, images, None, None)
    absent = ["experts_by_class.png", "hardest.png", "easiest.png"]
    assert files == [name for name in ALL if name not in absent] and list(missing) == absent
    assert set(missing.values()) == {"the model takes no labels and no prompts"}


@pytest.mark.slow
def test_a_dense_model_has_blocks_alone(tmp_path):
    rng = np.random.default_rng(0)
    stats = {"times": [0.0, 0.5], "blocks": [], "num_experts": 0} | block_stats(rng, ["a", "b"], 2)
    images = np.zeros((2, 8, 16, 1), np.float32)
    files, missing = routing_report.write_report(tmp_path, stats, images, None, None)
    assert files == ["routing.json", "blocks.png", "groups.png"]
    assert set(missing.values()) == {"the model has no experts that can be watched"}


def test_the_rows_of_images_are_sorted_by_class(monkeypatch):
    """Two images of b, then two of a: white lines and names go by the order of the classes."""
    found = []
    monkeypatch.setattr(block_pictures, "_separate", lambda axes, names: found.append(names))
    stats = make_stats(layers=1) | {"class_of_image": ["b", "b", "a", "a"], "per_class": {"a": 1}}
    stats["per_class"]["b"] = 1
    stats["selection_by_image"] = np.zeros((1, 4, 4)).tolist()
    block_pictures.selection_picture(stats)
    assert found == [["a", "a", "b", "b"]]


def test_one_class_has_no_extremes():
    stats = {"blocks": [0], "per_class": {"3": 1.0, "null": 2.0}}
    made = routing_report._extreme_pictures(stats, np.zeros((2, 8, 8, 1)), categories_of([3, 3]))
    assert made == dict.fromkeys(("hardest.png", "easiest.png"), "there is only one class")


def test_the_images_of_the_extremes():
    """Classes 1 and 2 are the hardest; each image has the grey level of its class."""
    labels = np.array([2, 0, 1, 3, 1, 2, 3, 0, 1])
    levels = np.array([-1, -0.5, 0, 0.5], np.float32)
    images = np.broadcast_to(levels[labels, None, None, None], (9, 64, 64, 1))
    per_class = {"0": 1.0, "1": 3.0, "2": 2.0, "3": 1.5, "null": 0.1}
    stats = {"blocks": [0], "per_class": per_class}
    made = routing_report._extreme_pictures(stats, images, categories_of(labels))
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
    per_class = {"0": 1.0, "1": 3.0, "2": 2.0, "3": 1.5, "null": 0.1}
    stats = {"blocks": [0], "per_class": per_class}
    named = categories_of(np.arange(4), 4, ("ant", "bee", "cow", "dog"))
    for draw in routing_report._extreme_pictures(stats, np.zeros((4, 8, 8, 1)), named).values():
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
    def layers(*names):
        return [ExpertLayer(name, "", 0) for name in names]

    blocks = layers(*range(1, 24, 2))
    assert routing_report.chosen_blocks("", blocks) == [1, 9, 15, 23]  # places 0, 11/3, 22/3, 11
    assert routing_report.chosen_blocks("", layers(2, 5)) == [2, 5]
    assert routing_report.chosen_blocks("7,1,7", blocks) == [7, 1]
    streams = layers("3 image", "3 text", "13 image", "13 text", 20)
    assert routing_report.chosen_blocks("", streams) == ["3 image", "13 image", 20]
    assert routing_report.chosen_blocks("3, 20", streams) == ["3 image", "3 text", 20]
    assert routing_report.chosen_blocks("13 text", streams) == ["13 text"]
    for text in ("2", "1,2", "3 video", "1 image"):
        with pytest.raises(UserError, match="has no experts that can be watched; those that have"):
            routing_report.chosen_blocks(text, streams if "1 " in text else layers(1, 3))
    with pytest.raises(UserError, match="not a list of numbers"):
        routing_report.chosen_blocks("first", blocks)


def test_images_are_shuffled():
    order = routing_report.shuffled(50, seed=3)
    assert sorted(order) == list(range(50)) and len(set(order[:10] // 5)) > 4
    np.testing.assert_array_equal(order, routing_report.shuffled(50, seed=3))
