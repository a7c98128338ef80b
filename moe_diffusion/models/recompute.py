"""What the backward pass computes again (`model.remat`), and how many layers a loop step holds."""

from __future__ import annotations

import jax

_MOST_UNROLLED = {"cpu": 6, "cuda": 28, "gpu": 28}  # platform -> periods
# Operations whose results `cheap` keeps besides those of products: kernels, loops, sorts, moves of
# rows between places or devices, and named values (the result of attention).
_EXPENSIVE = frozenset(
    ("pallas_call", "while", "scan", "cond", "sort", "top_k", "cumsum", "gather", "all_to_all")
    + ("ragged_all_to_all", "reduce_scatter", "name")
)


def _is_expensive(primitive, *_, **params) -> bool:
    """Whether `cheap` keeps an operation's result instead of computing it again.

    It does not keep elementwise operations and the products of attention, which are the products
    with two batch dimensions.
    """
    if primitive.name == "dot_general":
        _, (batch_dimensions, _) = params["dimension_numbers"]
        return len(batch_dimensions) < 2
    return primitive.name in _EXPENSIVE


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "cheap": _is_expensive,
}


def periods_at_once(repeats: int, remat: str, platform: str) -> int:
    """How many periods one step of the scan holds by default: all of them, or one.

    In a scan, XLA copies the saved values of every layer into and out of stacked arrays, and on CPU
    the weights, too. On CPU this costs an eighth of a step of DSMoE-S. On a GPU it is a quarter of
    the bytes that a step of DSMoE-L or DiT-XL moves. Unrolling avoids the copies, but makes the
    program longer. So all periods are unrolled if there are at most 6, or 28 on GPUs, where minutes
    of compiling matter less.

    Two cases are never unrolled. If the backward pass computes something again, XLA:CPU would keep
    it instead, outside of a loop. On TPU the stacked arrays need no filling.
    """
    most = _MOST_UNROLLED.get(platform, 1)
    return repeats if remat == "none" and repeats <= most else 1
