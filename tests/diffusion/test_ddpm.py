from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion import config as config_lib
from moe_diffusion.diffusion import ddpm, objectives, samplers
from moe_diffusion.errors import UserError
from tests.labelled import Labelled

FULL = ddpm.linear_process()
RNG = np.random.default_rng(0)
X_START = RNG.uniform(-0.9, 0.9, size=(4, 2, 2, 3)).astype(np.float32)
NOISE = RNG.normal(size=X_START.shape).astype(np.float32)
STEPS = np.array([0, 1, 500, 999])


@pytest.mark.parametrize(
    "spacing, steps",
    [
        ("2", [0, 999]),
        ("2,3", [0, 499, 500, 750, 999]),  # 249.5 rounds to the even 250
        ("1,1,1", [0, 334, 667]),  # 1,000 in three: the first section is one longer
        ("ddim4", [0, 250, 500, 750]),
        ("ddim3", [0, 334, 668]),  # stride 334 is the smallest that makes three
    ],
)
def test_spacing(spacing, steps):
    assert ddpm.spaced_timesteps(spacing).tolist() == steps


def test_all_steps():
    assert ddpm.spaced_timesteps("1000").tolist() == list(range(1000))
    assert ddpm.spaced_timesteps("ddim1000").tolist() == list(range(1000))


@pytest.mark.parametrize(
    "spacing, message",
    [
        ("many", "'many' is none of 250"),
        ("", "'' is none of"),
        ("ddim", "'ddim' is none of"),
        ("1", "at least 2 steps"),
        ("0,5", "0 steps do not fit a section of 500"),
        ("1001", "1001 steps do not fit a section of 1000"),
        ("10,501", "501 steps do not fit a section of 500"),
        ("ddim300", "ddim300: no integer stride makes 300 of 1000"),
    ],
)
def test_impossible_spacing(spacing, message):
    with pytest.raises(UserError, match=message):
        ddpm.spaced_timesteps(spacing)


def test_impossible_steps_are_found_before_sampling():
    with pytest.raises(UserError, match="1001 steps do not fit"):
        samplers.make_sampler(Label(), settings(steps=1001))


def test_respacing_keeps_the_marginals():
    steps = ddpm.spaced_timesteps("7,3")
    process = ddpm.respace(FULL, steps)
    np.testing.assert_allclose(process.alphas_cumprod, FULL.alphas_cumprod[steps], rtol=1e-12)
    np.testing.assert_array_equal(process.timesteps, steps)
    again = ddpm.respace(process, np.array([1, 4]))
    np.testing.assert_array_equal(again.timesteps, steps[[1, 4]])


def test_posterior_by_bayes():
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    t, x_start, x_t = 500, 0.3, -1.2
    beta, before = FULL.betas[t], FULL.alphas_cumprod_prev[t]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = np.sqrt(1 - beta) * x_t / beta + np.sqrt(before) * x_start / (1 - before)
    np.testing.assert_allclose(FULL.posterior_variance[t], 1 / precision)
    ours = ddpm.posterior_mean(FULL, jnp.array([x_start]), jnp.array([x_t]), jnp.array([t]))
    np.testing.assert_allclose(ours, [mean / precision], rtol=1e-6)


def network_output(v):
    """The noise itself, and v everywhere."""
    return jnp.concatenate([NOISE, jnp.full_like(NOISE, v)], axis=-1)


loss_terms = jax.jit(partial(ddpm.loss_terms, FULL))
reverse = jax.jit(partial(ddpm.reverse, FULL), static_argnames="clip")


def test_reverse_undoes_diffuse():
    x_t = ddpm.diffuse(FULL, X_START, STEPS, NOISE)
    p = reverse(network_output(1.0), x_t, STEPS)
    np.testing.assert_allclose(p.x_start, X_START, atol=1e-4)
    np.testing.assert_allclose(p.mean[0], X_START[0], atol=1e-4)  # nothing is left at step 0
    wanted = np.log(FULL.betas[STEPS])[:, None, None, None]
    np.testing.assert_allclose(p.log_variance, np.broadcast_to(wanted, X_START.shape), rtol=1e-6)
    smaller = reverse(network_output(-1.0), x_t, STEPS).log_variance
    np.testing.assert_allclose(smaller[1:, 0, 0, 0], np.log(FULL.posterior_variance[STEPS[1:]]))
    clipped = reverse(network_output(1.0), 3 * x_t, STEPS, clip=True).x_start
    assert np.abs(clipped).max() == 1.0


