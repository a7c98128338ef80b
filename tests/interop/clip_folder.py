"""A tiny CLIP as its publishers store it: config.json, model.safetensors and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from moe_diffusion.interop import clip, files
from tests.interop import pipeline_folder, torch_file

SIDE, LENGTH = 16, 12


def config(vocab_size: int, eos: int) -> dict:
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    text = tower | {"vocab_size": vocab_size, "max_position_embeddings": LENGTH}
    image = tower | {"image_size": SIDE, "patch_size": 8, "num_channels": 3}
    text["eos_token_id"] = eos
    return {"text_config": text, "vision_config": image, "projection_dim": 8}


def write(folder: Path, weights: str = "model.safetensors") -> Path:
    """The folder, with weights of normal noise."""
    pipeline_folder.clip_tokenizer(folder)
    tokens = json.loads((folder / "vocab.json").read_text())
    table = config(len(tokens), tokens["<|endoftext|>"])
    network = clip.network_from_config(table)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32),
        nn.meta.unbox(network.abstract_params()),
    )
    state = clip.export_state_dict(params, network)
    if weights.endswith(".safetensors"):
        files.write_state_dict(state, folder / weights)
    else:
        torch_file.save(folder / weights, state)
    (folder / "config.json").write_text(json.dumps(table))
    return folder
