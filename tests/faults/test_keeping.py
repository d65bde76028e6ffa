"""The newest checkpoints and the best one survive, whatever the validation losses are."""

import math
import random

import jax.numpy as jnp
import pytest
from orbax.checkpoint import checkpoint_managers

from gpt2_flax.training import checkpoint, train

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
def test_the_best_is_kept_also_where_no_save_was_due(train_tiny, tmp_path, monkeypatch):
    """Saves are due at each fourth step, evaluations at each second."""
    losses = iter([5.0, 4.0, 3.0, 6.0, 2.0, 7.0, math.nan, 3.5])  # 2, 4, 6, 8, 10, 12, ...
    monkeypatch.setattr(train, "held_out_loss", lambda *arguments: (next(losses), 99))
    flags = ["--keep", "1", "--eval_every", "2", "--save_every", "4", "--max_steps"]

    def run(n_steps):
        assert train_tiny(tmp_path / "run", *flags, str(n_steps)) == 0
        return {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}

    assert run(12) == {10, 12}
    assert run(16) == {10, 16}  # also after a resume: 3.5 is not the best
