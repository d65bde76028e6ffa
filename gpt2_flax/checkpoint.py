"""Checkpoints of a run: Orbax on disk, which of them to keep, which one to continue from.

A checkpoint has two items: `state`, the arrays, and `meta`, a JSON object (data cursor, settings,
model configuration, fingerprints of text and tokenizer, metrics not yet logged).
"""

import contextlib
import logging
import math
import os
import pathlib
import shutil

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gpt2_flax.errors import CheckpointError, StorageError, UserError

FOLDER = "checkpoints"
METRIC = "validation_loss"
log = logging.getLogger("gpt2_flax")


class Checkpoints:
    """The checkpoints of one run directory. Close it, or the last save may be lost."""

    def __init__(self, output_dir, keep: int):
        """keep: newest checkpoints kept, beside the one of lowest validation loss."""
        self.folder = pathlib.Path(output_dir).absolute() / FOLDER
        policies = checkpoint_managers
        # best_fn with max_to_keep would delete the newest checkpoint when it is not the best.
        preservation = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    get_metric_fn=best_first, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation,
            cleanup_tmp_directories=True,
            create=True,
        )
        with storage_errors(self.folder):
            self.manager = ocp.CheckpointManager(
                self.folder, options=options, item_names=("state", "meta")
            )

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, state, meta: dict, validation_loss: float | None) -> None:
        """Begin to save; the caller may go on, and donate the state, at once.

        Raises StorageError for what went wrong since the last call, too.
        """
        finite = validation_loss is not None and math.isfinite(validation_loss)
        metrics = {METRIC: validation_loss} if finite else None
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
        )
        with storage_errors(self.folder):
            if not self.manager.save(step, args=items, metrics=metrics):
                raise RuntimeError(f"Orbax skipped the checkpoint of step {step}")

    def wait(self) -> None:
        """Return when what was saved is on disk. Raises StorageError where it is not."""
        with storage_errors(self.folder):
            self.manager.wait_until_finished()
            self.manager.check_for_errors()

    def close(self) -> None:
        with storage_errors(self.folder):
            self.manager.close()

    def restore_latest(self, like):
        """(state, meta) of the newest checkpoint that can be read, on the devices of `like`.

        like: a tree of ShapeDtypeStruct with shardings. An unreadable checkpoint is moved
        aside, with a warning, once an older one has been read. None without any checkpoint;
        CheckpointError where there are some and none can be read: then nothing is moved.
        """
        steps, unreadable = self.steps(), []
        for step in reversed(steps):
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore()
            )
            try:
                restored = self.manager.restore(step, args=items)
            except Exception as error:  # Orbax and TensorStore raise whatever they please
                reason = str(error).strip().split("\n")[0][:200]
                unreadable.append((step, reason))
                continue
            for damaged, reason in unreadable:
                log.warning("checkpoint %s cannot be read and is set aside: %s", damaged, reason)
                self.set_aside(damaged)
            return restored["state"], restored["meta"]
        if unreadable:
            step, reason = unreadable[0]
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} can be read; {step}: {reason}\n"
                "  restore the folder from a copy, or start anew with another --output_dir"
            )
        return None

    def newest_meta(self) -> tuple[int, dict | None]:
        """(step, meta item) of the newest checkpoint that has a readable one; else 0, None."""
        for step in reversed(self.steps()):
            try:
                return step, read_meta(self.folder / str(step))
            except Exception as error:
                log.debug("meta of step %s: %s", step, error)
        return 0, None

    def set_aside(self, step: int) -> None:
        """Rename a step, so that Orbax neither offers it nor skips saves up to it."""
        damaged = self.folder / str(step)
        aside = self.folder / f"{step}.unreadable"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(damaged, aside)
        self.manager.reload()


def best_first(metrics) -> float:
    """BestN keeps the largest."""
    return -metrics[METRIC]


class storage_errors:  # noqa: N801
    """Context that turns what a failing file system makes Orbax raise into a StorageError."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        text = f"{error}"
        signs = ("RESOURCE_EXHAUSTED", "No space left", "Disk quota", "Read-only", "Permission")
        if isinstance(error, OSError) or (error and any(sign in text for sign in signs)):
            free = free_bytes(self.folder)
            raise StorageError(
                f"cannot save a checkpoint in {self.folder}: {text.strip()[:160]}\n"
                f"  {free / 1e9:.1f} GB are free there; make room and run the same command again"
            ) from error


def free_bytes(folder: pathlib.Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def locate(path, step: int | None) -> pathlib.Path:
    """The directory of one checkpoint: of a run directory, its checkpoints/ or the step itself.

    step: which; None for the newest. Raises CheckpointError that lists the steps there are.
    """
    path = pathlib.Path(path).absolute()
    if path.name.isdigit() and (path / "state").is_dir():
        if step not in (None, int(path.name)):
            raise UserError(f"{path} is step {path.name}, not {step}\n  name one of the two")
        return path
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    found = sorted(
        int(child.name)
        for child in (folder.iterdir() if folder.is_dir() else ())
        if child.name.isdigit() and (child / "state").is_dir()
    )
    if not found:
        raise CheckpointError(
            f"{path} holds no checkpoint\n  name a run directory or one of its steps"
        )
    if step is not None and step not in found:
        raise CheckpointError(f"{folder} has no step {step}; it has {', '.join(map(str, found))}")
    return folder / str(found[-1] if step is None else step)


@contextlib.contextmanager
def read_errors(directory: pathlib.Path):
    """Context that turns what reading a damaged checkpoint raises into a CheckpointError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever they please
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"checkpoint {directory} cannot be read: {reason}") from error


def read_params(directory: pathlib.Path, like) -> dict:
    """The parameters alone of a checkpoint, on this machine's first device.

    like: tree of the parameters' shapes and types.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=here), target)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            directory / "state",
            args=ocp.args.PyTreeRestore(
                item={"params": target},
                restore_args={"params": arguments},
                partial_restore=True,
            ),
        )
    return restored["params"]


def read_meta(directory: pathlib.Path) -> dict:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory / "meta")
