"""Which keys a config has, of what kind, and how settings become a config.

The keys depend on one value, model.router.name: the section model.router has the fields of that
router. So all settings are gathered before the first is checked, and their order does not matter.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import difflib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from moe_diffusion import models
from moe_diffusion.config.defaults import DEFAULTS
from moe_diffusion.config.renamed import new_key, new_value
from moe_diffusion.errors import UserError, shown
from moe_diffusion.moe import routers

_LARGEST = 3.4e38  # of float32, in which everything is computed
ROUTER, WEIGHTS = "model.router", "loss_weights"

# (dotted key, value, function that gives the value the kind of the default: `convert` or `parse`)
Setting = tuple[str, Any, Callable[[str, Any, Any], Any]]


def shared() -> dict[str, Any]:
    """A new copy of the table of defaults, with a section for every architecture."""
    table = copy.deepcopy(DEFAULTS)
    for name in models.ARCHITECTURES:
        fields = models.architecture(name).FIELDS
        table["model"][name] = {key: default for key, (default, _) in fields.items()}
    return table


def leaves(config: Mapping | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value. `loss_weights` is one leaf, because its names are free."""
    found = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and name != WEIGHTS:
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


@functools.cache
def router_fields(name: str) -> dict[str, Any]:
    """Dotted key -> default of the fields of a router. Raises UserError for an unknown one."""
    router = routers.find(name)
    fields = router.fields() if router else {}
    return {f"{ROUTER}.{field}": default for field, default in fields.items()}


@functools.cache
def fields_of_others() -> dict[str, Any]:
    """Dotted key -> default of the fields of all built-in routers.

    Old configs have all of them, whatever their router.
    """
    return {k: v for name in reversed(routers.ROUTERS) for k, v in router_fields(name).items()}


def settle(
    values: Mapping | ConfigDict, overrides: Sequence[str] = (), origin: str = ""
) -> ConfigDict:
    """Makes a complete config from the defaults, then `values`, then the overrides in order.

    Args:
      values: nested, under today's or old names; they may lack any key.
      overrides: as for `config.load`.
      origin: where `values` come from, such as a file. Messages about them begin with it.

    Returns:
      A locked, type-safe config, in which only `loss_weights` takes new names.

    Raises:
      UserError: an unknown key, a value of the wrong kind, or an unknown router.
    """
    values = values.to_dict() if isinstance(values, ConfigDict) else values
    given = [(new_key(key), value, convert) for key, value in leaves(values).items()]
    changes = [_override(text) for text in overrides]
    name = _router_name(changes)
    with prefixed(origin if name is None else ""):
        name = _router_name(given) if name is None else name
        fields = router_fields(DEFAULTS["model"]["router"]["name"] if name is None else name)
    known = leaves(shared()) | fields
    config = ConfigDict(shared())
    for key, default in fields.items():
        config.model.router[key.rpartition(".")[2]] = default
    config.lock()
    config.loss_weights.unlock()
    with prefixed(origin):
        _apply(config, known, given)
    _apply(config, known, changes)
    return config


