"""The classes of a data set, and the file in which a run keeps them.

A model may know more classes than its data has; whoever draws images must know which of them were
trained. A workdir therefore holds `data.json`, written when training starts:

{"source": "folder:/pets", "records": 312, "num_values": {"label": 3},
 "class_names": ["cat", "dog", "owl"], "class_counts": [120, 150, 42]}

"num_values" has every scalar field of the condition with a known number of values. Names and counts
are null where the source has none. Of captioned data it has "text", too: which encoder made which
field (see `interop.prompts`), so that prompts are encoded by the same.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from moe_diffusion import empty_prompt
from moe_diffusion.conditions import Field
from moe_diffusion.empty_prompt import EmptyPrompt
from moe_diffusion.errors import UserError, explained
from moe_diffusion.pictures import printable
from moe_diffusion.reading import read_table
from moe_diffusion.writing import save_text

FILE = "data.json"
LABEL = "label"  # the field of a condition that the names belong to


@dataclasses.dataclass(frozen=True)
class Classes:
    """What is known of the classes of some data; nothing by default.

    Attributes:
      num_values: of every scalar field of the condition, how many values the data has.
      names, counts: of each class, and its images; () if they are not known.
      source, records: the `data.source` that they are of, and how many records it has.
      empty: what the data has for the empty prompt; see `empty_prompt`.
      text: field of a text -> {"encoder", "fingerprint", ...} of what made it.
    """

    num_values: Mapping[str, int] = dataclasses.field(default_factory=dict)
    names: Sequence[str] = ()
    counts: Sequence[int] = ()
    source: str = ""
    records: int = 0
    empty: EmptyPrompt | None = None
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def limit(self, field: str, most: int) -> int:
        """How many of the `most` values of a model's field were trained: all if it is not known."""
        return min(most, self.num_values.get(field, most))

    def name(self, label: int) -> str:
        """The printable name of a class; its number if it has none."""
        return printable(self.names[label]) if label < len(self.names) else str(label)

    def numbers_of(self, name: str) -> list[int]:
        """The classes of a name, several where the names are not unique."""
        return [number for number, other in enumerate(self.names) if other == name]

    def nearest(self, name: str) -> list[str]:
        """Up to three names that look like `name`, whatever the case of their letters."""
        lower = {other.lower(): printable(other) for other in reversed(self.names)}
        return [lower[key] for key in difflib.get_close_matches(name.lower(), lower, cutoff=0.4)]

    def save(self, workdir: str | os.PathLike) -> None:
        """Writes the workdir's `data.json`, unless nothing is known, and its empty prompt."""
        if self == NOTHING:
            return
        if self.empty:
            self.empty.save(workdir)
        values = {
            "source": self.source,
            "records": self.records,
            "num_values": dict(self.num_values),
            "class_names": list(self.names) or None,
            "class_counts": list(self.counts) or None,
            **({"text": dict(self.text)} if self.text else {}),
        }
        save_text(json.dumps(values, indent=1) + "\n", epath.Path(workdir) / FILE)


NOTHING = Classes()


def is_discrete(field: Field) -> bool:
    """Whether a field of a condition is one number with a known number of values."""
    return field.shape == () and field.num_values is not None


def of_source(source: Any, name: str = "") -> Classes:
    """The classes of a data source, see `data/sources.py`."""
    spec = getattr(source, "cond_spec", {})
    num_values = {field: spec[field].num_values for field in spec if is_discrete(spec[field])}
    names, counts = (getattr(source, key, None) or () for key in ("class_names", "class_counts"))
    classes = num_values.get(LABEL, 0)
    labels = np.asarray(getattr(source, "labels", ()))
    if labels.size and 0 <= labels.min() and labels.max() < classes:
        counts = np.bincount(labels, minlength=classes).tolist()
    names, counts = (tuple(found) if len(found) == classes else () for found in (names, counts))
    records = len(source) if hasattr(source, "__len__") else 0
    text, empty = getattr(source, "text_encoders", {}), empty_prompt.of_source(source)
    return Classes(num_values, names, counts, name, records, empty, text)


