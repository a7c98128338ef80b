"""The loop that keeps a run going on TPU VMs, against a program that plays gcloud."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import tpu_vm
from tests import cli
from tests.launch import standins

INSTALL = "git+https://example.org/moe_diffusion@v0.1.0"
ROUND = ["describe", "create", "describe", "install", "ssh"]  # up to the first end of the command


class Cloud:
    """The stand-in and its folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.gcloud = standins.install(folder, "gcloud.py", "gcloud") / "gcloud"

    def will(self, **script: list) -> None:
        """What the stand-in answers, see standins/gcloud.py."""
        (self.folder / "script").write_text(json.dumps(script))

    def words(self, *more: str, accelerator: str = "v5e-16") -> list[str]:
        base = f"--accelerator {accelerator} --zone z --gcloud {self.gcloud} --install {INSTALL} "
        return [*f"{base} --config digits --workdir gs://b/run".split(), *more]

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    @property
    def verbs(self) -> list[str]:
        """Of every call; installing is told from running."""
        return [
            "install" if any("uv pip install" in w for w in words) else words[3]
            for words in self.calls
        ]

    def ends_with(self, *more: str, **options: str) -> int:
        with pytest.raises(SystemExit) as ended:
            tpu_vm.main(self.words(*more, **options))
        return ended.value.code or 0


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN", str(tmp_path))
    monkeypatch.setattr(tpu_vm, "EVERY", 0.0)
    monkeypatch.setattr(tpu_vm, "SHORTEST", 0.0)
    return Cloud(tmp_path)


def test_an_undisturbed_run_does_what_the_dry_run_says(cloud, capfd):
    tpu_vm.main(cloud.words("--spot", "--dry_run"))
    told = capfd.readouterr().out
    assert not (cloud.folder / "calls").exists()
    assert cloud.ends_with("--spot") == 0
    assert cloud.verbs == [*ROUND, "delete"]
    printed = [line for line in told.splitlines() if not line.startswith("#")]
    assert [shlex.split(line)[1:] for line in printed] == cloud.calls[1:]


def test_a_preempted_tpu_is_made_anew(cloud, capfd):
    cloud.will(ssh=["preempted", "preempted"])
    assert cloud.ends_with("--max-restarts", "0") == 0
    anew = ["describe", "describe", "delete", "create", "describe", "install", "ssh"]
    assert cloud.verbs == [*ROUND, *anew * 2, "delete"]
    assert "the TPU is gone (PREEMPTED): another one goes on" in capfd.readouterr().out


@pytest.mark.slow
def test_where_no_tpu_is_free_after_a_preemption_it_waits(cloud):
    cloud.will(ssh=["preempted"], create=[0, 1, 1])
    assert cloud.ends_with() == 0
    anew = ["describe", "describe", "delete", "create", "describe", "create", "describe", "create"]
    assert cloud.verbs == [*ROUND, *anew, "describe", "install", "ssh", "delete"]


def test_a_crash_is_tried_again_a_few_times(cloud, capfd):
    cloud.will(ssh=[1, 134, 75, 1])
    assert cloud.ends_with("--max-restarts", "2") == 1
    assert cloud.verbs.count("ssh") == 4 and cloud.verbs[-1] == "delete"
    assert capfd.readouterr().err.endswith("code 1, crash 3: no more restarts\n")


@pytest.mark.slow
def test_to_be_run_again_at_once_is_a_crash(cloud, monkeypatch):
    monkeypatch.setattr(tpu_vm, "SHORTEST", 60.0)
    cloud.will(ssh=[75] * 9)
    assert cloud.ends_with("--max-restarts", "1") == 75
    assert cloud.verbs.count("ssh") == 2


@pytest.mark.slow
def test_no_run_goes_on_for_ever(cloud, monkeypatch, capfd):
    monkeypatch.setattr(tpu_vm, "MOST_INTERRUPTIONS", 3)
    cloud.will(ssh=[75] * 9)
    assert cloud.ends_with() == 75
    assert cloud.verbs.count("ssh") == 3 and cloud.verbs[-1] == "delete"
    assert "interrupted 3 times: no more restarts" in capfd.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_installed_is_not_run(cloud):
    cloud.will(install=[1, 1])
    assert cloud.ends_with("--max-restarts", "1") == 1
    assert "ssh" not in cloud.verbs and cloud.verbs[-1] == "delete"


@pytest.mark.slow
def test_keep_leaves_the_tpu(cloud):
    cloud.will(ssh=[2])
    assert cloud.ends_with("--keep") == 2
    assert "delete" not in cloud.verbs and (cloud.folder / "state").exists()
    assert cloud.ends_with("--keep") == 0  # the one that is there is used
    assert cloud.verbs.count("create") == 1


@pytest.mark.slow
def test_several_slices_are_a_queued_resource_that_is_waited_for(cloud):
    (cloud.folder / "state").write_text("ACTIVE")
    cloud.will(describe=["WAITING_FOR_RESOURCES", "PROVISIONING"])
    assert cloud.ends_with("--slices", "2", accelerator="v5p:4x4x4") == 0
    assert {words[2] for words in cloud.calls} == {"queued-resources"}
    assert cloud.verbs == ["describe", "describe", "describe", "install", "ssh", "delete"]
    assert cloud.calls[-1][3:5] == ["delete", "digits"] and "--force" in cloud.calls[-1]


