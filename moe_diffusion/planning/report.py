"""Plans a run: whether it fits, what it costs, which preset suits it; as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from ml_collections import ConfigDict

from moe_diffusion.config import validate_devices
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.parallel import rules
from moe_diffusion.parallel.mesh import make_mesh
from moe_diffusion.planning import hlo
from moe_diffusion.planning.compile import (
    OutOfMemory,
    compile_program,
    drawn_together,
    state_bytes,
)
from moe_diffusion.planning.flops import flops_per_run
from moe_diffusion.planning.kernels import Dispatch, dispatch_of
from moe_diffusion.planning.memory import Memory, largest_batch
from moe_diffusion.planning.presets import ORDER, Outcome, amount, layout_of, recommend
from moe_diffusion.planning.repeats import EVERYTHING, Repeats, repeats_of, repeats_text
from moe_diffusion.planning.topologies import Topology

Say = Callable[[str], None]


@dataclass
class Plan:
    """What compiling one config for one topology showed. Bytes and FLOPs are those of one chip.

    Attributes:
      needed: bytes; None if the compiler refused and gave no number.
      memory, collectives, dispatch: empty if the compiler refused.
      flops: of one step, or of drawing one batch; None if the sampler chooses its own steps.
      seconds: the time that compiling took.
      layout: how weights and batch are split.
      times: how often every image is computed, where a batch does not fill the devices.
      repeats: what is computed more than once; None if it is unknown.
    """

    name: str
    what: str
    topology: Topology
    preset: str
    batch_size: int
    micro_batch: float  # images on a chip at a time; below 1, several chips share one
    fits: bool
    needed: int | None
    memory: dict[str, int]
    flops: float | None
    collectives: dict[str, int]
    dispatch: Dispatch | None
    seconds: float
    message: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    recommended: str | None = None
    reason: str = ""
    largest_micro_batch: int | None = None
    layout: str = ""
    times: float = 1
    repeats: Repeats | None = None

    @property
    def limit(self) -> int | None:
        return self.topology.hbm_bytes_per_chip

    @property
    def floor_seconds(self) -> float | None:
        """The time that the FLOPs alone take at the chip's peak."""
        chip = self.topology.chip
        return self.flops / chip.flops if chip and self.flops is not None else None

    def to_json(self) -> dict[str, Any]:
        dispatch = self.dispatch
        return {
            "config": self.name,
            "what": self.what,
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "chips": self.topology.num_chips,
            "device_kind": self.topology.devices[0].device_kind,
            "preset": self.preset,
            "batch_size": self.batch_size,
            "micro_batch": self.micro_batch,
            "fits": self.fits,
            "hbm_bytes_per_chip": self.needed,
            "hbm_limit_bytes": self.limit,
            "memory": self.memory,
            "flops_per_chip": self.flops,
            "floor_seconds": self.floor_seconds,
            "collective_bytes": self.collectives,
            "dispatch": None if dispatch is None else dispatch.backend,
            "dispatch_as_intended": None if dispatch is None else dispatch.as_intended,
            "kernels": {} if dispatch is None else dispatch.kernels,
            "layout": self.layout,
            "times_computed": self.times,
            "computed_repeatedly": self.repeats,
            "compile_seconds": round(self.seconds, 1),
            "presets": {name: vars(outcome) for name, outcome in self.outcomes.items()},
            "recommended_preset": self.recommended,
            "reason": self.reason,
            "largest_micro_batch": self.largest_micro_batch,
        }


def with_keys(config: ConfigDict, **keys: Any) -> ConfigDict:
    """A copy with parallel__preset="dp" and the like set."""
    config = config.copy_and_resolve_references()
    for key, value in keys.items():
        section = config
        *path, leaf = key.split("__")
        for name in path:
            section = section[name]
        section[leaf] = value
    return config