def table(classes: Classes) -> str:
    """How many classes there are, and the fewest and the most images of one; "" without classes."""
    if LABEL not in classes.num_values:
        return ""
    rows = [("classes", classes.num_values[LABEL], "")]
    if classes.counts:
        for what, chosen in (("fewest images", np.argmin), ("most images", np.argmax)):
            label = int(chosen(classes.counts))
            name = classes.name(label) if classes.names else f"class {label}"
            rows.append((what, classes.counts[label], name))
    width = max(len(f"{number:,}") for _, number, _ in rows)
    return "\n".join(
        f"{what:13}  {number:>{width},}  {name}".rstrip() for what, number, name in rows
    )


def of_run(workdir: str | os.PathLike) -> Classes:
    """The classes that a run was trained on; nothing is known of a conversion or an old run.

    Raises:
      UserError: the workdir's `data.json` is damaged.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return NOTHING
    remedy = "restore it, or delete it to draw every class that the model knows"
    values = read_table(path, remedy)
    with explained(f"{path} is damaged", remedy, (ValueError,)):
        num_values = _checked(values, "num_values", dict, _is_count)
        names = _checked(values, "class_names", list, lambda name: isinstance(name, str))
        counts = _checked(values, "class_counts", list, lambda n: n == 0 or _is_count(n))
        for key, found in (("class_names", names), ("class_counts", counts)):
            if found and len(found) != num_values.get(LABEL):
                raise ValueError(f"{key} has {len(found)} entries")
        source, records = values.get("source", ""), values.get("records", 0)
        if not isinstance(source, str) or type(records) is not int:
            raise ValueError("source is no text, or records no number")
        text = _checked(values, "text", dict, _is_encoder)
    known = num_values, tuple(names), tuple(counts), source, records
    return Classes(*known, empty_prompt.of_run(workdir), text)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_encoder(value: Any) -> bool:
    keys = ("encoder", "fingerprint")
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in keys)


def _checked(values: dict, key: str, kind: type, fits: Callable[[Any], bool]) -> Any:
    """The value of a key, an empty one for null, with entries that fit."""
    found = kind() if values.get(key) is None else values[key]
    entries = found.values() if isinstance(found, dict) else found
    if not (isinstance(found, kind) and all(map(fits, entries))):
        raise ValueError(f"{key} is wrong")
    return found


def check_same(before: Classes, now: Classes, workdir: str | os.PathLike) -> None:
    """Checks, when a run is resumed, that labels and the empty prompt mean what they meant.

    Raises:
      UserError: the same source has other classes or another empty prompt than when the run began.
    """
    if before.empty and before.empty != now.empty:
        raise UserError(
            f"data.source={now.source} has another empty prompt than when {workdir} began, so it "
            "is made by other text encoders: use the data that it began with, or another workdir"
        )
    if not before.num_values or before.source != now.source:
        return
    was, has = (known.num_values.get(LABEL, 0) for known in (before, now))
    changed = f"it had {was} classes, now it has {has}" if was != has else ""
    for number, (old, new) in enumerate(zip(before.names, now.names, strict=False)):
        if old != new:
            changed = f"class {number} was {printable(old)}, now it is {printable(new)}"
            break
    if changed:
        raise UserError(
            f"data.source={now.source} has other classes than when {workdir} began ({changed}): "
            "restore its folders, or choose another workdir"
        )


def with_names(classes: Classes, path: str | os.PathLike, most: int) -> Classes:
    """The classes under the names of a text file, which has one a line.

    Args:
      most: how many classes the model knows. The file names these, or those that were trained.

    Raises:
      UserError: the file cannot be read, a line is empty, or it has another number of lines.
    """
    with explained(
        f"{path} cannot be read", "give a text file, one name a line", (OSError, ValueError)
    ):
        if not os.path.isfile(path):
            raise ValueError("no such file")
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file.read().rstrip("\n").split("\n")]
    known = classes.limit(LABEL, most)
    if len(names) not in (known, most):
        raise UserError(f"{path} has {len(names)} names for {known} classes: give one for each")
    if "" in names:
        raise UserError(f"line {names.index('') + 1} of {path} is empty: name every class")
    return dataclasses.replace(classes, names=tuple(names[:known]))
