"""Kills in three epochs, twenty by --thorough: every row is trained on exactly once an epoch.

Real runs, real SIGKILLs at random steps, on one device, four and two by turns; the rows of each
step stand in ledger.jsonl. The rows of steps that a kill undid are trained on again, and their
lines replaced, as the parameters are those of the last checkpoint.
"""

import collections
import json
import random
import time

import pytest

from tests.faults.runs import is_saved

EPOCHS, GLOBAL_BATCH = 3, 4
SETTINGS = {
    "n_layers": 1, "n_heads": 2, "n_embd": 8, "n_positions": 32, "block_size": 32,
    "tokenizer": "bytes", "epochs": EPOCHS, "batch_size": 1, "grad_accum": GLOBAL_BATCH,
    "save_every": 4, "keep": 1, "log_every": 1000, "eval_every": 0, "validation_share": 0,
    "sample_tokens": 0, "ledger": "true",
}  # fmt: skip
KINDS = {
    "from a token file": {},
    "streamed": {"streaming": "true", "shuffle_window": 13},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {n} of {n * n}\n" for n in range(400)))
    return path


def read_ledger(output_dir) -> list[dict]:
    """The whole lines; the last may be half written."""
    path = output_dir / "ledger.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_used_once_an_epoch_through_kills(fork_server, text, tmp_path, thorough, kind):
    n_kills = 20 if thorough else 2

    def start(output_dir, devices):
        settings = SETTINGS | KINDS[kind] | {"train_file": text, "output_dir": output_dir}
        argv = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        return fork_server.start(argv, devices)

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    run = start(unbroken, devices=1)
    assert run.wait() == 0, run.text()
    expected = read_ledger(unbroken)
    n_steps = len(expected)
    assert n_steps > 60

    rng = random.Random(kind)
    # After how many steps; in the last ones a run could end before it is killed.
    places = sorted(rng.sample(range(n_steps - 12), n_kills))
    for n, place in enumerate(places):
        # Until something was saved, the devices say how many rows a step has.
        has_begun = any((broken / "checkpoints").glob("[0-9]*[0-9]"))
        run = start(broken, devices=(1, 4, 2)[n % 3] if has_begun else 1)
        while len(read_ledger(broken)) < place and run.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        assert run.poll() is None, run.text()
        run.kill()
        assert run.wait() == -9
    run = start(broken, devices=1)
    assert run.wait() == 0, run.text()

    assert is_saved(broken, n_steps) and (broken / "model.safetensors").exists()
    ledger = read_ledger(broken)
    assert ledger == expected  # the order too, and each step once
    counts = collections.Counter((epoch, row) for line in ledger for epoch, row in line["rows"])
    n_rows = len(counts) // EPOCHS
    missing = {(epoch, row) for epoch in range(EPOCHS) for row in range(n_rows)} - counts.keys()
    repeated = [row for row, times in counts.items() if times > 1]
    assert (missing, repeated) == (set(), [])
    assert f"{n_rows} rows of 32 tokens an epoch" in run.text()
