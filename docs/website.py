"""What mkdocs is told beside mkdocs.yml: pages made of other files, and links out of docs/.

mkdocs calls the functions on_... of this file (`make docs`). No page needs jax: docstrings are read
without importing their modules, and the flags of the commands from their --help.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # mkdocs runs this file alone

import moe_diffusion
from docs.notebooks import REPOSITORY, ROOT, images, sources
from moe_diffusion import cli

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

# Page of the reference -> title, modules or packages, all of whose public names it shows.
REFERENCE = {
    "moe": ("Routers and experts", ("moe",)),
    "models": ("Models", ("models",)),
    "diffusion": ("Diffusion", ("diffusion",)),
    "training": ("Training", ("training",)),
    "data": ("Data", ("conditions", "classes", "data", "preparing")),
    "sampling": ("Sampling", ("sampling",)),
    "evaluation": ("Evaluation", ("evaluation",)),
    "interop": ("PyTorch weights", ("interop",)),
    "dense2moe": ("Dense2MoE", ("dense2moe",)),
    "parallel": ("Devices and sharding", ("parallel", "tensor_parallel")),
    "planning": ("Planning", ("planning", "chips")),
}
# A block of code, a link (its text may hold code), or code: the first that begins is meant.
_LINK = re.compile(
    r"^```.*?^```$|(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s#]*)(#[^()\s]*)?\)|``.*?``|`[^`\n]*`",
    re.DOTALL | re.MULTILINE,
)
# A reference that must lead somewhere, to a name without a dot. Types of arguments need not.
_REFERENCE = re.compile(
    r'<autoref (?![^>]* optional)[^>]*?identifier="([^".]*)"[^>]*>(.*?)</autoref>', re.DOTALL
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages and pictures that are made of other files."""
    from mkdocs.structure.files import File

    for place, content in made():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **options: Any) -> str:
    """A page of docs/ as the site shows it."""
    del options
    source = page.file.src_uri
    return moved(markdown, f"docs/{source}", source) if page.file.generated_by is None else markdown


def on_page_content(html: str, **options: Any) -> str:
    """Shapes like [layers][B] are no links to something named B."""
    del options
    return _REFERENCE.sub(r"[\2][\1]", html)


def made() -> Iterator[tuple[str, str | bytes]]:
    """(place in the site, text or bytes) of every page and picture that is no file of docs/."""
    yield "index.md", moved((ROOT / "README.md").read_text(), "README.md", "index.md")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    yield "contributing.md", moved(text, "CONTRIBUTING.md", "contributing.md")
    yield "writing_a_router.md", _router_page()
    yield "commands.md", _commands()
    yield "api/index.md", _names()
    yield "api/config.md", _config_keys()
    for name, (title, modules) in REFERENCE.items():
        shown = [module for place in modules for module in _modules(place)]
        yield f"api/{name}.md", f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in shown)
    notebooks = [ipynb for ipynb in (s.with_suffix(".ipynb") for s in sources()) if ipynb.exists()]
    rows = [f"* [{_title(ipynb)}]({ipynb.stem}.md)" for ipynb in notebooks]
    head = "# Notebooks\n\nEvery notebook runs on a CPU, a GPU or one TPU chip"
    head += ", and opens in Colab.\n\n"
    yield "notebooks/index.md", head + "\n".join(rows) + "\n"
    for ipynb in notebooks:
        yield from _notebook(ipynb)


def moved(markdown: str, source: str, place: str) -> str:
    """A text whose relative links hold at its place in the site.

    Links to what the site shows stay inside of it; other files of the repository are shown there.

    Args:
      source: where the text lies in the repository, as its links see it.
      place: in the site.

    Raises:
      ValueError: a link leads to no file of the repository.
    """
    pages = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
    made_here = ("notebooks/index.md", "writing_a_router.md", "commands.md", "api/")

    def link(found: re.Match) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if not target or re.match(r"[a-z]+:", target):  # code, an anchor, or another site
            return found[0]
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        inside = path.removeprefix("docs/")
        if path in pages:
            inside, path = pages[path], f"docs/{pages[path]}"
        elif path.startswith("notebooks/") and path.endswith((".ipynb", ".py")):
            inside = f"{os.path.splitext(path)[0]}.md"
            path = f"docs/{inside}"
        elif path == "notebooks":
            inside, path = "notebooks/index.md", "docs/notebooks/index.md"
        elif inside.startswith(made_here):
            pass
        elif not (ROOT / path).exists():
            raise ValueError(f"{source}: the link to {target} leads nowhere")
        if path.startswith("docs/") and not path.endswith((".py", ".json")):
            target = os.path.relpath(inside, os.path.dirname(place))
        else:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            target = f"{REPOSITORY}/{kind}/main/{path}"
        return f"{text}({target}{anchor})"

    return _LINK.sub(link, markdown)


