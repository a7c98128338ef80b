"""Validation: what is possible, what is not, and every message."""

from __future__ import annotations

import re

import pytest
from ml_collections import ConfigDict

from moe_diffusion.config import default
from moe_diffusion.errors import UserError
from moe_diffusion.ranges import CHOICES
from moe_diffusion.validation import validate, validate_devices


def raises(message: str):
    """Expects a UserError of one line that holds `message`."""
    return pytest.raises(UserError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$")


def changed(changes: dict) -> ConfigDict:
    config = default()
    config.update_from_flattened_dict(changes)
    return config


EXPERT_CHOICE = {"model.router.name": "expert_choice"}
DIFFMOE = {"model.router.name": "diffmoe"}
BAD_COMBINATIONS = [
    ({"model.patch_size": 3}, "model.patch_size = 3 does not divide model.image_size = 32"),
    ({"model.num_heads": 5}, "model.num_heads = 5 does not divide model.hidden_size = 384"),
    ({"model.num_kv_heads": 4}, "model.num_kv_heads = 4 does not divide model.num_heads = 6"),
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
    ({"model.router.scores": "identity"}, "identity is for model.router.name = promoe_tc or"),
    (
        {"model.router.name": "promoe_tc", "model.router.top_k": 16},
        "model.router.top_k = 16 exceeds the experts of labelled samples, model.moe.num_experts = "
        "16 less model.router.null_expert = 1",
    ),
    (
        {"model.router.name": "promoe_ec", "model.router.capacity": 15.5},
        "model.router.capacity = 15.5 exceeds the experts of labelled samples",
    ),
    (
        {
            "model.reverse_time": True,
            "model.learn_sigma": True,
            "diffusion.path": "ddpm",
            "sampling.sampler": "ddpm",
        },
        "model.reverse_time turns the time of a flow",
    ),
    ({"model.depth": 1}, "model.depth = 1, model.moe.skip_first = 0 and model.moe.interleave ="),
    ({"train.eval_samples": 1}, "train.eval_samples = 1 has no covariance: take some hundreds"),
    ({"model.moe.skip_first": 12}, "leave no MoE block: add blocks, skip fewer, or set model.rout"),
    (
        {"model.moe.residual_input": True, "model.moe.shared_hidden_size": 8},
        "model.moe.residual_input stands in for a shared expert, but model.moe.shared_hidden_size",
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
        "model.router.scope = sample",
    ),
    (
        DIFFMOE
        | {"model.router.scope": "batch", "model.router.capacity": 0.01}
        | {"data.batch_size": 8, "optim.accumulate": 4},
        "less than one of the 512 tokens in model.router.scope = batch",
    ),
    (DIFFMOE | {"model.router.max_capacity": 0.5}, "model.router.max_capacity = 0.5 would drop"),
    ({"loss_weights.capacity": 1.0}, "loss_weights.capacity is no loss of model.router.name ="),
    ({"loss_weights.balance": -1.0}, "loss_weights.balance = -1.0 must be zero or positive"),
    (EXPERT_CHOICE | {"loss_weights.balance": 1.0}, "expert_choice, which has router_z: remove"),
    (DIFFMOE | {"loss_weights.balance": 1.0}, "diffmoe, which has capacity and router_z: remove"),
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
    (
        {"optim.schedule": "cosine", "optim.warmup_steps": 10, "train.num_steps": 10},
        "optim.warmup_steps = 10 leaves nothing of train.num_steps = 10",
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
        DIFFMOE | {"model.router.max_capacity": 0.0, "loss_weights.capacity": 0.0},
        {"loss_weights.balance": 0.01, "loss_weights.router_z": 0.001},
        {"ema.decays": ()},
        {"sampling.cfg_interval": (0.1, 1.0)},
    ],
)
def test_possible_combinations(changes):
    validate(changed(changes))


@pytest.mark.parametrize("key", sorted(CHOICES))
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
        ("diffusion.cond_dropout", 1.5, "between 0 and 1"),
    ],
)
def test_ranges(key, value, wanted):
    with raises(f"{key} = {value} must be {wanted}"):
        validate(changed({key: value}))


def test_batch_must_split_over_devices():
    config = changed({"data.batch_size": 24, "optim.accumulate": 2})
    validate_devices(config, 4)
    with raises(
        "optim.accumulate = 12 images cannot be split evenly over 8 devices: make it a mul"
    ):
        validate_devices(config, 8)


def test_a_shard_must_have_tokens_for_every_expert():
    changes = DIFFMOE | {"model.router.scope": "shard", "model.router.capacity": 0.05}
    config = changed(changes | {"data.batch_size": 8})
    validate(config)
    validate_devices(config, 4)
    with raises("less than one of the 256 tokens in model.router.scope = shard"):
        validate_devices(config, 8)
