"""`config.init_from`: what a new run takes from another, and what it refuses."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_diffusion import config as configs
from moe_diffusion import models
from moe_diffusion.classes import Classes
from moe_diffusion.data.pipeline import make_iterator
from moe_diffusion.data.sources import open_source
from moe_diffusion.diffusion.objectives import make_loss
from moe_diffusion.errors import UserError
from moe_diffusion.interop import streamed
from moe_diffusion.models import abstract_variables
from moe_diffusion.training import checkpoint, loop, warm_start
from moe_diffusion.training.run import prepare_run, shardings
from moe_diffusion.training.state import TrainState
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


# --- other classes, images and patches -----------------------------------------------------------

TABLE = "params/label_embed/embedding"


def small(architecture="dit", *changes):
    """A transformer of one MoE block on 8 x 8 pixels, 5 classes."""
    spec = (
        "configs/digits.py:router=token_choice"
        if architecture == "dit"
        else "configs/jitmoe_b16.py"
    )
    keys = [
        "model.depth=1",
        "model.moe.interleave=false",
        "model.moe.skip_first=0",
        "model.hidden_size=16",
        "model.num_heads=2",
        "model.image_size=8",
    ]
    keys += ["model.moe.num_experts=2", "model.moe.hidden_size=8", "model.num_classes=5"]
    keys += ["model.patch_size=4", "model.channels=1", "data.batch_size=8", "data.source=synthetic"]
    keys += ["model.router.top_k=1", "model.router.selection_bias=true", "train.num_steps=1"]
    keys += ["model.router.n_group=1", "model.router.topk_group=1"]
    keys += ["optim.schedule=constant", "optim.warmup_steps=0"]
    if architecture == "jit":
        keys += ["model.jit.bottleneck=4", "model.jit.in_context_start=0", "model.dtype=float32"]
        keys += ["model.jit.in_context_tokens=2"]
    return configs.load(spec, [*keys, *changes])


def stored(folder, config, class_names=None):
    """A workdir of random weights; returns path -> array."""
    model = models.build(config.model)
    rng = np.random.default_rng(0)
    flat = flatten_dict(abstract_variables(model), sep="/")
    flat = {p: jnp.asarray(rng.normal(size=x.shape), x.dtype) for p, x in flat.items()}
    tree = unflatten_dict(flat, sep="/")
    state = TrainState(jnp.int32(3), tree["params"], tree.get("router_state", {}), {}, {})
    config.ema.decays = ()
    checkpoints = checkpoint.Checkpointer(folder, config.checkpoint)
    checkpoints.save(3, state, {})
    checkpoints.close()
    configs.save_json(config, folder / "config.json")
    if class_names:
        Classes({"label": len(class_names)}, class_names).save(folder)
    return {path: np.asarray(array) for path, array in flat.items()}


def begun(config, class_names=(), new=()):
    """(path -> array that a run begins with, path in `new` -> what a new run begins with there)"""
    run = prepare_run(config)
    warm_start.check(config, run.model)
    found = flatten_dict(warm_start.read(run, Classes(names=class_names)), sep="/")
    places = flatten_dict(shardings(run.variables), sep="/")
    assert found.keys() == places.keys()
    for path, place in places.items():
        assert found[path].sharding.is_equivalent_to(place, found[path].ndim), path
    fresh = run.initial(config.seed, new) if new else {}
    return tuple({path: np.asarray(x) for path, x in tree.items()} for tree in (found, fresh))


@pytest.mark.parametrize("preset", ["dp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_another_number_of_classes_keeps_the_rows_of_both(tmp_path, preset, capsys):
    """5 classes become 3: rows 0, 1, 2 stay, and row 5 (no class) becomes row 3; 7: 5 -> 7."""
    before = stored(tmp_path, small())
    rest = [f"parallel.preset={preset}", f"init_from={tmp_path}"]
    few = small("dit", "model.num_classes=3", "init.reset=auto", *rest)
    found, _ = begun(few)
    np.testing.assert_array_equal(found.pop(TABLE), before[TABLE][[0, 1, 2, 5]])
    for path, array in found.items():
        np.testing.assert_array_equal(array, before[path], err_msg=path)
    told = capsys.readouterr().out.splitlines()
    assert f"init_from: 4 rows kept: {TABLE}" in told and len(told) == len(before)
    assert "init_from: kept: params/patch_embed/kernel" in told

    many = small("dit", "model.num_classes=7", "init.reset=auto", *rest)
    found, fresh = begun(many, new=[TABLE])
    np.testing.assert_array_equal(found[TABLE][[0, 1, 2, 3, 4, 7]], before[TABLE])
    np.testing.assert_array_equal(found[TABLE][[5, 6]], fresh[TABLE][[5, 6]])
    assert fresh[TABLE][[5, 6]].std() > 0.01

    with pytest.raises(UserError, match="model.num_classes: 5 there, 7 here; .* init.reset what"):
        begun(small("dit", "model.num_classes=7", *rest))
    anew, _ = begun(small("dit", "model.num_classes=7", "init.reset=label_embed", *rest))
    np.testing.assert_array_equal(anew[TABLE], fresh[TABLE])


def test_known_names_find_their_rows(tmp_path):
    names = ["cat", "dog", "owl", "elk", "bee"]
    before = stored(tmp_path, small(), names)
    config = small("dit", "model.num_classes=3", "init.reset=auto", f"init_from={tmp_path}")
    found, fresh = begun(config, ["owl", "ant", "cat"], [TABLE])
    np.testing.assert_array_equal(found[TABLE][[0, 2, 3]], before[TABLE][[2, 0, 5]])
    np.testing.assert_array_equal(found[TABLE][1], fresh[TABLE][1])
    (tmp_path / "data.json").write_text('{"class_names": 3}')
    with pytest.raises(
        UserError, match="data.json is damaged .class_names is wrong.*: restore it, or delete"
    ):
        begun(config, ["owl"])


@pytest.mark.parametrize("architecture", [pytest.param("dit", marks=pytest.mark.slow), "jit"])
def test_other_images_and_patches(tmp_path, architecture):
    """A larger image needs nothing. Of other patches or channels, both ends begin anew."""
    before = stored(tmp_path, small(architecture))
    rest = ["init.reset=auto", f"init_from={tmp_path}"]
    found, _ = begun(small(architecture, "model.image_size=16", *rest))
    for path, array in found.items():
        np.testing.assert_array_equal(array, before[path], err_msg=path)
    for change in ("model.patch_size=2", "model.channels=3"):
        new = [path for path in before if path.split("/")[1] == "patch_embed"]
        new += [path for path in before if path.startswith("params/final/linear/")]
        found, fresh = begun(small(architecture, change, *rest), new=new)
        assert len(new) == (4 if architecture == "dit" else 5)
        for path, array in found.items():
            expected = fresh if path in new else before
            np.testing.assert_array_equal(array, expected[path], err_msg=path)


def test_fewer_class_tokens(tmp_path):
    before = stored(tmp_path, small("jit"))
    path = "params/in_context_embed"
    rest = ["model.jit.in_context_tokens=3", f"init_from={tmp_path}"]
    found, fresh = begun(small("jit", "init.reset=auto", *rest), new=[path])
    np.testing.assert_array_equal(found[path], fresh[path])
    assert before[path].shape == (2, 16) and found[path].shape == (3, 16)


def test_experts_may_begin_anew_but_the_model_stays(tmp_path):
    before = stored(tmp_path, small())
    rest = ["model.moe.num_experts=4", f"init_from={tmp_path}"]
    moe = [path for path in before if "/moe/" in path]
    found, fresh = begun(small("dit", "init.reset=layers_0/*/moe", *rest), new=moe)
    assert {path.partition("/")[0] for path in moe} == {"params", "router_state"}
    for path in moe:
        np.testing.assert_array_equal(found[path], fresh[path], err_msg=path)
    for change in ("model.num_heads=4", "model.hidden_size=32", "model.depth=4"):
        key, _, value = change.partition("=")
        with pytest.raises(UserError, match=rf"another model: {key}: \d+ there, {value} here"):
            begun(small("dit", "init.reset=auto", change, f"init_from={tmp_path}"))
    with pytest.raises(UserError, match="init.reset = 'experts' matches no parameter"):
        begun(small("dit", "init.reset=experts", *rest))
    with pytest.raises(UserError, match="which names no folder: set init_from"):
        small("dit", "init.reset=auto")


def test_it_trains_from_there(tmp_path):
    """By the loop, with the data's names: the averages begin at the same table."""
    before = stored(tmp_path / "a", small(), ["cat", "dog", "owl", "elk", "bee"])
    rest = ["init.reset=auto", f"init_from={tmp_path / 'a'}", "ema.decays=0.5"]
    config = small("dit", "model.num_classes=2", "optim.learning_rate=1e-12", *rest)
    model = models.build(config.model, losses=sorted(config.loss_weights))
    source = open_source(config.data, model.input_shape, model.cond_spec())
    state = loop.train(
        config, model, make_loss(model, config),
        lambda: make_iterator(source, config.data, seed=0), tmp_path / "b",
        known=Classes({"label": 2}, ["owl", "dog"]),
    )  # fmt: skip
    assert int(state.step) == 1
    for params in (state.params, state.emas["0.5"]["params"]):
        table = params["label_embed"]["embedding"]
        np.testing.assert_allclose(table, before[TABLE][[2, 1, 5]], atol=1e-6)


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
