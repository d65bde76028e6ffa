"""Huge pages: asked for where that has an effect, by starting a script once more."""

import json
import os
import platform
import subprocess
import sys

import pytest

from gpt2_flax import huge_pages
from tests.fork_server import ROOT

SCRIPT = """
import ctypes, json, os, pathlib, sys
from gpt2_flax import huge_pages
print("begun", flush=True)
huge_pages.start_again()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
n = 1 << 28
libc.memset(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(n))), 1, ctypes.c_size_t(n))
rollup = pathlib.Path("/proc/self/smaps_rollup").read_text()
huge = [line.split()[1] for line in rollup.splitlines() if line.startswith("AnonHuge")]
print(json.dumps([os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), *huge]))
"""


@pytest.fixture
def mode(tmp_path, monkeypatch):
    """Has the system say when it gives huge pages; nobody has asked for any."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(huge_pages, "MODES", tmp_path / "enabled")
    monkeypatch.setattr(sys, "gettrace", lambda: None)  # whoever watches these tests
    return (tmp_path / "enabled").write_text


@pytest.mark.parametrize(
    ("said", "given", "expected"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.x=2", "glibc.x=2:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_they_are_asked_for_where_that_has_an_effect(mode, monkeypatch, said, given, expected):
    if said is not None:
        mode(said)
    if given is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    assert huge_pages.variables() == ({"GLIBC_TUNABLES": expected} if expected else {})


def test_what_was_not_started_as_a_script_is_left_alone(mode, monkeypatch):
    def execve(*arguments):
        raise AssertionError(arguments)

    mode("always [madvise] never")
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "--help"])
    huge_pages.start_again()  # as by a notebook's %run, or runpy
    monkeypatch.setattr(sys, "argv", [sys.orig_argv[-1]])
    with pytest.raises(AssertionError):
        huge_pages.start_again()
    monkeypatch.setattr(sys, "executable", "")
    huge_pages.start_again()


def test_a_debugger_keeps_its_process(mode, monkeypatch):
    mode("always [madvise] never")
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("started again"))
    monkeypatch.setattr(sys, "argv", [sys.orig_argv[-1]])
    monkeypatch.setitem(sys.modules, "pydevd", object())
    huge_pages.start_again()
    monkeypatch.delitem(sys.modules, "pydevd")
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    huge_pages.start_again()


def test_without_an_interpreter_to_start_it_goes_on(mode, monkeypatch, tmp_path):
    mode("always [madvise] never")
    monkeypatch.setattr(sys, "argv", [sys.orig_argv[-1]])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    huge_pages.start_again()


def run(folder, given: str | None) -> list:
    """[process id, line of its output, ...] of the script with GLIBC_TUNABLES of `given`."""
    (folder / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("GLIBC_TUNABLES", None)
    if given:
        environment["GLIBC_TUNABLES"] = given
    command = [sys.executable, "-X", "utf8", "script.py", "a b", "-c", ""]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    ) as process:
        said, _ = process.communicate()
    assert process.returncode == 0
    return [process.pid, *said.splitlines()]


@pytest.mark.skipif(
    not huge_pages.variables() or platform.libc_ver() < ("glibc", "2.35"),
    reason="huge pages are not to be had by asking for them, or were asked for already",
)
def test_a_script_starts_once_more_as_itself_and_has_them(tmp_path):
    pid, *begun, said = run(tmp_path, None)
    assert begun == ["begun", "begun"]
    own_pid, argv, tunables, huge_kb = json.loads(said)
    assert (own_pid, argv, tunables) == (pid, ["a b", "-c", ""], "glibc.malloc.hugetlb=1")
    assert int(huge_kb) > 1 << 17
    pid, *begun, said = run(tmp_path, "glibc.malloc.hugetlb=0")
    assert begun == ["begun"]


def test_train_py_asks_for_them(tmp_path):
    begun = tmp_path / "begun"
    count = f"import pathlib\nwith pathlib.Path({str(begun)!r}).open('a') as file: file.write('1')"
    (tmp_path / "sitecustomize.py").write_text(count)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "scripts/train.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("usage:")
    assert len(begun.read_text()) == (2 if huge_pages.variables() else 1)
