"""The losses of Dense2MoE's distillation (2510.09094, Eq. 7-10).

    distill = mean || f_tea(x_t, c, t) - f_stu(x_t, c, t) ||^2                                  (7)
    feature = sum_l w_l L_l          L_l = || f_tea^l - f_stu^l ||^2                            (8)
    w_l = |distill| / |L_l| * mean_k ||f_tea^k|| / ||f_tea^l||                                  (9)
    total = distill + lambda_feature feature + lambda_balance balance                          (10)

Squares are means over all values of a batch; so are those under the roots of the norms. The weights
w_l are constants for the gradient: otherwise w_l L_l would not depend on the student. A feature is
what comes out of a layer; of a double block, image and text together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from moe_diffusion import time_buckets
from moe_diffusion.buckets import sized
from moe_diffusion.conditions import cond_of, drop
from moe_diffusion.diffusion.objectives import LossFn, draw, objective, with_router_losses
from moe_diffusion.models.stack import Model

Tree = Any
# Below this share of a feature's own power a difference is rounding: the layer is the teacher's.
_SAME = 1e-9


def mean_square(tree: Tree) -> jax.Array:
    """The mean of the squares of all values of a tree, f32."""
    leaves = jax.tree.leaves(tree)
    total = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)
    return total / float(sum(x.size for x in leaves))  # above 2**31 in a batch of a pod


def difference(teacher: Tree, student: Tree) -> jax.Array:
    """L_l of Eq. 8: the mean squared difference of two features."""
    pairs = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, teacher, student)
    return mean_square(pairs)


def feature_weights(distill: jax.Array, differences: jax.Array, norms: jax.Array) -> jax.Array:
    """Eq. 9, without gradient; 0 where teacher and student are the same but for rounding.

    Args:
      distill: f32[], Eq. 7.
      differences: f32[L], L_l.
      norms: f32[L], of the teacher's features.
    """
    same = differences <= _SAME * jnp.square(norms)
    ratio = jnp.abs(distill) / jnp.where(same, 1.0, jnp.abs(differences))
    weights = ratio * norms.mean() / jnp.maximum(norms, 1e-30)
    return lax.stop_gradient(jnp.where(same, 0.0, weights))


def feature_loss(distill: jax.Array, teacher: Sequence[Tree], student: Sequence[Tree]) -> jax.Array:
    """Eq. 8 of the features of L layers."""
    pairs = zip(teacher, student, strict=True)
    differences = jnp.stack([difference(t, s) for t, s in pairs])
    norms = jnp.sqrt(jnp.stack([mean_square(t) for t in teacher]))
    return jnp.sum(feature_weights(distill, differences, norms) * differences)


def make_distillation_loss(
    teacher: Model,
    student: Model,
    config: ConfigDict,
    layers: Mapping[int, int],
    feature_weight: float,
) -> LossFn:
    """Eq. 10 as a loss of `training.loop.train`, whose `frozen` are the teacher's variables.

    Both models see the same noisy images, times and conditions; those of samples that lose their
    condition (`diffusion.cond_dropout`) are lost to both. The teacher is computed once a batch.

    Args:
      config: of the student's run; `diffusion` says what is drawn, `loss_weights` has the weights
        of the routers' losses.
      layers: layer of the student -> layer of the teacher whose feature it shall have.
      feature_weight: lambda_feature.
    """
    weights, diffusion = dict(config.loss_weights), config.diffusion
    mine, theirs = tuple(layers), tuple(layers.values())

    def loss_fn(params: Tree, router_state: Tree, batch: Tree, rng: jax.Array, frozen: Tree):
        draws = draw(rng, batch["image"].shape, diffusion)
        asked = objective(batch["image"], draws, diffusion)
        cond = drop(student, cond_of(batch), draws.drop_uniform < diffusion.cond_dropout)
        inputs = asked.x_t, asked.t, cond
        master, pupil = (sized(model, asked.x_t.shape[1:]) for model in (teacher, student))
        told = master.apply(lax.stop_gradient(frozen), *inputs, False, capture=theirs)
        target, features = told if theirs else (told, {})
        answer, collections = pupil.apply(
            {"params": params, "router_state": router_state},
            *inputs,
            True,
            capture=mine,
            rngs={"dropout": draws.dropout},
            mutable=["losses", "metrics", "router_stats"],
        )
        output, own = answer if mine else (answer, {})
        distill = mean_square(target - output)
        errors = {"distill": distill}
        if mine and feature_weight:
            wanted = [features[number] for number in theirs]
            found = [own[number] for number in mine]
            errors["feature"] = feature_weight * feature_loss(distill, wanted, found)
        loss, aux = with_router_losses(errors, collections, weights)
        squares = jnp.square(target.astype(jnp.float32) - output).mean((1, 2, 3))
        _, by_time = time_buckets.averages(asked.time, {"distill": squares})
        return loss, aux._replace(metrics=aux.metrics | by_time)

    return loss_fn
