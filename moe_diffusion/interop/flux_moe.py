"""Dense2MoE's FLUX.1-MoE (2510.09094): key map and hyperparameters.

Nobody has published such weights, so the layout is ours: it extends FLUX.1's own names by experts,
compressed adaLN and groups of blocks. docs/checkpoints.md lists names, shapes and formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from moe_diffusion.errors import UserError
from moe_diffusion.interop import flux
from moe_diffusion.interop.dit import linear
from moe_diffusion.interop.hparams import fill, without_default
from moe_diffusion.interop.rows import FLAT, HEADS_IN, HEADS_OUT, LINEAR, SAME, Family, Row
from moe_diffusion.interop.shapes import Shapes, first, numbers
from moe_diffusion.models.flux import PATCH
from moe_diffusion.reading import Key

# --- names ---------------------------------------------------------------------------------------

# Dense blocks and those with experts are counted together.
_KINDS = {"double": ("double", "double_moe"), "single": ("single", "single_moe")}
_B = "params/{block}"
_SINGLE = "single_blocks.{i}"
_DENSE = f"{_B}/mlp/up/kernel"  # of a single block, whose linear1 and linear2 have the MLP in them


def _as_flux(row: Row) -> Row:
    joined = row.torch.startswith((f"{_SINGLE}.linear1", f"{_SINGLE}.linear2"))
    return row._replace(kind=_KINDS.get(row.kind), needs=_DENSE if joined else row.needs)


def _moe(torch: str, ours: str, kind: tuple[str, ...]) -> tuple[Row, ...]:
    """The rows of the experts in the place of an MLP."""
    rows = [Row(f"{torch}.gate.weight", f"{ours}/router/kernel", LINEAR, kind=kind)]
    for name, part in (("0", "up"), ("2", "down")):
        rows += linear(f"{torch}.shared.{name}", f"{ours}/shared/{part}", kind=kind)
        expert = f"{torch}.experts.{{e}}.{name}"
        rows.append(Row(f"{expert}.weight", f"{ours}/experts/{part}", LINEAR, kind=kind))
        rows.append(Row(f"{expert}.bias", f"{ours}/experts/{part}_bias", SAME, kind=kind))
    return tuple(rows)


def _compressed(torch: str, ours: str, kind: tuple[str, ...]) -> tuple[Row, ...]:
    """The rows of a modulation of two layers; the first may be shared by all blocks."""
    return (
        Row(f"{torch}.down.weight", f"{ours}/down/kernel", LINEAR, kind=kind),
        *linear(f"{torch}.up", f"{ours}/up", kind=kind),
    )


def _stream(torch: str, ours: str) -> tuple[Row, ...]:
    """What one stream of the double blocks has besides FLUX.1's rows."""
    torch, ours, kind = f"double_blocks.{{i}}.{torch}", f"{_B}/{ours}", _KINDS["double"]
    return _moe(f"{torch}_moe", f"{ours}_moe", kind) + _compressed(
        f"{torch}_mod", f"{ours}_adaLN", kind
    )


_alone = partial(linear, kind=_KINDS["single"], unless=_DENSE)
_ROWS = (
    *map(_as_flux, flux.NATIVE),
    Row("adaLN_down.weight", "params/adaLN_down/kernel", LINEAR),
    *_stream("img", "image"),
    *_stream("txt", "text"),
    *_alone(f"{_SINGLE}.attn.qkv", f"{_B}/attn/qkv", HEADS_OUT, FLAT),
    *_alone(f"{_SINGLE}.attn.proj", f"{_B}/attn/proj", HEADS_IN),
    *_moe(f"{_SINGLE}.moe", f"{_B}/moe", _KINDS["single"]),
    *_compressed(f"{_SINGLE}.modulation", f"{_B}/adaLN", _KINDS["single"]),
    *(
        Row(f"{name}_groups.{{g}}.router.{x}.weight", f"{_B}/block_router/{x}", LINEAR, kind=kind)
        for name, kind in _KINDS.items()
        for x in "xy"
    ),
)

# --- hyperparameters -----------------------------------------------------------------------------

_SIZE = Key((int,), least=1, most=1 << 20)
_TABLE = Key((dict, type(None)), None)
# The fields of FluxParams, and keys of the section `model` of a config under their names there.
_PARAMS = flux.PARAMS | {
    "adaln_rank": Key((int,), 0, least=0, most=1 << 20),
    "adaln_shared": False,
    "moe": _TABLE,  # null: MLPs in all blocks
    "router": _TABLE,  # of the experts
    "mob": _TABLE,  # null: no groups
}
_MOE = {
    "num_experts": Key((int,), least=0, most=1 << 14),
    "hidden_size": _SIZE,
    "shared_hidden_size": Key((int,), least=0, most=1 << 20),
    "bias": True,
    "shared_bias": True,
    "interleave": False,
    "skip_first": Key((int,), 0, least=0, most=1 << 20),
}
_ROUTER = {"top_k": Key((int,), least=0, most=1 << 14), "normalize": True}
_ROUTER |= {"normalize_one": False, "scores": "softmax", "scale": 1.0}
_MOB = {
    "groups": Key((list,), least=1, most=1 << 12, items=Key((str,))),
    "active": _SIZE,
    "select": "topk",
    "pool": "tokens",
    "normalize": False,
    "alpha": 0.5,
}


