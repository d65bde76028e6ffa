"""What a run came to, in words: for the summary, report.html and the model card."""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import shlex
import statistics

import jax
import yaml

from gpt2_flax.command_names import typed
from gpt2_flax.config.train_config import (
    COMMAND_ONLY,
    EMBEDDED_DATASET,
    FIELDS,
    TrainConfig,
    dump_yaml,
)
from gpt2_flax.reporting.metrics import clock

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
MFU_FORMULA = (
    "tokens/s x (6 N + 12 L D T) / peak FLOP/s of all devices, with N parameters (without the"
    " position table), L layers, D width, T tokens of a row"
)
SCREEN_LINES, SCREEN_WIDTH = 8, 96  # of the sample in the summary


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run. rows: of metrics.jsonl. samples: step -> text, none if not wanted.

    about_text: a line on the text. rows_per_step: over all devices. peak: FLOP/s of all
    devices, None where unknown. saved: the settings in config.yaml.
    """

    config: TrainConfig
    saved: dict
    model: dict  # layers, width, heads, positions, vocabulary, parameters
    about_text: str
    step: int
    rows_per_step: int
    peak: float | None
    rows: list[dict]
    samples: dict[int, str]
    checkpoints: list[int]  # steps

    @property
    def output_dir(self) -> str:
        return self.config.output_dir


# ---------------------------------------------------------------- figures


def describe_model(model: dict) -> str:
    n = model["parameters"]
    size = f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n:,}"
    return (
        f"{model['layers']} layers x {model['width']}, {model['heads']} heads,"
        f" {model['positions']} positions, vocabulary {model['vocabulary']}:"
        f" {size} parameters"
    )


def results(outcome: Outcome) -> list[tuple[str, str]]:
    """(name, value with its unit) of what was reached and what it took."""
    rows = outcome.rows
    found = [("steps", f"{outcome.step:,} of {outcome.rows_per_step:,} rows each")]
    trained = last(rows, "train_loss", "tokens")
    if trained:
        epoch = f", {trained['epoch']:.2f} epochs" if has(trained, "epoch") else ""
        found += [
            ("tokens", f"{trained['tokens']:,}{epoch}"),
            (
                "training loss",
                f"{trained['train_loss']:.4f} nats per token, at the last log point",
            ),
        ]
    found += losses_of_validation(rows)
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    if speeds:
        found.append(("speed", f"{statistics.median(speeds):,.0f} tokens/s, median of log points"))
        found.append(("MFU", mfu(rows, outcome.peak)))
    if trained and has(trained, "seconds"):
        found.append(("time", f"{clock(trained['seconds'])} in all sessions"))
    for key, of in (
        ("device_peak_memory_bytes", "of the fullest device"),
        ("process_peak_memory_bytes", "of the process in main memory"),
    ):
        peaks = [row[key] for row in rows if row.get(key)]
        if peaks:
            found.append(("peak memory", f"{max(peaks) / 1e9:.2f} GB {of}"))
    bad = last(rows, "bad_steps")
    if bad and bad["bad_steps"]:
        found.append(("bad steps", f"{bad['bad_steps']} left out, not finite"))
    return found


def losses_of_validation(rows: list[dict]) -> list[tuple[str, str]]:
    evaluated = [row for row in rows if has(row, "validation_loss", "perplexity")]
    if not evaluated:
        return [("validation loss", "not measured: no text was held out")]
    final, best = evaluated[-1], min(evaluated, key=lambda row: row["validation_loss"])
    found = [("validation loss", f"{loss_and_perplexity(final)}, at step {final['step']:,}")]
    if best["step"] != final["step"]:
        found.append(("best of the run", f"{loss_and_perplexity(best)}, at step {best['step']:,}"))
    return found


def loss_and_perplexity(row: dict) -> str:
    return f"{row['validation_loss']:.4f} nats per token (perplexity {row['perplexity']:,.2f})"


def mfu(rows: list[dict], peak: float | None) -> str:
    measured = [row["mfu"] for row in rows if row.get("mfu")]
    if not measured:
        return "unknown: the peak FLOP/s of this device is not in our table"
    of = f" of {peak / 1e12:,.0f} TFLOP/s" if peak else ""
    return f"{statistics.median(measured):.1%}{of}, median"


def last(rows: list[dict], *keys: str) -> dict | None:
    """The last row that has a value for each key."""
    return next((row for row in reversed(rows) if has(row, *keys)), None)


def has(row: dict, *keys: str) -> bool:
    return all(row.get(key) is not None for key in keys)


# ---------------------------------------------------------------- where and with what


def environment() -> list[tuple[str, str]]:
    """Versions and devices: nothing that names the machine, its user or its directories."""
    devices = jax.devices()
    versions = {name: version(name) for name in PACKAGES}
    kind, platform_name = devices[0].device_kind, devices[0].platform
    named = kind if kind == platform_name else f"{kind} ({platform_name})"
    return [
        ("devices", f"{len(devices)} x {named}"),
        ("processor", f"{platform.machine()}, {os.cpu_count()} cores; {platform.system()}"),
        ("processes", str(jax.process_count())),
        ("Python", platform.python_version()),
        ("packages", ", ".join(f"{name} {number}" for name, number in versions.items())),
    ]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def public(name: str, value):
    """A setting as it may be shown to others: of a path from the root only its end."""
    if isinstance(value, list | tuple):
        return [public(name, item) for item in value]
    if name == "output_dir" or not isinstance(value, str):
        return value
    if value.startswith(("/", "~")) and value != "/":
        return f".../{pathlib.PurePath(value).name}"
    return value


def settings(config: TrainConfig) -> dict:
    """The run's settings, as config.yaml has them, fit to be shown to others."""
    values = yaml.safe_load(dump_yaml(config))
    texts = ("sample_prompt", "document_separator")  # no paths, whatever they begin with
    return {k: v if k in texts else public(k, v) for k, v in values.items()}


