"""Small parts, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion.models import blocks


def test_patchify_orders_row_column_channel():
    image = jnp.arange(4 * 4 * 2).reshape(1, 4, 4, 2)
    tokens = blocks.patchify(image, 2)
    assert tokens.shape == (1, 4, 8)
    wide = jnp.arange(4 * 6 * 2).reshape(1, 4, 6, 2)
    np.testing.assert_array_equal(blocks.unpatchify(blocks.patchify(wide, 2), 2, (2, 3)), wide)
    # The second token is the upper right patch: rows 0-1, columns 2-3, both channels.
    np.testing.assert_array_equal(tokens[0, 1], [4, 5, 6, 7, 12, 13, 14, 15])
    np.testing.assert_array_equal(blocks.unpatchify(tokens, 2, (2, 2)), image)


def test_sincos_encodes_the_column_first():
    table = blocks.sincos_table((3, 3), 8)
    same_column, same_row = table[[1, 4, 7]], table[[3, 4, 5]]
    assert (same_column[:, :4] == same_column[0, :4]).all()
    assert (same_row[:, 4:] == same_row[0, 4:]).all()
    # Position 2, frequencies 1 and 1/100: [sin, cos] of 2 and 0.02.
    expected = [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)]
    np.testing.assert_allclose(table[2, :4], expected, rtol=1e-6)


def test_time_features():
    features = blocks.time_features(jnp.array([0.5]), width=4)
    expected = [np.cos(0.5), np.cos(0.005), np.sin(0.5), np.sin(0.005)]
    np.testing.assert_allclose(features[0], expected, rtol=1e-6)


@pytest.mark.parametrize("kind", blocks.ROPES)
def test_rope_products_depend_on_the_distance_only(kind):
    grid, head_dim = 4, 8
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=head_dim), jnp.float32) for _ in range(2))
    angles = blocks.rope_angles(kind, (grid, grid), head_dim)
    everywhere = lambda v: jnp.broadcast_to(v, (grid * grid, head_dim))  # noqa: E731
    turned_q, turned_k = (blocks.rotate(everywhere(v), angles) for v in (q, k))
    scores = turned_q @ turned_k.T
    np.testing.assert_allclose(scores[1, 2], scores[9, 10], rtol=1e-5)  # one column to the right
    np.testing.assert_allclose(scores[0, 4], scores[5, 9], rtol=1e-5)  # one row down
    np.testing.assert_allclose(scores[0, 0], q @ k, rtol=1e-5)
    assert abs(scores[0, 1] - scores[0, 4]) > 1e-3


def test_rotate_by_hand():
    # One axis, two pairs: (x0, x2) turns by the first angle, (x1, x3) by the second.
    x = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 4)
    angles = np.array([np.pi / 2, np.pi]).reshape(1, 1, 2)
    turned = blocks.rotate(x, angles)[0, 0]
    np.testing.assert_allclose(turned, [0.0, 0.0, 1.0, -1.0], atol=1e-6)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms(kind):
    x = jnp.array([[1.0, 2.0, 3.0, 6.0]])
    y, _ = blocks.Norm(kind).init_with_output(jax.random.key(0), x)
    expected = (x - 3) / np.sqrt(3.5) if kind == "layernorm" else x / np.sqrt(12.5)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_grouped_queries_share_a_key_head():
    # Four query heads on two key heads equal four on four whose keys are repeated pairwise.
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    make = lambda kv: blocks.Attention(4, kv, False, "rope2d", (3, 3), jnp.float32)  # noqa: E731
    grouped = make(2)
    params = grouped.init(jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda leaf: leaf.value, params, is_leaf=lambda v: hasattr(v, "value"))
    repeat = lambda a: jnp.repeat(a, 2, axis=-2)  # noqa: E731
    parts = [params["q"], *(jax.tree.map(repeat, params[name]) for name in "kv")]
    qkv = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=-3), *parts)
    full = {"qkv": qkv, "proj": params["proj"]}
    np.testing.assert_allclose(
        grouped.apply({"params": params}, x), make(4).apply({"params": full}, x), atol=1e-5
    )


def test_a_norm_modulates_and_keeps_only_its_input_for_the_backward_pass():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    shift, scale = jax.random.normal(jax.random.key(1), (2, 2, 8))

    def norm(x, shift, scale):
        return blocks.Norm().apply({}, x, (shift, scale))

    y, pull = jax.vjp(norm, x, shift, scale)
    plain = blocks.Norm().apply({}, x)
    np.testing.assert_allclose(y, plain * (1 + scale[:, None]) + shift[:, None], rtol=1e-5)
    _, of_shift, of_scale = pull(jnp.ones_like(y))
    np.testing.assert_allclose(of_shift, np.full((2, 8), 3.0))  # of three tokens each
    np.testing.assert_allclose(of_scale, plain.sum(1), rtol=1e-4, atol=1e-5)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == x.shape]
    assert len(kept) == 1 and kept[0] is x
