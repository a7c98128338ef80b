"""DiT for texts: cross-attention by hand, padding, the empty prompt, and its parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion import config as configs
from moe_diffusion.conditions import drop
from moe_diffusion.empty_prompt import EmptyPrompt, told
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.models.accounting import forward_flops, parameter_counts
from moe_diffusion.models.blocks import CrossAttention
from moe_diffusion.models.patches import TransformerBlock
from moe_diffusion.models.stack import abstract_inputs, abstract_weights

TINY = {"depth": 2, "hidden_size": 16, "num_heads": 2, "image_size": 4, "moe.hidden_size": 16}
TINY |= {"moe.num_experts": 4, "remat": "none", "dtype": "float32"}
TEXT = {"text_tokens": 5, "text_width": 6, "text_dtype": "float32", "pooled_width": 3}


def tiny(config="configs/dit_t2i.py", text=TEXT, **keys):
    keys = TINY | {f"dit_t2i.{k}": v for k, v in text.items()} | keys
    settings = [f"model.{key}={value}" for key, value in keys.items()]
    return configs.load(config, settings).model


def filled(model, batch=4, seed=0):
    """Weights without zeros, and inputs with texts of 1 to 4 tokens."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if leaf.dtype == bool:
            return jnp.arange(leaf.shape[-1]) < 1 + jnp.arange(leaf.shape[0])[:, None] % 4
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(rng.integers(1, 10, leaf.shape), leaf.dtype)
        return jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    x, t, cond = jax.tree.map(fill, abstract_inputs(model, batch))
    return jax.tree.map(fill, abstract_weights(model)[0]), x, jax.nn.sigmoid(t), cond


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cross_attention_by_hand(qk_norm):
    layer = CrossAttention(2, 2, qk_norm, "sincos", (1, 3), jnp.float32)
    x, text = (jax.random.normal(jax.random.key(i), (2, n, 8)) for i, n in enumerate((3, 4)))
    seen = jnp.array([[True, True, False, False], [True] * 4])
    weights = layer.init(jax.random.key(2), x, text, seen)
    assert not np.any(layer.apply(weights, x, text, seen))  # it starts at zero
    noise = lambda w: w + 0.1 * jax.random.normal(jax.random.key(3), w.shape)  # noqa: E731
    weights = jax.tree.map(noise, nn.meta.unbox(weights))
    p = jax.tree.map(np.asarray, weights["params"])

    def normed(name, heads):
        if not qk_norm:
            return heads
        root = np.sqrt(np.mean(heads**2, -1, keepdims=True) + 1e-6)
        return heads / root * p[name]["scale"]

    got = layer.apply(weights, x, text, seen)
    for b, length in ((0, 2), (1, 4)):
        words = np.asarray(text)[b, :length]
        q = np.einsum("sd,dhk->hsk", x[b], p["q"]["kernel"]) + p["q"]["bias"][:, None]
        kv = np.einsum("ld,dnhk->nhlk", words, p["kv"]["kernel"]) + p["kv"]["bias"][:, :, None]
        q, k = normed("q_norm", q), normed("k_norm", kv[0])
        scores = np.exp(np.einsum("hsk,hlk->hsl", q, k) / 2)
        heads = np.einsum("hsl,hlk->hsk", scores / scores.sum(-1, keepdims=True), kv[1])
        expected = np.einsum("hsk,hkd->sd", heads, p["proj"]["kernel"]) + p["proj"]["bias"]
        np.testing.assert_allclose(got[b], expected, rtol=1e-4, atol=1e-5)


def test_padding_is_not_seen_and_words_are():
    model = build(tiny())
    weights, x, t, cond = filled(model)
    run = jax.jit(lambda cond: model.apply(weights, x, t, cond, False))
    before = run(cond)
    padding = ~cond["text_mask"][..., None]
    same = run(cond | {"text": jnp.where(padding, 7.0, cond["text"])})
    np.testing.assert_allclose(same, before, rtol=1e-5, atol=1e-5)
    others = [
        {"text": jnp.where(padding, cond["text"], 0.7)},
        {"pooled": cond["pooled"] + 1},
        {"text_mask": jnp.ones_like(cond["text_mask"])},
    ]
    for other in others:
        assert np.abs(run(cond | other) - before).max((1, 2, 3)).min() > 1e-4


