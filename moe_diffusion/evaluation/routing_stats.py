"""Measures how a model routes while it draws images: C_infer per layer, per time and per class.

C_infer is the average number of experts that a token uses. For routers with a fixed budget it is
top_k or `capacity`. DiffMoE's predictor decides it token by token (2503.14487, section 3, Fig. 1).
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from moe_diffusion.errors import UserError
from moe_diffusion.figures.images import save_png
from moe_diffusion.figures.routing import routing_picture
from moe_diffusion.models.stack import Model
from moe_diffusion.moe.router import Router
from moe_diffusion.sampling.labels import LABEL

_COUNTS, _DROPPED = "experts_per_token", "dropped"


class RoutingObserver:
    """Wraps a model and remembers how its routers decide; pass it to `make_sampler` as the model.

    It counts every evaluation of the network, conditional and unconditional, and also the
    repetitions that fill up a last batch. `stats` returns the averages, `reset` clears them.

    Raises:
      UserError: the model has no experts.
    """

    def __init__(self, model: Model):
        if not moe_blocks(model):
            raise UserError("a dense model has no routing statistics: use a model with experts")
        self._model = model
        self.reset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def reset(self) -> None:
        """Forgets what was seen."""
        jax.effects_barrier()  # evaluations that have begun are forgotten, too
        self._by_time: dict[float, list] = defaultdict(list)
        self._by_class: dict[int, list] = defaultdict(list)
        self._dropped: list[float] = []

    def apply(
        self,
        variables: Any,
        x: jax.Array,
        t: jax.Array,
        cond: Mapping[str, jax.Array],
        train: bool,
    ) -> jax.Array:
        """The model's `apply`, which also reports the routing; all samples have the same time t."""
        output, counts, dropped = observe(self._model, variables, x, t, cond, train)
        jax.debug.callback(self._note, t, cond.get(LABEL, ()), counts, dropped)
        return output

    def _note(self, t: Any, labels: Any, counts: Any, dropped: Any) -> None:
        counts = np.asarray(counts, np.float64)  # [layers, B]
        self._by_time[float(t[0])].append(counts.mean(1))
        self._dropped.append(float(dropped))
        if len(labels):
            for label, value in zip(np.asarray(labels), counts.mean(0), strict=True):
                self._by_class[int(label)].append(value)

    def stats(self) -> dict[str, Any]:
        """Averages over everything seen since the start or the last `reset`.

        Returns:
          c_infer_avg: experts per token over all evaluations.
          dropped: of the assignments that DiffMoE's thresholds accept, the share that
            `max_capacity` refuses; 0 for other routers.
          blocks: numbers of the MoE blocks.
          times: of the evaluations, ascending.
          per_layer [blocks], per_time [times], per_layer_and_time [blocks][times]: C_infer.
          per_class: label -> C_infer, with "null" for "no label"; only for a model with labels.

        Raises:
          UserError: nothing has been sampled.
        """
        jax.effects_barrier()
        times = sorted(self._by_time)
        if not times:
            raise UserError("no routing statistics: nothing has been sampled")
        seen = [np.stack(self._by_time[t]) for t in times]  # [evaluations, layers] for each time
        grid = np.stack([values.mean(0) for values in seen], axis=1)
        layers = np.concatenate(seen).mean(0)
        found = {
            "c_infer_avg": float(layers.mean()),
            "dropped": float(np.mean(self._dropped)),
            "blocks": moe_blocks(self._model),
            "times": times,
            "per_layer": layers.tolist(),
            "per_time": grid.mean(0).tolist(),
            "per_layer_and_time": grid.tolist(),
        }
        if self._by_class:
            null = self._model.cond_spec()[LABEL].num_values
            found["per_class"] = {
                "null" if label == null else str(label): float(np.mean(self._by_class[label]))
                for label in sorted(self._by_class)
            }
        return found


def observe(
    model: Model,
    variables: Any,
    x: jax.Array,
    t: jax.Array,
    cond: Mapping[str, jax.Array],
    train: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Applies a model and records its routing.

    Returns:
      The model's output, the experts per token f32[MoE layers, B], and the share of assignments
      that was dropped, f32[].
    """
    batch = x.shape[0]

    def count(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        result = call(*args, **kwargs)
        if isinstance(context.module, Router) and context.method_name == "__call__":
            routing, aux = result
            used = routing.expert < context.module.num_experts
            counts = per_sample(used, routing.token, args[0], batch)
            context.module.sow("intermediates", _COUNTS, counts)
            dropped = aux.metrics.get(_DROPPED, jnp.zeros(()))
            context.module.sow("intermediates", _DROPPED, dropped)
        return result

    with nn.intercept_methods(count):
        output, sown = model.apply(variables, x, t, cond, train, mutable=["intermediates"])
    flat = flatten_dict(sown["intermediates"], sep="/")
    routed = _routed(model).values()

    def by_layer(name: str) -> jax.Array:
        return jnp.stack([flat[f"{router}/{name}"][0][index] for router, index in routed])

    return output, by_layer(_COUNTS), by_layer(_DROPPED).mean()


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


def per_sample(used: jax.Array, token: jax.Array, x: jax.Array, batch: int) -> jax.Array:
    """Experts per token of each sample, f32[B].

    Args:
      used: bool[G, N], which assignments count.
      token: i32[G, N], the token of each assignment, numbered within its group.
      x: [G, T, D], the tokens of `batch` samples, one sample after the other.
    """
    groups, tokens, _ = x.shape
    length = groups * tokens // batch
    sample = jnp.arange(groups)[:, None] * (tokens // length) + token // length
    return jnp.zeros(batch).at[sample].add(used.astype(jnp.float32)) / length


def save_stats(stats: dict[str, Any], path: str | os.PathLike) -> tuple[Path, Path]:
    """Writes `stats` as JSON, whole or not at all, and a picture of the same name (.png)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(stats, indent=1) + "\n")
    os.replace(part, path)
    return path, save_png(routing_picture(stats), path.with_suffix(".png"))
