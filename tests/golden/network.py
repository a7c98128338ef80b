"""Checks of one network: evaluation, guidance, a training forward with its losses and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_diffusion import config, interop
from moe_diffusion.diffusion import guidance, objectives
from moe_diffusion.diffusion import sown as aux_losses
from moe_diffusion.interop import keymap
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.models.stack import next_router_state

from . import probe


def check(case, family: str) -> None:
    """All stored results of the case."""
    model, variables = probe.build(case, family)
    forward = probe.jit(functools.partial(probe.apply, model), static_argnums=4)
    check_eval(case, family, model, variables, forward)
    if "out/forward_with_cfg" in case:
        _check_guidance(case, family, model, variables, forward)
    if "flow/xt" in case:
        _check_flow(case, model, variables, forward)
    if "train/x1" in case:
        _check_capacity_training(case, family, model, variables, forward)
    elif "train/cotangent" in case:
        _check_training(case, family, model, variables)
    elif "train/x" in case:
        y = case.labels("train")
        t = case["train/t"].astype(np.float32)
        case.compare("out/train", forward(variables, case.image("train/x"), t, y, True)[0])
    case.assert_all_compared()


def diffusion_of(case, path: str = "flow"):
    """The section `diffusion` of a config that drops conditions as often as the authors."""
    diffusion = config.default().diffusion
    diffusion.update(path=path, cond_dropout=case.hparams["class_dropout_prob"])
    return diffusion


def loss_of(model, variables, *arguments):
    """`objectives.diffusion_loss` of the parameters alone."""

    def loss_fn(params):
        return objectives.diffusion_loss(model, params, variables["router_state"], *arguments)

    return loss_fn


def check_eval(case, family, model, variables, forward) -> None:
    prefix, key = ("eval/", "out/eval") if "out/eval" in case else ("", "out/forward")
    x, t = case.image("in/x"), probe.our_time(model, case["in/t"])
    output, sown = forward(variables, x, t, case["in/y"], False)
    output = probe.authors_output(model, output)
    # SiT's own forward already drops the second half of the channels.
    case.compare(key, output[..., : model.input_shape[-1]] if family == "sit" else output)
    record = probe.Record(model, sown, len(x))
    probe.compare_routing(case, record, prefix)
    probe.compare_intermediates(case, record, prefix)


def _check_guidance(case, family, model, variables, forward) -> None:
    """`forward_with_cfg`: both halves in one pass, three channels guided, the rest as it is."""
    key = "out/forward_with_cfg"
    half = len(case["cfg/x"]) // 2
    x, t, y = case.image("cfg/x")[:half], case["cfg/t"].astype(np.float32), case["cfg/y"]
    assert (y[half:] == model.num_classes).all() and (t[half:] == t[:half]).all()
    outputs = []

    def velocity(both, _, cond):
        times = np.repeat(t[:half], 2)  # both predictions of an image side by side
        outputs.append(forward(variables, both, times, cond["label"], False)[0])
        return outputs[0]

    # The authors' sampler of a SiT, and of a DDPM of the others.
    hparams = case.hparams if family == "sit" else {**case.hparams, "rf": False}
    sampling = interop.config_from_torch(family, hparams).sampling
    sampling.cfg = float(case["cfg/scale"])
    guide = guidance.guide(velocity, model.null, sampling)
    conditional = guide(x, t[0], {"label": y[:half]})
    unconditional = jnp.concatenate([conditional[..., :3], outputs[0][1::2, ..., 3:]], axis=-1)
    both = jnp.concatenate([conditional, unconditional])
    case.compare(key, both[..., : case[key].shape[1]])


def _check_flow(case, model, variables, forward) -> None:
    """SiT's velocity loss, per sample."""
    image, noise, t = case.image("flow/x1"), case.image("flow/x0"), case["flow/t"]
    output = forward(variables, case.image("flow/xt"), t, case["flow/y"], False)[0]
    output = output[..., : model.input_shape[-1]]
    case.compare("out/flow_pred", output)
    case.compare("flow/loss", jnp.mean((output - (image - noise)) ** 2, axis=(1, 2, 3)))
    batch = {"image": image, "label": case["flow/y"]}
    draws = objectives.Draws(t, noise, jnp.ones(len(t)))
    params, router_state = variables["params"], variables["router_state"]
    diffusion = config.default().diffusion
    loss, _ = objectives.diffusion_loss(model, params, router_state, batch, draws, diffusion, {})
    np.testing.assert_allclose(loss, case["flow/loss"].mean(), rtol=1e-4)


