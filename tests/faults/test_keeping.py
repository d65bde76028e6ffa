"""The newest checkpoints and the best one survive, whatever the validation losses are."""

import math
import random

import jax.numpy as jnp
import pytest
from orbax.checkpoint import checkpoint_managers

from gpt2_flax import checkpoint, train
from gpt2_flax.config import load_config

LOSSES = [1.0, 1.0, 2.0, 0.5, 3.25, -1.0, math.nan, math.inf, -math.inf, None]


def newest_of(losses: dict, keep: int) -> set[int]:
    return set(sorted(losses)[-keep:])


def best_of(losses: dict) -> set[int]:
    """Of the finite losses the lowest; of several such, any."""
    finite = {n: x for n, x in losses.items() if x is not None and math.isfinite(x)}
    return {n for n, x in finite.items() if x == min(finite.values())}


class Info:
    """What Orbax's policies see of a checkpoint."""

    def __init__(self, step, metrics):
        self.step, self.metrics = step, metrics


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_a_thousand_sequences(keep):
    """By the policy that checkpoints are made with; resumes lose the steps after one of them."""
    rng = random.Random(keep)
    policy = checkpoint.preservation_policy(keep, checkpoint.Best())
    context = checkpoint_managers.PreservationContext()
    for _ in range(1000):
        there, step = {}, 0
        for _ in range(rng.randint(1, 30)):
            step += rng.randint(1, 3)
            there[step] = rng.choice(LOSSES)
            infos = [Info(n, checkpoint.as_metrics(x)) for n, x in sorted(there.items())]
            kept = policy.should_preserve(infos, context=context)
            kept = {info.step for info, stays in zip(infos, kept, strict=True) if stays}
            newest, best = newest_of(there, keep), best_of(there)
            assert newest <= kept
            assert len(kept - newest) <= 1 and kept - newest <= best
            assert not best or kept & best
            there = {n: there[n] for n in kept}
            if rng.random() < 0.1:  # a resume from an older one: the newer is lost or damaged
                there.pop(max(there))
                step = max(there, default=0)


def test_real_checkpoints_are_kept_so(tmp_path, thorough):
    rng = random.Random(0)
    for n in range(20 if thorough else 2):
        there = {}
        store = checkpoint.Checkpoints(tmp_path / str(n), 2)
        for step in range(1, 13):
            there[step] = rng.choice(LOSSES)
            store.save(step, {"x": jnp.float32(step)}, {}, there[step])
            store.wait()
            best = best_of(there) & {*store.steps()}
            assert {*store.steps()} >= newest_of(there, 2)
            assert len(store.steps()) <= 3 and (best or not best_of(there))
            there = {step: there[step] for step in store.steps()}
            if rng.random() < 0.3:
                store.close()
                store = checkpoint.Checkpoints(tmp_path / str(n), 2)
        store.close()


@pytest.mark.slow
def test_the_best_is_kept_also_where_no_save_was_due(tmp_path, monkeypatch):
    """Saves are due at each third step, evaluations at each second."""
    text = tmp_path / "text.txt"
    text.write_text("tea milk sugar lemon honey " * 200)
    losses = iter([5.0, 4.0, 3.0, 6.0, 2.0, 7.0, math.nan, 3.5])  # 2, 4, 6, 8, 10, 12, ...
    monkeypatch.setattr(train, "held_out_loss", lambda *arguments: (next(losses), 99))
    argv = ["--n_layers", "1", "--n_heads", "2", "--n_embd", "8", "--n_positions", "16",
            "--block_size", "16", "--batch_size", "1", "--tokenizer", "bytes",
            "--sample_tokens", "0", "--train_file", str(text), "--keep", "1",
            "--eval_every", "2", "--save_every", "4"]  # fmt: skip

    def run(n_steps):
        argv_of = [*argv, "--max_steps", str(n_steps), "--output_dir", str(tmp_path / "run")]
        assert train.train(load_config(argv_of)) == 0
        folder = tmp_path / "run" / "checkpoints"
        return {int(path.name) for path in folder.iterdir()}

    assert run(12) == {10, 12}
    assert run(16) == {10, 16}  # also after a resume: 3.5 is not the best
