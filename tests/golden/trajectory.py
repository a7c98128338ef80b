"""Checks of training: the recorded steps are replayed through the real training step."""

from __future__ import annotations

import abc
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
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.models.stack import next_router_state
from moe_diffusion.training import optim, state, step

from . import cases, network, probe

BUFFERS = re.compile(r"(net\.)?pos_embed|.*\.(ema_decay|expert_threshold|e_score_correction_bias)")


def check(case, family: str) -> None:
    """Losses, gradients, weights, averages, thresholds and routing of every step of a flow."""
    FlowReplay(case, family).check()


class Replay(abc.ABC):
    """Runs the recorded steps of a case; a subclass knows the inputs and the loss of its kind."""

    path = "flow"
    inputs: tuple[str, ...]  # arrays "in/<name>" of a step; those with 4 axes or more are images

    def __init__(self, case, family: str):
        self.case, self.family = case, family
        self.model, self.variables = probe.build(case, family)
        self.loss_weights = probe.loss_weights(case, family)
        self.config = self.make_config()
        self.diffusion = self.make_diffusion()
        self.forward = probe.jit(functools.partial(probe.apply, self.model), static_argnums=4)
        self.log = collections.defaultdict(list)  # name of a stored array -> ours, step by step

    def make_config(self):
        """The recorded hyperparameters of the optimizer as a config of ours."""
        training = self.case.config["training"]
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
        decays = tuple(value for name, value in training.items() if name.startswith("ema_decay"))
        config.ema.update(decays=decays, router_state="average")
        return config

    def make_diffusion(self):
        """The section `diffusion` of a config, as recorded."""
        return network.diffusion_of(self.case, self.path)

    def schedule(self):
        return optim.make_schedule(self.config.optim, self.case.config["training"]["steps"])

    def loss_of(self, params, router_state, image, label, draws):
        """(loss, LossAux) of `diffusion`, of images and their labels."""
        batch, weights = {"image": image, "label": label}, self.loss_weights
        return objectives.diffusion_loss(
            self.model, params, router_state, batch, draws, self.diffusion, weights
        )

    @abc.abstractmethod
    def loss(self, params, router_state, batch):
        """(loss, LossAux) of the recorded draws."""

    @abc.abstractmethod
    def look(self, variables, batch) -> None:
        """Logs what the network does with the inputs of a step, before the step."""

    @abc.abstractmethod
    def read(self, metrics) -> None:
        """Logs the metrics of a step under the names of the stored arrays."""

    def compare_averages(self, train_state) -> None:
        """The averages after the last step."""
        compare_weights(self, "ema", exported(self, next(iter(train_state.emas.values()))))

    def check(self) -> None:
        train_step, train_state = self._start()
        key = jax.random.key(0)  # of no use: all draws are recorded
        for n in range(self.case.config["training"]["steps"]):
            batch = {name: self.case[f"in/{name}"][n] for name in self.inputs}
            batch = {k: cases.nhwc(v) if v.ndim >= 4 else v for k, v in batch.items()}
            before = jax.device_get((train_state.params, train_state.router_state))
            self.look(dict(zip(("params", "router_state"), before, strict=True)), batch)
            if n == 0:
                train_step = probe.compiled(train_step, train_state, batch, key)
            train_state, metrics = train_step(train_state, batch, key)
            self.log["out/grad_norm"].append(metrics["grad_norm"])
            self.log["out/lr"].append(metrics["learning_rate"])
            self.read(metrics)
            _read_norms(self, before[0], train_state)
            _read_thresholds(self, train_state)
            if n == 0:
                grads = _first_gradients(train_state, metrics, self.config.optim)
                network.compare_grads(self.case, self.family, self.model, grads)
        _compare_log(self.case, self.log)
        live = {"params": train_state.params, "router_state": train_state.router_state}
        compare_weights(self, "final", exported(self, live))
        self.compare_averages(train_state)
        self.case.assert_all_compared()

    def _start(self):
        """The training step, its loss reading the recorded draws, and the state before step 0."""

        def loss_fn(params, router_state, batch, key, frozen):
            del key, frozen
            return self.loss(params, router_state, batch)

        optimizer = optim.make_optimizer(self.config.optim, self.model.is_stacked)
        train_step = step.make_train_step(
            loss_fn,
            optimizer,
            self.schedule(),
            self.config,
            functools.partial(next_router_state, self.model.routers()),
        )

        @probe.jit
        def start(variables):
            return state.TrainState(
                step=jnp.zeros([], jnp.int32),
                **variables,
                emas=optim.init_emas(**variables, ema_config=self.config.ema),
                opt_state=optimizer.init(variables["params"]),
            )

        return train_step, start(self.variables)


