"""Makes any config small enough to train in seconds, so that every command can be tried."""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict

# Flags of every command that draws images, for a tiny run. Other values would take hours.
_FLAGS = {"--num": "8", "--batch": "4", "--steps": "2", "--gammas": "0.9,0.1"}
_OF_PROMPTS = {"--num": "1000", "--batch": "250", "--steps": "2"}  # one image for each, at least

_IMAGE, _PATCH, _WIDTH = 16, 2, 32
# Sources that come with the package keep their images and words.
_SHIPPED = ("digit_pairs",)
_OF_IMAGES = ("model.image_size", "model.image_width", "model.channels", "data.source")


def quick(argv: Sequence[str]) -> tuple[str, ...]:
    """A command line that draws images, changed to draw 8 of them, or one a prompt, in 2 steps."""
    words = list(argv)
    flags = _OF_PROMPTS if words[0] == "evaluate" and "--prompts" in words else _FLAGS
    if "--blocks" in words:  # two layers do not have them
        place = words.index("--blocks")
        del words[place : place + 2]
    for flag, value in flags.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        elif flag != "--gammas":
            words += [flag, value]
    return (*words, f"--config.sampling.pool={flags['--batch']}")


def shrink(config: ConfigDict) -> tuple[str, ...]:
    """Overrides that shrink a config: 2 layers of width 32, 16x16 generated images, 2 steps.

    Router, number of experts, positions and objective stay what they are. The images have three
    channels, so that samples can be judged without a decoder.
    """
    model = config.model
    values = {
        "seed": 0,  # runs that differ in it alone are trained once
        "model.image_size": _IMAGE,
        "model.image_width": 0,
        "model.channels": 3,
        "model.patch_size": _PATCH,
        "model.num_classes": 10,
        "model.depth": 2,
        "model.hidden_size": _WIDTH,
        "model.num_heads": 2,
        "model.num_kv_heads": 1 if model.num_kv_heads else 0,
        "model.moe.hidden_size": _WIDTH // 2,
        "model.moe.shared_hidden_size": _WIDTH // 2 if model.moe.shared_hidden_size else 0,
        "model.dtype": "float32",
        "data.source": "synthetic",
        "data.autoencoder": "",
        "data.batch_size": 8,
        "optim.mu_dtype": "float32",
        "train.num_steps": 2,
        "train.log_every": 1,
        "train.sample_every": 0,
        "train.eval_samples": 0,
        "checkpoint.every": 2,
        "checkpoint.keep_every": 0,
        "parallel.preset": "dp",
        "sampling.steps": 2,
    }
    if config.optim.schedule != "constant":
        values["optim.warmup_steps"] = 0
    if config.data.source in _SHIPPED:
        values = {key: value for key, value in values.items() if key not in _OF_IMAGES}
    if model.architecture == "dit_t2i" and not model.dit_t2i.vocabulary:
        small = {"text_tokens": 8, "text_width": 16, "text_dtype": "float32", "pooled_width": 8}
        values |= {f"model.dit_t2i.{key}": value for key, value in small.items()}
    if config.diffusion.path == "ddpm":
        values["sampling.clip"] = True  # without it two steps leave the range of images
    if model.architecture == "jit":
        small = {"bottleneck": 8, "in_context_start": 1, "in_context_tokens": 2}
        values |= {f"model.jit.{key}": value for key, value in small.items()}
    if model.architecture == "flux":
        small = {"single_depth": 2, "rope_axes": (4, 6, 6), "text_tokens": 8, "text_width": 16}
        small |= {"pooled_width": 8}
        values |= {f"model.flux.{key}": value for key, value in small.items()}
        values["model.adaln_rank"] = min(8, model.adaln_rank)
        if tuple(model.mob.groups) != ("none",):  # a group has blocks of one kind
            values |= {"model.mob.groups": ("0-1", "2-3"), "model.moe.skip_first": 0}
    return tuple(f"--config.{key}={value}" for key, value in values.items())
