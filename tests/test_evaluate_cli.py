"""`python -m moe_diffusion.evaluate`: what it measures, says and keeps, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from moe_diffusion import evaluate, train
from moe_diffusion.data.sources import Digits
from moe_diffusion.evaluation import compare, evaluator, inception, metrics
from tests import cli
from tests.full_disk import full_disk
from tests.golden.inception import recipe, shrink

PROTOCOL = """
from moe_diffusion.evaluation import protocol as protocols
def get_protocol(arg):
    protocol = protocols.default()
    protocol.source, protocol.num_samples, protocol.labels = "a paper", 32, "random"
    protocol.sampling, protocol.cfg = {"sampler": "euler", "steps": 2}, (1.0, 1.5)
    protocol.model = {"dtype": "float32", "router": {"max_capacity": 0.0}}
    protocol.score = "adm"
    return protocol
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    train.main([*cli.digits(sampling__steps=2), "--workdir", str(workdir)])
    return workdir


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(recipe(inception.tensor_shapes(), seed=0), path)
    return path


@pytest.fixture
def small_inception(monkeypatch):
    shrink(monkeypatch)


def measure(capsys, *args):
    """What --json prints, and the lines before it."""
    evaluate.main([*map(str, args), "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), lines


def pictures(seed, count=12, side=16):
    """Smooth ones, brighter with the seed."""
    rng = np.random.default_rng(seed)
    rows = rng.random((count, 1, side, 3)) * rng.random((count, side, 1, 3))
    return np.uint8(155 * rows + 40 * seed)


def test_a_run_on_digits_needs_nothing_else(trained, capsys):
    result, lines = measure(capsys, "--workdir", trained, "--num", 64)
    found = result["metrics"]
    assert list(found) == [
        "fd_digits", "precision_digits", "recall_digits", "kd_digits", "fd_digits_heldout"
    ]  # fmt: skip
    assert found["fd_digits"] > 5 * found["fd_digits_heldout"] > 0
    expected = {
        "checkpoint": str(trained), "step": 3, "ema": "0.5", "num_samples": 64, "seed": 0,
        "labels": "balanced", "batch_size": 64, "sampler": "heun", "steps": 2, "cfg": 2.0,
        "cfg_interval": [0.0, 1.0], "autoencoder": None, "protocol": None,
        "reference": {"name": "digits", "count": 1437}, "warnings": [],
    }  # fmt: skip
    assert {key: result[key] for key in expected} == expected
    assert "fid" not in found
    made_with = {
        "dtype": "float32", "matmul": "float32", "devices": {"count": 8, "kind": "cpu"},
        "router": {"name": "token_choice", "group": "sample"},
        "training_data": {"augment": "none", "mirrored": "no"},
    }  # fmt: skip
    assert {key: result[key] for key in made_with} == made_with
    versions = ("moe_diffusion", "python", "jax", "jaxlib", "flax", "numpy")
    assert tuple(result["software"]) == versions
    assert lines[-1].startswith(f"fd_digits {found['fd_digits']:.5g}, precision_digits")
    for stated in (
        "ema 0.5", "sampler heun", "steps 2", "cfg 2", "seed 0", "num_samples 64", "dtype float32",
        "router name=token_choice group=sample", "training_data augment=none mirrored=no",
        "matmul float32", "devices count=8 kind=cpu", "software moe_diffusion=0.1.0",
    ):  # fmt: skip
        assert f"; {stated}" in lines[-1]
    kept = (trained / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(kept[-1]) == result


@pytest.mark.slow
def test_a_sweep_draws_a_curve(trained, tmp_path, capsys):
    flags = ["--cfg", "1.0,2.0", "--ema", "0.9,none", "--num", 64, "--plot", tmp_path / "a.png"]
    swept, lines = measure(capsys, "--workdir", trained, *flags)
    assert [(r["ema"], r["cfg"]) for r in swept["results"]] == [
        ("0.9", 1.0), ("0.9", 2.0), ("none", 1.0), ("none", 2.0)
    ]  # fmt: skip
    assert len({r["metrics"]["fd_digits"] for r in swept["results"]}) == 4
    assert swept["plot"] == str(tmp_path / "a.png") and lines[-1] == f"the curve: {tmp_path}/a.png"
    names, *rows, shared, _ = lines
    assert names.split()[:3] == ["ema", "cfg", "fd_digits"] and len(rows) == 4
    assert rows[1].split()[:2] == ["0.9", "2"]
    assert rows[1].split()[2] == f"{swept['results'][1]['metrics']['fd_digits']:.5g}"
    ends = [[match.end() for match in re.finditer(r"\S+", row)] for row in (names, *rows)]
    assert ends == [ends[0]] * 5  # columns stand below each other
    assert shared.startswith(f"all: checkpoint {trained}; ") and "; sampler heun; " in shared
    assert "cfg " not in shared.replace("cfg_interval", "")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "a.png")))) > 20
    alone, _ = measure(capsys, "--workdir", trained, "--cfg", 1, "--ema", "none", "--num", 64)
    assert alone == swept["results"][2]


