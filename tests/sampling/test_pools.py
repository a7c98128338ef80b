"""Which images compete for experts: the same pools on any number of devices, jointly guided or not.

The model is a DiffMoE of random weights whose images differ visibly between pools.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion.diffusion import guidance
from moe_diffusion.diffusion.samplers import make_sampler
from moe_diffusion.models import abstract_variables, build
from moe_diffusion.parallel.mesh import make_mesh, num_pools, use_pools
from moe_diffusion.sampling.bound import BoundObserver, warning
from moe_diffusion.sampling.generate import generate, pool_of

NUM, POOL = 13, 4  # the last pool has three repetitions
LABELS = {"label": np.arange(NUM, dtype=np.int32) % 10}


def make(*overrides: str, router: str = "diffmoe"):
    """Config, model and random variables; each expert takes about half of the tokens."""
    config = configs.load(
        f"configs/digits.py:router={router}",
        [
            *("model.depth=1", "model.hidden_size=16", "model.num_heads=2", "model.patch_size=4"),
            *("model.moe.num_experts=4", "model.moe.hidden_size=8", "model.moe.interleave=false"),
            *("model.router.group=shard", "sampling.sampler=euler", "sampling.steps=2"),
            *overrides,
        ],
    )
    model = build(config.model)
    rng = np.random.default_rng(0)
    shapes = abstract_variables(model)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), shapes["params"]
    )
    state = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), shapes.get("router_state", {}))
    return config, model, {"params": params, "router_state": state}


def draw(config, model, variables, devices: int, batch_size: int = POOL, num: int = NUM):
    """The images of LABELS; one device draws without a mesh, as `sample` does."""
    pool = pool_of(config, batch_size)
    mesh = None
    if devices > 1:
        mesh = make_mesh(ConfigDict({"preset": "dp"}), jax.devices()[:devices])
    return generate(
        make_sampler(model, config, pool=pool),
        variables,
        {name: value[:num] for name, value in LABELS.items()},
        model.input_shape,
        seed=0,
        batch_size=batch_size,
        pool=pool,
        mesh=mesh,
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["sampling.joint=false", "model.router.max_capacity=0"],
        ["sampling.joint=true", "model.router.max_capacity=0", "sampling.cfg_interval=0.2,1.0"],
        pytest.param(
            ["sampling.joint=true", "model.router.group=batch", "model.router.max_capacity=1"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_images_do_not_depend_on_the_devices(overrides):
    made = make(*overrides)
    images = draw(*made, devices=1)
    assert images.shape == (NUM, 8, 8, 1)
    for devices in (2, 8):
        np.testing.assert_allclose(draw(*made, devices=devices), images, atol=1e-5)


def test_the_pool_matters_and_not_how_many_are_drawn_at_once():
    config, *rest = make("model.router.max_capacity=0")
    alone, together = (draw(config, *rest, devices=1, batch_size=size) for size in (POOL, 7))
    assert np.abs(alone - together).max() > 0.01
    config.sampling.pool = POOL
    np.testing.assert_allclose(draw(config, *rest, devices=1, batch_size=7), alone, atol=1e-5)


def test_a_pool_is_a_run_of_consecutive_images():
    """Images 4 to 7 of eight, as one pool of four that is drawn alone."""
    config, model, variables = make("model.router.max_capacity=0")
    z = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    cond = {"label": jnp.arange(8)}
    together = make_sampler(model, config, pool=4)(variables, z, cond)
    alone = make_sampler(model, config)(variables, z[4:], {"label": cond["label"][4:]})
    np.testing.assert_allclose(together[4:], alone, atol=1e-5)
    one_pool = make_sampler(model, config)(variables, z, cond)
    assert np.abs(one_pool - together).max() > 0.01
    with pytest.raises(ValueError, match="8 images are no whole pools of 3"):
        make_sampler(model, config, pool=3)(variables, z, cond)


@pytest.mark.parametrize("joint", [False, True])
def test_a_pool_needs_no_communication(joint):
    """What a mesh of 8 computes for a pool on every device contains no collective operation."""
    config, model, variables = make(f"sampling.joint={joint}", "model.router.max_capacity=0")
    mesh = make_mesh(ConfigDict({"preset": "dp"}))
    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, jax.P("data"))
        z = jax.ShapeDtypeStruct((16, 8, 8, 1), jnp.float32, sharding=split)
        label = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=split)
        sampler = make_sampler(model, config, pool=2)
        text = sampler.lower(variables, z, {"label": label}).compile().as_text()
    assert "while" in text
    assert not re.findall(
        r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text
    )


def test_one_pass_is_that_of_the_authors_order():
    """`forward_with_cfg` runs [conditional; unconditional] through the network as one pool."""
    config, model, variables = make("sampling.joint=true", "model.router.max_capacity=0")
    x = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    cond, t = {"label": jnp.arange(4)}, jnp.float32(0.5)

    @jax.jit
    def predict(x, t, cond):
        return model.apply(variables, x, jnp.full(len(x), t), cond, False)

    twice = {"label": jnp.concatenate([cond["label"], model.null(cond)["label"]])}
    with_label, without = jnp.split(predict(jnp.concatenate([x, x]), t, twice), 2)
    expected = without + config.sampling.cfg * (with_label - without)
    ours = guidance.guide(predict, model.null, config.sampling)(x, t, cond)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    config.sampling.joint = False  # two pools, of one kind each
    apart = guidance.guide(predict, model.null, config.sampling)(x, t, cond)
    assert np.abs(apart - expected).max() > 0.01


def test_who_competes():
    config, *_ = make()
    assert pool_of(config, 64) == 64
    config.sampling.pool = 125
    assert pool_of(config, 64) == 125
    for router, group in (("diffmoe", "sample"), ("token_choice", "batch"), ("dense", "batch")):
        config = configs.load(f"configs/digits.py:router={router}", ["sampling.pool=125"])
        config.model.router.group = group
        assert pool_of(config, 64) == 0, router


def test_routing_groups_are_pools():
    """Four samples of four tokens: as two pools, and as one."""
    _, model, variables = make(router="expert_choice")
    layer = model.make_moe(name=None)
    x = jax.random.normal(jax.random.key(3), (4, 4, 16))
    params = {
        "params": jax.tree.map(lambda a: a[0], variables["params"]["layers_0"]["block_0"]["moe"])
    }

    def apply(x):
        return layer.apply(params, x, jnp.zeros(len(x), bool), False)

    halves = np.concatenate([apply(x[:2]), apply(x[2:])])
    with use_pools(2):
        np.testing.assert_allclose(apply(x), halves, atol=1e-6)
        with use_pools(0):
            assert num_pools(7) == 7
    assert num_pools(7) == 7 and np.abs(apply(x) - halves).max() > 1e-3


# --- the bound -----------------------------------------------------------------------------------


def test_a_bound_that_drops_is_named():
    """All four experts want every token, C = T / 2 and a bound of 1: half is dropped."""
    config, model, variables = make("model.router.max_capacity=1")
    variables["router_state"] = jax.tree.map(lambda a: a - 9, variables["router_state"])
    observer = BoundObserver(model, config)
    images = draw(config, observer, variables, devices=8)
    assert observer.dropped() == pytest.approx(0.5)
    text = warning(config, observer.dropped())
    assert text.startswith("model.router.max_capacity = 1 dropped 50.00%")
    assert text.endswith("--config.model.router.max_capacity=0 serves everything")
    plain = draw(config, model, variables, devices=1)
    np.testing.assert_allclose(images, plain, atol=1e-5)


def test_without_a_bound_nothing_is_observed():
    config, model, variables = make("model.router.max_capacity=0")
    observer = BoundObserver(model, config)
    args = (variables, jnp.zeros((4, 8, 8, 1)), {"label": jnp.zeros(4, jnp.int32)})
    watched, plain = (make_sampler(m, config).lower(*args).as_text() for m in (observer, model))
    assert watched == plain
    assert observer.dropped() is None and warning(config, 0.0) is None
