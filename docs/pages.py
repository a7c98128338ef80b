"""Pages of docs/ with a part that a program writes, between two marks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moe_diffusion.cli import Parser
from moe_diffusion.errors import UserError
from moe_diffusion.writing import save_text

END = "<!-- end -->"


def renewed(text: str, begin: str, content: str) -> str:
    """The text of a page with what stands between the line `begin` and END replaced."""
    before, mark, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise UserError(f"the page has no place for the table: a line {begin} and a line {END}")
    return f"{before}{begin}\n\n{content}\n\n{END}{after}"


def main(
    name: str, doc: str, begin: str, make: Callable[[], str], argv: Sequence[str] | None
) -> None:
    """The command line of a program that writes a part of a page, which `make` returns."""
    parser = Parser(name, doc)
    parser.prog = f"python -m docs.{name}"
    parser.add_argument("--write", metavar="PAGE", help="renew the table in this page")
    args = parser.parse_args(argv)
    if not args.write:
        print(make())
        return
    page = Path(args.write)
    if not page.is_file():
        raise UserError(f"{page} is not there: name the page that holds the table")
    save_text(renewed(page.read_text(), begin, make()), page)
