"""The log of a run, its speed, and the lines on the terminal."""

import errno
import json
import math
import os
import pathlib
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_flax.errors import NumericsError, StorageError
from gpt2_flax.model.gpt2 import FlaxGPT2LMHeadModule
from gpt2_flax.reporting import metrics, trackers
from gpt2_flax.reporting.metrics import NOTHING_BEFORE, Meter, Progress, RunLog, read_log
from tests import measure

# ---------------------------------------------------------------- floating-point operations


def test_flops_of_gpt2_124m_are_nanogpt_s():
    # nanoGPT prints 123.59M parameters without positions; biases and LayerNorms are 0.06M.
    n_params = 12 * 12 * 768**2 + 50257 * 768
    assert n_params == 123_532_032
    assert metrics.flops_per_token(12, 768, 50257, 1024) == 6 * n_params + 12 * 12 * 768 * 1024


def test_flops_count_the_matrices_of_the_model(tiny_config):
    config = tiny_config(n_layer=4)
    ids = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(FlaxGPT2LMHeadModule(config).init, jax.random.key(0), ids)["params"]
    sizes = [leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    matrices = sum(sizes) - params["transformer"]["wpe"]["embedding"].size
    # T = 0 leaves out attention over the context.
    flops = metrics.flops_per_token(4, config.n_embd, config.vocab_size, 0)
    assert flops == 6 * matrices
    with_context = metrics.flops_per_token(4, config.n_embd, config.vocab_size, 5)
    assert with_context - flops == 12 * 4 * config.n_embd * 5


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989.4e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_is_that_of_the_device_or_none(kind, peak):
    assert metrics.peak_flops(kind) == peak


# ---------------------------------------------------------------- metrics.jsonl


class Reports(trackers.Nobody):
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def scalars(self, step, values):
        self.told.append((step, values))


def open_log(folder, reporter=None):
    return RunLog(folder, reporter or trackers.Nobody())


def test_rows_are_read_as_they_were_written(tmp_path):
    log = open_log(tmp_path)
    assert read_log(log.path) == []
    rows = [{"step": 1, "mfu": None, "train_loss": 0.1 + 0.2}, {"step": 2, "validation_loss": 3.0}]
    for row in rows:
        log.write(row)
        # On disk at once: a kill loses nothing that was logged.
        assert json.loads(log.path.read_text().splitlines()[-1]) == row
    assert read_log(log.path) == rows


@pytest.mark.parametrize("torn", ["", '{"step": 4, "tra', "4", "null", '{"st', "\xff\x00", "{}"])
def test_a_resumed_run_drops_later_rows_and_a_torn_one(torn, tmp_path):
    log = open_log(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step})
    with open(log.path, "a", encoding="latin-1") as file:
        file.write(torn)
    log.forget_after(2)
    for step in (3, 4):
        log.write({"step": step})
    assert log.path.read_text() == "".join(f'{{"step": {n}}}\n' for n in (1, 2, 3, 4))
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_rows_behind_a_torn_one_are_read(tmp_path):
    (tmp_path / "log").write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    assert [row["step"] for row in read_log(tmp_path / "log")] == [1, 2]


def test_a_row_that_only_lacks_its_line_end_is_whole(tmp_path):
    log = open_log(tmp_path)
    log.path.write_text('{"step": 1}\n{"step": 2}')
    log.forget_after(2)
    assert log.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_new_run_has_nothing_to_forget(tmp_path):
    open_log(tmp_path).forget_after(0)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("taken", "act"),
    [
        ("metrics.jsonl", lambda log: log.write({})),
        ("metrics.tmp", lambda log: log.forget_after(1)),
    ],
)
def test_a_file_system_that_refuses_is_a_storage_error(taken, act, tmp_path):
    log = open_log(tmp_path)
    log.path.touch()
    (tmp_path / taken).unlink(missing_ok=True)
    (tmp_path / taken).mkdir()
    with pytest.raises(
        StorageError, match=r"cannot write .*: Is a directory\n  .* GB are .*; make room"
    ):
        act(log)


def test_a_row_of_a_step_that_is_there_is_added_to_it_and_only_that_is_reported(tmp_path):
    log = open_log(tmp_path, Reports())
    log.write({"step": 2, "tokens": 20, "train_loss": 3.0})
    log.merge({"step": 2, "tokens": 20, "validation_loss": 2.5})
    log.merge({"step": 3, "tokens": 30, "validation_loss": 2.0})
    assert read_log(log.path) == [
        {"step": 2, "tokens": 20, "train_loss": 3.0, "validation_loss": 2.5},
        {"step": 3, "tokens": 30, "validation_loss": 2.0},
    ]
    assert log.reporter.told == [
        (2, {"tokens": 20, "train_loss": 3.0}),
        (2, {"validation_loss": 2.5}),
        (3, {"tokens": 30, "validation_loss": 2.0}),
    ]


