"""What a run measures of itself: step times, heartbeat, summary, the loss by time, and traces."""

from __future__ import annotations

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_diffusion import config as configs
from moe_diffusion import heartbeat, progress, time_buckets
from moe_diffusion.chips import CHIPS
from moe_diffusion.errors import UserError
from moe_diffusion.metric_lines import of_machine
from moe_diffusion.profiling import Profiled, steps_of
from moe_diffusion.progress import Progress
from moe_diffusion.step_times import StepTimes, summary
from tests import cli
from tests.full_disk import full_disk


def test_ranks_by_hand():
    """Of 1 to 10 s, nearest rank: the 5th, the 9th and the last; a step waits 0.2 s on average."""
    found = summary([10, 1, 9, 2, 8, 3, 7, 4, 6, 5], [0.1, 0.3])
    wanted = {"step_ms_median": 5000, "step_ms_p90": 9000, "step_ms_max": 10000}
    assert found == wanted | {"input_wait_ms": pytest.approx(200)}
    assert summary([0.25], [])["step_ms_p90"] == 250
    assert all(np.isnan(value) for value in summary([], []).values())


def test_steps_that_are_seen_together_share_their_time():
    """By hand: the clock starts at step 2 at 10 s; step 3 takes 2 s; 4 and 5 take 6 s together, of
    which 1 s was a pause; nothing ends at the look at 20 s; step 6 ends at 21 s, after 3 s."""
    times = StepTimes()
    times.ended(2, 10.0)
    times.ended(3, 12.0)
    times.pause(1.0)
    times.ended(5, 18.0)
    times.ended(5, 20.0)
    first = times.lately()
    assert (first["step_ms_median"], first["step_ms_max"]) == (2500, 2500)
    times.ended(6, 21.0)
    assert times.lately()["step_ms_median"] == 3000
    assert times.overall()["step_ms_max"] == 3000 and times.mean_ms() == 2500


def test_errors_by_time_of_micro_batches():
    """Means of sums and counts: a bucket that one micro-batch lacks is that of the other."""
    both = [
        time_buckets.averages(jnp.array(t), {"a": jnp.array(a), "b": jnp.zeros(2)})
        for t, a in (([0.1, 0.05], [1.0, 3.0]), ([0.0, 1.0], [5.0, 7.0]))
    ]
    assert [float(means["a"]) for means, _ in both] == [2.0, 6.0]
    table = jax.tree.map(lambda *x: sum(x) / 2, *(by_time for _, by_time in both))
    found = time_buckets.spread({"loss": 4.0, **table})
    assert found.pop("loss") == 4.0
    np.testing.assert_equal(list(found.values()), [3.0, np.nan, np.nan, np.nan, 7.0])


def test_a_sample_that_is_not_finite_spoils_its_bucket_alone():
    _, table = time_buckets.averages(jnp.array([0.1, 0.9]), {"a": jnp.array([jnp.nan, 2.0])})
    found = list(time_buckets.spread(table).values())
    np.testing.assert_equal(found, [np.nan, np.nan, np.nan, np.nan, 2.0])


