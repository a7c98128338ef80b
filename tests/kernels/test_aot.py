"""The Pallas kernels compiled for real devices that are not there, and the bytes they touch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from moe_diffusion.kernels import mlp, tuning
from moe_diffusion.kernels.gpu.triton import GPUKernels
from moe_diffusion.kernels.grouped import grouped
from moe_diffusion.kernels.tiles import fixed_tiles, plan_tiles
from moe_diffusion.kernels.tpu.tpu import TPUKernels
from tests.absent import compile_for

pytestmark = pytest.mark.tpu_aot

TPUS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def experts(num_experts, width, hidden, kind, bias, dtype):
    sizes = {name: (width, hidden) for name in mlp.inputs(kind)} | {"down": (hidden, width)}
    if bias:
        sizes |= {f"{name}_bias": size[1:] for name, size in sizes.items()}
    return {n: jax.ShapeDtypeStruct((num_experts, *size), dtype) for n, size in sizes.items()}


def token_choice(kernels, tile, kind, num_tokens, num_experts, top_k):
    def gradients(x, expert, weight, params):
        token = jnp.repeat(jnp.arange(num_tokens), top_k)
        plan = plan_tiles(token, expert, num_tokens=num_tokens, num_experts=num_experts,
                          slots_per_token=top_k, tile=tile)  # fmt: skip
        y, pull = jax.vjp(lambda *a: grouped(kernels, kind, *a, plan), x, weight, params)
        return y, pull(y)

    return gradients


@pytest.mark.parametrize("topology", [*TPUS, "a100:1", "h100:1"])
@pytest.mark.parametrize(
    ("width", "hidden", "num_experts", "top_k", "kind", "bias", "dtype"),
    [
        (1024, 448, 48, 5, "swiglu", False, "bfloat16"),
        (1152, 2880, 16, 2, "swiglu", False, "bfloat16"),  # no block of 128 columns divides 2880
        (384, 1536, 8, 1, "gelu", True, "float32"),
    ],
)
def test_forward_and_backward(topology, width, hidden, num_experts, top_k, kind, bias, dtype):
    params = experts(num_experts, width, hidden, kind, bias, dtype)
    num_tokens = 2048
    num = num_tokens * top_k
    if topology not in TPUS:
        blocks = tuning.gpu_blocks(params, num)
        kernels, tile, calls = GPUKernels(blocks), blocks.rows, "triton"
    else:
        tiles = tuning.tpu_tiles(params, num)
        kernels, tile, calls = TPUKernels(tiles.hidden, gather=True), tiles.rows, "tpu_custom_call"
    compiled = compile_for(
        topology,
        token_choice(kernels, tile, kind, num_tokens, num_experts, top_k),
        jax.ShapeDtypeStruct((num_tokens, width), dtype),
        jax.ShapeDtypeStruct((num,), "int32"),
        jax.ShapeDtypeStruct((num,), "float32"),
        params,
    )
    assert calls in compiled.as_text()


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_the_fused_kernel_touches_less_memory_than_xla(kind):
    """At the size of a DiffMoE-like layer: forward, rows in and rows out."""
    tokens, width, hidden, num_experts = 81_920, 768, 384, 48
    slots = tokens // num_experts
    params = experts(num_experts, width, hidden, kind, False, "bfloat16")
    shapes = (
        jax.ShapeDtypeStruct((tokens, width), "bfloat16"),
        jax.ShapeDtypeStruct((num_experts, slots), "int32"),
        jax.ShapeDtypeStruct((num_experts, slots), "float32"),
        params,
    )

    def xla(x, token, weight, params):
        rows = jnp.take(x, token.reshape(-1), axis=0, mode="fill", fill_value=0)
        rows = rows.reshape(num_experts, slots, width)
        return mlp.apply(rows, params, kind) * weight[..., None].astype(x.dtype)

    def fused(x, token, weight, params):
        tiles = tuning.tpu_tiles(params, token.size, slots=slots)
        plan = fixed_tiles(token, num_tokens=tokens, tile=tiles.rows)
        weight = jnp.take(weight.reshape(-1), plan.assignment, mode="fill", fill_value=0)
        kernels = TPUKernels(tiles.hidden, gather=True)
        return kernels.forward(kind, x, weight, params, plan, save=False)[0]

    touched = [
        compile_for("v5e:2x2", function, *shapes).cost_analysis()["bytes accessed"]
        for function in (fused, xla)
    ]
    assert touched[0] <= 0.75 * touched[1]
