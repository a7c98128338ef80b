"""What launchers know of accelerators: how many hosts one has, and what clusters call it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from moe_diffusion import chips
from moe_diffusion.chips import CHIPS, GPUS_PER_HOST
from moe_diffusion.errors import UserError

CHIPS_PER_HOST = 4


@dataclass(frozen=True)
class _TPU:
    """Names of a kind of TPU.

    Attributes:
      cloud: what Google's accelerator types begin with.
      cores: what those types count for one chip.
      runtime: the software version of a TPU VM (cloud.google.com/tpu/docs/runtimes); "" if the
        Cloud TPU API does not offer this kind.
      gke: value of the label cloud.google.com/gke-tpu-accelerator.
    """

    cloud: str
    cores: int
    runtime: str
    gke: str


TPUS = {
    "v4": _TPU("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": _TPU("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": _TPU("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": _TPU("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "tpu7x": _TPU("tpu7x", 2, "", "tpu7x"),
}
# Value of the label cloud.google.com/gke-accelerator.
GPUS = {"a100": "nvidia-tesla-a100", "h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb"}
# The slices of v5e and v6e, by their number of chips; a number says nothing else of its shape.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


@dataclass(frozen=True)
class Accelerator:
    """One TPU slice, some GPUs, or CPUs.

    Attributes:
      kind: a key of `CHIPS`, or "cpu".
      shape: of a TPU slice; (number,) of GPUs; () of CPUs.
    """

    kind: str
    shape: tuple[int, ...]

    @property
    def platform(self) -> str:
        """ "tpu", "cuda" or "cpu"."""
        return "cpu" if self.kind == "cpu" else CHIPS[self.kind].platform

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Machines of this accelerator; one for CPUs, unless the job says otherwise."""
        per_host = {"tpu": CHIPS_PER_HOST, "cuda": GPUS_PER_HOST, "cpu": 1}[self.platform]
        return -(-self.chips // per_host)

    @property
    def topology(self) -> str:
        """The shape as clusters write it: "4x4x4"."""
        return "x".join(map(str, self.shape))

    @property
    def cloud_type(self) -> str:
        """Google's name of a TPU slice, like v5litepod-256; of v4 and v5p it counts cores."""
        names = TPUS[self.kind]
        return f"{names.cloud}-{self.chips * names.cores}"

    def __str__(self) -> str:
        return f"{self.kind}:{self.topology}" if self.shape else self.kind


def parse(text: str) -> Accelerator:
    """Reads an accelerator, spelled as for `plan` or by its number of chips.

    "v5e:16x16" and "v5e-256" are the same slice; "v5p:4x4x4" has 64 chips; "h100:8" are eight GPUs.

    Raises:
      UserError: the kind is unknown, or has no such shape.
    """
    if text == "cpu":
        return Accelerator("cpu", ())
    match = re.fullmatch(r"(\w+)-([1-9]\d*)", text)
    if match and match[1] in CHIPS:
        kind, number = match.groups()
        shape = (int(number),) if kind in GPUS else _flat(text, kind, int(number))
        text = str(Accelerator(kind, shape))
    found = Accelerator(*chips.parse(text, "--accelerator", "cpu, v5e-256"))
    if found.platform == "tpu" and found.chips > CHIPS_PER_HOST and found.chips % CHIPS_PER_HOST:
        raise UserError(f"--accelerator {text} is no slice: a host has {CHIPS_PER_HOST} chips")
    return found


def _flat(text: str, kind: str, number: int) -> tuple[int, ...]:
    """The shape of v5e-256 and the like."""
    if CHIPS[kind].dims != 2:
        raise UserError(
            f"--accelerator {text}: Google's names of {kind} count cores, not chips; write the "
            f"shape instead, like {CHIPS[kind].examples.split()[-1]}"
        )
    shapes = {math.prod(shape): shape for shape in FLAT}
    if number not in shapes:
        numbers = ", ".join(map(str, shapes))
        raise UserError(f"--accelerator {text} is no slice: {kind} has {numbers} chips")
    return shapes[number]
