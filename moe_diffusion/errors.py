"""The one exception for mistakes that the user can mend."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A wrong key, file, shape or combination; the message names it and the remedy in one line.

    Raised before anything is written, so that bad input never loses data.
    """


def exits_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command line: a `UserError` becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped
