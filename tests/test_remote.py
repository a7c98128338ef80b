"""Remote folders: a bucket in fsspec's memory stands for gs://, and like gcsfs it cannot append."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from moe_diffusion import config as configs
from moe_diffusion import evaluate, remote, report, sample, train, writing
from moe_diffusion.errors import UserError
from moe_diffusion.figures.images import save_png
from moe_diffusion.sampling.load import load_workdir
from moe_diffusion.training import checkpoint
from tests import cli


class Bucket(MemoryFileSystem):
    """gs:// in the memory of this process."""

    protocol = ("gcs", "gs")
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

    def _open(self, path, mode="rb", **kwargs):
        if "a" in mode:  # word for word what gcsfs does
            warnings.warn("Append mode 'a' is not supported in GCS.", stacklevel=2)
            mode = mode.replace("a", "w")
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty gs://bucket, for a process whose current folder is empty, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "DRIVERS", {"gs": (), "s3": ("no_such_driver",)})
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield "gs://bucket"
    backend.fsspec_backend._get_filesystem.cache_clear()
    assert [path.name for path in tmp_path.iterdir() if ":" in path.name] == []


@pytest.mark.parametrize(
    "path, url",
    [
        ("gs://bucket/a/b.png", "gs://bucket/a/b.png"),
        (epath.Path("gs://bucket/a"), "gs://bucket/a"),
        ("gs:/bucket/a", "gs://bucket/a"),  # as pathlib writes it
        ("s3://bucket/a", "s3://bucket/a"),
        ("runs/gs://bucket", None),
        ("/data/me@host/val", None),
        ("gs", None),
        ("C:/data", None),
    ],
)
def test_which_paths_are_remote(path, url):
    assert remote.url_of(path) == url


def test_what_is_remote_behind_a_kind():
    assert remote.is_remote("latents:gs://b/x") and remote.is_remote("memory://x")
    assert not any(map(remote.is_remote, ("folder:/data", "runs/a:b", "tfds:cifar10:3.0.2", "")))


def test_a_driver_is_asked_for_by_name(bucket):
    remote.check("runs/digits", "--workdir")
    remote.check("gs://b/run", "--workdir")
    with pytest.raises(UserError, match="^--workdir s3://b/r needs a driver: pip install no_such_"):
        remote.check("s3://b/r", "--workdir")
    with pytest.raises(
        UserError, match="--workdir hf://b: hf:// is not supported; gs:// and s3://"
    ):
        remote.check("hf://b", "--workdir")


def test_a_log_keeps_what_an_earlier_process_wrote(bucket, monkeypatch):
    """Appending with gcsfs would replace it."""
    path = epath.Path(bucket) / "run" / "metrics.jsonl"
    with remote.open_log(path) as log:
        log.write("1\n")
        log.flush()
        assert not path.exists()  # not at every line
    with remote.open_log(path) as log:
        log.write("2\n")
        monkeypatch.setattr(remote, "_EVERY", 0.0)
        log.flush()
        assert path.read_text() == "1\n2\n"
        log.write("3\n")
    assert path.read_text() == "1\n2\n3\n"
    with remote.open_log(path):
        pass
    assert path.read_text() == "1\n2\n3\n"


def test_a_log_in_a_local_folder_is_a_file(tmp_path):
    for _ in range(2):
        with remote.open_log(tmp_path / "a:b.jsonl") as log:
            log.write("1\n")
    assert (tmp_path / "a:b.jsonl").read_text() == "1\n1\n"


def test_a_file_is_whole_or_absent(bucket):
    path = f"{bucket}/run/a.txt"
    with pytest.raises(ZeroDivisionError), writing.whole_file(path, "w") as file:
        file.write(str(1 / 0))
    assert not epath.Path(path).exists()
    writing.save_text("whole", path)
    assert epath.Path(path).read_text() == "whole"


def test_pictures_and_configs(bucket):
    run = epath.Path(bucket) / "run"
    config = configs.load("digits")
    configs.save_json(config, run / "config.json")
    assert configs.load_json(run / "config.json") == config
    image = Image.fromarray(np.zeros((4, 6), np.uint8))
    save_png(image, Path(f"{bucket}/run") / "samples" / "1.png")
    with (run / "samples" / "1.png").open("rb") as file:
        assert Image.open(file).size == (6, 4)
    with pytest.raises(UserError, match="^gs://bucket/other is not a workdir"):
        load_workdir(f"{bucket}/other")


@pytest.mark.slow
def test_a_run_in_a_bucket_is_begun_and_resumed(bucket, monkeypatch, tmp_path):
    """All but two: checkpoints go through tensorstore, and TensorBoard's events through Google's
    own package, which know no fsspec. The former lie in a local folder, the latter are left out."""
    monkeypatch.setattr(
        checkpoint, "_folder", lambda _, name="checkpoints": epath.Path(tmp_path / name)
    )
    run, config = f"{bucket}/run", dict(train__sample_every=2, train__samples=4, sampling__steps=2)
    for steps in (2, 4):
        args = cli.digits(train__num_steps=steps, **config)
        train.main([*args, "--workdir", run])
    names = {path.name for path in epath.Path(run).iterdir()}
    assert {"config.json", "metrics.jsonl", "parameters.txt", "loss.png", "samples"} <= names
    beat = json.loads((epath.Path(run) / "heartbeat.json").read_text())
    assert (beat["step"], beat["phase"]) == (4, "finished") and "summary.json" in names
    report.main(["--workdir", run, "--no-maps", "--out", str(tmp_path / "report.html")])
    assert (tmp_path / "report.html").stat().st_size > 10_000
    lines = (epath.Path(run) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    pictures = sorted(path.name for path in (epath.Path(run) / "samples").iterdir())
    assert pictures == ["00000002.png", "00000004.png"]
    assert not Path("/gs").exists() and not Path("gs:").exists()

    sample.main(["--workdir", run, "--num", "2", "--steps", "2", "--out", str(tmp_path / "a.png")])
    evaluations = epath.Path(run) / "evaluations.jsonl"
    for count in (1, 2):
        evaluate.main(["--workdir", run, "--num", "16", "--steps", "2"])
        assert len(evaluations.read_text().splitlines()) == count