def test_a_row_is_not_lost_where_it_cannot_be_added_to(tmp_path, monkeypatch):
    log = open_log(tmp_path)
    log.write({"step": 2, "train_loss": 3.0})

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StorageError, match="No space left on device"):
            log.merge({"step": 2, "validation_loss": 2.5})
    assert read_log(log.path) == [{"step": 2, "train_loss": 3.0}]
    assert list(tmp_path.iterdir()) == [log.path]


# ---------------------------------------------------------------- memory


def with_stats(monkeypatch, *stats):
    devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    monkeypatch.setattr(metrics.jax, "local_devices", lambda: devices)


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    with_stats(monkeypatch, {"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}, {})
    assert metrics.peak_memory() == {"device_peak_memory_bytes": 7}


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 3}])
def test_memory_is_that_of_the_process_where_no_device_counts_it(stats, monkeypatch):
    with_stats(monkeypatch, stats)
    before = metrics.peak_memory()["process_peak_memory_bytes"]
    # What the process has now may be far below its peak: more than is missing to that.
    missing = before - resident_bytes()
    block = np.ones((missing + 2**27) // 8)
    after = metrics.peak_memory()["process_peak_memory_bytes"]
    assert before > 2**26  # Python and JAX alone
    assert before + 2**26 < after < before + 2**28
    del block


def resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- Meter


class Device:
    """A device and a host with clocks of their own, in place of JAX's and the system's.

    Steps are queued, as JAX queues them: only who waits for a value waits for the device.
    """

    def __init__(self, monkeypatch, step_seconds, dispatch_seconds):
        self.step_seconds, self.dispatch_seconds = step_seconds, dispatch_seconds
        self.clocks = threading.local()  # a thread that waits doesn't hold up another
        self.free_at = 0.0
        monkeypatch.setattr(metrics.time, "perf_counter", self.now)
        monkeypatch.setattr(metrics.jax, "block_until_ready", self.wait)
        monkeypatch.setattr(metrics.jax, "device_get", lambda x: self.wait(x) and plain(x))

    def now(self):
        return getattr(self.clocks, "now", 0.0)

    def spend(self, seconds):
        self.clocks.now = self.now() + seconds

    def wait(self, tree):
        ready = [leaf.ready for leaf in jax.tree.leaves(tree) if isinstance(leaf, Value)]
        self.clocks.now = max([self.now(), *ready])
        return True

    def step(self, loss_sum=30.0, tokens=10.0, grad_norm=1.0):
        """The values of one more step, which the device comes to by and by."""
        self.spend(self.dispatch_seconds)
        self.free_at = max(self.free_at, self.now()) + self.step_seconds
        values = {"loss_sum": loss_sum, "tokens": tokens, "grad_norm": grad_norm}
        return {name: Value(value, self.free_at) for name, value in values.items()}


class Value(float):
    def __new__(cls, value, ready):
        made = super().__new__(cls, value)
        made.ready = ready
        return made


def plain(tree):
    return jax.tree.map(lambda x: float(x) if isinstance(x, Value) else x, tree)


def make_meter(flops=7.0, peak=None, max_bad_steps=10, **snapshot):
    return Meter(NOTHING_BEFORE | snapshot, flops, peak, max_bad_steps)


def run_loop(device, meter, steps, every=5, pauses=None, first=0):
    """The rows of a loop like the trainer's. pauses: step -> seconds of each thing done there."""
    rows = []
    for n in range(first + 1, steps + 1):
        meter.add(n, device.step())
        if n % every == 0:
            rows.append(meter.close_window(n, n / 100, 0.5))
        with meter.paused():
            for seconds in (pauses or {}).get(n, ()):
                rows.append(meter.flush())
                device.spend(seconds)
                device.free_at = device.now()
    rows.append(meter.flush())
    return [row for row in rows if row is not None]


@pytest.mark.parametrize(
    ("step_seconds", "dispatch_seconds"),
    [(2.0, 0.1), (0.1, 2.0)],
    ids=["the device is the slow one", "the host is the slow one"],
)
@pytest.mark.parametrize(
    "pauses",
    [{}, {10: [1000.0]}, {12: [1000.0]}, {10: [9.0], 11: [9.0], 12: [9.0]}, {10: [50.0, 9.0]}],
)
def test_speed_is_that_of_training_alone(step_seconds, dispatch_seconds, pauses, monkeypatch):
    device = Device(monkeypatch, step_seconds, dispatch_seconds)
    rows = run_loop(device, make_meter(), 30, pauses=pauses)
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]
    # At first and after a pause the queue is empty: what the quick one costs shows once.
    speeds = np.array([row["tokens_per_second"] for row in rows])
    np.testing.assert_allclose(speeds, 10 / 2.0, rtol=0.03)


