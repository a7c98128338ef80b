"""Analytic FLOPs of a training step and of drawing a batch of images."""

from __future__ import annotations

from flax import linen as nn
from ml_collections import ConfigDict

from moe_diffusion.dense2moe.stage_configs import dense_of
from moe_diffusion.diffusion import ddpm
from moe_diffusion.models import build
from moe_diffusion.models.accounting import BACKWARD, forward_flops


def flops_per_run(model: nn.Module, config: ConfigDict, what: str, chips: int) -> float | None:
    """FLOPs that one chip spends on a training step ("train") or on drawing a batch ("sample").

    A step of a stage of "distill" also computes the teacher once. The `data.batch_size` images are
    split evenly over the chips. With model.remat = full the forward pass counts twice, because the
    chip runs it twice.

    Returns:
      The FLOPs, or None if the sampler chooses its own steps.
    """
    passes = 1.0 + BACKWARD + (config.model.remat == "full")
    if what == "sample":
        evaluations = network_evaluations(config)
        if evaluations is None:
            return None
        passes = evaluations
    flops = passes * forward_flops(model, config.data.batch_size)["total"]
    if what == "distill":
        teacher = build(dense_of(config).model)
        flops += forward_flops(teacher, config.data.batch_size)["total"]
    return flops / chips


def network_evaluations(config: ConfigDict) -> float | None:
    """Forward passes that one image takes; a guided one counts twice. None for adaptive steps."""
    sampling = config.sampling
    steps, sampler = sampling.steps, sampling.sampler
    if sampler == "dopri5":
        return None
    if config.diffusion.path == "ddpm":
        steps = len(ddpm.spaced_timesteps(sampling.respacing or str(steps)))
    evaluations = 2 * steps if sampler in ("heun", "sde_heun") else steps
    if sampler == "sde_heun" or (sampler == "heun" and sampling.final_euler):
        evaluations -= 1  # the last step has no corrector
    low, high = sampling.cfg_interval
    return evaluations * (1.0 if sampling.cfg == 1 else 1.0 + high - low)
