"""The description of a job: accelerators, and what cannot be."""

from __future__ import annotations

import importlib
import math

import pytest

from launch import accelerators, job, sweeps, xm_launch
from moe_diffusion import signals
from moe_diffusion.chips import CHIPS
from moe_diffusion.errors import UserError
from tests import cli

BASE = "--config digits --workdir gs://b/run"
SLURM = "slurm --accelerator h100:8 --config digits --workdir /w"
TPU = f"tpu_vm --zone z --install x --accelerator v5e-16 {BASE}"
GKE = f"gke --image i --accelerator v5e-16 {BASE}"
XPK = f"xpk --image i --cluster c {BASE}"
XM = f"xm_launch --xm /nowhere/python --accelerator cpu {BASE}"


@pytest.mark.parametrize(
    "text, shape, chips, hosts, cloud",
    [
        ("v5e-256", (16, 16), 256, 64, "v5litepod-256"),
        ("v5e:16x16", (16, 16), 256, 64, "v5litepod-256"),
        ("v6e-1", (1, 1), 1, 1, "v6e-1"),
        ("v6e:4x8", (4, 8), 32, 8, "v6e-32"),
        # Google counts two cores a chip: v4-128 has 64 chips on 16 hosts.
        ("v4:4x4x4", (4, 4, 4), 64, 16, "v4-128"),
        ("v5p:2x2x1", (2, 2, 1), 4, 1, "v5p-8"),
        ("h100:8", (8,), 8, 1, None),
        ("h100-8", (8,), 8, 1, None),
        ("a100:1", (1,), 1, 1, None),
        ("h200:64", (64,), 64, 8, None),
        ("cpu", (), 1, 1, None),
    ],
)
def test_accelerators(text, shape, chips, hosts, cloud):
    found = accelerators.parse(text)
    assert (found.shape, found.chips, found.hosts) == (shape, chips, hosts)
    assert cloud is None or found.cloud_type == cloud
    assert accelerators.parse(str(found)) == found


@pytest.mark.parametrize(
    "text, message",
    [
        ("v9:2x2", "--accelerator 'v9:2x2' is unknown; known are cpu, v5e-256 and shapes of v4 ("),
        ("v5e", "--accelerator 'v5e' is unknown"),
        ("cpu:4", "--accelerator 'cpu:4' is unknown"),
        ("v5e:0x4", "a shape of v5e has 2 sizes from 1 on, as in v5e:2x2 or v5e:16x16"),
        ("v5e-12", "v5e-12 is no slice: v5e has 1, 4, 8, 16, 32, 64, 128, 256 chips"),
        ("v5e:4x4x4", "a shape of v5e has 2 sizes from 1 on, as in v5e:2x2 or v5e:16x16"),
        ("v5e:3x3", "v5e:3x3 is no slice: a host has 4 chips"),
        ("v5p-128", "names of v5p count cores, not chips; write the shape instead, like v5p:8x8x8"),
        ("h100:12", "more than 8 GPUs are whole hosts of them"),
        ("h100-12", "more than 8 GPUs are whole hosts of them"),
        ("h100:2x4", "a shape of h100 has 1 sizes from 1 on, as in h100:8"),
    ],
)
def test_what_is_no_accelerator(text, message):
    with pytest.raises(UserError, match="--accelerator") as refused:
        accelerators.parse(text)
    assert message in str(refused.value)


@pytest.mark.tpu_aot
def test_the_slices_of_launchers_are_those_of_the_compiler():
    """`plan` compiles for each of them, with as many chips; what is none is refused by both."""
    from moe_diffusion.planning.topologies import describe

    flat = [f"{kind}-{math.prod(shape)}" for kind in ("v5e", "v6e") for shape in accelerators.FLAT]
    shapes = [name for kind in accelerators.TPUS for name in CHIPS[kind].examples.split()]
    for name in [*flat, *shapes]:
        found = accelerators.parse(name)
        assert describe(str(found)).num_chips == found.chips, name
    for name in ("v5e:3x3", "v5p:1x1x5"):
        for parse in (accelerators.parse, describe):
            with pytest.raises(UserError, match=f"{name} is no slice"):
                parse(name)


