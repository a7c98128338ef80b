"""Checks of config values that the config, the architectures and the routers share.

A message names the key as a user writes it, and says what is wrong and how to correct it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import Any

from moe_diffusion.errors import UserError, shown


def require(condition: bool, message: str) -> None:
    """Raises a UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def at_most(key: str, value: float, limit: str, most: float, remedy: str = "lower it") -> None:
    """Raises a UserError if the value of a key exceeds `most`, the value of the key `limit`."""
    require(value <= most, f"{key} = {value} exceeds {limit} = {most}: {remedy}")


def check_seed(key: str, seed: int) -> None:
    """Raises a UserError for a seed that random numbers cannot begin with: 0 to 2^63 - 1 can."""
    require(0 <= seed < 2**63, f"{key} = {shown(seed)} must be from 0 to 2^63 - 1")


def divides(
    key: str, part: int, whole_key: str, whole: int, remedy: str = "choose a divisor"
) -> None:
    """Raises a UserError unless the value of a key divides `whole`, that of the key `whole_key`."""
    require(whole % part == 0, f"{key} = {part} does not divide {whole_key} = {whole}: {remedy}")


def check_values(
    section: Any,
    prefix: str = "",
    *,
    choices: Mapping[str, Collection[str]] | None = None,
    positive: Collection[str] = (),
    not_negative: Collection[str] = (),
    fraction: Collection[str] = (),
    share: Collection[str] = (),
    most: Mapping[str, float] | None = None,
) -> None:
    """Checks values of a config section one by one.

    Args:
      section: the config, or a section of it.
      prefix: what stands before the keys in a message, such as "model.jit.".
      choices: key -> the texts that are allowed.
      positive, not_negative, fraction (in [0, 1)), share (in [0, 1]): keys of numbers.
      most: key of a number -> the largest that is possible.

    Raises:
      UserError: at the first value that is not possible.
    """
    for key, allowed in (choices or {}).items():
        value = attrgetter(key)(section)
        named = f"{prefix}{key} = {shown(value)}"
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
    for key, limit in (most or {}).items():
        value = attrgetter(key)(section)
        require(value <= limit, f"{prefix}{key} = {value} is beyond {limit:,}: lower it")
