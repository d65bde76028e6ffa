"""What a run would take, from its compiled step: --dry_run and --show_sharding.

No text is read and nothing is trained; no array of a model from random weights is ever made.
"""

import itertools
import math
import re
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt2_flax.config import durations
from gpt2_flax.data import tokenizers
from gpt2_flax.distributed import devices, memory, parallel, processes
from gpt2_flax.reporting import metrics, summary
from gpt2_flax.training import setup, step

VOCABULARIES = {"gpt2": 50257, "bytes": 257}  # for which neither text nor network is needed
MOST_ROWS = 1024  # of the product whose speed is measured
LAYER = re.compile(r"(.*/h/)(\d+)(/.*)")


class Vocabulary(NamedTuple):
    """As much of a tokenizer as the size of a model depends on."""

    name: str
    vocab_size: int
    eos_id: int


def dry_run(config) -> int:
    """Print what was asked for. Returns the process's exit code."""
    if config.topology:
        devices.imagine(config.topology)
    try:
        return show_run(config)
    finally:
        devices.forget_imagined()


def show_run(config) -> int:
    model_config, _ = setup.choose_model(config, vocabulary_of(config), None)
    module = setup.make_module(config, model_config)
    optimizer, update = setup.trial(config, module, setup.engine_of_plans(config))
    state = step.state_shapes(module, optimizer)
    if config.show_sharding:
        show(sharding_lines(state, config.parallel))
    if config.dry_run:
        if config.batch_size == "auto":
            config = setup.with_batch_size(config, module, None, None)
        show(run_lines(config, model_config, state, update))
    return 0


def show(lines) -> None:
    for line in lines:
        if processes.is_first():
            print(line, flush=True)


def vocabulary_of(config) -> Vocabulary:
    if config.tokenizer in VOCABULARIES:
        size = VOCABULARIES[config.tokenizer]
    elif config.tokenizer.startswith("bpe:"):
        size = int(config.tokenizer.removeprefix("bpe:"))
    else:
        size = tokenizers.load_tokenizer(config.tokenizer).vocab_size
    return Vocabulary(config.tokenizer, size, size - 1)


# ---------------------------------------------------------------- how it lies on the devices


def sharding_lines(state: step.TrainState, engine: str):
    """A line for each array of the parameters, those of all layers in one; then the sums."""
    found: dict[tuple, list[int]] = {}
    placed = parallel.shapes_on_devices(state.params, engine)
    for path, leaf in jax.tree_util.tree_flatten_with_path(placed)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        match = LAYER.fullmatch(name)
        key = (match[1], match[3]) if match else (name, "")
        there = leaf.sharding.shard_shape(leaf.shape)
        found.setdefault((*key, leaf.shape, there, leaf.dtype), []).append(
            int(match[2]) if match else 0
        )
    rows = [("array", "shape", "on a device", "bytes there")]
    for (before, after, shape, there, dtype), layers in found.items():
        name = before + (span(layers) + after if after else "")
        n_bytes = dtype.itemsize * math.prod(there)
        each = f"{n_bytes:,}" + (f" x {len(layers)}" if len(layers) > 1 else "")
        rows.append((name, times(shape), "all of it" if there == shape else times(there), each))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
    yield ""
    n_devices = devices.count()
    for name, tree in (("parameters", state.params), ("with the optimizer", state)):
        yield (
            f"{name}: {size(bytes_of(tree))},"
            f" {size(parallel.bytes_there(tree, engine))} on each of {n_devices} devices"
        )


def span(layers: list[int]) -> str:
    return f"{layers[0]}..{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes < 1e8 else memory.gigabytes(n_bytes)


def times(shape) -> str:
    return " x ".join(map(str, shape)) or "1"


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------- what the run takes


