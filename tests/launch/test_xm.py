"""xmanager and xpk themselves, in environments of their own."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import job, xm_launch, xpk
from tests import cli
from tests.launch import dry_runs
from tests.launch.environments import python_with

pytestmark = pytest.mark.slow


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Runs launch/xm_launch.py with a workdir and words; returns the exit code."""
    python = python_with("xmanager")
    assert not list(python.parents[1].glob("lib/*/site-packages/jax"))  # the runs have another one
    # xmanager keeps a list of experiments in the home folder.
    for name, value in (cli.environment(1) | {"HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(cli.ROOT)
    settings = cli.digits(train__num_steps=3, checkpoint__every=3)[2:]

    def ends_with(workdir: Path, *words: str) -> int:
        known = ["--xm", str(python), "--accelerator", "cpu", "--workdir", str(workdir)]
        with pytest.raises(SystemExit) as ended:
            xm_launch.main([*known, *words, *settings])
        return ended.value.code or 0

    return ends_with


def test_digits_train_as_a_plain_process_without_docker(experiment, tmp_path, capfd):
    code = experiment(tmp_path / "run", "--config", "configs/digits.py")
    output = capfd.readouterr()
    assert code == 0, output.err
    assert "unit 1: digits\n" in output.out
    assert [line["step"] for line in cli.metrics(tmp_path / "run")] == [1, 2, 3]
    assert cli.saved_steps(tmp_path / "run") == [3]


def test_of_a_sweep_every_unit_runs_and_those_that_fail_are_named(experiment, tmp_path, capfd):
    swept = tmp_path / "swept.py"
    digits = (cli.ROOT / "configs" / "digits.py").read_text()
    swept.write_text(
        digits.partition("\n\ndef sweep")[0] + "\n\ndef sweep():\n"
        "    yield {'data.source': 'folder:/nowhere'}\n"
        "    yield {'arg': 'router=token_choice', 'seed': 7}\n"
    )
    code = experiment(tmp_path / "runs", "--config", str(swept), "--sweep", "--at-once", "2")
    output = capfd.readouterr()
    assert code == 1
    assert "failed: source-folder-nowhere\n" in output.err
    run = tmp_path / "runs" / "router-token_choice-seed-7"
    assert cli.saved_steps(run) == [3], output.out
    assert json.loads((run / "config.json").read_text())["seed"] == 7


# What xpk makes of command lines: of each its slice, its command, and the codes that restart it.
PARSE = """
import argparse, json, sys
from xpk.commands.workload import get_restart_exit_codes
from xpk.core.system_characteristics import get_system_characteristics
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser()
set_parser(parser)
found = []
for words in json.load(sys.stdin):
    args = parser.parse_args(words)
    system, failed = get_system_characteristics(args)
    found.append({
        "slice": [system.topology, system.vms_per_slice, args.num_slices, args.num_nodes],
        "restarts": [args.max_restarts, args.termination_grace_period_seconds],
        "codes": get_restart_exit_codes(args),
        "env": args.env,
        "command": args.command,
    })
print(json.dumps(found))
"""


def test_xpk_takes_our_commands():
    """The parser of xpk reads them, and means the slices and the restarts that we mean."""
    names = ("xpk", "xpk_gpu")
    lines = [(dry_runs.GOLDENS / f"{name}.txt").read_text() for name in names]
    words = [shlex.split(line.splitlines()[0])[1:] for line in lines]
    ran = subprocess.run(
        [python_with("xpk"), "-I", "-c", PARSE],
        input=json.dumps(words),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    tpu, gpu = json.loads(ran.stdout.splitlines()[-1])
    assert tpu["slice"] == ["16x16", 64, 2, 1]
    assert tpu["command"] == "moe-diffusion train --config dsmoe_3b --workdir gs://bucket/dsmoe_3b"
    assert [name.partition("=")[0] for name in tpu["env"]] == ["LIBTPU_INIT_ARGS"]
    assert gpu["slice"] == ["N/A", 1, 1, 2]
    assert gpu["command"] == ("moe-diffusion evaluate --workdir /disk/run --num 50000 --cfg 1.5")
    for found in (tpu, gpu):
        assert found["restarts"] == ["3", str(xpk.GRACE)]
        codes = found["codes"]
        assert {1, job.RUN_AGAIN, 137, 143} <= set(codes)
        assert job.USER_ERROR not in codes and 0 not in codes
        assert codes == sorted(codes)  # Kubernetes wants them in order
