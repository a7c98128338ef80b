"""The key map: one table per model family, read in both directions.

A `Row` says which tensor of a PyTorch state dict is which of our leaves, and how its axes are
arranged. Nothing here computes: every layout is a transpose or a reshape, so importing and
exporting a tensor gives back its bits. Our leaves are stacked (layers of a scanned segment,
experts of a layer); PyTorch's are not: a row with {i} and {e} stands for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from moe_diffusion import models
from moe_diffusion.errors import UserError

LISTED = 10  # keys of each kind that an error names
WRAPPERS = ("module.", "_orig_mod.", "net.")  # DDP, torch.compile, JiT's Denoiser


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
      part: (i, n) where PyTorch packs n equal tensors along the first axis and this is number i.
    """

    torch: str
    ours: str
    layout: Layout
    needs: str | None = None
    unless: str | None = None
    part: tuple[int, int] = (0, 1)


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

    Attributes:
      configure: (the authors' hyperparameters, a default config) -> None, sets the config.
      from_args: arguments of the authors' training script, which their checkpoints may hold under
        "args" -> hyperparameters, or None if these arguments do not tell them.
      from_shapes: key -> shape of a state dict -> those hyperparameters that it tells.
      asked: names of hyperparameters ("MoE_config.top_k" in a section) that no default stands in
        for: with a state dict alone, its shapes must tell them.
    """

    name: str
    rows: tuple[Row, ...]
    constants: tuple[Constant, ...]
    configure: Callable[[Mapping[str, Any], ConfigDict], None]
    from_args: Callable[[Mapping[str, Any]], dict[str, Any] | None] = lambda args: None
    from_shapes: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]] = lambda shapes: {}
    asked: tuple[str, ...] = ()


class Entry(NamedTuple):
    """A row at one block and expert: PyTorch's `key` (or a part of it) is `leaf[path][index]`."""

    key: str
    path: str
    index: tuple[int, ...]
    layout: Layout
    part: tuple[int, int]

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """This entry's part of PyTorch's tensor."""
        number, parts = self.part
        if parts == 1:
            return tensor
        size = len(tensor) // parts
        return tensor[number * size : (number + 1) * size]


def abstract_variables(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Paths ("params/final/linear/bias", ...) and shapes of all variables, computing none."""
    return flatten_dict(models.abstract_variables(model), sep="/")


def block_paths(model: nn.Module) -> list[tuple[str, int]]:
    """Where each block lives: ("layers_<segment>/block_<j>", index on the stacked layer axis)."""
    return [(block.path, block.index) for block in model.blocks()]


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
                    key = row.torch.format(i=i, e=e)
                    yield Entry(key, path, (*layer, e), row.layout, row.part)
            else:
                yield Entry(row.torch.format(i=i), path, layer, row.layout, row.part)


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


def entries_by_leaf(
    family: Family, model: nn.Module, leaves: Mapping[str, Any]
) -> dict[str, list[Entry]]:
    """Path of every leaf (path -> array or shape) -> the entries that it is written to.

    Raises:
      UserError: the family has no name for some leaf.
    """
    groups: dict[str, list[Entry]] = {path: [] for path in leaves}
    for entry in entries(family, model, leaves):
        groups[entry.path].append(entry)
    nameless = sorted(path for path, group in groups.items() if not group)
    if nameless:
        raise UserError(
            f"the PyTorch family '{family.name}' has no name for {listed(nameless)}; "
            "use the family that this model was built for"
        )
    return groups


def export_tree(tree: Mapping[str, Any], family: Family, model: nn.Module) -> dict[str, np.ndarray]:
    """Any tree shaped like the variables (or some of their collections) under PyTorch's names.

    Serves gradients as well as weights; constants are not added.

    Raises:
      UserError: the family has no name for some leaf.
    """
    leaves = flatten_dict(nn.meta.unbox(dict(tree)), sep="/")
    leaves = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    found = [e for group in entries_by_leaf(family, model, leaves).values() for e in group]
    tensors: dict[str, np.ndarray] = {}
    for entry in sorted(found, key=lambda entry: entry.part):
        tensor = entry.layout.to_torch(leaves[entry.path][entry.index], model)
        if entry.part[0] > 0:
            tensor = np.concatenate([tensors[entry.key], tensor])
        tensors[entry.key] = np.ascontiguousarray(tensor)
    return tensors


class Leaf(NamedTuple):
    """One of our leaves, to be filled piece by piece from a state dict.

    Attributes:
      pieces: yields (index, array): what `leaf[index]` is, each read when it is its turn.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[tuple[tuple[int, ...], np.ndarray]]]


def import_tree(
    state: Mapping[str, Any], family: Family, model: nn.Module
) -> dict[str, dict[str, Any]]:
    """A complete state dict as our variables {"params": ..., "router_state": ...}.

    Floating tensors of any precision become the dtype of our leaves (float32 masters).

    Raises:
      UserError: see `import_leaves`.
    """
    leaves = {}
    for path, leaf in import_leaves(state, family, model).items():
        leaves[path] = np.empty(leaf.shape, leaf.dtype)
        for index, piece in leaf.pieces():
            leaves[path][index] = piece
    variables = unflatten_dict(leaves, sep="/")
    return {"params": variables["params"], "router_state": variables.get("router_state", {})}


def import_leaves(state: Mapping[str, Any], family: Family, model: nn.Module) -> dict[str, Leaf]:
    """Path of every variable -> how to read it from a complete state dict.

    Only shapes and constants are looked at here, so that nothing long begins before all fits.
    Wrappers' prefixes (`WRAPPERS`) make no difference.

    Raises:
      UserError: one error for all missing, unexpected and misshaped keys; or a constant (the
        position table) is not the one that our model computes.
    """
    abstract = abstract_variables(model)
    groups = entries_by_leaf(family, model, abstract)
    wanted = [entry for group in groups.values() for entry in group]
    fixed = constants(family, model)
    want = torch_shapes(wanted, abstract, model) | {key: v.shape for key, v in fixed.items()}
    found = {bare(key): key for key in state}
    names = {key: found[bare(key)] for key in want if bare(key) in found}
    shapes = shapes_of(state)
    misshaped = sorted(
        f"{name} (file {shapes[name]}, model {want[key]})"
        for key, name in names.items()
        if shapes[name] != want[key]
    )
    different = [
        names[key]
        for key, value in fixed.items()
        if key in names
        and shapes[names[key]] == value.shape
        # Loose, because averaging a constant 10^5 times in an EMA lets its last bits drift.
        and not np.allclose(np.asarray(state[names[key]], np.float32), value, rtol=0, atol=1e-3)
    ]
    missing, unexpected = sorted(set(want) - set(names)), sorted(set(state) - set(names.values()))
    _raise_for(family, missing, unexpected, misshaped, different)

    def pieces(path: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for entry in groups[path]:
            tensor = entry.of(np.asarray(state[names[entry.key]]))
            shape = abstract[path].shape[len(entry.index) :]
            yield entry.index, entry.layout.to_ours(tensor, shape)

    return {
        path: Leaf(leaf.shape, np.dtype(leaf.dtype), partial(pieces, path))
        for path, leaf in abstract.items()
    }


def bare(key: str) -> str:
    """A key without what DDP, torch.compile or an enclosing module put in front of it."""
    while key.startswith(WRAPPERS):
        key = key.partition(".")[2]
    return key


def shapes_of(state: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Shapes of a state dict; that of a file (`files.open_weights`) knows them without reading."""
    return getattr(state, "shapes", None) or {key: np.shape(value) for key, value in state.items()}


def torch_shapes(
    found: Sequence[Entry], leaves: Mapping[str, Any], model: nn.Module
) -> dict[str, tuple[int, ...]]:
    """PyTorch's key -> shape of its tensor, for entries of `leaves` (path -> array or shape)."""
    known: dict[tuple, tuple[int, ...]] = {}
    shapes = {}
    for entry in found:
        ours = leaves[entry.path].shape[len(entry.index) :]
        if (entry.layout, ours) not in known:
            known[entry.layout, ours] = jax.eval_shape(
                lambda w, layout=entry.layout: layout.to_torch(w, model),
                jax.ShapeDtypeStruct(ours, np.float32),
            ).shape
        shape, parts = known[entry.layout, ours], entry.part[1]
        shapes[entry.key] = shape if parts == 1 else (parts * shape[0], *shape[1:])
    return shapes


def _raise_for(family, missing, unexpected, misshaped, different) -> None:
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "misshaped": misshaped,
        "not the fixed value of this model": different,
    }
    text = "; ".join(f"{len(k)} {name}: {listed(k)}" for name, k in problems.items() if k)
    if text:
        raise UserError(f"this is no state dict of such a model of family '{family.name}': {text}")


def listed(keys: Sequence[str]) -> str:
    """The first ten, and how many there are besides."""
    more = f", ... ({len(keys) - LISTED} more)" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + more
