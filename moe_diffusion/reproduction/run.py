"""Makes a table or figure: trains and judges what is missing, then writes what came out."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from moe_diffusion import config as configs
from moe_diffusion.errors import UserError
from moe_diffusion.figures.curves import comparison_picture, read_losses
from moe_diffusion.figures.images import save_png
from moe_diffusion.figures.parameters import parameters_picture
from moe_diffusion.parallel.distributed import is_main_process
from moe_diffusion.reading import Key, lines, read_table, table_of
from moe_diffusion.reproduction import tables
from moe_diffusion.reproduction.commands import Options, Step, judging, training, workdir
from moe_diffusion.reproduction.items import Item
from moe_diffusion.training.checkpoint import saved_steps
from moe_diffusion.writing import save_text

Results = dict[str, list[dict[str, Any]]]  # command line -> what `evaluate` wrote for it


def make(item: Item, options: Options) -> dict[str, Any]:
    """Runs the steps that have not been run, and writes table, curves and results.

    A training that was stopped goes on where it was; an evaluation that is in `results.json` is not
    repeated. So the same command again completes what is missing.

    Returns:
      {"name", "files": paths of what was written}.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    if item.counts:
        return _written(item, options, tables.counted(item))
    steps = training(item, options) + judging(item, options)
    kept = options.out / "results.json"
    results: Results = _read_results(kept) if kept.exists() else {}
    for number, step in enumerate(steps, 1):
        if is_main_process():
            print(f"[{number}/{len(steps)}] $ {step}", flush=True)
        if step.argv[0] == "train":
            _train(step)
        elif step.argv[0] != "evaluate":
            _call(step)
        elif str(step) not in results:
            results[str(step)] = _evaluate(step)
            save_text(json.dumps(results, indent=1), kept)
    if "fid" in item.curves:
        _judge_all_steps(item, options, results, kept)
    return _written(item, options, tables.compared(item, options, results), results)


def _call(step: Step) -> None:
    importlib.import_module(f"moe_diffusion.{step.argv[0]}").main(list(step.argv[1:]))


def _train(step: Step) -> None:
    """Trains unless the last step is saved."""
    folder = Path(step.argv[step.argv.index("--workdir") + 1])
    overrides = [text for text in step.argv if text.startswith(("--config.", "--noconfig."))]
    wanted = configs.load(step.row.config, overrides).train.num_steps
    if wanted not in saved_steps(folder):
        _call(step)


def _evaluate(step: Step) -> list[dict[str, Any]]:
    """Runs `evaluate`; returns the lines that it added to the run's evaluations.jsonl."""
    log = Path(step.argv[step.argv.index("--workdir") + 1]) / "evaluations.jsonl"
    before = sum(1 for _ in lines(log)) if log.exists() else 0
    _call(step)
    found = [table_of(line) for number, line in lines(log) if number > before]
    if None in found:
        raise UserError(f"{log} has a line that is no JSON object: delete that line")
    return found


def _read_results(path: Path) -> Results:
    """The results that are there. Raises UserError if the file holds something else."""
    results = read_table(path, "delete it, and what it holds is measured again")
    for name, found in results.items():
        judged = Key((list,), least=1, items=Key((dict,)))
        judged.check(found, f"{path}: {name}", "delete it, and what it holds is measured again")
    return results


def _judge_all_steps(item: Item, options: Options, results: Results, kept: Path) -> None:
    """Evaluates every checkpoint that the runs keep, for the curves of FID over steps."""
    for step in judging(item, options):
        for number in saved_steps(workdir(step.row, options))[:-1]:  # the newest is judged already
            one = Step((*step.argv, "--step", str(number)), step.row)
            if str(one) not in results:
                results[str(one)] = _evaluate(one)
                save_text(json.dumps(results, indent=1), kept)


def _written(
    item: Item, options: Options, table: str, results: Results | None = None
) -> dict[str, Any]:
    files = []
    if not is_main_process():
        return {"name": item.name, "files": files}
    if table:
        files.append(save_text(table, options.out / "table.md"))
        print(table)
    if item.bars:
        picture = parameters_picture(tables.counts(item), item.title)
        files.append(save_png(picture, options.out / "parameters.png"))
    if "loss" in item.curves:
        files.append(_draw(item, _losses(item, options), "loss", options.out / "loss.png"))
    if "fid" in item.curves:
        curves = {row.label: _fids(row.label, item, options, results) for row in item.rows}
        files.append(_draw(item, curves, "FID", options.out / "fid.png"))
    return {"name": item.name, "files": [str(path) for path in files]}


def _losses(item: Item, options: Options) -> dict[str, dict[int, float]]:
    """Label of a row, or name of its group -> step -> loss; that of a group is the mean."""
    runs: dict[str, list[dict[int, float]]] = {}
    for row in item.rows:
        losses = read_losses(workdir(row, options) / "metrics.jsonl")
        runs.setdefault(row.group or row.label, []).append(losses)
    return {
        name: {step: fmean(one[step] for one in found) for step in found[0]}
        for name, found in runs.items()
    }


def _fids(label: str, item: Item, options: Options, results: Results) -> dict[int, float]:
    """Step -> FID of a row; the first guidance scale of its protocol counts."""
    (step,) = (step for step in judging(item, options) if step.row.label == label)
    found = [lines[0] for text, lines in results.items() if text.startswith(str(step))]
    return {line["step"]: line["metrics"]["fid"] for line in found}


def _draw(item: Item, curves: Mapping[str, Mapping[int, float]], name: str, path: Path) -> Path:
    return save_png(comparison_picture(curves, name, item.title), path)
