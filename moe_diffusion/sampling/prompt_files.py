"""Files of prompts: lines of texts, and those of benchmarks as they are published.

| benchmark      | file                                                                 | images |
|----------------|----------------------------------------------------------------------|--------|
| `geneval`      | `evaluation_metadata.jsonl`: {"tag", "include", "prompt"} a line     | 4      |
| `dpg`          | folder of `<id>.txt`, or `dpg_bench.csv`: item_id, text, ... columns | 4      |
| `t2i_compbench`| `color_val.txt` and its like: one prompt a line, up to a tab         | 10     |
| `mjhq`         | `meta_data.json`: {id: {"category", "prompt"}}                       | 1      |
| `imagereward`  | `benchmark-prompts.json`: a list of {"id", "prompt"}                 | 10     |
| `mps`          | a list of {"prompt", "image_path", ...}, or of texts, as HPD v2 has  | 1      |
| `parti`        | `PartiPrompts.tsv`: Prompt, Category, ... columns                    | 1      |

`images` are drawn for each prompt, if nobody says how many.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_diffusion import digit_pairs, digit_prompts
from moe_diffusion.errors import UserError, shown
from moe_diffusion.reading import (
    LARGEST,
    Key,
    check_keys,
    plain_name,
    read_json,
    read_text,
    table_of,
)

# Name of a source -> prompts that its training never sees.
OWN: dict[str | os.PathLike, Callable[[], list[str]]] = {
    "digits_prompts": lambda: [text for text, _ in digit_prompts.held_out_prompts(100)],
    "digit_pairs": lambda: [text for text, _ in digit_pairs.held_out_prompts(1000)],
}
_LARGEST = 1 << 20  # bytes of a file of prompts without a benchmark
_LINE = {"prompt": Key((str,)), "category": Key((str,), "")}  # of a file .jsonl
_GENEVAL = {"tag": Key((str,)), "include": Key((list,)), "prompt": Key((str,))}
_TABLE_STARTS = ("{", "[", "item_id,", "Prompt\t")  # of files of the other benchmarks


class Item(NamedTuple):
    """A prompt of a file.

    Attributes:
      id: what the file calls it, or its number; a plain name of a file.
      category: "" if it has none.
      record: GenEval's line.
    """

    prompt: str
    id: str
    category: str = ""
    record: Mapping[str, Any] | None = None


class PromptFile(NamedTuple):
    """What `open_prompts` read.

    Attributes:
      benchmark: its name, or "".
      digest: SHA-256 of what the file or folder holds.
      items: in their order; a prompt may stand there twice.
    """

    path: str
    benchmark: str
    digest: str
    items: tuple[Item, ...]

    @property
    def prompts(self) -> list[str]:
        return [item.prompt for item in self.items]

    @property
    def images(self) -> int:
        """Images of each prompt, if nobody says how many."""
        return BENCHMARKS[self.benchmark].images if self.benchmark else 1

    def describe(self) -> dict[str, Any]:
        """For a result: file, digest, number of prompts, and the benchmark if it is of one."""
        told = {"file": Path(self.path).name, "sha256": self.digest, "count": len(self.items)}
        return {"benchmark": self.benchmark, **told} if self.benchmark else told


class Benchmark(NamedTuple):
    """How a benchmark publishes its prompts.

    Attributes:
      file: its name there.
      read: path -> items. What is not as published raises a `_Misfit`.
      images: of each prompt, as its scorer wants them.
    """

    file: str
    read: Callable[[Path], list[Item]]
    images: int


class _Misfit(UserError):
    """A file is not of the benchmark that it was taken for; says why."""


def open_prompts(path: str | os.PathLike, benchmark: str | None = None) -> PromptFile:
    """Reads a file of prompts, or the folder of DPG-Bench's; or takes `OWN` prompts by their name.

    Args:
      benchmark: one of `BENCHMARKS`. None reads a text in UTF-8 of at most 1 MiB, one prompt a
        line; empty lines are left out. A line of a file `.jsonl` is an object with a `prompt` and
        perhaps a `category`.

    Raises:
      UserError: it is not there, or not as the benchmark publishes it.
    """
    if benchmark is None and path in OWN:
        texts = OWN[path]()
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        items = tuple(Item(text, f"{number:05}") for number, text in enumerate(texts))
        return PromptFile(os.fspath(path), "", digest, items)
    path = Path(path)
    if benchmark is None:
        items = [Item(text, f"{number:05}", category) for number, (text, category)
            in enumerate(_read(path))]  # fmt: skip
        return PromptFile(str(path), "", _digest(path), tuple(items))
    if benchmark not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(f"--benchmark {shown(benchmark)} is not known: choose one of {known}")
    try:
        items = _items(path, benchmark)
    except _Misfit as error:
        fits = [name for name in BENCHMARKS if name != benchmark and _fits(path, name)]
        hint = f"it fits --benchmark {fits[0]}" if fits else "or leave out --benchmark"
        file = BENCHMARKS[benchmark].file
        raise UserError(
            f"{path} is no file of prompts of {benchmark}: {error}: name its {file}; {hint}"
        ) from None
    return PromptFile(str(path), benchmark, _digest(path), tuple(items))


def _items(path: Path, benchmark: str) -> list[Item]:
    items = BENCHMARKS[benchmark].read(path)
    seen: set[str] = set()
    for item in items:
        if not item.prompt.strip() or "\0" in item.prompt:
            raise _Misfit(f"the prompt of {shown(item.id)} is empty or no text")
        plain_name(item.id, f"an id of {path}", "its pictures are named so")
        if item.id in seen:
            raise _Misfit(f"the id {shown(item.id)} stands there twice")
        seen.add(item.id)
    if not items:
        raise _Misfit("it has no prompts")
    return items


def _fits(path: Path, benchmark: str) -> bool:
    try:
        return bool(_items(path, benchmark))
    except UserError:
        return False


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _texts_in(path) if path.is_dir() else [path]:
        digest.update((f"{file.name}\0" if path.is_dir() else "").encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


# --- lines ---------------------------------------------------------------------------------------


def categories_of(file: PromptFile) -> dict[str, str]:
    """Prompt -> category, of the prompts that have one.

    Raises:
      UserError: a prompt has several categories.
    """
    found: dict[str, str] = {}
    for prompt, _, category, _ in file.items:
        if category and found.setdefault(prompt, category) != category:
            raise UserError(
                f"{file.path} has the prompt {shown(prompt)} in the categories "
                f"{shown(found[prompt])} and {shown(category)}: leave one"
            )
    return found


def _read(path: str | os.PathLike) -> list[tuple[str, str]]:
    """(prompt, category or "") of every line that is not empty."""
    lines = read_text(path, "file of prompts", _LARGEST).split("\n")
    if os.fspath(path).endswith(".jsonl"):
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        found = [_of_line(line, f"line {number} of {path}") for number, line in numbered]
    else:
        found = [(line.strip(), "") for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path} has no prompts: write one a line")
    return found


def _of_line(line: str, where: str) -> tuple[str, str]:
    table = table_of(line)
    remedy = 'write {"prompt": "...", "category": "..."}'
    if table is None:
        raise UserError(f"{where} is no JSON object: {remedy}")
    check_keys(table, _LINE, where, remedy)
    if not table["prompt"].strip():
        raise UserError(f"{where}: prompt is empty: {remedy}")
    return table["prompt"].strip(), table.get("category", "").strip()


# --- benchmarks ----------------------------------------------------------------------------------


def _geneval(path: Path) -> list[Item]:
    items = []
    for number, line in enumerate(filter(str.strip, _text(path).split("\n"))):
        table = table_of(line)
        if table is None:
            raise _Misfit(f"line {number + 1} is no JSON object")
        _check(table, _GENEVAL, f"line {number + 1}")
        items.append(Item(table["prompt"], f"{number:05}", table["tag"], table))
    return items


def _dpg(path: Path) -> list[Item]:
    if path.is_dir():
        return [Item(_text(file).strip(), file.stem) for file in _texts_in(path)]
    rows = _rows(path, ",", ("item_id", "text"))
    found: dict[str, str] = {}
    for row in rows:
        if found.setdefault(row["item_id"], row["text"]) != row["text"]:
            raise _Misfit(f"the item {shown(row['item_id'])} has several texts")
    return [Item(text.strip(), name) for name, text in found.items()]


def _t2i_compbench(path: Path) -> list[Item]:
    text = _text(path)
    if path.suffix != ".txt" or text.lstrip().startswith(_TABLE_STARTS):
        raise _Misfit("it is no .txt of one prompt a line")
    prompts = [line.split("\t")[0].strip() for line in text.split("\n") if line.strip()]
    return [Item(prompt, f"{number:05}") for number, prompt in enumerate(prompts)]


def _mjhq(path: Path) -> list[Item]:
    table = _json(path)
    if not isinstance(table, dict):
        raise _Misfit("it is no JSON table")
    for name, value in table.items():
        if not isinstance(value, dict):
            raise _Misfit(f"{shown(name)} is no table of category and prompt")
        _check(value, {"category": Key((str,)), "prompt": Key((str,))}, shown(name))
    return [Item(value["prompt"], name, value["category"]) for name, value in table.items()]


def _imagereward(path: Path) -> list[Item]:
    keys = {"id": Key((str,)), "prompt": Key((str,))}
    return [Item(table["prompt"], table["id"]) for table in _list(path, keys)]


def _mps(path: Path) -> list[Item]:
    items = []
    for number, table in enumerate(_list(path, {"prompt": Key((str,))})):
        name = table["id"] if isinstance(table.get("id"), str) else f"{number:05}"
        items.append(Item(table["prompt"], name))
    return items


def _parti(path: Path) -> list[Item]:
    rows = _rows(path, "\t", ("Prompt", "Category"))
    return [Item(row["Prompt"].strip(), f"{number:05}", row["Category"])
        for number, row in enumerate(rows)]  # fmt: skip


BENCHMARKS = {
    "geneval": Benchmark("evaluation_metadata.jsonl", _geneval, 4),
    "dpg": Benchmark("dpg_bench.csv or folder prompts/", _dpg, 4),
    "t2i_compbench": Benchmark("color_val.txt or its like", _t2i_compbench, 10),
    "mjhq": Benchmark("meta_data.json", _mjhq, 1),
    "imagereward": Benchmark("benchmark-prompts.json", _imagereward, 10),
    "mps": Benchmark("list of prompts", _mps, 1),
    "parti": Benchmark("PartiPrompts.tsv", _parti, 1),
}


def _text(path: Path) -> str:
    return read_text(path, "file of prompts", LARGEST)


def _texts_in(folder: Path) -> list[Path]:
    """The .txt of a folder; names that are numbers in their order, before the others."""
    files = [p for p in folder.iterdir() if p.suffix == ".txt" and not p.name.startswith(".")]
    return sorted(files, key=lambda p: (not p.stem.isdecimal(), len(p.stem) * p.stem.isdecimal(),
        p.stem))  # fmt: skip


def _json(path: Path) -> Any:
    if path.is_dir():
        raise _Misfit("it is a folder")
    try:
        return read_json(path, "fetch it again", "file of prompts")
    except UserError as error:
        if not path.is_file():
            raise
        raise _Misfit(str(error).removeprefix(f"{path} ")) from None


def _list(path: Path, keys: Mapping[str, Key]) -> list[dict[str, Any]]:
    """The tables of a JSON list; a text stands for a table with that prompt."""
    found = _json(path)
    if not isinstance(found, list):
        raise _Misfit("it is no JSON list")
    tables = [{"prompt": value} if isinstance(value, str) else value for value in found]
    for number, table in enumerate(tables):
        if not isinstance(table, dict):
            raise _Misfit(f"its item {number} is no table")
        _check(table, keys, f"item {number}")
    return tables


def _rows(path: Path, separator: str, needed: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a table of texts whose first line names its columns."""
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    try:
        lines = csv.DictReader(io.StringIO(_text(path)), delimiter=separator, quoting=quoting)
        lacking = [name for name in needed if name not in (lines.fieldnames or ())]
        if lacking:
            raise _Misfit(f"its first line names no column {lacking[0]}")
        rows = list(lines)
    except csv.Error as error:
        raise _Misfit(f"it is no table of texts ({error})") from None
    for number, row in enumerate(rows, 2):
        if any(not row[name] for name in needed):
            raise _Misfit(f"row {number} has too few columns")
    return rows


def _check(table: Mapping[str, Any], keys: Mapping[str, Key], where: str) -> None:
    try:
        check_keys(table, keys, where, "see there")
    except UserError as error:
        raise _Misfit(str(error).removesuffix(": see there")) from None
