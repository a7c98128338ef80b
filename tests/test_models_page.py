"""The configs against the authors' classes at full size, and the table in docs/models.md."""

from __future__ import annotations

import re

import pytest

from docs import dense2moe_counts, generate_models, pages
from docs.published import PUBLISHED, VARIANTS
from moe_diffusion import config as configs
from moe_diffusion import shipped
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from tests.models.test_accounting import FAMILIES, check

SIZES = ("S", "B", "L", "XL")
# Entry of param_counts.json -> config and overrides. Those by yaml file are in test_accounting.py.
PINNED = {
    "dsmoe_yaml_configs": {
        "000_DSMoE_S_E16_Flow_half_misx2_s1a2_rope2d_l10": ["dsmoe_s.py"],
        "000_DSMoE_S_E48_Flow_half_misx0.3_s1a5_rope2d_l12": ["dsmoe_s.py:experts=48"],
        "000_DSMoE_B_E16_Flow_half_misx2_s1a2_rope2d_l10": ["dsmoe_b.py"],
        "000_DSMoE_B_E48_Flow_half_misx0.3_s1a5_rope2d_l12": ["dsmoe_b.py:experts=48"],
        "000_DSMoE_L_E16_Flow_half_misx2_s1a2_rope2d_l20": ["dsmoe_l.py:experts=16"],
        "000_DSMoE_L_E48_Flow_half_misx0.4_s1a5_rope2d_l24": ["dsmoe_l.py"],
        "000_DSMoE_3B_E16_Flow_half_misx2.5_s1a2_rope2d_l30": ["dsmoe_3b.py"],
    },
    "diffmoe_as_named": {
        f"DiffMoE-{size}-E{experts}": [f"diffmoe_{size.lower()}.py:experts={experts}"]
        for size in SIZES[:3]
        for experts in (8, 16)
    },
    "tc_ec_dit": {
        f"{kind}-DiT-L-E{experts}": [f"{kind.lower()}dit_l.py:experts={experts}"]
        for kind in ("TC", "EC")
        for experts in (8, 16)
    },
    "dit": {
        f"DiT-{size}/{patch}": [f"dit_{size.lower()}.py", f"model.patch_size={patch}"]
        for size in SIZES
        for patch in (2, 4, 8)
    },
    "sit": {f"SiT-{size}/2": [f"sit_{size.lower()}.py"] for size in SIZES},
    "dit_moe": {
        # Counted without the normalisation of queries and keys that XL's and G's weights have.
        "DiT-MoE-S/2-8E2A": ["dit_moe_s.py"],
        "DiT-MoE-B/2-8E2A": ["dit_moe_b.py"],
        "DiT-MoE-XL/2-8E2A": ["dit_moe_xl.py:qk_norm=false"],
        "DiT-MoE-G/2-16E2A": ["dit_moe_g.py:qk_norm=false"],
    },
    "promoe": {
        **{f"ProMoE_TC_{size}": [f"promoe_{size.lower()}.py"] for size in SIZES},
        "ProMoE_EC_L": ["promoe_l.py:routing=expert_choice"],
    },
    "jit": {
        **{
            f"JiT-{size}/{patch}": [f"jit_{size.lower()}{patch}.py"]
            for size in "BLH"
            for patch in (16, 32)
        },
        **{f"JiT-{size}/16-E16": [f"jitmoe_{size.lower()}16.py"] for size in "BLH"},
    },
}
# Built from their hyperparameters in test_accounting.py; the rest are models of other kinds.
BY_HYPERPARAMETERS = ("dsmoe_yaml_configs", "diffmoe_yaml_configs")
OUT_OF_SCOPE = ("flux_and_encoders",)  # but for the two below


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in PINNED for name in PINNED[family]]
)
def test_configs_are_the_authors_networks(family, name):
    spec, *overrides = PINNED[family][name]
    check(FAMILIES[family][name], generate_models.measure(f"configs/{spec}", *overrides).counts)


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_flux_is_the_authors_network(name):
    """Their 11.9B, by kind: the bias of a single block's last layer counts as attention."""
    entry = generate_models.measure(f"configs/flux_{name}.py")
    check(FAMILIES["flux_and_encoders"][f"FLUX.1-{name}"], entry.counts)


