"""Reading whole CLIPs, towers and projections: `load("clip-vit-large-patch14")`.

A folder holds, as transformers publishes it:

| file                                               | what it is                            |
|----------------------------------------------------|---------------------------------------|
| `config.json`                                      | with `text_config`, `vision_config`   |
| `model.safetensors`, or `pytorch_model.bin`        | weights; also in shards with an index |
| `tokenizer.json`, or `vocab.json` and `merges.txt` | see `interop.tokens`                  |
| `preprocessor_config.json`                         | see `preprocessing`; may be absent    |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from moe_diffusion.errors import UserError, shown
from moe_diffusion.interop import files, keymap, text
from moe_diffusion.interop.downloads import check_download
from moe_diffusion.interop.rows import LINEAR, PATCHES, SAME, Family, Row
from moe_diffusion.interop.tensors import Lazy, State, lazy, without
from moe_diffusion.interop.text_config import network_from_config as text_network
from moe_diffusion.interop.tokens import open_tokenizer
from moe_diffusion.models.clip import CLIP, CLIPEncoder, CLIPImage, Preprocessing
from moe_diffusion.models.parts import compute_dtype
from moe_diffusion.models.text import CLIPText
from moe_diffusion.reading import Key, check_keys, read_table

REMEDY = "restore the file that was published with the CLIP"
PREPROCESSOR = "preprocessor_config.json"
_BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
_SIZE = Key((int,), least=1, most=1 << 24)
# What transformers takes for keys that a config.json leaves out.
_TEXT = {"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048}
_TEXT |= {"num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77}
_TEXT |= {"hidden_act": "quick_gelu"}
_IMAGE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_IMAGE |= {"num_attention_heads": 12, "image_size": 224, "patch_size": 32, "num_channels": 3}
_IMAGE |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_IMAGE_KEYS = {name: _SIZE for name, value in _IMAGE.items() if isinstance(value, int)}
_IMAGE_KEYS |= {"hidden_act": Key((str,)), "layer_norm_eps": Key((float,), least=0, most=1)}
_NUMBERS = Key((list,), least=3, most=3, items=Key((float,)))
_PICTURES = {"image_mean": _NUMBERS, "image_std": _NUMBERS, "resample": Key((int,))}


def _of_tower(name: str, row: Row) -> Row:
    """A row of CLIP's text encoder for a tower; the path of a block begins with its name."""
    ours = row.ours if "{block}" in row.ours else row.ours.replace("/", f"/{name}/", 1)
    torch = row.torch if name == "text" else row.torch.replace("text_model", "vision_model")
    return row._replace(torch=torch, ours=ours, kind=name)


_SHARED = text.FAMILIES["clip_text"].rows
_EMBEDDINGS = "vision_model.embeddings"
FAMILY = Family(
    "clip",
    (
        *(_of_tower("text", row) for row in _SHARED),
        *(_of_tower("image", row) for row in _SHARED if "{block}" in row.ours),
        Row(f"{_EMBEDDINGS}.class_embedding", "params/image/class_token", SAME),
        Row(f"{_EMBEDDINGS}.patch_embedding.weight", "params/image/patches/kernel", PATCHES),
        Row(f"{_EMBEDDINGS}.position_embedding.weight", "params/image/positions", SAME),
        # The name is misspelt in every published file.
        Row("vision_model.pre_layrnorm.weight", "params/image/first_norm/scale", SAME),
        Row("vision_model.pre_layrnorm.bias", "params/image/first_norm/bias", SAME),
        Row("vision_model.post_layernorm.weight", "params/image/final_norm/scale", SAME),
        Row("vision_model.post_layernorm.bias", "params/image/final_norm/bias", SAME),
        Row("text_projection.weight", "params/text_projection/kernel", LINEAR),
        Row("visual_projection.weight", "params/image_projection/kernel", LINEAR),
        Row("logit_scale", "params/logit_scale", SAME),
    ),
)


def load(path: str | os.PathLike, dtype: str = "auto") -> CLIPEncoder:
    """Reads a CLIP; its weights keep the dtype of the file.

    Args:
      path: a folder as above, or a weight file with the others beside it.
      dtype: of the computations; "auto" is bf16 on TPU and GPU, and f32 on CPU.

    Raises:
      UserError: a file is missing or damaged, or it is of no such CLIP.
    """
    path = files.find(path)
    folder = path if path.is_dir() else path.parent
    described = folder / "config.json"
    check_download(described)
    network = network_from_config(read_table(described, REMEDY, "config.json"), str(described))
    told = folder / PREPROCESSOR
    table = read_table(told, REMEDY, PREPROCESSOR) if told.exists() else None
    preprocess = preprocessing(table, network.image.side, str(told))
    tokenizer = open_tokenizer(folder)
    if len(tokenizer) > network.text.vocab_size:
        raise UserError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens, the CLIP knows only "
            f"{network.text.vocab_size}: take both from one folder"
        )
    state = files.read_state_dict(path)
    network, params = import_state_dict(state, _computing(network, str(compute_dtype(dtype))))
    return CLIPEncoder(network, params, tokenizer, preprocess, folder.resolve().name)


