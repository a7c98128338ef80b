"""What an evaluation of a network tells: its routing, the blocks it passes, and what these change.

Routers and blocks are heard while the model is applied; no model knows of it. Shapes: B samples, T
tokens of one, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict

from moe_diffusion.models.stack import MEMBERS, Model
from moe_diffusion.moe.router import Router
from moe_diffusion.moe.routing import Routing, taken

COUNTS, DROPPED, STRONGEST, USED = "expert_counts", "dropped", "strongest_expert", "experts_used"
TOKENS, CHANGE, CHOSEN = "token_experts", "block_mse", "blocks"
_LAYER = re.compile(r"block_\d+")  # a layer of a `Stack`
_TEXT = " text"  # ends the name of a layer that sees no token of the image


class ExpertLayer(NamedTuple):
    """A layer of experts whose router can be heard.

    Attributes:
      name: the number of its block, from 0; with the stream if the block has several, "3 image".
      router: path of its router.
      repeat: its place on the layer axis there.
    """

    name: int | str
    router: str
    repeat: int

    @property
    def sees_image(self) -> bool:
        """Whether tokens of the image pass it; they are the last of a sample."""
        return not str(self.name).endswith(_TEXT)


class Layer(NamedTuple):
    """A layer of a model's stack: a block, or a group of which a sample passes some blocks.

    Attributes:
      name: the number of its block, or the range of a group's blocks, "4-6".
      path: of its module.
      repeat: its place on the layer axis there.
      blocks: the numbers of its blocks.
    """

    name: int | str
    path: str
    repeat: int
    blocks: tuple[int, ...]

    @property
    def is_group(self) -> bool:
        return len(self.blocks) > 1


def layers(model: Model) -> tuple[Layer, ...]:
    """The layers of a model's stack in order."""
    found: dict[int, Layer] = {}
    for number, block in enumerate(model.blocks()):
        path = block.path.removesuffix(f"/{MEMBERS}")
        first = found.get(block.layer, Layer(number, path, block.index[0], ()))
        blocks = (*first.blocks, number)
        name = number if len(blocks) == 1 else f"{blocks[0]}-{number}"
        found[block.layer] = first._replace(name=name, blocks=blocks)
    return tuple(found.values())


def expert_layers(model: Model) -> tuple[ExpertLayer, ...]:
    """The layers of experts outside of groups, in order; none if no token meets an expert.

    A group applies its blocks sample by sample, where their routers cannot be heard.
    """
    routers = model.routers()
    working = [name for name, router in routers.items() if router.experts_per_token]
    found = []
    for number, block in enumerate(model.blocks()):
        own = [name for name in working if name.startswith(f"{block.path}/")]
        for router in own if not block.path.endswith(f"/{MEMBERS}") else ():
            module = router.removeprefix(f"{block.path}/").rpartition("/")[0]
            name = f"{number} {module.removesuffix('_moe')}" if len(own) > 1 else number
            found.append(ExpertLayer(name, router, block.index[0]))
    return tuple(found)


def unheard(model: Model) -> list[int]:
    """Numbers of the blocks whose experts are left out because they stand in a group."""
    return [
        number
        for number, block in enumerate(model.blocks())
        if block.path.endswith(f"/{MEMBERS}")
        and any(name.startswith(f"{block.path}/") for name in model.routers())
    ]


