"""What the bound of a router drops while images are drawn.

DiffMoE and Expert Race serve at most `model.router.max_capacity` times the average load at
inference. What is beyond has no expert, and nothing in the images tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from moe_diffusion.models.stack import Model

KEY = "model.router.max_capacity"


def bound_of(config: ConfigDict) -> float:
    """The bound of a run's routers as a multiple of the average load; 0 is none."""
    return config.model.router.get("max_capacity", 0.0)


class BoundObserver:
    """Wraps a model and remembers what its routers drop; pass it to `make_sampler` as the model.

    It counts every evaluation of the network. It does nothing to a model whose routers have no
    bound.
    """

    def __init__(self, model: Model, config: ConfigDict):
        self._model, self._shares = model, []
        self._bound = bound_of(config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def apply(
        self,
        variables: Any,
        x: jax.Array,
        t: jax.Array,
        cond: Mapping[str, jax.Array],
        train: bool,
    ) -> jax.Array:
        """The model's `apply`, which also reports what is dropped if there is a bound."""
        if not self._bound:
            return self._model.apply(variables, x, t, cond, train)
        output, sown = self._model.apply(variables, x, t, cond, train, mutable=["metrics"])
        metrics = flatten_dict(sown.get("metrics", {}))
        dropped = [jnp.ravel(value) for path, value in metrics.items() if path[-1] == "dropped"]
        if dropped:
            jax.debug.callback(self._note, jnp.concatenate(dropped).mean())
        return output

    def _note(self, dropped: Any) -> None:
        self._shares.append(float(dropped))

    @property
    def shares(self) -> list[float]:
        """The dropped share of every evaluation so far; may be set, to those of an earlier call."""
        jax.effects_barrier()
        return self._shares

    @shares.setter
    def shares(self, shares: list[float]) -> None:
        self._shares = shares

    def dropped(self) -> float | None:
        """The dropped share of what routers accept, a mean over layers and evaluations.

        None where nothing was observed.
        """
        return float(np.mean(self.shares)) if self.shares else None


def warning(config: ConfigDict, dropped: float | None) -> str | None:
    """One line about a bound that dropped something, with the remedy; None if it did not."""
    if not dropped:
        return None
    return (
        f"{KEY} = {bound_of(config):g} dropped {dropped:.2%} of what the routers accept: "
        f"--config.{KEY}=0 serves everything"
    )


def report(config: ConfigDict, dropped: float | None) -> float | None:
    """Prints what a bound dropped, and returns it; None where there is no bound."""
    if dropped is None or not bound_of(config):
        return None
    print(warning(config, dropped) or f"{KEY} = {bound_of(config):g} dropped nothing")
    return dropped
