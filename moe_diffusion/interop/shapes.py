"""What the shapes of a checkpoint tell about its hyperparameters, in the authors' names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from moe_diffusion.reading import Key

Shapes = Mapping[str, tuple[int, ...]]

# Size -> depth, width, heads (DiT, 2212.09748, Table 1; SiT has the same).
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


# Hyperparameters that every DiT-like model needs and that have no default.
TRUNK = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
TRUNK += ("num_classes", "learn_sigma")


def dense_from_args(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """Hyperparameters from the arguments of DiT's or SiT's train.py; None if of another program."""
    match = re.fullmatch(r"[DS]iT-(S|B|L|XL)/(\d{1,4})", str(args.get("model")))
    if not match or "num_experts" in args:
        return None
    depth, hidden_size, num_heads = SIZES[match[1]]
    return {
        "input_size": input_size_of(args),
        "patch_size": int(match[2]),
        "depth": depth,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_classes": args.get("num_classes", 1000),
    }


def input_size_of(args: Mapping[str, Any]) -> int:
    """The side of the latents of the images that a training script was told to use.

    Raises:
      UserError: it is no number of pixels.
    """
    pixels = args.get("image_size", 256)
    sides = Key((int,), least=8, most=1 << 16)
    sides.check(pixels, "the training arguments: image_size", "pass --hparams file.yaml")
    return pixels // 8


def dense_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """The same as `trunk_from_shapes`, and the number of heads that DiTs of this width have."""
    found = trunk_from_shapes(shapes)
    usual = {hidden_size: num_heads for _, hidden_size, num_heads in SIZES.values()}
    if found.get("hidden_size") in usual:
        found["num_heads"] = usual[found["hidden_size"]]
    return found


def trunk_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """The hyperparameters of the parts that all DiT-like models have, if the shapes show them."""
    found = _labels_and_depth(shapes)
    patch = shapes.get("x_embedder.proj.weight", ())
    if len(patch) == 4:
        width, channels, side, _ = patch
        found |= {"hidden_size": width, "in_channels": channels, "patch_size": side}
        final = shapes.get("final_layer.linear.bias", ())
        if len(final) == 1:
            found["learn_sigma"] = final[0] == 2 * math.prod(patch[1:])
        found |= _input_size(shapes, side) | _heads(shapes, width)
        # If all blocks have experts, an expert shows the ratio: those of TC-DiT and its kin are as
        # wide as a dense MLP.
        key = first(shapes, r"blocks\.\d+\.mlp\.(experts\.0\.)?(fc1|gate_proj)\.weight")
        if key:
            ratio = shapes[key][0] / width
            rounded_down = int(ratio * width) < shapes[key][0]  # as the constructors compute it
            found["mlp_ratio"] = math.nextafter(ratio, math.inf) if rounded_down else ratio
            found["use_swiglu"] = "gate_proj" in key
    return found


def moe_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """The same as `trunk_from_shapes`, and the experts of TC-DiT, EC-DiT and DiffMoE."""
    found = trunk_from_shapes(shapes)
    moe = _experts(shapes)
    gated = first(shapes, r"blocks\.\d+\.mlp\.shared_experts\.gate_proj\.weight")
    if gated:
        moe["n_shared_experts"] = shapes[gated][0] // shapes[gated][1]
    elif first(shapes, r"blocks\.\d+\.mlp\.shared_experts\.fc1\.weight"):
        moe["n_shared_experts"] = 1  # any number gives DiffMoE the same width
    return {**found, "MoE_config": moe}


def dsmoe_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """The same as `trunk_from_shapes`, and the experts and the kind of attention of DSMoE."""
    found = trunk_from_shapes(shapes)
    moe = _experts(shapes)
    key = first(shapes, r"blocks\.\d+\.mlp\.experts\.blocks\.0\.up_proj\.weight")
    if key:
        moe["moe_intermediate_size"] = shapes[key][0]
        skipped = min(moe_blocks(shapes)) - moe["interleave"]
        moe["skip_first2"] = {0: False, 2: True}.get(skipped, skipped)
    moe["use_shared_expert"] = any(".mlp.shared_experts." in key for key in shapes)
    found["enable_gqa"] = "blocks.0.attn.k_proj.weight" in shapes
    found["norm_type"] = "rmsnorm" if "blocks.0.norm1.weight" in shapes else "layernorm"
    if "pos_embed" in shapes:
        found["rope_type"] = "none"
    return {**found, "MoE_config": moe}


def dit_moe_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """The same as `trunk_from_shapes`, and the experts and the kind of attention of DiT-MoE."""
    found = trunk_from_shapes(shapes)
    found["use_flash_attn"] = "blocks.0.attn.Wqkv.weight" in shapes
    gate = shapes.get("blocks.0.moe.gate.weight", ())
    expert = shapes.get("blocks.0.moe.experts.0.up_proj.weight", ())
    if len(gate) == len(expert) == 2:
        found["num_experts"], found["mlp_ratio"] = gate[0], expert[0] / expert[1]
    return found


def promoe_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """The same as `trunk_from_shapes`, and ProMoE's experts and q/k norm."""
    found = trunk_from_shapes(shapes)
    found["qk_norm"] = "blocks.0.attn.q_norm.weight" in shapes
    moe = _experts(shapes)
    total = moe.pop("num_experts", 0)
    for name, part in (
        ("num_routed_experts", r"cluster_centers"),
        ("moe_intermediate_size", r"experts\.0\.up_proj\.weight"),
        ("shared_expert_intermediate_size", r"shared_expert\.up_proj\.weight"),
    ):
        key = first(shapes, rf"blocks\.\d+\.mlp\.{part}")
        if key:
            moe[name] = shapes[key][0]
    if "num_routed_experts" in moe:
        moe["use_uncond_expert"] = total > moe["num_routed_experts"]
        moe["use_shared_expert"] = "shared_expert_intermediate_size" in moe
        moe.setdefault("shared_expert_intermediate_size", 0)
    return {**found, "MoE_config": moe}


