"""The walk over chunks and the sorting under it; values and gradients are in test_dispatch.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.kernels import blocked as module
from moe_diffusion.kernels.blocked import by_chunks, make_plan
from moe_diffusion.kernels.reference import reference
from moe_diffusion.kernels.rows import stable_order

LOADS = {
    "even": [100] * 8,
    "one expert has several full chunks": [0, 750, 1, 0, 32, 33, 0, 16],
    "all to the last": [0] * 7 + [832],
    "nobody": [0] * 8,
}


def plan_of(load, num_tokens=64, unused=3):
    expert = np.repeat(np.arange(9), [*load, unused]).astype(np.int32)
    np.random.default_rng(0).shuffle(expert)
    token = jnp.arange(len(expert), dtype=jnp.int32) % num_tokens
    plan = make_plan(
        token, jnp.asarray(expert), num_tokens=num_tokens, num_experts=8, slots_per_token=None
    )
    return token, jnp.asarray(expert), plan


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
def test_every_tile_is_walked_over_once(load):
    plan = plan_of(load)[2]

    def chunk(size, is_first, expert, row, carry):
        visits, owner, firsts = carry
        seen = jax.lax.dynamic_slice_in_dim(visits, row, size) + 1
        visits = jax.lax.dynamic_update_slice_in_dim(visits, seen, row, 0)
        mine = jnp.full(size, expert, jnp.int32)
        owner = jax.lax.dynamic_update_slice_in_dim(owner, mine, row, 0)
        return visits, owner, firsts.at[expert].add(int(is_first))

    rows = jnp.zeros(plan.assignment.shape[0], jnp.int32)
    start = (rows, rows - 1, jnp.zeros(8, jnp.int32))
    visits, owner, firsts = jax.jit(lambda: module._walk(plan, chunk, start))()
    used = int(plan.used[0]) * plan.tile
    np.testing.assert_array_equal(visits, np.arange(len(visits)) < used)
    np.testing.assert_array_equal(owner[:used], np.repeat(plan.expert, plan.tile)[:used])
    np.testing.assert_array_equal(firsts, 1)  # so that every expert's gradient is written


def test_many_chunks_of_one_expert_match_the_reference():
    token, expert, plan = plan_of(LOADS["one expert has several full chunks"])
    keys = jax.random.split(jax.random.key(0), 6)
    x, weight = jax.random.normal(keys[0], (64, 12)), jax.random.normal(keys[1], expert.shape)
    weight = jnp.where(expert < 8, weight, 0)
    shapes = {"gate": (8, 12, 20), "up": (8, 12, 20), "down": (8, 20, 12)}
    params = {
        name: jax.random.normal(key, shape) * 0.3
        for key, (name, shape) in zip(keys[2:], shapes.items(), strict=False)
    }

    def ours(x, weight, params):
        return by_chunks("swiglu", x, weight, params, plan)

    def oracle(x, weight, params):
        return reference(x, token, expert, weight, params, "swiglu")

    def both(function):
        def run(*args):
            y, pull = jax.vjp(function, *args)
            return y, pull(jnp.cos(y))

        return jax.jit(run)(x, weight, params)

    y, (d_x, d_weight, d_params) = both(ours)
    expected, (e_x, e_weight, e_params) = both(oracle)
    e_weight = jnp.where(expert < 8, e_weight, 0)
    for ours, theirs in zip(
        jax.tree.leaves((y, d_x, d_weight, d_params)),
        jax.tree.leaves((expected, e_x, e_weight, e_params)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4 * float(abs(theirs).max()))


@pytest.mark.parametrize("bound", [7, 2**31 // 50])  # as one number, and as pairs
def test_stable_order(bound):
    values = jnp.asarray(np.random.default_rng(1).integers(0, 7, 100), jnp.int32)
    order = stable_order(values, bound)
    np.testing.assert_array_equal(order, np.argsort(values, kind="stable"))