def test_a_perfect_network_has_no_loss():
    mse, vb = loss_terms(network_output(-1.0), X_START, STEPS, NOISE)
    np.testing.assert_allclose(mse, 0)
    np.testing.assert_allclose(vb[1:], 0, atol=1e-6)
    # At step 0 the posterior of step 1 is wider than a level of 8 bits.
    assert 0.1 < vb[0] < 3


def test_kl_by_hand():
    """Twice the variance at the right mean: (1/2 - 1 + log 2) / 2 nats."""
    share = np.log(2) / (np.log(FULL.betas[500]) - FULL.posterior_log_variance[500])
    _, vb = loss_terms(network_output(2 * share - 1), X_START, np.full(4, 500), NOISE)
    np.testing.assert_allclose(vb, (np.log(2) - 0.5) / 2 / np.log(2), rtol=1e-3)


def test_the_bound_trains_the_variance_only():
    def bound(output):
        return loss_terms(output, X_START, STEPS, NOISE)[1].sum()

    grads = jax.jit(jax.grad(bound))(network_output(0.3) + 0.1)
    assert (grads[..., :3] == 0).all() and (grads[..., 3:] != 0).all()


def test_probabilities_of_all_levels_add_up():
    levels = np.arange(256, dtype=np.float32)[:, None] / 127.5 - 1
    mean, log_scale = jnp.array([0.2, -0.99]), jnp.array([-2.0, -4.0])
    logs = jax.jit(ddpm._discretized_log_likelihood)(levels, mean, log_scale)
    np.testing.assert_allclose(np.exp(logs).sum(0), 1.0, rtol=1e-5)


def test_tanh():
    u = np.linspace(-12, 12, 1001).astype(np.float32)
    np.testing.assert_allclose(ddpm._tanh(u), np.tanh(u), atol=2e-7)
    slope = jax.jit(jax.grad(lambda u: ddpm._tanh(u).sum()))(u)
    np.testing.assert_allclose(slope, 1 - np.tanh(u) ** 2, atol=5e-7)


MEAN, STD = 0.4, 0.3


class GaussianData(Labelled):
    """What a network learns of data N(MEAN, STD^2): the exact expectation of the noise.

    The first label sees another mean; the null label, 2, sees 0.
    """

    num_classes: int = 2
    v: float = 1.0

    @nn.compact
    def __call__(self, x, t, cond, train):
        y = cond["label"]
        kept = jnp.asarray(FULL.alphas_cumprod, jnp.float32)[t.astype(int)][:, None, None, None]
        mean = jnp.array([-MEAN, MEAN, 0.0])[y][:, None, None, None]
        epsilon = jnp.sqrt(1 - kept) * (x - jnp.sqrt(kept) * mean) / (kept * STD**2 + 1 - kept)
        return jnp.concatenate([epsilon, jnp.full_like(x, self.v)], axis=-1)


def settings(**sampling):
    config = config_lib.default()
    config.model.learn_sigma = True
    config.diffusion.path = "ddpm"
    config.sampling.update({"sampler": "ddpm", "steps": 50, "cfg": 1.0} | sampling)
    config_lib.validate(config)
    return config


def draw(config, num=2, size=32, model=None, noise_seed=1, **options):
    """Images [num, size, size, 1] of label 1."""
    keys = jax.random.split(jax.random.key(0), num)
    z = jax.vmap(lambda key: jax.random.normal(key, (size, size, 1)))(keys)
    run = samplers.make_sampler(model or GaussianData(), config, **options)
    noise_keys = jax.random.split(jax.random.key(noise_seed), num)
    return np.asarray(run({}, z, {"label": jnp.ones(num, jnp.int32)}, noise_keys))


@pytest.mark.parametrize(
    "sampling",
    [
        {"sampler": "ddpm", "steps": 100},
        {"sampler": "ddim", "steps": 100},
        {"sampler": "ddim", "respacing": "ddim125", "eta": 0.5},
    ],
)
def test_samplers_reach_the_data(sampling):
    x = draw(settings(**sampling))
    np.testing.assert_allclose(x.mean(), MEAN, atol=0.03)
    np.testing.assert_allclose(x.std(), STD, atol=0.03)


def test_the_learned_variance_matters():
    wide, narrow = (draw(settings(steps=10), model=GaussianData(v=v)) for v in (1.0, -1.0))
    assert wide.std() > 1.1 * narrow.std()


