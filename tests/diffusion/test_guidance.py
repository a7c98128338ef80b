from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion import config
from moe_diffusion.diffusion import guidance

NULL = 10
X, COND = jnp.zeros((2, 1, 1, 4)), {"label": jnp.array([1, 2])}


def null(cond):
    return {"label": jnp.full_like(cond["label"], NULL)}


def by_label(x, t, cond):
    """The label itself: conditional 1 and 2, unconditional 10."""
    return x + cond["label"][:, None, None, None]


def guide(predict, **changes):
    sampling = config.default().sampling
    sampling.update({"cfg": 3.0} | changes)
    return guidance.guide(predict, null, sampling)


def run(t=0.5, **changes):
    guided = guide(by_label, **changes)
    return np.asarray(guided(X, jnp.float32(t), COND))[:, 0, 0]


@pytest.mark.parametrize("joint", [False, True])
def test_formula(joint):
    # 10 + 3 * (1 - 10) = -17 and 10 + 3 * (2 - 10) = -14
    np.testing.assert_allclose(run(joint=joint), [[-17] * 4, [-14] * 4])


def test_one_pass_keeps_both_predictions_of_an_image_together():
    """Images 5 and 7: 15 + 3 * (6 - 15) = -12 and 17 + 3 * (9 - 17) = -7."""
    images, seen = jnp.array([5.0, 7.0])[:, None, None, None], []

    def predict(x, t, cond):
        seen.append((x[:, 0, 0, 0].tolist(), cond["label"].tolist()))
        return by_label(x, t, cond)

    guided = guide(predict, joint=True)(images, jnp.float32(0.5), COND)
    np.testing.assert_allclose(guided[:, 0, 0, 0], [-12, -7])
    assert seen == [([5, 5, 7, 7], [1, NULL, 2, NULL])]


def test_some_channels():
    np.testing.assert_allclose(run(cfg_channels=3), [[-17] * 3 + [1], [-14] * 3 + [2]])


def test_more_channels_than_the_input_has_are_not_guided():
    def with_variance(x, t, cond):
        return jnp.concatenate([by_label(x, t, cond)] * 2, axis=-1)

    guided = guide(with_variance)(X, jnp.float32(0.5), COND)
    np.testing.assert_allclose(guided[0, 0, 0], [-17] * 4 + [1] * 4)


def test_scale_1_costs_nothing():
    assert guide(by_label, cfg=1.0, cfg_interval=(0.2, 0.3), joint=True) is by_label


@pytest.mark.parametrize(
    "interval, t, guided",
    [
        ((0.2, 0.8), 0.5, True),
        ((0.2, 0.8), 0.1, False),
        ((0.2, 0.8), 0.9, False),
        ((0.25, 0.75), 0.25, False),  # strict at both ends
        ((0.25, 0.75), 0.75, False),
        ((0.0, 1.0), 0.0, True),  # 0 and 1 are no bounds
        ((0.0, 1.0), 1.0, True),
        ((0.0, 0.5), 0.0, True),
        ((0.5, 1.0), 1.0, True),
    ],
)
def test_interval(interval, t, guided):
    np.testing.assert_allclose(run(t, cfg_interval=interval)[0, 0], -17 if guided else 1)


def test_no_unconditional_pass_outside_the_interval():
    seen = []

    def velocity(x, t, cond):
        jax.debug.callback(lambda value: seen.append(int(value[0])), cond["label"])
        return by_label(x, t, cond)

    guided = jax.jit(guide(velocity, cfg_interval=(0.2, 0.8)))
    guided(X, jnp.float32(0.1), COND).block_until_ready()
    jax.effects_barrier()
    assert seen == [1]
