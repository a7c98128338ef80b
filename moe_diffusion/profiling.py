"""A trace of some steps of a run, for TensorBoard's profiler, XProf or Perfetto.

`--config.profile=100:105` traces the steps 100 to 105 into workdir/profile/. Every process writes
the trace of its own devices.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from moe_diffusion import remote
from moe_diffusion.errors import UserError
from moe_diffusion.ornaments import ornament
from moe_diffusion.writing import whole_file

FOLDER = "profile"
MOST = 1000  # steps; a trace of more fills the memory


def steps_of(text: str) -> tuple[int, int] | None:
    """The first and the last step of "100:105"; None for "".

    Raises:
      UserError: the text is something else.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last < first + MOST:
        raise UserError(
            f"profile = {text!r} is no range of steps from 1 on, like 100:105, of at most {MOST:,}"
        )
    return first, last


class Profiled:
    """A training step that is called as before, and traced where it should be.

    A trace that fails is told in a line, and training goes on.

    Args:
      train_step: returns a tree of arrays.
      start: the first call is step start + 1.
      steps: the config's `profile`, see `steps_of`. Steps that are done are not traced.
      workdir: may be remote.
    """

    def __init__(self, train_step: Callable, start: int, steps: str, workdir: str | os.PathLike):
        self._call, self._step, self._tracing = train_step, start, False
        self._first, self._last = steps_of(steps) or (0, 0)
        self._first = max(self._first, start + 1)
        self._workdir, self._folder = os.fspath(workdir), None

    def __call__(self, *args: Any) -> Any:
        self._step += 1
        if self._step == self._first <= self._last:
            jax.block_until_ready(args)
            self._begin()
        if not self._tracing:
            return self._call(*args)
        with jax.profiler.StepTraceAnnotation("train", step_num=self._step):
            found = self._call(*args)
        if self._step == self._last:
            jax.block_until_ready(found)
            self.close()
        return found

    def close(self) -> None:
        """Ends a trace that has begun, and writes it."""
        if self._tracing:
            self._tracing = False
            with ornament("the trace of some steps"):
                jax.profiler.stop_trace()
                _upload(self._folder, self._workdir)

    def _begin(self) -> None:
        with ornament("the trace of some steps"):
            far = remote.is_remote(self._workdir)
            self._folder = tempfile.mkdtemp() if far else os.path.join(self._workdir, FOLDER)
            jax.profiler.start_trace(self._folder)
            self._tracing = True


def _upload(folder: str, workdir: str) -> None:
    """Copies the files of a trace to a remote workdir."""
    if not remote.is_remote(workdir):
        return
    for path in filter(Path.is_file, Path(folder).rglob("*")):
        with whole_file(f"{workdir.rstrip('/')}/{FOLDER}/{path.relative_to(folder)}") as file:
            file.write(path.read_bytes())
