"""`python -m moe_diffusion.sample`: what it draws and writes, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion import sample
from moe_diffusion.figures import images as figures
from moe_diffusion.sampling import film, flags
from tests import cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    args = cli.digits(
        train__num_steps=12,
        checkpoint__every=4,
        train__sample_every=12,
        train__samples=4,
        sampling__steps=2,
    )
    cli.succeed("train", *args, "--workdir", workdir)
    return workdir


def draw(workdir, out, *args):
    """Six images in out/; returns images f32[6, 8, 8, 1] and labels i32[6]."""
    files = ["--out", out / "grid.png", "--npz", out / "samples.npz"]
    fixed = ["--workdir", workdir, "--num", 6, "--steps", 2, *files, *args]
    sample.main([str(arg) for arg in fixed])
    with np.load(out / "samples.npz") as arrays:
        return arrays["arr_0"], arrays["labels"]


@pytest.fixture(scope="module")
def reference(trained, tmp_path_factory):
    """The images of seed 0, drawn by a real process, its folder and what it printed."""
    out = tmp_path_factory.mktemp("reference")
    files = ["--out", out / "grid.png", "--npz", out / "samples.npz", "--images", out / "singles"]
    args = ["--workdir", trained, "--num", 6, "--steps", 2, *files, "--json"]
    output = cli.succeed("sample", *args)
    with np.load(out / "samples.npz") as arrays:
        assert sorted(arrays) == ["arr_0", "labels"]
        return arrays["arr_0"], arrays["labels"], out, output


def test_training_draws_at_intervals(trained):
    (picture,) = (trained / "samples").iterdir()
    assert picture.name == "00000012.png"
    assert len(np.unique(np.asarray(Image.open(picture).convert("L")))) > 20


def test_a_real_process_writes_grid_array_and_single_images(reference):
    images, labels, out, output = reference
    assert images.shape == (6, 8, 8, 1) and images.dtype == np.float32
    assert images.std() > 0.1 and np.isfinite(images).all()
    assert labels.tolist() == [0, 1, 2, 3, 4, 5] and labels.dtype == np.int32
    assert sorted(p.name for p in out.iterdir()) == ["grid.png", "samples.npz", "singles"]
    assert sorted(p.name for p in (out / "singles").iterdir()) == [f"{i:06}.png" for i in range(6)]
    with Image.open(out / "singles" / "000005.png") as image:
        single = np.asarray(image)
        said = {"label": "5", "image": "5", "seed": "0", "steps": "2", "size": "8x8", "step": "12"}
        assert image.text.items() >= said.items() and "guidance" not in image.text
    expected = np.rint((np.clip(images[5, :, :, 0], -1, 1) + 1) * 127.5)
    np.testing.assert_array_equal(single, expected)

    grid = np.asarray(Image.open(out / "grid.png").convert("L"))
    assert grid.shape[0] > 2 * 64 and grid.shape[1] > 3 * 64  # 2 rows of 3, 8 times enlarged
    enlarged = expected.repeat(8, 0).repeat(8, 1)
    windows = np.lib.stride_tricks.sliding_window_view(grid, enlarged.shape)
    corners = np.argwhere(windows[:, :, 0, 0] == enlarged[0, 0])
    assert sum((windows[y, x] == enlarged).all() for y, x in corners) == 1

    assert f"6 images: {out}/grid.png" in output
    last = json.loads(output.splitlines()[-1])
    assert last.items() >= {
        "num": 6, "out": f"{out}/grid.png", "step": 12, "ema": "0.5", "sampler": "heun",
        "steps": 2, "cfg": 2.0, "joint": False,
    }.items()  # fmt: skip
    assert last.keys() >= set(configs.default().sampling)


def test_the_same_seed_draws_the_same_bytes(trained, reference, tmp_path):
    draw(trained, tmp_path)
    for name in ("grid.png", "samples.npz"):
        assert (tmp_path / name).read_bytes() == (reference[2] / name).read_bytes(), name


def test_other_seeds_and_images_start_from_other_noise(trained, reference, tmp_path):
    images, labels = draw(trained, tmp_path, "--seed", 1, "--labels", 7)
    assert labels.tolist() == [7] * 6
    for image, other in itertools.combinations([*images, *reference[0]], 2):
        assert np.abs(image - other).max() > 0.5


def test_the_batch_size_does_not_change_the_images(trained, reference, tmp_path):
    images, labels = draw(trained, tmp_path, "--batch", 4)
    np.testing.assert_allclose(images, reference[0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(labels, reference[1])


def test_labels_choose_the_classes(trained, reference, tmp_path):
    images, labels = draw(trained, tmp_path, "--labels", "5,2,9")
    assert labels.tolist() == [5, 5, 2, 2, 9, 9]
    # The same noise: what differs from the images of classes 0 to 5 is due to the class.
    np.testing.assert_allclose(images[2], reference[0][2], rtol=0, atol=1e-5)
    assert np.abs(images[0] - reference[0][0]).max() > 1e-3


def test_weights_and_sampler_can_be_chosen(trained, reference, tmp_path, capsys):
    seen = [reference[0]]
    for args in (
        ["--ema", "0.9"],
        ["--step", "8", "--ema", "none"],
        ["--sampler", "euler", "--cfg", "1"],
        ["--config.model.router.top_k=1"],
    ):
        images, _ = draw(trained, tmp_path, *args, "--json")
        for other in seen:
            assert np.abs(images - other).max() > 1e-4, args
        seen.append(images)
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        for name, value in zip(args[::2], args[1::2], strict=False):
            assert str(last[name.removeprefix("--")]).removesuffix(".0") == value


def test_help_shows_how_to_draw(capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--help"])
    output = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "python -m moe_diffusion.sample --workdir runs/digits --num 64" in output
    for option in ("--labels", "--cfg", "--sampler", "--steps", "--ema", "--npz", "--images"):
        assert option in output


IMPOSSIBLE = [
    (["--ema", "0.7"], "the run keeps no average of decay 0.7; it keeps: 0.5, 0.9"),
    (["--step", "9"], "/run/checkpoints has no checkpoint of step 9; it has: 4, 8, 12"),
    (["--sampler", "rk4"], "sampling.sampler = 'rk4' is unknown; choose heun | euler | dopri5"),
    (["--sampler", "ddim"], "sampling.sampler = ddim does not fit diffusion.path = flow"),
    (["--steps", "0"], "sampling.steps = 0 must be positive"),
    (["--cfg", "-1"], "sampling.cfg = -1.0 must be zero or positive"),
    (["--num", "0"], "--num, --num-per-class, --num-per-prompt and --batch must be at least 1"),
    (
        ["--num-per-class", "0"],
        "--num, --num-per-class, --num-per-prompt and --batch must be at least 1",
    ),
    (["--stats", "{}/s.png"], "--stats {}/s.png will be a .json file: name it so"),
    (["--npz", "{}/s.npy"], "--npz {}/s.npy will be a .npz file: name it so"),
    (["--trajectory", "{}/film.mp4"], "--trajectory {}/film.mp4 will be a .png file: name it so"),
    (
        ["--trajectory", "{}/new/grid.png"],
        "--trajectory and --out are the same file {}/new/grid.png: rename one",
    ),
    (
        ["--stats", "{}/new/grid.json"],
        "the picture beside --stats and --out are the same file {}/new/grid.png: rename one",
    ),
    (["--npz", "{}/singles/a.npz"], "--npz lies in the folder of --images: choose another place"),
    (["--stats", "{run}/config.json"], "--stats {run}/config.json is {run}/config.json, which is"),
    (["--labels", "3,10"], "--labels: 10 is no class; this model knows 0 to 9"),
    (["--labels=-1"], "--labels: -1 is no class; this model knows 0 to 9"),
    (["--labels", "three"], "--labels: 'three' is not a number like 3"),
    (["--config.sampling.cgf=1"], "'sampling.cgf'; the nearest is sampling.cfg"),
    (["--config.model.router.top_k=5"], "top_k = 5 exceeds model.moe.num_experts = 4: lower it"),
]


@pytest.mark.parametrize("args, message", IMPOSSIBLE, ids=[args[-1] for args, _ in IMPOSSIBLE])
def test_an_impossible_wish_writes_nothing(args, message, trained, tmp_path, capfd):
    before = cli.contents(trained)
    out = ["--out", tmp_path / "new" / "grid.png", "--images", tmp_path / "singles"]
    args = [text.replace("{run}", str(trained)).replace("{}", str(tmp_path)) for text in args]
    message = message.replace("{run}", str(trained)).replace("{}", str(tmp_path))
    assert message in cli.refused(capfd, sample.main, ["--workdir", trained, *out, *args])
    assert not list(tmp_path.iterdir())
    assert cli.contents(trained) == before


@pytest.mark.parametrize(
    "args, message",
    [
        (["--out", "file/grid.png"], "cannot write to {}/file: choose another folder"),
        (["--out", "folder"], "{}/folder is a folder: name a file in it"),
        (["--images", "file"], "cannot write to {}/file: choose another folder"),
        (["--npz", "file/a/b.npz"], "cannot write to {}/file: choose another folder"),
        (["--npz", "text.npz"], "--npz {}/text.npz is there and is no .npz file: choose another"),
        (
            ["--images", "old"],
            "--images {}/old is not empty, and its files would be taken for new ones: choose "
            "another folder, or empty this one",
        ),
    ],
)
def test_a_place_that_cannot_be_written(args, message, trained, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "text.npz").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "000000.png").write_text("old")
    before = cli.contents(tmp_path)
    where = ["--workdir", trained, "--out", tmp_path / "grid.png", args[0], tmp_path / args[1]]
    assert cli.refused(capfd, sample.main, where).startswith(message.format(tmp_path))
    assert cli.contents(tmp_path) == before


def test_so_many_of_each_class(trained, tmp_path):
    args = ["--workdir", trained, "--steps", 2, "--out", tmp_path / "a.png"]
    args += ["--num-per-class", 3, "--labels", "5,2", "--npz", tmp_path / "some.npz"]
    sample.main(list(map(str, args)))
    with np.load(tmp_path / "some.npz") as arrays:
        assert arrays["labels"].tolist() == [5, 5, 5, 2, 2, 2]
    of_all = ["--workdir", trained, "--num-per-class", 3]
    args, overrides = sample.parse(list(map(str, of_all)))
    labels = flags.conditions(flags.open_run(args, overrides), args)["label"]
    assert labels.tolist() == [i // 3 for i in range(30)]


@pytest.mark.parametrize("preset", ["dp", pytest.param("tp", marks=pytest.mark.slow), "fsdp"])
def test_devices_share_the_work(preset, trained, tmp_path):
    """Three images on eight devices, and the states on their way, are those of one device."""

    def drawn(name, *more):
        args = ["--workdir", trained, "--num", 3, "--steps", 2, "--npz", tmp_path / f"{name}.npz"]
        args += ["--out", tmp_path / f"{name}.png", "--trajectory", tmp_path / f"{name}.gif"]
        sample.main(list(map(str, [*args, *more])))
        with np.load(tmp_path / f"{name}.npz") as arrays:
            return arrays["arr_0"]

    expected = drawn("one")
    np.testing.assert_allclose(drawn(preset, "--preset", preset), expected, rtol=0, atol=1e-5)
    assert (tmp_path / f"{preset}.gif").stat().st_size > 100


def test_a_film_ends_with_the_images(trained, tmp_path, monkeypatch):
    """Of heun's 5 steps; the images of the film are those of the array."""
    kept = []
    monkeypatch.setattr(film, "save_film", lambda *args: kept.append(args))
    args = ["--workdir", trained, "--steps", 5, "--num", 3, "--batch", 2]
    args += ["--npz", tmp_path / "a.npz", "--out", tmp_path / "a.png"]
    args += ["--trajectory", tmp_path / "film.gif"]
    sample.main(list(map(str, args)))
    ((states, steps, texts, title, path),) = kept
    assert states.shape == (3, 5, 8, 8, 1) and steps.tolist() == [1, 2, 3, 4, 5]
    assert texts == ["0", "1", "2"] and path == str(tmp_path / "film.gif")
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_allclose(states[:, -1], arrays["arr_0"], rtol=0, atol=1e-5)
    assert np.abs(states[:, 0] - states[:, -1]).max() > 0.5  # the first is nearly noise


