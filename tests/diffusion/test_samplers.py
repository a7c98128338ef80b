from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion import config
from moe_diffusion.diffusion import samplers, sde, solvers
from moe_diffusion.errors import UserError
from tests.labelled import Labelled


def section(**changes):
    sampling = config.default().sampling
    sampling.update(changes)
    return sampling


def solve(velocity, z, steps, sampler="heun", return_trajectory=False, **changes):
    sampling = section(steps=steps, sampler=sampler, **changes)
    return solvers.solve(velocity, z, sampling, return_trajectory)


def test_both_are_exact_for_a_constant_velocity():
    z = jnp.arange(4.0).reshape(1, 2, 2, 1)
    for method in ("euler", "heun"):
        np.testing.assert_allclose(solve(lambda x, t: 3.0 + 0 * x, z, 5, method), z + 3)


def test_by_hand():
    z = jnp.ones((1,))
    # dx/dt = x in two steps: Euler 1.5^2, Heun (1 + 1/2 + 1/8)^2.
    np.testing.assert_allclose(solve(lambda x, t: x, z, 2, "euler"), 2.25)
    np.testing.assert_allclose(solve(lambda x, t: x, z, 2, "heun"), 1.625**2)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_order_of_convergence(method, order):
    # dx/dt = t x, x(1) = exp(1/2)
    errors = [
        abs(float(solve(lambda x, t: t * x, jnp.ones(()), n, method)) - np.exp(0.5))
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

    solve(velocity, jnp.ones((1,)), 4, method).block_until_ready()
    jax.effects_barrier()
    assert seen == times


def test_shifted_times():
    """FLUX.1 [dev], 256 tokens (a latent of 32 x 32): exp(mu) = e^0.5 = 1.648721.

    Half noise becomes 1.648721 * 0.5 / (1 + 0.648721 * 0.5) = 0.622459; so of dx/dt = t, Euler's
    second of two steps has the slope 0.377541 and the length 0.622459.
    """
    z = jnp.zeros((1, 32, 32, 1))
    grid = solvers.time_grid(section(steps=2, time_shift="resolution"), z.shape)
    np.testing.assert_allclose(grid, [0, 0.377541, 1], atol=1e-6)
    x = solve(lambda x, t: t + 0 * x, z, 2, "euler", time_shift="resolution")
    np.testing.assert_allclose(x, 0.377541 * 0.622459, rtol=1e-5)
    # Heun is exact for dx/dt = t on any grid, and of a last Euler step the length counts, too.
    x = solve(lambda x, t: t + 0 * x, z, 2, "heun", time_shift="resolution")
    np.testing.assert_allclose(x, 0.5, rtol=1e-6)
    x = solve(lambda x, t: t + 0 * x, z, 2, final_euler=True, time_shift="resolution")
    np.testing.assert_allclose(x, 0.377541**2 / 2 + 0.377541 * 0.622459, rtol=1e-5)


def test_trajectory():
    states = solve(lambda x, t: 1 + 0 * x, jnp.zeros((2,)), 4, return_trajectory=True)
    np.testing.assert_allclose(states, np.repeat([[0.25], [0.5], [0.75], [1.0]], 2, axis=1))


def test_errors():
    with pytest.raises(UserError, match="'rk45'; choose 'euler' or 'heun'"):
        solve(lambda x, t: x, jnp.zeros((1,)), 4, "rk45")
    with pytest.raises(UserError, match="at least 1"):
        solve(lambda x, t: x, jnp.zeros((1,)), 0)


class TwoHeaded(Labelled):
    """Velocity = label + t in the first half of the channels, nonsense in the second."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, t, cond, train):
        y = cond["label"]
        v = jnp.broadcast_to((y + t)[:, None, None, None], x.shape)
        return jnp.concatenate([v, jnp.full_like(v, jnp.nan)], axis=-1)


def test_model_sampler():
    settings = config.default()
    sampling = settings.sampling
    sampling.sampler, sampling.steps, sampling.cfg = "heun", 3, 2.0
    z = jnp.zeros((2, 2, 2, 1))
    x = samplers.make_sampler(TwoHeaded(), settings)({}, z, {"label": jnp.array([1, 4])})
    # The integral of label + t, guided: 10 + 2 (label - 10) + 1/2.
    np.testing.assert_allclose(x[:, 0, 0, 0], [-7.5, -1.5], rtol=1e-6)


def test_final_euler():
    z = jnp.ones((1,))
    # dx/dt = x in two steps: Heun 1 + 1/2 + 1/8, then Euler 1.5.
    x = solve(lambda x, t: x, z, 2, "heun", final_euler=True)
    np.testing.assert_allclose(x, 1.625 * 1.5)
    np.testing.assert_allclose(solve(lambda x, t: x, z, 1, final_euler=True), 2.0)
    states = solve(lambda x, t: x, z, 2, final_euler=True, return_trajectory=True)
    np.testing.assert_allclose(states[:, 0], [1.625, 1.625 * 1.5])


@jax.jit
def adaptive_examples():
    """dx/dt = t x, interpolated; one fast image in a crowd; a solver that gives up."""
    adaptive = solvers.solve_adaptive

    def growth(x, t):
        return t * x

    def fast_among_slow(x, t):
        return jnp.concatenate([40 * jnp.cos(40 * t) + 0 * x[:1], 0 * x[1:]])

    z = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    return (
        adaptive(growth, z, section(rtol=1e-5, atol=1e-8, steps=4), return_trajectory=True),
        adaptive(fast_among_slow, jnp.zeros((4096, 2)), section(rtol=1e-3, atol=1e-6))[0, 0],
        adaptive(growth, z, section(rtol=1e-6, atol=1e-9), max_steps=2),
    )


def test_adaptive():
    z = np.array([[1.0, 2.0], [3.0, -1.0]])
    states, fast, unfinished = adaptive_examples()
    np.testing.assert_allclose(states[1], z * np.exp(0.125), rtol=1e-4)
    np.testing.assert_allclose(states[-1], z * np.exp(0.5), rtol=1e-4)
    # The error of one image is not averaged over the 4,095 that stand still.
    np.testing.assert_allclose(fast, np.sin(40), atol=3e-3)
    assert np.isnan(unfinished).all()


MEAN, STD = 0.5, 0.4


class GaussianFlow(Labelled):
    """The exact velocity for data N(MEAN, STD^2) and noise of standard deviation `scale`."""

    num_classes: int = 10
    scale: float = 1.0

    @nn.compact
    def __call__(self, x, t, cond, train):
        t = t[:, None, None, None]
        slope = (t * STD**2 - (1 - t) * self.scale**2) / (
            t**2 * STD**2 + (1 - t) ** 2 * self.scale**2
        )
        return MEAN + slope * (x - t * MEAN)


def draw(num=2, seed=0, scale=1.0, **sampling):
    settings = config.default()
    settings.diffusion.noise_scale = scale
    settings.sampling.update({"cfg": 1.0, "steps": 50} | sampling)
    keys = jax.random.split(jax.random.key(seed), 4)[:num]
    z = jax.vmap(lambda key: jax.random.normal(key, (48, 48, 1)))(keys)
    run = samplers.make_sampler(GaussianFlow(scale=scale), settings)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    return np.asarray(run({}, z, {"label": jnp.zeros(num, jnp.int32)}, keys))


@pytest.mark.parametrize(
    "sampling",
    [
        {"sampler": "heun", "final_euler": True},
        {"sampler": "dopri5", "scale": 2.0},
        {"sampler": "sde"},
        {"sampler": "sde", "sde_last_step": "euler", "sde_last_step_size": 0.01},
        {"sampler": "sde_heun", "scale": 2.0},
        {"sampler": "sde", "sde_diffusion": "constant", "sde_norm": 0.2, "sde_last_step": "euler"},
        {"sampler": "sde_heun", "sde_diffusion": "decreasing"},
        {"sampler": "sde_heun", "sde_diffusion": "increasing_decreasing"},
    ],
)
def test_samplers_reach_the_data(sampling):
    x = draw(**sampling)
    np.testing.assert_allclose(x.mean(), MEAN, atol=0.03)
    np.testing.assert_allclose(x.std(), STD, atol=0.03)


def test_an_image_does_not_depend_on_its_batch():
    two, four = (draw(num, sampler="sde", steps=5) for num in (2, 4))
    np.testing.assert_allclose(two, four[:2], atol=1e-6)
    assert np.abs(four[0] - four[1]).max() > 0.1


def test_the_noise_of_the_sde_is_used():
    z = jnp.ones((1, 1))
    noises = [lambda step: jnp.zeros((1, 1)), lambda step: jnp.ones((1, 1))]
    sampling = section(sampler="sde", steps=2, sde_norm=0.5)
    xs = [float(sde.solve(lambda x, t: 0 * x, z, sampling, n)[0, 0]) for n in noises]
    # One step of 0.96 from t = 0: drift -w x = -0.5, noise sqrt(2 * 0.5 * 0.96); then the last
    # of 0.04 with w = 0.02 and score -x / 0.04.
    first = [1 - 0.5 * 0.96, 1 - 0.5 * 0.96 + np.sqrt(0.96)]
    np.testing.assert_allclose(xs, [x - 0.04 * 0.02 * x / 0.04 for x in first], rtol=1e-5)


def test_stochastic_samplers_need_keys():
    settings = config.default()
    settings.sampling.sampler = "sde"
    run = samplers.make_sampler(GaussianFlow(), settings)
    with pytest.raises(ValueError, match="sampler sde needs keys"):
        run({}, jnp.zeros((1, 2, 2, 1)), {"label": jnp.zeros(1, jnp.int32)})


def test_only_some_channels_are_guided():
    settings = config.default()
    settings.sampling.update(sampler="euler", steps=1, cfg=2.0, cfg_channels=3, joint=True)
    run = samplers.make_sampler(TwoHeaded(), settings)
    x = run({}, jnp.zeros((1, 1, 1, 4)), {"label": jnp.array([4])})
    np.testing.assert_allclose(x[0, 0, 0], [-2, -2, -2, 4])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sampling.sampler": "ddpm"}, "ddpm does not fit diffusion.path = flow: choose heun"),
        (
            {"diffusion.path": "ddpm", "model.learn_sigma": True},
            "sampling.sampler = heun does not fit diffusion.path = ddpm: choose ddpm | ddim",
        ),
        (
            {"diffusion.path": "ddpm", "sampling.sampler": "ddim"},
            "diffusion.path = ddpm trains a variance: set model.learn_sigma=true",
        ),
        ({"sampling.clip": True}, "sampling.clip = True is for diffusion.path = ddpm"),
        ({"sampling.respacing": "10"}, "sampling.respacing = 10 is for diffusion.path = ddpm"),
        ({"sampling.sampler": "sde", "sampling.steps": 1}, "take at least 2"),
        ({"sampling.eta": 1.5}, "sampling.eta = 1.5 must be between 0 and 1"),
        ({"sampling.sde_last_step_size": 0.0}, "sampling.sde_last_step_size = 0.0 must be posit"),
        ({"sampling.cfg_channels": -1}, "sampling.cfg_channels = -1 must be zero or positive"),
    ],
)
def test_impossible_settings(changes, message):
    settings = config.default()
    settings.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        config.validate(settings)


DDPM = {"diffusion.path": "ddpm", "model.learn_sigma": True, "sampling.sampler": "ddpm"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"diffusion.prediction": "data"}, "diffusion.prediction = data is for diffusion.path ="),
        ({"diffusion.noise_scale": 2.0}, "diffusion.noise_scale = 2.0 is for diffusion.path = fl"),
        ({"sampling.cfg_interval": (0.1, 1.0)}, "sampling.cfg_interval = (0.1, 1.0) is for diff"),
    ],
)
def test_settings_of_flows_do_not_fit_ddpm(changes, message):
    settings = config.default()
    settings.update_from_flattened_dict(DDPM)
    config.validate(settings)
    settings.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=re.escape(message)):
        config.validate(settings)
