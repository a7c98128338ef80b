"""xmanager and xpk themselves, in environments of their own."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from launch import xm_launch
from tests import cli
from tests.launch import dry_runs
from tests.launch.environments import python_with

pytestmark = pytest.mark.slow
SHORT = ["--config.train.num_steps=2", "--config.checkpoint.every=2"]


def test_a_sweep_runs_as_plain_processes(tmp_path, monkeypatch, capfd):
    """Two routers through the local executor, without Docker; a third config fails and is named."""
    python = python_with("xmanager")
    for name, value in (cli.environment(1) | {"HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    swept = tmp_path / "swept.py"
    digits = (cli.ROOT / "configs" / "digits.py").read_text()
    swept.write_text(
        digits.partition("\n\ndef sweep")[0] + "\n\ndef sweep():\n"
        "    yield {'arg': 'router=token_choice'}\n"
        "    yield {'arg': 'router=diffmoe'}\n"
        "    yield {'data.source': 'folder:/nowhere'}\n"
    )
    words = [
        "--xm",
        str(python),
        "--sweep",
        "--accelerator",
        "cpu",
        "--workdir",
        f"{tmp_path}/runs",
    ]
    settings = [word for word in cli.digits()[2:] if "loss_weights" not in word]
    monkeypatch.chdir(cli.ROOT)
    with pytest.raises(SystemExit) as ended:
        xm_launch.main([*words, "--config", str(swept), *settings, *SHORT])
    output = capfd.readouterr()
    assert ended.value.code == 1
    assert "failed: source-folder-nowhere\n" in output.err
    for router in ("token_choice", "diffmoe"):
        run = tmp_path / "runs" / f"router-{router}"
        assert cli.saved_steps(run) == [2], output.out
        config = json.loads((run / "config.json").read_text())
        assert config["model"]["router"]["name"] == router
    with pytest.raises(SystemExit) as ended:
        xm_launch.main([*words[:2], *words[3:], "--config", "digits", *settings, *SHORT])
    assert ended.value.code == 0
    assert cli.saved_steps(tmp_path / "runs") == [2]


PARSE = """
import argparse, json, sys
from xpk.core.system_characteristics import get_system_characteristics
from xpk.parser.core import set_parser
parser = argparse.ArgumentParser()
set_parser(parser)
args = parser.parse_args(json.load(sys.stdin))
found, failed = get_system_characteristics(args)
counts = [found.vms_per_slice, args.num_slices, args.num_nodes]
print(json.dumps([found.topology, *counts, args.command]))
"""


def test_xpk_takes_our_commands():
    """The parser of xpk reads them, and means the slices that we mean."""
    python = python_with("xpk")

    def understood(words: list[str]) -> list:
        ran = subprocess.run(
            [python, "-I", "-c", PARSE], input=json.dumps(words), capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])

    train = "moe-diffusion train --config dsmoe_3b --workdir gs://bucket/dsmoe_3b"
    for name, wanted in {
        "xpk": ["16x16", 64, 2, 1, train],
        "xpk_gpu": [
            "N/A",
            1,
            1,
            2,
            "moe-diffusion evaluate --workdir /disk/run --num 50000 --cfg 1.5",
        ],
    }.items():
        line = (Path(dry_runs.GOLDENS) / f"{name}.txt").read_text()
        assert understood(shlex.split(line)[1:]) == wanted