@pytest.mark.slow
def test_a_tpu_that_does_not_come_is_given_up(cloud, capfd):
    cloud.will(create=[1])
    assert cloud.ends_with() == 2
    assert "no TPU digits could be created, and the message of gcloud" in capfd.readouterr().err
    (cloud.folder / "state").write_text("CREATING")
    assert cloud.ends_with("--wait", "0") == 2
    assert "error: digits did not come within 0 s: raise --wait" in capfd.readouterr().err
    assert cloud.verbs[-1] == "delete"


@pytest.mark.slow
def test_a_network_that_is_away_for_a_moment_costs_no_tpu(cloud, capfd):
    cloud.will(describe=["unreachable"] * 3, ssh=[75])
    assert cloud.ends_with() == 0
    assert cloud.verbs.count("create") == 1
    cloud.will(describe=["unreachable"] * 9)
    assert cloud.ends_with() == 2
    assert "cannot describe digits: ERROR: the network is unreachable" in capfd.readouterr().err


def test_own_config_and_wheel_are_copied(cloud, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("")
    Path("a-1-py3-none-any.whl").write_text("")
    words = ("--config", "mine.py:x=1", "--install", "a-1-py3-none-any.whl")
    assert cloud.ends_with(*words) == 0
    assert cloud.verbs[3:6] == ["scp", "install", "ssh"]
    assert cloud.calls[3][4:7] == ["a-1-py3-none-any.whl", "mine.py", "mine:"]
    assert "'./a-1-py3-none-any.whl[tpu]' gcsfs" in cloud.calls[4][-3]
    assert "train --config mine.py:x=1 --workdir" in cloud.calls[5][-3]


# In the place of the library on a host: every run notes what it was told, and ends with the next
# code of a file.
HOST = """#!/bin/bash
echo "$@ $LIBTPU_INIT_ARGS" >> runs
code=$(head -1 codes); sed -i 1d codes
exit "${code:-0}"
"""


@pytest.mark.parametrize(
    "codes, last, runs",
    [([75, 75], 0, 3), ([2], 2, 1), ([75, 2], 2, 2), ([1, 75, 139], 139, 3)],
)
def test_the_code_of_the_command_decides(cloud, codes, last, runs):
    """One crash is allowed. A host's script is run here, and the code passes through it."""
    home = cloud.folder / "home"
    (home / "moe" / "bin").mkdir(parents=True)
    program = home / "moe" / "bin" / "moe-diffusion"
    program.write_text(HOST)
    program.chmod(0o755)
    (home / "codes").write_text("".join(f"{code}\n" for code in codes))
    assert cloud.ends_with("--max-restarts", "1") == last
    told = (home / "runs").read_text().splitlines()
    assert len(told) == runs
    assert all(line.startswith("train --config digits --workdir gs://b/run --x") for line in told)
    again = ["describe", "describe", "install", "ssh"]  # the same TPU goes on
    looked = [] if last in (0, 2) else ["describe"]  # was it a crash, or is the TPU gone?
    assert cloud.verbs == [*ROUND, *again * (runs - 1), *looked, "delete"]
    assert not (home / "job.pid").exists()


def test_the_script_of_a_host_returns_the_code_and_ends_what_was_left(tmp_path):
    """The script of a host, run here with a command that writes its number and ends with 75."""
    program = tmp_path / "moe" / "bin" / "moe-diffusion"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/bash\necho "$LIBTPU_INIT_ARGS" > flags\nexit 75\n')
    program.chmod(0o755)
    left = subprocess.Popen(["sleep", "60"])
    (tmp_path / "job.pid").write_text(f"{left.pid}\n")
    parser = tpu_vm.jobs.make_parser("tpu_vm", tpu_vm.__doc__)
    words = "--accelerator v5e-4 --config digits --workdir gs://b/run"
    script = tpu_vm.run_script(tpu_vm.jobs.parse(parser, words.split())[1])
    assert subprocess.run(["bash", "-c", script], cwd=tmp_path).returncode == 75
    assert left.wait(timeout=10) == -signal.SIGKILL
    assert (tmp_path / "flags").read_text().startswith("--xla_tpu_enable_async")
    assert not (tmp_path / "job.pid").exists()


def test_a_launcher_that_is_ended_gives_the_tpu_back(cloud):
    cloud.will(ssh=["slow"])
    code = "from launch import tpu_vm; tpu_vm.EVERY = 0; tpu_vm.main()"
    command = [sys.executable, "-c", code, *cloud.words()]
    with subprocess.Popen(command, cwd=cli.ROOT, stdout=subprocess.DEVNULL) as launcher:
        try:
            until = time.monotonic() + 30
            while not (cloud.folder / "calls").exists() or cloud.verbs[-1:] != ["ssh"]:
                assert time.monotonic() < until and launcher.poll() is None
                time.sleep(0.05)
            launcher.send_signal(signal.SIGTERM)
            assert launcher.wait(timeout=30) == 128 + signal.SIGTERM
        finally:
            launcher.kill()
    assert cloud.verbs == [*ROUND, "delete"] and not (cloud.folder / "state").exists()
