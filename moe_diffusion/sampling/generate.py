"""Draws images with a sampler, in batches of a fixed shape, with separate noise for each image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from moe_diffusion.diffusion.samplers import Sampler
from moe_diffusion.errors import UserError
from moe_diffusion.moe import routers
from moe_diffusion.parallel.mesh import num_batch_shards
from moe_diffusion.parallel.rules import batch_sharding

_NO_IMAGE = 2**32 - 1  # never the number of an image


def pool_of(config: ConfigDict, drawn: int) -> int:
    """How many images compete for experts in samples of a run; 0 where no image meets another.

    Args:
      drawn: images drawn together, which are the pool if `sampling.pool` is 0.
    """
    router = routers.find(config.model.router.name)
    pools = router is not None and router.group_matters and config.model.router.group != "sample"
    return (config.sampling.pool or drawn) if pools else 0


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
    pool: int = 0,
    start: int = 0,
    progress: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
    """Yields samples f32[b, H, W, C] batch by batch, for more images than fit into memory.

    Image i starts from its own noise, drawn with fold_in(key(seed), i). Stochastic samplers draw
    from a second key of image i. So neither N nor batch_size nor the mesh changes image i. Routers
    that pool images, like DiffMoE's, are an exception: there image i competes for experts with the
    others of its pool, the images k * pool to (k + 1) * pool - 1. Every device draws whole pools.

    Args:
      sampler: of `make_sampler`.
      cond: {field: [N, ...]}, the condition of each of the N images. The last batch is filled up
        with repetitions, which are not returned.
      image_shape: (H, W, C), the model's `input_shape`.
      batch_size: images drawn together. It is raised to the next multiple of the devices, or to
        that of one pool for each device.
      pool: the sampler's, see `pool_of`.
      start: number of the first image to draw, the first of a pool; those before it are left out.
      mesh: sampling runs on this mesh, and every batch is split over its devices. The variables
        must lie on this mesh.

    Raises:
      UserError: a sample is not finite.
    """
    num = len(next(iter(cond.values())))
    together = max(pool, 1) * (num_batch_shards(mesh) if mesh is not None else 1)
    batch_size = -(-batch_size // together) * together
    key = jax.random.key(seed)
    key_of_steps = jax.random.fold_in(key, _NO_IMAGE)

    placed = None if mesh is None else batch_sharding(mesh)

    @partial(jax.jit, out_shardings=placed)  # device_put takes no keys to several processes
    @jax.vmap
    def randomness(i):
        noise = jax.random.normal(jax.random.fold_in(key, i), image_shape, jnp.float32)
        return noise, jax.random.fold_in(key_of_steps, i)

    told = {"total": num, "initial": start, "unit": "image", "desc": "sampling"}
    with tqdm(disable=not progress, **told) as bar:
        for first in range(start, num, batch_size):
            index = np.arange(first, first + batch_size)
            wanted = {name: values[index % num] for name, values in cond.items()}
            noise, keys = randomness(index)
            # The mesh is set only here, because the caller may use another between two batches.
            with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
                batch = sampler(variables, noise, jax.device_put(wanted, placed), keys)
            kept = min(batch_size, num - first)
            batch = multihost_utils.process_allgather(batch, tiled=True)[:kept]
            if not np.isfinite(batch).all():
                raise UserError(
                    "samples are not finite: try more steps, less guidance or another ema"
                )
            yield batch
            bar.update(kept)