def _router_page() -> str:
    """The chapter of architecture.md on a new router, as a page with the notebook beside it."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    chapter = text.partition("## A new router\n")[2].partition("\n## ")[0]
    chapter = moved(chapter, "docs/architecture.md", "writing_a_router.md")
    see = "[A notebook](notebooks/04_own_router.md) writes one, tests it and trains it; "
    see += "[routers.md](routers.md) compares those of the library, whose classes are in the "
    return f"# Writing a router\n{chapter}\n{see}[reference](api/moe.md).\n"


def _commands() -> str:
    """The --help of every command."""
    environment = os.environ | {"COLUMNS": "96"}
    parts = ["# Command lines\n\nIn any folder `moe-diffusion COMMAND` is the same.\n"]
    for name in cli.COMMANDS:
        command = [sys.executable, "-m", f"moe_diffusion.{name}", "--help"]
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        told = subprocess.run(command, check=True, **options).stdout
        parts.append(f"## {name}\n\n```text\n{told.rstrip()}\n```\n")
    return "\n".join(parts)


def _names() -> str:
    """What `import moe_diffusion` offers, and where the reference has it."""
    text = "# Reference\n\nWhat `import moe_diffusion` offers; [python.md](../python.md) shows how "
    text += "its parts go together.\n\n| name in `moe_diffusion` | what it is |\n|---|---|\n"
    for name, (module, there) in moe_diffusion._PLACES.items():
        path, first = _definition(f"moe_diffusion.{module}", there)
        text += f"| [`{name}`][{path}] | {first} |\n"
    return text


def _definition(module: str, name: str) -> tuple[str, str]:
    """Where a name is defined, "module.name", and the first line of its docstring."""
    place = ROOT / module.replace(".", "/")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and name in (alias.name for alias in node.names):
            return _definition(node.module, name)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return f"{module}.{name}", (ast.get_docstring(node) or "").partition("\n")[0]
    raise ValueError(f"{module} has no {name}")


def _config_keys() -> str:
    """The files in which config keys stand, with their comments."""
    text = "# Config keys\n\nEvery key, its default and its meaning. Those of an architecture are "
    text += "`FIELDS` of its module, those of a router the fields of its class.\n"
    folder = ROOT / "moe_diffusion"
    shown = [folder / "config" / "defaults.py"]
    shown += [path for path in sorted((folder / "models").glob("*.py")) if _fields(path)]
    for path in shown:
        text += f"\n## {path.relative_to(folder)}\n\n```python\n{_fields(path).rstrip()}\n```\n"
    text += "\n# Functions\n\n"
    return text + "\n\n".join(f"::: {name}" for name in [*_modules("config"), *_modules("errors")])


def _fields(path: Path) -> str:
    """The part of a module that defines keys: all of defaults.py, or FIELDS."""
    code = path.read_text()
    if path.name == "defaults.py":
        return code
    found = re.search(r"^FIELDS\b.*?^[}\])]", code, re.DOTALL | re.MULTILINE)
    return found[0] if found else ""


def _modules(place: str) -> list[str]:
    """The names of a module, or of all modules of a package."""
    path = ROOT / "moe_diffusion" / place
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def _title(ipynb: Path) -> str:
    cells = json.loads(ipynb.read_text())["cells"]
    text = "".join("".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "markdown")
    return re.search(r"^# (.*)$", text, re.MULTILINE)[1]


def _notebook(ipynb: Path) -> Iterator[tuple[str, str | bytes]]:
    """The page of a notebook, and its pictures."""
    import nbformat

    notebook = nbformat.read(ipynb, as_version=4)
    pictures = iter(enumerate(images(notebook)))
    text = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text += (
                moved(cell.source, f"notebooks/{ipynb.name}", f"notebooks/{ipynb.stem}.md") + "\n\n"
            )
            continue
        text += f"```python\n{cell.source}\n```\n\n"
        for output in cell.outputs:
            data = output.get("data", {})
            if any(kind.startswith("image/") for kind in data):
                number, (kind, content) = next(pictures)
                name = f"{ipynb.stem}_{number}.{kind}"
                text += f"![output]({name})\n\n"
                yield f"notebooks/{name}", content
            elif told := output.get("text") or data.get("text/plain"):
                text += f"```text\n{told.rstrip()}\n```\n\n"
    yield f"notebooks/{ipynb.stem}.md", text
