"""A tiny FLUX that was never trained, as a workdir, and the flags that make experts of it."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_diffusion import config as configs
from moe_diffusion.dense2moe.stages import save_weights
from moe_diffusion.models import build
from moe_diffusion.models.stack import abstract_inputs, abstract_weights

DENSE = ("model.hidden_size=16", "model.num_heads=2", "model.depth=2", "model.flux.single_depth=3")
DENSE += ("model.flux.rope_axes=(2, 4, 2)", "model.flux.text_tokens=3", "model.flux.text_width=5")
DENSE += ("model.image_size=4", "data.batch_size=8", "train.num_steps=4")
# The ratios of FLUX.1-MoE-L: 64 hidden units are a shared expert of 16 and twelve of 4.
EXPERTS = (
    *("model.router.name=token_choice", "model.router.top_k=2", "model.router.normalize=true"),
    *("model.moe.num_experts=12", "model.moe.hidden_size=4", "model.moe.mlp=gelu"),
    *("model.moe.bias=true", "model.moe.shared_hidden_size=16", "model.moe.shared_mlp=gelu"),
    *("model.moe.shared_bias=true", "model.moe.interleave=false", "model.moe.skip_first=1"),
)
GROUPS = ("model.mob.groups=2-4", "loss_weights={'balance': 0.01, 'block_balance': 0.01}")
STEPS = tuple(f"distill.{kind}.steps=2" for kind in ("shared", "experts", "groups"))
STEPS += ("distill.importance_batches=3", "train.log_every=1", "ema.decays=()")


def config_of(*changes: str):
    return configs.load("configs/flux_tiny.py", [*DENSE, *changes])


def filled(model, seed=0, scale=0.3):
    """Params without a zero, so that every part counts."""
    rng = np.random.default_rng(seed)
    shapes = abstract_weights(model)[0]["params"]
    return jax.tree.map(lambda a: jnp.asarray(scale * rng.normal(size=a.shape), a.dtype), shapes)


def inputs(model, batch=2, seed=1):
    rng = np.random.default_rng(seed)
    x, t, cond = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), abstract_inputs(model, batch)
    )
    return x, jax.nn.sigmoid(t), cond


def teacher(folder: Path, *changes: str) -> str:
    """Writes the dense model into a folder; returns its name."""
    config = config_of(*changes)
    save_weights(config, filled(build(config.model)), folder)
    return str(folder)
