"""`config.init_from`: what a new run takes from another, and what it refuses."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.interop import streamed
from moe_diffusion.training import checkpoint, loop, warm_start
from moe_diffusion.training.run import prepare_run
from tests import cli
from tests.training import toy


def train(config, workdir, model=None):
    model = model or toy.Toy()
    return loop.train(config, model, toy.loss_fn, lambda: toy.Batches(16), workdir)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("source") / "run"
    return workdir, train(toy.make_config(ema__router_state="live"), workdir)


@pytest.mark.parametrize("preset", ["dp", "fsdp"])
def test_a_run_begins_with_what_sample_would_use(tmp_path, source, preset):
    folder, trained = source
    config = toy.make_config(
        init_from=str(folder), optim__learning_rate=1e-9, parallel__preset=preset
    )
    config.train.num_steps = 1
    state = train(config, tmp_path / "new")
    assert int(state.step) == 1
    for params in (state.params, state.emas["0.9"]["params"], state.emas["0.5"]["params"]):
        toy.assert_trees_close(params, trained.emas["0.9"]["params"], 1e-6)
    expected = {"params": trained.emas["0.9"]["params"], "router_state": trained.router_state}
    found = warm_start.read(prepare_run(config, toy.Toy(), toy.loss_fn))
    toy.assert_trees_equal(found, expected)
    # Again with the same command: it resumes, whether or not the source is still there.
    config.init_from = str(tmp_path / "gone")
    configs.save_json(config, tmp_path / "new" / "config.json")
    config.train.num_steps = 2
    assert int(train(config, tmp_path / "new").step) == 2


def test_live_weights_where_there_are_no_averages(tmp_path):
    trained = train(toy.make_config(ema__decays=()), tmp_path / "source")
    with checkpoint.StoredWeights(tmp_path / "source") as stored:
        found = stored.read_tree(dict.fromkeys(stored.shapes))
    toy.assert_trees_equal(found["params"], trained.params)
    assert isinstance(found["params"]["odd"], np.ndarray)
    config = toy.make_config(init_from=str(tmp_path / "source"), train__num_steps=1)
    config.optim.learning_rate = 1e-9
    toy.assert_trees_close(train(config, tmp_path / "new").params, trained.params, 1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, r"odd: \(12, 32\) there, absent here; .*up/bias: \(32,\) there, \(7,\) here"),
        ({"model__num_heads": 3}, "another model: model.num_heads: 6 there, 3 here; params/"),
    ],
)
def test_another_model_is_refused_before_anything_is_written(tmp_path, source, change, message):
    class Other(toy.Toy):
        @nn.compact
        def __call__(self, x, t, y, train):
            return nn.Dense(7, name="up")(x.reshape(x.shape[0], -1))

    config = toy.make_config(init_from=str(source[0]), **change)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "new", Other())
    assert not (tmp_path / "new").exists()


def test_the_same_arrays_with_another_meaning_are_refused(tmp_path, source):
    config = toy.make_config(init_from=str(source[0]), model__norm="rmsnorm", model__dtype="auto")
    with pytest.raises(UserError, match="model: model.norm: layernorm there, rmsnorm here: use"):
        train(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_no_workdir_and_no_checkpoint(tmp_path, source):
    with pytest.raises(UserError, match="nothing is no workdir .it has no config.json"):
        train(toy.make_config(init_from=str(tmp_path / "nothing")), tmp_path / "new")
    (tmp_path / "empty").mkdir()
    shutil.copy(source[0] / "config.json", tmp_path / "empty")
    with pytest.raises(UserError, match="empty holds no checkpoints"):
        train(toy.make_config(init_from=str(tmp_path / "empty")), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_streamed_weights_are_an_ordinary_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "params/a/kernel": rng.standard_normal((2, 3, 5), np.float32),
        "params/zeros": np.zeros(4, np.float32),
        "router_state/bias": rng.standard_normal(3).astype(np.float32),
    }
    written = []

    def pieces(array, depth):
        def read():
            for index in np.ndindex(array.shape[:depth]):
                yield index, [((), array[index])]

        return streamed.Pieces(array.shape, array.dtype, read)

    depths = dict(zip(arrays, (2, 0, 0), strict=True))
    leaves = {name: pieces(array, depths[name]) for name, array in arrays.items()}
    streamed.write_weights(tmp_path, leaves, written.append)
    assert sum(written) == sum(array.nbytes for array in arrays.values())
    with checkpoint.StoredWeights(tmp_path) as stored:
        assert stored.step == 0
        read = stored.read(dict.fromkeys(stored.shapes))
    assert read.keys() == arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, read, arrays)
    assert cli.saved_steps(tmp_path) == [0]
    # Chunks of a piece each: a reader of one expert reads no other.
    folder = tmp_path / "checkpoints" / "0" / "state" / "params.a.kernel"
    chunks = sorted(path.name for path in folder.glob("[!.]*"))
    assert chunks == ["0.0.0", "0.1.0", "0.2.0", "1.0.0", "1.1.0", "1.2.0"]
