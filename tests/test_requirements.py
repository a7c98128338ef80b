"""setup.cfg names the packages that the code imports, all of them and no others."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from tests import cli

# Requirement -> the name in an import, where they differ.
IMPORTED_AS = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "tensorflow-datasets": "tensorflow_datasets",
}
# Imported, but part of what another requirement brings.
PART_OF = {"jaxlib": "jax", "ml_dtypes": "jax", "fsspec": "etils", "IPython": "ipykernel"}
# A rival that `bench --compare` measures if the user has it, and what CLIP is compared with.
OPTIONAL = {"tokamax", "transformers"}
# tensorflow-datasets imports it and declares it for old versions of Python only.
NOT_IMPORTED = {"importlib_resources"}
# Of the tests and the site, run and not imported.
TOOLS = {"build", "pytest-xdist", "ruff", "mkdocs-material", "mkdocstrings-python"}
WORKING = ("dev", "notebooks", "docs")  # extras for work on the project itself


def requirements() -> dict[str, set[str]]:
    """Extra ("" = what is always installed) -> names of its requirements."""
    config = configparser.ConfigParser()
    config.read(cli.ROOT / "setup.cfg")
    groups = {"": config["options"]["install_requires"]} | dict(config["options.extras_require"])
    return {
        extra: {re.match(r"[\w.-]+", line)[0] for line in text.split("\n") if line.strip()}
        for extra, text in groups.items()
    }


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(*places: str) -> set[str]:
    """Top-level names of other projects that the files of some folders import anywhere."""
    names = set()
    for path in (path for place in places for path in (cli.ROOT / place).rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module)
    tops = {name.partition(".")[0] for name in names}
    own = {"moe_diffusion", "configs", "launch", "tests", "docs"}
    return {PART_OF.get(name, name) for name in tops - own - sys.stdlib_module_names}


def names_of(requirements: set[str]) -> set[str]:
    return {IMPORTED_AS.get(name, name) for name in requirements - NOT_IMPORTED - TOOLS}


def test_the_package_imports_what_is_declared_and_nothing_else():
    declared = requirements()
    work = set().union(*(declared.pop(extra) for extra in WORKING))
    package = imported("moe_diffusion", "configs")
    assert names_of(set().union(*declared.values())) == package - OPTIONAL
    assert imported("tests", "docs", "notebooks") - OPTIONAL <= package | names_of(work)
    assert names_of(requirements()["docs"] | requirements()["notebooks"]) <= imported(
        "docs", "notebooks"
    )


@pytest.mark.parametrize("extra", sorted(requirements().keys() - {"", *WORKING}))
def test_an_extra_brings_what_is_imported_when_it_is_needed(extra):
    """Each of its packages is imported, but not when a module is imported, jax apart."""
    names = names_of(requirements()[extra])
    assert names and names <= imported("moe_diffusion")
    eager = set()
    for path in Path(cli.ROOT / "moe_diffusion").rglob("*.py"):
        for node in parsed(path).body:
            if isinstance(node, ast.Import):
                eager |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                eager.add(node.module.partition(".")[0])
    assert not names & eager - {"jax"}
