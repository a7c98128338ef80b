"""What the command lines share: help from the module's docstring, config overrides, exit status."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

from moe_diffusion.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose help is a module docstring: one sentence, a blank line, then examples."""

    def __init__(self, name: str, doc: str):
        description, _, examples = doc.partition("\n\n")
        super().__init__(
            prog=f"python -m moe_diffusion.{name}",
            description=description,
            epilog="examples:\n" + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_with_overrides(
        self, argv: Sequence[str] | None
    ) -> tuple[argparse.Namespace, list[str]]:
        """The flags, and the texts "--config.<key>=<value>"; anything else unknown is an error."""
        args, overrides = self.parse_known_args(argv)
        for text in overrides:
            if not text.startswith("--config."):
                self.error(f"unknown argument {text}; a config key is set as --config.key=value")
        return args, overrides


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