def test_flops_of_flux():
    """FLUX.1 [dev] at 1024 x 1024 with 512 text tokens, by hand: 2 FLOPs a weight and token.

    In a double block 4096 image and 512 text tokens meet 12 D^2 weights each, in a single block all
    of them meet 12 D^2; the maps of 57 blocks are 4 S^2 D. That is 74.36T. Embedders, final layer
    and modulations are the rest.
    """
    width, tokens = 3072, 4096 + 512
    blocks = 57 * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
    assert blocks == pytest.approx(74.36e12, rel=1e-4)
    embedded = 2 * width * (4096 * 64 + 512 * 4096) + 2 * (2 * 256 + 768 + 3 * width) * width
    modulations = 2 * width**2 * (19 * 12 + 38 * 3 + 2)
    total = blocks + embedded + modulations + 2 * 4096 * 64 * width
    assert generate_models.measure("configs/flux_dev.py").flops == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("spec", dense2moe_counts.TABLE_1)
def test_dense2moe_counts_as_its_table_1(spec):
    """To the printed digit, once what the paper seems to leave out is left out."""
    _, parameters, flops = dense2moe_counts.TABLE_1[spec]
    *_, left = dense2moe_counts.activated(spec)
    assert left / 1e9 == pytest.approx(parameters, abs=0.0050001)
    # FLOPs of the dense models agree by one factor. Those of all students are less by 1.76 x 10^12.
    less = 1.76 if "moe" in spec else 0
    assert dense2moe_counts.scaled(spec) - less == pytest.approx(flops, abs=0.12)
    if "moe" in spec:
        assert dense2moe_counts.scaled(spec) - less == pytest.approx(flops, abs=0.01)


