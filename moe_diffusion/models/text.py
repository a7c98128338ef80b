"""Text encoders of FLUX.1: the text half of CLIP and the encoder of T5 v1.1, in inference.

Both are pre-norm transformers over the tokens of a prompt. The stream between the blocks is f32,
whatever `dtype` is: T5's activations exceed the range of fp16 and the steps of bf16.

| network    | attention                                | MLP          | norm             | result |
|------------|------------------------------------------|--------------|------------------|--------|
| `CLIPText` | causal, scale 1 / sqrt(d), biases        | quick GELU   | LayerNorm, 1e-5  | pooled |
| `T5Encoder`| all to all, no scale, position bias      | gated GELU   | RMSNorm, 1e-6    | tokens |

Sources: CLIP (Radford et al., 2103.00020, section 2.4), T5 (Raffel et al., 1910.10683, section 2.1)
and T5 v1.1 (Shazeer, 2002.05202: GEGLU). `interop.text` reads their published weights.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from moe_diffusion.models.blocks import Dtype, Norm, linear, parameter
from moe_diffusion.models.stack import Network, Stack
from moe_diffusion.parallel import mesh as meshes
from moe_diffusion.parallel import rules

PROMPTS_AT_ONCE = 4  # on a device; every batch is padded to it, so that there is one program
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
_TOKENS = nn.initializers.normal(0.02)


class TextAttention(nn.Module):
    """Multi-head self-attention of a text encoder, [B, L, D] -> [B, L, D]; softmax in f32.

    Attributes:
      scale: multiplies the queries.
    """

    num_heads: int
    head_dim: int
    scale: float
    use_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x, bias):
        """bias: f32, added to the scores; it broadcasts to [B, heads, L (queries), L (keys)]."""
        make = partial(linear, dtype=self.dtype, use_bias=self.use_bias)
        heads = (3, self.num_heads, self.head_dim)
        qkv = make(heads, ("embed", None, "heads", None), name="qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        scores = jnp.einsum(
            "bqhd,bkhd->bhqk", q * self.scale, k, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(scores + bias).astype(v.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return make(x.shape[-1], ("heads", None, "embed"), name="proj", contract=2)(out)


class TextMLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) if it is gated; [.., D] -> [.., D]."""

    hidden_size: int
    act: str
    gated: bool
    use_bias: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        make = partial(linear, dtype=self.dtype, use_bias=self.use_bias)
        hidden = make(self.hidden_size, ("embed", "mlp"), name="up")(x)
        if self.gated:
            gate = make(self.hidden_size, ("embed", "mlp"), name="gate")(x)
            hidden *= ACTIVATIONS[self.act](gate)
        else:
            hidden = ACTIVATIONS[self.act](hidden)
        return make(x.shape[-1], ("mlp", "embed"), name="down")(hidden)


class TextBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), in x's dtype."""

    make_norm: Callable[..., Norm]
    make_attention: Callable[..., TextAttention]
    make_mlp: Callable[..., TextMLP]
    dtype: Dtype

    @nn.compact
    def __call__(self, x, bias):
        h = self.make_norm(name="norm1")(x).astype(self.dtype)
        x += self.make_attention(name="attn")(h, bias).astype(x.dtype)
        h = self.make_norm(name="norm2")(x).astype(self.dtype)
        return x + self.make_mlp(name="mlp")(h).astype(x.dtype)


