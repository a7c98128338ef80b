"""Equal training: what the models of one table have in common, and who takes part in which."""

from __future__ import annotations

import re

import pytest

from configs.families.settings import SETTINGS
from moe_diffusion import config as configs
from moe_diffusion import shipped
from moe_diffusion.errors import UserError

SPECS = [spec for setting in SETTINGS.values() for spec in setting.members.values()]
# What a model trains on and how, whatever its architecture.
SECTIONS = ("data", "optim", "ema", "diffusion")
# Setting -> batch size, steps, objective. 2503.14487: batch of appendix B.1, steps of the captions
# and headers of Tables 2, 3, 5 and 8. 2512.01252: batch of appendix A, steps of section 1; Table 6,
# 200 epochs of 1,281,167 // 1024 steps. ProMoE: total_train_batch_size and step_list_for_sample of
# its authors' yaml files.
PUBLISHED = {
    "diffmoe_table2": (256, 7_000_000, "flow"),
    "diffmoe_table2_ddpm": (256, 7_000_000, "ddpm"),
    "diffmoe_table3": (256, 700_000, "flow"),
    "diffmoe_table5": (256, 3_000_000, "flow"),
    "diffmoe_table8": (256, 700_000, "flow"),
    "diffmoe_table11": (256, 700_000, "ddpm"),
    "diffmoe_figure8": (256, 700_000, "flow"),
    "diffmoe_figure9": (256, 700_000, "flow"),
    "diffmoe_figure11": (256, 700_000, "ddpm"),
    "dsmoe_table2": (512, 700_000, "flow"),
    "dsmoe_table3": (256, 500_000, "flow"),
    "dsmoe_table4": (1024, 250_200, "flow"),
    "dsmoe_table5": (512, 700_000, "flow"),
    "dsmoe_figure3": (512, 700_000, "flow"),
    "dsmoe_figure5": (512, 700_000, "flow"),
    "promoe": (256, 500_000, "flow"),
}


def training(config: configs.ConfigDict) -> dict:
    """Everything that equal training makes equal."""
    return {name: config[name].to_dict() for name in SECTIONS} | {
        "num_steps": config.train.num_steps,
        "keep_every": config.checkpoint.keep_every,
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_the_models_of_a_table_are_trained_equally(name):
    setting = SETTINGS[name]
    loaded = [configs.load(spec) for spec in setting.members.values()]
    first = training(loaded[0])
    for config in loaded:
        assert training(config) == first
        assert config.name.endswith(f"_{setting.same_as or name}")
    data, optim, diffusion = first["data"], first["optim"], first["diffusion"]
    assert (data["batch_size"], first["num_steps"], diffusion["path"]) == PUBLISHED[name]
    assert PUBLISHED[name] == (setting.batch_size, setting.num_steps, setting.objective)
    assert data["augment"] == "flip" and diffusion["cond_dropout"] == 0.1
    assert (optim["weight_decay"], optim["schedule"], optim["mu_dtype"]) == (
        *(0.0, "constant", "float32"),
    )
    pixels = name == "dsmoe_table4"  # Table 6 there
    assert (optim["learning_rate"], optim["b2"]) == ((2e-4, 0.95) if pixels else (1e-4, 0.999))
    assert first["ema"]["decays"][0] == 0.9999
    logit_normal = pixels or name in ("promoe", "dsmoe_table3")
    assert diffusion["time_sampling"] == ("logit_normal" if logit_normal else "uniform")
    assert optim["clip_norm"] == (0.5 if logit_normal and not pixels else 0.0)


def test_every_setting_is_above():
    assert PUBLISHED.keys() == SETTINGS.keys()


def test_a_model_has_the_same_name_only_where_its_whole_config_is_the_same():
    """So that a run of one table serves in another, and two runs are never taken for one."""
    by_name: dict[str, configs.ConfigDict] = {}
    for spec in SPECS:
        config = configs.load(spec)
        assert by_name.setdefault(config.name, config) == config, spec


def test_a_setting_changes_the_training_alone():
    """Batch, and ProMoE's times and clipping; steps are none of a run's identity."""
    for setting in SETTINGS.values():
        allowed = {"name", "data.batch_size"}
        if setting.time_sampling:
            allowed |= {"diffusion.time_sampling", "optim.clip_norm"}
        for spec in setting.members.values():
            plain = re.sub("setting=.*", f"objective={setting.objective}", spec)
            if re.search("dsmoe_|jit", spec.partition(":")[0]):  # flows only
                plain = re.sub("[:,]setting=.*", "", spec)
            changed = configs.compare(
                configs.load(plain, ["optim.mu_dtype=float32"]), configs.load(spec)
            )
            assert {line.partition(":")[0] for line in changed} <= allowed, spec


def test_table_5_of_dsmoe_differs_in_positions_alone():
    """2512.01252, Table 5."""
    members = SETTINGS["dsmoe_table5"].members
    positions = {label: configs.load(spec).model.positions for label, spec in members.items()}
    assert positions == {"APE": "sincos", "RoPE (1D)": "rope1d", "RoPE (2D)": "rope2d"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "configs/tcdit_l.py:experts=8,setting=diffmoe_table3",
            "no row of diffmoe_table3 is this model: choose experts=16,setting=diffmoe_table3 | ",
        ),
        (
            "configs/promoe_s.py:setting=dsmoe_table3",
            "no row of dsmoe_table3 is this model: choose setting=promoe",
        ),
        (
            "configs/tcdit_s.py:setting=diffmoe_table3",
            "no row of diffmoe_table3 is this model: tcdit_s is in no table, leave setting out",
        ),
        (
            "configs/dit_l.py:objective=ddpm,setting=diffmoe_table3",
            "objective=ddpm is not possible; choose flow",
        ),
        ("configs/jit_b16.py:setting=table4", "setting=table4 is not possible; choose none | "),
        (
            "configs/dsmoe_b.py:ablation=gqa,setting=dsmoe_figure5",
            "no row of dsmoe_figure5 is this model: choose experts=16,setting=dsmoe_table2 | ",
        ),
    ],
)
def test_a_model_that_is_not_in_the_table_refuses_it(spec, message):
    with pytest.raises(UserError, match=re.escape(f"{spec}: {message}")):
        configs.load(spec)


def test_config_files_name_their_settings():
    """The text at the top of a file is all that a reader sees of the tables it is in."""
    for spec in SPECS:
        path, _, arg = spec.partition(":")
        text = (shipped.CHECKOUT / path).read_text()
        assert re.search(rf"\b{arg.rpartition('=')[2]}\b", text), spec
