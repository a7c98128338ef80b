"""Checks of rectified flow: the loss with its gradients, and the samplers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_diffusion import config
from moe_diffusion.diffusion import objectives, paths, samplers

from . import cases, network, probe


def check(case, family: str) -> None:
    """All stored results of the case."""
    model, variables = probe.build(case, family)
    _check_loss(case, family, model, variables)
    for key in [key for key in case.arrays if key.startswith("out/sample_")]:
        _check_sampler(case, key.removeprefix("out/sample_"), model, variables)
    case.assert_all_compared()


def _check_loss(case, family, model, variables) -> None:
    image, noise, t = case.image("loss/x1"), case.image("loss/z0"), case["loss/t"]
    y = case.labels("loss")
    x_t = paths.interpolate(image, noise, t)
    np.testing.assert_allclose(x_t, case.image("loss/zt"), atol=1e-6)
    np.testing.assert_allclose(paths.velocity(image, noise), case.image("loss/ut"), atol=1e-6)

    output = probe.jit(probe.apply, static_argnums=(0, 5))(model, variables, x_t, t, y, True)[0]
    case.compare("out/loss_model_output", output)
    residual = output[..., : model.input_shape[-1]] - paths.velocity(image, noise)
    case.compare("loss/mse", jnp.mean(residual**2, axis=(1, 2, 3)))

    batch = {"image": image, "label": case["loss/y"]}
    draws = objectives.Draws(t, noise, case["loss/drop_uniform"])
    loss_fn = network.loss_of(model, variables, batch, draws, network.diffusion_of(case), {})
    (loss, _), grads = probe.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables["params"])
    case.compare("loss/loss", loss)
    network.compare_grads(case, family, model, grads)


def _check_sampler(case, name: str, model, variables) -> None:
    """The result, and every state at which the conditional network was evaluated."""
    method, _, unguided = name.partition("_")
    visited = cases.nhwc(case[f"sample/{name}/eval_z"])
    settings = config.default()
    sampling = settings.sampling
    sampling.sampler = method
    sampling.steps = len(visited) // (2 if method == "heun" else 1)
    sampling.cfg = 1.0 if unguided else float(case["sample/cfg"])
    z = case.image("sample/z")
    np.testing.assert_array_equal(visited[0], z)
    run = samplers.make_sampler(model, settings, return_trajectory=True)
    inputs = (variables, z, {"label": case["sample/y"]})
    states = probe.compiled(run, *inputs)(*inputs)
    case.compare(f"out/sample_{name}", states[-1])
    starts = visited[:: 2 if method == "heun" else 1]
    np.testing.assert_allclose(states[:-1], starts[1:], atol=1e-4, rtol=1e-4)
    case.seen(f"sample/{name}/eval_z")
