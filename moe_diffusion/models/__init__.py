"""From a config to a model: `build(config.model)`; and the shapes of its variables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion.errors import UserError
from moe_diffusion.models.blocks import MLP
from moe_diffusion.models.dit import DiT
from moe_diffusion.models.jit import JiT
from moe_diffusion.models.patches import moe_pattern
from moe_diffusion.models.stack import abstract_variables
from moe_diffusion.moe.layer import Experts, MoE
from moe_diffusion.moe.routers import ROUTERS

__all__ = ["abstract_variables", "build", "compute_dtype"]


def build(config: ConfigDict, losses: Sequence[str] = ()) -> nn.Module:
    """The model that `config` (the `model` section of a config) describes.

    losses: names of the auxiliary losses that its routers shall return, those of
    `config.loss_weights`. Raises UserError for a loss that the router does not have. Combinations
    of numbers are checked by `config.validate`, which every command line calls.
    """
    dtype = compute_dtype(config.dtype)
    dense = config.router.name == "dense"
    pattern = (False,) * config.depth
    if not dense:
        pattern = moe_pattern(config.depth, config.moe.interleave, config.moe.skip_first)
    width = int(config.hidden_size * config.mlp_ratio)
    make = partial(DiT, reverse_time=config.reverse_time)
    if config.family == "jit":
        width = width * 2 // 3
        make = partial(
            JiT,
            bottleneck=config.bottleneck,
            in_context_tokens=config.in_context_tokens,
            in_context_start=config.in_context_start,
            dropout=config.dropout,
        )
    mlp = partial(
        MLP,
        hidden_size=width,
        kind=config.mlp,
        use_bias=config.mlp_bias,
        dtype=dtype,
        name="mlp",
    )
    return make(
        input_shape=(config.image_size, config.image_size, config.channels),
        patch_size=config.patch_size,
        num_classes=config.num_classes,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads or config.num_heads,
        qk_norm=config.qk_norm,
        qk_norm_kind=config.qk_norm_kind,
        qk_norm_eps=config.qk_norm_eps,
        norm=config.norm,
        positions=config.positions,
        learn_sigma=config.learn_sigma,
        time_scale=config.time_scale,
        moe_pattern=pattern,
        make_mlp=mlp,
        make_moe=None if dense else _moe(config, tuple(losses), dtype),
        remat=config.remat,
        unroll=config.unroll,
        attention=None if config.attention == "auto" else config.attention,
        dtype=dtype,
        param_dtype=jnp.dtype(config.get("param_dtype", "float32")),
    )


def _moe(config: ConfigDict, losses: tuple[str, ...], dtype) -> partial:
    """MoE, ready to be instantiated in a block."""
    moe, router = config.moe, config.router
    kind = ROUTERS[router.name]
    unknown = sorted(set(losses) - set(kind.provides))
    if unknown:
        raise UserError(
            f"loss_weights.{unknown[0]}: router {router.name!r} has no such loss; "
            f"it has {', '.join(kind.provides)}"
        )
    fields = {name: router[name] for name in router if name in kind.__dataclass_fields__}
    del fields["name"]
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
        make_router=partial(kind, num_experts=moe.num_experts, losses=losses, **fields),
        make_experts=partial(
            Experts,
            num_experts=moe.num_experts,
            hidden_size=moe.hidden_size,
            kind=moe.mlp,
            use_bias=moe.bias,
        ),
        make_shared=shared,
        residual_input=moe.residual_input,
        # Tokens that choose do not compete, so their groups may as well be the devices' shards.
        compete_in=router.scope if kind.competes else "shard",
        backend=None if moe.backend == "auto" else moe.backend,
        transport=None if moe.transport == "auto" else moe.transport,
        capacity_factor=moe.capacity_factor,
        dropout=moe.dropout,
        name="moe",
    )


def compute_dtype(name: str) -> jnp.dtype:
    """`float32`, `bfloat16`, or `auto`: bf16 on TPU and GPU, f32 on CPU, where bf16 is slower."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
