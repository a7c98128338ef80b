"""Checks of DiT-MoE: the network, its training loss with gradients, and its sampler."""

from __future__ import annotations

import functools

import jax
import numpy as np

from moe_diffusion import config
from moe_diffusion.diffusion import objectives, samplers

from . import cases, network, probe


def check(case, family: str) -> None:
    """All stored results of the case."""
    model, variables = probe.build(case, family)
    forward = probe.jit(functools.partial(probe.apply, model), static_argnums=4)
    network.check_eval(case, family, model, variables, forward)
    _check_training(case, family, model, variables, forward)
    _check_sampler(case, model, variables)
    case.assert_all_compared()


def _check_training(case, family, model, variables, forward) -> None:
    """Rectified flow; the balance loss is in the gradients, but not in the stored loss."""
    image, noise = case.image("train/x"), case.image("train/noise")
    t, y = probe.our_time(model, case["train/t"]), case.labels("train")
    np.testing.assert_allclose(t, jax.nn.sigmoid(-case["train/t_normal"]), atol=1e-6)
    output, sown = forward(variables, case.image("train/zt"), t, y, True)
    case.compare("out/train", probe.authors_output(model, output))
    weights = probe.loss_weights(case, family)
    batch = {"image": image, "label": case["train/y"]}
    draws = objectives.Draws(t, noise, case["train/drop_uniform"])
    loss_fn = network.loss_of(model, variables, batch, draws, network.diffusion_of(case), weights)
    (loss, aux), grads = probe.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables["params"])
    case.compare("train/loss", aux.metrics["mse"])
    record = probe.Record(model, sown, len(image))
    network.compare_losses(case, record, weights, loss - aux.metrics["mse"])
    probe.compare_routing(case, record, "train/")
    probe.compare_intermediates(case, record, "train/")
    network.compare_grads(case, family, model, grads)


def _check_sampler(case, model, variables) -> None:
    """Euler steps; the trajectory starts with the noise and holds every state after it."""
    stored, z = cases.nhwc(case["sample/traj"]), case.image("sample/z")
    assert (case["sample/y_null"] == model.num_classes).all()
    starts_with_noise = np.array_equal(stored[0], z)
    settings = config.default()
    settings.sampling.sampler, settings.sampling.steps = "euler", len(stored) - starts_with_noise
    settings.sampling.cfg = float(case["sample/cfg"])
    run = samplers.make_sampler(model, settings, return_trajectory=True)
    inputs = (variables, z, {"label": case["sample/y"]})
    states = probe.compiled(run, *inputs)(*inputs)
    np.testing.assert_allclose(states, stored[starts_with_noise:], atol=1e-4, rtol=1e-4)
    case.seen("sample/traj")
    case.compare("out/sample", states[-1])
