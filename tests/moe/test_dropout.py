"""Dropout inside experts: its masks, and values and gradients of whatever can do it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.dropout import Dropout
from moe_diffusion.models import build
from moe_diffusion.models.blocks import MLP
from moe_diffusion.moe.dispatch import dispatch
from moe_diffusion.moe.layer import Experts, MoE
from moe_diffusion.moe.routers import TokenChoice
from tests.models.test_jit import UNPOLISHED, config, inputs, variables_of
from tests.moe import test_dispatch as dispatched
from tests.moe import test_transport as transported

DROPOUT = Dropout(jax.random.key(3), 0.4)
quick = partial(jax.jit, compiler_options=UNPOLISHED)


def test_masks():
    tokens, width = 200, 64
    token, expert = jnp.arange(tokens), jnp.arange(3)[:, None]

    @quick
    def draw(dropout):
        return dropout(jnp.ones((3, tokens, width)), token, expert)

    got = np.asarray(draw(DROPOUT))
    np.testing.assert_allclose(got[got != 0], 1 / 0.6, rtol=1e-6)
    # Of n = 38,400 values the mean has a standard deviation of sqrt(0.4 / 0.6 / n) = 0.0042.
    assert abs(got.mean() - 1) < 0.02 and abs(got.var() - 0.4 / 0.6) < 0.02
    # No two tokens and no two experts have a mask in common; two masks agree in 0.52 of all units.
    kept = got.reshape(-1, width) != 0
    assert len(np.unique(kept, axis=0)) == 3 * tokens
    agreement = (kept[:-1] == kept[1:]).mean()
    assert abs(agreement - 0.52) < 0.02
    np.testing.assert_array_equal(got, draw(DROPOUT))
    assert (draw(DROPOUT.fold_in(1)) != got).any(axis=-1).all()
    # A row of its own has the mask that it has among others.
    alone = DROPOUT(jnp.ones(width), jnp.asarray(7), jnp.asarray(2))
    np.testing.assert_array_equal(alone, got[2, 7])


def by_hand(routing, tree, kind):
    """`dispatched.values_and_gradients`, assignment by assignment, the masks stored."""
    x = jax.random.normal(jax.random.key(5), (dispatched.G, dispatched.T, dispatched.D))
    out = jax.random.normal(jax.random.key(6), x.shape)
    group = np.arange(dispatched.G)[:, None]
    token = (group * dispatched.T + np.asarray(routing.token)).reshape(-1)
    expert = np.asarray(routing.expert).reshape(-1)
    units = jnp.ones((len(token), tree["up"].shape[-1]))

    def f(x, weight, tree):
        mask = DROPOUT(units, jnp.asarray(token), jnp.asarray(expert))
        rows = x.reshape(-1, dispatched.D)[token][:, None]
        own = {name: value[expert] for name, value in tree.items()}
        hidden = [mlp.project(rows, own, name) for name in mlp.inputs(kind)]
        inner = mlp.activation(kind)(*hidden) * mask[:, None]
        values = mlp.project(inner, own, "down")[:, 0] * weight.reshape(-1, 1)
        return jax.ops.segment_sum(values, token, x.shape[0] * x.shape[1]).reshape(x.shape)

    @quick
    def both(x, weight, tree):
        y, pull = jax.vjp(f, x, weight, tree)
        return y, pull(out)

    return both(x, routing.weight, tree)


@pytest.mark.parametrize(
    ("backend", "routing", "kind", "bias"),
    [
        ("reference", "skewed", "swiglu", True),
        ("blocked", "skewed", "swiglu", True),
        ("slots", "expert choice", "swiglu", False),
    ],
)
def test_values_and_gradients(backend, routing, kind, bias):
    routing, tree = dispatched.ROUTINGS[routing], dispatched.params(kind, bias)
    got = dispatched.values_and_gradients(routing, tree, kind, backend=backend, dropout=DROPOUT)
    expected = by_hand(routing, tree, kind)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5), got, expected)


def test_no_mask_is_kept_for_the_backward_pass():
    routing, tree = dispatched.ROUTINGS["uniform"], dispatched.params("swiglu", False)
    x = jnp.ones((dispatched.G, dispatched.T, dispatched.D))

    def f(x):
        return dispatch(x, routing, tree, kind="swiglu", backend="blocked", dropout=DROPOUT)[0]

    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(f, x)[1], x))
    assert kept and not any(leaf.dtype == bool for leaf in kept)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("token choice", "none"),
        pytest.param("token choice", "a2a_slots", marks=pytest.mark.slow),
        pytest.param("batch pool", None, marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_the_backward_pass_draws_the_masks_again(name, how):
    """The output is linear in the gates, so that their gradients add up to it again."""
    routing = transported.routing(name)
    with transported.on_devices():
        y, (_, d_weight, _) = transported.run(routing, transport=how, dropout=DROPOUT)
        plain, _ = transported.run(routing, transport=how)
    assert jnp.abs(y - plain).max() > 0.1
    out = np.sin(np.arange(y.size, dtype=np.float32)).reshape(y.shape)
    weighed = (np.asarray(d_weight) * np.asarray(routing.weight)).sum()
    np.testing.assert_allclose(weighed, (out * y).sum(), rtol=1e-4)


def test_devices_draw_their_own_masks():
    routing = transported.routing("token choice")
    same = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), routing)
    params, x = transported.weights(), jnp.ones((transported.G, transported.T, transported.D))
    with transported.on_devices("dp"):
        run = quick(lambda dropout: dispatch(x, same, params, kind="swiglu", dropout=dropout)[0])
        y = np.asarray(run(DROPOUT))
    assert all(np.abs(y[0] - other).max() > 0.1 for other in y[1:])


def test_backends_without_dropout_are_refused():
    routing, tree = dispatched.ROUTINGS["uniform"], dispatched.params("silu", False)
    x = jnp.ones((dispatched.G, dispatched.T, dispatched.D))
    for backend in ("cpu", "tpu", "gpu", "ragged_dot"):
        with pytest.raises(
            UserError, match="has no dropout inside experts: choose auto or slots, bl"
        ):
            dispatch(x, routing, tree, kind="silu", backend=backend, dropout=DROPOUT)
        message = f"backend = {backend} cannot do model.moe.dropout = 0.2: choose auto, blocked or"
        with pytest.raises(UserError, match=message):
            configs.validate(config("configs/jitmoe_h16.py", **{"moe.backend": backend}))


def test_shared_experts_drop_too():
    moe = MoE(
        make_router=partial(TokenChoice, 4, top_k=1),
        make_experts=partial(Experts, 4, 3),
        make_shared=partial(MLP, 16, kind="swiglu"),
        dropout=0.5,
    )
    x, is_null = jax.random.normal(jax.random.key(0), (2, 4, 8)), jnp.zeros(2, bool)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(moe.init, train=False), jax.random.key(1), x, is_null)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), nn.meta.unbox(shapes["params"]))
    params["experts"] = jax.tree.map(np.zeros_like, params["experts"])  # the shared one is left

    @quick
    def run(params, key):
        return moe.apply({"params": params}, x, is_null, True, rngs={"dropout": key})

    shared = [run(params, jax.random.key(n)) for n in (0, 0, 1)]
    np.testing.assert_array_equal(shared[0], shared[1])
    assert jnp.abs(shared[0] - shared[2]).max() > 1e-3


def test_a_model_drops_in_training_alone():
    changes = {"depth": 2, "hidden_size": 16, "jit.in_context_tokens": 0, "router.n_group": 1}
    changes |= {"router.topk_group": 1}
    published = config("configs/jitmoe_h16.py", **changes)
    assert published.model.moe.dropout == 0.2 and published.model.jit.dropout == 0
    model = build(published.model)
    plain = build(config("configs/jitmoe_h16.py", **changes, **{"moe.dropout": 0.0}).model)
    variables = variables_of(model)

    def lowered(model, train):
        rngs = {"dropout": jax.random.key(0)} if train and model is not plain else {}
        run = jax.jit(lambda v: model.apply(v, *inputs(), train, rngs=rngs))
        return run.lower(variables)

    assert lowered(model, False).as_text() == lowered(plain, False).as_text()
    # In training without dropout no key is asked for, and no mask is drawn.
    assert "bernoulli" not in lowered(plain, True).as_text()
    dropped = lowered(model, True)
    assert "threefry" in dropped.as_text()
    compiled = (run.compile(compiler_options=UNPOLISHED) for run in (dropped, lowered(plain, True)))
    first, second = (run(variables) for run in compiled)
    assert jnp.abs(first - second).max() > 1e-3