def run_lines(config, model_config, state, update):
    n_devices = devices.count()
    at_once = n_devices * config.batch_size
    rows = at_once * config.grad_accum
    tokens = rows * config.block_size
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    c = model_config
    yield summary.describe_model(
        {
            "layers": c.n_layer, "width": c.n_embd, "heads": c.n_head,
            "positions": c.n_positions, "vocabulary": c.vocab_size, "parameters": n_parameters,
        }
    )  # fmt: skip
    yield (
        f"step: {rows} rows, {tokens:,} tokens (devices {n_devices} x rows {config.batch_size}"
        f" x accumulated {config.grad_accum}), --parallel {config.parallel}"
    )
    began, engine = time.perf_counter(), setup.engine_of_plans(config)
    batch = parallel.batch_shapes(
        setup.blank_batch(rows // jax.process_count(), config.block_size),
        config.grad_accum,
        engine,
    )
    placed = parallel.shapes_on_devices(state, engine)
    with memory.out_of_memory(lambda: too_large(config), setup.remedy_for_memory(config)):
        compiled = update.lower(placed, batch).compile()
    yield f"compiled in {time.perf_counter() - began:.0f} s for {n_devices} x {device_kind()}"
    yield from memory_lines(compiled, state, config)
    yield from communication_lines(state.params, config)
    flops = tokens * metrics.flops_per_token(c.n_layer, c.n_embd, c.vocab_size, config.block_size)
    yield f"compute: {flops:.3g} FLOP a step, by 6 N + 12 L D T a token"
    yield from length_lines(config, rows, tokens, flops, c.n_embd)


def device_kind() -> str:
    return devices.everywhere()[0].device_kind


def too_large(config) -> str:
    return (
        f"{config.batch_size} rows of {config.block_size} tokens at a time on a {device_kind()},"
        f" with --parallel {config.parallel}"
    )


def memory_lines(compiled, state, config):
    n_bytes, there = memory.step_bytes(compiled), parallel.bytes_there(state, config.parallel)
    yield (
        f"memory of a device: {size(n_bytes)} by the compiled program's plan:"
        f" {size(there)} of parameters and optimizer,"
        f" {size(n_bytes - there)} beside them"
    )
    if devices.imagined():
        return  # what does not fit is not compiled
    limit = memory.device_bytes()
    if devices.platform() == "cpu":
        yield f"  this machine has {size(limit)} free for each of its devices"
    elif n_bytes > memory.USABLE * limit:
        yield f"  that is too much for {size(limit)}: {setup.remedy_for_memory(config)}"
    else:
        yield f"  it has {size(limit)}"


def communication_lines(params, config):
    """Bytes that a device has to be sent each step, in a ring."""
    n_devices, engine = devices.count(), config.parallel
    if n_devices == 1:
        return
    gathered = [
        leaf
        for leaf in jax.tree.leaves(parallel.shapes_on_devices(params, engine))
        if not leaf.sharding.is_fully_replicated
    ]
    share = (n_devices - 1) / n_devices
    summed = bytes_of(params) - bytes_of(gathered)
    n_bytes = 2 * summed * share
    if gathered:
        numbers = sum(leaf.size for leaf in gathered)
        # Gathered for the forward and for the backward pass, and summed once, each micro-batch.
        each = numbers * (2 * jnp.dtype(config.dtype).itemsize + 4) * share
        n_bytes += each * config.grad_accum
    yield f"communication: {size(n_bytes)} to and from each device a step"


def length_lines(config, rows, tokens, flops, width):
    """Lines on the number of steps, as far as it is known without the text, and their time."""
    if devices.imagined():
        peak = metrics.peak_flops(device_kind())
        rate, whose = devices.count() * (peak or math.nan), "peak"
    else:
        rate = product_flops(width, jnp.dtype(config.dtype), min(MOST_ROWS, tokens))
        whose = "a product of matrices here"
    seconds = flops / rate
    if math.isnan(rate):
        yield f"time: not known, as the peak of a {device_kind()} is not"
    else:
        yield (
            f"time: at least {seconds:.3g} s a step, {tokens / seconds:,.0f} tokens/s, at the"
            f" {rate / 1e12:.3g} TFLOP/s of {whose}, on all devices together"
        )
    amount, unit = durations.split(config.max_steps)
    if not config.max_steps:
        plural = "" if config.epochs == 1 else "s"
        yield f"steps: as many as {config.epochs:g} epoch{plural} of the text come to"
    elif unit == "seconds":
        most = "as many as fit" if math.isnan(seconds) else f"at most {amount / seconds:,.0f}"
        yield f"steps: {most} in {config.max_steps}"
    else:
        n_steps = durations.in_steps(config.max_steps, rows, config.block_size, None)
        least = "" if math.isnan(seconds) else f"; at least {words_for(n_steps * seconds)}"
        yield f"steps: {n_steps:,}, {n_steps * tokens:,} tokens{least}"


def words_for(seconds: float) -> str:
    for name, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.3g} seconds"


def product_flops(width: int, dtype, rows: int) -> float:
    """FLOP/s of (rows, D) x (D, 4 D) on all devices of this run together, as the MLP has it.

    D is 512 at least: the less there is to do, the slower it is done.
    """
    width = max(512, width)
    mesh = parallel.local_mesh()
    spec = jax.sharding.PartitionSpec(parallel.AXIS)
    local = jax.local_device_count()

    def products(x, kernel):
        return jax.shard_map(
            lambda x, kernel: x @ kernel, mesh=mesh, in_specs=(spec, spec), out_specs=spec
        )(x, kernel)

    where = jax.sharding.NamedSharding(mesh, spec)
    x, kernel = (
        jax.jit(jnp.ones, static_argnums=(0, 1), out_shardings=where)(shape, dtype)
        for shape in ((local * rows, width), (local * width, 4 * width))
    )
    run = jax.jit(products)
    jax.block_until_ready(run(x, kernel))
    seconds = []
    for _ in itertools.repeat(None, 5):
        began = time.perf_counter()
        jax.block_until_ready(run(x, kernel))
        seconds.append(time.perf_counter() - began)
    flops = 2 * rows * width * 4 * width * jax.device_count()
    return flops / processes.agree(statistics.median(seconds))
