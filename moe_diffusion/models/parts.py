"""What architectures build from a config in the same way: dense MLPs, MoE layers, precision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from moe_diffusion.errors import UserError
from moe_diffusion.models.blocks import MLP
from moe_diffusion.moe import routers
from moe_diffusion.moe.layer import Experts, MoE


def compute_dtype(name: str) -> jnp.dtype:
    """`float32`, `bfloat16`, or `auto`: bf16 on TPU and GPU, f32 on CPU, where bf16 is slower."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def make_mlp(config: ConfigDict, width: int) -> partial:
    """The MLP of a dense block, `width` hidden units, ready to be instantiated in a block.

    config: the section `model` of a config.
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
      losses: names of the auxiliary losses that the router shall return.

    Raises:
      UserError: no such router, or a loss that the router does not have.
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
        # Where the grouping does not matter, the devices' shards need no communication.
        group=config.router.group if kind.group_matters else "shard",
        backend=None if moe.backend == "auto" else moe.backend,
        transport=None if moe.transport == "auto" else moe.transport,
        capacity_factor=moe.capacity_factor,
        dropout=moe.dropout,
        name="moe",
    )
