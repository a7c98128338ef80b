from __future__ import annotations

import json
import os
import re
import signal

import jax
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.training import loop
from tests import cli
from tests.training import toy


def train(config, workdir, loss_fn=toy.loss_fn, bad=(), **kwargs):
    def iterator_fn():
        return toy.Batches(config.data.batch_size, bad)

    return loop.train(config, toy.Toy(), loss_fn, iterator_fn, workdir, **kwargs)


def metrics(workdir):
    """Step -> the rest of its line without what depends on the machine."""
    return {entry.pop("step"): entry for entry in cli.metrics(workdir)}


def stop_at(step_to_stop, number=signal.SIGTERM):
    """A hook that sends this process a signal."""

    def hook(step, state):
        if step == step_to_stop:
            os.kill(os.getpid(), number)

    return hook


def test_a_run_leaves_what_it_should(tmp_path):
    workdir = tmp_path / "new" / "run"
    config = toy.make_config()
    state = train(config, workdir)
    assert int(state.step) == 6
    saved = configs.load_json(workdir / "config.json")
    assert configs.compare(saved, config) == [] and saved.train.num_steps == 6
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3", "6"]
    assert sorted(p.name for p in (workdir / "checkpoints" / "6").iterdir() if p.is_dir()) == [
        "data",
        "state",
    ]
    assert list(metrics(workdir)) == [2, 4, 6]
    assert set(metrics(workdir)[6]) == {"loss", "mse", "grad_norm", "learning_rate"}


def test_compiling_is_announced_and_is_no_training(tmp_path, capsys, caplog):
    """It happens once: what is compiled ahead is what the loop calls."""
    with jax.log_compiles():
        train(toy.make_config(train__log_every=1), tmp_path)
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation" in r.getMessage()]
    assert sum("jit(train_step)" in text for text in compiled) == 1, compiled
    first, second, third, *steps = capsys.readouterr().out.splitlines()
    assert (first, second) == ("starting at step 0 of 6", "compiling ...")
    assert re.fullmatch(r"compiled in \d+\.\d s", third)
    assert [line.split(":")[0] for line in steps] == [f"step {n}/6" for n in range(1, 7)]
    assert steps[0].count("images/s") == 0 and "left" not in steps[-1]
    entries = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert entries[0]["images_per_sec"] is None
    assert all(entry["images_per_sec"] is None or entry["images_per_sec"] > 0 for entry in entries)


@pytest.mark.parametrize("preset,accumulate", [("dp", 1), ("zero1", 2), ("fsdp", 1)])
def test_a_stopped_run_resumes_bitwise(tmp_path, capsys, preset, accumulate):
    config = toy.make_config(
        parallel__preset=preset,
        optim__accumulate=accumulate,
        train__num_steps=7,
        train__sample_every=1,
        train__log_every=1,
        checkpoint__every=100,
    )
    expected = train(config, tmp_path / "undisturbed")
    workdir = tmp_path / "stopped"
    stopped = train(config, workdir, hooks=[stop_at(2)])
    assert int(stopped.step) == 3  # the step after the signal
    assert "stopped by SIGTERM after step 3 of 7" in capsys.readouterr().out
    stopped = train(config, workdir, hooks=[stop_at(4, signal.SIGINT)])
    assert int(stopped.step) == 5
    out = capsys.readouterr().out
    assert "resuming after step 3 of 7" in out and "stopped by SIGINT after step 5 of 7" in out
    toy.assert_trees_equal(train(config, workdir), expected)
    assert metrics(workdir) == metrics(tmp_path / "undisturbed")


def test_a_killed_run_resumes_bitwise_from_its_last_checkpoint(tmp_path):
    class Killed(Exception):
        pass

    def kill(step, state):
        if step == 5:
            raise Killed

    config = toy.make_config(train__num_steps=7, train__sample_every=1, train__log_every=1)
    expected = train(config, tmp_path / "undisturbed")
    with pytest.raises(Killed):
        train(config, tmp_path / "killed", hooks=[kill])
    assert max(metrics(tmp_path / "killed")) == 5
    toy.assert_trees_equal(train(config, tmp_path / "killed"), expected)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "undisturbed")


