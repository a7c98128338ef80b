"""Dense2MoE (arXiv 2510.09094): experts in place of MLPs, and class-conditional DiTs with them."""

from __future__ import annotations

from ml_collections import ConfigDict

from moe_diffusion.config import parse_arg
from moe_diffusion.errors import UserError

E12A2 = (1.0, 0.25, 12, 2)  # 1S12E2A in the notation of Table 4
# Arguments of the config files, with their defaults.
ARGS = {"skip_first": 0, "adaln_rank": 0, "groups": "none", "active": 1}


def give_experts(
    model: ConfigDict,
    ratios: tuple[float, float, int, int] = E12A2,
    skip_first: int = 0,
) -> None:
    """The layers of Eq. 2 and 3 in the section `model` of a dense config.

    Args:
      ratios: (r_s, r_n, n, k): hidden units of the shared expert / width of the model, those of
        each of the n normal experts, and how many of these a token takes.
      skip_first: so many blocks keep their MLPs.

    Raises:
      UserError: a ratio makes no whole number of hidden units.
    """
    shared, normal, experts, top_k = ratios
    widths = [ratio * model.hidden_size for ratio in (shared, normal)]
    for name, width in zip(("shared", "normal"), widths, strict=True):
        if width != int(width):
            raise UserError(f"{name} x model.hidden_size = {width:g} is no whole number of units")
    model.moe.update(
        num_experts=experts,
        hidden_size=int(widths[1]) or model.moe.hidden_size,
        mlp=model.mlp,
        bias=model.mlp_bias,
        shared_hidden_size=int(widths[0]),
        shared_mlp=model.mlp,
        shared_bias=model.mlp_bias,
        interleave=False,
        skip_first=skip_first,
    )
    model.router.name = "token_choice"
    # The gates of a token sum to 1, also with fewer experts at inference (Eq. 3, Figure 8).
    gates = {"scores": "softmax", "normalize": True, "normalize_one": True}
    model.router.update(top_k=top_k, balance_gates=True, **gates)


def experts(config: ConfigDict, arg: ConfigDict, steps: int, learning_rate: float) -> ConfigDict:
    """Gives a dense DiT experts at the paper's ratios, and the stages that make them of its MLPs.

    Of a hidden layer 4 times as wide as the model the shared expert takes 1, each of 12 normal
    experts 0.25, and a token meets two of these: 1 + 2 * 0.25 of 4 (section 4.1). The gates of a
    token sum to 1 (Eq. 3).

    Args:
      arg: has `ARGS`. groups are written like 4-6+7-9.
      steps: of every stage. With groups there is a third one.
    """
    model = config.model
    give_experts(model, skip_first=arg.skip_first)
    model.adaln_rank = arg.adaln_rank
    model.mob.groups, model.mob.active = tuple(arg.groups.split("+")), arg.active
    config.loss_weights.balance = 1e-2
    stages = ["shared", "experts"]
    if arg.adaln_rank:
        config.name += f"_rank{arg.adaln_rank}"
    if arg.groups != "none":
        config.name += f"_mob{arg.active}"
        config.loss_weights.block_balance = 1e-2
        stages.append("groups")
    for stage in stages:  # of distill.teacher, which the command names
        config.distill[stage].update(steps=steps, learning_rate=learning_rate)
    # `train` with this config trains the same model from scratch, for as many steps.
    config.train.num_steps = steps * len(stages)
    return config


def xl_moe(config: ConfigDict, arg: ConfigDict) -> ConfigDict:
    """Experts in DiT-XL/2 or SiT-XL/2.

    The paper keeps the first 3 of FLUX.1's 57 blocks dense and tells no steps; its Figure 5 has
    40,000. In these models all 28 blocks get experts by default.
    """
    config.name = config.name.replace("_xl", "_xl_moe")
    return experts(config, arg, steps=40_000, learning_rate=1e-4)


def parse(arg: str | None, **options) -> ConfigDict:
    """The argument of a config file; see `config.parse_arg` and `ARGS`."""
    return parse_arg(arg, **ARGS, **options)
