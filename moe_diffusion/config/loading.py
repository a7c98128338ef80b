"""Reading and writing configs: config files, config.json, and the arguments of a config file.

A config file is a Python file with `get_config(arg: str | None = None) -> ConfigDict`, which starts
from `default()` and sets what differs. `load` reads it, applies overrides and validates. An unknown
key is a `UserError` that names the nearest valid one. A value of the wrong kind is a `UserError`,
too.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from moe_diffusion import shipped
from moe_diffusion.config.draft import is_draft
from moe_diffusion.config.schema import (
    fields_of_others,
    leaves,
    parse,
    router_fields,
    settle,
    shared,
    unknown_key,
)
from moe_diffusion.config.validation import validate
from moe_diffusion.errors import UserError, shown
from moe_diffusion.reading import read_table
from moe_diffusion.writing import save_text

VERSION = 2  # of config.json; files without a version are of version 1, with the old names


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a config file, applies the overrides in order and validates the result.

    Args:
      spec: a file or the name of one of the project's (see `shipped.find`): "my/own.py",
        "digits", or, with an argument for `get_config`, "digits:router=diffmoe".
      overrides: "--config.optim.learning_rate=2e-4" or "optim.learning_rate=2e-4"; for a key that
        is true or false also "--config.model.qk_norm" and "--noconfig.model.qk_norm".

    Raises:
      UserError: no such file, the file fails, an unknown key, a value of the wrong kind, or an
        impossible combination.
    """
    path_text, _, arg = spec.partition(":")
    get_config = _import_get_config(_find(path_text))
    try:
        returned = get_config(arg or None)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    except Exception as error:
        raise UserError(f"{spec}: get_config failed: {_one_line(error)}") from error
    if not isinstance(returned, ConfigDict):
        raise UserError(f"{spec}: get_config returned {type(returned).__name__}, not a ConfigDict")
    config = settle(returned, overrides, origin=spec)
    validate(config)
    return config


def save_json(config: ConfigDict, path: str | os.PathLike) -> None:
    """Writes the config as JSON, whole or not at all. Raises UserError if it cannot be written."""
    values = (settle(config) if is_draft(config) else config).to_dict()
    save_text(json.dumps({"version": VERSION, **values}, indent=2) + "\n", path)


def load_json(path: str | os.PathLike, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads what `save_json` wrote. Keys that a later version added take their defaults.

    Args:
      overrides: as for `load`; the result is validated.

    Raises:
      UserError: the file is missing, no JSON object or of a later version, or has unknown keys or
        wrong values.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"cannot read {path} (No such file or directory): is it a workdir?")
    values = read_table(path, "restore it or delete it", "config")
    version = values.pop("version", 1)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise UserError(
            f"{path} is of version {shown(version)}, and this code reads versions up to {VERSION}: "
            "update moe_diffusion"
        )
    config = settle(values, overrides, origin=str(path))
    validate(config)
    return config


def show(config: ConfigDict) -> str:
    """A line "key = value" for every key, with the default where the value differs."""
    lines, defaults = [], leaves(shared()) | fields_of_others()
    for key, value in leaves(config).items():
        value = value.to_dict() if isinstance(value, ConfigDict) else value
        default = router_fields(config.model.router.name).get(key, defaults.get(key, value))
        lines.append(f"{key} = {value!r}" + (f"  # default: {default!r}" * (value != default)))
    return "\n".join(lines)


def parse_arg(
    arg: str | None, *, choices: Mapping[str, Sequence] | None = None, **defaults: Any
) -> ConfigDict:
    """Parses the argument of a config file: "key=value,key=value"; "key" alone sets a bool.

    Args:
      arg: the text after the colon of "configs/x.py:router=dense,size=small", or None.
      choices: allowed values of some arguments.
      **defaults: the arguments with their defaults; a value must be of its default's kind.

    Returns:
      A locked ConfigDict with one attribute per argument.

    Raises:
      UserError: an argument is unknown, or its value is missing, of the wrong kind or not allowed.
    """
    values = dict(defaults)
    for part in filter(None, (part.strip() for part in (arg or "").split(","))):
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if key not in defaults:
            raise UserError(f"unknown argument {key!r}; known are: {', '.join(defaults)}")
        if not equals and not isinstance(defaults[key], bool):
            raise UserError(f"argument {key!r} needs a value: {key}={defaults[key]}")
        values[key] = parse(key, text if equals else "true", defaults[key])
        allowed = (choices or {}).get(key)
        if allowed and values[key] not in allowed:
            raise UserError(f"{key}={text} is not possible; choose {' | '.join(map(str, allowed))}")
    return ConfigDict(values).lock()


def _find(path_text: str) -> Path:
    """The config file, or a UserError that lists the files in its folder, the likeliest first."""
    path = Path(path_text)
    if found := shipped.find(path_text):
        return found
    own = len(path.parts) > 1 and path.parent.is_dir() and shipped.names(path.parent)
    known = own or shipped.names()
    known.sort(key=lambda other: -difflib.SequenceMatcher(None, path.stem, other).ratio())
    where = path.parent if own else "the project"
    raise UserError(f"no config file {path_text!r}; in {where} are: {', '.join(known)}")


def _import_get_config(path: Path) -> Callable[[str | None], ConfigDict]:
    if path.suffix != ".py":
        raise UserError(f"{path} is not a Python file; a config file is named like digits.py")
    try:
        module = shipped.run_file(path)
    except Exception as error:
        raise UserError(f"{path} cannot be imported: {_one_line(error)}") from error
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path} has no function get_config(arg=None)")
    return module.get_config


def _one_line(error: Exception) -> str:
    """An error's kind and first line; about an unknown key of a ConfigDict, our own message."""
    text = str(error)
    unknown = re.search(r'Key "(\w+)" does not exist', text)
    if error.args and isinstance(error.args[0], KeyError):  # an attribute of a ConfigDict
        unknown = unknown or re.match(r"\W*(\w+)", text)
    if unknown:
        return unknown_key(unknown[1])
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0]}"
