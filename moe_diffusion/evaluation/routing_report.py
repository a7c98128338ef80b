"""Draws images with an observed model, and writes a folder of numbers and pictures on its experts.

routing.json            what `RoutingObserver.stats` returns
blocks.png              how much every block changes its input, by class and time
groups.png              which blocks of a group are passed, by class and time
capacity.png            experts per token by layer, time and class
experts.png             the load of every expert, by layer
experts_over_time.png   the capacity of every expert, by time
experts_by_class.png    how many experts a class uses, and which
selection.png           how often every expert is chosen, by image, time and token
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

from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.categories import Categories
from moe_diffusion.evaluation.expert_tables import extreme_classes
from moe_diffusion.evaluation.observed import ExpertLayer
from moe_diffusion.evaluation.routing_stats import RoutingObserver, save_json
from moe_diffusion.figures import blocks as block_pictures
from moe_diffusion.figures import routing as pictures
from moe_diffusion.figures.images import image_grid, is_ours, save_ornament, to_pixels
from moe_diffusion.sampling.generate import generate_batches

MAPS = 4  # images whose tokens are drawn
_MOST_BLOCKS = 4
_MOST_KEPT = 1000  # images in memory, if there are fewer classes

_NO_EXPERTS = "the model has no experts that can be watched"

Cond = Mapping[str, np.ndarray]
Made = dict[str, Callable[[], Image.Image] | str]  # file -> what draws it, or why nothing does
Decode = Callable[[np.ndarray], np.ndarray]


def chosen_blocks(text: str, layers: Sequence[ExpertLayer]) -> list[int | str]:
    """The names of the layers of a text like "1,7,13" or "3 image,3 text".

    A number stands for all layers of its block. Without a text they are up to four, spread evenly
    over those that see the image.

    Args:
      layers: those with experts.

    Raises:
      UserError: the text names something else.
    """
    names = [layer.name for layer in layers]
    if not text:
        names = [layer.name for layer in layers if layer.sees_image]
        places = np.linspace(0, len(names) - 1, min(_MOST_BLOCKS, len(names)))
        return [names[round(place)] for place in places]
    chosen: list[int | str] = []
    for part in map(str.strip, text.split(",")):
        number, _, stream = part.partition(" ")
        if not number.isdecimal():
            raise UserError(f"--blocks {text!r} is not a list of numbers like 1,7,13")
        wanted = f"{int(number)} {stream}".strip()
        found = [n for n in names if str(n) == wanted or f"{n}".startswith(f"{wanted} ")]
        if not found:
            raise UserError(
                f"--blocks: block {wanted} has no experts that can be watched; those that have are "
                f"{', '.join(map(str, names)) or 'none'}"
            )
        chosen += found
    return list(dict.fromkeys(chosen))


def shuffled(num: int, seed: int) -> np.ndarray:
    """A random order of the images, i64[num], so that every batch has many classes.

    DiffMoE pools a batch: images of one class alone would compete for the same experts.
    """
    return np.random.default_rng(seed).permutation(num)


def draw(
    config: ConfigDict,
    observer: RoutingObserver,
    variables: Mapping[str, Any],
    cond: Cond,
    categories: Categories | None,
    *,
    seed: int,
    batch_size: int,
    decode: Decode | None = None,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Draws an image for each condition and observes the routing.

    Args:
      observer: of the model; `draw` resets it.
      categories: of the images; None if they have none.
      decode: turns latents into images; None if the model makes images.
      mesh: see `generate_batches`.

    Returns:
      The statistics, the images kept for pictures, and bool[N], which these are: the first `MAPS`,
      and the first of every class.
    """
    observer.reset()
    num = len(next(iter(cond.values())))
    sampler = observer.watch(make_sampler(observer, config), num, categories)
    kept = np.arange(num) < MAPS
    if categories:
        each = max(1, min(4, _MOST_KEPT // len(np.unique(categories.of))))
        kept |= _rank(categories.of) < each
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
    return observer.stats(), np.concatenate(images), kept


def write_report(
    folder: str | os.PathLike,
    stats: Mapping[str, Any],
    images: np.ndarray,
    categories: Categories | None,
    texts: Sequence[str] | None,
) -> tuple[list[str], dict[str, str]]:
    """Writes the files of this module's docstring; a picture that fails is told in a line.

    Args:
      stats: of `draw`.
      images, categories: f32[N, H, W, C] in [-1, 1] and their categories, of `draw`.
      texts: the captions of the images.

    Returns:
      The names of the files, and of those that were not written: name -> why.
    """
    folder = Path(folder)
    made = _expert_pictures(stats, images, texts) | _extreme_pictures(stats, images, categories)
    made["blocks.png"] = partial(block_pictures.blocks_picture, stats)
    made["groups.png"] = "the model has no groups of blocks"
    if "groups" in stats:
        made["groups.png"] = partial(block_pictures.groups_picture, stats)
    if "layers" not in stats:
        made["blocks.png"] = made["groups.png"] = "the model does not say what its blocks are"
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


def _expert_pictures(
    stats: Mapping[str, Any], images: np.ndarray, texts: Sequence[str] | None
) -> Made:
    """The pictures of experts but the extremes, or why there are none."""
    names = ("capacity", "experts", "experts_over_time", "experts_by_class", "selection", "tokens")
    if not stats["blocks"]:
        return dict.fromkeys((f"{name}.png" for name in names), _NO_EXPERTS)
    blocks = stats.get("looked_into", stats["blocks"])
    made: Made = {
        "capacity.png": lambda: pictures.capacity_picture(stats),
        "experts.png": lambda: pictures.experts_picture(stats),
        "experts_over_time.png": lambda: pictures.experts_over_time_picture(stats, blocks),
        "experts_by_class.png": "the model takes no labels and no prompts",
        "selection.png": "no image had a condition",
        "tokens.png": "the model does not say where its tokens lie in the image",
    }
    if "per_class" in stats:
        made["experts_by_class.png"] = lambda: pictures.experts_by_class_picture(stats, blocks)
    if "looked_into" in stats:
        made["selection.png"] = lambda: block_pictures.selection_picture(stats)
    if "tokens" in stats:
        pixels, _ = to_pixels(images[:MAPS])
        seen = [block for block in blocks if block in stats["tokens"]["blocks"]]
        made["tokens.png"] = "the chosen layers see no tokens of the image"
        if seen:
            made["tokens.png"] = lambda: pictures.tokens_picture(stats, seen, pixels, texts)
    return made


def _extreme_pictures(
    stats: Mapping[str, Any], images: np.ndarray, categories: Categories | None
) -> Made:
    """hardest.png and easiest.png, or why there are none."""
    names = "hardest.png", "easiest.png"
    if not stats["blocks"]:
        return dict.fromkeys(names, _NO_EXPERTS)
    if categories is None:
        return dict.fromkeys(names, "the model takes no labels and no prompts")
    per_class, of = stats["per_class"], categories.of
    if len(np.unique(of)) < 2:
        return dict.fromkeys(names, "there is only one class")
    found = extreme_classes(per_class)
    if not found[0]:
        alike = f"all classes use {per_class[categories.names[of[0]]]:.4g} experts per token"
        return dict.fromkeys(names, alike)
    rank = _rank(of)
    made: Made = {}
    for name, classes, what in zip(names, found, ("hardest", "easiest"), strict=True):
        numbers = [categories.names.index(c) for c in classes]
        columns = min(sum(of == c) for c in numbers)
        rows = [np.flatnonzero((of == c) & (rank < columns)) for c in numbers]
        texts = [
            f"{categories.shown[number]}: {per_class[c]:.3f}"
            for number, c in zip(numbers, classes, strict=True)
            for _ in range(columns)
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
