"""Several processes of one run, as on several machines: real ones, which meet on 127.0.0.1."""

import json
import pathlib
import random
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
import yaml

from gpt2_flax import errors
from gpt2_flax.config.train_config import TrainConfig
from gpt2_flax.distributed import processes
from gpt2_flax.errors import run_main
from gpt2_flax.pretrained import orbax_files
from gpt2_flax.reporting import metrics
from scripts.convert import main as convert
from tests.faults.runs import (
    SETTINGS,
    as_argv,
    is_saved,
    learned,
    logged_steps,
    saved_steps,
    steps_of,
)

PATIENCE = 20  # seconds for a step, a save by two processes and 5 beside them, on busy cores


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {n} of {n * n}\n" for n in range(900)))
    return path


@pytest.fixture(scope="module")
def start(fork_server, text):
    """Start the processes of a run; what differs between them is given as lists."""

    def start(output_dir, count, devices, fault=None, **settings):
        address = f"127.0.0.1:{free_port()}"
        common = SETTINGS | {
            "train_file": text, "output_dir": output_dir, "max_steps": 20, "dropout": 0.1,
            "batch_size": 1, "log_every": 1, "eval_every": 10,
        }  # fmt: skip
        runs = []
        for number in range(count):
            own = {k: v[number] if isinstance(v, list) else v for k, v in settings.items()}
            joined = {"num_processes": count, "process_id": number, "coordinator_address": address}
            argv = as_argv(common | (joined if count > 1 else {}) | own)
            runs.append(fork_server.start(argv, devices, fault=fault))
        return runs

    return start


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_all(runs, seconds=120):
    return [run.wait(seconds) for run in runs]


# A line of JAX's transport, or a piece of one: its threads write into one another's lines.
GREETING = re.compile(r".*(Gloo|Rank|connected|peer|ranks|Expected).*|[\s\d.:\[\]]*|begun")


def words(run) -> str:
    """What our own code said."""
    lines = run.text().splitlines(keepends=True)
    return "".join(line for line in lines if not GREETING.fullmatch(line.rstrip("\n")))


def losses(output_dir):
    rows = metrics.read_log(output_dir / "metrics.jsonl")
    return [[row.get("train_loss"), row.get("validation_loss") or 0.0] for row in rows]


def ledger(output_dir):
    return (output_dir / "ledger.jsonl").read_text()


# ---------------------------------------------------------------- one run, however divided


@pytest.fixture(scope="module")
def alone(fork_server, text, tmp_path_factory):
    """20 steps of 8 rows by one process on eight devices."""
    output_dir = tmp_path_factory.mktemp("alone") / "run"
    settings = SETTINGS | {
        "train_file": text, "output_dir": output_dir, "max_steps": 20, "dropout": 0.1,
        "batch_size": 1, "log_every": 1, "eval_every": 10,
    }  # fmt: skip
    run = fork_server.start(as_argv(settings), 8)
    assert run.wait() == 0, run.text()
    return output_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "settings"),
    [
        pytest.param(1, 1, {"grad_accum": 8}, id="1 x 1"),
        pytest.param(2, 4, {}, id="2 x 4"),
        pytest.param(2, 2, {"grad_accum": 2, "parallel": "fsdp"}, id="2 x 2, fsdp"),
        # These take up to a minute each.
        pytest.param(
            2, 1, {"grad_accum": 4, "parallel": "jit"}, id="2 x 1, jit", marks=pytest.mark.thorough
        ),
        pytest.param(4, 2, {}, id="4 x 2", marks=pytest.mark.thorough),
        pytest.param(2, 4, {"parallel": "jit"}, id="2 x 4, jit", marks=pytest.mark.thorough),
        pytest.param(4, 2, {"parallel": "fsdp"}, id="4 x 2, fsdp", marks=pytest.mark.thorough),
    ],
)
def test_processes_and_devices_change_nothing_but_rounding(
    start, alone, tmp_path, count, devices, settings
):
    runs = start(tmp_path / "run", count, devices, **settings)
    assert wait_for_all(runs) == [0] * count, runs[0].text()
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)
    assert ledger(tmp_path / "run") == ledger(alone)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(
        path.name for path in alone.iterdir()
    )
    for run in runs[1:]:
        assert words(run) == ""


