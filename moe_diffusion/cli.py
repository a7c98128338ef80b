"""What the command lines share: flags, help, config overrides, exit status; and `moe-diffusion`.

A command imports jax and what needs it inside of its functions, after the flags have been read, so
that `--help` and a wrong flag are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from moe_diffusion import __version__, remote, shipped
from moe_diffusion.errors import UserError

COMMANDS = (
    "train",
    "distill",
    "sample",
    "evaluate",
    "demo",
    "prepare",
    "convert",
    "plan",
    "reproduce",
)
COMMANDS += ("distill_demo", "report", "routing", "curves", "thresholds", "bench", "tune")
_MODULE, _COMMAND = "python -m moe_diffusion.", "moe-diffusion "
_WIDEST = 100  # columns of text
_KEY = ("--config.", "--noconfig.")
_SHOW = "--config.show"


class _Help(argparse.HelpFormatter):
    """Fits text to the terminal; paragraphs with indented lines (examples) stay as they are."""

    def __init__(self, prog: str):
        super().__init__(prog)
        self._width = min(self._width, _WIDEST)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = [
            part if re.search(r"^  ", part, re.MULTILINE) else textwrap.fill(part, width)
            for part in text.split("\n\n")
        ]
        return "\n\n".join(filled)


class Parser(argparse.ArgumentParser):
    """A parser whose help is a module docstring: one sentence, a blank line, then examples.

    Args:
      name: of the command.
      doc: the docstring.
      remote: names of the flags that may name a remote folder, like gs://bucket/run; the others
        are refused there.
    """

    program = _MODULE  # what stands before the name of a command where the user types it

    def __init__(self, name: str, doc: str, remote: Collection[str] = ()):
        description, _, examples = doc.replace(_MODULE, self.program).partition("\n\n")
        super().__init__(
            prog=f"{self.program}{name}",
            description=description,
            epilog="examples:\n" + examples,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self._name, self._remote = name, remote

    def parse_with_overrides(
        self, argv: Sequence[str] | None
    ) -> tuple[argparse.Namespace, list[str]]:
        """The flags, and the texts that set keys of the config, see `split_overrides`.

        `--config.show` prints the config that the flags give, and ends the program.
        """
        words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
        if _SHOW in overrides:
            self._show([text for text in overrides if text != _SHOW], self._config_of(words))
        return self.parse_args(words), overrides

    def parse_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        if self._takes_config and self._config_of(words) == "list":
            _answer(shipped.listing())
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]}{self._hint(unknown[0])}")
        self._check_remote(parsed)
        return parsed

    def _check_remote(self, parsed: argparse.Namespace) -> None:
        """Raises a UserError about a flag that names a remote place and may not, or in vain."""
        for action in self._actions:
            given = getattr(parsed, action.dest, None)
            flag = (action.option_strings or [action.dest])[0]
            for value in given if isinstance(given, list) else [given]:
                if not (isinstance(value, str) and remote.is_remote(value)):
                    continue
                if action.dest not in self._remote:
                    where = f"{self._name} needs a local path there"
                    raise UserError(f"{flag} {value} is remote, and {where}: copy it")
                remote.check(value, flag)

    def format_usage(self) -> str:
        self.usage = self._usage()
        return super().format_usage()

    def format_help(self) -> str:
        self.usage = self._usage()
        return super().format_help()

    def _usage(self) -> str:
        """What must be given; argparse fails where long flags wrap."""
        needed = [action for action in self._actions if action.required]
        words = [self.prog]
        for action in needed:
            value = action.metavar or "|".join(action.choices or [action.dest.upper()])
            words.append(" ".join([*action.option_strings[:1], value]))
        text = " ".join([*words, "[flags]"])
        width = _Help(self.prog)._width - len("usage: ")
        options = {"break_long_words": False, "break_on_hyphens": False}
        lines = textwrap.wrap(text, width, subsequent_indent=" " * len("usage: "), **options)
        return "\n".join(lines).replace("%", "%%")

    @property
    def _takes_config(self) -> bool:
        return "--config" in self._option_string_actions

    def _config_of(self, words: Sequence[str]) -> str | None:
        """The last value of --config, which may stand on a line that lacks other flags."""
        found = self.get_default("config")
        for index, word in enumerate(words):
            if word == "--config":
                found = next(iter(words[index + 1 :]), None)
            elif word.startswith("--config="):
                found = word.partition("=")[2]
        return found

    def _show(self, overrides: Sequence[str], spec: str | None) -> None:
        if not (self._takes_config and spec):
            self.error(f"{_SHOW} goes with --config; the config of a run is its config.json")
        if spec != "list":
            from moe_diffusion import config as configs

            _answer(configs.show(configs.load(spec, overrides)))

    def _hint(self, word: str) -> str:
        if word.startswith(_KEY):
            return f"; {self._name} takes no keys of a config"
        flag = word.partition("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.7)
        return f"; did you mean {near[0]}?" if near else "; --help lists all"


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes the words that set keys of the config out of a command line.

    They are written as for ml_collections: --config.seed=1, --config.seed 1, and for a key that is
    true or false --config.model.qk_norm and --noconfig.model.qk_norm.

    Returns:
      The other words; and the texts for `config.load`, such as "--config.seed=1".
    """
    words, overrides = [], []
    left = list(reversed(argv))
    while left:
        word = left.pop()
        if not word.startswith(_KEY):
            words.append(word)
            continue
        valueless = word.startswith(_KEY[0]) and "=" not in word and word != _SHOW
        if valueless and left and not re.match(r"-(?![\d.])", left[-1]):  # "-1" is a value
            word += f"={left.pop()}"
        overrides.append(word)
    return words, overrides


def exits_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command line: a `UserError` becomes one line on stderr and exit status 2.

    So does Ctrl-C, with status 130, where the command does not handle it, and the loss of another
    process of a run, with status 1.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if "jax" in sys.modules:
                from moe_diffusion import clusters

                clusters.end_if_lost(error)
            raise

    return wrapped


def _answer(text: str) -> None:
    """Prints a text, perhaps into `head`, and ends the program."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit()


def overview() -> str:
    """What `moe-diffusion --help` prints: a line for each command."""
    folder = Path(__file__).parent
    lines = [f"  {name:<14}{shipped.first_line(folder / f'{name}.py')}" for name in COMMANDS]
    width = _Help("")._width
    lines = [textwrap.fill(line, width, subsequent_indent=" " * 16) for line in lines]
    head = f"usage: {_COMMAND}COMMAND [flags]\n\nMixture-of-Experts diffusion transformers.\n"
    tail = f"\n{_COMMAND}COMMAND --help shows its flags and examples;"
    tail += f"\n{_COMMAND}train --config list shows the models."
    return "\n".join([head, *lines, tail])


def main(argv: Sequence[str] | None = None) -> None:
    """`moe-diffusion COMMAND ...`, the same as `python -m moe_diffusion.COMMAND ...`."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name == "--version":
        _answer(__version__)
    elif name in ("-h", "--help"):
        _answer(overview())
    elif name in COMMANDS:
        Parser.program = _COMMAND
        importlib.import_module(f"moe_diffusion.{name}").main(rest[:-1])
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        problem = f"unknown command {name!r}{hint}" if name else "name a command"
        print(f"{overview()}\n\nerror: {problem}", file=sys.stderr)
        sys.exit(2)