def test_the_first_step_of_a_session_is_not_timed(monkeypatch):
    device = Device(monkeypatch, 2.0, 0.1)
    meter = make_meter()
    device.spend(60)  # compilation
    rows = run_loop(device, meter, 3, every=1)
    assert [row["tokens_per_second"] for row in rows[:1]] == [None]
    assert rows[0]["mfu"] is None
    assert rows[0]["tokens"] == 10
    assert rows[1]["tokens_per_second"] == pytest.approx(10 / 2.1)


def test_the_host_hands_out_steps_without_waiting_for_the_device(monkeypatch):
    device = Device(monkeypatch, 2.0, 0.1)
    meter = make_meter()
    meter.add(1, device.step())  # the first one is waited for
    for n in range(2, 6):
        meter.add(n, device.step())
        with meter.paused():
            pass
    assert meter.close_window(5, 0.1, 0.5) is None
    assert device.now() == pytest.approx(2.1 + 4 * 0.1)


def test_a_row_holds_the_numbers_of_its_own_window(monkeypatch):
    device = Device(monkeypatch, 2.0, 0.5)
    meter = make_meter(flops=3.0, peak=60.0)
    meter.add(1, device.step(loss_sum=40.0, tokens=10.0, grad_norm=1.5))
    meter.add(2, device.step(loss_sum=20.0, tokens=20.0, grad_norm=2.5))
    assert meter.close_window(2, 0.25, 6e-4) is None
    meter.add(3, device.step(loss_sum=99.0))
    row = meter.flush()
    speed = row.pop("tokens_per_second")
    assert row.pop("seconds") == pytest.approx(3.0)
    assert row.pop("mfu") == pytest.approx(speed * 3.0 / 60.0)
    assert speed == pytest.approx(20 / 2.5)  # the second step: queued 0.5 s, then 2 s
    assert row.pop("process_peak_memory_bytes") > 2**26
    assert row == {
        "step": 2,
        "epoch": 0.25,
        "tokens": 30,
        "train_loss": 2.0,  # over tokens: not the mean of the steps' 4 and 1
        "learning_rate": 6e-4,
        "grad_norm": 2.5,  # the last step's
        "bad_steps": 0,
    }
    assert meter.flush() is None


def test_a_resumed_run_logs_what_the_whole_run_would_have(monkeypatch):
    def numbers(rows):
        return [{k: row[k] for k in ("step", "tokens", "train_loss", "grad_norm")} for row in rows]

    device = Device(monkeypatch, 2.0, 0.1)
    whole = run_loop(device, make_meter(), 20)
    meter = make_meter()
    before = run_loop(device, meter, 13)
    assert meter.tokens_now() == 130
    snapshot = json.loads(json.dumps(meter.snapshot()))
    assert [entry[0] for entry in snapshot["window"]] == [11, 12, 13]
    after = run_loop(device, make_meter(**snapshot), 20, first=13)
    assert numbers(before + after) == numbers(whole)
    assert after[0]["seconds"] > before[-1]["seconds"]
    # Three of its steps were made before, and one was compiled in.
    assert after[0]["tokens_per_second"] == pytest.approx(10 / 2.0, rel=0.06)


def test_a_meter_takes_the_arrays_of_a_real_device():
    meter = make_meter(peak=1e9)
    for n in (1, 2):
        scalars = {"loss_sum": 8.0 * n, "tokens": 4.0, "grad_norm": 1.0}
        meter.add(n, {name: jnp.float32(value) for name, value in scalars.items()})
    meter.close_window(2, 0.1, 0.5)
    row = json.loads(json.dumps(meter.flush()))
    assert (row["train_loss"], row["tokens"]) == (3.0, 8)
    assert row["tokens_per_second"] > 0
    assert 0 < row["mfu"] == row["tokens_per_second"] * 7.0 / 1e9


