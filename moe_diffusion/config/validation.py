"""Checks the values of a config and their combinations; messages name the keys and a remedy.

These checks see only the config. Whether a data source exists and fits the model is checked where
it is opened (`data.sources`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from moe_diffusion import models
from moe_diffusion.checks import require
from moe_diffusion.config.draft import is_draft
from moe_diffusion.config.ranges import check_ranges
from moe_diffusion.config.schema import settle
from moe_diffusion.models.mixture_of_blocks import BALANCE, parse_groups
from moe_diffusion.models.parts import pattern_of
from moe_diffusion.moe import routers
from moe_diffusion.moe.router import Router
from moe_diffusion.profiling import steps_of
from moe_diffusion.remote import is_remote
from moe_diffusion.slices import slices_of


def validate(config: ConfigDict) -> None:
    """Raises a UserError at the first value or combination that cannot work on any machine."""
    config = settle(config) if is_draft(config) else config
    check_ranges(config)
    for key in ("source", "autoencoder", "text_encoders"):
        place = config.data[key]
        remedy = "copy it to a local folder"
        require(not is_remote(place), f"data.{key} = {place} is remote: {remedy}")
    _check_transformer(config.model)
    _check_architecture(config.model)
    router = routers.find(config.model.router.name)
    if router:
        _check_moe(config.model)
        if parse_groups(config.model.mob.groups):
            _check_grouped(router, config.model)
        samples = {"sample": 1, "batch": _micro_batch(config), "shard": None}
        _check_router(router, config.model, samples[config.model.router.group])
    require(
        config.diffusion.path == "flow" or not config.model.dit.reverse_time,
        "model.dit.reverse_time turns the time of a flow; diffusion.path = ddpm counts its steps "
        "from the data anyway: set model.dit.reverse_time=false",
    )
    steps_of(config.profile)
    _check_loss_weights(config, router.provides if router else ())
    _check_diffusion(config)
    _check_training(config)
    require(
        bool(config.init_from) or tuple(config.init.reset) == ("none",),
        f"init.reset = {config.init.reset} is about the weights of init_from, which names no "
        "folder: set init_from, or init.reset=none",
    )


def validate_devices(config: ConfigDict, devices: Sequence[Any]) -> None:
    """Raises a UserError unless a micro-batch splits evenly over the devices of all processes.

    With `tp` it is split over groups of devices, each of which shares its samples. Neither they nor
    those that share experts are of several slices of TPU chips.
    """
    images, parallel = _micro_batch(config), config.parallel
    near, num_devices = len(slices_of(devices)[0]), len(devices)
    sharing = (parallel.tensor or near) if parallel.preset == "tp" else 1
    require(
        near % sharing == 0,
        f"parallel.tensor = {sharing} does not divide the {near} devices: choose a divisor, "
        "or 0 for all",
    )
    shards = num_devices // sharing
    require(
        images % shards == 0,
        f"data.batch_size / optim.accumulate = {images} images cannot be split evenly over "
        f"{shards} {'devices' if sharing == 1 else 'groups of devices'}: make it a multiple of "
        f"{shards}",
    )
    router = routers.find(config.model.router.name)
    if router and config.model.router.group == "shard":
        _check_router(router, config.model, images // shards)
    if parallel.preset == "fsdp_ep":
        sharing, experts = parallel.expert or near, config.model.moe.num_experts
        require(
            near % sharing == 0,
            f"parallel.expert = {sharing} does not divide the {near} devices: choose a "
            "divisor, or 0 for all",
        )
        require(
            experts % sharing == 0,
            f"model.moe.num_experts = {experts} cannot be split evenly over {sharing} devices: set "
            "parallel.expert to a divisor of both",
        )


def _micro_batch(config: ConfigDict) -> int:
    batch, parts = config.data.batch_size, config.optim.accumulate
    require(
        batch % parts == 0,
        f"data.batch_size = {batch} cannot be split into optim.accumulate = {parts} micro-batches: "
        "make it a multiple",
    )
    return batch // parts


def _sides(model: ConfigDict) -> tuple[int, int]:
    """Height and width of the model's input."""
    return model.image_size, model.image_width or model.image_size


