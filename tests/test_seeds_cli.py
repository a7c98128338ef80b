"""Seeds that no random numbers can begin with, on every command that takes one."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_diffusion import demo, evaluate, prepare, routing, sample, thresholds, train
from tests import cli

WORKDIR = ("--workdir", "nowhere")
COMMANDS = {
    "sample": (sample.main, (*WORKDIR, "--seed")),
    "routing": (routing.main, (*WORKDIR, "--seed")),
    "evaluate": (evaluate.main, (*WORKDIR, "--seed")),
    "thresholds": (thresholds.main, (*WORKDIR, "--gammas", "0.5", "--seed")),
    "prepare": (
        prepare.main,
        ("--source", "digits", "--size", "8", "--vae", "no", "--out", "no", "--seed"),
    ),
    "train": (train.main, ("--config", "configs/digits.py", *WORKDIR, "--config.seed=")),
    "demo": (demo.main, (*WORKDIR, "--config.seed=")),
}


@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**64)])
@pytest.mark.parametrize("command", COMMANDS)
def test_seeds(command, seed, capfd):
    main, args = COMMANDS[command]
    args = [*args, seed] if not args[-1].endswith("=") else [*args[:-1], args[-1] + seed]
    message = cli.refused(capfd, main, args)
    assert f"seed = {seed} must be from 0 to 2^63 - 1" in message
    assert not Path("nowhere").exists() and not Path("no").exists()
