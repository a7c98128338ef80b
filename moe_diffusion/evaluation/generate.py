"""Images from a model: batches of fixed shape, seeds per image, on one device or many."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from moe_diffusion import config as configs
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.figures import image_grid, save_png
from moe_diffusion.models import abstract_variables, build
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.training.checkpoint import restore_for_inference
from moe_diffusion.training.state import TrainState


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
    """Samples f32[N, H, W, C], one for every label i32[N].

    sampler: of `make_sampler`. Image i starts from noise of its own, fold_in(key(seed), i), so that
    neither N nor batch_size changes it (but where a router pools the batch, as DiffMoE does, images
    of a batch compete for experts). The last batch is filled up with repetitions.
    """
    key = jax.random.key(seed)
    noise = jax.jit(
        jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), image_shape, jnp.float32))
    )
    images = []
    with tqdm(total=len(labels), unit="image", desc="sampling", disable=not progress) as bar:
        for start in range(0, len(labels), batch_size):
            index = np.arange(start, start + batch_size)
            wanted = labels[index % len(labels)]
            batch = sampler(variables, noise(jnp.asarray(index)), jnp.asarray(wanted, jnp.int32))
            kept = min(batch_size, len(labels) - start)
            images.append(multihost_utils.process_allgather(batch, tiled=True)[:kept])
            bar.update(kept)
    images = np.concatenate(images)
    if not np.isfinite(images).all():
        raise UserError("samples are not finite: try more steps, less guidance or another ema")
    return images


def spread_labels(num: int, num_classes: int) -> np.ndarray:
    """`num` labels over the classes as evenly as possible, in order: 0 0 .. 1 1 .."""
    return (np.arange(num) * min(num, num_classes) // num).astype(np.int32)


class SampleHook:
    """A hook of the training loop: draws the same noise at intervals, so that one sees it learn.

    Writes workdir/samples/<step>.png from the first average (or the live weights).
    """

    def __init__(self, config: ConfigDict, model: nn.Module, workdir: str | os.PathLike):
        self._config, self._folder = config, Path(workdir) / "samples"
        self._sampler = make_sampler(model, config)
        self._labels = spread_labels(config.train.samples, config.model.num_classes)
        self._shape = (config.model.image_size, config.model.image_size, config.model.channels)

    def __call__(self, step: int, state: TrainState) -> dict[str, np.ndarray]:
        average = next(iter(state.emas.values()), {})
        images = generate(
            self._sampler,
            {
                "params": average.get("params", state.params),
                "router_state": average.get("router_state") or state.router_state,
            },
            self._labels,
            self._shape,
            seed=self._config.seed,
            batch_size=len(self._labels),
        )
        picture = image_grid(images, self._labels, title=f"step {step}")
        if is_main_process():
            save_png(picture, self._folder / f"{step:08d}.png")
        return {"samples": np.asarray(picture)}
