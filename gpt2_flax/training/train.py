"""A training run from its settings to the final model: the order of events."""

import contextlib
import functools
import itertools
import logging
import math
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from gpt2_flax import command_names, filesystem, imports
from gpt2_flax.config import durations
from gpt2_flax.config.settings import shown
from gpt2_flax.config.train_config import TrainConfig, differing_keys, dump_yaml, profiled_steps
from gpt2_flax.data import batches, pipeline, preview, tokenizers
from gpt2_flax.distributed import compilation_cache, memory, parallel, processes
from gpt2_flax.errors import CheckpointError, NumericsError, UserError, say
from gpt2_flax.evaluation import scorer
from gpt2_flax.model.architecture import as_gpt2_config
from gpt2_flax.reporting import (
    metrics,
    model_card,
    plots,
    profiling,
    report,
    samples,
    summary,
    trackers,
)
from gpt2_flax.reporting.logs import Logs
from gpt2_flax.training import checkpoint, dry_run, optim, run_directory, setup, signals, step

RATES_AT_ONCE = 4096
LONG_STEP = 4.0  # seconds; the device waits for the host after one, for some hundredths of them


def train(config: TrainConfig) -> int:
    """Run or continue a run to its end. Returns the process's exit code.

    Raises UserError, or one of its kinds, for what the user can put right.
    """
    quiet_libraries()
    compilation_cache.use(config.compilation_cache)
    memory.trim_after_compiling()
    output_dir = pathlib.Path(config.output_dir)
    if config.show_data:
        return show_data(config)
    if config.topology:  # before JAX looks for devices that are there
        return dry_run.dry_run(config)

    # ------------------------------------------------------------ check
    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(signals.StopRequest())
        cleanup.enter_context(never_left_early())
        cleanup.enter_context(checkpoint.quiet_closed_loops())
        cleanup.enter_context(processes.leaving_together())
        processes.join(config)
        stop.of_several = processes.several()
        with processes.together():
            check_intervals(config)
            if config.dry_run or config.show_sharding:
                return dry_run.dry_run(config)

        def look_into_directory():
            filesystem.refuse_links(output_dir, "output_dir", but=(model_card.CARD_FILE,))
            holds_a_run = run_directory.holds_a_run(output_dir)
            if holds_a_run:
                # Raises before a lock is put beside somebody else's file.
                run_directory.read_settings(output_dir)
                cleanup.enter_context(run_directory.locked(output_dir))
            continuing = run_directory.check(config, output_dir)
            trackers.check(config.report_to)
            return holds_a_run, continuing

        holds_a_run, continuing = processes.first_only(look_into_directory)
        checkpoints, newest, newest_meta = None, 0, None
        if continuing:
            watch = cleanup.enter_context(processes.watching(output_dir, config))
            checkpoints = open_checkpoints(config, output_dir, cleanup)
            newest, newest_meta = checkpoints.newest_meta()
        with processes.together():
            text = pipeline.open_text(config)
            tokenizer = pipeline.open_tokenizer(config, output_dir, text[0], continuing)
            model_config, given_params = setup.choose_model(config, tokenizer, newest_meta)
            sampler = make_sampler(config, model_config, tokenizer)
            train_rows, held_out, about_text = pipeline.open_rows(config, tokenizer, *text)
        processes.check_alike(
            what_must_be_alike(config, train_rows, held_out, tokenizer, model_config)
        )

        # -------------------------------------------------------- build
        run = None
        cleanup.enter_context(
            memory.out_of_memory(
                lambda: setup.describe_memory(run, config), setup.remedy_for_memory(config)
            )
        )
        with processes.together():
            run = setup.build_run(config, model_config, train_rows, newest, newest_meta)
            trace = make_trace(config, output_dir, run.total_steps)

        def take_directory():
            if not holds_a_run:
                run_directory.make(output_dir)
                cleanup.enter_context(run_directory.locked(output_dir))
                run_directory.check_still_new(output_dir)
            if not continuing:
                run_directory.begin(config, tokenizer, output_dir)
            elif not (output_dir / tokenizers.TOKENIZER_FILE).is_file():
                run_directory.save_tokenizer(tokenizer, output_dir)

        processes.first_only(take_directory)
        if not continuing:
            watch = cleanup.enter_context(processes.watching(output_dir, config))
            checkpoints = open_checkpoints(config, output_dir, cleanup)
        assert checkpoints is not None

        # -------------------------------------------------------- restore
        state, steps_made, meta = restore(
            run, checkpoints, config, train_rows, tokenizer, given_params
        )
        if steps_made != newest:  # that one is damaged: another number of steps is left
            run = setup.build_run(config, model_config, train_rows, steps_made, meta)
        with processes.together():
            logs = Logs(config, output_dir, steps_made, sampler, processes.is_first())
            cleanup.callback(logs.close)
        about_text = describe_text(config, train_rows, held_out, about_text)
        checkpoints.warn_of_room(state)
        describe_run(run, config, about_text, state, steps_made, trace)

        # -------------------------------------------------------- loop
        state, stopped_by = loop(
            run, config, state, steps_made, meta, train_rows, held_out, checkpoints, logs, trace,
            stop, watch,
        )  # fmt: skip
        pipeline.warn_of_stream(train_rows)
        if stopped_by is not None:
            say(f"saved step {int(state.step)}; the same command goes on from there")
            return 128 + stopped_by

        # -------------------------------------------------------- finish
        stop.phase = signals.FINISHING
        with processes.together():
            params = parallel.whole(state.params)
            if processes.is_first():
                logs.sample(int(state.step), params)
                finish(run, params, output_dir, logs)
                logs.close()  # before the summary, since Weights & Biases prints one of its own
                look_back(run, config, state, about_text, logs, checkpoints)
    return 0


