"""Runs of a tiny model that tests share: their settings, and what to ask of a run afterwards."""

import contextlib
import fcntl
import os
import pathlib
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp

from gpt2_flax.config.train_config import load_config
from gpt2_flax.pretrained import orbax_files
from gpt2_flax.reporting import metrics
from gpt2_flax.training.train import train

TINY = [
    "--n_layers", "1", "--n_heads", "2", "--n_embd", "8", "--n_positions", "24",
    "--block_size", "16", "--batch_size", "1", "--tokenizer", "bytes", "--sample_tokens", "0",
    "--max_steps", "12", "--log_every", "3", "--eval_every", "6",
    "--learning_rate", "1e-2", "--dropout", "0.1",
]  # fmt: skip


def write_words(path: pathlib.Path) -> pathlib.Path:
    """A file of a few thousand words that a byte model can learn something from."""
    rng = np.random.default_rng(0)
    words = ["tea", "milk", "sugar", "lemon", "honey", "\n"]
    path.write_text(" ".join(rng.choice(words, 3000)), encoding="utf-8")
    return path


def train_tiny(text: pathlib.Path, output_dir: pathlib.Path, *flags: str) -> int:
    """Train in this process, with the settings TINY and these flags; the exit code."""
    files = [] if "--train_file" in flags else ["--train_file", str(text)]
    return train(load_config([*TINY, *files, "--output_dir", str(output_dir), *flags]))


@contextlib.contextmanager
def made_once(tmp_path_factory, name: str):
    """A folder that all workers share, and whether it is still to be filled, by this one."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_new = not (folder / name / "made").exists()
        (folder / name).mkdir(exist_ok=True)
        yield folder / name, is_new
        (folder / name / "made").touch()


def stop_at(monkeypatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal right after a step of training."""
    add = metrics.Meter.add

    def add_and_stop(self, n, values):
        add(self, n, values)
        if n == step:
            signal.raise_signal(number)

    monkeypatch.setattr(metrics.Meter, "add", add_and_stop)


def learned(output_dir: pathlib.Path) -> tuple:
    """Everything a run has learned: state and cursor of its newest checkpoint."""
    newest = orbax_files.locate(output_dir, None)
    as_numpy = jax.tree.map(
        lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray),
        orbax_files.stored_shapes(newest),
    )
    with ocp.PyTreeCheckpointer() as reader:
        state = reader.restore(newest / "state", restore_args=as_numpy)
    return state, orbax_files.read_meta(newest)["cursor"]


def assert_same_run(a: pathlib.Path, b: pathlib.Path) -> None:
    """Bitwise the same state, data cursor and model, and the same log but for times."""
    (state_a, cursor_a), (state_b, cursor_b) = learned(a), learned(b)
    assert cursor_a == cursor_b
    assert jax.tree.structure(state_a) == jax.tree.structure(state_b)
    for x, y in zip(jax.tree.leaves(state_a), jax.tree.leaves(state_b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    timed = ("tokens_per_second", "seconds", "mfu", "process_peak_memory_bytes")
    rows_a, rows_b = (
        [{k: v for k, v in row.items() if k not in timed} for row in metrics.read_log(path)]
        for path in (a / "metrics.jsonl", b / "metrics.jsonl")
    )
    assert rows_a == rows_b
