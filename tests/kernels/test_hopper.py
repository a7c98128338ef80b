"""The Mosaic kernels for Hopper: interpreted on CPU, and compiled for a GPU that is not there.

Interpret mode simulates a block's warpgroups, TMA copies and barriers by Python callbacks, so the
shapes are about as small as the kernels allow.
"""

from __future__ import annotations

import contextlib
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.benchmarks import tiles as tune
from moe_diffusion.kernels import mlp, tuning
from moe_diffusion.kernels.gpu import gpu, hopper, hopper_products
from moe_diffusion.kernels.gpu.hopper import HopperKernels, can_run
from moe_diffusion.kernels.gpu.triton import GPUKernels
from moe_diffusion.kernels.grouped import grouped
from moe_diffusion.kernels.reference import reference
from moe_diffusion.kernels.tiles import plan_tiles
from moe_diffusion.kernels.tuning import GPUBlocks
from tests.absent import compile_for


class Transposed(tuple):
    """A range of a buffer whose contents are wanted transposed."""


@contextlib.contextmanager
def interpreted(monkeypatch, **options):
    """Mosaic kernels run on CPU, by Pallas' interpret mode, which is private, with two additions.

    Before jax 0.11 it has to learn what a transposed reference is; and every block's program is
    compiled once only. Should a warpgroup fail, the ones that wait for it are let go.
    """
    pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    # Private, and so not at the top: another jax may not have them where they are.
    from jax._src.pallas.mosaic.interpret import thread_map, utils
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params, shared_memory

    programs, lock = {}, threading.Lock()

    def run(jaxpr, *args):
        with lock:
            if jaxpr not in programs:
                evaluate = functools.partial(jax.core.eval_jaxpr, jaxpr)
                programs[jaxpr] = jax.jit(evaluate).lower(*args).compile()
        try:
            programs[jaxpr](*args)
        except Exception:
            release()
            raise

    def release():
        for barrier in list(gpu_callbacks._get_shared_memory().mem.values()):
            if isinstance(barrier, shared_memory.Barrier):
                with barrier.cv:
                    barrier.phase += 1 << 20
                    barrier.cv.notify_all()

    with monkeypatch.context() as patch:
        if not hasattr(utils, "Access"):
            teach_transposes(patch, utils, shared_memory.GPUSharedMemory)
        patch.setattr(thread_map, "_run_jaxpr", run)
        try:
            with params.force_gpu_interpret_mode(params.InterpretGPUParams(**options)):
                yield
        finally:
            gpu_callbacks.reset_gpu_interpret_mode_state()


def teach_transposes(patch, utils, memory):
    """A transposed reference is read as the other, and its contents are turned."""
    from jax._src.state.types import TransposeTransform

    to_range, read = utils.to_range, memory.get_buffer_content

    def range_of(transforms):
        indexers = [t for t in transforms if not isinstance(t, TransposeTransform)]
        found = to_range(indexers)
        return Transposed(found) if len(indexers) < len(transforms) else found

    def content(self, key, range_, *args, **kwargs):
        values, *rest = read(self, key, tuple(range_), *args, **kwargs)
        return (values.T if isinstance(range_, Transposed) else values, *rest)

    patch.setattr(utils, "to_range", range_of)
    patch.setattr(memory, "get_buffer_content", content)


