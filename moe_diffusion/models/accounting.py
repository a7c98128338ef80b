"""Parameters of a model, total and activated per token, by kind of module."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import linen as nn

from moe_diffusion.models import abstract_variables

# A parameter's kind is that of the first word that its path contains.
KINDS = (
    ("predictor", "capacity predictor"),
    ("router", "router"),
    ("experts", "routed experts"),
    ("shared", "shared experts"),
    ("attn", "attention"),
    ("mlp", "dense ffn"),
    ("final", "final layer"),
    ("adaLN", "adaLN"),
    ("norm1", "norms"),
    ("norm2", "norms"),
    ("_embed", "embedders"),
)


@dataclass(frozen=True)
class Count:
    """Parameters of one kind; activated: what one token uses of them, on average."""

    total: int
    activated: int


def parameter_counts(model: nn.Module) -> dict[str, Count]:
    """Counts by kind, with a last row "total".

    Of the routed experts a token uses top_k (token choice) or `capacity` (expert choice, DiffMoE,
    on average) of num_experts; everything else is used by all tokens. The whole class table counts
    as used, as the papers count it. Nothing is allocated.
    """
    counts: dict[str, Count] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_variables(model)["params"]):
        kind = _kind(jax.tree_util.keystr(path))
        used = leaf.size
        if kind == "routed experts":
            router = model.make_moe().make_router()
            used = round(leaf.size * router.experts_per_token / router.num_experts)
        old = counts.get(kind, Count(0, 0))
        counts[kind] = Count(old.total + leaf.size, old.activated + used)
    counts["total"] = Count(
        sum(c.total for c in counts.values()), sum(c.activated for c in counts.values())
    )
    return counts


def table(counts: dict[str, Count]) -> str:
    """The counts as lines of text, in millions (10^6)."""
    lines = [f"{'parameters':<20}{'total':>12}{'activated':>12}"]
    for kind, count in counts.items():
        if kind == "total":
            lines.append("-" * len(lines[0]))
        lines.append(f"{kind:<20}{_millions(count.total):>12}{_millions(count.activated):>12}")
    return "\n".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f} M"


def _kind(path: str) -> str:
    return next(kind for word, kind in KINDS if word in path)