class FlowReplay(Replay):
    """Rectified flow with the auxiliary losses of TC-DiT and DiffMoE."""

    inputs = ("x1", "z0", "t", "y", "drop_uniform")

    def loss(self, params, router_state, batch):
        draws = objectives.Draws(batch["t"], batch["z0"], batch["drop_uniform"])
        return self.loss_of(params, router_state, batch["x1"], batch["y"], draws)

    def look(self, variables, batch) -> None:
        values = [batch[name] for name in self.inputs]
        for x1, z0, t, y, drop in zip(*values, strict=True) if batch["y"].ndim == 2 else [values]:
            y = np.where(drop < self.case.hparams["class_dropout_prob"], self.model.num_classes, y)
            output, sown = self.forward(variables, paths.interpolate(x1, z0, t), t, y, True)
            residual = output[..., : self.model.input_shape[-1]] - paths.velocity(x1, z0)
            self.log["out/mse"].append(jnp.mean(residual**2, axis=(1, 2, 3)))
            record = probe.Record(self.model, sown, len(y))
            log_routing(self, record)
            for i in np.flatnonzero(self.model.moe_pattern):
                if "balance" in self.loss_weights:
                    loss = self.loss_weights["balance"] * record.sown("losses", i, "balance")
                    self.log[f"out/aux_loss_{i}"].append(loss)
                if "capacity_predictor" in self.loss_weights:
                    loss = record.sown("losses", i, "capacity_predictor")
                    self.log[f"out/Capacity_Pred_loss_{i}"].append(loss)

    def read(self, metrics) -> None:
        # TC-DiT's recorded loss leaves out the balance loss.
        name = "mse" if "balance" in self.loss_weights else "loss"
        self.log["out/loss"].append(metrics[name])
        if "capacity_predictor" in self.loss_weights:
            name = "capacity_predictor"
            self.log["out/cp_loss"].append(self.loss_weights[name] * metrics[name])


def log_routing(replay, record) -> None:
    """Every decision of every MoE layer, by token or by expert as the case has it."""
    for i in np.flatnonzero(replay.model.moe_pattern):
        chosen, _ = record.gates(i)
        by_token = chosen.reshape(-1, chosen.shape[-1])
        if f"router/blocks.{i}/idx_sorted" in replay.case:
            replay.log[f"router/blocks.{i}/idx_sorted"].append(probe.positions(by_token))
        else:
            replay.log[f"router/blocks.{i}/token_idx_sorted"].append(probe.positions(by_token.T))


def exported(replay, variables) -> dict[str, np.ndarray]:
    return interop.export_state_dict(variables, replay.model, replay.family)


def _read_norms(replay, params_before, train_state) -> None:
    """Norms over the trainable parameters after a step."""
    log, case, clip_norm = replay.log, replay.case, replay.config.optim.clip_norm
    if "out/clip_coefficient" in case:
        log["out/clip_coefficient"].append(optim.clip_factor(log["out/grad_norm"][-1], clip_norm))
    family = FAMILIES[replay.family]
    trees = [params_before, train_state.params]
    # Not as the state lists them: a pytree sorts its keys.
    trees += [train_state.emas[str(decay)]["params"] for decay in replay.config.ema.decays]
    before, after, *averaged = (
        _flat(case, keymap.export_tree({"params": params}, family, replay.model))
        for params in trees
    )
    log["out/param_norm"].append(np.linalg.norm(after))
    log["out/update_norm"].append(np.linalg.norm(after - before))
    for number, average in enumerate(averaged, start=1):
        log["out/ema_norm" + (str(number) if number > 1 else "")].append(np.linalg.norm(average))


def _read_thresholds(replay, train_state) -> None:
    """DiffMoE's thresholds after a step, live and averaged."""
    if replay.family == "diffmoe":
        averaged = next(iter(train_state.emas.values()))["router_state"]
        for name, kept in (("", train_state.router_state), ("_ema", averaged)):
            for i, threshold in network.thresholds(kept, replay.family, replay.model).items():
                replay.log[f"thresholds{name}/blocks.{i}"].append(threshold)


def _first_gradients(train_state, metrics, optim_config):
    """The gradients before clipping: after one step AdamW's first moment is (1 - b1) of them."""
    moment = jax.device_get(optax.tree.get(train_state.opt_state, "mu"))
    factor = optim.clip_factor(metrics["grad_norm"], optim_config.clip_norm)
    return jax.tree.map(lambda m: m / (1 - optim_config.b1) / factor, moment)


def _compare_log(case, log) -> None:
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


def compare_weights(replay, name: str, ours: dict[str, np.ndarray]) -> None:
    """The weights after the last step: 99 % of the elements closely, all of them loosely."""
    case = replay.case
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
