"""What glibc is told about memory that is freed."""

import os
import pathlib
import platform
import subprocess
import sys
from unittest import mock

import pytest

from gpt2_flax.distributed import memory

ROOT = pathlib.Path(__file__).resolve().parents[2]
# 640 MB in blocks that glibc does not map one by one, freed within the context and without it.
PROGRAM = """
import ctypes, resource
from gpt2_flax.distributed import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def take_and_free():
    blocks = [ctypes.create_string_buffer(b"x" * 2**24) for _ in range(40)]
    blocks.clear()

before = resident()
with memory.kept_when_freed():
    take_and_free()
    assert resident() > before + 600e6
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    take_and_free()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt < faults + 20000
assert resident() < before + 100e6
take_and_free()
assert resident() < before + 200e6
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_memory_is_kept_in_the_context_and_given_back_after_it():
    variables = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=4096"),
        ("MALLOC_MMAP_THRESHOLD_", "4096"),
    ],
)
def test_who_has_told_glibc_otherwise_is_obeyed(monkeypatch, name, value):
    library = mock.Mock()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    with memory.kept_when_freed():
        assert library.mallopt.call_count == 2
    assert library.mallopt.call_count == 3
    monkeypatch.setenv(name, value)
    with memory.kept_when_freed():
        pass
    assert library.mallopt.call_count == 3


def test_another_c_library_is_told_nothing(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    with memory.kept_when_freed():
        pass


@pytest.mark.parametrize(("limit", "n_rows"), [(5, 1), (20, 2), (39, 2), (100, 4), (200, 8)])
def test_the_largest_batch_that_fits_is_chosen(limit, n_rows):
    """By the first two, 8 rows would take 80 bytes."""
    needed = {1: 10, 2: 20, 4: 40, 8: 200}
    assert memory.largest_batch(needed.get, limit, [*needed]) == n_rows
