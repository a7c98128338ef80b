"""How the weights of one model begin another: what is kept, and what begins anew.

`init.reset` of a config says what begins anew, as a list:

* `none`: nothing. The models must be the same.
* A pattern of paths, like `label_embed` or `layers_0/*/moe`: the arrays that it matches, with
  everything below. `*` stands for any text.
* `auto`: what a difference between the two configs concerns (`CONCERNED`), and no more. The tables
  of `TABLES` have a row per class and a last one for "no class". Of these, classes that both models
  know keep their rows. If both know the names of their classes, a name finds its row. Otherwise row
  i stays row i.

Positions need no array: sine-cosine tables and rotations are computed from the size of the image.
Nor does the length of a text, unless the model reads words itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from moe_diffusion.errors import UserError

TABLES = ("label_embed/embedding",)
# Key -> the parameters whose shape or meaning depends on it.
CONCERNED: dict[str, tuple[str, ...]] = {
    "model.image_size": (),
    "model.image_width": (),
    "model.num_classes": TABLES,
    "model.patch_size": ("patch_embed", "final/linear"),
    "model.channels": ("patch_embed", "final/linear"),
    "model.learn_sigma": ("final/linear",),
    "model.dit_t2i.text_width": ("text_embed/dense_0",),
    "model.dit_t2i.pooled_width": ("pooled_embed/dense_0",),
    "model.dit_t2i.vocabulary": ("words",),
    "model.dit_t2i.text_mask": (),
    "model.flux.text_width": ("text_embed",),
    "model.flux.pooled_width": ("pooled_embed/dense_0",),
    "model.flux.vocabulary": ("words",),
    "model.jit.bottleneck": ("patch_embed",),
    "model.jit.in_context_tokens": ("in_context_embed",),
}
_LISTED = 10

Rows = tuple[np.ndarray, np.ndarray]  # i64[N] there, i64[N] here
Change = tuple[str, Any, Any]  # key, value there, value here


@dataclass
class Fit:
    """What becomes of every array. Paths begin with the collection.

    Attributes:
      kept: taken as they are.
      rows: tables, of which these rows are taken.
      new: begin anew.
      unused: stored, but the model has no such array.
      misfits: path -> (shape there, shape here, or "absent") of what neither fits nor begins anew.
      excused: keys that may differ.
    """

    kept: list[str] = field(default_factory=list)
    rows: dict[str, Rows] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    misfits: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    excused: set[str] = field(default_factory=set)

    def told(self) -> list[str]:
        """A line for each array, or one line if all are kept."""
        if not (self.rows or self.new or self.unused):
            return [f"init_from: all {len(self.kept)} arrays kept"]
        lines = [f"kept: {path}" for path in self.kept]
        lines += [f"{len(here)} rows kept: {path}" for path, (_, here) in self.rows.items()]
        lines += [f"new: {path}" for path in self.new]
        return [f"init_from: {line}" for line in lines + [f"unused: {p}" for p in self.unused]]

    def check(self, changes: Sequence[Change], free: tuple[str, ...], what: str) -> None:
        """Raises a UserError that lists what keeps the weights from beginning the model.

        Args:
          changes: how the two configs differ.
          free: keys, or beginnings of keys, that may differ if all arrays fit.
          what: is of another model; the message begins with it.
        """
        pairs = self.misfits.items()
        arrays = [f"{name}: {there} there, {here} here" for name, (there, here) in pairs]
        differences = [
            f"{key}: {there} there, {here} here"
            for key, there, here in changes
            if here is not None and key not in self.excused and (arrays or not key.startswith(free))
        ] + arrays
        if differences:
            more = len(differences) - _LISTED
            listed = differences[:_LISTED] + ([f"... ({more} more)"] if more > 0 else [])
            raise UserError(
                f"{what} is another model: {'; '.join(listed)}: use its model, another folder, or "
                "name in init.reset what begins anew (auto: what other classes, channels or "
                "patches concern)"
            )


def fit(
    wanted: Mapping[str, Any],
    misfits: Mapping[str, tuple[Any, Any]],
    changes: Sequence[Change],
    reset: Sequence[str],
    class_names: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> Fit:
    """Decides what becomes of every array.

    Args:
      wanted: path -> an array of the model, or its shape and dtype.
      misfits: of `StoredWeights.misfits`, path -> (shape there, shape here, or "absent").
      changes: how the two configs differ.
      reset: `init.reset`.
      class_names: there and here, in order; empty if unknown.

    Raises:
      UserError: a pattern of `reset` matches nothing.
    """
    paths, auto = sorted({*wanted, *misfits}), "auto" in reset
    patterns = [pattern for pattern in reset if pattern not in ("auto", "none")]
    for pattern in patterns:
        if not any(_matches(path, pattern) for path in paths):
            parts = sorted({_bare(path).partition("/")[0] for path in paths})
            raise UserError(
                f"init.reset = {pattern!r} matches no parameter: the model has {', '.join(parts)}, "
                f"and a path is like {_bare(paths[0])}"
            )
    if auto:
        parts = {part for key, _, _ in changes for part in CONCERNED.get(key, ())}
        patterns += sorted(parts - set(TABLES))
    found = Fit()
    for path in paths:
        there, here = misfits[path] if path in misfits else (wanted[path].shape,) * 2
        if any(_matches(path, pattern) for pattern in patterns):
            (found.unused if here == "absent" else found.new).append(path)
        elif auto and _bare(path) in TABLES and there[1:] == here[1:]:
            found.rows[path] = same_rows(there[0], here[0], *class_names)
        elif path in misfits:
            found.misfits[path] = misfits[path]
        else:
            found.kept.append(path)
    done = {*found.new, *found.unused, *found.rows}
    for key, parts in CONCERNED.items() if patterns or auto else ():
        concerned = [{path for path in paths if _matches(path, part)} for part in parts]
        if all(matched and matched <= done for matched in concerned):
            found.excused.add(key)
    return found


def same_rows(
    before: int, after: int, names_before: Sequence[str], names_after: Sequence[str]
) -> Rows:
    """Which rows of a table of classes are taken.

    Args:
      before, after: number of rows, the last of which stands for "no class".
      names_before, names_after: of the classes in order; empty if unknown.
    """
    if names_before and names_after:
        places = {name: row for row, name in enumerate(names_before[: before - 1])}
        pairs = [(places[n], i) for i, n in enumerate(names_after[: after - 1]) if n in places]
    else:
        pairs = [(row, row) for row in range(min(before, after) - 1)]
    there, here = np.array([*pairs, (before - 1, after - 1)]).T
    return there, here


def put_rows(table: jax.Array, rows: np.ndarray, values: np.ndarray) -> jax.Array:
    """The table with other values [N, ...] in rows i64[N]; it stays where it lies."""
    put = jax.jit(lambda table, values: table.at[rows].set(values), out_shardings=table.sharding)
    return put(table, values.astype(table.dtype))


def _bare(path: str) -> str:
    """A path without its collection."""
    return path.partition("/")[2]


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern matches a path without its collection, or a place above it."""
    return any(fnmatchcase(_bare(path), text) for text in (pattern, f"{pattern}/*"))