def trained(workdir, monkeypatch, chip="TPU v5 lite", flops=1e9, device_count=4):
    """A Progress after 4 steps of 8 images, a second each, on a clock of our own."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    device = type("Device", (), {"device_kind": chip, "memory_stats": lambda _: MEMORY})()
    monkeypatch.setattr(progress.jax, "devices", lambda: [device])
    monkeypatch.setattr(progress.jax, "local_devices", lambda: [device])
    monkeypatch.setattr(progress.jax, "device_count", lambda: device_count)
    told = Progress(0, 4, 8, workdir, flops)
    with told.compiling():
        clock[0] += 7
    for step in range(1, 5):
        clock[0] += 1
        told.update(step)
    clock[0] += 0.5
    assert told.next_of(iter("a")) == "a"
    line = told.report(4, {"balance": np.float32(3), "loss": np.float32(0.5)})
    return told, line


MEMORY = {"peak_bytes_in_use": 3_000_000_000}


def test_what_a_report_measures(tmp_path, monkeypatch):
    """By hand: 24 images in 3.5 s; 1e9 FLOPs each, of 4 chips with 197e12 FLOP/s."""
    told, line = trained(tmp_path, monkeypatch)
    assert list(line)[:2] == ["loss", "balance"]
    rate = 24 / 3.5
    wanted = {"step_ms_median": 1e3, "step_ms_p90": 1e3, "step_ms_max": 1e3, "input_wait_ms": 0}
    wanted |= {"tflops": rate / 1e3, "mfu": rate * 1e9 / (4 * 197e12), "memory_gb": 3}
    measured = {name: value for name, value in line.items() if of_machine(name)}
    expected = {f"machine/{name}": value for name, value in wanted.items()}
    assert measured == pytest.approx({"images_per_sec": rate} | expected)
    told.close()


def test_two_devices_of_a_chip_share_its_peak(tmp_path, monkeypatch):
    assert CHIPS["tpu7x"].devices == 2
    told, line = trained(None, monkeypatch, "TPU7x", device_count=8)
    assert line["machine/mfu"] == pytest.approx(24 / 3.5 * 1e9 / (4 * 2307e12))
    told.close()
    told, line = trained(None, monkeypatch, "cpu")
    assert "machine/mfu" not in line and line["machine/tflops"] > 0
    told.close()


def test_a_run_leaves_a_summary_and_a_last_heartbeat(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch)[0].close()
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["num_steps"], beat["phase"]) == (4, 4, "finished")
    assert beat["loss"] == 0.5 and beat["processes"] == 1 and abs(beat["time"] - time.time()) < 60
    found = heartbeat.read_summary(tmp_path)
    assert (found["step"], found["phase"], found["compile_seconds"]) == (4, "finished", 7)
    assert found["images_per_sec"] == found["images_per_sec_per_host"] == 8
    assert found["last"] == {"step": 4, "loss": 0.5, "balance": 3}
    assert dict(heartbeat.told(found)) == {
        "speed": "8 images/s, 0.0% of the peak (MFU), 0.008 TFLOP/s",
        "steps": "1,000 ms at the median, 1,000 at 90%, 1,000 at most, 0 of them for input",
        "memory": "3 GB at most (device)",
    }


def test_the_page_has_every_field(tmp_path, monkeypatch):
    """docs/observability.md names what the two files and a report have."""
    told, line = trained(tmp_path, monkeypatch)
    told.close()
    page = (cli.ROOT / "docs" / "observability.md").read_text()
    ranks = {"machine/step_ms_p90", "machine/step_ms_max"}  # written as `_p90`, `_max`
    names = {name for name in line if of_machine(name)} - ranks
    for file in ("heartbeat.json", "summary.json"):
        names |= set(json.loads((tmp_path / file).read_text()))
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_a_heartbeat_is_heard_now_and_then(tmp_path, monkeypatch):
    clock, path = [0.0], tmp_path / "heartbeat.json"
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    heart = heartbeat.Heartbeat(tmp_path)

    def heard(seconds, **values):
        clock[0] = seconds
        path.unlink(missing_ok=True)
        heart.beat(**values)
        return path.exists()

    assert heard(0.0, step=1, phase="training")
    assert not heard(4.9, step=2) and heard(5.0, step=3)
    assert not heard(5.5, phase="saving") and not heard(5.9, phase="training")
    assert heard(6.1, phase="saving")  # a new phase after a second
    assert json.loads(path.read_text())["step"] == 3


def test_a_full_disk_silences_a_heartbeat_and_no_more(tmp_path, capfd):
    with full_disk(room=5):
        heartbeat.Heartbeat(tmp_path).beat(step=1)
    assert capfd.readouterr().err == "" and list(tmp_path.iterdir()) == []
    assert heartbeat.read_summary(tmp_path) is None
    (tmp_path / "summary.json").write_text("[")
    assert heartbeat.read_summary(tmp_path) is None


@pytest.mark.parametrize("text", ["5", "5:", "0:3", "7:5", "1:1001", "a:b", "1:2:3", "-1:2"])
def test_what_is_no_range_of_steps(text):
    with pytest.raises(UserError, match="is no range of steps from 1 on, like 100:105, of at most"):
        configs.load("digits", [f"profile={text}"])


def test_some_steps_are_traced(tmp_path, monkeypatch):
    """Begins before step 12, ends when step 13 has; what is done before step 11 is not traced."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    for steps, wanted in (
        ("12:13", [11, "begin", 12, 13, "stop", 14]),
        ("5:12", ["begin", 11, 12, "stop", 13, 14]),
        ("14:20", [11, 12, 13, "begin", 14, "stop"]),  # the run ends before
        ("3:8", [11, 12, 13, 14]),
        ("", [11, 12, 13, 14]),
    ):
        calls.clear()
        step = Profiled(lambda n: calls.append(n) or n, 10, steps, tmp_path)
        assert [step(n) for n in range(11, 15)] == [11, 12, 13, 14]
        step.close()
        step.close()
        begun = [str(tmp_path / "profile") if call == "begin" else call for call in wanted]
        assert calls == begun
    assert steps_of("3:4") == (3, 4) and steps_of("") is None


@pytest.mark.slow
def test_a_trace_lies_in_the_workdir(tmp_path):
    step = Profiled(jax.jit(lambda x: x + 1), 0, "2:3", tmp_path)
    for _ in range(4):
        step(jnp.ones(3))
    step.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
