"""Tables and figures of DiffMoE (arXiv 2503.14487), with the paper's numbers."""

from __future__ import annotations

from configs.families.settings import SETTINGS
from moe_diffusion.reproduction.items import Item, Row

PAPER = "DiffMoE (arXiv 2503.14487)"

_METRICS = ("fid", "inception_score", "precision", "recall")


def _trained(setting: str, protocol: str = "diffmoe_flow", cfg: float = 1.0, **published) -> tuple:
    """A row for each model of a setting. published: label -> numbers, in the order of _METRICS."""
    rows = []
    for label, config in SETTINGS[setting].members.items():
        found = published.get(label, ())
        found = found if isinstance(found, tuple) else (found,)
        numbers = {f"{m}@{cfg:g}": n for m, n in zip(_METRICS, found, strict=False)}
        rows.append(Row(label, config, protocol, published=numbers))
    return tuple(rows)


def _sampled(label: str, protocol: str, *changes: str, **published: float) -> Row:
    """A row of the run that the user has."""
    return Row(label, "", protocol, changes, {f"{m}@1": n for m, n in published.items()})


_TABLE_3 = {
    "TC-DiT-L-E16-Flow": 19.06,
    "EC-DiT-L-E16-Flow": 16.12,
    "Dense-DiT-L-Flow": 17.01,
    "Dense-DiT-XL-Flow": 14.77,
    "DiffMoE-L-E16-Flow": 14.41,
}

_DYNAMIC = "EC-DiT-L-E16-Flow, Dynamic Intra-sample"

_TABLE_5 = {
    "Dense-DiT-XL-Flow": (2.52, 273.78, 0.84, 0.56),
    "Dense-DiT-XXL-Flow": (2.41, 281.96, 0.84, 0.57),
    "Dense-DiT-XXXL-Flow": (2.37, 291.29, 0.84, 0.57),
    "DiffMoE-L-E8-Flow": (2.40, 280.30, 0.83, 0.57),
    "DiffMoE-L-E16-Flow": (2.36, 287.26, 0.83, 0.58),
    "DiffMoE-XL-E16-Flow": (2.30, 291.23, 0.83, 0.58),
}

# Table 2 (and 6): objective, cfg -> FID, IS, precision, recall of the authors' models.
_TABLE_2 = {
    ("Flow", 1.0): (9.60, 131.46, 0.67, 0.67),
    ("Flow", 1.5): (2.13, 274.39, 0.81, 0.60),
    ("DDPM", 1.0): (9.17, 131.10, 0.67, 0.67),
    ("DDPM", 1.5): (2.30, 284.78, 0.82, 0.59),
}

# Table 13: batch -> FID of DiffMoE-L-E8-Flow, under guidance 1.0 and 1.5.
_TABLE_13 = {
    10: (9.60, 2.19),
    15: (9.62, None),
    32: (9.77, 2.16),
    50: (9.98, 2.16),
    75: (9.90, 2.13),
    100: (9.76, 2.17),
    125: (9.78, 2.18),
}

_L_E16, _L_E8 = "configs/diffmoe_l.py", "configs/diffmoe_l.py:experts=8"

_GAMMAS = (
    "0.999,0.99,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2,0.1,1e-2,1e-3,1e-4,1e-5,1e-6,1e-7,1e-8,1e-9,0.0"
)


def _count(label: str, config: str, activated: float | None = None, total: float | None = None):
    numbers = {"activated": activated, "total": total}
    published = {name: number for name, number in numbers.items() if number}
    return Row(label, config, published=published)


_DIGITS_T2I = {
    "Dense-DiT": "dense",
    "TC-DiT": "token_choice",
    "EC-DiT": "expert_choice",
    "DiffMoE": "diffmoe",
}

