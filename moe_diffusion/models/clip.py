"""CLIP: a tower for pictures and one for texts, whose vectors are near where the two fit together.

The tower of texts is `text.CLIPText`. That of pictures is a vision transformer (Radford et al.,
2103.00020, section 2.4) of the same blocks: patches without a bias, a token of its own for the
class, learned positions, a norm before the blocks, and one after them, of which the class token is
taken. A projection of each tower leads into the common space. `interop.clip` reads published
weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_diffusion.models.blocks import Norm, linear, parameter, patchify
from moe_diffusion.models.stack import Block, Network
from moe_diffusion.models.text import CLIPText, EncoderNetwork, fingerprint_of

AT_ONCE = 16  # pictures or texts on a device, at most; padded to a power of 2, for few programs
_CLASS = nn.initializers.normal(0.02)
_LOGIT_SCALE = 2.6592  # of CLIP before training: log(1 / 0.07)


class CLIPImage(EncoderNetwork, kw_only=True):
    """CLIP's vision transformer: pictures f32[B, side, side, C] -> f32[B, D], the class token.

    Attributes:
      side: pixels of a picture's side.
      patch: pixels of a patch's side.
    """

    side: int
    patch: int
    channels: int = 3
    eps: float = 1e-5
    act: str = "quick_gelu"

    parts = EncoderNetwork.parts | {"patches": "embedders", "class_token": "embedders"}
    parts |= {"first_norm": "norms"}
    kind = "image"

    @nn.compact
    def __call__(self, pictures):
        """pictures: normalized as `Preprocessing` does it."""
        tokens = patchify(pictures.astype(jnp.float32), self.patch)
        make = linear(self.hidden_size, (None, "embed"), dtype=self.dtype, use_bias=False,
            name="patches")  # fmt: skip
        x = make(tokens).astype(jnp.float32)
        own = parameter(self, "class_token", _CLASS, ("embed",), (self.hidden_size,))
        own = jnp.broadcast_to(own.astype(jnp.float32), (len(x), 1, self.hidden_size))
        x = jnp.concatenate([own, x], axis=1)
        x += self.table("positions", x.shape[1])
        x = Norm(self.norm, self.eps, name="first_norm")(x)
        return self.layers(x, jnp.zeros((1, 1, 1, 1)))[:, 0]


class CLIP(Network, kw_only=True):
    """Both towers and their projections.

    Attributes:
      size: of the vectors of the common space, P.
    """

    text: CLIPText
    image: CLIPImage
    size: int
    preset: str | None = "dp"

    def setup(self):
        make = {"axes": ("embed", None), "dtype": self.dtype, "use_bias": False}
        self.text_projection = linear(self.size, **make)
        self.image_projection = linear(self.size, **make)
        scale = nn.initializers.constant(_LOGIT_SCALE)
        self.logit_scale = parameter(self, "logit_scale", scale, (), ())

    def __call__(self, ids, pictures):
        """The vectors of texts and of pictures, f32[B, P] each."""
        return self.of_texts(ids), self.of_pictures(pictures)

    def of_texts(self, ids):
        """i32[B, L] -> f32[B, P]."""
        pooled = self.text.pooled(self.text(ids), ids)
        return self.text_projection(pooled).astype(jnp.float32)

    def of_pictures(self, pictures):
        """f32[B, side, side, C] -> f32[B, P]."""
        return self.image_projection(self.image(pictures)).astype(jnp.float32)

    @property
    def patch_size(self) -> int:
        """Pixels of a patch's side, for the layout of its kernel in files."""
        return self.image.patch

    @nn.nowrap
    def blocks(self) -> tuple[Block, ...]:
        """Those of the texts, of kind "text", and then those of the pictures, "image"."""
        return tuple(
            block._replace(path=f"{name}/{block.path}")
            for name in ("text", "image")
            for block in getattr(self, name).blocks()
        )

    @nn.nowrap
    def abstract_params(self) -> dict[str, Any]:
        """Shapes and dtypes of the parameters, boxed with their logical axes."""
        shape = (1, self.image.side, self.image.side, self.image.channels)
        inputs = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.eval_shape(self.init, jax.random.key(0), *inputs)["params"]


