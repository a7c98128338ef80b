"""What is only there: parameters that `optim.trainable` leaves out, and trees given as `frozen`."""

from __future__ import annotations

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

from moe_diffusion.errors import UserError
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.training import loop
from moe_diffusion.training.checkpoint import StoredWeights
from moe_diffusion.training.run import on_every_device
from moe_diffusion.training.state import matches, merge, split
from tests import cli
from tests.training import toy

PARAMS = {"up": {"kernel": 1, "bias": 2}, "odd": 3, "down": {"kernel": 4, "bias": 5}}
SOME = ("up/*", "*/bias")  # up/bias twice; leaves out odd and down/kernel


def train(workdir, hooks=(), model=None, frozen=None, loss_fn=toy.loss_fn, **overrides):
    config = toy.make_config(**{"optim__trainable": SOME, **overrides})
    make = partial(toy.Batches, config.data.batch_size)
    model = model or toy.Toy()
    return loop.train(config, model, loss_fn, make, workdir, hooks=hooks, frozen=frozen)


def stored(workdir, **kwargs):
    with StoredWeights(workdir, **kwargs) as weights:
        return weights.read_tree(dict.fromkeys(weights.shapes))["params"]


class Killed(Exception):
    pass


def kill_at(number):
    def hook(step, state):
        if step == number:
            raise Killed

    return hook


def test_patterns_split_parameters_and_merge_joins_them():
    trained, untrained = split(PARAMS, SOME)
    assert trained == {"up": {"kernel": 1, "bias": 2}, "down": {"bias": 5}}
    assert untrained == {"odd": 3, "down": {"kernel": 4}}
    assert merge(trained, untrained) == PARAMS
    assert split(PARAMS, ["*"]) == (PARAMS, {})
    found = matches({"up/bias": 2, "down/bias": 5, "odd": 3}, ["*/bias", "odd", "n*"])
    assert found == {"*/bias": ["up/bias", "down/bias"], "odd": ["odd"], "n*": []}


def test_a_pattern_that_matches_nothing_is_an_error_before_anything_is_written(tmp_path):
    message = "optim.trainable = 'left/.' matches no parameter: the model has down, odd, up"
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", optim__trainable=("up/*", "left/*"))
    assert not (tmp_path / "run").exists()


def test_only_what_is_trained_moves_and_is_kept_in_the_state(tmp_path, capsys):
    first = []

    def hook(step, state):
        """Sees the whole model, also in the averages."""
        for params in (state.params, state.emas["0.9"]["params"]):
            assert {*params} == {"up", "odd", "down"} and {*params["down"]} == {"kernel", "bias"}
        first.append(jax.device_get(state.params))

    state = train(tmp_path, [hook], train__sample_every=1)
    for tree in (state.params, state.opt_state[0].mu, state.emas["0.5"]["params"]):
        assert jax.tree.structure(tree) == jax.tree.structure(split(PARAMS, SOME)[0])
    trained, untrained = (split(first[-1], SOME)[i] for i in (0, 1))
    toy.assert_trees_equal(trained, jax.device_get(state.params))
    toy.assert_trees_equal(untrained, split(first[0], SOME)[1])
    assert np.any(first[0]["up"]["kernel"] != first[-1]["up"]["kernel"])
    lines = capsys.readouterr().out.splitlines()
    assert "trained: up/*: 2 arrays, 544 parameters" in lines
    assert "trained: */bias: 2 arrays, 48 parameters" in lines


def test_untrained_parameters_are_saved_once_and_read_with_the_others(tmp_path):
    state = train(tmp_path)
    arrays, _ = cli.read_checkpoint(tmp_path, 6)
    assert not any("odd" in name or "down/kernel" in name for name in arrays)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "untrained").rglob("*")}
    assert files
    for ema, trained in ((None, state.params), ("0.5", state.emas["0.5"]["params"])):
        params = stored(tmp_path, ema=ema)
        toy.assert_trees_equal(split(params, SOME)[0], trained)
        assert params["odd"].shape == (12, 32) and params["down"]["kernel"].shape == (32, 16)
    train(tmp_path, train__num_steps=8)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "untrained").rglob("*")} == files
    # Everything is listed for the reader of the folder, trained or not.
    table = (tmp_path / "parameters.txt").read_text()
    assert all(name in table for name in ("up/kernel", "odd", "down/kernel", "Total: 1,456 --"))


def test_all_is_trained_by_default(tmp_path):
    train(tmp_path, optim__trainable=("*",))
    assert not (tmp_path / "untrained").exists()


@pytest.mark.parametrize("preset", ["dp", "fsdp"])
def test_a_killed_run_resumes_bitwise(tmp_path, preset):
    options = {"train__sample_every": 1, "train__num_steps": 7, "parallel__preset": preset}
    expected = train(tmp_path / "undisturbed", **options)
    with pytest.raises(Killed):
        train(tmp_path / "killed", [kill_at(5)], **options)
    toy.assert_trees_equal(train(tmp_path / "killed", **options), expected)
    toy.assert_trees_equal(stored(tmp_path / "killed"), stored(tmp_path / "undisturbed"))


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    """What it began with may have changed in between; half a folder may be left."""
    for seed in (1, 2):
        train(tmp_path / f"source{seed}", optim__trainable=("*",), seed=seed, ema__decays=())
    shutil.copytree(tmp_path / "source1", tmp_path / "source")
    options = {"train__sample_every": 1, "init_from": str(tmp_path / "source")}
    with pytest.raises(Killed):
        train(tmp_path / "run", [kill_at(1)], **options)
    left = read_untrained(tmp_path / "run")
    np.testing.assert_array_equal(left["odd"], stored(tmp_path / "source1")["odd"])
    half = tmp_path / "run" / "untrained.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "part").write_text("x")
    shutil.rmtree(tmp_path / "source")
    shutil.copytree(tmp_path / "source2", tmp_path / "source")
    train(tmp_path / "run", **options)
    assert not half.exists()
    expected = split(stored(tmp_path / "source2"), SOME)[1]
    toy.assert_trees_equal(read_untrained(tmp_path / "run"), expected)


