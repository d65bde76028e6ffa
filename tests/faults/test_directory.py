"""A run's directory is one run's: others are refused at once, and nothing in it changes."""

import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import signal
import time

import pytest

from gpt2_flax.config.train_config import COMMAND_ONLY, FIELDS, FREE_ON_RESUME, load_config
from gpt2_flax.errors import UserError
from gpt2_flax.training import run_directory, train
from tests.faults.runs import SETTINGS, as_argv, wait_until_saved
from tests.tiny_runs import TINY

SECONDS = 5
RUN = SETTINGS | {"max_steps": 20, "save_every": 5, "eval_every": 0}
FIXED = sorted({*FIELDS} - FREE_ON_RESUME)


def other_than(value):
    """Another value of a setting's type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, "more.txt")
    return value + {str: "x", int: 1, float: 0.25}[type(value)]


def tree(folder: pathlib.Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def finished(finished_run, tiny_text, tmp_path_factory):
    """Settings of a run that is done."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(finished_run, output_dir)
    return load_config([*TINY, "--train_file", str(tiny_text), "--output_dir", str(output_dir)])


@pytest.mark.slow
def test_a_second_trainer_is_told_who_is_there(fork_server, text, tmp_path):
    settings = RUN | {"train_file": text, "output_dir": tmp_path / "run"}
    first = fork_server.start(as_argv(settings), fault=["hang_in_step", 12])
    wait_until_saved(first, tmp_path / "run", 10)
    before = tree(tmp_path / "run")
    began = time.monotonic()
    second = fork_server.start(as_argv(settings))
    assert second.wait() == 2
    assert time.monotonic() - began < SECONDS
    owner = f"is in use by process {first.pid} on {os.uname().nodename}\n"
    assert owner in second.text() and len(second.text().splitlines()) == 3  # with "begun"
    assert tree(tmp_path / "run") == before
    # A lock that a kill left behind is nobody's.
    first.kill(signal.SIGKILL)
    first.wait()
    third = fork_server.start(as_argv(settings))
    assert third.wait() == 0, third.text()
    assert "continuing after step 10" in third.text()


@pytest.mark.parametrize("name", FIXED)
def test_other_settings_are_refused_with_their_names(finished, name):
    output_dir = pathlib.Path(finished.output_dir)
    before = tree(output_dir)
    changed = dataclasses.replace(finished, **{name: other_than(getattr(finished, name))})
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"other settings: {name} \S+ -> .*\n  choose another"):
        train.train(changed)
    assert time.monotonic() - began < SECONDS
    assert tree(output_dir) == before


@pytest.mark.parametrize("name", sorted(FREE_ON_RESUME - {*COMMAND_ONLY, "output_dir"}))
def test_what_may_change_may_change(finished, name):
    changed = dataclasses.replace(finished, **{name: other_than(getattr(finished, name))})
    assert run_directory.check(changed, pathlib.Path(changed.output_dir))


def test_at_least_thirty_settings_make_another_run():
    assert len(FIXED) >= 30


def test_the_docs_list_what_may_change():
    docs = pathlib.Path(__file__).parents[2] / "docs" / "reliability.md"
    (line,) = [row for row in docs.read_text().splitlines() if "may change:" in row]
    listed = {*re.findall(r"`--(\w+)`", line.split("may change:")[1])}
    assert listed == FREE_ON_RESUME - {*COMMAND_ONLY}
