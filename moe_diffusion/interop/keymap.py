"""The key map: one table per model family, read in both directions.

A `Row` says which tensor of a PyTorch state dict is which of our leaves, and how its axes are
arranged. Nothing here computes: every layout is a transpose or a reshape, so importing and
exporting a tensor gives back its bits. Our leaves are stacked (layers of a scanned segment,
experts of a layer); PyTorch's are not: a row with {i} and {e} stands for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from moe_diffusion import models
from moe_diffusion.errors import UserError

LISTED = 10  # keys of each kind that an error names


class Layout(NamedTuple):
    """How one tensor lies on either side.

    Attributes:
      to_torch: (our array, model) -> PyTorch's array.
      to_ours: (PyTorch's array, our shape) -> our array.
    """

    to_torch: Callable[[Any, nn.Module], Any]
    to_ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _conv_to_torch(w, model):
    p = model.patch_size
    return w.reshape(p, p, -1, w.shape[-1]).transpose(3, 2, 0, 1)


SAME = Layout(lambda w, m: w, lambda w, s: w)
FLAT = Layout(lambda w, m: w.reshape(-1), lambda w, s: w.reshape(s))
# Linear weights are [out, in] in PyTorch and [in, out] here.
LINEAR = Layout(lambda w, m: w.T, lambda w, s: w.T)
# The same where our kernel splits its last axis into (3,) heads and head_dim, or its first one.
HEADS_OUT = Layout(lambda w, m: w.reshape(w.shape[0], -1).T, lambda w, s: w.T.reshape(s))
HEADS_IN = Layout(lambda w, m: w.reshape(-1, w.shape[-1]).T, lambda w, s: w.T.reshape(s))
# Patch embedding: a stride-p convolution [D, C, p_row, p_col], here [p_row * p_col * C, D].
CONV = Layout(_conv_to_torch, lambda w, s: w.transpose(2, 3, 1, 0).reshape(s))


class Row(NamedTuple):
    """One line of a key map.

    Attributes:
      torch: PyTorch's key; {i} runs over the blocks, {e} over the experts.
      ours: path of our leaf, collection first; {block} is `layers_<segment>/block_<j>`.
      layout: see `Layout`.
      needs, unless: path of a leaf that must or must not exist for the row to hold.
    """

    torch: str
    ours: str
    layout: Layout
    needs: str | None = None
    unless: str | None = None


class Constant(NamedTuple):
    """An entry of a state dict that is no variable of ours.

    Attributes:
      torch: PyTorch's key; with {i} there is one in every MoE block.
      value: model -> the float32 array to write, or None if this model's file has none.
    """

    torch: str
    value: Callable[[nn.Module], np.ndarray | None]


class Family(NamedTuple):
    """The names that one PyTorch code base gives to its tensors and its hyperparameters.

    configure: (the authors' hyperparameters, a default config) -> None, sets the config.
    """

    name: str
    rows: tuple[Row, ...]
    constants: tuple[Constant, ...]
    configure: Callable[[Mapping[str, Any], ConfigDict], None]


class Entry(NamedTuple):
    """A row at one block and expert: PyTorch's `key` is `leaf[path][index]`."""

    key: str
    path: str
    index: tuple[int, ...]
    layout: Layout


def abstract_variables(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Paths ("params/final/linear/bias", ...) and shapes of all variables, computing none."""
    return flatten_dict(models.abstract_variables(model), sep="/")


def block_paths(model: nn.Module) -> list[tuple[str, int]]:
    """Where each block lives: ("layers_<segment>/block_<j>", index on the stacked layer axis)."""
    places = []
    for segment, (period, repeats) in enumerate(model.segments):
        for offset in range(len(period) * repeats):
            repeat, j = divmod(offset, len(period))
            places.append((f"layers_{segment}/block_{j}", repeat))
    return places


def entries(family: Family, model: nn.Module, leaves: Mapping[str, Any]) -> Iterator[Entry]:
    """All entries of the family's rows that exist among `leaves` (path -> array or shape)."""
    for row in family.rows:
        places = block_paths(model) if "{i}" in row.torch else [("", 0)]
        for i, (block, repeat) in enumerate(places):
            path = row.ours.format(block=block)
            if path not in leaves:
                continue
            if row.needs and row.needs.format(block=block) not in leaves:
                continue
            if row.unless and row.unless.format(block=block) in leaves:
                continue
            layer = (repeat,) if "{i}" in row.torch else ()
            if "{e}" in row.torch:
                for e in range(leaves[path].shape[1]):
                    yield Entry(row.torch.format(i=i, e=e), path, (*layer, e), row.layout)
            else:
                yield Entry(row.torch.format(i=i), path, layer, row.layout)


def constants(family: Family, model: nn.Module) -> dict[str, np.ndarray]:
    """Key -> value of the entries that are no variables of ours."""
    found = {}
    for constant in family.constants:
        value = constant.value(model)
        if value is None:
            continue
        if "{i}" in constant.torch:
            blocks = [i for i, is_moe in enumerate(model.moe_pattern) if is_moe]
            found.update({constant.torch.format(i=i): value for i in blocks})
        else:
            found[constant.torch] = value
    return found


def export_tree(tree: Mapping[str, Any], family: Family, model: nn.Module) -> dict[str, np.ndarray]:
    """Any tree shaped like the variables (or some of their collections) under PyTorch's names.

    Serves gradients as well as weights; constants are not added.

    Raises:
      UserError: the family has no name for some leaf.
    """
    leaves = flatten_dict(nn.meta.unbox(dict(tree)), sep="/")
    leaves = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    found = list(entries(family, model, leaves))
    nameless = sorted(set(leaves) - {entry.path for entry in found})
    if nameless:
        raise UserError(
            f"the PyTorch family '{family.name}' has no name for {_listed(nameless)}; "
            "export under the family that this model was built for"
        )
    return {
        entry.key: np.ascontiguousarray(
            entry.layout.to_torch(leaves[entry.path][entry.index], model)
        )
        for entry in found
    }


def import_tree(
    state: Mapping[str, Any], family: Family, model: nn.Module
) -> dict[str, dict[str, Any]]:
    """A complete state dict as our variables {"params": ..., "router_state": ...}.

    Floating tensors of any precision become the dtype of our leaves (float32 masters).
    `state` may load its tensors lazily; each is read once.

    Raises:
      UserError: one error for all missing, unexpected and misshaped keys; or a constant (the
        position table) is not the one that our model computes.
    """
    abstract = abstract_variables(model)
    wanted = list(entries(family, model, abstract))
    fixed = constants(family, model)
    leaves = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in abstract.items()}
    nameless = sorted(set(leaves) - {entry.path for entry in wanted})
    if nameless:
        raise UserError(f"the PyTorch family '{family.name}' has no {_listed(nameless)}")
    expected = {entry.key for entry in wanted} | set(fixed)
    missing = sorted(expected - set(state))
    unexpected = sorted(set(state) - expected)
    misshaped = []
    for entry in wanted:
        if entry.key in state:
            tensor, leaf = np.asarray(state[entry.key]), leaves[entry.path]
            want = _torch_shape(entry, leaf, model)
            if tensor.shape == want:
                leaf[entry.index] = entry.layout.to_ours(tensor, leaf.shape[len(entry.index) :])
            else:
                misshaped.append(f"{entry.key} (file {tensor.shape}, model {want})")
    different = []
    for key, value in fixed.items():
        if key in state:
            tensor = np.asarray(state[key])
            if tensor.shape != value.shape:
                misshaped.append(f"{key} (file {tensor.shape}, model {value.shape})")
            # Loose, because averaging a constant 10^5 times in an EMA lets its last bits drift.
            elif not np.allclose(tensor, value, rtol=0, atol=1e-3):
                different.append(key)
    _raise_for(family, missing, unexpected, misshaped, different)
    variables = unflatten_dict(leaves, sep="/")
    return {"params": variables["params"], "router_state": variables.get("router_state", {})}


def _torch_shape(entry: Entry, leaf: np.ndarray, model: nn.Module) -> tuple[int, ...]:
    ours = jax.ShapeDtypeStruct(leaf.shape[len(entry.index) :], leaf.dtype)
    return jax.eval_shape(lambda w: entry.layout.to_torch(w, model), ours).shape


def _raise_for(family, missing, unexpected, misshaped, different) -> None:
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "misshaped": misshaped,
        "not the fixed value of this model": different,
    }
    text = "; ".join(f"{len(k)} {name}: {_listed(k)}" for name, k in problems.items() if k)
    if text:
        raise UserError(f"this is no state dict of such a model of family '{family.name}': {text}")


def _listed(keys: list[str]) -> str:
    more = f", ... ({len(keys) - LISTED} more)" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + more
