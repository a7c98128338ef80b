"""Checks of training with the DDPM loss: the recorded steps through the real training step."""

from __future__ import annotations

import numpy as np

from moe_diffusion.diffusion import ddpm, objectives

from . import trajectory


def check(case, family: str) -> None:
    """Losses, gradients, weights and averages of every step."""
    DdpmReplay(case, family).check()


class DdpmReplay(trajectory.Replay):
    """Epsilon and variance, mse + vb."""

    path = "ddpm"
    inputs = ("x_start", "noise", "t", "y", "drop_uniform")

    def loss(self, params, router_state, batch):
        draws = objectives.Draws(batch["t"], batch["noise"], batch["drop_uniform"])
        return self.loss_of(params, router_state, batch["x_start"], batch["y"], draws)

    def look(self, variables, batch) -> None:
        x_start, noise, t, y, drop = (batch[name] for name in self.inputs)
        y = np.where(drop < self.case.hparams["class_dropout_prob"], self.model.num_classes, y)
        process = ddpm.linear_process()
        x_t = ddpm.diffuse(process, x_start, t, noise)
        output, _ = self.forward(variables, x_t, t.astype(np.float32), y, True)
        mse, vb = ddpm.loss_terms(process, output, x_start, t, noise)
        self.log["out/mse"].append(mse)
        self.log["out/vb"].append(vb)

    def read(self, metrics) -> None:
        self.log["out/loss"].append(metrics["loss"])
