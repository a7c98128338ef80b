"""A FLUX.1 [dev] of random numbers, written as it is published, imported and exported again.

    python -m tests.interop.full_size --family flux --folder /tmp --report flux_import.json

The tensors are listed here and not taken from `interop`, so that names and shapes are checked, too.
48 GB of disk are needed; memory is that of the child that converts, as the kernel counts it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from moe_diffusion.interop.files import safetensors_writer
from moe_diffusion.interop.tensors import Spec

NAME = "diffusion_pytorch_model"


class Sizes(NamedTuple):
    """Of a FLUX.1 with heads of 128 channels; by default those of [dev]."""

    width: int = 3072
    double: int = 19
    single: int = 38
    text: int = 4096
    pooled: int = 768
    shard_bytes: int = 10 * 10**9


def _layer(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def native(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of flux1-dev.safetensors (flux/model.py)."""
    w, shapes = s.width, {}
    shapes |= _layer("img_in", w, 64) | _layer("txt_in", w, s.text)
    for name, size in (("time_in", 256), ("vector_in", s.pooled), ("guidance_in", 256)):
        shapes |= _layer(f"{name}.in_layer", w, size) | _layer(f"{name}.out_layer", w, w)
    for i in range(s.double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= _layer(f"{block}_mod.lin", 6 * w, w) | _layer(f"{block}_attn.qkv", 3 * w, w)
            shapes |= {f"{block}_attn.norm.{x}_norm.scale": (128,) for x in ("query", "key")}
            shapes |= _layer(f"{block}_attn.proj", w, w)
            shapes |= _layer(f"{block}_mlp.0", 4 * w, w) | _layer(f"{block}_mlp.2", w, 4 * w)
    for i in range(s.single):
        block = f"single_blocks.{i}"
        shapes |= _layer(f"{block}.linear1", 7 * w, w) | _layer(f"{block}.linear2", w, 5 * w)
        shapes |= {f"{block}.norm.{x}_norm.scale": (128,) for x in ("query", "key")}
        shapes |= _layer(f"{block}.modulation.lin", 3 * w, w)
    shapes |= _layer("final_layer.linear", 64, w)
    return shapes | _layer("final_layer.adaLN_modulation.1", 2 * w, w)


def diffusers(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of FLUX.1-dev/transformer (FluxTransformer2DModel)."""
    w, shapes = s.width, {}
    shapes |= _layer("x_embedder", w, 64) | _layer("context_embedder", w, s.text)
    for name, size in (("timestep", 256), ("text", s.pooled), ("guidance", 256)):
        embedder = f"time_text_embed.{name}_embedder"
        shapes |= _layer(f"{embedder}.linear_1", w, size) | _layer(f"{embedder}.linear_2", w, w)
    for i in range(s.double):
        block = f"transformer_blocks.{i}"
        for norm, ff in (("norm1", "ff"), ("norm1_context", "ff_context")):
            shapes |= _layer(f"{block}.{norm}.linear", 6 * w, w)
            shapes |= _layer(f"{block}.{ff}.net.0.proj", 4 * w, w)
            shapes |= _layer(f"{block}.{ff}.net.2", w, 4 * w)
        heads = [f"to_{x}" for x in "qkv"] + [f"add_{x}_proj" for x in "qkv"]
        for name in (*heads, "to_out.0", "to_add_out"):
            shapes |= _layer(f"{block}.attn.{name}", w, w)
        norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
        shapes |= {f"{block}.attn.{name}.weight": (128,) for name in norms}
    for i in range(s.single):
        block = f"single_transformer_blocks.{i}"
        shapes |= _layer(f"{block}.norm.linear", 3 * w, w) | _layer(f"{block}.proj_mlp", 4 * w, w)
        shapes |= _layer(f"{block}.proj_out", w, 5 * w)
        for name in "qkv":
            shapes |= _layer(f"{block}.attn.to_{name}", w, w)
        shapes |= {f"{block}.attn.norm_{x}.weight": (128,) for x in "qk"}
    return shapes | _layer("norm_out.linear", 2 * w, w) | _layer("proj_out", 64, w)


LAYOUTS = {"flux": native, "flux_diffusers": diffusers}


def in_a_child(*args: Any) -> dict[str, float]:
    """Runs `convert`: its seconds and the most memory that it had resident, in bytes."""
    command = [sys.executable, "-m", "moe_diffusion.convert", *map(str, args)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        told = child.stderr.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(told[-2000:])
    return {"seconds": round(time.perf_counter() - start), "peak_bytes": usage.ru_maxrss * 1024}


def round_trip(
    family: str, folder: Path, sizes: Sizes, convert: Callable[..., Any] = in_a_child
) -> dict[str, Any]:
    """Writes, imports, deletes the source, exports, compares every tensor's bytes.

    Args:
      convert: runs the command `convert` and tells what it took.

    Returns:
      what was measured. `mismatches` has the names of tensors that came back with other bytes.
    """
    shapes = LAYOUTS[family](sizes)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    needed, free = 2 * 2 * parameters, shutil.disk_usage(folder).free
    if free < 1.02 * needed:
        raise RuntimeError(f"{folder} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
    source, workdir, exported = folder / "source", folder / "run", folder / "back.safetensors"
    start = time.perf_counter()
    hashes = write_random(source, shapes, sizes.shard_bytes)
    seconds = time.perf_counter() - start
    came = convert("--family", family, "--input", source, "--output", workdir)
    shutil.rmtree(source)
    gone = convert("--export", "--family", family, "--input", workdir, "--output", exported)
    shutil.rmtree(workdir)
    found = dict(hashes_of(exported))
    exported.unlink()
    return {
        "family": family,
        "parameters": parameters,
        "tensors": len(shapes),
        "bytes": 2 * parameters,
        "write_seconds": round(seconds),
        "import": came,
        "export": gone,
        "mismatches": sorted({name for name, _ in hashes.items() ^ found.items()}),
    }


def write_random(folder: Path, shapes: Mapping[str, tuple[int, ...]], shard: int) -> dict[str, str]:
    """Writes random bf16 tensors in shards with an index; name -> hash of the bytes."""
    shards, size = [[]], 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if size + nbytes > shard and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    folder.mkdir(parents=True)
    rng, hashes, places = np.random.Generator(np.random.SFC64(0)), {}, {}
    for number, names in enumerate(shards, 1):
        path = folder / f"{NAME}-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = {name: Spec(shapes[name], np.dtype(ml_dtypes.bfloat16)) for name in names}
        with safetensors_writer(path, specs) as write:
            for name in names:
                bits = np.frombuffer(rng.bytes(2 * math.prod(shapes[name])), np.uint16)
                bits = bits & 0xBFFF  # below 2, so neither infinite nor no number
                hashes[name] = hashlib.sha256(bits).hexdigest()
                write(name, bits.view(ml_dtypes.bfloat16).reshape(shapes[name]))
                places[name] = path.name
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{NAME}.safetensors.index.json").write_text(json.dumps(index))
    return hashes


def hashes_of(path: Path) -> Iterator[tuple[str, str]]:
    """Name and hash of the bytes of every tensor of a .safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.tell()
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                file.seek(data + begin)
                yield name, hashlib.sha256(file.read(end - begin)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=LAYOUTS, default="flux")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the 48 GB are")
    parser.add_argument("--report", help=".json to which the measurements are added")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = round_trip(args.family, Path(folder), Sizes())
    print(json.dumps(found, indent=2))
    if args.report:
        report = Path(args.report)
        known = json.loads(report.read_text()) if report.exists() else {}
        known[args.family] = found | {"cores": os.cpu_count(), "jax": jax.__version__}
        report.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
