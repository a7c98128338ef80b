"""Slices of TPU chips: fast links inside of each, the data center's network (DCN) between them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def slices_of(devices: Iterable[Any]) -> list[list[Any]]:
    """The devices of each slice, in order; those that are no TPU chips are one slice."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        number = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(number, []).append(device)
    return list(slices.values())
