"""The measurements of docs/benchmarks.md that are too slow for a test.

python -m tests.measure memory            temporary memory of a gradient, with and without
                                          gradient checkpointing, as the compiler plans it
python -m tests.measure logging [ROUNDS]  steps with a row of the log each and with one in a
                                          hundred, fresh processes of scripts/train.py in turn;
                                          first, what the host does for a row by itself
                                          (0 rounds: only that)
python -m tests.measure checks [ROUNDS]   steps with and without the check that a step is
                                          finite, in turn, in fresh processes; and a comparison
                                          of two devices' copies of a 124M state
python -m tests.measure engines [ROUNDS]  steps by pmap and by jit, in turn, in fresh processes
                                          of one device and of two
python -m tests.measure levers [STEPS]    curves of the loss by each way to compute the same,
                                          against those of the plain one and of other seeds
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time


def memory() -> None:
    import jax
    import jax.numpy as jnp
    import optax
    import transformers

    from gpt2_flax import FlaxGPT2LMHeadModel

    ids = jax.ShapeDtypeStruct((1, 1025), jnp.int32)
    for again in (False, True):
        model = FlaxGPT2LMHeadModel(transformers.GPT2Config(), _do_init=False)
        if again:
            model.enable_gradient_checkpointing()

        def loss(params, ids, model=model):
            key = jax.random.key(0)
            logits = model(ids[:, :-1], params=params, dropout_rng=key, train=True).logits
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        program = jax.jit(jax.grad(loss)).lower(model.params_shape_tree, ids).compile()
        size = program.memory_analysis().temp_size_in_bytes
        print(f"124M, 1 x 1024, float32, gradient checkpointing {again}: {size / 1e9:.2f} GB")


BATCH, BLOCK = 4, 128
WARM_UP, TIMED = 100, 300  # steps; both multiples of a hundred, where either kind has a row
SMALL = [
    "--dataset", "python_stdlib", "--tokenizer", "bytes",
    "--n_layers", "2", "--n_heads", "4", "--n_embd", "128", "--n_positions", "128",
    "--block_size", str(BLOCK), "--batch_size", str(BATCH), "--dropout", "0",
    "--sample_tokens", "0", "--eval_every", "0", "--eval_rows", "4", "--save_every", "0",
    "--max_steps", str(WARM_UP + TIMED),
]  # fmt: skip


ROOT = pathlib.Path(__file__).resolve().parents[1]


def time_steps(log_every: int, folder: str) -> float:
    """Milliseconds of a step of a fresh run, after the warm-up, as its log times the device.

    (The log's `seconds` are the host's, which is up to a window ahead.)
    """
    output_dir = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *SMALL]
    command += ["--log_every", str(log_every), "--output_dir", output_dir]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    lines = pathlib.Path(output_dir, "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] > WARM_UP]
    tokens = TIMED * BATCH * BLOCK // len(rows)  # of a row
    return 1000 * sum(tokens / row["tokens_per_second"] for row in rows) / TIMED


def log_rows(report_to: str, n_rows: int = 600) -> tuple[float, float]:
    """Median milliseconds of a row of the log: (of the thread's processor time, by the clock)."""
    import jax.numpy as jnp

    from gpt2_flax.reporting import metrics, trackers

    with tempfile.TemporaryDirectory() as folder:
        reporter = trackers.make(report_to, folder, {}, 0)
        log, progress = metrics.RunLog(folder, reporter), metrics.Progress(n_rows, 0)
        meter = metrics.Meter(metrics.NOTHING_BEFORE, 1.0, None, 10)
        values = {name: jnp.float32(2) for name in ("loss_sum", "tokens", "grad_norm")}
        busy, passed = [], []
        for n in range(1, n_rows + 1):
            meter.add(n, values)
            progress.advance()
            at = time.thread_time(), time.perf_counter()
            row = meter.close_window(n, 0.1, 0.1)
            if row is not None:
                log.write(row)
                progress.show(n, row["train_loss"], row["tokens_per_second"])
            busy.append(1000 * (time.thread_time() - at[0]))
            passed.append(1000 * (time.perf_counter() - at[1]))
        reporter.close()
    return statistics.median(busy), statistics.median(passed)


def logging(rounds: int) -> None:
    for report_to in ("none", "tensorboard"):
        busy, passed = log_rows(report_to)
        print(f"a row, --report_to {report_to}: {busy:.2f} ms of processor time, {passed:.2f} ms")
    if not rounds:
        return
    taken = {1: [], 100: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for log_every, times in taken.items():
                times.append(time_steps(log_every, folder))
                load = os.getloadavg()[0]
                print(f"log_every {log_every:3}: {times[-1]:.2f} ms a step, load {load:.1f}")
    medians = {log_every: statistics.median(times) for log_every, times in taken.items()}
    for log_every, times in taken.items():
        print(f"log_every {log_every:3}: median {medians[log_every]:.2f} ms a step"
              f" ({min(times):.2f} to {max(times):.2f}, {rounds} processes)")  # fmt: skip
    print(f"a row each step costs {medians[1] / medians[100] - 1:+.1%}")


def checks(rounds: int) -> None:
    ratios = []
    for _ in range(rounds):
        command = [sys.executable, "-m", "tests.measure", "check"]
        run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        checked, unchecked = json.loads(run.stdout.splitlines()[-1])
        ratios.append(checked / unchecked)
        print(f"checked {checked:.2f} ms a step, unchecked {unchecked:.2f}"
              f" ({ratios[-1] - 1:+.1%}), load {os.getloadavg()[0]:.1f}")  # fmt: skip
    print(f"the check costs {statistics.median(ratios) - 1:+.1%}, median of {rounds} processes")
    compare_copies()


def check(n_steps: int = 120) -> None:
    """Medians of milliseconds a step, with the check and without, 4 layers x 256, 8 x 128."""
    import functools
    from unittest import mock

    import jax
    import transformers

    from gpt2_flax.config import train_config
    from gpt2_flax.distributed import parallel
    from gpt2_flax.training import setup, step

    settings = train_config.TrainConfig(dropout=0.0, max_steps=1000)
    sizes = transformers.GPT2Config(
        n_layer=4, n_head=4, n_embd=256, vocab_size=8192, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    module = setup.make_module(settings, sizes)
    _, optimizer = setup.make_optimizer(settings, 1000, lambda value: value)
    batch = parallel.put_batch(setup.blank_batch(8, 128), 1)
    make = functools.partial(step.init_state, model=module, optimizer=optimizer)
    fixed = setup.fixed_for_step(settings, module, optimizer)
    update, runs = step.update, {}

    def always(state, grads, optimizer, is_wanted, in_place):
        """XLA drops the question, and the choice between old and new."""
        return update(state, grads, optimizer, True, in_place)

    for name, used in (("checked", update), ("unchecked", always)):
        with mock.patch.object(step, "update", used):
            run = parallel.compile_train_step(functools.partial(step.train_step, **fixed), "pmap")
            state, _ = run(parallel.replicate(make, jax.random.key(0)), batch)
        runs[name] = [run, state, []]
    for _ in range(n_steps):
        for of_one in runs.values():
            run, state, taken = of_one
            began = time.perf_counter()
            of_one[1], _ = jax.block_until_ready(run(state, batch))
            taken.append(1000 * (time.perf_counter() - began))
    print(json.dumps([statistics.median(taken) for *_, taken in runs.values()]))


def engines(rounds: int) -> None:
    for devices in (1, 2):
        ratios = []
        for _ in range(rounds):
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
            command = [sys.executable, "-m", "tests.measure", "engine"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            by_pmap, by_jit = json.loads(done.stdout.splitlines()[-1])
            ratios.append(by_pmap / by_jit)
            print(f"{devices} devices: pmap {by_pmap:.2f} ms a step, jit {by_jit:.2f}"
                  f" ({ratios[-1] - 1:+.1%})", flush=True)  # fmt: skip
        print(f"{devices} devices: {statistics.median(ratios) - 1:+.1%}, median of {rounds}")


def engine(n_steps: int = 150) -> None:
    """Medians of milliseconds a step by pmap and by jit, 4 layers x 256, 8 x 128 tokens."""
    import jax
    import transformers

    from gpt2_flax.config import train_config
    from gpt2_flax.distributed import parallel
    from gpt2_flax.training import setup

    sizes = transformers.GPT2Config(
        n_layer=4, n_head=4, n_embd=256, vocab_size=8192, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    runs = []
    for name in ("pmap", "jit"):
        rows = 8 // jax.device_count()
        settings = train_config.TrainConfig(dropout=0.0, batch_size=rows, parallel=name)
        module = setup.make_module(settings, sizes)
        optimizer, update = setup.trial(settings, module)
        batch = parallel.put_batch(setup.blank_batch(8, 128), 1, name)
        state, _ = update(setup.new_state(jax.random.key(0), module, optimizer, name), batch)
        runs.append([update, state, batch, []])
    for _ in range(n_steps):
        for of_one in runs:
            update, state, batch, taken = of_one
            began = time.perf_counter()
            of_one[1], _ = jax.block_until_ready(update(state, batch))
            taken.append(1000 * (time.perf_counter() - began))
    print(json.dumps([statistics.median(taken) for *_, taken in runs]))


PLAIN = {
    "parallel": "jit", "dtype": "float32", "attention": "xla", "pad_vocab_to_multiple_of": "1",
    "batch_size": "8", "dropout": "0.1",
}  # fmt: skip
LEVERS = {
    "pmap": {"parallel": "pmap"},
    "pmap, 4 devices": {"parallel": "pmap", "batch_size": "2", "devices": "4"},
    "jit, 4 devices": {"batch_size": "2", "devices": "4"},
    "fsdp, 4 devices": {"parallel": "fsdp", "batch_size": "2", "devices": "4"},
    "accumulated twice": {"batch_size": "4", "grad_accum": "2"},
    "scanned layers": {"scan_layers": "true"},
    "remat block": {"remat": "block"},
    "remat attention": {"remat": "attention"},
    "logits of 16 positions at once": {"logits_at_once": "16"},
    "vocabulary padded to 128": {"pad_vocab_to_multiple_of": "128"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, padded, scanned, remat": {
        "dtype": "bfloat16", "pad_vocab_to_multiple_of": "128", "scan_layers": "true",
        "remat": "block",
    },
}  # fmt: skip
WINDOW = 20  # steps whose losses are one point of a curve


def levers(n_steps: int) -> None:
    """Of each lever: how far its curve is from the plain one's, by the clock of steps.

    As small a model as learns something of real text, and a learning rate at which it does.
    """

    def curve(**changes) -> list[float]:
        settings = PLAIN | changes
        devices = settings.pop("devices", "1")
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, str(ROOT / "scripts" / "train.py"), *SMALL, *flags,
                "--tokenizer", "bpe:1000", "--learning_rate", "1e-3",
                "--max_steps", str(n_steps), "--log_every", str(WINDOW),
                "--output_dir", f"{folder}/run",
            ]  # fmt: skip
            many = f"--xla_force_host_platform_device_count={devices}"
            environment = os.environ | {"XLA_FLAGS": many}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            lines = pathlib.Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        rows = map(json.loads, lines)
        return [row["train_loss"] for row in rows if row["step"] % WINDOW == 0]

    def show(name, losses) -> None:
        gaps = [abs(a - b) for a, b in zip(losses, plain, strict=True)]
        print(f"{name:33} | {losses[-1]:.4f} | {statistics.mean(gaps):.1e} | {max(gaps):.1e}",
              flush=True)  # fmt: skip

    print(f"of {n_steps} steps: last loss | mean gap to the plain one's curve | largest gap")
    plain = curve(seed="1")
    show("plain, seed 1", plain)
    for seed in ("2", "3"):
        show(f"plain, seed {seed}", curve(seed=seed))
    for name, changes in LEVERS.items():
        show(name, curve(seed="1", **changes))


def compare_copies() -> None:
    """Seconds of a comparison of a 124M state on two devices of a CPU."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import jax
    import jax.numpy as jnp

    from gpt2_flax.distributed import parallel

    state = parallel.replicate(lambda: [jnp.ones(124_439_808) for _ in range(3)])
    taken = []
    for _ in range(6):
        began = time.perf_counter()
        assert parallel.differing_replicas(state) == []
        taken.append(time.perf_counter() - began)
    print(f"{len(jax.devices())} copies of {3 * 0.4978:.2f} GB compared: {taken[0]:.2f} s the"
          f" first time, then median {statistics.median(taken[1:]):.2f} s")  # fmt: skip


if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or ["help"]
    if command == "memory":
        memory()
    elif command == "logging":
        logging(int(arguments[0]) if arguments else 5)
    elif command == "check":
        check()
    elif command == "engine":
        engine()
    elif command == "engines":
        engines(int(arguments[0]) if arguments else 5)
    elif command == "levers":
        levers(int(arguments[0]) if arguments else 600)
    elif command == "checks":
        checks(int(arguments[0]) if arguments else 5)
    else:
        print(__doc__)
