"""Mixture of Blocks: Eq. 4 and 5 of 2510.09094 by hand, and whole models block by block."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion.models.mixture_of_blocks import BlockGroup, BlockRouter, Mixture
from moe_diffusion.models.stack import MEMBERS, Group, Stack

# --- Eq. 5: the router ---------------------------------------------------------------------------

IMAGE = [[[1.0, 0.0], [3.0, 2.0]]]  # one sample of two tokens
TEXT = [[[2.0, 4.0]]]
Y = [[1.0, 3.0]]
W_Y = [[1.0, -1.0, 0.0], [0.0, 1.0, 0.0]]  # y W_y = (1, 2, 0)


def probabilities(w_x, streams=(IMAGE, TEXT), **options):
    router = BlockRouter(3, Mixture(**options))
    params = {"x": jnp.asarray(w_x), "y": jnp.asarray(W_Y)}
    return router.apply({"params": params}, tuple(map(jnp.asarray, streams)), jnp.asarray(Y))[0]


@pytest.mark.parametrize(
    ("alpha", "gates"), [(0.0, (1, 2, 0)), (0.5, (2.5, 3, 2)), (1.0, (4, 4, 4))]
)
def test_the_router_weighs_tokens_and_condition(alpha, gates):
    """The mean of all three tokens is ((1 + 3 + 2) / 3, (0 + 2 + 4) / 3) = (2, 2)."""
    p = probabilities([[1.0, 0.0, 2.0], [1.0, 2.0, 0.0]], alpha=alpha)
    np.testing.assert_allclose(p, np.exp(gates) / np.exp(gates).sum(), rtol=1e-6)


def test_the_router_may_see_two_means_side_by_side():
    """The mean of the image is (2, 1), that of the text (2, 4): (2, 1, 2, 4) W_x = (2, 5, 0)."""
    w_x = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    p = probabilities(w_x, pool="channels", alpha=1.0)
    np.testing.assert_allclose(p, np.exp([2, 5, 0]) / np.exp([2, 5, 0]).sum(), rtol=1e-6)
    # Without a text there is one mean: the same (2, 1).
    p = probabilities(w_x[:2], (IMAGE,), pool="channels", alpha=1.0)
    np.testing.assert_allclose(p, np.exp([2, 1, 0]) / np.exp([2, 1, 0]).sum(), rtol=1e-6)


def test_the_router_may_see_normalised_vectors():
    """(2, 1, 2, 4) has mean 2.25 and variance (2 * 0.0625 + 1.5625 + 3.0625) / 4 = 1.1875;
    y = (1, 3) becomes (-1, 1), and y W_y = (-1, 2, 0)."""
    w_x = [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    p = probabilities(w_x, pool="channels", normalize=True, alpha=0.5)
    x = np.array([-1.25, 0, 1.75]) / np.sqrt(1.1875)
    gates = 0.5 * x + 0.5 * np.array([-1, 2, 0])
    np.testing.assert_allclose(p, np.exp(gates) / np.exp(gates).sum(), rtol=1e-5)


# --- Eq. 4: the group ----------------------------------------------------------------------------


class Affine(nn.Module):
    """x -> scale * x + shift on every array of a carry; the order of two of them matters."""

    @nn.compact
    def __call__(self, carry, c):
        init = nn.with_logical_partitioning(nn.initializers.ones, ())
        scale, shift = (self.param(name, init, ()) for name in ("scale", "shift"))
        return jax.tree.map(lambda x: scale * x + shift, carry)


# 2 x, x + 1, 3 x + 5, and a router that sees y alone: the gates of sample b are row b of GATES.
BLOCKS = {"scale": [2.0, 1.0, 3.0], "shift": [0.0, 1.0, 5.0]}
GATES = np.array([[2.0, 0.0, 3.0], [0.0, 2.0, 1.0], [1.0, -1.0, 0.5]])
X = np.array([1.0, 4.0, -2.0])


def group(active, select="topk", size=3, train=True, losses=False, text_tokens=0):
    options = Mixture(active=active, select=select, alpha=0.0, losses=losses)
    return BlockGroup(Affine, size, active, options, text_tokens, train)


def variables(gates=GATES, blocks=BLOCKS, tokens=1):
    router = {"x": jnp.zeros((3, gates.shape[1])), "y": jnp.asarray(gates)}
    return {"params": {"block_router": router, MEMBERS: jax.tree.map(jnp.asarray, {**blocks},
                       is_leaf=lambda x: isinstance(x, list))}}  # fmt: skip


def passed(module, gates=GATES, mutable=("intermediates", "losses", "metrics")):
    """The result of the three samples X, which fill tokens [3, 1, 3], and what was sown."""
    carry = jnp.broadcast_to(jnp.asarray(X)[:, None, None], (3, 1, 3))
    run = jax.jit(partial(module.apply, mutable=list(mutable)))
    out, sown = run(variables(gates), carry, jnp.eye(3))
    np.testing.assert_array_equal(out, jnp.broadcast_to(out[:, :, :1], out.shape))
    return out[:, 0, 0], sown


@pytest.mark.parametrize("train", [True, False])
def test_one_block_of_three(train):
    """Samples 0, 1, 2 have their largest gates at blocks 2, 1, 0."""
    out, sown = passed(group(1, train=train))
    np.testing.assert_allclose(out, [3 * 1 + 5, 4 + 1, 2 * -2])
    np.testing.assert_array_equal(sown["intermediates"]["blocks"][0], [[2], [1], [0]])
    assert sown["metrics"]["block_load_max"] == 1


@pytest.mark.parametrize("train", [True, False])
def test_two_blocks_keep_their_order(train):
    """Sample 0 prefers block 2 to block 0, and passes block 0 first."""
    out, sown = passed(group(2, train=train))
    np.testing.assert_array_equal(sown["intermediates"]["blocks"][0], [[0, 2], [1, 2], [0, 2]])
    np.testing.assert_allclose(out, [3 * (2 * 1) + 5, 3 * (4 + 1) + 5, 3 * (2 * -2) + 5])
    # Blocks 0, 1, 2 serve 2, 1, 3 of the three samples; the mean is 2.
    np.testing.assert_allclose(sown["metrics"]["block_load_max"], 3 / 2)


@pytest.mark.parametrize("train", [True, False])
def test_two_blocks_in_a_row(train):
    """Of runs 0-1 and 1-2 samples take 1, 0, 0 by the first two columns of other gates."""
    gates = np.array([[0.0, 1.0], [3.0, 2.0], [0.5, -1.0]])
    out, sown = passed(group(2, "run", train=train), gates)
    np.testing.assert_array_equal(sown["intermediates"]["blocks"][0], [[1, 2], [0, 1], [0, 1]])
    np.testing.assert_allclose(out, [3 * (1 + 1) + 5, 2 * 4 + 1, 2 * -2 + 1])


def test_all_blocks_is_no_choice():
    out, sown = passed(group(3))
    np.testing.assert_allclose(out, 3 * (2 * X + 1) + 5)
    out, sown = passed(group(3, "run"), np.zeros((3, 1)))
    np.testing.assert_allclose(out, 3 * (2 * X + 1) + 5)


def test_two_streams_pass_the_same_blocks():
    carry = (jnp.asarray(X)[:, None, None] * jnp.ones((3, 2, 3)), jnp.ones((3, 1, 3)))
    out = jax.jit(group(1).apply)(variables(), carry, jnp.eye(3))
    np.testing.assert_allclose(out[0][:, 1, 2], [8, 5, -4])
    np.testing.assert_allclose(out[1][:, 0, 0], [8, 2, 2])


def test_the_first_tokens_of_one_stream_are_its_text():
    """With alpha = 1 and two means side by side, a router that reads the text's channel 0 alone."""
    options = Mixture(alpha=1.0, pool="channels")
    module = BlockGroup(Affine, 3, 1, options, 2, False)
    w_x = jnp.zeros((6, 3)).at[3].set(jnp.array([0.0, 1.0, 2.0]))
    params = variables()["params"] | {"block_router": {"x": w_x, "y": jnp.zeros((3, 3))}}
    tokens = jnp.zeros((2, 5, 3)).at[0, :2].set(1.0).at[1, 2:].set(-1.0).at[1, :2].set(-1.0)
    run = jax.jit(partial(module.apply, mutable="intermediates"))
    _, sown = run({"params": params}, tokens, jnp.eye(3)[:2])
    np.testing.assert_array_equal(sown["intermediates"]["blocks"][0], [[2], [0]])