def jit_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """Arguments of the network of JiT or JiTMoE, as {"net": ...}."""
    net = _labels_and_depth(shapes)
    patch = shapes.get("x_embedder.proj1.weight", ())
    expand = shapes.get("x_embedder.proj2.weight", ())
    if len(patch) == len(expand) == 4:
        width = expand[0]
        net |= {"hidden_size": width, "bottleneck_dim": patch[0], "in_channels": patch[1]}
        net |= {"patch_size": patch[2]} | _input_size(shapes, patch[2]) | _heads(shapes, width)
        context = shapes.get("in_context_posemb", (1, 0, width))
        net["in_context_len"] = context[1]
        if not context[1]:
            net["in_context_start"] = 0  # without class tokens the number has no meaning
        packed = first(shapes, r"blocks\.\d+\.mlp\.w12\.weight")
        if packed:
            hidden = shapes[packed][0] // 2  # int(int(width * ratio) * 2 / 3)
            close = -(-hidden * 3 // 2) / width
            for ratio in (4.0, close, math.nextafter(close, math.inf)):
                if int(width * ratio) * 2 // 3 == hidden:
                    net["mlp_ratio"] = ratio
                    break
    expert = first(shapes, r"blocks\.\d+\.mlp\.experts\.blocks\.0\.w12\.weight")
    if expert:
        shared = any(".mlp.shared_experts." in key for key in shapes)
        net["moe_config"] = _experts(shapes) | {
            "moe_intermediate_size": shapes[expert][0] // 2,
            "use_shared_expert": shared,
        }
    return {"net": net}


def moe_blocks(shapes: Shapes) -> list[int]:
    """Numbers of the blocks that have experts."""
    return sorted(numbers(r"blocks\.(\d+)\.mlp\.experts\.", shapes))


def first(shapes: Shapes, pattern: str) -> str | None:
    """The first key that matches the whole pattern."""
    return next(filter(re.compile(pattern).fullmatch, shapes), None)


def _experts(shapes: Shapes) -> dict[str, Any]:
    """How many experts there are, and whether only odd blocks have them; {} without experts."""
    experts = numbers(r"blocks\.\d+\.mlp\.experts\.(?:blocks\.)?(\d+)\.", shapes)
    if not experts:
        return {}
    interleave = all(block % 2 for block in moe_blocks(shapes))
    return {"num_experts": 1 + max(experts), "interleave": interleave}


def _labels_and_depth(shapes: Shapes) -> dict[str, Any]:
    found = {}
    labels = shapes.get("y_embedder.embedding_table.weight", ())
    if len(labels) == 2:
        found["num_classes"] = labels[0] - 1  # the last row stands for "no label"
    blocks = numbers(r"blocks\.(\d+)\.", shapes)
    if blocks:
        found["depth"] = 1 + max(blocks)
    return found


def _input_size(shapes: Shapes, patch_size: int) -> dict[str, Any]:
    """The input size from the position table; {} for models with rope, which have no table."""
    table = shapes.get("pos_embed", ())
    return {"input_size": math.isqrt(table[1]) * patch_size} if len(table) == 3 else {}


def _heads(shapes: Shapes, width: int) -> dict[str, Any]:
    """The number of heads from the norm of queries, which is as wide as a head; {} without it."""
    norm = shapes.get("blocks.0.attn.q_norm.weight", ())
    return {"num_heads": width // norm[0]} if len(norm) == 1 else {}


def numbers(pattern: str, keys: Shapes) -> set[int]:
    """The numbers that the group of a pattern finds at the beginning of the keys."""
    return {int(match[1]) for match in map(re.compile(pattern).match, keys) if match}