def import_state_dict(state: State, network: CLIP) -> tuple[CLIP, dict[str, Any]]:
    """A state dict -> the network with the file's dtype as param_dtype, and its params (numpy).

    Raises:
      UserError: keys are missing, unexpected or misshaped; one error names all.
    """
    state = _scalar(without(lazy(state), _BUFFERS))
    stored = keymap.widest(spec.dtype for spec in state.specs.values())
    network = network.clone(param_dtype=stored)
    abstract = flatten_dict({"params": nn.meta.unbox(network.abstract_params())}, sep="/")
    return network, keymap.import_tree(state, FAMILY, network, abstract)["params"]


def export_state_dict(params: Mapping[str, Any], network: CLIP) -> dict[str, np.ndarray]:
    """params -> state dict under transformers' names."""
    return keymap.export_tree({"params": params}, FAMILY, network)


def network_from_config(config: Mapping[str, Any], where: str = "config.json") -> CLIP:
    """The network that a config.json of transformers describes.

    Args:
      where: the file, for messages.

    Raises:
      UserError: it is of another architecture, lacks a tower, or a value cannot be.
    """
    for name in ("text_config", "vision_config"):
        if not isinstance(config.get(name), Mapping):
            raise UserError(
                f"{where} has no table {name}, so it is of no whole CLIP: name the folder of one, "
                "like clip-vit-large-patch14"
            )
    texts = text_network({"text_config": _TEXT | dict(config["text_config"])}, where)
    if not isinstance(texts, CLIPText):
        raise UserError(f"{where}: text_config is of a T5, not of a CLIP: {REMEDY}")
    sizes = _IMAGE | dict(config["vision_config"])
    place = f"{where}: vision_config"
    check_keys(sizes, _IMAGE_KEYS, place, REMEDY)
    width, heads, act = (sizes[k] for k in ("hidden_size", "num_attention_heads", "hidden_act"))
    if act not in ("quick_gelu", "gelu"):
        raise UserError(f"hidden_act {shown(act)} of {place} is not known: quick_gelu or gelu is")
    if width % heads:
        raise UserError(f"{place}: num_attention_heads {heads} does not divide {width}: {REMEDY}")
    if sizes["image_size"] % sizes["patch_size"] or sizes["num_channels"] != 3:
        raise UserError(
            f"{place}: {sizes['num_channels']} channels of {sizes['image_size']} pixels in patches "
            f"of {sizes['patch_size']} are not known here: 3, and a multiple, are"
        )
    check_keys({"projection_dim": 512} | dict(config), {"projection_dim": _SIZE}, where, REMEDY)
    images = CLIPImage(
        hidden_size=width,
        mlp_hidden_size=sizes["intermediate_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=heads,
        head_dim=width // heads,
        eps=sizes["layer_norm_eps"],
        act=act,
        side=sizes["image_size"],
        patch=sizes["patch_size"],
        channels=sizes["num_channels"],
        preset="dp",
    )
    texts = texts.clone(preset="dp")
    return CLIP(text=texts, image=images, size=config.get("projection_dim", 512))


def _computing(network: CLIP, dtype: str) -> CLIP:
    towers = {name: getattr(network, name).clone(dtype=dtype) for name in ("text", "image")}
    return network.clone(dtype=dtype, **towers)


def preprocessing(
    table: Mapping[str, Any] | None, side: int, where: str = PREPROCESSOR
) -> Preprocessing:
    """What a preprocessor_config.json says; without one, what OpenAI's say.

    Args:
      side: pixels of a side that the network sees.
      where: the file, for messages.

    Raises:
      UserError: it says something else than resizing, cropping to `side` and normalizing.
    """
    usual = Preprocessing(shortest=side, crop=side)
    if table is None:
        return usual
    table = {"image_mean": usual.mean, "image_std": usual.std, "resample": 3} | dict(table)
    check_keys(table, _PICTURES, where, REMEDY)
    shortest = _side(table.get("size", side), "shortest_edge", f"{where}: size")
    crop = _side(table.get("crop_size", side), "height", f"{where}: crop_size")
    steps = ("resize", "center_crop", "rescale", "normalize")
    told = [f"do_{name} is false" for name in steps if not table.get(f"do_{name}", True)]
    told += [f"resample is {table['resample']}"] * (table["resample"] != 3)
    told += [f"crop_size is {crop}"] * (crop != side)
    told += ["image_std is not positive"] * (min(table["image_std"]) <= 0)
    if told:
        raise UserError(
            f"{where}: {told[0]}; known here are bicubic resizing (3), the middle {side} pixels "
            f"and normalizing: {REMEDY}"
        )
    return Preprocessing(shortest, crop, tuple(table["image_mean"]), tuple(table["image_std"]))


def _side(value: Any, name: str, where: str) -> int:
    """A number of pixels, or that of a table: under a name, and of its width if it has one."""
    if isinstance(value, Mapping):
        sides = {value.get(key) for key in (name, "width") if key in value}
        value = sides.pop() if len(sides) == 1 else None
    _SIZE.check(value, where, REMEDY)
    return value


def _scalar(state: Lazy) -> Lazy:
    """The state dict with logit_scale of no axis; some files have it with one of length 1."""
    spec = state.specs.get("logit_scale")
    if spec is None or spec.shape != (1,):
        return state
    specs = state.specs | {"logit_scale": spec._replace(shape=())}
    return Lazy(specs, lambda key: state[key].reshape(specs[key].shape))
