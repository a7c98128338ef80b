"""DiT as a whole: segments of layers, its start at zero, remat, precision, router state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.models.parts import moe_pattern
from moe_diffusion.models.recompute import periods_at_once
from moe_diffusion.models.stack import layer_segments, next_router_state

F, T = "dense", "moe"


@pytest.mark.parametrize(
    ("pattern", "segments"),
    [
        ((F, T, F, T), (((F, T), 2),)),
        ((F, F, T, T), (((F,), 2), ((T,), 2))),
        ((F, T, F, T, F), (((F, T), 2), ((F,), 1))),
        ((F, F, F, T, F, T), (((F,), 3), ((T,), 1), ((F,), 1), ((T,), 1))),
        ((T,), (((T,), 1),)),
        ((F,) * 5, (((F,), 5),)),
        ((T, T, F) * 3, (((T, T, F), 3),)),
        ((F, T, T, T) * 2 + (F,), (((F, T, T, T), 2), ((F,), 1))),
        (("double",) * 19 + ("single",) * 38, ((("double",), 19), (("single",), 38))),
    ],
)
def test_layer_segments_cover_the_pattern(pattern, segments):
    found = layer_segments(pattern)
    assert sum((period * repeats for period, repeats in found), ()) == pattern
    if all(repeats > 1 or len(period) == 1 for period, repeats in segments):
        assert found == segments


def test_moe_pattern():
    assert moe_pattern(4, interleave=True, skip_first=0) == (False, True, False, True)
    assert moe_pattern(4, interleave=False, skip_first=2) == (False, False, True, True)
    assert moe_pattern(6, interleave=True, skip_first=2) == (False, False, False, True, False, True)


def tiny(router="token_choice", **overrides):
    """A digits config shrunk to two blocks, with `model` keys overridden."""
    keys = {"hidden_size": 16, "depth": 2, "num_heads": 2, "patch_size": 2, "moe.hidden_size": 16}
    keys |= {"moe.num_experts": 4, **overrides}
    if router == "deepseek":
        keys |= {"moe.shared_hidden_size": 16, "router.n_group": 2, "router.topk_group": 1}
    text = [f"model.{key}={value}" for key, value in keys.items()]
    return configs.load(f"configs/digits.py:router={router}", text)


def inputs(batch=4):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, 8, 8, 1)), jnp.float32)
    t = jnp.asarray(rng.random(batch), jnp.float32)
    return x, t, {"label": jnp.arange(batch, dtype=jnp.int32)}


def initial(model):
    return nn.meta.unbox(jax.jit(lambda: model.init(jax.random.key(0), *inputs(), False))())


def variables_of(model, scale=0.1):
    """Initial variables with noise on everything, since a new DiT puts out zeros."""
    variables = initial(model)
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        leaf + scale * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    state = variables.get("router_state", {})
    return {"params": jax.tree.unflatten(tree, noisy), "router_state": state}


def test_a_new_model_puts_out_zeros():
    config = tiny()
    model = build(config.model)
    variables = initial(model)
    out = model.apply(variables, *inputs(), False)
    assert out.shape == (4, 8, 8, 1) and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)


def test_learn_sigma_doubles_the_channels():
    model = build(tiny(learn_sigma="true").model)
    variables = initial(model)
    assert model.apply(variables, *inputs(), False).shape == (4, 8, 8, 2)


@pytest.mark.parametrize("remat", ["cheap", "dots", "full"])
def test_remat_changes_no_number(remat):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradients(remat),
        gradients("none"),
    )


@pytest.mark.parametrize("unroll", [1, 3])
def test_unrolled_layers_compute_the_same(unroll):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradients("none", unroll=unroll, depth=6),
        gradients("none", depth=6),  # all at once on CPU
    )


@pytest.mark.parametrize(
    ("repeats", "remat", "platform", "at_once"),
    [
        (6, "none", "cpu", 6),
        (12, "none", "cpu", 1),
        (6, "cheap", "cpu", 1),
        (6, "none", "tpu", 1),
        (28, "none", "cuda", 28),
        (40, "none", "cuda", 1),
        (12, "cheap", "gpu", 1),
    ],
)
def test_few_layers_are_unrolled_on_cpu_and_gpu(repeats, remat, platform, at_once):
    assert periods_at_once(repeats, remat, platform) == at_once


def test_computing_again_saves_memory():
    def temporaries(remat):
        model = build(tiny(remat=remat, depth=6).model)
        variables = variables_of(model)

        def loss(params):
            return (model.apply(variables | {"params": params}, *inputs(64), True) ** 2).sum()

        compiled = jax.jit(jax.grad(loss)).lower(variables["params"]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.7 * temporaries("none")


@functools.cache
def gradients(remat, **options):
    model = build(tiny(remat=remat, **options).model)
    variables = variables_of(model)

    def loss(params):
        return (model.apply(variables | {"params": params}, *inputs(), True) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss))(variables["params"])


def test_bfloat16_keeps_weights_and_output_in_float32():
    # Token choice is discrete: a rounded token may meet another expert, so dense it is.
    config = tiny("dense")
    full, half = (build(tiny("dense", dtype=dtype).model) for dtype in ("float32", "bfloat16"))
    variables = variables_of(full)
    assert config.model.dtype == "float32"
    expected, got = (
        jax.jit(lambda v, m=m: m.apply(v, *inputs(), False))(variables) for m in (full, half)
    )
    assert got.dtype == jnp.float32
    assert 0 < jnp.abs(got - expected).max() < 0.05 * jnp.abs(expected).max()
    assert {leaf.dtype for leaf in jax.tree.leaves(initial(half))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("router", ["token_choice", "expert_choice", "diffmoe", "deepseek"])
def test_router_state_moves_only_by_its_rule(router):
    config = tiny(router)
    model = build(config.model, losses=sorted(config.loss_weights))
    variables = variables_of(model)
    sown = ["losses", "metrics", "router_stats"]
    run = jax.jit(lambda variables: model.apply(variables, *inputs(), True, mutable=sown))
    out, sown = run(variables)
    assert np.isfinite(out).all()
    stats = sown.get("router_stats", {})
    state = next_router_state(model.routers(), variables["router_state"], stats)
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(variables["router_state"]), jax.tree.leaves(state), strict=True
        )
    ]
    assert changed == ([True] if router in ("diffmoe", "deepseek") else [])


def test_reversed_time_is_the_same_network_seen_from_the_data():
    """At t it sees 1000 (1 - t) and its velocity is turned round, but not the variance."""
    keys = {"learn_sigma": "true", "time_scale": 1000.0}
    plain, reverse = (
        build(tiny(**{"dit.reverse_time": r}, **keys).model) for r in ("false", "true")
    )
    variables = variables_of(plain)
    x, t, cond = inputs()
    expected = plain.apply(variables, x, 1 - t, cond, False)
    got = reverse.apply(variables, x, t, cond, False)
    assert jnp.abs(expected).min() > 0
    np.testing.assert_array_equal(got[..., :1], -expected[..., :1])
    np.testing.assert_array_equal(got[..., 1:], expected[..., 1:])


def test_the_null_label_has_its_own_row():
    model = build(tiny().model)
    variables = variables_of(model)
    x, t, cond = inputs()
    null = model.null(cond)
    np.testing.assert_array_equal(null["label"], 10)
    assert not np.allclose(
        model.apply(variables, x, t, cond, False), model.apply(variables, x, t, null, False)
    )


def test_a_loss_the_router_does_not_have_is_an_error():
    with pytest.raises(
        UserError, match="loss_weights.capacity_predictor: router 'token_choice' has no such"
    ):
        build(tiny().model, losses=["capacity_predictor"])
