"""A hook of the training loop that draws images, so that people see the model learn."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moe_diffusion.classes import NOTHING, of_source
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.figures.images import image_grid, own_name, save_png
from moe_diffusion.models.stack import Model
from moe_diffusion.ornaments import ornament
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.sampling.conditions import captions, default_conditions
from moe_diffusion.sampling.generate import generate, pool_of
from moe_diffusion.sampling.load import averaged_variables
from moe_diffusion.training.state import TrainState


class FixedSamples:
    """The same images at every call: from the same noise and conditions, with other weights.

    They are drawn with the first average, or with the live weights if the run keeps no average.

    Args:
      num: how many images.
      source: where conditions come from, see `default_conditions`.
      batch_size: images at a time; None draws all at once.
    """

    def __init__(
        self, config: ConfigDict, model: Model, num: int, source: Any, batch_size: int | None = None
    ):
        self._config, self._shape = config, model.input_shape
        batch_size = min(batch_size or num, num)
        pool = pool_of(config, batch_size)
        self._sampler = make_sampler(model, config, pool=pool)
        self.cond = default_conditions(model, num, source)
        self._options = {"seed": config.seed, "batch_size": batch_size, "pool": pool}

    def draw(self, state: TrainState) -> np.ndarray:
        """f32[num, H, W, C]."""
        variables = averaged_variables(self._config, state)
        return generate(self._sampler, variables, self.cond, self._shape, **self._options)


class SampleHook:
    """Draws `train.samples` images from the same noise and conditions at every call.

    Each call writes workdir/samples/<step>.png. A failure, like a full disk or images that are not
    finite, is told in a line, and training goes on.

    Args:
      source: see `FixedSamples`.
      decode: turns latents into images; None if the model makes images.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: Model,
        workdir: str | os.PathLike,
        source: Any = None,
        decode: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self._folder, self._decode = Path(os.fspath(workdir)) / "samples", decode
        self._samples = FixedSamples(config, model, config.train.samples, source)
        known = NOTHING if source is None else of_source(source)
        self._captions = captions(model, self._samples.cond, known)

    def __call__(self, step: int, state: TrainState) -> dict[str, np.ndarray]:
        with ornament(f"the samples of step {step}"):
            images = self._samples.draw(state)
            images = self._decode(images) if self._decode else images
            picture = image_grid(images, self._captions, title=f"step {step}")
            if is_main_process():
                save_png(picture, own_name(self._folder / f"{step:08d}.png"))
            return {"samples": np.asarray(picture)}
        return {}
