"""Checks of discrete diffusion: tables, loss with gradients, single steps, whole trajectories."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_diffusion import config
from moe_diffusion.diffusion import ddpm, objectives, samplers

from . import cases, network, probe

# Stored tables in terms of ours.
TABLES = {
    "betas": lambda p: p.betas,
    "timestep_map": lambda p: p.timesteps,
    "alphas_cumprod": lambda p: p.alphas_cumprod,
    "alphas_cumprod_prev": lambda p: p.alphas_cumprod_prev,
    "alphas_cumprod_next": lambda p: np.append(p.alphas_cumprod[1:], 0.0),
    "sqrt_alphas_cumprod": lambda p: np.sqrt(p.alphas_cumprod),
    "sqrt_one_minus_alphas_cumprod": lambda p: np.sqrt(1 - p.alphas_cumprod),
    "log_one_minus_alphas_cumprod": lambda p: np.log(1 - p.alphas_cumprod),
    "sqrt_recip_alphas_cumprod": lambda p: np.sqrt(1 / p.alphas_cumprod),
    "sqrt_recipm1_alphas_cumprod": lambda p: np.sqrt(1 / p.alphas_cumprod - 1),
    "posterior_variance": lambda p: p.posterior_variance,
    "posterior_log_variance_clipped": lambda p: p.posterior_log_variance,
    "posterior_mean_coef1": lambda p: p.posterior_coefficients[0],
    "posterior_mean_coef2": lambda p: p.posterior_coefficients[1],
}


def check(case, family: str) -> None:
    """All stored results of the case."""
    model, variables = probe.build(case, family)
    full = ddpm.linear_process()
    respacing = case.config["model"]["respacing"]
    stride = f"ddim{len(case['ddim/timestep_map'])}"
    respaced, strided = (
        ddpm.respace(full, ddpm.spaced_timesteps(text)) for text in (respacing, stride)
    )
    for name, process in (("full", full), ("respaced", respaced), ("ddim", strided)):
        for key in [key for key in case.arrays if key.startswith(f"{name}/")]:
            case.compare(key, TABLES[key.removeprefix(f"{name}/")](process), rtol=1e-9, atol=0)
    _check_loss(case, family, model, variables, full)
    _check_steps(case, model, variables, full, respaced, strided)
    for name in ("clip", "noclip", "cfg", "ddim", "ddim_eta06"):
        changes = {"respacing": stride if "ddim" in name else respacing}
        _check_trajectory(case, name, model, variables, changes)
    case.assert_all_compared()


def _check_loss(case, family, model, variables, process) -> None:
    image, noise, t = case.image("loss/x_start"), case.image("loss/noise"), case["loss/t"]
    y = case.labels("loss")
    x_t = ddpm.diffuse(process, image, t, noise)
    _compare_image(case, "loss/x_t", x_t)
    _compare_image(case, "q_posterior/mean", ddpm.posterior_mean(process, image, x_t, t))
    log_variance = ddpm.lookup(process.posterior_log_variance, t, x_t)
    _compare_image(case, "q_posterior/log_variance", jnp.broadcast_to(log_variance, x_t.shape))

    batch = {"image": image, "label": case["loss/y"]}
    draws = objectives.Draws(t, noise, case["loss/drop_uniform"])
    diffusion = network.diffusion_of(case, "ddpm")

    def loss_fn(params):
        loss, _ = network.loss_of(model, variables, batch, draws, diffusion, {})(params)
        # The same forward pass: the compiler computes it once.
        time = t.astype(np.float32)
        output = model.apply(variables | {"params": params}, x_t, time, {"label": y}, True)
        return loss, (output, ddpm.loss_terms(process, output, image, t, noise))

    grad_fn = probe.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, (output, (mse, vb))), grads = grad_fn(variables["params"])
    case.compare("out/loss_model_output", output)
    case.compare("loss/mse", mse)
    case.compare("loss/vb", vb)
    case.compare("loss/loss", loss)
    network.compare_grads(case, family, model, grads)


def _check_steps(case, model, variables, full, respaced, strided) -> None:
    """Single steps from stored latents; one forward pass for all of them."""
    x, i, y = case.image("step/x_t"), case["step/t_index"], case["step/y"]
    rows = {
        "p_mean_variance": (full, case.image("loss/x_t"), case["loss/t"], case["loss/y"]),
        "p_sample": (respaced, x, i, y),
        "ddim_eta06": (strided, x, i, y),
    }
    for name in ("clip", "noclip"):
        before = cases.nhwc(case[f"sample/{name}/traj"])[:-1]
        before = np.concatenate([case.image("sample/z")[None], before])
        steps, batch = before.shape[:2]
        countdown = np.repeat(np.arange(steps)[::-1], batch)
        labels = np.tile(case["sample/y"], steps)
        rows[name] = (respaced, before.reshape(-1, *before.shape[2:]), countdown, labels)
    times = [p.timesteps[index].astype(np.float32) for p, _, index, _ in rows.values()]
    inputs = [np.concatenate([row[column] for row in rows.values()]) for column in (1, 3)]
    output = probe.jit(model.apply, static_argnums=4)(
        variables, inputs[0], np.concatenate(times), {"label": inputs[1]}, False
    )
    outputs = jnp.split(output, np.cumsum([len(time) for time in times])[:-1])
    found = {
        name: ddpm.reverse(process, output, x_t, index, clip=name == "clip")
        for (name, (process, x_t, index, _)), output in zip(rows.items(), outputs, strict=True)
    }

    p = found["p_mean_variance"]
    _compare_image(case, "p_mean_variance/mean", p.mean)
    _compare_image(case, "p_mean_variance/log_variance", p.log_variance)
    _compare_image(case, "p_mean_variance/variance", jnp.exp(p.log_variance))
    _compare_image(case, "p_mean_variance/pred_xstart", p.x_start)
    noise = case.image("step/noise")
    case.compare("out/step_p_sample", ddpm.ancestral_step(found["p_sample"], i, noise))
    _compare_image(case, "step/p_sample_pred_xstart", found["p_sample"].x_start)
    step = ddpm.ddim_step(strided, found["ddim_eta06"], x, i, noise, eta=0.6)
    case.compare("out/step_ddim_eta06", step)
    for name, output in zip(rows, outputs, strict=True):
        key = f"sample/{name}/pred_xstart"
        if key in case:
            stored = case.image(key)
            ours = np.reshape(found[name].x_start, stored.shape)
            # At high noise the estimate is a difference of numbers in the hundreds; the size of
            # its error is that from before it is clipped.
            unclipped = ddpm.reverse(rows[name][0], output, *rows[name][1:3]).x_start
            for a, b, c in zip(ours, stored, np.reshape(unclipped, stored.shape), strict=True):
                _assert_relatively_close(a, b, key, size=np.std(c))
            case.seen(key)


def _check_trajectory(case, name: str, model, variables, changes) -> None:
    """Every state of a sampler that replays the recorded noise."""
    settings = config.default()
    settings.diffusion.path = "ddpm"
    settings.sampling.update(
        sampler="ddim" if "ddim" in name else "ddpm",
        clip=name == "clip" or "ddim" in name,
        eta=0.6 if "eta06" in name else 0.0,
        cfg=float(case["sample/cfg_scale"]) if name == "cfg" else 1.0,
        cfg_channels=3,
        joint=True,
        **changes,
    )
    z, recorded = case.image("sample/z"), jnp.asarray(case.image("sample/step_noise"))
    run = samplers.make_sampler(
        model,
        settings,
        return_trajectory=True,
        noise=lambda keys, step, shape: recorded[step, : shape[0]],
    )
    inputs = (variables, z, {"label": case["sample/y"]})
    states = np.asarray(probe.compiled(run, *inputs)(*inputs))
    # Under guidance the record has a second half, which never returns to the first.
    key, out = f"sample/{name}/traj", f"out/sample_{name}"
    for ours, stored in zip(states, cases.nhwc(case[key])[:, : len(z)], strict=True):
        _assert_relatively_close(ours, stored, key)
    case.seen(key)
    if out in case:
        _assert_relatively_close(states[-1], case.image(out), out)
        case.seen(out)


def _compare_image(case, key: str, ours) -> None:
    _assert_relatively_close(np.asarray(ours), case.image(key), key)
    case.seen(key)


def _assert_relatively_close(ours, stored, key, size=None) -> None:
    """Within 1e-4 of the stored values' own size, which unclipped trajectories take to hundreds."""
    assert ours.shape == stored.shape, f"{key}: shape {ours.shape}, stored {stored.shape}"
    size = max(1.0, float(np.std(stored) if size is None else size))
    np.testing.assert_allclose(ours, stored, atol=1e-4 * size, rtol=1e-4, err_msg=key)
