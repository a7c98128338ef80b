"""The conditions that images are drawn for if the user names none, and captions for the images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.classes import LABEL, NOTHING, Classes, is_discrete, of_source
from moe_diffusion.data.sources import open_source
from moe_diffusion.errors import UserError
from moe_diffusion.models.stack import Model
from moe_diffusion.vocabulary import TOKENS, VOCABULARIES


def default_conditions(
    model: Model, num: int, source: Any = None, known: Classes | None = None
) -> dict[str, np.ndarray]:
    """Conditions {field: [num, ...]} that show what a model can do.

    A scalar with a known number of values, like a label, is spread evenly over those that were
    trained. All other fields come from records of the source that are spaced evenly.

    Args:
      source: a data source, see `data/sources.py`; its records are read only if a field needs it.
      known: what was trained; None takes what the source has, or everything without a source.

    Raises:
      UserError: a field needs a source, and there is none.
    """
    spec = model.cond_spec()
    known = known or (NOTHING if source is None else of_source(source))
    named = [name for name, field in spec.items() if not is_discrete(field)]
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
        else spread(num, known.limit(name, field.num_values))
        for name, field in spec.items()
    }
    return {name: value.astype(jnp.dtype(spec[name].dtype)) for name, value in cond.items()}


def conditions_of_run(
    config: ConfigDict, model: Model, num: int, known: Classes
) -> dict[str, np.ndarray]:
    """`default_conditions` of a run; opens the run's data only if the model needs it."""
    discrete = all(is_discrete(field) for field in model.cond_spec().values())
    source = None if discrete else open_source(config.data, model.input_shape, model.cond_spec())
    return default_conditions(model, num, source, known)


def captions(
    model: Model, cond: Mapping[str, np.ndarray], known: Classes = NOTHING
) -> list[str] | None:
    """The text beside each image: its fields with a known number of values; None without any.

    A label is shown by the name of its class, where `known` has one, and a prompt by its words.
    """
    named = [name for name, field in model.cond_spec().items() if is_discrete(field)]
    texts = {name: [str(value) for value in cond[name]] for name in named}
    if LABEL in texts:
        texts[LABEL] = [known.name(label) for label in cond[LABEL].tolist()]
    if vocabulary := VOCABULARIES.get(getattr(model, "vocabulary", "")):
        texts[TOKENS] = [vocabulary.text(row) for row in cond[TOKENS]]
    return [" ".join(row) for row in zip(*texts.values(), strict=True)] or None


def spread(num: int, num_values: int) -> np.ndarray:
    """Spreads `num` items evenly over the values 0..num_values-1, in order: i64[num] 0 0 .. 1 1."""
    return np.arange(num) * min(num, num_values) // num
