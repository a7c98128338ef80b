"""A small model, loss and data with everything that the training code needs to see."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_diffusion import config as configs
from moe_diffusion.conditions import Field, cond_of
from moe_diffusion.models.stack import Model
from moe_diffusion.moe.router import Router


class LossAux(NamedTuple):
    metrics: dict[str, jax.Array]
    router_stats: Any


class Following(Router):
    """A router that only has a state, which follows what it is told."""

    def next_state(self, state, stats):
        return {"bias": 0.9 * state["bias"] + 0.1 * stats["bias"]} if stats else state


class Toy(Model):
    """Two layers on 4 x 4 images; a router state that follows the mean of the output."""

    input_shape: tuple[int, int, int] = (4, 4, 1)

    def cond_spec(self):
        return {"label": Field((), "int32", 10)}

    def null(self, cond):
        return {"label": jnp.full_like(cond["label"], 10)}

    def routers(self):
        return {"": Following(3)}

    @nn.compact
    def __call__(self, x, t, cond, train):
        y = cond["label"]
        boxed = nn.with_logical_partitioning
        normal = nn.initializers.lecun_normal()
        hidden = nn.Dense(
            32,
            kernel_init=boxed(normal, ("embed", "mlp")),
            bias_init=boxed(nn.initializers.zeros, ("mlp",)),
            name="up",
        )(x.reshape(x.shape[0], -1))
        hidden = nn.gelu(hidden + t[:, None] + 0.1 * y[:, None])
        # 12 is divided by no number of devices but 1, 2 and 4.
        odd = self.param("odd", boxed(normal, ("embed", None)), (12, 32))
        hidden = hidden + jnp.tanh(hidden @ odd.T) @ odd
        out = nn.Dense(16, kernel_init=boxed(normal, ("mlp", "embed")), name="down")(hidden)
        bias = self.variable("router_state", "bias", jnp.zeros, (3,))
        return out.reshape(x.shape) + 0.01 * bias.value.mean()


def loss_fn(params, router_state, batch, rng, frozen=None):
    """Denoises; a batch of infinite images makes the loss NaN."""
    image = batch["image"]
    noise = jax.random.normal(rng, image.shape)
    t = jnp.full(image.shape[0], 0.5)
    variables = {"params": params, "router_state": router_state}
    output = Toy().apply(variables, image + noise, t, cond_of(batch), True)
    loss = jnp.mean(jnp.square(output - image))
    return loss, LossAux({"mse": loss}, {"bias": jnp.mean(output) * jnp.ones(3)})


def exact_loss_fn(params, router_state, batch, rng, frozen=None):
    """Without noise, so that cutting a batch differently gives the same gradients."""
    t = jnp.full(batch["image"].shape[0], 0.5)
    variables = {"params": params, "router_state": router_state}
    output = Toy().apply(variables, 0.5 * batch["image"], t, cond_of(batch), True)
    loss = jnp.mean(jnp.square(output - batch["image"]))
    return loss, LossAux({"mse": loss}, {"bias": jnp.mean(output) * jnp.ones(3)})


class Batches:
    """Batch number n is a function of n alone; `bad` names batches (from 1) of infinite images."""

    def __init__(self, batch_size: int, bad: tuple[int, ...] = ()):
        self.batch_size = batch_size
        self.bad = bad
        self.next_index = 0

    def __next__(self):
        self.next_index += 1
        batch = make_batch(self.next_index, self.batch_size)
        if self.next_index in self.bad:
            batch["image"] = batch["image"] * np.float32(np.inf)
        return batch

    def get_state(self):
        return {"next_index": self.next_index}

    def set_state(self, state):
        self.next_index = state["next_index"]

    def close(self):
        pass


def make_batch(number: int, batch_size: int):
    rng = np.random.default_rng(number)
    return {
        "image": rng.standard_normal((batch_size, 4, 4, 1), np.float32),
        "label": rng.integers(0, 10, batch_size, np.int32),
    }


def make_config(**overrides):
    """A config of short runs; keyword `optim__clip_norm` sets `optim.clip_norm`."""
    config = configs.default()
    config.data.batch_size = 16
    config.optim.learning_rate = 1e-2
    config.ema.decays = (0.9, 0.5)
    config.train.num_steps = 6
    config.train.log_every = 2
    config.checkpoint.every = 3
    with config.unlocked():
        for key, value in overrides.items():
            section, _, name = key.rpartition("__")
            setattr(config[section] if section else config, name, value)
    return config


def assert_trees_equal(a, b):
    """Bitwise."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_trees_close(a, b, tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance)
