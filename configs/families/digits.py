"""Small models for handwritten digits, one for each router."""

from __future__ import annotations

from ml_collections import ConfigDict

from moe_diffusion import config as configs

# size -> depth, width, heads
_DIGITS_SIZES = {"tiny": (6, 96, 4), "small": (8, 128, 4)}
DIGITS_ROUTERS = ("token_choice", "expert_choice", "diffmoe", "expert_race", "deepseek", "dense")


def digits(router: str, size: str) -> ConfigDict:
    """A small DiT on 8x8 digits for each router, with nearly the same activated parameters.

    A token uses two experts of half the dense width, which cost as much as one dense MLP. With
    "deepseek" it uses three gated experts of a quarter of the width: two routed, one shared.
    """
    config = configs.default()
    config.name = f"digits_{router}_{size}"

    model = config.model
    model.depth, model.hidden_size, model.num_heads = _DIGITS_SIZES[size]
    model.image_size, model.channels, model.patch_size, model.num_classes = 8, 1, 2, 10
    model.positions = "rope2d"
    give_router(config, router)

    train_briefly(config, num_steps=1300)
    return config


def train_briefly(config: ConfigDict, num_steps: int) -> None:
    """The training of small models on digits, which takes minutes."""
    config.data.batch_size = 128
    config.optim.learning_rate = 1e-3
    config.optim.schedule, config.optim.warmup_steps = "cosine", 100
    config.ema.decays, config.ema.warmup = (0.999,), True
    config.train.num_steps = num_steps
    config.train.sample_every, config.train.eval_samples = 500, 100
    config.checkpoint.every = 500
    config.sampling.steps = 25


def give_router(config: ConfigDict, router: str) -> None:
    """Gives a small model the experts of a router; see `digits`."""
    model = config.model
    model.moe.num_experts = 8
    model.moe.hidden_size = 2 * model.hidden_size
    model.moe.mlp, model.moe.bias = "gelu", True
    {
        "token_choice": _token_choice,
        "expert_choice": _expert_choice,
        "diffmoe": _diffmoe,
        "expert_race": _expert_race,
        "deepseek": _deepseek,
        "dense": _dense,
    }[router](config)


def _token_choice(config: ConfigDict) -> None:
    """As in TC-DiT: softmax scores, gates not renormalised, balance loss."""
    config.model.router.top_k = 2
    config.model.router.kernel_init = "kaiming_uniform"
    config.loss_weights.balance = 0.01


def _expert_choice(config: ConfigDict) -> None:
    """As in EC-DiT: every expert takes its best tokens of each image."""
    config.model.router.name = "expert_choice"
    config.model.router.capacity = 2.0
    config.model.router.kernel_init = "normal_0.006"


def _diffmoe(config: ConfigDict) -> None:
    """As in DiffMoE: every expert takes its best tokens of the whole batch."""
    config.model.router.name = "diffmoe"
    config.model.router.group = "batch"
    config.model.router.capacity = 2.0
    config.model.router.kernel_init = "normal_0.006"
    config.loss_weights.capacity_predictor = 1.0


def _expert_race(config: ConfigDict) -> None:
    """As in Race-DiT: the best pairs of a token and an expert in the whole batch."""
    config.model.router.name = "expert_race"
    config.model.router.group = "batch"
    config.model.router.capacity = 2.0
    config.loss_weights.similarity = 1e-4


def _deepseek(config: ConfigDict) -> None:
    """As in DSMoE, but with the selection bias moved towards equal load, as in DeepSeek-V3."""
    moe, router = config.model.moe, config.model.router
    moe.hidden_size = moe.shared_hidden_size = config.model.hidden_size
    moe.mlp, moe.bias = "swiglu", False
    router.top_k, router.n_group, router.topk_group = 2, 4, 2
    router.scores, router.normalize, router.scale = "sigmoid", True, 2.0
    router.selection_bias, router.bias_update_rate = True, 0.001


def _dense(config: ConfigDict) -> None:
    config.model.router.name = "dense"