# ---------------------------------------------------------------- what to do next


def on_what(config) -> str:
    """Flags of an evaluation on the text that the run held out, where it can be named."""
    if config.validation_file:
        return f" --file {shlex.join(config.validation_file)}"
    if config.dataset == EMBEDDED_DATASET and not config.train_file:
        return f" --dataset {EMBEDDED_DATASET}"
    return ""


def commands(outcome: Outcome) -> list[tuple[str, str]]:
    """(what for, command line), to be run from where the run was started."""
    where = shlex.quote(outcome.output_dir)
    words = outcome.config.sample_prompt or "Once"
    # A word that begins like a flag is taken for one unless it is joined to its own.
    prompt = shlex.quote(f"--prompt={words}")
    if not words.startswith("-"):
        prompt = f"--prompt {shlex.quote(words)}"
    step = outcome.checkpoints[0] if outcome.checkpoints else outcome.step
    beside = shlex.quote(f"{outcome.output_dir.rstrip('/')}_step_{step}")
    flax = shlex.quote(f"{outcome.output_dir.rstrip('/')}_flax")
    return [
        ("train on", resume_command(outcome)),
        (
            "generate",
            f"{typed('generate')} --model {where} {prompt} --max_new_tokens 100",
        ),
        ("evaluate", f"{typed('evaluate')} --model {where}{on_what(outcome.config)}"),
        (
            "convert a checkpoint for PyTorch",
            f"{typed('convert')} to_pytorch --checkpoint {where} --step {step} --output {beside}",
        ),
        (
            "convert for transformers 4",
            f"{typed('convert')} from_pytorch --model {where} --output {flax}",
        ),
    ]


def resume_command(outcome: Outcome) -> str:
    """The command that continues the run for as long again."""
    config = outcome.config
    now = yaml.safe_load(dump_yaml(config))
    longer = {"max_steps": 2 * outcome.step} if config.max_steps else {"epochs": 2 * config.epochs}
    changed = {
        name: value
        for name, value in (now | longer).items()
        if name not in (*COMMAND_ONLY, "profile")
        and outcome.saved.get(name, FIELDS[name].default) != value
    }
    path = pathlib.PurePath(config.output_dir) / "config.yaml"
    words = [*typed("train").split(), "--config", str(path)]
    for name, value in changed.items():
        values = value if isinstance(value, list) else [value]
        words += [
            f"--{name}",
            *(str(v).lower() if isinstance(v, bool) else f"{v}" for v in values),
        ]
    stdin = " < TEXT" if "-" in config.train_file else ""
    return shlex.join(words) + stdin


# ---------------------------------------------------------------- on the terminal


def summary(outcome: Outcome) -> list[str]:
    """The lines at the end of a run, which fit on a screen of 40."""
    figures = results(outcome)
    lines = ["", *sample_lines(outcome.samples)]
    trained = last(outcome.rows, "tokens")
    tokens = f", {trained['tokens']:,} tokens" if trained else ""
    evaluated = last(outcome.rows, "validation_loss")
    held_out = f"; validation loss {evaluated['validation_loss']:.4f}" if evaluated else ""
    lines.append(f"done: {outcome.step:,} steps{tokens}{held_out}")
    lines.append(f"  {'model':16} {describe_model(outcome.model)}")
    lines += [f"  {name:16} {value}" for name, value in figures if name not in ("steps", "tokens")]
    where = outcome.output_dir
    lines += [
        "",
        f"model:    {where}  (PyTorch: GPT2LMHeadModel.from_pretrained({where!r}))",
        f"report:   {os.path.join(where, 'report.html')}",
        f"curves:   {os.path.join(where, 'loss.png')}",
    ]
    for what, command in commands(outcome)[:2]:
        lines.append(f"{what + ':':9} {command}")
    return lines


def sample_lines(samples: dict[int, str]) -> list[str]:
    """The last sample, shortened to what a summary has room for."""
    if not samples:
        return []
    whole = [line[:SCREEN_WIDTH] for line in samples[max(samples)].split("\n")]
    shown = whole[:SCREEN_LINES]
    rest = ["[the rest is in samples.txt]"] if len(whole) > len(shown) else []
    return ["--- a sample ---", *shown, *rest, "----------------", ""]
