"""What architectures build from a config in the same way: MLPs, MoE layers, dtypes, fields."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.errors import UserError
from moe_diffusion.models.blocks import MLP
from moe_diffusion.models.mixture_of_blocks import BALANCE, mixture
from moe_diffusion.moe import routers
from moe_diffusion.moe.layer import Experts, MoE


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype of a name; `auto` is bf16 on TPU and GPU, and f32 on CPU, where bf16 is slower."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def make_mlp(config: ConfigDict, width: int) -> partial:
    """The MLP of a dense block, ready to be instantiated in a block.

    Args:
      config: the section `model` of a config.
      width: number of hidden units.
    """
    return partial(
        MLP,
        hidden_size=width,
        kind=config.mlp,
        use_bias=config.mlp_bias,
        dtype=compute_dtype(config.dtype),
        name="mlp",
    )


def make_moe(config: ConfigDict, losses: Sequence[str] = ()) -> partial | None:
    """The MoE layer, ready to be instantiated in a block; None for a model without experts.

    Args:
      config: the section `model` of a config.
      losses: names of the auxiliary losses that the router returns.

    Raises:
      UserError: there is no such router, or the router does not have such a loss.
    """
    moe, dtype = config.moe, compute_dtype(config.dtype)
    kind = routers.find(config.router.name)
    if kind is None:
        return None
    unknown = sorted(set(losses) - set(kind.provides))
    if unknown:
        raise UserError(
            f"loss_weights.{unknown[0]}: router {config.router.name!r} has no such loss; "
            f"it has {', '.join(kind.provides) or 'none'}"
        )
    fields = {name: config.router[name] for name in kind.fields()}
    shared = None
    if moe.shared_hidden_size:
        shared = partial(
            MLP,
            hidden_size=moe.shared_hidden_size,
            kind=moe.shared_mlp,
            use_bias=moe.shared_bias,
            dtype=dtype,
        )
    return partial(
        MoE,
        make_router=partial(kind, num_experts=moe.num_experts, losses=tuple(losses), **fields),
        make_experts=partial(
            Experts,
            num_experts=moe.num_experts,
            hidden_size=moe.hidden_size,
            kind=moe.mlp,
            use_bias=moe.bias,
        ),
        make_shared=shared,
        residual_input=moe.residual_input,
        # If the grouping does not matter, use the devices' shards, which need no communication.
        group=config.router.group if kind.group_matters else "shard",
        backend=None if moe.backend == "auto" else moe.backend,
        transport=None if moe.transport == "auto" else moe.transport,
        capacity_factor=moe.capacity_factor,
        dropout=moe.dropout,
        name="moe",
    )


def moe_pattern(depth: int, interleave: bool, skip_first: int) -> tuple[bool, ...]:
    """Which blocks have experts: all or only the odd ones, but never the first `skip_first`."""
    layers = np.arange(depth)
    moe = (layers % 2 == 1) if interleave else (layers >= 0)
    return tuple(bool(v) for v in moe & (layers >= skip_first))


def pattern_of(config: ConfigDict, depth: int) -> tuple[bool, ...]:
    """Which of `depth` blocks have experts in a model with the section `model` of a config."""
    if routers.find(config.router.name) is None:
        return (False,) * depth
    return moe_pattern(depth, config.moe.interleave, config.moe.skip_first)


def transformer(
    config: ConfigDict, losses: tuple[str, ...], mlp_width: int, depth: int
) -> dict[str, Any]:
    """The fields of a transformer of `depth` blocks that the shared keys of a config fill."""
    of_experts = tuple(name for name in losses if name != BALANCE)
    make_moe_layer = make_moe(config, of_experts)
    names = ("patch_size", "num_classes", "hidden_size", "num_heads")
    names += ("qk_norm", "qk_norm_kind", "qk_norm_eps", "norm", "positions", "learn_sigma")
    names += ("time_scale", "remat", "unroll", "adaln_rank", "adaln_shared")
    height, width = config.image_size, config.image_width or config.image_size
    residual = config.residual_dtype
    return {name: config[name] for name in names} | {
        "input_shape": (height, width, config.channels),
        "num_kv_heads": config.num_kv_heads or config.num_heads,
        "moe_pattern": pattern_of(config, depth),
        "mixture": mixture(config.mob, losses),
        "make_mlp": make_mlp(config, mlp_width),
        "make_moe": make_moe_layer,
        "attention": None if config.attention == "auto" else config.attention,
        "dtype": compute_dtype(config.dtype),
        "residual_dtype": compute_dtype(config.dtype if residual == "auto" else residual),
        "param_dtype": jnp.dtype(config.param_dtype),
    }