def test_a_finished_run_says_so_and_a_longer_one_goes_on(tmp_path, capsys):
    expected = train(toy.make_config(train__num_steps=8), tmp_path / "long")
    config = toy.make_config(train__num_steps=6)
    first = train(config, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    capsys.readouterr()
    toy.assert_trees_equal(train(config, tmp_path / "run"), first)
    assert capsys.readouterr().out == f"already trained: {tmp_path}/run is at step 6 of 6\n"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    config.train.num_steps = 8
    toy.assert_trees_equal(train(config, tmp_path / "run"), expected)
    assert configs.load_json(tmp_path / "run" / "config.json").train.num_steps == 8


def test_a_run_resumes_under_another_preset(tmp_path):
    expected = train(toy.make_config(optim__eps=1e-3), tmp_path / "dp")
    train(toy.make_config(optim__eps=1e-3, train__num_steps=3), tmp_path / "run")
    config = toy.make_config(optim__eps=1e-3, parallel__preset="fsdp")
    state = train(config, tmp_path / "run")
    assert not state.params["up"]["kernel"].sharding.is_fully_replicated
    toy.assert_trees_close(state, expected, 1e-5)


def test_signal_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train(toy.make_config(), tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_nan_stops_with_the_step_the_loss_and_the_last_good_checkpoint(tmp_path):
    config = toy.make_config(train__num_steps=9, train__log_every=100)
    with pytest.raises(UserError) as error:
        train(config, tmp_path, bad=(5,))
    assert "stopped at step 5: loss nan, gradient norm nan" in str(error.value)
    assert f"Last good checkpoint: {tmp_path}/checkpoints/3." in str(error.value)
    assert "train.stop_on_nan=false" in str(error.value)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3"]
    # Rerun as the message says: the bad step is skipped.
    config.train.stop_on_nan = False
    state = train(config, tmp_path, bad=(5,))
    assert int(state.step) == 9
    assert int(state.opt_state[0].count) == 8
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))


@pytest.mark.parametrize("bad", [3, 9])
def test_nan_in_a_step_that_would_be_saved_is_not_saved(tmp_path, bad):
    config = toy.make_config(train__num_steps=9)
    with pytest.raises(
        UserError, match=f"stopped at step {bad}: .*: {'none yet' if bad == 3 else ''}"
    ):
        train(config, tmp_path, bad=(bad,))
    assert not (tmp_path / "checkpoints" / str(bad)).exists()


def test_skipped_steps_are_told(tmp_path, capsys):
    config = toy.make_config(train__stop_on_nan=False, train__log_every=1)
    train(config, tmp_path, bad=(4,))
    assert "step 4: loss nan, gradient norm nan; this step is skipped" in capsys.readouterr().out
    assert metrics(tmp_path)[4]["loss"] is None


def test_hooks_see_the_state_of_their_step_and_give_images(tmp_path):
    seen = []

    def hook(step, state):
        seen.append((step, int(state.step)))
        return {"grid": np.zeros((4, 4, 3), np.uint8)}

    train(toy.make_config(train__sample_every=2), tmp_path, hooks=[hook])
    assert seen == [(2, 2), (4, 4), (6, 6)]
    assert b"grid" in next(tmp_path.glob("events.*")).read_bytes()


def test_another_config_is_refused_and_nothing_changes(tmp_path):
    train(toy.make_config(), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    config = toy.make_config(optim__learning_rate=1.0, seed=3, train__num_steps=50)
    with pytest.raises(UserError) as error:
        train(config, tmp_path)
    assert "optim.learning_rate: 0.01 -> 1.0; seed: 0 -> 3" in str(error.value)
    assert "num_steps" not in str(error.value)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_bad_input_writes_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}/file"):
        train(toy.make_config(), tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot be split evenly over 8 devices"):
        train(toy.make_config(data__batch_size=12), tmp_path / "run")
    with pytest.raises(UserError, match="no such data"):

        def iterator_fn():
            raise UserError("no such data")

        loop.train(toy.make_config(), toy.Toy(), toy.loss_fn, iterator_fn, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_wrong_loss_does_not_claim_the_workdir(tmp_path):
    def loss_fn(params, router_state, batch, rng, frozen):
        raise UserError("loss_weights.balance is missing")

    with pytest.raises(UserError, match="balance is missing"):
        train(toy.make_config(), tmp_path, loss_fn)
    train(toy.make_config(optim__learning_rate=2e-2), tmp_path)


def test_micro_batches_are_cut_on_the_host(tmp_path):
    mesh = make_mesh(toy.make_config().parallel)
    batch = toy.make_batch(0, 32)
    placed = loop.to_device(batch, mesh, accumulate=2)
    assert placed["image"].shape == (2, 16, 4, 4, 1)
    np.testing.assert_array_equal(placed["image"][1], batch["image"][1::2])
    assert placed["label"].sharding.shard_shape((2, 16)) == (2, 2)
