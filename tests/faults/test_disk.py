"""A disk that is full or may not be written: what was saved stays, and the run says what it needs.

The disks are small ones in memory, which only root can mount.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import subprocess
import time

import pytest

from gpt2_flax import filesystem
from gpt2_flax.errors import StorageError
from gpt2_flax.training import checkpoint
from tests.faults.runs import SETTINGS, as_argv, is_saved, saved_steps

N_STEPS = 40  # a quarter of which is the most between two saves
ROOM = 64 << 20
# 1.7 MB of parameters and twice as much of Adam's.
WIDE = {"n_embd": 128, "save_every": 10, "eval_every": 0, "keep": 4}


def mount(*arguments) -> bool:
    command = ["mount", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A file system of ROOM bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or not mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", place):
        pytest.skip("no small disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: pathlib.Path, but: int) -> None:
    """Take all but some bytes of a disk."""
    free = shutil.disk_usage(disk).free
    with open(disk / "ballast", "wb") as file, contextlib.suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, max(1, free - but))


def tree(folder: pathlib.Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def start(fork_server, text, disk):
    def start(n_steps=N_STEPS, fault=None, **more):
        settings = (
            SETTINGS
            | WIDE
            | {
                "train_file": text,
                "output_dir": disk / "run",
                "max_steps": n_steps,
                "cache_dir": disk.parent / "cache",
            }
        )
        return fork_server.start(as_argv(settings | more), fault=fault)

    return start


@contextlib.contextmanager
def held(start, disk, step: int, saved: int | None):
    """A run that is held after a step, with another one saved."""
    path = disk.parent / "held"
    run = start(fault=["hold", step, str(path)])
    wait_until(run, lambda: path.exists() and (not saved or is_saved(disk / "run", saved)))
    yield run
    path.unlink()


def wait_until(run, condition):
    last = time.monotonic() + 120
    while not condition():
        assert run.poll() is None and time.monotonic() < last, run.text()
        time.sleep(0.002)


def assert_refused(run, disk, before, words):
    assert run.wait() == 4, run.text()
    error = run.text().split("error: ")[1]
    assert words in error and len(error.splitlines()) <= 3, run.text()
    assert "Traceback" not in run.text()
    checkpoints = disk / "run" / "checkpoints"
    after = tree(checkpoints) if checkpoints.exists() else {}
    assert {name: after.get(name) for name in before} == before
    assert not [*(disk / "run").rglob("*tmp*")], run.text()
    for step in saved_steps(disk / "run"):
        assert is_saved(disk / "run", step)


@pytest.mark.parametrize(
    "at",
    [
        10,
        pytest.param(20, marks=pytest.mark.thorough),
        pytest.param(40, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_at_the_first_a_middle_and_the_last_save(start, disk, at):
    with held(start, disk, at - 2, saved=at - 10) as run:
        before = tree(disk / "run" / "checkpoints") if at > 10 else {}
        fill(disk, but=1_000_000)
    assert_refused(run, disk, before, "cannot save a checkpoint in ")
    assert "No space left on device\n  0.005 GB are needed and 0.0" in run.text()
    assert saved_steps(disk / "run") == [*range(10, at, 10)]
    if at == 10:
        return
    # With room again, the same command goes on from what there is.
    (disk / "ballast").unlink()
    run = start()
    assert run.wait() == 0, run.text()
    assert f"continuing after step {at - 10}" in run.text()
    assert is_saved(disk / "run", N_STEPS)


@pytest.mark.slow
def test_a_full_disk_at_the_export_and_at_the_log(start, disk):
    run = start()
    assert run.wait() == 0, run.text()
    before = tree(disk / "run" / "checkpoints")
    weights = (disk / "run" / "model.safetensors").read_bytes()
    fill(disk, but=1_000_000)
    run = start()  # the run is complete: all it does is to write out its model again
    assert_refused(run, disk, before, "model.safetensors: ")
    assert " GB are needed and 0.001 GB free; make room" in run.text()
    assert (disk / "run" / "model.safetensors").read_bytes() == weights  # the old one, whole

    (disk / "ballast").unlink()
    fill(disk, but=0)
    run = start(n_steps=N_STEPS + 20)
    assert_refused(run, disk, before, ".jsonl")
    assert "0.000 GB are " in run.text()
    (disk / "ballast").unlink()
    run = start(n_steps=N_STEPS + 20)
    assert run.wait() == 0, run.text()


@pytest.mark.slow
def test_a_disk_that_may_only_be_read(start, disk):
    run = start()
    assert run.wait() == 0, run.text()
    before = tree(disk / "run")
    assert mount("-o", "remount,ro", disk)
    for n_steps in (N_STEPS, N_STEPS + 20):
        run = start(n_steps)
        assert_refused(run, disk, {}, "Read-only file system")
    assert tree(disk / "run") == before
    assert mount("-o", "remount,rw", disk)


@pytest.mark.slow
def test_a_checkpoint_folder_that_becomes_read_only(start, disk):
    folder = disk / "run" / "checkpoints"
    with held(start, disk, 15, saved=10) as run:
        before = tree(folder / "10")
        assert mount("--bind", folder, folder) and mount("-o", "remount,bind,ro", folder)
    try:
        assert run.wait() == 4, run.text()
        assert "Read-only file system" in run.text() and "Traceback" not in run.text()
        assert tree(folder / "10") == before
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_too_little_room_for_two_checkpoints_is_said_at_the_start(start, disk):
    disk.mkdir(exist_ok=True)
    fill(disk, but=6_000_000)
    run = start()
    wait_until(run, lambda: "compiling" in run.text())
    assert "the next checkpoints may not fit into" in run.text()
    assert "0.010 GB are needed and 0.006 GB free" in run.text()
    run.kill()
    run.wait()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_what_the_system_refuses_is_said(tmp_path, number):
    """Also a quota, which a small disk in memory does not have for root."""
    reason = os.strerror(number)
    for raised in (OSError(number, reason), ValueError(f"INTERNAL: {reason} [a long report]")):
        with (
            pytest.raises(StorageError, match=rf"{reason}\n  1\.500 GB are needed and .* free;"),
            checkpoint.storage_errors(tmp_path, lambda: 1_500_000_000),
        ):
            raise raised
    with (
        pytest.raises(StorageError, match=rf"{reason}\n  .* GB are free there; make room"),
        filesystem.storage_errors(tmp_path / "file"),
    ):
        raise OSError(number, reason)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ValueError, match="something else"), checkpoint.storage_errors(tmp_path):
        raise ValueError("something else")
