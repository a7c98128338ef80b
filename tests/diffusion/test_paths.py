from __future__ import annotations

import jax
import numpy as np
import pytest

from moe_diffusion import config
from moe_diffusion.diffusion import paths
from moe_diffusion.errors import UserError


def test_interpolate_by_hand():
    data, noise = np.full((2, 1, 1, 3), 4.0), np.full((2, 1, 1, 3), -2.0)
    x_t = paths.interpolate(data, noise, np.array([0.0, 0.5]))
    np.testing.assert_allclose(x_t[0], -2.0)  # t=0 is noise
    np.testing.assert_allclose(x_t[1], 1.0)


def test_velocity_is_the_derivative_of_the_path():
    rng = np.random.default_rng(0)
    data, noise = rng.normal(size=(2, 3, 4, 4, 2))
    t = np.array([0.1, 0.4, 0.9])
    _, derivative = jax.jvp(lambda t: paths.interpolate(data, noise, t), (t,), (np.ones_like(t),))
    np.testing.assert_allclose(derivative, paths.velocity(data, noise), rtol=1e-5)


def times(num, sides=(8, 8), **changes):
    diffusion = config.default().diffusion
    diffusion.update(changes)
    return np.asarray(paths.sample_time(jax.random.key(0), (num, *sides, 4), diffusion))


def test_uniform_times():
    t = times(4096)
    assert 0 <= t.min() and t.max() < 1
    np.testing.assert_allclose(np.quantile(t, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)


def test_logit_normal_times():
    t = times(4096, time_sampling="logit_normal", time_mean=-0.8, time_std=0.8)
    logit = np.log(t / (1 - t))
    np.testing.assert_allclose([logit.mean(), logit.std()], [-0.8, 0.8], atol=0.05)


def test_a_shift_moves_times_towards_noise():
    # Shift 3 moves half noise to 3/4 noise; the ends stay. ProMoE's and SD3's sigma is 1 - t.
    t = np.array([0.0, 0.5, 0.8, 1.0])
    sigma = 1 - t
    np.testing.assert_allclose(paths.shift_time(t, 3.0), [0, 0.25, 4 / 7, 1], rtol=1e-6)
    np.testing.assert_allclose(1 - paths.shift_time(t, 3.0), 3 * sigma / (1 + 2 * sigma))
    draws = [
        times(8, time_sampling=sampling, time_shift=shift)
        for sampling in ("uniform", "logit_normal")
        for shift in (1.0, 3.0)
    ]
    for plain, shifted in (draws[:2], draws[2:]):
        np.testing.assert_allclose(shifted, paths.shift_time(plain, 3.0), rtol=1e-6)
        assert (shifted < plain).all()


def test_the_shift_of_a_resolution():
    """mu is 0.5 at 256 tokens, 1.15 at 4096, and 0.825 half-way between; any sides count."""
    mus = [np.log(paths.resolution_shift(sides)) for sides in ((32, 32), (128, 128), (64, 136))]
    np.testing.assert_allclose(mus, [0.5, 1.15, 0.825])


def test_unknown_time_sampling():
    with pytest.raises(UserError, match="time_sampling is 'cosine'"):
        times(1, time_sampling="cosine")
