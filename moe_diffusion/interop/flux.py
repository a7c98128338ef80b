"""Key maps and hyperparameters of FLUX.1, in the layout of its authors and in that of diffusers.

`flux` is flux1-dev.safetensors and flux1-schnell.safetensors, `flux_diffusers` the folder
`transformer/` of a pipeline. Both hold the same numbers under other names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import ml_collections

from moe_diffusion.errors import UserError
from moe_diffusion.interop.dit import linear
from moe_diffusion.interop.hparams import fill, without_default
from moe_diffusion.interop.rows import (
    FLAT,
    HEADS_IN,
    HEADS_OUT,
    LINEAR,
    SAME,
    Family,
    Layout,
    Row,
    Slice,
)
from moe_diffusion.interop.shapes import Shapes, numbers
from moe_diffusion.models.flux import PATCH
from moe_diffusion.reading import Key

# --- names ---------------------------------------------------------------------------------------


def _channels_first(w):
    """Axis 0 of (row, column, C) as one of (C, row, column): FLUX packs a latent's pixels so."""
    return w.reshape(PATCH * PATCH, -1, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)


def _channels_last(w):
    return w.reshape(-1, PATCH * PATCH, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)


PACKED_IN = Layout(lambda w, m: _channels_first(w).T, lambda w, s: _channels_last(w.T))
# Their axis 0 is our last one; a bias has no other.
PACKED_OUT = Layout(lambda w, m: _channels_first(w.T), lambda w, s: _channels_last(w).T)

_B = "params/{block}"


def _embed(torch: str, ours: str, first: str, second: str) -> tuple[Row, ...]:
    """The rows of a `VectorEmbed`."""
    names = ((first, "dense_0"), (second, "dense_1"))
    return tuple(row for a, b in names for row in linear(f"{torch}.{a}", f"params/{ours}/{b}"))


def _norms(query: str, key: str, ours: str, kind: str) -> tuple[Row, ...]:
    """The rows of the norms of queries and keys."""
    pairs = ((query, "q_norm"), (key, "k_norm"))
    return tuple(Row(name, f"{ours}/{norm}/scale", SAME, kind=kind) for name, norm in pairs)


def _separate(names: Iterable[str], ours: str, kind: str) -> tuple[Row, ...]:
    """The rows of queries, keys and values, three layers that are one of ours."""
    return tuple(
        row
        for number, name in enumerate(names)
        for row in (
            Row(f"{name}.weight", f"{ours}/kernel", HEADS_OUT, part=Slice(1, number, 1), kind=kind),
            Row(f"{name}.bias", f"{ours}/bias", FLAT, part=Slice(0, number, 1), kind=kind),
        )
    )


def _outputs(torch: str) -> tuple[Row, ...]:
    """The rows of a single block's last layer, whose inputs are those of our two, side by side."""
    return (
        Row(f"{torch}.weight", f"{_B}/attn/proj/kernel", HEADS_IN, along=1, kind="single"),
        Row(f"{torch}.weight", f"{_B}/mlp/down/kernel", LINEAR, along=1, kind="single"),
        Row(f"{torch}.bias", f"{_B}/attn/proj/bias", SAME, kind="single"),
    )


def _native_stream(torch: str, ours: str) -> tuple[Row, ...]:
    """The rows of one stream of the double blocks, "img" or "txt"."""
    torch, ours, norm = f"double_blocks.{{i}}.{torch}", f"{_B}/{ours}", "_attn.norm"
    row = partial(linear, kind="double")
    names = (f"{torch}{norm}.{name}_norm.scale" for name in ("query", "key"))
    return (
        *row(f"{torch}_mod.lin", f"{ours}_adaLN"),
        *row(f"{torch}_attn.qkv", f"{ours}_attn/qkv", HEADS_OUT, FLAT),
        *_norms(*names, f"{ours}_attn", "double"),
        *row(f"{torch}_attn.proj", f"{ours}_attn/proj", HEADS_IN),
        *row(f"{torch}_mlp.0", f"{ours}_mlp/up"),
        *row(f"{torch}_mlp.2", f"{ours}_mlp/down"),
    )


