"""Draws the images of a trained run for an evaluation, batch by batch, and decodes latents."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from moe_diffusion import classes
from moe_diffusion.config import validate
from moe_diffusion.diffusion.samplers import Sampler, make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.images import check_shape
from moe_diffusion.evaluation.protocol import make_labels
from moe_diffusion.evaluation.record import made_with
from moe_diffusion.evaluation.routing_stats import RoutingObserver
from moe_diffusion.interop import autoencoder as autoencoders
from moe_diffusion.models import build
from moe_diffusion.models.accounting import forward_flops, parameter_counts
from moe_diffusion.models.stack import Model
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.sampling.bound import BoundObserver, warning
from moe_diffusion.sampling.conditions import conditions_of_run
from moe_diffusion.sampling.generate import generate_batches, pool_of
from moe_diffusion.sampling.labels import LABEL, num_labels, untrained
from moe_diffusion.sampling.load import load_workdir
from moe_diffusion.sampling.prompt_files import PromptFile
from moe_diffusion.sampling.prompts import GUIDANCE, condition, prompt_encoder


class Asked(NamedTuple):
    """Prompts that a run is asked to draw.

    Attributes:
      file: has them.
      text_encoders: folder of those that read them; None takes the config's.
      guidance: see `prompts.condition`.
    """

    file: PromptFile
    text_encoders: str | None = None
    guidance: float | None = None


class RunImages:
    """The images that a run's checkpoint draws under a protocol; a set like those of `images`.

    Every device holds all weights and draws its part of every batch. Where images compete for
    experts, `sampling.pool` of them do, or `batch_size` of the protocol if that is 0: the images do
    not depend on the number of devices, each of which draws whole pools.

    Args:
      overrides: changes to the run's config, sampling included; see `config.load`.
      step: of the checkpoint; None takes the newest.
      ema: decay of an average as text, or "none" for the live weights. None takes the run's first.
      vae: weights of the autoencoder; None takes the config's `data.autoencoder`.
      asked: prompts, over which the protocol's number of images is spread. None draws labels.

    Raises:
      UserError: there is no such run or average, the autoencoder is missing or not the run's, or
        the model takes no labels or no such prompts.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        protocol: ConfigDict,
        overrides: tuple[str, ...] = (),
        *,
        step: int | None = None,
        ema: str | None = None,
        vae: str | None = None,
        asked: Asked | None = None,
    ):
        self.name, self.asked, self._prompted = str(workdir), asked, None
        self._told = 0  # shares that `new_shares` has returned
        self._protocol, self._observer = protocol, None
        self._threshold: float | str | None = None  # None: as the config says
        self._routing: dict[str, Any] = {}  # sampler and observer, shared by all thresholds
        self._mesh = make_mesh(ConfigDict({"preset": "dp"})) if jax.device_count() > 1 else None
        self.config, self._model, self._variables, self.note = load_workdir(
            workdir, overrides, step=step, ema=ema, mesh=self._mesh, preset="dp", before=self._read
        )
        self._known = classes.of_run(workdir)
        if asked is None:
            self._num_labels = num_labels(self._model, "evaluate --workdir", self._known)
        self._autoencoder = autoencoders.for_config(self.config, vae)
        self.shape = self._model.input_shape
        if self._autoencoder is not None:
            network = self._autoencoder.network
            height, width, _ = self.shape
            self.shape = (height * network.factor, width * network.factor, network.channels)
        elif self.config.data.source.startswith("latents:"):
            raise UserError(
                f"{workdir} makes latents: give the autoencoder that made its data as --vae"
            )
        check_shape(self.shape, f"the model of {workdir}")

    def _read(self, config: ConfigDict, model: Model) -> None:
        """Encodes the prompts, if there are some, before the weights are read."""
        if self.asked is None:
            return
        encoder = prompt_encoder(config, model, self.asked.text_encoders)
        how = {"guidance": self.asked.guidance, "asked_by": "--guidance"}
        texts = self.asked.file.prompts
        self._prompted = condition(encoder, model, texts, len(self), **how)

    def __len__(self) -> int:
        return self._protocol.num_samples

    @property
    def texts(self) -> list[str]:
        """The prompt of every image; only with prompts."""
        return self._prompted.texts

    def batches(self, size: int, num: int, start: int = 0) -> Iterator[np.ndarray]:
        """Yields f32[b, H, W, C], in [-1, 1] except for overshoot.

        Args:
          size: ignored, because the protocol says how many images are drawn together, and the
            devices how many more.
          num: number of images in all.
          start: number of the first image, the first of a pool.
        """
        protocol, pool = self._protocol, self.pool
        drawn = generate_batches(
            self._compiled(num),
            self._variables,
            self._cond(num),
            self._model.input_shape,
            seed=protocol.seed,
            batch_size=protocol.batch_size,
            pool=pool,
            start=start,
            mesh=self._mesh,
        )
        for batch in drawn:
            yield batch if self._autoencoder is None else self._autoencoder.decode(batch)

    def _cond(self, num: int) -> Mapping[str, Any]:
        if self._prompted:
            return self._prompted.cond
        labels = make_labels(self._protocol.labels, num, self._num_labels, self._protocol.seed)
        return conditions_of_run(self.config, self._model, num, self._known) | {LABEL: labels}

    def with_cfg(self, cfg: float) -> RunImages:
        """The same run under another guidance scale; the weights are shared."""
        other = copy.copy(self)
        other._observer, other._routing = None, {}
        other.config = copy.deepcopy(self.config)
        other.config.sampling.cfg = float(cfg)
        validate(other.config)
        return other

    def with_threshold(self, threshold: float | str) -> RunImages:
        """The same run under one threshold for all experts of DiffMoE; its routing is observed.

        Runs of the same guidance scale share one compiled sampler, so the thresholds are put in the
        place of the learned ones, instead of into the config.

        Args:
          threshold: from 0 to below 1, or "dynamic" for the learned ones.

        Raises:
          UserError: the router is not DiffMoE's.
        """
        router = self.config.model.router
        if router.name != "diffmoe":
            raise UserError(
                f"model.router.name is {router.name}, but thresholds are DiffMoE's: choose a run "
                "with router diffmoe"
            )
        other = copy.copy(self)
        other._threshold = threshold
        other._variables = with_threshold(self._variables, threshold)
        return other

    def _compiled(self, num: int) -> Sampler:
        """The sampler for `num` images, and its observer, without what that saw before."""
        if self._threshold is None:
            self._observer, self._told = BoundObserver(self._model, self.config), 0
            return make_sampler(self._observer, self.config, pool=self.pool)
        if not self._routing:
            config = copy.deepcopy(self.config)
            config.model.router.threshold = "dynamic"  # those in router_state
            observer = RoutingObserver(build(config.model).clone(preset=self._model.preset))
            sampler = make_sampler(observer, config, pool=self.pool)
            self._routing |= {"observer": observer, "sampler": sampler}
        self._observer = self._routing["observer"]
        self._observer.reset()
        return self._observer.watch(self._routing["sampler"], num)

    def _experts(self) -> dict[str, Any]:
        """What the images cost under a threshold; nothing where the routing was not observed."""
        if self._threshold is None:
            return {}
        stats = self._observer.stats()
        capacity = stats["c_infer_avg"]
        counts = parameter_counts(self._model, capacity)["total"]
        flops = forward_flops(self._model, experts_per_token=capacity)["total"]
        return {
            "threshold": self._threshold,
            "c_infer_avg": capacity,
            "dropped": stats["dropped"],
            "activated_params": counts.activated,
            "gflops": flops / 1e9,
        }

    def check_ema(self, ema: str | None) -> None:
        """Raises a UserError unless the run keeps the average."""
        kept = ["none", *map(str, self.config.ema.decays)]
        if ema is not None and ema not in kept:
            raise UserError(f"{self.name} keeps no average {ema!r}; choose {' | '.join(kept)}")

    @property
    def pool(self) -> int:
        """See `pool_of`."""
        return pool_of(self.config, self._protocol.batch_size)

    @property
    def _dropped(self) -> float | None:
        if self._threshold is not None:
            return self._observer.stats()["dropped"]
        return self._observer and self._observer.dropped()

    @property
    def warnings(self) -> list[str]:
        """What a reader of the result must know about the images that were drawn."""
        bound = warning(self.config, self._dropped)
        return list(filter(None, [untrained(self._model, self._known), bound]))

    def new_shares(self) -> list[float]:
        """What a bound on routers dropped since the last call, by evaluation of the network."""
        shares = self._observer.shares
        new, self._told = shares[self._told :], len(shares)
        return new

    def set_shares(self, shares: list[float]) -> None:
        """Says what was dropped while all images were drawn, some perhaps by an earlier call."""
        self._observer = self._observer or BoundObserver(self._model, self.config)
        self._observer.shares = shares

    def _of_prompts(self) -> dict[str, Any]:
        """What only images for prompts depend on."""
        if not self._prompted:
            return {}
        told = {"prompts": self.asked.file.describe()}
        if GUIDANCE in self._prompted.cond:
            told[GUIDANCE] = float(self._prompted.cond[GUIDANCE][0])
        return told | {"resolution": "x".join(map(str, self.shape[:2]))}

    @property
    def conditions(self) -> dict[str, Any]:
        """The settings that the images depend on, for the result.

        Once images are drawn, also the share that a bound on routers dropped.
        """
        protocol, vae = self._protocol, self._autoencoder
        sampling = self.config.sampling.to_dict() | {"pool": self.pool or None}
        competing = {"pool": sampling.pop("pool"), "dropped": self._dropped}
        drawn = ("num_samples", "batch_size", "seed")
        return {
            "checkpoint": self.name,
            "config": self.config.name,
            **self.note,
            **{key: protocol[key] for key in (*drawn, *["labels"] * (not self.asked))},
            **self._of_prompts(),
            **{key: sampling.pop(key) for key in ("sampler", "steps", "cfg", "cfg_interval")},
            **{key: value for key, value in competing.items() if value is not None},
            **self._experts(),
            "sampling": sampling,
            "autoencoder": vae and {"name": vae.name, "fingerprint": vae.fingerprint},
            **made_with(self.config, threshold=self._threshold),
        }


def with_threshold(variables: Mapping[str, Any], threshold: float | str) -> dict[str, Any]:
    """The variables with every threshold at this number; "dynamic" leaves them as they are.

    The config key `model.router.threshold` has the same effect, but needs a new compilation.
    """
    if threshold == "dynamic":
        return dict(variables)
    states = jax.tree.map(lambda old: jnp.full_like(old, threshold), variables["router_state"])
    return {**variables, "router_state": states}
