"""What glibc is told about memory that is freed."""

import os
import pathlib
import platform
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# 640 MB in blocks that glibc does not map one by one, freed within the context and without it.
PROGRAM = """
import ctypes, resource
from gpt2_flax import memory

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


def test_another_c_library_is_told_nothing(monkeypatch):
    from gpt2_flax import memory

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    with memory.kept_when_freed():
        pass