def test_ddim_without_noise_is_deterministic():
    once, again = (draw(settings(sampler="ddim", steps=3), noise_seed=n) for n in (1, 2))
    np.testing.assert_array_equal(once, again)
    once, again = (draw(settings(sampler="ddpm", steps=3), noise_seed=n) for n in (1, 2))
    assert np.abs(once - again).max() > 0.01


def test_ddpm_adds_noise_in_all_steps_but_the_last():
    none, last, first = (
        draw(
            settings(steps=3),
            noise=lambda keys, step, shape, k=k: jnp.full(shape, 1.0 * (step == k)),
        )
        for k in (-1, 2, 0)
    )
    np.testing.assert_array_equal(none, last)
    assert np.abs(none - first).min() > 0.01


class Label(Labelled):
    """The label as noise and as v, whatever the input."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, x, t, cond, train):
        y = cond["label"]
        one = jnp.broadcast_to(y[:, None, None, None].astype(jnp.float32), x.shape)
        return jnp.concatenate([one, one], axis=-1)


@pytest.mark.parametrize("channels, epsilon", [(0, [-1, -1, -1, -1]), (3, [-1, -1, -1, 1])])
def test_guidance_leaves_the_variance_alone(channels, epsilon):
    """Label 1 of 2, scale 3: epsilon 2 + 3 (1 - 2) = -1 where it is guided; v = 1 everywhere."""
    config = settings(respacing="2", cfg=3.0, cfg_channels=channels, joint=True)
    options = {"noise": lambda keys, step, shape: jnp.ones(shape), "return_trajectory": True}
    run = samplers.make_sampler(Label(), config, **options)
    states = run({}, jnp.zeros((1, 1, 1, 4)), {"label": jnp.array([1])})
    process = ddpm.respace(FULL, ddpm.spaced_timesteps("2"))
    start = -np.sqrt(1 / process.alphas_cumprod[1] - 1) * np.array(epsilon)
    mean = process.posterior_coefficients[0][1] * start
    np.testing.assert_allclose(states[0, 0, 0, 0], mean + np.sqrt(process.betas[1]), rtol=1e-4)


class Echo(Labelled):
    """Label as epsilon, log of the step as v; a router that sows."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, x, t, cond, train):
        y = cond["label"]
        assert train
        bias = self.param("bias", nn.initializers.zeros, ())
        self.sow("losses", "balance", jnp.array([1.0, 2.0]), lambda _, new: new, lambda: None)
        one = jnp.ones_like(x)
        epsilon, v = (y + bias)[:, None, None, None] * one, t[:, None, None, None] / 500 * one
        return jnp.concatenate([epsilon, v], axis=-1)


def test_loss_by_its_parts():
    draws = objectives.Draws(
        jnp.asarray(STEPS), jnp.asarray(NOISE), jnp.array([0.05, 0.3, 0.09, 0.5])
    )
    batch = {"image": X_START, "label": jnp.array([0, 1, 2, 3])}
    arguments = ({}, batch, draws, settings().diffusion, {"balance": 0.5})
    loss, aux = objectives.diffusion_loss(Echo(), {"bias": jnp.float32(0)}, *arguments)
    label = np.array([4, 1, 4, 3])[:, None, None, None]
    v = np.broadcast_to(STEPS[:, None, None, None] / 500, X_START.shape)
    output = np.concatenate([np.broadcast_to(label, X_START.shape), v], -1).astype(np.float32)
    mse, vb = loss_terms(output, X_START, STEPS, NOISE)
    np.testing.assert_allclose(mse.mean(), np.mean((label - NOISE) ** 2), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["mse"], mse.mean(), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["vb"], vb.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, mse.mean() + vb.mean() + 0.5 * 3, rtol=1e-5)
    assert aux.metrics["balance"] == 3


def test_loss_of_a_config():
    config = settings()
    config.loss_weights = {"balance": 0.5}
    loss_fn = jax.jit(objectives.make_loss(Echo(), config))
    batch = {"image": X_START, "label": jnp.array([0, 1, 2, 3])}
    results = [
        loss_fn({"bias": jnp.float32(0)}, {}, batch, jax.random.key(seed)) for seed in (0, 0, 1)
    ]
    names = {"loss", "mse", "vb", "balance", "error_by_time"}
    assert set(results[0][1].metrics) == names
    losses = [float(loss) for loss, _ in results]
    assert losses[0] == losses[1] != losses[2] and np.isfinite(losses).all()
