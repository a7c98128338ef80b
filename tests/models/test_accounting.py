"""Counts of the built models; the published configurations against the authors' classes."""

import jax
import pytest

from moe_diffusion import config as configs
from moe_diffusion.models import build
from moe_diffusion.models.accounting import Count, parameter_counts, table


@pytest.mark.parametrize(
    ("spec", "total", "activated"),
    [
        # goldens/param_counts.json, dsmoe_yaml_configs: the authors' classes at full size.
        ("configs/dsmoe_s.py", 96_870_560, 34_939_040),
        ("configs/dsmoe_s.py:experts=48", 69_238_304, 31_194_656),
        ("configs/dsmoe_b.py", 386_318_624, 138_592_544),
        ("configs/dsmoe_b.py:experts=48", 275_610_656, 123_436_064),
        ("configs/dsmoe_l.py:experts=16", 1_368_055_840, 487_252_000),
        ("configs/dsmoe_l.py", 1_166_944_288, 456_796_192),
        ("configs/dsmoe_3b.py", 3_101_669_024, 1_011_480_224),
    ],
)
def test_published_configurations(spec, total, activated):
    counts = parameter_counts(build(configs.load(spec).model))
    assert counts["total"] == Count(total, activated)


def test_kinds_of_dsmoe_l_e48():
    counts = parameter_counts(build(configs.load("configs/dsmoe_l.py:experts=48").model))
    assert {kind: count.total for kind, count in counts.items()} == {
        "embedders": 2_355_200,
        "attention": 100_761_600,
        "dense ffn": 100_724_736,
        "adaLN": 151_142_400,
        "routed experts": 792_723_456,
        "router": 589_824,
        "shared experts": 16_515_072,
        "final layer": 2_132_000,
        "total": 1_166_944_288,
    }


@pytest.mark.parametrize(
    "router", ["token_choice", "expert_choice", "diffmoe", "deepseek", "dense"]
)
def test_every_parameter_has_a_kind(router):
    model = build(configs.load(f"configs/digits.py:router={router}").model)
    counts = parameter_counts(model)
    assert ("routed experts" in counts) == (router != "dense")
    assert ("capacity predictor" in counts) == (router == "diffmoe")
    lines = table(counts).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[-1].startswith("total")


def test_nothing_is_allocated():
    before = len(jax.live_arrays())
    parameter_counts(build(configs.load("configs/dsmoe_3b.py").model))
    assert len(jax.live_arrays()) == before
