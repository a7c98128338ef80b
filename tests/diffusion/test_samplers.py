from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion import config
from moe_diffusion.diffusion import samplers
from moe_diffusion.errors import UserError


def test_both_are_exact_for_a_constant_velocity():
    z = jnp.arange(4.0).reshape(1, 2, 2, 1)
    for method in ("euler", "heun"):
        np.testing.assert_allclose(samplers.sample(lambda x, t: 3.0 + 0 * x, z, 5, method), z + 3)


def test_by_hand():
    z = jnp.ones((1,))
    # dx/dt = x in two steps: Euler 1.5^2, Heun (1 + 1/2 + 1/8)^2.
    np.testing.assert_allclose(samplers.sample(lambda x, t: x, z, 2, "euler"), 2.25)
    np.testing.assert_allclose(samplers.sample(lambda x, t: x, z, 2, "heun"), 1.625**2)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
    # dx/dt = t x, x(1) = exp(1/2)
    errors = [
        abs(float(samplers.sample(lambda x, t: t * x, jnp.ones(()), n, method)) - np.exp(0.5))
        for n in (8, 16)
    ]
    assert errors[0] / errors[1] > 0.8 * 2**order


@pytest.mark.parametrize(
    "method, times",
    [("euler", [0, 0.25, 0.5, 0.75]), ("heun", [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1])],
)
def test_evaluation_times(method, times):
    seen = []

    def velocity(x, t):
        jax.debug.callback(lambda value: seen.append(float(value)), t, ordered=True)
        return x

    samplers.sample(velocity, jnp.ones((1,)), 4, method).block_until_ready()
    jax.effects_barrier()
    assert seen == times


def test_trajectory():
    states = samplers.sample(lambda x, t: 1 + 0 * x, jnp.zeros((2,)), 4, return_trajectory=True)
    np.testing.assert_allclose(states, np.repeat([[0.25], [0.5], [0.75], [1.0]], 2, axis=1))


def test_errors():
    with pytest.raises(UserError, match="'rk45'; choose 'euler' or 'heun'"):
        samplers.sample(lambda x, t: x, jnp.zeros((1,)), 4, "rk45")
    with pytest.raises(UserError, match="at least 1"):
        samplers.sample(lambda x, t: x, jnp.zeros((1,)), 0)


class TwoHeaded(nn.Module):
    """Velocity = label + t in the first half of the channels, nonsense in the second."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, t, y, train):
        v = jnp.broadcast_to((y + t)[:, None, None, None], x.shape)
        return jnp.concatenate([v, jnp.full_like(v, jnp.nan)], axis=-1)


def test_model_sampler():
    settings = config.default()
    sampling = settings.sampling
    sampling.sampler, sampling.steps, sampling.cfg = "heun", 3, 2.0
    z = jnp.zeros((2, 2, 2, 1))
    x = samplers.make_sampler(TwoHeaded(), settings)({}, z, jnp.array([1, 4]))
    # The integral of label + t, guided: 10 + 2 (label - 10) + 1/2.
    np.testing.assert_allclose(x[:, 0, 0, 0], [-7.5, -1.5], rtol=1e-6)
