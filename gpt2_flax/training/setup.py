"""What a run is to do, from its settings: its step, its rows, its length. Nothing is trained."""

import dataclasses
import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_flax.config import durations
from gpt2_flax.config.train_config import TrainConfig
from gpt2_flax.data import batches
from gpt2_flax.distributed import devices, memory, parallel, processes
from gpt2_flax.errors import UserError, say
from gpt2_flax.model import initialization
from gpt2_flax.model.architecture import Architecture
from gpt2_flax.model.gpt2 import FlaxGPT2LMHeadModule, check_config
from gpt2_flax.model.ops import kernels
from gpt2_flax.reporting import metrics
from gpt2_flax.training import optim, step

MOST_STEPS = 2**31 - 1  # the state counts them in an int32


@dataclasses.dataclass
class Run:
    """What the loop works with. Rows are counted over all devices and processes."""

    model_config: object  # an Architecture, or the GPT2Config of a model that was given
    module: FlaxGPT2LMHeadModule
    optimizer: object
    schedule: object
    engine: str  # "pmap", "jit" or "fsdp"
    train_step: object
    eval_step: object
    global_batch: int
    micro_batches: int
    eval_batch: int
    total_steps: int
    logging: durations.Interval
    evaluating: durations.Interval
    saving: durations.Interval
    row_limit: float
    slots: slice
    seconds_a_step: float | None  # where the run's length was given as a time
    flops: float  # of one token
    peak: float | None  # FLOP/s of all devices


