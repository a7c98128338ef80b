"""Reading and writing autoencoders: `load("sd-vae-ft-ema/")`, `load("ae.safetensors")`.

Three layouts of the same network: `native` (CompVis, FLUX.1's ae.safetensors), `diffusers`, and
`diffusers_old`, whose attention has other names (the published sd-vae-ft-* files).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from moe_diffusion.data import latents
from moe_diffusion.errors import UserError, shown
from moe_diffusion.interop import files, keymap
from moe_diffusion.interop.rows import CONV, CONV_1X1, LINEAR, SAME, Family, Row
from moe_diffusion.interop.tensors import lazy, without
from moe_diffusion.models.autoencoder import Autoencoder, AutoencoderKL
from moe_diffusion.reading import Key, check_keys, key_like, read_table
from moe_diffusion.writing import save_text

WEIGHTS = "diffusion_pytorch_model.safetensors"  # beside config.json in a folder of diffusers
# The kinds of bare weight files. The papers' models see (z - shift) * scale.
KINDS = {
    "sd": {"latent_channels": 4, "quant_conv": True, "scale": 0.18215, "shift": 0.0},
    "flux": {"latent_channels": 16, "quant_conv": False, "scale": 0.3611, "shift": 0.1159},
}
_OTHER = "no such KL autoencoder is known; restore the file, or take another"
_WIDTH, _LAYERS_IN = Key((int,), least=1, most=1 << 14), Key((int,), least=1, most=64)
_SCALE = Key((float,), least=1e-6, most=1e6)
_SHIFT = Key((float,), least=-1e6, most=1e6)
_PER_CHANNEL = Key((list, type(None)), None, most=1 << 14, items=Key((float,)))
_FLUX = {
    **dict.fromkeys(("in_channels", "z_channels", "ch"), _WIDTH),
    "ch_mult": Key((list,), least=1, most=12, items=_LAYERS_IN),
    "num_res_blocks": _LAYERS_IN,
    "scale_factor": _SCALE,
    "shift_factor": _SHIFT,
}
_DIFFUSERS = {
    **dict.fromkeys(("in_channels", "latent_channels"), _WIDTH),
    "block_out_channels": Key((list,), least=1, most=12, items=_WIDTH),
    "layers_per_block": _LAYERS_IN,
    "norm_num_groups": Key((int,), 32, least=1, most=1 << 14),
    "use_quant_conv": key_like(True),
    "use_post_quant_conv": key_like(True),
    "scaling_factor": dataclasses.replace(_SCALE, default=1.0),
    "shift_factor": Key((float, type(None)), None, least=-1e6, most=1e6),
    "latents_mean": _PER_CHANNEL,
    "latents_std": _PER_CHANNEL,
}
_IGNORED = ("loss.", "model_ema.")  # tensors of the training, in CompVis's own checkpoints

# Our layer -> native and diffusers' name. {side} is encoder or decoder; {l} counts levels from the
# highest resolution, {r} from the lowest; {j} counts blocks from 0, {n} from 1.
_LAYERS = {
    "quant": ("quant_conv",) * 2,
    "post_quant": ("post_quant_conv",) * 2,
    "{side}/conv_in": ("{side}.conv_in",) * 2,
    "{side}/norm_out": ("{side}.norm_out", "{side}.conv_norm_out"),
    "{side}/conv_out": ("{side}.conv_out",) * 2,
    "{side}/mid/block_{j}": ("{side}.mid.block_{n}", "{side}.mid_block.resnets.{j}"),
    "{side}/mid/attn": ("{side}.mid.attn_1", "{side}.mid_block.attentions.0"),
    "encoder/level_{l}/block_{j}": (
        "encoder.down.{l}.block.{j}", "encoder.down_blocks.{l}.resnets.{j}",
    ),
    "encoder/level_{l}/down": (
        "encoder.down.{l}.downsample.conv", "encoder.down_blocks.{l}.downsamplers.0.conv",
    ),
    "decoder/level_{l}/block_{j}": (
        "decoder.up.{l}.block.{j}", "decoder.up_blocks.{r}.resnets.{j}",
    ),
    "decoder/level_{l}/up": (
        "decoder.up.{l}.upsample.conv", "decoder.up_blocks.{r}.upsamplers.0.conv",
    ),
}  # fmt: skip
# What is inside a residual block, and inside the attention, by layout.
_BLOCK = {"norm_0": "norm1", "conv_0": "conv1", "norm_1": "norm2", "conv_1": "conv2"}
_ATTENTION = {
    "native": {"norm": "norm", "q": "q", "k": "k", "v": "v", "out": "proj_out"},
    "diffusers": {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
    "diffusers_old": {
        "norm": "group_norm", "q": "query", "k": "key", "v": "value", "out": "proj_attn",
    },
}  # fmt: skip
# Layout -> a key that only this layout has.
_MARKS = {
    "native": "encoder.mid.attn_1.q.weight",
    "diffusers": "encoder.mid_block.attentions.0.to_q.weight",
    "diffusers_old": "encoder.mid_block.attentions.0.query.weight",
}


def load(path: str | os.PathLike, kind: str = "auto") -> Autoencoder:
    """Reads an autoencoder.

    Args:
      path: a weight file (.safetensors, .pt, .pth), a folder of diffusers, or a whole pipeline with
        a subfolder `vae`. A config.json of diffusers beside the weights gives the network, scale
        and shift.
      kind: "sd" | "flux" for a file without config.json; "auto" goes by the latent channels.

    Raises:
      UserError: there is no such file, it is not an autoencoder, or its keys do not fit.
    """
    path = Path(path)
    if (path / "vae").is_dir():
        path = path / "vae"
    if path.is_dir():
        path = path / WEIGHTS
    described = path.with_name("config.json")
    state = files.read_state_dict(path)
    if described.is_file() and kind == "auto":
        network = network_from_config(read_table(described, "restore it"), str(described))
    else:
        network = _guess(state, kind, path)
    return Autoencoder(network, import_state_dict(state, network), _name(path))


def for_config(config: ConfigDict, path: str | None = None) -> Autoencoder | None:
    """The autoencoder that decodes what the config's model generates.

    Args:
      path: weights; None takes `data.autoencoder`.

    Returns:
      The autoencoder, or None if the path is "".

    Raises:
      UserError: it cannot be read, does not fit the model's channels, or is not the one that made
        the latents of `data.source` (if those are on this machine).
    """
    path = config.data.autoencoder if path is None else path
    if not path:
        return None
    autoencoder = load(path)
    if autoencoder.latent_channels != config.model.channels:
        raise UserError(
            f"the autoencoder {path} has {autoencoder.latent_channels} latent channels, the model "
            f"{config.model.channels} (model.channels): choose another data.autoencoder"
        )
    kind, _, folder = config.data.source.partition(":")
    if kind == "latents" and (Path(folder) / latents.MANIFEST).is_file():
        made_by = latents.read_manifest(folder)["autoencoder"]
        if made_by["fingerprint"] != autoencoder.fingerprint:
            raise UserError(
                f"{folder} was encoded by another autoencoder ({made_by['name']}, "
                f"{made_by['fingerprint']}) than {path} ({autoencoder.fingerprint}): change "
                "data.autoencoder, or prepare the latents again"
            )
    return autoencoder


def save(autoencoder: Autoencoder, folder: str | os.PathLike) -> None:
    """Writes a folder that `load` and diffusers' AutoencoderKL.from_pretrained read."""
    network, folder = autoencoder.network, Path(folder)
    levels = len(network.block_channels)
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": network.channels,
        "out_channels": network.channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(network.block_channels),
        "layers_per_block": network.layers_per_block,
        "latent_channels": network.latent_channels,
        "norm_num_groups": network.norm_groups,
        "scaling_factor": network.scale,
        "shift_factor": network.shift,
        "use_quant_conv": network.quant_conv,
        "use_post_quant_conv": network.quant_conv,
    }
    state = export_state_dict(autoencoder.params, network, "diffusers")
    files.write_state_dict(state, folder / WEIGHTS)
    save_text(json.dumps(config, indent=1) + "\n", folder / "config.json")


