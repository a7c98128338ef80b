"""`--help` of every command line, on narrow and wide terminals."""

import importlib
from pathlib import Path

import pytest

import moe_diffusion

COMMANDS = sorted(
    path.stem
    for path in Path(moe_diffusion.__file__).parent.glob("*.py")
    if "exits_on_user_error\n" in path.read_text() and path.stem != "cli"
)


@pytest.mark.parametrize("columns", ["60", "80", "200"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"moe_diffusion.{command}").main(["--help"])
    assert ended.value.code == 0
    assert f"examples:\n  python -m moe_diffusion.{command} " in capsys.readouterr().out


def test_every_command_line_is_found():
    assert len(COMMANDS) >= 10, COMMANDS
