"""Measures what the dispatch of tokens and a whole training step cost.

  python -m moe_diffusion.bench dispatch --shape 384,768,16,2 --tokens 2048 --json
  python -m moe_diffusion.bench train --config configs/dsmoe_s.py --config.data.batch_size=8

dispatch: rho = time of (route + gather + experts + combine) / time of a dense MLP over as many rows
(tokens * K), both SwiGLU, forward and forward + backward, interleaved in one run, medians.
train: the real step (gradients, AdamW, averages) on generated images.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_diffusion import config as configs
from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.data.sources import Synthetic
from moe_diffusion.diffusion.objectives import make_loss
from moe_diffusion.errors import UserError
from moe_diffusion.kernels import mlp
from moe_diffusion.models import build
from moe_diffusion.moe.dispatch import dispatch
from moe_diffusion.moe.layer import Experts
from moe_diffusion.moe.routers import TokenChoice
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.training.allocator import keep_freed_memory
from moe_diffusion.training.optim import make_optimizer, make_schedule
from moe_diffusion.training.state import create_state
from moe_diffusion.training.step import make_train_step


def medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, all of them in turn, after one run to compile and warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def bench_dispatch(shape: str, tokens: int, dtype: str, backend: str | None, repeats: int) -> dict:
    """rho of one shape D,H,E,K; routing is that of a random gate on random tokens."""
    try:
        width, hidden, num_experts, top_k = (int(part) for part in shape.split(","))
    except ValueError:
        raise UserError(f"--shape {shape!r} is not D,H,E,K like 384,768,16,2") from None
    key = jax.random.key(0)
    x = jax.random.normal(key, (1, tokens, width), dtype)
    rows = jax.random.normal(key, (tokens * top_k, width), dtype)
    router, experts = TokenChoice(num_experts, top_k=top_k), Experts(num_experts, hidden)
    gate, stacked = (nn.meta.unbox(m.init(key, a)) for m, a in ((router, x), (experts, width)))
    stacked = stacked["params"]
    single = {name: value[0].astype(dtype) for name, value in stacked.items()}

    def moe(x, gate, stacked):
        routing, _ = router.apply(gate, x)
        return dispatch(x, routing, stacked, kind="swiglu", backend=backend)

    def dense(x, single):
        return mlp.apply(x, single, "swiglu")

    def with_backward(function):
        def both(cotangent, *args):
            y, pull = jax.vjp(function, *args)
            return y, pull(cotangent)

        return jax.jit(both)

    compiled = {
        "dense_fwd": (jax.jit(dense), (rows, single)),
        "moe_fwd": (jax.jit(moe), (x, gate, stacked)),
        "dense_fwd_bwd": (with_backward(dense), (rows, rows, single)),
        "moe_fwd_bwd": (with_backward(moe), (x, x, gate, stacked)),
    }
    seconds = medians({n: (lambda f=f, a=a: f(*a)) for n, (f, a) in compiled.items()}, repeats)
    return {
        "shape": shape,
        "tokens": tokens,
        "dtype": dtype,
        "backend": backend or "blocked",
        "rho_fwd": seconds["moe_fwd"] / seconds["dense_fwd"],
        "rho_fwd_bwd": seconds["moe_fwd_bwd"] / seconds["dense_fwd_bwd"],
        "dense_gflops": 18 * tokens * top_k * width * hidden / seconds["dense_fwd_bwd"] / 1e9,
    }


def bench_train(spec: str, overrides: Sequence[str], repeats: int) -> dict:
    """Seconds of the real training step of a config, on generated images."""
    config = configs.load(spec, ["data.source=synthetic", *overrides])
    model = build(config.model, losses=sorted(config.loss_weights))
    shape = (config.model.image_size, config.model.image_size, config.model.channels)
    batch = Synthetic(shape, config.model.num_classes).take(np.arange(config.data.batch_size))
    optimizer = make_optimizer(config.optim)
    mesh = make_mesh(config.parallel, jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = create_state(model, optimizer, config, mesh, config.seed)
        schedule = make_schedule(config.optim, config.train.num_steps)
        step = make_train_step(
            make_loss(model, config), optimizer, schedule, config, model.update_router_state
        )
        holder = [state]

        def call():
            holder[0], metrics = step(holder[0], batch, jax.random.key(0))
            return metrics

        seconds = medians({"step": call}, repeats)["step"]
    return {"config": config.name, "batch": config.data.batch_size, "seconds_per_step": seconds,
            "images_per_sec": config.data.batch_size / seconds}  # fmt: skip


def gemm_gflops(size: int = 2048) -> float:
    """Rate of an f32 product of two size x size matrices, for comparing machines."""
    a = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / medians({"gemm": lambda: product(a, a)}, 10)["gemm"] / 1e9


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    keep_freed_memory()
    parser = Parser("bench", __doc__)
    parser.add_argument("what", choices=("dispatch", "train"))
    add = parser.add_argument
    add("--shape", default="384,768,16,2", help="dispatch: D,H,E,K (%(default)s)")
    add("--tokens", type=int, default=2048, help="dispatch: T (%(default)s)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--backend", choices=("reference", "blocked", "capacity"), help="dispatch: instead of auto")
    add("--config", default="configs/dsmoe_s.py", help="train: which config (%(default)s)")
    add("--repeats", type=int, default=11, help="runs of which the median counts (%(default)s)")
    add("--json", action="store_true", help="print one JSON object as last line")
    args, overrides = parser.parse_with_overrides(argv)
    if args.what == "dispatch":
        result = bench_dispatch(args.shape, args.tokens, args.dtype, args.backend, args.repeats)
    else:
        result = bench_train(args.config, overrides, args.repeats)
    result |= {
        "gemm_gflops": gemm_gflops(),
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "jax": jax.__version__,
    }
    for name, value in result.items():
        print(f"{name:<18}{value:.3f}" if isinstance(value, float) else f"{name:<18}{value}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
