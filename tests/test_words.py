"""Rules about the code itself: the words in it, its size, and which way its imports point."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from moe_diffusion import cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "moe_diffusion"
FILES = sorted(PACKAGE.rglob("*.py"))
LAUNCHERS = sorted((ROOT / "launch").glob("*.py"))  # above the commands, and not in the wheel
CORE = ("moe", "diffusion", "training", "data", "parallel") + tuple(
    f"models/{name}.py" for name in ("stack", "blocks", "dit", "jit", "patches")
)
KEY = re.compile(r"[A-Za-z_][\w.]*")
NAMES = {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.keyword: "arg"}
NAMES |= {ast.FunctionDef: "name", ast.AsyncFunctionDef: "name", ast.ClassDef: "name"}
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def under(*places: str) -> list[Path]:
    """The files of folders and the files of the package that are named."""
    return [f for f in FILES if any(f == PACKAGE / p or PACKAGE / p in f.parents for p in places)]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def docstrings(tree: ast.Module) -> set[ast.Constant]:
    """Texts that stand alone as a statement; comments on attributes are written so, too."""
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
    return {s.value for s in statements if isinstance(s.value, ast.Constant)}


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, identifier or text that looks like a key) of everything in a file but its prose."""
    prose = docstrings(tree)
    for joined in (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)):
        prose |= set(joined.values)
    for node in ast.walk(tree):
        if type(node) in NAMES:
            yield node.lineno, getattr(node, NAMES[type(node)]) or ""
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name
            yield node.lineno, node.asname or ""
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            yield node.lineno, node.name or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            if KEY.fullmatch(node.value):
                yield node.lineno, node.value


def found(wanted: re.Pattern, paths: list[Path]) -> list[str]:
    """ "file:line: word" of the words that a pattern matches."""
    return [
        f"{name_of(path)}:{line}: {word}"
        for path in paths
        for line, word in words(parsed(path))
        if wanted.search(word)
    ]


LABEL = re.compile(r"(^|[._])labels?($|[._])|num_classes|Label", re.ASCII)


def test_only_models_and_their_sources_know_what_a_label_is():
    places = ("training", "diffusion", "planning", "benchmarks", "parallel", "moe")
    assert found(LABEL, under(*places, "data/pipeline.py")) == []


@pytest.mark.parametrize(
    "code,clean",
    [
        ("label = 1", False),
        ("f(labels=1)", False),
        ("batch['label']", False),
        ("x = config.model.num_classes", False),
        ("getattr(model, 'num_classes')", False),
        ("'model.num_classes'", True),  # a docstring
        ("x = 'model.num_classes'", False),
        ("x = 'choose another label'", True),
        ("x = f'a label of {y}'", True),
        ("x = f'a label of {label}'", False),
        ("import labels", False),
        ("from models import LabelEmbed", False),
        ("unlabelled = 1", True),
    ],
)
def test_the_words_are_found(code, clean):
    assert not any(LABEL.search(word) for _, word in words(ast.parse(code))) == clean


# Who may read the keys model.image_size and model.image_width; others ask `model.input_shape`.
KNOW_THE_SIDES = (
    "config",
    "interop",
    "models/parts.py",
    "models/fitting.py",
    "reproduction/tiny.py",
)


def test_the_shape_of_an_image_is_that_of_the_model():
    others = [f for f in FILES if f not in under(*KNOW_THE_SIDES)]
    wanted = re.compile(r"^(model\.)?image_(size|width)$")
    assert found(wanted, others) == []


# Pictures for a judge are cropped to squares, as `evaluate --size` says.
SQUARES = ("moe_diffusion/evaluation/images.py",)


def test_no_image_is_taken_for_a_square():
    """A tuple or list that begins with the same name twice and goes on, as (size, size, 3)."""
    squares = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Tuple | ast.List) and len(node.elts) in (3, 4):
                elements = [ast.unparse(element) for element in node.elts]
                if any(
                    a == b and "size" in a for a, b in zip(elements, elements[1:], strict=False)
                ):
                    squares.append(f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}")
    assert [text for text in squares if not text.startswith(SQUARES)] == []


# --- size ----------------------------------------------------------------------------------------


