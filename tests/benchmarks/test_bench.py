"""The benchmark commands measure what they say, on shapes too small to be of interest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from moe_diffusion import bench, tune
from moe_diffusion.benchmarks import dispatch, report, saving, sparsity, tiles
from moe_diffusion.benchmarks.dispatch import bench_dispatch, parse_shape
from moe_diffusion.errors import UserError
from tests import cli
from tests.compiler import COMPILER


def test_dispatch_ends_with_one_line_of_json(capsys, tmp_path):
    args = ["dispatch", "--shape", "16,16,4,2", "--tokens", "64", "--repeats", "1", "--compare"]
    (tmp_path / "out.json").write_text("{}")  # of an earlier run
    bench.main([*args, "--json", "--out", str(tmp_path / "out.json")])
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert (
        result["backend"] == ("cpu" if COMPILER else "blocked") and result["shape"] == "16,16,4,2"
    )
    for name in ("rho_fwd", "rho_fwd_bwd", "rho_fwd_bwd_ragged_dot", "peak_bytes", "gemm_gflops"):
        assert result[name] > 0 and name in output
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["environment"]["jax"] == jax.__version__
    assert kept["results"][0]["rho_fwd"] == result["rho_fwd"]


def test_what_fails_does_not_take_the_rest_with_it(tmp_path, monkeypatch, capfd):
    def measure(shape, **_):
        if shape[1] == 768:
            raise RuntimeError("no such kernel\nat line 1")
        return {"shape": str(shape), "seconds_fwd_bwd": 1.0}

    def gone(*_):
        raise AssertionError("no CUDA")

    monkeypatch.setattr(report, "bench_dispatch", measure)
    monkeypatch.setattr(report, "torch_seconds", gone)
    for name in ("bench_train", "bench_sample"):
        monkeypatch.setattr(report, name, lambda spec, **_: {"config": spec})
    error = cli.refused(capfd, bench.main, ["suite", "--out", str(tmp_path / "out.json")])
    kept = json.loads((tmp_path / "out.json").read_text())["results"]
    shapes = ["dispatch"] * 6
    assert [result["what"] for result in kept] == [*shapes, "train", "sample", *shapes]
    # One shape fails with both routings; beside the other five, with one, PyTorch.
    assert [result["error"] for result in kept if "error" in result] == ["no such kernel"] * 2
    beside = [result for result in kept if "failed_torch" in result]
    assert [result["failed_torch"] for result in beside] == ["no CUDA"] * 5
    assert all(result["seconds_fwd_bwd"] == 1 for result in beside)
    assert "2 of 14 measurements failed" in error


def test_nothing_starts_when_the_time_is_over(monkeypatch, capsys):
    monkeypatch.setattr(report, "bench_dispatch", lambda shape, **_: {"seconds_fwd_bwd": 1.0})
    monkeypatch.setattr(report, "torch_seconds", lambda *_: {"torch_loop": 3.0})
    bench.main(["suite", "--minutes", "0", "--json"])
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1])["times_torch_loop"] == 3
    assert "--minutes 0 are over" in output


@pytest.mark.slow
def test_saving_beside_the_steps_between(capsys, monkeypatch):
    monkeypatch.setattr(saving, "SAVES", 1)
    small = ["depth=2", "hidden_size=16", "num_heads=2", "mlp_ratio=1.0"]
    args = ["--config", "configs/digits.py", "--config.data.batch_size=8", "--json"]
    bench.main(["saving", *args, *(f"--config.model.{key}" for key in small)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < result["ratio"] <= result["most"] and result["gigabytes"] > 0
    assert 0 < result["steps_saving"] < 24


def test_rivals_that_fail_are_named(monkeypatch):
    def broken(x, chosen, stacked):
        raise NotImplementedError("not on this device")

    monkeypatch.setattr(dispatch, "rivals", lambda: {"theirs": broken})
    result = bench_dispatch((16, 16, 4, 2), tokens=64, repeats=1, compare=True)
    assert result["failed_theirs"] == "not on this device" and result["rho_fwd_bwd"] > 0


@pytest.mark.slow
def test_zipf_prefers_the_first_experts():
    options = {"tokens": 256, "repeats": 1}
    even, uneven = (
        bench_dispatch((16, 16, 8, 2), routing=routing, **options)
        for routing in ("uniform", "zipf")
    )
    assert even["load_max"] < 2 < uneven["load_max"]


@pytest.mark.parametrize("what", ["train", pytest.param("sample", marks=pytest.mark.slow)])
def test_steps_of_a_config(what, capsys):
    args = [what, "--config", "configs/digits.py", "--repeats", "1", "--json"]
    changes = ["data.batch_size=2", "model.depth=2", "model.hidden_size=16", "sampling.steps=1"]
    bench.main([*args, *(f"--config.{change}" for change in changes)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["batch"] == 2 and result["images_per_sec"] > 0
    assert (0 < result["mfu"] < 1) if what == "train" else (result["steps"] == 1)


@pytest.mark.slow
def test_saving_tells_steps_during_a_save_from_others(capsys):
    args = ["saving", "--config", "configs/digits.py", "--json"]
    changes = ["data.batch_size=8", "model.depth=2", "model.hidden_size=16"]
    bench.main([*args, *(f"--config.{change}" for change in changes)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 3 <= result["steps_saving"] < 47 and result["gigabytes"] > 0
    assert 0 < result["ratio"] <= result["most"] and result["seconds"] > 0


SMALL = {"hidden_size": 32, "num_heads": 2, "flux.rope_axes": (4, 6, 6), "moe.hidden_size": 8}
SMALL |= {"moe.shared_hidden_size": 32, "flux.single_depth": 1, "depth": 1}


@pytest.mark.parametrize(
    "case", ["single-group", *(pytest.param(c, marks=pytest.mark.slow) for c in
             ("ffn", "double", "single", "double-group"))])  # fmt: skip
def test_sparsity_measures_two_structures(case):
    """12 tokens: 6 of a text and 2 x 3 of an image."""
    result = sparsity.bench_sparsity(case, tokens=12, dtype="float32", repeats=1, **SMALL)
    assert result["ratio"] == result["seconds_sparse"] / result["seconds_dense"] > 0
    assert (result["case"], result["tokens"]) == (case, 12)
    model = sparsity.flux(12, "bfloat16", SMALL)
    assert model.grid == (2, 3) and model.text_tokens == 6 and model.dtype == "bfloat16"
    assert sparsity.flux(4608, "float32", SMALL).grid == (64, 64)


def test_sparsity_needs_a_token_of_each_kind():
    with pytest.raises(UserError, match="--tokens 1 leaves no text or no image: take at least 2"):
        sparsity.bench_sparsity("ffn", tokens=1, dtype="float32", repeats=1)


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="the kernels for experts need a C++ compiler")
def test_sparsity_is_real():
    """At FLUX.1's width, 512 tokens: experts at most 0.55 of the MLP, one of five blocks 0.3.

    By count 3/8 and 1/5. In a process of its own, which optimises as usual and gives back 4 GB.
    """
    command = [sys.executable, "-m", "moe_diffusion.bench", "sparsity", "--json", "--repeats", "2"]
    command += ["--case", "ffn", "--case", "single-group"]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    ffn, group = json.loads(done.stdout.splitlines()[-1])["results"]
    assert ffn["ratio"] <= 0.55 and group["ratio"] <= 0.3, (ffn, group)


def test_tables_keep_their_columns_apart():
    lines = report.table([{"what": "a", "x": 1.5}, {"what": "a", "y": "b"}, {"what": "c"}])
    assert [line.split() for line in lines.splitlines()] == [
        ["a", "x", "y"],
        ["1.5"],
        ["b"],
        ["c"],
        [],
    ]


@pytest.mark.parametrize("text", ["1,2,3", "16,16,4,5", "16,0,4,1", "a,b,c,d"])
def test_a_wrong_shape_is_named(text):
    with pytest.raises(UserError, match=f"--shape '{text}'"):
        parse_shape(text)


def test_tune_needs_an_accelerator(capfd):
    assert "run it on such a device" in cli.refused(capfd, tune.main, [])


def test_tiles_of_other_devices_are_kept(tmp_path):
    path = tmp_path / "tiles.json"
    one, two, three = [1, 1], [2, 2, 2, 2], [3, 3, 3, 3, "mosaic"]
    tiles.merge(path, "A", {"x": one, "y": one})
    tiles.merge(path, "B", {"x": two})
    tiles.merge(path, "A", {"y": three})
    assert json.loads(path.read_text()) == {"A": {"x": one, "y": three}, "B": {"x": two}}


@pytest.mark.parametrize(
    "sizes", [None, [], [1], [1, 2, 3], [1, 2, 3, "4"], [0, 1], [1, 10**9], [1, 1, 1, 1, "cuda"]]
)
def test_a_table_of_tiles_that_is_none(sizes, tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"A": {"x": sizes}}))
    with pytest.raises(UserError, match="tiles.json: A: x .*: delete it, or name another by MOE_"):
        tiles.merge(path, "A", {"y": [1, 1]})
    path.write_text('{"A": 3}')
    with pytest.raises(UserError, match="tiles.json: A is 3, not a table"):
        tiles.merge(path, "A", {"y": [1, 1]})


def test_the_fastest_right_tiles_win_and_are_kept_at_once(tmp_path, monkeypatch, capsys):
    """A candidate that does not compile, or computes something else, is none."""
    fast = {(64,): 0.0, (128,): 1e-2, (256,): 0.0, (512,): 0.0}

    def call(sizes, params, tokens, top_k):
        def run():
            if sizes == (512,):
                raise NotImplementedError("too large")
            time.sleep(fast[sizes])
            return jnp.ones(3) * (2 if sizes == (256,) else 1)

        return run

    def second_shape_faults(params):
        if params["up"].shape[1] == 32:
            assert json.loads(path.read_text())  # the first shape's are there
            raise KeyboardInterrupt
        return [(128,), (64,), (256,), (512,)]

    path = tmp_path / "tiles.json"
    monkeypatch.setattr(tiles, "candidates", second_shape_faults)
    monkeypatch.setattr(tiles, "_call", call)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    args = ["--shape", "16,16,4,2", "--shape", "32,16,4,2", "--tokens", "64", "--table", path]
    with pytest.warns(UserWarning, match="tiles \\(256,\\) compute something else"):
        with pytest.raises(SystemExit):
            tune.main(list(map(str, args)))
    (chosen,) = json.loads(path.read_text())["cpu"].values()
    assert chosen == [64]