def test_flux_moe_l_by_hand():
    """2510.09094, section 4.1. D = 3072; a layer D -> n D has n D^2 weights, a token of an expert's
    1.5 D hidden units meets 3 D^2.
    """
    d, blocks = 3072, 16
    counts = generate_models.measure("configs/flux_moe_l.py").counts
    assert counts["total"].total == pytest.approx(9e9, rel=1e-3)
    streams = 2 * blocks + 38
    # Biases: the shared expert has hidden ones and, in double blocks, those of its last layer.
    shared = streams * (2 * d * d + d) + 2 * blocks * d
    assert counts["shared experts"].activated == counts["shared experts"].total == shared
    routed = streams * 12 * (2 * d * (d // 4) + d // 4 + d)
    assert counts["routed experts"].total == routed
    assert counts["routed experts"].activated == routed / 6
    assert counts["router"].total == streams * 12 * d
    assert counts["dense ffn"].total == 3 * 2 * (8 * d * d + 5 * d)
    # D -> 256 -> 6 D of two streams in 19 double blocks, D -> 256 -> 3 D in 38 single ones.
    assert counts["adaLN"].total == 38 * (7 * 256 * d + 6 * d) + 38 * (4 * 256 * d + 3 * d)
    model = build(configs.load("configs/flux_moe_l.py").model)
    text, condition = dense2moe_counts.left_out(model)
    expert = 2 * d * (d // 4) + d // 4 + d
    assert text == blocks * (2 * d * d + 2 * d + 2 * expert + 12 * d)
    embedders = 3 * (d + 1) * (d - 256)
    assert condition == 2 * d * (d - 256) + embedders + 2 * 38 * 256 * d


def test_groups_pass_a_share_of_their_blocks():
    """M passes 5 of 15 double blocks, S 3 of 15 single ones, too, XS 5 of 25 (section 4.1)."""
    found = {
        name: generate_models.measure(f"configs/flux_moe_{name}.py").counts["attention"].activated
        for name in ("l", "m", "s", "xs")
    }
    single = 4 * 3072**2 + 4 * 3072 + 2 * 128
    assert found["l"] - found["m"] == 10 * 2 * single
    assert found["m"] - found["s"] == 12 * single
    assert found["s"] - found["xs"] == 8 * single


def test_every_entry_is_pinned():
    assert set(FAMILIES) == {*PINNED, *BY_HYPERPARAMETERS, *OUT_OF_SCOPE}
    for family in set(PINNED) - set(BY_HYPERPARAMETERS):
        assert set(PINNED[family]) == set(FAMILIES[family])


# --- the page ------------------------------------------------------------------------------------


def test_the_page_is_not_stale():
    page = shipped.CHECKOUT / "docs" / "models.md"
    text = page.read_text()
    remedy = "run python -m docs.generate_models --write docs/models.md"
    assert pages.renewed(text, generate_models.BEGIN, generate_models.content()) == text, remedy


def test_every_config_is_in_the_table():
    specs = generate_models.specs()
    files = {path.name for path in shipped.FOLDER.glob("*.py")}
    files = {name for name in files if not re.match("__init__|eval_", name)}
    assert {spec.removeprefix("configs/").partition(":")[0] for spec in specs} == files
    assert len(set(specs)) == len(specs) and set(PUBLISHED) | set(VARIANTS) <= set(specs)


@pytest.mark.parametrize("spec", PUBLISHED)
def test_published_figures_are_explained(spec):
    """A printed figure is ours, in its unit, rounded or cut off."""
    entry, paper = generate_models.measure(spec), PUBLISHED[spec]
    assert -0.5 <= generate_models.in_unit(entry.counts, paper.unit) - paper.activated < 1
    if paper.gmacs:
        assert entry.flops / 2e9 == pytest.approx(paper.gmacs, rel=0.01)


def test_totals_of_diffmoe_with_and_without_the_predictor():
    """2503.14487: Tables 1 and 9 count it in L (1.176B, 1.982B), Table 1 not in S and B."""
    for spec, millions, predictor in (
        ("configs/diffmoe_l.py:experts=8", 1176, True),
        ("configs/diffmoe_l.py", 1982, True),
        ("configs/diffmoe_s.py", 139, False),
        ("configs/diffmoe_b.py", 555, False),
    ):
        counts = generate_models.measure(spec).counts
        total = counts["total"].total - (not predictor) * counts["capacity predictor"].total
        assert round(total / 1e6) == millions, spec


def test_activated_parameters_of_equation_40():
    """2503.14487, Table 9: 1725.3 of FFNs, 457.84 - 201.44 = 256.4 of all else. Eq. 40, C = 0.95:
    (1 + 0.95) / (1 + 16) * 1725.3 + 256.4 = 454.3, Table 3's 454M. Its FFNs are the dense ones, the
    experts, the routers and the predictors.
    """
    counts = {
        name: count.total / 1e6
        for name, count in generate_models.measure("configs/diffmoe_l.py").counts.items()
    }
    names = ("dense ffn", "routed experts", "router", "capacity predictor")
    ffn = sum(counts[name] for name in names)
    assert ffn == pytest.approx(1725.3, abs=0.05)
    assert (1 + 0.95) / (1 + 16) * ffn + counts["total"] - ffn == pytest.approx(454.3, abs=0.05)
    # What a token meets: the experts C times, everything else once, without the predictors.
    once = counts["total"] - counts["routed experts"] - counts["capacity predictor"]
    assert once + 0.95 * counts["routed experts"] / 16 == pytest.approx(453.0, abs=0.05)


def test_write(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generate_models, "specs", lambda: ["configs/dsmoe_s.py"])
    monkeypatch.setattr(generate_models.dense2moe_counts, "TABLE_1", {})
    page = tmp_path / "models.md"
    page.write_text(f"before\n{generate_models.BEGIN}\nold\n{pages.END}\nafter\n")
    generate_models.main(["--write", str(page)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["`dsmoe_s.py`", "96.87", "34.94", "33", "33.3 x 2^20"]
    # Multiply-adds are half the FLOPs; 256 patches.
    assert float(cells[5]) == pytest.approx(2 * float(cells[7]), rel=1e-3)
    assert float(cells[6]) == pytest.approx(1e3 * float(cells[5]) / 256, rel=1e-3)
    generate_models.main([])
    assert capsys.readouterr().out.strip() == generate_models.content()
    assert [path.name for path in tmp_path.iterdir()] == ["models.md"]


def test_a_page_without_place(tmp_path, capsys):
    with pytest.raises(UserError, match="no place for the table"):
        pages.renewed("no marks", generate_models.BEGIN, "")
    with pytest.raises(SystemExit):
        generate_models.main(["--write", str(tmp_path / "missing.md")])
    assert "is not there" in capsys.readouterr().err