def test_a_condition_has_what_the_config_says():
    fields = lambda **text: build(tiny(text=TEXT | text)).cond_spec()  # noqa: E731
    assert [*fields()] == ["text", "text_mask", "pooled"]
    assert [*fields(text_mask="false", pooled_width=0)] == ["text"]
    assert [*fields(text_width=8, vocabulary="digit_pairs")] == ["tokens"]
    bare = build(tiny(text=TEXT | {"text_mask": "false", "pooled_width": 0}))
    weights, x, t, cond = filled(bare)
    assert np.isfinite(bare.apply(weights, x, t, cond, False)).all()


def test_the_empty_prompt_takes_the_place_of_a_text():
    model = build(tiny())
    _, _, _, cond = filled(model)
    assert not any(np.any(value) for value in model.null(cond).values())
    empty = {name: np.asarray(value[0]) for name, value in cond.items()}
    model = told(model, EmptyPrompt(empty))
    dropped = drop(model, cond, jnp.array([True, False, True, False]))
    for name, value in cond.items():
        expected = np.stack([empty[name], value[1], empty[name], value[3]])
        np.testing.assert_array_equal(dropped[name], expected)
    assert model.empty == EmptyPrompt(empty) and hash(model.empty) == hash(EmptyPrompt(empty))
    with pytest.raises(UserError, match="the empty prompt of the data"):
        told(model, EmptyPrompt({"text": empty["text"]}))


def test_blocks_learn_which_samples_have_no_text():
    """ProMoE sends the tokens of such samples to experts of their own."""
    model, found = build(tiny(depth=1)), []
    weights, x, t, cond = filled(model)
    nulls = drop(model, cond, jnp.array([False, True, True, False]))

    def watch(call, args, kwargs, context):
        if isinstance(context.module, TransformerBlock):
            found.append(args[2])
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        model.apply(weights, x, t, nulls, False)
    np.testing.assert_array_equal(found[0], [False, True, True, False])


@pytest.mark.parametrize("router", ["token_choice", "expert_choice", "diffmoe", "promoe_tc"])
def test_every_router_takes_texts(router):
    keys = {"router.name": router, "depth": 2, "hidden_size": 16, "moe.hidden_size": 16}
    keys |= {"dit_t2i.text_width": 8}
    settings = [f"model.{key}={value}" for key, value in keys.items()]
    config = configs.load("configs/digits_t2i.py:router=dense", [*settings, "loss_weights={}"])
    model = build(config.model)
    variables, x, t, cond = filled(model, batch=2)
    out = jax.jit(lambda *inputs: model.apply(*inputs, False))(variables, x, t, cond)
    assert out.shape == (2, 8, 16, 1) and np.isfinite(out).all()


def test_parameters_are_those_of_table_7():
    """1.2B, and 4.6B of which 1.2B are activated, without embedders and capacity predictors."""
    for name, total, activated in (("dit_t2i", 1.25e9, 1.25e9), ("diffmoe_t2i", 4.65e9, 1.25e9)):
        counts = parameter_counts(build(configs.load(f"configs/{name}.py").model))
        left_out = ("embedders", "capacity predictor", "total")
        kept = [count for kind, count in counts.items() if kind not in left_out]
        assert abs(sum(c.total for c in kept) / total - 1) < 0.005
        assert abs(sum(c.activated for c in kept) / activated - 1) < 0.005
        assert counts["cross-attention"].total == 24 * (4 * 1536**2 + 4 * 1536 + 2 * 64)


def test_flops_of_attention_to_a_text():
    model = build(tiny())
    flops = forward_flops(model)
    image, text, width = 4, 5, 16
    assert flops["attention maps"] == 2 * 4 * width * (image**2 + image * text)
    # q and proj see the image's tokens, k and v those of the text.
    assert flops["cross-attention"] == 2 * 2 * 2 * width**2 * (image + text)


def test_sizes_that_cannot_be_are_refused():
    for text, message in (
        ({"text_tokens": 0}, "model.dit_t2i.text_tokens"),
        ({"text_dtype": "int8"}, "model.dit_t2i.text_dtype"),
        ({"vocabulary": "klingon"}, "model.dit_t2i.vocabulary"),
        ({"vocabulary": "digits", "text_width": 6}, "model.dit_t2i.text_width"),
    ):
        with pytest.raises(UserError, match=message):
            configs.validate(configs.load("configs/dit_t2i.py", [
                f"model.dit_t2i.{k}={v}" for k, v in text.items()]))  # fmt: skip
