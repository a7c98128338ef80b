"""The whole road through the command lines: pictures, latents, training, samples, a number."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from moe_diffusion import evaluate, prepare, sample, train
from moe_diffusion.evaluation import evaluator, inception
from tests import cli, pictures
from tests.golden.inception import recipe

STEPS = 20


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Pictures, an autoencoder, and the latents that this process's eight devices made."""
    folder = tmp_path_factory.mktemp("prepared")
    photos = pictures.write_pictures(folder / "pictures")
    vae = pictures.write_autoencoder(folder / "vae-tiny")
    prepare.main(pictures.prepare_args(photos, vae, folder / "latents"))
    return photos, vae, folder / "latents"


@pytest.fixture
def small_inception(monkeypatch):
    """The network on 107x107 pixels: a tenth of the work."""
    monkeypatch.setattr(inception, "SIZE", 107)
    dims = evaluator.INCEPTION_DIMS | {"spatial": 5 * 5 * 7}
    monkeypatch.setattr(evaluator, "INCEPTION_DIMS", dims)


def train_args(latents, autoencoder, workdir, **changes):
    values = {
        "model__image_size": 8,
        "model__channels": 4,
        "model__num_classes": pictures.CLASSES,
        "data__source": f"latents:{latents}",
        "data__augment": "flip",
        "data__autoencoder": autoencoder,
        "train__num_steps": STEPS,
        "train__eval_samples": 0,
        "train__sample_every": STEPS,
        "train__samples": 4,
        "checkpoint__every": STEPS,
        "sampling__steps": 2,
        "sampling__sampler": "euler",
    } | changes
    return [*cli.digits(**values), "--workdir", str(workdir)]


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    _, vae, latents = prepared
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train.main(train_args(latents, vae, workdir))
    return workdir


def test_the_road_on_eight_devices(trained, tmp_path):
    assert [line["step"] for line in cli.metrics(trained)] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) for line in cli.metrics(trained))
    grid = np.asarray(Image.open(trained / "samples" / f"{STEPS:08}.png"))
    assert grid.shape[1] > 2 * pictures.SIDE  # pictures, not latents

    draw = ["--workdir", str(trained), "--num", "8", "--out", str(tmp_path / "grid.png")]
    sample.main([*draw, "--images", str(tmp_path / "drawn")])
    drawn = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "drawn").iterdir())]
    assert [image.shape for image in drawn] == [(64, 64, 3)] * 8
    assert np.std(drawn) > 5


@pytest.mark.slow
@pytest.mark.usefixtures("small_inception")
def test_the_end_of_the_road(prepared, trained, tmp_path, capsys):
    """A FID of random weights, from samples that are decoded, to the pictures of the beginning."""
    weights = tmp_path / "inception.safetensors"
    save_file(recipe(inception.tensor_shapes(), seed=0), weights)
    capsys.readouterr()
    evaluate.main(
        ["--workdir", str(trained), "--num", "16", "--batch", "16", "--inception", str(weights),
         "--reference", f"folder:{prepared[0]}", "--size", "64", "--json"]
    )  # fmt: skip
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["metrics"]["fid"] > 0
    assert result["autoencoder"]["name"] == "vae-tiny"


@pytest.mark.slow
def test_one_device_has_the_latents_and_losses_of_eight(prepared, tmp_path):
    photos, vae, latents = prepared
    cli.succeed("prepare", *pictures.prepare_args(photos, vae, tmp_path / "latents"))
    pictures.assert_same_latents(tmp_path / "latents", latents)
    for devices in (1, 8):
        workdir = tmp_path / f"run{devices}"
        cli.succeed("train", *train_args(latents, vae, workdir), devices=devices)
        grid = tmp_path / f"{devices}.png"
        cli.succeed("sample", "--workdir", workdir, "--num", 4, "--out", grid, devices=devices)
    one, eight = (cli.metrics(tmp_path / f"run{devices}") for devices in (1, 8))
    assert len(one) == STEPS
    for line, other in zip(one, eight, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_wrong_latents_are_refused_before_anything_is_written(prepared, tmp_path, capfd):
    vae = prepared[1]
    latents = shutil.copytree(prepared[2], tmp_path / "latents")
    other = pictures.write_autoencoder(tmp_path / "vae-other", seed=1)
    for changes, message in (
        ({"data__autoencoder": other}, "was encoded by another autoencoder (vae-tiny, "),
        ({"model__image_size": 16}, "has images of shape (8, 8, 4), the model takes (16, 16, 4)"),
        ({"model__num_classes": 3}, "has 4 classes, the model only 3"),
    ):
        wrong = train_args(latents, vae, tmp_path / "run", **changes)
        assert message in cli.refused(capfd, train.main, wrong)
    (latents / "manifest.json").rename(latents / "prepare.json")
    refusal = cli.refused(capfd, train.main, train_args(latents, vae, tmp_path / "run"))
    assert "is half prepared: run the same `prepare` command again" in refusal
    assert not (tmp_path / "run").exists()
