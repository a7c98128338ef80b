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

    pytorch-fid's resizing against statistics that were made with TensorFlow's, so the numbers are
    a little off those of ADM's evaluator. FID alone was published so.
    """
    protocol = adm_suite()
    protocol.resize, protocol.quantize = "pytorch-fid", "none"
    protocol.autoencoder = "sd-vae-ft-mse"
    return protocol


def jit_suite(cfg: float) -> ConfigDict:
    """JiT's Heun sampler with guidance in an interval (arXiv 2511.13720), judged by torch-fidelity.

    Every class equally often and in order; images rounded to 8 bits; FID and Inception Score.
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
