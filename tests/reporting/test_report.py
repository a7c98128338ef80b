"""`python -m moe_diffusion.report`: what a page says of runs, and of what they lack."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion import report
from moe_diffusion.reporting import charts, maps, pictures, runs, tables
from moe_diffusion.reporting.page import page
from tests import cli

SMALL = ("model.depth=1", "model.moe.interleave=false", "model.hidden_size=16", "model.num_heads=2")
SMALL += ("model.patch_size=4", "model.moe.num_experts=4", "model.moe.hidden_size=16")


def write_run(folder, steps=5, **changes):
    """What a training leaves, but for checkpoints."""
    folder.mkdir(parents=True)
    config = configs.load("digits", [*SMALL, *(f"{k}={v}" for k, v in changes.items())])
    configs.save_json(config, folder / "config.json")
    lines = [
        {"step": n, "loss": 1 / n, "load_max": 1.5, "machine/mfu": None, "images_per_sec": 5.0 * n}
        for n in range(1, steps + 1)
    ]
    lines.append({"step": steps, "eval/fd": 3.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples").mkdir()
    for step in (2, 4):
        Image.new("L", (9, 7), 50 * step).save(folder / "samples" / f"{step:08d}.png")
    return folder


def data_of(text):
    """The JSON that a page's script reads."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_a_page_of_two_runs(tmp_path, capsys):
    a = write_run(tmp_path / "a", seed=1)
    b = write_run(tmp_path / "b", steps=3, seed=2, name="<b>&")
    result = {"step": 3, "ema": "0.9", "cfg": 2.0, "num_samples": 10, "metrics": {"fid": 12.345678}}
    (b / "evaluations.jsonl").write_text(json.dumps(result) + "\n")
    out = tmp_path / "new" / "page.html"
    report.main(
        ["--workdir", str(a), "--workdir", str(b), "--no-maps", "--out", str(out), "--json"]
    )
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    text = out.read_text()
    assert said == {"out": str(out), "bytes": len(text.encode()), "runs": ["a", "b"]}
    assert said["bytes"] < 200_000
    found = data_of(text)
    loss = next(chart for chart in found["charts"] if chart["title"] == "loss")
    assert [s["y"] for s in loss["series"]] == [[1, 0.5, 0.33333, 0.25, 0.2], [1, 0.5, 0.33333]]
    assert [grid["steps"] for grid in found["grids"]] == [[2, 4], [2, 4]]
    titles = [chart["title"] for chart in found["charts"]]
    assert "fd" in titles and not any("MFU" in title for title in titles)  # it has no value
    # The row of the seed is marked, that of the width is not; names are no HTML.
    row = next(line for line in text.split("<tr") if '"row">seed<' in line)
    assert row.startswith(' class="differs changed"') and "<td>1</td><td>2</td><td>0</td>" in row
    row = next(line for line in text.split("<tr") if '"row">model.hidden_size<' in line)
    assert row.startswith(' class="changed"')
    assert "&lt;b&gt;&amp;" in text and "<b>&" not in text
    assert "<td>12.346</td>" in text and "(--no-maps)" in text


