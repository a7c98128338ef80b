"""Tables and figures of the papers: what is listed, what is run for it, and what comes out."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from docs import generate_reproduce, pages
from moe_diffusion import config as configs
from moe_diffusion import reproduce, shipped, train
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation import inception, protocol
from moe_diffusion.reproduction import tables
from moe_diffusion.reproduction.commands import Options, judging, training
from moe_diffusion.reproduction.items import Item, Row, find, papers
from moe_diffusion.reproduction.run import make
from moe_diffusion.reproduction.tiny import shrink
from tests import cli
from tests.golden.inception import recipe
from tests.golden.inception import shrink as shrink_inception

ITEMS = {item.name: item for items in papers().values() for item in items}
MADE = [name for name, item in ITEMS.items() if not item.missing]
PAGE = shipped.CHECKOUT / "docs" / "reproduce.md"


@functools.cache
def load(spec: str) -> None:
    """A config, as it is and shrunk."""
    configs.load(spec, shrink(configs.load(spec)))


def options(tmp_path: Path, **given) -> Options:
    return Options(out=tmp_path / "out", runs=tmp_path / "runs", **given)


def test_every_item_is_listed_once_and_says_how_it_is_made():
    assert len(ITEMS) == sum(len(items) for items in papers().values())
    assert [paper.split()[-1] for paper in papers()] == [
        "2503.14487)",
        "2510.09094)",
        "2512.01252)",
    ]
    for items in papers().values():
        for item in items:
            assert bool(item.missing) != bool(item.rows or item.commands), item.name
            assert bool(item.needs_run) == bool(item.model), item.name


@pytest.mark.parametrize("name", MADE)
def test_configs_and_protocols_exist(name):
    item = ITEMS[name]
    for row in item.rows:
        if row.config:
            load(row.config)
        if row.protocol:
            settings = protocol.load(row.protocol)
            for key in row.published:  # the guidance of the paper is the protocol's
                metric, _, cfg = key.partition("@")
                assert not cfg or float(cfg) in settings.cfg, (row.label, key)


@pytest.mark.slow
def test_the_page_is_not_stale():
    text = PAGE.read_text()
    renewed = pages.renewed(text, generate_reproduce.BEGIN, generate_reproduce.content())
    remedy = "run python -m docs.generate_reproduce --write docs/reproduce.md"
    assert renewed == text, remedy


def test_the_steps_of_a_table(tmp_path):
    """Each config is trained once, each row is judged, and what the user gave stands in both."""
    config = "configs/dit_s.py"
    rows = (
        Row("a", config, "dit"),
        Row("b", config, "dit", ("model.router.threshold=off",)),
        Row("c", "", "dsmoe"),
    )
    item = Item("x_table1", "Table 1", rows)
    given = options(
        tmp_path,
        run="runs/mine",
        vaes="vaes",
        inception="i.pth",
        reference="r.npz",
        overrides=("--config.seed=1",),
    )
    (train,) = training(item, given)
    workdir = f"{tmp_path}/runs/dit_s_ddpm"
    assert str(train) == (
        f"python -m moe_diffusion.train --config {config} --workdir {workdir} --config.seed=1"
    )
    files = "--vae vaes/{} --inception i.pth --reference r.npz"
    a, b, c = map(str, judging(item, given))
    start = "python -m moe_diffusion.evaluate --workdir"
    ema = files.format("sd-vae-ft-ema")
    assert a == f"{start} {workdir} --protocol dit {ema} --config.seed=1"
    change = "--config.model.router.threshold=off"
    assert b == f"{start} {workdir} --protocol dit {ema} {change} --config.seed=1"
    mse = files.format("sd-vae-ft-mse")
    assert c == f"{start} runs/mine --protocol dsmoe {mse} --config.seed=1"


def test_a_cell_has_our_number_and_the_papers(tmp_path):
    rows = (Row("one", "configs/dit_s.py", "dit", published={"fid@1.5": 2.5}),)
    item = Item("x_table1", "Table 1", rows, note="A note.")
    given = options(tmp_path)
    (step,) = judging(item, given)
    found = [
        {"cfg": cfg, "metrics": {"fid": fid}, "protocol": {"deviations": ["seed: 1 instead of 0"]}}
        for cfg, fid in ((1.0, 9.0), (1.5, 3.0))
    ]
    table = tables.compared(item, given, {str(step): found})
    assert table.splitlines()[:5] == [
        "# Table 1",
        "",
        "| model | FID, guidance 1.5 |",
        "| --- | ---: |",
        "| one | 3.00 (2.5) |",
    ]
    assert table.endswith("A note.\n\nNot as published: seed: 1 instead of 0.\n")


def test_counts_are_those_of_the_paper():
    """DiffMoE's Table 9 adds up attention, adaLN and the rest to 1981.7 for L-E16."""
    table = tables.counted(find("diffmoe_table9"))
    (row,) = [line for line in table.splitlines() if line.startswith("| DiffMoE-L-E16 ")]
    assert "1,981.70 (1981.7)" in row