def network_from_config(config: Mapping[str, Any], where: str = "config.json") -> AutoencoderKL:
    """The network of a config in diffusers' names, or in those of FLUX.1's `AutoEncoderParams`.

    Args:
      where: the file, for messages.

    Raises:
      UserError: it is of no KL autoencoder, a value cannot be, or it has a network or a scale per
        channel (latents_mean, latents_std) that `AutoencoderKL` has not.
    """
    if "ch_mult" in config:
        check_keys(config, _FLUX, where, _OTHER)
        network = AutoencoderKL(
            channels=config["in_channels"],
            latent_channels=config["z_channels"],
            block_channels=tuple(config["ch"] * factor for factor in config["ch_mult"]),
            layers_per_block=config["num_res_blocks"],
            quant_conv=False,
            scale=config["scale_factor"],
            shift=config["shift_factor"],
        )
    else:
        check_keys(config, _DIFFUSERS, where, _OTHER)
        _check_supported(config, where)
        network = AutoencoderKL(
            channels=config["in_channels"],
            latent_channels=config["latent_channels"],
            block_channels=tuple(config["block_out_channels"]),
            layers_per_block=config["layers_per_block"],
            norm_groups=config.get("norm_num_groups", 32),
            quant_conv=config.get("use_quant_conv", True),
            scale=config.get("scaling_factor", KINDS["sd"]["scale"]),
            shift=config.get("shift_factor") or 0.0,
        )
    if uneven := [width for width in network.block_channels if width % network.norm_groups]:
        raise UserError(
            f"{where}: {uneven[0]} channels do not split into {network.norm_groups} groups: "
            f"{_OTHER}"
        )
    return network


