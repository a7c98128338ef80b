"""What a compiled program computes more than once, because several devices compute the same.

Counted are products: with weights, by the path of the weight, and those of attention. A product of
matrices [M, K] and [K, N] has 2 M K N FLOPs, which is twice the root of its three sizes multiplied.
So it does not matter how the compiler has written it, as a convolution for example.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from moe_diffusion.dense2moe.stage_configs import dense_of
from moe_diffusion.models import build
from moe_diffusion.models.accounting import products
from moe_diffusion.models.stack import Model
from moe_diffusion.planning.flops import network_evaluations
from moe_diffusion.planning.hlo import (
    SPLASH,
    Instruction,
    Program,
    called,
    sizes_of_arrays,
    trip_count,
)

Repeats = dict[str, float]  # part -> how often it is computed
EVERYTHING = "everything"
_LEAST = 1.5  # below, what is more than the analytic count is padding
_MAPS = "attention_maps"  # the scope in which kernels.attention computes
_SPLASH = f"{SPLASH}_fwd"


def repeats_of(
    program: Program, model: Model, config: ConfigDict, what: str, devices: int
) -> Repeats | None:
    """How often each part is computed, if more than once, for the `data.batch_size` images.

    In a training step only the forward pass counts, and of that nothing that is computed again on
    purpose. Experts whose products are in a kernel are left out. A stage of "distill" computes its
    teacher too, whose modules have the same names.

    Returns:
      {path of a module with a weight, or of an attention, with the kind of a layer in place of its
      number: factor}; None if the program or the sampler says too little.
    """
    evaluations = 1 if what != "sample" else network_evaluations(config)
    computed = [*_walk(program, program.entry, 1)]
    # XLA:CPU loses names of products, and on GPUs a library computes some.
    if evaluations is None or _hides_products(program) or not all(p.name for p in computed):
        return None
    wanted: Counter[str] = Counter()
    tokens: dict[str, int] = {}
    for one in (model, *([build(dense_of(config).model)] if what == "distill" else [])):
        weights, maps = products(one)
        wanted.update({path.rpartition("/")[0]: value for path, value in weights.items()})
        wanted.update({f"{path}/{_MAPS}": attention.flops for path, attention in maps.items()})
        tokens |= {f"{path}/{_MAPS}": attention.tokens for path, attention in maps.items()}
    found: Counter[str] = Counter()
    for product in computed:
        path = _path_of(product.name, wanted)
        if path is not None:
            found[path] += product.times * _flops(product, tokens.get(path, 0))
    factors = {
        path: found[path] * devices / (config.data.batch_size * evaluations * value)
        for path, value in wanted.items()
        if value
    }
    repeated = {path: round(factor, 2) for path, factor in factors.items() if factor >= _LEAST}
    return _named(repeated, model)


def repeats_text(repeats: Repeats | None) -> list[str]:
    """Lines of text: parts with the same factor in one line."""
    if repeats is None:
        return ["computed more than once: unknown"]
    if not repeats:
        return ["computed more than once: nothing"]
    groups: dict[str, list[str]] = {}
    for part, factor in repeats.items():
        groups.setdefault(f"{factor:.2g}", []).append(part)
    return [f"computed {times} times: {', '.join(parts)}" for times, parts in groups.items()]


class _Product(NamedTuple):
    """A product in a program, the computation around it, jax's name of it, how often it runs."""

    instruction: Instruction
    body: Mapping[str, Instruction]
    name: str
    times: float


def _walk(program: Program, name: str, times: float) -> Iterator[_Product]:
    """Yields the products of a computation and of what it calls."""
    body = program.computations[name]
    for instruction in body.values():
        if _is_product(instruction):
            yield _Product(instruction, body, _op_name(instruction), times)
            continue
        runs = times
        if instruction.opcode == "while":
            runs *= trip_count(program, body, instruction)
        branches = called(instruction)
        if instruction.opcode == "conditional":
            # Guidance is computed or not; the branch with less never shows too much.
            amounts = [[*_walk(program, branch, times)] for branch in branches]
            yield from min(amounts, key=len, default=[])
            continue
        for branch in branches:
            yield from _walk(program, branch, runs)


def _is_product(instruction: Instruction) -> bool:
    """A product of a vector and a matrix may be a sum of elementwise products, a reduce."""
    if instruction.opcode == "reduce":
        return "/dot_general" in instruction.text
    is_splash = instruction.opcode == "custom-call" and instruction.name.startswith(_SPLASH)
    return is_splash or instruction.opcode in ("dot", "convolution")


def _op_name(instruction: Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', instruction.text)
    return name[1] if name else ""


def _path_of(name: str, wanted: Mapping[str, Any]) -> str | None:
    """Which of the paths a product belongs to, by the name that jax gave it."""
    if "transpose(" in name or "rematted" in name:
        return None
    # "jvp(image_attn.heads)" is the method `heads` of the module `image_attn`.
    steps = [re.findall(r"[\w.]+", step)[-1:] for step in name.split("/")]
    steps = [step[0].split(".")[0] for step in steps if step]
    inside = [path for path in wanted if _follows(path.split("/"), steps)]
    return max(inside, key=len, default=None)


def _follows(path: list[str], steps: list[str]) -> bool:
    """Whether all names of a path are among the steps, in this order."""
    left = iter(steps)
    return all(name in left for name in path)


def _flops(product: _Product, tokens: int) -> float:
    """FLOPs of a product on one device; tokens: of an attention, or 0."""
    instruction, body = product.instruction, product.body
    if instruction.name.startswith(_SPLASH):  # both products; the largest result is [heads, S, d]
        return 4 * tokens * max(sizes_of_arrays(instruction.shape))
    operands = [body[name].shape for name in instruction.operands[:2] if name in body]
    if instruction.opcode == "reduce":
        return 2 * sum(sizes_of_arrays(operands[0])) if operands else 0.0
    sizes = [sum(sizes_of_arrays(shape)) for shape in (*operands, instruction.shape)]
    if len(sizes) < 3:
        return 0.0
    if tokens:  # [G, S, d] twice and [G, S, S], in whatever order
        return 2 * tokens * sorted(sizes)[1]
    return 2 * math.sqrt(math.prod(sizes))


def _hides_products(program: Program) -> bool:
    """Whether a library computes products, as on GPUs."""
    return any(
        "cublas" in instruction.text or "cudnn" in instruction.text
        for body in program.computations.values()
        for instruction in body.values()
        if instruction.opcode == "custom-call"
    )


def _named(factors: Repeats, model: Model) -> Repeats:
    """Paths with the kind of their layer in place of its number; the largest factor of each."""
    kinds = {block.path: str(block.kind) for block in model.blocks()}
    named: Repeats = {}
    for path, factor in factors.items():
        for layer, kind in kinds.items():
            if path.startswith(f"{layer}/"):
                path = f"{kind} {path.removeprefix(f'{layer}/')}"
        path = path.replace(f"/{_MAPS}", " (attention maps)").replace("attend ", "")
        named[path] = max(factor, named.get(path, 0))
    return named
