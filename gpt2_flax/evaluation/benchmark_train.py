"""Cells of the benchmark that train: our step, PyTorch's, and a save of ours.

Each is a function of settings that runs in a process of its own; see benchmark.py. PyTorch is
imported by the cells that measure it, and Orbax by the one that saves.
"""

import concurrent.futures
import contextlib
import os
import resource
import statistics
import sys
import tempfile
import time

import numpy as np

from gpt2_flax.errors import UserError
from gpt2_flax.imports import leave_out_torch
from gpt2_flax.xla_flags import set_defaults

LEARNING_RATE, WEIGHT_DECAY, GRAD_CLIP, BETAS = 6e-4, 0.1, 1.0, (0.9, 0.95)


def model_config(settings: dict):
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers.GPT2Config(
        n_layer=settings["n_layers"],
        n_embd=settings["n_embd"],
        n_head=settings["n_heads"],
        vocab_size=settings["vocab_size"],
        n_positions=max(1024, settings["block_size"]),
        bos_token_id=0,
        eos_token_id=0,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings["dropout"]),
    )


def random_rows(settings: dict, more: int):
    """Without end, ids of a step: (batch_size, block_size + more)."""
    rng = np.random.default_rng(settings["seed"])
    shape = settings["batch_size"], settings["block_size"] + more
    while True:
        yield rng.integers(0, settings["vocab_size"], shape).astype(np.int32)


def timed(step, wait, settings: dict) -> dict:
    """Figures of a step, which starts work, and of `wait`, which returns when all is done."""
    first_began = time.time()
    step()
    wait()
    first_done = time.time()
    for _ in range(settings["warm_up"]):
        step()
    wait()
    began, busy = time.perf_counter(), time.process_time()
    for _ in range(settings["steps"]):
        step()
    wait()
    seconds = (time.perf_counter() - began) / settings["steps"]
    busy = (time.process_time() - busy) / settings["steps"]
    first = {"s of the first step, compiled in it": first_done - first_began}
    return step_figures(seconds, first_done, settings) | first | {"processor s/step": busy}


def step_figures(seconds: float, first_done: float, settings: dict) -> dict:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "tokens/s": settings["batch_size"] * settings["block_size"] / seconds,
        "s/step": seconds,
        "s to the first step": first_done - settings["began"],
        "GB of the host": peak / 1e9,
    }


# ---------------------------------------------------------------- ours


def build(settings: dict):
    """(state, compiled step, batches on the device) of the step that train.py runs."""
    if __name__ == "__main__":  # as train.py does
        leave_out_torch()
        set_defaults()
    import jax

    from gpt2_flax.config.train_config import TrainConfig
    from gpt2_flax.data import batches
    from gpt2_flax.distributed import memory, parallel
    from gpt2_flax.training import setup

    memory.trim_after_compiling()
    devices, n_rows = jax.local_device_count(), settings["batch_size"]
    if n_rows % devices:
        raise UserError(f"batch_size {n_rows} does not divide over {devices} devices")
    config = TrainConfig(
        batch_size=n_rows // devices,
        block_size=settings["block_size"],
        dropout=settings["dropout"],
        dtype=settings["dtype"],
        learning_rate=LEARNING_RATE,
        lr_schedule="constant",
        warmup_steps=0,
        seed=settings["seed"],
        parallel=settings.get("parallel", "pmap"),
    )
    module = setup.make_module(config, model_config(settings))
    optimizer, update = setup.trial(config, module)
    state = setup.new_state(jax.random.key(config.seed), module, optimizer, config.parallel)

    def ready(ids):
        batch = batches.make_batch(ids, np.ones(n_rows, bool), slice(None), n_rows)
        return parallel.put_batch(batch, 1, config.parallel)

    return state, update, parallel.prefetch(random_rows(settings, more=1), ready)


def ours(settings: dict) -> dict:
    import jax

    from gpt2_flax.distributed import compilation_cache
    from gpt2_flax.reporting import metrics

    compilation_cache.use(settings["compilation_cache"])
    state, update, rows = build(settings)
    values: dict = {}

    def step():
        nonlocal state, values
        before = values
        state, values = update(state, next(rows))
        jax.block_until_ready(before)  # as in training

    with contextlib.closing(rows):
        found = timed(step, lambda: jax.block_until_ready((state, values)), settings)
    if not np.isfinite(values["loss_sum"]):
        raise RuntimeError("the loss is not finite")
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        found["GB of the device"] = stats["peak_bytes_in_use"] / 1e9
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    found["peak FLOP/s"] = [jax.device_count(), peak]
    return found


def checkpoint(settings: dict) -> dict:
    """What saves cost the steps beside them: how much longer than usual those take, together.

    The first by itself, and three from the third on: by then what an older one took of the
    system's memory for files is free again.
    """
    import jax

    from gpt2_flax.training import checkpoint as checkpoints
    from gpt2_flax.training import step

    state, update, rows = build(settings)
    is_finite = jax.jit(step.all_finite)

    def steps(count) -> list[float]:
        nonlocal state
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(update(state, next(rows)))
            seconds.append(time.perf_counter() - began)
        return seconds

    def when_written() -> float:
        saver.wait()
        return time.perf_counter()

    def save(n) -> tuple[float, float, float]:
        """Seconds: that the call takes, until the save is on disk, that all steps lose by it."""
        began = time.perf_counter()
        if not is_finite(state):  # as in training
            raise RuntimeError("the state is not finite")
        saver.save(n, state._asdict(), {}, None)
        blocked = time.perf_counter() - began
        written = thread.submit(when_written)
        lost = sum(steps(settings["steps"])) - settings["steps"] * usual
        return blocked, written.result() - began, blocked + lost

    with (
        tempfile.TemporaryDirectory(prefix="benchmark", dir=settings["folder"] or None) as folder,
        contextlib.closing(rows),
        concurrent.futures.ThreadPoolExecutor(1) as thread,
    ):
        saver = checkpoints.Checkpoints(folder, 1, lambda meta: None)
        steps(1 + settings["warm_up"])
        is_finite(state)
        usual = statistics.median(steps(settings["steps"]))
        first, _, *others = [save(n) for n in range(1, 6)]
        later = [statistics.median(column) for column in zip(*others, strict=True)]
        saver.close()
    return {
        "s/step": usual,
        "s the first save holds up the loop": first[0],
        "s until it is on disk": first[1],
        "s it costs altogether": first[2],
        "s a later save holds up the loop": later[0],
        "s until that is on disk": later[1],
        "s that costs altogether": later[2],
    }