def _check_supported(config: Mapping[str, Any], where: str) -> None:
    """Refuses what changes the meaning of weights and has no counterpart in `AutoencoderKL`."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if any(mean or ()) or any(value != 1 for value in std or ()):
        raise UserError(
            f"{where} has latents_mean or latents_std, a shift and scale for every channel, which "
            "are not supported: take an autoencoder with scaling_factor alone"
        )
    quant = config.get("use_quant_conv", True)
    for key, wanted in (
        ("_class_name", "AutoencoderKL"),
        ("act_fn", "silu"),
        ("mid_block_add_attention", True),
        ("use_post_quant_conv", quant),
    ):
        if config.get(key, wanted) != wanted:
            raise UserError(f"{where}: {key} is {shown(config[key])}, not {wanted}: {_OTHER}")
    for key, kind in (("down_block_types", "DownEncoder"), ("up_block_types", "UpDecoder")):
        levels = len(config["block_out_channels"])
        if config.get(key, [f"{kind}Block2D"] * levels) != [f"{kind}Block2D"] * levels:
            raise UserError(f"{where}: {key} are not {levels} times {kind}Block2D: {_OTHER}")


def import_state_dict(state: Mapping[str, Any], network: AutoencoderKL) -> dict[str, Any]:
    """PyTorch's state dict of any layout -> the network's params, f32 numpy leaves.

    Raises:
      UserError: an unknown layout, or keys missing, unexpected or misshaped (all in one error).
    """
    table, abstract = family(layout_of(state), network), abstract_params(network)
    return keymap.import_tree(without(state, _IGNORED), table, network, abstract)["params"]


def export_state_dict(
    params: Mapping[str, Any], network: AutoencoderKL, layout: str
) -> dict[str, np.ndarray]:
    """params -> state dict under the names of "native" | "diffusers" | "diffusers_old"."""
    return keymap.export_tree({"params": params}, family(layout, network), network)


def family(layout: str, network: AutoencoderKL) -> Family:
    """The key map of a layout: a row for every tensor that the network may have."""
    attention = CONV_1X1 if layout == "native" else LINEAR
    shortcut = {"shortcut": "nin_shortcut" if layout == "native" else "conv_shortcut"}
    levels, blocks = range(len(network.block_channels)), range(network.layers_per_block + 1)
    rows = {}  # by our path, because a layer without {l} and {j} comes up several times
    for side, level, j in itertools.product(("encoder", "decoder"), levels, blocks):
        at = {"side": side, "l": level, "r": levels[-1] - level, "j": j, "n": j + 1}
        for ours, names in _LAYERS.items():
            kernel, pieces = CONV, {"": ""}
            if ours.endswith("block_{j}"):
                pieces = _BLOCK | shortcut
            elif ours.endswith("attn"):
                kernel, pieces = attention, _ATTENTION[layout]
            for our_piece, their_piece in pieces.items():
                path = f"params/{ours.format(**at)}/{our_piece}".rstrip("/")
                key = f"{names[layout != 'native'].format(**at)}.{their_piece}".rstrip(".")
                rows |= {
                    f"{path}/kernel": Row(f"{key}.weight", f"{path}/kernel", kernel),
                    f"{path}/scale": Row(f"{key}.weight", f"{path}/scale", SAME),
                    f"{path}/bias": Row(f"{key}.bias", f"{path}/bias", SAME),
                }
    return Family(f"autoencoder, {layout}", tuple(rows.values()))


def abstract_params(network: AutoencoderKL) -> dict[str, jax.ShapeDtypeStruct]:
    """Path ("params/...") and shape of every parameter."""
    image = jax.ShapeDtypeStruct((1, network.factor, network.factor, network.channels), np.float32)
    abstract = jax.eval_shape(network.init, jax.random.key(0), image)
    return flatten_dict({"params": abstract["params"]}, sep="/")


def layout_of(state: Mapping[str, Any]) -> str:
    """The layout whose names a state dict has. Raises UserError if it has those of none."""
    for layout, mark in _MARKS.items():
        if mark in state:
            return layout
    raise UserError(
        "this is no KL autoencoder: the file has none of the keys " + ", ".join(_MARKS.values())
    )


def _guess(state: Mapping[str, Any], kind: str, path: Path) -> AutoencoderKL:
    """The network of a bare weight file."""
    if kind not in (*KINDS, "auto"):
        raise UserError(f"autoencoder kind '{kind}' is unknown; known: auto, {', '.join(KINDS)}")
    layout_of(state)
    channels = lazy(state).specs["decoder.conv_in.weight"].shape[1]
    fitting = [name for name, fixed in KINDS.items() if fixed["latent_channels"] == channels]
    if not fitting or kind not in (fitting[0], "auto"):
        raise UserError(
            f"{path} has {channels} latent channels and is no '{kind}' autoencoder: put its "
            "diffusers config.json beside it"
        )
    return AutoencoderKL(**KINDS[fitting[0]])


def _name(path: Path) -> str:
    """The name that people use: that of a diffusers folder, or of the file."""
    if path.name == WEIGHTS:
        folder = path.resolve().parent
        return folder.parent.name if folder.name == "vae" else folder.name
    return path.stem
