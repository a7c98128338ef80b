"""State dicts whose tensors are read only when they are asked for.

A state dict is any mapping of names to arrays. A lazy one also knows shapes and dtypes without
reading any tensor. So errors are found before anything is read, and afterwards at most one tensor
is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_diffusion.errors import UserError

State = Mapping[str, Any]
LISTED = 10  # names of each kind that an error shows


class Spec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


Parts = list[tuple[tuple[slice, ...], np.ndarray]]


class Pieces(NamedTuple):
    """An array that exists only piece by piece.

    Attributes:
      read: yields (index, parts) for every piece. The piece is array[index], and each of its parts
        is a pair (slices, part) with array[index][slices] = part. All indices have the same length,
        and every element is in one piece. A piece is read when its turn comes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], Iterator[tuple[tuple[int, ...], Parts]]]


class Lazy(Mapping):
    """A state dict whose tensors are read when they are asked for.

    Attributes:
      specs: tensor name -> Spec; reads nothing.
    """

    def __init__(self, specs: Mapping[str, Spec], read: Callable[[str], np.ndarray]):
        self.specs = dict(specs)
        self._read = read

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.specs:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def lazy(state: State) -> Lazy:
    """Any state dict, of numpy, JAX or PyTorch arrays, as a lazy one."""
    if isinstance(state, Lazy):
        return state
    if any(hasattr(tensor, "detach") for tensor in state.values()):
        return of_torch(state)
    specs = {key: Spec(np.shape(x), getattr(x, "dtype", np.float32)) for key, x in state.items()}
    return Lazy(specs, lambda key: np.asarray(state[key]))


def of_torch(state: State) -> Lazy:
    """PyTorch's tensors as numpy arrays that share their memory, also that of a mapped file."""
    specs = {}
    for key, tensor in state.items():
        name = str(tensor.dtype).removeprefix("torch.")
        # numpy cannot view the narrower floats; float32 holds all of their values.
        name = "float32" if name.startswith("float8") else name
        specs[key] = Spec(tuple(tensor.shape), jnp.dtype(name))

    def read(key: str) -> np.ndarray:
        tensor = state[key].detach()
        if specs[key].dtype == jnp.bfloat16:  # numpy knows it by an extension only
            import torch

            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        return (tensor.float() if specs[key].dtype == np.float32 else tensor).numpy()

    return Lazy(specs, read)


def adjusted(state: State, changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]) -> Lazy:
    """A state dict in which some tensors are changed when they are read, for example by a LoRA.

    Args:
      changes: tensor name -> function of that tensor. The result has the tensor's shape and is
        cast to its dtype; the tensor itself must not be written to.

    Raises:
      UserError: a name is not in `state`, or (when it is read) a result has another shape.
    """
    state = lazy(state)
    unknown = sorted(set(changes) - set(state))
    if unknown:
        raise UserError(f"{len(unknown)} tensors to change are not there: {listed(unknown)}")

    def read(key: str) -> np.ndarray:
        if key not in changes:
            return state[key]
        shape, dtype = state.specs[key]
        changed = np.asarray(changes[key](state[key]))
        if changed.shape != shape:
            raise UserError(f"{key} is {shape}, but what was made of it is {changed.shape}")
        return changed.astype(dtype, copy=False)

    return Lazy(state.specs, read)


def joined(states: Mapping[str, State]) -> Lazy:
    """Several state dicts as one: prefix -> state dict, like {"transformer/": ..., "vae/": ...}.

    Raises:
      UserError: two tensors have the same name.
    """
    places = {}
    for prefix, state in states.items():
        for key in (state := lazy(state)):
            if prefix + key in places:
                raise UserError(f"two files hold a tensor {prefix + key}: leave one of them out")
            places[prefix + key] = state, key
    specs = {name: state.specs[key] for name, (state, key) in places.items()}
    return Lazy(specs, lambda name: places[name][0][places[name][1]])


def without(state: State, prefixes: tuple[str, ...]) -> Lazy:
    """A state dict without the tensors whose names begin with one of the prefixes."""
    state = lazy(state)
    specs = {key: spec for key, spec in state.specs.items() if not key.startswith(prefixes)}
    return Lazy(specs, state.__getitem__)


def listed(keys: Sequence[str]) -> str:
    """The first ten keys, and how many there are besides."""
    more = f", ... ({len(keys) - LISTED} more)" if len(keys) > LISTED else ""
    return ", ".join(keys[:LISTED]) + more
