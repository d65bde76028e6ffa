"""What the tests of this folder ask of runs: their settings, their steps, what is saved."""

import json
import time

from gpt2_flax.pretrained import manifest
from gpt2_flax.reporting import metrics
from gpt2_flax.training import checkpoint
from tests.tiny_runs import learned

SETTINGS = {
    "n_layers": 2, "n_heads": 2, "n_embd": 32, "n_positions": 32, "block_size": 32,
    "tokenizer": "bytes", "batch_size": 2, "save_every": 10, "keep": 2, "log_every": 5,
    "eval_every": 30, "eval_rows": 8, "sample_tokens": 0, "ledger": "true",
}  # fmt: skip

__all__ = [
    "SETTINGS", "as_argv", "is_saved", "learned", "logged_steps", "saved_steps", "steps_of",
    "wait_until_saved",
]  # fmt: skip


def as_argv(settings: dict) -> list[str]:
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def steps_of(output_dir) -> list[int]:
    """Steps in the ledger; a line that a kill cut off is not one."""
    path = output_dir / "ledger.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def logged_steps(output_dir) -> list[int]:
    return [row["step"] for row in metrics.read_log(output_dir / "metrics.jsonl")]


def saved_steps(output_dir) -> list[int]:
    folder = output_dir / checkpoint.FOLDER
    found = (path.name for path in folder.iterdir()) if folder.exists() else ()
    return sorted(int(name) for name in found if name.isdigit())


def is_saved(output_dir, step: int) -> bool:
    """Whether the checkpoint of a step is whole."""
    try:
        manifest.check(output_dir / checkpoint.FOLDER / str(step), step)
    except manifest.DamagedError:
        return False
    return True


def wait_until_saved(run, output_dir, step: int) -> None:
    """Return when the checkpoint of a step is whole, which takes its time beside the steps."""
    began = time.monotonic()
    while not is_saved(output_dir, step):
        assert time.monotonic() < began + 60 and run.poll() is None, run.text()
        time.sleep(0.05)
