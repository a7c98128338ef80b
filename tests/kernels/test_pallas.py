"""Pallas kernels beyond their numbers (tests/moe/test_dispatch.py): tiles, odd shapes, lowering."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moe_diffusion.kernels import mlp, tuning
from moe_diffusion.kernels.gpu.triton import GPUKernels
from moe_diffusion.kernels.grouped import grouped
from moe_diffusion.kernels.reference import reference
from moe_diffusion.kernels.tiles import fixed_tiles, num_tiles, plan_tiles
from moe_diffusion.kernels.tpu.tpu import TPUKernels

E, K, T = 4, 2, 150


def params(width, hidden, kind, bias, dtype=jnp.float32):
    shapes = {name: (E, width, hidden) for name in mlp.inputs(kind)} | {"down": (E, hidden, width)}
    if bias:
        shapes |= {f"{name}_bias": (E, shape[-1]) for name, shape in shapes.items()}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape, dtype) * shape[-2] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def routing():
    """Uneven, expert 2 without tokens."""
    expert = np.random.default_rng(0).choice([0, 1, 3], size=T * K, p=[0.7, 0.2, 0.1])
    weight = np.random.default_rng(1).normal(size=T * K)
    token = np.repeat(np.arange(T), K)
    return jnp.asarray(token), jnp.asarray(expert), jnp.asarray(weight, jnp.float32)


def plan(tile):
    token, expert, _ = routing()
    return plan_tiles(token, expert, num_tokens=T, num_experts=E, slots_per_token=K, tile=tile)


def test_tiles_by_hand():
    # Tokens 0, 1, 2 with one assignment each, to experts 1, unused, 1; tiles of two rows.
    found = plan_tiles(
        jnp.array([0, 1, 2]), jnp.array([1, 2, 1]), num_tokens=3, num_experts=2,
        slots_per_token=None, tile=2,
    )  # fmt: skip
    assert found.expert.tolist() == [0, 1, 1, 1] and found.used.tolist() == [2]
    assert found.rows.token.tolist() == [3, 3, 0, 2, 3, 3, 3, 3]  # expert 0 has one empty tile
    assert found.assignment.tolist() == [3, 3, 0, 2, 3, 3, 3, 3]
    assert found.row.tolist() == [2, 8, 3]
    assert found.start.tolist() == [0, 1] and found.end.tolist() == [1, 2]


def test_every_used_row_is_its_assignment():
    token, expert, _ = routing()
    found = plan(16)
    assert found.rows.token.shape == (num_tiles(T * K, E, 16) * 16,)
    np.testing.assert_array_equal(found.assignment[found.row], np.arange(T * K))
    np.testing.assert_array_equal(found.rows.token[found.row], token)
    np.testing.assert_array_equal(found.expert[found.row // 16], expert)


def test_fixed_tiles_round_up():
    found = fixed_tiles(jnp.array([[0, 1, 2], [2, 1, 9]]), num_tokens=3, tile=2)
    assert found.rows.token.tolist() == [0, 1, 2, 3, 2, 1, 9, 3]
    assert found.row.tolist() == [0, 1, 2, 4, 5, 6]
    assert found.assignment.tolist() == [0, 1, 2, 6, 3, 4, 5, 6]
    assert found.expert.tolist() == [0, 0, 1, 1] and found.used.tolist() == [4]


@pytest.mark.parametrize(
    ("kernels", "width", "hidden", "tile"),
    [
        # A block of the hidden width that does not divide it.
        pytest.param(TPUKernels(block_h=16, interpret=True), 24, 40, 128, id="tpu"),
        # Nothing divides anything.
        pytest.param(
            GPUKernels(tuning.GPUBlocks(32, 32, 16, 4), interpret=True), 24, 40, 32, id="gpu"
        ),
    ],
)
def test_blocks_that_do_not_divide_the_widths(kernels, width, hidden, tile):
    token, expert, weight = routing()
    tree, found = params(width, hidden, "swiglu", True), plan(tile)
    x, d_y = jax.random.normal(jax.random.key(1), (2, T, width))

    def ours(x, weight, tree):
        return grouped(kernels, "swiglu", x, weight, tree, found)

    def oracle(x, weight, tree):
        return reference(x, token, expert, weight, tree, "swiglu")

    def run(f):
        y, pull = jax.vjp(f, x, weight, tree)
        return y, pull(d_y)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-5),
        jax.jit(run, static_argnums=0)(ours),
        run(oracle),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_fetched_inside_the_kernel_are_the_same(dtype):
    tree = params(128, 40, "gelu", False, jnp.dtype(dtype))
    x = jax.random.normal(jax.random.key(1), (T - 1, 128), dtype)  # odd: rows of bf16 go in pairs
    token, expert, weight = routing()
    found = plan_tiles(
        jnp.minimum(token, T - 2), expert, num_tokens=T - 1, num_experts=E, slots_per_token=None,
        tile=128,
    )  # fmt: skip
    fetched, gathered = (
        jax.jit(grouped, static_argnums=(0, 1))(
            TPUKernels(40, gather=gather, interpret=True), "gelu", x, weight, tree, found
        )
        for gather in (True, False)
    )
    np.testing.assert_array_equal(fetched, gathered)


@pytest.mark.parametrize(
    "platform, device", [("tpu", "TPU v5 lite"), ("cuda", "NVIDIA A100-SXM4-40GB")]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_forward_and_backward_lower_for_the_platform(platform, device, dtype):
    """To Mosaic's or Triton's dialect; no such device or compiler is needed for it."""
    token, expert, weight = routing()
    tree = params(128, 256, "swiglu", True, jnp.dtype(dtype))
    x = jnp.ones((T, 128), dtype)
    if platform == "tpu":
        kernels, tile = TPUKernels(block_h=128, gather=True), 128
    else:
        kernels, tile = GPUKernels(tuning.gpu_blocks(tree, T * K)), 64

    def gradients(x, weight, tree):
        y, pull = jax.vjp(lambda *a: grouped(kernels, "swiglu", *a, plan(tile)), x, weight, tree)
        return y, pull(y)

    absent = AbstractDevice(device_kind=device, num_cores=None, platform=platform)
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=absent)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(gradients).trace(x, weight, tree).lower(lowering_platforms=(platform,))
    calls = {"tpu": ("tpu_custom_call", 5), "cuda": ("__gpu$xla.gpu.triton", 7)}[platform]
    assert lowered.as_text().count(calls[0]) == calls[1]
    assert "scatter" not in lowered.as_text()


def test_tuned_tiles_are_preferred(tmp_path, monkeypatch):
    tree = {name: jax.ShapeDtypeStruct((E, 128, 256), "bfloat16") for name in ("up", "gate")}
    assert tuning.key(tree, 1000) == "128,256,4,bfloat16,2^8"
    assert tuning.tpu_tiles(tree, 1000) == tuning.TPUTiles(128, 256)
    assert tuning.tpu_tiles(tree, E * 1706, slots=1706).rows == 256  # 1,792 rows, not 2,048
    table = {jax.devices()[0].device_kind: {tuning.key(tree, 1000): [256, 64]}}
    (tmp_path / "tiles.json").write_text(json.dumps(table))
    monkeypatch.setenv("MOE_DIFFUSION_TILES", str(tmp_path / "tiles.json"))
    assert tuning.tpu_tiles(tree, 1000) == tuning.TPUTiles(256, 64)
    assert tuning.tpu_tiles(tree, 9000) == tuning.TPUTiles(512, 256)
