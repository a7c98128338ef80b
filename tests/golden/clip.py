"""Checks of whole CLIPs: vectors, preprocessing, and weights there and back."""

from __future__ import annotations

import numpy as np

from moe_diffusion.interop import clip as interop
from moe_diffusion.models.clip import CLIPEncoder

from . import probe


def check(case, family: str) -> None:
    """All stored results of the case."""
    state = case.tensors("weights")
    network = interop.network_from_config(case.config["model"])
    network, params = interop.import_state_dict(state, network)
    back = interop.export_state_dict(params, network)
    assert set(back) == set(state)
    for key, tensor in state.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)

    preprocess = interop.preprocessing(case.config["preprocessor"], network.image.side)
    pictures = [case[key] for key in sorted(case.arrays) if key.startswith("in/picture_")]
    pixels = np.concatenate([preprocess(picture[None]) for picture in pictures])
    np.testing.assert_allclose(pixels, case.image("in/pixel_values"), atol=1e-5)

    tower = probe.jit(network.image.apply)({"params": params["image"]}, pixels)
    compare(case, "mid/image_pooled", tower)
    clip = CLIPEncoder(network, params, lambda texts, length: case["in/input_ids"], preprocess)
    compare(case, "out/text_embeds", clip.of_texts(["a"]))
    found = np.concatenate([clip.of_pictures(picture[None]) for picture in pictures])
    compare(case, "out/image_embeds", found)
    case.assert_all_compared()


def compare(case, key: str, ours) -> None:
    np.testing.assert_allclose(ours, case[key], atol=1e-4, rtol=1e-4, err_msg=key)
    case.seen(key)
