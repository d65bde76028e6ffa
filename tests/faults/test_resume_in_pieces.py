"""N + M = N, resume, M, bitwise: a run that was stopped learns what one in a piece does."""

import random

import numpy as np
import pytest

from tests.faults.runs import SETTINGS, as_argv, is_saved, learned, steps_of

N_STEPS = 24
# The steps after which a run of 24 is stopped. Its evaluations are at 6, 12, 18 and 24, its saves
# at 5, 10, 15, 20 and 24, its epochs end inside steps 8 and 16; each step has two micro-batches.
CUTS = {1: [(12, 13, 20)], 4: [(8,), (5, 6)]}  # by the devices; with --thorough all on each
MORE_CUTS = [(1,), (2,), (7,), (9,), (10,), (16,), (17,), (18,), (23,), (3, 4), (6, 12), (8, 16),
             (1, 2, 3), (7, 8, 9), (11, 12, 18), (15, 16, 24), (22, 23)]  # fmt: skip


@pytest.fixture(scope="module")
def short_text(tmp_path_factory):
    """61 rows of 32 bytes, which 8 steps of 8 rows do not divide."""
    path = tmp_path_factory.mktemp("short") / "text.txt"
    letters = random.Random(0).choices("abcdefg \n", k=61 * 32 + 1 - 3)
    path.write_text("".join(letters))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("devices", CUTS)
def test_a_run_in_pieces_is_a_run(fork_server, short_text, tmp_path, thorough, devices):
    def start(output_dir, fault=None):
        settings = SETTINGS | {
            "train_file": short_text, "output_dir": output_dir, "max_steps": N_STEPS,
            "batch_size": 4 // devices, "grad_accum": 2, "dropout": 0.1, "save_every": 5,
            "eval_every": 6, "log_every": 1, "validation_file": short_text,
        }  # fmt: skip
        return fork_server.start(as_argv(settings), devices, fault=fault)

    whole = tmp_path / "whole"
    run = start(whole)
    assert run.wait() == 0, run.text()
    expected, expected_cursor = learned(whole)

    for cuts in [*CUTS[1], *CUTS[4], *MORE_CUTS] if thorough else CUTS[devices]:
        pieces = tmp_path / "-".join(map(str, cuts))
        for cut in cuts:
            run = start(pieces, ["stop_after", cut])
            # Also after the last step, whose evaluation is then still to be made.
            assert run.wait() == 143, run.text()
            assert is_saved(pieces, cut)
        run = start(pieces)
        assert run.wait() == 0, run.text()
        state, cursor = learned(pieces)
        assert cursor == expected_cursor
        np.testing.assert_equal(state, expected)
        assert steps_of(pieces) == [*range(1, N_STEPS + 1)]
        assert losses(pieces) == losses(whole)
        for name in ("ledger.jsonl", "model.safetensors"):
            assert (pieces / name).read_bytes() == (whole / name).read_bytes()


def losses(output_dir):
    from gpt2_flax.reporting import metrics

    names = "step", "train_loss", "validation_loss", "epoch", "tokens", "grad_norm"
    rows = metrics.read_log(output_dir / "metrics.jsonl")
    return [[row.get(name) for name in names] for row in rows]
