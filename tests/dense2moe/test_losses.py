"""Eq. 7 to 10 of 2510.09094, worked by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.dense2moe.losses import (
    difference,
    feature_loss,
    feature_weights,
    make_distillation_loss,
    mean_square,
)
from moe_diffusion.diffusion.objectives import draw, objective
from moe_diffusion.models import build
from tests.dense2moe.tiny import EXPERTS, config_of, filled, inputs


def test_a_double_blocks_feature_is_both_of_its_streams():
    """Squares 1 + 4 + 9 + 16 of four values, two of the image and two of the text."""
    assert mean_square((jnp.array([1.0, 2]), jnp.array([3.0, -4]))) == 30 / 4
    teacher, student = (jnp.array([1.0, 2]), jnp.array([3.0])), (jnp.array([0.0, 0]), jnp.zeros(1))
    np.testing.assert_allclose(difference(teacher, student), (1 + 4 + 9) / 3, rtol=1e-6)


def test_features_of_a_pods_batch_have_more_values_than_an_int32():
    """512 images of 4,096 tokens and 3,072 channels, traced alone."""
    wide = jax.ShapeDtypeStruct((512, 4096 + 512, 3072), jnp.bfloat16)
    assert jax.eval_shape(difference, wide, wide).shape == ()


def test_weights_of_eq_9_by_hand():
    """distill = 6, L = (2, 3), norms (1, 3) with mean 2: w = 6/2 * 2/1 and 6/3 * 2/3."""
    weights = feature_weights(jnp.float32(6), jnp.array([2.0, 3]), jnp.array([1.0, 3]))
    np.testing.assert_allclose(weights, [6, 4 / 3], rtol=1e-6)


def test_a_layer_that_is_the_teachers_counts_nothing():
    """Its difference is rounding, which Eq. 9 would blow up to the size of the others."""
    weights = feature_weights(jnp.float32(6), jnp.array([0.0, 1e-12, 3]), jnp.array([1.0, 1, 3]))
    np.testing.assert_allclose(weights, [0, 0, 6 / 3 * (5 / 3) / 3], rtol=1e-6)


def test_feature_loss_of_eq_8_by_hand():
    """Teacher (3), (4); student (1), (2): L = 4, 4; distill 2; norms 3, 4 with mean 3.5.

    sum of 2/4 * 3.5/3 * 4 and 2/4 * 3.5/4 * 4.
    """
    teacher, student = [jnp.array([3.0]), jnp.array([4.0])], [jnp.array([1.0]), jnp.array([2.0])]
    loss = feature_loss(jnp.float32(2), teacher, student)
    np.testing.assert_allclose(loss, 2 * 3.5 / 3 + 2 * 3.5 / 4, rtol=1e-6)


def test_the_weights_are_constants_for_the_gradient():
    """d/ds of w (3 - s)^2 at s = 1 is -4 w with w = 2/4 * 1; without the stop it would be 0."""

    def loss(s):
        return feature_loss(jnp.float32(2), [jnp.array([3.0])], [jnp.array([s])])

    np.testing.assert_allclose(jax.grad(loss)(1.0), -4 * 0.5, rtol=1e-6)


@pytest.fixture(scope="module")
def pair():
    """(config, teacher, student, their params, a batch)."""
    dense, sparse = config_of(), config_of(*EXPERTS, "loss_weights={'balance': 0.01}")
    teacher, student = build(dense.model), build(sparse.model, ("balance",))
    x, _, cond = inputs(teacher, 4)
    batch = {"image": x, **cond}
    return sparse, teacher, student, (filled(teacher), filled(student, 2)), batch


def test_total_of_eq_10(pair):
    """distill + lambda_feature * feature + 0.01 * balance, as the report has them."""
    config, teacher, student, (theirs, mine), batch = pair
    rng, frozen = jax.random.key(3), {"params": theirs}

    def value(feature_weight, layers):
        loss_fn = make_distillation_loss(teacher, student, config, layers, feature_weight)
        return jax.jit(loss_fn)(mine, {}, batch, rng, frozen)

    plain, layers = {}, {i: i for i in range(5)}
    loss, aux = value(1.0, layers)
    plain = aux.metrics
    total = plain["distill"] + plain["feature"] + 0.01 * plain["balance"]
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    half, aux = value(0.5, layers)
    np.testing.assert_allclose(aux.metrics["feature"], 0.5 * plain["feature"], rtol=1e-5)
    np.testing.assert_allclose(loss - half, 0.5 * plain["feature"], rtol=1e-4)
    assert "feature" not in value(1.0, {})[1].metrics


def test_distill_of_eq_7_is_the_difference_of_the_outputs(pair):
    config, teacher, student, (theirs, mine), batch = pair
    rng = jax.random.key(3)
    draws = draw(rng, batch["image"].shape, config.diffusion)
    asked = objective(batch["image"], draws, config.diffusion)
    cond = {name: value for name, value in batch.items() if name != "image"}
    config.diffusion.cond_dropout = 0.0
    outputs = [
        jax.jit(lambda p, m=model: m.apply({"params": p}, asked.x_t, asked.t, cond, False))(params)
        for model, params in ((teacher, theirs), (student, mine))
    ]
    loss_fn = make_distillation_loss(teacher, student, config, {}, 1.0)
    _, aux = jax.jit(loss_fn)(mine, {}, batch, rng, {"params": theirs})
    expected = np.mean(np.square(outputs[0] - outputs[1]))
    np.testing.assert_allclose(aux.metrics["distill"], expected, rtol=1e-5)


def test_the_teacher_has_no_gradient(pair):
    config, teacher, student, (theirs, mine), batch = pair
    loss_fn = make_distillation_loss(teacher, student, config, {0: 0}, 1.0)

    def loss(params):
        return loss_fn(mine, {}, batch, jax.random.key(0), {"params": params})[0]

    grads = jax.jit(jax.grad(loss))(theirs)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))
