"""Writes the table of all models: parameters and FLOPs of every config, beside the papers' figures.

  python -m docs.generate_models
  python -m docs.generate_models --write docs/models.md

Run it when a config changes or a new one comes: a test fails while docs/models.md is stale.
"""

from __future__ import annotations

from collections.abc import Sequence

from docs import dense2moe_counts, pages
from docs.measure import measure
from docs.published import PUBLISHED, VARIANTS, Published
from moe_diffusion import shipped
from moe_diffusion.cli import exits_on_user_error
from moe_diffusion.models.accounting import Count

BEGIN = "<!-- begin: written by docs.generate_models -->"
COLUMNS = (
    "config",
    "total, 10^6",
    "activated, 10^6",
    "activated, paper",
    "ours in the paper's unit",
    "GFLOPs an image",
    "MFLOPs a token",
    "G multiply-adds",
    "paper's Gflops",
)


def specs() -> list[str]:
    """Every config file with its default arguments, and the variants that stand for a model."""
    files = [
        f"configs/{path.name}"
        for path in sorted(shipped.FOLDER.glob("*.py"))
        if "def get_config(" in path.read_text()
    ]
    return files + list(VARIANTS)


def in_unit(counts: dict[str, Count], unit: str) -> float:
    """Activated parameters as a paper counts them: in a unit of `published.UNITS`."""
    activated = counts["total"].activated
    if unit == "10^6 without predictor":
        activated -= counts["capacity predictor"].activated
    return activated / (2**20 if unit == "2^20" else 10**6)


def row(spec: str) -> str:
    """A line of the table."""
    entry, paper = measure(spec), PUBLISHED.get(spec, Published())
    total = entry.counts["total"]
    cells = [
        f"`{spec.removeprefix('configs/')}`",
        f"{total.total / 1e6:,.2f}",
        f"{total.activated / 1e6:,.2f}",
        f"{paper.activated:g}" if paper.activated else "",
        f"{in_unit(entry.counts, paper.unit):,.1f} x {paper.unit}" if paper.activated else "",
        f"{entry.flops / 1e9:.4g}",
        f"{entry.flops / 1e6 / entry.tokens:.4g}",
        f"{entry.flops / 2e9:.4g}",
        f"{paper.gmacs:g}" if paper.gmacs else "",
    ]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """The table in Markdown, families in alphabetical order, models by their size."""

    def place(spec: str) -> tuple:
        return measure(spec).family, measure(spec).counts["total"].total, spec

    head = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * 3 + "---|" + "---:|" * 4]
    return "\n".join([*head, *map(row, sorted(specs(), key=place))])


def content() -> str:
    """The table of all models, and that of Dense2MoE."""
    return "\n\n".join([table(), "### Dense2MoE", dense2moe_counts.table()])


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    pages.main("generate_models", __doc__, BEGIN, content, argv)


if __name__ == "__main__":
    main()
