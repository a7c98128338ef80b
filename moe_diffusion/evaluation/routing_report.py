"""Draws images with an observed model, and writes a folder of numbers and pictures on its experts.

routing.json            what `RoutingObserver.stats` returns
capacity.png            experts per token by layer, time and class
experts.png             the load of every expert, by layer
experts_over_time.png   the capacity of every expert, by time
experts_by_class.png    how many experts a class uses, and which
tokens.png              the expert of every token of some images
hardest.png             images of the classes that use most experts per token
easiest.png             ... and of those that use fewest
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from PIL import Image

from moe_diffusion.classes import NOTHING, Classes
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.expert_tables import extreme_classes
from moe_diffusion.evaluation.routing_stats import RoutingObserver, save_json
from moe_diffusion.figures import routing as pictures
from moe_diffusion.figures.images import image_grid, is_ours, save_ornament, to_pixels
from moe_diffusion.sampling.generate import generate_batches
from moe_diffusion.sampling.labels import LABEL

MAPS = 4  # images whose tokens are drawn
_MOST_BLOCKS = 4
_MOST_KEPT = 1000  # images in memory, if there are fewer classes

Cond = Mapping[str, np.ndarray]
Decode = Callable[[np.ndarray], np.ndarray]


def chosen_blocks(text: str, blocks: Sequence[int]) -> list[int]:
    """The blocks of a text like "1,7,13", or up to four that are spread evenly over all.

    Args:
      blocks: those with experts.

    Raises:
      UserError: the text names something else.
    """
    if not text:
        places = np.linspace(0, len(blocks) - 1, min(_MOST_BLOCKS, len(blocks)))
        return [blocks[round(place)] for place in places]
    try:
        chosen = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--blocks {text!r} is not a list of numbers like 1,7,13") from None
    bad = [block for block in chosen if block not in blocks]
    if bad:
        raise UserError(
            f"--blocks: block {bad[0]} has no experts; those with experts are "
            f"{', '.join(map(str, blocks))}"
        )
    return list(dict.fromkeys(chosen))


def shuffled(cond: Cond, seed: int) -> dict[str, np.ndarray]:
    """The conditions in random order, so that every batch has many classes.

    DiffMoE pools a batch: images of one class alone would compete for the same experts.
    """
    order = np.random.default_rng(seed).permutation(len(next(iter(cond.values()))))
    return {name: values[order] for name, values in cond.items()}


def draw(
    config: ConfigDict,
    observer: RoutingObserver,
    variables: Mapping[str, Any],
    cond: Cond,
    *,
    seed: int,
    batch_size: int,
    decode: Decode | None = None,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Any], np.ndarray, dict[str, np.ndarray]]:
    """Draws an image for each condition and observes the routing.

    Args:
      observer: of the model; `draw` resets it.
      decode: turns latents into images; None if the model makes images.
      mesh: see `generate_batches`.

    Returns:
      The statistics, and the images kept for pictures with their conditions: the first `MAPS`, and
      the first of every class.
    """
    observer.reset()
    num = len(next(iter(cond.values())))
    sampler = observer.watch(make_sampler(observer, config), num)
    kept = np.arange(num) < MAPS
    if LABEL in cond:
        labels = cond[LABEL]
        each = max(1, min(4, _MOST_KEPT // len(np.unique(labels))))
        kept |= _rank(labels) < each
    images, start = [], 0
    for batch in generate_batches(
        sampler,
        variables,
        cond,
        observer.input_shape,
        seed=seed,
        batch_size=min(batch_size, num),
        progress=True,
        mesh=mesh,
    ):
        batch, start = batch[kept[start : start + len(batch)]], start + len(batch)
        if len(batch):
            images.append(decode(batch) if decode else batch)
    return observer.stats(), np.concatenate(images), {k: v[kept] for k, v in cond.items()}


def write_report(
    folder: str | os.PathLike,
    stats: Mapping[str, Any],
    blocks: Sequence[int],
    images: np.ndarray,
    cond: Cond,
    texts: Sequence[str] | None,
    known: Classes = NOTHING,
) -> tuple[list[str], dict[str, str]]:
    """Writes the files of this module's docstring; a picture that fails is told in a line.

    Args:
      stats: of `draw`.
      blocks: those of the pictures that do not show all.
      images, cond: f32[N, H, W, C] in [-1, 1] and their conditions, of `draw`.
      texts: the captions of the images.
      known: has the names of the classes.

    Returns:
      The names of the files, and of those that were not written: name -> why.
    """
    folder = Path(folder)
    made: dict[str, Callable[[], Image.Image] | str] = {
        "capacity.png": lambda: pictures.capacity_picture(stats),
        "experts.png": lambda: pictures.experts_picture(stats),
        "experts_over_time.png": lambda: pictures.experts_over_time_picture(stats, blocks),
        "experts_by_class.png": "the model takes no labels",
        "tokens.png": "the model does not say where its tokens lie in the image",
    }
    if "per_class" in stats:
        made["experts_by_class.png"] = lambda: pictures.experts_by_class_picture(stats, blocks)
    if "tokens" in stats:
        pixels, _ = to_pixels(images[:MAPS])
        made["tokens.png"] = lambda: pictures.tokens_picture(stats, blocks, pixels, texts)
    made |= _extreme_pictures(stats, images, cond.get(LABEL), known)
    save_json(stats, folder / "routing.json")
    files, missing = ["routing.json"], {}
    for name, draw in made.items():
        if isinstance(draw, str):
            missing[name] = draw
            if is_ours(folder / name):  # of an earlier run
                (folder / name).unlink()
        elif place := save_ornament(draw, folder / name):
            files.append(place.name)
        else:
            missing[name] = "see the warning"
    return files, missing


def _extreme_pictures(
    stats: Mapping[str, Any],
    images: np.ndarray,
    labels: np.ndarray | None,
    known: Classes = NOTHING,
) -> dict[str, Callable[[], Image.Image] | str]:
    """hardest.png and easiest.png, or why there are none."""
    names = "hardest.png", "easiest.png"
    if labels is None:
        return dict.fromkeys(names, "the model takes no labels")
    per_class = stats["per_class"]
    if len(np.unique(labels)) < 2:
        return dict.fromkeys(names, "there is only one class")
    found = extreme_classes(per_class)
    if not found[0]:
        alike = f"all classes use {per_class[str(labels[0])]:.4g} experts per token"
        return dict.fromkeys(names, alike)
    rank = _rank(labels)
    made = {}
    for name, classes, what in zip(names, found, ("hardest", "easiest"), strict=True):
        columns = min(sum(labels == int(c)) for c in classes)
        rows = [np.flatnonzero((labels == int(c)) & (rank < columns)) for c in classes]
        texts = [
            f"{known.name(int(c))}: {per_class[c]:.3f}" for c in classes for _ in range(columns)
        ]
        made[name] = partial(
            image_grid,
            images[np.concatenate(rows)],
            texts,
            columns=columns if columns > 1 else 5,
            title=f"the {what} classes: experts per token (C_infer)",
        )
    return made


def _rank(labels: np.ndarray) -> np.ndarray:
    """i64[N]: how many of the earlier labels are the same."""
    seen: dict[int, int] = {}
    ranks = []
    for label in labels.tolist():
        ranks.append(seen.get(label, 0))
        seen[label] = ranks[-1] + 1
    return np.array(ranks)