@contextlib.contextmanager
def prefixed(origin: str) -> Iterator[None]:
    """Puts the origin of settings in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{origin}: {error}" if origin else str(error)) from error


def _override(text: str) -> Setting:
    """The setting of "--config.a.b=value"; the value is read as the kind of the key's default.

    Without a value the key becomes true, or with "--noconfig." false.
    """
    name, equals, value = text.partition("=")
    name = name.strip().lstrip("-")
    key, no = name.removeprefix("no").removeprefix("config."), name.startswith("noconfig.")

    def flag(key: str, _: str, wanted: Any) -> bool:
        if not isinstance(wanted, bool):
            raise UserError(f"override {shown(text)} has no value; write {key}=<value>")
        return not no

    if no and equals:
        raise UserError(
            f"override {shown(text)} has a value; write {key}={value[:100]}, or leave it out"
        )
    return new_key(key), value.strip(), parse if equals else flag


def _router_name(settings: Iterable[Setting]) -> str | None:
    """The name that the last setting of model.router.name gives; None without one."""
    names = [read(key, value, "") for key, value, read in settings if key == f"{ROUTER}.name"]
    return names[-1] if names else None


def _apply(config: ConfigDict, known: Mapping[str, Any], settings: Iterable[Setting]) -> None:
    """Sets the keys of a config one by one."""
    for key, value, read in settings:
        section, _, leaf = key.rpartition(".")
        if key == WEIGHTS:
            weights = {new_key(f"{key}.{k}"): v for k, v in read(key, value, {}).items()}
            config.loss_weights = {
                k.removeprefix(f"{key}."): convert(k, v, 0.0) for k, v in weights.items()
            }
        elif section == WEIGHTS and leaf:
            config.loss_weights[leaf] = read(key, value, 0.0)
        elif key in known:
            target = config
            for name in section.split(".") if section else ():
                target = target[name]
            target[leaf] = new_value(key, read(key, value, known[key]))
        elif key in fields_of_others():
            read(key, value, fields_of_others()[key])  # checks the kind, then drops the value
        else:
            raise UserError(unknown_key(key, known))


def unknown_key(key: str, known: Iterable[str] = ()) -> str:
    """The message about a key that does not exist. It names the nearest key that does.

    The nearest has the same last word, or its initials (lr = learning_rate), or a similar spelling.

    Args:
      known: further keys that exist, besides the shared ones and those of all built-in routers.
    """
    key = key[:200]  # spellings of longer texts take minutes to compare
    known = [*{**leaves(shared()), **fields_of_others(), **dict.fromkeys(known)}]
    sections = {k.rpartition(".")[0] for k in known} - {""}
    if key in sections:
        inside = next(k for k in known if k.startswith(f"{key}."))
        return f"{key!r} is a section of the config, not a key; set one in it, like {inside}"

    def likeness(other: str) -> tuple:
        word, other_word = key.rpartition(".")[2], other.rpartition(".")[2]
        initials = "".join(part[0] for part in other_word.split("_"))
        spelling = [
            difflib.SequenceMatcher(None, a, b).ratio()
            for a, b in ((word, other_word), (key, other))
        ]
        return word == other_word, word == initials, sum(spelling)

    nearest = max([*known, *sorted(sections)], key=likeness)
    return f"unknown config key {shown(key)}; the nearest is {nearest}"


_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "a table like {'balance': 0.01}",
}


def convert(key: str, value: Any, wanted: Any) -> Any:
    """Converts `value` to the kind of `wanted`: an int to a float or a list to a tuple, no more.

    The items of a tuple get the kind of the first item of `wanted`, or are numbers if it is empty.

    Raises:
      UserError: the value is of another kind.
    """
    kind = type(wanted)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and abs(value) <= _LARGEST:
            return float(value)
    elif kind is tuple and isinstance(value, list | tuple):
        return tuple(convert(key, item, _item(wanted)) for item in value)
    elif type(value) is kind:
        return value
    described = _KINDS.get(kind) or (
        "a list of texts like layers_0/*,final/*"
        if isinstance(_item(wanted), str)
        else "a list of numbers like 0.5,1.0"
    )
    raise UserError(f"{key} = {shown(value)} is not {described} (the default is {wanted!r})")


def parse(key: str, text: str, wanted: Any) -> Any:
    """Reads the text of an override or argument as the kind of `wanted`; see `convert`."""
    if isinstance(wanted, str):
        return text
    texts = isinstance(wanted, tuple) and isinstance(_item(wanted), str)
    if texts and not text.startswith(("(", "[")):
        return tuple(filter(None, (part.strip() for part in text.split(","))))
    if text.lower() in ("true", "false"):
        return convert(key, text.lower() == "true", wanted)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(wanted, tuple) and isinstance(value, int | float):
        value = (value,)
    return convert(key, value, wanted)


def _item(wanted: tuple) -> Any:
    return wanted[0] if wanted else 0.0
