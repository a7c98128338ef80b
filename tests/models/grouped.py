"""Small models with groups of blocks, experts and compressed adaLN; their losses and gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_diffusion import config as configs
from moe_diffusion.diffusion.sown import sum_by_name
from moe_diffusion.models import build
from moe_diffusion.models.stack import abstract_inputs, abstract_weights

EXPERTS = {
    "model.router.name": "token_choice",
    "model.router.normalize": True,
    "model.router.balance_gates": True,
    "model.moe.num_experts": 8,
    "model.moe.hidden_size": 8,
    "model.moe.mlp": "gelu",
    "model.moe.bias": True,
    "model.moe.shared_hidden_size": 12,
    "model.moe.shared_mlp": "gelu",
    "model.moe.shared_bias": True,
    "model.moe.skip_first": 1,
    "model.moe.interleave": False,
    "model.dtype": "float32",
    "model.unroll": 1,
    "loss_weights.balance": 0.5,
}
GROUPS = {"loss_weights.block_balance": 0.25, "model.mob.normalize": True}
# Blocks 0-4 of two streams and 5-9 of one; the first has no experts.
FLUX = EXPERTS | {
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.depth": 5,
    "model.adaln_rank": 8,
    "model.adaln_shared": True,
    "model.flux.single_depth": 5,
    "model.flux.rope_axes": "(2, 4, 2)",
    "model.flux.text_tokens": 4,
    "model.flux.text_width": 6,
}
DIT = EXPERTS | {
    "model.hidden_size": 16,
    "model.num_heads": 2,
    "model.depth": 7,
    "model.adaln_rank": 8,
}
SOURCES = {"flux": ("configs/flux_tiny.py", FLUX), "dit": ("configs/digits.py", DIT)}


def config_of(name, groups=(), **changes):
    """The config of a small `flux` or `dit`; groups: like ("1-2", "3-4")."""
    path, keys = SOURCES[name]
    keys = dict(keys)
    if groups:
        keys |= {"model.mob.groups": ",".join(groups)} | GROUPS
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return configs.load(path, [f"{key}={value}" for key, value in keys.items()])


def model_of(config):
    return build(config.model, losses=sorted(config.loss_weights))


def prepared(model, batch, seed=0):
    """Weights without a zero, and inputs (x, t, cond)."""
    rng = np.random.default_rng(seed)

    def fill(scale, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 10, leaf.shape), leaf.dtype)
        return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)

    x, t, cond = jax.tree.map(partial(fill, 1.0), abstract_inputs(model, batch))
    params = jax.tree.map(partial(fill, 0.15), abstract_weights(model)[0]["params"])
    # Conditions and gates that differ from sample to sample.
    factors = {"block_router": 20, "label_embed": 20, "pooled_embed": 3}
    leaves = flatten_dict(params)
    for path in leaves:
        leaves[path] *= next((f for name, f in factors.items() if name in path), 1)
    return unflatten_dict(leaves), (x, jax.nn.sigmoid(t), cond)


def loss_of(model, config, params, x, t, cond, train=True):
    """A loss of outputs and routers, and (outputs, losses by name)."""
    kinds = ["losses"]
    out, sown = model.apply({"params": params}, x, t, cond, train, mutable=kinds)
    losses = sum_by_name(sown.get("losses", {}))
    total = jnp.sum(jnp.sin(out)) + sum(config.loss_weights[n] * v for n, v in losses.items())
    return total, (out, losses)


def value_and_gradients(model, config, train=True):
    """(params, x, t, cond) -> ((loss, (outputs, losses)), gradients of params), compiled."""
    loss = partial(loss_of, model, config, train=train)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_near(got, expected, tolerance=1e-5):
    """Every leaf within a tolerance of the largest value of the one that is expected."""
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, b), a in zip(paths, jax.tree.leaves(got), strict=True):
        scale = max(np.abs(b).max(), 1e-3)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=name)
