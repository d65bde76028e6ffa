"""Checkpoints of a run: Orbax on disk, which of them to keep, which one to continue from.

A checkpoint has two items: `state`, the arrays, and `meta`, a JSON object (data cursor, settings,
model configuration, fingerprints of text and tokenizer, metrics not yet logged).
"""

import contextlib
import math
import os
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from gpt2_flax.distributed import memory, processes
from gpt2_flax.errors import CheckpointError, StorageError, say
from gpt2_flax.filesystem import describe_room, free_bytes
from gpt2_flax.pretrained import manifest, orbax_files
from gpt2_flax.pretrained.orbax_files import FOLDER

TRASH = ".trash"  # below FOLDER: a checkpoint is renamed into it, at once, and then deleted
METRIC = "validation_loss"


class Checkpoints:
    """The checkpoints of one run directory. Close it, or the last save may be lost."""

    def __init__(self, output_dir, keep: int, refuse: Callable[[dict], str | None] | None = None):
        """keep: newest checkpoints kept, beside the one of lowest validation loss.

        refuse: says of a meta item why it is not of this run; None where it is.
        """
        self.refuse = refuse or (lambda meta: None)
        self.folder = pathlib.Path(output_dir).absolute() / FOLDER
        # Barriers of JAX's runtime instead of its collectives: Orbax has them in a thread of its
        # own, and collectives of two threads would be taken for one another.
        together = ocp.options.MultiprocessingOptions(
            active_processes={*range(jax.process_count())} if processes.several() else None
        )
        self.best = Best()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy(keep, self.best),
            best_fn=best_first,  # without it, Orbax does not write the metrics down
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=together,
            todelete_subdir=TRASH,
            async_options=ocp.AsyncOptions(
                post_finalization_callback=self.seal,
                barrier_sync_fn=make_barrier() if processes.several() else None,
            ),
        )
        self.saving: int | None = None  # the step that is being saved
        self.needed = 0  # its bytes
        self.cleaner: threading.Thread | None = None
        if (self.folder / TRASH).is_symlink():  # what is put aside stays in this folder
            (self.folder / TRASH).unlink()
        self.verified: dict[int, dict] = {}  # meta of the steps whose files were checked
        with storage_errors(self.folder):
            processes.first_only(lambda: self.folder.mkdir(parents=True, exist_ok=True))
            self.manager = ocp.CheckpointManager(
                self.folder,
                options=options,
                item_handlers={
                    # Compressing takes most of a save, and finds 7 % in float32: lab_notes.md.
                    "state": ocp.PyTreeCheckpointHandler(
                        use_compression=False, multiprocessing_options=together
                    ),
                    "meta": ocp.JsonCheckpointHandler(multiprocessing_options=together),
                },
            )
        self.empty_trash()

    def seal(self) -> None:
        """Called when a step is written and has not its final name yet: add its manifest."""
        if not processes.is_first():
            return
        (directory,) = (
            path
            for path in self.folder.glob(f"{self.saving}.*")
            if path.is_dir() and ocp.utils.TMP_DIR_SUFFIX in path.name
        )
        assert self.saving is not None
        manifest.write(directory, self.saving)

    def flush_name(self) -> None:
        """Have on the disk itself what came after the manifest of the step that was saved."""
        if self.saving is not None and processes.is_first():
            directory = self.folder / str(self.saving)
            for path in (*map(directory.joinpath, manifest.LATER), directory, self.folder):
                with contextlib.suppress(FileNotFoundError):
                    manifest.flush(path)

    def empty_trash(self) -> None:
        """Delete, in a thread, what Orbax put aside for it. A kill leaves no half checkpoint."""
        if not processes.is_first():
            return
        if self.cleaner is not None:
            self.cleaner.join()
        self.cleaner = threading.Thread(
            target=shutil.rmtree, args=(self.folder / TRASH,), kwargs={"ignore_errors": True}
        )
        self.cleaner.start()

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return sorted(self.manager.all_steps())

    def names(self) -> list[int]:
        """The numbers of all that is called as a step is, whatever it may be, oldest first."""
        names = (path.name for path in self.folder.iterdir())
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    def save(self, step: int, state, meta: dict, validation_loss: float | None) -> None:
        """Begin to save; the caller may go on, and donate the state, at once.

        Raises StorageError for what went wrong since the last call, too.
        """
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
        with self.storage_errors():
            self.manager.wait_until_finished()
            self.flush_name()
            self.empty_trash()
            self.saving, self.needed = step, bytes_of(state)
            if not self.manager.save(step, args=items, metrics=as_metrics(validation_loss)):
                raise RuntimeError(f"Orbax skipped the checkpoint of step {step}")

    def wait(self) -> None:
        """Return when what was saved is on disk. Raises StorageError where it is not."""
        with self.storage_errors():
            self.manager.wait_until_finished()
            self.manager.check_for_errors()
            self.flush_name()

    def confirm(self, step: int) -> None:
        """Raise StorageError where what is on disk of a step is not what was saved."""
        self.wait()
        with processes.together():
            try:
                if processes.is_first():
                    self.verify(step)
            except manifest.DamagedError as error:
                raise StorageError(
                    f"checkpoint {step} in {self.folder} was saved and is damaged: {error}\n"
                    "  the disk may be faulty; the same command goes on from an older one"
                ) from error

    def close(self) -> None:
        with self.storage_errors():
            self.manager.close()
        self.empty_trash()
        if self.cleaner is not None:
            self.cleaner.join()

    @contextlib.contextmanager
    def storage_errors(self):
        """`storage_errors` of this folder, which also leaves no part of a failed save behind."""
        try:
            with storage_errors(self.folder, lambda: self.needed):
                yield
        except StorageError:
            if not processes.is_first():
                raise
            for partial in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def warn_of_room(self, state) -> None:
        """Say so where the disk has no room for two checkpoints of a state, or what is missing."""
        needed = bytes_of(state) * max(1, 2 - len(self.names()))
        if (free := free_bytes(self.folder)) < needed:
            say(
                f"the next checkpoints may not fit into {self.folder}:"
                f" {describe_room(needed, free)}"
            )

    def newest_meta(self) -> tuple[int, dict | None]:
        """(step, meta item) of the newest checkpoint that is whole; 0, None without any.

        Raises CheckpointError where there are some and none is whole.
        """
        return tuple(processes.first_only(self.find_newest))

    def find_newest(self) -> tuple[int, dict | None]:
        damaged = {}
        for step in reversed(self.names()):
            try:
                return step, self.verify(step)
            except manifest.DamagedError as error:
                damaged[step] = str(error)
        self.raise_if_all_are(damaged)
        return 0, None

    def raise_if_all_are(self, damaged: dict[int, str]) -> None:
        """Raise CheckpointError for checkpoints of which none is whole, if there are any."""
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise CheckpointError(
                f"no checkpoint in {self.folder} is whole; of step {step}: {reason}\n"
                "  restore the folder from a copy, or start anew with another --output_dir"
            )

    def verify(self, step: int) -> dict:
        """The meta item of a checkpoint. Raises DamagedError where it is not what was saved."""
        if step not in self.verified:
            directory = self.folder / str(step)
            manifest.check(directory, step)
            try:
                meta = orbax_files.read_meta(directory)
                reason = self.refuse(meta)
            except Exception as error:  # Orbax raises whatever it pleases
                raise manifest.DamagedError(f"meta cannot be read: {first_line(error)}") from error
            if reason:
                raise manifest.DamagedError(reason)
            self.verified[step] = meta
        return self.verified[step]

    def restore_latest(self, like):
        """(state, meta) of the newest checkpoint that is whole, on the devices of `like`.

        like: a tree of ShapeDtypeStruct with shardings. A damaged checkpoint is moved aside,
        with a warning, once an older one has been read. None without any checkpoint;
        CheckpointError where there are some and none is whole, or a whole one cannot be read:
        then nothing is moved.
        """
        chosen = processes.first_only(lambda: self.choose(like))
        if chosen is None:
            return None
        step, meta, damaged = chosen
        arguments = ocp.checkpoint_utils.construct_restore_args(like)
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(like, restore_args=arguments))
        with orbax_files.read_errors(self.folder / str(step)), memory.kept_when_freed():
            state = self.manager.restore(step, args=items)["state"]
        for other, reason in damaged:
            say(f"checkpoint {other} is damaged ({reason}); it is moved aside to {aside(other)}")
            if processes.is_first():
                self.set_aside(other)
        if damaged:
            processes.gather(None)  # all see the folder as it is now
            self.manager.reload()
        return state, meta

    def choose(self, like) -> tuple[int, dict, list] | None:
        """(step, meta, [newer step, what is wrong with it] of each) to restore; None of none."""
        damaged = {}
        for step in reversed(self.names()):
            directory = self.folder / str(step)
            try:
                meta = self.verify(step)
                orbax_files.check_kinds(directory, like)
                return step, meta, [*damaged.items()]
            except manifest.DamagedError as error:
                damaged[step] = str(error)
        self.raise_if_all_are(damaged)
        return None

    def set_aside(self, step: int) -> None:
        """Rename a step, so that Orbax neither offers it nor skips saves up to it."""
        target = self.folder / aside(step)
        if target.is_symlink():
            target.unlink()
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self.folder / str(step), target)


