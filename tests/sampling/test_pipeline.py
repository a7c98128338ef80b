"""`moe_diffusion.load(...)`: the same images as the command line, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import moe_diffusion
from moe_diffusion import interop, sample
from moe_diffusion.errors import UserError
from moe_diffusion.interop import autoencoder as autoencoders
from moe_diffusion.models.autoencoder import Autoencoder, AutoencoderKL
from tests import cli
from tests.sampling.tiny_run import STEP, make_run

GOLDEN = cli.ROOT / "tests" / "goldens" / "dsmoe_rope2d"
NAMES = [f"digit {i}" for i in range(10)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, make_run(folder, class_names=NAMES)


@pytest.fixture(scope="module")
def pipe(run):
    return moe_diffusion.load(run[0])


def raises(message):
    return pytest.raises(UserError, match=f"^[^\n]*{re.escape(message)}[^\n]*$")


def test_the_images_of_the_command_line(run, pipe, tmp_path):
    args = ["--workdir", run[0], "--labels", "3,7", "--num", 4, "--seed", 2, "--cfg", 1.5]
    args += ["--sampler", "euler", "--npz", tmp_path / "x.npz", "--out", tmp_path / "x.png"]
    sample.main([str(arg) for arg in args])
    with np.load(tmp_path / "x.npz") as arrays:
        expected, labels = arrays["arr_0"], arrays["labels"]
    assert labels.tolist() == [3, 3, 7, 7]
    settings = {"cfg": 1.5, "sampler": "euler", "seed": 2}
    images = pipe([3, 7], num=4, **settings)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(pipe([3, 3, 7, 7], **settings), expected)
    np.testing.assert_array_equal(
        pipe(["digit 3", 3, "digit 7", np.int64(7)], **settings), expected
    )
    np.testing.assert_array_equal(pipe(jax.numpy.array([3, 3, 7, 7]), **settings), expected)
    assert len(pipe._samplers) == 1
    assert np.abs(pipe([3, 3, 7, 7], **settings | {"cfg": 3}) - expected).max() > 1e-4
    # Neither the batch nor what a call drew before changes an image.
    np.testing.assert_allclose(pipe([3, 3], **settings, batch_size=1), expected[:2], atol=1e-6)


def test_numbers_and_pictures(pipe):
    """-1 is 0, 1 is 255, and v is round((v + 1) * 127.5)."""
    images = pipe(4, num=2, steps=2)
    pixels = pipe(4, num=2, steps=2, output="uint8")
    assert pixels.dtype == np.uint8 and pixels.shape == images.shape == (2, 8, 8, 1)
    np.testing.assert_array_equal(pixels, np.rint((images.clip(-1, 1) + 1) * 127.5))
    pictures = pipe("digit 4", num=2, steps=2, output="pil")
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), pixels[..., 0])
    assert pipe(num=3).shape == (3, 8, 8, 1)
    labels = {"label": np.array([4, 4], np.int32)}
    np.testing.assert_array_equal(pipe(cond=labels, steps=2), images)


def test_which_weights(run):
    """The first average, which is half of the live weights; a checkpoint by its folder."""
    folder, live = run
    leaf = lambda p: p.variables["params"]["label_embed"]["embedding"]  # noqa: E731
    wanted = live["params"]["label_embed"]["embedding"]
    pipe = moe_diffusion.load(folder / "checkpoints" / str(STEP))
    assert pipe.note == {"step": STEP, "ema": "0.9"} and list(pipe.known.names) == NAMES
    np.testing.assert_array_equal(leaf(pipe), wanted / 2)
    np.testing.assert_array_equal(leaf(moe_diffusion.load(folder, ema="none")), wanted)
    other = moe_diffusion.load(folder, overrides=["sampling.cfg=1", "model.dtype=bfloat16"])
    assert other.config.sampling.cfg == 1 and other.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "the number of images is not clear: say labels or num"),
        ({"labels": [10]}, "labels: 10 is no class; this model knows 0 to 9"),
        ({"labels": [-1]}, "labels: -1 is no class; this model knows 0 to 9"),
        ({"labels": []}, "labels is empty: name at least one class"),
        ({"labels": [1.5]}, "labels: 1.5 is neither the number nor the name of a class"),
        ({"labels": [True]}, "labels: True is neither the number nor the name of a class"),
        ({"labels": "cat"}, "labels: no class is called 'cat'; nearest: digit 0 is one"),
        ({"labels": 1, "steps": 0}, "sampling.steps = 0 must be positive"),
        (
            {"labels": 1, "step": 2},
            "unknown config key 'sampling.step'; the nearest is sampling.st",
        ),
        ({"labels": 1, "cfg": "high"}, "sampling.cfg = 'high' is not a number"),
        ({"labels": 1, "sampler": "ddim"}, "sampling.sampler = ddim does not fit diffusion.path"),
        ({"labels": 1, "output": "png"}, "output='png' is unknown; choose float | uint8 | pil"),
        ({"labels": 1, "num": 0}, "num and batch_size must be at least 1"),
        ({"labels": 1, "seed": -1}, "seed = -1 must be from 0 to 2^63 - 1"),
        ({"labels": 1, "seed": 2**64}, "must be from 0 to 2^63 - 1"),
        ({"labels": [1, 2], "cond": {"text": np.zeros((2, 3))}}, "has the field 'text', which the"),
        ({"num": 3, "cond": {"label": np.zeros(2, np.int32)}}, "there are [2, 3] of them"),
        ({"cond": {"label": np.zeros(2, np.int64)}}, "'label' as int64[], the model takes int32[]"),
    ],
)
def test_impossible_calls(pipe, arguments, message):
    with raises(message):
        pipe(**arguments)


def test_no_names(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / "data.json").unlink()
    with raises("labels: 'three' is not a number like 3"):
        moe_diffusion.load(folder)("three")
    (folder / "data.json").write_text("[")
    with raises(f"{folder / 'data.json'} is not valid JSON"):
        moe_diffusion.load(folder)


def test_impossible_places(run, tmp_path):
    folder = run[0]
    (tmp_path / "empty").mkdir()
    with raises("empty holds no checkpoints and no weights: name a run, or a weight file"):
        moe_diffusion.load(tmp_path / "empty")
    with raises("no weight file at "):
        moe_diffusion.load(tmp_path / "nothing.safetensors", "dit")
    with raises("is a workdir: leave out family='dit'"):
        moe_diffusion.load(folder, "dit")
    with raises("is a weight file: leave out step=3"):
        moe_diffusion.load(GOLDEN / "weights.safetensors", step=3)
    with raises("is the checkpoint of another step than 3: leave out step"):
        moe_diffusion.load(folder / "checkpoints" / str(STEP), step=3)
    with raises("has no checkpoint of step 3; it has: 5"):
        moe_diffusion.load(folder, step=3)
    with raises("choose one of dit, "):
        moe_diffusion.load(GOLDEN / "weights.safetensors", "flax")


def test_a_file_of_the_authors(tmp_path):
    """By its hyperparameters as a table, as a file, and as a file beside it; as `load_torch`."""
    shutil.copy(GOLDEN / "weights.safetensors", tmp_path)
    path = tmp_path / "weights.safetensors"
    with raises("there is no .yaml file beside"):
        moe_diffusion.load(path, "dsmoe")
    hparams = json.loads((GOLDEN / "config.json").read_text())
    table = hparams.get("model", hparams)
    table = table.get("params", table)
    pipes = [
        moe_diffusion.load(path, "dsmoe", table, overrides=["sampling.steps=1"]),
        moe_diffusion.load(path, "dsmoe", GOLDEN / "config.json"),
    ]
    shutil.copy(GOLDEN / "config.json", tmp_path / "weights.json")
    pipes.append(moe_diffusion.load(path))  # no other family has such names
    assert [pipe.note["family"] for pipe in pipes] == ["dsmoe"] * 3
    assert pipes[0].note["hparams"] == "the arguments"
    assert pipes[2].note["hparams"] == str(tmp_path / "weights.json")
    _, expected = interop.load_torch(path, "dsmoe", table)
    for pipe in pipes:
        jax.tree.map(np.testing.assert_array_equal, pipe.variables, expected)
    assert pipes[0].config.sampling.steps == 1
    assert pipes[0](2, cfg=1.0).shape == (1, 8, 8, 4)
    with raises(
        "output='pil' needs images, and these are latents of 4 channels: load with autoenc"
    ):
        pipes[0](2, cfg=1.0, output="pil")

    interop.files.write_state_dict({"a.b": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "weights.safetensors", tmp_path / "folder")
    shutil.copy(GOLDEN / "config.json", tmp_path / "folder" / "weights.json")
    jax.tree.map(
        np.testing.assert_array_equal, moe_diffusion.load(tmp_path / "folder").variables, expected
    )
    with raises("its names fit none: pass family="):
        moe_diffusion.load(tmp_path / "x.safetensors")
    assert len(load_file(path)) > 10


@pytest.mark.slow
def test_latents_are_decoded(run, tmp_path):
    """An autoencoder of 4 latent channels that makes 16 x 16 pixels of 8 x 8 latents."""
    network = AutoencoderKL(
        block_channels=(8, 8), latent_channels=4, layers_per_block=1, norm_groups=4
    )
    image = np.zeros((1, 16, 16, 3), np.float32)
    params = jax.jit(network.init)(jax.random.key(0), image)["params"]
    autoencoder = Autoencoder(network, params, "tiny")
    autoencoders.save(autoencoder, tmp_path / "vae")
    shutil.copy(GOLDEN / "weights.safetensors", tmp_path)
    how = {"family": "dsmoe", "hparams": GOLDEN / "config.json", "overrides": ["sampling.steps=1"]}
    path = tmp_path / "weights.safetensors"
    pipe = moe_diffusion.load(path, autoencoder=tmp_path / "vae", **how)
    images, latents = pipe([1, 2], cfg=1.0), pipe([1, 2], cfg=1.0, decode=False)
    assert images.shape == (2, 16, 16, 3) and latents.shape == (2, 8, 8, 4)
    np.testing.assert_allclose(images, autoencoder.decode(latents), atol=1e-5)
    assert pipe([1], cfg=1.0, output="pil")[0].size == (16, 16)
    given = moe_diffusion.load(path, autoencoder=autoencoder, **how)
    assert given.autoencoder is autoencoder
    with raises("has 4 latent channels, the model 1 (model.channels): choose another"):
        moe_diffusion.load(run[0], autoencoder=tmp_path / "vae")