ITEMS = [
    Item(
        "diffmoe_table1",
        "Table 1: configurations and parameters",
        (
            _count("DiffMoE-S-E16", "configs/diffmoe_s.py", 32, 139),
            _count("DiffMoE-B-E16", "configs/diffmoe_b.py", 130, 555),
            _count("DiffMoE-L-E8", "configs/diffmoe_l.py:experts=8", 458, 1176),
            _count("DiffMoE-L-E16", "configs/diffmoe_l.py", 458, 1982),
        ),
        counts="10^6",
        note="The paper's activated parameters, and its totals of S and B, leave the capacity "
        "predictor out; its totals of L include it. docs/models.md explains each figure.",
    ),
    Item(
        "diffmoe_table2",
        "Table 2 (and 6): DiffMoE-L-E8 after 7,000K steps, without and with guidance",
        tuple(
            Row(
                f"DiffMoE-L-E8-{name}, cfg {cfg:g}",
                SETTINGS[setting].members[f"DiffMoE-L-E8-{name}"],
                f"diffmoe_{name.lower()}:table2,cfg={cfg}",
                published={f"{m}@{cfg:g}": n for m, n in zip(_METRICS, numbers, strict=True)},
            )
            for (name, cfg), numbers in _TABLE_2.items()
            for setting in ("diffmoe_table2" + ("_ddpm" if name == "DDPM" else ""),)
        ),
        note="Takes 7 million steps; a published or converted checkpoint can be judged with "
        "`evaluate --protocol diffmoe_flow:table2,cfg=1.5` alone.",
    ),
    Item(
        "diffmoe_table3",
        "Table 3: baselines at equal training, 700K steps",
        _trained("diffmoe_table3", **_TABLE_3),
    ),
    Item(
        "diffmoe_figure3",
        "Figures 3 and 4: training loss of the flow models",
        _trained("diffmoe_table3", protocol=""),
        curves=("loss",),
    ),
    Item(
        "diffmoe_figure4",
        "Figure 4: FID over the steps of training",
        _trained("diffmoe_table3", **_TABLE_3),
        curves=("fid",),
    ),
    Item(
        "diffmoe_table4",
        "Table 4: without the capacity predictor, a fixed top-k",
        tuple(
            _sampled(
                f"without predictor, C = {capacity:g}",
                "diffmoe_flow",
                "model.router.threshold=off",
                f"model.router.capacity={capacity}",
                fid=fid,
            )
            for capacity, fid in ((0.9, 16.63), (0.95, 15.99), (1.0, 15.25))
        )
        + (_sampled("with predictor", "diffmoe_flow", fid=14.41),),
        note="The paper's model is DiffMoE-L-E16-Flow after 700K steps.",
        model=_L_E16,
    ),
    Item(
        "diffmoe_figure6",
        "Figure 6: images without and with the predictor, one image a batch",
        commands=(
            "sample --workdir {run} --num 8 --batch 1 --out {out}/without.png "
            "--config.model.router.threshold=off",
            "sample --workdir {run} --num 8 --batch 1 --out {out}/with.png",
        ),
        model=_L_E16,
    ),
    Item(
        "diffmoe_table5",
        "Table 5: scaling, 3,000K steps, guidance 1.5",
        _trained("diffmoe_table5", "diffmoe_flow:cfg=1.5", 1.5, **_TABLE_5),
    ),
    Item(
        "diffmoe_table7",
        "Table 7, Figures 5, 17, 18: text to image",
        missing="its data is not public; diffmoe_table7_digits makes the comparison on digits",
    ),
    Item(
        "diffmoe_table7_digits",
        "As Table 7 and Figure 5: two digits from prompts, routers at equal activated parameters",
        tuple(
            Row(
                f"{label}, seed {seed}",
                f"configs/digits_t2i.py:router={router},seed={seed}",
                prompts="digit_pairs",
                group=label,
            )
            for label, router in _DIGITS_T2I.items()
            for seed in range(3)
        ),
        curves=("loss",),
        note="Of 1,000 images for prompts that training never saw: prompt_accuracy is the share "
        "with both digits right and in their places, digits_accuracy that of single digits in "
        "their places, content_accuracy that of images with the right two digits in any order. The "
        "paper's table has GenEval's scores, of models with 1.2B activated parameters.",
    ),
    Item(
        "diffmoe_table10",
        "Table 10 and Figure 7: constant thresholds",
        commands=(
            "thresholds --workdir {run} --protocol diffmoe_flow {files} --gammas "
            + _GAMMAS
            + " --out {out}/thresholds.png",
        ),
        note="The paper: C_infer 0.97, FID 14.16 at 0.4; 0.95, 14.41 with dynamic thresholds.",
        model=_L_E16,
    ),
    Item(
        "diffmoe_figure1",
        "Figures 1c, 1d and 12: capacity over time, by class, and by expert and layer",
        commands=("routing --workdir {run} --num 1000 --blocks 1,7,13,19 --out {out}",),
        model=_L_E16,
    ),
    Item(
        "diffmoe_figure13",
        "Figures 13 and 14: the hardest and the easiest classes",
        commands=("routing --workdir {run} --num 1000 --batch 1000 --out {out}",),
        note="The paper draws one image of each of 1,000 classes in one batch.",
        model=_L_E16,
    ),
    Item(
        "diffmoe_figure8",
        "Figure 8: FID over steps for S, B and L",
        _trained("diffmoe_figure8"),
        curves=("fid",),
    ),
    Item(
        "diffmoe_figure9",
        "Figure 9: 1 to 16 experts",
        _trained("diffmoe_figure9"),
        curves=("fid",),
    ),
    Item(
        "diffmoe_table8",
        "Table 8: whose tokens compete, in training and at inference",
        _trained("diffmoe_table8", **_TABLE_3, **{_DYNAMIC: 23.74})
        + (
            Row(
                "DiffMoE-L-E16-Flow, Global Static TopK Routing",
                SETTINGS["diffmoe_table8"].members["DiffMoE-L-E16-Flow"],
                "diffmoe_flow",
                ("model.router.threshold=off",),
                {"fid@1": 15.25},
            ),
        ),
        note="The row that is called dynamic intra-sample is trained with a capacity predictor.",
    ),
    Item(
        "diffmoe_table9",
        "Table 9: parameters by kind of module",
        (
            _count("Dense-DiT-L", "configs/dit_l.py", None, 457.84),
            _count("DiffMoE-L-E2", "configs/diffmoe_l.py:experts=2", None, 571.2),
            _count("DiffMoE-L-E4", "configs/diffmoe_l.py:experts=4", None, 772.7),
            _count("DiffMoE-L-E8", "configs/diffmoe_l.py:experts=8", None, 1175.7),
            _count("DiffMoE-L-E16", "configs/diffmoe_l.py", None, 1981.7),
        ),
        counts="10^6",
        note="The paper's FFN column is the sum of dense MLPs, experts, router and predictor.",
    ),
    Item(
        "diffmoe_table11",
        "Table 11: baselines at equal training, DDPM",
        _trained("diffmoe_table11", "diffmoe_ddpm"),
        note="The table's numbers are not in the text that this page was written from.",
    ),
    Item(
        "diffmoe_figure10",
        "Figure 10: training loss of the DDPM models",
        _trained("diffmoe_table11", protocol=""),
        curves=("loss",),
    ),
    Item(
        "diffmoe_figure11",
        "Figure 11: FID over steps of the DDPM models, S, B and L",
        _trained("diffmoe_figure11", "diffmoe_ddpm"),
        curves=("fid",),
    ),
    Item(
        "diffmoe_table12",
        "Table 12: two decoders",
        tuple(
            _sampled(f"ft-{decoder.upper()}", f"diffmoe_flow:decoder={decoder}")
            for decoder in ("mse", "ema")
        ),
        note="The table's numbers are not in the text that this page was written from.",
        model=_L_E8,
    ),
    Item(
        "diffmoe_table13",
        "Table 13: batch sizes, which are DiffMoE's pools",
        tuple(
            Row(
                f"batch {batch}, cfg {cfg:g}",
                "",
                f"diffmoe_flow:sampler=heun,decoder=ema,batch={batch},cfg={cfg}",
                published={f"fid@{cfg:g}": fid},
            )
            for number, cfg in enumerate((1.0, 1.5))
            for batch, fids in _TABLE_13.items()
            if (fid := fids[number])
        ),
        note="The paper's model is DiffMoE-L-E8-Flow after 7,000K steps.",
        model=_L_E8,
    ),
    Item(
        "diffmoe_table14",
        "Table 14: guidance scales",
        tuple(
            Row(
                f"cfg {cfg:g}",
                "",
                f"diffmoe_flow:sampler=heun,decoder=ema,batch=125,cfg={cfg}",
                published={f"fid@{cfg:g}": fid},
            )
            for cfg, fid in ((1.0, 9.78), (1.43, 2.13), (1.5, 2.18))
        ),
        note="The paper's model is DiffMoE-L-E8-Flow after 7,000K steps.",
        model=_L_E8,
    ),
    Item(
        "diffmoe_table15",
        "Table 15: samplers of the flow",
        tuple(
            Row(
                f"{sampler.capitalize()}, batch {batch}",
                "",
                f"diffmoe_flow:sampler={sampler},decoder=ema,batch={batch}",
                published={"fid@1": fid},
            )
            for sampler, batch, fid in (
                ("euler", 125, 9.86),
                ("heun", 125, 9.78),
                ("euler", 250, 9.94),
                ("dopri5", 250, 9.56),
            )
        ),
        note="The paper's model is DiffMoE-L-E8-Flow after 7,000K steps.",
        model=_L_E8,
    ),
    Item(
        "diffmoe_figure15",
        "Figures 15 and 16: uncurated samples under guidance 4.0",
        commands=("sample --workdir {run} --num 64 --cfg 4.0 --out {out}/samples.png",),
        model=_L_E8,
    ),
]