def experts(num_experts, width, hidden, kind, dtype):
    shapes = {name: (width, hidden) for name in mlp.inputs(kind)} | {"down": (hidden, width)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: (jax.random.normal(key, (num_experts, *shape)) * shape[0] ** -0.5).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def routing(num_tokens):
    """Two assignments of every token: most to expert 0, none to 1, the rest to 2."""
    rng = np.random.default_rng(0)
    expert = rng.choice([0, 2], size=2 * num_tokens, p=[0.9, 0.1])
    weight = jnp.asarray(rng.normal(size=2 * num_tokens), jnp.float32)
    return jnp.asarray(np.repeat(np.arange(num_tokens), 2)), jnp.asarray(expert), weight


def gradients(layer, x, weight, params, d_y):
    y, pull = jax.vjp(layer, x, weight, params)
    return y, *pull(d_y.astype(y.dtype))


def check(found, expected, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()
        assert error <= tolerance * np.abs(b).max()


# What lies beyond the end of an axis reads as zeros, as with TMA.
ZEROS = {"out_of_bounds_reads": "uninitialized", "uninitialized_memory": "zero"}


@pytest.mark.parametrize(
    ("kind", "width", "hidden", "dtype", "rows", "columns", "options"),
    [
        # Two warpgroups; to read what nothing wrote gives NaN.
        pytest.param("swiglu", 128, 128, "bfloat16", 128, 128, {}, id="swiglu"),
        # An expert with two tiles, and blocks of columns that do not divide the width.
        pytest.param(
            "gelu", 192, 128, "float16", 64, 128, ZEROS, id="gelu", marks=pytest.mark.slow
        ),
        # More steps than the ring has stages, and more than one block of columns.
        pytest.param("silu", 256, 64, "bfloat16", 64, 64, {}, id="silu", marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients(monkeypatch, kind, width, hidden, dtype, rows, columns, options):
    monkeypatch.setattr(hopper_products, "STAGES", 2)
    token, expert, weight = routing(num_tokens=40)
    params = experts(3, width, hidden, kind, dtype)
    x, d_y = jax.random.normal(jax.random.key(1), (2, 40, width), dtype)
    plan = plan_tiles(
        token, expert, num_tokens=40, num_experts=3, slots_per_token=2, tile=rows
    )  # fmt: skip
    blocks = GPUBlocks(rows, columns, 64, rows // 16 + 4, "mosaic")
    assert can_run(params, blocks, rows)
    kernels = HopperKernels(blocks)

    def layer(x, weight, params):
        return grouped(kernels, kind, x, weight, params, plan)

    def oracle(x, weight, params):
        return reference(x, token, expert, weight, params, kind)

    with interpreted(monkeypatch, **options):
        run = jax.jit(functools.partial(gradients, layer))
        found = jax.block_until_ready(run(x, weight, params, d_y))
        if kind == "swiglu":  # nothing is saved without a gradient
            np.testing.assert_array_equal(jax.jit(layer)(x, weight, params), found[0])
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weight, params, d_y))
    check(found, gradients(oracle, *wide), 0.02)


@pytest.mark.parametrize("kind", mlp.KINDS)
def test_slopes_are_the_derivatives(kind):
    values = jax.random.normal(jax.random.key(0), (len(mlp.inputs(kind)), 1000)) * 3
    inner, pull = jax.vjp(mlp.activation(kind), *values)
    found, slopes = hopper._slopes(kind, *values)
    np.testing.assert_allclose(found, inner, rtol=1e-5, atol=1e-6)
    for slope, expected in zip(slopes, pull(jnp.ones(1000)), strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-5)


def test_what_they_cannot_run_is_left_to_triton():
    blocks = GPUBlocks(64, 64, 64, 8, "mosaic")
    params = experts(3, 128, 64, "gelu", "bfloat16")
    assert can_run(params, blocks, 64) and can_run(params, blocks, 128)
    assert not can_run(params, blocks, 32)
    assert not can_run(params, blocks._replace(columns=96), 64)
    assert not can_run(experts(3, 128, 64, "gelu", "float32"), blocks, 64)
    assert not can_run(experts(3, 96, 64, "gelu", "bfloat16"), blocks, 64)
    biased = params | {"up_bias": jnp.ones((3, 64), "bfloat16")}
    assert not can_run(biased, blocks, 64)

    token, expert, weight = routing(num_tokens=40)
    plan = plan_tiles(token, expert, num_tokens=40, num_experts=3, slots_per_token=2, tile=64)
    x = jax.random.normal(jax.random.key(1), (40, 96))
    odd = experts(3, 96, 40, "gelu", "float32")

    @functools.partial(jax.jit, static_argnums=0)
    def run(kernels):
        return gradients(lambda *a: grouped(kernels, "gelu", *a, plan), x, weight, odd, x)

    found, expected = run(HopperKernels(blocks, True)), run(GPUKernels(blocks, True))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_only_the_table_chooses_them(tmp_path, monkeypatch):
    params = experts(4, 128, 64, "gelu", "bfloat16")
    monkeypatch.setenv("MOE_DIFFUSION_TILES", str(tmp_path / "tiles.json"))
    assert all(
        tuning.gpu_blocks(experts(4, 128, 64, "gelu", dtype), rows).kernels == "triton"
        for dtype in ("bfloat16", "float32") for rows in (100, 100_000)
    )  # fmt: skip
    line = {tuning.key(params, 1000): [128, 64, 64, 12, "mosaic"],
            tuning.key(params, 4000): [128, 64, 64, 4]}  # fmt: skip
    tune.merge(tmp_path / "tiles.json", jax.devices()[0].device_kind, line)
    mosaic, triton = (tuning.gpu_blocks(params, rows) for rows in (1000, 4000))
    assert mosaic.kernels == "mosaic" and triton == GPUBlocks(128, 64, 64, 4, "triton")
    assert type(gpu.choose(mosaic)) is HopperKernels
    assert type(gpu.choose(triton)) is type(gpu.choose(mosaic, interpret=True)) is GPUKernels


def test_tune_tries_them_on_hopper_and_compares_numbers(monkeypatch):
    hopper_gpu = type("Device", (), {"compute_capability": "9.0"})()
    params = experts(4, 128, 64, "gelu", "bfloat16")
    assert not any("mosaic" in sizes for sizes in tune.candidates(params))
    monkeypatch.setattr(jax, "devices", lambda: [hopper_gpu])
    found = [sizes for sizes in tune.candidates(params) if "mosaic" in sizes]
    assert len(found) == 6 and (128, 64, 64, 12, "mosaic") in found
    single = experts(4, 128, 64, "gelu", "float32")
    assert not any("mosaic" in sizes for sizes in tune.candidates(single))
    good, bad = {"a": jnp.array([1.0, -2.0])}, {"a": jnp.array([1.0, jnp.nan])}
    assert tune.agree(good, {"a": good["a"] * 1.01}) and not tune.agree(bad, good)
    assert not tune.agree({"a": jnp.array([1.1, -2.0])}, good)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("width", "hidden", "num_experts", "top_k", "kind", "rows", "columns"),
    [
        (1024, 448, 48, 5, "swiglu", 128, 128),
        (1152, 2880, 16, 2, "gelu", 128, 256),
        (384, 1536, 8, 1, "silu", 64, 64),
    ],
)
def test_forward_and_backward_compile(width, hidden, num_experts, top_k, kind, rows, columns):
    """For an H100, to machine code."""
    shapes = jax.eval_shape(lambda: experts(num_experts, width, hidden, kind, "bfloat16"))
    num_tokens, blocks = 2048, GPUBlocks(rows, columns, 64, rows // 16 + 4, "mosaic")

    def run(x, expert, weight, params):
        token = jnp.repeat(jnp.arange(num_tokens), top_k)
        plan = plan_tiles(token, expert, num_tokens=num_tokens, num_experts=num_experts,
                          slots_per_token=top_k, tile=rows)  # fmt: skip
        kernels = HopperKernels(blocks)
        return gradients(lambda *a: grouped(kernels, kind, *a, plan), x, weight, params, x)

    text = compile_for(
        "h100:1",
        run,
        jax.ShapeDtypeStruct((num_tokens, width), "bfloat16"),
        jax.ShapeDtypeStruct((num_tokens * top_k,), "int32"),
        jax.ShapeDtypeStruct((num_tokens * top_k,), "float32"),
        shapes,
    ).as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 5 + len(mlp.inputs(kind))
    assert "triton" not in text
