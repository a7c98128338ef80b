"""Commands of README.md, CONTRIBUTING.md and docs/ parse, their configs load, a test runs each."""

from __future__ import annotations

import argparse
import configparser
import importlib
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from moe_diffusion import chips, remote, shipped
from moe_diffusion import cli as command_lines
from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import protocol
from moe_diffusion.reproduction.items import find
from tests import cli

PAGES = [cli.ROOT / "README.md", cli.ROOT / "CONTRIBUTING.md"]
PAGES += sorted((cli.ROOT / "docs").rglob("*.md"))
_PACKAGES = r"(?:moe_diffusion|docs|tests|launch)"
_STARTS = re.compile(
    rf"(?:[A-Z_]+=\S+ )*(?:python -m {_PACKAGES}(?:\.\w|$|\s)|(?:moe-diffusion|make) [-\w])"
)
# A word of the pages that stands for others -> one of these; "..." stands for more of the same.
STANDS_FOR = {"ROUTER": "token_choice", "COMMAND": "train"}
_LEFT_OUT = ("...", "FLAGS")


class Command(NamedTuple):
    """A command of a page.

    whole: it stands in a block, where it has all flags that it needs, and not in a sentence.
    """

    page: str
    line: int
    whole: bool
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def commands_of(text: str, page: str) -> list[Command]:
    """The commands in a page's blocks of shell, and in the `code` of its sentences."""
    found, prose, block, language = [], [], None, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith("```"):
            if block is not None and language in ("", "bash", "shell"):
                found += _of_block(block, page)
            language = line.strip().strip("`") if block is None else ""
            block = [] if block is None else None
        else:
            (prose if block is None else block).append((number, line))
    joined = "\n".join(line for _, line in prose)
    for code in re.finditer(r"`([^`]+)`", joined):
        words = " ".join(code[1].split())
        if _STARTS.match(words):
            found.append(Command(page, prose[joined.count("\n", 0, code.start())][0], False, words))
    return found


def _of_block(block: list[tuple[int, str]], page: str) -> list[Command]:
    found, start, whole = [], 0, ""
    for number, line in block:
        start = start if whole else number
        whole += line.strip().removesuffix("\\")
        if not line.rstrip().endswith("\\"):
            for text in re.sub(r"(^|\s)#.*", "", whole).removeprefix("$ ").split("&&"):
                if _STARTS.match(text.strip()):
                    found.append(Command(page, start, True, " ".join(text.split())))
            whole = ""
    return found


@cache
def all_commands() -> tuple[Command, ...]:
    pages = {page.relative_to(cli.ROOT).as_posix(): page.read_text() for page in PAGES}
    return tuple(command for page, text in pages.items() for command in commands_of(text, page))


def test_commands_are_found():
    page = """Text with `make demo`, `make` and `python -m
moe_diffusion.sample --num 2`.

```
$ moe-diffusion train --config digits \\
    --workdir runs/x   # a comment
A=1 python -m tests.campaign && make test
step 3: loss 2
```

```python
make = "make it"
```
"""
    assert [tuple(command)[1:] for command in commands_of(page, "")] == [
        (5, True, "moe-diffusion train --config digits --workdir runs/x"),
        (7, True, "A=1 python -m tests.campaign"),
        (7, True, "make test"),
        (1, False, "make demo"),
        (1, False, "python -m moe_diffusion.sample --num 2"),
    ]
    assert len(all_commands()) > 100


# --- parsing -------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Thrown in place of what a command does once its flags are read."""

    def __init__(self, flags: argparse.Namespace, overrides: list[str]):
        super().__init__()
        self.flags, self.overrides = flags, overrides


@pytest.fixture
def parse(monkeypatch):
    """(module, its arguments, whether they are all) -> Parsed, or None if it ends, as --help."""
    kinds = (command_lines.Parser, argparse.ArgumentParser)
    originals = {kind: kind.parse_args for kind in kinds}
    lenient = []

    def parse_args(parser, argv=None, overrides=()):
        if lenient:
            for action in parser._actions:
                action.required = False
        original = next(originals[kind] for kind in kinds if isinstance(parser, kind))
        raise Parsed(original(parser, argv), list(overrides))

    def parse_with_overrides(parser, argv):
        words, overrides = command_lines.split_overrides(argv or sys.argv[1:])
        parse_args(parser, words, overrides)

    for kind in kinds:
        monkeypatch.setattr(kind, "parse_args", parse_args)
    monkeypatch.setattr(command_lines.Parser, "parse_with_overrides", parse_with_overrides)
    monkeypatch.setattr(remote, "check", lambda *args: None)  # drivers need not be here

    def parse(module, words, whole):
        lenient[:] = [] if whole else [True]
        monkeypatch.setattr(sys, "argv", [module, *words])
        if (cli.ROOT / module.replace(".", "/")).is_dir():
            module += ".__main__"
        try:
            importlib.import_module(module).main()
        except Parsed as parsed:
            return parsed
        except SystemExit as end:
            assert not end.code, (module, words)
        return None

    return parse


