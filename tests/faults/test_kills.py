"""Runs that are killed anywhere go on by themselves and end as if nothing had happened.

Real runs of scripts/train.py, real SIGKILLs: some at a random instant, some while a checkpoint is
being written, some while an old one is being deleted, some before the first save. Afterwards
everything a run has learned is bitwise that of a run that was left alone.

The fast tier has one of these kills, though it costs some 20 processor seconds: it is the one that
shows what users are promised.
"""

import random
import time

import numpy as np
import pytest

from gpt2_flax.pretrained import manifest
from tests.faults.runs import SETTINGS, as_argv, learned, logged_steps, saved_steps, steps_of

SAVE_EVERY = SETTINGS["save_every"]
# How often a kill comes where: (in the fast tier, with --all, with --thorough).
PLACES = {
    "before the first save": (0, 1, 2),
    "after a save": (1, 0, 0),
    "inside a save": (0, 3, 25),
    "inside a deletion": (0, 1, 5),
    "anywhere": (0, 1, 18),
}


def wait_for(run, condition, seconds=120):
    last = time.monotonic() + seconds
    while run.poll() is None and not condition():
        assert time.monotonic() < last, run.text()
        time.sleep(0.0005)


def in_checkpoints(output_dir, pattern):
    return lambda: any((output_dir / "checkpoints").glob(pattern))


@pytest.mark.parametrize("tier", ["fast", pytest.param("all", marks=pytest.mark.slow)])
def test_any_kill_is_survived_bitwise(fork_server, text, tmp_path, thorough, tier):
    def start(output_dir, n_steps):
        return fork_server.start(
            as_argv(SETTINGS | {"train_file": text, "output_dir": output_dir,
                                "max_steps": n_steps}),
            fault=["slow_down", 0.02],
        )  # fmt: skip

    n_kills = 0 if tier == "fast" else 1 + thorough
    kills = [place for place, counts in PLACES.items() for _ in range(counts[n_kills])]
    n_steps = 40 * len(kills)
    rng = random.Random(len(kills))
    early = [place for place in kills if place == "before the first save"]
    later = kills[len(early) :]
    rng.shuffle(later)

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    run = start(unbroken, n_steps)
    assert run.wait(600) == 0, run.text()

    redone, last = [], 0
    for place in [*early, *later, None]:
        run = start(broken, n_steps)
        wait_for(run, lambda: "compiling" in run.text() or "continuing" in run.text())  # noqa: B023
        if "continuing after step" in run.text():
            begun = int(run.text().split("continuing after step ")[1].split()[0].replace(",", ""))
            redone.append(last - begun)
        if place is None:
            break
        if place == "inside a save":
            seen = len(steps_of(broken)) + rng.randrange(3) * SAVE_EVERY
            wait_for(run, lambda: len(steps_of(broken)) > seen)  # noqa: B023
            wait_for(run, in_checkpoints(broken, "*.orbax-checkpoint-tmp*/state/*"))
            time.sleep(rng.random() * 0.01)
        elif place == "after a save":
            wait_for(run, lambda: saved_steps(broken) and steps_of(broken)[-1] > SAVE_EVERY + 2)
        elif place == "inside a deletion":
            wait_for(run, in_checkpoints(broken, ".trash/*"))
        elif place == "anywhere":
            time.sleep(rng.random() * 1.5)
        run.kill()
        assert run.wait() == -9, run.text()
        last = max(steps_of(broken), default=0)
        assert "is damaged" not in run.text()
    assert run.wait(600) == 0, run.text()
    assert "is damaged" not in run.text()
    # A save is written while the run goes on, here for many of its short steps: a kill inside
    # it costs those too. The next save waits for it, so there are at most as many again.
    assert len(redone) >= (len(kills) + 1) // 2 and max(redone) <= 2 * SAVE_EVERY, redone

    (state, cursor), (expected, expected_cursor) = learned(broken), learned(unbroken)
    assert cursor == expected_cursor
    np.testing.assert_equal(state, expected)
    weights = [path / "model.safetensors" for path in (broken, unbroken)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert steps_of(broken) == [*range(1, n_steps + 1)]
    assert logged_steps(broken) == [*range(5, n_steps + 1, 5)]
    for folder in (broken, broken / "checkpoints"):
        assert {p.name for p in folder.iterdir()} == {
            p.name for p in (unbroken / folder.relative_to(broken)).iterdir()
        }
    assert len(saved_steps(broken)) <= 3
    for step in saved_steps(broken):
        manifest.check(broken / "checkpoints" / str(step), step)
