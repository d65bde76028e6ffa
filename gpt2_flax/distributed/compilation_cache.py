"""Compiled programs kept on disk, so that the same run starts faster the next time."""

import hashlib
import os
import pathlib
import platform
import tempfile
from typing import Any

import jax

from gpt2_flax.errors import say


def default_folder() -> pathlib.Path:
    """In the user's cache, a folder for each kind of processor: homes are shared by machines."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "gpt2_flax" / "compiled" / processor()


def processor() -> str:
    """A name for what programs that are compiled for this processor may use of it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(f"{platform.processor()} {flags}".encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"


def use(setting: str) -> str | None:
    """Keep programs as `--compilation_cache` says, before any is compiled. Returns the folder.

    "auto" leaves alone what JAX was told already, by JAX_COMPILATION_CACHE_DIR and its like. A
    folder that cannot be written is done without: a line says so.
    """
    if setting == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    options: Any = jax.config  # no type checker knows its attributes
    if setting == "auto" and not options.jax_enable_compilation_cache:
        return None
    if setting == "auto" and options.jax_compilation_cache_dir:
        return options.jax_compilation_cache_dir
    try:
        folder = default_folder() if setting == "auto" else pathlib.Path(setting).expanduser()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # programs are run as they are found
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # the latter where no home is known
        reason = getattr(error, "strerror", None) or error
        say(f"compiled programs are not kept (--compilation_cache {setting}): {reason}")
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return str(folder)
