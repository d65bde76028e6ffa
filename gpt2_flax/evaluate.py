"""How well a model predicts a text."""

import math
from collections.abc import Callable, Iterable


def mean_loss(eval_step: Callable, params, batches: Iterable) -> tuple[float, int]:
    """(mean cross-entropy in nats over every target, number of targets).

    eval_step: (params, batch) -> (loss sum, targets). The mean is weighted by targets, so it
    does not depend on how rows were grouped; sums of batches are added up in float64.
    """
    sums = [eval_step(params, batch) for batch in batches]
    total = math.fsum(float(loss) for loss, _ in sums)
    targets = sum(int(count) for _, count in sums)
    return total / targets, targets


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