def observe(
    model: Model,
    variables: Any,
    x: jax.Array,
    t: jax.Array,
    cond: Mapping[str, jax.Array],
    train: bool,
    maps: bool = False,
    by_token: Collection[int | str] = (),
) -> tuple[jax.Array, dict[str, Any]]:
    """Applies a model and records what happens inside.

    Args:
      by_token: names of expert layers of which `token_experts` is recorded.

    Returns:
      The model's output, and by name, first by layer as `expert_layers` and `layers` list them:
        expert_counts f32[expert layers, B, E]: see `expert_counts`.
        dropped f32[expert layers]: the share of assignments that was dropped.
        strongest_expert, experts_used i32[those that see the image, B, rows, columns], only with
          `maps`: see `token_maps`.
        token_experts: a tuple of bool[B, T, E] for the layers of `by_token`: who uses what.
        block_mse f32[layers, B]: see `mean_square_change`.
        blocks: a tuple of f32[B, m] for the groups, 1 where a sample passes a block.
    """
    batch = x.shape[0]

    def record(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        result, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or not module.is_mutable_collection("intermediates"):
            return result  # the blocks of a group report nothing
        values = {}
        if isinstance(module, Router):
            values = _of_router(module, args[0].shape[1], *result, batch, bool(by_token))
            if maps and args[0].size // args[0].shape[-1] >= batch * _positions(model):
                shape = batch, *model.grid
                seen = token_maps(result[0], args[0].shape[1], module.num_experts, shape)
                values |= dict(zip((STRONGEST, USED), seen, strict=True))
        elif _LAYER.fullmatch(module.name or ""):
            values = {CHANGE: mean_square_change(args[0], result)}
        for name, value in values.items():
            module.sow("intermediates", name, value)
        return result

    with nn.intercept_methods(record):
        output, sown = model.apply(variables, x, t, cond, train, mutable=["intermediates"])
    flat = flatten_dict(sown["intermediates"], sep="/")
    experts, blocks = expert_layers(model), layers(model)

    def of(name: str, layer: ExpertLayer | Layer) -> jax.Array:
        path = layer.router if isinstance(layer, ExpertLayer) else layer.path
        return flat[f"{path}/{name}"][0][layer.repeat]

    seen = {
        name: jnp.stack([of(name, e) for e in experts]) for name in (COUNTS, DROPPED) if experts
    }
    if maps and experts:
        pictured = [e for e in experts if e.sees_image]
        seen |= {name: jnp.stack([of(name, e) for e in pictured]) for name in (STRONGEST, USED)}
    seen[TOKENS] = tuple(of(TOKENS, e) for e in experts if e.name in by_token)
    if blocks:
        seen[CHANGE] = jnp.stack([of(CHANGE, layer) for layer in blocks])
    groups = [layer for layer in blocks if layer.is_group]
    seen[CHOSEN] = tuple(
        jax.nn.one_hot(of(CHOSEN, group), len(group.blocks)).sum(1) for group in groups
    )
    return output, seen


def _of_router(
    router: Router, tokens: int, routing: Routing, aux: Any, batch: int, by_token: bool
) -> dict[str, jax.Array]:
    users = taken(routing, tokens, router.num_experts).reshape(batch, -1, router.num_experts)
    found = {COUNTS: expert_counts(routing, tokens, router.num_experts, batch)}
    found[DROPPED] = aux.metrics.get(DROPPED, jnp.zeros(()))
    return found | ({TOKENS: users > 0} if by_token else {})


def _positions(model: Model) -> int:
    """Tokens of an image."""
    rows, columns = model.grid
    return rows * columns


def mean_square_change(before: Any, after: Any) -> jax.Array:
    """f32[B]: mean squared difference of a block's input and output, over all tokens and channels.

    Dense2MoE (2510.09094), Figure 3. A double block has two streams, image and text, whose values
    count alike.

    Args:
      before, after: a tree of [B, tokens, channels].
    """
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    total = sum(
        jnp.square(b.astype(jnp.float32) - a.astype(jnp.float32)).sum(tuple(range(1, a.ndim)))
        for a, b in pairs
    )
    return total / sum(a[0].size for a, _ in pairs)


def expert_counts(routing: Routing, tokens: int, num_experts: int, batch: int) -> jax.Array:
    """f32[B, E]: of the tokens of each sample, the share that uses each expert.

    Args:
      routing: of the `batch` samples, one sample after the other.
      tokens: T, of a group.
    """
    users = taken(routing, tokens, num_experts).reshape(batch, -1, num_experts)
    return users.mean(1)


def token_maps(
    routing: Routing, tokens: int, num_experts: int, shape: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
    """The experts that the tokens of an image use, where they lie in it.

    Args:
      routing, tokens: see `expert_counts`.
      shape: (B, rows, columns). The last rows * columns tokens of a sample are those of the image.

    Returns:
      i32[B, rows, columns] of the expert with the largest weight, -1 without any, and of the number
      of experts.
    """
    batch, rows, columns = shape
    groups = jnp.arange(len(routing.token))[:, None]
    weight = jnp.full((len(routing.token), tokens, num_experts), -jnp.inf)
    weight = weight.at[groups, routing.token, routing.expert].max(routing.weight, mode="drop")
    weight = weight.reshape(batch, -1, num_experts)[:, -rows * columns :]
    used = (weight > -jnp.inf).sum(-1)
    strongest = jnp.where(used > 0, weight.argmax(-1), -1)
    return strongest.reshape(shape), used.reshape(shape)
