"""The C++ kernels beyond their numbers (see tests/moe/test_dispatch.py): blocks, builds."""

from __future__ import annotations

import ctypes
import logging
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.errors import UserError
from moe_diffusion.kernels import mlp
from moe_diffusion.kernels.cpu import library
from moe_diffusion.kernels.cpu.cpu import CPUKernels, make_plan
from moe_diffusion.kernels.grouped import grouped
from moe_diffusion.kernels.reference import reference
from moe_diffusion.kernels.tiles import plan_tiles
from moe_diffusion.moe.dispatch import choose_backend, dispatch
from moe_diffusion.moe.routing import by_token
from tests.compiler import COMPILER, needs_compiler

BUILDS = {"x86_64": ("x86-64", "haswell"), "AMD64": ("x86-64", "haswell")}
SIZES = {  # tokens, width, hidden, experts, experts of a token
    "one number": (1, 1, 1, 1, 1),
    "less than a tile": (5, 3, 7, 4, 2),
    "whole tiles": (64, 32, 64, 2, 1),
    "depth and columns of several blocks": (40, 530, 1100, 2, 1),
    "rows of several blocks": (700, 40, 33, 3, 2),
}


def assignments(tokens, experts, top_k, seed=0):
    """Skewed; the last expert has nobody where there are more than two."""
    rng = np.random.default_rng(seed)
    busy = experts - (experts > max(2, top_k))
    order = np.argsort(rng.random((tokens, busy)) * np.arange(1, busy + 1), axis=-1)
    token = np.repeat(np.arange(tokens), top_k)
    weight = rng.normal(size=tokens * top_k)
    return jnp.asarray(token), jnp.asarray(order[:, :top_k].ravel()), jnp.float32(weight)


def problem(size, kind="swiglu", bias=True):
    tokens, width, hidden, experts, top_k = SIZES[size]
    shapes = {name: (experts, width, hidden) for name in mlp.inputs(kind)}
    shapes["down"] = (experts, hidden, width)
    if bias:
        shapes |= {f"{name}_bias": (experts, shape[-1]) for name, shape in shapes.items()}
    keys = jax.random.split(jax.random.key(0), len(shapes) + 2)
    tree = {
        name: jax.random.normal(key, shape) * shape[-2] ** -0.5
        for key, (name, shape) in zip(keys[2:], shapes.items(), strict=True)
    }
    x, d_y = (jax.random.normal(key, (tokens, width)) for key in keys[:2])
    return x, d_y, *assignments(tokens, experts, top_k), tree


def outcome(kernels, x, d_y, token, expert, weight, tree, kind="swiglu", top_k=None):
    """y and the gradients of x, weight and tree."""
    plan = plan_tiles(
        token, expert, num_tokens=len(x), num_experts=len(tree["up"]), slots_per_token=top_k, tile=1
    )
    y, pull = jax.vjp(lambda *args: grouped(kernels, kind, *args, plan), x, weight, tree)
    return y, pull(d_y)


def oracle(x, d_y, token, expert, weight, tree, kind="swiglu"):
    def run(x, weight, tree):
        return reference(x, token, expert, weight, tree, kind)

    y, pull = jax.vjp(run, x, weight, tree)
    return y, pull(d_y)


def assert_same(ours, theirs):
    def same(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, float(abs(b).max())))

    jax.tree.map(same, ours, theirs)


@needs_compiler
def test_a_compiler_is_enough():
    assert library.available()


@needs_compiler
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("size", SIZES)
def test_blocks_that_do_not_divide_the_sizes(size, kind):
    given, top_k = problem(size, kind), SIZES[size][-1]
    expected = oracle(*given, kind)
    assert_same(outcome(CPUKernels(), *given, kind), expected)
    assert_same(outcome(CPUKernels(), *given, kind, top_k=top_k), expected)


@needs_compiler
@pytest.mark.parametrize("slots_per_token", [None, 2])
@pytest.mark.parametrize("unused", [0, 3])
def test_counting_sorts(slots_per_token, unused):
    expert = np.random.default_rng(0).choice([0, 1, 3], size=40)  # nobody chooses expert 2
    expert[:unused] = 4
    token = jnp.repeat(jnp.arange(20), 2)
    sizes = {"num_tokens": 20, "num_experts": 4, "slots_per_token": slots_per_token}
    counted = make_plan(token, jnp.asarray(expert), **sizes)
    expected = plan_tiles(token, jnp.asarray(expert), **sizes, tile=1)
    jax.tree.map(np.testing.assert_array_equal, counted, expected)


