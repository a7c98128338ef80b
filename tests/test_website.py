"""docs/website.py: links and pages; and the whole site, strictly, with its own links checked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from docs import website
from tests import cli


@pytest.mark.parametrize(
    ("source", "place", "link", "moved"),
    [
        ("README.md", "index.md", "docs/data.md#x", "data.md#x"),
        ("README.md", "index.md", "docs/digits.png", "digits.png"),
        ("README.md", "index.md", "configs", f"{website.REPOSITORY}/tree/main/configs"),
        ("docs/plan.md", "plan.md", "data.md", "data.md"),
        ("docs/plan.md", "plan.md", "../README.md", "index.md"),
        ("docs/benchmarks/README.md", "benchmarks/README.md", "../plan.md", "../plan.md"),
        ("docs/plan.md", "plan.md", "#what", "#what"),
        ("docs/plan.md", "plan.md", "https://a.b/c.md", "https://a.b/c.md"),
        (
            *("docs/routers.md", "routers.md", "../moe_diffusion/cli.py"),
            f"{website.REPOSITORY}/blob/main/moe_diffusion/cli.py",
        ),
        ("README.md", "index.md", "notebooks/05_plan.ipynb", "notebooks/05_plan.md"),
        ("notebooks/05_plan.py", "notebooks/05_plan.md", "../docs/plan.md", "../plan.md"),
    ],
)
def test_links_hold_where_a_page_is_shown(source, place, link, moved):
    text = website.moved(f"see [a `b` c]({link}), `[x](y)`", source, place)
    assert text == f"see [a `b` c]({moved}), `[x](y)`"


def test_a_link_that_leads_nowhere_is_an_error():
    with pytest.raises(ValueError, match="README.md: the link to docs/nothing.md leads nowhere"):
        website.moved("[x](docs/nothing.md)", "README.md", "index.md")


def test_every_link_of_the_pages_leads_somewhere():
    """Without the site, so that it is told at once; anchors are checked with it."""
    pages = [cli.ROOT / "README.md", cli.ROOT / "CONTRIBUTING.md"]
    for page in [*pages, *(cli.ROOT / "docs").rglob("*.md")]:
        source = page.relative_to(cli.ROOT).as_posix()
        website.moved(page.read_text(), source, source.removeprefix("docs/"))


def test_the_reference_has_every_room():
    """Every package of the library is shown, but for those that commands and tests alone use."""
    folders = {path.parent.name for path in (cli.ROOT / "moe_diffusion").glob("*/__init__.py")}
    shown = {name for _, names in website.REFERENCE.values() for name in names}
    inner = {"benchmarks", "figures", "kernels", "reproduction", "reporting", "config"}
    assert folders - shown == inner
    nav = str(yaml.safe_load((cli.ROOT / "mkdocs.yml").read_text())["nav"])
    assert all(f"api/{name}.md" in nav for name in website.REFERENCE)


class Links(HTMLParser):
    """Links, and names that links may lead to, of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links += [found[key] for key in ("href", "src") if found.get(key)]


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    """A warning of mkdocs is an error. Then every link inside is followed, anchors too."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=cli.ROOT, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    pages = {page: Links(page.read_text()) for page in site.rglob("*.html")}
    names = {page.relative_to(site).as_posix() for page in pages}
    assert {"index.html", "notebooks/02_routers/index.html", "api/moe/index.html"} <= names
    dead = []
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or page.name == "404.html":
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            gone = not target.exists()
            if not gone and parts.fragment and target in pages:
                gone = unquote(parts.fragment) not in pages[target].names | {"__top"}
            if gone:
                dead.append(f"{page.relative_to(site)}: {link}")
    assert dead == []
    text = (site / "api" / "index.html").read_text()
    assert "sampling/#moe_diffusion.sampling.pipeline.load" in text
    assert "Loads a run, what <code>convert</code> wrote" in text
    assert re.search(r"by_token", (site / "api" / "moe" / "index.html").read_text())
