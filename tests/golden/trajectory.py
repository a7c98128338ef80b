"""Checks of training: the recorded steps are replayed through the real training step."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_diffusion import config as config_lib
from moe_diffusion import interop
from moe_diffusion.diffusion import objectives, paths
from moe_diffusion.interop import keymap
from moe_diffusion.interop.dit import FAMILIES
from moe_diffusion.training import optim, state, step

from . import cases, network, probe

INPUTS = ("x1", "z0", "t", "y", "drop_uniform")
BUFFERS = re.compile(r"pos_embed|.*\.(ema_decay|expert_threshold|e_score_correction_bias)")


def check(case, family: str) -> None:
    """Losses, gradients, weights, averages, thresholds and routing of every step."""
    model, variables = probe.build(case, family)
    weights = probe.loss_weights(case, family)
    config = _config(case)
    train_step, train_state = _make(case, model, variables, weights, config)
    forward = probe.jit(functools.partial(probe.apply, model), static_argnums=4)
    key = jax.random.key(0)  # of no use: all draws are recorded
    log = collections.defaultdict(list)  # name of a stored array -> our values, step by step
    for n in range(case.config["training"]["steps"]):
        batch = {name: case[f"in/{name}"][n] for name in INPUTS}
        batch |= {name: cases.nhwc(batch[name]) for name in ("x1", "z0")}
        before = jax.device_get((train_state.params, train_state.router_state))
        _look(log, case, model, before, batch, forward, weights)
        if n == 0:
            train_step = probe.compiled(train_step, train_state, batch, key)
        train_state, metrics = train_step(train_state, batch, key)
        _read(log, case, family, model, metrics, before[0], train_state, weights)
        _read_thresholds(log, model, family, train_state)
        if n == 0:
            grads = _first_gradients(train_state, metrics, config.optim)
            network.compare_grads(case, family, model, grads)
    _compare(case, log)
    ema = next(iter(train_state.emas.values()))
    live = {"params": train_state.params, "router_state": train_state.router_state}
    for name, ours in (("final", live), ("ema", ema)):
        _compare_weights(case, name, interop.export_state_dict(ours, model, family))
    case.assert_all_compared()


def _config(case):
    """The recorded hyperparameters as a config of ours."""
    training = case.config["training"]
    assert training["optimizer"] == "torch.optim.AdamW"
    config = config_lib.default()
    config.optim.update(
        learning_rate=training["lr"],
        b1=training["betas"][0],
        b2=training["betas"][1],
        eps=training["eps"],
        weight_decay=training["weight_decay"],
        clip_norm=training["clip_grad_norm"] or 0.0,
        accumulate=training.get("micro_batches", 1),
        accumulate_reduce="sum",
    )
    config.ema.update(decays=(training["ema_decay"],), router_state="average")
    return config


def _make(case, model, variables, weights, config):
    """The training step, its loss reading the recorded draws, and the state before step 0."""

    def loss_fn(params, router_state, batch, key):
        del key
        return objectives.flow_loss(
            model,
            params,
            router_state,
            {"image": batch["x1"], "label": batch["y"]},
            objectives.Draws(batch["t"], batch["z0"], batch["drop_uniform"]),
            label_dropout=case.hparams["class_dropout_prob"],
            loss_weights=weights,
        )

    optimizer = optim.make_optimizer(config.optim)
    train_step = step.make_train_step(
        loss_fn,
        optimizer,
        optim.make_schedule(config.optim, case.config["training"]["steps"]),
        config,
        model.update_router_state,
    )

    @probe.jit
    def start(variables):
        return state.TrainState(
            step=jnp.zeros([], jnp.int32),
            **variables,
            emas=optim.init_emas(**variables, ema_config=config.ema),
            opt_state=optimizer.init(variables["params"]),
        )

    return train_step, start(variables)


def _look(log, case, model, before, batch, forward, weights) -> None:
    """Runs the network on the inputs of a step, to see its errors and its routers' decisions."""
    variables = dict(zip(("params", "router_state"), before, strict=True))
    micro_batches = zip(*batch.values(), strict=True) if batch["y"].ndim == 2 else [batch.values()]
    for x1, z0, t, y, drop_uniform in micro_batches:
        y = np.where(drop_uniform < case.hparams["class_dropout_prob"], model.num_classes, y)
        output, sown = forward(variables, paths.interpolate(x1, z0, t), t, y, True)
        residual = output[..., : model.channels] - paths.velocity(x1, z0)
        log["out/mse"].append(jnp.mean(residual**2, axis=(1, 2, 3)))
        record = probe.Record(model, sown, len(y))
        for i in np.flatnonzero(model.moe_pattern):
            chosen, _ = record.gates(i)
            by_token = chosen.reshape(-1, chosen.shape[-1])
            if f"router/blocks.{i}/idx_sorted" in case:
                log[f"router/blocks.{i}/idx_sorted"].append(probe.positions(by_token))
            else:
                log[f"router/blocks.{i}/token_idx_sorted"].append(probe.positions(by_token.T))
            if "balance" in weights:
                loss = weights["balance"] * record.sown("losses", i, "balance")
                log[f"out/aux_loss_{i}"].append(loss)
            if "capacity" in weights:
                log[f"out/Capacity_Pred_loss_{i}"].append(record.sown("losses", i, "capacity"))


