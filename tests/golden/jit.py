"""Checks of JiT and JiTMoE: network, v-loss of a data prediction with its gradients, sampler."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_diffusion import interop
from moe_diffusion.diffusion import guidance, objectives, paths, samplers
from moe_diffusion.models import blocks

from . import cases, network, probe


def family(case) -> str:
    """Told apart by the hyperparameters alone: both come from one file of the authors."""
    moe = case.hparams["net"]["moe_config"]
    return "jitmoe" if moe and moe["interleave"] else "jit"


def check(case, family: str) -> None:
    """All stored results of the case."""
    model, variables = probe.build(case, family)
    config = interop.config_from_torch(family, case.hparams)
    forward = probe.jit(functools.partial(probe.apply, model), static_argnums=4)
    output, sown = forward(variables, case.image("in/x"), case["in/t"], case["in/y"], False)
    case.compare("out/forward", output)
    record = probe.Record(model, sown, len(output))
    probe.compare_routing(case, record, "")
    probe.compare_intermediates(case, record, "")
    _check_positions(case, model)
    _check_loss(case, family, config.diffusion, model, variables, forward)
    _check_sampler(case, config, model, variables)
    case.assert_all_compared()


def _check_positions(case, model) -> None:
    """The fixed tables: sin-cos, and rope with and without class tokens."""
    table = blocks.sincos_table(model.grid, model.hidden_size)
    case.compare("buf/pos_embed", table[None], atol=1e-6)
    head_dim = model.hidden_size // model.num_heads
    angles = blocks.rope_angles(model.positions, model.grid, head_dim)
    for name, context in (("rope", 0), ("rope_incontext", model.in_context_tokens)):
        padded = np.pad(angles.reshape(len(angles), -1), ((context, 0), (0, 0)))
        for f in (np.cos, np.sin):
            case.compare(f"buf/{name}_{f.__name__}", np.repeat(f(padded), 2, axis=1), atol=1e-6)


def _check_loss(case, family, diffusion, model, variables, forward) -> None:
    image, noise, t = case.image("loss/x"), case.image("loss/e_unit"), case["loss/t"]
    mean, std = diffusion.time_mean, diffusion.time_std
    case.compare("loss/t", jax.nn.sigmoid(mean + std * case["loss/t_normal"]))
    x_t = paths.interpolate(image, diffusion.noise_scale * noise, t)
    np.testing.assert_allclose(x_t, case.image("loss/z"), atol=1e-6)
    dropped = case["loss/drop_uniform"] < diffusion.cond_dropout
    y = np.where(dropped, model.num_classes, case["loss/labels"])
    case.compare("loss/labels_dropped", y)

    output, _ = forward(variables, x_t, t, y, True)
    velocity = objectives.velocity_of(output, x_t, t, diffusion)
    target = paths.velocity_from_data(image, x_t, t, diffusion.t_eps)
    for name, ours in (("x_pred", output), ("v_pred", velocity), ("v", target)):
        stored = case.image(f"loss/{name}")
        np.testing.assert_allclose(ours, stored, atol=1e-4, rtol=1e-4, err_msg=name)
        case.seen(f"loss/{name}")
    case.compare("loss/per_sample", jnp.mean((velocity - target) ** 2, axis=(1, 2, 3)))

    batch = {"image": image, "label": case["loss/labels"]}
    draws = objectives.Draws(t, noise, case["loss/drop_uniform"])
    loss_fn = network.loss_of(model, variables, batch, draws, diffusion, {})
    (loss, _), grads = probe.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables["params"])
    case.compare("loss/loss", loss)
    network.compare_grads(case, family, model, grads)


def _check_sampler(case, config, model, variables) -> None:
    """Every state of the sampler that the config asks for, and every guided velocity."""
    z, cond = case.image("sample/z0_unit"), {"label": case["sample/labels"]}
    run = samplers.make_sampler(model, config, return_trajectory=True)
    states = probe.compiled(run, variables, z, cond)(variables, z, cond)
    case.compare("out/sample", states[-1])
    stored = case.image("sample/traj")
    np.testing.assert_allclose(states, stored, atol=1e-4, rtol=1e-4, err_msg="sample/traj")
    case.seen("sample/traj")

    @probe.jit
    def velocity(x, t):
        def of_cond(x, t, cond):
            output = model.apply(variables, x, jnp.full(len(x), t), cond, False)
            return objectives.velocity_of(output, x, t, config.diffusion)

        return guidance.guide(of_cond, model.null, config.sampling)(x, t, cond)

    # At the recorded states, since a guided trajectory spreads rounding errors.
    expected, velocities = cases.nhwc(case["sample/eval_v"]), []
    starts = [config.diffusion.noise_scale * z, *stored[:-1]]
    for number, x in enumerate(starts):
        velocities.append(velocity(x, number / len(starts)))
        if config.sampling.sampler == "heun" and number < len(starts) - 1:
            predicted = x + expected[len(velocities) - 1] / len(starts)
            velocities.append(velocity(predicted, (number + 1) / len(starts)))
    np.testing.assert_allclose(np.stack(velocities), expected, atol=1e-4, rtol=1e-4)
    case.seen("sample/eval_v")
