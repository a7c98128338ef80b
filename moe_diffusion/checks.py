"""Checks of config values that the config, the architectures and the routers share.

A message names the key as a user writes it, and says what is wrong and how to correct it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import Any

from moe_diffusion.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raises a UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_values(
    section: Any,
    prefix: str = "",
    *,
    choices: Mapping[str, Collection[str]] | None = None,
    positive: Collection[str] = (),
    not_negative: Collection[str] = (),
    fraction: Collection[str] = (),
    share: Collection[str] = (),
) -> None:
    """Checks values of a config section one by one.

    Args:
      section: the config, or a section of it.
      prefix: what stands before the keys in a message, such as "model.jit.".
      choices: key -> the texts that are allowed.
      positive, not_negative, fraction (in [0, 1)), share (in [0, 1]): keys of numbers.

    Raises:
      UserError: at the first value that is not possible.
    """
    for key, allowed in (choices or {}).items():
        value = attrgetter(key)(section)
        named = f"{prefix}{key} = {value!r}"
        require(value in allowed, f"{named} is unknown; choose {' | '.join(allowed)}")
    for keys, condition, wanted in (
        (positive, lambda value: value > 0, "positive"),
        (not_negative, lambda value: value >= 0, "zero or positive"),
        (fraction, lambda value: 0 <= value < 1, "at least 0 and below 1"),
        (share, lambda value: 0 <= value <= 1, "between 0 and 1"),
    ):
        for key in keys:
            value = attrgetter(key)(section)
            require(condition(value), f"{prefix}{key} = {value} must be {wanted}")
