"""The config files that come with the project, and how they are found and run.

They lie in configs/ of a checkout, and in moe_diffusion/configs/ of an installed package (setup.py
puts them there). Nothing here imports jax, so a command line can name them in its help.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "configs"
# The root of the repository; None if the package is installed without one.
CHECKOUT = None if _INSTALLED.is_dir() else _PACKAGE.parent
FOLDER = _INSTALLED if CHECKOUT is None else CHECKOUT / "configs"
_PROTOCOL = "eval_"


def find(name: str) -> Path | None:
    """The config file of "digits", "configs/digits.py" or "my/own.py"; None if there is none.

    A bare name is always one of the project's. A path is looked for in the current folder first,
    and then among the project's files, whose folder it may call configs/.
    """
    path = Path(name)
    if path.suffix or len(path.parts) > 1:
        inside = Path(*path.parts[1:]) if path.parts[0] == "configs" else path
        candidates = [path, FOLDER / inside]
    else:
        candidates = [FOLDER / f"{name}.py"]
    return next((found for found in candidates if found.is_file()), None)


def find_protocol(name: str) -> Path | None:
    """The file of a protocol that is named "dsmoe" or "my/own.py"; None if there is none."""
    path = Path(name) if name.endswith(".py") else FOLDER / f"{_PROTOCOL}{name}.py"
    return path if path.is_file() else None


def names(folder: Path = FOLDER) -> list[str]:
    """The config files of a folder, without their suffix; other Python files are left out."""
    return [p.stem for p in sorted(folder.glob("*.py")) if "def get_config(" in p.read_text()]


def protocols() -> list[str]:
    """The names of the published protocols of evaluation."""
    return [p.stem.removeprefix(_PROTOCOL) for p in sorted(FOLDER.glob(f"{_PROTOCOL}*.py"))]


def papers() -> list[Path]:
    """The files that list the tables and figures of a paper."""
    return sorted((FOLDER / "papers").glob("*.py"))


def listing() -> str:
    """A line for each config: its name and the first line of its docstring."""
    width = max(map(len, names()))
    return "\n".join(f"{name:<{width}}  {first_line(FOLDER / f'{name}.py')}" for name in names())


def first_line(path: Path) -> str:
    """The first line of a Python file's docstring, read without running the file."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def run_file(path: Path) -> ModuleType:
    """Runs a config file, which may import `configs.families`; returns its module.

    Raises:
      ImportError: it is no Python file. Otherwise, whatever the file raises.
    """
    _name_folder()
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _name_folder() -> None:
    """Lets `configs` be the name of FOLDER in imports; a package of that name that was imported
    before finds the project's files, too."""
    known = sys.modules.get("configs")
    if known is None:
        places = [str(FOLDER)]
        spec = importlib.util.spec_from_file_location(
            "configs", FOLDER / "__init__.py", submodule_search_locations=places
        )
        known = importlib.util.module_from_spec(spec)
        sys.modules["configs"] = known
        spec.loader.exec_module(known)
    elif str(FOLDER) not in known.__path__:
        known.__path__.append(str(FOLDER))
