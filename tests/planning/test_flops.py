from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from moe_diffusion import config as configs
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.models import build
from moe_diffusion.models.accounting import forward_flops, products
from moe_diffusion.planning.flops import flops_per_run, network_evaluations


class Counter:
    """A network that counts how often it runs."""

    def __init__(self):
        self.calls = 0

    def null(self, cond):
        return cond

    def apply(self, variables, x, t, cond, train):
        jax.debug.callback(self._count)
        return jnp.concatenate([x, x], axis=-1)

    def _count(self):
        self.calls += 1


def make_config(**sampling):
    config = configs.default()
    config.model.learn_sigma = True
    config.diffusion.path = sampling.pop("path", "flow")
    config.sampling.update({"steps": 4, "cfg": 1.0, **sampling})
    return config


@pytest.mark.parametrize(
    "sampling",
    [
        {"sampler": "euler"},
        {"sampler": "heun"},
        {"sampler": "heun", "final_euler": True},
        {"sampler": "heun", "cfg": 2.0},
        {"sampler": "sde"},
        {"sampler": "sde_heun"},
        {"sampler": "ddpm", "path": "ddpm"},
        {"sampler": "ddim", "path": "ddpm", "respacing": "2,3", "cfg": 2.0},
    ],
)
def test_evaluations_are_those_of_the_sampler(sampling):
    config, network = make_config(**sampling), Counter()
    z, cond = jnp.zeros((1, 2, 2, 1)), {"label": jnp.zeros(1, jnp.int32)}
    keys = jax.random.split(jax.random.key(0), 1)
    jax.block_until_ready(make_sampler(network, config)({}, z, cond, keys))
    jax.effects_barrier()
    assert network.calls == network_evaluations(config)


def test_an_interval_of_guidance_and_adaptive_steps():
    config = make_config(sampler="euler", cfg=2.0, cfg_interval=(0.25, 0.75))
    assert network_evaluations(config) == 4 * 1.5
    assert network_evaluations(make_config(sampler="dopri5")) is None


@pytest.mark.parametrize("remat,passes", [("none", 3), ("full", 4)])
def test_flops_of_a_step_are_split_over_the_chips(remat, passes):
    config = configs.load("configs/digits.py", [f"model.remat={remat}", "data.batch_size=64"])
    model = build(config.model)
    forward = forward_flops(model, 64)["total"]
    assert flops_per_run(model, config, "train", 8) == pytest.approx(passes * forward / 8)
    assert flops_per_run(model, config, "sample", 8) == pytest.approx(
        2 * 2 * config.sampling.steps * forward / 8  # Heun, guided
    )


@pytest.mark.parametrize("remat,again", [("none", 0), ("full", 1)])
def test_weights_that_are_not_trained_cost_less(remat, again):
    """A product of a layer: forward, again with remat, for its input and for its weights."""
    keys = [f"model.remat={remat}", "model.depth=2", "model.moe.skip_first=1"]

    def flops(trainable):
        config = configs.load("configs/digits.py", [*keys, f"optim.trainable={trainable}"])
        model = build(config.model)
        return flops_per_run(model, config, "train", config.data.batch_size)

    config = configs.load("configs/digits.py", keys)
    weights, maps = products(build(config.model))
    forward = sum(weights.values()) + sum(m.flops for m in maps.values())
    everything = flops("*")
    assert everything == pytest.approx((3 + again) * forward)
    # Experts of the second block: backward through that block and what follows.
    second = sum(v for path, v in weights.items() if path.startswith(("layers_1", "final/")))
    attention = sum(m.flops for path, m in maps.items() if path.startswith("layers_1"))
    experts = sum(v for path, v in weights.items() if "/experts/" in path)
    expected = forward + (1 + again) * second + (2 + again) * attention + experts
    assert flops("*/experts/*") == pytest.approx(expected)
    # The embedding of labels has no product, but all blocks pass gradients on to it.
    assert flops("label_embed/*") == pytest.approx(everything - sum(weights.values()))
