"""`--on-damage=previous` goes on from the checkpoint before, and deletes nothing."""

from __future__ import annotations

import pytest

from moe_diffusion import digests, fallback, train
from tests import cli


@pytest.fixture
def checkpoints(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for step in (4, 8, 12):
        for part in ("state", "data"):
            (folder / str(step) / part).mkdir(parents=True)
            (folder / str(step) / part / "values").write_bytes(bytes([step]))
            digests.write(folder / str(step) / part)
    return folder


def damage(checkpoints, step, part="state"):
    (checkpoints / str(step) / part / "values").write_bytes(b"x")


def set_aside(folder):
    lines = []
    fallback.set_aside(folder, lines.append)
    return lines


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_one_stays(checkpoints):
    damage(checkpoints, 4)  # older than a whole one: nobody reads it
    assert set_aside(checkpoints.parent) == [] and names(checkpoints) == ["12", "4", "8"]
    assert names(checkpoints.parent) == ["checkpoints"]  # no lock is left


def test_damaged_ones_are_kept_under_another_name(checkpoints):
    damage(checkpoints, 12)
    damage(checkpoints, 8, "data")
    (checkpoints / "12.damaged").mkdir()
    first, second = set_aside(checkpoints.parent)
    assert f"{checkpoints}/12 is damaged (state/values is not what was written)" in first
    assert "8 is damaged (data/values" in second and "kept as 8.damaged" in second
    assert names(checkpoints) == ["12.damaged", "4", "8.damaged"]
    assert (checkpoints / "12.damaged" / "state" / "values").read_bytes() == b"x"


def test_without_a_whole_one_nothing_moves(checkpoints):
    for step in (4, 8, 12):
        damage(checkpoints, step)
    assert set_aside(checkpoints.parent) == [] and names(checkpoints) == ["12", "4", "8"]


def test_stages_of_a_distillation(checkpoints):
    damage(checkpoints, 12)
    stage = checkpoints.parent.rename(checkpoints.parents[1] / "shared")
    assert len(set_aside(stage.parent)) == 1
    assert names(stage / "checkpoints") == ["12.damaged", "4", "8"]


def test_a_new_workdir_has_none(tmp_path):
    assert set_aside(tmp_path / "new") == [] and not (tmp_path / "new").exists()


def test_a_run_goes_on_from_the_checkpoint_before(tmp_path, capsys):
    arguments = [*cli.digits(train__num_steps=3, data__source="synthetic"), "--workdir"]
    for name in ("run", "undisturbed"):
        train.main([*arguments, str(tmp_path / name)])
    folder = tmp_path / "run" / "checkpoints"
    file = max((folder / "3" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main([*arguments, str(tmp_path / "run")])
    assert "to fall back on step 2" in capsys.readouterr().err
    train.main([*arguments, str(tmp_path / "run"), "--on-damage=previous"])
    out = capsys.readouterr().out
    assert f"checkpoint {folder}/3 is damaged" in out and "resuming after step 2 of 3" in out
    assert cli.metrics(tmp_path / "run") == cli.metrics(tmp_path / "undisturbed")
    again, expected = (cli.read_checkpoint(tmp_path / n, 3) for n in ("run", "undisturbed"))
    assert again[1] == expected[1]
    assert all((value == expected[0][name]).all() for name, value in again[0].items())
