"""A run that an earlier version began is resumed by this one.

tests/recorded/run was made by commit f62ad2c, on one device, and stopped after step 7 of 12.
"""

import json
import shutil

import numpy as np

from gpt2_flax.reporting import metrics
from tests.recorded import record

SETTINGS = {
    "train_file": "text.txt", "tokenizer": "bytes", "n_layers": 1, "n_heads": 2, "n_embd": 8,
    "n_positions": 24, "block_size": 16, "batch_size": 2, "max_steps": 12, "log_every": 3,
    "eval_every": 0, "save_every": 0, "keep": 1, "sample_tokens": 0, "learning_rate": "1e-2",
    "dropout": 0.1, "ledger": "true", "validation_share": 0.2, "output_dir": "run",
}  # fmt: skip
# What the earlier version logged when it resumed the run itself.
TRAIN_LOSSES = {9: 4.795273621877034, 12: 4.679848353068034}
VALIDATION_LOSS = 4.6516439119974775


def test_a_run_of_an_earlier_version_is_resumed_as_that_version_did(fork_server, tmp_path):
    """The same rows, dropout and losses. Other processors round otherwise: not to the bit."""
    shutil.copytree(record.HERE / "run", tmp_path / "run")
    shutil.copy(record.HERE / "run_text.txt", tmp_path / "text.txt")
    argv = [str(word) for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    run = fork_server.start(argv, devices=1, cwd=str(tmp_path))
    assert run.wait() == 0, run.text()
    assert "continuing after step 7\n" in run.text()
    rows = {row["step"]: row for row in metrics.read_log(tmp_path / "run" / "metrics.jsonl")}
    assert [*rows] == [3, 6, 9, 12]
    for step, loss in TRAIN_LOSSES.items():
        np.testing.assert_allclose(rows[step]["train_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(rows[12]["validation_loss"], VALIDATION_LOSS, rtol=1e-5)
    lines = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 13)]
