"""On an NVIDIA GPU: the kernels' numbers at real shapes, and a training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion.benchmarks.dispatch import SHAPES
from moe_diffusion.benchmarks.steps import bench_train
from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.gpu.gpu import choose
from moe_diffusion.kernels.grouped import sorted_by_expert
from moe_diffusion.kernels.tuning import GPUBlocks
from moe_diffusion.moe.dispatch import dispatch
from moe_diffusion.moe.routing import by_token, flatten

pytestmark = pytest.mark.gpu


def layer(shape, dtype, bias, tokens=1000):
    width, hidden, num_experts, top_k = shape
    sizes = {name: (width, hidden) for name in mlp.inputs("swiglu")} | {"down": (hidden, width)}
    if bias:
        sizes |= {f"{name}_bias": size[1:] for name, size in sizes.items()}
    keys = iter(jax.random.split(jax.random.key(0), len(sizes) + 3))
    params = {
        name: (jax.random.normal(next(keys), (num_experts, *size)) * size[0] ** -0.5).astype(dtype)
        for name, size in sizes.items()
    }
    x = jax.random.normal(next(keys), (1, tokens, width), dtype)
    # Uneven, and the last expert without tokens.
    scores = jax.random.normal(next(keys), (1, tokens, num_experts))
    scores += jnp.linspace(2, -2, num_experts).at[-1].set(-1e9)
    expert = jax.lax.top_k(scores, top_k)[1]
    weight = jax.random.uniform(next(keys), expert.shape)
    return x, by_token(expert, weight), params


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] <= 2048], ids=str)
@pytest.mark.parametrize(("dtype", "bias"), [("bfloat16", False), ("float32", True)])
def test_kernels_equal_the_reference(shape, dtype, bias):
    x, routing, params = layer(shape, dtype, bias)

    def run(backend, x, weight, params):
        def apply(x, weight, params):
            return dispatch(x, routing.replace(weight=weight), params, kind="swiglu",
                            backend=backend)[0]  # fmt: skip

        y, pull = jax.vjp(apply, x, weight, params)
        return y, pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

    run = jax.jit(run, static_argnums=0)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, routing.weight, params))
    with jax.default_matmul_precision("highest"):
        found, expected = run("gpu", x, routing.weight, params), run("reference", *wide)
    tolerance = 0.03 if dtype == "bfloat16" else 1e-4
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b)).max()
        assert error <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] <= 2048], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (128, 128), (128, 256)])
def test_mosaic_kernels_equal_the_reference(shape, rows, columns):
    """Those of kernels/gpu/hopper.py, which only a table of tile sizes chooses."""
    if not jax.devices()[0].compute_capability.startswith("9."):
        pytest.skip("wgmma and TMA as used here are Hopper's")
    from moe_diffusion.kernels.gpu.hopper import can_run  # its API in Pallas is not stable

    x, routing, params = layer(shape, "bfloat16", False)
    blocks = GPUBlocks(rows, columns, 64, rows // 16 + 4, "mosaic")
    assert can_run(params, blocks, rows)

    def run(f, x, weight, params):
        y, pull = jax.vjp(f, x, weight, params)
        return y, pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

    def mosaic(x, weight, params):
        token, expert, weight = flatten(routing.replace(weight=weight), x.shape[1])
        kernels, top_k = choose(blocks), routing.slots_per_token
        arrays = (x[0], token, expert, weight, params, "swiglu", top_k)
        return sorted_by_expert(kernels, rows, *arrays)[None]

    def oracle(x, weight, params):
        return dispatch(x, routing.replace(weight=weight), params, kind="swiglu",
                        backend="reference")[0]  # fmt: skip

    run = jax.jit(run, static_argnums=0)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, routing.weight, params))
    with jax.default_matmul_precision("highest"):
        found, expected = run(mosaic, x, routing.weight, params), run(oracle, *wide)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b)).max()
        assert error <= 0.03 * np.abs(b).max()


def test_a_training_step():
    result = bench_train("configs/dsmoe_s.py", ["data.batch_size=16"], repeats=2)
    assert configs.load("configs/dsmoe_s.py").name == result["config"]
    assert result["dtype"] == "bfloat16" and result["images_per_sec"] > 0