_SINGLE = "single_blocks.{i}"
NATIVE = (
    *linear("img_in", "params/patch_embed", PACKED_IN),
    *linear("txt_in", "params/text_embed"),
    *_embed("time_in", "time_embed", "in_layer", "out_layer"),
    *_embed("vector_in", "pooled_embed", "in_layer", "out_layer"),
    *_embed("guidance_in", "guidance_embed", "in_layer", "out_layer"),
    *_native_stream("img", "image"),
    *_native_stream("txt", "text"),
    *linear(f"{_SINGLE}.modulation.lin", f"{_B}/adaLN", kind="single"),
    # linear1 joins qkv and the MLP's first layer along its outputs.
    *linear(f"{_SINGLE}.linear1", f"{_B}/attn/qkv", HEADS_OUT, FLAT, along=0, kind="single"),
    *linear(f"{_SINGLE}.linear1", f"{_B}/mlp/up", along=0, kind="single"),
    *_norms(
        f"{_SINGLE}.norm.query_norm.scale",
        f"{_SINGLE}.norm.key_norm.scale",
        f"{_B}/attn",
        "single",
    ),
    *_outputs(f"{_SINGLE}.linear2"),
    *linear("final_layer.adaLN_modulation.1", "params/final/adaLN"),
    *linear("final_layer.linear", "params/final/linear", PACKED_OUT, PACKED_OUT),
)


def _diffusers_stream(ours: str, norm: str, heads: str, scales: str, out: str, mlp: str):
    """The rows of one stream of the double blocks; `heads` and `scales` are names of q, k and v."""
    torch, ours = "transformer_blocks.{i}.", f"{_B}/{ours}"
    row = partial(linear, kind="double")
    return (
        *row(f"{torch}{norm}.linear", f"{ours}_adaLN"),
        *_separate((torch + heads.format(x) for x in "qkv"), f"{ours}_attn/qkv", "double"),
        *_norms(*(torch + scales.format(x) for x in "qk"), f"{ours}_attn", "double"),
        *row(f"{torch}{out}", f"{ours}_attn/proj", HEADS_IN),
        *row(f"{torch}{mlp}.net.0.proj", f"{ours}_mlp/up"),
        *row(f"{torch}{mlp}.net.2", f"{ours}_mlp/down"),
    )


def _width(model):
    return model.hidden_size


def _scale_then_shift(torch: str, ours: str) -> tuple[Row, ...]:
    """The rows of a modulation that diffusers stores as scale, shift; ours is shift, scale."""
    return tuple(
        row
        for start in (_width, 0)
        for row in (
            Row(f"{torch}.weight", f"{ours}/kernel", LINEAR, part=Slice(1, start, _width), along=0),
            Row(f"{torch}.bias", f"{ours}/bias", SAME, part=Slice(0, start, _width), along=0),
        )
    )


_JOINED = "single_transformer_blocks.{i}"
_VECTORS = "time_text_embed"
_DIFFUSERS = (
    *linear("x_embedder", "params/patch_embed", PACKED_IN),
    *linear("context_embedder", "params/text_embed"),
    *_embed(f"{_VECTORS}.timestep_embedder", "time_embed", "linear_1", "linear_2"),
    *_embed(f"{_VECTORS}.text_embedder", "pooled_embed", "linear_1", "linear_2"),
    *_embed(f"{_VECTORS}.guidance_embedder", "guidance_embed", "linear_1", "linear_2"),
    *_diffusers_stream(
        "image", "norm1", "attn.to_{}", "attn.norm_{}.weight", "attn.to_out.0", "ff"
    ),
    *_diffusers_stream(
        *("text", "norm1_context", "attn.add_{}_proj", "attn.norm_added_{}.weight"),
        *("attn.to_add_out", "ff_context"),
    ),
    *linear(f"{_JOINED}.norm.linear", f"{_B}/adaLN", kind="single"),
    *_separate((f"{_JOINED}.attn.to_{x}" for x in "qkv"), f"{_B}/attn/qkv", "single"),
    *_norms(*(f"{_JOINED}.attn.norm_{x}.weight" for x in "qk"), f"{_B}/attn", "single"),
    *linear(f"{_JOINED}.proj_mlp", f"{_B}/mlp/up", kind="single"),
    *_outputs(f"{_JOINED}.proj_out"),
    *_scale_then_shift("norm_out.linear", "params/final/adaLN"),
    *linear("proj_out", "params/final/linear", PACKED_OUT, PACKED_OUT),
)

