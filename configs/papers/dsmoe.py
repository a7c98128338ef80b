"""Tables and figures of DSMoE and JiTMoE (arXiv 2512.01252), with the paper's numbers."""

from __future__ import annotations

from configs.families.settings import SETTINGS
from moe_diffusion.reproduction.items import Item, Row

PAPER = "A Practical Recipe: DSMoE and JiTMoE (arXiv 2512.01252)"

# label -> config, activated and total parameters (Table 1).
_TABLE_1 = {
    "DSMoE-S-E16": ("configs/dsmoe_s.py", 33, 92),
    "DSMoE-S-E48": ("configs/dsmoe_s.py:experts=48", 30, 66),
    "DSMoE-B-E16": ("configs/dsmoe_b.py", 132, 368),
    "DSMoE-B-E48": ("configs/dsmoe_b.py:experts=48", 118, 263),
    "DSMoE-L-E16": ("configs/dsmoe_l.py:experts=16", 465, 1304),
    "DSMoE-L-E48": ("configs/dsmoe_l.py", 436, 1112),
    "DSMoE-3B-E16": ("configs/dsmoe_3b.py", 965, 2958),
    "JiTMoE-B/16-E16": ("configs/jitmoe_b16.py", 133, 369),
    "JiTMoE-L/16-E16": ("configs/jitmoe_l16.py", 465, 1306),
}

# label -> FID and IS without guidance, FID and IS under 1.5.
_TABLE_2 = {
    "DiffMoE-S-E16": (41.02, 37.53, 15.47, 94.04),
    "DSMoE-S-E16": (39.84, 38.63, 14.53, 97.55),
    "DSMoE-S-E48": (40.20, 38.09, 14.81, 96.51),
    "DiffMoE-B-E16": (20.83, 70.26, 4.87, 183.43),
    "DSMoE-B-E16": (20.33, 71.42, 4.50, 186.79),
    "DSMoE-B-E48": (19.46, 72.69, 4.27, 191.03),
    "DiffMoE-L-E16": (11.16, 107.74, 2.84, 256.57),
    "DSMoE-L-E16": (9.80, 115.45, 2.59, 272.55),
    "DSMoE-L-E48": (9.19, 118.52, 2.55, 278.35),
    "DSMoE-3B-E16": (7.52, 135.29, 2.38, 304.93),
}
_TABLE_3 = {
    "Dense-DiT-B": (30.61, 49.89, 9.02, 131.13),
    "ProMoE-B": (24.44, 60.38, 6.39, 154.21),
    "DSMoE-B-E16": (22.46, 64.57, 5.38, 170.22),
    "DSMoE-B-E48": (21.56, 66.48, 5.14, 172.80),
    "Dense-DiT-L": (15.44, 84.20, 3.56, 209.03),
    "ProMoE-L": (11.61, 100.82, 2.79, 244.21),
    "DSMoE-L-E16": (10.71, 107.34, 2.78, 258.09),
    "DSMoE-L-E48": (9.87, 111.54, 2.72, 263.13),
}
_TABLE_5 = {
    "APE": (45.13, 33.27, 18.10, 82.37),
    "RoPE (1D)": (44.75, 33.64, 18.12, 83.13),
    "RoPE (2D)": (39.84, 38.63, 14.53, 97.55),
}
_COLUMNS = ("fid@1", "inception_score@1", "fid@1.5", "inception_score@1.5")


def _trained(setting: str, protocol: str, published: dict[str, tuple]) -> tuple[Row, ...]:
    """A row for each model of a setting."""
    return tuple(
        Row(
            label,
            config,
            protocol,
            published=dict(zip(_COLUMNS, published.get(label, ()), strict=False)),
        )
        for label, config in SETTINGS[setting].members.items()
    )


ITEMS = [
    Item(
        "dsmoe_figure1",
        "Figure 1: training loss of matched DiffMoE and DSMoE models",
        _trained("dsmoe_table2", "", {}),
        curves=("loss",),
    ),
    Item(
        "dsmoe_table1",
        "Table 1: configurations and parameters",
        tuple(
            Row(label, config, published={"activated": activated, "total": total})
            for label, (config, activated, total) in _TABLE_1.items()
        ),
        counts="2^20",
        note="The paper divides by 2^20 and writes M.",
    ),
    Item(
        "dsmoe_table2",
        "Table 2: DSMoE and DiffMoE at equal training",
        _trained("dsmoe_table2", "dsmoe", _TABLE_2),
    ),
    Item(
        "dsmoe_table3",
        "Table 3: DSMoE, ProMoE and dense DiT",
        _trained("dsmoe_table3", "promoe", _TABLE_3),
        note="The text gives neither steps nor batch of this table, nor its evaluator. Its ProMoE "
        "and dense models are ProMoE's, so training and protocol here are those of ProMoE's code.",
    ),
    Item(
        "dsmoe_figure2",
        "Figure 2: which experts are chosen, by layer and class",
        commands=("routing --workdir {run} --num 5000 --out {out}",),
        model="configs/dsmoe_s.py",
        note="The paper's model is DSMoE-S-E16, with 5,000 random images.",
    ),
    Item(
        "dsmoe_figure3",
        "Figure 3: more and narrower experts, training loss",
        _trained("dsmoe_figure3", "", {}),
        curves=("loss",),
    ),
    Item(
        "dsmoe_table4",
        "Table 4: JiT and JiTMoE in pixels",
        tuple(
            Row(label, SETTINGS["dsmoe_table4"].members[label], protocol, published=numbers)
            for label, protocol, numbers in (
                ("JiT-B/16", "jit:size=b", {"fid@3": 4.37}),
                ("JiTMoE-B/16-E16", "jitmoe", {"fid@2.9": 4.23, "inception_score@2.9": 245.53}),
                ("JiT-L/16", "jit:size=l", {"fid@2.4": 2.79}),
                ("JiTMoE-L/16-E16", "jitmoe", {"fid@2.9": 3.10, "inception_score@2.9": 311.34}),
            )
        ),
    ),
    Item(
        "dsmoe_table5",
        "Table 5: position encodings",
        _trained("dsmoe_table5", "dsmoe", _TABLE_5),
    ),
    Item(
        "dsmoe_figure4",
        "Figure 4: position encodings, training loss",
        _trained("dsmoe_table5", "", {}),
        curves=("loss",),
    ),
    Item(
        "dsmoe_figure5",
        "Figure 5: without a shared expert, with experts in all blocks, with GQA: training loss",
        _trained("dsmoe_figure5", "", {}),
        curves=("loss",),
    ),
    Item(
        "dsmoe_samples",
        "Figures of section 4.4: samples",
        commands=("sample --workdir {run} --num 64 --cfg 4.0 --out {out}/samples.png",),
        model="configs/dsmoe_3b.py",
    ),
    Item(
        "dsmoe_table6",
        "Table 6: hyperparameters of JiT and JiTMoE",
        tuple(
            Row(label, config, published={"activated": activated, "total": total})
            for label, (config, activated, total) in _TABLE_1.items()
            if label.startswith("JiT")
        ),
        counts="2^20",
        note="The hyperparameters themselves are configs/families/jit.py.",
    ),
]
