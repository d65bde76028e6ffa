"""The proof that this is GPT-2: the same training by this project and by PyTorch.

Both models begin with the same weights and see the same batches. Ours is trained by the program
of scripts/train.py. PyTorch's is transformers' GPT2LMHeadModel with eager attention and
torch.optim.AdamW, its clipping torch's, its schedule written down here once more. It is the one
module that needs PyTorch, and imports it when it runs.
"""

import functools
import json
import math
import os
import pathlib
import tempfile

import jax
import numpy as np
import transformers

from gpt2_flax.command_names import prog
from gpt2_flax.config.train_config import EMBEDDED_DATASET, TrainConfig, find_faults
from gpt2_flax.data import pipeline
from gpt2_flax.distributed import parallel
from gpt2_flax.errors import NumericsError, UserError, say
from gpt2_flax.pretrained.modeling import FlaxGPT2LMHeadModel
from gpt2_flax.reporting.metrics import storage_errors
from gpt2_flax.training import optim, step

LARGEST_GAP = 1e-3  # nats; what float32 leaves between two orders of the same sums
WARMUP_STEPS = 20
BETAS, EPSILON, WEIGHT_DECAY, GRAD_CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
FINAL_SHARE = 0.1  # of the peak learning rate, where the cosine ends


def run(settings: dict) -> dict:
    """Train both, write parity.json and parity.png into `output_dir`, and return the figures.

    settings: those of scripts/parity.py. Raises UserError for bad ones and without PyTorch,
    NumericsError where the largest gap of the losses is above LARGEST_GAP.
    """
    torch = import_torch()
    config = check(settings)
    output_dir = pathlib.Path(settings["output_dir"])
    with storage_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
    n_rows = settings["batch_size"] * jax.local_device_count()
    vocab_size, batches = read_batches(config, n_rows, settings["steps"])
    model = FlaxGPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=settings["n_layers"], n_head=settings["n_heads"], n_embd=settings["n_embd"],
            n_positions=settings["block_size"], vocab_size=vocab_size,
            bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        seed=settings["seed"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        oracle = open_oracle(folder)
    say(f"{settings['steps']} steps of {n_rows} x {settings['block_size']} tokens by JAX")
    ours = train_ours(model, batches, settings)
    say(f"loss {ours[-1]:.4f}; the same steps by PyTorch")
    theirs = train_theirs(torch, oracle, batches, settings)

    gaps = np.abs(np.array(ours) - theirs)
    result = {
        "settings": settings | {"rows": n_rows, "vocab_size": vocab_size},
        "jax": jax.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__,
        "largest_gap": float(gaps.max()), "step_of_largest_gap": int(gaps.argmax()) + 1,
        "mean_gap": float(gaps.mean()), "allowed_gap": LARGEST_GAP,
        "first_loss": ours[0], "last_loss": ours[-1], "last_loss_torch": theirs[-1],
        "losses": ours, "losses_torch": theirs,
    }  # fmt: skip
    with storage_errors(output_dir):
        (output_dir / "parity.json").write_text(
            json.dumps(finite_or_none(result), indent=1), "utf-8"
        )
        plot(ours, theirs, output_dir / "parity.png")
    if not result["largest_gap"] <= LARGEST_GAP:
        raise NumericsError(
            f"the losses differ by up to {result['largest_gap']:.2g} nats, at step"
            f" {result['step_of_largest_gap']}; {LARGEST_GAP:g} is allowed\n"
            f"  {output_dir / 'parity.png'} shows where they part"
        )
    return result


def import_torch():
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{prog('parity')} compares with PyTorch, which is not installed\n"
            "  pip install torch, or pip install -r requirements-dev.txt"
        ) from error
    return torch


def check(settings: dict) -> TrainConfig:
    """The settings as those of a run. Raises UserError that lists what is wrong with them."""
    files = tuple(settings["train_file"])
    sizes = ("n_layers", "n_heads", "n_embd", "block_size", "batch_size", "learning_rate", "seed",
             "tokenizer")  # fmt: skip
    config = TrainConfig(
        **({"train_file": files} if files else {"dataset": EMBEDDED_DATASET}),
        **{name: settings[name] for name in sizes},
        n_positions=settings["block_size"], sample_tokens=0, validation_share=0.0,
    )  # fmt: skip
    faults = find_faults(config, set(), {"n_positions"})
    if settings["steps"] < 1:
        faults.append(f"steps must be at least 1, got {settings['steps']}")
    if faults:
        raise UserError("\nerror: ".join(faults))
    return config


# ---------------------------------------------------------------- the same beginning


