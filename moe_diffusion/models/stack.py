"""What all models share: the questions that others ask of a model, and its stack of layers.

A model maps noisy samples x [B, H, W, C], times t f32[B] and a condition to a prediction. The
condition `cond` is a dict of arrays [B, ...] whose fields the model names in `cond_spec`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_diffusion.conditions import Field
from moe_diffusion.moe.router import Router
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import platform

_MOST_UNROLLED = {"cpu": 6, "cuda": 28, "gpu": 28}  # periods, by platform
COLLECTIONS = ("params", "router_state", "losses", "metrics", "router_stats", "intermediates")
# What `cheap` keeps besides products: kernels, loops and orders, moved rows, attention's result.
_EXPENSIVE = frozenset(
    ("pallas_call", "while", "scan", "cond", "sort", "top_k", "cumsum", "gather", "all_to_all")
    + ("ragged_all_to_all", "reduce_scatter", "name")
)


def _is_expensive(primitive, *_, **params) -> bool:
    """Not elementwise, and no product of attention, which has two batch dimensions."""
    if primitive.name == "dot_general":
        _, (batch_dimensions, _) = params["dimension_numbers"]
        return len(batch_dimensions) < 2
    return primitive.name in _EXPENSIVE


REMAT = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "cheap": _is_expensive,
}

Segments = tuple[tuple[tuple[Hashable, ...], int], ...]


class Block(NamedTuple):
    """One layer of a model.

    Attributes:
      path: of its parameters, like "layers_0/block_1"; repeated layers share one.
      index: its place on the leading axis of those parameters.
      kind: as the model's stack names it.
    """

    path: str
    index: int
    kind: Hashable


@dataclass(frozen=True)
class Stack:
    """Layers of several kinds, one after the other: carry -> carry.

    A layer is a module that is called as layer(carry, *broadcast) and returns the next carry, any
    pytree. Equal periods of layers (say one dense, one MoE) are scanned: a period is traced and
    compiled once, and its parameters are stacked along a leading axis `layers`.

    Attributes:
      kinds: the kind of every layer, like ("dense", "moe") * 6.
      make: kind -> factory, which is called with a name and returns a module.
      remat: what the backward pass computes again: `none`; `cheap`, elementwise operations,
        attention weights and gathered weights; `dots`, all but products with dense weights;
        `full`, everything.
      unroll: periods in one step of the scan; 0 takes `periods_at_once`.
    """

    kinds: tuple[Hashable, ...]
    make: Callable[[Hashable], Callable[..., nn.Module]]
    remat: str = "none"
    unroll: int = 0

    @property
    def segments(self) -> Segments:
        """What is scanned: (period, repeats) after (period, repeats), see `layer_segments`."""
        return layer_segments(self.kinds)

    def blocks(self) -> tuple[Block, ...]:
        """Every layer in order."""
        return tuple(
            Block(f"layers_{segment}/block_{place}", repeat, kind)
            for segment, (period, repeats) in enumerate(self.segments)
            for repeat in range(repeats)
            for place, kind in enumerate(period)
        )

    def __call__(
        self,
        carry: Any,
        *broadcast: Any,
        capture: tuple[int, ...] = (),
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Any, dict[int, Any]]:
        """Applies layers start..stop-1, inside the compact method of a module, whose they are.

        Args:
          carry: what every layer takes and returns.
          broadcast: arrays that every layer sees.
          capture: numbers of layers whose carry is returned as well.
          start, stop: where segments begin; by default all layers.

        Returns:
          The last carry, and number of a layer -> the carry after it.
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
            # A loop keeps what is computed again apart by itself, straight code does not.
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
    """The layers of one scan step; returns the carries after those at `captured` too."""

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
    """Cuts kinds of layers into (period, repeats), to be scanned one after the other.

    From the left, the period that covers most layers is taken, of several the shortest:
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


def periods_at_once(repeats: int, remat: str, platform: str) -> int:
    """How many periods a step of the scan holds by default.

    XLA copies every layer's saved values into and out of stacked arrays, on CPU the weights too: an
    eighth of a step of DSMoE-S there, and on a GPU a quarter of the bytes that a step of DSMoE-L or
    DiT-XL moves. Hence all periods, as long as that makes the program at most six times as long,
    or 28 on GPUs, where minutes of compiling matter less. Not if anything is to be computed again:
    outside of a loop XLA:CPU keeps it instead. Not on TPU, whose stacked arrays need no filling.
    """
    most = _MOST_UNROLLED.get(platform, 1)
    return repeats if remat == "none" and repeats <= most else 1


_QUESTIONS = frozenset(("cond_spec", "null", "blocks", "is_stacked", "kind_of", "routers"))


class Model(nn.Module, kw_only=True):
    """The base class of models. A model is apply(variables, x, t, cond, train, capture=()).

    x [B, H, W, C], t f32[B] (0 noise, 1 data) and cond {field: [B, ...]} become f32[B, H, W, C or
    2C]; with `capture`, numbers of layers, also {number: features after that layer}. A model has,
    besides what is here:

      input_shape: (H, W, C) of the samples that it is trained on.
      cond_spec() -> {field: Field}, the fields of one sample's condition.
      null(cond) -> the cond that stands for "no condition".

    dtype: to compute in; the kernels are chosen for it.
    param_dtype: of the parameters, whatever `dtype` is.
    preset: how its weights lie on the mesh (parallel/rules.py); None takes that of the run.
    """

    # Paths of parameters and what they are: names directly below the model, and names inside of a
    # layer, of which the innermost counts.
    parts = {}
    layer_parts = {}
    stack = None  # a `Stack`, of a model that has one

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    preset: str | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Keeps linen from wrapping what answers questions: plain methods, not parts of a call."""
        for name in _QUESTIONS & cls.__dict__.keys():
            nn.nowrap(getattr(cls, name))
        super().__init_subclass__(**options)

    @nn.nowrap
    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """linen's `apply`, with the layout of the weights that `preset` says."""
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
        """Every layer of the stack in order."""
        return () if self.stack is None else self.stack.blocks()

    @nn.nowrap
    def is_stacked(self, path: str) -> bool:
        """Whether the leaf at a path, like "layers_0/block_1/adaLN/kernel", has a layer axis."""
        return any(path.startswith(f"{block.path}/") for block in self.blocks())

    @nn.nowrap
    def kind_of(self, path: str) -> str:
        """What kind of weight the leaf at a path is, like "attention"; "other" if unknown."""
        names = path.split("/")
        if names[0] in self.parts:
            return self.parts[names[0]]
        return next((self.layer_parts[n] for n in names[::-1] if n in self.layer_parts), "other")

    @nn.nowrap
    def routers(self) -> dict[str, Router]:
        """Path of every router, like "layers_0/block_1/moe/router" -> an unbound copy of it."""
        return {}


