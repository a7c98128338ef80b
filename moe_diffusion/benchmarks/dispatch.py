"""rho: what routing tokens to experts costs beyond the arithmetic of the experts.

    rho = time of (route + gather + experts + combine) / time of a dense MLP over as many rows (T K)

Both are SwiGLUs in the same dtype. They run in turn in one process, and medians are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_diffusion.benchmarks.rivals import rivals
from moe_diffusion.benchmarks.timing import medians, peak_bytes, peak_flops
from moe_diffusion.errors import UserError, first_line
from moe_diffusion.kernels import mlp
from moe_diffusion.moe.dispatch import choose_backend, dispatch
from moe_diffusion.moe.layer import Experts
from moe_diffusion.moe.routers import TokenChoice
from moe_diffusion.moe.routing import expert_load
from moe_diffusion.parallel.mesh import platform

# (D, H, E, K): those of diffusion models from DSMoE-S-E48 up to 3B, and one as in a large language
# model.
SHAPES = (
    (384, 128, 16, 1),
    (384, 192, 48, 5),
    (384, 768, 16, 2),
    (768, 384, 48, 5),
    (1024, 448, 48, 5),
    (1024, 2048, 16, 2),
    (3072, 4096, 16, 2),
)
ROUTINGS = ("uniform", "zipf")


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """ "384,768,16,2" -> (D, H, E, K). Raises UserError."""
    try:
        width, hidden, num_experts, top_k = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--shape {text!r} is not D,H,E,K like 384,768,16,2") from None
    if min(width, hidden, num_experts, top_k) < 1 or top_k > num_experts:
        raise UserError(f"--shape {text!r}: all must be positive, and K at most E")
    return width, hidden, num_experts, top_k


def bench_dispatch(
    shape: Sequence[int],
    *,
    tokens: int,
    dtype: str = "float32",
    backend: str | None = None,
    routing: str = "uniform",
    repeats: int = 11,
    compare: bool = False,
) -> dict[str, Any]:
    """Measures one shape (D, H, E, K): rho_fwd, rho_fwd_bwd, peak_bytes and more.

    routing: "uniform" takes a random gate on random tokens; "zipf" adds a preference for the first
    experts, like 1 / rank.
    compare: also measure other kernels, see `rivals`; a kernel that fails is named with its error.
    """
    width, hidden, num_experts, top_k = shape
    key = jax.random.key(0)
    x = jax.random.normal(key, (1, tokens, width), dtype)
    rows = jax.random.normal(key, (tokens * top_k, width), dtype)
    router, experts = TokenChoice(num_experts, top_k=top_k), Experts(num_experts, hidden)
    gate, stacked = (nn.meta.unbox(m.init(key, a)) for m, a in ((router, x), (experts, width)))
    if routing == "zipf":
        # The first feature is 1 in every token, and its weights prefer expert e by 1 / (e + 1).
        x = x.at[..., 0].set(1)
        preference = -np.log(np.arange(1, num_experts + 1))
        kernel = gate["params"]["kernel"].at[0].set(preference)
        gate = {"params": {"kernel": kernel}}
    stacked = stacked["params"]
    single = {name: value[0].astype(dtype) for name, value in stacked.items()}

    def layer(x, gate, stacked, apply):
        chosen, _ = router.apply(gate, x)
        return apply(x, chosen, stacked)

    def dispatched(x, chosen, stacked):
        return dispatch(x, chosen, stacked, kind="swiglu", backend=backend)[0]

    def dense(x, single):
        return mlp.apply(x, single, "swiglu")

    ours = partial(layer, apply=dispatched)
    compiled = _compile({"dense": (dense, (rows, single)), "moe": (ours, (x, gate, stacked))})
    failures, others = {}, rivals() if compare else {}
    for name, apply in others.items():
        try:
            theirs = _compile({name: (partial(layer, apply=apply), (x, gate, stacked))})
            for function, args in theirs.values():
                jax.block_until_ready(function(*args))
            compiled |= theirs
        except Exception as error:  # other people's code may raise anything
            failures[name] = first_line(error)
    seconds = medians({name: partial(f, *args) for name, (f, args) in compiled.items()}, repeats)

    chosen, _ = router.apply(gate, x)
    load = expert_load(chosen, num_experts)
    flops = 18 * tokens * top_k * width * hidden  # three products, forward and twice backward
    peaks = {name: peak_bytes(compiled[f"{name}_fwd_bwd"][0]) for name in ("moe", "dense")}
    result = {
        "shape": ",".join(map(str, shape)),
        "tokens": tokens,
        "dtype": dtype,
        "routing": routing,
        "load_max": float(load.max() / load.mean()),
        "backend": choose_backend(platform(), chosen, dtype, dropout=False, name=backend)[0],
        "rho_fwd": seconds["moe_fwd"] / seconds["dense_fwd"],
        "rho_fwd_bwd": seconds["moe_fwd_bwd"] / seconds["dense_fwd_bwd"],
        "peak_bytes": peaks["moe"],
        "peak_ratio": peaks["moe"] / peaks["dense"],
        "seconds_fwd_bwd": seconds["moe_fwd_bwd"],
        "roofline": flops / peak_flops(dtype) / seconds["moe_fwd_bwd"],
    }
    for name in others.keys() - failures.keys():
        ratio = seconds[f"{name}_fwd_bwd"] / seconds["dense_fwd_bwd"]
        result[f"rho_fwd_bwd_{name}"] = ratio
    return result | {f"failed_{name}": message for name, message in failures.items()}


def _compile(functions: dict[str, tuple[Callable, tuple]]) -> dict[str, tuple[Any, tuple]]:
    """Compiles each function twice: forward, and forward + backward with a cotangent like x."""
    compiled = {}
    for name, (function, args) in functions.items():

        def both(cotangent, *args, function=function):
            y, pull = jax.vjp(function, *args)
            return y, pull(cotangent)

        compiled[f"{name}_fwd"] = (jax.jit(function).lower(*args).compile(), args)
        args = (jnp.ones_like(args[0]), *args)
        compiled[f"{name}_fwd_bwd"] = (jax.jit(both).lower(*args).compile(), args)
    return compiled