def _check_transformer(model: ConfigDict) -> None:
    for name, side in zip(("image_size", "image_width"), _sides(model), strict=True):
        require(
            side % model.patch_size == 0,
            f"model.patch_size = {model.patch_size} does not divide model.{name} = {side}: choose "
            "a divisor",
        )
    require(
        model.hidden_size % model.num_heads == 0,
        f"model.num_heads = {model.num_heads} does not divide model.hidden_size = "
        f"{model.hidden_size}: choose a divisor",
    )
    require(
        model.num_kv_heads == 0 or model.num_heads % model.num_kv_heads == 0,
        f"model.num_kv_heads = {model.num_kv_heads} does not divide model.num_heads = "
        f"{model.num_heads}: choose a divisor, or 0 for as many",
    )
    height, width = (side // model.patch_size for side in _sides(model))
    values = height * width * model.hidden_size
    require(
        values <= 1 << 28,
        f"model.image_size and model.patch_size make {height * width:,} tokens of "
        f"model.hidden_size = {model.hidden_size}, beyond {1 << 28:,} values of a sample: take "
        "larger patches or a smaller image",
    )
    require(
        model.adaln_rank > 0 or not model.adaln_shared,
        "model.adaln_shared = True has no compression to share: set model.adaln_rank, like 256, or "
        "model.adaln_shared=false",
    )
    require(
        int(model.hidden_size * model.mlp_ratio) >= 2,  # jit has two thirds of it
        f"model.mlp_ratio = {model.mlp_ratio} leaves less than two hidden units of "
        f"model.hidden_size = {model.hidden_size}: raise it",
    )
    head_size = model.hidden_size // model.num_heads
    # One sine-cosine pair needs two channels; two axes need twice as many.
    for positions, name, size, step in (
        ("sincos", "model.hidden_size", model.hidden_size, 4),
        ("rope1d", "model.hidden_size / model.num_heads", head_size, 2),
        ("rope2d", "model.hidden_size / model.num_heads", head_size, 4),
        ("rope2d_pairs", "model.hidden_size / model.num_heads", head_size, 4),
    ):
        require(
            model.positions != positions or size % step == 0,
            f"model.positions = {positions} needs {name} = {size} to be a multiple of {step}: "
            "change the width, the heads or the positions",
        )


def _check_architecture(model: ConfigDict) -> None:
    """Checks the fields of the architecture, and that no other one's are switched on."""
    models.architecture(model.architecture).check(model)
    for other in set(models.ARCHITECTURES) - {model.architecture}:
        for name, (default, _) in models.architecture(other).FIELDS.items():
            # A field whose default is "off" was set by someone who expects an effect.
            require(
                default or model[other][name] == default,
                f"model.{other}.{name} = {model[other][name]} is of model.architecture = {other}, "
                f"and this is {model.architecture}: set it to {default}",
            )


def _check_moe(model: ConfigDict) -> None:
    moe, depth = model.moe, models.num_blocks(model)
    require(
        depth * moe.num_experts <= 1 << 18,
        f"{depth} blocks and model.moe.num_experts = {moe.num_experts} make more than "
        f"{1 << 18:,} experts: lower one of them",
    )
    require(
        any(pattern_of(model, depth)),
        f"model.depth = {model.depth}, model.moe.skip_first = {moe.skip_first} and "
        f"model.moe.interleave = {moe.interleave} leave no MoE block: add blocks, skip fewer, or "
        "set model.router.name=dense",
    )
    require(
        moe.shared_hidden_size > 0 or moe.residual_input or moe.num_experts > 0,
        "model.moe.num_experts = 0 and model.moe.shared_hidden_size = 0 leave nothing: set one",
    )
    require(
        moe.num_experts > 0 or model.router.get("top_k", 1) == 0,
        "model.moe.num_experts = 0 leaves a router without experts: set model.router.top_k=0 of "
        "token_choice, or add experts",
    )
    require(
        not (moe.residual_input and moe.shared_hidden_size),
        f"model.moe.residual_input stands in for a shared expert, but model.moe.shared_hidden_size "
        f"= {moe.shared_hidden_size}: set one of them to false or 0",
    )
    require(
        moe.dropout == 0 or moe.backend not in ("cpu", "tpu", "gpu", "ragged_dot"),
        f"model.moe.backend = {moe.backend} cannot do model.moe.dropout = {moe.dropout}: choose "
        "auto, blocked or slots, or set model.moe.dropout=0",
    )


def _check_grouped(router: type[Router], model: ConfigDict) -> None:
    """Checks experts in groups of blocks, where a sample is alone (mixture_of_blocks.py)."""
    require(
        model.moe.dropout == 0,
        f"model.moe.dropout = {model.moe.dropout} has no random stream in the blocks of "
        "model.mob.groups: set it to 0, or model.mob.groups=none",
    )
    require(
        model.router.group == "sample" or not router.group_matters,
        f"model.router.group = {model.router.group} routes tokens of several samples together, and "
        "in the blocks of model.mob.groups a sample is alone: set model.router.group=sample",
    )


def _check_router(router: type[Router], model: ConfigDict, samples: int | None) -> None:
    """Lets the router's class check its fields.

    Args:
      samples: how many samples have their tokens in one routing group; None if it is unknown.
    """
    rows, columns = (side // model.patch_size for side in _sides(model))
    group_tokens = None if samples is None else samples * rows * columns
    router.check(model.router, model.moe.num_experts, group_tokens)


def _check_loss_weights(config: ConfigDict, provided: tuple[str, ...]) -> None:
    if parse_groups(config.model.mob.groups):
        provided = (*provided, BALANCE)
    for name, weight in config.loss_weights.items():
        require(
            name in provided,
            f"loss_weights.{name} is no loss of model.router.name = {config.model.router.name}, "
            f"which has {' and '.join(provided) or 'none'}: remove it, or clear all: "
            "loss_weights={}",
        )
        require(weight >= 0, f"loss_weights.{name} = {weight} must be zero or positive")


def _check_diffusion(config: ConfigDict) -> None:
    """Checks that the sampler fits diffusion.path, and that the sampling keys fit the sampler."""
    path, sampling = config.diffusion.path, config.sampling
    interval, discrete = sampling.cfg_interval, sampling.sampler in ("ddpm", "ddim")
    require(
        discrete == (path == "ddpm"),
        f"sampling.sampler = {sampling.sampler} does not fit diffusion.path = {path}: choose "
        + ("ddpm | ddim" if path == "ddpm" else "heun | euler | dopri5 | sde | sde_heun"),
    )
    require(
        len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1,
        f"sampling.cfg_interval = {interval} must be two times, 0 <= start < end <= 1",
    )
    if path == "ddpm":
        require(
            config.model.learn_sigma,
            "diffusion.path = ddpm trains a variance: set model.learn_sigma=true",
        )
        for key, needed in (("prediction", "velocity"), ("noise_scale", 1.0)):
            require(
                config.diffusion[key] == needed,
                f"diffusion.{key} = {config.diffusion[key]} is for diffusion.path = flow: set it "
                f"to {needed}",
            )
        require(
            tuple(interval) == (0, 1),
            f"sampling.cfg_interval = {interval} is for diffusion.path = flow: set it to (0, 1)",
        )
    require(
        sampling.time_shift == "none" or sampling.sampler in ("heun", "euler"),
        f"sampling.time_shift = {sampling.time_shift} is for sampling.sampler = heun or euler, and "
        f"this is {sampling.sampler}: set it to none",
    )
    require(
        sampling.sampler not in ("sde", "sde_heun") or sampling.steps >= 2,
        f"sampling.steps = {sampling.steps} is too few for sampling.sampler = {sampling.sampler}, "
        "whose last step is one without noise: take at least 2",
    )
    for key in ("respacing", "clip"):
        require(
            discrete or not sampling[key],
            f"sampling.{key} = {sampling[key]} is for diffusion.path = ddpm: leave it out",
        )


def _check_training(config: ConfigDict) -> None:
    _micro_batch(config)
    decays = config.ema.decays
    require(
        all(0 < decay < 1 for decay in decays) and len(set(decays)) == len(decays),
        f"ema.decays = {decays} must be different numbers above 0 and below 1",
    )
    require(
        config.train.eval_samples != 1,
        "train.eval_samples = 1 has no covariance: take some hundreds, or 0 for none",
    )
    _check_optim(config.optim, config.train.num_steps)


def _check_optim(optim: ConfigDict, steps: int) -> None:
    falling = optim.schedule in ("cosine", "linear")
    require(
        not falling or optim.warmup_steps < steps,
        f"optim.warmup_steps = {optim.warmup_steps} leaves nothing of train.num_steps = {steps} to "
        f"optim.schedule = {optim.schedule}: lower the warm-up or train longer",
    )
    require(
        optim.schedule != "inverse_sqrt" or optim.warmup_steps >= 1,
        "optim.schedule = inverse_sqrt falls with the steps since the warm-up began, but "
        "optim.warmup_steps = 0: set it to at least 1",
    )
    require(
        falling or optim.min_learning_rate == 0,
        f"optim.min_learning_rate = {optim.min_learning_rate} is where optim.schedule = cosine or "
        f"linear ends, and this is {optim.schedule}: set it to 0, or change the schedule",
    )
    require(
        optim.min_learning_rate <= optim.learning_rate,
        f"optim.min_learning_rate = {optim.min_learning_rate} exceeds optim.learning_rate = "
        f"{optim.learning_rate}: lower it",
    )
    require(
        bool(optim.trainable) and all(optim.trainable),
        f"optim.trainable = {optim.trainable} trains nothing: name patterns of parameter paths, "
        "like *",
    )
