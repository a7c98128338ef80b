"""A dense model's weights in a model of experts: nothing is lost, the most important is shared."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from moe_diffusion.dense2moe import convert
from moe_diffusion.dense2moe.blocks import join, numbers, ranges, split, standing_for
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from tests.dense2moe.tiny import EXPERTS, config_of, filled, inputs


def test_deal_by_hand():
    """Eight units by importance 5 2 7 0 | 1 6 3 4: the shared expert has the first two."""
    order = convert.order_of(np.array([5.0, 4, 7, 2, 1, 8, 3, 6]), 8, seed=0)
    assert order.tolist() == [5, 2, 7, 0, 1, 6, 3, 4]
    shared, dealt = convert.deal(order, 2, 3)
    assert shared.tolist() == [2, 5]
    assert dealt.tolist() == [[6, 7], [0, 3], [1, 4]]  # 7 6, 0 3, 1 4 in turn


def test_every_unit_is_dealt_once_at_random_too():
    order = convert.order_of(None, 64, seed=3)
    assert order.tolist() != convert.order_of(None, 64, seed=4).tolist()
    shared, dealt = convert.deal(order, 16, 12)
    assert sorted([*shared, *dealt.ravel()]) == [*range(64)] and dealt.shape == (12, 4)


def test_compressed_modulation_is_the_truncated_svd():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(6, 20)).astype(np.float32), np.ones(20, np.float32)
    down = convert.principal([jnp.asarray(kernel)], 2)
    made = convert.compressed({"kernel": jnp.asarray(kernel), "bias": bias}, down)
    u, s, v = np.linalg.svd(kernel, full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2]
    product = made["down/kernel"] @ made["up/kernel"]
    np.testing.assert_allclose(product, best, atol=1e-5)
    whole = convert.principal([jnp.asarray(kernel)], 6)
    made = convert.compressed({"kernel": jnp.asarray(kernel), "bias": bias}, whole)
    np.testing.assert_allclose(made["down/kernel"] @ made["up/kernel"], kernel, atol=1e-5)


def student_of(*changes, units=None):
    """(config, teacher, student, teacher's params, student's params)."""
    dense, config = config_of(), config_of(*EXPERTS, *changes)
    teacher, student = build(dense.model), build(config.model)
    params, initial = filled(teacher), filled(student, 7)
    rng = np.random.default_rng(5)
    units = units or (lambda number, name, size: rng.permutation(size))
    taken = convert.taken_blocks(config, teacher, student, None)

    def make(params, initial):
        return convert.make_student(config, teacher, student, params, initial, units, taken)

    return config, teacher, student, params, jax.jit(make)(params, initial)


def output(model, params):
    run = jax.jit(lambda params, *args: model.apply({"params": params}, *args, False))
    return run(params, *inputs(model))


@pytest.mark.parametrize("skip", [0, 1])
def test_with_gates_of_one_the_model_is_the_dense_one(skip):
    """All twelve experts, each with the gate softmax(0) * 12 = 1, and the output bias once."""
    everything = (
        "model.router.top_k=12",
        "model.router.scale=12.0",
        f"model.moe.skip_first={skip}",
    )
    _, teacher, student, params, made = student_of(*everything)
    made = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if "router" in str(path) else x, made
    )
    expected, found = output(teacher, params), output(student, made)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_full_rank_modulation_is_the_dense_one():
    """Rank 16 of width 16, shared or not, and the shared experts alone in both models."""
    alone = "model.router.top_k=0"
    for compression in ("model.adaln_shared=false", "model.adaln_shared=true"):
        units = lambda number, name, size: np.arange(size)  # noqa: E731
        _, _, plain, _, without = student_of(alone, units=units)
        _, _, compressed, _, made = student_of(
            alone, "model.adaln_rank=16", compression, units=units
        )
        expected, found = output(plain, without), output(compressed, made)
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def regrouped(before, after, params, initial):
    return jax.jit(lambda p, i: convert.regroup(before, after, p, i))(params, initial)


def test_blocks_move_from_model_to_model():
    config = config_of(*EXPERTS, "model.mob.groups=2-4")
    plain, grouped = build(config_of(*EXPERTS).model), build(config.model)
    params, initial = filled(plain), filled(grouped, 9)
    moved = regrouped(plain, grouped, params, initial)
    flat, old = flatten_dict(moved, sep="/"), flatten_dict(params, sep="/")
    member = flat["layers_2/block_0/members/attn/qkv/kernel"]
    assert member.shape[:2] == (1, 3)
    np.testing.assert_array_equal(member[0], old["layers_2/block_0/attn/qkv/kernel"])
    router = flatten_dict(initial, sep="/")["layers_2/block_0/block_router/x"]
    np.testing.assert_array_equal(flat["layers_2/block_0/block_router/x"], router)
    back = jax.jit(lambda params: join(grouped, *split(grouped, params)))(moved)
    jax.tree.map(np.testing.assert_array_equal, back, moved)


def test_a_group_that_was_there_keeps_its_router():
    one = build(config_of(*EXPERTS, "model.moe.skip_first=0", "model.mob.groups=0-1").model)
    two = build(config_of(*EXPERTS, "model.moe.skip_first=0", "model.mob.groups=0-1,2-4").model)
    params, initial = filled(one), filled(two, 9)
    flat = flatten_dict(regrouped(one, two, params, initial), sep="/")
    old = flatten_dict(params, sep="/")
    np.testing.assert_array_equal(
        flat["layers_0/block_0/block_router/y"], old["layers_0/block_0/block_router/y"]
    )


def test_what_a_layer_stands_for():
    """A group for its last block; a layer before blocks that were left out for the last of them."""
    dense = build(config_of().model)
    grouped = build(config_of(*EXPERTS, "model.mob.groups=2-4").model)
    assert standing_for(grouped, range(5), dense) == [0, 1, 4]
    pruned = build(config_of("model.depth=1", "model.flux.single_depth=2").model)
    assert standing_for(pruned, (0, 2, 4), dense) == [1, 3, 4]
    assert standing_for(pruned, (1, 2, 3), dense) == [1, 2, 4]


def test_ranges():
    assert ranges((0, 1, 2, 5, 7, 8)) == ("0-2", "5", "7-8")
    assert numbers(("0-2", "5", "7-8")) == (0, 1, 2, 5, 7, 8)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [("lite", (1, 3, 4)), ("even", (0, 2, 3)), ("0,3-4", (0, 3, 4)), ("1,2,4", (1, 2, 4))],
)
def test_which_blocks_are_kept(blocks, expected):
    """Changes of the blocks: lite keeps the double block 1 and the single blocks 3 and 4."""
    config = config_of("model.depth=1", "model.flux.single_depth=2", f"distill.blocks={blocks}")
    teacher, student = build(config_of().model), build(config.model)
    changes = [0.1, 0.5, 0.2, 0.9, 0.3]
    assert convert.taken_blocks(config, teacher, student, changes) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("model.moe.num_experts=11",), r"16 \+ 11 \* 4 = 60, but the teacher's MLPs have 64"),
        (
            ("model.moe.num_experts=0", "model.router.top_k=0", "model.moe.shared_hidden_size=65"),
            "65",
        ),
        (("model.moe.mlp=silu",), "model.moe.mlp = silu is cut out of MLPs of model.mlp = gelu"),
        (("model.moe.bias=false",), "model.moe.bias = False, but model.mlp_bias = True"),
        (
            ("model.hidden_size=32", "model.num_heads=4"),
            "is another model: .*hidden_size: 16 there",
        ),
        (("model.depth=1",), "model.depth: 2 there, 1 here"),
        (("distill.blocks=some",), "distill.blocks = some is unknown: name all"),
        (("distill.blocks=0-3",), "4 of the teacher's 5 blocks"),
        (("distill.blocks=0-5",), "6 of the teacher's 5 blocks"),
        (("model.depth=3", "distill.blocks=lite"), "3 blocks of kind double, the teacher 2"),
    ],
)
def test_students_that_cannot_be_made(changes, message):
    config = config_of(*EXPERTS, "distill.teacher=t", *changes)
    with pytest.raises(UserError, match=message):
        convert.check(config, config_of())


def test_a_teacher_with_experts_is_refused():
    config = config_of(*EXPERTS)
    with pytest.raises(UserError, match="has experts itself"):
        convert.check(config, config)
