"""Files: whole or absent, under random temporary names, and nothing replaced that may not be."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion import writing
from moe_diffusion.benchmarks import report, tiles
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import digits
from moe_diffusion.evaluation.features import FeatureSet, save_features
from moe_diffusion.evaluation.metrics import gaussian_of
from moe_diffusion.evaluation.routing_stats import save_json, save_stats
from moe_diffusion.figures.images import save_gif, save_png, save_pngs
from moe_diffusion.interop.files import write_state_dict
from moe_diffusion.sample import save_grid, save_npz
from tests import cli
from tests.full_disk import full_disk

IMAGES = np.zeros((2, 8, 8, 1), np.float32)
VECTORS = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
PICTURE = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
STATS = {"c_infer_avg": 1.5, "blocks": [1], "times": [0.0], "per_layer_and_time": [[1.0]]}

# Every function that writes a file by itself: name of the file -> write(path).
WRITERS = {
    "text.txt": lambda path: writing.save_text("long " * 50, path),
    "arrays.npz": lambda path: writing.save_arrays(path, {"a": VECTORS}),
    "samples.npz": lambda path: save_npz(path, IMAGES, {"label": np.arange(2)}),
    "features.npz": lambda path: save_features(
        FeatureSet("a", gaussian_of(VECTORS), vectors=VECTORS), path
    ),
    "classifier.npz": lambda path: digits._store([(VECTORS, VECTORS)] * 2, path),
    "picture.png": lambda path: save_png(PICTURE, path),
    "grid.png": lambda path: save_grid(IMAGES, None, "title", path),
    "film.gif": lambda path: save_gif([PICTURE, PICTURE.rotate(90)], path, 1),
    "routing.json": lambda path: save_json(STATS, path),
    "stats.json": lambda path: save_stats(STATS, path),
    "bench.json": lambda path: report.write(path, {"device": "cpu"}, [{"what": "train"}]),
    "tiles.json": lambda path: tiles.merge(path, "cpu", {"shape": [64, 64]}),
    "config.json": lambda path: configs.save_json(configs.default(), path),
    "weights.safetensors": lambda path: write_state_dict({"a": VECTORS}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_the_old_file_stays(name, tmp_path):
    path, write = tmp_path / name, WRITERS[name]
    with full_disk(), pytest.raises(UserError) as error:
        write(path)
    message = str(error.value)
    assert message.startswith(f"cannot write {path} (") and "make room" in message
    assert "\n" not in message and list(tmp_path.iterdir()) == []
    write(path)
    before = cli.contents(tmp_path)
    with full_disk(), pytest.raises(UserError):
        write(path)
    assert cli.contents(tmp_path) == before
    write(path)  # the same kind of thing is replaced
    assert cli.contents(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_no_regular_file_stays(name, tmp_path):
    """As root a rename would replace /dev/null by a file."""
    os.mkfifo(tmp_path / name)
    with pytest.raises((UserError, OSError)):
        # `merge` reads its table first, which would wait for a writer.
        if name == "tiles.json":
            writing.save_text("", tmp_path / name)
        WRITERS[name](tmp_path / name)
    assert (tmp_path / name).is_fifo() and [p.name for p in tmp_path.iterdir()] == [name]


def test_images_that_do_not_all_fit_leave_none(tmp_path, monkeypatch):
    from moe_diffusion.figures import images as figures

    real, done = figures.save_png, []

    def save(image, path, *texts):
        if len(done) == 2:
            raise writing.WriteError("no room")
        done.append(real(image, path, *texts))
        return done[-1]

    monkeypatch.setattr(figures, "save_png", save)
    (tmp_path / ".hidden").write_text("mine")
    with pytest.raises(UserError, match="no room"):
        save_pngs(np.zeros((4, 8, 8, 1), np.float32), tmp_path)
    assert len(done) == 2 and cli.contents(tmp_path) == {".hidden": b"mine"}


def test_links_are_replaced_and_never_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").symlink_to("mine")
    for guess in (".out.part", f".out.{os.getpid()}.part", f".out.{os.getpid()}.tmp"):
        (tmp_path / guess).symlink_to("mine")
    before = {path.name for path in tmp_path.iterdir()}
    writing.save_text("new", tmp_path / "out")
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == before  # only our own file is removed


def test_a_long_name_has_a_temporary_one(tmp_path):
    path = tmp_path / ("ä" * 120 + ".txt")  # 244 bytes of at most 255
    assert writing.save_text("text", path).read_text() == "text"


def test_an_error_of_the_body_is_no_error_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError):
        with writing.whole_file(tmp_path / "out"):
            (tmp_path / "source").read_text()
    with pytest.raises(ZeroDivisionError):
        with writing.whole_file(tmp_path / "out"):
            1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_new_files_may_be_read_as_the_umask_says(tmp_path):
    umask = os.umask(0o027)
    try:
        path = writing.save_text("text", tmp_path / "out")
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_lines_are_added_whole(tmp_path):
    path = tmp_path / "lines.jsonl"
    writing.append_line('{"a": 1}', path)
    with path.open("a") as file:
        file.write('{"a": ')  # a killed process
    writing.append_line('{"b": 2}', path)
    assert path.read_text() == '{"a": 1}\n{"a": \n{"b": 2}\n'
    before = path.read_bytes()
    with full_disk(len(before) + 5), pytest.raises(UserError, match="cannot write .*lines.jsonl"):
        writing.append_line('{"c": "too long"}', path)
    assert path.read_bytes() == before


# --- what is checked before the work -----------------------------------------------------------


def png(path):
    return save_png(PICTURE, path)


REFUSED = {
    "suffix": ({"--stats": ("s.png", ".json")}, "--stats {}/s.png will be a .json file: name it"),
    "no suffix": ({"--npz": ("samples", ".npz")}, "--npz {}/samples will be a .npz file"),
    "folder": ({"--out": ("folder", ".png")}, "{}/folder is a folder: name a file in it"),
    "in a file": ({"--out": ("a.json/grid.png", ".png")}, "cannot write to {}/a.json: choose"),
    "another kind": (
        {"--npz": ("fake.npz", ".npz")}, "--npz {}/fake.npz is there and is no .npz file"
    ),
    "fifo": ({"--npz": ("fifo.npz", ".npz")}, "{}/fifo.npz is there and is no regular file"),
    "twice": (
        {"--out": ("x.png", ".png"), "--plot": ("folder/../x.png", ".png")},
        "--out and --plot are the same file {}/folder/../x.png: rename one",
    ),
    "an input": ({"--stats": ("a.json", ".json")}, "--stats {}/a.json is {}/a.json, which is read"),
    "a linked input": ({"--stats": ("link.json", ".json")}, "--stats {}/link.json is {}/a.json"),
    "in an input": (
        {"--plot": ("read/sub/p.png", ".png")}, "--plot {}/read/sub/p.png lies in {}/read, which"
    ),
    "remote": ({"--out": ("gs://b/x.png", ".png")}, "--out gs://b/x.png is remote: write into"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_outputs_that_would_be_lost_are_refused(case, tmp_path):
    outputs, message = REFUSED[case]
    (tmp_path / "folder").mkdir()
    (tmp_path / "read").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("a.json")
    (tmp_path / "fake.npz").write_text("my notes")
    os.mkfifo(tmp_path / "fifo.npz")
    before = sorted(tmp_path.rglob("*"))
    outputs = {
        flag: (path if "://" in path else f"{tmp_path}/{path}", suffix)
        for flag, (path, suffix) in outputs.items()
    }
    with pytest.raises(UserError) as error:
        writing.check_outputs(outputs, [tmp_path / "a.json", tmp_path / "read", None, "none"])
    assert message.replace("{}", str(tmp_path)) in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_outputs_of_the_same_kind_are_replaced(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"a": 1}))
    (tmp_path / "empty.npz").touch()
    png(tmp_path / "a.png")
    outputs = {
        "--out": (tmp_path / "a.png", ".png"), "--stats": (tmp_path / "s.json", ".json"),
        "--npz": (tmp_path / "empty.npz", ".npz"), "--plot": (None, ".png"),
        "--film": (tmp_path / "new" / "film.GIF", ".gif"),
    }  # fmt: skip
    writing.check_outputs(outputs, [tmp_path / "none"])


def test_the_rest_is_saved_before_an_error_is_told():
    done = []

    def fails(text):
        raise UserError(text)

    with pytest.raises(UserError, match="^first; second$"):
        writing.save_each(
            lambda: done.append(1), lambda: fails("first"), lambda: fails("second"),
            lambda: done.append(2),
        )  # fmt: skip
    assert done == [1, 2]