@pytest.mark.slow
def test_a_run_goes_on_in_other_processes_and_by_other_engines(start, alone, tmp_path, thorough):
    # The step after which the signal comes; several processes stop stopping.LAG steps later.
    stages = [(1, 8, 2, "pmap"), (2, 2, 12, "fsdp"), (2, 1, 15, "jit"), (1, 2, 20, "pmap")]
    if thorough:
        stages[1:1] = [(4, 1, 3, "jit"), (1, 4, 6, "fsdp"), (4, 2, 7, "pmap"), (1, 1, 10, "jit")]
    for count, devices, step, engine in stages:
        if count == 1 and step == 20:  # as a kill leaves it
            (tmp_path / "run" / processes.FOLDER).mkdir()
            (tmp_path / "run" / processes.FOLDER / "1.json").write_text("{}")
        fault = ["stop_after", step] if step < 20 else None
        runs = start(tmp_path / "run", count, devices, fault=fault, parallel=engine)
        codes = wait_for_all(runs)
        assert codes == [143 if step < 20 else 0] * count, runs[0].text()
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)
    assert ledger(tmp_path / "run") == ledger(alone)
    assert not (tmp_path / "run" / processes.FOLDER).exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pmap", pytest.param("fsdp", marks=pytest.mark.thorough)])
def test_memory_is_planned_by_several_processes(start, tmp_path, engine):
    """Which pmap cannot do from shapes: it takes arrays of each process then."""
    said = {}
    for more in ({"dry_run": "true"}, {"batch_size": "auto"}):
        settings = {"n_layers": 1, "max_steps": 1, "eval_rows": 2, "parallel": engine}
        runs = start(tmp_path / "run", 2, 1, **settings | more)
        assert wait_for_all(runs) == [0, 0], runs[0].text()
        assert words(runs[1]) == ""
        said |= dict.fromkeys(more, runs[0].text())
    assert re.search(r"\nmemory of a device: \d.* by the compiled program's plan", said["dry_run"])
    assert re.search(r"batch_size auto: \d+ rows a device; a step takes \d", said["batch_size"])


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_read_by_one(start, tmp_path):
    """In another topology, into the same numbers as the exported model has."""
    output_dir = tmp_path / "run"
    assert wait_for_all(start(output_dir, 2, 2, batch_size=2)) == [0, 0]
    code = run_main(convert, ["to_pytorch", "--checkpoint", str(output_dir), "--output",
                              str(tmp_path / "export")])  # fmt: skip
    assert code == 0
    names = ("run", "export")
    exported = [(tmp_path / name / "model.safetensors").read_bytes() for name in names]
    assert exported[0] == exported[1]