def test_a_protocol_fixes_everything_and_tells_what_differs(trained, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(PROTOCOL)
    flags = ["--protocol", tmp_path / "mine.py", "--plot", tmp_path / "a.png"]
    swept, _ = measure(capsys, "--workdir", trained, *flags)
    first, second = swept["results"]
    assert (first["cfg"], second["cfg"]) == (1.0, 1.5)
    assert (first["sampler"], first["steps"], first["labels"]) == ("euler", 2, "random")
    assert first["num_samples"] == 32 and first["protocol"]["deviations"] == []
    assert first["protocol"]["source"] == "a paper"
    other, _ = measure(capsys, "--workdir", trained, *flags, "--cfg", 1, "--batch", 32)
    assert other["protocol"]["deviations"] == ["batch_size: 32 instead of 64"]
    assert other["metrics"]["fd_digits"] == pytest.approx(first["metrics"]["fd_digits"], rel=1e-3)
    narrow, lines = measure(
        capsys, "--workdir", trained, *flags, "--cfg", 1, "--config.model.dtype=bfloat16"
    )
    assert narrow["dtype"] == "bfloat16" and "; dtype bfloat16; " in lines[-1]
    assert narrow["protocol"]["deviations"] == ["model.dtype: bfloat16 instead of float32"]
    assert narrow["metrics"]["fd_digits"] != first["metrics"]["fd_digits"]


def test_a_sweep_leaves_a_picture_of_the_user_alone(trained, tmp_path, capsys, monkeypatch):
    """And ends well if its own picture or its record cannot be written."""
    workdir = shutil.copytree(trained, tmp_path / "run")
    Image.new("L", (3, 3)).save(workdir / "sweep.png")
    mine = (workdir / "sweep.png").read_bytes()
    results = [
        {"ema": "0.5", "cfg": cfg, "metrics": {"fid": 3.0}, "warnings": ["few images"],
         "config": "c", "step": 3, "num_samples": 4}
        for cfg in (1.0, 2.0)
    ]  # fmt: skip
    monkeypatch.setattr(evaluator, "evaluate", lambda request: iter(results))
    flags = ["--workdir", str(workdir), "--cfg", "1,2"]
    for _ in range(2):
        evaluate.main(flags)
        shown = capsys.readouterr()
        assert shown.out.endswith(f"the curve: {workdir}/sweep-2.png\n")
        assert shown.err == "warning: few images\n"  # once
    assert (workdir / "sweep.png").read_bytes() == mine
    before = cli.contents(workdir)
    with full_disk():
        evaluate.main([*flags, "--json"])
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["plot"] is None
    assert "warning: without the picture" in shown.err
    assert cli.contents(workdir) == before


def test_a_full_disk_costs_the_record_not_the_result(trained, tmp_path, capsys):
    workdir = shutil.copytree(trained, tmp_path / "run")
    (workdir / "evaluations.jsonl").write_text('{"metrics": {}}\n')
    flags = ["--num", 32, "--save-features", tmp_path / "f.npz", "--workdir", workdir]
    with full_disk(room=20), pytest.raises(SystemExit):
        evaluate.main(list(map(str, flags)))
    shown = capsys.readouterr()
    assert shown.out.startswith("fd_digits ")
    told = [line for line in shown.err.splitlines() if line.startswith(("warning: w", "error"))]
    assert len(told) == 2
    assert told[0].startswith("warning: without a line in evaluations.jsonl (cannot write ")
    assert told[1].startswith(f"error: cannot write {tmp_path}/f.npz (")
    assert (workdir / "evaluations.jsonl").read_text() == '{"metrics": {}}\n'
    assert not (tmp_path / "f.npz").exists()


@pytest.mark.slow
def test_images_features_and_statistics_agree(weights, tmp_path, capsys, small_inception):
    ours, theirs = pictures(0), pictures(1)
    np.savez(tmp_path / "ours.npz", arr_0=ours / np.float32(127.5) - 1)
    np.savez(tmp_path / "theirs.npz", arr_0=theirs)
    for i, pixels in enumerate(ours):
        (tmp_path / "folder").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "folder" / f"{i}.png")
    judge = ["--inception", weights, "--batch", 8, "--save-features", tmp_path / "features.npz"]
    against = ["--reference", tmp_path / "theirs.npz"]
    result, _ = measure(capsys, "--samples", tmp_path / "ours.npz", *against, *judge)
    found = result["metrics"]
    assert list(found) == ["fid", "sfid", "inception_score", "precision", "recall", "kid"]
    assert found["fid"] > 1 and result["num_samples"] == 12
    assert result["inception_score"] == {"score": "torch-fidelity", "parts": 10, "shuffle": 2020}
    assert "dtype" not in result and result["devices"]["count"] == 8
    assert result["features"]["layout"] == "torch-fidelity" and result["features"]["sha256"]
    assert [w.split(":")[1] for w in result["warnings"]] == [" 12 images for 64 features"] * 2

    folder, _ = measure(capsys, "--samples", tmp_path / "folder", *against, *judge[:4])
    assert folder["metrics"] == pytest.approx(found, rel=1e-4)

    # Features of both sides: the same numbers without a network, but for the classifier's.
    alone = ["--samples", tmp_path / "theirs.npz", "--save-features", tmp_path / "ref.npz"]
    made, _ = measure(capsys, *alone, *judge[:4])
    assert made["metrics"] == {}
    stored = ["--samples", tmp_path / "features.npz", "--reference", tmp_path / "ref.npz"]
    result, _ = measure(capsys, *stored)
    expected = {key: value for key, value in found.items() if key != "inception_score"}
    assert result["metrics"] == pytest.approx(expected, rel=1e-4)

    # ADM's reference batch: its own statistics, and images for precision and recall.
    shifted = np.load(tmp_path / "ref.npz")
    shifted = {key: shifted[key] for key in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "adm.npz", arr_0=theirs, **shifted | {"mu": shifted["mu"] + 1})
    adm = ["--samples", tmp_path / "features.npz", "--reference", tmp_path / "adm.npz"]
    result, _ = measure(capsys, *adm, *judge[:4])
    assert result["metrics"]["fid"] > found["fid"] + 10
    assert result["metrics"]["precision"] == pytest.approx(found["precision"])
    assert result["metrics"]["sfid"] == pytest.approx(found["sfid"], rel=1e-4)


