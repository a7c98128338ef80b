"""Discrete diffusion as DiT trains and samples it: the process, its loss terms and its steps.

A network sees x_t and the integer step t (as float; 0 has the least noise). It returns 2C channels:
the noise epsilon, and v, which places log sigma^2 between the two bounds of iDDPM.

DDPM (arXiv 2006.11239), learned variance and respacing (iDDPM, arXiv 2102.09672), DDIM
(arXiv 2010.02502). Time here runs from data (t = 0) to noise, as in those papers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.diffusion.paths import expand
from moe_diffusion.diffusion.solvers import run_steps
from moe_diffusion.errors import UserError

NUM_TIMESTEPS = 1000
_LOG2 = float(np.log(2.0))


@dataclass(frozen=True, eq=False)
class Process:
    """A Gaussian diffusion of N steps. Its tables are float64[N]; the step is the index.

    Attributes:
      betas: variance of the noise that step i adds.
      timesteps: i64[N], what the network is told in step i.
    """

    betas: np.ndarray
    timesteps: np.ndarray

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """The variance of q(x_{t-1} | x_t, x_0), DDPM eq. 7."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """The logarithm of the posterior variance; step 0, where it is 0, has that of step 1."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def posterior_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """(a, b) of the posterior's mean a x_0 + b x_t, DDPM eq. 7."""
        rest = 1.0 - self.alphas_cumprod
        return (
            self.betas * np.sqrt(self.alphas_cumprod_prev) / rest,
            (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / rest,
        )


def linear_process() -> Process:
    """The 1,000 steps of DDPM and DiT: betas from 1e-4 to 0.02."""
    return Process(np.linspace(1e-4, 0.02, NUM_TIMESTEPS), np.arange(NUM_TIMESTEPS))


def respace(process: Process, timesteps: np.ndarray) -> Process:
    """The process that visits only some steps, with the same marginals there (iDDPM, sec. 4)."""
    kept = process.alphas_cumprod[timesteps]
    betas = 1.0 - kept / np.append(1.0, kept[:-1])
    return Process(betas, process.timesteps[timesteps])


def spaced_timesteps(spacing: str) -> np.ndarray:
    """The steps that a sampler visits, ascending i64[N].

    Args:
      spacing: "250" spreads so many evenly over all. "10,15,25" takes so many in each of three
        equal sections. "ddim50" takes so many, at least 2, with an integer stride from 0, as DDIM
        does.

    Raises:
      UserError: the text has another form, or asks for something impossible.
    """
    try:
        counts = [int(count) for count in spacing.removeprefix("ddim").split(",")]
    except ValueError:
        forms = "250 | 10,15,25 | ddim50"
        raise UserError(f"sampling.respacing = {spacing!r} is none of {forms}") from None
    if sum(counts) < 2:
        raise UserError("sampling.steps or sampling.respacing: take at least 2 steps")
    if spacing.startswith("ddim"):
        return _strided_timesteps(sum(counts))
    steps, start = [], 0
    for index, count in enumerate(counts):
        size = NUM_TIMESTEPS // len(counts) + (index < NUM_TIMESTEPS % len(counts))
        if not 1 <= count <= size:
            raise UserError(
                f"{count} steps do not fit a section of {size} (of {NUM_TIMESTEPS} steps in all): "
                "change sampling.steps or sampling.respacing"
            )
        # The published samplers add up step by step too, so that halves round in the same way.
        position, stride = 0.0, (size - 1) / max(count - 1, 1)
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += size
    return np.array(steps)


def _strided_timesteps(count: int) -> np.ndarray:
    for stride in range(1, NUM_TIMESTEPS + 1):
        steps = np.arange(0, NUM_TIMESTEPS, stride)
        if len(steps) == count:
            return steps
    raise UserError(
        f"sampling.respacing = ddim{count}: no integer stride makes {count} of {NUM_TIMESTEPS} "
        "steps; take a divisor"
    )


def lookup(table: np.ndarray, i: jax.Array, x: jax.Array) -> jax.Array:
    """Entries i ([B] or a scalar) of a table as float32, shaped to multiply x [B, ...]."""
    return expand(jnp.asarray(table, jnp.float32)[i], x)


def diffuse(process: Process, x_start: jax.Array, i: jax.Array, noise: jax.Array) -> jax.Array:
    """x_t of q(x_t | x_0) that the noise makes, DDPM eq. 4. x_start, noise [B, ...], i [B]."""
    scale = lookup(np.sqrt(process.alphas_cumprod), i, x_start)
    return scale * x_start + lookup(np.sqrt(1.0 - process.alphas_cumprod), i, x_start) * noise


def posterior_mean(process: Process, x_start: jax.Array, x_t: jax.Array, i: jax.Array):
    """The mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7. x_start, x_t [B, ...], i [B]."""
    of_start, of_t = process.posterior_coefficients
    return lookup(of_start, i, x_t) * x_start + lookup(of_t, i, x_t) * x_t


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t): mean and log variance [B, ...], and the x_0 that the mean aims at."""

    mean: jax.Array
    log_variance: jax.Array
    x_start: jax.Array


def reverse(
    process: Process, output: jax.Array, x_t: jax.Array, i: jax.Array, clip: bool = False
) -> Reverse:
    """What a network's output [..., 2C] says about x_t [..., C] at step i ([B] or a scalar).

    clip: hold the estimate of x_0 within [-1, 1]. It serves pixels, not latents.
    """
    epsilon, v = jnp.split(output.astype(jnp.float32), 2, axis=-1)
    x_start = lookup(np.sqrt(1.0 / process.alphas_cumprod), i, x_t) * x_t
    x_start -= lookup(np.sqrt(1.0 / process.alphas_cumprod - 1.0), i, x_t) * epsilon
    if clip:
        x_start = jnp.clip(x_start, -1.0, 1.0)
    share = (v + 1.0) / 2.0  # iDDPM eq. 15
    log_variance = share * lookup(np.log(process.betas), i, x_t)
    log_variance += (1.0 - share) * lookup(process.posterior_log_variance, i, x_t)
    return Reverse(posterior_mean(process, x_start, x_t, i), log_variance, x_start)


def loss_terms(
    process: Process, output: jax.Array, x_start: jax.Array, i: jax.Array, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(mse, vb), each f32[B], of a network's output at `diffuse(process, x_start, i, noise)`.

    mse is the error of epsilon. vb is the term of the variational bound in bits per dimension
    (iDDPM eq. 4-6): a KL divergence or, at step 0, the likelihood of x_0 in 255 levels. It trains
    the variance only, since the mean counts as constant. DiT adds both with equal weight.
    """
    x_t = diffuse(process, x_start, i, noise)
    epsilon, v = jnp.split(output.astype(jnp.float32), 2, axis=-1)
    axes = tuple(range(1, x_start.ndim))
    mse = jnp.mean(jnp.square(epsilon - noise), axes)

    frozen = jnp.concatenate([jax.lax.stop_gradient(epsilon), v], axis=-1)
    p = reverse(process, frozen, x_t, i)
    true_mean = posterior_mean(process, x_start, x_t, i)
    true_log_variance = lookup(process.posterior_log_variance, i, x_t)
    kl = _normal_kl(true_mean, true_log_variance, p.mean, p.log_variance)
    nll = -_discretized_log_likelihood(x_start, p.mean, 0.5 * p.log_variance)
    return mse, jnp.where(i == 0, jnp.mean(nll, axes), jnp.mean(kl, axes)) / _LOG2


