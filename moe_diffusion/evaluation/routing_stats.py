"""Measures how a model routes while it draws images: which experts its tokens use, and how many.

C_infer is the average number of experts that a token uses. For routers with a fixed budget it is
top_k or `capacity`. DiffMoE's predictor decides it token by token (2503.14487, section 3, Fig. 1).
The selection frequency of an expert is the share of tokens that use it. Over the experts of a layer
the frequencies sum to C_infer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from moe_diffusion.diffusion.samplers import Sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import observed
from moe_diffusion.evaluation.averages import Averages
from moe_diffusion.evaluation.categories import NULL, Categories
from moe_diffusion.evaluation.expert_tables import by_class, rounded, tables
from moe_diffusion.figures.images import save_ornament
from moe_diffusion.figures.routing import capacity_picture, experts_picture
from moe_diffusion.models.stack import Model
from moe_diffusion.sampling.labels import LABEL
from moe_diffusion.writing import save_text

_MAP_TIMES = 3


class RoutingObserver:
    """Wraps a model and remembers what happens in it; pass it to `make_sampler` as the model.

    It adds up the evaluations of the network, conditional and unconditional ones apart. `watch`
    keeps the repetitions that fill up a last batch out of the sums. `stats` returns the averages,
    `reset` clears them.

    Args:
      maps: of so many images it also remembers what every token did, if the model has a `grid`, its
        (rows, columns) of patches. The tokens of the image must be the last of a sample.
      looked_into: names of the expert layers (`expert_layers`) of which it remembers the use by
        every image of `watch` and by every token.
      dense: a model without experts will do; then only its blocks are measured.
      map_times: of how many times the maps tell, evenly spread over those of the sampler.

    Raises:
      UserError: the model has no experts, or its layers have different numbers of experts.
    """

    def __init__(
        self,
        model: Model,
        maps: int = 0,
        looked_into: Sequence[int | str] = (),
        dense: bool = False,
        map_times: int = _MAP_TIMES,
    ):
        layers = observed.expert_layers(model)
        self.blocks = [layer.name for layer in layers]
        self.pictured = [layer.name for layer in layers if layer.sees_image]
        if not self.blocks and not dense:
            raise UserError("a dense model has no routing statistics: use a model with experts")
        numbers = {router.num_experts for router in model.routers().values()}
        if len(numbers) > 1:
            raise UserError(
                f"the model's layers have {sorted(numbers)} experts: routing statistics need a "
                "model with the same number of experts in all layers"
            )
        (self.num_experts,) = numbers or {0}
        self._layers = observed.layers(model)
        self._map_times = map_times
        self._maps = maps if hasattr(model, "grid") and self.pictured else 0
        self.looked_into = [name for name in self.blocks if name in looked_into]
        self._model, self._images = model, np.inf
        label = model.cond_spec().get(LABEL)
        self._labels = label.num_values if label else None
        self._categories: Categories | None = None
        self.reset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def _classes(self) -> tuple[str, ...]:
        """Names of what is counted apart; a model without any has one, which is not told of."""
        if self._categories:
            return self._categories.names
        return tuple(map(str, range(self._labels or 1)))

    def reset(self) -> None:
        """Forgets what was seen."""
        jax.effects_barrier()  # evaluations that have begun are forgotten, too
        self._means = Averages(len(self._classes) + 1)  # "no condition" comes last
        self._dropped: list[float] = []
        self._maps_seen: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        self._by_image: np.ndarray | None = None  # sums [images, looked into, E] of frequencies
        self._evaluated = np.zeros(0)  # how often each image was
        self._by_token = [np.zeros((1, self.num_experts)) for _ in self.looked_into]  # sums [T, E]
        self._drawn = 0

    def watch(self, sampler: Sampler, images: int, categories: Categories | None = None) -> Sampler:
        """The same sampler, which counts the first `images` samples that it draws and no more.

        Args:
          categories: of these images, in place of their labels.
        """
        self._images = images
        if categories is not None:
            self._categories = categories
            self.reset()
        if self.looked_into:
            self._by_image = np.zeros((images, len(self.looked_into), self.num_experts))
            self._evaluated = np.zeros(images)

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
        how = {"maps": bool(self._maps), "by_token": tuple(self.looked_into)}
        output, seen = observed.observe(self._model, variables, x, t, cond, train, **how)
        maps = ()
        if self._maps:  # of the first samples with a condition
            first = jnp.argsort(is_null, stable=True)[: self._maps]
            kinds = (observed.STRONGEST, observed.USED)
            maps = ~is_null[first].any(), *(seen.pop(kind)[:, first] for kind in kinds)
        labels = cond[LABEL] if self._labels else jnp.zeros_like(is_null, jnp.int32)
        jax.debug.callback(self._note, t[0], labels, is_null, seen, maps)
        return output

    def _note(self, t: Any, labels: Any, is_null: Any, seen: dict[str, Any], maps: tuple) -> None:
        t, labels, is_null = float(t), np.asarray(labels), np.asarray(is_null)
        values = {  # [B, layers, ...]
            name: np.asarray(seen[name], np.float64).swapaxes(0, 1)
            for name in (observed.COUNTS, observed.CHANGE)
            if name in seen
        }
        groups = [layer.name for layer in self._layers if layer.is_group]
        values |= zip(groups, map(np.asarray, seen[observed.CHOSEN]), strict=True)
        # Images are in order among the conditional samples and among the others, so this holds for
        # any way to lay out both in one batch.
        left = int(min(len(labels), max(0, self._images - self._drawn)))
        for null in (0, 1):
            rows = np.flatnonzero(is_null == null)[:left]
            images = self._drawn + np.arange(len(rows))
            classes = self._categories.of[images] if self._categories else labels[rows]
            places = np.full(len(rows), len(self._classes)) if null else classes
            self._means.add(t, null, places, {name: v[rows] for name, v in values.items()})
            if self.looked_into and not null and self._by_image is not None:
                chosen = [self.blocks.index(name) for name in self.looked_into]
                self._by_image[images] += values[observed.COUNTS][rows][:, chosen]
                self._evaluated[images] += 1
                used = (np.asarray(users)[rows].sum(0) for users in seen[observed.TOKENS])
                pairs = zip(self._by_token, used, strict=True)
                self._by_token = [before + now for before, now in pairs]
        if self.blocks:
            self._dropped.append(float(np.mean(seen[observed.DROPPED])))
        if maps and maps[0] and not self._drawn:
            strongest, used = (np.asarray(a, np.int16) for a in maps[1:])
            self._maps_seen.setdefault(t, (strongest, used))

    def stats(self) -> dict[str, Any]:
        """Averages over everything seen since the start or the last `reset`.

        Returns:
          blocks, num_experts: names of the layers with experts (`ExpertLayer`); experts in each.
          dropped: of the assignments that DiffMoE's thresholds accept, the share that
            `max_capacity` refuses; 0 for other routers.
          Everything of `expert_tables.tables`, over all evaluations.
          conditional, unconditional: the same over these evaluations, if there are both kinds.
          Everything of `expert_tables.by_class`, and `class_kind`, what the classes are; only for a
            model with labels, or if `watch` was told categories.
          looked_into, selection_by_token [layers][T][E], selection_by_image [layers][images][E],
            class_of_image [images]: selection frequencies in the evaluations with a condition.
          tokens: what `tokens` returns; only with maps.
          times, layers, block_mse ..., groups: see `_of_blocks`.
          Without experts only the last line.

        Raises:
          UserError: nothing has been sampled.
        """
        jax.effects_barrier()
        times = self._means.times
        if not times:
            raise UserError("no routing statistics: nothing has been sampled")
        told = [*self._classes, NULL] if self._labels or self._categories else None
        found: dict[str, Any] = {"blocks": self.blocks, "num_experts": self.num_experts}
        if told:
            found["class_kind"] = self._categories.kind if self._categories else "class"
        if self.blocks:
            sums, samples = self._means.by_time(observed.COUNTS), self._means.samples
            found |= tables(times, sums.sum(1), samples.sum(1))
            found["dropped"] = float(np.mean(self._dropped))
            if samples.any(0).all():
                for null, name in enumerate(("conditional", "unconditional")):
                    found[name] = tables(times, sums[:, null], samples[:, null])
            if told:
                sums = self._means.by_class(observed.COUNTS)
                found |= by_class(told, sums, self._means.samples_of_class)
            if self._by_image is not None and samples[:, 0].any():
                found |= self._looked_into(float(samples[:, 0].sum()))
            if self._maps:
                found["tokens"] = self.tokens()
        return {"times": times, **found, **self._of_blocks(told)}

    def _looked_into(self, samples: float) -> dict[str, Any]:
        names = self._classes if self._categories else ()
        by_image = self._by_image / np.maximum(self._evaluated, 1)[:, None, None]
        return {
            "looked_into": self.looked_into,
            "selection_by_token": [(used / samples).tolist() for used in self._by_token],
            "selection_by_image": by_image.swapaxes(0, 1).tolist(),
            "class_of_image": [names[c] for c in self._categories.of] if names else [],
        }

    def _of_blocks(self, told: Sequence[str] | None) -> dict[str, Any]:
        """What the blocks do, over the evaluations with a condition, if there are some.

        Returns:
          layers: names of the blocks and of the groups of blocks, in order (`Layer`).
          block_mse [layers], block_mse_by_time [times][layers] and block_mse_by_class, class ->
            [layers]: mean squared difference of input and output (2510.09094, Figure 3).
          groups: name -> blocks [m], their numbers, and share [m], share_by_time [times][m] and
            share_by_class class -> [m]: of the samples, the share that passes each block.
        """
        seen = np.flatnonzero(self._means.samples_of_class)

        def means(name: str, key: str) -> dict[str, Any]:
            whole, by_time, classes = self._means.means(name)
            found = {key: whole.tolist(), f"{key}_by_time": by_time.tolist()}
            if told:
                found[f"{key}_by_class"] = {told[place]: classes[place].tolist() for place in seen}
            return found

        if observed.CHANGE not in self._means.names:
            return {}
        found = {"layers": [layer.name for layer in self._layers]}
        found |= means(observed.CHANGE, observed.CHANGE)
        groups = [layer for layer in self._layers if layer.is_group]
        if groups:
            found["groups"] = {
                group.name: {"blocks": group.blocks} | means(group.name, "share")
                for group in groups
            }
        return found

    def tokens(self) -> dict[str, Any]:
        """What the tokens of the first images did, at the first, the last and times in between.

        Returns:
          blocks: the layers that see tokens of the image.
          times: the times.
          strongest [images][blocks][times][rows][columns]: the expert with the largest weight, -1
            where a token uses none.
          used, of the same shape: how many experts a token uses.
        """
        times = sorted(self._maps_seen)
        chosen = np.unique(np.linspace(0, len(times) - 1, self._map_times).round().astype(int))
        times = [times[i] for i in chosen]
        maps = [np.stack([self._maps_seen[t][i] for t in times], 2) for i in (0, 1)]
        strongest, used = (a.swapaxes(0, 1).tolist() for a in maps)
        return {"blocks": self.pictured, "times": times, "strongest": strongest, "used": used}


def _is_null(model: Model, cond: Mapping[str, jax.Array], batch: int) -> jax.Array:
    """bool[B]: the condition of a sample is "no condition"."""
    null = model.null(cond)
    same = [(cond[name] == null[name]).reshape(batch, -1).all(1) for name in cond]
    return reduce(jnp.logical_and, same) if same else jnp.zeros(batch, bool)


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
