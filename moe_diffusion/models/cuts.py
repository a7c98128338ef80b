"""A loop over samples, in which each cuts its own blocks out of stacked weights [m, ...].

The backward pass cuts again: kept, the cuts would be a block a sample. And it adds the gradient of
a cut to its place in one stack, where the gradient of a slice would be a stack of zeros a cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

Tree = Any
Weights = dict[str, jax.Array]  # by path

# What the backward pass does again: cutting and casting.
_CUTS = frozenset(("dynamic_slice", "squeeze", "reshape", "transpose", "convert_element_type"))


def one_by_one(function: Callable[..., Tree], samples: Tree, stack: Weights) -> Tree:
    """function(cut, sample) of every sample, one after the other.

    Args:
      function: (cut, sample) -> any tree; cut(number) returns block `number` of the stack.
      samples: any tree of arrays [B, ...].
      stack: weights [m, ...].

    Returns:
      The results, stacked: [B, ...].
    """

    def step(sums: Weights, sample: Tree) -> tuple[Weights, Tree]:
        def cut(number: jax.Array) -> Weights:
            nonlocal sums
            own, sums = _cut(stack, sums, number)
            return own

        result = function(cut, sample)
        return sums, result

    return lax.scan(jax.checkpoint(step, policy=_keeps, prevent_cse=False), stack, samples)[1]


def _keeps(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy of `jax.checkpoint`: keeps everything but `_CUTS`."""
    return primitive.name not in _CUTS


@jax.custom_vjp
def _cut(stack: Weights, sums: Weights, number: jax.Array) -> tuple[Weights, Weights]:
    """Block `number` of the stack, and `sums` as they are.

    sums: the stack once more, which the loop carries from cut to cut. The gradient goes this way
    alone, backwards: each cut adds that of its block, in place.
    """
    own = {path: lax.dynamic_index_in_dim(w, number, keepdims=False) for path, w in stack.items()}
    return own, sums


def _forward(stack: Weights, sums: Weights, number: jax.Array) -> tuple:
    return _cut.fun(stack, sums, number), number


def _backward(number: jax.Array, gradients: tuple[Weights, Weights]) -> tuple[None, Weights, None]:
    own, sums = gradients
    for path, total in sums.items():
        new = lax.dynamic_index_in_dim(total, number, keepdims=False) + own[path]
        sums[path] = lax.dynamic_update_index_in_dim(total, new, number, 0)
    return None, sums, None


_cut.defvjp(_forward, _backward)
