from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.training.run import prepare_run
from moe_diffusion.training.state import weights
from tests.training import toy

MODEL = toy.Toy()


def start(config):
    """State on one device."""
    return prepare_run(config, MODEL, devices=jax.devices()[:1]).create(config.seed)[0]


def make_step(config, loss_fn=toy.exact_loss_fn):
    return prepare_run(config, MODEL, loss_fn, jax.devices()[:1]).step()


def run(config, batches, loss_fn=toy.exact_loss_fn):
    state, step = start(config), make_step(config, loss_fn)
    log = []
    for batch in batches:
        state, metrics = step(state, batch, jax.random.key(config.seed))
        log.append(jax.device_get(metrics))
    return state, log


def test_a_step_by_hand():
    """Clipping, learning rate, router state and averages, each from its definition."""
    config = toy.make_config(
        optim__clip_norm=0.5, optim__weight_decay=0.1, optim__warmup_steps=2, optim__eps=1e-3
    )
    batch = toy.make_batch(1, 16)
    state = start(config)
    params, router_state = jax.device_get((state.params, state.router_state))
    (loss, aux), grads = jax.jit(jax.value_and_grad(toy.exact_loss_fn, has_aux=True))(
        params, router_state, batch, None
    )
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    after, log = run(config, [batch, batch])  # the first step has learning rate 0
    assert log[0]["loss"] == log[0]["mse"] == pytest.approx(float(loss))
    assert log[0]["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert [entry["learning_rate"] for entry in log] == pytest.approx([0.0, 5e-3])
    # Twice the same gradient: the corrected moments are g and g^2.
    grads, bias = jax.device_get((grads, aux.router_stats["bias"]))
    clipped = jax.tree.map(lambda g: g * min(1.0, 0.5 / (norm + 1e-6)), grads)
    expected = jax.tree.map(
        lambda p, g: p * (1 - 5e-3 * 0.1) - 5e-3 * g / (np.abs(g) + 1e-3), params, clipped
    )
    toy.assert_trees_close(after.params, expected, 1e-4)  # the router state moves a little
    # From 0, twice 0.9 old + 0.1 new: the params move in the last step only.
    np.testing.assert_allclose(after.router_state["bias"], 0.19 * bias, rtol=1e-3)
    average = jax.tree.map(lambda p, new: 0.9 * p + 0.1 * new, params, jax.device_get(after.params))
    toy.assert_trees_close(after.emas["0.9"]["params"], average, 1e-6)
    assert int(after.step) == 2


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_accumulation_equals_the_big_batch(reduce):
    batch = toy.make_batch(1, 16)
    cut = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), batch)
    overrides = {"optim__clip_norm": 0.3, "optim__eps": 1e-2}
    whole, whole_log = run(toy.make_config(**overrides), [batch] * 3)
    config = toy.make_config(optim__accumulate=4, optim__accumulate_reduce=reduce, **overrides)
    parts, parts_log = run(config, [cut] * 3)
    factor = 4 if reduce == "sum" else 1
    for a, b in zip(whole_log, parts_log, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(factor * a["grad_norm"], rel=1e-5)
    # Both norms are clipped to 0.3, after which the updates are the same.
    toy.assert_trees_close(parts.params, whole.params, 1e-5)
    toy.assert_trees_close(parts.router_state, whole.router_state, 1e-5)


def test_a_batch_that_is_not_cut_is_refused():
    config = toy.make_config(optim__accumulate=4)
    with pytest.raises(ValueError, match="16 micro-batches, optim.accumulate is 4"):
        run(config, [toy.make_batch(1, 16)])


def test_micro_batches_and_steps_draw_their_own_noise():
    config = toy.make_config(optim__accumulate=2)
    seen = []

    def loss_fn(params, router_state, batch, rng, frozen):
        jax.debug.callback(lambda key: seen.append(tuple(key.tolist())), jax.random.key_data(rng))
        return toy.loss_fn(params, router_state, batch, rng)

    cut = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), toy.make_batch(1, 16))
    run(config, [cut, cut], loss_fn)
    jax.effects_barrier()
    key = jax.random.key(config.seed)
    expected = [
        tuple(jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, n), i)).tolist())
        for n in range(2)
        for i in range(2)
    ]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(bad):
    def loss_fn(params, router_state, batch, rng, frozen):
        loss, aux = toy.exact_loss_fn(params, router_state, batch, rng)
        if bad == "gradient":  # 0 * infinity in the gradient of sqrt(0)
            return loss + jnp.sqrt(0 * jnp.sum(params["odd"])), aux
        return loss * jnp.inf, aux

    config = toy.make_config()
    before = jax.device_get(start(config))
    after, log = run(config, [toy.make_batch(1, 16)], loss_fn)
    assert not log[0]["finite"]
    assert np.isfinite(log[0]["loss"]) == (bad == "gradient")
    toy.assert_trees_equal(after.replace(step=before.step), before)
    assert int(after.step) == 1


def test_the_state_is_updated_in_place():
    config = toy.make_config()
    state, step = start(config), make_step(config)
    lowered = step.lower(state, toy.make_batch(1, 16), jax.random.key(0))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    assert lowered.compile().memory_analysis().alias_size_in_bytes >= size
    new, _ = step(state, toy.make_batch(1, 16), jax.random.key(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_weights_of_an_average():
    state = start(toy.make_config(ema__router_state="live"))
    assert weights(state)[0] is state.params
    params, router_state = weights(state, "0.5")
    assert params is state.emas["0.5"]["params"]
    assert router_state is state.router_state
