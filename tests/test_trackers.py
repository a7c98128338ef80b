"""TensorBoard and Weights & Biases: what they get, and that their failure ends nothing else."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from moe_diffusion import trackers, train
from moe_diffusion.errors import UserError
from moe_diffusion.trackers import Trackers
from tests import cli
from tests.full_disk import full_disk


def events(path):
    """The events of a file: length u64, its checksum, the event, its checksum."""
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_tensorboard_gets_everything(tmp_path):
    tracked = Trackers(tmp_path / "run", step=4)
    tracked.hparams({"optim": {"learning_rate": 1e-4}})
    tracked.scalars(5, {"loss": 0.5, "eval/fd": 2.0})
    tracked.images(5, {"samples": np.zeros((4, 6, 3), np.uint8)})
    tracked.close()
    tracked.scalars(6, {"loss": 0.1})  # after the end: nothing
    (path,) = (tmp_path / "run").iterdir()
    version, start, text, *rest = events(path)
    assert version.file_version == "brain.Event:2"
    assert start.step == 5 and start.session_log.status == event_pb2.SessionLog.START
    assert b"learning_rate" in text.SerializeToString()
    values = [(e.step, e.summary.value[0]) for e in rest]
    assert [(step, v.tag) for step, v in values] == [(5, "loss"), (5, "eval/fd"), (5, "samples")]
    assert [v.simple_value for _, v in values[:2]] == [0.5, 2.0]
    assert (values[2][1].image.height, values[2][1].image.width) == (4, 6)


def test_two_runs_in_a_second_have_a_file_each(tmp_path):
    for _ in range(2):
        Trackers(tmp_path, step=0).close()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_ends_tensorboard_alone(tmp_path, capsys):
    """The writer of tensorboardX would wait for ever for its dead thread at the 11th event."""
    tracked = Trackers(tmp_path, step=0)
    with full_disk():
        for step in range(30):
            tracked.scalars(step, {"loss": 0.5})
    tracked.scalars(30, {"loss": 0.5})
    tracked.close()
    error = capsys.readouterr().err
    assert error.startswith("warning: TensorBoard gets nothing more (")
    assert error.count("\n") == 1


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes what it is told."""
    told = []

    class Run:
        config = types.SimpleNamespace(update=lambda values, **_: told.append(("config", values)))

        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("finished")

    def init(**options):
        if options["project"] == "closed":
            raise RuntimeError("no API key\nconfigured")
        told.append(options)
        return Run()

    module = types.ModuleType("wandb")
    module.init, module.Image = init, lambda image: ("image", image.shape)
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def test_a_run_is_told_to_weights_and_biases_and_goes_on(wandb, tmp_path):
    """One id for the workdir, so that a resumed run is the same run there."""
    args = [*cli.digits(train__wandb="mine", checkpoint__every=2), "--workdir", str(tmp_path)]
    train.main([*args, "--config.train.num_steps=2"])
    train.main([*args, "--config.train.num_steps=3"])
    first, config, *steps = wandb[: wandb.index("finished")]
    assert (first["project"], first["name"]) == ("mine", tmp_path.name)
    assert first["dir"] == str(tmp_path) and first["resume"] == "allow"
    assert first["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert config[1]["optim"]["learning_rate"] == 0.1
    assert [step for step, _ in steps] == [1, 2] and steps[0][1]["loss"] > 0
    again, _, (step, values) = wandb[wandb.index("finished") + 1 : -1]
    assert again == first and step == 3
    logged = cli.metrics(tmp_path)
    assert values.items() >= {k: v for k, v in logged[-1].items() if k != "step"}.items()


def test_images_and_failures_of_weights_and_biases(wandb, tmp_path, capsys, monkeypatch):
    tracked = Trackers(tmp_path, 0, "mine")
    tracked.images(3, {"samples": np.zeros((4, 6, 3), np.uint8)})
    assert wandb[-1] == (3, {"samples": ("image", (4, 6, 3))})
    monkeypatch.setattr(tracked._open["wandb"], "_run", None)  # any later error
    tracked.scalars(4, {"loss": 1.0})
    tracked.scalars(5, {"loss": 1.0})
    tracked.close()
    assert capsys.readouterr().err.count("warning: wandb gets nothing more") == 1
    with pytest.raises(UserError, match="'closed' does not start .no API key.: run `wandb login`"):
        Trackers(tmp_path, 0, "closed")


def test_without_wandb_nothing_begins(tmp_path, capfd):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    trackers.check("")
    args = [*cli.digits(train__wandb="mine"), "--workdir", tmp_path / "run"]
    error = cli.refused(capfd, train.main, args)
    assert error == "train.wandb = 'mine' needs wandb: pip install wandb"
    assert not list(tmp_path.iterdir())
