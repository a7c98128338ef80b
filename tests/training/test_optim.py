from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.training import optim
from tests.training import toy


class TorchAdamW:
    """torch.optim.AdamW, written out in float64."""

    def __init__(self, lr, b1, b2, eps, weight_decay):
        self.lr, self.b1, self.b2, self.eps, self.weight_decay = lr, b1, b2, eps, weight_decay
        self.n, self.m, self.v = 0, 0.0, 0.0

    def step(self, p, g):
        self.n += 1
        p = p * (1 - self.lr * self.weight_decay)
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        m_hat = self.m / (1 - self.b1**self.n)
        v_hat = self.v / (1 - self.b2**self.n)
        return p - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


def test_adamw_is_torchs():
    config = toy.make_config().optim
    config.update(learning_rate=3e-2, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1)
    optimizer, rng = optim.make_optimizer(config, lambda path: False), np.random.default_rng(0)
    expected = rng.standard_normal(50)
    params = {"w": jnp.asarray(expected, jnp.float32)}
    update, sub = jax.jit(optimizer.update), jax.jit(lambda p, u: p - 3e-2 * u)
    state, torch = optimizer.init(params), TorchAdamW(3e-2, 0.8, 0.95, 1e-3, 0.1)
    for _ in range(20):
        grad = rng.standard_normal(50)
        expected = torch.step(expected, grad)
        updates, state = update({"w": np.float32(grad)}, state, params)
        params = {"w": sub(params["w"], updates["w"])}
    np.testing.assert_allclose(params["w"], expected, rtol=2e-5, atol=2e-6)


def test_decay_mask_spares_biases_scales_and_vectors_of_a_layer():
    config = toy.make_config().optim
    config.update(weight_decay=1.0, decay_mask="matrices")
    params = {
        "layers_0": {
            "experts": {"up": np.ones((2, 4, 3, 3)), "up_bias": np.ones((2, 4, 3))},
            "attn": {"kernel": np.ones((2, 3, 3)), "bias": np.ones((2, 3, 2, 2))},
            "norm1": {"scale": np.ones((2, 3))},
            "vector": np.ones((2, 3)),
        },
        "embed": {"kernel": np.ones((3, 3)), "bias": np.ones(3), "vector": np.ones(3)},
    }
    optimizer = optim.make_optimizer(config, lambda path: path.startswith("layers_"))
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(params), params)
    decayed = [
        "/".join(key.key for key in path)
        for path, update in jax.tree_util.tree_leaves_with_path(updates)
        if update.any()
    ]
    assert decayed == ["embed/kernel", "layers_0/attn/kernel", "layers_0/experts/up"]


def test_schedules():
    config = toy.make_config().optim
    config.update(learning_rate=2.0, warmup_steps=4)
    schedule = optim.make_schedule(config, 12)
    np.testing.assert_allclose([schedule(n) for n in (0, 1, 4, 11)], [0, 0.5, 2, 2])
    config.schedule = "cosine"
    schedule = optim.make_schedule(config, 12)
    np.testing.assert_allclose([schedule(n) for n in (1, 4, 8, 12)], [0.5, 2, 1, 0], atol=1e-7)
    config.warmup_steps = 0
    assert float(optim.make_schedule(config, 12)(0)) == 2.0


