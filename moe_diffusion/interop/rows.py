"""The parts of a key map: which PyTorch tensor is which of our leaves, and in which layout.

Every layout is a transpose or a reshape, so a tensor that is imported and exported again has the
same bits. `keymap` reads the rows in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict


class Layout(NamedTuple):
    """How a tensor is turned into our array and back.

    Attributes:
      to_torch: (our array, model) -> PyTorch's array.
      to_ours: (PyTorch's array, our shape) -> our array.
    """

    to_torch: Callable[[Any, nn.Module], Any]
    to_ours: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _patches_to_torch(w, model):
    p = model.patch_size
    return w.reshape(p, p, -1, w.shape[-1]).transpose(3, 2, 0, 1)


SAME = Layout(lambda w, m: w, lambda w, s: w)
FLAT = Layout(lambda w, m: w.reshape(-1), lambda w, s: w.reshape(s))
LEADING_1 = Layout(lambda w, m: w[None], lambda w, s: w[0])
# Linear weights are [out, in] in PyTorch and [in, out] here.
LINEAR = Layout(lambda w, m: w.T, lambda w, s: w.T)
# Linear weights of which our kernel splits one axis: the last into (3,) heads and head_dim, or the
# first into heads and head_dim.
HEADS_OUT = Layout(lambda w, m: w.reshape(w.shape[0], -1).T, lambda w, s: w.T.reshape(s))
HEADS_IN = Layout(lambda w, m: w.reshape(-1, w.shape[-1]).T, lambda w, s: w.T.reshape(s))
# A convolution: [out, in, rows, columns] in PyTorch, here [rows, columns, in, out].
CONV = Layout(lambda w, m: w.transpose(3, 2, 0, 1), lambda w, s: w.transpose(2, 3, 1, 0))
# A layer that is linear here and a 1 x 1 convolution in PyTorch.
CONV_1X1 = Layout(lambda w, m: w.T[..., None, None], lambda w, s: w[..., 0, 0].T)
# Patch embedding: a stride-p convolution [D, C, p_row, p_col], here [p_row * p_col * C, D].
PATCHES = Layout(_patches_to_torch, lambda w, s: w.transpose(2, 3, 1, 0).reshape(s))


class Slice(NamedTuple):
    """A part of one of our leaves: `size` entries of an axis, from `start` on.

    Attributes:
      axis: counted without the axes of layers and experts.
      start, size: numbers, or functions of the model.
    """

    axis: int
    start: int | Callable[[nn.Module], int]
    size: int | Callable[[nn.Module], int]

    def of(self, model: nn.Module) -> tuple[slice, ...]:
        start, size = (v(model) if callable(v) else v for v in (self.start, self.size))
        return (*(slice(None),) * self.axis, slice(start, start + size))


class Row(NamedTuple):
    """One line of a key map.

    Attributes:
      torch: PyTorch's key; {i} runs over the blocks, {e} over the experts, and {g}, in the place of
        {i}, over the groups of blocks.
      ours: path of our leaf, collection first; {block} is `layers_<segment>/block_<j>`, with
        `/members` below it for the blocks of a group.
      layout: see `Layout`.
      needs, unless: path of a leaf that must or must not exist for the row to hold.
      part: which part of our leaf the row is about; None is all of it.
      along: axis of PyTorch's tensor along which it joins several of our leaves. All rows of that
        key have the same `along`, and their parts lie on it in the order of the table.
      kind: {i} counts only the blocks of this kind or these kinds, {g} only their groups; None
        counts all.
    """

    torch: str
    ours: str
    layout: Layout
    needs: str | None = None
    unless: str | None = None
    part: Slice | None = None
    along: int | None = None
    kind: str | tuple[str, ...] | None = None


class Constant(NamedTuple):
    """An entry of a state dict that is no variable of ours.

    Attributes:
      torch: PyTorch's key; with {i} there is one in every block of the kind `kind`.
      value: model -> the float32 array to write, or None if this model's file has none.
    """

    torch: str
    value: Callable[[nn.Module], np.ndarray | None]
    kind: str = "moe"


# Part of the path of a leaf -> what a model has with it, which few layouts know.
_PARTS = {"/moe/": "experts", "_moe/": "experts", "adaLN/down/": "compressed adaLN"}
_PARTS |= {"adaLN_down/": "shared compression of adaLN", "/block_router/": "groups of blocks"}


class Family(NamedTuple):
    """The names that one PyTorch code base gives to its tensors and its hyperparameters.

    Attributes:
      configure: (the authors' hyperparameters, a default config) -> None, sets the config. None if
        networks of this family are not built from a config.
      from_args: arguments of the authors' training script, which their checkpoints may hold under
        "args" -> hyperparameters, or None if these arguments do not tell them.
      from_shapes: key -> shape of a state dict -> those hyperparameters that it tells.
      asked: names of hyperparameters that have no default ("MoE_config.top_k" in a section). If
        there is only a state dict, its shapes must show them.
      subfolder: the one that holds the weights, if they are published as a folder of several
        networks.
      hparams: the section `model` of a config -> the hyperparameters that `configure` makes it of.
        An export then writes them into its file. None if the authors keep them elsewhere.
    """

    name: str
    rows: tuple[Row, ...]
    constants: tuple[Constant, ...] = ()
    configure: Callable[[Mapping[str, Any], ConfigDict], None] | None = None
    from_args: Callable[[Mapping[str, Any]], dict[str, Any] | None] = lambda args: None
    from_shapes: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any]] = lambda shapes: {}
    asked: tuple[str, ...] = ()
    subfolder: str = ""
    hparams: Callable[[ConfigDict], dict[str, Any]] | None = None

    def lacks(self, paths: Sequence[str]) -> list[str]:
        """What models with leaves at these paths have, like "experts", and no row is about."""
        found = {
            what: None
            for part, what in _PARTS.items()
            if any(part in path for path in paths) and not any(part in r.ours for r in self.rows)
        }
        return list(found)
