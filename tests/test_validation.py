"""Validation: what is possible, what is not, and every message."""

from __future__ import annotations

import re

import jax
import pytest
from ml_collections import ConfigDict

from moe_diffusion.config import default, validate, validate_devices
from moe_diffusion.config.ranges import CHOICES
from moe_diffusion.errors import UserError
from moe_diffusion.models import ARCHITECTURES, architecture


def raises(message: str):
    """Expects a UserError of one line that holds `message`."""
    return pytest.raises(UserError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$")


def changed(changes: dict) -> ConfigDict:
    config = default()
    config.update_from_flattened_dict(changes)
    return config


EXPERT_CHOICE = {"model.router.name": "expert_choice"}
DIFFMOE = {"model.router.name": "diffmoe"}
RACE = {"model.router.name": "expert_race"}
ALL = {"model.moe.interleave": False}
MOB = ALL | {"model.mob.groups": ("2-4", "6-7")}
BAD_COMBINATIONS = [
    (
        ALL | {"model.mob.groups": ("2-4", "4-6")},
        "model.mob.groups = 4-6 overlaps the group before it, which ends at block 4, or stands "
        "before it: name groups from the first to the last",
    ),
    (ALL | {"model.mob.groups": ("4-6", "1-2")}, "groups = 1-2 overlaps the group before it"),
    (
        {"model.mob.groups": ("10-12",)},
        "model.mob.groups = 10-12 leaves the model, whose blocks are 0-11",
    ),
    (
        ALL | {"model.mob.groups": ("0-1",), "model.moe.skip_first": 1},
        "model.mob.groups = 0-1 has blocks of several kinds, dense and moe: group blocks of one "
        "kind",
    ),
    (
        MOB | {"model.mob.active": 3},
        "model.mob.active = 3 exceeds the 2 blocks of the group 6-7: lower it or widen the group",
    ),
    (MOB | {"model.mob.active": 0}, "model.mob.active = 0 must be positive"),
    (MOB | {"model.mob.select": "best"}, "model.mob.select = 'best' is unknown; choose topk | run"),
    (
        MOB | {"model.mob.pool": "max"},
        "model.mob.pool = 'max' is unknown; choose tokens |",
    ),
    (MOB | {"model.mob.alpha": 1.5}, "model.mob.alpha = 1.5 must lie between 0 and 1"),
    *(
        (
            {"model.mob.groups": (text,)},
            f"model.mob.groups = {text!r} is no range of at least two blocks: write first-last, "
            "like 4-6",
        )
        for text in ("4", "4-4", "6-4", "-1-3", "a-b", "1-2-3", "", "1.5-3")
    ),
    (
        MOB | {"model.moe.dropout": 0.1},
        "model.moe.dropout = 0.1 has no random stream in the blocks of model.mob.groups: set it to "
        "0, or model.mob.groups=none",
    ),
    (
        MOB | {"model.router.name": "expert_choice", "model.router.group": "batch"},
        "model.router.group = batch routes tokens of several samples together, and in the blocks "
        "of model.mob.groups a sample is alone: set model.router.group=sample",
    ),
    (
        {"model.adaln_shared": True},
        "model.adaln_shared = True has no compression to share: set model.adaln_rank, like 256, or "
        "model.adaln_shared=false",
    ),
    ({"model.adaln_rank": -1}, "model.adaln_rank = -1 must be zero or positive"),
    (
        MOB | {"model.architecture": "jit"},
        "model.mob.groups = ('2-4', '6-7') is for model.architecture = dit and flux: set it to "
        "('none',)",
    ),
    (
        {"model.architecture": "jit", "model.adaln_rank": 8},
        "model.adaln_rank = 8 is for model.architecture = dit and flux: set it to 0",
    ),
    (
        {"loss_weights.block_balance": 0.01},
        "loss_weights.block_balance is no loss of model.router.name",
    ),
    ({"model.patch_size": 3}, "model.patch_size = 3 does not divide model.image_size = 32"),
    ({"model.num_heads": 5}, "model.num_heads = 5 does not divide model.hidden_size = 384"),
    ({"model.num_kv_heads": 4}, "model.num_kv_heads = 4 does not divide model.num_heads = 6"),
    (
        {"sampling.sampler": "dopri5", "sampling.time_shift": "resolution"},
        "sampling.time_shift = resolution is for sampling.sampler = heun or euler, and this is "
        "dopri5: set it to none",
    ),
    (
        {"model.hidden_size": 6, "model.num_heads": 1},
        "model.positions = sincos needs model.hidden_size = 6 to be a multiple of 4",
    ),
    (
        {"model.hidden_size": 18, "model.positions": "rope1d"},
        "model.positions = rope1d needs model.hidden_size / model.num_heads = 3 to be a multiple",
    ),
    (
        {"model.hidden_size": 36, "model.positions": "rope2d"},
        "rope2d needs model.hidden_size / model.num_heads = 6 to be a multiple of 4",
    ),
    ({"model.router.scores": "identity"}, "scores = 'identity' is unknown; choose softmax |"),
    (
        {"model.router.name": "promoe_tc", "model.router.top_k": 16},
        "model.router.top_k = 16 exceeds the experts with a prototype, model.moe.num_experts = "
        "16 less model.router.null_expert = 1",
    ),
    (
        {"model.router.name": "promoe_ec", "model.router.capacity": 15.5},
        "model.router.capacity = 15.5 exceeds the experts with a prototype",
    ),
    (
        {
            "model.dit.reverse_time": True,
            "model.learn_sigma": True,
            "diffusion.path": "ddpm",
            "sampling.sampler": "ddpm",
        },
        "model.dit.reverse_time turns the time of a flow",
    ),
    ({"model.depth": 1}, "model.depth = 1, model.moe.skip_first = 0 and model.moe.interleave ="),
    ({"train.eval_samples": 1}, "train.eval_samples = 1 has no covariance: take some hundreds"),
    ({"model.moe.skip_first": 12}, "leave no MoE block: add blocks, skip fewer, or set model.rout"),
    (
        {"model.moe.residual_input": True, "model.moe.shared_hidden_size": 8},
        "model.moe.residual_input stands in for a shared expert, but model.moe.shared_hidden_size",
    ),
    (
        {"model.residual_dtype": "float16"},
        "model.residual_dtype = 'float16' is unknown; choose auto | float32",
    ),
    ({"model.router.top_k": 17}, "model.router.top_k = 17 exceeds model.moe.num_experts = 16"),
    ({"model.router.n_group": 3}, "model.router.n_group = 3 does not divide model.moe.num_experts"),
    (
        {"model.router.n_group": 2, "model.router.topk_group": 3},
        "model.router.topk_group = 3 exceeds model.router.n_group = 2",
    ),
    ({"model.router.n_group": 16}, "model.router.n_group = 16 leaves one expert to a group"),
    (
        {"model.router.bias_update_rate": 0.1},
        "model.router.bias_update_rate = 0.1 has no bias to move",
    ),
    (EXPERT_CHOICE | {"model.router.capacity": 17.0}, "capacity = 17.0 exceeds model.moe.num_expe"),
    (
        EXPERT_CHOICE | {"model.router.capacity": 0.05},
        "gives each of model.moe.num_experts = 16 less than one of the 256 tokens in "
        "model.router.group = sample",
    ),
    (
        DIFFMOE
        | {"model.router.group": "batch", "model.router.capacity": 0.01}
        | {"data.batch_size": 8, "optim.accumulate": 4},
        "less than one of the 512 tokens in model.router.group = batch",
    ),
    (DIFFMOE | {"model.router.max_capacity": 0.5}, "model.router.max_capacity = 0.5 would drop"),
    (RACE | {"model.router.max_capacity": 0.5}, "model.router.max_capacity = 0.5 would drop pairs"),
    (RACE | {"model.router.capacity": 17.0}, "capacity = 17.0 exceeds model.moe.num_experts = 16"),
    (
        RACE | {"model.router.capacity": 0.001},
        "capacity = 0.001 leaves no pair to the 256 tokens in model.router.group = sample",
    ),
    (RACE | {"model.router.threshold_decay": 1.0}, "model.router.threshold_decay = 1.0 must be at"),
    ({"loss_weights.similarity": 1.0}, "loss_weights.similarity is no loss of model.router.na"),
    ({"loss_weights.balance": -1.0}, "loss_weights.balance = -1.0 must be zero or positive"),
    (EXPERT_CHOICE | {"loss_weights.balance": 1.0}, "expert_choice, which has router_z: remove"),
    (DIFFMOE | {"loss_weights.balance": 1.0}, "diffmoe, which has capacity_predictor and router_z"),
    (
        {"model.router.name": "dense", "loss_weights.router_z": 1.0},
        "dense, which has none: remove it, or clear all: loss_weights={}",
    ),
    ({"optim.accumulate": 3}, "data.batch_size = 256 cannot be split into optim.accumulate = 3"),
    ({"ema.decays": (1.0,)}, "ema.decays = (1.0,) must be different numbers above 0 and below 1"),
    ({"ema.decays": (0.0,)}, "ema.decays = (0.0,) must be"),
    ({"ema.decays": (0.9, 0.9)}, "ema.decays = (0.9, 0.9) must be different"),
    ({"sampling.cfg_interval": (0.5, 0.5)}, "sampling.cfg_interval = (0.5, 0.5) must be two times"),
    ({"sampling.cfg_interval": (0.0, 1.5)}, "0 <= start < end <= 1"),
    ({"sampling.cfg_interval": (0.5,)}, "sampling.cfg_interval = (0.5,) must be"),
    *(
        (
            {"optim.schedule": schedule, "optim.warmup_steps": 10, "train.num_steps": 10},
            "optim.warmup_steps = 10 leaves nothing of train.num_steps = 10",
        )
        for schedule in ("cosine", "linear")
    ),
    ({"optim.schedule": "inverse_sqrt"}, "optim.warmup_steps = 0: set it to at least 1"),
    *(
        (
            {"optim.schedule": s, "optim.warmup_steps": 1, "optim.min_learning_rate": 1e-6},
            f"optim.min_learning_rate = 1e-06 is where optim.schedule = cosine or linear ends, and "
            f"this is {s}: set it to 0",
        )
        for s in ("constant", "inverse_sqrt")
    ),
    (
        {"optim.schedule": "linear", "optim.min_learning_rate": 1e-3},
        "optim.min_learning_rate = 0.001 exceeds optim.learning_rate = 0.0001: lower it",
    ),
    ({"optim.trainable": ()}, "optim.trainable = () trains nothing: name patterns of"),
    ({"optim.trainable": ("*", "")}, "optim.trainable = ('*', '') trains nothing"),
    ({"model.image_width": 31}, "model.patch_size = 2 does not divide model.image_width = 31"),
    ({"model.jit.dropout": 0.1}, "model.jit.dropout = 0.1 is of model.architecture = jit, and"),
    (
        {"model.architecture": "jit", "model.dit.reverse_time": True},
        "model.dit.reverse_time = True is of model.architecture = dit, and this is jit: set it to",
    ),
]


@pytest.mark.parametrize("changes, message", BAD_COMBINATIONS)
def test_impossible_combinations(changes, message):
    with raises(message):
        validate(changed(changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model.num_kv_heads": 3},
        {"model.router.n_group": 8, "model.router.topk_group": 8, "model.router.top_k": 16},
        {"model.router.bias_update_rate": 0.1, "model.router.selection_bias": True},
        {"model.router.name": "dense", "model.depth": 1, "model.router.top_k": 99},
        {"model.depth": 1, "model.moe.interleave": False},
        EXPERT_CHOICE | {"model.router.capacity": 16.0},
        EXPERT_CHOICE | {"model.router.capacity": 1 / 16},  # 256 tokens / 16 experts / 16 = 1
        DIFFMOE | {"model.router.max_capacity": 0.0, "loss_weights.capacity_predictor": 0.0},
        {"loss_weights.balance": 0.01, "loss_weights.router_z": 0.001},
        {"ema.decays": ()},
        {"sampling.cfg_interval": (0.1, 1.0)},
        # 128 tokens: 128 / 16 experts / 8 = 1.
        EXPERT_CHOICE | {"model.image_width": 16, "model.router.capacity": 1 / 8},
        {"optim.schedule": "linear", "optim.min_learning_rate": 1e-4},
        {"optim.schedule": "inverse_sqrt", "optim.warmup_steps": 1},
        {"optim.trainable": ("layers_0/*", "final/*"), "model.param_dtype": "bfloat16"},
        RACE | {"model.router.max_capacity": 0.0, "loss_weights.similarity": 1e-4},
        # What is off in another architecture may have any size there.
        {"model.jit.bottleneck": 3, "model.jit.in_context_start": 99},
    ],
)
def test_possible_combinations(changes):
    validate(changed(changes))


ROUTER_CHOICES = ["model.router.name", "model.router.kernel_init", "model.router.scores"]


@pytest.mark.parametrize("key", sorted(CHOICES) + ROUTER_CHOICES)
def test_unknown_choices(key):
    with raises(f"{key} = 'nonsense' is unknown; choose "):
        validate(changed({key: "nonsense"}))


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("model.depth", 0, "positive"),
        ("model.mlp_ratio", -1.0, "positive"),
        ("optim.learning_rate", 0.0, "positive"),
        ("checkpoint.keep_last", 0, "positive"),
        ("model.moe.skip_first", -1, "zero or positive"),
        ("optim.clip_norm", -0.1, "zero or positive"),
        ("optim.b2", 1.0, "at least 0 and below 1"),
        ("optim.min_learning_rate", -1e-5, "zero or positive"),
        ("model.image_width", -1, "zero or positive"),
        ("model.router.top_k", -1, "zero or positive"),
        ("model.router.bias_update_rate", -0.1, "zero or positive"),
        ("diffusion.cond_dropout", 1.5, "between 0 and 1"),
    ],
)
def test_ranges(key, value, wanted):
    with raises(f"{key} = {value} must be {wanted}"):
        validate(changed({key: value}))


def test_batch_must_split_over_devices():
    config = changed({"data.batch_size": 24, "optim.accumulate": 2})
    validate_devices(config, jax.devices()[:4])
    with raises(
        "optim.accumulate = 12 images cannot be split evenly over 8 devices: make it a mul"
    ):
        validate_devices(config, jax.devices())


def test_a_shard_must_have_tokens_for_every_expert():
    changes = DIFFMOE | {"model.router.group": "shard", "model.router.capacity": 0.05}
    config = changed(changes | {"data.batch_size": 8})
    validate(config)
    validate_devices(config, jax.devices()[:4])
    with raises("less than one of the 256 tokens in model.router.group = shard"):
        validate_devices(config, jax.devices())


def test_the_width_counts_in_a_group():
    config = changed(EXPERT_CHOICE | {"model.image_width": 16, "model.router.capacity": 0.1})
    with raises("less than one of the 128 tokens in model.router.group = sample"):
        validate(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_field_of_an_architecture_has_a_comment(name):
    config = changed({"model.architecture": name, "model.router.name": "dense"})
    validate(config)
    for field, (default_value, comment) in architecture(name).FIELDS.items():
        assert config.model[name][field] == default_value and len(comment) > 10
