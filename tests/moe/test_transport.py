"""Experts on other devices: values and gradients of every transport are those of one device."""

from __future__ import annotations

import contextlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from moe_diffusion.moe import transport
from moe_diffusion.moe.dispatch import dispatch
from moe_diffusion.moe.layer import Experts, MoE
from moe_diffusion.moe.routers import ROUTERS
from moe_diffusion.moe.routing import Routing, Work, by_expert, by_token, top_experts, top_tokens
from moe_diffusion.parallel.mesh import AXES, make_mesh
from moe_diffusion.parallel.rules import use_preset
from moe_diffusion.planning.topologies import describe

D, H, E, T, G = 8, 12, 8, 16, 8
QUICK = {"xla_backend_optimization_level": 0}


def mesh(expert=4, preset="fsdp_ep"):
    """Two devices along fsdp, four along expert."""
    return make_mesh(ConfigDict({"preset": preset, "expert": expert}), jax.devices()[:8])


@contextlib.contextmanager
def on_devices(preset="fsdp_ep"):
    """On the mesh of a preset, with weights that lie as the preset says."""
    with jax.set_mesh(mesh(preset=preset)), use_preset(preset):
        yield


def weights():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"up": (E, D, H), "gate": (E, D, H), "down": (E, H, D)}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def routing(name):
    scores = jax.nn.softmax(jax.random.normal(jax.random.key(1), (G, T, E)))
    if name == "token choice":
        expert = top_experts(scores, 2)
        return by_token(expert, jnp.take_along_axis(scores, expert, axis=-1))
    if name == "expert choice":
        weight, token = top_tokens(scores, 4)
        return by_expert(token, weight)
    if name == "unused slots":
        weight, token = top_tokens(scores, 4)
        return by_expert(token, weight, used=weight > 0.15, fixed_slots=False)
    weight, token = top_tokens(scores.reshape(1, G * T, E), 21)  # 21 slots over two devices
    return by_expert(token, weight)


