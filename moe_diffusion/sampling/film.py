"""How images come to be: the states of a sampler on its way from noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.figures.images import image_grid, save_gif, save_png
from moe_diffusion.models.stack import Model
from moe_diffusion.sampling.generate import generate

SHOWN = 8  # images of a film
COLUMNS = 10  # states of a filmstrip
FRAMES = 40  # states of a GIF
_GIF_COLUMNS = 4
_SECONDS = 4


def draw_film(
    model: Model,
    config: ConfigDict,
    variables: Mapping[str, Any],
    cond: Mapping[str, np.ndarray],
    *,
    seed: int,
    states: int,
    pool: int = 0,
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The first `SHOWN` images of `generate` with the same seed and conditions, and their past.

    Args:
      model: what `make_sampler` takes.
      states: how many to keep, if the sampler takes as many steps.
      pool: see `pool_of`; a whole pool is drawn, so that its images meet the experts they met.
      decode: turns latents into images; None if the model makes images.
      mesh: see `generate_batches`.

    Returns:
      f32[images, states, H, W, C] and the numbers of the sampler's steps after which the states
      were taken, evenly spread; the last is the finished image. For dopri5, which chooses its own
      steps, the states are evenly spaced in time.
    """
    num = len(next(iter(cond.values())))
    drawn = max(pool, min(SHOWN, num))
    states_of = make_sampler(model, config, return_trajectory=True, pool=pool)

    def sampler(*args: Any) -> np.ndarray:
        found = states_of(*args)
        chosen = np.unique(np.linspace(0, len(found) - 1, states).round().astype(int))
        taken.append(chosen + 1)
        return jnp.moveaxis(found[chosen], 0, 1)

    taken: list[np.ndarray] = []
    first = {name: values[np.arange(drawn) % num] for name, values in cond.items()}
    shape = model.input_shape
    options = {"seed": seed, "batch_size": drawn, "pool": pool, "mesh": mesh}
    film = generate(sampler, variables, first, shape, **options)[: min(SHOWN, num)]
    if decode:
        frames = decode(film.reshape(-1, *film.shape[2:]))
        film = frames.reshape(*film.shape[:2], *frames.shape[1:])
    return film, taken[0]


def save_film(
    film: np.ndarray, steps: np.ndarray, texts: list[str] | None, title: str, path: str
) -> Path:
    """Writes a film of `draw_film`: a GIF, or a filmstrip (.png) with a row for each image.

    Args:
      texts: captions of the images; None for none.
      title: above the filmstrip.
    """
    shown = None if texts is None else texts[: len(film)]
    if Path(path).suffix.lower() == ".gif":
        frames = [
            image_grid(film[:, i], shown, _GIF_COLUMNS, title=f"step {step} of {steps[-1]}")
            for i, step in enumerate(steps)
        ]
        return save_gif(frames, path, _SECONDS)
    rows = None if shown is None else [text for text in shown for _ in steps]
    grid = image_grid(
        film.reshape(-1, *film.shape[2:]),
        rows,
        columns=len(steps),
        title=f"{title}, after step",
        heads=[str(step) for step in steps],
    )
    return save_png(grid, path)