def jit_rate(epoch, lr, min_lr, warmup_epochs, epochs):
    """JiT's util/lr_sched.py, written out in float64; `epoch` is fractional."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    done = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + np.cos(np.pi * done))


@pytest.mark.parametrize("min_lr,warmup_epochs", [(1e-5, 5), (0.0, 5), (2e-4, 0)])
def test_a_cosine_with_a_floor_is_jits_epoch_by_epoch(min_lr, warmup_epochs):
    epochs, steps_per_epoch, lr = 40, 25, 8e-4
    config = toy.make_config().optim
    config.update(learning_rate=lr, min_learning_rate=min_lr, schedule="cosine")
    config.warmup_steps = warmup_epochs * steps_per_epoch
    schedule = optim.make_schedule(config, epochs * steps_per_epoch)
    steps = range(0, epochs * steps_per_epoch + 1, 5)  # five of every epoch
    expected = [jit_rate(n / steps_per_epoch, lr, min_lr, warmup_epochs, epochs) for n in steps]
    np.testing.assert_allclose([schedule(n) for n in steps], expected, rtol=2e-5, atol=1e-9)
    assert expected[-1] == min_lr and max(expected) == lr
    assert float(schedule(epochs * steps_per_epoch + 100)) == pytest.approx(min_lr)


def test_other_schedules_by_hand():
    config = toy.make_config().optim
    config.update(learning_rate=2.0, min_learning_rate=0.5, warmup_steps=4, schedule="linear")
    schedule = optim.make_schedule(config, 16)
    rates = [0, 1, 2, 1.75, 1.25, 0.5, 0.5]  # from step 4 on 1.5 less in 12 steps
    np.testing.assert_allclose([schedule(n) for n in (0, 2, 4, 6, 10, 16, 20)], rates)
    config.schedule = "inverse_sqrt"
    schedule = optim.make_schedule(config, 16)
    rates = [0, 1, 2, 2 * np.sqrt(4 / 5), 1, 0.5]  # 2 sqrt(4 / n); no floor
    np.testing.assert_allclose([schedule(n) for n in (0, 2, 4, 5, 16, 64)], rates, rtol=1e-6)


def test_clip_factor_is_torchs():
    assert float(optim.clip_factor(jnp.float32(4.0), 0.0)) == 1.0
    assert float(optim.clip_factor(jnp.float32(0.5), 1.0)) == 1.0
    assert float(optim.clip_factor(jnp.float32(4.0), 1.0)) == pytest.approx(1 / (4 + 1e-6))


def test_ema_by_hand():
    config = toy.make_config().ema
    config.decays = (0.9, 0.5)
    emas = optim.init_emas({"w": jnp.float32(1.0)}, {"b": jnp.float32(0.0)}, config)
    emas = optim.update_emas(emas, {"w": jnp.float32(2.0)}, {"b": jnp.float32(1.0)}, 0, config)
    emas = optim.update_emas(emas, {"w": jnp.float32(3.0)}, {"b": jnp.float32(1.0)}, 1, config)
    # 0.9: 1 -> 1.1 -> 1.29 and 0 -> 0.1 -> 0.19; 0.5: 1 -> 1.5 -> 2.25 and 0 -> 0.5 -> 0.75
    for name, w, b in (("0.9", 1.29, 0.19), ("0.5", 2.25, 0.75)):
        assert float(emas[name]["params"]["w"]) == pytest.approx(w)
        assert float(emas[name]["router_state"]["b"]) == pytest.approx(b)


def test_ema_warmup_starts_near_the_weights():
    config = toy.make_config().ema
    config.update(decays=(0.9,), warmup=True)
    emas = optim.init_emas({"w": jnp.float32(0.0)}, {}, config)
    params = {"w": jnp.float32(1.0)}
    for step, expected in ((0, 0.9), (0, 0.99), (1000, 0.991)):  # decays 1/10, 1/10, 0.9
        emas = optim.update_emas(emas, params, {}, jnp.int32(step), config)
        assert float(emas["0.9"]["params"]["w"]) == pytest.approx(expected)


def test_ema_of_constant_weights_does_not_drift():
    config = toy.make_config().ema
    config.decays = (0.9999,)
    params = {"w": jnp.full(8, 1 / 3, jnp.float32)}
    emas = optim.init_emas(params, {}, config)
    for step in range(50):
        emas = optim.update_emas(emas, params, {}, step, config)
    toy.assert_trees_equal(emas["0.9999"]["params"], params)


@pytest.mark.parametrize("mode,expected", [("copy", {"b": 1.0}), ("live", {})])
def test_ema_router_state_modes(mode, expected):
    config = toy.make_config().ema
    config.update(decays=(0.9,), router_state=mode)
    emas = optim.init_emas({}, {"b": jnp.float32(0.0)}, config)
    emas = optim.update_emas(emas, {}, {"b": jnp.float32(1.0)}, 0, config)
    assert jax.tree.map(float, emas["0.9"]["router_state"]) == expected
