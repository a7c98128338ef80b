"""`python -m moe_diffusion.train`: what it leaves, on how many devices, and what it refuses."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil

import jax
import pytest

from moe_diffusion import config as configs
from moe_diffusion import locks, sample, train
from tests import cli

ARGS = cli.digits()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run; tests that change it change a copy. Returns its output, too."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, cli.succeed("train", *ARGS, "--workdir", workdir, "--json")


@pytest.fixture(scope="module")
def on_one_device(trained, tmp_path_factory):
    """router -> metrics of every step."""

    @functools.cache
    def metrics(router):
        if router == "token_choice":
            return cli.metrics(trained[0])
        workdir = tmp_path_factory.mktemp(router) / "run"
        cli.succeed("train", *cli.digits(router), "--workdir", workdir)
        return cli.metrics(workdir)

    return metrics


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "copy")


def test_what_a_run_prints_and_leaves(trained):
    workdir, output = trained
    first, *_, last = output.splitlines()
    assert first == "digits_token_choice_tiny: 1,437 images, 1 x cpu, preset dp"
    assert json.loads(last) == {"step": 3, "num_steps": 3, "workdir": str(workdir)}
    assert (
        "routed experts" in output
        and "\ndispatch of experts: " in output
        and "step 3/3: loss" in output
        and "\nspeed        " in output
        and "\nexperts      busiest " in output
    )
    kinds = {path.name.split(".")[0] for path in workdir.iterdir()}
    files = {"config", "data", "events", "heartbeat", "loss", "metrics", "parameters", "summary"}
    assert kinds == files | {"checkpoints"}
    assert cli.saved_steps(workdir) == [1, 2, 3]
    assert json.loads((workdir / "config.json").read_text())["model"]["hidden_size"] == 16
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_left_alone(trained, capsys):
    workdir, _ = trained
    before = cli.contents(workdir)
    train.main([*ARGS, "--workdir", str(workdir)])
    assert f"already trained: {workdir} is at step 3 of 3" in capsys.readouterr().out
    before.pop("loss.png")  # drawn again
    assert before.items() <= cli.contents(workdir).items()


def test_help_shows_how_to_start_and_resume():
    output = cli.succeed("train", "--help")
    assert "python -m moe_diffusion.train --config configs/digits.py --workdir" in output
    assert "run the same command again to resume" in output
    assert "--json" in output and "--config.optim.learning_rate=5e-4" in output


@pytest.mark.parametrize(
    "router, preset",
    [
        pytest.param("token_choice", "fsdp", marks=pytest.mark.slow),
        ("token_choice", "fsdp_ep"),
        pytest.param("diffmoe", "zero1", marks=pytest.mark.slow),
        pytest.param("diffmoe", "fsdp_ep", marks=pytest.mark.slow),
        pytest.param("token_choice", "dp", marks=pytest.mark.slow),
        pytest.param("token_choice", "zero1", marks=pytest.mark.slow),
        pytest.param("diffmoe", "dp", marks=pytest.mark.slow),
        pytest.param("diffmoe", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_have_the_numbers_of_one(router, preset, on_one_device, tmp_path, capsys):
    """Losses, router losses, expert loads and gradient norms, before and after an update."""
    args = cli.digits(router, parallel__preset=preset, parallel__expert=4)
    train.main([*args, "--workdir", str(tmp_path)])
    assert f", 8 x cpu, preset {preset}" in capsys.readouterr().out
    found, expected = cli.metrics(tmp_path), on_one_device(router)
    assert len({line["loss"] for line in found}) == len(found) == len(expected) == 3
    for line, wanted in zip(found, expected, strict=True):
        assert line.keys() == wanted.keys() >= {"loss", "mse", "grad_norm", "load_max"}
        for name, value in wanted.items():
            same = value is None or math.isclose(line[name], value, rel_tol=1e-5)
            assert same, (name, line, wanted)


IMPOSSIBLE = [
    (["--config.optim.learning_rat=1"], "'optim.learning_rat'; the nearest is optim.learning_rate"),
    (["--config.model.heads=1"], "unknown config key 'model.heads'; the nearest is model.num_head"),
    (["--config.train.num_steps=many"], "train.num_steps = 'many' is not an integer"),
    (["--config.train.num_steps=1.5"], "train.num_steps = 1.5 is not an integer"),
    (["--config.model.moe.bias=2"], "model.moe.bias = 2 is not true or false"),
    (["--config.ema.decays=high"], "ema.decays = 'high' is not a list of numbers like 0.5,1.0"),
    (["--config.parallel.preset=ddp"], "preset = 'ddp' is unknown; choose dp | zero1 | fsdp"),
    (["--config.model.num_heads=3"], "model.num_heads = 3 does not divide model.hidden_size = 16"),
    (["--config.model.router.top_k=5"], "top_k = 5 exceeds model.moe.num_experts = 4: lower it"),
    (["--config.model.router.n_group=3"], "n_group = 3 does not divide model.moe.num_experts = 4"),
    (
        ["--config.loss_weights.capacity=1"],
        "loss_weights.capacity_predictor is no loss of model.router",
    ),
    (["--config.data.batch_size=12"], "cannot be split evenly over 8 devices: make it a multiple"),
    (["--config.model.num_classes=5"], "has 10 classes, the model only 5: set model.num_classes"),
    (["--config.model.image_size=16"], "data.source=digits has images of shape (8, 8, 1), the mod"),
    (["--config.data.source=cifar"], "data.source='cifar' is unknown; known are: digits, syntheti"),
    (
        ["--config", "configs/digit.py"],
        "no config file 'configs/digit.py'; in configs are: digits,",
    ),
    (["--config", "configs/digits.py:router=moe"], "router=moe is not possible; choose token_choi"),
    (["--config", "configs/dsmoe_l.py:experts=32"], "experts=32 is not possible; choose 48 | 16"),
]


@pytest.mark.parametrize("args, message", IMPOSSIBLE, ids=[args[-1] for args, _ in IMPOSSIBLE])
def test_an_impossible_config_writes_nothing(args, message, tmp_path, capfd):
    assert jax.device_count() == 8
    error = cli.refused(capfd, train.main, [*ARGS, *args, "--workdir", tmp_path / "new" / "run"])
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_mistake_ends_a_real_process_the_same_way(tmp_path):
    result = cli.run("train", *ARGS, "--config.optim.lr=1", "--workdir", tmp_path / "run")
    error = cli.the_one_error(result.returncode, result.stderr)
    assert error == "unknown config key 'optim.lr'; the nearest is optim.learning_rate"
    assert not list(tmp_path.iterdir())


def test_without_data_it_says_what_to_prepare_and_how(tmp_path, capfd):
    args = ["--config", "configs/dsmoe_l.py", "--workdir", tmp_path / "run"]
    error = cli.refused(capfd, train.main, args)
    assert "data.source=latents:data/imagenet256_latents is not there" in error
    assert "32x32x4 latents with the condition label" in error
    assert "python -m moe_diffusion.prepare --source folder:/data --size 256" in error
    assert "--config.data.source=synthetic" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_file_in_the_way_of_the_workdir(below, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    workdir = tmp_path / "file" / below
    error = cli.refused(capfd, train.main, [*ARGS, "--workdir", workdir])
    assert error == f"cannot write to {tmp_path}/file: choose another folder"
    assert cli.contents(tmp_path) == {"file": b"mine"}


def test_a_workdir_of_another_config(copy, capfd):
    before = cli.contents(copy)
    args = [*ARGS, "--config.seed=1", "--config.model.moe.num_experts=8", "--workdir", copy]
    error = cli.refused(capfd, train.main, args)
    assert f"{copy} belongs to a run with another config" in error
    assert "(model.moe.num_experts: 4 -> 8; seed: 0 -> 1)" in error
    assert "choose another workdir, or set these back to resume" in error
    assert cli.contents(copy) == before


def test_a_broken_config_json(copy, capfd):
    path = copy / "config.json"
    path.write_bytes(path.read_bytes()[:100])
    before = cli.contents(copy)
    error = cli.refused(capfd, train.main, [*ARGS, "--workdir", copy])
    assert f"{path} is not valid JSON" in error and "restore it or delete it" in error
    assert cli.contents(copy) == before


@pytest.mark.parametrize("item", ["state/d", "state/manifest.ocdbt", "data/metadata"])
def test_a_truncated_checkpoint(item, copy, capfd):
    """The largest file of the array data, its index or the data iterator's state is cut in half."""
    found = copy / "checkpoints" / "3" / item
    files = [path for path in [found, *found.rglob("*")] if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    before = cli.contents(copy)
    args = [*ARGS, "--config.train.num_steps=4", "--workdir", copy]
    error = cli.refused(capfd, train.main, args)
    name = largest.relative_to(copy / "checkpoints" / "3")
    assert f"checkpoint {copy}/checkpoints/3 is damaged ({name} is not what was written)" in error
    assert error.endswith("or delete that folder to fall back on step 2")
    assert cli.contents(copy) == before


def test_a_truncated_checkpoint_ends_a_real_process_the_same_way(copy):
    shutil.rmtree(copy / "checkpoints" / "3" / "state" / "d")
    before = cli.contents(copy)
    result = cli.run("train", *ARGS, "--config.train.num_steps=4", "--workdir", copy)
    error = cli.the_one_error(result.returncode, result.stderr)
    assert f"checkpoint {copy}/checkpoints/3 is damaged" in error
    assert cli.contents(copy) == before


@pytest.mark.parametrize("change", ["hidden_size=32", "depth=4", "router.selection_bias=true"])
def test_a_checkpoint_of_another_model(change, copy, capfd):
    """config.json says what the command says, but the arrays are those of another model."""
    args = [*ARGS, f"--config.model.{change}", "--config.train.num_steps=4"]
    configs.save_json(configs.load(args[1], args[2:]), copy / "config.json")
    before = cli.contents(copy)
    error = cli.refused(capfd, train.main, [*args, "--workdir", copy])
    assert f"checkpoint {copy}/checkpoints/3 is damaged or of another model" in error
    assert "use the code and config that wrote it" in error
    assert cli.contents(copy) == before


def test_two_runs_in_one_workdir(copy, capfd):
    """The second is refused before it writes anything, while the first is at work."""
    args = [*ARGS, "--config.train.num_steps=4", "--workdir", copy]
    with locks.held(copy, "training"):
        before = cli.contents(copy)
        error = cli.refused(capfd, train.main, args)
        assert f"{copy} is in use by training (process {os.getpid()} on" in error
        assert f"delete {copy}/in_use.lock" in error
        assert cli.contents(copy) == before
    train.main(list(map(str, args)))
    assert cli.saved_steps(copy)[-1] == 4 and not (copy / "in_use.lock").exists()


@pytest.mark.parametrize("command", [train, sample])
def test_one_flipped_bit_in_a_checkpoint(command, copy, capfd):
    """In the numbers themselves, where orbax alone notices nothing."""
    files = (copy / "checkpoints" / "3" / "state").rglob("d/*")
    largest = max(files, key=lambda path: path.stat().st_size)
    bits = bytearray(largest.read_bytes())
    bits[len(bits) // 2] ^= 16
    largest.write_bytes(bits)
    args = ["--workdir", copy]
    args += [*ARGS, "--config.train.num_steps=4"] if command is train else ["--num", "1"]
    error = cli.refused(capfd, command.main, args)
    name = largest.relative_to(copy / "checkpoints" / "3")
    assert f"checkpoint {copy}/checkpoints/3 is damaged ({name} is not what was written)" in error
    assert error.endswith("restore that file, or delete that folder to fall back on step 2")