class Preprocessing(NamedTuple):
    """How a picture becomes what the tower sees; the defaults are those of OpenAI's CLIPs.

    Attributes:
      shortest: pixels to which the shorter side is resized, bicubic.
      crop: pixels of each side of the square that is cut out of the middle.
      mean, std: of the red, green and blue of values in [0, 1].
    """

    shortest: int = 224
    crop: int = 224
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """u8[B, H, W, 1 or 3] -> f32[B, crop, crop, 3]."""
        return np.stack([self._one(picture) for picture in pixels])

    def _one(self, pixels: np.ndarray) -> np.ndarray:
        from PIL import Image

        picture = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
        width, height = picture.size
        shorter = min(width, height)
        # The longer side is cut to a whole number, as published preprocessors do it.
        sides = [self.shortest * side // shorter for side in (width, height)]
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
        # A square that is larger than the picture has black beside it.
        left, top = ((side - self.crop) // 2 for side in sides)
        picture = picture.crop((left, top, left + self.crop, top + self.crop))
        values = np.asarray(picture, np.float32) / np.float32(255)
        return (values - np.float32(self.mean)) / np.float32(self.std)


class CLIPEncoder:
    """A CLIP with its weights and what reads its inputs.

    This process's devices share the inputs, and each holds all weights, which are placed on the
    first call.

    Args:
      network, params: the model.
      tokenize: (texts, length) -> i32[B, length].
      preprocess: pictures u8[B, H, W, C] -> what the network takes.
      name: of the folder or file.
    """

    def __init__(
        self,
        network: CLIP,
        params: Mapping[str, Any],
        tokenize: Any,
        preprocess: Preprocessing,
        name: str = "",
    ):
        self.network, self.params, self.name = network, params, name
        self.preprocess, self._tokenize = preprocess, tokenize

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors f32[B, P] of length 1. A text that is too long is cut; stderr says so."""
        ids = self._tokenize(list(texts), self.network.text.max_length)
        return self._chunked("of_texts", ids)

    def of_pictures(self, pixels: np.ndarray) -> np.ndarray:
        """Vectors f32[B, P] of length 1, of u8[B, H, W, 1 or 3]."""
        return self._chunked("of_pictures", pixels, self.preprocess)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of the weights, whatever file and dtype they came from."""
        return fingerprint_of(self.params)

    def _chunked(self, method: str, rows: np.ndarray, prepare: Any = lambda x: x) -> np.ndarray:
        share = 1 << (-(-len(rows) // self._mesh.size) - 1).bit_length()
        chunk, parts = self._mesh.size * min(AT_ONCE, share), []
        split = NamedSharding(self._mesh, PartitionSpec("rows"))
        for start in range(0, len(rows), chunk):
            part = prepare(rows[start : start + chunk])
            padded = np.pad(part, [(0, chunk - len(part))] + [(0, 0)] * (part.ndim - 1), "edge")
            found = self._functions[method](self._placed, jax.device_put(padded, split))
            parts.append(np.asarray(found)[: len(part)])
        found = np.concatenate(parts).astype(np.float32)
        return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)

    @functools.cached_property
    def _functions(self) -> dict[str, Any]:
        def apply(method: str, params: Any, rows: jax.Array) -> jax.Array:
            return self.network.apply({"params": params}, rows, method=method)

        names = ("of_texts", "of_pictures")
        return {name: jax.jit(functools.partial(apply, name)) for name in names}

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(jax.local_devices()), ("rows",))  # of this process alone

    @functools.cached_property
    def _placed(self) -> Any:
        return jax.device_put(dict(self.params), NamedSharding(self._mesh, PartitionSpec()))
