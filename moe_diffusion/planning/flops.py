"""Analytic FLOPs of a training step and of drawing a batch of images."""

from __future__ import annotations

from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from moe_diffusion.dense2moe.stage_configs import dense_of
from moe_diffusion.diffusion import ddpm
from moe_diffusion.models import build
from moe_diffusion.models.accounting import BACKWARD, forward_flops, products
from moe_diffusion.models.stack import abstract_variables
from moe_diffusion.training.state import matches


def flops_per_run(model: nn.Module, config: ConfigDict, what: str, chips: int) -> float | None:
    """FLOPs that one chip spends on a training step ("train") or on drawing a batch ("sample").

    A step of a stage of "distill" also computes the teacher once. The `data.batch_size` images are
    split evenly over the chips. With model.remat = full the forward pass counts twice, because the
    chip runs it twice. Weights that `optim.trainable` leaves out have no gradients: they cost less,
    and where no block before them is trained, nothing but the forward pass.

    Returns:
      The FLOPs, or None if the sampler chooses its own steps.
    """
    forward = forward_flops(model)["total"]
    if what == "sample":
        evaluations = network_evaluations(config)
        flops = None if evaluations is None else evaluations * forward
    else:
        again = config.model.remat == "full"
        flops = (1 + again + BACKWARD) * forward - _spared(model, config, again)
    if what == "distill":
        flops += forward_flops(build(dense_of(config).model))["total"]
    return flops and flops * config.data.batch_size / chips


def _spared(model: nn.Module, config: ConfigDict, again: bool) -> float:
    """What a step for one image does not compute, because `optim.trainable` leaves weights out.

    again: whether the backward pass computes the forward pass again.
    """
    weights, maps = products(model)
    paths = flatten_dict(abstract_variables(model)["params"], sep="/")
    trained = {path for found in matches(paths, config.optim.trainable).values() for path in found}
    layers = list(dict.fromkeys(block.path for block in model.blocks()))
    learn = [any(path.startswith(f"{layer}/") for path in trained) for layer in layers]
    before = any(not path.startswith(("layers_", "final/")) for path in trained)
    after = [f"{layer}/" for layer in layers[[*learn, True].index(True) :]]

    def idle(path: str) -> bool:
        """Whether nothing up to here is trained."""
        return not before and not path.startswith((*after, "final/"))

    spared = sum(value for path, value in weights.items() if path not in trained)
    spared += sum((1 + again) * value for path, value in weights.items() if idle(path))
    spared += sum((BACKWARD + again) * m.flops for path, m in maps.items() if idle(path))
    return spared


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
