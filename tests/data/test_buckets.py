"""Images of several sizes: the bucket of each, what lies in the folder, and whose turn it is."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe_diffusion import config as configs
from moe_diffusion import pictures
from moe_diffusion.buckets import Order, buckets_of, order_of, records_of, sized
from moe_diffusion.conditions import Field
from moe_diffusion.data import pipeline, sources
from moe_diffusion.data.latents import Latents
from moe_diffusion.diffusion.objectives import make_loss
from moe_diffusion.digests import seal
from moe_diffusion.errors import UserError
from moe_diffusion.models import build
from moe_diffusion.models.accounting import training_flops
from moe_diffusion.models.stack import (
    Model,
    abstract_inputs,
    abstract_variables,
    init_variables,
)
from moe_diffusion.planning import buckets as planned
from moe_diffusion.preparing import buckets, encode
from moe_diffusion.preparing.captions import Captioned
from moe_diffusion.preparing.pairs import Pair, Pairs
from tests import cli
from tests.preparing import latents_folder as lib

SIZES = ((8, 8), (6, 10), (10, 6), (4, 16))  # nothing is nearest to the last
SHAPES = [(4, 4, 2), (3, 5, 2), (5, 3, 2), (2, 8, 2)]
COUNT = 40
OF_RECORD = [0, 0, 1, 0, 2]  # bucket of record i is that of i % 5


class Pictures(lib.Images):
    """`Images` in the sizes of `OF_RECORD`."""

    image_shape = (*SIZES[0], 1)

    def picture_size(self, index):
        height, width = SIZES[OF_RECORD[index % 5]]
        return None if index in self.broken else (3 * height + 1, 3 * width)

    def read(self, index):
        self.shape = self.image_shape
        return super().read(index)


def job(folder, broken=(), **settings) -> encode.Job:
    source = Pictures(COUNT, broken)
    shapes = {"shape": list(SHAPES[0]), "buckets": [list(shape) for shape in SHAPES]}
    made = lib.job(folder, source, flip=True, **shapes, **settings)
    views = buckets.views(source, SIZES, "this source")
    return encode.Job(**{**vars(made), "batch": (4, 3, 4, 4), "views": views})


def write(made: encode.Job) -> Latents:
    assert encode.begin(made)
    encode.write_shards(made, 0, 1)
    encode.finish(made)
    return Latents(str(made.folder))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buckets") / "out"
    return folder, write(job(folder))


def numbers(bucket: int) -> list[int]:
    return [i for i in range(COUNT) if OF_RECORD[i % 5] == bucket]


# --- preparing -----------------------------------------------------------------------------------


def test_an_image_goes_to_the_nearest_aspect_ratio():
    sizes = [(256, 256), (192, 320), (320, 192)]
    of = [(100, 100), (100, 125), (100, 140), (125, 100), (900, 100), (100, 900), (3000, 2000)]
    # The border between 1 and 5/3 lies at the square root of 5/3, 1.29.
    assert buckets.nearest(np.array(of), sizes).tolist() == [0, 0, 1, 0, 2, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "64x64,60x80",
            "--sizes 60x80 is no multiple of 16: 8 pixels per latent, 2 latents per pa",
        ),
        ("64x64,96x96", "64x64 and 96x96 have the same aspect ratio, so that no picture would be"),
        ("64x64,", "--sizes '' is no size"),
        ("64x64,0x16", "is no size of up to"),
    ],
)
def test_impossible_sizes_are_refused(text, message):
    assert buckets.parse_sizes("64,48x80", 8, 2) == [(64, 64), (48, 80)]
    with pytest.raises(UserError, match=message):
        buckets.parse_sizes(text, 8, 2)


def test_a_source_of_one_size_has_no_buckets():
    with pytest.raises(UserError, match="digits has images of one size, so --sizes means nothing"):
        buckets.views(lib.Images(3), SIZES, "digits")


def test_sizes_of_pictures(tmp_path):
    array = np.zeros((3, 5, 3), np.uint8)
    pictures.Image.fromarray(array).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    bits = (tmp_path / "a.png").read_bytes()
    for picture in (tmp_path / "a.png", bits, array):
        assert pictures.size_of(picture, "a", "mend it") == (3, 5)
    pairs = Pairs([Pair(name, str(tmp_path / name), ["text"]) for name in ("a.png", "b.png")])
    for skip in (False, True):
        encoders = SimpleNamespace(cond_spec={})
        captions = Captioned(pairs, (8, 8, 3), encoders, skip_broken=skip)
        assert captions.picture_size(0) == (3, 5)
        if not skip:
            with pytest.raises(UserError, match="b.png cannot be read as an image"):
                captions.picture_size(1)
    assert captions.picture_size(1) is None
    assert pictures.size_of(tmp_path / "b.png", "b", "mend it", skip=True) is None
    with pytest.raises(UserError, match="b cannot be read as an image .*: mend it"):
        pictures.size_of(tmp_path / "b.png", "b", "mend it")


def test_what_the_folder_holds(prepared, tmp_path, capfd):
    folder, source = prepared
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 4 and manifest["count"] == COUNT
    assert manifest["buckets"] == [list(shape) for shape in SHAPES]
    assert manifest["bucket_counts"] == [24, 8, 8, 0]
    shards = [(shard["bucket"], shard["count"]) for shard in manifest["shards"]]
    assert shards == [(0, 8), (0, 8), (0, 8), (1, 8), (2, 8)]
    assert sorted(p.suffix for p in folder.iterdir()) == [".array_record"] * 5 + [".json"]
    assert source.buckets == tuple(zip(SHAPES, (24, 8, 8, 0), strict=True))
    everything = []
    for bucket in range(3):
        mine = records_of(source, SHAPES[bucket])
        batch = source.take(np.array(mine))
        assert batch["label"].tolist() == [i % 3 for i in numbers(bucket)]
        assert batch["image"].shape == (len(mine), *SHAPES[bucket])
        everything.append(batch["image"].reshape(-1, 2))
    assert not records_of(source, SHAPES[3]) and not records_of(source, (9, 9, 2))
    # The mirrored images have the same numbers; the variance has that of the Gaussian, too.
    everything = np.concatenate(everything).astype(np.float64)
    statistics = manifest["statistics"]
    np.testing.assert_allclose(statistics["mean"], everything.mean(0), atol=1e-3)
    deviation = np.sqrt(everything.var(0) + 0.01 * 0.5**2)
    np.testing.assert_allclose(statistics["std"], deviation, rtol=2e-3)
    assert encode.begin(job(tmp_path / "again"))
    assert capfd.readouterr().err.endswith("no image is nearest to 4x16\n")


def test_any_number_of_processes_and_interruptions_make_the_same_folder(prepared, tmp_path):
    assert encode.begin(job(tmp_path))
    encode.write_shards(job(tmp_path), 1, 2)  # each a process of its own
    (tmp_path / buckets.FILE).unlink()  # killed before the sizes were written
    assert encode.begin(job(tmp_path))
    encode.write_shards(job(tmp_path), 0, 3)
    encode.write_shards(job(tmp_path), 0, 1)
    encode.finish(job(tmp_path))
    assert cli.contents(tmp_path) == cli.contents(prepared[0])


def test_broken_pictures_are_of_the_first_bucket_and_left_out(tmp_path):
    source = write(job(tmp_path / "out", broken=(2, 3)))
    assert source.manifest["skipped"] == ["image 2", "image 3"]
    assert source.manifest["bucket_counts"] == [23, 7, 8, 0]


def test_other_sizes_and_damaged_lists_are_refused(prepared, tmp_path):
    folder, _ = prepared
    with pytest.raises(UserError, match="was written with buckets = .*, now it is None"):
        encode.begin(lib.job(folder, Pictures(COUNT), flip=True, shape=list(SHAPES[0])))
    made = job(tmp_path)
    assert encode.begin(made)
    path = tmp_path / buckets.FILE
    for bits in (path.read_bytes()[:-30], b""):
        path.write_bytes(bits)
        with pytest.raises(UserError, match="buckets.npz is damaged"):
            encode.write_shards(job(tmp_path), 0, 1)


def test_manifests_that_cannot_be(prepared, tmp_path):
    folder, source = prepared
    for change, message in (
        ({"shape": [5, 3, 2]}, "shape is not the first of buckets"),
        ({"buckets": [[4, 4, 2], [3, 5, 1], [5, 3, 2], [2, 8, 2]]}, "or channels differ"),
        ({"bucket_counts": [23, 9, 8, 0]}, "bucket_counts is not what the shards hold"),
        ({"shards": source.manifest["shards"][::-1]}, "buckets of its shards are not in order"),
        ({"buckets": [[4, 4, 2], [3, 5, 2]]}, "buckets of its shards are not in order"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(seal(source.manifest | change)))
        with pytest.raises(UserError, match=message):
            Latents(str(tmp_path))


# --- the order of batches ------------------------------------------------------------------------


def test_one_bucket_is_a_sequence_of_permutations():
    order = Order((10,), 4, seed=7)
    drawn = np.concatenate([order.records(number, range(4)) for number in range(5)])
    for epoch in range(2):
        expected = np.random.Generator(np.random.Philox([7, epoch])).permutation(10)
        np.testing.assert_array_equal(drawn[10 * epoch : 10 * epoch + 10], expected)


def test_buckets_take_turns_in_proportion_to_their_images():
    order, size = Order((40, 3, 20, 8), 4, seed=1), 4
    assert order.used == (40, 0, 20, 8)
    ends = np.cumsum((0, *order.counts))
    total, seen = sum(order.used), np.zeros(4, int)
    drawn = [[] for _ in order.counts]
    for number in range(total):  # a cycle: as many epochs as a batch has images
        records = order.records(number, range(size))
        (bucket,) = set(np.searchsorted(ends, records, side="right") - 1)
        assert order.turn(number) == (bucket, seen[bucket])
        drawn[bucket].append(records)
        seen[bucket] += 1
        assert (np.abs(seen - (number + 1) * np.array(order.used) / total) < 2).all()
    assert seen.tolist() == [40, 0, 20, 8]
    for bucket in (0, 2, 3):  # every epoch has each image once
        count = order.counts[bucket]
        epochs = np.sort(np.concatenate(drawn[bucket]).reshape(size, count), axis=1)
        np.testing.assert_array_equal(epochs, size * [range(ends[bucket], ends[bucket] + count)])
    turns = [order.turn(number)[0] for number in range(3 * total)]
    assert turns[:total] != turns[total : 2 * total]  # another cycle is another order
    assert turns[:9] != sorted(turns[:9])
    blocks = [order.records(total + 3, range(i, i + 2)) for i in (0, 2)]
    np.testing.assert_array_equal(np.concatenate(blocks), order.records(total + 3, range(4)))


def test_all_buckets_are_too_small():
    source = SimpleNamespace(buckets=((SHAPES[0], 3), (SHAPES[1], 2)))
    with pytest.raises(UserError, match="8 exceeds the images of every bucket; the largest has 3:"):
        order_of(source, 8, 0)
    assert order_of(source, 3, 0).used == (3, 0)
    alone = Pictures(3)
    assert buckets_of(alone) == (((8, 8, 1), 3),) and order_of(alone, 8, 0).used == (3,)


def batches(source, batch=6, workers=0, index=0, count=1):
    data = SimpleNamespace(batch_size=batch, augment="flip", num_workers=workers, prefetch=1)
    return pipeline.make_iterator(source, data, seed=3, process_index=index, process_count=count)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_processes_and_resuming_change_nothing(prepared, workers):
    _, source = prepared
    whole, resumed = batches(source), batches(source, workers=workers)
    parts = [batches(source, index=i, count=3) for i in range(3)]
    resumed.set_state({"next_index": 4})
    shapes = set()
    for number in range(12):
        batch, pieces = next(whole), [next(part) for part in parts]
        shapes.add(batch["image"].shape)
        again = next(resumed) if number >= 4 else batch
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), value)
            np.testing.assert_array_equal(again[name], value)
    assert shapes == {(6, *shape) for shape in SHAPES[:3]}
    for iterator in (whole, resumed, *parts):
        iterator.close()


# --- models for every shape ----------------------------------------------------------------------

CONFIG = configs.load(
    "digits:router=dense",
    ["model.depth=1", "model.hidden_size=16", "model.num_heads=2", "model.image_size=4"]
    + ["model.channels=2", "data.batch_size=4", "model.patch_size=1"],
)


def source_of(*buckets) -> SimpleNamespace:
    spec = {"label": Field((), "int32", 10)}
    return SimpleNamespace(image_shape=buckets[0][0], buckets=buckets, cond_spec=spec)


def test_the_model_has_the_shape_of_a_batch():
    """With the positions and the FLOPs of that shape, and the same parameters."""
    model = build(CONFIG.model)
    other = sized(model, (3, 5, 2))
    assert sized(model, model.input_shape) is model and other.grid == (3, 5)
    variables, loss = abstract_variables(model), make_loss(model, CONFIG)
    image, _, cond = abstract_inputs(other, 4)
    batch, key = {"image": image, **cond}, jax.random.key(0)
    state = variables.get("router_state", {})
    value, _ = jax.eval_shape(loss, variables["params"], state, batch, key)
    assert value.shape == () and image.shape == (4, 3, 5, 2)
    source = source_of(((4, 4, 2), 60), ((3, 5, 2), 20), ((9, 9, 2), 3), ((2, 8, 2), 0))
    one, two = training_flops(model), training_flops(other)
    assert planned.mean_flops(CONFIG, model, source) == pytest.approx(0.75 * one + 0.25 * two)
    assert planned.table(CONFIG, source).splitlines() == [
        "bucket          4x4x2           60 images",
        "bucket          3x5x2           20 images",
        "bucket          9x9x2            3 images  left out: fewer than data.batch_size = 4",
        "bucket          2x8x2            0 images",
    ]
    alone = source_of(((4, 4, 2), 60))
    assert planned.mean_flops(CONFIG, model, alone) == one and not planned.table(CONFIG, alone)
    sources.check_fits(source, "latents:x", (3, 5, 2), model.cond_spec())
    with pytest.raises(UserError, match=r"of shape \(4, 4, 2\) or .*, the model takes \(8, 8, 2\)"):
        sources.check_fits(source, "latents:x", (8, 8, 2), model.cond_spec())


class Learned(Model):
    """A model that trains a table of positions."""

    input_shape: tuple

    @nn.compact
    def __call__(self, x, t, cond, train, capture=()):
        return x + self.param("positions", nn.initializers.zeros_init(), self.input_shape)

    def cond_spec(self):
        return {}


def test_what_cannot_train_on_several_sizes():
    source = source_of(((4, 4, 2), 60), ((3, 5, 2), 20))
    with pytest.raises(UserError, match="parameters of this model depend on the size .* of 3x5x2"):
        planned.mean_flops(CONFIG, Learned(input_shape=(4, 4, 2)), source)
    config = CONFIG.copy_and_resolve_references()
    config.model.patch_size = 2
    model = build(config.model)
    with pytest.raises(UserError, match="of shape 3x5x2: size 24x40: this model draws multiples"):
        planned.mean_flops(config, model, source)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("digits:router=diffmoe", ["model.image_size=8"]),
        ("digits:router=dense", ["model.positions=sincos"]),
        ("jitmoe_b16", ["model.image_size=32", "model.depth=6", "model.hidden_size=96"]),
        ("flux_tiny", []),
    ],
)
def test_a_model_of_another_size_is_what_the_config_would_build(name, changes):
    """FLUX's positions, rope and tables go by the shape; all have the same parameters."""
    config = configs.load(name, [*changes, "model.dtype=float32"])
    model, patch = build(config.model), config.model.patch_size
    height, width = model.input_shape[0] + patch, model.input_shape[1] * 2
    sides = [f"model.image_size={height}", f"model.image_width={width}"]
    other = build(configs.load(name, [*changes, "model.dtype=float32", *sides]).model)
    mine = sized(model, other.input_shape)
    variables = init_variables(model, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    random = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype),
        nn.meta.unbox(variables),
    )
    x, t, cond = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), abstract_inputs(other, 2))
    x = np.random.default_rng(0).standard_normal(x.shape, np.float32)
    programs = [jax.jit(lambda *inputs, m=m: m.apply(*inputs, False)) for m in (mine, other)]
    outputs = [np.asarray(program(random, x, t / 2, cond)) for program in programs]
    np.testing.assert_array_equal(*outputs)
    assert np.ptp(outputs[0]) > 0.01
    assert abstract_variables(mine) == abstract_variables(model) == abstract_variables(other)