def test_the_rest_is_saved_if_the_picture_fails(trained, tmp_path, capfd, monkeypatch):
    """Arrays, numbers and single images are there; the one line is the last."""

    def broken(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr(figures, "image_grid", broken)
    args = ["--workdir", trained, "--steps", 2, "--num", 2, "--out", tmp_path / "a.png"]
    args += ["--npz", tmp_path / "a.npz", "--stats", tmp_path / "s.json"]
    args += ["--images", tmp_path / "singles"]
    with pytest.raises(SystemExit) as stopped:
        sample.main(list(map(str, args)))
    error = capfd.readouterr().err.splitlines()[-1]
    wanted = f"error: cannot draw {tmp_path}/a.png (no font): what is not named here is written"
    assert stopped.value.code == 2 and error == wanted
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    singles = ["singles", "singles/000000.png", "singles/000001.png"]
    assert found == ["a.npz", "s.json", "s.png", *singles]


def test_a_folder_without_a_run_in_a_real_process(tmp_path):
    out = tmp_path / "grid.png"
    result = cli.run("sample", "--workdir", tmp_path / "nothing", "--out", out)
    error = cli.the_one_error(result.returncode, result.stderr)
    assert error.startswith(f"{tmp_path}/nothing is not a workdir (it has no config.json)")
    assert "train into it first" in error
    assert not list(tmp_path.iterdir())


def test_a_run_without_checkpoints(trained, tmp_path, capfd):
    shutil.copy(trained / "config.json", tmp_path)
    args = ["--workdir", tmp_path, "--out", tmp_path / "grid.png"]
    assert "holds no checkpoints: train into it first" in cli.refused(capfd, sample.main, args)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("item", ["state/_METADATA", "state/manifest.ocdbt", "state/d"])
def test_a_truncated_checkpoint(item, trained, tmp_path, capfd):
    """The largest file of the index or the array data is cut in half."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    found = workdir / "checkpoints" / "12" / item
    largest = max([found, *found.glob("*")], key=lambda path: path.is_file() * path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    before = cli.contents(tmp_path)
    error = cli.refused(capfd, sample.main, ["--workdir", workdir, "--out", tmp_path / "grid.png"])
    assert f"checkpoint {workdir}/checkpoints/12 is damaged" in error
    assert error.endswith("or delete that folder to fall back on step 8")
    assert cli.contents(tmp_path) == before


@pytest.mark.parametrize(
    "change, message",
    [
        ("hidden_size=32", "params/final/adaLN/bias is (32,), should be (64,)"),
        ("router.selection_bias=true", "/moe/router/bias is absent, should be (1, 4)"),
        ("moe.shared_hidden_size=16", "/moe/shared/down/kernel is absent, should be (1, 16, 16)"),
        ("moe.bias=false", "/moe/experts/down_bias is (1, 4, 16), should be absent"),
    ],
)
def test_a_checkpoint_of_another_model(change, message, trained, tmp_path, capfd):
    """Whether config.json was changed or --config says something else."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    args = ["--workdir", workdir, "--out", tmp_path / "grid.png"]
    override = f"--config.model.{change}"
    path = workdir / "config.json"
    error = cli.refused(capfd, sample.main, [*args, override])
    configs.save_json(configs.load_json(path, [override]), path)
    before = cli.contents(tmp_path)
    assert cli.refused(capfd, sample.main, args) == error
    assert f"the checkpoint is of another model than {path} and --config describe" in error
    assert message in error and "use the config that it was trained with" in error
    assert cli.contents(tmp_path) == before
