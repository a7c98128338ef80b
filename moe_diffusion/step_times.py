"""How long the steps of a run take, and how long they wait for their input."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

_RANKS = {"median": 0.5, "p90": 0.9, "max": 1.0}


class StepTimes:
    """The seconds of every step, from the moments at which steps are seen to have ended.

    The first moment starts the clock. Steps that are seen to end together took the same time each:
    a CPU computes a step while it is started, so that two end between some looks and none between
    others. Four bytes a step.
    """

    def __init__(self) -> None:
        self._seconds = array("f")
        self._waits = array("f")
        self._ended: int | None = None
        self._since = 0.0
        self._told = self._waits_told = 0  # how many of them a report had

    def ended(self, step: int, now: float) -> None:
        """At the time `now` it is seen that the steps up to `step` have ended."""
        if self._ended is not None and step > self._ended:
            count = step - self._ended
            self._seconds.extend([(now - self._since) / count] * count)
        if self._ended is None or step > self._ended:
            self._ended, self._since = step, now

    def waited(self, seconds: float) -> None:
        """A step waited so long for its input, which is part of its time."""
        self._waits.append(seconds)

    def pause(self, seconds: float) -> None:
        """So much time since the last moment belongs to no step."""
        self._since += seconds

    def lately(self) -> dict[str, float]:
        """`summary` of the steps that no call before this one was told of."""
        found = summary(self._seconds[self._told :], self._waits[self._waits_told :])
        self._told, self._waits_told = len(self._seconds), len(self._waits)
        return found

    def mean_ms(self) -> float:
        """Milliseconds of a step on average; NaN without one."""
        return 1e3 * sum(self._seconds) / len(self._seconds) if self._seconds else math.nan

    def overall(self) -> dict[str, float]:
        """`summary` of all steps."""
        return summary(self._seconds, self._waits)


def summary(seconds: Sequence[float], waits: Sequence[float]) -> dict[str, float]:
    """Milliseconds of steps, {"step_ms_median", "step_ms_p90", "step_ms_max", "input_wait_ms"}.

    A rank is the value of a step (the nearest rank), not one between two. The wait is the mean.
    All are NaN without a step.
    """
    ordered = sorted(seconds)
    found = {f"step_ms_{name}": math.nan for name in _RANKS} | {"input_wait_ms": math.nan}
    for name, share in _RANKS.items() if ordered else ():
        place = max(0, math.ceil(share * len(ordered)) - 1)
        found[f"step_ms_{name}"] = 1e3 * ordered[place]
    if len(waits):
        found["input_wait_ms"] = 1e3 * sum(waits) / len(waits)
    return found
