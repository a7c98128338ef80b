"""The engine of the key maps: reads a family's rows in both directions.

Our leaves stack the layers of a scanned segment and the experts of a layer; PyTorch has a tensor
for each. So a row with {i} and {e} stands for all of these tensors, and an `Entry` is that row at
one block and expert.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_diffusion.errors import UserError
from moe_diffusion.interop.rows import Family, Layout, Row
from moe_diffusion.interop.tensors import Lazy, Parts, Pieces, Spec, State, lazy, listed
from moe_diffusion.models import stack

# DDP, torch.compile, JiT's Denoiser, Lightning, ema_pytorch (its average and its live weights)
WRAPPERS = ("module.", "_orig_mod.", "net.", "model.", "ema_model.", "online_model.")
Abstract = Mapping[str, Any]  # path of a leaf, like "params/final/linear/bias" -> array or shape


class Entry(NamedTuple):
    """A row at one block and expert: which part of our leaf is which part of PyTorch's tensor.

    Attributes:
      key: name of PyTorch's tensor.
      path: of our leaf. Our part is leaf[(*index, *part)].
      index: numbers of the layer and the expert, where the leaf is stacked.
      part: slices of the other axes.
      ours: shape of our part.
      layout: turns one part into the other.
      theirs: shape of PyTorch's part, which begins at `start` of axis `axis` of the tensor.
    """

    key: str
    path: str
    index: tuple[int, ...]
    part: tuple[slice, ...]
    ours: tuple[int, ...]
    layout: Layout
    theirs: tuple[int, ...]
    axis: int = 0
    start: int = 0

    @property
    def place(self) -> tuple[slice, ...]:
        """The slices of PyTorch's tensor that are its part."""
        if not self.theirs:
            return ()
        stop = self.start + self.theirs[self.axis]
        return (*(slice(None),) * self.axis, slice(self.start, stop))


# --- the rows at all blocks and experts ----------------------------------------------------------


