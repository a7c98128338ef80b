"""Attention's implementations agree, values and gradients, and compile where they are meant to."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.kernels import attention
from moe_diffusion.parallel.mesh import BATCH_AXES
from tests.absent import compile_for

QUICK = {"xla_backend_optimization_level": 0}


def inputs(batch=1, heads=2, kv_heads=2, tokens=128, head_dim=8, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, n, tokens, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]


def value_and_gradients(implementation, *arrays):
    def both(q, k, v, cotangent):
        y, pull = jax.vjp(lambda *a: attention.attend(*a, implementation), q, k, v)
        return y, pull(cotangent)

    return jax.jit(both, compiler_options=QUICK)(*arrays)


def by_hand(q, k, v):
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.exp(np.einsum("bhsd,bhtd->bhst", q, k) / np.sqrt(q.shape[-1]))
    return np.einsum("bhst,bhtd->bhsd", scores / scores.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_xla_by_hand(kv_heads):
    q, k, v, _ = inputs(2, 4, kv_heads, tokens=9)
    np.testing.assert_allclose(
        attention.attend(q, k, v, "xla"), by_hand(*map(np.asarray, (q, k, v))), atol=1e-5
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "head_dim"), [(4, 4, 128, 72), (4, 2, 256, 64)]
)
def test_splash_has_the_values_and_gradients_of_xla(heads, kv_heads, tokens, head_dim):
    arrays = inputs(2, heads, kv_heads, tokens, head_dim)
    assert attention.can_run("splash", *arrays[:2])
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(
        compare, value_and_gradients("splash", *arrays), value_and_gradients("xla", *arrays)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["high", "highest"])
def test_splash_has_a_kernel_for_every_precision(dtype, precision, monkeypatch):
    """Mosaic refuses "high", which an evaluation asks for (`evaluation/precision.py`)."""
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    x = jax.ShapeDtypeStruct((1, 2, 128, 64), dtype)
    with jax.default_matmul_precision(precision):
        traced = jax.jit(lambda *qkv: attention.attend(*qkv, "splash")).trace(x, x, x)
        assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(("batch", "kv_heads"), [(8, 4), (6, 2), (1, 1)])
def test_own_gradient_has_the_values_and_gradients_of_xla(batch, kv_heads):
    arrays = inputs(batch, 4, kv_heads, tokens=16)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        value_and_gradients("own_gradient", *arrays),
        value_and_gradients("xla", *arrays),
    )


def crossed(dtype="float32", batch=4, tokens=16, head_dim=8):
    """q, k, v and a cotangent, for the 12 tokens of a text, and which of them are seen."""
    q, _, _, cotangent = inputs(batch, 4, 2, tokens, head_dim, dtype)
    _, k, v, _ = inputs(batch, 4, 2, 12, head_dim, dtype)
    lengths = jnp.array([12, 1, 5, 9])[:batch]
    return (q, k, v, cotangent), jnp.arange(12) < lengths[:, None]


@pytest.mark.parametrize("implementation", ["xla", "own_gradient"])
def test_a_mask_hides_keys_by_hand(implementation):
    (q, k, v, _), seen = crossed()
    got = attention.attend(q, k, v, implementation, seen)
    for sample, length in enumerate(seen.sum(1)):
        one = (np.asarray(x)[sample : sample + 1, :, :cut] for x, cut in ((q, None), (k, length)))
        expected = by_hand(*one, np.asarray(v)[sample : sample + 1, :, :length])
        np.testing.assert_allclose(got[sample : sample + 1], expected, atol=1e-5)


def masked_gradients(implementation, arrays, seen):
    q, k, v, cotangent = arrays
    y, pull = jax.vjp(lambda *a: attention.attend(*a, implementation, seen), q, k, v)
    return y, pull(cotangent)


def test_own_gradient_of_a_text_is_that_of_xla():
    arrays, seen = crossed()
    got, expected = (masked_gradients(n, arrays, seen) for n in ("own_gradient", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
    hidden = ~np.asarray(seen)[:, None, :, None]
    for gradient in got[1][1:]:  # of k and v
        assert not np.any(np.where(hidden, gradient, 0))


def test_a_text_without_tokens_gives_finite_numbers():
    (q, k, v, cotangent), seen = crossed()
    for name in ("xla", "own_gradient"):
        y, gradients = masked_gradients(name, (q, k, v, cotangent), jnp.zeros_like(seen))
        mean = np.repeat(np.asarray(v).mean(2, keepdims=True), 2, axis=1)
        np.testing.assert_allclose(y, np.broadcast_to(mean, y.shape), atol=1e-6)
        assert all(np.isfinite(g).all() for g in gradients)


def test_splash_leaves_texts_and_masks_to_xla():
    q, k, v, _ = inputs(tokens=128)
    assert not attention.can_run("splash", q, k, masked=True)
    assert not attention.can_run("splash", q, k[:, :, :64])


def test_a_remat_policy_keeps_what_own_gradient_remembers():
    q, k, v, _ = inputs(batch=4, tokens=16)
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    attend = jax.checkpoint(lambda *a: attention.attend(*a, "own_gradient").sum(), policy=policy)
    text = str(jax.make_jaxpr(jax.grad(attend))(q, k, v))
    # 4 parts: 2 products forward; scores again and 4 gradients backward, but no second result
    assert text.count("dot_general") == 4 * (2 + 5)


def test_on_a_mesh_every_device_attends_to_its_own_images():
    arrays = inputs(batch=4)
    expected = value_and_gradients("xla", *arrays)
    mesh = jax.make_mesh((1, 2, 2, 1), BATCH_AXES, (jax.sharding.AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P(BATCH_AXES))
        got = value_and_gradients("splash", *jax.device_put(arrays, place))
    assert not got[0].sharding.is_fully_replicated
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_defaults():
    choose = attention.default_implementation
    few, many = 2 * 16 * 256**2, 16 * 1024**2
    assert [choose("tpu", scores) for scores in (few, many)] == ["xla", "splash"]
    expected = ["own_gradient", "cudnn", "cudnn"]
    assert [choose(name, many) for name in ("cpu", "cuda", "gpu")] == expected


def test_what_a_kernel_cannot_take_is_left_to_xla():
    odd = inputs(tokens=96)  # no multiple of 128
    half = inputs(dtype="bfloat16")  # cuDNN's type, but there is no GPU
    for name, (q, k, v, _) in (("splash", odd), ("cudnn", half)):
        assert not attention.can_run(name, q, k)
        np.testing.assert_array_equal(
            attention.attend(q, k, v, name), attention.attend(q, k, v, "xla")
        )


@pytest.mark.parametrize(
    ("there", "capability", "dtype", "head_dim", "runs"),
    [
        ("gpu", "8.0", "bfloat16", 72, True),
        ("gpu", "10.0", "float16", 64, True),
        ("gpu", "7.5", "bfloat16", 64, False),  # Turing
        ("gpu", "9.0", "float32", 64, False),
        ("gpu", "9.0", "bfloat16", 36, False),
        ("gpu", "9.0", "float16", 256, False),
        ("cpu", "", "bfloat16", 64, False),  # planned for GPUs that are not there
    ],
)
def test_when_cudnn_runs(monkeypatch, there, capability, dtype, head_dim, runs):
    monkeypatch.setattr(attention, "platform", lambda: "cuda")
    monkeypatch.setattr(jax, "default_backend", lambda: there)
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    q = jax.ShapeDtypeStruct((2, 4, 256, head_dim), dtype)
    assert attention.can_run("cudnn", q, q) == runs


def compiled_text(topology, implementation, shape, kv_heads, dtype="bfloat16"):
    heads = jax.ShapeDtypeStruct(shape, dtype)
    kv = jax.ShapeDtypeStruct((shape[0], kv_heads, *shape[2:]), dtype)

    def both(q, k, v, cotangent):
        y, pull = jax.vjp(lambda *a: attention.attend(*a, implementation), q, k, v)
        return y, pull(cotangent)

    return compile_for(topology, both, heads, kv, kv, heads).as_text()


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
    ("shape", "kv_heads"),
    [((2, 8, 256, 64), 8), ((2, 8, 256, 64), 2), ((1, 16, 1024, 72), 16), ((1, 2, 384, 128), 2)],
)
def test_splash_compiles_for_tpus(topology, shape, kv_heads):
    text = compiled_text(topology, "splash", shape, kv_heads)
    assert text.count('custom_call_target="tpu_custom_call"') == 2  # forward and backward


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("images", "kernels"), [(2, 0), (64, 2)])
def test_what_tpus_do_unless_told(images, kernels):
    text = compiled_text("v5e:2x2", None, (images, 16, 256, 64), 16)
    assert text.count("splash_mha") >= kernels and ("splash_mha" in text) == bool(kernels)


@pytest.mark.tpu_aot
def test_a_plan_for_absent_gpus_has_attention_in_xla():
    """cuDNN's calls are made while tracing, by a library that is not there."""
    text = compiled_text("h100:1", None, (2, 8, 256, 64), 8)
    assert "cudnn" not in text.lower()


@pytest.mark.gpu
def test_cudnn_takes_the_mask_of_a_text():
    arrays, seen = crossed("bfloat16", tokens=256, head_dim=64)
    assert attention.can_run("cudnn", *arrays[:2], masked=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.05, atol=0.02
        ),
        masked_gradients("cudnn", arrays, seen),
        masked_gradients("xla", arrays, seen),
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 16, 64), (16, 4, 72)])
def test_cudnn_has_the_values_and_gradients_of_xla(heads, kv_heads, head_dim):
    arrays = inputs(2, heads, kv_heads, 256, head_dim, "bfloat16")
    assert attention.can_run("cudnn", *arrays[:2])

    def compare(a, b):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.05, atol=0.02
        )

    def gradients(implementation):
        y, pull = jax.vjp(lambda *a: attention.attend(*a, implementation), *arrays[:3])
        return y, pull(arrays[3])

    jax.tree.map(compare, gradients("cudnn"), gradients("xla"))
