"""Reading and writing text encoders: `load("FLUX.1-dev/text_encoder_2")`.

| family       | published as                                         | network     |
|--------------|------------------------------------------------------|-------------|
| `clip_text`  | `text_encoder/` of a pipeline, or a whole CLIP       | `CLIPText`  |
| `t5_encoder` | `text_encoder_2/`, or a whole T5 with its decoder    | `T5Encoder` |

A folder holds config.json, in the names of transformers, and `.safetensors`, in one file or in
shards with their index. Tensors are read and written one at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from moe_diffusion.errors import UserError, check_writable
from moe_diffusion.interop import files, keymap
from moe_diffusion.interop.downloads import check_download
from moe_diffusion.interop.rows import (
    FLAT,
    HEADS_IN,
    HEADS_OUT,
    LINEAR,
    SAME,
    Family,
    Layout,
    Row,
    Slice,
)
from moe_diffusion.interop.tensors import Lazy, Spec, State, joined, without
from moe_diffusion.interop.text_config import REMEDY, config_of, network_from_config
from moe_diffusion.models.parts import compute_dtype
from moe_diffusion.models.text import CLIPText, TextEncoder, TextNetwork
from moe_diffusion.reading import read_table
from moe_diffusion.writing import save_text

WEIGHTS = "model.safetensors"
SHARD_BYTES = 5_000_000_000  # of a written file, as transformers cuts them
_BLOCK = "params/{block}"
_CLIP, _T5 = "text_model.encoder.layers.{i}", "encoder.block.{i}.layer"


def _linear(torch: str, ours: str, layout: Layout = LINEAR) -> tuple[Row, Row]:
    return (
        Row(f"{torch}.weight", f"{ours}/kernel", layout),
        Row(f"{torch}.bias", f"{ours}/bias", SAME),
    )


def _norm(torch: str, ours: str) -> tuple[Row, Row]:
    return Row(f"{torch}.weight", f"{ours}/scale", SAME), Row(f"{torch}.bias", f"{ours}/bias", SAME)


def _qkv(keys: Sequence[str]) -> tuple[Row, ...]:
    """The rows of three projections, which are one leaf here: [D, 3, heads, d]."""
    ours = f"{_BLOCK}/attn/qkv"
    return tuple(
        row
        for number, key in enumerate(keys)
        for row in (
            Row(f"{key}.weight", f"{ours}/kernel", HEADS_OUT, part=Slice(1, number, 1)),
            Row(f"{key}.bias", f"{ours}/bias", FLAT, part=Slice(0, number, 1)),
        )
    )


FAMILIES = {
    "clip_text": Family(
        "clip_text",
        (
            Row("text_model.embeddings.token_embedding.weight", "params/tokens", SAME),
            Row("text_model.embeddings.position_embedding.weight", "params/positions", SAME),
            *_norm(f"{_CLIP}.layer_norm1", f"{_BLOCK}/norm1"),
            *_qkv([f"{_CLIP}.self_attn.{name}_proj" for name in "qkv"]),
            *_linear(f"{_CLIP}.self_attn.out_proj", f"{_BLOCK}/attn/proj", HEADS_IN),
            *_norm(f"{_CLIP}.layer_norm2", f"{_BLOCK}/norm2"),
            *_linear(f"{_CLIP}.mlp.fc1", f"{_BLOCK}/mlp/up"),
            *_linear(f"{_CLIP}.mlp.fc2", f"{_BLOCK}/mlp/down"),
            *_norm("text_model.final_layer_norm", "params/final_norm"),
        ),
        subfolder="text_encoder",
    ),
    "t5_encoder": Family(
        "t5_encoder",
        (
            Row("shared.weight", "params/tokens", SAME),
            Row(
                f"{_T5}.0.SelfAttention.relative_attention_bias.weight".format(i=0),
                "params/position_bias",
                SAME,
            ),
            *_norm(f"{_T5}.0.layer_norm", f"{_BLOCK}/norm1"),
            *_qkv([f"{_T5}.0.SelfAttention.{name}" for name in "qkv"]),
            *_linear(f"{_T5}.0.SelfAttention.o", f"{_BLOCK}/attn/proj", HEADS_IN),
            *_norm(f"{_T5}.1.layer_norm", f"{_BLOCK}/norm2"),
            *_linear(f"{_T5}.1.DenseReluDense.wi_0", f"{_BLOCK}/mlp/gate"),
            *_linear(f"{_T5}.1.DenseReluDense.wi_1", f"{_BLOCK}/mlp/up"),
            *_linear(f"{_T5}.1.DenseReluDense.wo", f"{_BLOCK}/mlp/down"),
            *_norm("encoder.final_layer_norm", "params/final_norm"),
        ),
        subfolder="text_encoder_2",
    ),
}
# Tensors of whole models beside those of the encoder, and a buffer of older files.
_OTHERS = {
    "clip_text": (
        *("vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
        *("text_model.embeddings.position_ids", "embeddings.position_ids"),
    ),
    "t5_encoder": ("decoder.", "lm_head."),
}
_TIED = "encoder.embed_tokens.weight"  # T5's second name of shared.weight


def load(path: str | os.PathLike, dtype: str = "auto") -> TextEncoder:
    """Reads a text encoder; its weights keep the dtype of the file.

    Args:
      path: a folder with config.json and weights, or a weight file with config.json beside it.
      dtype: of the computations; "auto" is bf16 on TPU and GPU, and f32 on CPU.

    Raises:
      UserError: a file is missing or damaged, or it is of no such encoder.
    """
    path = files.find(path)
    described = path.with_name("config.json")
    check_download(described)
    network = network_from_config(read_table(described, REMEDY, "config.json"), str(described))
    state = files.read_state_dict(path)
    return TextEncoder(
        *import_state_dict(state, network.clone(dtype=compute_dtype(dtype))), _name(path)
    )


def save(
    encoder: TextEncoder, folder: str | os.PathLike, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Writes a folder that `load` and transformers' `from_pretrained` read.

    Args:
      shard_bytes: if the weights are larger, they are cut into files of at most so many bytes (or
        one tensor), with an index.

    Returns:
      The files: weights, the index if there is one, and config.json.
    """
    network, folder = encoder.network, Path(folder)
    check_writable(folder)
    leaves = flatten_dict({"params": dict(encoder.params)}, sep="/")
    groups = keymap.entries_by_leaf(FAMILIES[family_of(network)], network, leaves)
    entries = {e.key: e for group in groups.values() for e in group}
    specs = keymap.torch_specs(entries.values(), leaves)
    shards = _shards(specs, shard_bytes)
    names = [WEIGHTS]
    if len(shards) > 1:
        stem = WEIGHTS.removesuffix(".safetensors")
        names = [
            f"{stem}-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)
        ]
    for name, keys in zip(names, shards, strict=True):
        with files.safetensors_writer(folder / name, {key: specs[key] for key in keys}) as write:
            for entry in (entries[key] for key in keys):
                part = np.asarray(leaves[entry.path][(*entry.index, *entry.part)])
                write(entry.key, entry.layout.to_torch(part, network))
    written = [folder / name for name in names]
    if len(shards) > 1:
        table = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(map(_size, specs.values()))
        index = {"metadata": {"total_size": total}, "weight_map": table}
        written.append(
            save_text(json.dumps(index, indent=1) + "\n", folder / f"{WEIGHTS}.index.json")
        )
    config = json.dumps(config_of(network), indent=1) + "\n"
    return [*written, save_text(config, folder / "config.json")]


