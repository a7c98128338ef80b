"""`--help` of every command, on narrow and wide terminals, and what all command lines share."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moe_diffusion
from moe_diffusion import bench, cli, convert, prepare, shipped
from moe_diffusion.benchmarks import sparsity
from moe_diffusion.benchmarks.dispatch import ROUTINGS
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import protocol
from moe_diffusion.interop.families import FAMILIES
from moe_diffusion.interop.prompts import TEXT_LENGTH
from moe_diffusion.interop.transfer import DTYPES
from moe_diffusion.moe.dispatch import BACKENDS
from moe_diffusion.parallel.rules import PRESETS
from moe_diffusion.sampling import flags

FOLDER = Path(moe_diffusion.__file__).parent


def main(command: str, *args: str) -> None:
    importlib.import_module(f"moe_diffusion.{command}").main(list(args))


def ended(status: int, command: str, *args: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command, *args)
    assert (stopped.value.code or 0) == status


def test_every_command_is_listed():
    known = {p.stem for p in FOLDER.glob("*.py") if "exits_on_user_error\n" in p.read_text()}
    assert known - {"cli"} == set(cli.COMMANDS)


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_an_example(command, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    ended(0, command, "--help")
    output = capsys.readouterr().out
    assert f"examples:\n  python -m moe_diffusion.{command} " in output
    # The text fits, but for a flag with its choices and for the lines of the examples.
    flags, _, examples = output.partition("examples:\n")
    prose = flags + "\n".join(t for t in examples.split("\n\n") if not t.startswith("  "))
    long = [line for line in prose.splitlines() if len(line) > min(columns, 100)]
    assert [line for line in long if len(line.split()) > 2] == []


@pytest.mark.parametrize("columns", ["40", "80"])
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_wrong_flag_is_one_line_after_the_usage(command, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    ended(2, command, "--no-such-flag")
    usage, _, error = capsys.readouterr().err.rstrip("\n").rpartition("\n")
    assert " ".join(usage.split()).startswith(f"usage: python -m moe_diffusion.{command}")
    assert error.startswith(f"python -m moe_diffusion.{command}: error: ")


def test_a_missing_flag_is_named(capsys):
    ended(2, "plan")
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: python -m moe_diffusion.plan --config FILE --topology CHIPS [flags]"
    assert error.endswith("error: the following arguments are required: --config, --topology")


def test_a_misspelt_flag_is_recognized(capsys):
    ended(2, "sample", "--workdir", "x", "--stpes=3")
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("error: unknown argument --stpes=3; did you mean --steps?")
    ended(2, "prepare", *"--source digits --size 8 --vae x --out y --config.seed=1".split())
    assert capsys.readouterr().err.endswith("--config.seed=1; prepare takes no keys of a config\n")


def without_jax(code: str) -> float:
    """Runs code in a new process, which must not import jax or flax; returns the seconds."""
    code += "\nassert not {'jax', 'flax', 'numpy', 'etils'} & set(sys.modules), sorted(sys.modules)"
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", f"import sys\n{code}"], check=True, capture_output=True)
    return time.monotonic() - begin


def test_help_is_answered_without_jax():
    code = f"""
from importlib import import_module
for command in {cli.COMMANDS}:
    for args in (["--help"], ["--no-such-flag"]):
        try:
            import_module(f"moe_diffusion.{{command}}").main(args)
        except SystemExit:
            pass
try:
    from moe_diffusion.cli import main
    main(["train", "--config", "list"])
except SystemExit:
    pass
