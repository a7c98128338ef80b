"""Reads a compiled program in XLA's text form: the bytes that its collectives send, its kernels.

XLA's own cost analysis counts the body of a loop once. This module walks the program from its entry
and counts the body of a loop as often as the loop runs. Of the branches of a conditional it counts
the one that sends most.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

from moe_diffusion.kernels.cpu.library import FUNCTIONS

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
BETWEEN_SLICES = "slices (DCN)"  # whatever goes between TPU slices, over another network
# Custom calls that are Pallas kernels: Mosaic on TPU; Triton and Mosaic on GPU.
PALLAS_CALLS = ("tpu_custom_call", "triton", "mosaic_gpu")
SPLASH = "splash_mha"  # begins the names of jax's own kernels for attention

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPCODE = re.compile(r" ([a-z][\w-]*)\(([^()]*)\)")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a program.

    Attributes:
      name: without the leading "%".
      shape: type of the result, like "f32[8,4]{1,0}" or a tuple of types.
      opcode: what it does, like "all-gather".
      operands: names of the instructions whose results it takes.
      text: everything after "name =".
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str


@dataclass
class Program:
    """A program: its computations by name, each a table of instructions in order."""

    entry: str = ""
    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)
    files: tuple[str, ...] = ()  # Python files that its operations come from


def parse(text: str) -> Program:
    """Reads the text of `compiled.as_text()`."""
    program, body = Program(files=_files(text)), {}
    # The metadata of a kernel may stand on lines of its own.
    for line in re.sub(r'\n(?=["}]\S)', " ", text).splitlines():
        if head := _HEAD.match(line):
            body = program.computations[head[2]] = {}
            program.entry = head[2] if head[1] else program.entry
        elif (match := _INSTRUCTION.match(line)) and (call := _OPCODE.search(" " + match[2])):
            shape = match[2][: max(0, call.start() - 1)]
            operands = tuple(re.findall(r"%([\w.-]+)", call[2]))
            body[match[1]] = Instruction(match[1], shape, call[1], operands, match[2])
    return program


def collective_bytes(program: Program) -> dict[str, int]:
    """Bytes that each device sends in one run of the program, by kind of collective.

    In a ring of n devices, each device sends (n - 1) / n of the whole array for an all-gather, a
    reduce-scatter or an all-to-all, twice that for an all-reduce, and all of it for a permute. What
    goes from slice to slice is a kind of its own, `BETWEEN_SLICES`, whatever collective it is.
    """
    sent = _traffic(program, program.entry, {})
    return {kind: round(sent[kind]) for kind in (*COLLECTIVES, BETWEEN_SLICES) if sent[kind]}


def kernels(program: Program) -> dict[str, int]:
    """How often the program calls each of our kernels; a call inside a loop counts once."""
    counts: Counter[str] = Counter()
    for body in program.computations.values():
        for instruction in body.values():
            target = re.search(r'custom_call_target="([^"]*)"', instruction.text)
            if target and target[1] in FUNCTIONS:
                counts[target[1]] += 1
            is_pallas = target and any(kind in target[1] for kind in PALLAS_CALLS)
            # XLA also generates kernels itself. Their text has neither of these words.
            is_pallas = is_pallas and not instruction.name.startswith(SPLASH)
            if is_pallas and re.search("pallas_call|kernel_name", instruction.text):
                counts[re.sub(r"[.\d]+$", "", instruction.name)] += 1
    return dict(counts)


def _traffic(program: Program, name: str, known: dict[str, Counter]) -> Counter:
    """Bytes that one run of a computation sends, by kind of collective."""
    if name in known:
        return known[name]
    body = program.computations[name]
    total: Counter[str] = Counter()
    for instruction in body.values():
        if instruction.opcode == "while":
            loop = re.search(r"body=%?([\w.-]+)", instruction.text)[1]
            inside = _traffic(program, loop, known)
            if inside:
                count = trip_count(program, body, instruction)
                total += Counter({kind: count * value for kind, value in inside.items()})
        elif instruction.opcode == "conditional":
            branches = [_traffic(program, b, known) for b in _branches(instruction.text)]
            total += max(branches, key=lambda sent: sum(sent.values()), default=Counter())
        elif instruction.opcode == "fusion":
            total += _sent_in_fusion(program, instruction)
        elif instruction.opcode.removesuffix("-start") in COLLECTIVES:
            total += _sent(instruction)
        elif instruction.opcode == "send" and "xla_megascale_runtime" in instruction.text:
            total += _sent_between_slices(instruction)
        elif not instruction.opcode.endswith(("-done", "-update")):
            for called in _CALLED.findall(instruction.text):
                total += _traffic(program, called, known)
    known[name] = total
    return total


def trip_count(program: Program, body: dict[str, Instruction], loop: Instruction) -> int:
    """How often a loop runs, by XLA's note or else by the constant in the loop's condition.

    A loop without either depends on data; it counts as 1. A loop begins at 0. XLA may have unrolled
    it, so that it counts in steps of 2.
    """
    if note := re.search(r"known_trip_count\W+n\W+(\d+)", loop.text):
        return int(note[1])
    condition = program.computations[re.search(r"condition=%?([\w.-]+)", loop.text)[1]]
    *_, root = condition.values()
    if root.opcode == "fusion":  # it holds only the comparison, with operands in the same order
        inner = program.computations[_CALLED.search(root.text)[1]]
        direction = next((i for i in inner.values() if i.opcode == "compare"), root)
    else:
        direction = root
    if "direction=LT" not in direction.text:
        return 1
    for operand in reversed(root.operands):
        bound = condition.get(operand)
        if bound and bound.opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", bound.text)[1])
            start = body.get(loop.operands[0])
            if index and start and start.opcode == "tuple":
                bound = body.get(start.operands[index])
        if bound and bound.opcode == "constant":
            value = re.search(r"constant\((\d+)\)", bound.text)
            if not value:
                return 1
            counters = (condition.get(name) for name in root.operands)
            return -(-int(value[1]) // max(_step(program, loop, c) for c in counters))
    return 1


def _step(program: Program, loop: Instruction, counter: Instruction | None) -> int:
    """What a loop adds to its counter, an element of the loop's tuple; 1 if it is not seen."""
    if counter is None or counter.opcode != "get-tuple-element":
        return 1
    body = program.computations[re.search(r"body=%?([\w.-]+)", loop.text)[1]]
    *_, root = body.values()
    index = int(re.search(r"index=(\d+)", counter.text)[1])
    if root.opcode != "tuple" or index >= len(root.operands):
        return 1
    added = body.get(root.operands[index])
    if added is None or added.opcode != "add":
        return 1
    constants = (body[name].text for name in added.operands if name in body)
    steps = (re.search(r"constant\((\d+)\)", text) for text in constants)
    return next((int(step[1]) for step in steps if step), 1) or 1


