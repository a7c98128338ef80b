from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import platform

from moe_diffusion.errors import UserError
from moe_diffusion.progress import Progress
from moe_diffusion.training.logging import MetricWriter
from tests import cli
from tests.full_disk import full_disk


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_scalars_go_to_both_files(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write_scalars(1, {"loss": np.float32(0.5), "grad_norm": float("nan")})
    writer.write_scalars(2, {"loss": 0.25})
    writer.close()
    assert lines(tmp_path) == [
        {"step": 1, "loss": 0.5, "grad_norm": None},
        {"step": 2, "loss": 0.25},
    ]
    assert next(tmp_path.glob("events.out.tfevents.*")).stat().st_size > 0


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write_scalars(1, {"loss": 1.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]
    writer.close()


def test_a_resumed_run_drops_what_it_will_write_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "lo')
    writer = MetricWriter(tmp_path, step=2)
    writer.write_scalars(3, {"loss": 1.0})
    writer.close()
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    assert sorted(p.name for p in tmp_path.iterdir() if "events" not in p.name) == ["metrics.jsonl"]


def test_a_full_disk_keeps_the_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    before = path.read_bytes()
    with full_disk(), pytest.raises(UserError, match="cannot write .*metrics.jsonl"):
        MetricWriter(tmp_path, step=2)
    assert cli.contents(tmp_path) == {"metrics.jsonl": before}
    writer = MetricWriter(tmp_path, step=3)
    with full_disk(), pytest.raises(UserError, match="make room .* run the same command again"):
        writer.write_scalars(4, {"loss": 1.0})
    writer.close()
    assert path.read_bytes().startswith(before)
    MetricWriter(tmp_path, step=3).close()  # what the next run finds
    assert path.read_bytes() == before


def test_a_line_without_its_end_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    MetricWriter(tmp_path, step=2).close()
    assert lines(tmp_path) == [{"step": 1}]


def test_images_numbers_and_hparams(tmp_path):
    writer = MetricWriter(tmp_path)
    images = {"grid": np.zeros((8, 8, 3), np.uint8), "gray": np.zeros((8, 8, 1))}
    writer.write_outputs(1, {**images, "distance": np.float32(0.5)})
    writer.write_setup({"optim": {"learning_rate": 1e-4}}, {})
    writer.close()
    events = next(tmp_path.glob("events.out.tfevents.*")).read_bytes()
    for name in (b"grid", b"gray", b"distance", b"learning_rate"):
        assert name in events
    assert lines(tmp_path) == [{"step": 1, "distance": 0.5}]


def test_parameters_are_listed_with_their_shardings(tmp_path):
    writer = MetricWriter(tmp_path)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data", None))
    shape = jax.ShapeDtypeStruct((16, 4), jnp.bfloat16, sharding=sharding)
    writer.write_setup({}, {"layers": {"kernel": shape}})
    writer.close()
    text = (tmp_path / "parameters.txt").read_text()
    row = next(line for line in text.splitlines() if "layers/kernel" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["layers/kernel", "(16, 4)", "bfloat16", "64", "('data', None)"]
    assert text.endswith("Total: 64 -- 128 bytes\n")


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    for module in ("progress", "training.logging"):
        monkeypatch.setattr(f"moe_diffusion.{module}.is_main_process", lambda: False)
    writer = MetricWriter(tmp_path)
    writer.write_scalars(1, {"loss": 1.0})
    writer.write_setup({"seed": 1}, {"kernel": np.zeros(3)})
    writer.write_outputs(1, {"grid": np.zeros((8, 8, 3), np.uint8)})
    writer.close()
    progress = Progress(0, 2, batch_size=4)
    progress.update(1)
    progress.report(1, {"loss": 0.5})
    progress.write("note")
    progress.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_without_a_terminal_progress_prints_lines(capsys, monkeypatch):
    told = []
    monkeypatch.setattr(platform.work_unit(), "set_task_status", told.append)
    progress = Progress(10, 30, batch_size=4)
    progress.update(11)
    assert np.isnan(
        progress.report(11, {"loss": 1.0})["images_per_sec"]
    )  # the time of the first step is compilation
    with progress.paused():
        time.sleep(0.3)
    time.sleep(0.1)
    progress.update(21)
    rate = progress.report(21, {"loss": 0.5})["images_per_sec"]
    assert rate == pytest.approx(400, rel=0.3)  # 10 steps of 4 images in 0.1 s
    progress.write("note")
    progress.close()
    first, second, third = capsys.readouterr().out.splitlines()
    assert told == [first, second]  # a launcher's status of this process
    assert first == "step 11/30: loss 1"
    assert second.startswith("step 21/30: loss 0.5, ") and second.endswith("images/s, 00:00 left")
    assert third == "note"


def reports(monkeypatch, capsys, moments):
    """What Progress prints for 4 steps of 8 images, of ("update" or "report", seconds, ...)."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    progress = Progress(0, 4, batch_size=8)
    rates = []
    for name, clock[0], *args in moments:
        if name == "update":
            progress.update(*args)
        else:
            rates.append(progress.report(*args, {"loss": 1.0})["images_per_sec"])
    progress.close()
    return rates, capsys.readouterr().out.splitlines()


def test_rates_count_the_steps_that_have_ended(monkeypatch, capsys):
    """By hand. The device computes when a step is started, as a CPU does: at each report the next
    step has ended, too, and at the last report none has since the one before. Steps take 2 s."""
    moments = [
        ("update", 4.0, 1, 2), ("report", 4.0, 1),
        ("update", 6.0, 2, 3), ("report", 6.0, 2),  # 1 step in 2 s
        ("update", 8.0, 3, 4), ("report", 8.0, 3),
        ("update", 8.001, 4), ("report", 8.001, 4),  # 8 images in 1 ms it would have been
    ]  # fmt: skip
    rates, lines = reports(monkeypatch, capsys, moments)
    np.testing.assert_equal(rates, [np.nan, 4.0, 4.0, np.nan])
    assert lines == [
        "step 1/4: loss 1",
        "step 2/4: loss 1, 4 images/s, 00:04 left",
        "step 3/4: loss 1, 4 images/s, 00:02 left",
        "step 4/4: loss 1",
    ]


def test_rates_where_the_device_computes_on_its_own(monkeypatch, capsys):
    """By hand: no later step has ended at a report, and the last one is like all others."""
    moments = [("update", 10.0, 1), ("update", 12.0, 2), ("report", 12.0, 2)]
    moments += [("update", 14.0, 3), ("update", 17.0, 4), ("report", 17.0, 4)]
    rates, lines = reports(monkeypatch, capsys, moments)
    assert rates == [4.0, 3.2]  # 8 images in 2 s; 16 in 5 s
    assert lines[0] == "step 2/4: loss 1, 4 images/s, 00:04 left"
    assert lines[1] == "step 4/4: loss 1, 3.2 images/s"


def test_on_a_terminal_progress_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(0, 4, batch_size=4)
    for step in (1, 2, 3, 4):
        progress.update(step)
    progress.report(4, {"loss": 0.5})
    progress.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "4/4" in shown.err and "loss 0.5" in shown.err


def test_an_output_on_a_full_disk_does_not_end_training(tmp_path, monkeypatch):
    """`train > log` where the disk has no room; when it has some again, so has the log."""
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr("sys.stdout", log)
        progress = Progress(0, 4, 2)
        progress.write("begin")
        with full_disk(room=6):
            progress.write("lost or late")
            progress.update(1)
            progress.report(1, {"loss": 0.5})
        progress.write("end")
        progress.close()
    text = (tmp_path / "log").read_text()
    assert text.startswith("begin\n") and text.endswith("end\n")


def test_lines_without_a_step_are_dropped_on_resuming(tmp_path, caplog):
    """What a killed process or a hand left there."""
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 5)]
    odd = [
        '{"step": null}',
        '{"step": NaN}',
        '{"step": "2"}',
        "[1]",
        "null",
        '{"step": 1',
        "[" * 9999,
    ]
    odd += ['{"step": 1e999}', '{"step": [1]}', '{"loss": 1}', '{"step": true}', "\udcff"]
    lines = [good[0], *odd, good[1], json.dumps({"step": 6, "loss": 1.0})]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
    with caplog.at_level("WARNING"):
        MetricWriter(tmp_path, step=5).close()
    assert path.read_text().splitlines() == good
    assert caplog.messages == [f"{path}: {len(odd)} damaged lines are left out"]


@pytest.mark.parametrize(
    ("steps", "step", "missing"),
    [
        ([10, 20, 30], 35, None),
        ([10, 20, 30], 40, None),  # the line may come after the checkpoint
        ([10, 20], 35, "21 to 35"),
        ([1, 2, 3], 5, "4 to 5"),
        ([50], 90, None),
        ([], 90, None),  # with train.log_every=100 there is none
    ],
)
def test_a_log_without_its_end_is_told(tmp_path, caplog, steps, step, missing):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}}}\n' for n in steps) + '{"st')
    with caplog.at_level("WARNING"):
        MetricWriter(tmp_path, step).close()
    assert [line["step"] for line in lines(tmp_path)] == steps
    assert caplog.messages == ([f"{path}: has no line of steps {missing}"] if missing else [])
