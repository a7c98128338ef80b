"""Reads the JSON and YAML files that a user hands over, and checks what they hold.

A file is read only if it is a regular file of bounded size. What it holds is of bounded depth and
of plain values: texts, finite numbers, true, false, null, lists, and tables with texts as keys.
Whatever else lies there is a `UserError` that names the file and the key.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml
from etils import epath

from moe_diffusion.errors import UserError, explained, shown

LARGEST = 16 << 20  # bytes of a JSON file; the index of 150,000 tensors is as large
LARGEST_YAML = 256 << 10  # its parser is slow
DEEPEST = 32  # tables and lists inside each other
MOST = 2_000_000  # values in a file, those that YAML's references repeat included
_WHOLE = 2**63  # integers beyond fit into no array
RESTORE = "restore the file"


# --- files ---------------------------------------------------------------------------------------


def regular_file(path: str | os.PathLike, what: str = "file") -> epath.Path:
    """The path, if a regular file is there. A pipe or a device would be waited for without end.

    Args:
      path: may be remote, like gs://bucket/config.json, or a link to a file.
      what: the file is, for the message.

    Raises:
      UserError: nothing is there, or something else, or it cannot be looked at.
    """
    path = epath.Path(path)
    try:
        if "://" in os.fspath(path):
            found = path.is_file() or (None if not path.exists() else "a folder")
        else:
            mode = os.stat(path).st_mode
            found = stat.S_ISREG(mode) or ("a folder" if stat.S_ISDIR(mode) else "a device or pipe")
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise UserError(
            f"cannot read {path} ({getattr(error, 'strerror', None) or error})"
        ) from None
    if not found:
        raise UserError(f"no {what} at {path}")
    if found is not True:
        raise UserError(f"{path} is {found}: name a regular file")
    return path


def read_text(
    path: str | os.PathLike, what: str = "file", most: int = LARGEST, remedy: str = RESTORE
) -> str:
    """The text of a regular file of at most `most` bytes of UTF-8.

    Args:
      remedy: ends the message about bytes that are no text.

    Raises:
      UserError: see `regular_file`; or it is larger, or no text, or cannot be read.
    """
    path = regular_file(path, what)
    with explained(f"cannot read {path}", "mend the access", (OSError,)):
        with path.open("rb") as file:
            data = file.read(most + 1)
    if len(data) > most:
        raise UserError(f"{path} is larger than {most:,} bytes: it is no {what}")
    with explained(f"{path} is no text in UTF-8", remedy, (UnicodeDecodeError,)):
        return data.decode("utf-8-sig")


def read_json(path: str | os.PathLike, remedy: str = RESTORE, what: str = "file") -> Any:
    """What a JSON file holds; see the top of this file for what it may hold.

    Args:
      remedy: ends the message about a file that holds something else.

    Raises:
      UserError: see `read_text`; or it is not valid JSON, too deep, or a value is not plain.
    """
    text = read_text(path, what, remedy=remedy)
    return _parsed(text, json_of, f"{path} is not valid JSON", str(path), remedy)


def read_yaml(path: str | os.PathLike, remedy: str = RESTORE, what: str = "file") -> Any:
    """What a YAML file holds; see `read_json`. References may not lead back to themselves."""
    text = read_text(path, what, LARGEST_YAML, remedy)
    return _parsed(text, yaml_of, f"{path} is no valid yaml file", str(path), remedy)


def read_table(path: str | os.PathLike, remedy: str = RESTORE, what: str = "file") -> dict:
    """The table that a file holds: YAML if it is named .yaml or .yml, else JSON.

    Raises:
      UserError: see `read_json`; or it holds no table.
    """
    read = read_yaml if os.fspath(path).endswith((".yaml", ".yml")) else read_json
    value = read(path, remedy, what)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {shown(value)}, not a table of names and values: {remedy}")
    return value


def table_of(line: str) -> dict[str, Any] | None:
    """The table of a line of a .jsonl file; None if the line is cut off or holds something else."""
    try:
        value = _parsed(line, json_of, "it is no JSON", "the line", RESTORE)
    except UserError:
        return None
    return value if isinstance(value, dict) else None


def _parsed(text: str, parse: Callable[[str], Any], wrong: str, where: str, remedy: str) -> Any:
    try:
        value = parse(text)
    except RecursionError:
        raise UserError(f"{where} is deeper than {DEEPEST} levels: {remedy}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{wrong} ({' '.join(str(error).split())[:200]}): {remedy}") from None
    check_plain(value, where, remedy)
    return value


# --- texts ---------------------------------------------------------------------------------------


def json_of(text: str) -> Any:
    """Parses JSON. Raises ValueError, also for a key that stands twice in one table."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in table if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return table


def yaml_of(text: str) -> Any:
    """Parses YAML's safe subset; dates stay texts. Raises ValueError or yaml.YAMLError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Reads a date as the text that it is, and refuses a key that stands twice."""

    yaml_implicit_resolvers = {
        first: [rule for rule in rules if not rule[0].endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode)]
        if len(set(keys)) != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {shown(twice)} stands there twice")
        return super().construct_mapping(node, deep)


