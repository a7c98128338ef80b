"""Replays the recorded training of JiTMoE: v-loss, warm-up, parameter groups, two averages."""

from __future__ import annotations

import jax
import numpy as np

from moe_diffusion import interop
from moe_diffusion.diffusion import objectives, paths
from moe_diffusion.training import optim

from . import probe, trajectory


def check(case, family: str) -> None:
    """Losses, gradients, weights, both averages and the routing of every step."""
    JiTReplay(case, family).check()


class JiTReplay(trajectory.Replay):
    inputs = ("x", "y", "drop_uniform", "t_normal", "e_unit")

    def make_config(self):
        config, training = super().make_config(), self.case.config["training"]
        config.optim.update(
            decay_mask="matrices",
            schedule=training["lr_schedule"],
            min_learning_rate=training.get("min_lr", 0.0),
            warmup_steps=training["warmup_epochs"] * training["steps_per_epoch"],
        )
        config.ema.router_state = "live"
        return config

    def schedule(self):
        training = self.case.config["training"]
        num_steps = training["epochs"] * training["steps_per_epoch"]
        return optim.make_schedule(self.config.optim, num_steps)

    def make_diffusion(self):
        return interop.config_from_torch(self.family, self.case.hparams).diffusion

    def _draws(self, batch):
        diffusion = self.diffusion
        t = jax.nn.sigmoid(diffusion.time_mean + diffusion.time_std * batch["t_normal"])
        return objectives.Draws(t, batch["e_unit"], batch["drop_uniform"])

    def loss(self, params, router_state, batch):
        return self.loss_of(params, router_state, batch["x"], batch["y"], self._draws(batch))

    def look(self, variables, batch) -> None:
        diffusion, draws = self.diffusion, self._draws(batch)
        x_t = paths.interpolate(batch["x"], diffusion.noise_scale * draws.noise, draws.t)
        dropped = draws.drop_uniform < diffusion.cond_dropout
        y = np.where(dropped, self.model.num_classes, batch["y"])
        _, sown = self.forward(variables, x_t, draws.t, y, True)
        trajectory.log_routing(self, probe.Record(self.model, sown, len(y)))

    def read(self, metrics) -> None:
        self.log["out/loss"].append(metrics["loss"])

    def compare_averages(self, train_state) -> None:
        for name, decay in zip(("ema", "ema2"), self.config.ema.decays, strict=True):
            average = train_state.emas[str(decay)]["params"]
            variables = {"params": average, "router_state": train_state.router_state}
            trajectory.compare_weights(self, name, trajectory.exported(self, variables))
