"""Counts the parameters of a model, total and activated per token, and the FLOPs of a forward pass.

A multiply-add is two FLOPs; the "Gflops" of the DiT and JiT papers are multiply-adds. The counts
have what a device spends its time on: products with weights, and the two products of attention.
They leave out biases, norms, activations, softmax and rope (a few percent of XLA's own count).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from flax import linen as nn
from flax.traverse_util import flatten_dict

from moe_diffusion.models.blocks import Attention, CrossAttention
from moe_diffusion.models.flux_blocks import JointAttention
from moe_diffusion.models.stack import Model, abstract_variables
from moe_diffusion.moe.layer import MoE

_EXPERTS = "routed experts"
BACKWARD = 2  # FLOPs of a backward pass / those of its forward pass


@dataclass(frozen=True)
class Count:
    """Parameters of one kind, and how many of them one token uses on average (activated)."""

    total: int
    activated: int


class Maps(NamedTuple):
    """FLOPs of the two products of an attention, q k^T and that with v, and its tokens."""

    flops: float
    tokens: int


def parameter_counts(model: Model, experts_per_token: float | None = None) -> dict[str, Count]:
    """Counts parameters by kind, with a last row "total". Nothing is allocated.

    The activated parameters follow 2503.14487, Eq. 40: the experts times C_infer_avg / E, and
    everything else whole. The paper leaves out DiffMoE's capacity predictor, which has its own row
    here. Of a group of blocks (Mixture of Blocks) kappa / m is used. The whole class table counts
    as used, as in the papers. A fixed position table is no parameter.

    Args:
      experts_per_token: how many routed experts a token uses on average. None takes what the router
        is built for: top_k (token choice) or `capacity` (expert choice, DiffMoE). For DiffMoE, give
        what `evaluation.routing_stats` measured.
    """
    share = _used_shares(model, experts_per_token)
    counts: dict[str, Count] = {}
    for path, leaf in _trace(model)[0].items():
        kind = model.kind_of(path)
        used = round(leaf.size * share(path))
        old = counts.get(kind, Count(0, 0))
        counts[kind] = Count(old.total + leaf.size, old.activated + used)
    counts["total"] = Count(
        sum(c.total for c in counts.values()), sum(c.activated for c in counts.values())
    )
    return counts


def forward_flops(
    model: Model, batch: int = 1, experts_per_token: float | None = None
) -> dict[str, float]:
    """FLOPs of one forward pass over `batch` images, by kind, with a last row "total".

    The model is traced, and the shapes that reach a module (a block's tokens, an image's condition)
    show how often its weights are used. So this holds for every model made of these modules. The
    row "attention maps" is q k^T and its product with v, 4 S^2 D per layer, and 4 S L D with a text
    of L tokens. A training step costs `1 + BACKWARD` times as much.

    Args:
      experts_per_token: see `parameter_counts`. The padding and copies that a backend of the
        dispatch adds do not count.
    """
    weights, maps = products(model, experts_per_token)
    flops: dict[str, float] = {}
    for path, value in weights.items():
        _add(flops, model.kind_of(path), value)
    for attention in maps.values():
        _add(flops, "attention maps", attention.flops)
    flops = {kind: batch * value for kind, value in flops.items()}
    return flops | {"total": sum(flops.values())}


def training_flops(model: Model) -> float:
    """FLOPs of one image in training, forward and backward; what remat repeats does not count."""
    return (1 + BACKWARD) * forward_flops(model)["total"]


def parameter_shapes(model: Model) -> dict[str, Any]:
    """Path of every parameter -> its shape and dtype (ShapeDtypeStruct). Nothing is allocated."""
    return _trace(model)[0]


def products(
    model: Model, experts_per_token: float | None = None
) -> tuple[dict[str, float], dict[str, Maps]]:
    """What `forward_flops` adds up, for one image, by path: of the weights, and of attentions.

    What is stacked along an axis of layers counts for all of them.
    """
    parameters, rows, shapes = _trace(model)
    share = _used_shares(model, experts_per_token)
    weights: dict[str, float] = {}
    for path, leaf in parameters.items():
        module, _, name = path.rpartition("/")
        kind, axes = model.kind_of(path), leaf.ndim - model.is_stacked(path)
        if kind == _EXPERTS and axes == 3:  # [experts, in, out]; biases have two
            tokens = rows[module.rpartition("/")[0]]
            weights[path] = 2 * tokens * leaf.size * share(path)
        elif name == "kernel" and module in rows:
            weights[path] = 2 * rows[module] * leaf.size * share(path)
    maps = {}
    for path, (shape, keys) in shapes.items():
        layers = sum(b.share for b in model.blocks() if path.startswith(f"{b.path}/"))
        flops = 4 * keys * math.prod(shape) * (layers or 1)
        maps[path] = Maps(flops, shape[-2])
    return weights, maps


def table(counts: dict[str, Count], flops: dict[str, float]) -> str:
    """Counts in millions (10^6) and the FLOPs of an image in 10^9, as lines of text."""
    lines = [f"{'parameters':<20}{'total':>12}{'activated':>12}{'GFLOPs':>12}"]
    for kind, count in counts.items():
        if kind == "total":
            lines.append("-" * len(lines[0]))
        numbers = f" {_millions(count.total):>11} {_millions(count.activated):>11}"
        lines.append(f"{kind:<20}{numbers}{flops.get(kind, 0) / 1e9:>12,.3f}")
        if kind == "attention" and "attention maps" in flops:
            lines.append(f"{'attention maps':<44}{flops['attention maps'] / 1e9:>12,.3f}")
    return "\n".join(lines)


@functools.lru_cache(maxsize=1)  # counts and FLOPs are asked for one after the other
def _trace(model: Model) -> tuple[dict, dict, dict]:
    """Traces the model for one image.

    Returns:
      Three tables by path: the shapes of the parameters, how many rows reach each module, and, for
      an attention, the shape of its tokens [1, S, D] or queries [1, heads, S, d] and its number of
      keys.
    """
    rows: dict[str, int] = {}
    maps: dict[str, tuple[tuple[int, ...], int]] = {}

    def watch(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if isinstance(module, MoE):  # the reference is traced fastest; linen freezes its modules
            object.__setattr__(module, "backend", "reference")
        if context.method_name == "__call__" and args and hasattr(args[0], "shape"):
            shape = args[0].shape
            contract = getattr(module, "contract", 1)  # trailing axes that a Linear sums over
            rows[path] = math.prod(shape[:-contract])
            if isinstance(module, Attention | JointAttention):  # x [1, S, D] or q [1, heads, S, d]
                keys = args[1] if isinstance(module, CrossAttention) else args[0]
                maps[path] = shape, keys.shape[-2]
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        tree = abstract_variables(model)["params"]
    return flatten_dict(tree, sep="/"), rows, maps


def _used_shares(model: Model, experts_per_token: float | None) -> Callable[[str], float]:
    """Path of a weight -> the share of it that a token uses: of experts, and of grouped blocks."""
    routers = model.routers()
    blocks = {f"{block.path}/": block.share for block in model.blocks()}

    def share(path: str) -> float:
        passed = next((s for prefix, s in blocks.items() if path.startswith(prefix)), 1.0)
        if model.kind_of(path) != _EXPERTS:
            return passed
        router = next(r for where, r in routers.items() if path.startswith(where[: -len("router")]))
        used = router.experts_per_token if experts_per_token is None else experts_per_token
        return passed * used / router.num_experts

    return share


def _add(flops: dict[str, float], kind: str, value: float) -> None:
    flops[kind] = flops.get(kind, 0) + value


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f} M"