# ---------------------------------------------------------------- stops and faults


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_at_the_same_step(start, tmp_path, thorough):
    n_stops = 25 if thorough else 2
    length = {"max_steps": 30 * n_stops, "save_every": 25, "eval_every": 40}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    runs = start(unbroken, 2, 1, **length)
    assert wait_for_all(runs, 600) == [0, 0], runs[0].text()

    rng = random.Random(n_stops)
    for n in range(n_stops):
        number = (signal.SIGTERM, signal.SIGINT)[n % 2]
        runs = start(broken, 2, 1, fault=["slow_down", 0.05], **length)
        # Sometimes when the first has asked for the step, which the other may still compile.
        steps, patience = (steps_of, 2 * PATIENCE) if n % 5 == 0 else (logged_steps, PATIENCE)
        began, seen = time.monotonic(), len(steps(broken))
        while len(steps(broken)) <= seen and time.monotonic() < began + 60:
            assert runs[0].poll() is None, runs[0].text()
            time.sleep(0.01)
        time.sleep(rng.random())
        asked = time.monotonic()
        runs[(n + n // 2) % 2].kill(number)  # either signal to either
        assert wait_for_all(runs) == [128 + number] * 2, [run.text() for run in runs]
        assert time.monotonic() - asked < patience
        made = max(steps_of(broken))
        assert f"saved step {made};" in runs[0].text()
        assert saved_steps(broken)[-1] == made
        assert is_saved(broken, made)
    runs = start(broken, 2, 1, **length)
    assert wait_for_all(runs, 600) == [0, 0], runs[0].text()
    (state, cursor), (expected, expected_cursor) = learned(broken), learned(unbroken)
    assert cursor == expected_cursor
    np.testing.assert_equal(state, expected)
    assert ledger(broken) == ledger(unbroken)


SIXTY = {"max_steps": 60, "save_every": 10}


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """60 steps of two processes that nobody disturbs."""
    output_dir = tmp_path_factory.mktemp("unbroken") / "run"
    runs = start(output_dir, 2, 1, **SIXTY)
    assert wait_for_all(runs) == [0, 0], runs[0].text()
    return output_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (0, signal.SIGKILL),
        (1, signal.SIGSTOP),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.thorough),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.thorough),
    ],
)
def test_who_loses_another_process_ends_and_the_run_goes_on_afterwards(
    start, unbroken, tmp_path, number, victim, thorough
):
    broken = tmp_path / "broken"
    for n in range(5 if thorough else 1):
        patience = 30 if thorough else 4
        runs = start(broken, 2, 1, fault=["lose_patience", patience, 0.1], **SIXTY)
        began, wanted = time.monotonic(), 5 + max(steps_of(broken), default=0)
        while max(steps_of(broken), default=0) < wanted + n and time.monotonic() < began + 60:
            time.sleep(0.02)
        runs[victim].kill(number)
        lost = time.monotonic()
        other = runs[1 - victim]
        code = other.wait(70)
        assert time.monotonic() - lost < 60
        said = other.text()
        runs[victim].kill()
        runs[victim].wait()
        assert code == 6, said
        named = rf"error: process {victim} \(number \d+ on .*, at step \d+\) (has not|is gone)"
        assert re.search(named, said), said
        assert "Traceback" not in said
    runs = start(broken, 2, 1, **SIXTY)
    assert wait_for_all(runs) == [0, 0], runs[0].text()
    np.testing.assert_equal(learned(broken), learned(unbroken))
    assert steps_of(broken) == [*range(1, 61)]


@pytest.mark.slow
def test_a_process_that_hangs_is_named(start, tmp_path):
    runs = start(tmp_path / "run", 2, 1, fault=["hang_alone", 5, 1, 60], step_timeout=6)
    assert runs[0].wait(60) == 6, runs[0].text()
    assert runs[1].wait(60) == 6
    said = (
        r"no step was finished for \d+ s: process 0 is at step \d, in (.*); process 1 is at step"
    )
    found = re.search(said + r" \d, in fault_injection.py:\d+\n", runs[0].text())
    assert found, runs[0].text()
    assert "fault_injection.py" not in found[1]


@pytest.mark.slow
def test_a_single_process_that_hangs_ends_too(fork_server, text, tmp_path):
    settings = SETTINGS | {"train_file": text, "output_dir": tmp_path / "run", "max_steps": 90}
    run = fork_server.start(as_argv(settings | {"step_timeout": 3}), fault=["hang_in_step", 12])
    assert run.wait(60) == 6
    assert re.search(r"error: no step was finished for \d s: process 0 is at", run.text())


@pytest.mark.slow
def test_the_others_of_a_process_with_a_bug_say_whose_it_is(start, tmp_path):
    runs = start(tmp_path / "run", 2, 1, fault=["fail_alone", 5, 1])
    assert wait_for_all(runs) == [6, 1], [run.text() for run in runs]
    assert runs[1].text().count("RuntimeError: an injected fault in one process") == 1
    assert "error: process 1 on " in runs[0].text()
    assert "ended: an injected fault in one process" in runs[0].text()


@pytest.mark.slow
def test_a_full_disk_ends_all(start, tmp_path):
    """The first process writes; the error is its own."""
    runs = start(tmp_path / "run", 2, 1, fault=["fail_in_save", 10])
    codes = wait_for_all(runs)
    assert codes[0] == 4, runs[0].text()
    assert codes[1] != 0
    assert "No space left on device" in runs[0].text()


