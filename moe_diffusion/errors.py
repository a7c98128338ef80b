"""The one exception for mistakes that the user can correct, and helpers for messages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


class UserError(ValueError):
    """A wrong key, file, shape or combination; the message names it and the remedy in one line.

    Raised before anything is written, so that bad input never loses data.
    """


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
      kinds: the exceptions that are turned; others pass.

    Raises:
      UserError: the body raised one of `kinds`.
    """
    try:
        yield
    except kinds as error:
        raise UserError(f"{what} ({first_line(error)}): {remedy}") from None


def check_writable(folder: str | os.PathLike) -> None:
    """Raises a UserError unless files can be written in `folder`, which need not exist yet."""
    existing = Path(folder).absolute()
    while not os.path.exists(existing):
        existing = existing.parent
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise UserError(f"cannot write to {existing}: choose another folder")
