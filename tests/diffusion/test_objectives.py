from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion import config as config_lib
from moe_diffusion import time_buckets
from moe_diffusion.diffusion import objectives
from moe_diffusion.errors import UserError
from tests.labelled import Labelled

B, NULL = 6, 4
IMAGE = np.random.default_rng(0).normal(size=(B, 2, 2, 3)).astype(np.float32)
BATCH = {"image": IMAGE, "label": jnp.array([0, 1, 2, 3, 0, 1])}
DRAWS = objectives.Draws(
    t=np.linspace(0, 1, B, dtype=np.float32),
    noise=np.random.default_rng(1).normal(size=IMAGE.shape).astype(np.float32),
    drop_uniform=jnp.array([0.05, 0.3, 0.09, 0.1, 0.9, 0.5]),
)


class Echo(Labelled):
    """Twice the channels: the label in the first half, nonsense in the second. Two layers sow."""

    num_classes: int = NULL

    @nn.compact
    def __call__(self, x, t, cond, train):
        y = cond["label"]
        assert train
        bias = self.param("bias", nn.initializers.zeros, ())
        for collection, name, values in (
            ("losses", "balance", [1.0, 2.0]),
            ("metrics", "load_max", [1.0, 2.0]),
            ("router_stats", "load", [5.0, 6.0]),
        ):
            self.sow(collection, name, jnp.array(values), lambda _, new: new, lambda: None)
        v = jnp.broadcast_to((y + bias)[:, None, None, None], x.shape)
        return jnp.concatenate([v, jnp.full_like(v, jnp.nan)], axis=-1)


def section(**changes):
    diffusion = config_lib.default().diffusion
    diffusion.update(changes)
    return diffusion


def evaluate(loss_weights=None):
    params, weights = {"bias": jnp.float32(0)}, {"balance": 0.5}
    weights = weights if loss_weights is None else loss_weights
    return objectives.diffusion_loss(Echo(), params, {}, BATCH, DRAWS, section(), weights)


def test_by_hand():
    loss, aux = evaluate()
    label = np.array([NULL, 1, NULL, 3, 0, 1])  # dropped where the uniform is below 0.1, strictly
    errors = (label[:, None, None, None] - (IMAGE - DRAWS.noise)) ** 2
    mse = np.mean([error.mean() for error in errors])
    np.testing.assert_allclose(aux.metrics["mse"], mse, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["balance"], 3.0)  # sum over the layers, unweighted
    np.testing.assert_allclose(aux.metrics["load_max"], 1.5)  # mean over the layers
    np.testing.assert_allclose(loss, mse + 1.5, rtol=1e-6)
    # t = 0, 0.2, 0.4, 0.6, 0.8, 1: one sample in each fifth, and two in the last.
    means = [error.mean() for error in errors]
    by_time = time_buckets.spread(aux.metrics)
    expected = [*means[:4], (means[4] + means[5]) / 2]
    found = [by_time[f"error_by_time/0.{i}-{(i + 2) / 10:.1f}"] for i in (0, 2, 4, 6, 8)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert aux.metrics["loss"] is loss
    np.testing.assert_array_equal(aux.router_stats["load"], [5.0, 6.0])


def test_loss_names_must_match():
    with pytest.raises(UserError, match="balance"):
        evaluate(loss_weights={})
    with pytest.raises(UserError, match="capacity"):
        evaluate(loss_weights={"balance": 1.0, "capacity": 1.0})


def test_draws():
    draws = objectives.draw(jax.random.key(0), IMAGE.shape, section())
    assert (draws.t.shape, draws.noise.shape) == ((B,), IMAGE.shape)
    keys = [jax.random.key(seed) for seed in (0, 1)]
    again, other = (objectives.draw(key, IMAGE.shape, section()) for key in keys)
    jax.tree.map(np.testing.assert_array_equal, draws[:3], again[:3])
    assert draws.dropout == again.dropout and draws.dropout != other.dropout
    assert (draws.t != other.t).all() and (draws.t != draws.drop_uniform).all()
    steps = objectives.draw(keys[0], (4096, 1), section(path="ddpm")).t
    assert (steps.min(), steps.max(), steps.dtype) == (0, 999, jnp.int32)


def test_loss_of_a_config():
    config = config_lib.default()
    config.loss_weights = {"balance": 0.5}
    config.diffusion.update(time_sampling="logit_normal", cond_dropout=1.0)
    loss_fn = jax.jit(objectives.make_loss(Echo(), config))
    params, key = {"bias": jnp.float32(0)}, jax.random.key(3)
    loss, aux = loss_fn(params, {}, BATCH, key)
    draws = objectives.draw(key, IMAGE.shape, config.diffusion)
    arguments = ({}, BATCH, draws, config.diffusion, {"balance": 0.5})
    expected, _ = objectives.diffusion_loss(Echo(), params, *arguments)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert set(aux.metrics) == {"loss", "mse", "balance", "load_max", "error_by_time"}


def test_time_of_ddpm_runs_from_noise_to_data():
    """Step 0 is nearest to the data: time 1; step 999 is 1 - 999 / 1000."""
    steps = DRAWS._replace(t=jnp.array([0, 500, 999, 0, 0, 0]))
    asked = objectives.objective(IMAGE, steps, section(path="ddpm"))
    np.testing.assert_allclose(asked.time[:3], [1, 0.5, 0.001], rtol=1e-4)


class Oracle(Labelled):
    """Puts out the true images plus an offset."""

    num_classes: int = NULL

    @nn.compact
    def __call__(self, x, t, cond, train):
        return IMAGE + self.param("offset", nn.initializers.zeros, ())


def test_a_network_that_predicts_the_data():
    """The same floor of 1 - t on both sides: the error is divided by max(1 - t, t_eps)."""
    flow = section(prediction="data", t_eps=0.3, noise_scale=2.0)

    def loss(offset):
        params = {"offset": jnp.float32(offset)}
        return objectives.diffusion_loss(Oracle(), params, {}, BATCH, DRAWS, flow, {})[0]

    assert loss(0.0) == 0
    by_hand = np.mean([(0.5 / max(1 - t, 0.3)) ** 2 for t in DRAWS.t])
    np.testing.assert_allclose(loss(0.5), by_hand, rtol=1e-5)


def test_velocity_of_the_data():
    """Away from t = 1 it is data - noise, whatever the scale of the noise."""
    config = config_lib.default().diffusion
    t = np.linspace(0, 0.9, B, dtype=np.float32)
    x_t = objectives.paths.interpolate(IMAGE, 3 * DRAWS.noise, t)
    twice = np.concatenate([IMAGE, np.full_like(IMAGE, np.nan)], -1)  # the second half is not read
    config.prediction = "data"
    v = objectives.velocity_of(twice, x_t, t, config)
    np.testing.assert_allclose(v, IMAGE - 3 * DRAWS.noise, atol=1e-4)
    scalar = objectives.velocity_of(twice[2:3], x_t[2:3], t[2], config)
    np.testing.assert_allclose(scalar, v[2:3], rtol=1e-6)
    config.prediction = "velocity"
    np.testing.assert_array_equal(objectives.velocity_of(twice, x_t, t, config), IMAGE)