def read_untrained(workdir):
    """Past this project's code."""
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = {"odd": as_numpy, "down": {"kernel": as_numpy}}
        return reader.restore(workdir / "untrained", restore_args=args)


@pytest.mark.parametrize("damage", ["gone", "cut", "bit"])
def test_damaged_untrained_parameters_are_told_apart_from_a_checkpoint(tmp_path, damage):
    train(tmp_path)
    if damage == "gone":
        shutil.rmtree(tmp_path / "untrained")
    elif damage == "cut":
        for path in (tmp_path / "untrained" / "d").iterdir():
            path.write_bytes(path.read_bytes()[:10])
    else:
        path = max((tmp_path / "untrained").rglob("d/*"), key=lambda path: path.stat().st_size)
        bits = bytearray(path.read_bytes())
        bits[len(bits) // 2] ^= 1
        path.write_bytes(bits)
    with pytest.raises(UserError) as error:
        train(tmp_path, train__num_steps=8)
    assert f"checkpoint {tmp_path}/untrained is damaged" in str(error.value)
    assert "begin anew in another workdir, since every checkpoint" in str(error.value)
    if damage != "gone":
        with pytest.raises(UserError, match=f"{tmp_path}/untrained is damaged"):
            stored(tmp_path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bf16_parameters_train_with_f32_moments_and_averages(tmp_path, accumulate):
    options = {"optim__trainable": ("*",), "optim__accumulate": accumulate, "train__num_steps": 12}
    dtype = {"model__param_dtype": "bfloat16"}
    state = train(tmp_path / "bf16", model=toy.Toy(param_dtype=jnp.bfloat16), **options, **dtype)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    kept = (state.opt_state[0].mu, state.opt_state[0].nu, state.emas)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype(jnp.float32)}
    train(tmp_path / "f32", **options)
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("bf16", "f32")
    ]
    np.testing.assert_allclose(*losses, rtol=0.02)


def test_what_is_given_is_read_and_neither_trained_nor_saved(tmp_path):
    """Where it lies does not change a number."""
    mesh = make_mesh(toy.make_config().parallel)
    given = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    other = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    places = {
        "host": given,
        "one": jax.device_put(given, jax.devices()[3]),
        "another mesh": jax.device_put(given, jax.NamedSharding(other, P("a", "b"))),
        "split": jax.device_put(given, jax.NamedSharding(mesh, P("data"))),
    }

    def loss_fn(params, router_state, batch, key, frozen):
        loss, aux = toy.exact_loss_fn(params, router_state, batch, key)
        features = params["up"]["kernel"][:, :16] @ frozen["teacher"]
        return loss + jnp.mean((features - 1.0) ** 2), aux

    states = {}
    for name, teacher in places.items():
        frozen = {"teacher": teacher}
        states[name] = train(tmp_path / name, frozen=frozen, loss_fn=loss_fn, train__num_steps=2)
        assert np.array_equal(teacher, given)  # not donated
    for name, state in states.items():
        toy.assert_trees_close(state, states["host"], 0 if name != "split" else 1e-5)
    without = train(tmp_path / "without", train__num_steps=2, loss_fn=toy.exact_loss_fn)
    assert not np.array_equal(without.params["up"]["kernel"], states["host"].params["up"]["kernel"])
    arrays, _ = cli.read_checkpoint(tmp_path / "host", 2)
    assert not any("teacher" in name for name in arrays)


def test_arrays_of_the_run_s_mesh_stay_where_they_are_and_others_go_everywhere():
    mesh = make_mesh(toy.make_config().parallel)
    split_over = jax.device_put(np.arange(8.0), jax.NamedSharding(mesh, P("data")))
    tree = {"split": split_over, "host": np.float32(3), "bf16": jnp.ones(4, jnp.bfloat16)}
    placed = on_every_device(mesh, tree)
    assert placed["split"] is split_over
    for name in ("host", "bf16"):
        assert placed[name].sharding == jax.NamedSharding(mesh, P())
        assert placed[name].dtype == tree[name].dtype
        np.testing.assert_array_equal(np.asarray(placed[name]), np.asarray(tree[name]))
    assert on_every_device(mesh, None) is None


def test_weights_in_a_closure_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_LARGEST_CONSTANT", 1000)
    teacher = jnp.ones((16, 16))

    def loss_fn(params, router_state, batch, key, frozen):
        loss, aux = toy.exact_loss_fn(params, router_state, batch, key)
        return loss + jnp.sum(params["up"]["kernel"][:, :16] @ teacher), aux

    with pytest.raises(UserError, match=r"shape \(16, 16\) .* hand it to train as frozen"):
        train(tmp_path, loss_fn=loss_fn)
    assert not (tmp_path / "config.json").exists()
