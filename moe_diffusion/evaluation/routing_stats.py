"""Measures how a model routes while it draws images: which experts its tokens use, and how many.

C_infer is the average number of experts that a token uses. For routers with a fixed budget it is
top_k or `capacity`. DiffMoE's predictor decides it token by token (2503.14487, section 3, Fig. 1).
The selection frequency of an expert is the share of tokens that use it. Over the experts of a layer
the frequencies sum to C_infer.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from PIL import Image

from moe_diffusion.diffusion.samplers import Sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.expert_tables import by_class, rounded, tables
from moe_diffusion.figures.images import save_ornament
from moe_diffusion.figures.routing import capacity_picture, experts_picture
from moe_diffusion.models.stack import Model
from moe_diffusion.moe.router import Router
from moe_diffusion.moe.routing import Routing, taken
from moe_diffusion.sampling.labels import LABEL
from moe_diffusion.writing import save_text

_COUNTS, _DROPPED, _STRONGEST, _USED = (
    "expert_counts",
    "dropped",
    "strongest_expert",
    "experts_used",
)
_MAP_TIMES = 3


class RoutingObserver:
    """Wraps a model and remembers how its routers decide; pass it to `make_sampler` as the model.

    It adds up the evaluations of the network, conditional and unconditional ones apart. `watch`
    keeps the repetitions that fill up a last batch out of the sums. `stats` returns the averages,
    `reset` clears them.

    Args:
      maps: of so many images it also remembers what every token did, if the model has a `grid`, its
        (rows, columns) of patches. The tokens of the image must be the last of a sample.

    Raises:
      UserError: the model has no experts, or its layers have different numbers of experts.
    """

    def __init__(self, model: Model, maps: int = 0):
        self.blocks = moe_blocks(model)
        if not self.blocks:
            raise UserError("a dense model has no routing statistics: use a model with experts")
        numbers = {router.num_experts for router in model.routers().values()}
        if len(numbers) > 1:
            raise UserError(
                f"the model's layers have {sorted(numbers)} experts: routing statistics need a "
                "model with the same number of experts in all layers"
            )
        (self.num_experts,) = numbers
        self._maps = maps if hasattr(model, "grid") else 0
        self._model, self._images = model, np.inf
        label = model.cond_spec().get(LABEL)
        self._classes = label.num_values if label else None
        self.reset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def reset(self) -> None:
        """Forgets what was seen."""
        jax.effects_barrier()  # evaluations that have begun are forgotten, too
        shape = len(self.blocks), self.num_experts
        # Sums over samples of the share of tokens that use an expert; "no condition" comes last.
        self._by_class = np.zeros(((self._classes or 1) + 1, *shape))
        self._samples_of_class = np.zeros(len(self._by_class))
        self._by_time: dict[float, np.ndarray] = defaultdict(lambda: np.zeros((2, *shape)))
        self._samples_of_time: dict[float, np.ndarray] = defaultdict(lambda: np.zeros(2))
        self._dropped: list[float] = []
        self._tokens: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        self._drawn = 0

    def watch(self, sampler: Sampler, images: int) -> Sampler:
        """The same sampler, which counts the first `images` samples that it draws and no more."""
        self._images = images

        def watched(variables: Any, z: jax.Array, *args: Any) -> jax.Array:
            samples = jax.block_until_ready(sampler(variables, z, *args))
            jax.effects_barrier()
            self._drawn += len(z)
            return samples

        return watched

    def apply(
        self,
        variables: Any,
        x: jax.Array,
        t: jax.Array,
        cond: Mapping[str, jax.Array],
        train: bool,
    ) -> jax.Array:
        """The model's `apply`, which also reports the routing; all samples have the same time t."""
        is_null = _is_null(self._model, cond, len(x))
        output, seen = observe(self._model, variables, x, t, cond, train, bool(self._maps))
        maps = ()
        if self._maps:  # of the first samples with a condition
            first = jnp.argsort(is_null, stable=True)[: self._maps]
            maps = ~is_null[first].any(), seen[_STRONGEST][:, first], seen[_USED][:, first]
        labels = cond[LABEL] if self._classes else jnp.zeros_like(is_null, jnp.int32)
        jax.debug.callback(
            self._note, t[0], labels, is_null, seen[_COUNTS], seen[_DROPPED].mean(), maps
        )
        return output

    def _note(
        self, t: Any, labels: Any, is_null: Any, counts: Any, dropped: Any, maps: tuple
    ) -> None:
        t, labels, is_null = float(t), np.asarray(labels), np.asarray(is_null)
        counts = np.asarray(counts, np.float64).swapaxes(0, 1)  # [B, layers, experts]
        # Images are in order among the conditional samples and among the others, so this holds for
        # any way to lay out both in one batch.
        left = int(min(len(labels), max(0, self._images - self._drawn)))
        for null in (0, 1):
            rows = np.flatnonzero(is_null == null)[:left]
            places = np.full(len(rows), len(self._by_class) - 1) if null else labels[rows]
            np.add.at(self._by_class, places, counts[rows])
            np.add.at(self._samples_of_class, places, 1)
            self._by_time[t][null] += counts[rows].sum(0)
            self._samples_of_time[t][null] += len(rows)
        self._dropped.append(float(dropped))
        if maps and maps[0] and not self._drawn:
            strongest, used = (np.asarray(a, np.int16) for a in maps[1:])
            self._tokens.setdefault(t, (strongest, used))

    def stats(self) -> dict[str, Any]:
        """Averages over everything seen since the start or the last `reset`.

        Returns:
          blocks, num_experts: numbers of the MoE blocks; experts in each.
          dropped: of the assignments that DiffMoE's thresholds accept, the share that
            `max_capacity` refuses; 0 for other routers.
          Everything of `expert_tables.tables`, over all evaluations.
          conditional, unconditional: the same over these evaluations, if there are both kinds.
          Everything of `expert_tables.by_class`; only for a model with labels.
          tokens: what `tokens` returns; only with maps.

        Raises:
          UserError: nothing has been sampled.
        """
        jax.effects_barrier()
        times = sorted(self._by_time)
        if not times:
            raise UserError("no routing statistics: nothing has been sampled")
        sums = np.stack([self._by_time[t] for t in times])  # [times, 2, layers, experts]
        samples = np.stack([self._samples_of_time[t] for t in times])  # [times, 2]
        found = {"blocks": self.blocks, "num_experts": self.num_experts}
        found |= tables(times, sums.sum(1), samples.sum(1))
        found["dropped"] = float(np.mean(self._dropped))
        if samples.any(0).all():
            for null, name in enumerate(("conditional", "unconditional")):
                found[name] = tables(times, sums[:, null], samples[:, null])
        if self._classes:
            names = [*map(str, range(self._classes)), "null"]
            found |= by_class(names, self._by_class, self._samples_of_class)
        if self._maps:
            found["tokens"] = self.tokens()
        return found

    def tokens(self) -> dict[str, Any]:
        """What the tokens of the first images did, at the first, middle and last time.

        Returns:
          times: the times.
          strongest [images][blocks][times][rows][columns]: the expert with the largest weight, -1
            where a token uses none.
          used, of the same shape: how many experts a token uses.
        """
        times = sorted(self._tokens)
        chosen = np.unique(np.linspace(0, len(times) - 1, _MAP_TIMES).round().astype(int))
        times = [times[i] for i in chosen]
        maps = [np.stack([self._tokens[t][i] for t in times], 2) for i in (0, 1)]
        strongest, used = (a.swapaxes(0, 1).tolist() for a in maps)
        return {"times": times, "strongest": strongest, "used": used}