# ---------------------------------------------------------------- peers


def torch_model(settings: dict):
    """(model, device, context of the forward pass) of PyTorch, on a GPU if it sees one."""
    import torch
    import transformers

    config = model_config(settings)
    config._attn_implementation = "sdpa"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(settings["seed"])
    model = transformers.GPT2LMHeadModel(config).train().to(device)
    casts = contextlib.nullcontext
    if settings["dtype"] == "bfloat16":
        casts = lambda: torch.autocast(device, dtype=torch.bfloat16)  # noqa: E731
    return model, device, casts


def torch_step(settings: dict, compiles: bool) -> dict:
    import torch

    model, device, casts = torch_model(settings)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    run = torch.compile(model) if compiles else model
    rows = random_rows(settings, more=0)

    def step():
        ids = torch.tensor(next(rows), dtype=torch.long).to(device, non_blocking=True)
        with casts():
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return with_torchs_peak(timed(step, wait, settings))


def with_torchs_peak(found: dict) -> dict:
    import torch

    if torch.cuda.is_available():
        found["GB of the device"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def torch_trainer(settings: dict) -> dict:
    """Hugging Face's Trainer with the same rows, optimizer and clipping."""
    import torch
    import transformers

    model, device, _ = torch_model(settings)
    n_steps = 1 + settings["warm_up"] + settings["steps"]
    rows = random_rows(settings, more=0)
    ids = torch.tensor(np.concatenate([next(rows) for _ in range(n_steps)]), dtype=torch.long)
    done, busy = [], []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if device == "cuda" and len(done) in (0, settings["warm_up"], n_steps - 1):
                torch.cuda.synchronize()
            done.append(time.time())
            busy.append(time.process_time())

    with tempfile.TemporaryDirectory(prefix="benchmark") as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=n_steps, per_device_train_batch_size=settings["batch_size"],
            learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adam_beta2=BETAS[1],
            max_grad_norm=GRAD_CLIP, lr_scheduler_type="constant", optim="adamw_torch_fused",
            bf16=settings["dtype"] == "bfloat16", report_to="none", save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=device == "cpu",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    first, last = settings["warm_up"], n_steps - 1
    seconds = (done[last] - done[first]) / settings["steps"]
    figures = step_figures(seconds, done[0], settings)
    figures["processor s/step"] = (busy[last] - busy[first]) / settings["steps"]
    return with_torchs_peak(figures)


# ---------------------------------------------------------------- decoding


def decode_ours(settings: dict) -> dict:
    if __name__ == "__main__":  # as generate.py does
        leave_out_torch()
    from gpt2_flax import FlaxGPT2LMHeadModel

    config = model_config(settings)
    model = FlaxGPT2LMHeadModel(config, seed=settings["seed"])
    ids = next(random_rows(settings, more=0))

    def run():  # -1: no id ends the text early
        out = model.generate(
            ids, max_new_tokens=settings["new_tokens"], eos_token_id=-1, pad_token_id=0
        )
        return np.asarray(out.sequences)

    return decoded(run, settings)


def decode_torch(settings: dict) -> dict:
    import torch

    model, device, _ = torch_model(settings)
    model.eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(next(random_rows(settings, more=0)), dtype=torch.long, device=device)
    mask = torch.ones_like(ids)

    def run():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=settings["new_tokens"], do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return out.cpu().numpy()

    return decoded(run, settings)


def decoded(run, settings: dict) -> dict:
    """Figures of a function that decodes: of its first call, and of the median of some more."""
    seconds = []
    for _ in range(1 + settings["repeats"]):
        began = time.perf_counter()
        shape = run().shape
        seconds.append(time.perf_counter() - began)
    n_new = settings["batch_size"] * settings["new_tokens"]
    if shape != (settings["batch_size"], settings["block_size"] + settings["new_tokens"]):
        raise RuntimeError(f"decoding ended early: {shape}")
    usual = statistics.median(seconds[1:])
    return {"tokens/s": n_new / usual, "s/call": usual, "s of the first call": seconds[0]}


CELLS = {
    "ours": ours,
    "jit": lambda settings: ours(settings | {"parallel": "jit"}),
    "fsdp": lambda settings: ours(settings | {"parallel": "fsdp"}),
    "torch": lambda settings: torch_step(settings, compiles=False),
    "torch_compile": lambda settings: torch_step(settings, compiles=True),
    "torch_trainer": torch_trainer,
    "checkpoint": checkpoint,
    "decode ours": decode_ours,
    "decode torch": decode_torch,
}

if __name__ == "__main__":
    from gpt2_flax.evaluation.benchmark import run_cell

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run_cell(CELLS))