def split(command: Command) -> tuple[str, list[str]]:
    """The module of a command and its arguments; ("make", targets)."""
    text = command.text
    for name, meaning in STANDS_FOR.items():
        text = re.sub(rf"\b{name}\b", meaning, text)
    words = [word for word in shlex.split(text) if word not in _LEFT_OUT]
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words[0] == "make":
        return "make", [word for word in words[1:] if "=" not in word]
    if words[0] == "moe-diffusion":
        name, *rest = words[1:]
        return ("moe_diffusion.cli" if name.startswith("-") else f"moe_diffusion.{name}"), (
            [name, *rest] if name.startswith("-") else rest
        )
    module, *rest = words[2:]
    return module, rest


# A workdir of the pages whose name is no config's -> the config of its run.
RUNS = {
    "in/": "dsmoe_l",
    "runs/diffmoe": "digits:router=diffmoe",
    "runs/pairs": "digits_t2i:router=diffmoe",
    "runs/tuned": "dsmoe_l",
}


def config_of(args: argparse.Namespace) -> str | None:
    """The config that a command is given, or that its workdir has."""
    if given := getattr(args, "config", None):
        return given
    workdir = getattr(args, "workdir", None) or (getattr(args, "input", None) or "")
    workdir = workdir[0] if isinstance(workdir, list) else workdir
    if workdir in RUNS:
        return RUNS[workdir]
    return next((part for part in Path(workdir).parts if part in shipped.names()), None)


@pytest.fixture
def routers_of_the_docs(tmp_path, monkeypatch):
    """The current folder, with the router of docs/architecture.md as hash_router.py."""
    text = (cli.ROOT / "docs" / "architecture.md").read_text()
    (example,) = re.findall(
        r"```python\n((?:(?!```).)*class Hash\(Router\).*?)```", text, re.DOTALL
    )
    (tmp_path / "hash_router.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("hash_router", None)


@pytest.mark.usefixtures("routers_of_the_docs")
def test_every_command_parses_and_its_config_loads(parse):
    wrong = []
    for command in all_commands():
        try:
            check(command, parse)
        except (UserError, AssertionError, ImportError) as error:
            wrong.append(f"{command}\n    {error}")
    assert not wrong, "\n".join(wrong)


def check(command: Command, parse) -> tuple[str, str]:
    """Raises if a command is wrong; returns its name and what kind of work it is given."""
    module, words = split(command)
    if module == "make":
        (target,) = words
        assert target in re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE), target
        return "make", target
    name = module.removeprefix("moe_diffusion.")
    parsed = parse(module, words, command.whole)
    if parsed is None:
        return name, "--help"
    flags, spec = parsed.flags, config_of(parsed.flags)
    if spec:
        configs.load(spec, parsed.overrides)
    else:
        assert not parsed.overrides, "RUNS does not say which config this run has"
    if getattr(flags, "protocol", None):
        protocol.load(flags.protocol)
    if (getattr(flags, "topology", None) or "local") != "local":
        chips.parse(flags.topology, "--topology", "local")
    if name == "reproduce" and flags.name:
        find(flags.name)
    return name, kind_of(name, flags, spec)


def kind_of(name: str, flags: argparse.Namespace, spec: str | None) -> str:
    """What a command works on: a family of configs or of checkpoints, or the kind of its inputs."""
    if name == "convert":
        return flags.family or ""
    if name == "prepare":
        if flags.captions:
            return f"captions {flags.captions.partition(':')[0]}"
        return "sizes" if flags.sizes else "images"
    if name == "bench":
        return flags.what
    if name == "evaluate" and flags.samples:
        return "files"
    if name == "evaluate" and flags.prompts:
        return "prompts"
    if name == "sample" and flags.save_images:
        return "folders"
    if not spec:
        return ""
    stem = Path(spec.partition(":")[0]).stem
    return re.sub(r"(?<=[a-z])_(s|b|l|xl|xxl|xxxl|m|xs|3b|dev|schnell|[blgh]\d\d)$", "", stem)


# --- and is executed -----------------------------------------------------------------------------

