"""What the files of drawn images say about how they came to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from moe_diffusion import __version__
from moe_diffusion.sampling.prompts import GUIDANCE

TOP_K = "top_k"  # experts that a token chooses, of a model in which it does
_SAID = ("sampler", "steps", "cfg")  # keys of the section `sampling`
Text = dict[str, str]


def settings_text(
    config: ConfigDict,
    note: Mapping[str, Any],
    seed: int,
    pixels: tuple[int, int],
    cond: Mapping[str, np.ndarray],
) -> Text:
    """How all images of a call were drawn, as fields of a PNG: model, step, seed, steps, size, ...

    Args:
      note: of `load_workdir`.
      pixels: (height, width) of the images.
      cond: {field: [N, ...]} of the images. A guidance scale is told if all have the same.
    """
    fields = {"seed": seed, **{key: config.sampling[key] for key in _SAID}}
    scales = np.unique(np.asarray(cond.get(GUIDANCE, ())))
    if len(scales) == 1:
        fields[GUIDANCE] = f"{scales[0]:g}"
    if TOP_K in config.model.router:
        fields[TOP_K] = config.model.router[TOP_K]
    fields |= {"size": f"{pixels[0]}x{pixels[1]}", "model": config.name, **note}
    return {name: str(value) for name, value in (fields | {"version": __version__}).items()}


def title_of(config: ConfigDict, fields: Mapping[str, str], *more: str) -> str:
    """The line above a picture: model, checkpoint, guidance and sampler.

    Args:
      fields: of `settings_text`.
      more: fields that the line also tells.
    """
    parts = [config.name, f"step {fields['step']}", f"ema {fields['ema']}"]
    parts += [f"cfg {config.sampling.cfg:g}", f"{fields['sampler']} {fields['steps']}"]
    told = [name for name in (GUIDANCE, *more) if name in fields]
    return ", ".join([*parts, *(f"{name.replace('_', '-')} {fields[name]}" for name in told)])


def image_texts(settings: Text, subjects: Sequence[str] | None, kind: str, num: int) -> list[Text]:
    """The fields of every image's own file: its number, its prompt or its label, and `settings`.

    Args:
      subjects: what every image was drawn for; None if that is no text.
      kind: "prompt" or "label".
    """
    drawn = [{} for _ in range(num)] if subjects is None else [{kind: text} for text in subjects]
    return [{**own, "image": str(i), **settings} for i, own in enumerate(drawn)]


def stored_fields(cond: Mapping[str, np.ndarray], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """What an array file holds beside images for prompts: the prompts, and the numbers of `cond`.

    The states of text encoders are left out: they are megabytes an image, and follow from the
    prompts.
    """
    kept = {name: v for name, v in cond.items() if v.ndim == 1 or v.dtype.kind in "iub"}
    return kept | {"prompts": np.array(list(prompts))}