def test_figure_2_of_dense2moe(tmp_path):
    """A table and a picture of bars, without any training; here of two models."""
    item = find("dense2moe_figure2")
    rows = tuple(row for row in item.rows if row.label in ("FLUX.1-MoE-M", "FLUX-Mini"))
    made = make(dataclasses.replace(item, rows=rows), options(tmp_path))
    assert [Path(file).name for file in made["files"]] == ["table.md", "parameters.png"]
    text = (tmp_path / "out" / "table.md").read_text()
    head, _, row, mini = [line.split(" | ") for line in text.splitlines() if line[:1] == "|"]
    cells = dict(zip(head, row, strict=True))
    assert cells["activated, 10^6"] == "4,269.23 (4010)" and cells["total"] == "9,007.87"
    assert cells["FLOPs an image, 10^12"] == "42.21 (35.7)"
    assert mini[1] == "3,179.20 (3180)"
    found = [v.strip(" |").replace(",", "") for k, v in cells.items() if "activated" in k]
    assert sum(map(float, found[1:])) == pytest.approx(4269.23, abs=0.05)
    assert np.std(np.asarray(Image.open(made["files"][1]))) > 1


def test_what_is_refused(tmp_path, capfd):
    refused = lambda *args: cli.refused(capfd, reproduce.main, args)  # noqa: E731
    assert "did you mean dsmoe_table5" in refused("dsmoe_tabel5")
    assert "cannot be made yet: trained weights" in refused("dense2moe_table2")
    assert "name its workdir as --run" in refused("diffmoe_figure6")
    assert "give --inception and --reference" in refused("dsmoe_table5")
    assert "name a table or figure" in refused()
    with pytest.raises(UserError, match="did you mean"):
        find("nothing")


def test_list_and_dry_run(capsys):
    reproduce.main(["--list"])
    assert len(capsys.readouterr().out.splitlines()) == len(ITEMS)
    reproduce.main(["dsmoe_figure5", "--dry_run", "--tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(
        line.startswith("python -m moe_diffusion.train --config ") for line in lines
    )


# --- all of them, small --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folder of the runs that the items share, weights of an Inception, and a reference."""
    folder = tmp_path_factory.mktemp("shared")
    save_file(recipe(inception.tensor_shapes(), seed=0), folder / "inception.safetensors")
    features = np.random.default_rng(0).standard_normal((80, 64), np.float32)
    spatial = {"mu_s": np.zeros(32), "sigma_s": np.eye(32)}
    np.savez(folder / "reference.npz", features=features, **spatial)
    return folder


def kind_of(item: Item) -> tuple:
    """What is run for an item, and what comes out."""
    commands = {command.split()[0] for command in item.commands}
    prompts = any(row.prompts for row in item.rows)
    protocol = any(row.protocol for row in item.rows)
    return frozenset(commands), item.curves, item.counts, item.bars, prompts, protocol


def first_of_each_kind() -> list:
    """All that are made; those of a kind that came before are marked exhaustive."""
    found, seen = [], set()
    for name in MADE:
        known = kind_of(ITEMS[name]) in seen
        found.append(pytest.param(name, marks=pytest.mark.exhaustive if known else ()))
        seen.add(kind_of(ITEMS[name]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", first_of_each_kind())
def test_every_command_runs(name, shared, tmp_path, monkeypatch, capsys):
    shrink_inception(monkeypatch)
    item = ITEMS[name]
    args = [name, "--tiny", "--runs", str(shared / "runs"), "--out", str(tmp_path), "--json"]
    args += ["--inception", str(shared / "inception.safetensors")]
    args += ["--reference", str(shared / "reference.npz")]
    if item.needs_run:
        given = options(shared, tiny=True)
        (step,) = training(Item("x", "", (Row("x", item.model),)), given)
        folder = shared / "runs" / Path(step.argv[step.argv.index("--workdir") + 1]).name
        if not folder.exists():
            train.main(list(step.argv[1:]))
        args += ["--run", str(folder)]
    reproduce.main(args)
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["name"] == name
    expected = {f"{curve}.png" for curve in item.curves}
    if item.bars:
        expected.add("parameters.png")
    if any(row.protocol or row.prompts for row in item.rows) or item.counts:
        expected.add("table.md")
    assert {Path(file).name for file in made["files"]} == expected
    assert item.commands or expected
    for picture in tmp_path.rglob("*.png"):
        assert np.std(np.asarray(Image.open(picture))) > 1
    if "table.md" in expected and not item.counts:
        table = (tmp_path / "table.md").read_text()
        for row in item.rows:
            (line,) = [line for line in table.splitlines() if line.startswith(f"| {row.label} |")]
            assert "| - " not in line, line