def test_the_balance_of_blocks_by_hand():
    """3 * sum_i f_i P_i: gates ln(1, 1, 2), ln(1, 2, 1), ln(2, 1, 1) are probabilities 1/4 and 1/2.

    With kappa = 1 each block serves one sample: f = 1/3, and the loss is 1. With a third sample
    like the first, f = (0, 1/3, 2/3) and P = (1/4, 1/3, 5/12): 3 * (1/9 + 5/18) = 7/6.
    """
    gates = np.log([[1.0, 1.0, 2.0], [1.0, 2.0, 1.0], [2.0, 1.0, 1.0]])
    _, sown = passed(group(1, losses=True), gates)
    np.testing.assert_allclose(sown["losses"]["block_balance"], 1, rtol=1e-6)
    _, sown = passed(group(1, losses=True), gates[[0, 1, 0]])
    np.testing.assert_allclose(sown["losses"]["block_balance"], 7 / 6, rtol=1e-6)
    assert "losses" not in passed(group(1), gates)[1]


# --- the straight-through gate -------------------------------------------------------------------


def gradients(module, gates=GATES):
    """Of the sum of one token's channel 0 over the samples: to the gates, blocks and input."""

    def loss(gates, blocks, x):
        carry = jnp.broadcast_to(x[:, None, None], (3, 1, 3))
        return module.apply(variables(gates, blocks), carry, jnp.eye(3))[:, 0, 0].sum()

    blocks = {name: jnp.asarray(values) for name, values in BLOCKS.items()}
    return jax.jit(jax.grad(loss, (0, 1, 2)))(jnp.asarray(gates), blocks, jnp.asarray(X))


