"""Disturbs trainings of two processes, restarts both as a launcher does, and compares the ends.

  python -m tests.campaign.several --runs 30 --seed 0 --out several.json

Every run trains configs/digits.py, at a size of seconds, with the real command line as two
processes of one device each. One or both are killed, stopped or paused, once. When one has ended
with anything but 0, the loop waits until the other has ended by itself, for at most `NOTICED`
seconds, and starts both again; exit code 2 ends a case, since restarting does not help. The end
must have the bits of an undisturbed run of two processes. The same command again goes on where a
campaign was stopped.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import tests.conftest  # noqa: F401  the environment of children; before anything imports jax

from moe_diffusion.clusters import LOST  # isort: skip
from moe_diffusion.signals import RUN_AGAIN  # isort: skip
from tests import cli  # isort: skip
from tests.campaign import disturbed  # isort: skip
from tests.campaign.started import ARGS, NUM_STEPS, SAVED_EVERY, Case, Fault, Start  # isort: skip

PROCESSES = 2
NOTICED = LOST + 60  # seconds from the loss of a process to the end of the others
RESTARTS = 4


class Pair(Case):
    """A run of two processes."""

    def begin(self) -> list[Start]:
        """Starts both."""
        self.starts += 1
        args = [*ARGS, "--workdir", str(self.workdir)]
        own = cli.environment(1) | {"PYTHONPATH": str(cli.ROOT)} | self.mark
        return [
            Start(self.folder, 10 * self.starts + number, args, own | place)
            for number, place in enumerate(cli.cluster(PROCESSES))
        ]

    def at_step(self, pair: list[Start], step: int) -> None:
        """Waits until the first process, which speaks, has told of a step."""
        if not pair[0].wait_for_line(f"step {step}/"):
            raise Fault(f"ended before step {step}: {pair[0].error.read_text()[-1500:]}")

    def ended(self, pair: list[Start]) -> list[int]:
        """Waits for both, and after the first loss for no longer than `NOTICED`."""
        lost_at = None
        while any(start.process.poll() is None for start in pair):
            if lost_at is None and any(start.process.poll() for start in pair):
                lost_at = time.monotonic()
            if lost_at is not None and time.monotonic() > lost_at + NOTICED:
                raise Fault(f"a process lives {NOTICED} s after the other has ended")
            for start in pair:
                start.check_time()
            time.sleep(0.02)
        if lost_at is not None:
            self.note(f"the last ended {time.monotonic() - lost_at:.0f} s after the first")
        return [start.process.returncode for start in pair]

    def finish(self) -> None:
        """The launcher's loop: both again, until both end with 0."""
        for _ in range(RESTARTS):
            codes = self.ended(self.begin())
            if codes == [0] * PROCESSES:
                return
            if 2 in codes:
                raise Fault(f"refused: {codes}")
        raise Fault(f"{RESTARTS} restarts did not bring it to an end")


def _signalled(number: int, both: bool, saving: bool) -> Callable[[Pair], None]:
    """A signal to one of the processes, or to both, at a random step or during a save."""

    def disturb(case: Pair) -> None:
        pair = case.begin()
        if saving:
            step = case.rng.choice(range(SAVED_EVERY, NUM_STEPS, SAVED_EVERY))
            name = f"{step}.orbax-checkpoint-tmp*"
            pair[0].wait_for(lambda: any((case.workdir / "checkpoints").glob(name)))
            time.sleep(case.rng.choice((0, 0.01, 0.03, 0.06)))
        else:
            step = case.rng.randint(1, NUM_STEPS - 3)
            case.at_step(pair, step)
        chosen = pair if both else [pair[case.turn % PROCESSES]]
        for start in chosen:
            start.send(number)
        who = "both" if both else f"process {case.turn % PROCESSES}"
        case.note(f"{signal.Signals(number).name} to {who} at step {step}")
        codes = case.ended(pair)
        case.note(f"ended with {codes}")
        if number == signal.SIGTERM and set(codes) - {0, RUN_AGAIN}:
            raise Fault(f"told to stop, they ended with {codes}")
        case.finish()

    return disturb


def _paused(case: Pair) -> None:
    """SIGSTOP of one for some seconds: nothing but a pause."""
    pair, step = case.begin(), case.rng.randint(1, NUM_STEPS - 3)
    case.at_step(pair, step)
    seconds, one = case.rng.uniform(1, 10), pair[case.turn % PROCESSES]
    one.send(signal.SIGSTOP)
    time.sleep(seconds)
    one.send(signal.SIGCONT)
    case.note(f"process {case.turn % PROCESSES} paused for {seconds:.1f} s at step {step}")
    if case.ended(pair) != [0] * PROCESSES:
        raise Fault("a pause ended the run")


def _hung(case: Pair) -> None:
    """SIGSTOP of one for ever: the other ends, and a launcher kills the one that hangs."""
    pair, step = case.begin(), case.rng.randint(1, NUM_STEPS - 3)
    case.at_step(pair, step)
    hung = case.turn % PROCESSES
    pair[hung].send(signal.SIGSTOP)
    since, other = time.monotonic(), pair[1 - hung]
    while other.process.poll() is None:
        if time.monotonic() > since + NOTICED:
            raise Fault(f"the other did not notice within {NOTICED} s")
        time.sleep(0.1)
    case.note(f"process {hung} hung at step {step}, noticed after {time.monotonic() - since:.0f} s")
    pair[hung].send(signal.SIGKILL)
    pair[hung].process.wait()
    case.finish()


KINDS: dict[str, Callable[[Pair], None]] = {
    "one killed": _signalled(signal.SIGKILL, both=False, saving=False),
    "both killed": _signalled(signal.SIGKILL, both=True, saving=False),
    "one terminated": _signalled(signal.SIGTERM, both=False, saving=False),
    "both terminated": _signalled(signal.SIGTERM, both=True, saving=False),
    "one killed during a save": _signalled(signal.SIGKILL, both=False, saving=True),
    "both killed during a save": _signalled(signal.SIGKILL, both=True, saving=True),
    "one terminated during a save": _signalled(signal.SIGTERM, both=False, saving=True),
    "one paused": _paused,
    "one hung": _hung,
}


if __name__ == "__main__":
    disturbed.main("several", __doc__, 30, KINDS, Pair)
