"""FLUX.1-MoE (Dense2MoE, 2510.09094): FLUX.1 with experts in place of MLPs, and grouped blocks.

Blocks count from 0: 0-18 have two streams, 19-56 one. The paper does not say which blocks it groups
(sections 4.1 and 4.3 give numbers of groups). The defaults here follow two findings: Figure 3, a
block's share in the result varies with prompt and time, so that no block is spared in general; and
published depth pruning, where the first and the last blocks matter most. So the groups of single
blocks stand in the middle, and the converted double blocks are grouped from 4 on: of the 16 there
are 15 in groups, and the one alone, 3, is the nearest to the input. `model.mob.groups` changes it.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs.families.dense2moe import E12A2, give_experts
from configs.families.flux import flux
from moe_diffusion.config import parse_arg
from moe_diffusion.dense2moe.stage_configs import EXPERTS, GROUPS, SHARED
from moe_diffusion.errors import UserError
from moe_diffusion.models.mixture_of_blocks import parse_groups

MLP_RATIO = 4.0
SINGLE = 19  # the first block of one stream
# Of a stage. The paper does not say; Figure 5 shows as many of group feature distillation.
STEPS = 40_000
BALANCE = 1e-2  # weight of the losses that balance experts and blocks (Eq. 10)

# Section 4.1: five groups of three double blocks, and three or five groups of five single ones.
GROUPS_M = ("4-6", "7-9", "10-12", "13-15", "16-18")
GROUPS_S = (*GROUPS_M, "30-34", "35-39", "40-44")
GROUPS_XS = (*GROUPS_M, "25-29", "30-34", "35-39", "40-44", "45-49")

# Variant of flux_moe_ablation.py -> arguments of `flux_moe`. Tables 4 and 5 and Figure 5 are about
# single blocks alone, at 512 x 512 (section 4.3). Whether their modulation is compressed is not
# said; here it is not, nor in Tables 2 and 3, which compare what the compression would blur.
_SINGLE_ONLY = {"adaln_rank": 0, "skip_first": SINGLE, "pixels": 512}
_WHOLE = {"adaln_rank": 0}
_DENSE = {"adaln_rank": 0, "ratios": None}
ABLATIONS: dict[str, dict[str, Any]] = {
    # Table 2: MLPs pruned to 1.5 and 2 times the width, and experts.
    "pruned1.5": _WHOLE | {"ratios": 1.5},
    "pruned2": _WHOLE | {"ratios": 2.0},
    "moe1.5": _WHOLE,
    # Table 3: as many blocks active, double and single, by pruning and by groups; dense MLPs.
    "depth9_38": _DENSE | {"depth": (9, 38)},
    "depth9_26": _DENSE | {"depth": (9, 26)},
    "mob9_38": _DENSE | {"groups": GROUPS_M},
    "mob9_26": _DENSE | {"groups": GROUPS_S},
    # Table 4: shared ratio, normal experts, active ones.
    "1s12e2a": _SINGLE_ONLY,
    "0.5s14e4a": _SINGLE_ONLY | {"ratios": (0.5, 0.25, 14, 4)},
    # Table 5: hidden units dealt at random; shared and normal experts trained together.
    "random_split": _SINGLE_ONLY | {"importance": "random"},
    "joint": _SINGLE_ONLY | {"jointly": True},
    # Figure 5: 4 of 12 blocks, the middle ones of 19-56.
    "groups4x3": _SINGLE_ONLY | {"groups": ("32-34", "35-37", "38-40", "41-43")},
    "groups2x6": _SINGLE_ONLY | {"groups": ("32-37", "38-43"), "active": 2},
    "groups1x12": _SINGLE_ONLY | {"groups": ("32-43",), "active": 4},
}


def level(name: str, arg: str | None, groups: tuple[str, ...] = ()) -> ConfigDict:
    """A model of Table 1; its argument may change the pixels and the ratios of Eq. 1-3."""
    chosen = parse_arg(arg, pixels=1024, shared=1.0, normal=0.25, experts=12, top_k=2)
    ratios = (chosen.shared, chosen.normal, chosen.experts, chosen.top_k)
    return flux_moe(name, ratios, groups=groups, pixels=chosen.pixels)


def ablation(arg: str | None) -> ConfigDict:
    """A model of Tables 2-5 or of Figure 5, see `ABLATIONS`."""
    variant = parse_arg(arg, choices={"variant": tuple(ABLATIONS)}, variant="1s12e2a").variant
    return flux_moe(f"flux_moe_{variant}", **ABLATIONS[variant])


def hyper(config: ConfigDict) -> ConfigDict:
    """Makes HyperFLUX the teacher: eight steps."""
    config.sampling.steps = 8
    config.distill.teacher = "runs/hyper_flux"
    return config


def flux_moe(
    name: str,
    ratios: tuple[float, float, int, int] | float | None = E12A2,
    *,
    groups: tuple[str, ...] = (),
    active: int = 1,
    skip_first: int = 3,
    adaln_rank: int = 256,
    depth: tuple[int, int] = (SINGLE, 38),
    pixels: int = 1024,
    importance: str = "taylor",
    jointly: bool = False,
) -> ConfigDict:
    """A student of FLUX.1 [dev].

    Args:
      ratios: (r_s, r_n, n, k): width of the shared expert / width of the model, that of each of the
        n normal experts, and how many of these a token takes. One number: MLPs pruned to this
        ratio. None: the MLPs stay.
      groups, active: `model.mob.groups` and `model.mob.active`.
      skip_first: so many blocks keep their MLPs.
      adaln_rank: 256 for 3,072 channels compressed to 256; 0 for whole modulation.
      depth: double and single blocks.
      importance, jointly: of the training, see `_train`.

    Raises:
      UserError: r_s + n r_n is not r = 4, or a ratio makes no whole number of hidden units.
    """
    config = flux(name, True, pixels)
    config.model.depth, config.model.flux.single_depth = depth
    config.model.adaln_rank = adaln_rank
    if isinstance(ratios, float):
        give_experts(config.model, (ratios, 0.0, 0, 0), skip_first)
    elif ratios:
        _check_sum(*ratios[:3])
        give_experts(config.model, ratios, skip_first)
        config.loss_weights.balance = BALANCE
    if groups:
        config.model.mob.groups, config.model.mob.active = groups, active
        config.loss_weights.block_balance = BALANCE
    _train(config, importance, jointly)
    return config


def _check_sum(shared: float, normal: float, experts: int) -> None:
    """r = r_s + n r_n: the experts have the hidden units of the MLP, each once."""
    total = shared + experts * normal
    if abs(total - MLP_RATIO) > 1e-9:
        raise UserError(
            f"shared={shared:g} + experts={experts} x normal={normal:g} = {total:g} is not the "
            f"ratio of the MLPs, {MLP_RATIO:g}, whose hidden units the experts share out: change "
            "one of the three"
        )


def _train(config: ConfigDict, importance: str, jointly: bool) -> None:
    """How the student is distilled: the one place of the section `distill`.

    Args:
      importance: how hidden units are dealt to the experts, `taylor` or `random` (Table 5).
      jointly: shared and normal experts are trained in one stage instead of two (Table 5).
    """
    how, model = config.distill, config.model
    how.teacher, how.importance = "runs/flux_dev", importance
    if model.router.name == "dense":
        stages = [GROUPS] if parse_groups(model.mob.groups) else [SHARED]
    else:
        stages = [SHARED] + [EXPERTS] * bool(model.moe.num_experts)
        stages += [GROUPS] * bool(parse_groups(model.mob.groups))
    if jointly:
        stages = [EXPERTS, *stages[2:]]
        how.experts.trainable = ("*/shared/*", "*/experts/*", "*/router/*")
    if (model.depth, model.flux.single_depth) != (
        SINGLE,
        38,
    ):  # FLUX.1-Lite's blocks; BK's training
        how.blocks, how.shared.trainable = ("lite",), ("*",)
    for stage in stages:
        how[stage].steps = STEPS
    if EXPERTS in stages and SHARED not in stages or stages == [SHARED]:  # as long as two stages
        how[stages[0]].steps = 2 * STEPS