def _read(log, case, family, model, metrics, params_before, train_state, weights) -> None:
    """The metrics of a step, and norms over the trainable parameters after it."""
    # TC-DiT's recorded loss leaves out the balance loss.
    log["out/loss"].append(metrics["mse"] if "balance" in weights else metrics["loss"])
    if "capacity" in weights:
        log["out/cp_loss"].append(weights["capacity"] * metrics["capacity"])
    log["out/grad_norm"].append(metrics["grad_norm"])
    log["out/lr"].append(metrics["learning_rate"])
    if "out/clip_coefficient" in case:
        clip_norm = case.config["training"]["clip_grad_norm"]
        log["out/clip_coefficient"].append(optim.clip_factor(metrics["grad_norm"], clip_norm))
    ema = next(iter(train_state.emas.values()))
    before, after, averaged = (
        _flat(case, keymap.export_tree({"params": params}, FAMILIES[family], model))
        for params in (params_before, train_state.params, ema["params"])
    )
    log["out/param_norm"].append(np.linalg.norm(after))
    log["out/update_norm"].append(np.linalg.norm(after - before))
    log["out/ema_norm"].append(np.linalg.norm(averaged))


def _read_thresholds(log, model, family, train_state) -> None:
    """DiffMoE's thresholds after a step, live and averaged."""
    if family == "diffmoe":
        averaged = next(iter(train_state.emas.values()))["router_state"]
        for name, kept in (("", train_state.router_state), ("_ema", averaged)):
            for i, threshold in network.thresholds(kept, family, model).items():
                log[f"thresholds{name}/blocks.{i}"].append(threshold)


def _first_gradients(train_state, metrics, optim_config):
    """The gradients before clipping: after one step AdamW's first moment is (1 - b1) of them."""
    moment = jax.device_get(optax.tree.get(train_state.opt_state, "mu"))
    factor = optim.clip_factor(metrics["grad_norm"], optim_config.clip_norm)
    return jax.tree.map(lambda m: m / (1 - optim_config.b1) / factor, moment)


def _compare(case, log) -> None:
    """What was collected, each array within the case's own tolerance for it."""
    tolerance = case.config["suggested_tolerance"]
    for key in sorted(log.keys() & case.arrays.keys()):
        ours, stored = np.stack(log[key]), case[key]
        rtol, atol = tolerance["loss_terms_rtol"], 0.0
        if key == "out/loss" and stored.ndim == 2:
            stored = stored.mean(-1)  # ours is the mean over the micro-batches
        if key.startswith("thresholds"):
            rtol, atol = 0.0, tolerance["thresholds_atol"]
        elif key.startswith("router/"):
            rtol = 0.0
        elif key in ("out/grad_norm", "out/clip_coefficient"):
            rtol = tolerance["grad_norm_rtol"]
        elif key == "out/update_norm":
            rtol = cases.TOLERANCE  # of differences of rounded weights
        ours = ours.reshape(stored.shape)
        np.testing.assert_allclose(ours, stored, rtol=rtol, atol=atol, err_msg=key)
        case.seen(key)


def _compare_weights(case, name: str, ours: dict[str, np.ndarray]) -> None:
    """The weights after the last step: 99 % of the elements closely, all of them loosely."""
    tolerance = case.config["suggested_tolerance"]
    stored = case.tensors(name)
    assert set(stored) == set(ours)
    for key in filter(BUFFERS.fullmatch, stored):
        is_threshold = key.endswith("expert_threshold")
        atol = tolerance["thresholds_atol" if is_threshold else "frozen_and_buffers_atol"]
        np.testing.assert_allclose(ours[key], stored[key], rtol=0, atol=atol, err_msg=key)
    error = np.sort(np.abs(_flat(case, ours) - _flat(case, stored)))
    assert error[-1] <= tolerance["final_and_ema_atol_all"], name
    assert error[int(0.99 * len(error))] <= tolerance["final_and_ema_atol_99_percent"], name


def _flat(case, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """All trainable elements, but for those that the case declares to be rounding noise."""
    noise = case.config["checks"]["stability_float64"].get("noise_elements", {}).get("tensors", {})
    kept = []
    for key in sorted(tensors):
        if not BUFFERS.fullmatch(key):
            tensor = tensors[key]
            if key in noise:  # such as "[16:32]"
                start, stop = map(int, re.fullmatch(r"\[(\d+):(\d+)\]", noise[key]).groups())
                tensor = np.delete(tensor, slice(start, stop), axis=0)
            kept.append(tensor.ravel())
    return np.concatenate(kept)