def _branches(text: str) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", text):
        return re.findall(r"%?([\w.-]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.-]+)", text)


def _sent_in_fusion(program: Program, fusion: Instruction) -> Counter:
    """Bytes of the collectives that the TPU compiler has put into a fusion.

    The compiler writes a reduce-scatter as an all-reduce of which it takes a part. It splits other
    collectives into pieces that run beside other work. The start, each piece and the end are
    separate fusions, and each looks like the whole collective, so only the start counts.
    """
    name = _CALLED.search(fusion.text)[1]
    if fusion.name.startswith("async-collective-done") or name.startswith("async_collective_"):
        return Counter()
    total: Counter[str] = Counter()
    for inner in program.computations[name].values():
        if inner.opcode == "fusion":
            total += _sent_in_fusion(program, inner)
        elif inner.opcode.removesuffix("-start") in COLLECTIVES:
            sent = _sent(inner)
            if name.startswith("all-reduce-scatter"):
                sent = Counter({"reduce-scatter": sent["all-reduce"] / 2})
            total += sent
    return total


def _sent(instruction: Instruction) -> Counter:
    """Bytes that a device sends for one collective."""
    kind = instruction.opcode.removesuffix("-start")
    arrays = _bytes_of_arrays(instruction.shape)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # the operands come first, then the results
    size, devices = sum(arrays), group_size(instruction.text)
    # Of a reduce-scatter it is the result, which is one part of the array.
    size *= devices if kind == "reduce-scatter" else 1
    return Counter({kind: size * _times_sent(kind, devices)})


def _times_sent(kind: str, devices: int) -> float:
    """How often each device of a ring sends an array of which it has, or gets, a part."""
    share = (devices - 1) / devices
    return {"all-reduce": 2 * share, "collective-permute": 1}.get(kind, share)


def _sent_between_slices(send: Instruction) -> Counter:
    """Bytes that a device gives to the runtime that joins slices of TPU chips ("megascale").

    The compiler notes which collective it is, and its target: "{1,2}x{0:7}" are the slices 1 and 2.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.text)
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', send.text)
    slices = 2
    if target:
        ends = [list(map(int, part.split(":"))) for part in target[1].split(",")]
        slices = max(sum(end[-1] - end[0] + 1 for end in ends), 2)
    name = kind[1].lower().replace("_", "-") if kind else "all-reduce"
    size = _bytes_of_arrays(send.shape)[0]
    size *= slices if name == "all-gather" else 1  # a device sends the part that it has
    return Counter({BETWEEN_SLICES: size * _times_sent(name, slices)})


def group_size(text: str) -> int:
    """How many devices exchange data with one another, by `replica_groups` in any spelling."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'?([\w.-]+)'?=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'?([\w.-]+)'?", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    return 2  # a permute, which names pairs instead


def called(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs: a loop's body, branches, a fusion or a call."""
    if instruction.opcode == "conditional":
        return _branches(instruction.text)
    return _CALLED.findall(instruction.text)


def sizes_of_arrays(shape: str) -> list[int]:
    """Number of elements of each array in a type."""
    found = re.findall(r"\b[a-z]\w*\[([\d,]*)\]", shape)
    return [math.prod(int(d) for d in dims.split(",") if d) for dims in found]


def _bytes_of_arrays(shape: str) -> list[int]:
    """Bytes of each array in a type, without the scalars that a start passes on to its done."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)
    if len(found) > 1:
        found = [(kind, dims) for kind, dims in found if not (kind == "u32" and not dims)]
    return [
        math.prod(int(d) for d in dims.split(",") if d) * _bits(kind) // 8 for kind, dims in found
    ]


def _bits(kind: str) -> int:
    """Bits of one element: 16 for bf16, 8 for f8e4m3fn and for pred."""
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 8


def _files(text: str) -> tuple[str, ...]:
    """The Python files in the table at the head of the text."""
    table = re.search(r"^FileNames\n((?:\d+ \".*\"\n)+)", text, re.MULTILINE)
    return tuple(re.findall(r'"(.*)"', table[1])) if table else ()
