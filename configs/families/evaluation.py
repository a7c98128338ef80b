"""What the evaluation protocols of several papers share."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import protocol as protocols

ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"


def adm_suite() -> ConfigDict:
    """Samples as 8-bit images, judged by ADM's evaluator (arXiv 2105.05233): all five metrics.

    Classes are drawn at random, as in `sample_ddp.py` of DiT and its descendants, which compute in
    float32 and allow TF32.
    """
    protocol = protocols.default()
    protocol.labels = "random"
    protocol.model = {"dtype": "float32"}
    protocol.matmul = "tf32"
    protocol.resize, protocol.quantize = "tensorflow", "round"
    protocol.score = "adm"
    protocol.reference = ADM_REFERENCE
    protocol.ema = "0.9999"
    return protocol


def features_of_decoder() -> ConfigDict:
    """Inception features of what the decoder puts out, never rounded (`sample_ddp_feature.py`).

    The images are resized as in pytorch-fid, but the reference statistics were made with
    TensorFlow's resizing. So the numbers differ a little from those of ADM's evaluator.

    The papers publish more than FIDs: Inception Score, precision and recall in DiffMoE's Table 2,
    Inception Score in DSMoE's Tables 2 and 3. The code does not tell how these were made. Its
    `evaluation/fid.py` gives FID alone. Its `evaluation/evaluator.py`, an altered copy of ADM's,
    takes Inception Score, precision and recall of the same stored features, and no sFID.
    """
    protocol = adm_suite()
    protocol.resize, protocol.quantize = "pytorch-fid", "none"
    protocol.autoencoder = "sd-vae-ft-mse"
    return protocol


def two_passes() -> dict[str, Any]:
    """Guidance of the flows' samplers: a pass for each half, at all times, on all channels."""
    return {"cfg_interval": (0.0, 1.0), "cfg_channels": 0, "joint": False}


def forward_with_cfg() -> dict[str, Any]:
    """Guidance of DiT and its descendants: one pass for both halves, on three of the channels."""
    return {"cfg_interval": (0.0, 1.0), "cfg_channels": 3, "joint": True}


def diffmoe_suite(
    sampling: dict[str, Any], decoder: str, pool: int, cfg: float, tables: str
) -> ConfigDict:
    """How DiffMoE's models were measured (arXiv 2503.14487 and its `sample_ddp_feature.py`).

    The tokens of `pool` images compete for experts, without a bound on what an expert takes. The
    script's pool is the batch of one device, 125 in the README's command.

    Args:
      sampling: keys of the section `sampling`, without the pool.
      decoder: mse | ema. Section 3, Tables 10 and 11 are of ft-mse; Tables 2 and 13 to 15 of
        ft-ema (appendix E.1).
      tables: of the paper, for the source.

    Raises:
      UserError: the pool is empty.
    """
    if pool < 1:
        raise UserError(f"batch={pool} is no pool of images: it must be at least 1")
    protocol = features_of_decoder()
    protocol.source = f"arXiv 2503.14487, {tables}; DiffMoE/sample_ddp_feature.py and its README"
    protocol.sampling = {**sampling, "pool": pool}
    protocol.model.router = {"max_capacity": 0.0}
    protocol.cfg = (cfg,)
    protocol.batch_size = 125  # drawn together; rounded up to whole pools
    protocol.autoencoder = f"sd-vae-ft-{decoder}"
    return protocol


def jit_suite(cfg: float) -> ConfigDict:
    """JiT's Heun sampler with guidance in an interval (arXiv 2511.13720), judged by torch-fidelity.

    Every class is drawn equally often and in order, and images are rounded to 8 bits. FID and
    Inception Score were published; torch-fidelity shuffles the images for the latter. The sampler
    runs under bfloat16 autocast (`engine_jit.py`).
    """
    protocol = protocols.default()
    protocol.labels = "balanced"
    protocol.model = {"dtype": "auto"}
    protocol.score = "torch-fidelity"
    protocol.sampling = {
        "sampler": "heun",
        "steps": 50,
        "final_euler": True,
        **two_passes(),
        "cfg_interval": (0.1, 1.0),
    }
    protocol.cfg = (cfg,)
    protocol.resize, protocol.quantize = "tensorflow", "round"
    protocol.ema = "0.9999"
    protocol.reference = "jit_in256_stats.npz"
    return protocol