# ---------------------------------------------------------------- bad input


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"learning_rate": ["0.001", "0.002"]},
            "differs from process 0 in --learning_rate: 0.002",
        ),
        ({"batch_size": ["2", "1"]}, "in --batch_size: 1 instead of 2"),
        ({"save_every": "5 minutes"}, "save_every 5 minutes is a time"),
        ({"train_file": "nowhere.txt"}, "nowhere.txt"),
        ({"train_file": ["nowhere.txt", None]}, "nowhere.txt"),
    ],
)
def test_what_processes_cannot_do_together_is_refused_by_one_of_them(
    start, text, tmp_path, settings, match
):
    settings = {
        name: [text if v is None else v for v in value] if isinstance(value, list) else value
        for name, value in settings.items()
    }
    runs = start(tmp_path / "run", 2, 1, **settings)
    assert wait_for_all(runs) == [2, 2], [run.text() for run in runs]
    said = [words(run) for run in runs]
    assert sum("error: " in one for one in said) == 1, said
    assert match in "".join(said)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_text_under_the_same_name_is_refused(start, text, fork_server, tmp_path):
    """As on machines whose disks are their own."""
    runs = []
    address = f"127.0.0.1:{free_port()}"
    for number in range(2):
        home = tmp_path / str(number)
        home.mkdir()
        (home / "text.txt").write_text(text.read_text() + "x" * number)
        settings = SETTINGS | {
            "train_file": "text.txt", "output_dir": tmp_path / "run", "max_steps": 5,
            "num_processes": 2, "process_id": number, "coordinator_address": address,
        }  # fmt: skip
        runs.append(fork_server.start(as_argv(settings), cwd=str(home)))
    assert wait_for_all(runs) == [2, 2], [run.text() for run in runs]
    assert "process 1 differs from process 0 in its held-out text" in words(runs[0])


@pytest.mark.slow
def test_a_directory_that_is_not_shared_is_refused(text, fork_server, tmp_path):
    runs = []
    address = f"127.0.0.1:{free_port()}"
    for number in range(2):
        home = tmp_path / str(number)
        home.mkdir()
        settings = SETTINGS | {
            "train_file": text, "output_dir": "run", "max_steps": 5,
            "num_processes": 2, "process_id": number, "coordinator_address": address,
        }  # fmt: skip
        runs.append(fork_server.start(as_argv(settings), cwd=str(home)))
    assert wait_for_all(runs) == [2, 2], [run.text() for run in runs]
    assert "does not see what process 0 wrote into run" in words(runs[1])
    assert "error: " not in words(runs[0])


def test_processes_with_other_numbers_of_devices_are_refused(fork_server, text, tmp_path):
    """Also where the others have nobody left to ask by the time they know."""
    runs = []
    address = f"127.0.0.1:{free_port()}"
    for number in range(2):
        settings = SETTINGS | {
            "train_file": text, "output_dir": tmp_path / "run", "max_steps": 5,
            "num_processes": 2, "process_id": number, "coordinator_address": address,
        }  # fmt: skip
        fault = ["linger", 3 * number]
        runs.append(fork_server.start(as_argv(settings), devices=1 + number, fault=fault))
    assert wait_for_all(runs) == [2, 2], [run.text() for run in runs]
    said = "".join(map(words, runs))
    assert said.count("the processes have 1, 2 devices") == 1


@pytest.mark.slow
def test_a_coordinator_out_of_reach_is_named_within_30_seconds(fork_server, text, tmp_path):
    port = free_port()
    settings = SETTINGS | {
        "train_file": text, "output_dir": tmp_path / "run", "num_processes": 2, "process_id": 1,
        "coordinator_address": f"127.0.0.1:{port}",
    }  # fmt: skip
    began = time.monotonic()
    run = fork_server.start(as_argv(settings))
    assert run.wait(30) == 2
    assert time.monotonic() - began < 30
    assert f"the coordinator at 127.0.0.1:{port} does not answer (Connection refused)" in words(
        run
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_processes": 2}, "needs a coordinator_address"),
        ({"num_processes": 2, "process_id": 2}, "process_id 2 is not below num_processes 2"),
        ({"coordinator_address": "somewhere", "num_processes": 2}, "not of the form HOST:PORT"),
        ({"coordinator_address": "a:70000", "num_processes": 2}, "not of the form HOST:PORT"),
        ({"process_id": 1}, "process_id has no effect with num_processes 0"),
        ({"num_processes": -1}, "num_processes must be 0 or more"),
        ({"step_timeout": -1}, "step_timeout must be 0 or more"),
    ],
)
def test_settings_by_which_processes_cannot_meet_are_refused(settings, match):
    from gpt2_flax.config.train_config import load_config

    with pytest.raises(errors.UserError, match=re.escape(match)):
        load_config(as_argv(settings))


