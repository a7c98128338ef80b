"""What chips can do, by their makers; nothing here imports jax."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_diffusion.checks import require
from moe_diffusion.errors import UserError
from moe_diffusion.gpus import memory_bytes

GIB = 2**30
GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Chip:
    """What one chip can do, by its maker's data sheet and by what its compiler lets a program use.

    Attributes:
      platform: "tpu" or "cuda".
      device_kind: how jax's name of the device begins.
      flops: dense bf16 FLOP per second.
      hbm_bytes: memory that the compiler lets one device use, which is less than the chip has.
      dims: number of axes of a slice's shape.
      devices: jax devices in one chip.
      examples: names of topologies, separated by spaces.
    """

    platform: str
    device_kind: str
    flops: float
    hbm_bytes: int
    dims: int
    devices: int = 1
    examples: str = ""


def _of_gpu(kind: str) -> int:
    """Bytes that jax takes of a GPU's memory unless told otherwise: three quarters."""
    return memory_bytes(kind) * 3 // 4


# FLOP/s: cloud.google.com/tpu/docs and NVIDIA's data sheets (SXM, without sparsity). HBM of TPUs:
# the limit in libtpu's own out-of-memory messages.
CHIPS = {
    "v4": Chip("tpu", "TPU v4", 275e12, int(30.75 * GIB), 3, examples="v4:2x2x1 v4:4x4x4"),
    "v5e": Chip("tpu", "TPU v5 lite", 197e12, int(15.75 * GIB), 2, examples="v5e:2x2 v5e:16x16"),
    "v5p": Chip("tpu", "TPU v5", 459e12, int(95.74 * GIB), 3, examples="v5p:2x2x1 v5p:8x8x8"),
    "v6e": Chip("tpu", "TPU v6 lite", 918e12, int(31.25 * GIB), 2, examples="v6e:2x2 v6e:16x16"),
    "tpu7x": Chip("tpu", "TPU7x", 2307e12, int(94.75 * GIB), 3, 2, "tpu7x:2x2x1 tpu7x:4x4x4"),
    "a100": Chip("cuda", "NVIDIA A100", 312e12, _of_gpu("a100"), 1, examples="a100:8"),
    "h100": Chip("cuda", "NVIDIA H100", 989.4e12, _of_gpu("h100"), 1, examples="h100:8"),
    "h200": Chip("cuda", "NVIDIA H200", 989.4e12, _of_gpu("h200"), 1, examples="h200:8"),
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`; None if it is unknown.

    Only the beginning of the name is compared, because the names of GPUs end with their memory.
    """
    known = [chip for chip in CHIPS.values() if device_kind.startswith(chip.device_kind)]
    # The longest match counts, because "TPU v5 lite" also begins with "TPU v5".
    return max(known, key=lambda chip: len(chip.device_kind), default=None)


def parse(name: str, flag: str, beside: str) -> tuple[str, tuple[int, ...]]:
    """Splits the name of a topology into kind and shape: "v5e:16x16" -> ("v5e", (16, 16)).

    Args:
      flag: what the name was given for, to begin a message with.
      beside: the name that this flag also takes, for messages.

    Raises:
      UserError: the kind is unknown, or the shape is none of that kind.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in CHIPS:
        raise UserError(f"{flag} {name!r} is unknown; known are {beside} and shapes of {known()}")
    kind, shape = match[1], tuple(int(size) for size in match[2].split("x"))
    chip = CHIPS[kind]
    require(
        len(shape) == chip.dims and 0 not in shape,
        f"{flag} {name!r}: a shape of {kind} has {chip.dims} sizes from 1 on, as in "
        f"{' or '.join(chip.examples.split())}",
    )
    require(
        chip.platform == "tpu" or shape[0] <= GPUS_PER_HOST or shape[0] % GPUS_PER_HOST == 0,
        f"{flag} {name!r}: more than {GPUS_PER_HOST} GPUs are whole hosts of them",
    )
    return kind, shape


def known() -> str:
    """The kinds of chips with examples, for messages and help."""
    return ", ".join(f"{kind} ({', '.join(c.examples.split())})" for kind, c in CHIPS.items())
