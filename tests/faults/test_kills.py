"""Runs that are killed anywhere go on by themselves and end as if nothing had happened.

Real runs of scripts/train.py, real SIGKILLs: some at a random instant, some while a checkpoint is
being written, some while an old one is being deleted, some before the first save. Afterwards
everything a run has learned is bitwise that of a run that was left alone.
"""

import json
import random
import time

import numpy as np
import pytest

from gpt2_flax import checkpoint, manifest, metrics
from tests.nursery import Nursery
from tests.test_train import learned

SAVE_EVERY = 10
SETTINGS = {
    "n_layers": 2, "n_heads": 2, "n_embd": 32, "n_positions": 32, "block_size": 32,
    "tokenizer": "bytes", "batch_size": 2, "save_every": SAVE_EVERY, "keep": 2, "log_every": 5,
    "eval_every": 30, "eval_rows": 8, "sample_tokens": 0, "ledger": "true",
}  # fmt: skip
# How often a kill comes where; (in the normal run, with --full).
PLACES = {
    "before the first save": (1, 2),
    "inside a save": (5, 25),
    "inside a deletion": (2, 5),
    "anywhere": (2, 18),
}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {n} of {n * n}\n" for n in range(900)))
    return path


def steps_of(output_dir) -> list[int]:
    """Steps in the ledger; a line that a kill cut off is not one."""
    path = output_dir / "ledger.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def wait_for(run, condition, seconds=120):
    last = time.monotonic() + seconds
    while run.poll() is None and not condition():
        assert time.monotonic() < last, run.text()
        time.sleep(0.0005)


def in_checkpoints(output_dir, pattern):
    return lambda: any((output_dir / "checkpoints").glob(pattern))


def test_any_kill_is_survived_bitwise(nursery, text, tmp_path, full):
    def start(output_dir, n_steps):
        settings = SETTINGS | {
            "train_file": text, "output_dir": output_dir, "max_steps": n_steps,
        }  # fmt: skip
        argv = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        return nursery.start(argv, 1)

    kills = [place for place, counts in PLACES.items() for _ in range(counts[full])]
    n_steps = 25 * len(kills)
    rng = random.Random(len(kills))
    first, *later = kills
    rng.shuffle(later)

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    run = start(unbroken, n_steps)
    assert run.wait(600) == 0, run.text()

    redone = []
    for n, place in enumerate([first, *later]):
        run = start(broken, n_steps)
        wait_for(run, lambda: f"{'compiling' if not n else 'continuing'}" in run.text())  # noqa: B023
        if place == "inside a save":
            seen = len(steps_of(broken))
            wait_for(run, lambda: len(steps_of(broken)) > seen)  # noqa: B023
            wait_for(run, in_checkpoints(broken, "*.orbax-checkpoint-tmp*/state/*"))
            time.sleep(rng.random() * 0.01)
        elif place == "inside a deletion":
            wait_for(run, in_checkpoints(broken, ".trash/*"))
        elif place == "anywhere":
            time.sleep(rng.random() * 2)
        run.kill()
        code = run.wait()
        assert code == -9, run.text()
        if "continuing after step" in run.text():
            begun = int(run.text().split("continuing after step ")[1].split()[0].replace(",", ""))
            redone.append((place, max(steps_of(broken), default=0) - begun))
        assert "is damaged" not in run.text()
    run = start(broken, n_steps)
    assert run.wait(600) == 0, run.text()
    assert "is damaged" not in run.text()

    (state, cursor), (expected, expected_cursor) = learned(broken), learned(unbroken)
    assert cursor == expected_cursor
    np.testing.assert_equal(state, expected)
    weights = [path / "model.safetensors" for path in (broken, unbroken)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert steps_of(broken) == [*range(1, n_steps + 1)]
    logged = [row["step"] for row in metrics.read_log(broken / "metrics.jsonl")]
    assert logged == [*range(5, n_steps + 1, 5)]
    for folder in (broken, broken / "checkpoints"):
        assert {p.name for p in folder.iterdir()} == {
            p.name for p in (unbroken / folder.relative_to(broken)).iterdir()
        }
    for directory in (broken / "checkpoints").iterdir():
        manifest.check(directory, int(directory.name))
    assert len(checkpoint.Checkpoints(broken, 2).steps()) <= 3