def lines_of_code(path: Path) -> int:
    """Lines that hold a token which is no comment and no docstring."""
    without = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    spans = {(c.lineno, c.end_lineno) for c in docstrings(parsed(path))}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        is_prose = token.type == tokenize.STRING and (token.start[0], token.end[0]) in spans
        if token.type not in (*without, tokenize.ENDMARKER) and not is_prose:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def test_the_core_can_be_read():
    sizes = {place: sum(map(lines_of_code, under(place))) for place in CORE}
    assert all(sizes.values()), sizes
    print(sizes, sum(sizes.values()))
    assert sum(sizes.values()) <= 3500, sizes


def test_no_file_is_long():
    sizes = {name_of(p): len(p.read_text().splitlines()) for p in (*FILES, *LAUNCHERS)}
    assert {name: size for name, size in sizes.items() if size > 350} == {}


def test_no_function_is_long():
    sizes = {
        f"{name_of(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in (*FILES, *LAUNCHERS)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: size for name, size in sizes.items() if size > 80} == {}


# --- imports -------------------------------------------------------------------------------------


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
COMMANDS = (*cli.COMMANDS, "__main__")


def at_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a file that run when it is imported: not those inside of functions."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                for part in ("body", "orelse", "finalbody", "handlers"):
                    yield from at_import(getattr(node, part, []))


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports when it is imported, or run as a command."""
    names: set[str] = set()
    tree = parsed(path)
    # A command imports inside of its functions, after its flags have been read.
    inside = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    for node in inside if path.stem in COMMANDS else at_import(tree.body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else node.module)
    return {name for name in names if name in MODULES} - {module_of(path)}


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One way round every circle that a walk through the graph meets."""
    found, done, way = [], set(), []

    def visit(name: str) -> None:
        if name in way:
            found.append(way[way.index(name) :])
        elif name not in done:
            way.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(way.pop())

    for name in sorted(graph):
        visit(name)
    return found


def test_no_modules_import_each_other_in_a_circle():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert circles(GRAPH) == []


# From the ground up. A folder or file may import what stands in a lower row, or in its own folder.
FLOORS = (
    ("errors", "__init__"),
    (
        "checks",
        "reading",
        "caches",
        "signals",
        "digests",
        "plugins",
        "vocabulary",
        "slices",
        "priorities",
    ),
    ("gpus", "step_times", "time_buckets"),
    ("chips",),
    ("remote", "shipped", "workers", "ornaments", "xla_flags"),
    ("writing", "manifest", "handlers", "clusters", "cli"),
    ("locks", "metric_lines", "heartbeat", "profiling"),
    ("trackers",),
    ("parallel", "pictures"),
    ("conditions", "tensor_parallel", "progress", "fallback"),
    ("synthetic", "empty_prompt", "digit_prompts"),
    ("classes", "own_data", "digit_pairs", "caption_records", "buckets"),
    ("kernels",),
    ("moe",),
    ("models",),
    ("config", "diffusion", "data"),
    ("training",),
    ("interop",),
    ("preparing",),
    ("evaluation", "figures", "sampling"),
    ("dense2moe",),
    ("planning", "benchmarks", "reproduction", "reporting"),
)
# A row whose members may import each other, but never in a circle (see above).
BESIDE = {("evaluation", "sampling"), ("evaluation", "figures"), ("sampling", "figures")}
BESIDE |= {("benchmarks", "planning")}
FLOOR = {name: number for number, names in enumerate((*FLOORS, COMMANDS)) for name in names}


def place_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_imports_point_one_way():
    unknown = sorted({place_of(module) for module in MODULES} - FLOOR.keys())
    assert unknown == [], "not on the map"
    wrong = []
    for module, others in GRAPH.items():
        for other in others:
            own, its = place_of(module), place_of(other)
            up = FLOOR[its] >= FLOOR[own] and its != own
            if up and (own, its) not in BESIDE and own not in COMMANDS:
                wrong.append(f"{module} -> {other}")
    assert sorted(wrong) == []


def test_nothing_below_knows_the_launchers():
    imports = (n for f in FILES for n in ast.walk(parsed(f)) if isinstance(n, ast.ImportFrom))
    assert [n.module for n in imports if (n.module or "").split(".")[0] == "launch"] == []


@pytest.mark.parametrize("name", ["slow.txt", "exhaustive.txt"])
def test_the_slow_tests_are_there(name):
    for line in (ROOT / "tests" / name).read_text().splitlines():
        file, _, test = line.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(), line
