"""Takes models apart into blocks and puts blocks together again.

The layers of two models are stacked in different ways: by kind, by runs of equal kinds, by groups.
Here a block is a dict of its own arrays, so that it can move from one model to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_diffusion.models.stack import MEMBERS, Block, Model, abstract_weights
from moe_diffusion.parallel.mesh import num_batch_shards

Tree = Any
Weights = dict[str, jax.Array]  # path inside a block, like "image_mlp/up/kernel" -> array


def split(model: Model, params: Tree) -> tuple[list[Weights], Weights]:
    """The weights of each block in order, and path -> array of what belongs to no block.

    What belongs to a group of blocks, its router, goes with its first block, under "../".
    """
    rest, blocks = flatten_dict(params, sep="/"), [{} for _ in model.blocks()]
    for place, owners in _places(model).items():
        for path in [path for path in rest if path.startswith(place)]:
            leaf = rest.pop(path)
            for index, number, above in owners:
                blocks[number][f"{above}{path.removeprefix(place)}"] = leaf[index]
    return blocks, rest


def join(model: Model, blocks: Sequence[Weights], rest: Weights) -> Tree:
    """The params of `model` made of its blocks' weights and of the rest; the inverse of `split`.

    Raises KeyError where the model needs an array that is not there.
    """
    shapes, _ = abstract_weights(model, num_batch_shards())
    wanted = flatten_dict(shapes["params"], sep="/")
    places, params = _places(model), {}
    for path, shape in wanted.items():
        place = next((place for place in places if path.startswith(place)), None)
        if place is None:
            params[path] = rest[path]
            continue
        name = path.removeprefix(place)
        parts = [blocks[number][f"{above}{name}"] for _, number, above in sorted(places[place])]
        params[path] = jnp.stack(parts).reshape(shape.shape)
    return unflatten_dict(params, sep="/")


def _places(model: Model) -> dict[str, list[tuple[tuple[int, ...], int, str]]]:
    """Beginning of a path -> (index, number of the block, what its names begin with) of each block.

    The members of a group stand before the group, whose paths begin likewise.
    """
    places: dict[str, list[tuple[tuple[int, ...], int, str]]] = {}
    for number, block in enumerate(model.blocks()):
        places.setdefault(f"{block.path}/", []).append((block.index, number, ""))
        group = block.path.removesuffix(MEMBERS)
        if group != block.path and block.index[-1] == 0:
            places.setdefault(group, []).append((block.index[:-1], number, "../"))
    return places


def standing_for(student: Model, taken: Sequence[int], teacher: Model) -> list[int]:
    """For each layer of the student, the last of the teacher's blocks that it stands for.

    A group stands for all of its blocks (2510.09094, section 3.2), and a layer also for the blocks
    that were left out behind it.

    Args:
      taken: for each block of the student, the number of the teacher's block that it was made of.
    """
    kinds = [stream(block) for block in teacher.blocks()]
    last: dict[int, int] = {}
    for number, block in enumerate(student.blocks()):
        here = taken[number]
        after = taken[number + 1] if number + 1 < len(taken) else len(kinds)
        # Features of another kind have another shape.
        last[block.layer] = max(i for i in range(here, after) if kinds[i] == kinds[here])
    return [last[layer] for layer in sorted(last)]


def stream(block: Block) -> str:
    """The kind of a block whatever stands in the place of its MLPs: double, single, or block."""
    kind = str(block.kind)
    return "block" if kind in ("dense", "moe") else kind.removesuffix("_moe")


def ranges(numbers: Sequence[int]) -> tuple[str, ...]:
    """(0, 1, 2, 5) -> ("0-2", "5"): numbers in ascending order as a config has them."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return tuple(f"{a}-{b}" if a < b else str(a) for a, b in found)


def numbers(texts: Sequence[str]) -> tuple[int, ...]:
    """The inverse of `ranges`."""
    found: list[int] = []
    for text in texts:
        first, _, last = str(text).partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)
