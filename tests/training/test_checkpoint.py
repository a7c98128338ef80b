from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.errors import UserError
from moe_diffusion.training.checkpoint import Checkpointer, StoredWeights, saved_steps
from moe_diffusion.training.optim import init_emas, make_optimizer
from moe_diffusion.training.state import TrainState
from tests.training import toy


def read_weights(workdir, step=None, ema=None):
    """(params, router_state, step) of a checkpoint, without the rest of the state."""
    with StoredWeights(workdir, step, ema) as stored:
        tree = stored.read_tree(dict.fromkeys(stored.shapes))
        return tree["params"], tree["router_state"], stored.step


def make_state(step, **overrides):
    """Big enough an array that its values are not stored inside the index."""
    config = toy.make_config(**overrides)
    rng = np.random.default_rng(step)
    params = {"b": jnp.zeros(3), "w": jnp.asarray(rng.standard_normal((64, 128)), jnp.float32)}
    router_state = {"bias": jnp.full(4, step, jnp.float32)}
    return TrainState(
        step=jnp.int32(step),
        params=params,
        router_state=router_state,
        emas=init_emas(jax.tree.map(lambda x: x + 1, params), router_state, config.ema),
        opt_state=make_optimizer(config.optim, bool).init(params),
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def write(workdir, steps, **overrides):
    config = toy.make_config(**overrides).checkpoint
    checkpoints = Checkpointer(workdir, config)
    for step in steps:
        checkpoints.save(step, make_state(step), {"next_index": step})
    checkpoints.close()


def read(workdir, target=None):
    checkpoints = Checkpointer(workdir, toy.make_config().checkpoint)
    try:
        return checkpoints.restore(abstract(make_state(0)) if target is None else target)
    finally:
        checkpoints.close()


def steps_on_disk(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_newest_comes_back_bitwise(tmp_path, asynchronous):
    write(tmp_path, [3, 7], checkpoint__asynchronous=asynchronous)
    state, data = read(tmp_path)
    toy.assert_trees_equal(state, make_state(7))
    assert data == {"next_index": 7}


def test_restores_to_other_shardings(tmp_path):
    write(tmp_path, [2])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if x.ndim == 2 else whole),
        make_state(0),
    )
    state, _ = read(tmp_path, target)
    assert state.params["w"].sharding == split
    toy.assert_trees_equal(state, make_state(2))


def test_a_state_that_trains_on_while_it_is_written_is_saved_as_it_was(tmp_path):
    checkpoints = Checkpointer(tmp_path, toy.make_config().checkpoint)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = make_state(1)
    checkpoints.save(1, state, {})
    for _ in range(3):
        state = advance(state)
    checkpoints.close()
    toy.assert_trees_equal(read(tmp_path)[0], make_state(1))


def test_keep_last_and_keep_every(tmp_path):
    write(tmp_path, range(1, 9), checkpoint__keep_last=2, checkpoint__keep_every=3)
    assert steps_on_disk(tmp_path) == [3, 6, 7, 8]


def test_saving_a_step_again_is_nothing(tmp_path):
    write(tmp_path, [4, 4])
    write(tmp_path, [4])
    assert steps_on_disk(tmp_path) == [4]


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path):
    write(tmp_path, [1])
    leftover = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("x")
    assert int(read(tmp_path)[0].step) == 1
    assert steps_on_disk(tmp_path) == [1]


def test_every_truncated_file_is_noticed_or_harmless(tmp_path):
    write(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints" / "2"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    noticed = set()
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        for reader in (read, read_weights):
            try:
                result = reader(tmp_path)
            except UserError as error:
                assert f"{folder} is damaged" in str(error)
                assert "delete that folder to fall back on step 1" in str(error)
                noticed.add(path.name if path.parent == folder / "state" else path.parent.name)
            else:
                if reader is read:
                    toy.assert_trees_equal(result, (make_state(2), {"next_index": 2}))
                else:
                    toy.assert_trees_equal(result[0], make_state(2).params)
        path.write_bytes(whole)
    assert noticed >= {"_METADATA", "manifest.ocdbt", "d", "data"}
    assert steps_on_disk(tmp_path) == [1, 2]
    toy.assert_trees_equal(read(tmp_path)[0], make_state(2))


@pytest.mark.parametrize(
    "foreign",
    [
        {"w": jnp.zeros((64, 64)), "b": jnp.zeros(3)},
        {"w": jnp.zeros((64, 128))},
        {"w": jnp.zeros((64, 128)), "b": jnp.zeros(3), "c": jnp.zeros(3)},
    ],
    ids=["shape", "less", "more"],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, foreign):
    write(tmp_path, [5])
    target = abstract(make_state(0).replace(params=foreign))
    with pytest.raises(UserError, match="5 is damaged or of another model.*a fresh start"):
        read(tmp_path, target)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    write(tmp_path, [5])
    (tmp_path / "checkpoints" / "9").mkdir()
    (tmp_path / "checkpoints" / "5").rename(tmp_path / "checkpoints" / "6")
    for step, older in ((9, "step 6"), (6, "a fresh start")):
        with pytest.raises(UserError, match=f"checkpoints/{step} is damaged.*{older}"):
            read(tmp_path)
        (tmp_path / "checkpoints" / str(step)).rename(tmp_path / f"away{step}")


def test_other_files_among_checkpoints_are_passed_over(tmp_path):
    write(tmp_path, [5])
    expected = read(tmp_path)
    for name in ("notes.txt", "99"):
        (tmp_path / "checkpoints" / name).write_text("not of the run")
    (tmp_path / "checkpoints" / "old").mkdir()
    assert saved_steps(tmp_path) == [5]
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path), expected)


