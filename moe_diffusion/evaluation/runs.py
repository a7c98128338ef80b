"""Images of a trained run, drawn batch by batch for an evaluation; latents are decoded."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from moe_diffusion.config import validate
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.generate import generate_batches, load_workdir
from moe_diffusion.evaluation.images import check_shape
from moe_diffusion.evaluation.protocol import make_labels
from moe_diffusion.interop import autoencoder as autoencoders
from moe_diffusion.parallel.mesh import make_mesh


class RunImages:
    """The images that a run's checkpoint draws under a protocol; a set as in `images`.

    Args:
      ema: decay as text, "none" or None for the run's first.
      overrides: of the config, sampling included; see `config.load`.
      vae: weights of the autoencoder; None takes the config's `data.autoencoder`.

    Raises:
      UserError: no such run or average, a batch that cannot be split over the devices, or an
        autoencoder that is missing or another than the run's.
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
    ):
        self.name = str(workdir)
        self._protocol = protocol
        devices = jax.device_count()
        if protocol.batch_size % devices:
            raise UserError(
                f"--batch {protocol.batch_size} cannot be split evenly over {devices} devices: "
                f"make it a multiple of {devices}"
            )
        self.config, self._model, self._variables, self.note = load_workdir(
            workdir, overrides, step=step, ema=ema
        )
        self._autoencoder = autoencoders.for_config(self.config, vae)
        model = self.config.model
        self._latent_shape = self.shape = (model.image_size, model.image_size, model.channels)
        if self._autoencoder is not None:
            side = model.image_size * self._autoencoder.network.factor
            self.shape = (side, side, self._autoencoder.network.channels)
        elif self.config.data.source.startswith("latents:"):
            raise UserError(
                f"{workdir} makes latents: give the autoencoder that made its data as --vae"
            )
        check_shape(self.shape, f"the model of {workdir}")

    def __len__(self) -> int:
        return self._protocol.num_samples

    def batches(self, size: int, num: int) -> Iterator[np.ndarray]:
        """f32[b, H, W, C] in [-1, 1] but for overshoot. Batches are the protocol's, not `size`."""
        labels = make_labels(
            self._protocol.labels, num, self.config.model.num_classes, self._protocol.seed
        )
        sampler, variables = make_sampler(self._model, self.config), self._variables
        mesh = None
        if jax.device_count() > 1:
            mesh = make_mesh(ConfigDict({"preset": "dp"}))
            sampler = _under(mesh, sampler)
            variables = jax.tree.map(np.asarray, variables)  # from where all processes have them
            variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        drawn = generate_batches(
            sampler,
            variables,
            labels,
            self._latent_shape,
            seed=self._protocol.seed,
            batch_size=self._protocol.batch_size,
            mesh=mesh,
        )
        for batch in drawn:
            yield batch if self._autoencoder is None else self._autoencoder.decode(batch)

    def with_cfg(self, cfg: float) -> RunImages:
        """The same run under another guidance scale; the weights are shared."""
        other = copy.copy(self)
        other.config = copy.deepcopy(self.config)
        other.config.sampling.cfg = float(cfg)
        validate(other.config)
        return other

    def check_ema(self, ema: str | None) -> None:
        """Raises a UserError unless the run keeps the average."""
        kept = ["none", *map(str, self.config.ema.decays)]
        if ema is not None and ema not in kept:
            raise UserError(f"{self.name} keeps no average {ema!r}; choose {' | '.join(kept)}")

    @property
    def conditions(self) -> dict[str, Any]:
        """What the images depend on, for the result."""
        protocol, vae = self._protocol, self._autoencoder
        sampling = self.config.sampling.to_dict()
        return {
            "checkpoint": self.name,
            "config": self.config.name,
            **self.note,
            **{key: protocol[key] for key in ("num_samples", "labels", "batch_size", "seed")},
            **{key: sampling.pop(key) for key in ("sampler", "steps", "cfg", "cfg_interval")},
            "sampling": sampling,
            "autoencoder": vae and {"name": vae.name, "fingerprint": vae.fingerprint},
        }


def _under(mesh: Mesh, sampler: Callable) -> Callable:
    """Sets the mesh while the sampler runs, and not while its batch is judged."""

    def run(*args: Any) -> jax.Array:
        with jax.set_mesh(mesh):
            return sampler(*args)

    return run
