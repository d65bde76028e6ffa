"""How fast the parts of training are, measured so that anyone can repeat it.

A cell is one measurement in a process of its own. Cells that are compared take turns, so that
a machine that is busy for a while slows down both; medians and ranges are over processes.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from gpt2_flax import huge_pages
from gpt2_flax.errors import StorageError, UserError, say

ROOT = pathlib.Path(__file__).resolve().parents[2]
AS_TRAIN_PY = "ours", "jit", "fsdp", "checkpoint"  # cells that run as scripts/train.py does
TOKENIZE_MB = 16  # of text, in a cell that tokenizes
BUSY = 0.7  # programs at once
WARM = "ours, compiled before"
FIRST = "s to the first step"


def data(settings: dict) -> dict:
    """Rows ready per second, the share of a step that waits for data, and tokenizing per core.

    settings: train_file ("" for Python's own sources), tokenizer, batch_size, block_size,
    tokens_per_second (of the step that is fed), steps, processes (of each cell).
    Returns name -> {"unit", "median", "low", "high", "values"} of what was measured.
    """
    fed = f"of a step at {settings['tokens_per_second']:,.0f} tokens/s, waiting for data"
    cells = {
        "cached": ("rows from the cache", "rows/s"),
        "streamed": ("rows from a stream, tokenized on the fly", "rows/s"),
        "fed from the cache": (fed, "%"),
        "tokenize": ("tokenizing, one core", "MB/s"),
        "tokenize_hf": ("tokenizers' encode_batch, one core", "MB/s"),
        "tokenize_hf_fast": ("tokenizers' encode_batch_fast, one core", "MB/s"),
    }
    with tempfile.TemporaryDirectory(prefix="benchmark") as folder:
        settings = settings | {"folder": folder}
        in_fresh_process("prepare", settings)
        values = in_turn(
            cells, settings, lambda cell, n: {cells[cell][1]: in_fresh_process(cell, settings)}
        )
    return {
        name: spread(unit, [figures[unit] for figures in values[cell]])
        for cell, (name, unit) in cells.items()
    }


def train(settings: dict) -> dict:
    """Our training step and those of peers, on random rows, new ones each step.

    settings: peer (names of cells), n_layers, n_embd, n_heads, vocab_size, batch_size (of a
    step, over all devices), block_size, dtype, dropout, steps, warm_up, processes. Peers get the
    same sizes, update rule and clipping. Each round is cold: it has an empty folder for compiled
    programs, in which one more process of ours then starts warm.
    """
    peak = None  # FLOP/s of a device, which ours know; PyTorch takes one

    def measure(cell, n):
        nonlocal peak
        kept = settings | {"compilation_cache": f"{folder}/jax{n}", "seed": n}
        variables = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch{n}"}
        if cell == WARM:
            again = of_training("ours", kept | {"steps": 1, "warm_up": 0}, variables)
            return {FIRST: again[FIRST]}
        figures = of_training(cell, kept, variables)
        n_devices, peak = figures.pop("peak FLOP/s", (1, peak))
        return figures | {"MFU": mfu(figures["tokens/s"], settings, peak and n_devices * peak)}

    with tempfile.TemporaryDirectory(prefix="benchmark") as folder:
        rounds = in_turn(("ours", *settings["peer"], WARM), settings, measure)
    warm = rounds.pop(WARM)
    results = spreads(rounds)
    results[f"ours: {FIRST}, compiled before"] = spread("", [found[FIRST] for found in warm])
    for cell in settings["peer"]:
        for what in ("tokens/s", "processor s/step", "GB of the host", "GB of the device"):
            pairs = zip(rounds["ours"], rounds[cell], strict=True)
            values = [a[what] / b[what] for a, b in pairs if what in a and what in b]
            if values:
                results[f"ours / {cell}: {what}"] = spread("", values)
    return results


def mfu(speed: float, settings: dict, peak: float | None) -> float | None:
    """Of tokens a second on devices of a peak, in FLOP/s; None where that is unknown."""
    from gpt2_flax.reporting import metrics

    sizes = (settings[name] for name in ("n_layers", "n_embd", "vocab_size", "block_size"))
    return peak and speed * metrics.flops_per_token(*sizes) / peak


def about() -> dict:
    """The machine and what is installed on it, beside which figures mean something."""
    names = "jax", "jaxlib", "flax", "optax", "transformers", "torch", "accelerate"
    processors = re.findall(r"^model name\s*: (.*)$", read_if_there("/proc/cpuinfo"), re.M)
    gpus = read_if_there(*pathlib.Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processors[0] if processors else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load of the last minute": load(),
        "gpus": re.findall(r"^Model:\s*(.*)$", gpus, re.M),
        "Python": platform.python_version(),
        "packages": {
            name: importlib.metadata.version(name) for name in names
            if importlib.util.find_spec(name) is not None
        },
        "MFU": "tokens/s x (6 N + 12 L D T) / peak FLOP/s of the devices",
    }  # fmt: skip


def load() -> float:
    """Programs that ran at once in the last minute, on the average."""
    return round(os.getloadavg()[0], 2)


def read_if_there(*paths) -> str:
    text = ""
    for path in paths:
        with contextlib.suppress(OSError):
            text += pathlib.Path(path).read_text()
    return text


def decode(settings: dict) -> dict:
    """Greedy decoding after a prompt of random ids with a cache, ours and PyTorch's."""
    settings = settings | {"dropout": 0.0, "dtype": "float32"}
    cells = "decode ours", "decode torch"
    rounds = in_turn(cells, settings, lambda cell, n: of_training(cell, settings | {"seed": n}))
    results = spreads(rounds)
    pairs = zip(*rounds.values(), strict=True)
    results["ours / torch: tokens/s"] = spread(
        "", [a["tokens/s"] / b["tokens/s"] for a, b in pairs]
    )
    return results


def checkpoint(settings: dict) -> dict:
    """What a save costs the steps around it."""
    settings = settings | {"dropout": 0.0}
    rounds = in_turn(
        ("checkpoint",), settings, lambda cell, n: of_training(cell, settings | {"seed": n})
    )
    return spreads({"save": rounds["checkpoint"]})


def in_turn(cells, settings: dict, measure) -> dict[str, list[dict]]:
    """What each cell measured in each of its processes, in turn. Says what comes, as it does.

    measure: (cell, round) -> figures by name, the first of which is said.
    """
    found = {cell: [] for cell in cells}
    if (busy := load()) > BUSY:
        say(f"the machine was busy in the last minute (load {busy}): figures may vary")
    n_processes, done = len(found) * settings["processes"], 0
    say(
        f"{n_processes} processes, one after another ({settings['processes']} of each):"
        f" {'; '.join(found)}"
    )
    for n in range(settings["processes"]):
        for cell, rounds in found.items():
            rounds.append(measure(cell, n))
            done += 1
            what, value = next(iter(rounds[-1].items()))
            say(f"{done} of {n_processes}: {cell}, {shown(value)} {what}")
    return found


def of_training(cell: str, settings: dict, variables: dict | None = None) -> dict:
    settings = settings | {"began": time.time()}
    if cell in AS_TRAIN_PY:
        variables = (variables or {}) | huge_pages.variables()
    return in_fresh_process(cell, settings, "gpt2_flax.evaluation.benchmark_train", variables)


def spreads(rounds: dict[str, list[dict]]) -> dict:
    """The figures of each cell's processes as name -> median and range."""
    return {
        f"{cell}: {what}": spread("", [figures[what] for figures in found])
        for cell, found in rounds.items()
        for what in found[0]
    }


def spread(unit: str, values: list) -> dict:
    """Median, range, and the values in turn; None of those that are not known."""
    if None in values:
        return {"unit": unit, "median": None, "low": None, "high": None, "values": values}
    low, high = min(values), max(values)
    median = statistics.median(values)
    return {"unit": unit, "median": median, "low": low, "high": high, "values": values}


def in_fresh_process(
    cell: str,
    settings: dict,
    module="gpt2_flax.evaluation.benchmark",
    variables: dict | None = None,
):
    """What a cell measured, in a process of its own. Raises UserError where it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (variables or {})
    if cell.startswith("tokenize"):
        environment |= {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", module, cell, json.dumps(settings)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        _, _, message = process.stderr.rpartition("error: ")
        kind = {2: UserError, 4: StorageError}.get(process.returncode)
        if kind is not None:
            raise kind(message.strip())
        raise RuntimeError(f"the cell {cell} failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def table(results: dict) -> str:
    """The results as lines of text."""
    width = max(map(len, results))
    return "\n".join(
        f"{name:{width}}  {shown(r['median']):>8} {r['unit']}"
        f"  ({shown(r['low'])} to {shown(r['high'])})"
        if r["median"] is not None
        else f"{name:{width}}   unknown"
        for name, r in results.items()
    )


def shown(value: float) -> str:
    """A number to three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ---------------------------------------------------------------- cells of `data`


def open_text(settings: dict):
    """(config, source, tokenizer) of the text that is measured."""
    from gpt2_flax.config.train_config import EMBEDDED_DATASET, TrainConfig, find_faults
    from gpt2_flax.data import pipeline

    text: dict[str, Any] = {"dataset": EMBEDDED_DATASET}
    if settings["train_file"]:
        text = {"train_file": (settings["train_file"],)}
    config = TrainConfig(
        **text,
        tokenizer=settings["tokenizer"],
        block_size=settings["block_size"],
        cache_dir=settings["folder"],
        validation_share=0.0,
        n_positions=max(1024, settings["block_size"]),
    )
    faults = find_faults(config, set(), set())
    if faults:
        raise UserError("\n".join(faults))
    source, _ = pipeline.open_text(config)
    if source is None:
        raise UserError(
            f"{settings['train_file']} holds ids, and nothing to tokenize\n  name a file of text"
        )
    tokenizer = pipeline.open_tokenizer(config, pathlib.Path(settings["folder"]), source, False)
    return config, source, tokenizer


def open_rows(settings: dict, streaming: bool):
    import dataclasses

    from gpt2_flax.data import pipeline

    config, source, tokenizer = open_text(settings)
    config = dataclasses.replace(config, streaming=streaming, max_steps=1)
    rows, _, _ = pipeline.open_rows(config, tokenizer, source, None)
    return rows


def prepare(settings: dict) -> None:
    open_rows(settings, streaming=False)


def rows_per_second(settings: dict, streaming: bool) -> float:
    """Rows of batches, as a step takes them, made as fast as they can be for a while."""
    rows = open_rows(settings, streaming)
    steps = rows.batches(rows.start, settings["batch_size"], np.inf, slice(None))
    next(steps)
    n_steps, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < settings["seconds"]:
        next(steps)
        n_steps += 1
    return n_steps * settings["batch_size"] / passed


def waiting_share(settings: dict) -> float:
    """Percent of a step's time spent waiting for its batch, on the device, made ahead.

    The step is a pause of the length that the wanted speed gives it.
    """
    import jax

    from gpt2_flax.distributed import parallel

    if settings["batch_size"] % jax.device_count():
        raise UserError(
            f"batch_size {settings['batch_size']} does not divide over {jax.device_count()}"
            " devices"
        )
    rows = open_rows(settings, streaming=False)
    steps = rows.batches(rows.start, settings["batch_size"], np.inf, slice(None))
    ready = parallel.prefetch(steps, lambda taken: parallel.put_batch(taken.batch, 1))
    step_seconds = settings["batch_size"] * settings["block_size"] / settings["tokens_per_second"]
    jax.block_until_ready(next(ready))
    waited = 0.0
    for _ in range(settings["steps"]):
        time.sleep(step_seconds)
        began = time.perf_counter()
        jax.block_until_ready(next(ready))
        waited += time.perf_counter() - began
    ready.close()
    return 100 * waited / (settings["steps"] * step_seconds)


def megabytes_per_second(settings: dict, how: str) -> float:
    """Tokenizing of the text's first megabytes, in pieces, from a cold start of its caches."""
    _, source, tokenizer = open_text(settings)
    texts, n_bytes = [], 0
    for piece in source.pieces(0, tokenizer.cuts):
        texts.append(piece.text)
        n_bytes += len(piece.text.encode())
        if n_bytes > TOKENIZE_MB * 1e6:
            break
    backend = tokenizer.fast.backend_tokenizer
    encode = {
        "tokenize": tokenizer.encode_batch,
        "tokenize_hf": lambda some: backend.encode_batch(some, add_special_tokens=False),
        "tokenize_hf_fast": lambda some: backend.encode_batch_fast(some, add_special_tokens=False),
    }[how]
    began = time.perf_counter()
    for first in range(0, len(texts), 16):
        encode(texts[first : first + 16])
    return n_bytes / 1e6 / (time.perf_counter() - began)


CELLS = {
    "prepare": prepare,
    "cached": lambda settings: rows_per_second(settings, streaming=False),
    "streamed": lambda settings: rows_per_second(settings, streaming=True),
    "fed from the cache": waiting_share,
    **{
        how: functools.partial(megabytes_per_second, how=how)
        for how in ("tokenize", "tokenize_hf", "tokenize_hf_fast")
    },
}


def run_cell(cells: dict) -> int:
    """Run the cell that the command line names and print what it measured, as JSON."""
    from gpt2_flax.errors import run_main

    def main(argv):
        print(json.dumps(cells[argv[0]](json.loads(argv[1]))))

    return run_main(main, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run_cell(CELLS))
