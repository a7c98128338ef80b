"""`python -m moe_diffusion.thresholds` and `.routing`, and `sample --stats`, on a DiffMoE run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from moe_diffusion import routing, sample, thresholds, train
from tests import cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    keys = {"sampling__steps": 1, "sampling__sampler": "euler", "sampling__joint": "true"}
    _, spec, *overrides = cli.digits("diffmoe", train__num_steps=2, **keys)
    train.run(spec, str(workdir), overrides)
    return workdir


def test_search(trained, tmp_path, capsys):
    out = tmp_path / "new" / "curves.png"
    args = ["--workdir", trained, "--gammas", "0.2,0.99", "--num", 4, "--out", out, "--json"]
    thresholds.main(list(map(str, args)))
    lines = capsys.readouterr().out.splitlines()
    head = lines[0].split()
    assert head[:2] == ["threshold", "c_infer_avg"] and "fd_digits" in head
    table = [dict(zip(head, line.split(), strict=True)) for line in lines[1:4]]
    result = json.loads(lines[-1])
    assert [row["threshold"] for row in table] == ["dynamic", "0.2", "0.99"]
    assert [row["threshold"] for row in result["rows"]] == ["dynamic", 0.2, 0.99]
    for shown, row in zip(table, result["rows"], strict=True):
        assert float(shown["c_infer_avg"]) == pytest.approx(row["c_infer_avg"], abs=1e-4)
        assert float(shown["fd_digits"]) == pytest.approx(row["metrics"]["fd_digits"], abs=1e-4)
    many, few = (row["c_infer_avg"] for row in result["rows"][1:])
    assert many > 2 > few and result["target"] == 2  # capacity of configs/digits.py:router=diffmoe
    assert result["nearest"] == (0.2 if many - 2 < 2 - few else 0.99)
    assert len(np.unique(np.asarray(Image.open(out)).reshape(-1, 3), axis=0)) > 20
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]
    experts = 4 * (16 * 16 + 16 + 16 * 16 + 16)  # four MLPs with biases in the one layer
    names = ("activated_params", "gflops")
    params, gflops = ([row[name] for row in result["rows"][1:]] for name in names)
    assert params[0] - params[1] == pytest.approx(experts * (many - few) / 4, abs=1)
    assert gflops[0] > gflops[1]
    routers = [row["result"]["router"] for row in result["rows"]]
    assert [router["threshold"] for router in routers] == ["dynamic", 0.2, 0.99]
    assert routers[0]["max_capacity"] == 4 and result["rows"][0]["result"]["software"]["jax"]


def test_sampling_writes_statistics(trained, tmp_path, capsys):
    out, stats = tmp_path / "grid.png", tmp_path / "stats.json"
    args = ["--workdir", trained, "--labels", "3,7", "--num", 4, "--out", out, "--stats", stats]
    sample.main(list(map(str, args)))
    found = json.loads(stats.read_text())
    assert set(found["per_class"]) == {"3", "7", "null"} and found["times"] == [0]
    assert found["blocks"] == [0] and found["c_infer_avg"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grid.png",
        "stats.json",
        "stats.png",
    ]
    assert f"experts per token: {found['c_infer_avg']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"--gammas": "low"}, "--gammas 'low'"),
        ({"--gammas": "0.5,1"}, "--gammas: 1 "),
        ({"--num": 0}, "num_samples = 0"),
        ({"--workdir": "nowhere"}, "nowhere is not a workdir"),
    ],
)
def test_refusals(changes, named, tmp_path, capfd):
    args = {"--workdir": tmp_path, "--gammas": "0.5", "--out": tmp_path / "a" / "b.png"} | changes
    message = cli.refused(capfd, thresholds.main, [part for pair in args.items() for part in pair])
    assert message.startswith(named)
    assert not list(tmp_path.iterdir())


# --- routing -------------------------------------------------------------------------------------


def show_routing(capsys, *args):
    """Lines printed, and the JSON object after them."""
    routing.main([*map(str, args), "--json"])
    lines = capsys.readouterr().out.splitlines()
    return lines[:-1], json.loads(lines[-1])


def test_a_folder_on_the_use_of_experts(trained, tmp_path, capsys):
    """Ten images in batches of four: the last batch has two, and their repetitions do not count."""
    out, threshold = tmp_path / "new" / "routing", "--config.model.router.threshold=0.5"
    args = ("--num", 10, "--batch", 4, "--cfg", 1, "--steps", 2, "--out", out, threshold)
    lines, result = show_routing(capsys, "--workdir", trained, *args)
    assert list(result["not_written"]) == ["groups.png"] and len(result["files"]) == 10
    assert sorted(path.name for path in out.iterdir()) == sorted(result["files"])
    assert {str(out / name) for name in result["files"]} <= set(lines)
    stats = json.loads((out / "routing.json").read_text())
    assert stats["evaluations"] == 10 * 2 and stats["times"] == [0, 0.5]
    assert set(stats["per_class"]) == set(map(str, range(10))) and "conditional" not in stats
    assert np.shape(stats["tokens"]["used"]) == (4, 1, 2, 2, 2)
    np.testing.assert_allclose(np.sum(stats["selection"], -1), stats["per_layer"], rtol=1e-4)
    assert f"experts per token: {result['c_infer_avg']:.4f}" in lines


def test_classes_that_use_all_experts_are_equally_hard(trained, tmp_path, capsys):
    keys = ("model.router.threshold=0", "model.router.max_capacity=0")
    args = ("--labels", "3,7", "--num", 4, "--out", tmp_path, *(f"--config.{k}" for k in keys))
    lines, result = show_routing(capsys, "--workdir", trained, *args)
    reason = "all classes use 4 experts per token"
    alike = dict.fromkeys(("hardest.png", "easiest.png"), reason)
    assert result["not_written"] == alike | {"groups.png": "the model has no groups of blocks"}
    assert f"hardest.png: not written, {reason}" in lines
    stats = json.loads((tmp_path / "routing.json").read_text())
    assert stats["per_class"] == {"3": 4, "7": 4, "null": 4}
    assert stats["conditional"]["evaluations"] == stats["unconditional"]["evaluations"] == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"--num": 0}, "--num"),
        ({"--blocks": "99"}, "--blocks: block 99 has no experts"),
        ({"--labels": "10"}, "--labels: 10 is no class"),
        ({"--out": __file__}, f"--out {__file__} is a file"),
    ],
)
def test_routing_refuses(changes, named, trained, tmp_path, capfd):
    args = {"--workdir": trained, "--out": tmp_path / "routing"} | changes
    message = cli.refused(capfd, routing.main, [part for pair in args.items() for part in pair])
    assert message.startswith(named)
    assert not list(tmp_path.iterdir())
