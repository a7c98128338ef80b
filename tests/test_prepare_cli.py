"""`python -m moe_diffusion.prepare`: what it leaves, however it is run, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_diffusion import classes, locks, prepare
from moe_diffusion.data.latents import Latents
from moe_diffusion.signals import RUN_AGAIN
from tests import cli, pictures


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return (
        pictures.write_pictures(folder / "pictures"),
        pictures.write_autoencoder(folder / "vae-tiny"),
    )


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """Made in this process, on eight devices."""
    out = tmp_path_factory.mktemp("undisturbed") / "latents"
    prepare.main(pictures.prepare_args(*inputs, out))
    return out


@pytest.fixture(scope="module")
def alone(inputs, undisturbed, tmp_path_factory):
    """Made by a process with one device."""
    out = tmp_path_factory.mktemp("alone") / "latents"
    cli.succeed("prepare", *pictures.prepare_args(*inputs, out))
    pictures.assert_same_latents(out, undisturbed)
    return out


def test_what_a_run_leaves_and_says(inputs, undisturbed, capsys):
    """Started again, it only says what is there."""
    before = cli.contents(undisturbed)
    prepare.main([*pictures.prepare_args(*inputs, undisturbed), "--json"])
    output = capsys.readouterr().out
    assert f"200 latents in 10 files: {undisturbed}" in output
    last = json.loads(output.splitlines()[-1])
    assert last["count"] == 200 and last["shape"] == [8, 8, 4] and last["moments"] and last["flip"]
    assert last["autoencoder"]["name"] == "vae-tiny" and last["scale"] == 0.18215
    assert cli.contents(undisturbed) == before and len(before) == 11
    manifest = json.loads(before["manifest.json"])
    assert manifest["format"] == 4
    label = {"name": "label", "shape": [], "dtype": "int32", "num_values": 4}
    assert manifest["fields"] == [label]
    assert manifest["class_names"] == [f"class_{i}" for i in range(4)]
    assert manifest["class_counts"] == [50] * 4
    table = ["classes         4", "fewest images  50  class_0", "most images    50  class_0"]
    assert output.splitlines()[:3] == table
    known = classes.of_source(Latents(str(undisturbed)))
    assert (
        known.names == tuple(manifest["class_names"]) and classes.table(known).splitlines() == table
    )
    assert manifest["source"] == f"folder:{inputs[0]}" and len(manifest["statistics"]["std"]) == 4
    batch = Latents(str(undisturbed)).take(np.arange(200))
    assert batch["label"].tolist() == [i // 50 for i in range(200)]
    assert 0.01 < batch["image"].std() < 1


def test_two_runs_in_one_folder(inputs, undisturbed, tmp_path, capfd):
    """A folder that another run works in is left alone, be it new or finished."""
    for folder in (tmp_path / "new", undisturbed):
        with locks.held(folder, "prepare"):
            before = cli.contents(folder)
            error = cli.refused(capfd, prepare.main, pictures.prepare_args(*inputs, folder))
            assert f"{folder} is in use by prepare (process {os.getpid()} on" in error
            assert cli.contents(folder) == before
    assert not (tmp_path / "new").exists()


def test_verify(undisturbed, tmp_path, capfd):
    copy = shutil.copytree(undisturbed, tmp_path / "copy")
    prepare.main(["--verify", "--out", str(copy)])
    assert f"200 latents in 10 files: {copy}" in capfd.readouterr().out
    shard = copy / "latents-00003-of-00010.array_record"
    bits = bytearray(shard.read_bytes())
    bits[-1] ^= 1  # padding, which no reader looks at
    shard.write_bytes(bits)
    error = cli.refused(capfd, prepare.main, ["--verify", "--out", copy])
    assert error.startswith(f"{shard} is damaged or of another folder: copy it again, or delete")
    error = cli.refused(capfd, prepare.main, ["--verify", "--out", tmp_path])
    assert f"{tmp_path} holds no prepared latents" in error


def test_pictures_that_are_not_square(inputs, tmp_path):
    out = tmp_path / "latents"
    args = pictures.prepare_args(inputs[0], inputs[1], out)
    prepare.main([*args, "--size", "32x48", "--shard-size", "200"])
    source = Latents(str(out))
    assert len(source) == 200 and source.image_shape == (4, 6, 4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_in_the_middle_and_run_again(inputs, alone, tmp_path, number):
    out = tmp_path / "latents"
    args = pictures.prepare_args(*inputs, out)
    with cli.started("prepare", *args) as process:
        while len(done := {path.name for path in out.glob("latents-*.json")}) < 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.001)
        process.send_signal(number)
        code, told = process.wait(), process.stdout.read()
    if number == signal.SIGTERM:
        assert code == RUN_AGAIN
        assert "stopped by SIGTERM; run the same command again to go on\n" in told
    assert not (out / "manifest.json").exists()
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
    cli.succeed("prepare", *args)
    assert cli.contents(out) == cli.contents(alone)
    finished = {path for path in times if path.with_suffix(".json").name in done}
    assert all(path.stat().st_mtime_ns == times[path] for path in finished)


@pytest.mark.slow
def test_two_processes_make_the_same_folder(inputs, alone, tmp_path):
    out = tmp_path / "latents"
    code = (
        "import jax; jax.config.update('jax_cpu_collectives_implementation', 'gloo');"
        f"from moe_diffusion import prepare; prepare.main({pictures.prepare_args(*inputs, out)})"
    )
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=cli.ROOT,
            env=cli.environment(2) | own | {"PYTHONPATH": os.fspath(cli.ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for own in cli.cluster(2)
    ]
    outputs = [process.communicate(timeout=cli.HANGS_AFTER)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert "200 latents" in outputs[0] and "200 latents" not in outputs[1]
    assert cli.contents(out) == cli.contents(alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--vae", "nowhere.safetensors"], "no weight file at nowhere.safetensors"),
        (["--size", "60"], "--size 60 is no multiple of 8"),
        (["--size", "64x60"], "--size 64x60 is no multiple of 8"),
        (["--size", "0"], "--size 0 is no size in pixels: give 256, or height x width: 256x384"),
        (["--size", "64x64x3"], "--size 64x64x3 is no size in pixels"),
        (["--size", "64x-8"], "--size 64x-8 is no size in pixels"),
        (["--source", "folder:/nowhere"], "there is no folder /nowhere"),
        (["--source", "digits"], "has images of shape (8, 8, 1), --size and --vae need (64, 64, 3"),
        (["--source", "disk"], "'disk' is unknown; known are: digits, synthetic, folder:"),
        (["--kind", "flux"], "4 latent channels and is no 'flux' autoencoder"),
        (["--shard-size", "0"], "--shard-size must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(inputs, tmp_path, capfd, change, message):
    args = [*pictures.prepare_args(*inputs, tmp_path / "out"), *change]
    assert message in cli.refused(capfd, prepare.main, args)
    assert not (tmp_path / "out").exists()


def test_other_settings_and_autoencoders_are_refused(inputs, undisturbed, tmp_path, capfd):
    before = cli.contents(undisturbed)
    other = pictures.write_autoencoder(tmp_path / "vae-tiny", seed=1)
    args = pictures.prepare_args(*inputs, undisturbed)
    assert "was written with autoencoder = {'name': 'vae-tiny', 'fingerprint'" in cli.refused(
        capfd, prepare.main, [*args, "--vae", other]
    )
    assert "was written with moments = True, now it is False" in cli.refused(
        capfd, prepare.main, [*args, "--samples"]
    )
    assert "was written with flip = True, now it is False" in cli.refused(
        capfd, prepare.main, [*args, "--no-flip"]
    )
    prepare.main([*args, "--flip"])  # what had to be said in earlier versions
    assert cli.contents(undisturbed) == before


def test_a_broken_image_stops_the_run_or_is_left_out(inputs, tmp_path, capfd):
    for label in range(2):
        (tmp_path / "pictures" / f"class_{label}").mkdir(parents=True)
        for name in ("a.png", "b.png"):
            bits = (inputs[0] / "class_0" / "000.png").read_bytes()
            (tmp_path / "pictures" / f"class_{label}" / name).write_bytes(bits)
    (tmp_path / "pictures" / "class_1" / "a.png").write_bytes(bits[:100])
    args = pictures.prepare_args(tmp_path / "pictures", inputs[1], tmp_path / "out")
    args.append("--no-flip")
    capfd.readouterr()
    with pytest.raises(SystemExit):
        prepare.main(args)
    assert "class_1/a.png cannot be read as an image" in capfd.readouterr().err
    assert not list((tmp_path / "out").glob("latents-*"))
    prepare.main([*args, "--skip-broken"])
    captured = capfd.readouterr()
    assert "3 latents in 1 files" in captured.out and "skipped: " in captured.err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert not manifest["flip"] and not Latents(str(tmp_path / "out")).mirrored
    assert manifest["count"] == 3 and manifest["skipped"][0].endswith("class_1/a.png")
    assert manifest["skipped_by_reason"] == {"unreadable image": 1}
    assert "left out: 1 for unreadable image\n" in captured.out
    assert manifest["class_counts"] == [2, 1]
