"""The built package, installed into a fresh environment, works from any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from moe_diffusion import shipped
from tests import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution, and with the wheel that was made of it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=cli.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (cli.ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((cli.ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--outdir", str(out), str(source)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=cli.HANGS_AFTER)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return out


@pytest.fixture(scope="module")
def command(built, tmp_path_factory) -> Path:
    """`moe-diffusion` of an environment that borrows all packages but this one."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    (wheel,) = built.glob("*.whl")
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    pip += ["--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, cwd=place, env=environment())  # away from the checkout
    (own,) = place.glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin" / "moe-diffusion"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


def environment() -> dict[str, str]:
    """Variables of a process that does not see the checkout."""
    return {name: value for name, value in cli.environment(1).items() if name != "PYTHONPATH"}


def run(command: Path, folder: Path, *args: str) -> str:
    """What a command prints, run in a folder that is not the checkout."""
    ran = subprocess.run(
        [str(command), *args],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=cli.HANGS_AFTER,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_source_and_wheel_hold_every_config(built):
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    wanted = {path.relative_to(shipped.FOLDER).as_posix() for path in shipped.FOLDER.rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = "moe_diffusion/configs/"
    assert {name.removeprefix(inside) for name in names if name.startswith(inside)} == wanted
    kernels = {path.relative_to(cli.ROOT).as_posix() for path in cli.ROOT.glob("moe_*/**/*.[ch]*")}
    assert {name for name in kernels if not name.endswith(".pyc")} <= names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moe_diffusion"}
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"configs/{name}" for name in wanted} | {"setup.py", "README.md"} <= names


def test_the_first_minute(command, folder):
    place = run(command.with_name("python"), folder, "-c", "import moe_diffusion as m; print(m)")
    assert str(command.parent.parent) in place
    assert "  train " in run(command, folder, "--help")
    assert "\ndsmoe_l " in run(command, folder, "train", "--config", "list")
    assert "dsmoe_table5" in run(command, folder, "reproduce", "--list")
    tiny = cli.digits()[2:]
    shown = run(command, folder, "train", "--config", "digits", *tiny, "--config.show")
    assert "\nmodel.depth = 1  # default: 12\n" in shown
    run(command, folder, "train", "--config", "digits", "--workdir", "run", *tiny)
    assert (folder / "run" / "checkpoints" / "3").is_dir()
    sampling = ("--num", "4", "--steps", "2")
    run(command, folder, "sample", "--workdir", "run", *sampling, "--out", "grid.png")
    assert (folder / "grid.png").stat().st_size
    judged = run(command, folder, "evaluate", "--workdir", "run", *sampling, "--json")
    result = json.loads(judged.splitlines()[-1])
    assert result["metrics"]["fd_digits"] > 0
    assert result["software"]["moe_diffusion"].partition("+")[1] == ""  # of no repository
    planned = run(
        command, folder, "plan", "--config", "digits", *tiny, "--topology", "local", "--own-preset"
    )
    assert "dp" in planned
    assert sorted(os.listdir(folder)) == ["grid.png", "run"]
