"""Autoencoder files: three layouts, what tells them apart, and what is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.interop import autoencoder as interop
from moe_diffusion.interop import files, keymap
from moe_diffusion.models.autoencoder import Autoencoder, AutoencoderKL

TINY = AutoencoderKL(block_channels=(4, 8, 8), layers_per_block=1, norm_groups=2)
LAYOUTS = ("native", "diffusers", "diffusers_old")


@pytest.fixture(scope="module")
def autoencoder():
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(0)
    return Autoencoder(
        TINY, jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    )


@pytest.fixture
def folder(autoencoder, tmp_path):
    interop.save(autoencoder, tmp_path / "vae-tiny")
    return tmp_path / "vae-tiny"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_there_and_back(autoencoder, layout):
    state = interop.export_state_dict(autoencoder.params, TINY, layout)
    assert interop.layout_of(state) == layout
    params = interop.import_state_dict(state, TINY)
    assert Autoencoder(TINY, params).fingerprint == autoencoder.fingerprint
    assert len(state) == len(jax.tree.leaves(params))


def test_names_are_those_of_the_published_files():
    """One of every kind; `sd-vae-ft-mse` has 248 tensors, with old names of the attention."""
    network = AutoencoderKL()
    shapes = interop.abstract_params(network)
    names = {
        layout: {
            entry.path.removeprefix("params/"): entry.key
            for entry in keymap.entries(interop.family(layout, network), network, shapes)
        }
        for layout in LAYOUTS
    }
    assert {len(set(found.values())) for found in names.values()} == {len(shapes)} == {248}
    published = {
        "decoder/level_3/block_2/conv_1/kernel": (
            "decoder.up.3.block.2.conv2.weight",
            "decoder.up_blocks.0.resnets.2.conv2.weight",
            "decoder.up_blocks.0.resnets.2.conv2.weight",
        ),
        "encoder/level_1/block_0/shortcut/bias": (
            "encoder.down.1.block.0.nin_shortcut.bias",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        ),
        "encoder/mid/attn/out/kernel": (
            "encoder.mid.attn_1.proj_out.weight",
            "encoder.mid_block.attentions.0.to_out.0.weight",
            "encoder.mid_block.attentions.0.proj_attn.weight",
        ),
        "decoder/norm_out/scale": (
            "decoder.norm_out.weight",
            "decoder.conv_norm_out.weight",
            "decoder.conv_norm_out.weight",
        ),
        "quant/bias": ("quant_conv.bias",) * 3,
    }
    for path, keys in published.items():
        assert tuple(names[layout][path] for layout in LAYOUTS) == keys


def test_folder_file_and_name(autoencoder, folder):
    for path in (folder, folder / interop.WEIGHTS):
        loaded = interop.load(path)
        assert loaded.fingerprint == autoencoder.fingerprint and loaded.name == "vae-tiny"
        assert loaded.network == TINY


@pytest.mark.parametrize(
    ("kind", "scale", "shift"), [("sd", 0.18215, 0.0), ("flux", 0.3611, 0.1159)]
)
def test_a_bare_file_is_told_by_its_channels(kind, scale, shift, monkeypatch, tmp_path):
    narrow = {"block_channels": (32, 32, 32, 32), "layers_per_block": 1}
    monkeypatch.setitem(interop.KINDS, kind, interop.KINDS[kind] | narrow)
    network = AutoencoderKL(**interop.KINDS[kind])
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 8, 8, 3)))["params"]
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    state = interop.export_state_dict(params, network, "native")
    state["loss.logvar"] = np.zeros(1, np.float32)  # as CompVis's file has it
    files.write_state_dict(state, tmp_path / "ae.safetensors")
    for given in ("auto", kind):
        loaded = interop.load(tmp_path / "ae.safetensors", given)
        assert (loaded.network.scale, loaded.network.shift, loaded.name) == (scale, shift, "ae")
    other = {"sd": "flux", "flux": "sd"}[kind]
    with pytest.raises(UserError, match=f"{network.latent_channels} latent channels .*'{other}'"):
        interop.load(tmp_path / "ae.safetensors", other)
    with pytest.raises(UserError, match="kind 'vq' is unknown; known: auto, sd, flux"):
        interop.load(tmp_path / "ae.safetensors", "vq")


def test_flux_in_its_own_names():
    params = {"in_channels": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 16}
    network = interop.network_from_config(params | {"scale_factor": 0.3611, "shift_factor": 0.1159})
    assert network.block_channels == (32, 64) and not network.quant_conv
    with pytest.raises(UserError, match="config.json lacks latent_channels, block_out_channels"):
        interop.network_from_config({"in_channels": 3})


def test_wrong_files_are_refused(autoencoder, folder, tmp_path):
    with pytest.raises(UserError, match="no weight file at"):
        interop.load(tmp_path / "nothing.safetensors")
    state = interop.export_state_dict(autoencoder.params, TINY, "diffusers")
    state["decoder.conv_in.bias"] = np.zeros(3, np.float32)
    state["extra"] = state.pop("quant_conv.bias")
    with pytest.raises(UserError, match=r"1 missing: quant_conv.bias; 1 unexpected: extra; 1 miss"):
        interop.import_state_dict(state, TINY)
    files.write_state_dict({"w": np.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no KL autoencoder: the file has none of the keys"):
        interop.load(tmp_path / "other.safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        interop.load(folder)


def test_the_config_and_its_autoencoder(autoencoder, folder, tmp_path):
    config = configs.default()
    assert interop.for_config(config) is None
    config.data.autoencoder = str(folder)
    assert interop.for_config(config).fingerprint == autoencoder.fingerprint
    config.model.channels = 16
    with pytest.raises(UserError, match=r"4 latent channels, the model 16 \(model.channels\)"):
        interop.for_config(config)
    config.model.channels = 4
    config.data.source = f"latents:{tmp_path}"
    manifest = {"format": 1, "count": 1, "num_classes": 3, "shape": [8, 8, 4], "moments": True}
    manifest |= {"flip": False, "scale": 1.0, "shift": 0.0}
    manifest["shards"] = [{"file": "a.array_record", "count": 1, "bytes": 1}]
    for name in (autoencoder.fingerprint, "0123456789abcdef"):
        made_by = {"name": "sd-vae", "fingerprint": name}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"autoencoder": made_by}))
        if name == autoencoder.fingerprint:
            assert interop.for_config(config).name == "vae-tiny"
    with pytest.raises(UserError, match=r"encoded by another autoencoder \(sd-vae, 0123456789ab"):
        interop.for_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": None}, "config.json: scaling_factor is None, not a number: no such"),
        ({"scaling_factor": 0}, "config.json: scaling_factor is 0, outside"),
        ({"latents_mean": [0.5] * 4}, "has latents_mean or latents_std, .* are not supported"),
        ({"latents_std": [1.0, 1, 1, 2]}, "has latents_mean or latents_std"),
        ({"block_out_channels": [4, 10**9, 8]}, r"block_out_channels\[1\] is 1000000000, outside"),
        ({"block_out_channels": [4, 8, 9]}, "9 channels do not split into 2 groups"),
        ({"layers_per_block": "1"}, "layers_per_block is '1', not an integer"),
        ({"_class_name": "AutoencoderKLWan"}, "_class_name is 'AutoencoderKLWan', not Autoencod"),
        ({"act_fn": "relu"}, "act_fn is 'relu', not silu"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False, not True"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv is False, not True"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types are not 3 times"),
    ],
)
def test_a_config_that_cannot_be_honoured(change, message, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        interop.load(folder)


def test_a_config_with_what_changes_nothing(autoencoder, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"shift_factor": None, "force_upcast": True}
    for mean, std in ((None, None), ([0.0] * 4, [1.0] * 4)):
        path.write_text(json.dumps(config | {"latents_mean": mean, "latents_std": std}))
        assert interop.load(folder).fingerprint == autoencoder.fingerprint
