"""The keys that every run's config has, with their defaults and what they mean.

Two sections have keys from elsewhere, which `schema` adds:

* model.<architecture>: FIELDS of moe_diffusion/models/<architecture>.py.
* model.router: the fields of the router's class, moe_diffusion/moe/routers/<router>.py.

`ranges` says which values are possible, `validation` which combinations.
"""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {
    "name": "dit",
    "seed": 0,
    "init_from": "",  # workdir or converted folder whose weights a new run begins with
    "init": {
        # Which parameters begin anew all the same, see models/fitting.py: none | patterns of paths,
        # like label_embed,layers_0/*/moe | auto, those that a change of classes, channels or
        # patches concerns (a class that both models know keeps its row)
        "reset": ("none",),
    },
    "model": {
        # dit (and what descends from it) | dit_t2i (dit that attends to texts) | jit (large patches
        # of pixels) | flux (texts, FLUX.1)
        "architecture": "dit",
        "image_size": 32,  # height of the model's input, in pixels or latents
        "image_width": 0,  # its width; 0 = as image_size
        "channels": 4,
        "patch_size": 2,
        "hidden_size": 384,
        "depth": 12,
        "num_heads": 6,
        "num_kv_heads": 0,  # fewer key/value heads (grouped queries); 0 = num_heads
        "mlp_ratio": 4.0,  # width of the dense blocks' MLP / hidden_size; jit: * 2 / 3
        "mlp": "gelu",  # dense blocks: gelu (tanh) | silu, two layers; swiglu, gated
        "mlp_bias": True,
        "norm": "layernorm",  # layernorm (no parameters) | rmsnorm (learned scale)
        "qk_norm": False,  # of queries and keys; flux always has it
        "qk_norm_kind": "rmsnorm",  # rmsnorm (scale) | layernorm_affine (scale and bias)
        "qk_norm_eps": 1e-6,
        # sincos | rope1d | rope2d | rope2d_pairs; jit always adds sincos; flux has its own rope
        "positions": "sincos",
        "num_classes": 1000,  # label num_classes is the null label of guidance
        "learn_sigma": False,  # twice the output channels; the second half is not trained by flow
        "time_scale": 1.0,  # the sinusoidal embedding sees time_scale * t
        "dtype": "float32",  # of computations: float32 | bfloat16 | auto (bfloat16 on TPU and GPU)
        # Of the residual stream (dit: from the positions on, jit: from the class tokens on): auto =
        # that of computations | float32 (what is saved of it for the backward pass doubles) |
        # bfloat16
        "residual_dtype": "auto",
        "param_dtype": "float32",  # of every parameter: float32 | bfloat16 | float16
        # What the backward pass computes again: none | cheap (elementwise operations) | dots (all
        # but products with dense weights) | full
        "remat": "none",
        "unroll": 0,  # periods of layers in one scan step; 0: see models/recompute.py
        "attention": "auto",  # auto, or one of kernels/attention.py
        "moe": {
            "num_experts": 16,
            "hidden_size": 768,  # width of one expert
            "mlp": "swiglu",
            "bias": False,
            "shared_hidden_size": 0,  # width of the shared expert; 0 = none
            "shared_mlp": "swiglu",
            "shared_bias": False,
            "residual_input": False,  # add the layer's input where a shared expert would stand
            "interleave": True,  # MoE in odd blocks only
            "skip_first": 0,  # the first n blocks stay dense
            "dropout": 0.0,  # in training, of the hidden units of all experts
            "backend": "auto",  # of the dispatch: auto, or one of moe/dispatch.py
            "transport": "auto",  # to experts on other devices: auto, or one of moe/transport.py
            "capacity_factor": 1.25,  # token choice, backend slots: slots / average load
        },
        # Layers from the condition to shifts, scales and gates: their inner width, 0 = one layer;
        # and whether all blocks share the first of the two (models/adaln.py)
        "adaln_rank": 0,
        "adaln_shared": False,
        # Mixture of Blocks: a router picks blocks for every sample (models/mixture_of_blocks.py)
        "mob": {
            "groups": ("none",),  # none | like 4-6,7-9: consecutive blocks of one kind, from 0
            "active": 1,  # blocks of a group that a sample passes
            "select": "topk",  # topk: any of them | run: consecutive ones
            "pool": "tokens",  # the router sees the mean of all tokens | channels: two means
            "normalize": False,  # what the router sees
            "alpha": 0.5,  # weight of the tokens against the condition
        },
        "router": {
            # token_choice | expert_choice | diffmoe | promoe_tc | promoe_ec | expert_race |
            # dense (no experts) | my_package.my_module:MyRouter
            "name": "token_choice",
            "group": "sample",  # whose tokens are one routing group: sample | shard | batch
        },
    },
    "diffusion": {
        "path": "flow",  # flow (t = 0 noise, 1 data) | ddpm (1,000 discrete steps, learned sigma)
        "prediction": "velocity",  # of a flow: velocity | data (JiT: the network predicts x)
        "t_eps": 0.05,  # prediction=data: velocity = (data - x_t) / max(1 - t, t_eps)
        "noise_scale": 1.0,  # standard deviation of the noise at t = 0
        # s: the share of noise u becomes s u / (1 + (s - 1) u); 0 takes the s of the image's size
        # with which FLUX.1 [dev] samples
        "time_shift": 1.0,
        "time_sampling": "uniform",  # uniform | logit_normal
        "time_mean": 0.0,  # logit_normal: mean of logit(t)
        "time_std": 1.0,  # and its standard deviation
        "cond_dropout": 0.1,  # share of samples that are trained without their condition
    },
    "sampling": {
        "sampler": "heun",  # flow: heun | euler | dopri5 | sde | sde_heun; ddpm: ddpm | ddim
        "steps": 50,  # dopri5 chooses its own steps
        # heun, euler: none (equal steps) | resolution (shorter ones near the noise, the more so the
        # larger the image is, as in FLUX.1 [dev])
        "time_shift": "none",
        "final_euler": False,  # heun: the last step is an Euler step, as in JiT's sampler
        "cfg": 2.0,  # guidance scale; 1 = off
        "cfg_interval": (0.0, 1.0),  # times at which guidance acts; 0 is noise, 1 is data
        "cfg_channels": 0,  # guide only the first n channels; 0 = all (not the variance of ddpm)
        "joint": False,  # compute the conditional and unconditional halves in one forward pass
        "rtol": 1e-3,  # dopri5: relative error of a step, per image
        "atol": 1e-6,  # dopri5: absolute error of a step, per image
        "sde_diffusion": "sigma",  # w(t): sigma | constant | decreasing | increasing_decreasing
        "sde_norm": 1.0,  # scales w(t)
        # The last step has no noise: mean (drift of the SDE) | euler (velocity alone)
        "sde_last_step": "mean",
        "sde_last_step_size": 0.04,
        "respacing": "",  # ddpm, ddim: "" = `steps` evenly | 10,15,25 by sections | ddim50
        "clip": False,  # ddpm, ddim: keep the estimate of the data within [-1, 1]
        "eta": 0.0,  # ddim: 0 = no noise, 1 = as much as ddpm
        # images that compete for experts where router.group is shard or batch; 0 = all that are
        # drawn together
        "pool": 0,
    },
    "loss_weights": {},  # auxiliary loss of the router -> its weight
    "data": {
        # digits | digits_prompts | digit_pairs | synthetic | folder:<path> | tfds:<name> |
        # latents:<path>
        "source": "digits",
        "split": "train",  # of digits, with and without prompts, and tfds
        "skip_broken": False,  # folder: skip files that are no images, and name them
        "autoencoder": "",  # weights that decode latents into pictures, see docs/data.md
        # folder of a FLUX.1 pipeline, whose encoders read the prompts of `sample --prompt`
        "text_encoders": "",
        "batch_size": 256,  # images per optimizer step, over all devices
        "augment": "none",  # none | flip | dequantize
        "num_workers": 0,
        "prefetch": 2,
    },
    "optim": {
        "learning_rate": 1e-4,
        # After the warm-up: constant | cosine, linear (down to min_learning_rate at
        # train.num_steps) | inverse_sqrt (learning_rate * sqrt(warmup_steps / step))
        "schedule": "constant",
        "min_learning_rate": 0.0,  # where cosine and linear end
        "warmup_steps": 0,
        "trainable": ("*",),  # patterns of parameter paths, like layers_0/*,final/*; others freeze
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "mu_dtype": "float32",  # of AdamW's first moment: float32 | bfloat16
        "weight_decay": 0.0,
        "decay_mask": "all",  # all | matrices
        "clip_norm": 0.0,  # of the global gradient; 0 = off
        "accumulate": 1,  # micro-batches per optimizer step
        "accumulate_reduce": "mean",  # mean | sum
    },
    "ema": {
        "decays": (0.9999,),
        "warmup": False,  # decay of step n at most (1 + n) / (10 + n), so that short runs profit
        "router_state": "average",  # average | copy | live
    },
    "train": {
        "num_steps": 700_000,
        "log_every": 100,
        "sample_every": 0,  # 0 = never
        "samples": 16,
        "eval_samples": 0,  # judged every sample_every steps, see evaluation/periodic.py; 0 = none
        "stop_on_nan": True,
        "wandb": "",  # project of Weights & Biases to write to as well, needs wandb; "" = none
    },
    "checkpoint": {"every": 5000, "keep_last": 3, "keep_every": 0, "asynchronous": True},
    "parallel": {
        "preset": "dp",  # dp | zero1 | fsdp | fsdp_ep | tp
        "expert": 0,  # fsdp_ep: how many devices share the experts; 0 = all
        "tensor": 0,  # tp: how many devices share a sample; 0 = all
    },
    # Dense2MoE: a dense teacher becomes this model, see dense2moe/ and docs/dense2moe.md
    "distill": {
        "teacher": "",  # workdir or converted folder of the dense model
        "teacher_dtype": "auto",  # of its weights: auto (bfloat16 on TPU and GPU) | float32 | ...
        # The teacher's blocks that become the student's: all | ranges like 0-3,15-56 | lite (those
        # that change their input most) | even (evenly spaced ones, as in BK-SDM)
        "blocks": ("all",),
        "importance": "taylor",  # how hidden units are dealt to the experts: taylor | random
        "importance_batches": 64,  # of data.batch_size samples
        "adaln_init": "svd",  # of compressed modulation: svd | random
        "adaln_stage": "shared",  # that trains it: shared | experts | both | none
        "feature_weight": 1.0,  # lambda_feature of Eq. 10
        # The stages: steps (0 leaves a stage out), learning rate, and what is trained of the model.
        # shared: (a) the shared experts alone; experts: (b) all experts, the shared ones frozen;
        # groups: (c) a Mixture of Blocks, one kind of blocks after the other
        "shared": {"steps": 0, "learning_rate": 1e-4, "trainable": ("*/shared/*",)},
        "experts": {
            "steps": 0,
            "learning_rate": 1e-4,
            "trainable": ("*/experts/*", "*/router/*"),
        },
        "groups": {
            "steps": 0,
            "learning_rate": 1e-4,
            "trainable": ("*/members/*", "*/block_router/*"),
        },
    },
    "profile": "",  # steps to trace, like 100:105, into workdir/profile/; "" = none
    "compile_cache": "",  # folder; "" = ~/.cache/moe_diffusion/jax, "off" = none
}

