"""What a run writes of itself while it trains: its numbers, samples, curves, the rows it took.

Of several processes only the first writes.
"""

import dataclasses
import pathlib

from gpt2_flax.config.train_config import TrainConfig
from gpt2_flax.distributed import parallel
from gpt2_flax.reporting import metrics, plots, samples, trackers


class Logs:
    """The logs of a run's directory. Close it, or what a reporter holds back may be lost."""

    def __init__(self, config: TrainConfig, output_dir, step: int, sampler, writes: bool):
        """step: that the run is at; what the files say of later ones is dropped.

        sampler: None for no samples. writes: False for a process that keeps silent.
        """
        self.writes, self.sampler = writes, sampler
        self.sampled = -1  # the step of the last sample
        self.drawn: list[dict] | None = None  # the rows of the last curves
        if not writes:
            return
        self.plot = pathlib.Path(output_dir) / plots.PLOT_FILE
        settings = dataclasses.asdict(config)
        self.reporter = trackers.make(config.report_to, output_dir, settings, step)
        self.numbers = metrics.RunLog(output_dir, self.reporter)
        self.samples = samples.SampleLog(output_dir)
        self.ledger = metrics.StepLog(self.numbers.path.with_name(metrics.LEDGER_FILE))
        self.has_ledger, self.has_samples = config.ledger, bool(config.sample_tokens)
        self.numbers.forget_after(step)
        self.samples.forget_after(step)
        if self.has_ledger:
            self.ledger.forget_after(step)

    def write(self, row: dict) -> None:
        """A row of the training loss."""
        if self.writes:
            self.numbers.write(row)

    def merge(self, row: dict) -> None:
        """A row of an evaluation, into that of the step's training loss if there is one."""
        if self.writes:
            self.numbers.merge(row)

    def took(self, step: int, rows) -> None:
        """rows: (n, 2), the epochs and numbers of those that a step was given."""
        if self.writes and self.has_ledger:
            self.ledger.write({"step": step, "rows": rows.tolist()})

    def sample(self, step: int, params) -> None:
        """Let the model go on with the prompt, unless it did at this step.

        All processes must ask, and the first samples.
        """
        if self.sampler is None or self.sampled == step:
            return
        self.sampled, params = step, parallel.whole(params)
        if self.writes:
            text = self.sampler.sample(params, step)
            self.samples.put(step, text)
            self.reporter.text(step, "sample", text)

    def draw(self) -> None:
        """The curves, unless nothing was written since they were drawn."""
        if self.writes and (rows := self.rows()) != self.drawn:
            plots.draw(rows, self.plot)
            self.drawn = rows

    def rows(self) -> list[dict]:
        return metrics.read_log(self.numbers.path)

    def read_samples(self) -> dict[int, str]:
        return self.samples.read() if self.has_samples else {}

    def close(self) -> None:
        if self.writes:
            self.reporter.close()