class EncoderNetwork(Network, kw_only=True):
    """What encoders of texts and of pictures share: sizes, the stack and the last norm."""

    hidden_size: int
    mlp_hidden_size: int
    depth: int
    num_heads: int
    head_dim: int
    eps: float
    act: str
    preset: str | None = "fsdp"

    parts = {"positions": "embedders", "final_norm": "norms"}
    layer_parts = {"attn": "attention", "mlp": "dense ffn", "norm1": "norms", "norm2": "norms"}
    kind = "text"  # of the blocks
    norm = "layernorm_affine"
    gated = False
    use_bias = True

    @property
    def scale(self) -> float:
        """What the queries are multiplied with."""
        return self.head_dim**-0.5

    @property
    def stack(self) -> Stack:
        options = {"use_bias": self.use_bias, "dtype": self.dtype}
        block = partial(
            TextBlock,
            partial(Norm, self.norm, self.eps),
            partial(TextAttention, self.num_heads, self.head_dim, self.scale, **options),
            partial(TextMLP, self.mlp_hidden_size, self.act, self.gated, **options),
            self.dtype,
        )
        return Stack((self.kind,) * self.depth, lambda kind: block)

    @nn.nowrap
    def table(self, name: str, rows: int) -> jax.Array:
        """A table of `rows` vectors, [rows, D]; for use in `__call__`."""
        return parameter(self, name, _TOKENS, (None, "embed"), (rows, self.hidden_size))

    @nn.nowrap
    def layers(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """The blocks and the norm after them, f32[B, L, D]; for use in `__call__`."""
        x, _ = self.stack(x, bias)
        return Norm(self.norm, self.eps, name="final_norm")(x)


class TextNetwork(EncoderNetwork, kw_only=True):
    """What both encoders of texts share: a table of tokens.

    `field` names the field of a condition that `encode(ids, mask)` computes.
    """

    vocab_size: int

    parts = EncoderNetwork.parts | {"tokens": "embedders", "position_bias": "embedders"}
    field = ""

    @nn.nowrap
    def embed(self, ids: jax.Array) -> jax.Array:
        """The vectors of tokens, f32[B, L, D]; for use in `__call__`."""
        table = self.table("tokens", self.vocab_size)
        return jnp.take(table, ids, axis=0, mode="clip").astype(jnp.float32)

    @nn.nowrap
    def abstract_params(self) -> dict[str, Any]:
        """Shapes and dtypes of the parameters, boxed with their logical axes."""
        ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        return jax.eval_shape(self.init, jax.random.key(0), ids)["params"]


class CLIPText(TextNetwork, kw_only=True):
    """CLIP's text encoder: ids i32[B, L <= max_length] -> states f32[B, L, D] after the last norm.

    Attributes:
      eos_id: the token that ends a prompt. None takes the largest id of a prompt for it, as the
        first published configs (eos_token_id = 2) mean it.
    """

    max_length: int = 77
    eos_id: int | None = None
    eps: float = 1e-5
    act: str = "quick_gelu"

    field = "pooled"

    @nn.compact
    def __call__(self, ids, mask=None):
        """mask bool[B, L]: which tokens are seen; FLUX has None, so padding is seen, too."""
        length = ids.shape[1]
        x = self.embed(ids)
        x += self.table("positions", self.max_length)[:length]
        seen = np.tril(np.ones((length, length), bool))[None, None]
        return self.layers(x, _penalty(seen, mask))

    @nn.nowrap
    def encode(self, params: Any, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The state f32[B, D] of each prompt at its end, the first eos."""
        return self.pooled(self.apply({"params": params}, ids, mask), ids)

    @nn.nowrap
    def pooled(self, states: jax.Array, ids: jax.Array) -> jax.Array:
        """Of the states f32[B, L, D] those at the ends, f32[B, D]."""
        ends = (ids if self.eos_id is None else ids == self.eos_id).argmax(-1)
        return jnp.take_along_axis(states, ends[:, None, None], axis=1)[:, 0]


class T5Encoder(TextNetwork, kw_only=True):
    """The encoder of T5 v1.1: ids i32[B, L] -> states f32[B, L, D] after the last norm.

    Attributes:
      buckets, max_distance: of the position bias; see `relative_buckets`.
    """

    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    act: str = "gelu_tanh"

    norm = "rmsnorm"
    gated = True
    use_bias = False
    scale = 1.0
    field = "text"

    @nn.compact
    def __call__(self, ids, mask=None):
        """mask bool[B, L]: which tokens are seen; FLUX has None, so padding is seen, too."""
        x = self.embed(ids)
        shape = (self.buckets, self.num_heads)
        table = parameter(self, "position_bias", _TOKENS, (None, "heads"), shape)
        buckets = relative_buckets(ids.shape[1], self.buckets, self.max_distance)
        bias = table.astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]
        return self.layers(x, bias + _penalty(np.ones((1, 1, 1, 1), bool), mask))

    @nn.nowrap
    def encode(self, params: Any, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The states f32[B, L, D] of all positions, padding included."""
        return self.apply({"params": params}, ids, mask)


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """The bucket i32[L, L] of key j as query i sees it (T5, 1910.10683, section 2.1).

    Half of the buckets serve keys that come later. Within a half, the first half of the buckets is
    one for each distance; the others grow logarithmically up to `max_distance`, and the last one
    holds all that is farther.
    """
    ahead = np.arange(length)[None] - np.arange(length)[:, None]
    half = buckets // 2
    exact, distance = half // 2, np.abs(ahead)
    growth = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.log(
        max_distance / exact
    )
    far = exact + (growth.astype(np.float32) * (half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return (bucket + half * (ahead > 0)).astype(np.int32)


def _penalty(seen: np.ndarray, mask: jax.Array | None) -> jax.Array:
    """f32, 0 where a key is seen and else the lowest number: all scores masked means all equal."""
    seen = jnp.asarray(seen)
    if mask is not None:
        seen &= mask[:, None, None, :]
    return jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)


def fingerprint_of(params: Mapping[str, Any]) -> str:
    """16 hex digits of a hash of the weights, whatever file and dtype they came from."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        digest.update(path.encode())
        for row in np.atleast_1d(leaf):  # row by row: the f32 copy of a large table is 0.5 GB
            digest.update(np.ascontiguousarray(row, np.float32))
    return digest.hexdigest()[:16]


class TextEncoder:
    """A network with its weights, as the rest of the library uses it.

    This process's devices share the prompts, and each keeps a part of the weights, as the preset of
    the network says. They are placed on the first call; `release` frees them.
    """

    def __init__(self, network: CLIPText | T5Encoder, params: Mapping[str, Any], name: str = ""):
        self.network = network
        self.params = params
        self.name = name

    def encode(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Ids i32[B, L] -> f32[B, D] (CLIP: pooled) or f32[B, L, D] (T5: all positions).

        mask: bool[B, L], which tokens are seen; None: all of them, as FLUX has it.
        """
        chunk, parts = self._mesh.size * PROMPTS_AT_ONCE, []
        for start in range(0, len(ids), chunk):
            inputs = [ids] if mask is None else [ids, mask]
            inputs = [x[start : start + chunk] for x in inputs]
            padded = [np.pad(x, [(0, chunk - len(x)), (0, 0)], mode="edge") for x in inputs]
            with jax.set_mesh(self._mesh):
                placed = jax.device_put(padded, self._split)
                parts.append(np.asarray(self._encode(self._placed, *placed))[: len(inputs[0])])
        return np.concatenate(parts)

    def release(self) -> None:
        """Frees the weights on the devices; the next call places them again."""
        self.__dict__.pop("_placed", None)

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `fingerprint_of`."""
        return fingerprint_of(self.params)

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        # Of this process's devices alone: the mesh of a training run has those of all hosts.
        return meshes.make_mesh(SimpleNamespace(preset="fsdp"), jax.local_devices())

    @property
    def _split(self) -> NamedSharding:
        return rules.batch_sharding(self._mesh)

    @functools.cached_property
    def _placed(self) -> Any:
        axes = nn.get_partition_spec(self.network.abstract_params())
        table = rules.PRESETS[self.network.preset or "dp"].params
        layout = rules.shardings_of(self._mesh, table, dict(self.params), axes)
        return jax.device_put(dict(self.params), layout)

    @functools.cached_property
    def _encode(self) -> Any:
        return jax.jit(self.network.encode, out_shardings=self._split)