def make_plan(config: ConfigDict, what: str, topology: Topology, say: Say) -> Plan:
    """Compiles `config` as it is, with its own preset. Raises UserError if it cannot be split."""
    if config.model.dtype == "auto" and topology.platform != "cpu":
        config = with_keys(config, model__dtype="bfloat16")  # what "auto" means there
    asked = config.data.batch_size
    if what == "sample":
        drawn = drawn_together(config, topology.devices)
        config = with_keys(config, data__batch_size=drawn)
    validate_devices(config, topology.devices)
    say(
        f"compiling {what} for preset {config.parallel.preset}, "
        f"{_images_on_chips(config, what, topology)} at a time"
    )
    result = compile_program(config, what, topology.devices)
    per_chip, model = topology.devices_per_chip, build(config.model)
    plan = Plan(
        name=config.name,
        what=what,
        topology=topology,
        preset=config.parallel.preset,
        batch_size=asked,
        micro_batch=_per_chip(config, what, topology),
        fits=False,
        needed=None,
        memory={},
        flops=flops_per_run(model, config, what, topology.num_chips),
        collectives={},
        dispatch=None,
        seconds=result.seconds,
        layout=_layout(config, topology),
        times=config.data.batch_size / asked,
    )
    if isinstance(result, OutOfMemory):
        plan.needed = result.bytes_needed and result.bytes_needed * per_chip
        plan.message = result.message
        return plan
    memory, program = Memory.of(result.memory), hlo.parse(result.text)
    plan.needed, plan.memory = memory.total * per_chip, memory.times(per_chip)
    plan.fits = plan.limit is None or plan.needed <= plan.limit
    sent = hlo.collective_bytes(program)
    plan.collectives = {kind: size * per_chip for kind, size in sent.items()}
    plan.dispatch = dispatch_of(program, model, config.model, what, topology.platform)
    plan.repeats = repeats_of(program, model, config, what, len(topology.devices))
    if plan.times > 1:  # the images that fill the batch up are repetitions
        plan.repeats = {EVERYTHING: plan.times} | (plan.repeats or {})
    return plan


def compare_presets(plan: Plan, config: ConfigDict, say: Say) -> None:
    """Compiles for the other presets; fills in the plan's outcomes, recommendation and reason."""
    plan.outcomes[plan.preset] = _outcome(plan)
    for preset in _candidates(config, plan):
        other, note = with_keys(config, parallel__preset=preset), ""
        if preset == "fsdp_ep" and not config.parallel.expert:
            # As many devices share the experts as can do so evenly.
            sharing = math.gcd(config.model.moe.num_experts, plan.topology.devices_per_slice)
            other, note = with_keys(other, parallel__expert=sharing), f"parallel.expert={sharing}"
        if preset == "tp" and not config.parallel.tensor:
            # As few devices share an image as leave none idle.
            chips = plan.topology.devices_per_slice
            sharing = chips // math.gcd(plan.batch_size, chips)
            other, note = with_keys(other, parallel__tensor=sharing), f"parallel.tensor={sharing}"
        state = state_bytes(other, plan.what, plan.topology.devices)
        state *= plan.topology.devices_per_chip
        if plan.limit is not None and state > plan.limit:
            alone = "for the state and gradients alone" if plan.what != "sample" else "of weights"
            where = _layout(other, plan.topology)
            plan.outcomes[preset] = Outcome(False, state, None, alone, layout=where)
            continue
        try:
            tried = make_plan(other, plan.what, plan.topology, say)
            tried.message = tried.message or note
            plan.outcomes[preset] = _outcome(tried)
        except UserError as error:
            plan.outcomes[preset] = Outcome(False, None, None, str(error))
    plan.recommended, plan.reason = recommend(plan.outcomes, plan.limit)
    if plan.recommended is None:
        plan.reason += ": " + "; ".join(remedies(config, plan.what))


def search_batch(plan: Plan, config: ConfigDict, say: Say) -> None:
    """Fills in how many images a chip can take at a time: the largest of `memory.batch_sizes`."""
    if plan.limit is None:
        raise UserError(
            f"--search-batch needs a memory limit, and {plan.topology.devices[0].device_kind} has "
            "none: choose a TPU or GPU topology"
        )
    accumulate = config.optim.accumulate if plan.what != "sample" else 1

    def needed(images: int) -> int | None:
        size = images * len(plan.topology.devices) * accumulate
        tried = make_plan(with_keys(config, data__batch_size=size), plan.what, plan.topology, say)
        # A compiler that refuses may name only a part of the bytes that are needed.
        says_enough = tried.fits or (tried.needed or 0) > plan.limit
        return tried.needed if says_enough else None

    plan.largest_micro_batch = plan.topology.devices_per_chip * largest_batch(needed, plan.limit)


def remedies(config: ConfigDict, what: str) -> list[str]:
    """What makes a run smaller, most effective first."""
    found = ["take more chips"]
    if what != "sample":
        if config.model.remat == "none":
            found.append("--config.model.remat=cheap")
        if config.model.remat != "full":
            found.append("--config.model.remat=full")
        found.append(f"--config.optim.accumulate={2 * config.optim.accumulate}")
        if config.optim.mu_dtype != "bfloat16":
            found.append("--config.optim.mu_dtype=bfloat16")
    else:
        found.append("a smaller --config.data.batch_size")
    return found


def _per_chip(config: ConfigDict, what: str, topology: Topology) -> float:
    """Images on a chip at a time; a fraction where several chips share one."""
    images = config.data.batch_size // (config.optim.accumulate if what != "sample" else 1)
    whole, rest = divmod(images, topology.num_chips)
    return images / topology.num_chips if rest else whole


def _images_on_chips(config: ConfigDict, what: str, topology: Topology) -> str:
    return images_on_chips(_per_chip(config, what, topology))


