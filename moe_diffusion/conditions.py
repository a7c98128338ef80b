"""Conditions: what samples are generated for, as a dict of arrays `[B, ...]`.

A model names the fields of its condition: a label, the tokens of a prompt, a guidance scale. Code
that only passes conditions on does not know the fields. A batch of training data is
{"image": [B, H, W, C], **cond}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_diffusion.errors import UserError

IMAGE = "image"


class Field(NamedTuple):
    """One field of the condition of one sample.

    Attributes:
      shape: without the batch axis.
      dtype: its name, like "int32".
      num_values: an integer field has the values 0..num_values-1; None for other fields.
    """

    shape: tuple[int, ...]
    dtype: str
    num_values: int | None = None


def cond_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The condition of a batch: every field but the image."""
    return {name: value for name, value in batch.items() if name != IMAGE}


def fields_of(batch: Mapping[str, Any]) -> dict[str, Field]:
    """The fields of a batch's condition. Their `num_values` is None, because it is unknown."""
    return {name: Field(v.shape[1:], str(v.dtype)) for name, v in cond_of(batch).items()}


def drop(model: Any, cond: Mapping[str, jax.Array], dropped: jax.Array) -> dict[str, jax.Array]:
    """Puts "no condition" (`model.null`) in place of the condition where dropped bool[B] is set."""

    def choose(null: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), null, value)

    return jax.tree.map(choose, dict(model.null(cond)), dict(cond))


def check_fields(found: Mapping[str, Field], wanted: Mapping[str, Field], where: str) -> None:
    """Checks that `found` has the fields of `wanted` and no others, in their shapes and dtypes.

    The number of values is not compared: data may have fewer values than a model knows.

    Args:
      found: what the data has.
      wanted: what the model takes.
      where: the name of the data, with which the message begins.

    Raises:
      UserError: a field is lacking, unexpected, or of another shape or dtype.
    """
    lacking, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if lacking or unknown:
        texts = [f"lacks the field {name!r}, which the model takes" for name in lacking]
        texts += [f"has the field {name!r}, which the model does not take" for name in unknown]
        raise UserError(f"{where} {' and '.join(texts)}: choose other data or another model")
    for name, field in wanted.items():
        has, takes = (f"{f.dtype}{list(f.shape)}" for f in (found[name], field))
        if has != takes:
            raise UserError(
                f"{where} has the field {name!r} as {has}, the model takes {takes}: choose other "
                "data or another model"
            )
