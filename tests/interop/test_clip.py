"""Whole CLIPs in transformers' folders: what is read, and what is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from moe_diffusion.errors import UserError
from moe_diffusion.interop import clip
from moe_diffusion.models.clip import Preprocessing
from tests.interop import clip_folder, torch_clip


@pytest.mark.slow
def test_a_folder_and_what_it_computes(tmp_path):
    """Weights of either kind of file; vectors have length 1, whatever comes with them."""
    folder = clip_folder.write(tmp_path / "a")
    found = clip.load(folder)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    texts, images = found.of_texts(["seven", "a three"]), found.of_pictures(pictures)
    assert texts.shape == (2, 8) and images.shape == (3, 8) and found.name == "a"
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.of_texts(["a three"]), texts[1:], atol=1e-6)
    np.testing.assert_allclose(found.of_pictures(pictures[2:]), images[2:], atol=1e-6)
    old = clip.load(clip_folder.write(tmp_path / "b", "pytorch_model.bin"))
    assert old.fingerprint == found.fingerprint
    grey = found.preprocess(pictures[..., :1])
    np.testing.assert_array_equal(grey, found.preprocess(pictures[..., :1].repeat(3, -1)))


def test_one_error_names_all_that_does_not_fit(tmp_path):
    folder = clip_folder.write(tmp_path / "a")
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"] = state["visual_projection.weight"][:, :4]
    state["decoder.weight"] = state.pop("vision_model.pre_layrnorm.bias")
    state |= {f"{name}_model.embeddings.position_ids": np.zeros(2) for name in ("text", "vision")}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError) as raised:
        clip.load(folder)
    message = str(raised.value)
    assert "1 missing: vision_model.pre_layrnorm.bias; 1 unexpected: decoder.weight" in message
    assert "1 misshaped: visual_projection.weight (file (8, 4), model (8, 16))" in message


def changed(tower, **values):
    table = clip_folder.config(40, 39)
    table[f"{tower}_config"] |= values
    return table


@pytest.mark.parametrize(
    "table, message",
    [
        ({"text_config": {}}, "has no table vision_config, so it is of no whole CLIP"),
        (changed("vision", hidden_act="relu"), "hidden_act 'relu' of x: vision_config is not kno"),
        (changed("vision", num_attention_heads=3), "num_attention_heads 3 does not divide 16"),
        (changed("vision", patch_size=7), "3 channels of 16 pixels in patches of 7 are not known"),
        (changed("vision", hidden_size="16"), "hidden_size is '16', not an integer"),
        (changed("text", vocab_size=0), "vocab_size is 0, outside 1"),
    ],
)
def test_configs_that_are_refused(table, message):
    with pytest.raises(UserError, match=message):
        clip.network_from_config(table, "x")


def test_what_configs_leave_out():
    """CLIP's ViT-B/32, which transformers has as defaults; another crop is another network's."""
    network = clip.network_from_config({"text_config": {}, "vision_config": {}})
    assert (network.size, network.image.side, network.image.patch, network.image.depth) == (
        512, 224, 32, 12
    )  # fmt: skip
    assert network.text.vocab_size == 49408 and network.text.hidden_size == 512
    assert clip.preprocessing(None, 32) == Preprocessing(32, 32)
    assert clip.preprocessing({"size": 40, "crop_size": 32}, 32) == Preprocessing(40, 32)
    for table, message in (
        ({"do_resize": False}, "do_resize is false; known here are bicubic"),
        ({"crop_size": 33}, "crop_size is 33"),
        ({"size": {"shortest_edge": 32, "width": 30}}, "size is None, not an integer"),
        ({"image_mean": [1]}, "image_mean has 1 items"),
        ({"resample": 2}, "resample is 2"),
    ):
        with pytest.raises(UserError, match=message):
            clip.preprocessing(table, 32)


def test_the_weights_of_the_published_ones():
    """ViT-L/14 has 427.6M, as transformers counts them."""
    image = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    image |= {"num_hidden_layers": 24, "patch_size": 14}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    table = {"text_config": text, "vision_config": image, "projection_dim": 768}
    leaves = jax.tree.leaves(nn.meta.unbox(clip.network_from_config(table).abstract_params()))
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves) == 427_616_513


@pytest.mark.slow
def test_the_same_as_transformers(tmp_path):
    pytest.importorskip("transformers")
    stored = torch_clip.write(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    network = clip.network_from_config(json.loads((tmp_path / "config.json").read_text()))
    network, params = clip.import_state_dict(state, network)
    pixels = np.moveaxis(stored["in/pixel_values"], 1, -1)
    texts, images = network.apply({"params": params}, stored["in/input_ids"], pixels)
    for found, name in ((texts, "text"), (images, "image")):
        found = found / np.linalg.norm(found, axis=-1, keepdims=True)
        np.testing.assert_allclose(found, stored[f"out/{name}_embeds"], atol=1e-4, rtol=1e-4)
