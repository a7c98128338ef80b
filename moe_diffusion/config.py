"""The config of a run: a `ConfigDict` with the keys of `defaults.py`, loaded, saved and compared.

A config file is a Python file with `get_config(arg: str | None = None) -> ConfigDict`, which starts
from `default()` and sets what differs. `load` reads it, applies overrides and validates. Nothing is
guessed: an unknown key is a `UserError` naming the nearest valid one, and so is a value of the
wrong kind.
"""

from __future__ import annotations

import ast
import copy
import difflib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from moe_diffusion.defaults import DEFAULTS, RUN_CONTROL
from moe_diffusion.errors import UserError
from moe_diffusion.validation import validate, validate_devices

__all__ = [
    "compare",
    "default",
    "load",
    "load_json",
    "parse_arg",
    "save_json",
    "validate",
    "validate_devices",
]

ROOT = Path(__file__).resolve().parent.parent  # config files may import `configs.families` from it


def default() -> ConfigDict:
    """A new config with every key at its default: locked (but for `loss_weights`) and type-safe."""
    config = ConfigDict(copy.deepcopy(DEFAULTS)).lock()
    config.loss_weights.unlock()
    return config


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a config file, applies the overrides in order and validates the result.

    Args:
      spec: "configs/digits.py" or, with an argument for `get_config`,
        "configs/digits.py:router=diffmoe". Looked for in the current folder, then beside the
        package.
      overrides: "--config.optim.learning_rate=2e-4" or "optim.learning_rate=2e-4".

    Raises:
      UserError: no such file, the file fails, an unknown key, a value of the wrong kind, or an
        impossible combination.
    """
    path_text, _, arg = spec.partition(":")
    path = _find(path_text)
    get_config = _import_get_config(path)
    try:
        returned = get_config(arg or None)
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    except Exception as error:
        raise UserError(f"{spec}: get_config failed: {_one_line(error)}") from error
    if not isinstance(returned, ConfigDict):
        raise UserError(f"{spec}: get_config returned {type(returned).__name__}, not a ConfigDict")
    try:
        config = _checked(returned.to_dict())
    except UserError as error:
        raise UserError(f"{spec}: {error}") from error
    for text in overrides:
        _override(config, text)
    validate(config)
    return config


def save_json(config: ConfigDict, path: str | os.PathLike) -> None:
    """Writes the config as JSON, whole or not at all. Raises UserError if it cannot be written."""
    path = epath.Path(path)
    part = path.parent / f".{path.name}.part"
    try:
        part.write_text(config.to_json(indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): choose another folder"
        ) from error


def load_json(path: str | os.PathLike, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads what `save_json` wrote. Keys that a later version added take their defaults.

    Args:
      overrides: as for `load`; the result is validated.

    Raises:
      UserError: the file is missing or no JSON object, or has unknown keys or wrong values.
    """
    path = epath.Path(path)
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}): is it a workdir?"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore it or delete it") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a config: restore it or delete it")
    try:
        config = _checked(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for text in overrides:
        _override(config, text)
    validate(config)
    return config


def compare(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Differences that make two configs different runs: "key: old value -> new value", by key.

    Keys under `RUN_CONTROL` (how long to run, how to save, sample and shard) are left out.
    """
    before, after = ({**_leaves(c), **_leaves(c.loss_weights, "loss_weights.")} for c in (old, new))
    keys = sorted((before.keys() | after.keys()) - {"loss_weights"})
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in keys
        if before.get(key) != after.get(key) and not key.startswith(RUN_CONTROL)
    ]


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
    """
    values = dict(defaults)
    for part in filter(None, (part.strip() for part in (arg or "").split(","))):
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if key not in defaults:
            raise UserError(f"unknown argument {key!r}; known are: {', '.join(defaults)}")
        if not equals and not isinstance(defaults[key], bool):
            raise UserError(f"argument {key!r} needs a value: {key}={defaults[key]}")
        values[key] = _parse(key, text if equals else "true", defaults[key])
        allowed = (choices or {}).get(key)
        if allowed and values[key] not in allowed:
            raise UserError(f"{key}={text} is not possible; choose {' | '.join(map(str, allowed))}")
    return ConfigDict(values).lock()


def _find(path_text: str) -> Path:
    """The config file, or a UserError that lists the files in its folder, the likeliest first."""
    for path in (Path(path_text), ROOT / path_text):
        if path.is_file():
            return path
    folder = Path(path_text).parent
    folder = folder if folder.is_dir() and list(folder.glob("*.py")) else ROOT / "configs"
    known = [p.stem for p in sorted(folder.glob("*.py")) if "def get_config(" in p.read_text()]
    name = Path(path_text).stem
    known.sort(key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
    raise UserError(f"no config file {path_text!r}; in {folder} are: {', '.join(known)}")


def _import_get_config(path: Path) -> Callable[[str | None], ConfigDict]:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if module_spec is None:
        raise UserError(f"{path} is not a Python file; a config file is named like digits.py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be imported: {_one_line(error)}") from error
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path} has no function get_config(arg=None)")
    return module.get_config


def _one_line(error: Exception) -> str:
    """Kind and first line; of ml_collections' complaint about an unknown key, our own wording."""
    text = str(error)
    unknown = re.search(r'Key "(\w+)" does not exist', text)
    if error.args and isinstance(error.args[0], KeyError):  # an attribute of a ConfigDict
        unknown = unknown or re.match(r"\W*(\w+)", text)
    if unknown:
        return _unknown_key(unknown[1])
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0]}"


