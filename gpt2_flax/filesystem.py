"""Files of a run directory: replaced whole, so that a kill leaves the old one or the new one."""

import contextlib
import os
import pathlib
import shutil

from gpt2_flax.config.settings import plain
from gpt2_flax.errors import StorageError, UserError


@contextlib.contextmanager
def storage_errors(path, needed: int = 0):
    """Turn the file system's refusal into a StorageError that names the file and a remedy.

    needed: bytes of what is written, where that is much.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}\n"
            f"  {describe_room(needed, free_bytes(path))}; make room, or make it writable, and run"
            " the same command again"
        ) from error


def describe_room(needed: int, free: int) -> str:
    if not needed:
        return f"{free / 1e9:.3f} GB are free there"
    return f"{needed / 1e9:.3f} GB are needed and {free / 1e9:.3f} GB free"


def free_bytes(path) -> int:
    """Of the file system that a path is on, or would be."""
    folder = pathlib.Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def replace_file(path, content: bytes) -> None:
    """Write a file beside its place and move it there. Raises StorageError."""
    path = pathlib.Path(path)
    temporary = path.with_suffix(".tmp")
    with storage_errors(path, len(content)), contextlib.ExitStack() as undo:
        undo.callback(temporary.unlink, missing_ok=True)
        temporary.unlink(missing_ok=True)  # a link that somebody put there would lead elsewhere
        temporary.write_bytes(content)
        os.replace(temporary, path)


def refuse_links(directory: pathlib.Path, name: str, but: tuple[str, ...] = ()) -> None:
    """Raise UserError where a directory that is written into holds a symbolic link.

    A directory of somebody else's could lead what is written to any file of the user's.
    name: of the directory's setting. but: names of files that are not written through links.
    """
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            if path.is_symlink() and path.name not in but:
                raise UserError(
                    f"{name} {directory} holds a symbolic link, {plain(path.name)}: what is"
                    " written stays in the directory\n"
                    "  put the file or folder itself there, or choose another directory"
                )
