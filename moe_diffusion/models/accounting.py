"""Parameters of a model, total and activated per token, and FLOPs of a forward pass, by kind.

A multiply-add is two FLOPs; the "Gflops" of the DiT and JiT papers are multiply-adds. What counts
is what a device spends its time on: products with weights, and the two products of attention.
Left out are biases, norms, activations, softmax and rope (a few percent of XLA's own count).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn

from moe_diffusion.models import abstract_variables
from moe_diffusion.models.blocks import Attention

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
EXPERT_MATRICES = ("up", "gate", "down")  # those of all other modules are called kernel
BACKWARD = 2  # FLOPs of a backward pass / those of its forward pass


@dataclass(frozen=True)
class Count:
    """Parameters of one kind; activated: what one token uses of them, on average."""

    total: int
    activated: int


def parameter_counts(model: nn.Module, experts_per_token: float | None = None) -> dict[str, Count]:
    """Counts by kind, with a last row "total". Nothing is allocated.

    Of the routed experts a token uses `experts_per_token`, by default what the router is built for:
    top_k (token choice) or `capacity` (expert choice, DiffMoE, on average). For DiffMoE give what
    `evaluation.routing_stats` measured: its activated parameters then follow 2503.14487, Eq. 40,
    the experts times C_infer_avg / E and everything else whole (the paper leaves out the capacity
    predictor, which has a row of its own here). The whole class table counts as used, as the papers
    count it; a fixed position table is no parameter.
    """
    share = _used_share(model, experts_per_token)
    counts: dict[str, Count] = {}
    for path, leaf in _trace(model)[0].items():
        kind = _kind(path)
        used = round(leaf.size * share) if kind == "routed experts" else leaf.size
        old = counts.get(kind, Count(0, 0))
        counts[kind] = Count(old.total + leaf.size, old.activated + used)
    counts["total"] = Count(
        sum(c.total for c in counts.values()), sum(c.activated for c in counts.values())
    )
    return counts


def forward_flops(
    model: nn.Module, batch: int = 1, experts_per_token: float | None = None
) -> dict[str, float]:
    """FLOPs of one forward pass over `batch` images, by kind, with a last row "total".

    How often a weight is used is read off the shapes that reach its module when the model is traced
    (a block's tokens, an image's condition), so this holds for every model made of these modules.
    Routed experts count for the `experts_per_token` experts of a token (see `parameter_counts`),
    whatever a backend of the dispatch makes of them. "attention maps" is q k^T and its product with
    v, 4 S^2 D per layer. A training step costs `1 + BACKWARD` times as much.
    """
    parameters, rows, maps = _trace(model)
    share = _used_share(model, experts_per_token)
    flops: dict[str, float] = {}
    for path, leaf in parameters.items():
        module, name, kind = path[:-1], path[-1], _kind(path)
        if kind == "routed experts" and name in EXPERT_MATRICES:
            _add(flops, kind, 2 * rows[module[:-1]] * leaf.size * share)
        elif name == "kernel":
            _add(flops, kind, 2 * rows[module] * leaf.size)
        if path[-2:] == ("proj", "kernel") and path[:-2] in maps:
            layers = math.prod(leaf.shape[:-3])  # [layers, heads, head_dim, D]
            _add(flops, "attention maps", layers * maps[path[:-2]])
    flops = {kind: batch * value for kind, value in flops.items()}
    return flops | {"total": sum(flops.values())}


def table(counts: dict[str, Count], flops: dict[str, float]) -> str:
    """Counts in millions (10^6) and the FLOPs of an image in 10^9, as lines of text."""
    lines = [f"{'parameters':<20}{'total':>12}{'activated':>12}{'GFLOPs':>12}"]
    for kind, count in counts.items():
        if kind == "total":
            lines.append("-" * len(lines[0]))
        numbers = f"{_millions(count.total):>12}{_millions(count.activated):>12}"
        lines.append(f"{kind:<20}{numbers}{flops.get(kind, 0) / 1e9:>12,.3f}")
        if kind == "attention":
            lines.append(f"{'attention maps':<44}{flops['attention maps'] / 1e9:>12,.3f}")
    return "\n".join(lines)


@functools.lru_cache(maxsize=1)  # counts and FLOPs are asked for one after the other
def _trace(model: nn.Module) -> tuple[dict, dict, dict]:
    """What tracing the model for one image shows, by path: shapes of the parameters, how many rows
    reach each module, and the FLOPs of an attention's two maps in one layer."""
    rows: dict[tuple[str, ...], int] = {}
    maps: dict[tuple[str, ...], int] = {}

    def watch(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__" and args and hasattr(args[0], "shape"):
            shape = args[0].shape
            contract = getattr(module, "contract", 1)  # trailing axes that a Linear sums over
            rows[module.path] = math.prod(shape[:-contract])
            if isinstance(module, Attention):
                maps[module.path] = 4 * shape[-2] ** 2 * shape[-1]
        return call(*args, **kwargs)

    if model.make_moe is not None:  # the reference is the dispatch that is traced fastest
        model = model.clone(make_moe=functools.partial(model.make_moe, backend="reference"))
    with nn.intercept_methods(watch):
        tree = abstract_variables(model)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}, rows, maps


def _used_share(model: nn.Module, experts_per_token: float | None) -> float:
    """The share of the routed experts that a token meets."""
    if model.make_moe is None:
        return 0.0
    moe = model.make_moe()
    if experts_per_token is None:
        experts_per_token = moe.make_router().experts_per_token
    return experts_per_token / moe.make_experts().num_experts


def _add(flops: dict[str, float], kind: str, value: float) -> None:
    flops[kind] = flops.get(kind, 0) + value


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f} M"


def _kind(path: tuple[str, ...]) -> str:
    text = "/".join(path)
    return next(kind for word, kind in KINDS if word in text)
