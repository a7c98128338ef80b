"""Weights gathered where they are used: the numbers of whole ones, on every mesh."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from moe_diffusion.parallel.mesh import AXES, make_mesh
from moe_diffusion.parallel.rules import PRESETS, spec_of, use_preset
from moe_diffusion.parallel.weights import weight_specs, with_whole_weights
from moe_diffusion.planning.topologies import describe

AUTO = (jax.sharding.AxisType.Auto,) * len(AXES)
LOGICAL = {"kernel": ("embed", "mlp"), "bias": ("mlp",), "down": ("mlp", "embed")}
MESHES = {"rings": (1, 2, 4, 1, 1), "fsdp": (1, 1, 8, 1, 1), "fsdp_ep": (1, 1, 2, 4, 1)}
MESHES |= {"dp": (1, 8, 1, 1, 1), "slices": (2, 1, 4, 1, 1)}


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"kernel": (16, 12), "bias": (12,), "down": (12, 16)}
    weights = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    return jax.random.normal(keys[-1], (8, 3, 16)), weights


def layer(x, weights):
    return jnp.tanh(x @ weights["kernel"] + weights["bias"]) @ weights["down"]


@jax.jit
def value_and_gradients(x, weights):
    def loss(x, weights):
        return jnp.sum(with_whole_weights(layer, x, weights, LOGICAL) ** 2)

    return jax.value_and_grad(loss, (0, 1))(x, weights)


@pytest.mark.parametrize("kind", MESHES)
def test_values_and_gradients_are_those_of_one_device(kind):
    x, weights = inputs()
    expected = jax.value_and_grad(lambda x, w: jnp.sum(layer(x, w) ** 2), (0, 1))(x, weights)
    mesh = jax.make_mesh(MESHES[kind], AXES, AUTO)
    preset = "fsdp" if kind in ("rings", "slices") else kind
    table = PRESETS[preset].params
    with jax.set_mesh(mesh), use_preset(preset):
        specs = weight_specs(weights, LOGICAL)
        assert specs == {n: spec_of(w.shape, LOGICAL[n], table, mesh) for n, w in weights.items()}
        placed = {
            n: jax.device_put(w, jax.NamedSharding(mesh, specs[n])) for n, w in weights.items()
        }
        got = value_and_gradients(x, placed)
        text = value_and_gradients.lower(x, placed).compile().as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)
    assert bool(re.search(r"\breduce-scatter\(", text)) == (kind != "dp")


def test_what_does_not_split_evenly_is_left_to_the_compiler():
    x, weights = inputs()
    expected = value_and_gradients(x[:3], weights)
    with jax.set_mesh(jax.make_mesh(MESHES["fsdp"], AXES, AUTO)), use_preset("fsdp"):
        got = value_and_gradients(x[:3], weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("topology", "data", "fsdp"),
    [("v5e:4x4", 4, 4), ("v5e:2x4", 1, 8), ("v5p:2x2x4", 1, 16), ("v4:4x4x4", 16, 4)],
)
def test_a_torus_is_cut_into_rings(topology, data, fsdp):
    mesh = make_mesh(ConfigDict({"preset": "fsdp"}), describe(topology).devices)
    assert dict(mesh.shape) == {"slice": 1, "data": data, "fsdp": fsdp, "expert": 1, "tensor": 1}


@pytest.mark.tpu_aot
def test_gradients_on_a_torus_leave_as_reduce_scatters():
    """Not as sums of whole arrays on all devices, which send twice as much."""
    devices = describe("v5e:4x4").devices
    mesh = make_mesh(ConfigDict({"preset": "fsdp"}), devices)
    place = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))  # noqa: E731
    weights = {"kernel": jax.ShapeDtypeStruct((1024, 4096), "bfloat16",
                                              sharding=place(("fsdp", "data")))}  # fmt: skip
    x = jax.ShapeDtypeStruct((64, 256, 1024), "bfloat16", sharding=place(("data", "fsdp")))

    def gradient(x, weights):
        def loss(weights):
            y = with_whole_weights(lambda x, w: x @ w["kernel"], x, weights, LOGICAL)
            return jnp.sum(jnp.sin(y.astype(jnp.float32)))

        return jax.grad(loss)(weights)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), use_preset("fsdp"):
        text = jax.jit(gradient).lower(x, weights).compile().as_text()
    assert "reduce-scatter" in text
    assert not re.search(r"= \S*\[1024,4096\]\S* all-reduce", text)
