"""Which stages a distillation has, and the config of each (2510.09094, section 3.2, Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ml_collections import ConfigDict

from moe_diffusion import config as configs
from moe_diffusion.checks import require
from moe_diffusion.models import build
from moe_diffusion.models.mixture_of_blocks import BALANCE, parse_groups

SHARED, EXPERTS, GROUPS = "shared", "experts", "groups"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
      name: of its folder.
      kind: `shared`, `experts` or `groups`, the section of `distill` that it follows.
      config: of its run.
    """

    name: str
    kind: str
    config: ConfigDict


def stages(config: ConfigDict) -> list[Stage]:
    """The stages of a distillation in order; those of 0 steps are left out."""
    found, groups = [], parse_groups(config.model.mob.groups)
    for kind in (SHARED, EXPERTS):
        if config.distill[kind].steps:
            found.append(Stage(kind, kind, _stage_config(config, kind, ())))
    if not config.distill[GROUPS].steps:
        return found
    kinds = [str(block.kind) for block in build(ungrouped(config).model).blocks()]
    streams = list(dict.fromkeys(kinds[first] for first, _ in groups))
    for number, _ in enumerate(streams, 1):
        upto = [group for group in groups if streams.index(kinds[group[0]]) < number]
        stage_config = _stage_config(config, GROUPS, [f"{a}-{b - 1}" for a, b in upto])
        found.append(Stage(f"{GROUPS}{number}", GROUPS, stage_config))
    return found


def stage_named(config: ConfigDict, name: str) -> ConfigDict:
    """The config of one stage. Raises a UserError if there is no such stage."""
    found = {stage.name: stage.config for stage in stages(config)}
    require(
        name in found,
        f"{config.name} has no stage {name!r}; it has {', '.join(found) or 'none with steps'}: set "
        f"distill.<stage>.steps",
    )
    return found[name]


def ungrouped(config: ConfigDict) -> ConfigDict:
    """The config without a Mixture of Blocks, all of whose parameters are trained."""
    weights = {n: w for n, w in config.loss_weights.items() if n != BALANCE}
    values = config.to_dict() | {"loss_weights": weights}
    return configs.settle(values, ["model.mob.groups=none", "optim.trainable=*"])


def has_experts(config: ConfigDict) -> bool:
    """Whether the model has normal experts, not shared ones alone."""
    return config.model.router.name != "dense" and config.model.moe.num_experts > 0


def _stage_config(config: ConfigDict, kind: str, groups: Sequence[str]) -> ConfigDict:
    """The config of a stage's run.

    groups: `model.mob.groups` of its model.
    """
    section, trained = config.distill[kind], list(config.distill[kind].trainable)
    when = {SHARED: (SHARED, "both"), EXPERTS: (EXPERTS, "both"), GROUPS: ()}[kind]
    if config.model.adaln_rank and config.distill.adaln_stage in when:
        trained += ["layers_*adaLN/*"] + ["adaLN_down/*"] * config.model.adaln_shared
    values = config.to_dict()
    values["name"] = f"{config.name}_{kind}"
    values["model"]["mob"]["groups"] = tuple(groups) or ("none",)
    values["train"]["num_steps"] = section.steps
    values["optim"] |= {"learning_rate": section.learning_rate, "trainable": tuple(trained)}
    routed = has_experts(config) and kind != SHARED
    if has_experts(config) and kind == SHARED:
        values["model"]["router"]["top_k"] = 0
    values["loss_weights"] = {
        name: weight
        for name, weight in config.loss_weights.items()
        if (groups if name == BALANCE else routed)
    }
    return configs.settle(values)


def dense_of(config: ConfigDict) -> ConfigDict:
    """The config of a teacher that the student of `config` could have, of as many blocks."""
    keys = {"adaln_rank": 0, "adaln_shared": False, "param_dtype": "float32"}
    values = ungrouped(config).to_dict() | {"loss_weights": {}}
    values["model"] |= keys | {"router": {"name": "dense"}}
    return configs.settle(values)
