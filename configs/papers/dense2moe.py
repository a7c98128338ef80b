"""Tables and figures of Dense2MoE (arXiv 2510.09094)."""

from __future__ import annotations

from moe_diffusion.reproduction.items import Item

PAPER = "Dense2MoE (arXiv 2510.09094)"

_MISSING = "FLUX.1 and its distillation into a MoE are not in the library yet"

ITEMS = [
    Item(f"dense2moe_{name}", title, missing=_MISSING)
    for name, title in (
        ("figure1", "Figure 1: FLUX.1 [dev] and the FLUX.1-MoE models, images"),
        ("figure2", "Figure 2: activated parameters by kind of module"),
        ("figure3", "Figure 3: mean squared error between input and output of each block"),
        ("table1", "Table 1: quality and cost against other compressed models"),
        ("table2", "Table 2: pruned MLPs and MoE"),
        ("table3", "Table 3: fewer blocks and Mixture of Blocks"),
        ("table4", "Table 4: numbers and widths of experts"),
        ("table5", "Table 5: initialisation and distillation"),
        ("figure5", "Figure 5: sizes of Mixture-of-Blocks groups"),
        ("figure6", "Figure 6: which experts are chosen"),
        ("figure7", "Figure 7: experts of the tokens of one image"),
        ("figure8", "Figure 8: other top-k"),
    )
]
