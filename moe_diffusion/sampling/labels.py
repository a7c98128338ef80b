"""Labels to draw images for. Only models with a condition field "label" take them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_diffusion.classes import LABEL, NOTHING, Classes, of_run, with_names
from moe_diffusion.errors import UserError, shown
from moe_diffusion.models.stack import Model

_LONGEST = 60  # characters of a user's text that are compared with names


def num_labels(model: Model, asked_by: str, known: Classes = NOTHING) -> int:
    """How many labels there are to draw: those that were trained, or all that the model knows.

    Args:
      asked_by: what needs labels, like "--labels". The error begins with it.
      known: of the run, see `classes.of_run`.

    Raises:
      UserError: the model takes no labels.
    """
    field = model.cond_spec().get(LABEL)
    if field is None:
        raise UserError(
            f"{asked_by}: this model takes no labels; its condition has "
            f"{', '.join(model.cond_spec())}"
        )
    return known.limit(LABEL, field.num_values)


def untrained(model: Model, known: Classes) -> str | None:
    """One line if the data had fewer classes than the model knows; None if it had all."""
    field = model.cond_spec().get(LABEL)
    if field is None or known.limit(LABEL, field.num_values) == field.num_values:
        return None
    return (
        f"the data has {known.num_values[LABEL]:,} of the {field.num_values:,} classes that the "
        "model knows: only these are drawn"
    )


def parse_labels(text: str, model: Model, known: Classes = NOTHING) -> np.ndarray:
    """i32[N], the classes of a text like "3,7" or "cat,7".

    A part that is exactly the name of a class means that class, also if it looks like a number or
    holds commas. Any other part is a number.

    Raises:
      UserError: the text names something that is no class, that was not trained, or that several
        classes are called; or the model takes no labels.
    """
    num_labels(model, "--labels", known)
    chosen, parts = [], text.split(",")
    while parts:
        # The longest name first: "tench, Tinca tinca" before "tench".
        lengths = range(len(parts), 0, -1)
        names = {length: ",".join(parts[:length]).strip() for length in lengths}
        length = next((length for length in lengths if known.numbers_of(names[length])), 1)
        chosen.append(_number(names[length], known, "--labels"))
        del parts[:length]
    return check_labels(chosen, model, known, "--labels")


def check_labels(labels: Sequence[Any], model: Model, known: Classes, asked_by: str) -> np.ndarray:
    """i32[N] of numbers, or of names of classes.

    Args:
      asked_by: see `num_labels`.

    Raises:
      UserError: one is no class, was not trained, or is the name of several classes.
    """
    count = num_labels(model, asked_by, known)
    if not len(labels):
        raise UserError(f"{asked_by} is empty: name at least one class")
    numbers = []
    for label in labels:
        number = _number(label, known, asked_by) if isinstance(label, str) else label
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise UserError(
                f"{asked_by}: {shown(label)} is neither the number nor the name of a class"
            )
        if not 0 <= number < count:
            whose = "the data of this run has" if untrained(model, known) else "this model knows"
            raise UserError(f"{asked_by}: {shown(number)} is no class; {whose} 0 to {count - 1}")
        numbers.append(int(number))
    return np.array(numbers, np.int32)


def _number(text: str, known: Classes, asked_by: str) -> int:
    """The class of a name, or of a text that is a number."""
    found = known.numbers_of(text)
    if len(found) > 1:
        several = " and ".join(map(str, found))
        raise UserError(f"{asked_by}: {text} is the name of {several}: give a number")
    if found:
        return found[0]
    try:
        return int(text)
    except ValueError:
        if not known.names:
            raise UserError(f"{asked_by}: {shown(text)} is not a number like 3") from None
        near = ", ".join(known.nearest(text[:_LONGEST])) or f"{known.name(0)} is one"
        raise UserError(f"{asked_by}: no class is called {shown(text)}; nearest: {near}") from None


def classes_of(workdir: str | os.PathLike, model: Model, names: str | None = None) -> Classes:
    """The classes of a run (`classes.of_run`), with a printed line if the model knows more.

    Args:
      names: a file with other names for them, see `classes.with_names`.
    """
    known = of_run(workdir)
    if names is not None:
        known = with_names(known, names, num_labels(model, "--class-names"))
    if line := untrained(model, known):
        print(line)
    return known


def described(labels: np.ndarray, known: Classes) -> str:
    """The classes of some labels, like "0 cat, 7 owl"."""
    return ", ".join(f"{label} {known.name(label)}" for label in np.unique(labels).tolist())