"""
    # All of them in one process take 0.2 s, and each for itself 0.05 s, where jax alone takes 2.
    assert min(without_jax(code) for _ in range(3)) < 2


def test_names_that_flags_choose_from_are_those_of_the_code():
    assert bench.ROUTINGS == ROUTINGS and bench.BACKENDS == tuple(BACKENDS)
    assert bench.CASES == tuple(sparsity.CASES)
    assert prepare.TEXT_LENGTH == TEXT_LENGTH and set(flags.PRESETS) <= set(PRESETS)
    assert convert.FAMILIES == tuple(FAMILIES) and convert.DTYPES == DTYPES
    assert all(protocol.load(name) for name in shipped.protocols())


@pytest.mark.parametrize(
    "error, status, message",
    [
        (UserError("no file x"), 2, "error: no file x"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl"),
    ],
)
def test_what_ends_a_command_is_one_line(error, status, message, capsys):
    @cli.exits_on_user_error
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


# moe-diffusion


def test_the_console_command_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    output = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]", output, re.MULTILINE)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"{moe_diffusion.__version__}\n"


@pytest.mark.parametrize(
    "argv, message",
    [(["smaple"], "unknown command 'smaple'; did you mean sample?"), ([], "name a command")],
)
def test_the_console_command_refuses(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f"\n\nerror: {message}\n")


def test_the_console_command_names_itself_in_examples(capsys, monkeypatch):
    monkeypatch.setattr(cli.Parser, "program", cli.Parser.program)
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    output = capsys.readouterr().out
    assert output.startswith("usage: moe-diffusion train --config NAME --workdir DIR [flags]\n")
    assert "\n  moe-diffusion train --config configs/digits.py" in output
    assert "python -m" not in output


# Keys of the config


@pytest.mark.parametrize(
    "words, left, overrides",
    [
        ("--config x --config.seed=1", "--config x", "--config.seed=1"),
        ("--config.seed 1 --json", "--json", "--config.seed=1"),
        ("--config.optim.b1 -0.5 dispatch", "dispatch", "--config.optim.b1=-0.5"),
        ("--config.model.qk_norm --json", "--json", "--config.model.qk_norm"),
        ("--json --config.model.qk_norm", "--json", "--config.model.qk_norm"),
        ("--noconfig.model.qk_norm train", "train", "--noconfig.model.qk_norm"),
        ("--config.show --config.name a=b", "", "--config.show --config.name=a=b"),
    ],
)
def test_words_that_set_keys(words, left, overrides):
    found = cli.split_overrides(words.split())
    assert tuple(map(" ".join, found)) == (left, overrides)


@pytest.mark.parametrize("args", [["--config", "list"], ["--config=list", "--json"]])
@pytest.mark.parametrize("command", ["train", "plan", "demo", "convert"])
def test_config_list_shows_all(command, args, capsys):
    ended(0, command, *args)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped.names()
    assert any(re.match(r"digits +Handwritten digits \(8x8", line) for line in lines)
    assert all(len(line.split()) > 3 for line in lines)


def test_config_show_prints_what_a_run_would_use(capsys):
    args = "--config digits:router=dense --config.show --config.seed 3 --config.ema.decays 0.9"
    ended(0, "train", *args.split())
    lines = capsys.readouterr().out.splitlines()
    assert "seed = 3  # default: 0" in lines and "model.router.name = 'dense'" in str(lines)
    assert any(line.startswith("ema.decays = (0.9,)") for line in lines)
    assert "loss_weights = {}" in lines and "data.prefetch = 2" in lines
    ended(2, "train", "--config", "digits", "--config.show", "--config.sed=3")
    assert "unknown config key 'sed'; the nearest is seed" in capsys.readouterr().err
    ended(2, "sample", "--workdir", "x", "--config.show")
    assert (
        "--config.show goes with --config; the config of a run is its config.json"
        in capsys.readouterr().err
    )


# Remote folders


REMOTE = {
    "train": ("workdir",),
    "distill": ("workdir",),
    "sample": ("workdir",),
    "report": ("workdir",),
    "routing": ("workdir",),
    "evaluate": ("workdir",),
    "thresholds": ("workdir",),
}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_other_flag_refuses_a_remote_path(command, monkeypatch, tmp_path, capsys):
    """Each flag that takes text, alone: the parser's other requirements are lifted."""
    made = []
    monkeypatch.setattr(cli.Parser, "_usage", lambda parser: made.append(parser) or "")
    monkeypatch.chdir(tmp_path)
    ended(0, command, "--help")
    for action in made[0]._actions:
        action.required = False
    for action in made[0]._actions:
        if action.nargs is None and action.option_strings and not (action.type or action.choices):
            flag = action.option_strings[0]
            with pytest.raises(UserError) as caught:
                made[0].parse_args([flag, "gs://bucket/x"])
            problem = f"is remote, and {command} needs a local path there: copy it"
            if action.dest in REMOTE.get(command, ()):
                problem = "needs a driver: pip install gcsfs"
            assert str(caught.value) == f"{flag} gs://bucket/x {problem}"
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_begun_in_a_folder_that_cannot_be_reached(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for args, message in (
        ("--workdir gs://b/run", "--workdir gs://b/run needs a driver: pip install gcsfs"),
        ("--workdir s3://b/run", "--workdir s3://b/run needs a driver: pip install s3fs boto3"),
        ("--workdir memory://run", "memory:// is not supported; gs:// and s3:// are"),
        ("--workdir run --config.init_from=gs://b/run", "init_from = gs://b/run needs a driver"),
        ("--workdir run --config.data.source=latents:gs://b", "data.source = latents:gs://b is re"),
    ):
        ended(2, "train", "--config", "digits", *args.split())
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
