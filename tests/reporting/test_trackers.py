"""TensorBoard and Weights & Biases, read back from the files that they themselves wrote."""

import importlib.util
import os
import struct
import sys
import time
import types

import pytest

from gpt2_flax.errors import UserError
from gpt2_flax.reporting import trackers

HAS_TENSORBOARD = all(map(importlib.util.find_spec, ("tensorboardX", "tensorboard")))
needs_tensorboard = pytest.mark.skipif(
    not HAS_TENSORBOARD, reason="tensorboardX and tensorboard are optional"
)
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is optional"
)


# ---------------------------------------------------------------- TensorBoard


def read_tensorboard(folder):
    """tag -> [(step, value)] of what TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    for tag in events.Tags()["tensors"]:
        found[tag] = [
            (event.step, event.tensor_proto.string_val[0].decode())
            for event in events.Tensors(tag)
        ]
    return found


@needs_tensorboard
def test_tensorboard_shows_numbers_and_texts(tmp_path):
    reporter = trackers.make("tensorboard", tmp_path, {}, 0)
    reporter.scalars(7, {"train_loss": 2.5, "mfu": None})
    reporter.scalars(8, {"train_loss": 2.25, "tokens": 10})
    reporter.text(8, "sample", "one *line*\n<b>two</b>")
    reporter.close()
    reporter.close()
    assert read_tensorboard(tmp_path) == {
        "train_loss": [(7, 2.5), (8, 2.25)],
        "tokens": [(8, 10.0)],
        "sample/text_summary": [(8, "    one *line*\n    <b>two</b>")],
    }


@needs_tensorboard
def test_tensorboard_forgets_what_a_kill_left_beyond_the_checkpoint(tmp_path, monkeypatch):
    def write(step, values):
        reporter = trackers.make("tensorboard", tmp_path, {}, step)
        for n, value in values.items():
            reporter.scalars(n, {"train_loss": value})
        reporter.close()

    write(0, {1: 1.0, 2: 2.0, 3: 3.0})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 5)  # it is part of the next file's name
    write(1, {2: 20.0})
    assert read_tensorboard(tmp_path)["train_loss"] == [(1, 1.0), (2, 20.0)]


@needs_tensorboard
def test_what_was_reported_soon_outlives_a_kill(tmp_path):
    """It is on disk while nothing more is reported, and before the end."""
    reporter = trackers.make("tensorboard", tmp_path, {}, 0)
    for step in (1, 2):
        reporter.scalars(step, {"train_loss": 1.0 * step})
    last = time.monotonic() + 9  # the writer's own interval is longer
    while len(read_tensorboard(tmp_path).get("train_loss", [])) < 2 and time.monotonic() < last:
        time.sleep(0.2)
    assert read_tensorboard(tmp_path) == {"train_loss": [(1, 1.0), (2, 2.0)]}
    reporter.close()


# ---------------------------------------------------------------- Weights & Biases


def read_wandb(path):
    """The records of a .wandb file: a log of LevelDB's format after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = path.read_bytes(), 7, b""
    assert b":W&B".startswith(content[:4])
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # a block's end, too short for a head
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if at + 7 + length > len(content):  # it is still being written
            return
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_when_ended(path):
    """Another process writes the file, and may still be at it."""
    last = time.monotonic() + 60
    while time.monotonic() < last:
        records = list(read_wandb(path))
        if records and records[-1].HasField("exit"):
            return records
        time.sleep(0.1)
    raise AssertionError(f"no end in {[record.WhichOneof('record_type') for record in records]}")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


@needs_wandb
@pytest.mark.filterwarnings("default")  # of wandb's own making, about Python and pydantic
def test_wandb_holds_numbers_and_texts(offline, tmp_path):
    reporter = trackers.make("wandb", tmp_path, {"seed": 3, "train_file": ("a.txt",)}, 0)
    reporter.scalars(7, {"train_loss": 2.5, "mfu": None})
    reporter.scalars(8, {"train_loss": 2.25})
    reporter.text(8, "sample", "<script>x</script>\ntwo")
    reporter.scalars(8, {"validation_loss": 2.0})
    reporter.close()
    reporter.close()
    (log,) = tmp_path.glob("wandb/offline-*/*.wandb")
    records = read_when_ended(log)
    history = [
        {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["train_loss"]) for row in history] == [("7", "2.5"), ("8", "2.25")]
    assert "mfu" not in history[0]
    assert history[1]["validation_loss"] == "2"
    (run,) = [record.run for record in records if record.HasField("run")]
    settings = {update.key: update.value_json for update in run.config.update}
    assert (settings["seed"], settings["train_file"]) == ("3", '["a.txt"]')
    assert run.run_id == (tmp_path / "wandb_id.txt").read_text()
    (page,) = tmp_path.glob("wandb/offline-*/files/media/html/*.html")
    assert page.read_text() == "<pre>&lt;script&gt;x&lt;/script&gt;\ntwo</pre>"


def test_sessions_of_a_run_have_one_id(tmp_path):
    first = trackers.own_id(tmp_path)
    assert trackers.own_id(tmp_path) == first
    (tmp_path / "other").mkdir()
    assert trackers.own_id(tmp_path / "other") != first
    (tmp_path / "wandb_id.txt").write_text("../../not an id")
    assert trackers.own_id(tmp_path).isalnum()


class WandBError(Exception):
    pass


@pytest.fixture
def strict_wandb(monkeypatch):
    """In place of the package: it can neither log in nor start."""

    def fail(**options):
        raise WandBError("api_key not configured\nlong story")

    module = types.SimpleNamespace(init=fail, login=fail, Error=WandBError, Html=None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: module)


def test_a_wandb_that_does_not_start_is_the_user_s_to_put_right(tmp_path, strict_wandb):
    with pytest.raises(UserError, match=r"did not start: api_key not configured\n  wandb login"):
        trackers.make("wandb", tmp_path, {}, 0)


def test_an_account_that_is_missing_is_found_before_the_run(strict_wandb, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match=r"did not start: api_key not configured\n  wandb login"):
        trackers.check("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check("wandb")


# ---------------------------------------------------------------- both


def test_without_a_reporter_nothing_is_written(tmp_path):
    reporter = trackers.make("none", tmp_path, {}, 0)
    reporter.scalars(1, {"train_loss": 1.0})
    reporter.text(1, "sample", "x")
    reporter.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        ("tensorboard", "tensorboardX", "pip install tensorboardX tensorboard"),
        ("wandb", "wandb", "pip install wandb"),
    ],
)
def test_a_reporter_that_is_not_installed_is_named(name, module, command, monkeypatch):
    trackers.check("none")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda found: None)
    with pytest.raises(UserError, match=rf"--report_to {name} needs .*{module}\n  {command}$"):
        trackers.check(name)
