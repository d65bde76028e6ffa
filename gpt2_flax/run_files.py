"""Files of a run directory: replaced whole, so that a kill leaves the old one or the new one."""

import contextlib
import os
import pathlib

from gpt2_flax.errors import StorageError


@contextlib.contextmanager
def storage_errors(path):
    """Turn the file system's refusal into a StorageError that names the file and a remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}\n"
            "  make room, or make it writable, and run the same command again"
        ) from error


def replace_file(path, content: bytes) -> None:
    """Write a file beside its place and move it there. Raises StorageError."""
    path = pathlib.Path(path)
    temporary = path.with_suffix(".tmp")
    with storage_errors(path):
        temporary.write_bytes(content)
        os.replace(temporary, path)
