"""--profile: a trace of some steps, for TensorBoard's profile plugin or Perfetto."""

import contextlib
import pathlib

import jax

from gpt2_flax.errors import StorageError
from gpt2_flax.filesystem import storage_errors

FOLDER = "profile"
STEP = "train_step"  # the name of a step in the trace


class StepTrace:
    """Traces steps first to last of a run, both included, into a folder of the run."""

    def __init__(self, output_dir, span: tuple[int, int] | None):
        """span: (first, last), None for no trace."""
        self.folder = pathlib.Path(output_dir) / FOLDER
        self.first, self.last = span or (1, 0)
        self.active = False

    def begins_at(self, step: int) -> bool:
        """Whether to call `start` before a step. A resumed run may come in between."""
        return not self.active and self.first <= step <= self.last

    def ends_at(self, step: int) -> bool:
        """Whether to call `stop` after a step."""
        return self.active and step >= self.last

    def start(self) -> None:
        """Begin. Nothing should be on the device yet. Raises StorageError."""
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call in Python: it slows the steps it measures
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self.active = True

    def annotated(self, step: int):
        """Shows what happens inside as a step in the trace."""
        if not self.active:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation(STEP, step_num=step)

    def stop(self) -> None:
        """Write the trace. The device should have done all its steps. Raises StorageError."""
        self.active = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            raise StorageError(
                f"cannot write the trace into {self.folder}: {error}\n  make room there"
            ) from error

    def close(self) -> None:
        """Write what there is of a trace that was cut short."""
        if self.active:
            self.stop()
