"""Text to image by cross-attention: DiffMoE-E16-T2I-Flow, Dense-DiT-T2I-Flow, and small ones.

DiffMoE (arXiv 2503.14487, section 3.3 and table 7) gives only their parameters, 4.6B with 1.2B
activated, and 1.2B, and that they are trained at 256x256. Here 24 layers of width 1536 with the
MLPs, experts and adaLN of DiffMoE-L, and cross-attention of the same width in every layer: 1.25B
and 4.65B before embedders and capacity predictors. docs/models.md has the sum.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs.families.diffmoe import give_diffmoe
from configs.families.digits import give_router, train_briefly
from moe_diffusion import config as configs

ROUTERS = ("dense", "token_choice", "expert_choice", "diffmoe")
STAGES = ("pretrain", "sft")


def t2i(name: str, router: str, stage: str) -> ConfigDict:
    """A text-to-image transformer on 32x32x4 latents with T5-XXL's tokens and CLIP-L's vector.

    Args:
      router: "dense" or "diffmoe", with 16 experts in odd blocks, as in DiffMoE-L.
      stage: "pretrain"; or "sft", supervised fine-tuning (table 7 and figures 17 and 18) of the
        pretrained model on JourneyDB.
    """
    config = configs.default()
    config.name = name if stage == "pretrain" else f"{name}_{stage}"

    model = config.model
    model.architecture = "dit_t2i"
    model.depth, model.hidden_size, model.num_heads = 24, 1536, 24
    model.image_size, model.channels, model.patch_size = 32, 4, 2
    model.qk_norm = True  # keeps the scores of long trainings in bf16 small
    model.dtype, model.remat = "auto", "full"
    model.router.name = "dense"
    if router == "diffmoe":
        model.moe.num_experts = 16
        model.moe.hidden_size = 4 * model.hidden_size
        model.moe.mlp, model.moe.bias = "gelu", True
        give_diffmoe(config)

    # Of the training the paper says: rectified flow on internal data, AdamW at a constant 1e-4
    # without decay, EMA 0.9999, 160,000 steps (figure 5; appendix B.1). The batch, the shift of
    # time and the sampler are our choice.
    config.diffusion.time_shift = 0.0  # by the size of the images
    config.data.source = "latents:data/captioned_latents"
    config.data.batch_size = 1024
    config.train.num_steps = 160_000
    config.checkpoint.keep_every = 20_000
    config.parallel.preset = "fsdp"
    config.sampling.sampler, config.sampling.steps, config.sampling.cfg = "heun", 50, 4.5
    if stage == "sft":
        config.init_from = f"runs/{name}"
        config.data.source = "latents:data/journeydb_latents"
        config.data.batch_size = 256
        config.optim.learning_rate = 2e-5
        config.train.num_steps = 20_000
    return config


def digits_t2i(router: str, seed: int) -> ConfigDict:
    """A narrow one that reads words itself, on pairs of digits side by side.

    All routers activate as many parameters: a token uses two experts of half the dense width.
    """
    config = configs.default()
    config.name, config.seed = f"digits_t2i_{router}", seed
    model = config.model
    model.architecture = "dit_t2i"
    model.depth, model.hidden_size, model.num_heads = 6, 96, 4
    model.image_size, model.image_width, model.channels, model.patch_size = 8, 16, 1, 2
    # A rotation knows only distances. Left and right need places.
    model.positions = "sincos"
    model.dit_t2i.update(text_tokens=18, text_width=64, text_dtype="float32", text_mask=False)
    model.dit_t2i.update(pooled_width=0, vocabulary="digit_pairs")
    give_router(config, router)

    train_briefly(config, num_steps=3000)
    config.data.source, config.data.batch_size = "digit_pairs", 64
    config.optim.learning_rate = 1.5e-3
    config.train.sample_every, config.train.eval_samples = 1000, 0
    return config