# --- hyperparameters -----------------------------------------------------------------------------

# The fields of FluxParams, flux/model.py.
_THETA = 10_000
_COUNT = Key((int,), least=1, most=1 << 20)
_AXIS = Key((int,), least=2, most=1 << 12)
PARAMS = {
    "in_channels": _COUNT,
    "out_channels": Key((int, type(None)), None, least=1, most=1 << 20),  # null: as in_channels
    "vec_in_dim": _COUNT,
    "context_in_dim": _COUNT,
    "hidden_size": _COUNT,
    "mlp_ratio": Key((float,), 4.0, least=1e-3, most=1e3),
    "num_heads": _COUNT,
    "depth": _COUNT,
    "depth_single_blocks": _COUNT,
    "axes_dim": Key((list,), least=3, most=3, items=_AXIS),
    "theta": Key((int,), _THETA),
    "qkv_bias": Key((bool,), True),
    "guidance_embed": Key((bool,)),
}
# The same in diffusers' config.json, which has the width of a head in place of the model's.
_RENAMED = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "vec_in_dim": "pooled_projection_dim",
    "context_in_dim": "joint_attention_dim",
    "num_heads": "num_attention_heads",
    "depth": "num_layers",
    "depth_single_blocks": "num_single_layers",
    "axes_dim": "axes_dims_rope",
    "guidance_embed": "guidance_embeds",
}
_CONFIG_JSON = {new: PARAMS[old] for old, new in _RENAMED.items()}
_CONFIG_JSON |= {"attention_head_dim": _COUNT, "patch_size": Key((int,), 1)}
# Published head width -> how its channels are shared by the three positions; shapes do not show it.
_AXES = {128: (16, 56, 56)}


def configure(hparams: Mapping[str, Any], config: ml_collections.ConfigDict) -> None:
    """Sets `config` (model, diffusion, sampling) to a FLUX.1 transformer.

    The size of images is no hyperparameter: it becomes 1024 x 1024 pixels, and the text 512 tokens,
    or 256 without guidance scale, as the authors sample. Other sizes take the same weights.

    Args:
      hparams: the fields of FluxParams.

    Raises:
      UserError: a key is unknown or lacking, a value cannot be, or an option is unknown here.
    """
    h = fill("FluxParams", PARAMS, hparams)
    channels, out = h["in_channels"], h["out_channels"] or h["in_channels"]
    for wrong, text in (
        (channels != out, f"in_channels {channels} is not out_channels {out}: an image condition"),
        (channels % PATCH**2, f"in_channels {channels} is no multiple of 4, a packed latent's"),
        (h["theta"] != _THETA, f"theta {h['theta']} ({_THETA} is the one of rope here)"),
        (not h["qkv_bias"], "qkv_bias false"),
    ):
        if wrong:
            raise UserError(f"{text}; this is not supported")
    config.model.update(
        architecture="flux",
        image_size=128,
        channels=channels // PATCH**2,
        patch_size=PATCH,
        mlp_ratio=float(h["mlp_ratio"]),
        qk_norm=True,
        time_scale=1000.0,
    )
    for name in ("hidden_size", "num_heads", "depth"):
        config.model[name] = h[name]
    config.model.router.name = "dense"
    config.model.flux.update(
        single_depth=h["depth_single_blocks"],
        rope_axes=tuple(h["axes_dim"]),
        text_tokens=512 if h["guidance_embed"] else 256,
        text_width=h["context_in_dim"],
        pooled_width=h["vec_in_dim"],
        guidance=h["guidance_embed"],
        text_dtype="bfloat16",  # as the authors run T5
    )
    config.diffusion.cond_dropout = 0.0
    config.sampling.update(sampler="euler", steps=28 if h["guidance_embed"] else 4, cfg=1.0)
    config.sampling.time_shift = "resolution" if h["guidance_embed"] else "none"