def _check_nodes(root: yaml.Node) -> None:
    """Refuses references that lead back to themselves or unfold to too many values."""
    sizes: dict[int, int | None] = {}  # of finished nodes; None while their parts are counted
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    while stack:
        node, counted = stack.pop()
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        if counted:
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in parts)
            if sizes[id(node)] > MOST:
                raise ValueError(f"its references (*name) unfold to more than {MOST:,} values")
        elif id(node) not in sizes:
            sizes[id(node)] = None
            stack.append((node, True))
            stack += [(part, False) for part in parts]
        elif sizes[id(node)] is None:
            raise ValueError("it refers to itself (*name inside of &name)")


# --- values --------------------------------------------------------------------------------------


def check_plain(value: Any, where: str, remedy: str = RESTORE) -> None:
    """Raises a UserError unless a parsed value is what the top of this file says.

    Args:
      where: the file, with which the message begins.
    """
    seen, stack = 0, [(value, "", 0)]
    while stack:
        value, key, depth = stack.pop()
        seen += 1
        if depth > DEEPEST or seen > MOST:
            limit = f"{DEEPEST} levels" if depth > DEEPEST else f"{MOST:,} values"
            raise UserError(f"{where} is deeper or larger than {limit}: {remedy}")
        named = f"{where}: {key or 'it'} is"
        if isinstance(value, dict):
            for name, part in value.items():
                if not isinstance(name, str):
                    place = f"{key} has" if key else "it has"
                    raise UserError(f"{where}: {place} the key {shown(name)}, no text: {remedy}")
                stack.append((part, f"{key}.{_cut(name)}" if key else _cut(name), depth + 1))
        elif isinstance(value, list):
            stack += [(part, f"{key}[{i}]", depth + 1) for i, part in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{named} {value}, not a finite number: {remedy}")
        elif isinstance(value, int) and not -_WHOLE <= value < _WHOLE:
            raise UserError(f"{named} an integer beyond 64 bits: {remedy}")
        elif not isinstance(value, str | float | int | None):
            raise UserError(f"{named} a {type(value).__name__}, no plain value: {remedy}")


def _cut(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."


_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_KINDS |= {dict: "a table", list: "a list", type(None): "null"}


@dataclasses.dataclass(frozen=True)
class Key:
    """What the value of a key may be.

    Attributes:
      kinds: int, float (any number), bool, str, dict, list (or tuple), NoneType; one of them must
        fit. A bool is no number. `bool` takes 0 and 1, too, as Python's code does.
      default: where the key is left out; `...` says that it must be there.
      least, most: of a number, and of the length of a list.
      items: what each item of a list is.
    """

    kinds: tuple[type, ...]
    default: Any = ...
    least: float = -math.inf
    most: float = math.inf
    items: Key | None = None

    def check(self, value: Any, named: str, remedy: str) -> None:
        """Raises a UserError that begins with `named` unless the value is as this says."""
        if not any(_fits(value, kind) for kind in self.kinds):
            wanted = " or ".join(_KINDS[kind] for kind in self.kinds)
            raise UserError(f"{named} is {shown(value)}, not {wanted}: {remedy}")
        several = isinstance(value, list | tuple)
        size = len(value) if several else value
        if isinstance(size, int | float) and not self.least <= size <= self.most:
            what = f"has {size} items" if several else f"is {size}"
            raise UserError(f"{named} {what}, outside {self.least:g}..{self.most:g}: {remedy}")
        if self.items and several:
            for i, item in enumerate(value):
                self.items.check(item, f"{named}[{i}]", remedy)


def key_like(default: Any) -> Key:
    """The key that takes values of its default's kind."""
    return Key((type(default),), default)


def _fits(value: Any, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, {dict: Mapping, list: list | tuple}.get(kind, kind))


def check_keys(table: Mapping[str, Any], keys: Mapping[str, Key], where: str, remedy: str) -> None:
    """Checks the values of a table; keys that `keys` does not name are left alone.

    Raises:
      UserError: a key is lacking that has no default, or a value is not as its `Key` says.
    """
    lacking = [name for name, key in keys.items() if key.default is ... and name not in table]
    if lacking:
        raise UserError(f"{where} lacks {', '.join(lacking)}: {remedy}")
    for name, key in keys.items():
        if name in table:
            key.check(table[name], f"{where}: {name}", remedy)


def plain_name(name: str, where: str, remedy: str = RESTORE) -> str:
    """A name of a file in the folder of the file that names it; no path leads out of the folder.

    Raises:
      UserError: it is a path, empty, or "..".
    """
    long = len(name.encode(errors="replace")) > 255  # bytes, which file systems allow
    if long or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise UserError(f"{where}: {shown(name)} is no plain name of a file beside it: {remedy}")
    return name


def lines(path: str | os.PathLike, what: str = "file") -> Iterator[tuple[int, str]]:
    """Yields (number from 1, line) of a text file, whatever bytes it holds.

    Raises:
      UserError: see `regular_file`; or it cannot be read.
    """
    path = regular_file(path, what)
    with explained(f"cannot read {path}", "mend the access", (OSError,)):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode(errors="replace").rstrip("\r\n")
