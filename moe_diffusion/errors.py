"""The one exception for mistakes that the user can correct, and helpers for messages."""

from __future__ import annotations

import contextlib
import os
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LONGEST = 3000  # characters of a message; what is longer loses its middle
_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3


class UserError(ValueError):
    """A wrong key, file, shape or combination; the message names it and the remedy in one line.

    Raised before anything is written, so that bad input never loses data. Whatever the message
    quotes, it stays one printable line of at most 3,000 characters.
    """

    def __init__(self, message: object = ""):
        text = _TERMINAL_CODE.sub("", str(message))
        text = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
        if len(text) > _LONGEST:
            half = _LONGEST // 2
            text = f"{text[:half]} ... {text[-half:]}"
        super().__init__(text)


def shown(value: Any) -> str:
    """A value as a message shows it: its repr, cut where it is long or deep."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes out no integer of more than 4,300 digits
        return f"<{type(value).__name__}>"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def explained(
    what: str, remedy: str, kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turns an exception of the body into the UserError "<what> (<its message>): <remedy>".

    Args:
      what: the file or key, and what is wrong with it.
      remedy: what the user can do.
      kinds: the exceptions that are turned; others pass, and so does a UserError.

    Raises:
      UserError: the body raised one of `kinds`.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what} ({first_line(error)[:300]}): {remedy}") from None


def check_writable(folder: str | os.PathLike) -> None:
    """Raises a UserError unless files can be written in `folder`, which need not exist yet."""
    existing = Path(folder).absolute()
    while not os.path.exists(existing):
        existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(f"cannot write to {existing}: choose another folder")
