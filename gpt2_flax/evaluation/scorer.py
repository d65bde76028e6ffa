"""How well a model predicts a text.

Shapes: B rows scored at a time, S = T + 1 ids of a row, T targets of a row.
"""

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SHORTEST_ROW = 16  # targets; shorter rows are padded to it, so that few lengths are compiled


def mean_loss(eval_step: Callable, params, batches: Iterable) -> tuple[float, int]:
    """(mean cross-entropy in nats over every target, number of targets).

    eval_step: (params, batch) -> (loss sum, targets). The mean is weighted by targets, so it
    does not depend on how rows were grouped; sums of batches are added up in float64.
    """
    sums = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        jax.block_until_ready(sums[-2:-1])  # or `batches` would not notice a stop for long
    total = math.fsum(float(loss) for loss, _ in sums)
    targets = sum(int(count) for _, count in sums)
    return total / targets, targets


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


# ---------------------------------------------------------------- ids -> scores


class Scores(NamedTuple):
    """What a model thinks of the targets of a row, its ids but the first.

    nll_T: float32, nats. is_greedy_T: whether the target was the likeliest id.
    """

    nll_T: np.ndarray
    is_greedy_T: np.ndarray

    def last(self, n: int) -> "Scores":
        """Those of the last n targets."""
        first = len(self.nll_T) - n
        return Scores(self.nll_T[first:], self.is_greedy_T[first:])

    def nll(self) -> float:
        """Their sum, added up in float64: the same however rows were grouped."""
        return float(self.nll_T.sum(dtype=np.float64))


class Scorer:
    """Scores rows of ids, some on each device at a time. Compiles once a length of row."""

    def __init__(self, model, params, batch_size: int, devices=None):
        """model: a FlaxGPT2LMHeadModel. params: its own, which become float32.

        batch_size: rows on each device. devices: all of this process where None.
        """
        devices = devices or jax.local_devices()
        mesh = Mesh(devices, ("batch",))
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec("batch"))
        self.n_rows = batch_size * len(devices)
        self.n_positions = model.config.n_positions
        self.params = jax.device_put(model.to_fp32(params), self.whole)
        self.program = jax.jit(
            functools.partial(score_targets, model.module), out_shardings=self.split
        )

    def score(self, rows: Iterable[np.ndarray], length: int) -> Iterator[Scores]:
        """The scores of each row in order; a row has 2 to length + 1 ids.

        Two batches are under way at a time.
        """
        rows, under_way = iter(rows), deque()
        while group := list(itertools.islice(rows, self.n_rows)):
            ids_BxS = np.zeros((self.n_rows, length + 1), np.int32)
            for n, row in enumerate(group):
                ids_BxS[n, : len(row)] = row
            found = self.program(self.params, jax.device_put(ids_BxS, self.split))
            under_way.append((group, found))
            if len(under_way) == 2:
                yield from scores_of(*under_way.popleft())
        while under_way:
            yield from scores_of(*under_way.popleft())

    def score_any(self, rows: list[np.ndarray]) -> list[Scores]:
        """The scores of rows of any lengths up to n_positions + 1 ids, in order.

        Rows of similar lengths share a program: padding takes less than half of one.
        """
        found: list = [None] * len(rows)
        by_length = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        groups = itertools.groupby(by_length, key=lambda n: self.padded(len(rows[n]) - 1))
        for length, numbers in groups:
            numbers = list(numbers)
            scores = self.score((rows[n] for n in numbers), length)
            for n, of_row in zip(numbers, scores, strict=True):
                found[n] = of_row
        return found

    def padded(self, n_targets: int) -> int:
        """The length that a row of so many targets is padded to: a power of two, mostly."""
        return min(self.n_positions, max(SHORTEST_ROW, 1 << (n_targets - 1).bit_length()))


def score_targets(module, params, ids_BxS):
    """(nll_BxT, is_greedy_BxT) of the targets of rows. What pads a row comes behind its ids."""
    targets_BxT = ids_BxS[:, 1:]
    logits = module.apply({"params": params}, ids_BxS[:, :-1], deterministic=True).logits
    logits = logits.astype(jnp.float32)
    nll_BxT = optax.softmax_cross_entropy_with_integer_labels(logits, targets_BxT)
    return nll_BxT, logits.argmax(-1) == targets_BxT


def scores_of(group: list[np.ndarray], found) -> Iterator[Scores]:
    nll_BxT, is_greedy_BxT = jax.device_get(found)
    for n, row in enumerate(group):
        n_targets = len(row) - 1
        yield Scores(nll_BxT[n, :n_targets], is_greedy_BxT[n, :n_targets])


# ---------------------------------------------------------------- perplexity of a text


class Window(NamedTuple):
    """A row [begin, end) of a text's ids; targets from `first` on are counted."""

    begin: int
    first: int
    end: int


def windows(n_ids: int, context: int, stride: int) -> Iterator[Window]:
    """Rows of up to context + 1 ids, begun `stride` apart, that count every id but the first
    exactly once.

    Behind the first window an id is predicted from context - stride + 1 ids or more.
    """
    begin, first = 0, 1
    while first < n_ids:
        end = min(begin + context + 1, n_ids)
        yield Window(begin, first, end)
        begin, first = begin + stride, end


def score_text(scorer: Scorer, ids: np.ndarray, context: int, stride: int) -> tuple[float, int]:
    """(summed cross-entropy in nats, targets) of a text. stride: at most context."""
    assert 1 <= stride <= context <= scorer.n_positions
    assert len(ids) >= 2
    rows, counted = itertools.tee(windows(len(ids), context, stride))
    scores = scorer.score(
        (ids[window.begin : window.end] for window in rows), min(context, len(ids) - 1)
    )
    sums = [
        of_row.last(window.end - window.first).nll()
        for window, of_row in zip(counted, scores, strict=True)
    ]
    return math.fsum(sums), len(ids) - 1
