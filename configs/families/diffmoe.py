"""DiffMoE (arXiv 2503.14487) and the two routers it is compared with, TC-DiT and EC-DiT."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families import settings
from configs.families.dit import OBJECTIVES, imagenet_latents


def diffmoe(size: str, arg: str | None, router: str = "diffmoe") -> ConfigDict:
    """A DiT whose odd blocks have experts as wide as a dense MLP; a token uses one on average.

    Args:
      size: "s" | "b" | "l" | "xl" (arXiv 2503.14487, tables 1 and 5).
      arg: of the config file: experts=16 | 8 | 4 | 2, objective=flow | ddpm, setting= one of
        `settings.SETTINGS`; of EC-DiT also predictor=false | true, a capacity predictor, with which
        it can be sampled by thresholds (table 8, dynamic intra-sample routing).
      router: "diffmoe"; "tcdit", where tokens choose; or "ecdit", where experts choose in an image.
    """
    defaults = {"experts": 16, "objective": "flow"}
    if router == "ecdit":
        defaults["predictor"] = False
    choices = {"experts": (2, 4, 8, 16), "objective": OBJECTIVES}
    chosen = settings.parse(f"{router}_{size}", arg, choices=choices, **defaults)
    predicts = router == "ecdit" and chosen.predictor
    name = f"{router}_{size}_e{chosen.experts}" + ("_predictor" if predicts else "")
    config = imagenet_latents(name, size, chosen.objective)
    model = config.model
    model.moe.num_experts = chosen.experts
    model.moe.hidden_size = 4 * model.hidden_size
    model.moe.mlp, model.moe.bias = "gelu", True
    {"diffmoe": give_diffmoe, "tcdit": _tcdit, "ecdit": _ecdit}[router](config)
    if predicts:
        give_diffmoe(config)
        model.router.group = "sample"

    config.data.batch_size = 512  # the yaml files; the paper, and so its settings, have 256
    config.train.num_steps = 700_000
    settings.apply(config, chosen.setting)
    return config


def give_diffmoe(config: ConfigDict) -> None:
    router = config.model.router
    router.name, router.capacity = "diffmoe", 1.0
    router.group = "shard"  # the authors pool the tokens of one GPU
    router.max_capacity = 0.0  # no bound, as in the authors' code
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
