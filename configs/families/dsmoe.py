"""The published DSMoE models (arXiv 2512.01252)."""

from __future__ import annotations

from ml_collections import ConfigDict

from moe_diffusion import config as configs

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


# The parts that the paper removes or replaces one by one; the published choice comes first.
_ABLATIONS = {
    "positions": ("rope2d", "rope1d", "sincos"),
    "shared": (True, False),
    "interleave": (True, False),
    "gqa": (False, True),
}


def dsmoe(size: str, arg: str | None, experts: tuple[int, ...] = (16, 48)) -> ConfigDict:
    """DSMoE for ImageNet 256x256 in latent space (arXiv 2512.01252): one of the seven published.

    Args:
      size: "s" | "b" | "l" | "3b".
      arg: of the config file: experts (16 or 48 routed ones, 3b only 16), and the ablations
        positions=rope2d | rope1d | sincos, shared=true | false (a shared expert, or the layer's
        input in its place), interleave=true | false (MoE in odd blocks, or in all), gqa=false |
        true (half as many key/value heads).
      experts: possible numbers, the default first.
    """
    defaults = {name: values[0] for name, values in _ABLATIONS.items()}
    choices = {"experts": experts, "positions": _ABLATIONS["positions"]}
    chosen = configs.parse_arg(arg, choices=choices, experts=experts[0], **defaults)
    changed = [f"{k}={v}".lower() for k, v in chosen.items() if v != defaults.get(k, v)]
    experts = chosen.experts
    config = configs.default()
    config.name = "_".join([f"dsmoe_{size}_e{experts}", *changed])

    model = config.model
    model.depth, model.hidden_size, model.num_heads, width = _DSMOE_SIZES[size, experts]
    model.image_size, model.channels, model.patch_size = 32, 4, 2
    model.num_classes = 1000
    model.learn_sigma = True  # as the checkpoints have it; the flow loss uses the first half
    model.positions = chosen.positions
    model.num_kv_heads = model.num_heads // 2 if chosen.gqa else 0
    model.mlp = "silu"  # dense blocks, mlp_ratio 4, with bias
    model.dtype = "auto"

    model.moe.num_experts = experts
    model.moe.hidden_size = width
    # One shared expert, as wide as a routed one.
    model.moe.shared_hidden_size = width if chosen.shared else 0
    model.moe.residual_input = not chosen.shared
    model.moe.interleave = chosen.interleave
    model.router.scores = "sigmoid"
    model.router.normalize = True
    model.router.selection_bias = True  # present, but never moved: bias_update_rate stays 0
    top_k, n_group, topk_group, scale = _DSMOE_ROUTING[experts]
    model.router.top_k, model.router.scale = top_k, scale
    model.router.n_group, model.router.topk_group = n_group, topk_group

    # AdamW(0.9, 0.999), constant 1e-4, no decay, no clipping, EMA 0.9999, label dropout 0.1 and
    # uniform times are the defaults. No auxiliary loss.
    config.data.source = "latents:data/imagenet256_latents"
    config.data.batch_size = 512
    config.train.num_steps = 700_000
    config.checkpoint.keep_every = 50_000
    config.parallel.preset = "dp" if size in ("s", "b") else "fsdp"
    if size in ("l", "3b"):
        config.optim.mu_dtype = "bfloat16"  # saves 2 bytes per parameter; the authors use float32

    # The protocol of the published FIDs: 250 Euler steps, guidance 1.0 and 1.5.
    config.sampling.sampler, config.sampling.steps, config.sampling.cfg = "euler", 250, 1.5
    return config
