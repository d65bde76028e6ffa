"""Memory of devices: what a step takes, what there is, and what is said when it runs out."""

import contextlib
import ctypes
import os
import pathlib
from collections.abc import Callable

import jax

from gpt2_flax.errors import UserError

USABLE = 0.9  # of a device's memory; the rest is for what the compiler does not plan
# Of glibc's mallopt, and the most that it takes for the first, in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_THRESHOLD = -1, -3, 32 * 2**20
# Tokens at a time beyond which a device only takes longer: its units have enough to do.
MOST_TOKENS = {"cpu": 2**13}


def device_bytes() -> int:
    """Memory that one device may use: its own, or on a CPU this process's share a device."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or host_bytes() // jax.local_device_count()


def host_bytes() -> int:
    """Memory of this machine that is free, or all of it where the system doesn't say."""
    try:
        fields = dict(
            line.split(":", 1) for line in pathlib.Path("/proc/meminfo").read_text().splitlines()
        )
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # a container may have less
        group = pathlib.Path("/sys/fs/cgroup")
        allowed = int((group / "memory.max").read_text())
        free = min(free, allowed - int((group / "memory.current").read_text()))
    return max(0, free)


def step_bytes(compiled) -> int:
    """What a compiled step takes of one device: arguments, results and all in between."""
    plan = compiled.memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )


def trim_after_compiling() -> None:
    """From now on give back to the system what the compiler of a program has freed.

    glibc would keep it beside what the program then takes: 0.3 GB at 124M. Other C libraries
    have nothing to be told.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and not _trims:
        _trims.append(trim)
        jax.monitoring.register_event_duration_secs_listener(_trim)


_trims: list[Callable] = []


def _trim(event: str, duration_secs: float, **unused) -> None:
    if event == "/jax/core/compile/backend_compile_duration" and duration_secs > 0.2:
        for trim in _trims:
            trim(0)


@contextlib.contextmanager
def kept_when_freed():
    """Context in which memory that is freed is taken again, and not first given to the system.

    For what allocates and frees much in turn: each page that the system gives is cleared, and
    that is a third of the time of reading a checkpoint. Afterwards glibc has the thresholds that
    it comes to by itself where large blocks are freed. Other C libraries have nothing to be told,
    and one that was told otherwise by the environment is left alone.
    """
    library = ctypes.CDLL(None)
    told = f"{os.environ.get('GLIBC_TUNABLES')} {[*os.environ]}".lower()
    is_told = "trim_threshold" in told or "mmap_threshold" in told
    if is_told or not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
    library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_THRESHOLD)
        library.malloc_trim(0)


def largest_batch(bytes_of: Callable[[int], int], limit: int, allowed: list[int]) -> int:
    """The largest of some batch sizes whose step fits; the smallest where none does.

    bytes_of: rows -> bytes of the step, by compiling it. allowed: in rising order. A step's
    bytes grow by much the same for each row, so that two sizes foretell the others.
    """
    if len(allowed) == 1:
        return allowed[0]
    small, next_one = bytes_of(allowed[0]), bytes_of(allowed[1])
    a_row = max(1, (next_one - small) / (allowed[1] - allowed[0]))
    fits = [n for n in allowed if small + a_row * (n - allowed[0]) <= limit]
    best = fits[-1] if fits else allowed[0]
    while best > allowed[0] and bytes_of(best) > limit:
        best = max(n for n in allowed if n < best)
    return best


@contextlib.contextmanager
def out_of_memory(describe: Callable[[], str], remedy: str):
    """Turn XLA's running out of memory into a UserError. describe: the sizes, in a few words."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        text = str(error)
        signs = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
        if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
            raise
        raise UserError(f"out of memory: {describe()}\n  {remedy}") from error


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
