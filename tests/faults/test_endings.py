"""Exit code 0 means saved: however a run ends, it is 0 exactly when the last step is on disk.

Each way to end is tried with real runs of scripts/train.py, at random steps.
"""

import random

import pytest

from tests.faults.runs import SETTINGS, as_argv, is_saved, saved_steps

N_STEPS = 24
# How it ends: the injected fault, with the step where it does so; exit code; words on the way out.
WAYS = {
    "an exception in the step": ("fail_in_step", 1, "an injected fault"),
    "an exception in an evaluation": ("fail_in_evaluation", 1, "an injected fault"),
    "an exception in logging": ("fail_in_logging", 1, "an injected fault"),
    "an exception in the data": ("fail_in_data", 1, "an injected fault"),
    "sys.exit(0)": ("exit_in_step", 1, "something called sys.exit(0)"),
    "Ctrl-C": ("stop_after", 130, "saved step"),
    "a save that fails": ("fail_in_save", 4, "No space left on device"),
}
# They take the way of an exception in the step.
ALIKE = {"an exception in an evaluation", "an exception in logging"}


def settings(text, output_dir, **more):
    return as_argv(
        SETTINGS | {"train_file": text, "output_dir": output_dir, "eval_every": 8,
                    "save_every": 6, "log_every": 2} | more
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[pytest.mark.thorough] if way in ALIKE else []) for way in WAYS],
)
def test_exit_0_means_saved(fork_server, text, tmp_path, thorough, way):
    fault, expected, words = WAYS[way]
    rng = random.Random(way)
    for n in range(10 if thorough else 1):
        output_dir = tmp_path / str(n)
        step = N_STEPS if fault == "fail_in_save" else rng.randrange(1, N_STEPS)
        arguments = [2] if fault == "stop_after" else []
        run = fork_server.start(
            settings(text, output_dir, max_steps=N_STEPS), fault=[fault, step, *arguments]
        )
        assert run.wait() == expected, run.text()
        assert words in run.text()
        assert not is_saved(output_dir, N_STEPS)
        assert not (output_dir / "model.safetensors").exists()
        if fault == "stop_after":
            assert is_saved(output_dir, step)
        elif expected == 1:
            assert "Traceback" in run.text()
        leftovers = [path.name for path in (output_dir / "checkpoints").glob("*tmp*")]
        assert not leftovers
        # Whatever it was, the same command goes on and ends well.
        run = fork_server.start(settings(text, output_dir, max_steps=N_STEPS))
        assert run.wait() == 0, run.text()
        assert is_saved(output_dir, N_STEPS) and (output_dir / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("length", [{"epochs": "0.3"}, {"max_steps": 13}])
def test_a_run_that_ends_by_itself_is_saved(fork_server, text, tmp_path, thorough, length):
    for n in range(10 if thorough else 1):
        output_dir = tmp_path / str(n)
        run = fork_server.start(settings(text, output_dir, seed=n, **length))
        assert run.wait() == 0, run.text()
        last = saved_steps(output_dir)[-1]
        assert last == length.get("max_steps", last) and last > 10
        assert is_saved(output_dir, last) and (output_dir / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_flipped_bit_of_one_device_is_found(fork_server, text, tmp_path, devices):
    """At the next comparison, and in any case before a save."""
    for name, step, more in (
        ("compared", 4, {"replica_check_every": 5, "save_every": 20}),
        ("saved", 12, {"replica_check_every": 1000, "save_every": 6}),
    ):
        output_dir = tmp_path / name
        run = fork_server.start(
            settings(text, output_dir, max_steps=N_STEPS, eval_every=0, **more),
            devices, fault=["flip_a_bit", step, devices - 1],
        )  # fmt: skip
        assert run.wait() == 5, run.text()
        found = {"compared": 5, "saved": 12}[name]
        error = run.text().split("error: ")[1]
        assert error.startswith(
            f"step {found}: the copies of the model and the optimizer on {devices} devices"
            " differ, that of "
        )
        odd = error.split("that of ")[1].split(" from the others; not saved")[0]
        # Of two that differ, neither is known to be right.
        assert odd == {4: "cpu:3", 2: "cpu:0 or cpu:1"}[devices]
        assert saved_steps(output_dir) == {"compared": [], "saved": [6]}[name]
    run = fork_server.start(
        settings(text, tmp_path / "never", max_steps=6, eval_every=0, replica_check_every=0),
        devices, fault=["flip_a_bit", 3, 1],
    )  # fmt: skip
    assert run.wait() == 0, run.text()
    for n_devices, code in ((1, 0), (2, 1)):  # of one device there is nothing to compare
        run = fork_server.start(
            settings(text, tmp_path / f"{n_devices}", max_steps=6, replica_check_every=1),
            n_devices, fault=["never_compare"],
        )  # fmt: skip
        assert run.wait() == code, run.text()
