"""Which expert every token of some images uses, by layer and time, for the sliders of a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from moe_diffusion.classes import of_run
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import observed
from moe_diffusion.evaluation.routing_report import MAPS, draw
from moe_diffusion.evaluation.routing_stats import RoutingObserver
from moe_diffusion.figures.images import to_pixels
from moe_diffusion.interop import autoencoder as autoencoders
from moe_diffusion.reporting.pictures import bytes_of, data_uri
from moe_diffusion.reporting.runs import Run
from moe_diffusion.sampling.conditions import captions, conditions_of_run
from moe_diffusion.sampling.load import load_workdir

IMAGES = 8  # drawn; the first `MAPS` are shown
TIMES = 10
_MOST = 400_000  # tokens of all maps of a run, a byte each
_PICTURE = 60_000  # bytes of an image


def expert_maps(run: Run) -> dict[str, Any]:
    """Draws images with the newest checkpoint of a run, and hears its routers.

    Returns:
      JSON values: pictures and captions of `MAPS` images; layers, times and experts, the numbers;
      rows and columns of tokens; strongest, base64 of u8[images, layers, times, rows, columns], one
      more than the expert with the largest weight, 0 for none; used, the same for the number of
      experts, null where it is the same everywhere; load [layers][times][experts], 1 = average;
      note, of what was drawn.

    Raises:
      UserError: there is no checkpoint, the model has no experts that can be watched or says not
        where its tokens lie, or images cannot be drawn without more than the run has.
    """
    if not run.checkpoints:
        raise UserError("it has no checkpoint")
    config, model, variables, note = load_workdir(run.folder)
    if not any(layer.sees_image for layer in observed.expert_layers(model)):
        raise UserError("the model has no experts that can be watched")
    if not hasattr(model, "grid"):
        raise UserError("the model does not say where its tokens lie in the image")
    known, told = of_run(run.folder), f"step {note['step']:,}, average {note['ema']}"
    decode = None
    try:
        autoencoder = autoencoders.for_config(config)
        decode = autoencoder.decode if autoencoder else None
    except UserError:
        told += "; latents, since the autoencoder is not there"
    cond = conditions_of_run(config, model, IMAGES, known)
    observer = RoutingObserver(model, MAPS, map_times=TIMES)
    options = {"seed": config.seed, "batch_size": IMAGES, "decode": decode}
    stats, images, _ = draw(config, observer, variables, cond, None, **options)
    pixels, shown = to_pixels(images[:MAPS])
    texts = captions(model, {name: values[:MAPS] for name, values in cond.items()}, known)
    found = told_of(stats, backwards=config.diffusion.path == "ddpm")
    count = len(found.pop("chosen"))
    return found | {
        "pictures": [data_uri(Image.fromarray(pixel), _PICTURE) for pixel in pixels[:count]],
        "captions": texts[:count] if texts else [f"image {i + 1}" for i in range(count)],
        "note": ", ".join(filter(None, [told, shown])),
    }


def told_of(stats: dict[str, Any], backwards: bool = False) -> dict[str, Any]:
    """The maps and loads of `RoutingObserver.stats`, thinned to a size that a page can have.

    backwards: large times are noise, as of DDPM's steps.
    """
    tokens, tables = stats["tokens"], stats.get("conditional", stats)
    strongest, used = np.asarray(tokens["strongest"]), np.asarray(tokens["used"])
    size = strongest[0, 0, 0].size
    layers, times = np.arange(strongest.shape[1]), np.arange(strongest.shape[2])
    images = np.arange(len(strongest))

    def total() -> int:
        return size * len(layers) * len(times) * len(images)

    while total() > _MOST and max(len(layers), len(times), len(images)) > 1:
        # What there is most of is halved first; ends stay.
        if len(layers) > max(4, len(times)):
            layers = _half(layers)
        elif len(times) > 3:
            times = _half(times)
        elif len(images) > 1:
            images = images[: len(images) // 2]
        else:
            layers = _half(layers)
    order = times[::-1] if backwards else times
    chosen = np.ix_(images, layers, order)
    strongest, used = strongest[chosen], used[chosen]
    names = [tokens["blocks"][layer] for layer in layers]
    when = [tokens["times"][place] for place in order]
    # A page has a byte for a token; of so many experts the last share a colour.
    return {
        "chosen": images.tolist(),
        "layers": [str(name) for name in names],
        "times": [float(f"{time:.4g}") for time in when],
        "backwards": backwards,
        "experts": stats["num_experts"],
        "rows": strongest.shape[3],
        "columns": strongest.shape[4],
        "strongest": bytes_of(np.minimum(strongest + 1, 255)),
        "used": bytes_of(np.minimum(used, 255)) if np.ptp(used) else None,
        "most_used": int(used.max()),
        "load": _loads(stats, tables, names, when),
    }


def _half(places: np.ndarray) -> np.ndarray:
    """Half of them, the first and the last among them where more than one stays."""
    kept = np.linspace(0, len(places) - 1, max(1, len(places) // 2)).round().astype(int)
    return places[np.unique(kept)]


def _loads(
    stats: dict[str, Any], tables: dict[str, Any], names: Sequence[Any], when: Sequence[float]
) -> list[list[list[float]]]:
    """[layers][times][experts]: share of a layer's assignments times the number of experts."""
    share, seen = np.asarray(tables["share_by_time"]), np.asarray(tables["times"])
    layers = [stats["blocks"].index(name) for name in names]
    times = [int(np.abs(seen - time).argmin()) for time in when]
    load = stats["num_experts"] * share[np.ix_(layers, times)]
    return [[[float(f"{x:.3g}") for x in experts] for experts in row] for row in load]
