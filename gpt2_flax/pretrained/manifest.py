"""Digests of a checkpoint's files, so that damage is found before anything is trained on.

A manifest lies in the checkpoint's directory and is written, and all files are flushed to the
disk, before the directory gets its final name: a checkpoint has it or is none.
"""

import concurrent.futures
import contextlib
import errno
import json
import os
import pathlib
import stat
import time

import xxhash

FILE = "manifest.json"
VERSION = 1
MAX_JSON_BYTES = 1 << 26
CHUNK_BYTES = 1 << 26  # hashed by one thread at a time
# Orbax writes these two after the manifest. The first says when it did so, which nothing here
# depends on: it is compared without that. The second holds a sentence and is never read.
STEP_METADATA, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
LATER = STEP_METADATA, COMMITTED
WRITTEN_LATER = "commit_timestamp_nsecs"
PATIENCE = 60.0  # seconds that Orbax's thread may take to write the first of them


class DamagedError(Exception):
    """A checkpoint is not what was saved. Says which file, and what is wrong with it."""


def write(directory: pathlib.Path, step: int) -> None:
    """Describe the files of a checkpoint and flush all of it to the disk."""
    await_step_metadata(directory)
    names = [name for name in list_files(directory) if name not in LATER]
    body = {
        "version": VERSION,
        "step": step,
        "files": describe(directory, names),
        "metadata": step_metadata(directory),
    }
    path = directory / FILE
    path.write_text(json.dumps({"body": body, "digest": digest_of(body)}), "utf-8")
    for name in (*names, FILE):
        flush(directory / name)
    folders = {(directory / name).parent for name in names}
    for folder in {*folders, *(parent for one in folders for parent in one.parents)}:
        if folder.is_relative_to(directory):
            flush(folder)


def check(directory: pathlib.Path, step: int) -> None:
    """Raise DamagedError where a checkpoint's files are not those that were saved at a step."""
    path = directory / FILE
    if directory.is_symlink():
        raise DamagedError(f"{directory.name} is a symbolic link")
    if not directory.is_dir():
        raise DamagedError(f"{directory.name} is no directory")
    found = {*list_files(directory)}
    if not found:
        raise DamagedError(f"{directory.name} is empty")
    if FILE not in found:
        raise DamagedError(f"{FILE} is missing")
    try:
        whole = read_json(path)
        body, digest = whole["body"], whole["digest"]
        files, metadata = dict(body["files"]), body["metadata"]
        sizes = {name: files[name]["bytes"] for name in files}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{FILE} cannot be read") from error
    if digest_of(body) != digest or body["version"] != VERSION:
        raise DamagedError(f"{FILE} was changed")
    if body["step"] != step:
        raise DamagedError(f"{FILE} is that of step {body['step']}")
    for name in sorted(files.keys() - found):
        raise DamagedError(f"{name} is missing")
    for name in sorted(found - files.keys() - {FILE, *LATER}):
        raise DamagedError(f"{name} was added")
    for name, size in sorted(sizes.items()):
        if (there := (directory / name).stat().st_size) != size:
            raise DamagedError(f"{name} has {there:,} bytes instead of {size:,}")
    try:
        now = describe(directory, sorted(files))
    except OSError as error:
        raise DamagedError(f"{error.filename} cannot be read: {error.strerror}") from error
    for name in sorted(files):
        if now[name] != files[name]:
            raise DamagedError(f"{name} was changed")
    if step_metadata(directory) != metadata:
        raise DamagedError(f"{STEP_METADATA} was changed")


def list_files(directory: pathlib.Path) -> list[str]:
    """Paths of all files below a directory. Raises DamagedError for what is no plain file."""
    names = []
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = pathlib.Path(folder, name)
            mode = path.lstat().st_mode
            relative = path.relative_to(directory).as_posix()
            if stat.S_ISREG(mode):
                names.append(relative)
            elif not stat.S_ISDIR(mode):
                what = "a symbolic link" if stat.S_ISLNK(mode) else "no plain file"
                raise DamagedError(f"{relative} is {what}")
    return sorted(names)


def describe(directory: pathlib.Path, names: list[str]) -> dict[str, dict]:
    """name -> {"bytes", "digest"} of files, hashed by one thread a core."""
    sizes = {name: (directory / name).stat().st_size for name in names}
    chunks = [(name, at) for name in names for at in range(0, sizes[name] or 1, CHUNK_BYTES)]
    hashers = {name: xxhash.xxh3_128() for name in names}
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        digests = threads.map(
            lambda chunk: digest_of_chunk(directory / chunk[0], chunk[1]), chunks
        )
        for (name, _), digest in zip(chunks, digests, strict=True):
            hashers[name].update(digest)
    return {name: {"bytes": sizes[name], "digest": hashers[name].hexdigest()} for name in names}


def digest_of_chunk(path: pathlib.Path, at: int) -> bytes:
    hasher, left = xxhash.xxh3_128(), CHUNK_BYTES
    with open(path, "rb", buffering=0) as file:
        file.seek(at)
        while left and (block := file.read(min(left, 1 << 22))):
            hasher.update(block)
            left -= len(block)
    return hasher.digest()


def read_json(path: pathlib.Path):
    """Raises ValueError for a file longer than one of ours is."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"over {MAX_JSON_BYTES} bytes")
    return json.loads(path.read_text("utf-8"))


def digest_of(body) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def await_step_metadata(directory: pathlib.Path) -> None:
    """Return when Orbax's own thread has written what a step consists of, which it does last.

    It writes over the file that it began the step with: in between that is empty. After PATIENCE
    the file is taken as it is.
    """
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError):
            found = read_json(directory / STEP_METADATA)
            if isinstance(found, dict) and found.get("item_handlers"):
                return
        time.sleep(0.01)


def step_metadata(directory: pathlib.Path) -> str:
    """A digest of what Orbax says of the whole step, but for the time at which it was done."""
    try:
        found = read_json(directory / STEP_METADATA)
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{STEP_METADATA} cannot be read") from error
    if isinstance(found, dict):
        found = {name: value for name, value in found.items() if name != WRITTEN_LATER}
    return digest_of(found)


def flush(path: pathlib.Path) -> None:
    """Have a file or a directory on the disk itself, as far as the system lets us."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)
