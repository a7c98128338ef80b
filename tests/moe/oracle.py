"""What tests of several routers compare with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moe_diffusion.moe.routing import Routing


def dense_gates(routing: Routing, num_tokens: int, num_experts: int) -> jax.Array:
    """The same routing as a matrix of gate values, f32[G, T, E]."""
    groups = jnp.arange(routing.token.shape[0])[:, None]
    gates = jnp.zeros((routing.token.shape[0], num_tokens, num_experts + 1), jnp.float32)
    return gates.at[groups, routing.token, routing.expert].add(routing.weight)[..., :-1]
