"""What the work does not need, like a picture of it: a failure is told in a line, no more."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from moe_diffusion.errors import first_line


def warn(what: str, error: Exception) -> None:
    """Prints "warning: <what> (<the error's first line>)" on stderr, if that can be written."""
    with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
        print(f"warning: {what} ({first_line(error)})", file=sys.stderr, flush=True)


@contextlib.contextmanager
def ornament(what: str) -> Iterator[None]:
    """Turns any exception of the body into a warning that `what` is left out.

    An ornament must not end what it adorns: hours of training end well without their last picture.
    """
    try:
        yield
    except Exception as error:
        warn(f"without {what}", error)
