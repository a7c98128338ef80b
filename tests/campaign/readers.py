"""Damaged inputs by the thousand: each is refused in one line, or is proved to be harmless.

A kind of input is a function of (count, seed, folder). It writes a whole file, damages it `count`
times, and has it read each time. Reading raises a `UserError`, or returns what the file is taken
for, which must be harmless: what the whole file holds, but for values that a file may freely
choose. Any other exception is a traceback that a user would have seen.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe_diffusion import classes, digests, models, pictures
from moe_diffusion import config as configs
from moe_diffusion.config.schema import leaves
from moe_diffusion.data.images import ImageFolder
from moe_diffusion.data.latents import Latents
from moe_diffusion.errors import UserError
from moe_diffusion.evaluation.features import open_features
from moe_diffusion.evaluation.images import open_images
from moe_diffusion.figures.curves import read_metrics
from moe_diffusion.interop import autoencoder, describe, families, files, keymap, tokens
from moe_diffusion.interop.text_config import config_of, network_from_config
from moe_diffusion.models.text import CLIPText, T5Encoder
from moe_diffusion.preparing.captions import open_pairs
from moe_diffusion.reading import read_table
from moe_diffusion.sampling.load import load_workdir
from tests import cli
from tests.campaign.mutations import RAN, VALUES, mutations, whole
from tests.interop import pipeline_folder, torch_file
from tests.preparing import caption_places, latents_folder
from tests.sampling import tiny_run

GOLDENS = cli.ROOT / "tests" / "goldens"
SECONDS = 10  # that one input may take
# One byte more or less can make another number of a number, which nothing in the file contradicts.
FLIPS = ("flip", "flips", "insert", "remove", "repeat", "zero")
Kind = Callable[[int, int, Path], Counter]


class Found(AssertionError):
    """A damaged input that was treated wrongly; `what` is traceback, accepted, hang or code."""

    def __init__(self, what: str, name: str, data: bytes):
        super().__init__(f"{what}: {name}: {data[:200]!r}")
        self.what = what


def attempt(counts: Counter, name: str, data: bytes, read: Callable, harmless: Callable) -> None:
    """Has one damaged input read and counts what became of it. Raises `Found` for a fault."""
    start = time.process_time()  # other programs may share the cores
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            taken = read()
    except UserError as error:
        message = str(error)
        if not (message and len(message) <= 3100 and message.isprintable()):
            raise Found("traceback", name, data) from error
        counts["refused"] += 1
    except Exception as error:
        raise Found("traceback", name, data) from error
    else:
        if not harmless(name, taken):
            raise Found("accepted", name, data)
        counts["harmless"] += 1
    if time.process_time() - start > SECONDS:
        raise Found("hang", name, data)
    if os.path.exists(RAN):
        raise Found("code", name, data)


def damage(
    given: Any,
    kind: str,
    seed: int,
    count: int,
    path: Path,
    judge: Callable[[Path], Any],
    harmless: Callable[[str, Any], bool],
    sealed: bool = False,
) -> Counter:
    """{"refused": ..., "harmless": ...} of a file; `given` and `kind` are those of `mutations`.

    sealed: the file has a digest of itself, which every other mutation brings up to date, so that
      what stands behind the digest is tried, too.
    """
    counts: Counter = Counter()
    path.write_bytes(whole(given, kind))
    assert harmless("nothing", judge(path))
    for number, (name, data) in enumerate(mutations(given, kind, seed, count)):
        path.write_bytes(_resealed(data) if sealed and number % 2 else data)
        attempt(counts, name, data, lambda: judge(path), harmless)
    return counts


def _resealed(data: bytes) -> bytes:
    try:
        values = json.loads(data)
        return json.dumps(digests.seal(values)).encode() if isinstance(values, dict) else data
    except (ValueError, RecursionError):
        return data


# --- config --------------------------------------------------------------------------------------


def run_config(count: int, seed: int, folder: Path) -> Counter:
    """config.json of a workdir."""
    configs.save_json(configs.load("digits"), folder / "config.json")
    values = json.loads((folder / "config.json").read_text())

    def harmless(name, taken):
        configs.validate(taken)
        return bool(models.abstract_variables(models.build(taken.model))["params"])

    return damage(values, "json", seed, count, folder / "config.json", configs.load_json, harmless)


def overrides(count: int, seed: int, folder: Path) -> Counter:
    """--config.<key>=<value> with values of every kind, one or two at a time."""
    rng, counts = np.random.default_rng(seed), Counter()
    keys = sorted(leaves(configs.load("digits")))
    texts = [*map(str, VALUES.values()), "()", "1,2", "0.5,x", "none", "auto", "-1", "1e-3", "\0"]

    def harmless(name, taken):
        return bool(models.abstract_variables(models.build(taken.model))["params"])

    for _ in range(count):
        chosen = [
            f"--config.{keys[rng.integers(len(keys))]}={texts[rng.integers(len(texts))]}"
            for _ in range(rng.integers(1, 3))
        ]
        name = " ".join(text[:80] for text in chosen)
        attempt(counts, name, b"", lambda: configs.load("digits", chosen), harmless)  # noqa: B023
    return counts


# --- convert -------------------------------------------------------------------------------------


def hyperparameters(count: int, seed: int, folder: Path) -> Counter:
    """Hyperparameters beside a checkpoint, of every kind of family, in JSON and in YAML."""
    cases = {"sit": "sit", "dsmoe": "dsmoe_gqa", "diffmoe": "diffmoe_shared"}
    cases |= {"promoe_tc": "promoe_tc", "jitmoe": "jit_moe", "flux": "flux_schnell"}
    counts = Counter()

    def harmless(name, taken):
        return bool(models.build(taken.model).input_shape)

    for number, (family, case) in enumerate(cases.items()):
        values = json.loads((GOLDENS / case / "config.json").read_text())["model"]
        hparams = {"model": {"params": values}}
        if family in ("dsmoe", "diffmoe"):
            hparams["basic"] = {"rf": True}

        def judge(path, family=family):
            return families.config_from_torch(family, describe.read_hparams(path))

        for kind in ("json", "yaml"):
            share = count // (2 * len(cases)) + (kind == "json" and number < 2)
            counts += damage(hparams, kind, seed, share, folder / f"h.{kind}", judge, harmless)
    return counts


def weights(count: int, seed: int, folder: Path) -> Counter:
    """A .safetensors file."""
    case = GOLDENS / "sit"
    hparams = describe.read_hparams(case / "config.json")
    chosen = families.family("sit")
    model = models.build(families.model_config_from_torch("sit", hparams))

    def judge(path):
        state = files.read_state_dict(path)
        describe.from_shapes(chosen, state)
        return keymap.import_tree(state, chosen, model)

    data = (case / "weights.safetensors").read_bytes()
    path = folder / "weights.safetensors"
    wanted = {"params", "router_state"}
    return damage(
        data, "safetensors", seed, count, path, judge, lambda name, taken: set(taken) == wanted
    )


def pickles(count: int, seed: int, folder: Path) -> Counter:
    """A file of torch.save; no opcode of it may run anything."""
    path, rng = folder / "weights.pt", np.random.default_rng(0)
    state = {f"blocks.{i}.weight": rng.standard_normal((3, 4), np.float32) for i in range(3)}
    torch_file.save(path, {"model": state, "args": torch_file.namespace(lr=0.1, size="S")})
    data = path.read_bytes()

    def judge(path):
        found = files.read_state_dict(path)
        return {key: np.asarray(found[key]) for key in found}

    def harmless(name, taken):
        return all(isinstance(array, np.ndarray) for array in taken.values())

    return damage(data, "bytes", seed, count, path, judge, harmless)


def shard_indices(count: int, seed: int, folder: Path) -> Counter:
    """The index of weights in several files."""
    state = files.read_state_dict(GOLDENS / "sit" / "weights.safetensors")
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in halves.items():
        files.write_state_dict({key: np.asarray(state[key]) for key in keys}, folder / name)
    table = {key: name for name, keys in halves.items() for key in keys}
    index = {"metadata": {"total_size": 1}, "weight_map": table}

    def harmless(name, taken):
        return set(taken) <= set(names)

    path = folder / "model.safetensors.index.json"
    return damage(index, "json", seed, count, path, files.read_state_dict, harmless)


def autoencoders(count: int, seed: int, folder: Path) -> Counter:
    """config.json of an autoencoder of diffusers."""
    values = {
        "_class_name": "AutoencoderKL", "in_channels": 3, "block_out_channels": [32, 64],
        "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 32, "act_fn": "silu",
        "scaling_factor": 0.18, "shift_factor": None, "latents_mean": None, "latents_std": None,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
        "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True,
    }  # fmt: skip

    def judge(path):
        return autoencoder.network_from_config(read_table(path), "config.json")

    path = folder / "config.json"
    return damage(values, "json", seed, count, path, judge, lambda name, taken: bool(taken.factor))


# --- workdir -------------------------------------------------------------------------------------


def run_notes(count: int, seed: int, folder: Path) -> Counter:
    """data.json and metrics.jsonl of a workdir."""
    known = classes.Classes({"label": 3}, ("cat", "dog", "owl"), (5, 6, 7), "folder:/pets", 18)
    known.save(folder)
    values = json.loads((folder / classes.FILE).read_text())

    def harmless(name, taken):
        return all(isinstance(text, str) for text in taken.names) and taken.limit("label", 9) > 0

    counts = damage(
        values, "json", seed, count // 2, folder / classes.FILE,
        lambda path: classes.of_run(path.parent), harmless,
    )  # fmt: skip
    text = "".join(
        json.dumps({"step": i, "loss": 1 / (i + 1), "grad_norm": None}) + "\n" for i in range(20)
    )

    def finite(name, taken):
        return all(isinstance(v, float) for column in taken.values() for v in column.values())

    path = folder / "metrics.jsonl"
    counts += damage(text.encode(), "bytes", seed, count - count // 2, path, read_metrics, finite)
    return counts


def checkpoints(count: int, seed: int, folder: Path) -> Counter:
    """The files of a checkpoint, damaged byte by byte; what is read must be what was written."""
    tiny_run.make_run(folder / "run")
    step = folder / "run" / "checkpoints" / str(tiny_run.STEP)
    found = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    rng, counts = np.random.default_rng(seed), Counter()

    def read():
        _, _, variables, _ = load_workdir(folder / "run")
        return {str(k): np.asarray(v) for k, v in keymap.flatten_dict(variables).items()}

    expected = read()

    def unread(path):
        """Whether nothing is read from a file, so that damage to it is harmless."""
        last = ("_CHECKPOINT_METADATA", "commit_success.txt")  # orbax writes them after the digests
        return path.parts[0] != "state" or path.name in last

    def harmless(name, taken):
        same = taken.keys() == expected.keys() and all(
            np.array_equal(taken[key], expected[key]) for key in expected
        )
        return same and (name == "nothing" or unread(Path(name.split(" of ", 1)[1])))

    # orbax writes more or fewer files from run to run, so every fifth input is drawn from all.
    read_ones = [path for path in found if not unread(path.relative_to(step))]
    for number in range(count):
        among = found if number % 5 == 0 else read_ones
        path = among[rng.integers(len(among))]
        data = path.read_bytes()
        [(what, damaged)] = mutations(data, "bytes", seed * 100_000 + number, 1)
        path.write_bytes(damaged)
        attempt(counts, f"{what} of {path.relative_to(step)}", damaged, read, harmless)
        path.write_bytes(data)
    return counts


# --- manifest and prepare ------------------------------------------------------------------------


def manifests(count: int, seed: int, folder: Path) -> Counter:
    """manifest.json of prepared latents."""
    source = latents_folder.write(
        folder / "x", latents_folder.Prompts(latents_folder.COUNT), flip=True
    )
    path = folder / "x" / "manifest.json"
    manifest, indices = json.loads(path.read_text()), np.array([0, 9, 20])
    expected = source.take(indices)
    free = (".scale", ".shift", ".num_values", ".name", ".source", ".split", ".seed", ".records")

    def judge(path):
        taken = Latents(str(path.parent))
        return taken.manifest, taken.take(indices)

    def harmless(name, taken):
        manifest, batch = taken
        same = list(batch) == list(expected) and all(
            np.array_equal(batch[key], expected[key]) for key in expected
        )
        finite = all(np.isfinite(np.asarray(x, np.float32)).all() for x in batch.values())
        return same or (finite and (name.endswith(free) or name.split()[0] in FLIPS))

    return damage(manifest, "json", seed, count, path, judge, harmless, sealed=True)


def shards(count: int, seed: int, folder: Path) -> Counter:
    """The records of prepared latents; a damaged one is never taken for another."""
    source = latents_folder.write(folder / "x", latents_folder.Images(latents_folder.COUNT))
    everything = np.arange(latents_folder.COUNT)
    expected = source.take_stored(everything)
    path = sorted((folder / "x").glob("*.array_record"))[0]

    def harmless(name, taken):
        return all(np.array_equal(taken[key], expected[key]) for key in expected)

    return damage(
        path.read_bytes(), "bytes", seed, count, path,
        lambda path: Latents(str(path.parent)).take_stored(everything), harmless,
    )  # fmt: skip


def image_files(count: int, seed: int, folder: Path) -> Counter:
    """Pictures to train on and to judge, in the formats that people have."""
    counts, rng = Counter(), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 10, 3), np.uint8)
    (folder / "a").mkdir()
    for number, suffix in enumerate(("png", "jpg", "webp", "bmp")):
        path = folder / "a" / f"0.{suffix}"
        Image.fromarray(pixels).save(path)

        def judge(path):
            record = ImageFolder(str(path.parent.parent), (8, 8, 3))[0]
            judged = next(iter(open_images(str(path.parent)).batches(4, 4)))
            return record["image"], np.asarray(judged, np.float32), pictures.header(path, "x")

        def harmless(name, taken):
            return all(np.isfinite(array).all() for array in taken[:2])

        share = count // 4 + (number < count % 4)
        counts += damage(path.read_bytes(), "bytes", seed, share, path, judge, harmless)
        path.unlink()
    return counts


def captions(count: int, seed: int, folder: Path) -> Counter:
    """metadata.jsonl of pictures with prompts."""
    for i in range(3):
        Image.new("RGB", (4, 4)).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"a handwritten \u00e9 {i}"} for i in range(3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def harmless(name, taken):
        pairs = [taken.pair(index) for index in range(len(taken))]
        return all(Path(pair.image).is_file() and all(taken.texts(pair)) for pair in pairs)

    path = folder / "metadata.jsonl"
    return damage(
        text.encode(),
        "bytes",
        seed,
        count,
        path,
        lambda path: open_pairs(str(path.parent), skip_broken=False),
        harmless,
    )


def caption_shards(count: int, seed: int, folder: Path) -> Counter:
    """A tar of pictures with captions. What is inside of its files has no digest."""
    path = caption_places.write_tar(folder / "a.tar", caption_places.shard(0, 3))
    given = path.read_bytes()
    known = {f"{path}: {i:09}" for i in range(3)}

    def read(path):
        places = open_pairs(f"webdataset:{path}", skip_broken=False)
        pairs = [places.pair(index) for index in range(len(places))]
        for pair in pairs:
            pictures.read(places.image(pair), pair.name, "x")
        return {pair.name: places.texts(pair) for pair in pairs}

    def harmless(name, taken):
        return taken.keys() == known and all(text for texts in taken.values() for text in texts)

    return damage(given, "bytes", seed, count, path, read, harmless)


def text_encoders(count: int, seed: int, folder: Path) -> Counter:
    """config.json of CLIP and T5, and the files of their tokenizers."""
    sizes = {"hidden_size": 16, "mlp_hidden_size": 24, "depth": 2, "num_heads": 2, "head_dim": 8}
    counts = Counter()
    for kind in (CLIPText, T5Encoder):
        counts += damage(
            config_of(kind(vocab_size=9, **sizes)), "json", seed, count // 4, folder / "c.json",
            lambda path: network_from_config(read_table(path), path.name),
            lambda name, taken: taken.vocab_size > 0,
        )  # fmt: skip
    pipeline_folder.clip_tokenizer(folder / "clip")
    pipeline_folder.spiece(folder / "t5" / "spiece.model")

    def harmless(name, ids):
        return ids.shape == (1, 8) and ids.dtype == np.int32

    for path in (folder / "clip" / "vocab.json", folder / "t5" / "spiece.model"):
        is_json = path.suffix == ".json"
        given = json.loads(path.read_text()) if is_json else path.read_bytes()
        counts += damage(
            given, "json" if is_json else "bytes", seed, count // 4, path,
            lambda path: tokens.encode_prompts(["a seven"], path.parent, 8), harmless,
        )  # fmt: skip
    return counts


# --- evaluate ------------------------------------------------------------------------------------


def features(count: int, seed: int, folder: Path) -> Counter:
    """An .npz of images, features and statistics."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 4)).astype(np.float32)
    arrays = {
        "arr_0": rng.integers(0, 256, (4, 5, 5, 3), np.uint8),
        "features": rows,
        "mu": rows.mean(0),
        "sigma": np.cov(rows, rowvar=False),
        "count": np.array(6),
    }

    def judge(path):
        found = open_features(str(path))
        images = [] if found.images is None else list(found.images.batches(3, 4))
        return found, images

    def harmless(name, taken):
        found, images = taken
        parts = [*images, found.pool and found.pool.covariance, found.vectors]
        return all(np.isfinite(x).all() for x in parts if x is not None)

    return damage(arrays, "npz", seed, count, folder / "f.npz", judge, harmless)


# Kind -> how often it is tried for every 100 inputs.
KINDS: dict[Kind, int] = {
    run_config: 12, overrides: 12, hyperparameters: 14, weights: 8, pickles: 8, shard_indices: 4,
    autoencoders: 6, run_notes: 5, checkpoints: 2, manifests: 9, shards: 3, image_files: 3,
    captions: 2, caption_shards: 2, text_encoders: 4, features: 6,
}  # fmt: skip


def campaign(kind: Kind, count: int, seed: int, folder: Path) -> Counter:
    """`kind` in a folder of its own, which is removed afterwards."""
    place = folder / kind.__name__
    place.mkdir(parents=True)
    try:
        return kind(count, seed, place)
    finally:
        shutil.rmtree(place)
