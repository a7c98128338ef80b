"""Recommends a sharding preset: of those that fit, the one that sends the fewest bytes.

Where a batch is smaller than the number of devices, those that compute an image several times count
only if no other fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import Mesh

from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import batch_axes

ORDER = ("dp", "zero1", "fsdp", "fsdp_ep", "tp")  # from simple to involved
CLOSE = 0.02  # a simpler preset may send this share more than the best one


@dataclass(frozen=True)
class Outcome:
    """What one preset costs on one chip.

    Attributes:
      needed: bytes of memory; None if they are unknown, because the preset does not fit.
      sent: bytes in one run of the program; None if nothing was compiled.
      note: a config key that the preset also needs, or why it does not fit.
      times: how often every image is computed, where a batch does not fill the devices.
      layout: how weights and batch are split, see `layout_of`.
      repeats: what is computed more than once; None if nothing was compiled.
    """

    fits: bool
    needed: int | None
    sent: int | None
    note: str = ""
    times: float = 1
    layout: str = ""
    repeats: Mapping[str, float] | None = None


def recommend(outcomes: Mapping[str, Outcome], limit: int | None) -> tuple[str | None, str]:
    """The preset to use and why; (None, why) if none fits."""
    fitting = [preset for preset in ORDER if preset in outcomes and outcomes[preset].fits]
    if not fitting:
        return None, "no preset fits"
    once = min(outcomes[preset].times for preset in fitting)
    sound = [preset for preset in fitting if outcomes[preset].times == once]
    least = min(outcomes[preset].sent for preset in sound)
    best = next(p for p in sound if outcomes[p].sent <= (1 + CLOSE) * least)
    reasons = []
    for preset in ORDER:
        if preset not in outcomes or preset == best:
            continue
        other = outcomes[preset]
        if not other.fits:
            reasons.append(f"{preset} does not fit{_size(other, limit)}")
        elif other.times > once:
            reasons.append(f"{preset} computes {other.times / once:.3g} times as much")
        elif other.sent > (1 + CLOSE) * outcomes[best].sent:
            reasons.append(f"{preset} sends {amount(other.sent)} a step")
        else:
            reasons.append(f"{preset} sends no less and is more involved")
    note = f"with {outcomes[best].note}, " if outcomes[best].note else ""
    sends = f"{note}it fits and sends {amount(outcomes[best].sent)} a step from each chip"
    return best, "; ".join([sends, *reasons])


def layout_of(mesh: Mesh, preset: str, width: int) -> str:
    """How a preset splits weights and batch, with the sizes of the mesh axes.

    "weights: heads, mlp over tensor=8; batch over data=1"

    width: of the model, its logical axis `embed`.
    """

    def over(axes: tuple[str, ...]) -> str:
        split = [f"{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1]
        return " x ".join(split) or "nothing"

    places: dict[str, list[str]] = {}
    for name, axes in rules.PRESETS[preset].params.items():
        used = rules.dividing(width, axes, mesh) if name == "embed" else axes
        note = "" if over(used) == over(axes) else f" ({over(axes)} does not divide {width})"
        places.setdefault(f"{over(used)}{note}", []).append(name)
    weights = ", ".join(f"{', '.join(names)} over {place}" for place, names in places.items())
    return f"weights: {weights or 'whole'}; batch over {over(batch_axes(mesh))}"


def amount(size: float | None) -> str:
    """Bytes as text with a decimal unit: 512 B, 1.05 MB, 3.16 GB; "?" for None."""
    if size is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:,.0f} {unit}"
        size /= 1000


def _size(outcome: Outcome, limit: int | None) -> str:
    if outcome.needed is None or limit is None:
        return ""
    note = f" {outcome.note}" if outcome.note else ""
    return f" ({amount(outcome.needed)}{note}, a chip has {amount(limit)})"
