"""The conditions that images are drawn for if the user names none, and captions for the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.conditions import Field
from moe_diffusion.data.sources import open_source
from moe_diffusion.errors import UserError
from moe_diffusion.models.stack import Model


def default_conditions(model: Model, num: int, source: Any = None) -> dict[str, np.ndarray]:
    """Conditions {field: [num, ...]} that show what a model can do.

    A scalar with a known number of values, like a label, is spread evenly over its values. All
    other fields come from records of the source that are spaced evenly.

    Args:
      source: a data source, see `data/sources.py`; it is read only if a field needs it.

    Raises:
      UserError: a field needs a source, and there is none.
    """
    spec = model.cond_spec()
    named = [name for name, field in spec.items() if not _is_discrete(field)]
    if named and source is None:
        raise UserError(
            f"the model's condition has {', '.join(named)}, which must come from data: name a "
            "data.source that has it"
        )
    indices = np.arange(num) * len(source) // num if named else []
    records = [source[int(index)] for index in indices]
    cond = {
        name: np.stack([record[name] for record in records])
        if name in named
        else spread(num, field.num_values)
        for name, field in spec.items()
    }
    return {name: value.astype(jnp.dtype(spec[name].dtype)) for name, value in cond.items()}


def conditions_of_run(config: ConfigDict, model: Model, num: int) -> dict[str, np.ndarray]:
    """`default_conditions` of a run; opens the run's data only if the model needs it."""
    discrete = all(_is_discrete(field) for field in model.cond_spec().values())
    source = None if discrete else open_source(config.data, model.input_shape, model.cond_spec())
    return default_conditions(model, num, source)


def captions(model: Model, cond: Mapping[str, np.ndarray]) -> list[str] | None:
    """The text beside each image: its fields with a known number of values; None without any."""
    named = [name for name, field in model.cond_spec().items() if _is_discrete(field)]
    rows = zip(*(cond[name] for name in named), strict=True)
    return [" ".join(map(str, row)) for row in rows] or None


def spread(num: int, num_values: int) -> np.ndarray:
    """Spreads `num` items evenly over the values 0..num_values-1, in order: i64[num] 0 0 .. 1 1."""
    return np.arange(num) * min(num, num_values) // num


def _is_discrete(field: Field) -> bool:
    return field.shape == () and field.num_values is not None
