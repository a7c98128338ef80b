"""What Dense2MoE's structure saves in time: experts in the place of an MLP, one of five blocks.

Forward, one sample, at the width of FLUX.1 (3072, 24 heads). By count the experts of FLUX.1-MoE-L
(2510.09094, section 4.1) take 3/8 of the MLP's time, and one of five blocks a fifth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from math import isqrt
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_diffusion import config as configs
from moe_diffusion.benchmarks.timing import medians
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.models.flux import PATCH, Flux
from moe_diffusion.models.mixture_of_blocks import make_layer
from moe_diffusion.models.stack import MEMBERS, Group, Stack

# Section 4.1: a shared expert of the width's size, 12 experts of a quarter of it, 2 to a token.
EXPERTS = {
    "router.name": "token_choice",
    "router.top_k": 2,
    "router.normalize": True,
    "moe.num_experts": 12,
    "moe.hidden_size": 768,
    "moe.mlp": "gelu",
    "moe.bias": True,
    "moe.shared_hidden_size": 3072,
    "moe.shared_mlp": "gelu",
    "moe.shared_bias": True,
    "moe.interleave": False,
}
GROUP = 5  # blocks, of which a sample passes one (section 4.1)
TEXT = 512  # tokens of a prompt, at most half of all


CASES = {
    "ffn": "experts instead of an MLP",
    "double": "a double block with experts, against one without",
    "single": "a single block with experts, against one without",
    "double-group": f"one of {GROUP} double blocks, against all",
    "single-group": f"one of {GROUP} single blocks, against all",
}


class Layers(nn.Module):
    """Layers as FLUX has them, (image, text) or tokens -> the same."""

    kinds: tuple[Any, ...]
    make: Callable[[Any], Callable[..., nn.Module]]

    @nn.compact
    def __call__(self, carry, c):
        return Stack(self.kinds, self.make)(carry, c)[0]


def bench_sparsity(
    case: str, *, tokens: int, dtype: str, repeats: int, **changes: Any
) -> dict[str, Any]:
    """Median seconds of the dense and the sparse structure of a case, in turn, and their ratio.

    Args:
      case: a name of `CASES`.
      tokens: of text and image together; up to half of them, at most `TEXT`, are the text's.
      changes: keys of the section `model`, for another size.
    """
    model = flux(tokens, dtype, changes)
    key, width = jax.random.key(0), model.hidden_size
    x, c = (jax.random.normal(key, shape, dtype) for shape in ((1, tokens, width), (1, width)))
    if case == "ffn":
        inputs = x, jnp.zeros(1, bool), False
        calls = {
            "dense": _call(model.make_mlp(), inputs),
            "sparse": _call(model.make_moe(), inputs),
        }
    else:
        kind, _, is_group = case.partition("-")
        double = x[:, model.text_tokens :], x[:, : model.text_tokens]
        inputs = (double if kind == "double" else x), c
        make = partial(make_layer, model.make_block, model.mixture, model.text_tokens, False)
        if is_group:
            calls = _group(kind, make, inputs)
        else:
            layers = {"dense": (kind,), "sparse": (f"{kind}_moe",)}
            calls = {name: _call(Layers(kinds, make), inputs) for name, kinds in layers.items()}
    seconds = medians(calls, repeats)
    return {
        "case": case,
        "tokens": tokens,
        "dtype": dtype,
        "seconds_dense": seconds["dense"],
        "seconds_sparse": seconds["sparse"],
        "ratio": seconds["sparse"] / seconds["dense"],
    }


def flux(tokens: int, dtype: str, changes: Mapping[str, Any]) -> Flux:
    """FLUX.1 [dev] with so many tokens and a layer of experts at hand."""
    text = min(TEXT, tokens // 2)
    image = tokens - text
    if text < 1:
        raise UserError(f"--tokens {tokens} leaves no text or no image: take at least 2")
    rows = max(n for n in range(1, isqrt(image) + 1) if image % n == 0)
    keys = EXPERTS | {
        "flux.text_tokens": text,
        "dtype": dtype,
        "param_dtype": dtype,
        "remat": "none",
        **changes,
    }
    overrides = [f"model.{key}={value}" for key, value in keys.items()]
    model = build(configs.load("configs/flux_dev.py", overrides).model)
    return model.clone(input_shape=(PATCH * rows, PATCH * (image // rows), model.input_shape[2]))


def _group(kind: str, make: Callable, inputs: tuple) -> dict[str, Callable]:
    """All blocks of a group one after the other, and one of them, with the same weights."""
    group = Layers((Group(kind, GROUP, 1),), make)
    params = _weights(group, inputs)

    def dense(params: Any, *inputs: Any) -> Any:
        members = params["layers_0"]["block_0"][MEMBERS]
        params = {"layers_0": {"block_0": jax.tree.map(lambda w: w.reshape(w.shape[1:]), members)}}
        return Layers((kind,) * GROUP, make).apply({"params": params}, *inputs)

    sparse = jax.jit(lambda params, *inputs: group.apply({"params": params}, *inputs))
    return {
        "dense": partial(jax.jit(dense), params, *inputs),
        "sparse": partial(sparse, params, *inputs),
    }


def _call(module: nn.Module, inputs: tuple) -> Callable[[], Any]:
    """The module, compiled, on weights of its own."""
    arrays = [x for x in inputs if not isinstance(x, bool)]
    rest = inputs[len(arrays) :]
    run = jax.jit(lambda params, *arrays: module.apply({"params": params}, *arrays, *rest))
    return partial(run, _weights(module, inputs), *arrays)


def _weights(module: nn.Module, inputs: tuple) -> Any:
    """Weights in the dtype of the inputs; large ones cheaper than at random."""
    dtype = jax.tree.leaves(inputs)[0].dtype
    init = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))

    @partial(jax.jit, static_argnums=0)
    def fill(shape: tuple[int, ...], scale: float) -> jax.Array:
        numbers = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
        return (scale * jnp.sin(12.9898 * numbers)).astype(dtype)

    return jax.tree.map(lambda w: fill(w.shape, 0.02), nn.meta.unbox(init)["params"])