def build_run(config, model_config, rows, first_step: int, meta: dict | None) -> Run:
    """What the loop needs to go on after a step. meta: of that step's checkpoint, if any."""
    module = make_module(config, model_config)
    saved_batch = meta["global_batch"] if meta is not None else None
    if config.batch_size == "auto":
        config = with_batch_size(config, module, rows.count, saved_batch)
    assert isinstance(config.batch_size, int)
    at_once = devices.count() * config.batch_size
    global_batch = at_once * config.grad_accum
    if saved_batch not in (None, global_batch):
        global_batch = keep_global_batch(saved_batch, config)
    speed = meta.get("seconds_a_step") if meta is not None else None
    if speed is None and durations.split(config.max_steps)[1] == "seconds":
        speed = measure_step(config, module, global_batch)

    def in_steps(value):
        return durations.in_steps(value, global_batch, config.block_size, rows.count)

    total_steps, row_limit = count_steps(
        config, rows, global_batch, first_step, meta, speed, in_steps
    )
    if total_steps > MOST_STEPS:
        raise UserError(
            f"a run of {total_steps:,} steps is too long: {MOST_STEPS:,} can be counted\n"
            "  lower --max_steps or --epochs"
        )
    schedule, optimizer = make_optimizer(config, total_steps, in_steps)
    train_step = functools.partial(step.train_step, **fixed_for_step(config, module, optimizer))
    eval_step = functools.partial(
        step.eval_step, model=module, logits_at_once=config.logits_at_once or None
    )
    share = global_batch // jax.process_count()
    first = jax.process_index() * share
    peak = metrics.peak_flops(devices.everywhere()[0].device_kind)
    return Run(
        model_config=model_config,
        module=module,
        optimizer=optimizer,
        schedule=schedule,
        engine=config.parallel,
        train_step=parallel.compile_train_step(train_step, config.parallel),
        eval_step=parallel.compile_eval_step(eval_step, config.parallel),
        global_batch=global_batch,
        micro_batches=global_batch // at_once,
        eval_batch=at_once,
        total_steps=total_steps,
        logging=make_interval(config.log_every, in_steps),
        evaluating=make_interval(config.eval_every, in_steps),
        saving=make_interval(config.save_every, in_steps, at_most=max(1, total_steps // 4)),
        row_limit=row_limit,
        slots=slice(first, first + share),
        seconds_a_step=speed,
        flops=metrics.flops_per_token(
            model_config.n_layer, model_config.n_embd, model_config.vocab_size, config.block_size
        ),
        peak=peak and peak * devices.count(),
    )


def make_module(config, model_config) -> FlaxGPT2LMHeadModule:
    """Raises UserError for kernels that were asked for and do not work here."""
    usual_multiple = 1 if devices.platform() == "cpu" else 128
    return FlaxGPT2LMHeadModule(
        model_config,
        jnp.dtype(config.dtype),
        pad_vocab_to_multiple_of=config.pad_vocab_to_multiple_of or usual_multiple,
        gradient_checkpointing=config.remat == "block",
        attention_checkpointing=config.remat == "attention",
        # Elsewhere it was not measured.
        keeps_little=devices.platform() == "cpu",
        fused_attention=kernels.choose_attention(config, model_config),
        kernels=kernels.choose_others(config, model_config),
        scanned=config.scan_layers,
        traced_once=True,
        # XLA would sum the two gradients of a tied table over devices in two types.
        embeds_in_dtype=config.parallel == "jit" and devices.count() > 1,
    )


def fixed_for_step(config, module, optimizer) -> dict:
    return {
        "model": module,
        "optimizer": optimizer,
        "seed": config.seed,
        "logits_at_once": config.logits_at_once or None,
    }


def count_steps(config, rows, global_batch, first_step, meta, speed, in_steps):
    """(steps, rows) of the whole run; a length that is not given in epochs has no end of rows.

    speed: seconds a step, where the length is a time.
    """
    if config.max_steps:
        amount, unit = durations.split(config.max_steps)
        n_steps = amount // speed if unit == "seconds" else in_steps(config.max_steps)
        return max(1, int(n_steps)), math.inf
    row_limit = round(config.epochs * rows.count)
    if row_limit < 1:
        raise UserError(
            f"{config.epochs} epochs of {rows.count} rows are no step\n  raise --epochs"
        )
    # A step that ended the run before it was given more epochs may have been a short one.
    rows_left = row_limit - (meta["cursor"]["rows"] if meta is not None else 0)
    return first_step + math.ceil(rows_left / global_batch), row_limit


def make_optimizer(config, total_steps: int, in_steps):
    """(learning rate of each step, optax's optimizer). in_steps: a setting's value as steps."""
    warmup, decay = (
        optim.count_part(in_steps(value), total_steps)
        for value in (config.warmup_steps, config.decay_steps)
    )
    schedule = optim.make_schedule(
        config.lr_schedule, config.learning_rate, config.min_learning_rate, warmup, total_steps,
        decay,
    )  # fmt: skip
    return schedule, optim.make_optimizer(
        config.optimizer, schedule, config.weight_decay, config.beta1, config.beta2,
        config.adam_epsilon, config.grad_clip,
    )  # fmt: skip


def make_interval(value, in_steps, at_most: int | None = None) -> durations.Interval:
    amount, unit = durations.split(value)
    if unit == "seconds":
        return durations.Interval(seconds=amount or None)
    # Words that come to less than a step, unlike a 0, mean each step.
    n_steps = max(in_steps(value), 1 if amount else 0)
    return durations.Interval(min(n_steps, at_most) if at_most is not None else n_steps)


def keep_global_batch(saved: int, config: TrainConfig) -> int:
    """The global batch of a run's checkpoints, if these devices can make it up."""
    n_devices = devices.count()
    assert isinstance(config.batch_size, int)
    if saved % (n_devices * config.batch_size):
        fitting = [n for n in range(1, saved + 1) if saved % (n_devices * n) == 0]
        ways = f"set --batch_size to one of {fitting}" if fitting else "use fewer devices"
        raise UserError(
            f"the run's steps have {saved} rows; {n_devices} devices x batch_size"
            f" {config.batch_size} cannot make that up\n  {ways}"
        )
    accumulated = saved // (n_devices * config.batch_size)
    say(f"the run's steps have {saved} rows and keep them: grad_accum is {accumulated} here")
    return saved


# ---------------------------------------------------------------- the model


def choose_model(config: TrainConfig, tokenizer, meta: dict | None):
    """(the model's settings, parameters to start from; None for random or a checkpoint's ones).

    The settings are an Architecture, or the GPT2Config of the model to start from.

    meta: of the checkpoint that the run goes on from, if there is one.
    """
    names = "resid_pdrop", "embd_pdrop", "attn_pdrop"
    dropouts: dict[str, Any] = dict.fromkeys(names, config.dropout)
    if not config.init_from:
        model_config = Architecture(
            n_layer=config.n_layers,
            n_head=config.n_heads,
            n_embd=config.n_embd,
            n_positions=config.n_positions,
            vocab_size=choose_vocab_size(config, tokenizer),
            bos_token_id=tokenizer.eos_id,
            eos_token_id=tokenizer.eos_id,
            **dropouts,
        )
        try:
            check_config(model_config)
        except ValueError as error:
            raise UserError(f"the settings name no model: {error}") from error
        return model_config, None
    # A run that goes on has its model in its checkpoints; the one it began from may be gone.
    if meta is not None:
        from gpt2_flax.pretrained.config_files import make_config

        model_config, params = make_config(meta["model"], "the checkpoint"), None
    else:
        from gpt2_flax.pretrained.modeling import FlaxGPT2LMHeadModel

        model, given = FlaxGPT2LMHeadModel.from_pretrained(config.init_from, _do_init=False)
        missing = model._missing_keys - {("lm_head", "kernel")}  # a base model has no head
        if missing:
            raise UserError(
                f"the model in {config.init_from} lacks {len(missing)} weights, such as"
                f" {'/'.join(min(missing))}\n  is its config.json the right one?"
            )
        given = model.init_weights(model.key, params=given)
        # On no device yet: where they go is for the run to say.
        model_config, params = model.config, jax.device_get(model.to_fp32(given))
        types = {leaf.dtype.name for leaf in jax.tree.leaves(given)} - {"float32"}
        if types:
            say(f"{config.init_from}: {', '.join(types)} weights become float32 for training")
    model_config.update(dropouts)
    check_given_model(config, model_config, tokenizer)
    return model_config, params


def choose_vocab_size(config: TrainConfig, tokenizer) -> int:
    if 0 < config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size {config.vocab_size} is smaller than the tokenizer's"
            f" {tokenizer.vocab_size} tokens\n  raise --vocab_size, or leave it out"
        )
    return config.vocab_size or tokenizer.vocab_size


def check_given_model(config: TrainConfig, model_config, tokenizer) -> None:
    """Raise UserError where the model to start from does not fit the other settings."""
    if tokenizer.vocab_size > model_config.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model in"
            f" {config.init_from} has {model_config.vocab_size}\n"
            f"  use the model's own tokenizer: --tokenizer {config.init_from}"
        )
    if config.block_size > model_config.n_positions:
        raise UserError(
            f"block_size {config.block_size} is over the {model_config.n_positions} positions of"
            f" the model in {config.init_from}\n  lower --block_size"
        )
    if model_config.add_cross_attention:
        raise UserError(
            f"the model in {config.init_from} has cross-attention, which text alone cannot train\n"
            "  start from a model without it (add_cross_attention false in its config.json)"
        )


