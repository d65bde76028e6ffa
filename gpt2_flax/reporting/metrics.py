"""What a run shows of itself while it trains: metrics.jsonl and the progress bar."""

import concurrent.futures
import contextlib
import json
import math
import pathlib
import resource
import sys
import time

import jax
from tqdm import tqdm

from gpt2_flax import errors
from gpt2_flax.errors import NumericsError
from gpt2_flax.filesystem import replace_file, storage_errors

LOG_FILE = "metrics.jsonl"
LEDGER_FILE = "ledger.jsonl"
MAX_ROW_BYTES = 1 << 20  # a ledger's row names all rows of a step
STEADIER = (
    "in another --output_dir, lower --learning_rate or --grad_clip, lengthen --warmup_steps, or"
    " use --dtype float32"
)
# Dense bfloat16 peak of one device, FLOP/s, from the makers' data sheets (TPU: per jax device).
# The first name that is part of the device's kind counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,  # what JAX calls a v5p
    "TPU v6 lite": 918e12,
}


def flops_per_token(n_layers: int, n_embd: int, vocab_size: int, block_size: int) -> float:
    """FLOPs of training on one token, forward and backward: 6 N + 12 L D T.

    N: parameters without the position table; L layers, D width, T tokens of context. The
    formula of nanoGPT and of PaLM's appendix B (https://arxiv.org/abs/2204.02311).
    """
    n_params = 12 * n_layers * n_embd**2 + vocab_size * n_embd
    return 6 * n_params + 12 * n_layers * n_embd * block_size


def peak_memory() -> dict[str, int]:
    """The most memory used so far, in bytes, under a name that says whose.

    Of the fullest device where the backend counts it; else, as on CPU, the peak resident size of
    the process.
    """
    counted = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in counted if "peak_bytes_in_use" in stats]
    if peaks:
        return {"device_peak_memory_bytes": max(peaks)}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"process_peak_memory_bytes": peak}


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device, None where it isn't known (as for any CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


