"""What an expert computes: a two-layer MLP or a SwiGLU, with or without biases.

    gelu, silu:  down(act(up(x)))             swiglu:  down(silu(gate(x)) * up(x))

Parameters of E stacked experts: up [E, D, H], gate [E, D, H] (swiglu only), down [E, H, D] and,
with biases, up_bias [E, H], gate_bias [E, H], down_bias [E, D]. Every kernel in this package takes
them as one plain dict, whose keys say which of them there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Params = Mapping[str, jax.Array]

KINDS = ("gelu", "silu", "swiglu")


def activation(kind: str) -> Callable[..., jax.Array]:
    """The function between the projections: of up(x), and for a SwiGLU of up(x) and gate(x)."""
    return {
        "gelu": lambda up: jax.nn.gelu(up, approximate=True),
        "silu": jax.nn.silu,
        "swiglu": lambda up, gate: jax.nn.silu(gate) * up,
    }[kind]


def inputs(kind: str) -> tuple[str, ...]:
    """The names of the projections that read the token."""
    return ("up", "gate") if kind == "swiglu" else ("up",)


def project(x: jax.Array, params: Params, name: str) -> jax.Array:
    """Applies the projection `name`: x[..., M, I] -> [..., M, O] in x's dtype.

    params: of one expert, or stacked of all. Sums are in f32 on every platform.
    """
    y = jnp.matmul(x, params[name], preferred_element_type=jnp.float32).astype(x.dtype)
    bias = params.get(name + "_bias")
    return y if bias is None else y + jnp.expand_dims(bias, -2)


def apply(
    x: jax.Array,
    params: Params,
    kind: str,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """One expert: x[M, D] -> [M, D]; all experts, with stacked parameters: x[E, M, D] -> [E, M, D].

    drop: dropout of the hidden values [..., M, H]; the backward pass draws it again.
    """
    between = activation(kind)
    if drop is not None:
        between = jax.checkpoint(lambda *hidden: drop(activation(kind)(*hidden)))
    hidden = between(*(project(x, params, name) for name in inputs(kind)))
    return project(hidden, params, "down")
