"""TensorBoard and Weights & Biases: what `--report_to` also sends a run's numbers and texts to."""

import contextlib
import html
import importlib.util
import os
import pathlib
import secrets

from gpt2_flax.errors import UserError
from gpt2_flax.filesystem import replace_file, storage_errors

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
RUN_ID_FILE = "wandb_id.txt"


def check(name: str) -> None:
    """Raise UserError where the package behind `--report_to`, or its account, is missing."""
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"--report_to {name} needs a package that is not installed: {package}\n"
            f"  pip install {package}{' tensorboard' if name == 'tensorboard' else ''}"
        )
    if name == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        import wandb

        with wandb_errors(wandb):
            wandb.login()  # asks, on a terminal


def make(name: str, output_dir, settings: dict, step: int):
    """The reporter for `--report_to`. step: that the run is at, 0 for a new one."""
    if name == "tensorboard":
        return TensorBoard(output_dir, step)
    if name == "wandb":
        return WandB(output_dir, settings)
    return Nobody()


class Nobody:
    """`--report_to none`. The methods of the others."""

    def scalars(self, step: int, values: dict) -> None:
        """Report numbers by name; those that are None are not known."""

    def text(self, step: int, name: str, text: str) -> None:
        """Report a text, such as a sample."""

    def close(self) -> None:
        """Write out what is left. May be called again."""


class TensorBoard:
    def __init__(self, output_dir, step: int):
        from tensorboardX import SummaryWriter

        # What a kill left beyond the checkpoint is shown no more: those steps come again.
        purge_step = step + 1 if step else None
        # A kill loses what was reported in the last second: the writer's own flush does not wait
        # for its thread (tensorboardX 2.6.5).
        with storage_errors(output_dir):
            self.writer = SummaryWriter(str(output_dir), purge_step=purge_step, flush_secs=1)

    def scalars(self, step: int, values: dict) -> None:
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        # It reads Markdown, in which an indented text stays as it is.
        self.writer.add_text(name, indented(text), step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, output_dir, settings: dict):
        import wandb

        self.html = wandb.Html
        run_id = own_id(output_dir)
        with wandb_errors(wandb):
            self.run = wandb.init(dir=str(output_dir), config=settings, id=run_id, resume="allow")

    def scalars(self, step: int, values: dict) -> None:
        self.run.log({k: v for k, v in values.items() if v is not None}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        page = self.html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self.run.log({name: page}, step=step)

    def close(self) -> None:
        self.run.finish()


@contextlib.contextmanager
def wandb_errors(wandb):
    """Turn what Weights & Biases raises into a UserError with the remedies."""
    try:
        yield
    except (wandb.Error, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"--report_to wandb: Weights & Biases did not start: {reason}\n"
            "  wandb login, or WANDB_MODE=offline in the environment, or --report_to none"
        ) from error


def own_id(output_dir) -> str:
    """The id of a run at Weights & Biases, by which its sessions are one run there."""
    path = pathlib.Path(output_dir) / RUN_ID_FILE
    with contextlib.suppress(FileNotFoundError):
        known = path.read_text("utf-8", errors="replace").strip()
        if known.isascii() and known.isalnum():
            return known
    run_id = secrets.token_hex(4)
    replace_file(path, run_id.encode())
    return run_id


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))
