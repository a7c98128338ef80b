"""Labels to draw images for. Only models with a condition field "label" take them."""

from __future__ import annotations

import numpy as np

from moe_diffusion.errors import UserError
from moe_diffusion.models.stack import Model
from moe_diffusion.sampling.conditions import spread

LABEL = "label"


def num_labels(model: Model, asked_by: str) -> int:
    """How many labels a model knows.

    Args:
      asked_by: what needs labels, like "--labels". The error begins with it.

    Raises:
      UserError: the model takes no labels.
    """
    field = model.cond_spec().get(LABEL)
    if field is None:
        raise UserError(
            f"{asked_by}: this model takes no labels; its condition has "
            f"{', '.join(model.cond_spec())}"
        )
    return field.num_values


def chosen_labels(text: str, num: int, model: Model) -> np.ndarray:
    """i32[num], spread evenly over the labels of a text like "3,7".

    Raises:
      UserError: the text names something that is no label, or the model takes no labels.
    """
    known = num_labels(model, "--labels")
    try:
        chosen = np.array([int(part) for part in text.split(",")])
    except ValueError:
        raise UserError(f"--labels {text!r} is not a list of numbers like 3,7") from None
    bad = chosen[(chosen < 0) | (chosen >= known)]
    if bad.size:
        raise UserError(f"--labels: {bad[0]} is no class; this model knows 0 to {known - 1}")
    return chosen[spread(num, len(chosen))].astype(np.int32)
