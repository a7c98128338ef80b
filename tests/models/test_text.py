"""Text encoders: buckets and ends worked by hand, masks, dtypes, and many devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from moe_diffusion.models.text import CLIPText, T5Encoder, relative_buckets
from tests.interop.pipeline_folder import encoder


@pytest.fixture(scope="module")
def clip():
    return encoder(CLIPText, 20, max_length=8, eos_id=19)


@pytest.fixture(scope="module")
def t5():
    return encoder(T5Encoder, 20)


def test_buckets_by_hand():
    """32 buckets, 128 tokens: 16 a direction, of which 8 are single distances.

    Distance d >= 8 is in bucket 8 + floor(8 log(d / 8) / log(16)): 11 in 8 (0.92), 12 in 9 (1.17),
    16 in 10, 32 in 12, 64 in 14, 127 in 15 (7.98 + 8), and all beyond, too. Keys ahead add 16.
    """
    buckets = relative_buckets(200, 32, 128)
    wanted = {0: 0, 1: 1, 7: 7, 8: 8, 11: 8, 12: 9, 16: 10, 32: 12, 64: 14, 127: 15, 199: 15}
    for distance, bucket in wanted.items():
        assert buckets[199, 199 - distance] == bucket, distance
        assert buckets[0, distance] == bucket + (16 if distance else 0), distance


def test_the_end_of_a_prompt(clip):
    """The first eos; where a config names none, the largest id, which is not the same here."""
    ids = np.array([[18, 3, 19, 19, 4, 19, 19, 19]])
    states = jax.jit(clip.network.apply)({"params": clip.params}, ids)
    pooled = jax.jit(clip.network.encode)(clip.params, ids)
    np.testing.assert_allclose(pooled[0], states[0, 2], rtol=1e-6)
    odd = np.array([[18, 3, 5, 5, 5, 5, 5, 5]])
    legacy = clip.network.clone(eos_id=None)
    states = jax.jit(legacy.apply)({"params": clip.params}, odd)
    pooled = jax.jit(legacy.encode)(clip.params, odd)
    np.testing.assert_allclose(pooled[0], states[0, 0], rtol=1e-6)


def test_who_sees_whom(clip, t5):
    """CLIP is causal; T5 sees everything but what a mask hides."""
    ids = np.array([[1, 2, 3, 4, 5, 6]])
    other = np.array([[1, 2, 3, 4, 5, 7]])
    mask = np.array([[True] * 5 + [False]])
    for network, params, causal in ((clip.network, clip.params, True), (t5.network, t5.params, 0)):
        apply = jax.jit(
            lambda ids, mask=None, n=network, p=params: n.apply({"params": p}, ids, mask)
        )
        differ = np.abs(apply(ids) - apply(other)).max((0, 2)) > 1e-6
        assert differ.tolist() == [not causal] * 5 + [True]
        np.testing.assert_array_equal(apply(ids, mask)[:, :5], apply(other, mask)[:, :5])


def test_any_number_of_prompts_on_all_devices(clip, t5):
    """The devices share prompts and weights; neither changes what comes out of a prompt."""
    ids = np.random.default_rng(0).integers(0, 19, (37, 8)).astype(np.int32)
    mask = np.arange(8) <= np.arange(37)[:, None] % 8
    for made in (clip, t5):
        for inputs in ((ids,), (ids, mask)):
            alone = jax.jit(made.network.encode)(made.params, *inputs)
            np.testing.assert_allclose(made.encode(*inputs), alone, atol=1e-5, rtol=1e-5)
    leaf = t5._placed["layers_0"]["block_0"]["attn"]["qkv"]["kernel"]
    assert leaf.addressable_shards[0].data.size * jax.device_count() == leaf.size
    t5.release()
    assert "_placed" not in vars(t5)
    assert clip.fingerprint != t5.fingerprint and len(clip.fingerprint) == 16


def test_dtypes_and_logical_axes(t5):
    """Weights and products in bf16, the stream and the result in f32."""
    network = t5.network.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    ids = np.array([[1, 2, 3]])
    params = nn.meta.unbox(network.abstract_params())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), t5.params)
    found = jax.jit(network.encode)(narrow, ids)
    assert found.dtype == jnp.float32
    wanted = jax.jit(t5.network.encode)(t5.params, ids)
    assert 1e-5 < np.abs(found - wanted).max() < 0.1
    axes = flatten_dict(nn.get_partition_spec(network.abstract_params()), sep="/")
    assert tuple(axes["layers_0/block_0/attn/qkv/kernel"]) == (
        "layers",
        "embed",
        None,
        "heads",
        None,
    )
    assert tuple(axes["layers_0/block_0/mlp/down/kernel"]) == ("layers", "mlp", "embed")
    assert tuple(axes["tokens"]) == (None, "embed")
    assert tuple(axes["position_bias"]) == (None, "heads")
    kinds = {network.kind_of(path) for path in axes}
    assert kinds == {"attention", "dense ffn", "norms", "embedders"}
    assert len(network.blocks()) == 2
