"""The encoder that is trained with FLUX: by hand where its blocks do nothing, and inside FLUX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_diffusion import config as configs
from moe_diffusion.conditions import drop
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.models.accounting import parameter_counts
from moe_diffusion.models.stack import abstract_inputs, abstract_weights
from moe_diffusion.models.words import WordEncoder
from moe_diffusion.vocabulary import TOKENS, VOCABULARIES

SIZES = {"hidden_size": 16, "num_heads": 2, "depth": 1, "flux.single_depth": 1}
SIZES |= {"flux.rope_axes": (2, 4, 2), "flux.text_tokens": 3, "flux.text_width": 8}


def tiny(**changes):
    keys = SIZES | {name.replace("__", "."): value for name, value in changes.items()}
    overrides = [f"model.{key}={value}" for key, value in keys.items()]
    return build(configs.load("configs/digits_flux.py", overrides).model)


def test_by_hand():
    """Blocks that end in zeros add nothing: norm(word + place), and a linear layer of the mean."""
    encoder, rng = WordEncoder(6, 8, 5, jnp.float32), np.random.default_rng(0)
    tokens = np.array([[2, 5, 0], [1, 1, 4]], np.int32)
    shapes = nn.meta.unbox(jax.eval_shape(encoder.init, jax.random.key(0), tokens))["params"]
    weights = {
        path: np.zeros(x.shape) if "proj" in path or "down" in path else rng.normal(size=x.shape)
        for path, x in flatten_dict(shapes).items()
    }
    assert weights["tokens",].shape == (6, 8) and weights["positions",].shape == (3, 8)
    found = encoder.apply({"params": unflatten_dict(weights)}, tokens)
    x = weights["tokens",][tokens] + weights["positions",]
    x -= x.mean(-1, keepdims=True)
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    x = x * weights["final_norm", "scale"] + weights["final_norm", "bias"]
    np.testing.assert_allclose(found["text"], x, rtol=1e-4, atol=1e-5)
    pooled = x.mean(1) @ weights["pooled", "kernel"] + weights["pooled", "bias"]
    np.testing.assert_allclose(found["pooled"], pooled, rtol=1e-4, atol=1e-5)


def test_flux_reads_the_words_in_their_order():
    model = tiny()
    size = len(VOCABULARIES["digits"])
    field = model.cond_spec()[TOKENS]
    assert list(model.cond_spec()) == [TOKENS]
    assert (field.shape, field.dtype, field.num_values) == ((3,), "int32", size)
    rng = np.random.default_rng(0)
    x, t, _ = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), abstract_inputs(model, 2)
    )
    weights = jax.tree.map(
        lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), abstract_weights(model)[0]
    )
    run = jax.jit(lambda tokens: model.apply(weights, x, t, {TOKENS: jnp.array(tokens)}, False))
    output = run([[1, 2, 0], [3, 4, 5]])
    for other in ([[1, 6, 0], [3, 4, 6]], [[2, 1, 0], [4, 3, 5]], [[0, 1, 2], [5, 3, 4]]):
        assert (np.abs(run(other) - output).max((1, 2, 3)) > 1e-3).all(), other


def test_no_condition_is_a_prompt_without_words():
    model = tiny()
    cond = {TOKENS: jnp.array([[1, 2, 3], [4, 5, 6]])}
    dropped = drop(model, cond, jnp.array([True, False]))
    np.testing.assert_array_equal(dropped[TOKENS], [[0, 0, 0], [4, 5, 6]])
    with_scale = tiny(flux__guidance=True)
    assert list(with_scale.cond_spec()) == [TOKENS, "guidance"]
    null = with_scale.null(cond | {"guidance": jnp.full(2, 3.5)})
    assert not null[TOKENS].any() and null["guidance"].tolist() == [3.5, 3.5]


def test_its_weights_are_of_a_kind_and_have_named_axes():
    model = tiny()
    variables, axes = abstract_weights(model)
    words = flatten_dict(variables["params"]["words"], sep="/")
    assert parameter_counts(model)["text encoder"].total == sum(x.size for x in words.values())
    assert "other" not in parameter_counts(model)
    names = flatten_dict(axes["words"], sep="/")
    assert all(len(names[path]) == leaf.ndim for path, leaf in words.items())
    assert not any(model.is_stacked(f"words/{path}") for path in words)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"flux.vocabulary": "latin"}, "vocabulary = 'latin' is unknown; choose  | digits"),
        ({"flux.text_width": 6}, "heads of words.py = 4 does not divide model.flux.text_width = 6"),
        ({"architecture": "dit"}, "model.flux.vocabulary = digits is of model.architecture = flux"),
    ],
)
def test_bad_configs(changes, message):
    overrides = [f"model.{key}={value}" for key, value in (SIZES | changes).items()]
    with pytest.raises(UserError, match=message):
        configs.load("configs/digits_flux.py", overrides)