# Keys of how a model is computed; no weight depends on them.
COMPUTATION = ("model.dtype", "model.residual_dtype", "model.remat", "model.unroll")
COMPUTATION += ("model.attention", "model.jit.dropout", "model.moe.backend", "model.moe.transport")
COMPUTATION += ("model.moe.capacity_factor", "model.moe.dropout")

# Keys that may change when a workdir is resumed. `train --allow-change` permits others, too.
RUN_CONTROL = ("train.", "checkpoint.", "sampling.", "parallel.") + (
    "compile_cache",
    "profile",
    "data.autoencoder",
    "data.text_encoders",
    "data.num_workers",
    "data.prefetch",
)

# Keys (with a dot: sections) that no flag permits to change, and why. `COMPUTATION` is excepted.
FIXED = {
    "model.": "the stored weights are those of that model",
    "diffusion.path": "the stored weights predict on that path",
    "diffusion.prediction": "it is what the stored weights predict",
    "diffusion.noise_scale": "the stored weights know noise of that strength",
    "optim.trainable": "the state of the optimizer is stored for these parameters",
    "optim.mu_dtype": "the moments are stored in it",
    "optim.decay_mask": "the state of the optimizer has another structure with it",
    "ema.decays": "these averages are stored",
    "ema.router_state": "it says what the stored averages hold",
}