def import_state_dict(state: State, network: TextNetwork) -> tuple[TextNetwork, dict[str, Any]]:
    """A state dict -> the network with the file's dtype as param_dtype, and its params (numpy).

    The tensors of a whole CLIP or T5 that are not the encoder's are left out.

    Raises:
      UserError: keys are missing, unexpected or misshaped, or T5's two tables differ.
    """
    name = family_of(network)
    state = without(state, _OTHERS[name])
    state = _named_alike(state) if name == "clip_text" else _untied(state)
    network = network.clone(param_dtype=keymap.widest(spec.dtype for spec in state.specs.values()))
    abstract = flatten_dict({"params": nn.meta.unbox(network.abstract_params())}, sep="/")
    return network, keymap.import_tree(state, FAMILIES[name], network, abstract)["params"]


def export_state_dict(params: Mapping[str, Any], network: TextNetwork) -> dict[str, np.ndarray]:
    """params -> state dict under transformers' names; T5's tied table is written once."""
    return keymap.export_tree({"params": params}, FAMILIES[family_of(network)], network)


def family_of(network: TextNetwork) -> str:
    """ "clip_text" or "t5_encoder"."""
    return "clip_text" if isinstance(network, CLIPText) else "t5_encoder"


def _named_alike(state: Lazy) -> Lazy:
    """CLIP's state dict with the prefix that published files have."""
    bare = not any(key.startswith("text_model.") for key in state)
    return joined({"text_model.": state}) if bare else state


def _untied(state: Lazy) -> Lazy:
    """T5's state dict with its table under the name shared.weight alone."""
    if _TIED not in state:
        return state
    if "shared.weight" in state and not np.array_equal(state["shared.weight"], state[_TIED]):
        raise UserError(
            f"shared.weight and {_TIED} differ; T5 encoders with two are not known here"
        )
    rest = {key: spec for key, spec in state.specs.items() if key != _TIED}
    specs = rest | {"shared.weight": state.specs[_TIED]}
    return Lazy(specs, lambda key: state[_TIED if key == "shared.weight" else key])


def _shards(specs: Mapping[str, Spec], most: int) -> list[list[str]]:
    """Keys, in order, in groups of at most so many bytes or one tensor."""
    shards, size = [[]], 0
    for key, spec in specs.items():
        if shards[-1] and size + _size(spec) > most:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += _size(spec)
    return shards


def _size(spec: Spec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def _name(path: Path) -> str:
    """The folder's name, with that of the pipeline before it."""
    folder = path.resolve().parent
    return f"{folder.parent.name}/{folder.name}"
