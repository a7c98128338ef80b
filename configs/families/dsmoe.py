"""The published DSMoE models (arXiv 2512.01252)."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families import settings
from moe_diffusion import config as configs
from moe_diffusion.errors import UserError

# (size, experts) -> depth, width, heads, width of an expert. From the yaml files that the authors
# released with arXiv 2512.01252 (its Table 1); their totals and activated parameters agree with the
# published ones, see docs/papers_vs_code.md.
_DSMOE_SIZES = {
    ("s", 16): (10, 384, 6, 768),
    ("s", 48): (12, 384, 6, 128),
    ("b", 16): (10, 768, 12, 1536),
    ("b", 48): (12, 768, 12, 256),
    ("l", 16): (20, 1024, 16, 2048),
    ("l", 48): (24, 1024, 16, 448),
    ("3b", 16): (30, 1152, 16, 2880),
}

# experts -> experts per token, groups, groups per token, scale of the gates; from the same files.
_DSMOE_ROUTING = {16: (2, 2, 2, 2.0), 48: (5, 1, 1, 2.5)}

# What section 4.3 of the paper removes or replaces, one part at a time.
_ABLATIONS = ("none", "s0a3", "s0a6", "gqa", "no_interleave", "ape", "rope1d")
# Arguments of earlier versions -> the ablations that took their place.
_EARLIER = {
    "positions": "ape, rope1d or none",
    "shared": "s0a3 (with experts=48, s0a6) or none",
    "interleave": "no_interleave or none",
    "gqa": "gqa or none",
}


def dsmoe(size: str, arg: str | None, experts: tuple[int, ...] = (16, 48)) -> ConfigDict:
    """DSMoE for ImageNet 256x256 in latent space (arXiv 2512.01252): one of the seven published.

    Args:
      size: "s" | "b" | "l" | "3b".
      arg: of the config file: experts (16 or 48 routed ones, 3b only 16); setting= one of
        `settings.SETTINGS`; and ablation=none, or one of section 4.3:
        s0a3: no shared expert and one routed one more, so that as many parameters are active; with
          48 experts it is s0a6. As in the authors' code, the layer's input stands in for the shared
          expert.
        gqa: half as many key/value heads.
        no_interleave: MoE in all blocks instead of the odd ones.
        ape: absolute positions, the sin-cos table, instead of 2-D rope.
        rope1d: 1-D rope instead of 2-D rope.
      experts: possible numbers, the default first. Figure 3 compares more of them, but neither the
        text nor the yaml files say which numbers and widths these were.
    """
    for part in (arg or "").split(","):
        if instead := _EARLIER.get(part.partition("=")[0].strip()):
            raise UserError(f"{part.strip()} is no argument any more: say ablation={instead}")
    choices = {"experts": experts, "ablation": _ABLATIONS}
    chosen = settings.parse(
        f"dsmoe_{size}", arg, choices=choices, experts=experts[0], ablation="none"
    )
    experts, ablation = chosen.experts, chosen.ablation
    config = configs.default()
    config.name = f"dsmoe_{size}_e{experts}" + (f"_{ablation}" if ablation != "none" else "")

    model = config.model
    model.depth, model.hidden_size, model.num_heads, width = _DSMOE_SIZES[size, experts]
    model.image_size, model.channels, model.patch_size = 32, 4, 2
    model.num_classes = 1000
    model.learn_sigma = True  # as the checkpoints have it; the flow loss uses the first half
    model.positions = {"ape": "sincos", "rope1d": "rope1d"}.get(ablation, "rope2d")
    model.num_kv_heads = model.num_heads // 2 if ablation == "gqa" else 0
    model.mlp = "silu"  # dense blocks, mlp_ratio 4, with bias
    model.dtype = "auto"

    model.moe.num_experts = experts
    model.moe.hidden_size = width
    model.moe.shared_hidden_size = width  # one shared expert, as wide as a routed one
    model.moe.interleave = ablation != "no_interleave"
    model.router.scores = "sigmoid"
    model.router.normalize = True
    model.router.selection_bias = True  # present, but never moved: bias_update_rate stays 0
    top_k, n_group, topk_group, scale = _DSMOE_ROUTING[experts]
    model.router.top_k, model.router.scale = top_k, scale
    model.router.n_group, model.router.topk_group = n_group, topk_group
    if ablation.startswith("s0"):
        model.router.top_k = top_k + 1
        model.moe.shared_hidden_size, model.moe.residual_input = 0, True
        if ablation != f"s0a{top_k + 1}":
            raise UserError(f"with experts={experts}, ablation={ablation} is s0a{top_k + 1}")

    # AdamW(0.9, 0.999), constant 1e-4, no decay, no clipping, EMA 0.9999, label dropout 0.1 and
    # uniform times are the defaults. No auxiliary loss.
    config.data.source = "latents:data/imagenet256_latents"
    config.data.augment = "flip"
    config.data.batch_size = 512
    config.train.num_steps = 700_000
    config.checkpoint.keep_every = 50_000
    config.parallel.preset = "dp" if size in ("s", "b") else "fsdp"
    if size in ("l", "3b"):
        config.optim.mu_dtype = "bfloat16"  # saves 2 bytes per parameter; the authors use float32

    # The protocol of the published FIDs: 250 Euler steps, guidance 1.0 and 1.5.
    config.sampling.sampler, config.sampling.steps, config.sampling.cfg = "euler", 250, 1.5
    settings.apply(config, chosen.setting)
    return config