def configure_diffusers(hparams: Mapping[str, Any], config: ml_collections.ConfigDict) -> None:
    """The same as `configure` for the values of a transformer's config.json."""
    given = {key: value for key, value in hparams.items() if not key.startswith("_")}
    h = fill("config.json", _CONFIG_JSON, given)
    if h["patch_size"] != 1:
        raise UserError(f"patch_size {h['patch_size']} (on top of 2 x 2) is not supported")
    native = {old: h[new] for old, new in _RENAMED.items()}
    width = h["attention_head_dim"] * h["num_attention_heads"]
    configure({**native, "hidden_size": width}, config)


def from_shapes(shapes: Shapes) -> dict[str, Any]:
    """The fields of FluxParams that the shapes of a state dict show."""
    scale = "single_blocks.0.norm.query_norm.scale"
    found = _from_shapes(shapes, ("img_in", "txt_in", "vector_in.in_layer", "guidance_in"), scale)
    for name, kind in (("depth", "double"), ("depth_single_blocks", "single")):
        found[name] = len(numbers(rf"{kind}_blocks\.(\d+)\.", shapes))
    mlp = shapes.get("double_blocks.0.img_mlp.0.weight", ())
    return found | ({"mlp_ratio": mlp[0] / mlp[1]} if len(mlp) == 2 else {})


def diffusers_from_shapes(shapes: Shapes) -> dict[str, Any]:
    """The same as `from_shapes`, in the names of config.json."""
    scale = "single_transformer_blocks.0.attn.norm_q.weight"
    embedders = ("x_embedder", "context_embedder", f"{_VECTORS}.text_embedder.linear_1")
    found = _from_shapes(shapes, (*embedders, f"{_VECTORS}.guidance_embedder"), scale)
    found["depth"] = len(numbers(r"transformer_blocks\.(\d+)\.", shapes))
    found["depth_single_blocks"] = len(numbers(r"single_transformer_blocks\.(\d+)\.", shapes))
    width = found.pop("hidden_size", 0)
    named = {_RENAMED[name]: value for name, value in found.items()}
    if "num_heads" in found:
        named["attention_head_dim"] = width // found["num_heads"]
    return named


def _from_shapes(shapes: Shapes, embedders: tuple[str, ...], scale: str) -> dict[str, Any]:
    """What the embedders of image, text, pooled text and guidance and a norm's scale show."""
    image, text, pooled, guidance = embedders
    found: dict[str, Any] = {"guidance_embed": any(k.startswith(f"{guidance}.") for k in shapes)}
    for name, key in (("in_channels", image), ("context_in_dim", text), ("vec_in_dim", pooled)):
        weight = shapes.get(f"{key}.weight", ())
        if len(weight) == 2:
            found[name], found["hidden_size"] = weight[1], weight[0]
    head = shapes.get(scale, ())
    if len(head) == 1 and "hidden_size" in found:
        found["num_heads"] = found["hidden_size"] // head[0]
        found |= {"axes_dim": _AXES[head[0]]} if head[0] in _AXES else {}
    return found


FAMILIES = {
    "flux": Family(
        "flux",
        NATIVE,
        configure=configure,
        from_shapes=from_shapes,
        asked=tuple(without_default(PARAMS)),
    ),
    "flux_diffusers": Family(
        "flux_diffusers",
        _DIFFUSERS,
        configure=configure_diffusers,
        from_shapes=diffusers_from_shapes,
        asked=tuple(without_default(_CONFIG_JSON)),
        subfolder="transformer",
    ),
}
