"""Eq. 6 of 2510.09094 by hand, and scores that are saved, resumed and not mixed up."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from moe_diffusion.data.pipeline import make_iterator
from moe_diffusion.data.sources import open_source
from moe_diffusion.dense2moe import importance
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.parallel.mesh import make_mesh
from tests.dense2moe.tiny import config_of, filled, inputs


def test_scores_of_two_units_by_hand():
    """|2 * 0.5| + |1 * 0.1| + |4 * -0.25| and |3 * -1| + |0 * 0.2| + |5 * 0.2|."""
    values = {
        "mlp/up/kernel": ([[[2.0, 3]]], [[[0.5, -1]]]),
        "mlp/up/bias": ([[1.0, 0]], [[0.1, 0.2]]),
        "mlp/down/kernel": ([[[4.0], [5]]], [[[-0.25], [0.2]]]),
        "mlp/down/bias": ([[9.0]], [[9.0]]),
    }
    weights = {f"layers_0/block_0/{k}": jnp.array(w) for k, (w, _) in values.items()}
    grads = {f"layers_0/block_0/{k}": jnp.array(g) for k, (_, g) in values.items()}
    scores = importance.unit_scores(weights, grads)
    assert list(scores) == ["layers_0/block_0/mlp"]
    np.testing.assert_allclose(scores["layers_0/block_0/mlp"], [[2.1, 4.0]], rtol=1e-6)


def test_what_a_block_changes():
    """The mean squared difference of the features before and after it; -1 for the first."""
    model = build(config_of().model)
    params, args = filled(model), inputs(model)
    found = jax.jit(lambda p: importance.changes(model, p, *args))(params)
    _, features = model.apply({"params": params}, *args, False, capture=(0, 1, 2))
    tokens = [jnp.concatenate(features[i][::-1], 1) for i in (0, 1)] + [features[2]]
    expected = [-1] + [np.mean(np.square(b - a)) for a, b in zip(tokens, tokens[1:], strict=False)]
    assert found.shape == (5,)
    np.testing.assert_allclose(found[:3], expected, rtol=1e-4)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(measure(batches, found, file), the file of five batches at once)."""
    config = config_of("distill.importance_batches=5", "data.batch_size=8")
    model = build(config.model)
    params, source = filled(model), open_source(config.data, model.input_shape, model.cond_spec())

    def measure(batches, found, file):
        config.distill.importance_batches = batches
        iterator = make_iterator(source, config.data, seed=0)
        with jax.set_mesh(make_mesh(config.parallel)), contextlib.closing(iterator):
            return importance.measure(config, model, params, iterator, found, file)

    folder = tmp_path_factory.mktemp("scores")
    return measure, measure(5, importance.Importance("t"), folder / "once.npz"), folder


def test_resumed_scores_are_those_of_one_go(measured):
    measure, once, folder = measured
    measure(2, importance.Importance("t"), folder / "twice.npz")
    again = importance.load(folder / "twice.npz", "t")
    assert again.batches == 2
    twice = measure(5, again, folder / "twice.npz")
    assert twice.batches == once.batches == 5
    for path, scores in once.units.items():
        np.testing.assert_array_equal(twice.units[path], scores)
    np.testing.assert_array_equal(twice.changes, once.changes)
    np.testing.assert_allclose(twice.loss, once.loss, rtol=1e-12)


def test_every_mlp_is_scored(measured):
    _, once, _ = measured
    shapes = {path: scores.shape for path, scores in once.units.items()}
    assert shapes == {
        "layers_0/block_0/image_mlp": (2, 64),
        "layers_0/block_0/text_mlp": (2, 64),
        "layers_1/block_0/mlp": (3, 64),
    }
    assert all((scores > 0).all() for scores in once.units.values())


def test_scores_of_another_model_are_refused(measured):
    with pytest.raises(UserError, match="has the scores of another model than distill.teacher"):
        importance.load(measured[2] / "once.npz", "another")


def test_damaged_scores_are_refused(measured, tmp_path):
    data = bytearray((measured[2] / "once.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(UserError, match="x.npz"):
        importance.load(tmp_path / "x.npz", "t")


def test_a_loss_that_ignores_a_unit_gives_it_nothing():
    """A unit whose row of the last matrix is zero has a gradient there, but the weight is zero."""
    model = build(config_of().model)
    params = filled(model)
    flat = flatten_dict(params, sep="/")
    path = "layers_1/block_0/mlp/down/kernel"
    flat[path] = flat[path].at[:, 5].set(0)
    scores = importance.unit_scores({path: flat[path]}, {path: jnp.ones_like(flat[path])})[
        "layers_1/block_0/mlp"
    ]
    assert (scores[:, 5] == 0).all() and (np.delete(scores, 5, 1) > 0).all()