def test_a_run_is_measured_with_inception(weights, trained, tmp_path, capsys, small_inception):
    np.savez(tmp_path / "real.npz", arr_0=Digits("test").images[:8])
    reference = tmp_path / "real.npz"
    flags = ["--inception", weights, "--reference", reference, "--num", 8, "--batch", 8]
    flags += ["--resize", "pytorch-fid", "--score", "adm"]
    result, _ = measure(capsys, "--workdir", trained, *flags)
    assert result["metrics"]["fid"] > 0 and result["features"]["resize"] == "pytorch-fid"
    assert result["inception_score"] == {"score": "adm", "split": 5000, "shuffle": None}
    assert "parts in class order" in result["warnings"][-1]
    assert result["reference"] == {"name": str(reference), "count": 8}


def test_images_of_digits_need_no_run(tmp_path, capsys):
    np.savez(tmp_path / "real.npz", arr_0=Digits("test").images)
    result, _ = measure(capsys, "--samples", tmp_path / "real.npz")
    found = result["metrics"]
    assert found["fd_digits"] == pytest.approx(found["fd_digits_heldout"])
    assert found["precision_digits"] > 0.8


def test_help_shows_how_to_measure(capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--help"])
    output = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "python -m moe_diffusion.evaluate --workdir runs/digits" in output
    assert "diffmoe_flow" in output


IMPOSSIBLE = [
    ([], "nothing to judge: give --workdir or --samples"),
    (["--workdir", "{}/none"], "{}/none is not a workdir"),
    (["--workdir", "{run}", "--ema", "0.5,0.7"], "keeps no average '0.7'; choose none | 0.5 | 0.9"),
    (["--workdir", "{run}", "--cfg", "1,high"], "--cfg '1,high' is not a list of numbers"),
    (["--workdir", "{run}", "--cfg=-1"], "sampling.cfg = -1.0 must be zero or positive"),
    (["--workdir", "{run}", "--num", "0"], "num_samples = 0 must be at least 1"),
    (["--workdir", "{run}", "--protocol", "nothing"], "no protocol 'nothing'; known are: diffmoe"),
    (["--workdir", "{run}", "--inception", "{}/no.pth"], "nothing to compare with: give --refer"),
    (
        ["--workdir", "{run}", "--inception", "{}/no.pth", "--reference", "digits"],
        "no weight file at {}/no.pth",
    ),
    (["--workdir", "{run}", "--save-features", "{}/a.npz/b.npz"], "cannot write to {}/a.npz"),
    (
        ["--samples", "{}/a.npz", "--reference", "{}/b.npz", "--save-features", "{}/b.npz"],
        "--save-features {}/b.npz is {}/b.npz, which is read: rename it",
    ),
    (
        ["--samples", "folder:{}", "--plot", "{}/sweep.png"],
        "--plot {}/sweep.png lies in {}, which is read: rename it",
    ),
    (["--samples", "{}/a.npz"], "nothing to compare with: give --reference"),
    (["--samples", "{}/a.npz", "--reference", "{}/none.npz"], "no .npz at {}/none.npz"),
    (["--samples", "{}/a.npz", "--reference", "{}/b.npz"], "a.npz are images: give the weights"),
    (["--samples", "{}/a.npz", "--num", "99"], "a.npz has 12 images, 99 are asked for"),
    (["--samples", "{}/a.npz", "--cfg", "1,2"], "a sweep over --cfg or --ema needs --workdir"),
    (
        ["--samples", "{}/a.npz", "--reference", "{}/b.npz", "--inception", "{weights}"],
        "the images to judge are 16x16, those of {}/b.npz 20x20: take the reference of the same",
    ),
    (
        ["--samples", "{}/a.npz", "--reference", "{}/mu.npz", "--inception", "{weights}"],
        "{}/mu.npz holds 7 pool features an image, the network makes 2048",
    ),
]


@pytest.mark.parametrize("args, message", IMPOSSIBLE, ids=[" ".join(a) for a, _ in IMPOSSIBLE])
def test_impossible_wishes_end_before_the_work(
    args, message, trained, weights, tmp_path, capfd, monkeypatch
):
    np.savez(tmp_path / "a.npz", arr_0=pictures(0))
    np.savez(tmp_path / "b.npz", arr_0=pictures(0, side=20))
    np.savez(tmp_path / "mu.npz", mu=np.zeros(7), sigma=np.eye(7))

    def work(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr(evaluator, "with_vectors", work)
    before = cli.contents(trained)
    texts = [text.replace("{run}", str(trained)).replace("{weights}", str(weights))
             .replace("{}", str(tmp_path)) for text in args]  # fmt: skip
    error = cli.refused(capfd, evaluate.main, texts)
    assert message.replace("{}", str(tmp_path)) in error
    assert cli.contents(trained) == before


def test_what_only_one_side_has_is_left_out():
    class Names:
        names = evaluator.StoredFeatures.names

    rows = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    gaussian = metrics.gaussian_of(rows)
    known = evaluator.FeatureSet("a", pool=gaussian, vectors=rows)
    statistics = evaluator.FeatureSet("b", pool=gaussian)
    found, warnings = compare.compare(known, statistics, Names)
    assert list(found) == ["fid"] and warnings == []
