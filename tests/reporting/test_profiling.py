"""Traces of steps: the files that TensorBoard's profile plugin and Perfetto open."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from gpt2_flax.config.train_config import load_config, profiled_steps
from gpt2_flax.errors import StorageError, UserError
from gpt2_flax.reporting import profiling
from gpt2_flax.reporting.profiling import StepTrace


def read_steps(output_dir):
    """The numbers of the steps in a run's trace, in order of time."""
    (path,) = output_dir.glob("profile/plugins/profile/*/*.trace.json.gz")
    assert path.with_name(path.name.replace(".trace.json.gz", ".xplane.pb")).stat().st_size > 0
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == profiling.STEP]
    assert all(event["dur"] > 0 for event in steps)
    return [int(event["args"]["step_num"]) for event in sorted(steps, key=lambda e: e["ts"])]


@pytest.fixture(scope="module")
def work():
    return jax.jit(lambda x: jnp.sin(x @ x).sum())


def run_steps(trace, work, first, last):
    for n in range(first, last + 1):
        if trace.begins_at(n):
            trace.start()
        with trace.annotated(n):
            work(jnp.ones((50, 50))).block_until_ready()
        if trace.ends_at(n):
            trace.stop()
    trace.close()


@pytest.mark.parametrize(
    ("first", "last", "traced"),
    [(1, 9, [4, 5, 6]), (5, 9, [5, 6]), (1, 5, [4, 5]), (6, 6, [6])],
    ids=["whole", "resumed inside", "stopped inside", "one"],
)
def test_a_trace_holds_the_steps_that_were_asked_for(first, last, traced, work, tmp_path):
    run_steps(StepTrace(tmp_path, (4, 6)), work, first, last)
    assert read_steps(tmp_path) == traced


@pytest.mark.parametrize("span", [None, (4, 6)])
def test_without_such_steps_nothing_is_written(span, work, tmp_path):
    run_steps(StepTrace(tmp_path, span), work, 7, 9)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "profile").touch()
    with pytest.raises(StorageError, match=r"cannot write .*profile: File exists"):
        StepTrace(tmp_path, (1, 2)).start()


def test_a_trace_that_cannot_be_written_is_a_storage_error(tmp_path, monkeypatch):
    def stop_trace():
        raise RuntimeError("no space left")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **options: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop_trace)
    trace = StepTrace(tmp_path, (1, 2))
    trace.start()
    with pytest.raises(StorageError, match=r"cannot write the trace .*no space left"):
        trace.close()


# ---------------------------------------------------------------- the setting


def test_steps_are_read():
    assert profiled_steps("10:15") == (10, 15)
    assert profiled_steps("7:7") == (7, 7)
    assert profiled_steps("1:100") == (1, 100)


@pytest.mark.parametrize(
    "text", ["10", "10:", ":15", "15:10", "0:3", "-1:3", "1:101", "a:b", "1:2:3", "1.5:2",
             "\uff11:2", " 1:2", "1:2\n", "1:" + "9" * 30],
)  # fmt: skip
def test_what_names_no_steps_is_refused(text):
    assert profiled_steps(text) is None
    with pytest.raises(UserError, match=r"^profile .*: expected first:last") as error:
        load_config(["--profile", text] if not text.startswith("-") else [f"--profile={text}"])
    assert len(str(error.value).splitlines()) == 2


def test_steps_beyond_the_last_are_refused_before_anything_is_read():
    with pytest.raises(UserError, match=r"^profile 10:15 goes beyond max_steps 14\n"):
        load_config(["--profile", "10:15", "--max_steps", "14"])
    load_config(["--profile", "10:15", "--max_steps", "15"])


def test_a_number_that_yaml_makes_of_it_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("profile: 10:15\n")  # YAML 1.1 reads 615
    with pytest.raises(UserError, match=r"profile: expected text \(in quotes.*got 615"):
        load_config(["--config", str(path)])
    path.write_text("profile: '10:15'\n")
    assert load_config(["--config", str(path)]).profile == "10:15"