def _check_training(case, family, model, variables) -> None:
    """TC-DiT, EC-DiT, ProMoE: a linear functional of the output plus the routers' losses."""
    weights = probe.loss_weights(case, family)
    x, t, y = case.image("train/x"), probe.our_time(model, case["train/t"]), case.labels("train")
    cotangent = case.image("train/cotangent")

    def loss_fn(params):
        output, sown = probe.apply(model, variables | {"params": params}, x, t, y, True)
        output = probe.authors_output(model, output)
        main = jnp.mean(output * cotangent)
        named = aux_losses.sum_by_name(sown.get("losses", {}))
        aux = aux_losses.weigh(named, weights)
        return main + aux, (output, sown, main, aux)

    grad_fn = probe.jit(jax.grad(loss_fn, has_aux=True))
    grads, (output, sown, main, aux) = grad_fn(variables["params"])
    case.compare("out/train", output)
    case.compare("train/loss_main", main)
    record = probe.Record(model, sown, len(x))
    probe.compare_routing(case, record, "train/")
    probe.compare_intermediates(case, record, "train/")
    if weights:
        compare_losses(case, record, weights, aux)
    if (case.path / "grads.safetensors").exists():
        compare_grads(case, family, model, grads)


def compare_losses(case, record, weights, total) -> None:
    """The loss of every router, weighted, and their sum; the authors have one kind in a model."""
    ((name, weight),) = weights.items()
    stored = {"balance": "aux_loss", "contrast": "contrastive_loss"}[name]
    case.compare(f"train/{stored}_total", total)
    for key in (key for key in case.arrays if key.endswith(f"/{stored}")):
        block = int(key.split("/")[2].removeprefix("blocks."))
        case.compare(key, weight * record.sown("losses", block, name))


def _check_capacity_training(case, family, model, variables, forward) -> None:
    """DiffMoE: flow loss plus capacity BCE, pool masks, and the step of the thresholds."""
    image, noise, t = case.image("train/x1"), case.image("train/z0"), case["train/t"]
    y = case.labels("train")
    output, sown = forward(variables, case.image("train/zt"), t, y, True)
    case.compare("out/train", output)
    residual = output[..., : model.input_shape[-1]] - (image - noise)
    case.compare("train/mse", jnp.mean(residual**2, axis=(1, 2, 3)))

    loss_fn = loss_of(
        model,
        variables,
        {"image": image, "label": case["train/y"]},
        objectives.Draws(t, noise, case["train/drop_uniform"]),
        diffusion_of(case),
        probe.loss_weights(case, family),
    )

    (loss, aux), grads = probe.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables["params"])
    case.compare("train/loss", loss)
    case.compare("train/cp_loss", loss - aux.metrics["mse"])
    compare_grads(case, family, model, grads)

    record = probe.Record(model, sown, len(image))
    probe.compare_routing(case, record, "train/")
    probe.compare_intermediates(case, record, "train/")
    before = thresholds(variables["router_state"], family, model)
    after = next_router_state(model.routers(), variables["router_state"], aux.router_stats)
    after = thresholds(after, family, model)
    for block in case["train/layer_idx"]:
        case.compare(
            f"train/ones.{block}", record.gates(block)[0].reshape(case[f"train/ones.{block}"].shape)
        )
        case.compare(f"train/capacity_pred.{block}", record.capacity_logits(block))
        bce = record.sown("losses", block, "capacity_predictor")
        case.compare(f"train/Capacity_Pred_loss_{block}", bce)
        case.compare(f"train/threshold_before.blocks.{block}", before[block])
        case.compare(f"train/threshold_after.blocks.{block}", after[block])
        quantile = (after[block] - 0.95 * before[block]) / 0.05
        case.compare(f"train/router/blocks.{block}/quantile", quantile)


def thresholds(router_state, family: str, model) -> dict[int, np.ndarray]:
    """Block number -> DiffMoE's thresholds [E]."""
    named = keymap.export_tree({"router_state": router_state}, FAMILIES[family], model)
    return {int(key.split(".")[1]): value for key, value in named.items()}


def compare_grads(case, family: str, model, grads) -> None:
    """Every gradient under PyTorch's name. Frozen entries have none in the file."""
    named = keymap.export_tree({"params": grads}, FAMILIES[family], model)
    labels = "y_embedder.embedding_table.weight"
    if labels not in case.tensors("grads"):  # left out of ProMoE's for its size
        named.pop(labels, None)
    case.compare_tensors("grads", named)