def _normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N1 || N2) of normal distributions, element by element, in nats."""
    difference = log_variance2 - log_variance1
    square = jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    return 0.5 * (difference - 1.0 + jnp.exp(-difference) + square)


def _discretized_log_likelihood(x, mean, log_scale):
    """Log probability, in nats, of an x in [-1, 1] that has 8 bits, DDPM eq. 13."""
    half_bin, least = 1.0 / 255.0, 1e-12

    def log(probability):
        return jnp.log(jnp.maximum(probability, least))

    def cdf(edge):  # of the standard normal, the approximation that the published losses use
        z = edge * jnp.exp(-log_scale)
        return 0.5 * (1.0 + _tanh(np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)))

    below, above = cdf(x - mean - half_bin), cdf(x - mean + half_bin)
    inside = jnp.where(x > 0.999, log(1.0 - below), log(above - below))
    return jnp.where(x < -0.999, log(above), inside)


@jax.custom_jvp
def _tanh(u):
    """tanh whose float32 values near 1 are rounded as PyTorch rounds them.

    Far tails of the likelihood are differences of such values, and XLA's own tanh is off by several
    units in the last place there. The derivative is 1 - tanh^2 of the rounded value for the same
    reason: an exact derivative would not be the gradient of the published loss.
    """
    e = jnp.exp(-2.0 * jnp.abs(u))
    return jnp.where(u < 0, -1.0, 1.0) * (1.0 - 2.0 * e / (1.0 + e))


@_tanh.defjvp
def _tanh_jvp(primals, tangents):
    y = _tanh(*primals)
    return y, (1.0 - y * y) * tangents[0]


def ancestral_step(p: Reverse, i: jax.Array, noise: jax.Array) -> jax.Array:
    """x_{t-1} of p(x_{t-1} | x_t) that standard normal noise makes; step 0 takes no noise.

    i: [B] or a scalar.
    """
    noise = jnp.where(expand(i, noise) == 0, 0.0, noise)
    return p.mean + jnp.exp(0.5 * p.log_variance) * noise


def ddim_step(
    process: Process, p: Reverse, x_t: jax.Array, i: jax.Array, noise: jax.Array, eta: float
) -> jax.Array:
    """x_{t-1} of DDIM, eq. 12 and 16. It is deterministic with eta 0, as noisy as DDPM with 1."""
    now, before = process.alphas_cumprod, process.alphas_cumprod_prev
    epsilon = lookup(np.sqrt(1.0 / now), i, x_t) * x_t - p.x_start
    epsilon /= lookup(np.sqrt(1.0 / now - 1.0), i, x_t)
    sigma = eta * np.sqrt((1.0 - before) / (1.0 - now)) * np.sqrt(1.0 - now / before)
    x = lookup(np.sqrt(before), i, x_t) * p.x_start
    x += lookup(np.sqrt(1.0 - before - sigma**2), i, x_t) * epsilon
    # sigma is 0 at step 0, where no noise may remain.
    return x + lookup(sigma, i, x_t) * noise


def sample(
    process: Process,
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    z: jax.Array,
    sampling: ConfigDict,
    step_noise: Callable[[jax.Array], jax.Array],
    return_trajectory: bool = False,
) -> jax.Array:
    """Runs through all steps of a process, from the noisiest to step 0.

    Args:
      predict: (x, what the network is told of the step, a float32 scalar) -> output [B, H, W, 2C].
      z: [B, H, W, C], standard normal.
      sampling: the section of a config, of which this function reads sampler ("ddpm" or "ddim"),
        eta and clip.
      step_noise: number of steps done, i32 -> standard normal [B, H, W, C].
      return_trajectory: return the states after every step, [N, B, H, W, C].
    """
    timesteps = jnp.asarray(process.timesteps, jnp.float32)

    def step(x, done):
        i = len(timesteps) - 1 - done
        p = reverse(process, predict(x, timesteps[i]), x, i, sampling.clip)
        if sampling.sampler == "ddim":
            return ddim_step(process, p, x, i, step_noise(done), sampling.eta)
        return ancestral_step(p, i, step_noise(done))

    return run_steps(step, z, jnp.arange(len(timesteps)), return_trajectory)