def _leaves(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; `loss_weights` is one leaf, since its names are free."""
    leaves = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and name != "loss_weights":
            leaves |= _leaves(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


_LEAVES = _leaves(DEFAULTS)
_SECTIONS = {key.rpartition(".")[0] for key in _LEAVES} - {""}


def _checked(values: Mapping) -> ConfigDict:
    """A locked config of exactly the known keys with `values` set, each of its default's kind."""
    config = default()
    for key, value in _leaves(values).items():
        _set(config, key, value)
    return config


def _override(config: ConfigDict, text: str) -> None:
    """Applies one "--config.a.b=value"; the value is read as the kind of the key's default."""
    key, equals, value = text.partition("=")
    key = key.strip().lstrip("-").removeprefix("config.")
    if not equals:
        raise UserError(f"override {text!r} has no value; write {key}=<value>")
    _set(config, key, value.strip(), _parse)


def _set(config: ConfigDict, key: str, value: Any, read: Callable | None = None) -> None:
    """Sets a dotted key to `read(key, value, default)`, by default the value's kind is checked."""
    read = read or _convert
    section, _, leaf = key.rpartition(".")
    if key == "loss_weights":
        weights = read(key, value, {})
        config.loss_weights = {k: _convert(f"{key}.{k}", v, 0.0) for k, v in weights.items()}
    elif section == "loss_weights" and leaf:
        config.loss_weights[leaf] = read(key, value, 0.0)
    elif key in _LEAVES:
        target = config
        for name in section.split(".") if section else ():
            target = target[name]
        target[leaf] = read(key, value, _LEAVES[key])
    else:
        raise UserError(_unknown_key(key))


def _unknown_key(key: str) -> str:
    """Names the nearest key: same last word, or its initials (lr = learning_rate), or spelling."""
    if key in _SECTIONS:
        inside = next(known for known in _LEAVES if known.startswith(f"{key}."))
        return f"{key!r} is a section of the config, not a key; set one in it, like {inside}"

    def likeness(known: str) -> tuple:
        word, known_word = key.rpartition(".")[2], known.rpartition(".")[2]
        initials = "".join(part[0] for part in known_word.split("_"))
        spelling = [
            difflib.SequenceMatcher(None, a, b).ratio()
            for a, b in ((word, known_word), (key, known))
        ]
        return word == known_word, word == initials, sum(spelling)

    nearest = max([*_LEAVES, *sorted(_SECTIONS)], key=likeness)
    return f"unknown config key {key!r}; the nearest is {nearest}"


_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple: "a list of numbers like 0.5,1.0",
    dict: "a table like {'balance': 0.01}",
}


def _convert(key: str, value: Any, wanted: Any) -> Any:
    """`value` as the kind of `wanted`; int passes for float, nothing else for anything else."""
    kind = type(wanted)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value):
            return float(value)
    elif kind is tuple and isinstance(value, list | tuple):
        return tuple(_convert(key, item, 0.0) for item in value)
    elif type(value) is kind:
        return value
    raise UserError(f"{key} = {value!r} is not {_KINDS[kind]} (the default is {wanted!r})")


def _parse(key: str, text: str, wanted: Any) -> Any:
    """The text of an override or argument as the kind of `wanted`."""
    if isinstance(wanted, str):
        return text
    if text.lower() in ("true", "false"):
        return _convert(key, text.lower() == "true", wanted)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(wanted, tuple) and isinstance(value, int | float):
        value = (value,)
    return _convert(key, value, wanted)
