"""The notebooks: both files of each are one, what is kept of their outputs, and that they run."""

from __future__ import annotations

import collections
import json
import sys

import jupytext
import nbformat
import pytest

from docs import notebooks
from moe_diffusion.errors import UserError
from tests import cli

NAMES = [source.stem for source in notebooks.sources()]


def read(name: str, suffix: str) -> nbformat.NotebookNode:
    path = notebooks.FOLDER / f"{name}{suffix}"
    return jupytext.read(path) if suffix == ".py" else nbformat.read(path, as_version=4)


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("name", NAMES)
def test_both_files_have_the_same_cells(name):
    remedy = f"run python -m docs.notebooks {name}"
    assert cells(read(name, ".py")) == cells(read(name, ".ipynb")), remedy
    source = notebooks.FOLDER / f"{name}.py"
    assert cells(notebooks.renewed(source)) == cells(read(name, ".py")), remedy
    assert notebooks.as_text(read(name, ".py")) == source.read_text(), remedy


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept(name):
    """Outputs of every cell that has some, pictures among them, small and of no machine."""
    notebook = read(name, ".ipynb")
    nbformat.validate(notebook)
    size = (notebooks.FOLDER / f"{name}.ipynb").stat().st_size
    assert notebooks.problems(notebook, size) == []
    assert sum(bool(cell.get("outputs")) for cell in notebook.cells) >= 5


def test_there_are_six_and_a_number_orders_them():
    assert [name[:2] for name in NAMES] == [f"{number:02}" for number in range(1, 7)]
    assert {path.stem for path in notebooks.FOLDER.glob("*.ipynb")} == set(NAMES)


def test_what_must_not_be_kept_is_found():
    new = nbformat.v4
    picture = {"image/png": "A" * 240_000}
    outputs = [
        new.new_output("stream", name="stderr", text="x"),
        new.new_output("stream", text="in /home/me/runs"),
        new.new_output("stream", text="UserWarning: x"),
        new.new_output("stream", text=" 10%|#  |"),
        new.new_output("display_data", data=picture),
    ]
    notebook = new.new_notebook(cells=[new.new_code_cell("1", outputs=outputs)])
    assert notebooks.problems(notebook, 1_000_001) == [
        "the file has 1,000,001 bytes",
        "an image has 180,000 bytes",
        "stderr says 'x'",
        "a path of this machine: 'in /home/me/runs'",
        "a warning: 'UserWarning: x'",
        "a progress bar: ' 10%|#  |'",
    ]
    notebook.cells[0].outputs = [new.new_output("stream", text="work/way a/tmp 3/4")]
    assert notebooks.problems(notebook, 10) == ["it has no image"]


def test_a_notebook_without_setup_is_refused(tmp_path):
    source = tmp_path / "07_x.py"
    source.write_text("# %% [markdown]\n# colab-badge\n\n# %%\n1 + 1\n")
    with pytest.raises(UserError, match="must begin with a badge, and its first code with # Setup"):
        notebooks.renewed(source)


def test_the_tool_names_what_is_not_there(capfd):
    assert "there is no notebook 09_x: choose 01_quickstart, " in cli.refused(
        capfd, notebooks.main, ["09_x"]
    )


def test_the_setup_adds_what_is_missing_and_keeps_jax(tmp_path, monkeypatch):
    """As in Colab: pip is told the versions of jax and numpy that are imported."""
    ran, kinds = [], "name version"
    there = [("jax", "0.10.1"), ("jax-cuda12-plugin", "0.10.1"), ("jaxlib", "0.10.1+a")]
    there += [
        ("numpy", "2.3.0"),
        ("numpy", "1.26.4"),
        ("flax", "0.11"),
        (None, "1"),
        ("libtpu", "9"),
    ]
    installed = [collections.namedtuple("Distribution", kinds)(*found) for found in there]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.metadata.distributions", lambda: installed)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, check: ran.append((command, check)))
    setup = next(c.source for c in read(NAMES[0], ".py").cells if c.cell_type == "code")
    exec(setup, {})
    assert (tmp_path / "constraints.txt").read_text().splitlines() == [
        *("jax==0.10.1", "jax-cuda12-plugin==0.10.1", "jaxlib==0.10.1+a", "numpy==2.3.0"),
        "libtpu==9",
    ]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt"]
    assert ran == [([*pip, f"git+{notebooks.REPOSITORY}"], True)]
    ran.clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    exec(setup, {})
    assert ran == []  # the library is there


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path, monkeypatch):
    """With the small settings, in an empty folder. A cell that fails is an error."""
    for variable, value in cli.environment(1).items():
        monkeypatch.setenv(variable, value)
    notebook = notebooks.execute(read(name, ".py"), tmp_path, tiny=True)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert list(notebooks.images(notebook))
    wrong = [kind for kind, text in notebooks.texts(notebook) if kind == "stderr" and text.strip()]
    assert wrong == [], json.dumps(list(notebooks.texts(notebook)))
