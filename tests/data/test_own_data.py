"""`data.source=my_module:MyData`: what is taken and what is refused; it trains and resumes."""

from __future__ import annotations

import contextlib
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from moe_diffusion import train
from moe_diffusion.conditions import Field
from moe_diffusion.data.pipeline import make_iterator
from moe_diffusion.data.sources import open_images, open_source
from moe_diffusion.errors import UserError
from tests import cli

MODULE = """
import numpy as np
from moe_diffusion import Field

class Data:
    class_names = [str(i) for i in range(10)]
    def __init__(self, image_shape=(8, 8, 1), split="train", size=50):
        self.image_shape, self.split, self.size = image_shape, split, size
        self.cond_spec = {"label": Field((), "int32", 10)}
    def __len__(self):
        return self.size
    def __getitem__(self, index):
        image = np.random.default_rng(index).normal(0, 0.3, self.image_shape)
        return {"image": image.astype(np.float32), "label": np.int32(index % 10)}

def of_model(cond_spec, **options):
    data = Data(options["image_shape"])
    data.cond_spec = cond_spec
    return data

ready = Data(size=7)
class Needy:
    def __init__(self, place):
        pass
class Fails(Data):
    def __init__(self):
        raise OSError("disk is gone")
class NoShape:
    cond_spec = {}
    def __len__(self):
        return 1
class Plain(Data):
    def __init__(self):
        super().__init__()
        self.cond_spec = {"label": 10}
class Empty(Data):
    def __len__(self):
        return 0
class Double(Data):
    def __getitem__(self, index):
        return {"image": np.zeros((8, 8, 1)), "label": np.int32(0)}
class Pair(Data):
    def __getitem__(self, index):
        return np.zeros((8, 8, 1), np.float32), 0
class Long(Data):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"label": index}
class Wide(Data):
    def __getitem__(self, index):
        return super().__getitem__(index) | ({"label": np.int32(10)} if index == 3 else {})
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The current folder, with the module own.py."""
    (tmp_path / "own.py").write_text(MODULE)
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own", None)


def test_a_class_a_function_and_an_object(outside):
    made = open_images("own:Data", (4, 6, 3), split="test")
    assert (made.image_shape, made.split, len(made)) == ((4, 6, 3), "test", 50)
    spec = {"label": Field((), "int32", 10)}
    assert open_images("own:of_model", (4, 4, 1), cond_spec=spec).cond_spec is spec
    assert open_images("own:ready", (4, 4, 1)) is sys.modules["own"].ready


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("cifar", "data.source='cifar' is unknown; known are: digits, synthetic, folder:<path>, "),
        (
            "foldr:x",
            "(which is none of digits, synthetic, folder:<path>, tfds:<name>, latents:<pat",
        ),
        (
            "foldr:x",
            "module foldr cannot be imported (ModuleNotFoundError: No module named 'foldr'",
        ),
        ("own:", "data.source='own:' is unknown"),
        ("own:Dada", "own.py has no Dada: name a class of that file"),
        ("ends:Data", "module ends cannot be imported (SystemExit: 3)"),
        ("own:Needy", "Needy cannot be made (TypeError: Needy.__init__() missing 1 required posit"),
        ("own:Fails", "Fails cannot be made (OSError: disk is gone)"),
        ("own:NoShape", "has no image_shape and no __getitem__: see the top of moe_diffusion/data"),
        ("own:Plain", "is {'label': 10}: it must be a dict of fields, like {'label': moe_diffusio"),
        ("own:Empty", "has no records: choose other data"),
        ("own:Double", "has the image as float64[8, 8, 1]: return float32[8, 8, 1] in [-1, 1]"),
        ("own:Pair", "record 0 of data.source='own:Pair' is tuple: return a dict with 'image'"),
        ("own:Long", "the field 'label' as int64[], the model takes int32[]"),
    ],
)
def test_what_is_refused(outside, place, message):
    with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(message)}[^\n]*$"):
        open_images(place, (8, 8, 1))


def test_it_must_fit_the_model(outside):
    data = SimpleNamespace(source="own:ready", split="train", skip_broken=False)
    with pytest.raises(UserError, match="data.source=own:ready has images of shape .8, 8, 1., the"):
        open_source(data, (4, 4, 1), {"label": Field((), "int32", 10)})
    with pytest.raises(
        UserError, match="has 10 classes, the model only 5: set model.num_classes=10"
    ):
        open_source(data, (8, 8, 1), {"label": Field((), "int32", 5)})


def arguments(workdir, **changes):
    options = {"data__source": "own:Data", "data__augment": "flip", "ema__decays": "()"}
    return [*cli.digits("dense", **options | changes), "--workdir", str(workdir)]


def test_batches_are_a_function_of_their_number(outside):
    """An iterator that is set to batch 2 goes on as one that made batches 0 and 1."""
    source = open_images("own:Data", (8, 8, 1))
    data = SimpleNamespace(batch_size=20, augment="flip", num_workers=0, prefetch=1)
    with contextlib.closing(make_iterator(source, data, seed=3)) as whole:
        batches = [next(whole) for _ in range(4)]
    assert whole.get_state() == {"next_index": 4}
    with contextlib.closing(make_iterator(source, data, seed=3)) as resumed:
        resumed.set_state({"next_index": 2})
        for batch in batches[2:]:
            for name, values in next(resumed).items():
                np.testing.assert_array_equal(values, batch[name])
    assert batches[0]["image"].shape == (20, 8, 8, 1) and batches[0]["label"].dtype == np.int32
    wide = open_images("own:Wide", (8, 8, 1))
    message = "record 3 of the data has label 10, outside 0..9"
    with contextlib.closing(make_iterator(wide, data, seed=3)) as bad:
        with pytest.raises(UserError, match=message):
            [next(bad) for _ in range(3)]


@pytest.mark.slow
def test_it_trains_and_resumes(outside, capfd):
    """In one piece and in two."""
    train.main(arguments("whole", train__num_steps=3, checkpoint__every=3))
    assert "50 images" in capfd.readouterr().out
    train.main(arguments("parts", train__num_steps=1))
    train.main(arguments("parts", train__num_steps=3))
    lines = cli.metrics(outside / "whole")
    assert lines == cli.metrics(outside / "parts") and len(lines) == 3


@pytest.mark.slow
def test_worker_processes_read_the_same(outside):
    train.main(arguments("one", train__num_steps=3, checkpoint__every=3))
    train.main(arguments("two", train__num_steps=2, data__num_workers=2))
    train.main(arguments("two", train__num_steps=3, data__num_workers=1))
    assert cli.metrics(outside / "one") == cli.metrics(outside / "two")
    states = [cli.read_checkpoint(outside / name, 3)[0] for name in ("one", "two")]
    for path, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][path], err_msg=path)
