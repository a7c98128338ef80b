"""The configs of Dense2MoE (2510.09094): blocks with experts, groups, errors."""

from __future__ import annotations

import pytest

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.models import build


def model_of(spec: str):
    return build(configs.load(f"configs/{spec}").model)


def structure(spec: str) -> tuple[dict[str, int], float, float]:
    """Blocks of each kind, and how many double and single ones a sample passes."""
    kinds: dict[str, int] = {}
    passed = {"double": 0.0, "single": 0.0}
    for block in model_of(spec).blocks():
        kinds[block.kind] = kinds.get(block.kind, 0) + 1
        passed[block.kind.partition("_")[0]] += block.share
    return kinds, round(passed["double"], 9), round(passed["single"], 9)


CONVERTED = {"double": 3, "double_moe": 16, "single_moe": 38}
DENSE = {"double": 19, "single": 38}
SINGLE = {"double": 19, "single_moe": 38}
EXPECTED = {
    "flux_lite.py": ({"double": 8, "single": 38}, 8, 38),
    "flux_mini.py": ({"double": 5, "single": 10}, 5, 10),
    # Section 4.1: 10 double blocks fewer, then 12 or 20 single ones.
    "flux_moe_l.py": (CONVERTED, 19, 38),
    "flux_moe_m.py": (CONVERTED, 9, 38),
    "flux_moe_s.py": (CONVERTED, 9, 26),
    "flux_moe_xs.py": (CONVERTED, 9, 18),
    # Tables 2 and 3.
    "flux_moe_ablation.py:variant=pruned1.5": (CONVERTED, 19, 38),
    "flux_moe_ablation.py:variant=depth9_26": ({"double": 9, "single": 26}, 9, 26),
    "flux_moe_ablation.py:variant=mob9_38": (DENSE, 9, 38),
    "flux_moe_ablation.py:variant=mob9_26": (DENSE, 9, 26),
    # Tables 4 and 5, Figure 5: single blocks alone; 4 of 12 active.
    "flux_moe_ablation.py": (SINGLE, 19, 38),
    "flux_moe_ablation.py:variant=groups4x3": (SINGLE, 19, 30),
    "flux_moe_ablation.py:variant=groups2x6": (SINGLE, 19, 30),
    "flux_moe_ablation.py:variant=groups1x12": (SINGLE, 19, 30),
}


@pytest.mark.parametrize("spec", EXPECTED)
def test_blocks(spec):
    assert structure(spec) == EXPECTED[spec]


def test_ratios_are_widths():
    """r_s = 1, r_n = 0.25 of 3,072 channels; 0.5S14E4A has half the shared expert, two more."""
    moe = configs.load("configs/flux_moe_l.py").model.moe
    assert (moe.shared_hidden_size, moe.num_experts, moe.hidden_size) == (3072, 12, 768)
    config = configs.load("configs/flux_moe_ablation.py:variant=0.5s14e4a").model
    moe = config.moe
    assert (moe.shared_hidden_size, moe.num_experts, moe.hidden_size) == (1536, 14, 768)
    assert config.router.top_k == 4 and (config.image_size, config.adaln_rank) == (64, 0)
    pruned = configs.load("configs/flux_moe_ablation.py:variant=pruned2")
    assert (pruned.model.moe.shared_hidden_size, pruned.model.moe.num_experts) == (6144, 0)
    assert pruned.loss_weights.to_dict() == {}
    other = configs.load("configs/flux_moe_l.py:shared=2,normal=0.5,experts=4,top_k=1,pixels=512")
    assert (other.model.moe.shared_hidden_size, other.model.moe.hidden_size) == (6144, 1536)
    assert (other.model.router.top_k, other.model.image_size) == (1, 64)


def test_losses_and_teachers():
    config = configs.load("configs/flux_moe_s.py")
    assert config.loss_weights.to_dict() == {"balance": 0.01, "block_balance": 0.01}
    assert configs.load("configs/flux_moe_l.py").loss_weights.to_dict() == {"balance": 0.01}
    assert config.distill.teacher == "runs/flux_dev" and config.sampling.steps == 28
    hyper = configs.load("configs/hyper_flux_moe_xs.py")
    assert hyper.distill.teacher == "runs/hyper_flux" and hyper.sampling.steps == 8
    split = configs.load("configs/flux_moe_ablation.py:variant=random_split")
    assert split.distill.importance == "random"
    joint = configs.load("configs/flux_moe_ablation.py:variant=joint").distill
    assert joint.shared.steps == 0 and "*/shared/*" in joint.experts.trainable


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flux_moe_l:shared=0.5", "shared=0.5 \\+ experts=12 x normal=0.25 = 3.5 is not the ratio"),
        ("flux_moe_s:experts=14", "= 4.5 is not the ratio of the MLPs, 4"),
        ("flux_moe_l:shared=3.9,normal=0.1,experts=1,top_k=1", "is no whole number of units"),
        ("flux_moe_l:top_k=13", "model.router.top_k = 13 exceeds"),
        ("flux_moe_ablation:variant=2s", "variant=2s is not possible; choose pruned1.5"),
    ],
)
def test_what_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        configs.load(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.mob.groups=4-6,6-8"], "overlaps the group before it"),
        (["model.mob.groups=54-57"], "leaves the model, whose blocks are 0-56"),
        (["model.mob.groups=2-4"], "blocks of several kinds, double and double_moe"),
        (["model.mob.active=4"], "exceeds the 3 blocks of the group 4-6"),
    ],
)
def test_groups_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        configs.load("flux_moe_m", changes)
