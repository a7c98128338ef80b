"""Runs notebooks/*.py (py:percent) and writes them beside themselves as .ipynb, with outputs.

  python -m docs.notebooks
  python -m docs.notebooks 02_routers 04_own_router
  python -m docs.notebooks 06_dense2moe --runs runs/digits_flux
  python -m docs.notebooks --tiny --check

Both files of a notebook are kept. The .py file is the source: jupytext pairs the two, and a test
fails where their cells differ. The first cell (a badge) and the first code cell (what Colab lacks)
are the same in all notebooks and are written by this program, so that REPOSITORY stands here alone.
--tiny takes the small settings of the tests, --check runs the notebooks and writes nothing. A
notebook works in an empty folder; --runs copies finished runs into its runs/ first, such as the
teacher of `make flux-demo`, which 06_dense2moe otherwise trains for a part of its steps.
"""

from __future__ import annotations

import base64
import copy
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_diffusion.cli import Parser, exits_on_user_error
from moe_diffusion.errors import UserError
from moe_diffusion.writing import save_text

if TYPE_CHECKING:
    from nbformat import NotebookNode

# The project's address. OWNER is a placeholder until it is published; then run this program.
REPOSITORY = "https://github.com/OWNER/moe_diffusion"
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
TINY = "MOE_DIFFUSION_TINY"

_COLAB = "https://colab.research.google.com"
_SETUP = f'''\
# Setup. Colab lacks this library and some of what it needs. Its jax belongs to its accelerator, so
# jax and numpy are constrained to the versions that are there, and pip adds the rest.
# With {TINY}=1 in the environment all is so small that one CPU core needs less than
# a minute; what is drawn is then noise.
import importlib.util
import os
import subprocess
import sys
from importlib.metadata import distributions

TINY = os.environ.get("{TINY}") == "1"
if importlib.util.find_spec("moe_diffusion") is None:
    there = {{}}
    for found in distributions():  # of two with a name the first is the one that is imported
        there.setdefault(found.name or "", found.version)
    kept = [name for name in there if name.startswith(("jax", "libtpu", "numpy"))]
    with open("constraints.txt", "w") as file:
        file.writelines(f"{{name}}=={{there[name]}}\\n" for name in kept)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt"]
    subprocess.run([*pip, "git+{REPOSITORY}"], check=True)'''
_MOST_BYTES, _MOST_OF_AN_IMAGE = 1_000_000, 150_000
_UNWANTED = {
    "a path of this machine": re.compile(r"(?<![\w.])/(home|root|tmp|work|usr|content|Users)/"),
    "a warning": re.compile(r"[Ww]arning"),
    "a progress bar": re.compile(r"\d%\|"),
}


def sources() -> list[Path]:
    """The notebooks' .py files in order."""
    return sorted(FOLDER.glob("*.py"))


def badge(name: str) -> str:
    """Markdown that opens a notebook in Colab."""
    place = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({_COLAB}/github/{place})"


def renewed(source: Path) -> NotebookNode:
    """The notebook of a .py file, with badge and setup as they are written here; no outputs."""
    import jupytext

    notebook = jupytext.read(source)
    first, setup = notebook.cells[0], next(c for c in notebook.cells if c.cell_type == "code")
    if "colab-badge" not in first.source or "# Setup." not in setup.source:
        raise UserError(f"{source} must begin with a badge, and its first code with # Setup.")
    first.source, setup.source = badge(source.stem), _SETUP
    return notebook


def as_text(notebook: NotebookNode) -> str:
    """The notebook as a .py file in jupytext's py:percent."""
    import jupytext

    bare = copy.deepcopy(notebook)
    bare.metadata = type(bare)()
    for cell in bare.cells:
        cell.metadata = type(bare)()
    bare.metadata.jupytext = {"notebook_metadata_filter": "-all"}
    return jupytext.writes(bare, fmt="py:percent")


def execute(notebook: NotebookNode, folder: Path, tiny: bool) -> NotebookNode:
    """Runs a notebook with a kernel of its own that works in `folder`; returns it with outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, TINY: str(int(tiny))}
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"  # XLA's complaint about a slow compilation
    place = {"metadata": {"path": str(folder)}}
    quiet = ["--IPKernelApp.log_level=ERROR"]
    options = {"kernel_name": "python3", "extra_arguments": quiet, "resources": place}
    client = NotebookClient(notebook, timeout=3600, **options)
    return cleaned(client.execute(env=environment))


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Without what differs from run to run and says nothing: times, random names, the machine."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
        for output in cell.get("outputs", ()):
            if output.output_type in ("execute_result", "display_data"):
                output.metadata = {}
                if "image/png" in output.data or "image/gif" in output.data:
                    for other in ("text/plain", "image/jpeg"):  # <PIL.Image.Image ...>
                        output.data.pop(other, None)
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """With one output in place of several in a row of the same stream."""
    found: list[NotebookNode] = []
    for output in outputs:
        last = found[-1] if found else {}
        if output.output_type == "stream" == last.get("output_type") and last.name == output.name:
            last.text += output.text
        else:
            found.append(output)
    return found


def images(notebook: NotebookNode) -> Iterator[tuple[str, bytes]]:
    """(kind, bytes) of every picture among the outputs, like ("png", ...)."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            for kind, data in output.get("data", {}).items():
                if kind.startswith("image/"):
                    yield kind.removeprefix("image/"), base64.b64decode(data)


def texts(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    """(kind, text) of every other output: stdout, stderr, text/plain, ..."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                yield output.name, output.text
            for kind, data in output.get("data", {}).items():
                if not kind.startswith("image/"):
                    yield kind, data


def problems(notebook: NotebookNode, size: int) -> list[str]:
    """What must not be among the outputs of a notebook that is kept; size: bytes of its file."""
    found = [] if size < _MOST_BYTES else [f"the file has {size:,} bytes"]
    sizes = [len(data) for _, data in images(notebook)]
    found += [f"an image has {size:,} bytes" for size in sizes if size > _MOST_OF_AN_IMAGE]
    for kind, text in texts(notebook):
        found += [f"stderr says {text!r}"] * (kind == "stderr")
        found += [f"{what}: {text!r}" for what, words in _UNWANTED.items() if words.search(text)]
    if not sizes:
        found.append("it has no image")
    return found


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("notebooks", __doc__)
    parser.prog = "python -m docs.notebooks"
    add = parser.add_argument
    add("names", nargs="*", help="of notebooks, like 01_quickstart (all)")
    add("--tiny", action="store_true", help=f"run with {TINY}=1")
    add("--check", action="store_true", help="write nothing")
    add("--runs", nargs="+", default=[], metavar="DIR", help="finished runs that notebooks find")
    args = parser.parse_args(argv)
    import nbformat

    known = {source.stem: source for source in sources()}
    if unknown := set(args.names) - known.keys():
        raise UserError(f"there is no notebook {', '.join(unknown)}: choose {', '.join(known)}")
    for name in args.names or known:
        notebook, started = renewed(known[name]), time.perf_counter()
        if not args.check:
            save_text(as_text(notebook), known[name])
        with tempfile.TemporaryDirectory() as folder:
            for run in map(Path, args.runs):
                shutil.copytree(run, Path(folder) / "runs" / run.name)
            notebook = execute(notebook, Path(folder), args.tiny)
        text = nbformat.writes(notebook) + "\n"
        print(f"{name}: {time.perf_counter() - started:.0f} s, {len(text):,} bytes")
        for problem in problems(notebook, len(text)):
            print(f"{name}: {problem}")
        if not args.check:
            save_text(text, known[name].with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
