"""What all models share: a base class that answers questions about a model, and stacks of layers.

A model maps noisy samples x [B, H, W, C], times t f32[B] and a condition to a prediction. The
condition `cond` is a dict of arrays [B, ...] whose fields the model names in `cond_spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_diffusion.conditions import Field
from moe_diffusion.models.recompute import REMAT, periods_at_once
from moe_diffusion.moe.router import Router
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import platform

COLLECTIONS = ("params", "router_state", "losses", "metrics", "router_stats", "intermediates")
MEMBERS = "members"  # where the blocks of a `Group` lie, stacked
Shape = jax.ShapeDtypeStruct
Segments = tuple[tuple[tuple[Hashable, ...], int], ...]


class Group(NamedTuple):
    """The kind of a layer that has `size` blocks of one kind, of which a sample passes `active`."""

    kind: Hashable
    size: int
    active: int


class Block(NamedTuple):
    """One block of a model: a layer of its `Stack`, or a member of a layer that is a `Group`.

    Attributes:
      path: of its parameters, like "layers_0/block_1"; blocks that are stacked together share it.
      index: its place on the leading axes of those parameters: the layer, and its place in a group.
      kind: its kind in the model's `Stack`.
      share: of the samples that pass it, on average.
      layer: its number among the layers of the stack.
    """

    path: str
    index: tuple[int, ...]
    kind: Hashable
    share: float
    layer: int


@dataclass(frozen=True)
class Stack:
    """Layers of several kinds, one after the other: carry -> carry.

    A layer is a module that is called as layer(carry, *broadcast) and returns the next carry, any
    pytree. Equal periods of layers (say one dense, one MoE) are scanned: a period is traced and
    compiled once, and its parameters are stacked along a leading axis `layers`.

    Attributes:
      kinds: the kind of every layer, like ("dense", "moe") * 6.
      make: kind -> factory, which is called with a name and returns a module.
      remat: what the backward pass computes again. `none`: nothing. `cheap`: elementwise
        operations, attention weights and gathered weights. `dots`: everything but products with
        dense weights. `full`: everything.
      unroll: periods in one step of the scan; 0 takes `periods_at_once`.
    """

    kinds: tuple[Hashable, ...]
    make: Callable[[Hashable], Callable[..., nn.Module]]
    remat: str = "none"
    unroll: int = 0

    @property
    def segments(self) -> Segments:
        """The scans, one after the other, each as (period, repeats); see `layer_segments`."""
        return layer_segments(self.kinds)

    def blocks(self) -> tuple[Block, ...]:
        """Every block in order."""
        places = (
            (f"layers_{segment}/block_{place}", repeat, kind)
            for segment, (period, repeats) in enumerate(self.segments)
            for repeat in range(repeats)
            for place, kind in enumerate(period)
        )
        blocks: list[Block] = []
        for layer, (path, repeat, kind) in enumerate(places):
            if isinstance(kind, Group):
                member = partial(Block, f"{path}/{MEMBERS}")
                share = kind.active / kind.size
                indices = [(repeat, i) for i in range(kind.size)]
                blocks += [member(index, kind.kind, share, layer) for index in indices]
            else:
                blocks.append(Block(path, (repeat,), kind, 1.0, layer))
        return tuple(blocks)

    def number_of(self, block: int) -> int:
        """Number of the layer with a block, which may also be the one after the last."""
        blocks = self.blocks()
        return blocks[block].layer if block < len(blocks) else len(self.kinds)

    def __call__(
        self,
        carry: Any,
        *broadcast: Any,
        capture: tuple[int, ...] = (),
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Any, dict[int, Any]]:
        """Applies layers start..stop-1. A module calls this in its compact method and owns them.

        Args:
          carry: what every layer takes and returns.
          broadcast: arrays that every layer sees.
          capture: numbers of layers whose carry is returned as well.
          start, stop: numbers of layers at which segments begin; by default all layers are applied.

        Returns:
          The last carry, and {number of a captured layer: the carry after it}.
        """
        captured, first = {}, 0
        stop = len(self.kinds) if stop is None else stop
        for index, (period, repeats) in enumerate(self.segments):
            numbers = range(first, first + len(period) * repeats)
            first = numbers.stop
            if not start <= numbers.start < stop:
                continue
            wanted = {n: divmod(n - numbers.start, len(period)) for n in capture if n in numbers}
            places = tuple(sorted({place for _, place in wanted.values()}))
            scanned = self._scan(repeats, len(broadcast))
            layers = scanned(period, self.make, places, name=f"layers_{index}")
            carry, carries = layers(carry, *broadcast)
            for number, (repeat, place) in wanted.items():
                captured[number] = jax.tree.map(lambda x, r=repeat: x[r], carries[place])
        return carry, captured

    def _scan(self, repeats: int, num_broadcast: int) -> Callable[..., nn.Module]:
        unroll = min(repeats, self.unroll or periods_at_once(repeats, self.remat, platform()))
        body = _Period
        if self.remat != "none":
            # XLA must not merge the values that are computed again with the first ones. A loop
            # prevents this by itself, unrolled code needs prevent_cse.
            body = nn.remat(_Period, policy=REMAT[self.remat], prevent_cse=unroll > 1)
        return nn.scan(
            body,
            variable_axes={name: 0 for name in COLLECTIONS},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * num_broadcast,
            length=repeats,
            unroll=unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )


class _Period(nn.Module):
    """The layers of one period; it also returns the carries after the places in `captured`."""

    kinds: tuple[Hashable, ...]
    make: Callable[[Hashable], Callable[..., nn.Module]]
    captured: tuple[int, ...]

    @nn.compact
    def __call__(self, carry, *broadcast):
        carries = {}
        for place, kind in enumerate(self.kinds):
            carry = self.make(kind)(name=f"block_{place}")(carry, *broadcast)
            if place in self.captured:
                carries[place] = carry
        return carry, carries


def layer_segments(kinds: tuple[Hashable, ...]) -> Segments:
    """Cuts the kinds of layers into segments (period, repeats), which are scanned one by one.

    From the left, each segment takes the period whose repeats cover most layers; of several such
    periods it takes the shortest:
    (d, m, d, m) -> (((d, m), 2),)          (d, d, m, m) -> (((d,), 2), ((m,), 2))
    """
    segments = []
    start = 0
    while start < len(kinds):
        best = (kinds[start : start + 1], 1)
        for size in range(1, (len(kinds) - start) // 2 + 1):
            period = kinds[start : start + size]
            repeats = 1
            while kinds[start + repeats * size :][:size] == period:
                repeats += 1
            if repeats > 1 and repeats * size > len(best[0]) * best[1]:
                best = (period, repeats)
        segments.append(best)
        start += len(best[0]) * best[1]
    return tuple(segments)


_QUESTIONS = frozenset(("cond_spec", "null", "blocks", "is_stacked", "kind_of", "routers"))


class Network(nn.Module, kw_only=True):
    """The base class of models and text encoders: dtypes, layout on the mesh, questions by path.

    Attributes:
      dtype: of computations; the kernels are chosen for it.
      param_dtype: of the parameters, whatever `dtype` is.
      preset: how the weights lie on the mesh (parallel/rules.py); None takes the run's preset.
    """

    # Name in the path of a parameter -> its kind. `parts` has names directly below the model,
    # `layer_parts` names inside a layer, of which the innermost counts.
    parts = {}
    layer_parts = {}
    stack = None  # the network's `Stack`, if it has one

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    preset: str | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Keeps linen from wrapping `_QUESTIONS`: plain methods that are not part of a call."""
        for name in _QUESTIONS & cls.__dict__.keys():
            nn.nowrap(getattr(cls, name))
        super().__init_subclass__(**options)

    @nn.nowrap
    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """linen's `apply`, with the weights laid out as `preset` says."""
        with rules.use_preset(self.preset):
            return super().apply(*args, **kwargs)

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Initial variables as linen's `init` makes them, with params in `param_dtype`."""
        with rules.use_preset(self.preset):
            variables = super().init(*args, **kwargs)
        params = jax.tree.map(lambda x: x.astype(self.param_dtype), variables["params"])
        return {**variables, "params": params}

    @nn.nowrap
    def blocks(self) -> tuple[Block, ...]:
        """Every block of the stack in order."""
        return () if self.stack is None else self.stack.blocks()

    @nn.nowrap
    def is_stacked(self, path: str) -> int:
        """How many leading axes of layers the leaf at a path has, like "layers_0/block_1/bias".

        One if it is stacked, and one more in a group of blocks.
        """
        return path.startswith("layers_") + (f"/{MEMBERS}/" in path)

    @nn.nowrap
    def kind_of(self, path: str) -> str:
        """What kind of weight the leaf at a path is, like "attention"; "other" if unknown."""
        names = path.split("/")
        if names[0] in self.parts:
            return self.parts[names[0]]
        return next((self.layer_parts[n] for n in names[::-1] if n in self.layer_parts), "other")