def run(routing, **options):
    groups = routing.token.shape[0]
    x = jax.random.normal(jax.random.key(2), (groups, G * T // groups, D))

    def both(x, weight, params):
        def layer(x, weight, params):
            chosen = routing.replace(weight=weight)
            return dispatch(x, chosen, params, kind="swiglu", capacity_factor=E, **options)[0]

        y, pull = jax.vjp(layer, x, weight, params)
        return y, pull(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    return jax.jit(both, compiler_options=QUICK)(x, routing.weight, weights())


def dropped(routing, **options):
    """What `dispatch` says that it drops."""
    x = jnp.ones((G, T, D))
    return dispatch(x, routing, weights(), kind="swiglu", backend="blocked", **options)[1]


def assert_close(got, expected):
    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

    jax.tree.map(compare, got, expected)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("token choice", "none"),
        ("token choice", "gather"),
        ("token choice", "a2a_slots"),
        ("expert choice", "gather"),
        ("expert choice", "a2a_slots"),
        ("unused slots", "gather"),
        ("unused slots", "a2a_slots"),
        ("batch pool", None),
    ],
)
def test_eight_devices_have_the_numbers_of_one(name, how):
    routed = routing(name)
    expected = run(routed)
    with on_devices():
        assert_close(run(routed, transport=how), expected)


@pytest.mark.parametrize("preset", ["dp", "fsdp"])
@pytest.mark.parametrize(
    ("name", "how"),
    [("token choice", "gather"), ("expert choice", "a2a_slots"), ("batch pool", None)],
)
def test_experts_that_are_whole_on_a_mesh_of_another_model(name, how, preset):
    """The mesh could split experts, but this model's preset does not."""
    routed = routing(name)
    expected = run(routed)
    with jax.set_mesh(mesh()), use_preset(preset):
        assert_close(run(routed, transport=how), expected)
        assert_close(run(routed), expected)


def test_the_batch_pool_is_shared_out_under_data_parallelism_too():
    routed = routing("batch pool")
    expected = run(routed)
    with on_devices("dp"):
        assert_close(run(routed), expected)


def test_what_is_beyond_the_slots_is_dropped_and_counted():
    # All tokens of all devices want expert 0, and a device may send 2 T / 8 of its T tokens there.
    routed = by_token(jnp.zeros((G, T, 1), jnp.int32), jnp.ones((G, T, 1)))
    x, params = jnp.ones((G, T, D)), weights()
    with on_devices():
        y, share = jax.jit(
            lambda x: dispatch(x, routed, params, kind="swiglu", transport="a2a_slots",
                               capacity_factor=2.0)
        )(x)  # fmt: skip
    served = (np.abs(y) > 0).any(-1).sum(-1)
    assert served.tolist() == [4] * G  # ceil(2 * 16 / 8) of 16 in each group, one to a device
    np.testing.assert_allclose(share, 12 / 16)


def test_a_transport_that_is_not_used_drops_nothing():
    routed = by_token(jnp.zeros((G, T, 1), jnp.int32), jnp.ones((G, T, 1)))
    for how in ("a2a_slots", "ragged_a2a"):
        assert dropped(routed, transport=how) == 0  # one device
    assert dropped(routed, transport="gather") is None
    assert dropped(routing("expert choice"), transport="a2a_slots") is None


def test_ragged_sizes_by_hand():
    # Two devices, two experts each, room for 5 rows.
    counts = jnp.array([[1, 2, 0, 3], [2, 1, 4, 0]])
    sizes, kept = transport.ragged_sizes(counts, 2, 5)
    # Device 0 gets 1 + 2 from itself and has room for 2 of 2 + 1; device 1 gets 3, and 2 of 4.
    assert sizes[..., 0].tolist() == [[3, 3], [2, 2]]
    assert kept.tolist() == [[[1, 2], [0, 3]], [[2, 0], [2, 0]]]


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *,
                      axis_name):  # fmt: skip
    """What lax.ragged_all_to_all does, which XLA:CPU lacks: everybody sees everything."""
    operands, starts, sizes, places = (
        jax.lax.all_gather(a, axis_name)
        for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    me, row = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    for sender in range(operands.shape[0]):
        ours = row - places[sender, me]
        sent = (ours >= 0) & (ours < sizes[sender, me])
        found = jnp.take(operands[sender], starts[sender, me] + ours, axis=0, mode="clip")
        output = jnp.where(sent[:, None], found, output)
    return output


def test_ragged_rows_have_the_numbers_of_one_device(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    # Every other token wants expert 5 first, whose device then has 1.4 times its share.
    second = jax.random.permutation(jax.random.key(4), jnp.arange(G * T) % 5).reshape(G, T)
    first = jnp.broadcast_to(5 + jnp.arange(T) % 2, (G, T))
    expert = jnp.stack([first, second], axis=-1)
    routed = by_token(expert, jax.random.uniform(jax.random.key(5), expert.shape))
    expected = run(routed)
    with on_devices():
        assert dropped(routed, transport="ragged_a2a") == 0
        assert_close(run(routed, transport="ragged_a2a"), expected)


def test_ragged_rows_without_room_are_dropped_and_counted(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    # All want expert 0: four devices send 16 rows each to one that has room for 2 * 16.
    routed = by_token(jnp.zeros((G, T, 1), jnp.int32), jnp.ones((G, T, 1)))
    with on_devices():
        y = run(routed, transport="ragged_a2a")[0]
        np.testing.assert_allclose(dropped(routed, transport="ragged_a2a"), 0.5)
        # The first two devices of four have their rows served, in both groups of devices.
        assert (np.abs(y) > 0).any(-1).mean(-1).tolist() == [1, 1, 0, 0] * 2


def test_a_layer_tells_what_ragged_rows_were_dropped():
    make_router = partial(ROUTERS["token_choice"], num_experts=E)
    layer = MoE(make_router, partial(Experts, E, H), group="shard", transport="ragged_a2a")
    x, is_null = jax.ShapeDtypeStruct((G, T, D), "float32"), jax.ShapeDtypeStruct((G,), "bool")
    with on_devices():
        init = partial(layer.init, train=True)
        metrics = jax.eval_shape(init, jax.random.key(0), x, is_null)["metrics"]
    assert metrics["dropped"].shape == ()


def test_restricted_to_some_experts():
    routed = by_token(jnp.array([[[0, 3], [2, 1]]]), jnp.array([[[0.1, 0.2], [0.3, 0.4]]]))
    mine = transport.restrict(routed, 2, 2)
    assert mine.expert.tolist() == [[2, 1, 0, 2]]
    np.testing.assert_allclose(mine.weight, [[0, 0.2, 0.3, 0]])


def test_the_cheapest_transport_that_drops_nothing():
    """48 experts, 448 hidden units, 5 experts a token; `tokens` on each device."""

    def choose(tokens, devices=16, fixed=False):
        mesh = AbstractMesh((1, 1, 1, devices, 1), AXES)
        chosen = jax.ShapeDtypeStruct((devices, 5 * tokens), "int32")
        routed = Routing(chosen, chosen, chosen, slots_per_expert=1 if fixed else None)
        x, up = (jax.ShapeDtypeStruct(s, "float32") for s in ((devices, tokens, 8), (48, 8, 448)))
        with jax.sharding.use_abstract_mesh(mesh):
            return transport.default_transport(Work(x, routed, {"up": up}, "silu", 1.25, None))

    assert choose(512, devices=1) == "none"
    assert choose(512) == "gather"  # 16 k rows against 64 k of weights
    assert choose(8192) == "none"
    assert choose(4096, fixed=True) == "a2a_slots"


@pytest.mark.parametrize("name", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("preset", ["dp", "fsdp"])
def test_routing_gathers_no_scores(name, preset):
    """XLA would gather the scores of all groups for a top-k, if it were left to it."""
    router = ROUTERS[name](E)
    x = jnp.ones((G, T, D))
    variables = router.init(jax.random.key(0), x)
    devices = mesh(preset=preset)
    with jax.set_mesh(devices):
        x = jax.device_put(
            x, jax.NamedSharding(devices, jax.P("data" if preset == "dp" else "fsdp"))
        )
        text = jax.jit(lambda x: router.apply(variables, x)[0]).lower(x).compile().as_text()
    assert not re.search(rf"all-gather[^\n]*\[{G},", text)


def test_the_pool_of_all_devices_orders_equal_scores_by_token():
    scores = jnp.round(jax.random.uniform(jax.random.key(3), (1, G * T, E)) * 4)
    weight, token = top_tokens(scores, 40)
    with on_devices():
        found = jax.jit(lambda s: top_tokens(s, 40))(scores)
    np.testing.assert_array_equal(found[0], weight)
    np.testing.assert_array_equal(found[1], token)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("how", ["none", "gather", "a2a_slots", "ragged_a2a"])
def test_transports_compile_for_tpus(how):
    """Forward and backward; the only test of `ragged_a2a`: XLA:CPU has no such collective."""
    devices = make_mesh(ConfigDict({"preset": "fsdp_ep", "expert": 4}), describe("v5e:2x4").devices)
    routed, params = routing("token choice"), weights()
    spec = jax.NamedSharding(devices, jax.P(("data", "fsdp", "expert")))
    shapes = [jax.ShapeDtypeStruct((G, T, 128), "bfloat16", sharding=spec)]
    shapes += [jax.ShapeDtypeStruct(routed.weight.shape, "float32", sharding=spec)]
    whole = jax.NamedSharding(devices, jax.P())
    wide = {name: (E, 128, 256) if name != "down" else (E, 256, 128) for name in params}
    shapes += [{n: jax.ShapeDtypeStruct(s, "float32", sharding=whole) for n, s in wide.items()}]

    def gradients(x, weight, params):
        def layer(x, weight, params):
            return dispatch(x, routed.replace(weight=weight), params, kind="swiglu", transport=how)[
                0
            ]

        y, pull = jax.vjp(layer, x, weight, params)
        return y, pull(y)

    with jax.sharding.use_abstract_mesh(devices.abstract_mesh), use_preset("fsdp_ep"):
        text = jax.jit(gradients).lower(*shapes).compile().as_text()
    assert ("ragged-all-to-all" in text) == (how == "ragged_a2a")
    assert "tpu_custom_call" in text or how == "a2a_slots"
