"""The directory of a run: whose it is, its lock, and what is written when the run begins."""

import contextlib
import fcntl
import os
import pathlib

from gpt2_flax import filesystem
from gpt2_flax.config.settings import read_yaml, shown
from gpt2_flax.config.train_config import TrainConfig, differing_keys, dump_yaml
from gpt2_flax.data import tokenizers
from gpt2_flax.errors import CheckpointError, StorageError, UserError
from gpt2_flax.reporting import metrics, plots, report, samples
from gpt2_flax.training import checkpoint

SETTINGS_FILE = "config.yaml"
# In every SETTINGS_FILE that a run began with: other files of that name are somebody's own.
ALWAYS_SAVED = (
    "n_layers", "n_embd", "block_size", "train_file", "tokenizer", "seed", "save_every",
)  # fmt: skip
# A directory that holds one of these and no settings of ours is somebody's own.
FOREIGN_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "pytorch_model.bin",
    "flax_model.msgpack", metrics.LOG_FILE, plots.PLOT_FILE, samples.SAMPLES_FILE,
    report.REPORT_FILE,
)  # fmt: skip
LOCK_FILE = ".lock"
MAX_SAVED_BYTES = 2**20  # of SETTINGS_FILE, which may name thousands of files


def holds_a_run(output_dir: pathlib.Path) -> bool:
    """Whether a run began there, or the file of another program's settings has the same name."""
    return (output_dir / SETTINGS_FILE).is_file()


def check(config: TrainConfig, output_dir: pathlib.Path) -> bool:
    """Whether output_dir holds this run already. Raises where it holds something else."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir {output_dir} is a file\n  name a directory")
    if not holds_a_run(output_dir):
        if config.resume == "require":
            raise CheckpointError(f"output_dir {output_dir} holds no run to resume")
        names = FOREIGN_FILES
        if not (output_dir / LOCK_FILE).exists():  # else a start was killed that had written them
            names += (tokenizers.TOKENIZER_FILE, tokenizers.SETTINGS_FILE)
        foreign = [name for name in names if (output_dir / name).exists()]
        if foreign or (output_dir / checkpoint.FOLDER).exists():
            raise UserError(
                f"output_dir {output_dir} holds {', '.join(foreign) or 'checkpoints'} but no"
                f" {SETTINGS_FILE}: it is not a run of this trainer\n"
                "  choose another --output_dir; nothing was changed"
            )
        if (size := len(dump_yaml(config).encode())) > MAX_SAVED_BYTES:
            raise UserError(
                f"the settings are {size:,} bytes, and {SETTINGS_FILE} holds at most"
                f" {MAX_SAVED_BYTES:,}\n  name directories instead of their files"
            )
        return False
    if config.resume == "never":
        raise UserError(
            f"output_dir {output_dir} holds a run, and --resume never forbids to continue it\n"
            "  choose another --output_dir"
        )
    differing = differing_keys(config, read_settings(output_dir))
    if differing:
        listed = ", ".join(
            f"{name} {shown(old)} -> {shown(new)}" for name, (old, new) in differing.items()
        )
        raise UserError(
            f"output_dir {output_dir} holds a run with other settings: {listed}\n"
            "  choose another --output_dir, or repeat the run's settings to continue it"
        )
    return True


def read_settings(output_dir: pathlib.Path) -> dict:
    """The settings of the run that is there. Raises UserError for a file that is not a run's."""
    saved, faults = read_yaml(str(output_dir / SETTINGS_FILE), (), MAX_SAVED_BYTES)
    if faults:
        raise CheckpointError(faults[0].split("\n")[0])
    if not {*ALWAYS_SAVED} <= saved.keys():
        raise UserError(
            f"output_dir {output_dir} holds a {SETTINGS_FILE} that is not of this trainer\n"
            "  choose another --output_dir; nothing was changed"
        )
    return saved


def check_still_new(output_dir: pathlib.Path) -> None:
    """Raise UserError where another process began a run here while this one read its text."""
    if (output_dir / SETTINGS_FILE).exists():
        raise UserError(
            f"output_dir {output_dir} now holds a run that another process began\n"
            "  run the same command again to continue it, or choose another --output_dir"
        )


@contextlib.contextmanager
def locked(output_dir: pathlib.Path):
    """Hold the directory's lock, which the system releases even if this process is killed."""
    try:
        file = open(output_dir / LOCK_FILE, "a+")  # noqa: SIM115
    except OSError as error:
        raise StorageError(f"cannot write into {output_dir}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(
                f"output_dir {output_dir} is in use by {owner}\n"
                "  wait for it, stop it, or choose another --output_dir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def make(output_dir: pathlib.Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make output_dir {output_dir}: {error.strerror}") from error


def begin(config: TrainConfig, tokenizer, output_dir: pathlib.Path) -> None:
    """Write the tokenizer and, last, the settings: with them the directory is a run."""
    save_tokenizer(tokenizer, output_dir)
    filesystem.replace_file(output_dir / SETTINGS_FILE, dump_yaml(config).encode())


def save_tokenizer(tokenizer, output_dir: pathlib.Path) -> None:
    """All of it or nothing. Raises StorageError."""
    names = tokenizers.TOKENIZER_FILE, tokenizers.SETTINGS_FILE
    with contextlib.ExitStack() as undo:
        for name in names:
            undo.callback((output_dir / name).unlink, missing_ok=True)
        with filesystem.storage_errors(output_dir / names[0]):
            tokenizer.save(output_dir)
        undo.pop_all()