def new_state(key, module, optimizer, engine: str) -> step.TrainState:
    """`step.init_state` of a key, on the devices as an engine wants it, by several programs."""
    like = parallel.shapes_on_devices(step.state_shapes(module, optimizer), engine)
    params = initialization.draw_parameters(module, key, like.params)

    def rest(params):
        return step.state_from_params(params, optimizer)._replace(params=None)

    where = jax.tree.map(lambda leaf: leaf.sharding, like._replace(params=None))
    return jax.jit(rest, out_shardings=where)(params)._replace(params=params)


# ---------------------------------------------------------------- measured before the first step


def trial(config, module, engine: str | None = None):
    """(optimizer, a step on many devices) of a run whose length is not known yet."""
    _, optimizer = make_optimizer(config, 1, lambda value: 1)
    update = functools.partial(step.train_step, **fixed_for_step(config, module, optimizer))
    return optimizer, parallel.compile_train_step(update, engine or config.parallel)


def engine_of_plans(config) -> str:
    """The engine that tells a step's memory: the run's own, or jit in the place of pmap.

    On two devices of a CPU, jit's small steps were planned at 3 to 6 % more than pmap's.
    """
    return config.parallel if parallel.takes_shapes(config.parallel) else "jit"


def with_batch_size(config, module, rows_an_epoch: int | None, saved: int | None) -> TrainConfig:
    """The settings with a number for the batch_size that was `auto`."""
    n_rows = choose_batch_size(config, module, rows_an_epoch, saved)
    return dataclasses.replace(config, batch_size=n_rows)