def configure(hparams: Mapping[str, Any], config: ConfigDict) -> None:
    """Sets `config` (model, diffusion, sampling) to a FLUX.1 with experts or groups of blocks.

    Args:
      hparams: `_PARAMS`. Experts are MLPs with GELU (tanh), as FLUX.1's own.

    Raises:
      UserError: a key is unknown or lacking, or a value cannot be.
    """
    h = fill("flux_moe", _PARAMS, hparams)
    flux.configure({name: h[name] for name in flux.PARAMS}, config)
    config.model.update(adaln_rank=h["adaln_rank"], adaln_shared=h["adaln_shared"])
    if h["moe"] is not None:
        config.model.moe.update(mlp="gelu", shared_mlp="gelu", **fill("moe", _MOE, h["moe"]))
        router = fill("router", _ROUTER, h["router"] or {})
        router["scale"] = float(router["scale"])
        config.model.router.update(name="token_choice", balance_gates=True, **router)
    elif h["router"] is not None:
        raise UserError("a router without experts: give the section moe, or leave out router")
    if h["mob"] is not None:
        mob = fill("mob", _MOB, h["mob"])
        mob |= {"groups": tuple(mob["groups"]), "alpha": float(mob["alpha"])}
        config.model.mob.update(mob)


def hparams_of(model: ConfigDict) -> dict[str, Any]:
    """The hyperparameters of the section `model` of a config; the inverse of `configure`.

    Raises:
      UserError: it is of another architecture, or its router is another one.
    """
    for key, value, possible in (
        ("architecture", model.architecture, ("flux",)),
        ("router.name", model.router.name, ("token_choice", "dense")),
    ):
        if value not in possible:
            raise UserError(
                f"family flux_moe has models with model.{key} = {' or '.join(possible)}, and this "
                f"has {value}: it cannot be written so"
            )
    channels, details = model.channels * PATCH**2, model.flux
    h = {
        "in_channels": channels,
        "vec_in_dim": details.pooled_width,
        "context_in_dim": details.text_width,
        "depth_single_blocks": details.single_depth,
        "axes_dim": list(details.rope_axes),
        "guidance_embed": details.guidance,
    }
    names = ("hidden_size", "mlp_ratio", "num_heads", "depth", "adaln_rank", "adaln_shared")
    h |= {name: model[name] for name in names}
    if model.router.name != "dense":
        h["moe"] = {name: model.moe[name] for name in _MOE}
        h["router"] = {name: model.router[name] for name in _ROUTER}
    if tuple(model.mob.groups) != ("none",):
        h["mob"] = {name: model.mob[name] for name in _MOB}
        h["mob"]["groups"] = list(model.mob.groups)
    return h


def from_shapes(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of a state dict show: not how many experts a token takes, nor the groups."""
    found = flux.from_shapes(shapes)
    low = first(shapes, r"adaLN_down\.weight|double_blocks\.0\.img_mod\.down\.weight")
    if low:
        found |= {"adaln_rank": shapes[low][0], "adaln_shared": low.startswith("adaLN_down")}
    if numbers(r"(?:double|single)_groups\.(\d+)\.", shapes):
        found["mob"] = {}  # there are groups; which blocks are in them must be said
    places = {"double": 0, "single": found["depth"]}
    blocks = [
        start + number
        for kind, start in places.items()
        for number in numbers(rf"{kind}_blocks\.(\d+)\.(?:img_)?moe\.", shapes)
    ]
    return found | ({"moe": _moe_from_shapes(blocks, shapes)} if blocks else {})


def _moe_from_shapes(blocks: Sequence[int], shapes: Shapes) -> dict[str, Any]:
    """The section `moe`; blocks: the numbers of those with experts, among all blocks."""
    interleave = all(block % 2 for block in blocks)
    gate, expert, shared = (
        first(shapes, rf".*moe\.{name}\.weight")
        for name in ("gate", r"experts\.0\.0", r"shared\.0")
    )
    found = {"interleave": interleave, "skip_first": min(blocks) - interleave}
    found["num_experts"] = shapes[gate][0] if gate else 0
    found["shared_hidden_size"] = shapes[shared][0] if shared else 0
    if expert:
        found["hidden_size"] = shapes[expert][0]
    for name, key in (("bias", expert), ("shared_bias", shared)):
        if key:
            found[name] = key.removesuffix("weight") + "bias" in shapes
    return found


FAMILIES = {
    "flux_moe": Family(
        "flux_moe",
        _ROWS,
        configure=configure,
        from_shapes=from_shapes,
        asked=tuple(without_default(flux.PARAMS)),
        hparams=hparams_of,
    )
}
