"""SIGTERM and Ctrl-C: the step at hand is saved, and the run goes on as if it had not stopped.

One run is stopped at random instants (while it imports, reads its text, compiles, trains,
evaluates, saves) and started again by the same command until it is done.
"""

import random
import signal
import time

import numpy as np
import pytest

from tests.faults.runs import (
    SETTINGS,
    as_argv,
    is_saved,
    learned,
    saved_steps,
    steps_of,
    wait_until_saved,
)

WORDS = {signal.SIGTERM: 143, signal.SIGINT: 130}
PATIENCE = 5  # seconds beside a step and a save, of which these are far below one


@pytest.mark.slow
def test_a_stop_at_any_instant_loses_no_step(fork_server, text, tmp_path, thorough):
    n_stops = 50 if thorough else 4
    n_steps = 20 * n_stops

    def start(output_dir):
        settings = SETTINGS | {"train_file": text, "output_dir": output_dir,
                               "max_steps": n_steps, "dropout": 0.1}  # fmt: skip
        return fork_server.start(as_argv(settings), fault=["slow_down", 0.02])

    rng = random.Random(n_stops)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    run = start(unbroken)
    assert run.wait(600) == 0, run.text()

    stopped = {"before the first step": 0, "between steps": 0}
    for n in range(n_stops):
        number = (signal.SIGTERM, signal.SIGINT)[n % 2]
        run = start(broken)
        if n % 4 == 0:  # while it gets ready
            while "begun" not in run.text():
                time.sleep(0.005)
            time.sleep(rng.random() * 2)
        else:
            began = time.monotonic()
            seen = len(steps_of(broken))
            while len(steps_of(broken)) <= seen and time.monotonic() < began + 60:
                assert run.poll() is None, run.text()
                time.sleep(0.005)
            time.sleep(rng.random() / 2)
        asked = time.monotonic()
        run.kill(number)
        code = run.wait()
        took = time.monotonic() - asked
        assert code == WORDS[number], run.text()
        assert took < PATIENCE, run.text()
        assert "Traceback" not in run.text()
        made = max(steps_of(broken), default=0)
        if "saved step" in run.text():
            stopped["between steps"] += 1
            assert f"saved step {made};" in run.text()
        else:
            stopped["before the first step"] += 1
            assert "interrupted" in run.text() or "nothing was done yet" in run.text()
        assert (saved_steps(broken) or [0])[-1] == made
        assert made == 0 or is_saved(broken, made)
    assert all(stopped.values()), stopped
    run = start(broken)
    assert run.wait(600) == 0, run.text()

    (state, cursor), (expected, expected_cursor) = learned(broken), learned(unbroken)
    assert cursor == expected_cursor
    np.testing.assert_equal(state, expected)
    assert steps_of(broken) == [*range(1, n_steps + 1)]
    logs = [(path / "metrics.jsonl").read_text().count("\n") for path in (broken, unbroken)]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize(("most", "long_step"), [(2, 9), (1, 0.5)], ids=["two", "one long one"])
def test_a_stop_waits_for_few_steps(fork_server, text, tmp_path, most, long_step):
    """The host could hand out as many as 32 ahead of the device."""
    settings = SETTINGS | {"train_file": text, "output_dir": tmp_path / "run", "max_steps": 60,
                           "log_every": 100, "eval_every": 0}  # fmt: skip
    run = fork_server.start(as_argv(settings), fault=["slow_device", 1.0, long_step])
    began = time.monotonic()
    while len(steps_of(tmp_path / "run")) < 3 and time.monotonic() < began + 60:
        assert run.poll() is None, run.text()
        time.sleep(0.005)
    made = len(steps_of(tmp_path / "run"))
    asked = time.monotonic()
    run.kill(signal.SIGTERM)
    assert run.wait() == 143, run.text()
    assert time.monotonic() - asked < most * 1.0 + PATIENCE
    assert saved_steps(tmp_path / "run")[-1] == len(steps_of(tmp_path / "run")) <= made + most


@pytest.mark.parametrize(
    "where", [pytest.param("while training", marks=pytest.mark.slow), "while compiling"]
)
def test_a_second_ctrl_c_ends_at_once(fork_server, text, tmp_path, where):
    settings = SETTINGS | {"train_file": text, "output_dir": tmp_path / "run", "max_steps": 90}
    fault = ["hang_in_step", 12] if where == "while training" else ["hang_in_compilation"]
    run = fork_server.start(as_argv(settings), fault=fault)
    began = time.monotonic()
    while "hanging" not in run.text() and time.monotonic() < began + 60:
        time.sleep(0.02)
    if where == "while training":
        wait_until_saved(run, tmp_path / "run", 10)
    run.kill(signal.SIGINT)
    if where == "while training":
        time.sleep(0.5)
        assert run.poll() is None
        assert "the step is finished and saved first" in run.text()
        run.kill(signal.SIGINT)
    began = time.monotonic()
    assert run.wait(10) == 130
    assert time.monotonic() - began < 1
    assert "Traceback" not in run.text()
    assert saved_steps(tmp_path / "run") == ([10] if where == "while training" else [])
