"""What a long command does when it is told to stop."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils
from tqdm import tqdm

# The exit code of a command that a signal stopped and that saved what it had (EX_TEMPFAIL): a
# launcher shall run the same command again.
RUN_AGAIN = 75


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block at once, with `RUN_AGAIN`: for work that keeps its finished parts."""

    def end(number: int, _: Any) -> None:
        name = signal.Signals(number).name
        tqdm.write(f"stopped by {name}; run the same command again to go on", file=sys.stderr)
        sys.exit(RUN_AGAIN)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopSignal:
    """Turns SIGTERM and SIGINT into a question; a second signal ends the process as usual.

    With several processes only SIGTERM counts, and jax's preemption service, which listens to it,
    makes them stop at the same step, whichever of them is told.
    """

    def __enter__(self) -> StopSignal:
        self.name, self._received, self._previous = "SIGTERM", False, {}
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGTERM, signal.SIGINT)
            self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, _: Any) -> None:
        self.name, self._received = signal.Signals(number).name, True
        self.__exit__()

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process must ask at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def farewell(self, step: int, num_steps: int) -> str:
        """What to tell the user once the state of `step` is saved."""
        return (
            f"stopped by {self.name} after step {step} of {num_steps}, which is saved; "
            "run the same command again to resume"
        )