def next_router_state(
    routers: Mapping[str, Router], state: Mapping[str, Any], stats: Mapping[str, Any]
) -> dict[str, Any]:
    """router_state after an optimizer step that saw `stats`, by the rule of each path's router.

    Args:
      routers: of `Model.routers`.
      state, stats: nested by the parts of those paths; a router that saw nothing keeps its state.
    """

    def update(path: str, state: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
        if path in routers:
            return routers[path].next_state(state, stats)
        prefix = f"{path}/" if path else ""
        return {k: update(f"{prefix}{k}", state[k], stats.get(k, {})) for k in state}

    return update("", state, stats)


def abstract_inputs(
    model: Model, *lead: int
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of x, t and cond of a batch with leading axes `lead`, like (B,) or (A, B / A)."""

    def make(field: Field) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *field.shape), jnp.dtype(field.dtype))

    cond = {name: make(field) for name, field in model.cond_spec().items()}
    return make(Field(tuple(model.input_shape), "float32")), make(Field((), "float32")), cond


def abstract_variables(model: Model) -> dict[str, Any]:
    """Shapes of params and router_state (if there is one), as trees of ShapeDtypeStruct."""
    init = lambda key, *inputs: model.init(key, *inputs, False)  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0), *abstract_inputs(model, 1))
    variables = nn.meta.unbox(shapes)
    return {name: tree for name, tree in variables.items() if name in ("params", "router_state")}
