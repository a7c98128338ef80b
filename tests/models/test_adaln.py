"""Compressed adaLN (2510.09094, section 4.1): two layers that can be one, or all blocks' first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from moe_diffusion.models.adaln import activated, compressed, modulation, vector
from moe_diffusion.models.stack import abstract_weights
from tests.models.grouped import config_of, model_of

WIDTH, NUMBER = 8, 6
FLUX = {"image_adaLN": 6, "text_adaLN": 6, "adaLN": 3}


def filled(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Two(nn.Module):
    """The modulations of two blocks of one condition."""

    rank: int
    shared: bool

    @nn.compact
    def __call__(self, c):
        c = compressed(c, self.rank, jnp.float32) if self.shared else c
        layers = [modulation(WIDTH, self.rank, self.shared, jnp.float32, NUMBER, n) for n in "ab"]
        return [layer(activated(c)) for layer in layers], vector(c)


def factors(kernel):
    """Exact factors [D, D], [D, n D] of a kernel."""
    u, s, v = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    return jnp.asarray(u * s, jnp.float32), jnp.asarray(v, jnp.float32)


@pytest.mark.parametrize("shared", [False, True])
def test_a_compression_of_full_rank_is_the_whole_layer(shared):
    """Each block's kernel is its down times up; a shared down is one for both kernels."""
    c = filled((3, WIDTH), 0)
    kernels = {n: filled((WIDTH, NUMBER * WIDTH), i) for i, n in enumerate("ab")}
    biases = {n: filled(NUMBER * WIDTH, i + 2) for i, n in enumerate("ab")}
    whole = {n: {"kernel": kernels[n], "bias": biases[n]} for n in "ab"}
    expected, _ = Two(0, False).apply({"params": whole}, c)
    if shared:
        down, up = factors(jnp.concatenate([*kernels.values()], axis=1))
        parts = dict(zip("ab", jnp.split(up, 2, axis=1), strict=True))
        params = {n: {"up": {"kernel": parts[n], "bias": biases[n]}} for n in "ab"}
        params["adaLN_down"] = {"kernel": down}
    else:
        params = {}
        for n in "ab":
            down, up = factors(kernels[n])
            params[n] = {"down": {"kernel": down}, "up": {"kernel": up, "bias": biases[n]}}
    found, condition = Two(WIDTH, shared).apply({"params": params}, c)
    np.testing.assert_array_equal(condition, c)  # for the routers of blocks
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_modulation_starts_at_zero():
    variables = Two(4, True).init(jax.random.key(0), filled((2, WIDTH), 0))
    found, _ = Two(4, True).apply(variables, filled((2, WIDTH), 1))
    assert not np.any(found)


@pytest.mark.parametrize(
    ("name", "shared", "layers"),
    [
        ("dit", False, {"adaLN": 6}),
        pytest.param("flux", True, FLUX, marks=pytest.mark.slow),
    ],
)
def test_where_the_weights_of_a_model_lie(name, shared, layers):
    """Of width 16 and rank 8: up [8, n 16] everywhere, down [16, 8] in each layer or once."""
    model = model_of(config_of(name, model__adaln_shared=shared))
    params = flatten_dict(abstract_weights(model)[0]["params"], sep="/")
    found = {p: w.shape for p, w in params.items() if "adaLN" in p and "final" not in p}
    assert {model.kind_of(path) for path in found} == {"adaLN"}
    assert ("adaLN_down/kernel" in found) == shared
    for path, shape in found.items():
        if path.endswith("up/kernel"):
            assert shape[1:] == (8, 16 * layers[path.split("/")[-3]])
        elif path.endswith("down/kernel"):
            assert shape[-2:] == (16, 8) and path.startswith("layers_") != shared
    assert sum(p.endswith("down/kernel") for p in found) == (
        1 if shared else sum(p.endswith("up/kernel") for p in found)
    )