@pytest.mark.parametrize("name", ["loss_sum", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_counted_and_left_out_of_the_mean(name, value, monkeypatch):
    device = Device(monkeypatch, 2.0, 0.1)
    meter = make_meter()
    meter.add(1, device.step(loss_sum=40.0, grad_norm=1.5))
    meter.add(2, device.step(**{name: value}))
    meter.close_window(2, 0.1, 0.5)
    row = json.loads(json.dumps(meter.flush(), allow_nan=False))
    assert (row["train_loss"], row["grad_norm"], row["bad_steps"]) == (4.0, 1.5, 1)
    assert row["tokens"] == 20  # its rows are used up
    assert meter.notes() == ["a step's loss or gradient was not finite: left out (1 so far)"]
    assert meter.notes() == []
    for n in (3, 4):
        meter.add(n, device.step(**{name: value}))
    meter.close_window(4, 0.1, 0.5)
    row = meter.flush()
    assert (row["train_loss"], row["grad_norm"], row["bad_steps"]) == (None, None, 3)
    assert meter.notes() == ["2 steps' loss or gradient was not finite: left out (3 so far)"]


@pytest.mark.parametrize("sessions", [(), (3,), (2, 4)], ids=str)
def test_too_many_bad_steps_in_a_row_end_the_run_also_across_sessions(sessions, monkeypatch):
    """Steps 2, 4, 5 and 6 are bad, at most two in a row are allowed."""
    device = Device(monkeypatch, 2.0, 0.1)
    meter = make_meter(max_bad_steps=2)
    for n in range(1, 6):
        meter.add(n, device.step(loss_sum=math.nan if n in (2, 4, 5) else 30.0))
        if n == 3:
            meter.close_window(3, 0.1, 0.5)
        if n in sessions:
            meter.flush()
            meter.tokens_now()  # to look twice is not to count twice
            snapshot = json.loads(json.dumps(meter.snapshot(), allow_nan=False))
            meter = make_meter(max_bad_steps=2, **snapshot)
    meter.flush()
    assert meter.snapshot()["bad_steps"] == 3
    meter.add(6, device.step(grad_norm=math.inf))
    with pytest.raises(NumericsError, match=r"^step 6: for 3 steps in a row .*\n  in another"):
        meter.snapshot()


# ---------------------------------------------------------------- on the terminal


@pytest.fixture
def clock(monkeypatch):
    times = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: times.now)
    return times


def test_away_from_a_terminal_progress_is_a_line_a_log_point(clock, capsys):
    progress = Progress(total_steps=1000, first_step=200)
    progress.advance()
    clock.now += 50.0
    progress.show(300, 3.14159, 12345.6)
    progress.show(1000, 2.0, None)
    progress.show(1000, None, None)
    progress.say("step 300: validation loss 3.2")
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""  # that is for the sample and the closing words
    assert err.splitlines() == [
        "step 300/1000  loss 3.1416  12,346 tok/s  5:54 left",  # 99 steps in 50 s; 700 to go
        "step 1000/1000  loss 2.0000  0:00 left",
        "step 1000/1000  loss nan  0:00 left",
        "step 300: validation loss 3.2",
    ]


def test_on_a_terminal_progress_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(total_steps=10, first_step=4)
    progress.advance()
    progress.show(5, 3.14159, 99.6)
    progress.say("a line")
    progress.close()
    err = capsys.readouterr().err
    assert "a line\n" in err
    bar = err.split("\r")[-1]
    assert " 50% |" in bar
    assert "step 5/10" in bar
    assert "loss 3.1416  100 tok/s" in bar


def test_the_bar_s_time_left_leaves_the_compilation_out(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(total_steps=10, first_step=0)
    clock.now += 600.0
    progress.advance()
    clock.now += 2.0
    progress.advance()
    progress.show(2, 3.0, 50.0)
    progress.close()
    assert "loss 3.0000  50 tok/s  0:16 left" in capsys.readouterr().err.split("\r")[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"),
     (90061, "25:01:01")],
)  # fmt: skip
def test_clock(seconds, text):
    assert metrics.clock(seconds) == text


def test_a_snapshot_stays_as_it_was_while_training_goes_on():
    """A checkpoint's thread turns it into JSON after the next steps have begun."""
    meter = make_meter()
    values = {"loss_sum": jax.numpy.float32(3), "tokens": 2.0, "grad_norm": 1.0}
    meter.add(1, values)
    snapshot = meter.snapshot()
    meter.add(2, values)
    assert snapshot["window"] == [(1, 3.0, 2.0, 1.0)]
    json.dumps(snapshot)


def test_what_logging_costs_can_be_measured(capsys):
    """The measurement of docs/benchmarks.md, on a few rows."""
    for milliseconds in measure.log_rows("none", n_rows=3):
        assert 0 < milliseconds < 1000
    assert "step 2/3" in capsys.readouterr().err


def test_a_ledger_s_rows_are_rows(tmp_path):
    log = metrics.StepLog(tmp_path / "ledger.jsonl")
    rows = [{"step": n, "rows": [[0, n], [1, n + 1]]} for n in (1, 2, 3)]
    for row in rows:
        log.write(row)
    log.forget_after(2)
    assert read_log(log.path) == rows[:2]