def images_on_chips(per_chip: float) -> str:
    """ "2 images on a chip", "1 image on 4 chips"; per_chip: images for each chip."""
    share = Fraction(per_chip).limit_denominator(2**20)
    images = f"{share.numerator} image{'s' * (share.numerator > 1)}"
    chips = "a chip" if share.denominator == 1 else f"{share.denominator} chips"
    return f"{images} on {chips}"


def _outcome(plan: Plan) -> Outcome:
    sent = sum(plan.collectives.values())
    found = (plan.times, plan.layout, plan.repeats)
    return Outcome(plan.fits, plan.needed, sent, plan.message, *found)


def _layout(config: ConfigDict, topology: Topology) -> str:
    mesh = make_mesh(config.parallel, topology.devices)
    return layout_of(mesh, config.parallel.preset, config.model.hidden_size)


def _candidates(config: ConfigDict, plan: Plan) -> list[str]:
    """The other presets that could make a difference."""
    if len(plan.topology.devices) == 1:
        return []
    names = [name for name in ORDER if name in rules.PRESETS and name != plan.preset]
    sharing = math.gcd(config.model.moe.num_experts, plan.topology.devices_per_slice)
    if config.model.router.name == "dense" or sharing == 1:
        names = [name for name in names if name != "fsdp_ep"]
    if plan.what == "sample":  # zero1 only splits what the update needs
        names = [name for name in names if name != "zero1"]
    if plan.batch_size % len(plan.topology.devices) == 0:
        names = [name for name in names if name != "tp"]
    return names


def table(plan: Plan) -> str:
    """The plan as lines of text."""
    topology = plan.topology
    slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
    lines = [
        f"{plan.name}: {plan.what} on {slices}{topology.name} ({topology.num_chips} x "
        f"{topology.devices[0].device_kind}), preset {plan.preset}",
        f"{plan.batch_size} image{'s' * (plan.batch_size > 1)} in all, "
        f"{images_on_chips(plan.micro_batch)} at a time",
        plan.layout,
        "",
        "memory of a chip",
    ]
    lines += [f"  {kind:<22}{amount(size):>10}" for kind, size in plan.memory.items()]
    lines.append(f"  {'needed':<22}{amount(plan.needed):>10}")
    if plan.limit is not None:
        share = f" ({plan.needed / plan.limit:.0%} of it)" if plan.needed else ""
        verdict = f"fits{share}" if plan.fits else f"does not fit{share}"
        lines.append(f"  {'limit':<22}{amount(plan.limit):>10}   {verdict}")
    if plan.message:
        lines.append(f"  {plan.message}")
    lines += ["", *_work(plan)]
    if plan.outcomes:
        lines += ["", f"{'preset':<12}{'needs':>12}{'sends':>12}"]
        for name in sorted(plan.outcomes, key=ORDER.index):
            outcome = plan.outcomes[name]
            note = outcome.note if outcome.fits else f"does not fit {outcome.note}"
            if outcome.times > 1:
                note = f"{note}, computes every image {outcome.times:.3g} times".lstrip(", ")
            line = f"{name:<12}{amount(outcome.needed):>12}{amount(outcome.sent):>12}   {note}"
            lines.append(line.rstrip())
            lines += [f"    {text}" for text in (outcome.layout, *_more_than_once(outcome)) if text]
        lines.append(f"recommended: {plan.recommended or 'none'}: {plan.reason}")
    if plan.largest_micro_batch is not None:
        lines.append(f"largest batch on a chip at a time: {plan.largest_micro_batch} images")
    return "\n".join(lines)


def _more_than_once(outcome: Outcome) -> list[str]:
    return [] if outcome.repeats is None else repeats_text(outcome.repeats)


def _work(plan: Plan) -> list[str]:
    """The lines on FLOPs, collectives, kernels and compilation."""
    lines = []
    if plan.flops is None:
        lines.append("FLOPs of a chip: unknown, the sampler chooses its own steps")
    else:
        line = f"{'FLOPs of a chip':<24}{plan.flops / 1e12:>10.3f} TFLOP"
        if plan.floor_seconds is not None:
            rate = plan.topology.chip.flops / 1e12
            line += f", at {rate:g} TFLOP/s no less than {1e3 * plan.floor_seconds:.3g} ms"
        lines.append(line)
    lines.append("sent by a chip")
    lines += [f"  {kind:<22}{amount(size):>10}" for kind, size in plan.collectives.items()]
    lines.append(f"  {'in all':<22}{amount(sum(plan.collectives.values())):>10}")
    if plan.dispatch is not None:
        lines.append(f"dispatch: {plan.dispatch.describe()}")
    lines += repeats_text(plan.repeats)
    lines.append(f"compiled in {plan.seconds:.1f} s")
    return lines
