"""What a model is conditioned on: named fields that travel with the images.

A batch is `{"image": [B, H, W, C], **cond}`, and `cond` maps the name of a field to an array
[B, *shape]. A model says which fields it takes (`model.cond_spec()`), a data source says which
fields it has (`source.cond_spec`); both are dicts from a name to a `Field`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 -- numpy knows the name "bfloat16" after this import

from moe_diffusion.errors import UserError


class Field(NamedTuple):
    """One field of a condition, for one sample.

    Attributes:
      shape: without the batch axis; () is a scalar.
      dtype: numpy's name of the type, such as "int32", "bool" or "bfloat16".
      num_values: of an integer field, which then holds 0..num_values-1; None where there is no
        bound.
    """

    shape: tuple[int, ...]
    dtype: str
    num_values: int | None = None


def cond_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The condition of a batch: every field but the image."""
    return {name: value for name, value in batch.items() if name != "image"}


def check_fields(found: Mapping[str, Field], wanted: Mapping[str, Field], where: str) -> None:
    """Checks that `found` has exactly the fields of `wanted`, in the same shapes and dtypes.

    The number of values is not compared: a source may know fewer values than a model.

    Args:
      found: what `where` has.
      wanted: what the model takes.
      where: the start of the message, such as "data.source=digits".

    Raises:
      UserError: a field is lacking, unexpected, or of another shape or dtype.
    """
    for name, field in wanted.items():
        if name not in found:
            raise UserError(
                f"{where} lacks the field '{name}' ({_describe(field)}), which the model takes: "
                "supply it, or choose a model that does not take it"
            )
        if _describe(found[name]) != _describe(field):
            raise UserError(
                f"{where} has the field '{name}' as {_describe(found[name])}, the model takes "
                f"{_describe(field)}: change one of the two"
            )
    for name in found:
        if name not in wanted:
            raise UserError(
                f"{where} has the field '{name}', a batch field that the model does not take: "
                "leave it out, or choose a model that takes it"
            )


def _describe(field: Field) -> str:
    return f"{field.dtype}{list(field.shape)}"
