"""Which values and combinations of a config are possible; a message names the keys and a remedy.

Only what the numbers alone can tell is checked here. Whether a data source exists and fits the
model is checked where it is opened (`data.sources`).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from moe_diffusion.ranges import LOSSES, check_ranges, require


def validate(config: ConfigDict) -> None:
    """Raises a UserError at the first value or combination that cannot work on any machine."""
    check_ranges(config)
    _check_transformer(config.model)
    _check_family(config)
    if config.model.router.name != "dense":
        _check_moe(config.model)
        if config.model.router.name == "token_choice":
            _check_token_choice(config.model)
        elif config.model.router.name in ("promoe_tc", "promoe_ec"):
            _check_promoe(config.model)
        else:
            _check_expert_choice(config.model)
            if config.model.router.scope == "sample":
                _check_capacity(config.model, samples=1)
            elif config.model.router.scope == "batch":
                _check_capacity(config.model, samples=_micro_batch(config))
    require(
        config.diffusion.path == "flow" or not config.model.reverse_time,
        "model.reverse_time turns the time of a flow; diffusion.path = ddpm counts its steps from "
        "the data anyway: set model.reverse_time=false",
    )
    _check_loss_weights(config)
    _check_diffusion(config)
    _check_training(config)


def validate_devices(config: ConfigDict, num_devices: int) -> None:
    """Raises a UserError unless a micro-batch splits evenly over the devices of all processes."""
    images = _micro_batch(config)
    require(
        images % num_devices == 0,
        f"data.batch_size / optim.accumulate = {images} images cannot be split evenly over "
        f"{num_devices} devices: make it a multiple of {num_devices}",
    )
    router, parallel = config.model.router, config.parallel
    if router.name in ("expert_choice", "diffmoe") and router.scope == "shard":
        _check_capacity(config.model, images // num_devices)
    if parallel.preset == "fsdp_ep":
        sharing, experts = parallel.expert or num_devices, config.model.moe.num_experts
        require(
            num_devices % sharing == 0,
            f"parallel.expert = {sharing} does not divide the {num_devices} devices: choose a "
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


def _check_transformer(model: ConfigDict) -> None:
    require(
        model.image_size % model.patch_size == 0,
        f"model.patch_size = {model.patch_size} does not divide model.image_size = "
        f"{model.image_size}: choose a divisor",
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


def _check_family(config: ConfigDict) -> None:
    """What only one of the families can do."""
    model = config.model
    if model.family == "dit":
        require(
            model.dropout == 0,
            f"model.dropout = {model.dropout} is of model.family = jit: set it to 0",
        )
        return
    require(
        model.hidden_size % 4 == 0,
        f"model.family = jit adds a sin-cos table, which needs model.hidden_size = "
        f"{model.hidden_size} to be a multiple of 4: change the width",
    )
    require(
        model.in_context_tokens == 0 or model.in_context_start < model.depth,
        f"model.in_context_start = {model.in_context_start} is beyond the last of model.depth = "
        f"{model.depth} blocks: start earlier, or set model.in_context_tokens=0",
    )
    require(
        not model.reverse_time,
        "model.reverse_time is of model.family = dit: set it to false",
    )


def _check_moe(model: ConfigDict) -> None:
    moe = model.moe
    blocks = range(moe.skip_first, model.depth)
    require(
        any(not moe.interleave or block % 2 for block in blocks),
        f"model.depth = {model.depth}, model.moe.skip_first = {moe.skip_first} and "
        f"model.moe.interleave = {moe.interleave} leave no MoE block: add blocks, skip fewer, or "
        "set model.router.name=dense",
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


def _check_token_choice(model: ConfigDict) -> None:
    router, experts = model.router, model.moe.num_experts
    require(
        router.top_k <= experts,
        f"model.router.top_k = {router.top_k} exceeds model.moe.num_experts = {experts}: lower it",
    )
    require(
        experts % router.n_group == 0,
        f"model.router.n_group = {router.n_group} does not divide model.moe.num_experts = "
        f"{experts}: choose a divisor",
    )
    require(
        router.topk_group <= router.n_group,
        f"model.router.topk_group = {router.topk_group} exceeds model.router.n_group = "
        f"{router.n_group}: lower it",
    )
    require(
        router.n_group == 1 or experts // router.n_group >= 2,
        f"model.router.n_group = {router.n_group} leaves one expert to a group, but a group is "
        "rated by its two best: use fewer groups",
    )
    require(
        router.scores != "identity",
        "model.router.scores = identity is for model.router.name = promoe_tc or promoe_ec; choose "
        "softmax or sigmoid",
    )
    require(
        router.bias_update_rate == 0 or router.selection_bias,
        f"model.router.bias_update_rate = {router.bias_update_rate} has no bias to move: set "
        "model.router.selection_bias=true, or the rate to 0",
    )


def _check_promoe(model: ConfigDict) -> None:
    router, experts = model.router, model.moe.num_experts
    name = "top_k" if router.name == "promoe_tc" else "capacity"
    require(
        router[name] <= experts - router.null_expert,
        f"model.router.{name} = {router[name]} exceeds the experts of labelled samples, "
        f"model.moe.num_experts = {experts} less model.router.null_expert = "
        f"{int(router.null_expert)}: lower it, or add experts",
    )


def _check_expert_choice(model: ConfigDict) -> None:
    router, experts = model.router, model.moe.num_experts
    require(
        router.capacity <= experts,
        f"model.router.capacity = {router.capacity} exceeds model.moe.num_experts = {experts}: "
        "an expert cannot take more tokens than there are, lower it",
    )
    require(
        router.name != "diffmoe" or router.max_capacity == 0 or router.max_capacity >= 1,
        f"model.router.max_capacity = {router.max_capacity} would drop tokens even at the average "
        "load: use at least 1, or 0 for no bound",
    )
    require(
        router.threshold == "dynamic" or _is_fraction(router.threshold),
        f"model.router.threshold = {router.threshold!r} must be dynamic or a number at least 0 and "
        "below 1, like 0.4",
    )


def _is_fraction(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def _check_capacity(model: ConfigDict, samples: int) -> None:
    """An expert takes int(tokens / experts * capacity) tokens of `samples` samples: at least 1."""
    router, experts = model.router, model.moe.num_experts
    tokens = samples * (model.image_size // model.patch_size) ** 2
    require(
        int(tokens / experts * router.capacity) >= 1,
        f"model.router.capacity = {router.capacity} gives each of model.moe.num_experts = "
        f"{experts} less than one of the {tokens} tokens in model.router.scope = {router.scope}: "
        "raise the capacity, use fewer experts, a smaller model.patch_size or a wider scope",
    )


def _check_loss_weights(config: ConfigDict) -> None:
    router = config.model.router.name
    for name, weight in config.loss_weights.items():
        require(
            name in LOSSES[router],
            f"loss_weights.{name} is no loss of model.router.name = {router}, which has "
            f"{' and '.join(LOSSES[router]) or 'none'}: remove it, or clear all: loss_weights={{}}",
        )
        require(weight >= 0, f"loss_weights.{name} = {weight} must be zero or positive")


def _check_diffusion(config: ConfigDict) -> None:
    """The samplers fit the path, and their keys fit them."""
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
    optim, steps = config.optim, config.train.num_steps
    require(
        optim.schedule == "constant" or optim.warmup_steps < steps,
        f"optim.warmup_steps = {optim.warmup_steps} leaves nothing of train.num_steps = {steps} to "
        "optim.schedule = cosine: lower the warm-up or train longer",
    )
