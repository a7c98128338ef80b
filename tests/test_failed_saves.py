"""A save that fails ends the run within seconds, with one line, whatever threads orbax has."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests import cli

# After two good checkpoints the third cannot be written. The last line tells when training ended.
RUN = """
import resource, shutil, signal, sys, time
from moe_diffusion.cli import exits_on_user_error
from moe_diffusion.training.loop import train
from tests.training import toy

workdir, how, asynchronous = sys.argv[1], sys.argv[2], sys.argv[3] == "asynchronous"
config = toy.make_config(
    train__num_steps=6, train__log_every=1, checkpoint__every=1,
    checkpoint__asynchronous=asynchronous, optim__eps=1e-3,
    # So many arrays that their index, unlike the other files of a run, is over the limit.
    ema__decays=tuple(i / 100 for i in range(40)),
)

class Batches(toy.Batches):
    def __next__(self):
        if self.next_index == 2:
            time.sleep(1)  # so that the second is whole
            if how == "gone":
                shutil.rmtree(workdir + "/checkpoints")
                open(workdir + "/checkpoints", "w").close()
            else:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(how), int(how)))
        return super().__next__()

try:
    exits_on_user_error(train)(config, toy.Toy(), toy.loss_fn, lambda: Batches(16), workdir)
finally:
    print(time.time())
"""


@pytest.mark.parametrize(
    "how",
    [
        ("gone", "asynchronous"),
        pytest.param(("gone", "synchronous"), marks=pytest.mark.slow),
        pytest.param(("20000", "asynchronous"), marks=pytest.mark.slow),
        pytest.param(("20000", "synchronous"), marks=pytest.mark.slow),
        pytest.param(("40000", "asynchronous"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def test_a_failed_save_ends_the_run(tmp_path, how):
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run"), *how],
        cwd=cli.ROOT,
        env=cli.environment(1) | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        timeout=cli.HANGS_AFTER,
    )
    ended = float(result.stdout.splitlines()[-1])
    error = cli.the_one_error(result.returncode, result.stderr)
    assert time.time() - ended < 20
    assert error.startswith(f"a checkpoint could not be written to {tmp_path}/run/checkpoints (")
    assert error.endswith("then run the same command again to resume")
    assert not (tmp_path / "run" / "in_use.lock").exists()
    if how[0] != "gone":
        assert cli.saved_steps(tmp_path / "run") == [1, 2]
