"""What a checkpoint of a DiT-like family tells about its hyperparameters, in the authors' names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

# Size -> depth, width, heads (DiT, 2212.09748, Table 1; SiT has the same).
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def dense_from_args(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """Hyperparameters of what DiT's or SiT's train.py was called with: model, image size, ..."""
    match = re.fullmatch(r"[DS]iT-(S|B|L|XL)/(\d+)", str(args.get("model")))
    if not match or "num_experts" in args:
        return None
    depth, hidden_size, num_heads = SIZES[match[1]]
    return {
        "input_size": args.get("image_size", 256) // 8,
        "patch_size": int(match[2]),
        "depth": depth,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_classes": args.get("num_classes", 1000),
    }


def dense_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """As `trunk_from_shapes`, and the number of heads that DiTs of this width have."""
    found = trunk_from_shapes(shapes)
    usual = {hidden_size: num_heads for _, hidden_size, num_heads in SIZES.values()}
    if found.get("hidden_size") in usual:
        found["num_heads"] = usual[found["hidden_size"]]
    return found


def trunk_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """Hyperparameters of the parts that all DiT-like models have; those that the shapes tell."""
    found: dict[str, Any] = {}
    patch = shapes.get("x_embedder.proj.weight", ())
    if len(patch) == 4:
        found["hidden_size"], found["in_channels"], found["patch_size"], _ = patch
        final = shapes.get("final_layer.linear.bias", ())
        if len(final) == 1:
            found["learn_sigma"] = final[0] == 2 * math.prod(patch[1:])
        table = shapes.get("pos_embed", ())
        if len(table) == 3:
            found["input_size"] = math.isqrt(table[1]) * patch[2]
        mlp = shapes.get("blocks.0.mlp.fc1.weight") or shapes.get("blocks.0.mlp.gate_proj.weight")
        if mlp:
            ratio = mlp[0] / patch[0]
            rounded_down = int(ratio * patch[0]) < mlp[0]  # as the constructors compute the width
            found["mlp_ratio"] = math.nextafter(ratio, math.inf) if rounded_down else ratio
            found["use_swiglu"] = "blocks.0.mlp.gate_proj.weight" in shapes
    labels = shapes.get("y_embedder.embedding_table.weight", ())
    if len(labels) == 2:
        found["num_classes"] = labels[0] - 1  # one more for no label
    blocks = _numbers(r"blocks\.(\d+)\.", shapes)
    if blocks:
        found["depth"] = 1 + max(blocks)
    return found


def moe_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """As `trunk_from_shapes`, and the experts."""
    moe: dict[str, Any] = {}
    experts = _numbers(r"blocks\.\d+\.mlp\.experts\.(?:blocks\.)?(\d+)\.", shapes)
    if experts:
        moe["num_experts"] = 1 + max(experts)
    return {**trunk_from_shapes(shapes), "MoE_config": moe}


def dsmoe_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """As `moe_from_shapes`, and what else DSMoE's constructor is told about them."""
    found = moe_from_shapes(shapes)
    width = re.compile(r"blocks\.\d+\.mlp\.experts\.blocks\.0\.up_proj\.weight")
    for key in filter(width.fullmatch, shapes):
        found["MoE_config"]["moe_intermediate_size"] = shapes[key][0]
    found["MoE_config"]["use_shared_expert"] = any(".mlp.shared_experts." in key for key in shapes)
    found["enable_gqa"] = "blocks.0.attn.k_proj.weight" in shapes
    return found


def _numbers(pattern: str, keys: Shapes) -> set[int]:
    return {int(match[1]) for match in map(re.compile(pattern).match, keys) if match}