class Model(Network, kw_only=True):
    """The base class of models: apply(variables, x, t, cond, train, capture=()) -> prediction.

    x is [B, H, W, C], t is f32[B] (0 noise, 1 data) and cond is {field: [B, ...]}. The prediction
    is f32[B, H, W, C or 2C]. If `capture` has numbers of layers, the result is the prediction and
    {number: features after that layer}. Every model also defines:

      input_shape: (H, W, C) of the samples that it is trained on.
      cond_spec() -> {field: Field}, the fields of one sample's condition.
      null(cond) -> the cond that stands for "no condition".
    """

    @nn.nowrap
    def routers(self) -> dict[str, Router]:
        """Path of every router, like "layers_0/block_1/moe/router" -> an unbound copy of it."""
        return {}


def next_router_state(
    routers: Mapping[str, Router], state: Mapping[str, Any], stats: Mapping[str, Any]
) -> dict[str, Any]:
    """The router_state after an optimizer step: each router updates the state at its path.

    Args:
      routers: of `Model.routers`.
      state: nested by the parts of those paths.
      stats: what the routers saw in the step, nested likewise. A router that saw nothing keeps its
        state.
    """

    def update(path: str, state: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
        if path in routers:
            return routers[path].next_state(state, stats)
        prefix = f"{path}/" if path else ""
        return {k: update(f"{prefix}{k}", state[k], stats.get(k, {})) for k in state}

    return update("", state, stats)


def abstract_inputs(model: Model, *lead: int) -> tuple[Shape, Shape, dict[str, Shape]]:
    """Shapes of x, t and cond of a batch with leading axes `lead`, like (B,) or (A, B / A)."""

    def make(field: Field) -> Shape:
        return Shape((*lead, *field.shape), jnp.dtype(field.dtype))

    cond = {name: make(field) for name, field in model.cond_spec().items()}
    return make(Field(tuple(model.input_shape), "float32")), make(Field((), "float32")), cond


def init_variables(model: Model, key: jax.Array, batch: int = 1) -> dict[str, Any]:
    """New params and router_state (if there is one) with their metadata.

    batch: samples of the inputs, which only give shapes. On a mesh, one for every device.
    """
    inputs = abstract_inputs(model, batch)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
    variables = model.init(key, *zeros, False)
    return {name: variables[name] for name in ("params", "router_state") if name in variables}


def abstract_weights(model: Model, batch: int = 1) -> tuple[dict[str, Any], Any]:
    """Shapes of params and router_state, and the logical axes of params; nothing is allocated.

    The axes are a tree like params with a PartitionSpec of names (or None) for every parameter.
    batch: see `init_variables`.
    """
    init = partial(init_variables, model, batch=batch)
    variables = jax.eval_shape(init, jax.random.key(0))
    return nn.meta.unbox(variables), nn.get_partition_spec(variables["params"])


def abstract_variables(model: Model) -> dict[str, Any]:
    """Shapes of params and router_state (if there is one), as trees of ShapeDtypeStruct."""
    return abstract_weights(model)[0]