def abstract_variables(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Path ("params/final/linear/bias", ...) -> shape of every variable; computes none of them."""
    return flatten_dict(stack.abstract_variables(model), sep="/")


def entries(family: Family, model: nn.Module, leaves: Abstract) -> Iterator[Entry]:
    """All entries of the family's rows that exist among `leaves`."""
    ends: dict[str, int] = {}  # PyTorch's key -> where its parts end so far; -1: a whole tensor

    @functools.cache
    def in_torch(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
        leaf = jax.ShapeDtypeStruct(shape, np.float32)
        return jax.eval_shape(lambda w: layout.to_torch(w, model), leaf).shape

    for row in family.rows:
        part = row.part.of(model) if row.part else ()
        for key, path, index in _places(row, model, leaves):
            ours = leaves[path].shape[len(index) :]
            ours = (*_lengths(part, ours), *ours[len(part) :])
            theirs = in_torch(row.layout, ours)
            start = ends.get(key, 0)
            if start < 0 or (row.along is None and key in ends):
                raise ValueError(f"{family.name}: several rows are {key}: all need an axis `along`")
            yield Entry(key, path, index, part, ours, row.layout, theirs, row.along or 0, start)
            ends[key] = -1 if row.along is None else start + theirs[row.along]


def _places(
    row: Row, model: nn.Module, leaves: Abstract
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(PyTorch's key, our path, index of layer, member and expert) wherever the row holds."""
    for i, (block, index) in enumerate(_blocks(row, model)):
        path = row.ours.format(block=block)
        needed = not row.needs or row.needs.format(block=block) in leaves
        if path not in leaves or not needed:
            continue
        if row.unless and row.unless.format(block=block) in leaves:
            continue
        if "{e}" not in row.torch:
            yield row.torch.format(i=i, g=i), path, index
            continue
        for e in range(leaves[path].shape[len(index)]):
            yield row.torch.format(i=i, e=e), path, (*index, e)


def _blocks(row: Row, model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """(path, index) of all that the row's {i} or {g} counts; one of nothing if it has neither."""
    if "{i}" not in row.torch and "{g}" not in row.torch:
        return [("", ())]
    kinds = (row.kind,) if isinstance(row.kind, str) else row.kind
    chosen = [block for block in model.blocks() if not kinds or block.kind in kinds]
    if "{i}" in row.torch:
        return [(block.path, block.index) for block in chosen]
    firsts = [block for block in chosen if block.index[1:] == (0,)]  # a group's first members
    return [(block.path.removesuffix(f"/{stack.MEMBERS}"), block.index[:1]) for block in firsts]


def _lengths(part: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(range(*s.indices(n))) for s, n in zip(part, shape, strict=False))


def constants(family: Family, model: nn.Module) -> dict[str, np.ndarray]:
    """PyTorch's key -> value of its tensors that are no variables of ours."""
    found = {}
    for constant in family.constants:
        value = constant.value(model)
        if value is None:
            continue
        if "{i}" in constant.torch:
            kinds = [block.kind for block in model.blocks()]
            blocks = [i for i, kind in enumerate(kinds) if kind == constant.kind]
            found.update({constant.torch.format(i=i): value for i in blocks})
        else:
            found[constant.torch] = value
    return found


def entries_by_leaf(family: Family, model: nn.Module, leaves: Abstract) -> dict[str, list[Entry]]:
    """Groups the entries by our leaf: path of every leaf -> its entries.

    Raises:
      UserError: the family has no name for some leaf, or for a part of it.
    """
    groups: dict[str, list[Entry]] = {path: [] for path in leaves}
    for entry in entries(family, model, leaves):
        groups[entry.path].append(entry)

    def size(shape: tuple[int, ...]) -> int:
        return int(np.prod(shape, dtype=np.int64))

    nameless = sorted(
        path
        for path, group in groups.items()
        if not group or sum(size(entry.ours) for entry in group) != size(leaves[path].shape)
    )
    if nameless:
        absent = family.lacks(nameless)
        why = f": its published layout has no {' and no '.join(absent)}" if absent else ""
        raise UserError(
            f"the PyTorch family '{family.name}' has no name for {listed(nameless)}{why}; "
            "use the family that this model was built for"
        )
    return groups


def torch_specs(found: Iterable[Entry], leaves: Abstract) -> dict[str, Spec]:
    """PyTorch's key -> shape and dtype of its tensor, for entries of `leaves`.

    If a tensor joins leaves of several dtypes, its dtype is one that holds the values of all.
    """
    specs: dict[str, Spec] = {}
    for entry in found:
        shape, dtype = entry.theirs, jnp.dtype(leaves[entry.path].dtype)
        if entry.key in specs:
            dtype = jnp.promote_types(specs[entry.key].dtype, dtype)
            last = max(specs[entry.key].shape[entry.axis], entry.place[-1].stop)
            shape = (*shape[: entry.axis], last, *shape[entry.axis + 1 :])
        specs[entry.key] = Spec(shape, dtype)
    return specs


# --- there and back ------------------------------------------------------------------------------


def export_tree(tree: Mapping[str, Any], family: Family, model: nn.Module) -> dict[str, np.ndarray]:
    """Exports a tree with the structure of the variables (or some collections) to PyTorch's names.

    The tree may hold gradients as well as weights. Constants are not added.

    Raises:
      UserError: the family has no name for some leaf.
    """
    leaves = flatten_dict(nn.meta.unbox(dict(tree)), sep="/")
    leaves = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    found = [e for group in entries_by_leaf(family, model, leaves).values() for e in group]
    tensors = {key: np.empty(*spec) for key, spec in torch_specs(found, leaves).items()}
    for entry in found:
        leaf = leaves[entry.path][(*entry.index, *entry.part)]
        tensors[entry.key][(*entry.place, ...)] = entry.layout.to_torch(leaf, model)
    return tensors


def import_tree(
    state: State, family: Family, model: nn.Module, abstract: Abstract | None = None
) -> dict[str, dict[str, Any]]:
    """A complete state dict -> our variables, {"params": ..., "router_state": ...}.

    Floating tensors of any precision are cast to the dtype of our leaves. See `import_leaves`.
    """
    return assembled(import_leaves(state, family, model, abstract))


def assembled(leaves: Mapping[str, Pieces]) -> dict[str, dict[str, Any]]:
    """Reads path -> Pieces; returns {"params": ..., "router_state": ...} of numpy arrays."""
    arrays = {}
    for path, leaf in leaves.items():
        arrays[path] = np.empty(leaf.shape, leaf.dtype)
        for index, parts in leaf.read():
            for part, array in parts:
                arrays[path][(*index, *part, ...)] = array
    variables = unflatten_dict(arrays, sep="/")
    return {"params": variables["params"], "router_state": variables.get("router_state", {})}


def import_leaves(
    state: State,
    family: Family,
    model: nn.Module,
    abstract: Abstract | None = None,
    dtype: str | None = None,
) -> dict[str, Pieces]:
    """Path of every variable -> how to read it from a complete state dict.

    Only shapes and constants are read here, so errors come before any slow work. Prefixes of
    wrappers (`WRAPPERS`) are ignored.

    Args:
      abstract: the variables' shapes; None takes `abstract_variables(model)`.
      dtype: of all floating parameters. None takes that of `abstract`. "file" takes the narrowest
        one that holds the file's values, where float64 counts as float32. Router states keep
        theirs.

    Raises:
      UserError: keys are missing, unexpected or misshaped (one error names all), or a constant (the
        position table) is not the one that our model computes.
    """
    abstract = abstract_variables(model) if abstract is None else abstract
    groups = entries_by_leaf(family, model, abstract)
    want = torch_specs((entry for group in groups.values() for entry in group), abstract)
    state = lazy(state)
    names = _matched(state, {k: v.shape for k, v in want.items()}, family, model)
    params = {path: leaf for path, leaf in abstract.items() if path.startswith("params/")}
    if dtype == "file":
        dtype = widest(state.specs[names[e.key]].dtype for path in params for e in groups[path])

    def read(entry: Entry) -> np.ndarray:
        tensor = state[names[entry.key]].reshape(want[entry.key].shape)
        return entry.layout.to_ours(tensor[entry.place], entry.ours)

    def pieces(path: str) -> Iterator[tuple[tuple[int, ...], Parts]]:
        at: dict[tuple[int, ...], list[Entry]] = {}
        for entry in groups[path]:
            at.setdefault(entry.index, []).append(entry)
        for index, found in at.items():
            yield index, [(entry.part, read(entry)) for entry in found]

    leaves = {}
    for path, leaf in abstract.items():
        change = dtype if path in params and jnp.issubdtype(leaf.dtype, jnp.floating) else None
        made = functools.partial(pieces, path)
        leaves[path] = Pieces(leaf.shape, jnp.dtype(change or leaf.dtype), made)
    return leaves


def widest(dtypes: Iterable[np.dtype]) -> str:
    """The narrowest of float32, bfloat16 and float16 that holds all of these floating dtypes."""
    floats = {jnp.dtype(d) for d in dtypes if jnp.issubdtype(d, jnp.floating)}
    floats = [np.dtype(np.float32) if d == np.float64 else d for d in floats]
    return functools.reduce(jnp.promote_types, floats).name if floats else "float32"


def bare(key: str) -> str:
    """A key without the prefixes of DDP, torch.compile or an enclosing module (`WRAPPERS`)."""
    while key.startswith(WRAPPERS):
        key = key.partition(".")[2]
    return key


def _matched(
    state: Lazy, want: Mapping[str, tuple[int, ...]], family: Family, model: nn.Module
) -> dict[str, str]:
    """Wanted key -> its name in the state dict. Raises one UserError for all that does not fit."""
    fixed = constants(family, model)
    want = {**want, **{key: value.shape for key, value in fixed.items()}}
    found = {bare(key): key for key in state}
    if len(found) < len(state):
        twice = next(key for key in state if found[bare(key)] != key)
        raise UserError(
            f"{twice} and {found[bare(twice)]} are the same tensor under two prefixes: save one "
            "state dict alone"
        )
    names = {key: found[bare(key)] for key in want if bare(key) in found}
    shapes = {key: state.specs[name].shape for key, name in names.items()}
    problems = {
        "missing": set(want) - set(names),
        "unexpected": set(state) - set(names.values()),
        "misshaped": [
            f"{names[key]} (file {shape}, model {want[key]})"
            for key, shape in shapes.items()
            if _matrix(shape) != _matrix(want[key])
        ],
        "no floating numbers": [
            f"{names[key]} ({state.specs[names[key]].dtype})"
            for key in shapes
            if not jnp.issubdtype(state.specs[names[key]].dtype, jnp.floating)
        ],
        "not the fixed value of this model": [
            names[key]
            for key, value in fixed.items()
            if shapes.get(key) == value.shape and not _close(state[names[key]], value)
        ],
    }
    text = "; ".join(f"{len(k)} {what}: {listed(sorted(k))}" for what, k in problems.items() if k)
    if text:
        raise UserError(f"this is no state dict of such a model of family '{family.name}': {text}")
    return names


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, but a 1 x 1 convolution as a linear layer, because files may have either."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _close(tensor: np.ndarray, value: np.ndarray) -> bool:
    """Whether a file's constant, in any precision, equals that of our model.

    The tolerance is wide, because an EMA averages a constant 10^5 times and its last bits drift.
    """
    rounding = jnp.finfo(tensor.dtype).eps if jnp.issubdtype(tensor.dtype, jnp.floating) else 0
    return np.allclose(np.asarray(tensor, np.float32), value, rtol=0, atol=1e-3 + rounding)
