"""DiffMoE (arXiv 2503.14487) and the two routers it is compared with, TC-DiT and EC-DiT."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.dit import imagenet_latents


def diffmoe(size: str, experts: int, objective: str, router: str = "diffmoe") -> ConfigDict:
    """A DiT whose odd blocks have experts as wide as a dense MLP; a token uses one on average.

    Args:
      size: "s" | "b" | "l" | "xl" (arXiv 2503.14487, tables 1 and 5).
      experts: 2 | 4 | 8 | 16.
      objective: "flow" or "ddpm".
      router: "diffmoe"; "tcdit", where tokens choose; or "ecdit", where experts choose in an image.
    """
    config = imagenet_latents(f"{router}_{size}_e{experts}", size, objective)
    model = config.model
    model.moe.num_experts = experts
    model.moe.hidden_size = 4 * model.hidden_size
    model.moe.mlp, model.moe.bias = "gelu", True
    {"diffmoe": _diffmoe, "tcdit": _tcdit, "ecdit": _ecdit}[router](config)

    # The released yaml files say 512, the paper 256.
    config.data.batch_size = 512
    config.train.num_steps = 700_000  # 7,000,000 for the longest runs of L-E8
    return config


def _diffmoe(config: ConfigDict) -> None:
    router = config.model.router
    router.name, router.capacity = "diffmoe", 1.0
    router.group = "shard"  # the authors pool the tokens of one GPU
    router.kernel_init = "normal_0.006"
    config.loss_weights.capacity_predictor = 1.0


def _tcdit(config: ConfigDict) -> None:
    router = config.model.router
    router.name, router.top_k = "token_choice", 1
    router.kernel_init = "kaiming_uniform"
    config.loss_weights.balance = 0.01


def _ecdit(config: ConfigDict) -> None:
    router = config.model.router
    router.name, router.capacity, router.group = "expert_choice", 1.0, "sample"
    router.kernel_init = "normal_0.006"