def choose_batch_size(config, module, rows_an_epoch: int | None, saved: int | None) -> int:
    """The largest power of two rows a device whose step fits, by the compiler's own plan.

    saved: rows of a step of the run's checkpoints, which the choice then divides.
    """
    n_devices, accumulated = devices.count(), config.grad_accum
    most = memory.MOST_TOKENS.get(devices.platform(), 2**18) // config.block_size
    if rows_an_epoch is not None:
        most = min(most, rows_an_epoch // (n_devices * accumulated))
    allowed = [2**n for n in range(31) if 2**n <= max(1, most)]
    if saved is not None:
        allowed = [n for n in allowed if saved % (n_devices * n) == 0]
        if not allowed:
            return 1  # these devices cannot make up the run's steps: that is said elsewhere
    engine = engine_of_plans(config)
    optimizer, update = trial(config, module, engine)
    state = parallel.shapes_on_devices(step.state_shapes(module, optimizer), engine)
    planned = {}

    def bytes_of(n):
        if n not in planned:
            micro_batches = saved // (n_devices * n) if saved else accumulated
            rows = len(devices.here()) * micro_batches * n
            batch = parallel.batch_shapes(
                blank_batch(rows, config.block_size), micro_batches, engine
            )
            planned[n] = memory.step_bytes(update.lower(state, batch).compile())
        return planned[n]

    limit = int(memory.USABLE * memory.device_bytes())
    chosen = min(processes.gather(memory.largest_batch(bytes_of, limit, allowed)))
    figures = f"{memory.gigabytes(bytes_of(chosen))} of the {memory.gigabytes(limit)} it may"
    if bytes_of(chosen) > limit:
        raise UserError(
            f"batch_size auto: a step of {chosen} row a device takes {figures}\n"
            "  use --remat block, --dtype bfloat16, a shorter --block_size, or a smaller model"
        )
    say(f"batch_size auto: {chosen} rows a device; a step takes {figures}")
    return chosen


def measure_step(config, module, global_batch: int) -> float:
    """Seconds a step: the median of five on blank rows, after one in which it is compiled."""
    optimizer, update = trial(config, module)
    state = new_state(jax.random.key(config.seed), module, optimizer, config.parallel)
    batch = blank_batch(global_batch // jax.process_count(), config.block_size)
    micro_batches = global_batch // (devices.count() * config.batch_size)
    ready = parallel.put_batch(batch, micro_batches, config.parallel)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(update(state, ready))
        seconds.append(time.perf_counter() - began)
    speed = processes.agree(statistics.median(seconds[1:]))
    n_steps = durations.split(config.max_steps)[0] // speed
    say(f"a step takes {speed:.3g} s: {config.max_steps} are {n_steps:,.0f} steps")
    return speed


def blank_batch(n_rows: int, block_size: int) -> batches.Batch:
    ids = np.zeros((n_rows, block_size + 1), np.int32)
    return batches.make_batch(ids, np.ones(n_rows, bool), slice(None), n_rows)


# ---------------------------------------------------------------- memory


def describe_memory(run, config) -> str:
    """The sizes that matter where a step does not fit into a device. run: None if not built."""
    rows, beside = config.batch_size, ""
    if run is not None:
        rows = run.eval_batch // devices.count()
        state = step.state_shapes(run.module, run.optimizer)
        n_bytes = parallel.bytes_there(state, run.engine)
        beside = f" beside {memory.gigabytes(n_bytes)} of parameters and optimizer,"
    return (
        f"{rows} rows of {config.block_size} tokens at a time,{beside} on a"
        f" {jax.devices()[0].device_kind} that has {memory.gigabytes(memory.device_bytes())}"
    )


def remedy_for_memory(config) -> str:
    remedies = ["a smaller --batch_size with as much more --grad_accum (the same step)"]
    remedies += ["--remat block"] if config.remat != "block" else []
    if config.parallel == "fsdp":  # samples are made on one device
        remedies += ["--sample_tokens 0"] if config.sample_tokens else []
    elif devices.count() > 1:
        remedies += ["--parallel fsdp"]
    remedies += ["--dtype bfloat16 in a new run"] if config.dtype == "float32" else []
    remedies += ["--optimizer adafactor in a new run"] if config.optimizer != "adafactor" else []
    return "use " + ", or ".join(remedies[:3])