# ---------------------------------------------------------------- check


def check_intervals(config: TrainConfig) -> None:
    """Raise UserError where processes would have to agree on what time it is."""
    for name in ("eval_every", "save_every"):
        value = getattr(config, name)
        if processes.several() and durations.split(value)[1] == "seconds":
            raise UserError(
                f"{name} {value} is a time, and a run of several processes counts steps\n"
                f"  give --{name} in steps, tokens or epochs"
            )


def what_must_be_alike(config, rows, held_out, tokenizer, model_config) -> dict:
    """What the processes of a run have to have in common, beside the files that they share."""
    settings = yaml.safe_load(dump_yaml(config))
    return {
        **{f"--{name}": value for name, value in settings.items() if name != "cache_dir"},
        "its code or version of jax": processes.code_version(),
        "its training text": rows.fingerprint,
        "its held-out text": None if held_out is None else [held_out.fingerprint, len(held_out)],
        "its tokenizer": tokenizer.fingerprint,
        "its model": model_config.to_dict(),
    }


def show_data(config: TrainConfig) -> int:
    """Print the first rows of a run as ids and text, and the counts, and train nothing."""
    output_dir = pathlib.Path(config.output_dir)
    continuing = run_directory.holds_a_run(output_dir) and run_directory.check(config, output_dir)
    text = pipeline.open_text(config)
    tokenizer = pipeline.open_tokenizer(config, output_dir, text[0], continuing)
    rows, held_out, about = pipeline.open_rows(config, tokenizer, *text)
    for line in preview.lines(rows, held_out, about, config.add_eos, tokenizer, config.show_data):
        print(line)
    return 0


def open_checkpoints(config, output_dir, cleanup) -> checkpoint.Checkpoints:
    refuse = functools.partial(why_of_another_run, config)
    checkpoints = checkpoint.Checkpoints(output_dir, config.keep, refuse)
    cleanup.callback(checkpoints.close)
    return checkpoints


def why_of_another_run(config: TrainConfig, meta: dict) -> str | None:
    """What in a checkpoint says that a run of other settings saved it; None for this run's."""
    for name, kind in META_TYPES.items():
        if not isinstance(meta.get(name), kind):
            return f"its meta has no {name} that this trainer wrote"
    differing = differing_keys(config, meta["settings"])
    listed = ", ".join(f"{name} {shown(was)}" for name, (was, _) in differing.items())
    return f"it was saved by a run with {listed}" if differing else None


def make_sampler(config, model_config, tokenizer) -> samples.Sampler | None:
    if not config.sample_tokens:
        return None
    return samples.Sampler(
        model_config, jnp.dtype(config.dtype), tokenizer, config.sample_prompt,
        config.sample_tokens, config.seed,
    )  # fmt: skip


def make_trace(config, output_dir, total_steps) -> profiling.StepTrace:
    """Of the first process. Raises UserError for steps that the run does not have."""
    span = profiled_steps(config.profile)
    if span is not None and span[1] > total_steps:
        raise UserError(
            f"profile {config.profile} goes beyond the run's {total_steps} steps\n"
            "  trace earlier steps"
        )
    return profiling.StepTrace(output_dir, span if processes.is_first() else None)


