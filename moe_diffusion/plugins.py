"""What a config names by its place: "package.module:name", inside this package or outside."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

from moe_diffusion.errors import UserError, first_line


def find_object(place: str, asked_by: str) -> Any:
    """The object of a place.

    Args:
      place: "package.module:name". The module may lie in the current folder.
      asked_by: key and value that hold the place, with which messages begin.

    Raises:
      UserError: the module cannot be imported, or has no such name.
    """
    module_name, _, name = place.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script may end the process as it is imported
        raise UserError(
            f"{asked_by}: module {module_name} cannot be imported ({type(error).__name__}: "
            f"{first_line(error)}): mend it, or start in the folder that it lies in"
        ) from error
    if not hasattr(module, name):
        where = getattr(module, "__file__", None) or module_name
        raise UserError(f"{asked_by}: {where} has no {name}: name a class of that file")
    return getattr(module, name)


def is_place(text: str) -> bool:
    """Whether a text looks like "package.module:name"."""
    module_name, colon, name = text.partition(":")
    return (
        bool(colon) and name.isidentifier() and all(map(str.isidentifier, module_name.split(".")))
    )


def make(found: Any, options: Mapping[str, Any], asked_by: str) -> Any:
    """An object: `found` itself, or what it returns if it is a class or a function.

    Args:
      options: values by name, of which a class or a function receives those that it has parameters
        for.
      asked_by: see `find_object`.

    Raises:
      UserError: it needs another parameter, or it fails.
    """
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        return found
    try:
        parameters = inspect.signature(found).parameters.values()
        takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        names = options.keys() if takes_all else {p.name for p in parameters} & options.keys()
        return found(**{name: options[name] for name in options if name in names})
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{asked_by}: {found.__name__} cannot be made ({type(error).__name__}: "
            f"{first_line(error)}): it may have the parameters {', '.join(options)}, and others "
            "only with a default"
        ) from error
