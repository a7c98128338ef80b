"""From pictures that are not square to a model, by command lines that are killed on the way."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import train
from tests import cli, pictures

pytestmark = pytest.mark.slow
SIDES = [(64, 64), (48, 80), (90, 50), (70, 64), (40, 66), (64, 60)]
COUNT, NUM_STEPS = 72, 12
OVERRIDES = {
    "model__patch_size": 2,
    "model__image_size": 8,
    "model__channels": 4,
    "model__num_classes": 3,
    "data__batch_size": 8,
    "train__num_steps": NUM_STEPS,
    "checkpoint__every": NUM_STEPS,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for index in range(COUNT):
        pixels = np.random.default_rng(index).integers(0, 256, (*SIDES[index % 6], 3))
        path = folder / "pictures" / f"class_{index % 3}" / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder / "pictures", pictures.write_autoencoder(folder / "vae-tiny")


def prepare_args(inputs, out) -> list[str]:
    return [
        *("--source", f"folder:{inputs[0]}", "--sizes", "64x64,48x80,80x48,16x160"),
        *("--vae", str(inputs[1]), "--shard-size", "5", "--workers", "2", "--out", str(out)),
    ]


@pytest.fixture(scope="module")
def prepared(inputs, tmp_path_factory):
    """Made on one device, as those that are killed: others may round the last bit differently."""
    out = tmp_path_factory.mktemp("prepared") / "latents"
    cli.succeed("prepare", *prepare_args(inputs, out))
    return out


def train_args(latents, workdir, positions="rope2d", **changes) -> list[str]:
    changes = OVERRIDES | {"model__positions": positions} | changes
    source = f"--config.data.source=latents:{latents}"
    return [*cli.digits("token_choice", **changes), source, "--workdir", str(workdir)]


def test_prepare_is_killed_and_goes_on(inputs, prepared, tmp_path):
    out = tmp_path / "latents"
    with cli.started("prepare", *prepare_args(inputs, out)) as process:
        while len(list(out.glob("latents-*.json"))) < 4:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.001)
        process.kill()
    assert not (out / "manifest.json").exists() and (out / "buckets.npz").exists()
    printed = cli.succeed("prepare", *prepare_args(inputs, out), "--json")
    assert cli.contents(out) == cli.contents(prepared)
    last = json.loads(printed.splitlines()[-1])
    assert last["buckets"] == [[8, 8, 4], [6, 10, 4], [10, 6, 4], [2, 20, 4]]
    assert last["bucket_counts"] == [36, 24, 12, 0]


def test_training_is_killed_and_ends_bit_for_bit_the_same(prepared, tmp_path):
    whole, killed, positions = tmp_path / "whole", tmp_path / "killed", "sincos"
    printed = cli.succeed("train", *train_args(prepared, whole, positions))
    assert "bucket          8x8x4           36 images" in printed
    assert "bucket         2x20x4            0 images" in printed
    told = re.findall(r"compiling for images of shape (\S+) \.\.\.\ncompiled in", printed)
    assert len(told) == len(set(told)) == 2  # and one before the first step
    with cli.started("train", *train_args(prepared, killed, positions, checkpoint__every=1)) as run:
        cli.read_until(run, "step 7/")
        run.kill()
    newest = max(cli.saved_steps(killed))
    assert 1 <= newest < NUM_STEPS  # the newest ones may not be whole
    printed = cli.succeed("train", *train_args(prepared, killed, positions))
    assert f"resuming after step {newest} of {NUM_STEPS}" in printed
    (state, data), (expected, _) = (cli.read_checkpoint(w, NUM_STEPS) for w in (killed, whole))
    assert state.keys() == expected.keys() and data == {"next_index": NUM_STEPS}
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    assert cli.metrics(killed) == cli.metrics(whole)


def test_pictures_and_evaluation_are_of_the_size_of_the_config(prepared, tmp_path):
    every = {"train__sample_every": 2, "train__num_steps": 2, "train__eval_samples": 4}
    changes = every | {"model__image_size": 10, "model__image_width": 6, "train__samples": 3}
    changes |= {"optim__warmup_steps": 1}
    cli.succeed("train", *train_args(prepared, tmp_path, **changes))
    assert (tmp_path / "samples" / "00000002.png").exists()
    assert "eval/fd_pooled" in cli.metrics(tmp_path)[-1]
    printed = cli.succeed(
        "sample", "--workdir", str(tmp_path), "--num", "2", "--out", tmp_path / "x.png"
    )
    assert "x.png" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__image_size": 12}, "has images of shape (8, 8, 4) or (6, 10, 4) or"),
        (
            {"model__patch_size": 4},
            "images of shape 6x10x4: size 48x80: this model draws multiples",
        ),
        (
            {"data__batch_size": 40},
            "data.batch_size = 40 exceeds the images of every bucket; the la",
        ),
    ],
)
def test_what_does_not_fit_is_refused(prepared, tmp_path, capfd, changes, message):
    args = train_args(prepared, tmp_path / "run", **changes)
    assert message in cli.refused(capfd, train.main, args)
    assert not (tmp_path / "run").exists()


def test_images_of_small_buckets_are_left_out(prepared, tmp_path):
    changes = {"data__batch_size": 16, "train__num_steps": 3}
    printed = cli.succeed("train", *train_args(prepared, tmp_path, **changes))
    line = "bucket         10x6x4           12 images  left out: fewer than data.batch_size = 16"
    assert line in printed and "shape 10x6x4" not in printed
