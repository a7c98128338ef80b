"""The names of the classes that a run was trained on: "class_names" in the run's data.json."""

from __future__ import annotations

import json
import os

from etils import epath

from moe_diffusion.errors import UserError, explained

FILE = "data.json"


def class_names_of(workdir: str | os.PathLike) -> tuple[str, ...]:
    """The names in the order of the classes; () if the folder does not tell them.

    Raises:
      UserError: the file is damaged.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return ()
    remedy = "mend it, or delete it: then classes have numbers only"
    with explained(f"{path} is damaged", remedy, (ValueError, OSError, AttributeError)):
        names = json.loads(path.read_text()).get("class_names") or ()
    if not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise UserError(f"class_names of {path} is no list of texts: {remedy}")
    return tuple(names)
