"""LoRA files, merged into weights when these are read: W + scale * alpha / rank * B A.

Source: Hu et al., 2106.09685, section 4.1. A is [rank, in] and B is [out, rank]. A convolution has
A [rank, in, rows, columns] and B [out, rank, 1, 1]. The styles of keys that are read:

| written by            | a pair of keys                                                          |
|-----------------------|-------------------------------------------------------------------------|
| diffusers, PEFT       | `transformer.x.to_q.lora_A.weight`, `...lora_B.weight` (and B's `.bias`) |
| diffusers, old        | `x.to_q.lora.down.weight`, `x.processor.to_q_lora.up.weight`            |
| kohya                 | `lora_unet_x_to_q.lora_down.weight`, `...lora_up.weight`                |

`<module>.alpha` is a tensor of its own, or stands in the adapter_config.json of PEFT or in the
metadata of diffusers; without any it is the rank. A LoRA for FLUX.1 in the names of diffusers fits
weights in native names, and the other way round (`FLUX_MODULES`).
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from moe_diffusion.errors import UserError, explained
from moe_diffusion.interop import files, keymap
from moe_diffusion.interop.tensors import Lazy, State, adjusted, lazy, listed
from moe_diffusion.reading import Key, check_keys, read_table, table_of

_KINDS = {
    "A": re.compile(r"(?:\.lora_A|\.lora_down|\.lora\.down|_lora\.down)(?:\.\w+)?\.weight$"),
    "B": re.compile(r"(?:\.lora_B|\.lora_up|\.lora\.up|_lora\.up)(?:\.\w+)?\.weight$"),
    "bias": re.compile(r"(?:\.lora_B|\.lora_up)(?:\.\w+)?\.bias$"),
    "alpha": re.compile(r"\.alpha$"),
}
# What stands before the name of a module. Text encoders have LoRAs of their own.
_PREFIX = re.compile(
    r"base_model\.model\.|transformer\.|diffusion_model\.|unet\.|lora_unet_|lora_transformer_"
)
_TEXT = ("text_encoder", "lora_te")
_METADATA = "lora_adapter_metadata"  # of diffusers, in the header of a .safetensors file

# Module of diffusers -> native module, and which part of its rows, counted in widths of the model.
FLUX_MODULES: dict[str, tuple[str, int]] = {
    "x_embedder": ("img_in", 0),
    "context_embedder": ("txt_in", 0),
    "time_text_embed.timestep_embedder.linear_1": ("time_in.in_layer", 0),
    "time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer", 0),
    "time_text_embed.text_embedder.linear_1": ("vector_in.in_layer", 0),
    "time_text_embed.text_embedder.linear_2": ("vector_in.out_layer", 0),
    "time_text_embed.guidance_embedder.linear_1": ("guidance_in.in_layer", 0),
    "time_text_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", 0),
    "transformer_blocks.{i}.norm1.linear": ("double_blocks.{i}.img_mod.lin", 0),
    "transformer_blocks.{i}.norm1_context.linear": ("double_blocks.{i}.txt_mod.lin", 0),
    "transformer_blocks.{i}.attn.to_q": ("double_blocks.{i}.img_attn.qkv", 0),
    "transformer_blocks.{i}.attn.to_k": ("double_blocks.{i}.img_attn.qkv", 1),
    "transformer_blocks.{i}.attn.to_v": ("double_blocks.{i}.img_attn.qkv", 2),
    "transformer_blocks.{i}.attn.add_q_proj": ("double_blocks.{i}.txt_attn.qkv", 0),
    "transformer_blocks.{i}.attn.add_k_proj": ("double_blocks.{i}.txt_attn.qkv", 1),
    "transformer_blocks.{i}.attn.add_v_proj": ("double_blocks.{i}.txt_attn.qkv", 2),
    "transformer_blocks.{i}.attn.to_out.0": ("double_blocks.{i}.img_attn.proj", 0),
    "transformer_blocks.{i}.attn.to_add_out": ("double_blocks.{i}.txt_attn.proj", 0),
    "transformer_blocks.{i}.ff.net.0.proj": ("double_blocks.{i}.img_mlp.0", 0),
    "transformer_blocks.{i}.ff.net.2": ("double_blocks.{i}.img_mlp.2", 0),
    "transformer_blocks.{i}.ff_context.net.0.proj": ("double_blocks.{i}.txt_mlp.0", 0),
    "transformer_blocks.{i}.ff_context.net.2": ("double_blocks.{i}.txt_mlp.2", 0),
    "single_transformer_blocks.{i}.norm.linear": ("single_blocks.{i}.modulation.lin", 0),
    "single_transformer_blocks.{i}.attn.to_q": ("single_blocks.{i}.linear1", 0),
    "single_transformer_blocks.{i}.attn.to_k": ("single_blocks.{i}.linear1", 1),
    "single_transformer_blocks.{i}.attn.to_v": ("single_blocks.{i}.linear1", 2),
    "single_transformer_blocks.{i}.proj_mlp": ("single_blocks.{i}.linear1", 3),
    "single_transformer_blocks.{i}.proj_out": ("single_blocks.{i}.linear2", 0),
    "norm_out.linear": ("final_layer.adaLN_modulation.1", 0),
    "proj_out": ("final_layer.linear", 0),
}
_MLP = 3  # the part of linear1 that is as wide as the MLP; the others are as wide as the model
_SWAPPED = "norm_out.linear"  # scale and shift in diffusers, shift and scale natively
_FLUX_MARKS = tuple(f"{kind}blocks." for kind in ("double_", "single_", "transformer_"))
_FLUX_MARKS += ("single_transformer_blocks.",)


_ALPHA = Key((float,), None, least=-1e6, most=1e6)
_TOLD = {
    "lora_alpha": _ALPHA,
    "alpha_pattern": Key((dict, type(None)), None),
    "use_rslora": Key((bool, type(None)), None),
    "use_dora": Key((bool, type(None)), None),
}


class _Delta(NamedTuple):
    """The LoRA of one module: factor * B A, and a change of the bias."""

    down: np.ndarray
    up: np.ndarray
    factor: float
    bias: np.ndarray | None


class _Target(NamedTuple):
    """Where a module of the LoRA lies in the weights.

    Attributes:
      module: of the weights.
      rows: of the weights that are changed.
      start: the first of the LoRA's rows that change them.
      swapped: whether the two halves of the LoRA's rows change places.
    """

    module: str
    rows: range
    start: int = 0
    swapped: bool = False

    def take(self, array: np.ndarray) -> np.ndarray:
        """The rows of B, or of its bias, that change the weights."""
        array = np.asarray(array, np.float32)
        if self.swapped:
            array = np.roll(array, len(array) // 2, axis=0)
        return array[self.start : self.start + len(self.rows)]


def merge(state: State, path: str | os.PathLike, scale: float = 1.0) -> Lazy:
    """The weights `state` with a LoRA file added, computed in f32 when a tensor is read.

    Args:
      state: tensor name -> array.
      path: `.safetensors`, `.pt` or a folder of PEFT. Its modules for text encoders are left out,
        which a line on stderr says.
      scale: multiplies the whole LoRA; Hyper-FLUX with 8 steps is published for 0.125.

    Raises:
      UserError: a module of the LoRA is not in `state` or has another shape, or the file holds
        something else than a LoRA. The message names examples.
    """
    if not math.isfinite(scale):
        raise UserError(f"--lora-scale {scale} is no number to multiply weights with")
    path, state = files.find(path), lazy(state)
    deltas = _read(path)
    found = dict(_targets(state, deltas))
    if strange := sorted(set(deltas) - set(found)):
        what = "no tensor of" if not found else f"{len(strange)} modules not in"
        raise UserError(
            f"{path} changes {what} these weights: {listed(strange)}; the weights have "
            f"{listed(sorted(_modules(state).values()))}: name a LoRA of this model"
        )
    changes: dict[str, list[Callable[[np.ndarray], None]]] = {}
    for name, targets in found.items():
        _check(path, name, deltas[name], targets, state)
        for target in targets:
            _add(changes, deltas[name], target, scale)

    def changed(additions: list[Callable[[np.ndarray], None]]) -> Callable[[Any], np.ndarray]:
        def change(tensor: Any) -> np.ndarray:
            tensor = np.array(tensor, np.float32)
            for add in additions:
                add(tensor)
            return tensor

        return change

    return adjusted(state, {key: changed(additions) for key, additions in changes.items()})


def _read(path: Path) -> dict[str, _Delta]:
    """Name of a module, without prefix -> its LoRA."""
    state, modules, strange, others = files.read_state_dict(path), {}, [], 0
    for key in state:
        kind = next((k for k, pattern in _KINDS.items() if pattern.search(key)), None)
        if kind is None:
            strange.append(key)
        elif key.startswith(_TEXT) or _bare(key).startswith(_TEXT):
            others += 1
        else:
            name = _KINDS[kind].sub("", key).replace(".processor.", ".")
            modules.setdefault(name, {})[kind] = state[key]
    if strange:
        raise UserError(f"{path} holds more than a plain LoRA: {listed(strange)}: it is not read")
    halves = [name for name, parts in modules.items() if not {"A", "B"} <= set(parts)]
    if halves:
        raise UserError(f"{path} lacks A or B of {listed(halves)}: copy it again")
    if others:
        print(
            f"{path}: {others} tensors for text encoders are left out", file=sys.stderr, flush=True
        )
    if not modules:
        raise UserError(f"{path} holds no LoRA of a diffusion model")
    told = _settings(path)
    return {_bare(name): _delta(name, parts, told) for name, parts in modules.items()}


def _delta(name: str, parts: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> _Delta:
    rank = parts["A"].shape[0]
    if "alpha" in parts:
        alpha = float(np.asarray(parts["alpha"], np.float32).reshape(()))
    else:
        patterns = told.get("alpha_pattern") or {}
        fits = (a for p, a in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", _bare(name)))
        alpha = next(fits, told.get("lora_alpha", rank))
    return _Delta(
        down=np.asarray(parts["A"], np.float32),
        up=np.asarray(parts["B"], np.float32),
        factor=alpha / (math.sqrt(rank) if told.get("use_rslora") else rank),
        bias=parts.get("bias"),
    )


def _settings(path: Path) -> dict[str, Any]:
    """PEFT's description of a LoRA: adapter_config.json beside it, or diffusers' metadata in it."""
    told, beside = {}, path.with_name("adapter_config.json")
    with explained(f"the settings of {path} are damaged", "copy the LoRA again", (ValueError,)):
        if beside.is_file():
            told = read_table(beside, "copy the LoRA again")
        elif path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="numpy") as file:
                metadata = (file.metadata() or {}).get(_METADATA, "{}")
            told = table_of(metadata)
            if told is None:
                raise ValueError("its metadata is no table")
            told = {key.removeprefix("transformer."): v for key, v in told.items()}
    check_keys(told, _TOLD, f"the settings of {path}", "copy the LoRA again")
    patterns = told.get("alpha_pattern") or {}
    for pattern in patterns:
        check_keys(patterns, {pattern: _ALPHA}, f"alpha_pattern of {path}", "copy the LoRA again")
        with explained(f"alpha_pattern of {path} is damaged", "copy the LoRA again", (re.error,)):
            re.compile(pattern)
    if told.get("use_dora"):
        raise UserError(f"{path} is a DoRA, which changes more than a LoRA: it is not read")
    return told


def _bare(name: str) -> str:
    """A name without the prefixes of its style."""
    while match := _PREFIX.match(name):
        name = name[match.end() :]
    return name


def _flat(name: str) -> str:
    """A name as kohya writes it, by which names of all styles are compared."""
    return keymap.bare(name).replace(".", "_")


def _modules(state: Lazy) -> dict[str, str]:
    """Flat name -> name of every module of the weights that has a matrix or a convolution."""
    names = (k.removesuffix(".weight") for k in state if k.endswith(".weight"))
    return {_flat(n): n for n in names if len(state.specs[f"{n}.weight"].shape) > 1}


def _targets(state: Lazy, deltas: Mapping[str, _Delta]) -> Iterator[tuple[str, list[_Target]]]:
    """(module of the LoRA, where it lies in the weights) for every module that is found."""
    own = _modules(state)
    shapes = {flat: state.specs[f"{name}.weight"].shape for flat, name in own.items()}
    places = {flat: [_Target(name, range(shapes[flat][0]))] for flat, name in own.items()}
    blocks = [int(n) for flat in own for n in re.findall(r"blocks_(\d+)_", flat)]
    is_flux = any(keymap.bare(key).startswith(_FLUX_MARKS) for key in state)
    joined = Counter(native for native, _ in FLUX_MODULES.values())
    for theirs, (ours, part) in FLUX_MODULES.items() if is_flux else ():
        for i in range(max(blocks, default=0) + 1 if "{i}" in theirs else 1):
            diffusers, native = (_flat(name.format(i=i)) for name in (theirs, ours))
            swapped = theirs == _SWAPPED
            if native in own and diffusers not in own:
                count, width = shapes[native]
                end = (part + 1) * width if joined[ours] > 1 and part < _MLP else count
                rows = range(part * width, end)
                places[diffusers] = [_Target(own[native], rows, swapped=swapped)]
            elif diffusers in own and native not in own:
                count, width = shapes[diffusers]
                target = _Target(own[diffusers], range(count), part * width, swapped)
                places.setdefault(native, []).append(target)
    for name in deltas:
        if _flat(name) in places:
            yield name, places[_flat(name)]


def _check(path: Path, name: str, delta: _Delta, targets: list[_Target], state: Lazy) -> None:
    """Raises a UserError unless the LoRA of a module has the shape of its weights."""
    down, up = delta.down.shape, delta.up.shape
    shapes = {t.module: state.specs[f"{t.module}.weight"].shape for t in targets}
    fits = math.prod(up) == up[0] * down[0] and up[0] == sum(len(t.rows) for t in targets)
    if not fits or any(math.prod(shape[1:]) != math.prod(down[1:]) for shape in shapes.values()):
        wanted = ", ".join(f"{module}.weight {shape}" for module, shape in shapes.items())
        raise UserError(
            f"{path}: {name} has A {down} and B {up}, which is no change of {wanted}: name a LoRA "
            "of this model"
        )
    if delta.bias is not None:
        for module in shapes:
            if f"{module}.bias" not in state:
                raise UserError(f"{path} changes the bias of {module}, which has none")


def _add(
    changes: dict[str, list[Callable[[np.ndarray], None]]],
    delta: _Delta,
    target: _Target,
    scale: float,
) -> None:
    """Notes what is added to the tensors of a module; nothing is computed yet."""

    def weight(tensor: np.ndarray) -> None:
        up = target.take(delta.up)
        product = up.reshape(len(up), -1) @ delta.down.reshape(len(delta.down), -1)
        rows = tensor[target.rows.start : target.rows.stop]
        rows += scale * delta.factor * product.reshape(rows.shape)

    def bias(tensor: np.ndarray) -> None:
        rows = slice(target.rows.start, target.rows.stop)
        tensor[rows] += scale * delta.factor * target.take(delta.bias)

    changes.setdefault(f"{target.module}.weight", []).append(weight)
    if delta.bias is not None:
        changes.setdefault(f"{target.module}.bias", []).append(bias)