@pytest.mark.parametrize(
    "words, message",
    [
        (f"{SLURM} --name My_Run", "--name My_Run is no name for a cluster: take at most 40 of"),
        (f"{SLURM} --name {'a' * 41}", "is no name for a cluster"),
        (f"{SLURM} --nodes 3", "--nodes 3: h100:8 are 8 GPUs, which cannot be shared evenly"),
        (f"{SLURM} --slices 2", "--slices 2 are of TPUs; of h100:8 raise the number"),
        (f"{SLURM} --slices 0", "--slices 0 must be at least 1"),
        (f"{SLURM} --max-restarts -1", "--max-restarts -1 must not be negative"),
        (f"{SLURM} --env A", "--env A is no variable: write NAME=VALUE"),
        (f"{SLURM} --env 1=2", "--env 1=2 is no variable"),
        (f"{SLURM} --env A=1\n2", "--env A has several lines"),
        (f"{SLURM} --sbatch=-p", "--sbatch -p is no option"),
        (f"{SLURM} --config nothere", "--config nothere: there is no such file"),
        (f"{SLURM} --command sample", "--command sample takes no --config: the workdir has it"),
        ("slurm --accelerator h100:8 --config digits", "--command train needs --workdir"),
        ("slurm --accelerator h100:8 --workdir /w", "--command train needs --config"),
        ("slurm --accelerator cpu --command prepare --config.seed=1", "sets keys of a config, and"),
        ("slurm --accelerator cpu --config digits --workdir /w --tasks-per gpu", "needs GPUs, and"),
        ("slurm --accelerator v5e-8 --config digits --workdir /w", "TPUs have no Slurm"),
        ("slurm --accelerator cpu --config digits --workdir az://x", "az:// is not supported"),
        (f"{TPU} --workdir runs/x", "--workdir runs/x is local, and is deleted with the TPU"),
        (f"{TPU} --workdir runs/x --keep", "its hosts share no folder: name a remote one"),
        (f"{TPU} --spot --reserved", "--spot and --reserved exclude each other"),
        (f"{TPU} --accelerator h100:8", "h100:8 is no TPU that comes as a VM: for tpu7x use"),
        (f"{TPU} --accelerator tpu7x:2x2x1", "tpu7x:2x2x1 is no TPU that comes as a VM"),
        (f"{TPU} --install a.whl", "--install a.whl: there is no such file"),
        (f"{TPU} --nodes 3", "--nodes 3: a slice v5e:4x4 has 4 hosts; leave the flag out"),
        (f"{GKE} --workdir /w", "--workdir /w is local, and a container loses its files"),
        (f"{XPK} --accelerator v5e-8 --workdir /w", "or mount a --storage"),
        (f"{XPK} --accelerator cpu", "--accelerator cpu: xpk takes TPUs and whole hosts of h100"),
        (f"{XPK} --accelerator h100:4", "xpk takes TPUs and whole hosts of h100 or h200"),
        (f"{XPK} --accelerator v5e-8 --spot --reservation r", "exclude each other"),
        (
            f"{XPK} --accelerator v5e-8 --xpk /nowhere/xpk",
            "--xpk /nowhere/xpk is not there: python3.11",
        ),
        (XM, "--xm /nowhere/python is not there: python3.11 -m venv ~/xm && ~/xm/bin/pip install"),
        (f"{XM} --executor vertex", "--executor vertex needs --image"),
        (f"{XM} --executor vertex --image i --accelerator h100:8", "knows a100 and cpu; use"),
        (f"{XM} --nodes 2", "2 machines: xmanager's executors run a job on one"),
        (f"{XM} --at-once 0", "--at-once 0 must be at least 1"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launcher, *words = words.split(" ")
    error = cli.refused(capfd, importlib.import_module(f"launch.{launcher}").main, words)
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_single_machine_may_have_a_local_workdir(capfd):
    tpu = importlib.import_module("launch.tpu_vm")
    words = "--accelerator v5e-4 --zone z --install x --config digits --workdir r --keep --dry_run"
    tpu.main(words.split())
    assert "moe-diffusion train --config digits --workdir r" in capfd.readouterr().out


@pytest.mark.parametrize(
    "config, name",
    [
        ("configs/dsmoe_l.py", "dsmoe-l"),
        ("digits:router=dense", "digits"),
        ("a/My Run_2.py", "my-run-2"),
    ],
)
def test_a_job_is_called_like_its_config(config, name):
    assert job._name_of(config) == name


def described(words: str) -> job.Job:
    parser = job.make_parser("slurm", "Doc.\n\n  example")
    return job.parse(parser, words.split())[1]


def test_the_command_of_a_job():
    made = described("--accelerator cpu --config digits --config.seed 3 --workdir w -- --json")
    assert made.words == "train --config digits --config.seed=3 --workdir w --json".split()
    made = described("--accelerator cpu --command prepare --workdir w -- --source digits --size 8")
    assert made.words == "prepare --out w --source digits --size 8".split()
    assert described("--accelerator cpu --command sample --workdir s3://b/r").drivers == (
        "s3fs",
        "boto3",
    )


def test_the_exit_code_is_that_of_the_commands():
    assert job.RUN_AGAIN == 75 == signals.RUN_AGAIN


# Sweeps


def sweep(tmp_path, body: str) -> list[tuple[str, job.Job]]:
    file = tmp_path / "swept.py"
    file.write_text(
        "from moe_diffusion.config import default\n\n\ndef get_config(arg=None):\n"
        f"    config = default()\n    config.name = str(arg)\n    return config\n\n\n{body}\n"
    )
    return sweeps.jobs_of(
        described(f"--accelerator cpu --config {file}:own --config.seed=1 --workdir w/ --name x")
    )


def test_every_dict_of_a_sweep_is_a_job(tmp_path):
    made = sweep(
        tmp_path,
        "def sweep():\n"
        "    yield {'optim.learning_rate': 3e-4, 'model.qk_norm': True}\n"
        "    yield {'arg': 'size=2,b', 'ema.decays': (0.9, 0.99)}",
    )
    labels, made = zip(*made, strict=True)
    assert labels == ("learning_rate-0.0003-qk_norm-true", "size-2-b-decays-0.9-0.99")
    assert [one.workdir for one in made] == [f"w/{label}" for label in labels]
    file = tmp_path / "swept.py"
    assert [one.config for one in made] == [f"{file}:own", f"{file}:size=2,b"]
    assert made[0].overrides == (
        "--config.seed=1",
        "--config.optim.learning_rate=0.0003",
        "--config.model.qk_norm=true",
    )
    assert made[1].overrides[1] == "--config.ema.decays=0.9,0.99"


@pytest.mark.parametrize(
    "body, message",
    [
        ("", "has no function sweep"),
        ("def sweep():\n    yield from ()", "sweep() yields nothing"),
        ("def sweep():\n    yield 3", "sweep() yields 3, which is no dict of keys"),
        ("def sweep():\n    yield {}", "sweep() yields {}, which is no dict of keys"),
        ("def sweep():\n    return 1 / 0", "sweep() failed (division by zero): correct it"),
        (
            "def sweep():\n    yield {'seed': 1}\n    yield {'seed': 1}",
            "two of sweep() are called seed-1",
        ),
        ("def sweep():\n    yield {'sed': 1}", "unknown config key 'sed'; the nearest is seed"),
    ],
)
def test_what_is_no_sweep(tmp_path, body, message):
    with pytest.raises(UserError) as refused:
        sweep(tmp_path, body)
    assert message in str(refused.value)


def test_the_routers_of_digits_are_five_jobs():
    made = sweeps.jobs_of(described("--accelerator cpu --config digits --workdir w"))
    routers = ["token_choice", "expert_choice", "diffmoe", "expert_race", "deepseek"]
    assert [label for label, _ in made] == [f"router-{router}" for router in routers]
    assert [one.config for _, one in made] == [f"digits:router={router}" for router in routers]
    assert xm_launch.UNITS.is_file()