def test_a_page_asks_for_nothing(tmp_path):
    """No address of the network stands in it but the names of XML and of links inside."""
    run = write_run(tmp_path / "a")
    text = page(runs.open_runs([str(run)]), maps=False)
    assert set(re.findall(r"\w+://[\w./]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"""(src|href)=["'](?!#|data:)|@import|url\(""", text)
    assert "default-src 'none'" in text


def test_text_cannot_leave_the_script(tmp_path):
    run = write_run(tmp_path / "a")
    text = page(runs.open_runs([str(run)], ["</script><i>"]), maps=False)
    assert "</script><i>" not in text
    assert data_of(text)["runs"] == ["</script><i>"]


def test_parameters_are_those_of_the_accounting(tmp_path):
    (run,) = runs.open_runs([str(write_run(tmp_path / "a"))])
    counts, flops = tables.counts_of(run)
    row = next(r for r in tables.parameters_table([run]).split("<tr") if '"row">total<' in r)
    cells = re.findall(r"<td>(.*?)</td>", row)
    total = counts["total"]
    assert cells[:2] == [f"{total.total / 1e6:,.3f}", f"{total.activated / 1e6:,.3f}"]
    assert float(cells[2]) == pytest.approx(flops["total"] / 1e9, rel=1e-3)


def test_stages_of_a_distillation_are_runs(tmp_path):
    folder = tmp_path / "moe"
    for stage in ("groups2", "experts", "shared", "groups1"):
        write_run(folder / stage)
    (folder / "student").mkdir()
    (folder / "config.json").write_text("{}")
    found = runs.open_runs([str(folder)])
    names = ("shared", "experts", "groups1", "groups2")
    assert [run.label for run in found] == [f"moe/{name}" for name in names]


def test_what_is_damaged_is_said(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[1:1] = ["{oops", '{"loss": 1}', "[" * 9999]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "lo')
    (folder / "config.json").write_text("[]")
    (folder / "samples" / "00000002.png").write_bytes(b"no picture")
    (run,) = found = runs.open_runs([str(folder)])
    text = page(found, maps=True)
    assert run.columns["loss"] == pytest.approx({n: 1 / n for n in range(1, 6)})
    assert data_of(text)["grids"][0]["steps"] == [4]
    config, *others = run.notes
    assert config.startswith("config.json: ") and "not a table" in config
    assert others == [
        "metrics.jsonl: 2 damaged lines are left out, the first is line 2: '{oops'",
        "metrics.jsonl: 1 lines without a step are left out",
        others[2],
    ]
    assert others[2].startswith("00000002.png of samples/ is left out (cannot identify")
    for note in ("2 damaged lines are left out", "No maps: it has no checkpoint"):
        assert note in text


def test_what_cannot_be_reported(tmp_path, capfd):
    run = write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    out = ["--no-maps", "--out", tmp_path / "x.html"]
    for args, message in (
        (["--workdir", tmp_path / "empty", *out], "holds no run (no metrics.jsonl and no checkpoi"),
        (["--workdir", tmp_path / "none", *out], "none holds no run"),
        (["--workdir", run, "--workdir", f"{run}/", *out], "--workdir names a folder twice"),
        (["--workdir", run, *out, "--labels", "a,b"], "1 workdirs need as many different --labels"),
        (["--workdir", run, "--out", tmp_path / "x.png"], "x.png will be a .html file"),
        (["--workdir", run, "--out", run / "config.html"], "is there and is no .html file"),
    ):
        (run / "config.html").write_text("{}")
        assert message in cli.refused(capfd, report.main, args)
    assert not (tmp_path / "x.html").exists()


def test_long_curves_are_means():
    """By hand: 1,000 values of 1 to 1000 in threes; the last point is the last value alone."""
    steps, values, span = charts.thinned({n: float(n) for n in range(1, 1001)})
    assert (span, len(steps), steps[0], steps[-1]) == (3, 334, 3, 1000)
    assert values[0] == 2 and values[-1] == 1000


def test_pictures_fit_their_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (900, 1500, 3), np.uint8)
    uri = pictures.data_uri(Image.fromarray(noise), 40_000)
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 40_000 * 4 / 3 + 40
    assert pictures.data_uri(Image.new("L", (4, 4)), 40_000).startswith("data:image/png;base64,")


def stats_of(images, layers, times, side):
    strongest = np.arange(images * layers * times * side * side) % 5 - 1
    shape = images, layers, times, side, side
    when = np.linspace(0, 1, times).tolist()
    share = np.full((layers, times, 4), 0.25)
    share[:, :, 0] = 0.5
    return {
        "blocks": list(range(layers)),
        "num_experts": 4,
        "times": when,
        "share_by_time": share.tolist(),
        "tokens": {
            "blocks": list(range(layers)),
            "times": when,
            "strongest": strongest.reshape(shape).tolist(),
            "used": np.ones(shape, int).tolist(),
        },
    }


def test_maps_by_hand():
    """A byte a token, one more than the expert's number; loads are shares times 4 experts."""
    found = maps.told_of(stats_of(1, 1, 2, 2))
    assert found["strongest"] == pictures.bytes_of(np.array([0, 1, 2, 3, 4, 0, 1, 2]))
    assert (found["used"], found["rows"], found["times"]) == (None, 2, [0, 1])
    assert found["load"] == [[[2, 1, 1, 1]] * 2]
    found = maps.told_of(stats_of(1, 1, 2, 2), backwards=True)
    assert found["strongest"] == pictures.bytes_of(np.array([4, 0, 1, 2, 0, 1, 2, 3]))
    assert found["times"] == [1, 0]


def test_large_maps_keep_their_ends(monkeypatch):
    monkeypatch.setattr(maps, "_MOST", 600)
    found = maps.told_of(stats_of(4, 9, 10, 2))
    assert len(found["strongest"]) <= 4 * 600 / 3 + 4
    assert (found["layers"][0], found["layers"][-1]) == ("0", "8")
    assert (found["times"][0], found["times"][-1]) == (0, 1)