def test_stored_weights(tmp_path):
    write(tmp_path, [1, 2])
    params, router_state, step = read_weights(tmp_path)
    toy.assert_trees_equal(
        (params, router_state), (make_state(2).params, {"bias": jnp.full(4, 2.0)})
    )
    assert step == 2
    params, router_state, step = read_weights(tmp_path, step=1, ema="0.9")
    expected = make_state(1).emas["0.9"]
    toy.assert_trees_equal((params, router_state), (expected["params"], expected["router_state"]))
    assert step == 1


def test_an_average_without_router_state_takes_the_live_one(tmp_path):
    checkpoints = Checkpointer(tmp_path, toy.make_config().checkpoint)
    checkpoints.save(3, make_state(3, ema__router_state="live"), {})
    checkpoints.close()
    _, router_state, _ = read_weights(tmp_path, ema="0.5")
    toy.assert_trees_equal(router_state, make_state(3).router_state)


def test_stored_weights_say_what_there_is(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoints"):
        read_weights(tmp_path)
    write(tmp_path, [1, 2])
    with pytest.raises(UserError, match="no checkpoint of step 3; it has: 1, 2"):
        read_weights(tmp_path, step=3)
    with pytest.raises(UserError, match="no average of decay 0.7; it keeps: 0.5, 0.9"):
        read_weights(tmp_path, ema="0.7")


def flipped(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def read_blockwise(workdir):
    """As `convert --export` reads."""
    with StoredWeights(workdir) as stored:
        return {name: list(stored.read_blocks(name)) for name in stored.shapes}


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    """40 bits of each file of a checkpoint, read in every way.

    Two kinds have no digest, because orbax writes them at the very end: the time is in one, and
    the other only has to exist. There, what is read is as before.
    """
    write(tmp_path, [1, 2])
    folder, rng, noticed = tmp_path / "checkpoints" / "2", np.random.default_rng(0), {}
    checkpoints = Checkpointer(tmp_path, toy.make_config().checkpoint)
    good, target = read_blockwise(tmp_path), abstract(make_state(0))
    expected = (make_state(2), {"next_index": 2})
    ways = lambda: checkpoints.restore(target), lambda: read_blockwise(tmp_path)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        whole = path.read_bytes()
        for i, bit in enumerate(rng.integers(8 * len(whole), size=40).tolist()):
            flipped(path, bit)
            for way in ways[: 1 + (i < 2)]:
                try:
                    found = way()
                except UserError as error:
                    assert f"checkpoint {folder} is damaged" in str(error)
                    assert f"{path.relative_to(folder)} is not what was written" in str(error)
                    assert str(error).endswith("or delete that folder to fall back on step 1")
                    noticed[path] = noticed.get(path, 0) + 1
                else:
                    toy.assert_trees_equal(found, expected if isinstance(found, tuple) else good)
            path.write_bytes(whole)
    checkpoints.close()
    # The state of the data iterator is not read with the weights.
    expected = {p: 40 if p.parent.name == "data" else 42 for p in files}
    last = "_CHECKPOINT_METADATA", "commit_success.txt"
    assert noticed == {path: count for path, count in expected.items() if path.name not in last}


def test_missing_files_and_checkpoints_without_digests(tmp_path, caplog):
    write(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints" / "2"
    shard = next(path for path in (folder / "state").rglob("d/*") if path.is_file())
    bits = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is not what was written"):
        read(tmp_path)
    shard.write_bytes(bits)
    assert not caplog.records
    for path in folder.rglob("digests.json"):
        path.unlink()
    toy.assert_trees_equal(read(tmp_path)[0], make_state(2))
    read_weights(tmp_path)
    told = [record.getMessage() for record in caplog.records if "digests" in record.getMessage()]
    what, why = f"{folder}/state", ": without digests.json, so not checked for damage"
    assert told == [f"{what}, {folder}/data{why}", f"{what}{why}"]