@needs_compiler
def test_two_runs_give_the_same_bits():
    given = problem("rows of several blocks")
    first, again = (outcome(CPUKernels(), *given) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@needs_compiler
def test_tokens_that_nobody_serves_are_zero():
    # K = 1 writes results where the tokens stand, so what is not written must be cleared.
    x, d_y, token, expert, weight, tree = problem("whole tiles")
    expert = jnp.where(token % 3 == 0, len(tree["up"]), expert)
    y, (d_x, _, _) = outcome(CPUKernels(), x, d_y, token, expert, weight, tree, top_k=1)
    np.testing.assert_array_equal(y[::3], 0)
    np.testing.assert_array_equal(d_x[::3], 0)
    expected, _ = oracle(x, d_y, token, expert, weight, tree)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_a_batch_of_layers():
    x, d_y, *given = problem("less than a tile")
    batch = jnp.stack([x, 2 * x, -x])
    together = jax.jit(jax.vmap(lambda x: outcome(CPUKernels(), x, d_y, *given)))(batch)
    apart = [outcome(CPUKernels(), x, d_y, *given) for x in batch]
    assert_same(together, jax.tree.map(lambda *parts: jnp.stack(parts), *apart))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("architecture", BUILDS.get(platform.machine(), ()))
def test_other_instruction_sets(architecture, tmp_path):
    spellings = (architecture, architecture.replace("-", "_"))  # the second is Zig's
    flags = tuple((f"-march={name}",) for name in spellings)
    path = library.build(COMPILER, tmp_path, flags)
    library.register(ctypes.CDLL(str(path)), f"_{architecture}")
    for size in SIZES:
        given = problem(size)
        assert_same(outcome(CPUKernels(f"_{architecture}"), *given), oracle(*given))


@needs_compiler
def test_a_library_is_built_once(tmp_path):
    path = library.build(COMPILER, tmp_path)
    made = path.stat().st_mtime_ns
    assert library.build(COMPILER, tmp_path) == path
    assert path.stat().st_mtime_ns == made and list(tmp_path.iterdir()) == [path]


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "other bytes", "of others", "a link"])
def test_a_library_that_is_not_as_it_was_built_is_built_again(damage, tmp_path):
    """A cut one would be SIGBUS when it is called, and a planted one would run."""
    path = library.build(COMPILER, tmp_path)
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "other bytes":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "of others":
        path.chmod(0o777)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    again = library.build(COMPILER, tmp_path)
    assert again.read_bytes() == whole or again != path  # compilers may differ in a time stamp
    assert again.stat().st_mode & 0o777 == 0o700 and not again.is_symlink()
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert library.build(COMPILER, tmp_path) == again


@needs_compiler
def test_a_source_that_does_not_compile_leaves_nothing(tmp_path, monkeypatch):
    source = tmp_path / "wrong.cc"
    source.write_text("int wrong() { return nonsense; }")
    monkeypatch.setattr(library, "SOURCE", source)
    folder = tmp_path / "cache"
    folder.mkdir()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        library.build(COMPILER, folder)
    assert "nonsense" in library._reason(caught.value)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "No such file"),
        (f"{sys.executable} -c 'raise SystemExit(3)'", "status 3"),
    ],
)
def test_without_a_compiler_xla_does_it(compiler, reason, monkeypatch, caplog):
    monkeypatch.setenv("CXX", compiler)
    missing = library.available.__wrapped__
    monkeypatch.setattr(library, "available", missing)
    routing = by_token(jnp.zeros((1, 4, 1), jnp.int32), jnp.ones((1, 4, 1)))
    with caplog.at_level(logging.WARNING):
        assert choose_backend("cpu", routing, "float32", False)[0] == "blocked"
    assert "no C++ compiler works here" in caplog.text and reason in caplog.text
    with pytest.raises(UserError, match="pip install ziglang"):
        dispatch(jnp.ones((1, 4, 2)), routing, {}, kind="silu", backend="cpu")


def test_half_precision_is_left_to_xla():
    routing = by_token(jnp.zeros((1, 4, 1), jnp.int32), jnp.ones((1, 4, 1)))
    assert choose_backend("cpu", routing, "bfloat16", False)[0] == "blocked"
    with pytest.raises(UserError, match="cpu computes in float32, not bfloat16: choose auto or tp"):
        x = jnp.ones((1, 4, 2), jnp.bfloat16)
        dispatch(x, routing, {}, kind="silu", backend="cpu")