def read_batches(config: TrainConfig, n_rows: int, n_steps: int):
    """(size of the vocabulary, the batches of all steps) in the order that training has."""
    source, _ = pipeline.open_text(config)
    tokenizer = pipeline.open_tokenizer(config, pathlib.Path(config.output_dir), source, False)
    rows, _, _ = pipeline.open_rows(config, tokenizer, source, None)
    steps = rows.batches(rows.start, n_rows, math.inf, slice(0, n_rows))
    return tokenizer.vocab_size, [next(steps).batch for _ in range(n_steps)]


def open_oracle(folder: str):
    """PyTorch's model of the weights in a directory, in training mode (it has no dropout)."""
    transformers.utils.logging.disable_progress_bar()
    oracle = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    return oracle.train()


# ---------------------------------------------------------------- two trainings


def train_ours(model, batches: list, settings: dict) -> list[float]:
    """The loss of each step, by the step function, optimizer and pmap of training."""
    peak, steps = settings["learning_rate"], settings["steps"]
    schedule = optim.make_schedule(
        "cosine", peak, FINAL_SHARE * peak, min(WARMUP_STEPS, steps), steps
    )
    optimizer = optim.make_optimizer("adamw", schedule, WEIGHT_DECAY, *BETAS, EPSILON, GRAD_CLIP)
    update = parallel.compile_train_step(
        functools.partial(
            step.train_step, model=model.module, optimizer=optimizer, seed=settings["seed"]
        ),
        "pmap",
    )
    make = functools.partial(step.state_from_params, optimizer=optimizer)
    state = parallel.replicate(make, model.params)
    losses = []
    # Some devices multiply float32 with fewer bits unless they are asked not to.
    with jax.default_matmul_precision("highest"):
        for batch in batches:
            state, values = update(state, parallel.put_batch(batch, 1))
            losses.append(values["loss_sum"] / values["tokens"])
    return [float(loss) for loss in jax.device_get(losses)]


def learning_rate(n: int, peak: float, steps: int) -> float:
    """Of update n, from 0 on: a line up to the peak, then a cosine down to its last share."""
    warmup = min(WARMUP_STEPS, steps)
    if n < warmup:
        return peak * (n + 1) / warmup
    share = min(1.0, (n - warmup) / max(1, steps - warmup))
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * share)) / 2)


def train_theirs(torch, oracle, batches: list, settings: dict) -> list[float]:
    """The loss of each step, by PyTorch on the CPU."""
    matrices = [p for p in oracle.parameters() if p.ndim >= 2]
    others = [p for p in oracle.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others}],
        lr=settings["learning_rate"], betas=BETAS, eps=EPSILON, weight_decay=0.0,
    )  # fmt: skip
    losses = []
    for n, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(n, settings["learning_rate"], settings["steps"])
        ids = torch.from_numpy(batch.ids_BxS.astype(np.int64))
        logits = oracle(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), GRAD_CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
        if (n + 1) % 50 == 0:
            say(f"PyTorch: step {n + 1}, loss {losses[-1]:.4f}")
    return losses


# ---------------------------------------------------------------- the plot


def plot(ours: list[float], theirs: list[float], path: pathlib.Path) -> None:
    """Both curves, and below them their gap beside the one that is allowed."""
    from matplotlib.figure import Figure

    steps = np.arange(1, len(ours) + 1)
    gaps = np.abs(np.array(ours) - theirs)
    figure = Figure(figsize=(8, 6), layout="constrained")
    curves, distance = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    curves.plot(steps, theirs, color="#e45756", lw=4, alpha=0.45, label="PyTorch")
    curves.plot(steps, ours, color="#4c78a8", lw=1.2, label="gpt2_flax")
    curves.set_ylabel("training loss, nats per token")
    curves.set_title("The same weights, batches and settings")
    curves.legend()
    # Equal losses have no logarithm: they stand at the bottom.
    distance.plot(steps, np.maximum(gaps, 1e-8), color="#54a24b", lw=1, label="gap")
    distance.axhline(LARGEST_GAP, color="#555555", ls="--", lw=1, label=f"{LARGEST_GAP:g} allowed")
    distance.set_yscale("log")
    distance.set_ylim(5e-9, 1e-2 if gaps.max() < 5e-3 else None)
    distance.set_ylabel("gap, nats")
    distance.set_xlabel(f"step (largest gap {gaps.max():.2g})")
    distance.legend(loc="center right")
    for axes in (curves, distance):
        axes.grid(alpha=0.3)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)


def finite_or_none(value):
    """A result as JSON can hold it, which has no infinity and no NaN."""
    if isinstance(value, dict):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
