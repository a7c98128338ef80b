"""Measuring one thing after another, and tables and files of the results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from tqdm import tqdm

from moe_diffusion.benchmarks.dispatch import SHAPES, bench_dispatch
from moe_diffusion.benchmarks.steps import bench_sample, bench_train
from moe_diffusion.benchmarks.torch_layer import torch_seconds
from moe_diffusion.errors import first_line
from moe_diffusion.writing import save_text

Result = dict[str, Any]


def measured(
    what: str, cases: Iterable, measure: Callable[[Any], Result], keep_going: bool = False
) -> Iterator[Result]:
    """measure(case) for every case under a progress bar; keep_going: or the `error` it raised."""
    for case in tqdm(list(cases), desc=what, unit="case", disable=None):
        try:
            result = measure(case)
        except Exception as error:  # whatever it is: the next case may be fine
            if not keep_going:
                raise
            result = {"case": str(case), "error": first_line(error)}
        yield {"what": what} | result


def suite(repeats: int) -> Iterator[Result]:
    """What docs/benchmarks reports: on CPU in f32 up to H = 2,048, on accelerators all in bf16.

    What matters most comes first. A measurement that fails becomes a result with an `error`, and
    the others go on.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype, tokens = ("float32", 4096) if on_cpu else ("bfloat16", 16384)
    shapes = [shape for shape in SHAPES if not on_cpu or shape[1] <= 2048]
    options = {"tokens": tokens, "dtype": dtype, "repeats": repeats, "compare": not on_cpu}
    rho = partial(bench_dispatch, **options)
    measure = partial(_beside_torch, partial(rho, routing="uniform"), tokens, dtype, repeats)
    yield from measured("dispatch", shapes, measure, keep_going=True)
    if on_cpu:
        steps = {"configs/dsmoe_s.py": 8}
    else:
        steps = {"configs/dsmoe_l.py": 64, "configs/diffmoe_l.py": 64, "configs/dit_xl.py": 64}
    few = max(3, repeats // 3)
    for spec, batch in steps.items():
        overrides = [f"data.batch_size={batch}"]
        if not on_cpu:
            overrides.append("model.dtype=bfloat16")
        run = partial(bench_train, overrides=overrides, repeats=few)
        yield from measured("train", [spec], run, keep_going=True)
        run = partial(bench_sample, overrides=[*overrides, "sampling.steps=4"], repeats=few)
        yield from measured("sample", [spec], run, keep_going=True)
    yield from measured("dispatch", shapes, partial(rho, routing="zipf"), keep_going=True)


def _beside_torch(measure, tokens, dtype, repeats, shape) -> Result:
    """With how many times as long plain PyTorch takes, where it is installed."""
    result = measure(shape)
    try:
        theirs = torch_seconds(shape, tokens, dtype, repeats) or {}
    except Exception as error:  # of any kind, as of the rivals in JAX: ours is measured
        return result | {"failed_torch": first_line(error)}
    return result | {f"times_{k}": s / result["seconds_fwd_bwd"] for k, s in theirs.items()}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One table for each kind of measurement, a line for each result."""
    blocks = []
    for what in dict.fromkeys(result["what"] for result in results):
        chosen = [result for result in results if result["what"] == what]
        names = list(dict.fromkeys(name for r in chosen for name in r if name != "what"))
        lines = [[what, *names]]
        for result in chosen:
            lines.append(["", *(_text(result.get(name, "")) for name in names)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        blocks += [
            "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
        ]
    return "\n".join(blocks)


def write(path: str | os.PathLike, found: Mapping[str, Any], results: Sequence[Result]) -> None:
    """{"environment", "results"} as JSON, whole or not at all."""
    text = json.dumps({"environment": dict(found), "results": results}, indent=1)
    save_text(text + "\n", path)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
