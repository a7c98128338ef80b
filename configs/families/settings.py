"""Equal training: what the models of one table were trained with, as an argument of their configs.

`configs/tcdit_l.py:setting=diffmoe_table3` trains TC-DiT-L as every model of DiffMoE's Table 3 is
trained. Without a setting, a config has the training of its own paper.

Where text and code disagree, or the text is silent, `Setting.source` says what was taken and why.
docs/papers_vs_code.md lists the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ml_collections import ConfigDict

from moe_diffusion.config import parse_arg
from moe_diffusion.errors import UserError

STEPS_PER_EPOCH = 1_281_167 // 1024  # of ImageNet, for JiT's batch


@dataclass(frozen=True)
class Setting:
    """The training that the models of one table or figure have in common.

    AdamW, its learning rate, decay and schedule, EMA, label dropout and flips are those of the
    configs; they are equal in all members without help.

    Attributes:
      batch_size: images per optimizer step, over all devices.
      num_steps: optimizer steps.
      objective: "flow" or "ddpm".
      source: paper, table or figure; and what the text leaves open.
      members: label of the row -> config spec, this setting included.
      same_as: another setting with the same training, whose runs serve both. The runs carry its
        name, so that no model is trained twice.
      time_sampling: of training times; "" = that of the family.
      clip_norm: of the global gradient; None = that of the family.
    """

    batch_size: int
    num_steps: int
    objective: str
    source: str
    members: dict[str, str]
    same_as: str = ""
    time_sampling: str = ""
    clip_norm: float | None = None


# --- DiffMoE, arXiv 2503.14487 -------------------------------------------------------------------

_DIFFMOE_BATCH = (
    "Batch 256 is appendix B.1; the one yaml file that the authors released says 512, for 128 "
    "pixels. 256 fits the tables: with 512, DiffMoE-L-E16 has FID 11.16 after the same 700K steps "
    "(arXiv 2512.01252, Table 2), with Table 3's training 14.41. Dense-DiT-XL of Table 2 is the "
    "released DiT and SiT, which had 256, too."
)


def _diffmoe(
    num_steps: int, objective: str, source: str, specs: dict[str, str], same_as: str = ""
) -> Setting:
    source = f"arXiv 2503.14487, {source} {_DIFFMOE_BATCH}"
    return Setting(256, num_steps, objective, source, specs, same_as)


def _models_of_l(suffix: str) -> dict[str, str]:
    return {
        f"TC-DiT-L-E16-{suffix}": "tcdit_l.py:experts=16",
        f"EC-DiT-L-E16-{suffix}": "ecdit_l.py:experts=16",
        f"Dense-DiT-L-{suffix}": "dit_l.py",
        f"Dense-DiT-XL-{suffix}": "dit_xl.py",
        f"DiffMoE-L-E16-{suffix}": "diffmoe_l.py:experts=16",
    }


def _models_by_size(suffix: str) -> dict[str, str]:
    return {
        **{f"Dense-DiT-{s}-{suffix}": f"dit_{s.lower()}.py" for s in "SBL"},
        **{f"DiffMoE-{s}-E16-{suffix}": f"diffmoe_{s.lower()}.py:experts=16" for s in "SBL"},
    }


_DIFFMOE = {
    "diffmoe_table2": _diffmoe(
        7_000_000,
        "flow",
        "Table 2 (flow), whose models are also those of Tables 6 and 12 to 15.",
        {"Dense-DiT-XL-Flow": "dit_xl.py", "DiffMoE-L-E8-Flow": "diffmoe_l.py:experts=8"},
    ),
    "diffmoe_table2_ddpm": _diffmoe(
        7_000_000,
        "ddpm",
        "Table 2 (DDPM), whose models are also those of Tables 6 and 12 to 14.",
        {"Dense-DiT-XL-DDPM": "dit_xl.py", "DiffMoE-L-E8-DDPM": "diffmoe_l.py:experts=8"},
    ),
    "diffmoe_table3": _diffmoe(
        700_000,
        "flow",
        "Table 3; its DiffMoE-L-E16 is also that of Tables 4 and 10.",
        _models_of_l("Flow"),
    ),
    "diffmoe_table5": _diffmoe(
        3_000_000,
        "flow",
        "Table 5, which gives parameters alone of XXL and XXXL (see SIZES in families/dit.py).",
        {
            **{f"Dense-DiT-{s}-Flow": f"dit_{s.lower()}.py" for s in ("XL", "XXL", "XXXL")},
            "DiffMoE-L-E8-Flow": "diffmoe_l.py:experts=8",
            "DiffMoE-L-E16-Flow": "diffmoe_l.py:experts=16",
            "DiffMoE-XL-E16-Flow": "diffmoe_xl.py:experts=16",
        },
    ),
    "diffmoe_table8": _diffmoe(
        700_000,
        "flow",
        "Table 8: Table 3's models, and EC-DiT with a capacity predictor.",
        {
            **_models_of_l("Flow"),
            "EC-DiT-L-E16-Flow, Dynamic Intra-sample": "ecdit_l.py:experts=16,predictor=true",
        },
        same_as="diffmoe_table3",
    ),
    "diffmoe_table11": _diffmoe(
        700_000,
        "ddpm",
        "Table 11: Table 3's models with DDPM. The table is not in the text at hand; the steps are "
        "those of Figures 13 and 14.",
        _models_of_l("DDPM"),
    ),
    "diffmoe_figure8": _diffmoe(
        700_000,
        "flow",
        "Figure 8; the text names neither its baselines nor its steps.",
        _models_by_size("Flow"),
        same_as="diffmoe_table3",
    ),
    "diffmoe_figure9": _diffmoe(
        700_000,
        "flow",
        "Figure 9; the text does not give its steps.",
        {
            "Dense-DiT-L-Flow (E1)": "dit_l.py",
            **{f"DiffMoE-L-E{e}-Flow": f"diffmoe_l.py:experts={e}" for e in (2, 4, 8, 16)},
        },
        same_as="diffmoe_table3",
    ),
    "diffmoe_figure11": _diffmoe(
        700_000,
        "ddpm",
        "Figure 11; the text names neither all of its baselines nor its steps.",
        _models_by_size("DDPM"),
        same_as="diffmoe_table11",
    ),
}

# --- ProMoE, arXiv 2510.24711, whose training DSMoE's Table 3 takes ------------------------------

_PROMOE = Setting(
    256,
    500_000,
    "flow",
    "arXiv 2510.24711, its authors' configs/*.yaml, config.py and train.py: 256 images, results at "
    "500K steps, logit-normal times, gradients clipped at 0.5, for their baselines, too.",
    {
        **{f"Dense-DiT-{s}": f"dit_{s.lower()}.py" for s in ("B", "L", "XL")},
        "TC-DiT-L-E8": "tcdit_l.py:experts=8",
        "EC-DiT-L-E8": "ecdit_l.py:experts=8",
        **{f"DiffMoE-{s}-E8": f"diffmoe_{s.lower()}.py:experts=8" for s in ("B", "L", "XL")},
        **{f"ProMoE-{s}": f"promoe_{s.lower()}.py" for s in ("S", "B", "L", "XL")},
        "ProMoE-EC-L": "promoe_l.py:routing=expert_choice",
    },
    time_sampling="logit_normal",
    clip_norm=0.5,
)

# --- DSMoE and JiTMoE, arXiv 2512.01252 ----------------------------------------------------------


def _dsmoe(source: str, specs: dict[str, str], same_as: str = "") -> Setting:
    source = f"arXiv 2512.01252, {source} Batch 512 is appendix A."
    return Setting(512, 700_000, "flow", source, specs, same_as)


def _dsmoe_models(sizes: str) -> dict[str, str]:
    return {f"DSMoE-{s}-E{e}": f"dsmoe_{s.lower()}.py:experts={e}" for s in sizes for e in (16, 48)}


_DSMOE = {
    "dsmoe_table2": _dsmoe(
        "Table 2. Section 1 gives 700K steps, for 3B; the yaml files leave the end open.",
        {
            **{f"DiffMoE-{s}-E16": f"diffmoe_{s.lower()}.py:experts=16" for s in "SBL"},
            **_dsmoe_models("SBL"),
            "DSMoE-3B-E16": "dsmoe_3b.py:experts=16",
        },
    ),
    "dsmoe_table3": replace(
        _PROMOE,
        source="arXiv 2512.01252, Table 3. The text gives neither steps nor batch. Its ProMoE rows "
        "are the figures of ProMoE's released checkpoints, which had 256 images for 500K steps; so "
        "all of its models have ProMoE's training here. With appendix A's batch of 512 for DSMoE "
        "the models would not be trained equally.",
        members={
            **{f"Dense-DiT-{s}": f"dit_{s.lower()}.py" for s in "BL"},
            **{f"ProMoE-{s}": f"promoe_{s.lower()}.py" for s in "BL"},
            **_dsmoe_models("BL"),
        },
        same_as="promoe",
    ),
    "dsmoe_table4": Setting(
        1024,
        200 * STEPS_PER_EPOCH,
        "flow",
        "arXiv 2512.01252, Tables 4 and 6: 200 epochs. The commands in the authors' repository say "
        "600, at the same constant rate.",
        {
            **{f"JiT-{s}/16": f"jit_{s.lower()}16.py" for s in "BL"},
            **{f"JiTMoE-{s}/16-E16": f"jitmoe_{s.lower()}16.py" for s in "BL"},
        },
    ),
    "dsmoe_table5": _dsmoe(
        "Table 5, position encodings of DSMoE-S-E16.",
        {
            "APE": "dsmoe_s.py:ablation=ape",
            "RoPE (1D)": "dsmoe_s.py:ablation=rope1d",
            "RoPE (2D)": "dsmoe_s.py",
        },
        same_as="dsmoe_table2",
    ),
    "dsmoe_figure3": _dsmoe(
        "Figure 3, more and narrower experts. The text does not name its models; these are the two "
        "of the yaml files, whose activated parameters are nearly equal (33M and 30M).",
        _dsmoe_models("S"),
        same_as="dsmoe_table2",
    ),
    "dsmoe_figure5": _dsmoe(
        "Figure 5, ablations of DSMoE-S-E16 (section 4.3).",
        {
            "default": "dsmoe_s.py",
            "S0A3": "dsmoe_s.py:ablation=s0a3",
            "w/o Interleave": "dsmoe_s.py:ablation=no_interleave",
            "w/ GQA": "dsmoe_s.py:ablation=gqa",
        },
        same_as="dsmoe_table2",
    ),
}


def _completed(name: str, setting: Setting) -> Setting:
    """The setting with members like "configs/dit_l.py:more=1,setting=<name>"."""
    members = {
        label: f"configs/{spec}{',' if ':' in spec else ':'}setting={name}"
        for label, spec in setting.members.items()
    }
    return replace(setting, members=members)


SETTINGS: dict[str, Setting] = {
    name: _completed(name, setting)
    for name, setting in {**_DIFFMOE, **_DSMOE, "promoe": _PROMOE}.items()
}


# --- what the configs of a family do with it -----------------------------------------------------


def parse(
    model: str,
    arg: str | None,
    *,
    choices: Mapping[str, Sequence] | None = None,
    **defaults: Any,
) -> ConfigDict:
    """Parses the argument of a config file that has `setting=`, too; see `config.parse_arg`.

    With a setting, the default of `objective` is that of the setting, and no other is possible.

    Args:
      model: name of the config file, without configs/ and .py.

    Returns:
      The arguments; `setting` is "none" where none was asked for.

    Raises:
      UserError: as `parse_arg`; or the model with these arguments is in no such table.
    """

    def parsed(text: str | None) -> ConfigDict:
        own, known = {**defaults, "setting": "none"}, {**(choices or {})}
        known["setting"] = ("none", *SETTINGS)
        setting = parse_arg(text, choices=known, **own).setting
        if setting in SETTINGS and "objective" in own:
            own["objective"] = SETTINGS[setting].objective
            known["objective"] = (own["objective"],)
        return parse_arg(text, choices=known, **own)

    chosen = parsed(arg)
    if chosen.setting in SETTINGS:
        members = [
            spec.partition(":")[2]
            for setting in SETTINGS.values()
            for spec in setting.members.values()
            if spec.startswith(f"configs/{model}.py:")
        ]
        if chosen not in map(parsed, members):
            places = " | ".join(members)
            raise UserError(
                f"no row of {chosen.setting} is this model: "
                + (f"choose {places}" if places else f"{model} is in no table, leave setting out")
            )
    return chosen


def apply(config: ConfigDict, name: str) -> None:
    """Gives a config the training of a setting, and adds its name; "none" changes nothing."""
    if name == "none":
        return
    setting = SETTINGS[name]
    config.name += f"_{setting.same_as or name}"
    config.data.batch_size, config.train.num_steps = setting.batch_size, setting.num_steps
    config.optim.mu_dtype = "float32"  # as all authors; some configs save memory here
    if setting.time_sampling:
        config.diffusion.time_sampling = setting.time_sampling
    if setting.clip_norm is not None:
        config.optim.clip_norm = setting.clip_norm
