"""Draws images with a sampler, in batches of a fixed shape, with separate noise for each image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from moe_diffusion.diffusion.samplers import Sampler
from moe_diffusion.errors import UserError
from moe_diffusion.parallel.rules import batch_sharding

_NO_IMAGE = 2**32 - 1  # never the number of an image


def generate(*args: Any, **options: Any) -> np.ndarray:
    """All images of `generate_batches`, which takes the same arguments, as f32[N, H, W, C]."""
    return np.concatenate(list(generate_batches(*args, **options)))


def generate_batches(
    sampler: Sampler,
    variables: Mapping[str, Any],
    cond: Mapping[str, np.ndarray],
    image_shape: tuple[int, int, int],
    *,
    seed: int,
    batch_size: int,
    progress: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
    """Yields samples f32[b, H, W, C] batch by batch, for more images than fit into memory.

    Image i starts from its own noise, drawn with fold_in(key(seed), i). Stochastic samplers draw
    from a second key of image i. So neither N nor batch_size changes image i. Routers that pool a
    batch, like DiffMoE's, are an exception: there the images of a batch compete for experts.

    Args:
      sampler: of `make_sampler`.
      cond: {field: [N, ...]}, the condition of each of the N images. The last batch is filled up
        with repetitions, which are not returned.
      image_shape: (H, W, C), the model's `input_shape`.
      mesh: sampling runs on this mesh, and every batch is split over its devices; batch_size must
        be a multiple of their number. The variables must lie on this mesh.

    Raises:
      UserError: a sample is not finite.
    """
    num = len(next(iter(cond.values())))
    key = jax.random.key(seed)
    key_of_steps = jax.random.fold_in(key, _NO_IMAGE)

    @jax.jit
    @jax.vmap
    def randomness(i):
        noise = jax.random.normal(jax.random.fold_in(key, i), image_shape, jnp.float32)
        return noise, jax.random.fold_in(key_of_steps, i)

    def place(tree: Any) -> Any:
        return tree if mesh is None else jax.device_put(tree, batch_sharding(mesh))

    with tqdm(total=num, unit="image", desc="sampling", disable=not progress) as bar:
        for start in range(0, num, batch_size):
            index = np.arange(start, start + batch_size)
            wanted = {name: jnp.asarray(values[index % num]) for name, values in cond.items()}
            noise, keys = randomness(jnp.asarray(index))
            # The mesh is set only here, because the caller may use another between two batches.
            with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
                batch = sampler(variables, place(noise), place(wanted), place(keys))
            kept = min(batch_size, num - start)
            batch = multihost_utils.process_allgather(batch, tiled=True)[:kept]
            if not np.isfinite(batch).all():
                raise UserError(
                    "samples are not finite: try more steps, less guidance or another ema"
                )
            yield batch
            bar.update(kept)
