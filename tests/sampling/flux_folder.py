"""A tiny FLUX.1 as its publishers store it: a folder of diffusers with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_diffusion import interop
from moe_diffusion.interop import files, transfer
from moe_diffusion.models import abstract_variables, build
from tests.interop import pipeline_folder
from tests.pictures import write_autoencoder

SIDE = 16  # pixels of two latents, which are one token
CONFIG = {
    "attention_head_dim": 8,
    "in_channels": 16,  # 2 x 2 latents of 4 channels
    "joint_attention_dim": 16,
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 1,
    "pooled_projection_dim": 16,
    "axes_dims_rope": [2, 4, 2],
}
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def write(folder: Path, guidance: bool = True, dtype: str = "float32") -> Path:
    """transformer/ (two shards) and vae/, beside the tokenizers and encoders of `pipeline_folder`.

    guidance: as [dev], whose texts have 512 tokens; else as [schnell], with 256.
    """
    pipeline_folder.write(folder)
    write_autoencoder(folder / "vae")
    hparams = CONFIG | {"guidance_embeds": guidance}
    model = build(interop.model_config_from_torch("flux_diffusers", hparams))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(jnp.dtype(dtype)),
        abstract_variables(model),
    )
    state = interop.export_state_dict(variables, model, "flux_diffusers")
    place, keys = folder / "transformer", sorted(state)
    for name, part in zip(SHARDS, (keys[::2], keys[1::2]), strict=True):
        files.write_state_dict({key: state[key] for key in part}, place / name)
    index = {key: SHARDS[number % 2] for number, key in enumerate(keys)}
    (place / INDEX).write_text(json.dumps({"weight_map": index}))
    (place / "config.json").write_text(json.dumps(hparams))
    return folder


def convert(folder: Path, workdir: Path) -> Path:
    """The workdir of such a folder."""
    transfer.import_folder("flux_diffusers", folder, workdir)
    return workdir