class StepLog:
    """A .jsonl file in which every step stands at most once, also across kills."""

    def __init__(self, path):
        self.path = pathlib.Path(path)

    def forget_after(self, step: int) -> None:
        """Drop the rows after a step, and a row that a kill left half written."""
        if self.path.exists():
            self.replace([row for row in read_log(self.path) if row["step"] <= step])

    def replace(self, rows: list[dict]) -> None:
        replace_file(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def write(self, row: dict) -> None:
        with storage_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class RunLog(StepLog):
    """metrics.jsonl, and the reporter of its numbers."""

    def __init__(self, output_dir, reporter):
        super().__init__(pathlib.Path(output_dir) / LOG_FILE)
        self.reporter = reporter

    def write(self, row: dict) -> None:
        super().write(row)
        self.report(row, {})

    def merge(self, row: dict) -> None:
        """Write a row, into that of its step if that is the last one."""
        rows = read_log(self.path)
        before = rows.pop() if rows and rows[-1]["step"] == row["step"] else {}
        if before:  # as a whole: a kill leaves the one or the other
            self.replace([*rows, before | row])
        else:
            super().write(row)
        self.report(row, before)

    def report(self, row: dict, before: dict) -> None:
        new = {name: value for name, value in row.items() if name not in before | {"step": 0}}
        self.reporter.scalars(row["step"], new)


def read_log(path) -> list[dict]:
    """The whole rows of a metrics.jsonl, in order; none where there is no file.

    Lines that are none of ours are left out: the file may be somebody else's.
    """
    rows = []
    if pathlib.Path(path).is_file():
        with open(path, "rb") as file:
            while line := file.readline(MAX_ROW_BYTES):
                with contextlib.suppress(ValueError, RecursionError):
                    row = json.loads(line)
                    if is_row(row):
                        rows.append(row)
    return rows


def is_row(row) -> bool:
    """Whether a JSON value is a row as it is written here: numbers, and a ledger's pairs."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    pairs = row.get("rows", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, list) for pair in pairs):
        return False
    values = [value for name, value in row.items() if name != "rows"]
    return all(
        value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)
        for value in (*values, *(number for pair in pairs for number in pair))
    )


# What a Meter of a new run starts from.
NOTHING_BEFORE = {
    "tokens": 0, "seconds": 0.0, "window": [], "bad_steps": 0, "bad_in_a_row": 0,
}  # fmt: skip


class Meter:
    """Turns what steps measure on the device into rows of the log.

    A row is made one log point after its own: its numbers have arrived by then, and the
    device never waits for the host.
    """

    def __init__(self, before: dict, flops: float, peak: float | None, max_bad_steps: int):
        """before: what `snapshot` gave, or NOTHING_BEFORE.

        flops: of one token. peak: FLOP/s of all devices together, None where unknown.
        max_bad_steps: steps in a row whose loss or gradient may not be finite.
        """
        self.tokens, self.seconds_before = before["tokens"], before["seconds"]
        self.window = [tuple(entry) for entry in before["window"]]
        self.bad_steps, self.bad_in_a_row = before["bad_steps"], before["bad_in_a_row"]
        self.max_bad_steps, self.noted = max_bad_steps, self.bad_steps
        self.counted = self.window[-1][0] if self.window else -1  # step up to which they are
        self.flops, self.peak = flops, peak
        self.waiting: tuple | None = None
        self.began = time.perf_counter()
        self.since: float | None = None  # when the device began the window's timed part
        self.timed_from = 0  # the place in the window of that part's first step
        self.drained: float | None = None  # when, in a pause, the device had done all its steps
        # Notes when a window's last step is done, which the host learns too late: it only
        # hands out the steps, and is one ahead of the device.
        self.watcher = concurrent.futures.ThreadPoolExecutor(1)

    def add(self, step: int, values: dict) -> None:
        """Take in a step's loss_sum, tokens and grad_norm, which may still be on the device."""
        self.window.append((step, values["loss_sum"], values["tokens"], values["grad_norm"]))
        if self.since is None:  # the session's first step: it was compiled in it
            jax.block_until_ready(values)
            self.since, self.timed_from = time.perf_counter(), len(self.window)

    @contextlib.contextmanager
    def paused(self):
        """Leave what happens inside, from a `flush` on, out of tokens per second."""
        self.drained = None
        yield
        if self.drained is not None and self.since is not None:
            self.since += time.perf_counter() - self.drained

    def close_window(self, step: int, epoch: float, learning_rate: float) -> dict | None:
        """End the window at a log point. Returns the row of the one before, if it waits."""
        row = self.take_row()
        seconds = time.perf_counter() - self.began + self.seconds_before
        about = step, epoch, learning_rate, seconds
        ended = self.watcher.submit(time_of_arrival, self.window[-1])
        self.waiting = self.window, about, ended, self.timed_from
        self.window, self.timed_from = [], 0
        return row

    def flush(self) -> dict | None:
        """The row that waits, if any. Waits until the device has done all its steps."""
        row = self.take_row()
        if self.window:
            jax.block_until_ready(self.window[-1])
        if self.drained is None:  # what a pause does begins at its first flush
            self.drained = time.perf_counter()
        return row

    def take_row(self) -> dict | None:
        if self.waiting is None:
            return None
        window, (step, epoch, learning_rate, seconds), ended, timed_from = self.waiting
        self.waiting = None
        window = self.fetch(window)
        passed, self.since = ended.result() - self.since, ended.result()
        self.tokens += count_tokens(window)
        timed_tokens = count_tokens(window[timed_from:])
        speed = timed_tokens / passed if timed_tokens else None
        good = [entry for entry in window if entry[1] is not None]
        loss = sum(entry[1] for entry in good) / count_tokens(good) if good else None
        return {
            "step": step,
            "epoch": epoch,
            "tokens": self.tokens,
            "train_loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": good[-1][3] if good else None,
            "bad_steps": self.bad_steps,
            "tokens_per_second": speed,
            "mfu": speed * self.flops / self.peak if speed and self.peak else None,
            "seconds": seconds,
            **peak_memory(),
        }

    def snapshot(self) -> dict:
        """What a checkpoint needs of it. Call `flush` first."""
        assert self.waiting is None
        self.window = self.fetch(self.window)
        return {
            "tokens": self.tokens,
            "seconds": time.perf_counter() - self.began + self.seconds_before,
            # A copy: it is written by a thread while this window goes on growing.
            "window": list(self.window),
            "bad_steps": self.bad_steps,
            "bad_in_a_row": self.bad_in_a_row,
        }

    def tokens_now(self) -> int:
        """Tokens trained on, those of the open window included. Call `flush` first."""
        self.window = self.fetch(self.window)
        return self.tokens + count_tokens(self.window)

    def fetch(self, window: list[tuple]) -> list[tuple]:
        """A window's numbers on the host, None for loss and norm of a step that was left out.

        Counts such steps. Raises NumericsError after more of them in a row than are allowed.
        """
        window = [as_numbers(*entry) for entry in jax.device_get(window)]
        for n, loss_sum, *_ in window:
            if n <= self.counted:
                continue
            self.counted = n
            self.bad_in_a_row = self.bad_in_a_row + 1 if loss_sum is None else 0
            self.bad_steps += loss_sum is None
            if self.bad_in_a_row > self.max_bad_steps:
                raise NumericsError(
                    f"step {n}: for {self.bad_in_a_row} steps in a row the loss or the gradient"
                    " was not a finite number; they changed nothing, and the newest checkpoint"
                    f" is from before them or leaves them out\n  {STEADIER}"
                )
        return window

    def notes(self) -> list[str]:
        """What is to be said of steps that were left out since the last call."""
        found, self.noted = self.bad_steps - self.noted, self.bad_steps
        if not found:
            return []
        steps = "a step's" if found == 1 else f"{found} steps'"
        return [f"{steps} loss or gradient was not finite: left out ({self.bad_steps} so far)"]


def time_of_arrival(values) -> float:
    jax.block_until_ready(values)
    return time.perf_counter()


def as_numbers(step: int, loss_sum, tokens, grad_norm) -> tuple:
    """An entry of a window as JSON can hold it: no loss and no norm where one isn't finite."""
    if loss_sum is None or not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
        return step, None, float(tokens), None
    return step, float(loss_sum), float(tokens), float(grad_norm)


def count_tokens(window: list[tuple]) -> int:
    return int(sum(entry[2] for entry in window))


class Progress:
    """A bar on a terminal, a line a log point elsewhere."""

    def __init__(self, total_steps: int, first_step: int):
        self.total, self.first = total_steps, first_step
        self.began = time.perf_counter()
        self.compiled = False
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            disable=not self.is_terminal or errors.is_silent,
            bar_format="{percentage:3.0f}% |{bar:24}| step {n_fmt}/{total_fmt}"
            " [{elapsed}]{postfix}",
        )
        self.latest = ""  # what the last log point said

    def advance(self) -> None:
        if not self.compiled:  # the first step's time says nothing of the others'
            self.compiled, self.began, self.first = True, time.perf_counter(), self.first + 1
        if self.is_terminal:
            words = filter(None, (self.latest, self.time_left(self.bar.n + 1)))
            self.bar.set_postfix_str("  ".join(words), refresh=False)
        self.bar.update()

    def show(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        speed = "" if tokens_per_second is None else f"  {tokens_per_second:,.0f} tok/s"
        left = self.time_left(step)
        words = f"loss {math.nan if loss is None else loss:.4f}{speed}"
        if self.is_terminal:
            self.latest = words
            self.bar.set_postfix_str("  ".join(filter(None, (words, left))))
        else:
            self.say("  ".join(filter(None, (f"step {step}/{self.total}", words, left))))

    def time_left(self, step: int) -> str:
        """As the steps of this session took, evaluations included; empty before there are any."""
        n_steps = step - self.first
        if n_steps < 1:
            return ""
        seconds_a_step = (time.perf_counter() - self.began) / n_steps
        return f"{clock(seconds_a_step * (self.total - step))} left"

    def say(self, line: str) -> None:
        """Print a line above the bar. Training outlives whoever reads it (`2>&1 | tee log`)."""
        if errors.is_silent:
            return
        with contextlib.suppress(BrokenPipeError):
            if self.is_terminal:
                self.bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.bar.close()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
