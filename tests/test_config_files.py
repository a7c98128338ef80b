"""The files in configs/: all of them load, and DSMoE's have the published numbers."""

from __future__ import annotations

import pytest

from moe_diffusion import config as configs

DIGITS = [
    f"configs/digits.py:router={router},size={size}"
    for router in ("token_choice", "expert_choice", "diffmoe", "deepseek", "dense")
    for size in ("tiny", "small")
]
DSMOE = [f"configs/dsmoe_{size}.py:experts={experts}" for size in "sbl" for experts in (16, 48)]
DSMOE += ["configs/dsmoe_3b.py"]


@pytest.mark.parametrize("spec", DIGITS + DSMOE)
def test_every_config_file_loads(spec):
    config = configs.load(spec)
    configs.validate(config)
    assert config.is_locked
    configs.validate_devices(config, 8)


def test_every_config_file_is_listed_above():
    stems = {path.stem for path in (configs.ROOT / "configs").glob("*.py")}
    tested = {spec.split("/")[1].split(".")[0] for spec in DIGITS + DSMOE}
    assert stems - {"__init__", "families"} == tested


def test_config_names_are_distinct():
    names = [configs.load(spec).name for spec in DIGITS + DSMOE]
    assert len(set(names)) == len(names)


def test_dsmoe_training_settings():
    config = configs.load("configs/dsmoe_l.py:experts=48")
    assert config.name == "dsmoe_l_e48"
    assert (config.optim.learning_rate, config.optim.b1, config.optim.b2) == (1e-4, 0.9, 0.999)
    assert (config.optim.schedule, config.optim.weight_decay) == ("constant", 0.0)
    assert (config.ema.decays, config.ema.warmup) == ((0.9999,), False)
    assert (config.data.batch_size, config.train.num_steps) == (512, 700_000)
    assert config.model.router.bias_update_rate == 0.0 and config.model.router.selection_bias
    assert not config.loss_weights


def test_digits_defaults_to_the_tiny_token_choice():
    plain = configs.load("configs/digits.py")
    assert plain == configs.load("configs/digits.py:router=token_choice,size=tiny")
    assert plain.loss_weights.to_dict() == {"balance": 0.01}