def observe(
    model: Model,
    variables: Any,
    x: jax.Array,
    t: jax.Array,
    cond: Mapping[str, jax.Array],
    train: bool,
    maps: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Applies a model and records its routing.

    Returns:
      The model's output, and by name:
        expert_counts f32[MoE layers, B, E]: see `expert_counts`.
        dropped f32[MoE layers]: the share of assignments that was dropped.
        strongest_expert, experts_used i32[MoE layers, B, rows, columns], only with `maps`: see
          `token_maps`.
    """
    batch, names = x.shape[0], [_COUNTS, _DROPPED] + [_STRONGEST, _USED] * maps

    def record(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        result = call(*args, **kwargs)
        router = context.module
        if isinstance(router, Router) and context.method_name == "__call__":
            routing, aux = result
            tokens, experts = args[0].shape[1], router.num_experts
            values = [expert_counts(routing, tokens, experts, batch)]
            values += [aux.metrics.get(_DROPPED, jnp.zeros(()))]
            if maps:
                values += token_maps(routing, tokens, experts, (batch, *model.grid))
            for name, value in zip(names, values, strict=True):
                router.sow("intermediates", name, value)
        return result

    with nn.intercept_methods(record):
        output, sown = model.apply(variables, x, t, cond, train, mutable=["intermediates"])
    flat = flatten_dict(sown["intermediates"], sep="/")
    routed = _routed(model).values()
    return output, {
        name: jnp.stack([flat[f"{router}/{name}"][0][index] for router, index in routed])
        for name in names
    }


def moe_blocks(model: Model) -> list[int]:
    """Numbers of the blocks with experts, from 0."""
    return list(_routed(model))


def _routed(model: Model) -> dict[int, tuple[str, int]]:
    """Number of a block with experts -> (path of its router, its place on the layer axis)."""
    routers = model.routers()
    return {
        number: (router, block.index)
        for number, block in enumerate(model.blocks())
        for router in routers
        if router.startswith(f"{block.path}/")
    }


def _is_null(model: Model, cond: Mapping[str, jax.Array], batch: int) -> jax.Array:
    """bool[B]: the condition of a sample is "no condition"."""
    null = model.null(cond)
    same = [(cond[name] == null[name]).reshape(batch, -1).all(1) for name in cond]
    return reduce(jnp.logical_and, same) if same else jnp.zeros(batch, bool)


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


def save_json(stats: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """Writes `stats` as JSON with five digits, one key a line, whole or not at all."""
    lines = [f" {json.dumps(key)}: {json.dumps(rounded(value))}" for key, value in stats.items()]
    return save_text("{\n" + ",\n".join(lines) + "\n}\n", path)


def save_stats(stats: Mapping[str, Any], path: str | os.PathLike) -> tuple[Path, Path | None]:
    """Writes `stats` as JSON, and a picture of the same name (.png); None if that fails.

    The picture shows C_infer, or the load of every expert if C_infer is the same everywhere.

    Raises:
      WriteError: the JSON cannot be written.
    """

    def picture() -> Image.Image:
        varies = np.ptp(stats["per_layer_and_time"]) > 1e-6
        return capacity_picture(stats) if varies else experts_picture(stats)

    return save_json(stats, path), save_ornament(picture, Path(path).with_suffix(".png"))
