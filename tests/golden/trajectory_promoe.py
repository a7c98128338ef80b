"""ProMoE's training: the contrastive loss is in the gradients, but not in the stored loss."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from moe_diffusion.diffusion import objectives, paths

from . import probe, trajectory


def check(case, family: str) -> None:
    """Losses, gradients, weights, averages and routing of every step."""
    ProMoEReplay(case, family).check()


class ProMoEReplay(trajectory.Replay):
    """Rectified flow at logit-normal, shifted times."""

    inputs = ("z", "noise", "t_normal", "y", "drop_uniform")

    def time(self, batch):
        """Our times of the recorded normal draws; noisier where theirs is larger."""
        h = self.case.config["training"]
        logit = h["sigmoid_scale"] * (h["logit_mean"] + h["logit_std"] * batch["t_normal"])
        return paths.shift_time(1 / (1 + jnp.exp(logit)), h["shift"])

    def loss(self, params, router_state, batch):
        draws = objectives.Draws(self.time(batch), batch["noise"], batch["drop_uniform"])
        return self.loss_of(params, router_state, batch["z"], batch["y"], draws)

    def look(self, variables, batch) -> None:
        t, noise = self.time(batch), batch["noise"]
        dropped = batch["drop_uniform"] < self.case.hparams["class_dropout_prob"]
        y = np.where(dropped, self.model.num_classes, batch["y"])
        x_t = paths.interpolate(batch["z"], noise, t)
        output, sown = self.forward(variables, x_t, t, y, True)
        residual = output[..., : self.model.input_shape[-1]] - paths.velocity(batch["z"], noise)
        self.log["out/mse"].append(jnp.mean(residual**2, axis=(1, 2, 3)))
        self.log["out/sigma"].append(1 - t)
        record = probe.Record(self.model, sown, len(y))
        for i in np.flatnonzero(self.model.moe_pattern):
            routing = record.output(i, "moe/router")[0]
            expert = routing.expert.reshape(-1, routing.slots_per_token)
            self.log[f"router/blocks.{i}/idx_sorted"].append(np.sort(expert))
            contrast = self.loss_weights["contrast"] * record.sown("losses", i, "contrast")
            self.log[f"out/contrastive_loss_{i}"].append(contrast)

    def read(self, metrics) -> None:
        self.log["out/loss"].append(metrics["mse"])
