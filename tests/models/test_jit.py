"""JiT: its segments, class tokens, dropout, rope, and what its config may say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion.diffusion.objectives import make_loss
from moe_diffusion.errors import UserError
from moe_diffusion.models import abstract_variables, blocks, build

F, T = False, True
UNPOLISHED = {"xla_backend_optimization_level": 0}
SMALL = {"image_size": 4, "channels": 1, "patch_size": 2, "hidden_size": 8, "num_heads": 2}
SMALL |= {"num_classes": 3, "jit.bottleneck": 3, "jit.in_context_tokens": 2}
SMALL |= {"jit.in_context_start": 1}
SMALL |= {"depth": 4, "moe.num_experts": 4, "moe.hidden_size": 4, "moe.shared_hidden_size": 4}
DEEP = {"depth": 8, "jit.in_context_start": 3}


def config(spec="configs/jit_b16.py", **changes):
    return configs.load(spec, [f"model.{k}={v}" for k, v in {**SMALL, **changes}.items()])


def inputs():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    return x, jnp.array([0.2, 0.9]), {"label": jnp.array([1, 3])}


def variables_of(model):
    """Random ones, since a new model puts out zeros."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32),
        abstract_variables(model),
    )


def apply(model, variables, train=False, **rngs):
    run = jax.jit(
        lambda v, r: model.apply(v, *inputs(), train, rngs=r), compiler_options=UNPOLISHED
    )
    return run(variables, rngs)


@pytest.mark.parametrize(
    ("changes", "segments"),
    [
        ({}, (((F,), 1), ((F,), 3))),
        ({"jit.in_context_start": 0}, (((F,), 4),)),
        ({"jit.in_context_tokens": 0}, (((F,), 4),)),
        ({"depth": 8, "jit.in_context_start": 3}, (((F,), 3), ((F,), 5))),
        # Dropout in the blocks 2 to 5 of 8.
        (
            {"depth": 8, "jit.in_context_start": 3, "jit.dropout": 0.1},
            (((F,), 2), ((F,), 1), ((F,), 3), ((F,), 2)),
        ),
    ],
)
def test_segments_end_where_blocks_change(changes, segments):
    assert segments_of(build(config(**changes).model)) == segments


def segments_of(model):
    """With True for the blocks that have experts."""
    return tuple(
        (tuple(kind.startswith("moe") for kind in period), repeats)
        for period, repeats in model.stack.segments
    )


def test_segments_with_experts():
    model = build(config("configs/jitmoe_b16.py", **DEEP).model)
    assert [kind.split(".")[0] for kind in model.kinds] == ["dense", "moe"] * 4
    assert segments_of(model) == (((F,), 1), ((T,), 1), ((F,), 1), ((T, F), 2), ((T,), 1))


def test_class_tokens_begin_at_their_block_and_are_gone_in_the_end():
    model = build(config().model)
    out, seen = jax.eval_shape(
        lambda variables: model.apply(
            variables,
            *inputs(),
            False,
            mutable="intermediates",
            capture_intermediates=lambda module, _: str(module.name).startswith("block_"),
        ),
        abstract_variables(model),
    )
    tokens = [leaf.shape[-2] for leaf in jax.tree.leaves(seen)]
    assert tokens == [4, 6]  # a segment of one block, and one of three
    assert out.shape == (2, 4, 4, 1) and out.dtype == jnp.float32


def test_rope_of_interleaved_pairs_is_the_other_rope_reordered():
    angles = blocks.rope_angles("rope2d_pairs", (3, 3), 8)
    np.testing.assert_array_equal(angles, blocks.rope_angles("rope2d", (3, 3), 8))
    x = jax.random.normal(jax.random.key(0), (1, 2, 9, 8))
    order = np.array([0, 2, 1, 3, 4, 6, 5, 7])  # pairs (0, 1), (2, 3) -> (0, 2), (1, 3)
    turned = blocks.rotate(x, angles, interleaved=True)
    np.testing.assert_array_equal(turned[..., order], blocks.rotate(x[..., order], angles))
    # By hand: token 1 (row 0, column 1) turns its fifth and sixth channel by one radian.
    expected = x[..., 1, 4] * np.cos(1) - x[..., 1, 5] * np.sin(1)
    np.testing.assert_allclose(turned[..., 1, 4], expected, rtol=1e-5)


def test_dropout_acts_in_training_only():
    model, without = (
        build(config(**{"jit.in_context_start": 0, "jit.dropout": d}).model) for d in (0.5, 0.0)
    )
    variables = variables_of(model)
    first, again, other = (
        apply(model, variables, True, dropout=jax.random.key(n)) for n in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).min() > 0
    # Evaluation needs no key, and is that of the model without dropout (its layers in one stack).
    stacks = [variables["params"].pop(f"layers_{n}") for n in range(3)]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stacks)
    plain = {"params": {**variables["params"], "layers_0": joined}}
    variables["params"] |= {f"layers_{n}": stack for n, stack in enumerate(stacks)}
    np.testing.assert_allclose(apply(model, variables), apply(without, plain), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_recomputation_draws_the_same_dropout():
    batch = {"image": inputs()[0], "label": inputs()[2]["label"] % 3}
    found = []
    for remat in ("none", "full"):
        changes = {"jit.dropout": 0.5, "jit.in_context_tokens": 0, "remat": remat}
        whole = config("configs/jit_h16.py", **changes)
        model = build(whole.model)
        grad_fn = jax.value_and_grad(make_loss(model, whole), has_aux=True)
        run = jax.jit(grad_fn, compiler_options=UNPOLISHED)
        (loss, _), grads = run(variables_of(model)["params"], {}, batch, jax.random.key(0))
        found.append((loss, grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jit.in_context_start": 4}, "model.jit.in_context_start = 4 is beyond the last of model"),
        (
            {"dit.reverse_time": "true"},
            "model.dit.reverse_time = True is of model.architecture = dit",
        ),
        ({"hidden_size": 10, "positions": "rope1d", "num_heads": 1}, "a multiple of 4"),
        ({"num_heads": 4}, "model.positions = rope2d_pairs needs .* = 2 to be a multiple of 4"),
        ({"architecture": "dit", "jit.dropout": 0.1}, "0.1 is of model.architecture = jit"),
        ({"jit.dropout": 1.0}, "model.jit.dropout = 1.0 must be at least 0 and below 1"),
        ({"jit.bottleneck": 0}, "model.jit.bottleneck = 0 must be positive"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(UserError, match=message):
        configs.validate(config(**changes))