MAKEFILE = (cli.ROOT / "Makefile").read_text()
_REPRODUCED = "tests/reproduction/test_reproduce.py::test_every_command_runs"
_GOLDEN = "tests/golden/test_golden.py::test_import_then_export_keeps_every_bit"
_DRY_RUN = "tests/launch/test_dry_runs.py::test_a_dry_run_prints_its_golden_text"
_CI = ".ci/run"
# Command and kind -> the test that executes it, small; or the script of CI.
EXECUTED = {
    "bench dispatch": "tests/benchmarks/test_bench.py::test_dispatch_ends_with_one_line_of_json",
    "bench saving": "tests/benchmarks/test_bench.py::test_saving_beside_the_steps_between",
    "bench sparsity": "tests/benchmarks/test_bench.py::test_sparsity_measures_two_structures",
    "bench suite": "tests/benchmarks/test_bench.py::test_nothing_starts_when_the_time_is_over",
    "cli --help": "tests/test_help.py::test_the_console_command_lists_the_commands",
    "convert dit": _GOLDEN,
    "convert dit_moe": _GOLDEN,
    "convert dsmoe": "tests/test_convert_cli.py::test_from_a_golden_to_images_and_back",
    "convert flux": "tests/interop/test_full_size.py::test_a_small_one_comes_back_bit_by_bit",
    "convert flux_diffusers": "tests/test_prompts_cli.py::test_one_image_for_each_prompt",
    "convert flux_moe": "tests/interop/test_flux_moe.py::test_the_command",
    "convert jit": _GOLDEN,
    "convert jitmoe": _GOLDEN,
    "convert promoe_tc": _GOLDEN,
    "convert sit": "tests/interop/test_lora.py::test_convert_merges",
    "curves": "tests/test_curves_cli.py::test_a_picture_of_two_runs",
    "demo digits": "tests/test_demo_cli.py::test_digits_by_their_labels",
    "demo digits_flux": "tests/test_flux_demo.py::test_trains_draws_and_ends_with_a_line",
    "distill dit_xl_moe": "tests/test_demo_cli.py::test_a_dit_becomes_experts",
    "distill flux_moe": "tests/dense2moe/test_stages.py::test_the_command",
    "distill_demo": "tests/dense2moe/test_demonstration.py::test_two_minutes_of_it",
    "docs.generate_models": "tests/test_models_page.py::test_write",
    "docs.generate_reproduce": "tests/reproduction/test_reproduce.py::test_the_page_is_not_stale",
    "docs.notebooks": "tests/test_notebooks.py::test_it_runs",
    "evaluate digits": "tests/test_evaluate_cli.py::test_a_run_on_digits_needs_nothing_else",
    "evaluate dsmoe": _REPRODUCED,
    "evaluate files": "tests/test_evaluate_cli.py::test_images_features_and_statistics_agree",
    "evaluate prompts": "tests/test_scores_cli.py::test_scores_of_prompts",
    "launch.gke dsmoe": _DRY_RUN,
    "launch.slurm dsmoe": _DRY_RUN,
    "launch.tpu_vm dsmoe": _DRY_RUN,
    "launch.xm_launch digits": _DRY_RUN,
    "launch.xpk dsmoe": _DRY_RUN,
    "plan dsmoe": "tests/planning/test_aot.py::test_dsmoe_l_e48_for_256_chips_in_three_minutes",
    "plan flux": "tests/planning/test_aot.py::test_flux_dev_draws_one_image_on_eight_v5e",
    "plan flux_moe": "tests/planning/test_aot.py::test_every_config_fits_somewhere",
    "prepare captions folder": "tests/preparing/test_captions.py::"
    "test_one_of_several_captions_is_drawn",
    "prepare captions journeydb": "tests/preparing/test_captions.py::test_other_kinds_are_prepared",
    "prepare captions tfds": "tests/preparing/test_captions.py::test_other_kinds_are_prepared",
    "prepare captions webdataset": "tests/test_captions_road_cli.py::"
    "test_records_of_a_tar_and_of_a_folder",
    "prepare images": "tests/test_prepare_cli.py::test_what_a_run_leaves_and_says",
    "prepare sizes": "tests/test_buckets_cli.py::test_prepare_is_killed_and_goes_on",
    "report digits": "tests/reporting/test_report.py::test_a_page_of_two_runs",
    "reproduce": "tests/reproduction/test_reproduce.py::test_list_and_dry_run",
    "routing digits": "tests/test_thresholds_cli.py::test_a_folder_on_the_use_of_experts",
    "sample digits_t2i": "tests/test_pairs_cli.py::test_train_draw_and_score",
    "sample digits": "tests/test_sample_cli.py::test_the_same_seed_draws_the_same_bytes",
    "sample dsmoe": "tests/test_convert_cli.py::test_from_a_golden_to_images_and_back",
    "sample folders": "tests/test_scores_cli.py::test_layouts_of_scorers",
    "sample flux": "tests/test_prompts_cli.py::test_one_image_for_each_prompt",
    "sample flux_moe": "tests/sampling/test_top_k.py::test_columns_are_the_pictures_of_each",
    "tests.campaign": "tests/campaign/test_readers.py::test_damaged_inputs",
    "tests.campaign.disturbed": "tests/campaign/test_disturbed.py::"
    "test_a_disturbed_run_ends_as_an_undisturbed_one",
    "tests.campaign.processes": "tests/proofs/test_processes.py::test_processes_train_as_one",
    "tests.interop.full_size": "tests/interop/test_full_size.py::"
    "test_a_small_one_comes_back_bit_by_bit",
    "thresholds digits": "tests/test_thresholds_cli.py::test_search",
    "train digits_t2i": "tests/test_pairs_cli.py::test_train_draw_and_score",
    "train diffmoe_t2i": "tests/test_captions_road_cli.py::"
    "test_a_killed_run_resumes_and_draws_prompts",
    "train --help": "tests/test_help.py::test_config_list_shows_all",
    "train digits": "tests/test_train_cli.py::test_what_a_run_prints_and_leaves",
    "train dsmoe": _REPRODUCED,
    "make docs": "tests/test_website.py::test_the_site_is_built",
    "make install": _CI,
    "make lint": _CI,
    "make test": _CI,
    "make test-slow": _CI,
}
TESTS = ("make test-all", "make test-browser")  # targets that run nothing but tests


