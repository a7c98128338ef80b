"""Images from a model: batches of fixed shape, seeds per image, on one device or many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from moe_diffusion import config as configs
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.figures import image_grid, save_png
from moe_diffusion.models import abstract_variables, build
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.parallel.rules import batch_sharding
from moe_diffusion.training.checkpoint import restore_for_inference
from moe_diffusion.training.state import TrainState

_NO_IMAGE = 2**32 - 1  # never the number of an image


def load_workdir(
    workdir: str | os.PathLike,
    overrides: tuple[str, ...] = (),
    *,
    step: int | None = None,
    ema: str | None = None,
) -> tuple[ConfigDict, nn.Module, dict[str, Any], dict[str, Any]]:
    """Config, model, variables, and a note of what they are {"step", "ema"}, of a trained run.

    ema: decay as text; None takes the first that the run keeps, "none" the live weights.
    Raises UserError where a file is missing, damaged or of another model.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is not a workdir (it has no config.json): train into it first")
    config = configs.load_json(path, overrides)
    if ema is None:
        ema = str(config.ema.decays[0]) if config.ema.decays else "none"
    average = None if ema == "none" else ema
    params, router_state, step = restore_for_inference(workdir, step, average)
    variables = {"params": params, "router_state": router_state}
    model = build(config.model)
    _check_fits(model, variables, path)
    return config, model, variables, {"step": step, "ema": ema}


def _check_fits(model: nn.Module, variables: dict[str, Any], path: Path) -> None:
    """Raises a UserError unless the arrays are those of the model that `path` describes."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}

    wanted, found = shapes(abstract_variables(model)), shapes(variables)
    # A router without a state leaves alone what another kept.
    names = wanted.keys() | {name for name in found if name.startswith("params/")}
    wrong = sorted(name for name in names if wanted.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        raise UserError(
            f"the checkpoint is of another model than {path} and --config describe; {len(wrong)} "
            f"arrays differ: {first} is {found.get(first, 'absent')}, should be "
            f"{wanted.get(first, 'absent')}: use the config that it was trained with"
        )


def generate(
    sampler: Callable,
    variables: Mapping[str, Any],
    labels: np.ndarray,
    image_shape: tuple[int, int, int],
    *,
    seed: int,
    batch_size: int,
    progress: bool = False,
) -> np.ndarray:
    """Samples f32[N, H, W, C], one for every label i32[N]: `generate_batches` in one array."""
    batches = generate_batches(
        sampler, variables, labels, image_shape, seed=seed, batch_size=batch_size, progress=progress
    )
    return np.concatenate(list(batches))


def generate_batches(
    sampler: Callable,
    variables: Mapping[str, Any],
    labels: np.ndarray,
    image_shape: tuple[int, int, int],
    *,
    seed: int,
    batch_size: int,
    progress: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[np.ndarray]:
    """Samples f32[b, H, W, C] batch by batch, for more images than fit into memory.

    sampler: of `make_sampler`. Image i starts from noise of its own, fold_in(key(seed), i), and has
    a key of its own for the noise of stochastic samplers, so that neither N nor batch_size changes
    it (but where a router pools the batch, as DiffMoE does, images of a batch compete for experts).
    The last batch is filled up with repetitions.
    mesh: splits every batch over its devices; batch_size must be a multiple of their number.
    """
    key = jax.random.key(seed)
    key_of_steps = jax.random.fold_in(key, _NO_IMAGE)

    @jax.jit
    @jax.vmap
    def randomness(i):
        noise = jax.random.normal(jax.random.fold_in(key, i), image_shape, jnp.float32)
        return noise, jax.random.fold_in(key_of_steps, i)

    def place(array: jax.Array) -> jax.Array:
        return array if mesh is None else jax.device_put(array, batch_sharding(mesh))

    with tqdm(total=len(labels), unit="image", desc="sampling", disable=not progress) as bar:
        for start in range(0, len(labels), batch_size):
            index = np.arange(start, start + batch_size)
            wanted = labels[index % len(labels)]
            noise, keys = randomness(jnp.asarray(index))
            batch = sampler(
                variables, place(noise), place(jnp.asarray(wanted, jnp.int32)), place(keys)
            )
            kept = min(batch_size, len(labels) - start)
            batch = multihost_utils.process_allgather(batch, tiled=True)[:kept]
            if not np.isfinite(batch).all():
                raise UserError(
                    "samples are not finite: try more steps, less guidance or another ema"
                )
            yield batch
            bar.update(kept)


def spread_labels(num: int, num_classes: int) -> np.ndarray:
    """`num` labels over the classes as evenly as possible, in order: 0 0 .. 1 1 .."""
    return (np.arange(num) * min(num, num_classes) // num).astype(np.int32)


def averaged_variables(config: ConfigDict, state: TrainState) -> dict[str, Any]:
    """What a hook applies the model to: the first average, or the live weights without one."""
    decays = config.ema.decays
    # By name: a restored or compiled state lists its averages alphabetically.
    average = state.emas[str(decays[0])] if decays else {}
    return {
        "params": average.get("params", state.params),
        "router_state": average.get("router_state") or state.router_state,
    }


class SampleHook:
    """A hook of the training loop: draws the same noise at intervals, so that one sees it learn.

    Writes workdir/samples/<step>.png from the first average (or the live weights).
    decode: makes images of latents.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: nn.Module,
        workdir: str | os.PathLike,
        decode: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self._config, self._folder = config, Path(workdir) / "samples"
        self._decode = decode
        self._sampler = make_sampler(model, config)
        self._labels = spread_labels(config.train.samples, config.model.num_classes)
        self._shape = (config.model.image_size, config.model.image_size, config.model.channels)

    def __call__(self, step: int, state: TrainState) -> dict[str, np.ndarray]:
        images = generate(
            self._sampler,
            averaged_variables(self._config, state),
            self._labels,
            self._shape,
            seed=self._config.seed,
            batch_size=len(self._labels),
        )
        images = self._decode(images) if self._decode else images
        picture = image_grid(images, self._labels, title=f"step {step}")
        if is_main_process():
            save_png(picture, self._folder / f"{step:08d}.png")
        return {"samples": np.asarray(picture)}
