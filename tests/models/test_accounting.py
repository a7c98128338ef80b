"""Counts of the built models against the authors' classes; FLOPs against XLA's own count."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion import interop
from moe_diffusion.models import abstract_variables, build
from moe_diffusion.models.accounting import Count, forward_flops, parameter_counts, table
from moe_diffusion.models.stack import abstract_inputs

FAMILIES = json.loads((Path(__file__).parents[1] / "goldens/param_counts.json").read_text())[
    "families"
]
# Kinds of the file -> ours; a frozen position table is no parameter here.
KINDS = {
    "embedders": "embedders",
    "attention": "attention",
    "dense_ffn": "dense ffn",
    "ffn": "dense ffn",
    "adaLN": "adaLN",
    "routed_experts": "routed experts",
    "shared_experts": "shared experts",
    "router": "router",
    "capacity_predictor": "capacity predictor",
    "norms": "norms",
    "final": "final layer",
}
# Keys of two older yaml files that the authors' classes do not look at.
NEVER_READ = ("use_type", "group_bins", "local_top_p")


def check(entry, counts):
    """Every kind, the total and the activated parameters of an entry of param_counts.json."""
    by_kind = dict(entry["by_kind"])
    frozen = by_kind.pop("pos_embed_frozen", 0)
    totals = {kind: count.total for kind, count in counts.items()}
    assert {KINDS[kind]: number for kind, number in by_kind.items()} == {
        kind: number for kind, number in totals.items() if kind != "total"
    }
    assert counts["total"].total == entry["trainable"] == entry["total"] - frozen
    assert counts["total"].activated == entry["active_per_token"] - frozen


def digits(router="dense", **model):
    keys = [f"model.{key.replace('__', '.')}={value}" for key, value in model.items()]
    return build(configs.load(f"configs/digits.py:router={router}", keys).model)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in ("dsmoe", "diffmoe")
        for name, entry in FAMILIES[f"{family}_yaml_configs"].items()
        if "skipped" not in entry
    ],
)
def test_networks_of_the_authors_hyperparameters(family, name):
    entry = FAMILIES[f"{family}_yaml_configs"][name]
    hparams = copy.deepcopy(entry["params"])
    for key in NEVER_READ:
        hparams["MoE_config"].pop(key, None)
    check(entry, parameter_counts(build(interop.model_config_from_torch(family, hparams))))


@pytest.mark.parametrize("experts, millions", [(2, 571.2), (4, 772.7), (8, 1175.7), (16, 1981.7)])
def test_experts_of_diffmoe_l(experts, millions):
    """arXiv 2503.14487, table 9."""
    counts = parameter_counts(build(configs.load(f"configs/diffmoe_l.py:experts={experts}").model))
    assert counts["total"].total / 1e6 == pytest.approx(millions, abs=0.1)


def test_activated_parameters_of_a_measured_capacity():
    model = digits("diffmoe")
    counts = parameter_counts(model, experts_per_token=1.5)
    experts = counts["routed experts"]
    assert experts.activated == experts.total * 1.5 / 8
    default = parameter_counts(model)
    assert counts["total"].activated == default["total"].activated - experts.total * 0.5 / 8
    assert counts["total"].total == default["total"].total


@pytest.mark.parametrize(
    "router", ["token_choice", "expert_choice", "diffmoe", "deepseek", "dense"]
)
def test_every_parameter_has_a_kind(router):
    counts = parameter_counts(digits(router))
    assert ("routed experts" in counts) == (router != "dense")
    assert ("capacity predictor" in counts) == (router == "diffmoe")
    lines = table(counts, forward_flops(digits(router))).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[-1].startswith("total")


def test_nothing_is_allocated():
    before = len(jax.live_arrays())
    model = build(configs.load("configs/dsmoe_3b.py").model)
    parameter_counts(model)
    forward_flops(model)
    assert len(jax.live_arrays()) == before


# --- FLOPs ---------------------------------------------------------------------------------------

WIDE = {"image_size": 16, "hidden_size": 2048, "num_heads": 8, "moe__num_experts": 4}


@pytest.mark.parametrize(
    ("router", "changes"),
    [
        ("dense", {"depth": 1, "num_kv_heads": 2, "mlp": "swiglu"}),
        # A backend whose products are exactly those that are counted: C = capacity * T / E slots.
        (
            "token_choice",
            {
                "depth": 2,
                "moe__hidden_size": 4096,
                "moe__backend": "slots",
                "moe__capacity_factor": 1.0,
                "moe__shared_hidden_size": 2048,
            },
        ),
        # Max capacity 1: exactly the slots of training.
        (
            "diffmoe",
            {
                "depth": 2,
                "moe__hidden_size": 4096,
                "moe__backend": "slots",
                "router__max_capacity": 1.0,
            },
        ),
    ],
)
def test_flops_agree_with_xla(router, changes):
    """Of a model whose every layer is a scan of length 1, which XLA counts whole; nothing runs.

    Its width leaves little to what we do not count: norms, softmax, activations.
    """
    model, batch = digits(router, **(WIDE | changes)), 2
    assert all(repeats == 1 for _, repeats in model.stack.segments)
    variables = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), abstract_variables(model)
    )
    inputs = abstract_inputs(model, batch)
    lowered = jax.jit(lambda *args: model.apply(*args, False)).lower(variables, *inputs)
    counted = lowered.cost_analysis()["flops"]
    assert forward_flops(model, batch)["total"] == pytest.approx(counted, rel=0.002)


def test_flops_of_layers_scanned():
    """Stacked layers count as often as there are; a batch is proportional."""
    one, five = (forward_flops(digits("token_choice", depth=2 * n)) for n in (1, 5))
    ends = ("embedders", "final layer", "total")
    assert all(five[kind] == 5 * one[kind] for kind in one if kind not in ends)
    assert all(five[kind] == one[kind] for kind in ends[:2])
    many = forward_flops(digits("token_choice", depth=2), batch=7)
    assert many["total"] == 7 * one["total"]


def test_flops_follow_the_experts_of_a_token():
    model = digits("diffmoe")
    trained, measured = forward_flops(model), forward_flops(model, experts_per_token=3.0)
    assert measured["routed experts"] == 1.5 * trained["routed experts"]
    others = [kind for kind in trained if kind not in ("routed experts", "total")]
    assert np.allclose([trained[k] for k in others], [measured[k] for k in others], rtol=0)


def test_flops_of_published_networks():
    """DiT-XL/2 at 256 x 256: 118.64 Gflops in 2212.09748, Table 4; these are multiply-adds."""
    hparams = {"hidden_size": 1152, "depth": 28, "num_heads": 16}
    model = build(interop.model_config_from_torch("dit", hparams))
    assert forward_flops(model)["total"] / 2e9 == pytest.approx(118.64, abs=0.05)


def test_count_adds_nothing_twice():
    counts = parameter_counts(digits("diffmoe"))
    total = counts.pop("total")
    assert total == Count(
        sum(c.total for c in counts.values()), sum(c.activated for c in counts.values())
    )
