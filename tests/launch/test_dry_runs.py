"""What launchers print, and that each is what its cluster can read."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

from launch import accelerators, job
from moe_diffusion import xla_flags
from tests import cli
from tests.launch import dry_runs

LAUNCHERS = ("tpu_vm", "slurm", "xpk", "gke", "xm_launch")


@pytest.mark.parametrize("name", dry_runs.COMMANDS)
def test_a_dry_run_prints_its_golden_text(name):
    assert dry_runs.printed(name) == (dry_runs.GOLDENS / f"{name}.txt").read_text()


def test_every_golden_text_is_tested_and_every_launcher_on_the_page():
    kept = {path.stem for path in dry_runs.GOLDENS.glob("*.txt")}
    assert kept == set(dry_runs.COMMANDS) and set(dry_runs.ON_PAGE) == set(LAUNCHERS)
    page = dry_runs.PAGE.read_text()
    for name in dry_runs.ON_PAGE:
        assert f"{dry_runs.mark(name)}\n{dry_runs.on_page(name)}\n<!-- end -->" in page, name
    assert xla_flags.table() in page


@pytest.mark.parametrize("name", ["slurm", "slurm_tasks_per_gpu", "slurm_cpu"])
def test_the_script_of_slurm_is_bash(name, tmp_path):
    text = (dry_runs.GOLDENS / f"{name}.txt").read_text()
    script = tmp_path / "script"
    script.write_text(text.partition("\n")[2].partition("# end of ")[0])
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("name", ["tpu_vm", "tpu_vm_slices", "xpk", "xpk_gpu"])
def test_commands_are_bash_also_those_that_run_elsewhere(name):
    text = (dry_runs.GOLDENS / f"{name}.txt").read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    inner = [
        word.removeprefix("--command=")
        for line in text.splitlines()
        for word in shlex.split(line, comments=True)
        if word.startswith("--command=")
    ]
    assert inner
    for script in inner:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("name", ["gke", "gke_gpu", "gke_cpu"])
def test_a_jobset_has_the_fields_of_jobset(name):
    schema = json.loads((dry_runs.GOLDENS.parent / "jobset.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    found = yaml.safe_load((dry_runs.GOLDENS / f"{name}.txt").read_text())
    jsonschema.validate(found, schema)
    spec = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    codes = spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert codes == sorted({job.USER_ERROR, job.RUN_AGAIN})  # Kubernetes wants them in order
    spec["podFailurePolicy"]["rule"] = []
    with pytest.raises(jsonschema.ValidationError, match="'rule' was unexpected"):
        jsonschema.validate(found, schema)


def test_which_failures_restart_a_jobset():
    """As pkg/controllers/failure_policy.go of JobSet has it: the first rule that fits any job that
    has failed counts; without one the set restarts, which is counted."""
    found = yaml.safe_load((dry_runs.GOLDENS / "gke.txt").read_text())
    rules = found["spec"]["failurePolicy"]["rules"]

    def fits(rule: dict, reason: str, message: str) -> bool:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        known = any(re.search(pattern, message) for pattern in patterns)
        return known and reason in rule["onJobFailureReasons"]

    def action(*failed: tuple[str, str]) -> str:
        fitting = (rule["action"] for rule in rules if any(fits(rule, *one) for one in failed))
        return next(fitting, "RestartJobSet")

    def ended_with(code: int) -> tuple[str, str]:
        """The message of Kubernetes, in pkg/controller/job/pod_failure_policy.go."""
        message = f"Container main for pod lab/x-0-0 failed with exit code {code} matching FailJob"
        return "PodFailurePolicy", f"{message} rule at index 0"

    message = "Pod lab/x-0-0 has condition DisruptionTarget matching FailJob rule at index 1"
    lost = ("PodFailurePolicy", message)
    crashed = ("BackoffLimitExceeded", "Job has reached the specified backoff limit")
    ignore = "RestartJobSetAndIgnoreMaxRestarts"
    assert action(ended_with(job.RUN_AGAIN)) == ignore
    assert action(lost) == ignore
    assert action(ended_with(job.USER_ERROR)) == "FailJobSet"
    assert action(crashed) == "RestartJobSet"
    # Of several slices: who loses the others crashes.
    assert action(crashed, lost) == ignore
    assert action(crashed, ended_with(job.USER_ERROR)) == "FailJobSet"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_need_neither_jax_nor_a_second(name):
    module, *words = shlex.split(dry_runs.COMMANDS[name].replace(" --sweep", ""))
    code = f"""
import sys
from importlib import import_module
for words in ({words!r}, ["--help"]):
    try:
        import_module({module!r}).main(words)
    except SystemExit as ended:
        assert not ended.code
assert not {{"jax", "flax", "numpy", "etils", "yaml"}} & set(sys.modules), sorted(sys.modules)
"""
    seconds = []
    while len(seconds) < 3 and not (seconds and min(seconds) < 1):
        begin = time.monotonic()
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=cli.ROOT, capture_output=True, text=True, check=True
        )
        seconds.append(time.monotonic() - begin)
    assert min(seconds) < 1
    assert f"examples:\n  python -m launch.{name} " in ran.stdout


def test_the_image_is_what_launchers_expect():
    """No Docker here: the instructions are read, and those that matter compared."""
    text = (cli.ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    names = [name for name, _ in lines]
    assert names[0] == "FROM" and names[-1] == "ENTRYPOINT"
    assert set(names) == {"FROM", "ARG", "RUN", "COPY", "USER", "WORKDIR", "ENTRYPOINT"}
    assert json.loads(lines[-1][1])[-1] == "moe-diffusion"  # launchers give what follows it
    last_user = [value for name, value in lines if name == "USER"][-1]
    assert last_user != "root" and f"useradd --create-home {last_user}" in text
    extras = re.search(r"EXTRA: (.*)\. DRIVERS", text)[1].replace(" or", ",").split(", ")
    declared = (cli.ROOT / "setup.cfg").read_text()
    assert all(f"\n{extra} = jax[{extra}]" in declared for extra in ["tpu", *extras[1:]])
    for line in re.findall(r"RUN (.*)", text):
        subprocess.run(["bash", "-n"], input=line, text=True, check=True)


def test_tpus_are_those_that_plan_knows():
    tpus = {kind for kind, chip in accelerators.CHIPS.items() if chip.platform == "tpu"}
    gpus = {kind for kind, chip in accelerators.CHIPS.items() if chip.platform == "cuda"}
    assert set(accelerators.TPUS) == tpus and set(accelerators.GPUS) == gpus