@pytest.mark.slow
def test_how_processes_meet_is_not_a_part_of_the_run(start, tmp_path):
    runs = start(tmp_path / "run", 2, 1, max_steps=2)
    assert wait_for_all(runs) == [0, 0]
    saved = (tmp_path / "run" / "config.yaml").read_text()
    settings = yaml.safe_load(saved)
    assert not {"num_processes", "process_id", "coordinator_address"} & settings.keys()


# ---------------------------------------------------------------- launchers


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip
OPEN_MPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}


@pytest.mark.parametrize(
    ("environment", "settings", "expected"),
    [
        ({}, {}, None),
        (SLURM, {}, {}),
        (SLURM | {"SLURM_NTASKS": "1"}, {}, None),
        (SLURM, {"num_processes": 1}, None),
        (SLURM, {"coordinator_address": "a:1"}, {"coordinator_address": "a:1"}),
        (OPEN_MPI_5, {}, {"num_processes": 4, "process_id": 3}),
        (OPEN_MPI_5 | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.1:5"}, {}, {}),
        (
            OPEN_MPI_5,
            {"coordinator_address": "a:1"},
            {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3},
        ),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, {}, {}),
        (
            SLURM,
            {"num_processes": 3, "process_id": 2, "coordinator_address": "b:2"},
            {"coordinator_address": "b:2", "num_processes": 3, "process_id": 2},
        ),
    ],
)
def test_who_launched_the_processes_is_told_by_the_environment(
    environment, settings, expected, monkeypatch
):
    for name in (*SLURM, *OPEN_MPI_5, "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.wanted(TrainConfig(**settings)) == expected


def test_a_coordinator_of_nobody_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(errors.UserError, match="a:1 has no effect without num_processes"):
        processes.wanted(TrainConfig(coordinator_address="a:1"))


@pytest.mark.slow
def test_slurm_s_own_variables_are_enough(fork_server, text, tmp_path):
    """As `srun` sets them for two tasks on one machine."""
    port = free_port()
    runs = []
    for number in range(2):
        settings = SETTINGS | {
            "train_file": text, "output_dir": tmp_path / "run", "max_steps": 3, "batch_size": 1,
        }  # fmt: skip
        variables = SLURM | {
            "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_PROCID": str(number),
            "SLURM_LOCALID": str(number), "JAX_COORDINATOR_PORT": str(port),
        }  # fmt: skip
        runs.append(fork_server.start(as_argv(settings), fault=["set_variables", variables]))
    assert wait_for_all(runs) == [0, 0], [run.text() for run in runs]
    assert "step: 2 rows" in words(runs[0])
    assert words(runs[1]) == ""
    rows = [json.loads(line)["rows"] for line in ledger(tmp_path / "run").splitlines()]
    assert [len(of_step) for of_step in rows] == [2, 2, 2]
    assert len({tuple(row) for of_step in rows for row in of_step}) == 6


# ---------------------------------------------------------------- in one process


def test_one_process_agrees_with_itself():
    assert processes.gather({"a": 1}) == [{"a": 1}]
    assert processes.agree([2]) == [2]
    assert processes.first_only(lambda: (3, None)) == (3, None)
    processes.check_alike({"a": 1})
    with pytest.raises(KeyError), processes.together():
        raise KeyError("a")


def test_the_code_s_version_depends_on_the_code(monkeypatch, tmp_path):
    before = processes.code_version()
    assert before == processes.code_version()
    copy = tmp_path / "gpt2_flax"
    shutil.copytree(pathlib.Path(processes.__file__).parents[1], copy)
    monkeypatch.setattr(processes, "__file__", str(copy / "distributed" / "processes.py"))
    assert processes.code_version() == before
    changed = copy / "training" / "step.py"
    changed.write_text(changed.read_text() + "\n")
    assert processes.code_version() != before


def test_meta_is_read_without_orbax(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "metadata").write_text('{"a": [1, null]}')
    assert orbax_files.read_meta(tmp_path) == {"a": [1, None]}
    (tmp_path / "meta" / "metadata").write_text("[1]")
    with pytest.raises(ValueError, match="no JSON object"):
        orbax_files.read_meta(tmp_path)


def test_a_process_that_differs_from_the_first_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda about: [about, about | {"its text": "b"}])
    with pytest.raises(errors.UserError, match="process 1 differs from process 0 in its text"):
        processes.check_alike({"its text": "a", "its model": {}})
