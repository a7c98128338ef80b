"""The command lines that make a table or figure: to be shown, and to be run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import protocol
from moe_diffusion.reproduction.items import Item, Row
from moe_diffusion.reproduction.tiny import quick, shrink


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says. The fields are flags of `reproduce`.

    out: folder of the results. runs: folder of what is trained.
    run: a trained run, for items that need one.
    prompts: a file of them, for items whose images are drawn for prompts.
    vaes: folder that holds the autoencoders under their names, like sd-vae-ft-mse.
    tiny: shrink models, data, training and evaluations until everything ends within minutes.
    overrides: texts "--config.<key>=<value>" for every command.
    """

    out: Path
    runs: Path
    run: str = ""
    vaes: str = ""
    inception: str = ""
    reference: str = ""
    prompts: str = ""
    tiny: bool = False
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Step:
    """One command line: argv[0] is the command. `row` is the one that it is for, if any."""

    argv: tuple[str, ...]
    row: Row | None = None

    def __str__(self) -> str:
        return "python -m moe_diffusion." + shlex.join(self.argv)


def check(item: Item, options: Options) -> None:
    """Raises a UserError if a flag is missing that a command of the item will need."""
    if item.needs_run and not options.run:
        raise UserError(f"{item.name} is made of a trained run: name its workdir as --run")
    judged = any(row.protocol for row in item.rows) or any("{files}" in c for c in item.commands)
    if judged and not (options.inception and options.reference):
        raise UserError(
            f"{item.name} has FIDs: give --inception and --reference (docs/evaluation.md says "
            "where to get them)"
        )


def workdir(row: Row, options: Options) -> Path:
    """The folder of a row's run. Items that train the same config share it.

    Configs that differ in size only are the same when they are shrunk, and are trained once.
    """
    if not row.config:
        return Path(options.run)
    return options.runs / (tiny_name if options.tiny else full_name)(row.config)


def full_name(spec: str) -> str:
    """The name of a config with its arguments."""
    return configs.load(spec).name


@functools.cache
def tiny_name(spec: str) -> str:
    """A name for a config that has been shrunk: the architecture, the router, and a digest."""
    config = configs.load(spec)
    small = configs.load(spec, shrink(config)).to_dict() | {"name": ""}
    digest = hashlib.sha1(json.dumps(small, sort_keys=True, default=str).encode()).hexdigest()
    return f"tiny_{config.model.architecture}_{config.model.router.name}_{digest[:8]}"


def training(item: Item, options: Options) -> list[Step]:
    """The steps that train what the rows need, every run once."""
    steps = {}
    for row in item.rows:
        if row.config and not item.counts:
            smaller = shrink(configs.load(row.config)) if options.tiny else ()
            argv = ("train", "--config", row.config, "--workdir", str(workdir(row, options)))
            steps.setdefault(argv[-1], Step((*argv, *smaller, *options.overrides), row))
    return list(steps.values())


def judging(item: Item, options: Options) -> list[Step]:
    """The steps that evaluate the rows, and all the other commands."""
    steps = []
    for row in item.rows:
        if row.protocol:
            argv = ("evaluate", "--workdir", str(workdir(row, options)))
            argv += ("--protocol", row.protocol, *files(options, row.protocol))
            argv += tuple(f"--config.{change}" for change in row.changes) + options.overrides
            steps.append(Step(argv, row))
        if row.prompts:
            argv = ("evaluate", "--workdir", str(workdir(row, options)), "--prompts", row.prompts)
            steps.append(Step((*argv, *options.overrides), row))
    for text in item.commands:
        words, known = [], protocol_of(text)
        for word in shlex.split(text):
            plain = word.format(run=options.run, out=options.out, files="", prompts="")
            asked = ["--prompts", options.prompts] if options.prompts else []
            given = {"{files}": files(options, known), "{prompts}": asked}
            words += given.get(word, [plain])
        steps.append(Step((*words, *options.overrides)))
    if options.tiny:
        steps = [dataclasses.replace(step, argv=quick(step.argv)) for step in steps]
    return steps


def files(options: Options, name: str = "") -> tuple[str, ...]:
    """The flags --vae, --inception and --reference, as far as the user gave them."""
    flags = []
    if options.vaes and name and (vae := protocol.load(name).autoencoder):
        flags += ["--vae", str(Path(options.vaes) / vae)]
    for flag in ("inception", "reference"):
        if value := getattr(options, flag):
            flags += [f"--{flag}", value]
    return tuple(flags)


def protocol_of(text: str) -> str:
    """The protocol that a command line names, or ""."""
    words: Sequence[str] = shlex.split(text)
    return words[words.index("--protocol") + 1] if "--protocol" in words else ""
