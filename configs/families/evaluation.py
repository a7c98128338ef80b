"""What the evaluation protocols of several papers share."""

from __future__ import annotations

from ml_collections import ConfigDict

from moe_diffusion.evaluation import protocol as protocols

ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"


def adm_suite() -> ConfigDict:
    """Samples as 8-bit images, judged by ADM's evaluator (arXiv 2105.05233): all five metrics.

    Classes are drawn at random, as in `sample_ddp.py` of DiT and its descendants.
    """
    protocol = protocols.default()
    protocol.labels = "random"
    protocol.resize, protocol.quantize = "tensorflow", "round"
    protocol.reference = ADM_REFERENCE
    protocol.ema = "0.9999"
    return protocol


def features_of_decoder() -> ConfigDict:
    """Inception features of what the decoder puts out, never rounded (`sample_ddp_feature.py`).

    The images are resized as in pytorch-fid, but the reference statistics were made with
    TensorFlow's resizing. So the numbers differ a little from those of ADM's evaluator. Only FIDs
    were published in this way.
    """
    protocol = adm_suite()
    protocol.resize, protocol.quantize = "pytorch-fid", "none"
    protocol.autoencoder = "sd-vae-ft-mse"
    return protocol


def jit_suite(cfg: float) -> ConfigDict:
    """JiT's Heun sampler with guidance in an interval (arXiv 2511.13720), judged by torch-fidelity.

    Every class is drawn equally often and in order, and images are rounded to 8 bits. FID and
    Inception Score were published.
    """
    protocol = protocols.default()
    protocol.labels = "balanced"
    protocol.sampling = {
        "sampler": "heun",
        "steps": 50,
        "final_euler": True,
        "cfg_interval": (0.1, 1.0),
    }
    protocol.cfg = (cfg,)
    protocol.resize, protocol.quantize = "tensorflow", "round"
    protocol.ema = "0.9999"
    protocol.reference = "jit_in256_stats.npz"
    return protocol