@pytest.mark.usefixtures("routers_of_the_docs")
def test_every_command_is_executed_by_a_test(parse):
    kinds = {" ".join(check(command, parse)).strip() for command in all_commands()}
    targets = {kind for kind in kinds if kind.startswith("make ")} - EXECUTED.keys()
    for target in sorted(targets.difference(TESTS)):
        recipe = recipe_of(target.removeprefix("make "))
        assert recipe, f"nothing is known of {target}"
        kinds |= {" ".join(check(command, parse)).strip() for command in recipe}
    missing = kinds - targets - EXECUTED.keys()
    # In a sentence a command may stand for itself, without what it works on.
    bare = {kind for kind in missing if any(known.startswith(f"{kind} ") for known in EXECUTED)}
    assert missing == bare, "no test is named in EXECUTED"
    assert EXECUTED.keys() - kinds == set(), "no page has these"


def test_what_other_programs_are_given_is_there():
    """Extras for pip, tests and markers for pytest, files for docker."""
    text = "\n".join(page.read_text() for page in PAGES)
    settings = configparser.ConfigParser()
    settings.read(cli.ROOT / "setup.cfg")
    extras = re.findall(r"pip install [^\n`]*?(?:moe_diffusion|\.)\[(\w+)\]", text)
    assert "torch" in extras
    assert set(extras) - {"EXTRA"} <= set(settings["options.extras_require"])
    given = [words.split() for words in re.findall(r"python -m pytest ([^\n`#]+)", text)]
    markers = re.findall(r"^(\w+):", settings["tool:pytest"]["markers"], re.MULTILINE)
    for words in given:
        assert words[-1] in markers if words[0] == "-m" else (cli.ROOT / words[-1]).exists(), words
    builds = re.findall(r"docker build -f (\S+) --build-arg (\w+)=(\w+)", text)
    for file, argument, extra in builds:
        assert f"ARG {argument}" in (cli.ROOT / file).read_text()
        assert extra in settings["options.extras_require"]
    assert given and builds


def recipe_of(target: str) -> list[Command]:
    """The commands of a target of the Makefile."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)[1]
    found = re.findall(r"-m (moe_diffusion\.[^;&\n]*)", recipe.replace("\\\n", " "))
    texts = [re.sub(r"\$\([A-Z]+\)", "1", text) for text in found]
    return [Command("Makefile", 0, True, f"python -m {text.strip()}") for text in texts]


@pytest.mark.parametrize("place", sorted(set(EXECUTED.values())))
def test_the_tests_are_there(place):
    file, _, test = place.partition("::")
    text = (cli.ROOT / file).read_text()
    assert f"def {test}(" in text if test else "make test" in text