def through_softmax(gates, d_p):
    p = np.exp(gates) / np.exp(gates).sum(1, keepdims=True)
    return p * (d_p - (p * d_p).sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("active", "select", "gates", "d_p"),
    [
        # y - x of blocks 2, 1, 0: 8 - 1, 5 - 4, -4 + 2.
        (1, "topk", GATES, [[0, 0, 7], [0, 1, 0], [-2, 0, 0]]),
        # Sample 0: 1 -> 2 -> 11. The first adds 1, times the slope 3 behind it; the second adds 9.
        # Sample 1: 4 -> 5 -> 20: 3 and 15. Sample 2: -2 -> -4 -> -7: -6 and -3.
        (2, "topk", GATES, [[3, 0, 9], [0, 3, 15], [-6, 0, -3]]),
        # A run has one p. 1 -> 2 -> 11, 4 -> 8 -> 9, -2 -> -4 -> -3: it adds 10, 5, -1.
        pytest.param(
            2,
            "run",
            np.array([[0.0, 1.0], [3.0, 2.0], [0.5, -1.0]]),
            [[0, 10], [5, 0], [-1, 0]],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_gradient_of_the_gate_is_what_a_block_adds(active, select, gates, d_p):
    d_gates, d_blocks, d_x = gradients(group(active, select), gates)
    np.testing.assert_allclose(d_gates, through_softmax(gates, d_p), rtol=1e-5, atol=1e-6)
    # Nothing else sees the gate: the rest has the gradients of a model without one.
    frozen, others, d_input = gradients(group(active, select, train=False), gates)
    assert not np.any(frozen)
    jax.tree.map(np.testing.assert_array_equal, (d_blocks, d_x), (others, d_input))


def test_the_gradients_of_a_block_come_from_its_samples():
    """kappa = 2: sample 0 passes blocks 0, 2; sample 1: 1, 2; sample 2: 0, 2 (values as above)."""
    _, blocks, x = gradients(group(2))
    # Behind block 0 and 1 lies the slope 3. Inputs of block 0: 1, -2; of 1: 4; of 2: 2, 5, -4.
    np.testing.assert_allclose(blocks["scale"], [3 * (1 - 2), 3 * 4, 2 + 5 - 4])
    np.testing.assert_allclose(blocks["shift"], [3 + 3, 3, 3])
    np.testing.assert_allclose(x, [6, 3, 6])


def test_the_gate_changes_no_bit_of_the_value():
    rng = np.random.default_rng(0)
    make = partial(group, 2)
    blocks = {name: jnp.asarray(rng.normal(size=3), jnp.float32) for name in BLOCKS}
    carry = jnp.asarray(rng.normal(size=(3, 4, 3)), jnp.float32)
    runs = [jax.jit(make(train=t).apply) for t in (True, False)]
    np.testing.assert_array_equal(*(f(variables(GATES, blocks), carry, jnp.eye(3)) for f in runs))


# --- what the program holds ----------------------------------------------------------------------


class Wide(nn.Module):
    """x -> x + tanh(x up) down, in bf16, so that weights are cast."""

    @nn.compact
    def __call__(self, x, c):
        boxed = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("embed", "mlp"))
        up, down = (
            self.param(name, boxed, shape).astype(jnp.bfloat16)
            for name, shape in (("up", (16, 48)), ("down", (48, 16)))
        )
        h = jnp.tanh(x.astype(jnp.bfloat16) @ up)
        return x + (h @ down.astype(jnp.bfloat16)).astype(x.dtype)


def wide(size=5, active=2, samples=7, tokens=9):
    """Loss and gradient of a group, traced."""
    module = BlockGroup(Wide, size, active, Mixture(active=active, losses=True), 0, True)
    x, c = jnp.ones((samples, tokens, 16)), jnp.ones((samples, 16))
    init = partial(module.init, jax.random.key(0))
    params = nn.meta.unbox(jax.eval_shape(init, x, c))["params"]

    def loss(params, x, c):
        y, sown = module.apply({"params": params}, x, c, mutable=["losses"])
        return jnp.sum(y**2) + sown["losses"]["block_balance"]

    return jax.jit(jax.value_and_grad(loss, (0, 1))).trace(params, x, c)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(value, "eqns"):
                yield from equations(value)


def test_no_weights_are_kept_for_the_samples_and_no_stack_of_zeros_is_added():
    """Neither [B, weights of a block] nor a sum of two stacks inside the loop."""
    traced = wide()
    scans = [e for e in equations(traced.jaxpr) if e.primitive.name == "scan"]
    assert len(scans) == 2  # there and back
    for scan in scans:
        for shape in (v.aval.shape for v in (*scan.invars, *scan.outvars)):
            assert shape[:1] != (7,) or shape[1:] not in ((16, 48), (48, 16))
    back = scans[1].params["jaxpr"]
    stacks = [
        eqn.primitive.name
        for eqn in equations(back)
        for v in eqn.outvars
        if v.aval.shape in ((5, 16, 48), (5, 48, 16))
    ]
    assert "dynamic_update_slice" in stacks
    assert not {*stacks} & {"add", "add_any", "broadcast_in_dim"}
    assert "7,16,48]" not in traced.lower().compile().as_text()


def test_the_work_is_that_of_the_active_blocks():
    """Products inside the loops, by the number of blocks a sample passes, not of the group."""

    def products(**sizes):
        return sum(e.primitive.name == "dot_general" for e in equations(wide(**sizes).jaxpr))

    router = products(active=1) - 6  # up and down, and two gradients of each
    assert products(active=2) == router + 12 and products(active=2, size=9) == router + 12


# --- in a stack ----------------------------------------------------------------------------------


class Layers(nn.Module):
    """A group of the three `Affine` blocks, and the same again; or of `Wide` ones."""

    block: type[nn.Module]
    remat: str = "none"

    @nn.compact
    def __call__(self, carry, c, capture=()):
        def make(kind):
            options = Mixture(alpha=0.0)
            return partial(BlockGroup, self.block, kind.size, kind.active, options, 0, True)

        return Stack((Group("a", 3, 1),) * 2, make, self.remat, unroll=1)(carry, c, capture=capture)


def test_a_captured_layer_is_what_leaves_the_group():
    """Sample 0 passes block 2, then block 2: 1 -> 8 -> 29. 1: 4 -> 5 -> 6. 2: -2 -> -4 -> -8."""
    once = variables()["params"]
    params = {"layers_0": {"block_0": jax.tree.map(lambda w: jnp.stack([w, w]), once)}}
    x = jnp.asarray(X)[:, None, None] * jnp.ones((3, 1, 3))
    run = jax.jit(lambda p, *a: Layers(Affine).apply({"params": p}, *a, capture=(0,)))
    out, features = run(params, x, jnp.eye(3))
    np.testing.assert_allclose(features[0][:, 0, 0], [8, 5, -4])
    np.testing.assert_allclose(out[:, 0, 0], [29, 6, -8])


@pytest.mark.slow
def test_what_is_computed_again_changes_no_gradient_and_keeps_no_weights():
    """Neither for every sample, nor for every layer: the weights are there anyway."""
    rng, results = np.random.default_rng(0), {}
    x, c = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((7, 5, 16), (7, 16)))
    init = partial(Layers(Wide).init, jax.random.key(0))
    shapes = nn.meta.unbox(jax.eval_shape(init, x, c))["params"]
    params = jax.tree.map(lambda w: jnp.asarray(0.2 * rng.normal(size=w.shape), w.dtype), shapes)
    for remat in ("none", "cheap", "dots", "full"):

        def loss(params, x, c, remat=remat):
            return jnp.sum(Layers(Wide, remat).apply({"params": params}, x, c)[0] ** 2)

        function = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        forward = next(e for e in equations(function.trace(params, x, c).jaxpr)
                       if e.primitive.name == "scan" and e.params["length"] == 2)  # fmt: skip
        kept = [v.aval.shape for v in forward.outvars]
        assert not [s for s in kept if s[-2:] in ((16, 48), (48, 16))], remat
        results[remat] = function(params, x, c)
    for remat in ("cheap", "dots", "full"):
        for a, b in zip(*map(jax.tree.leaves, (results[remat], results["none"])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())
