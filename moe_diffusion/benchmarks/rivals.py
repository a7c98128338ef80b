"""Other people's grouped products in place of our kernels, as far as they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from moe_diffusion.kernels.ragged import grouped_products
from moe_diffusion.parallel.mesh import platform

# (rows [R, I], weights [E, I, O], rows of each expert i32[E]) -> [R, O]
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def rivals() -> dict[str, Callable]:
    """The rivals that this machine can run: name -> ((x[1, T, D], routing, params) -> [1, T, D]).

    ragged_dot is XLA's, megablox is jax's Pallas kernel for TPU, tokamax is what that library
    chooses.
    """
    found: dict[str, Product] = {"ragged_dot": jax.lax.ragged_dot}
    if platform() == "tpu":
        found["megablox"] = _megablox
    if importlib.util.find_spec("tokamax"):
        found["tokamax"] = _tokamax
    return {name: partial(_layer, product=product) for name, product in found.items()}


def _layer(x, routing, params, *, product):
    params = {name: value.astype(x.dtype) for name, value in params.items()}
    assignments = (a.reshape(-1) for a in (routing.token, routing.expert, routing.weight))
    return grouped_products(x[0], *assignments, params, "swiglu", product=product)[None]


def _megablox(rows, weights, sizes):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    padded = jnp.pad(rows, ((0, -rows.shape[0] % 128), (0, 0)))
    return gmm(padded, weights, sizes, preferred_element_type=rows.dtype)[: rows.shape[0]]


def _tokamax(rows, weights, sizes):
    import tokamax

    return tokamax.ragged_dot(rows, weights, sizes)