@contextlib.contextmanager
def never_left_early():
    """Context in which an exit that is not ours does not pass for the end of the run."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"something called sys.exit({error.code!r}) during the run") from error


# ---------------------------------------------------------------- restore

# What the meta item of a checkpoint holds, at the least.
META_TYPES = {
    "global_batch": int, "data": dict, "model": dict, "settings": dict, "cursor": dict,
    "tokens": int, "seconds": int | float, "window": list, "evaluated": int, "bad_steps": int,
    "bad_in_a_row": int,
}  # fmt: skip


def restore(run, checkpoints, config, rows, tokenizer, given_params):
    """(state, steps made, meta) to go on from: the newest checkpoint's, or those of a new run.

    On one device a new run's state may still be under way: the step is compiled meanwhile.
    """
    shapes = step.state_shapes(run.module, run.optimizer)
    like = parallel.shapes_on_devices(shapes, run.engine)
    restored = checkpoints.restore_latest(like._asdict())
    data = {"text": rows.fingerprint, "tokenizer": tokenizer.fingerprint}
    if restored is not None:
        state, meta = restored
        steps_made = int(state["step"])
        if steps_made > run.total_steps:
            raise UserError(
                f"the run in {config.output_dir} is at step {steps_made} already, past"
                f" the {run.total_steps} that are asked for\n"
                "  raise --max_steps or --epochs; any of its checkpoints can be converted:"
                f" {command_names.prog('convert')}"
            )
        for what, fingerprint in data.items():
            if meta["data"][what] != fingerprint:
                raise UserError(
                    f"the {what} is not the one that the run in {config.output_dir} began with\n"
                    "  bring it back, or choose another --output_dir"
                )
        return step.TrainState(**state), steps_made, meta | {"seconds_a_step": run.seconds_a_step}
    if config.resume == "require" or (config.init_from and given_params is None):
        raise CheckpointError(f"output_dir {config.output_dir} holds no checkpoint to resume from")
    meta = {
        "global_batch": run.global_batch,
        "data": data,
        "model": run.model_config.to_dict(),
        "settings": yaml.safe_load(dump_yaml(config)),
        "cursor": rows.start,
        "evaluated": 0,
        "best_validation_loss": None,
        **metrics.NOTHING_BEFORE,
        "seconds_a_step": run.seconds_a_step,
    }
    if given_params is None:
        key = jax.random.key(config.seed)
        state = setup.new_state(key, run.module, run.optimizer, run.engine)
    else:
        make = functools.partial(step.state_from_params, optimizer=run.optimizer)
        state = parallel.make_state(make, given_params, run.engine)
    if jax.device_count() > 1:  # one that fails would leave the others waiting in the first step
        jax.block_until_ready(state)
    return state, 0, meta


# ---------------------------------------------------------------- loop


class InterruptedEvaluationError(Exception):
    """An evaluation was cut short by a stop request."""


def loop(
    run, config, state, steps_made, meta, rows, held_out, checkpoints, logs, trace, stop, watch
):
    """Train to the last step. Returns (state, the signal that stopped it early or None)."""
    if processes.several():
        stop.agree_by(parallel.compile_maximum())
    stop.phase = signals.STARTING
    n = steps_made
    cursor, evaluated, best = meta["cursor"], meta["evaluated"], meta["best_validation_loss"]
    checkpoints.best.step = meta.get("best_step")
    meter = metrics.Meter(meta, run.flops, run.peak, config.max_bad_steps)
    progress = metrics.Progress(run.total_steps, n)

    @functools.lru_cache(maxsize=1)
    def rates(chunk):
        """Learning rates of some steps at once: each would wait for the device."""
        steps = chunk * RATES_AT_ONCE + jnp.arange(RATES_AT_ONCE)
        return np.broadcast_to(run.schedule(steps), RATES_AT_ONCE)

    def rate(update):
        chunk, place = divmod(update, RATES_AT_ONCE)
        return float(rates(chunk)[place])

    def report(row):
        if row is not None:
            logs.write(row)
            progress.show(row["step"], row["train_loss"], row["tokens_per_second"])
            for line in meter.notes():
                progress.say(line)

    def evaluate_now():
        """Evaluate, sample, and draw. Returns the validation loss, None without such a text.

        It is logged in the same row as the step's training loss, if that has one.
        """
        nonlocal evaluated
        report(meter.flush())
        loss = None if held_out is None else validate()
        logs.sample(n, state.params)
        evaluated = n
        logs.draw()
        return loss

    def validate():
        # A trial of a few steps is not to be followed by an evaluation longer than itself.
        n_rows = config.eval_rows or run.total_steps * run.global_batch
        loss, n_tokens = held_out_loss(run, config, state.params, held_out, n_rows, stop, watch)
        perplexity = scorer.perplexity(loss)
        about = {"step": n, "tokens": meter.tokens_now()}
        logs.merge(about | {"validation_loss": loss, "perplexity": perplexity})
        part = "" if n_tokens == len(held_out) - 1 else f" (on the first {n_tokens:,} tokens)"
        progress.say(f"step {n}: validation loss {loss:.4f}, perplexity {perplexity:.2f}{part}")
        return loss

    def save_now(validation_loss):
        report(meter.flush())
        about = meter.snapshot() | {
            "cursor": cursor, "evaluated": evaluated, "best_validation_loss": best,
            "best_step": checkpoints.best.step,
        }  # fmt: skip
        if not is_finite(state):
            raise NumericsError(
                f"step {n}: parameters or optimizer are not finite numbers; not saved\n"
                f"  {metrics.STEADIER}"
            )
        if checks_replicas:
            check_replicas()
        whole = parallel.of_all_processes(state._asdict())
        checkpoints.save(n, whole, meta | about, validation_loss)

    def check_replicas():
        differing = parallel.differing_replicas(state)
        if differing:
            raise NumericsError(
                f"step {n}: the copies of the model and the optimizer on {jax.device_count()}"
                f" devices differ, that of {' or '.join(map(str, differing))} from the others;"
                " not saved\n  a device or its memory may be faulty; the same command goes on"
                " from the newest checkpoint"
            )

    def is_best(loss):
        """Whether it is the lowest validation loss yet, of which a checkpoint is kept."""
        nonlocal best
        if (
            not config.save_every
            or loss is None
            or not math.isfinite(loss)
            or (best is not None and loss >= best)
        ):
            return False
        best = loss
        return True

    def is_due(interval):
        return interval.is_due(n) or n == run.total_steps

    is_finite = jax.jit(step.all_finite)
    checks_replicas = config.replica_check_every and jax.device_count() > 1
    steps = rows.batches(cursor, run.global_batch, run.row_limit, run.slots)
    steps = itertools.islice(steps, run.total_steps - steps_made)
    ready = parallel.prefetch(
        steps,
        lambda taken: taken._replace(
            batch=parallel.put_batch(taken.batch, run.micro_batches, config.parallel)
        ),
    )

    with contextlib.ExitStack() as cleanup:
        for opened in (progress, ready, trace):
            cleanup.enter_context(contextlib.closing(opened))
        # A stop request may have cut off the evaluation that belongs to this step.
        if n and is_due(run.evaluating) and evaluated != n:
            with contextlib.suppress(InterruptedEvaluationError):
                if is_best(evaluate_now()):  # its checkpoint is there, and knows nothing of it
                    checkpoints.best.step = n
        if trace.begins_at(n + 1):
            trace.start()
        before, done = None, time.monotonic()
        is_long = False
        for batch, numbers, cursor in ready:
            with trace.annotated(n + 1):
                state, values = run.train_step(state, batch)
            # One step is computed and one waits: a stop waits for no more, and programs of several
            # devices of a CPU that wait for each other can stop for good where more are under way.
            jax.block_until_ready(values if is_long else before)
            is_long, done = time.monotonic() - done > LONG_STEP, time.monotonic()
            before = values
            stop.phase = signals.RUNNING
            n += 1
            logs.took(n, numbers)
            meter.add(n, values)
            progress.advance()
            watch.move_on(n)
            stop.poll()
            validation_loss = None
            if is_due(run.logging):
                epoch = cursor["rows"] / rows.count if rows.count else cursor["epoch"]
                report(meter.close_window(n, round(epoch, 6), rate(n - 1)))
            with meter.paused():
                if trace.ends_at(n):
                    report(meter.flush())
                    trace.stop()
                    progress.say(f"the trace of steps {config.profile} is in {trace.folder}")
                if is_due(run.evaluating) and not stop.asked:
                    with contextlib.suppress(InterruptedEvaluationError):
                        validation_loss = evaluate_now()
                    run.evaluating.done()
                if best_yet := is_best(validation_loss):
                    checkpoints.best.step = None
                if best_yet or is_due(run.saving) or stop.asked:
                    save_now(validation_loss)
                    run.saving.done()
                elif checks_replicas and n % config.replica_check_every == 0:
                    check_replicas()
                if trace.begins_at(n + 1) and not stop.asked:
                    report(meter.flush())
                    trace.start()
            if stop.asked:
                break
        report(meter.flush())
        checkpoints.confirm(n)
    stopped_early = n < run.total_steps or (held_out is not None and evaluated < n)
    return state, stop.asked if stopped_early else None


def held_out_loss(run, config, params, held_out, n_rows, stop, watch) -> tuple[float, int]:
    """(mean loss on the first rows of the held-out text, targets counted).

    Raises InterruptedEvaluationError on a stop request.
    """
    share = run.eval_batch // jax.process_count()
    first = jax.process_index() * share
    chunks = batches.evaluation_batches(
        held_out, config.block_size, run.eval_batch, n_rows, slice(first, first + share)
    )

    def unless_stopped(ready):
        for batch in ready:
            watch.move_on()
            if stop.poll():
                raise InterruptedEvaluationError
            yield batch

    ready = parallel.prefetch(chunks, lambda batch: parallel.put_batch(batch, None, run.engine))
    with contextlib.closing(ready):
        return scorer.mean_loss(run.eval_step, params, unless_stopped(ready))


# ---------------------------------------------------------------- finish


def finish(run, params, output_dir, logs) -> None:
    """Export the model, beside the tokenizer that is there, and draw the curves."""
    from gpt2_flax.pretrained.modeling import FlaxGPT2LMHeadModel

    for leftover in output_dir.glob(".model*.tmp"):  # of an export that was killed
        leftover.unlink()
    params = jax.device_get(params)
    model_config = as_gpt2_config(run.model_config)
    model = FlaxGPT2LMHeadModel(model_config, dtype=run.module.dtype, params=params)
    with filesystem.storage_errors(f"{output_dir}/model.safetensors", checkpoint.bytes_of(params)):
        model.save_pretrained(output_dir)
    logs.draw()


def look_back(run, config, state, about_text, logs, checkpoints) -> None:
    """Write report.html and the model card, and say what came of the run and what to do next."""
    output_dir = pathlib.Path(config.output_dir)
    came_to = summary.Outcome(
        config=config,
        saved=run_directory.read_settings(output_dir),
        model=describe_model(run, state),
        about_text=about_text,
        step=int(state.step),
        rows_per_step=run.global_batch,
        peak=run.peak,
        rows=logs.rows(),
        samples=logs.read_samples(),
        checkpoints=checkpoints.steps(),
    )
    report.write(came_to, output_dir / plots.PLOT_FILE, output_dir / report.REPORT_FILE)
    if not model_card.write(came_to, output_dir / model_card.CARD_FILE):
        say(f"{output_dir / model_card.CARD_FILE} is somebody's own and stays as it is")
    for line in summary.summary(came_to):
        print(line)


# ---------------------------------------------------------------- words


def describe_model(run, state) -> dict:
    c = run.model_config
    return {
        "layers": c.n_layer,
        "width": c.n_embd,
        "heads": c.n_head,
        "positions": c.n_positions,
        "vocabulary": c.vocab_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    }


def describe_text(config, rows, held_out, about: dict) -> str:
    """A line on the training text and its size, where that is known."""
    if config.train_file:
        name = ", ".join(summary.public("train_file", config.train_file))
    else:
        name = " ".join(filter(None, (config.dataset, config.dataset_config)))
        name = summary.public("dataset", name)
    if rows.count is None:
        return f"{name}, streamed; tokenizer {summary.public('tokenizer', config.tokenizer)}"
    documents = about.get("documents")
    plural = "" if documents == 1 else "s"
    in_documents = f"{documents:,} document{plural}, " if documents is not None else ""
    evaluated = f"; {len(held_out):,} tokens held out" if held_out is not None else ""
    return (
        f"{name}: {in_documents}{rows.count:,} rows of {config.block_size} tokens an epoch,"
        f" {rows.remainder} tokens left over{evaluated}"
    )


def describe_run(run, config, about_text, state, steps_made, trace) -> None:
    devices = jax.devices()
    if os.environ.get("XLA_FLAGS"):
        say(f"XLA_FLAGS: {os.environ['XLA_FLAGS']}")
    say(f"jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}, {config.dtype}")
    say(f"model: {summary.describe_model(describe_model(run, state))}")
    say(f"text: {about_text}")
    say(optim.describe_decay(state.params, config.weight_decay))
    per_step = run.global_batch * config.block_size
    rows_at_once = run.eval_batch // len(devices)
    say(
        f"step: {run.global_batch} rows, {per_step:,} tokens (devices {len(devices)} x rows"
        f" {rows_at_once} x accumulated {run.micro_batches}); {run.total_steps:,} steps"
    )
    if steps_made:
        say(f"continuing after step {steps_made:,}")
        if config.profile and steps_made >= trace.last:
            say(f"profile {config.profile}: these steps were made before; nothing is traced")
    elif run.total_steps:
        say("compiling the first step")


def quiet_libraries() -> None:
    """Our own words only: the libraries' notes to developers are not for who trains."""
    # What Orbax logs as an error it also raises, where it is put into words of ours.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    imports.quiet_transformers()