def aside(step: int) -> str:
    return f"{step}.damaged"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def make_barrier():
    """Orbax's barrier of several processes, but for one whose save failed.

    The others wait for it elsewhere, and it would wait for them: its error has to come first.
    """
    barrier = ocp.multihost.get_barrier_sync_fn(processes={*range(jax.process_count())})

    def sync(*, key: str, timeout_ms: int) -> None:
        error = sys.exc_info()[1]  # of the `finally` in which Orbax calls this
        if error is not None:
            raise error
        barrier(key=key, timeout_ms=timeout_ms)

    return sync


class Best(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of lowest validation loss.

    step: which that is, where it was found to be the best when it had been saved without a loss.
    """

    def __init__(self):
        self.step: int | None = None
        self.by_loss = checkpoint_managers.BestN(
            get_metric_fn=best_first, n=1, keep_checkpoints_without_metrics=False
        )

    def should_preserve(self, checkpoints, *, context):
        named = [about.step == self.step for about in checkpoints]
        return named if any(named) else self.by_loss.should_preserve(checkpoints, context=context)


def preservation_policy(keep: int, best: Best):
    """Which checkpoints stay: the newest, and the best.

    (Orbax's best_fn with max_to_keep would delete the newest when it is not the best.)
    """
    latest = checkpoint_managers.LatestN(keep)
    return checkpoint_managers.AnyPreservationPolicy([latest, best])


def as_metrics(validation_loss: float | None) -> dict | None:
    """What Orbax may know of it: a NaN there would make it delete the best."""
    is_number = validation_loss is not None and math.isfinite(validation_loss)
    return {METRIC: validation_loss} if is_number else None


def best_first(metrics) -> float:
    """BestN keeps the largest."""
    return -metrics[METRIC]


# What is said in the words of the system, and what TensorStore makes of it.
REFUSALS = (
    "No space left on device", "Disk quota exceeded", "Read-only file system",
    "Permission denied", "File too large", "RESOURCE_EXHAUSTED",
)  # fmt: skip


@contextlib.contextmanager
def storage_errors(folder: pathlib.Path, needed: Callable[[], int] = lambda: 0):
    """Context that turns what a failing file system makes Orbax raise into a StorageError.

    needed: bytes of what is being saved.
    """
    try:
        yield
    except Exception as error:
        text = f"{error}"
        found = [reason for reason in REFUSALS if reason in text]
        if not isinstance(error, OSError) and not found:
            raise
        reason = found[0] if found else text.strip()[:160]
        raise StorageError(
            f"cannot save a checkpoint in {folder}: {reason}\n"
            f"  {describe_room(needed(), free_bytes(folder))}; make room and run the same command"
            " again"
        ) from error


@contextlib.contextmanager
def quiet_closed_loops():
    """Keep back what TensorStore prints of a failed write whose event loop is closed already.

    The failure itself is raised, where it is put into words of ours.
    """
    names = ("excepthook", "unraisablehook")
    before = {name: getattr(sys, name) for name in names}

    def is_that(error) -> bool:
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    def excepthook(kind, error, traceback):
        if not is_that(error):
            before["excepthook"](kind, error, traceback)

    def unraisablehook(about):
        if not is_that(about.exc_value):
            before["unraisablehook"](about)

    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook
    try:
        yield
    finally:
        for name, hook in before.items():
            setattr(sys, name, hook)


def bytes_of(tree) -> int:
    """Bytes of a tree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
