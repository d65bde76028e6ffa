"""Memory in huge pages: fewer page faults where much of it comes and goes.

On a CPU, XLA allocates a step's temporary memory anew each time, and the system hands those
gigabytes out in pages of 4 KiB. glibc asks for huge ones if it is told so before a process starts.
"""

import contextlib
import os
import pathlib
import sys

TUNABLE = "glibc.malloc.hugetlb"  # 1: madvise(MADV_HUGEPAGE). Since glibc 2.35; others ignore it
MODES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def variables() -> dict[str, str]:
    """What has to be added to a process's environment; nothing where it would have no effect.

    That is where the system gives huge pages to all or to nobody, where it is not Linux, and
    where GLIBC_TUNABLES names the tunable already, with whatever value.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    try:
        on_request = "[madvise]" in MODES.read_text()
    except OSError:
        on_request = False
    if TUNABLE in given or not on_request:
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, [given, f"{TUNABLE}=1"]))}


def start_again() -> None:
    """Begin the program anew, in the same process, with `variables`; before any long import.

    The program is a script or `python -m gpt2_flax`. Neither where it isn't what the process was
    started for, as in a notebook, nor under a debugger, which would lose it.
    """
    added = variables()
    if sys.gettrace() is not None or "pydevd" in sys.modules:
        return
    program = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
    is_module = program is not None and program.name == "gpt2_flax.__main__"
    if added and (is_module or sys.argv[0] in sys.orig_argv) and sys.executable:
        with contextlib.suppress(OSError):  # then without
            os.execve(sys.executable, sys.orig_argv, os.environ | added)
