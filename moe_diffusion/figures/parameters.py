"""The picture of what a model's parameters are: bars of activated parameters by kind of module."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image

from moe_diffusion.figures.canvas import GREY, make_plain, new_figure
from moe_diffusion.models.accounting import Count

OTHER = "all else"
_SMALL = 0.02  # a kind with less than this share in every model is among `OTHER`


def parameters_picture(counts: Mapping[str, Mapping[str, Count]], title: str) -> Image.Image:
    """A bar for each model, from top to bottom, of the parameters that a token uses.

    It is Figure 2 (left) of Dense2MoE, 2510.09094. The number behind a bar is its whole length.

    Args:
      counts: label of a model -> what `accounting.parameter_counts` returns.
    """
    parts = _parts(counts)
    figure, draw = new_figure(8, 1.4 + 0.42 * len(counts))
    axes = figure.subplots()
    labels, ends = list(counts), [0.0] * len(counts)
    for number, (kind, values) in enumerate(parts.items()):
        colour = GREY if kind == OTHER else f"C{number}"
        axes.barh(labels, values, left=ends, label=kind, color=colour, height=0.7)
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    for label, end in zip(labels, ends, strict=True):
        axes.annotate(
            f"{end:.2f}", (end, label), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.invert_yaxis()
    axes.set_xlabel("activated parameters, 10^9")
    axes.set_title(title, fontsize=10, wrap=True)
    axes.legend(frameon=False, fontsize=8)
    axes.margins(x=0.08)
    make_plain(axes, grid="x")
    return draw()


def _parts(counts: Mapping[str, Mapping[str, Count]]) -> dict[str, list[float]]:
    """Kind -> activated parameters of every model in 10^9; the largest kind first, `OTHER` last."""
    kinds = dict.fromkeys(kind for model in counts.values() for kind in model if kind != "total")
    none = Count(0, 0)
    values = {k: [m.get(k, none).activated / 1e9 for m in counts.values()] for k in kinds}
    wholes = [model["total"].activated / 1e9 for model in counts.values()]

    def is_small(kind: str) -> bool:
        return all(v < _SMALL * whole for v, whole in zip(values[kind], wholes, strict=True))

    large = sorted((k for k in kinds if not is_small(k)), key=lambda k: -sum(values[k]))
    rest = [sum(values[k][i] for k in kinds if k not in large) for i in range(len(counts))]
    return {k: values[k] for k in large} | ({OTHER: rest} if any(rest) else {})
