"""The records of a paper's tables and figures, and where they are listed.

A paper is a file `configs/papers/<paper>.py` with `PAPER`, its name and arXiv number, and a list of
`Item`, `ITEMS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_diffusion import shipped
from moe_diffusion.errors import UserError

CURVES = ("loss", "fid")


@dataclass(frozen=True)
class Row:
    """A line of a table.

    label: the model, as the paper calls it.
    config: what is trained for it, like "configs/dit_l.py:setting=diffmoe_table3"; "" stands for
      a run that the user has.
    protocol: how it is judged, for `evaluate --protocol`; "" = not at all.
    prompts: what it draws and how that is scored, for `evaluate --prompts`; "" = none.
    changes: keys of the run's config that sampling changes, like "model.router.threshold=off".
    group: rows of one name, which differ in their seed, also get a line and a curve together.
    published: the paper's numbers. "fid@1.5" is the FID under guidance 1.5.
    """

    label: str
    config: str = ""
    protocol: str = ""
    changes: tuple[str, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)
    prompts: str = ""
    group: str = ""


@dataclass(frozen=True)
class Item:
    """A table or a figure.

    name: of the command, like "diffmoe_table3"; its first part is the paper's.
    title: the number in the paper, and what it shows.
    rows: the lines of a table.
    curves: pictures over the steps of training, of CURVES, with a curve for each row.
    commands: command lines that make the item of a run, without "python -m moe_diffusion.".
      {run}, {out}, {files} and {prompts} stand for the run, the folder of results, the flags --vae,
      --inception and --reference, and the flag --prompts if the user gave it.
    model: config of the paper's run, where the user must name one.
    counts: the table counts the parameters of the rows' configs; nothing is trained. They are
      counted in this unit, "10^6" or "2^20", as the paper's. Where a row has "tflops" of the paper,
      the FLOPs of an image in 10^12 are counted, too.
    bars: with `counts`: draws the activated parameters by kind of module.
    note: what a reader must know, like what the paper leaves open.
    missing: what the library lacks for it; then there is no command.
    """

    name: str
    title: str
    rows: tuple[Row, ...] = ()
    curves: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    model: str = ""
    counts: str = ""
    bars: bool = False
    note: str = ""
    missing: str = ""

    @property
    def needs_run(self) -> bool:
        """Whether the user must name a trained run."""
        return bool(self.commands) or any(not row.config for row in self.rows)


def papers() -> dict[str, list[Item]]:
    """Title of every paper, the oldest first -> its tables and figures, in the paper's order."""
    found = {}
    for module in map(shipped.run_file, shipped.papers()):
        found[module.PAPER] = module.ITEMS
    return dict(sorted(found.items(), key=lambda paper: paper[0].partition("arXiv ")[2]))


def find(name: str) -> Item:
    """The item of a name.

    Raises:
      UserError: there is none (the likeliest are named), or the library cannot make it yet.
    """
    known = {item.name: item for items in papers().values() for item in items}
    if name not in known:
        likely = difflib.get_close_matches(name, known, n=3, cutoff=0) or sorted(known)
        raise UserError(
            f"no table or figure {name!r}; did you mean {', '.join(likely)}? --list shows all"
        )
    if known[name].missing:
        raise UserError(f"{name} cannot be made yet: {known[name].missing}")
    return known[name]
