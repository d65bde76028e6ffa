"""Ids -> rows -> batches, in an order that a few integers can continue.

Shapes: B rows of a batch, S = T + 1 ids in a row, T targets in a row.
Row i of a text holds its ids [i*T, i*T + T]: a row's last id is the next row's first, so that
every id but the very first is a target exactly once.
"""

import contextlib
import hashlib
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gpt2_flax.data.sources import blank_error
from gpt2_flax.data.token_files import Bar, Encoded, encode
from gpt2_flax.errors import UserError


class Batch(NamedTuple):
    """Rows of one step. Arrays may carry more axes in front of B."""

    ids_BxS: np.ndarray  # int32
    slot_B: np.ndarray  # int32, the row's place in the global batch: dropout's row id
    length_B: np.ndarray  # int32, targets that count: T, less in a text's last row, 0 in padding


class Taken(NamedTuple):
    """What a step takes from the text: this process's rows, and where to go on behind them.

    rows: int64 (n, 2), epoch and row number of all processes' rows, without padding.
    """

    batch: Batch
    rows: np.ndarray
    cursor: dict


# ---------------------------------------------------------------- ids -> rows in order


class StoredRows:
    """Rows of ids that lie in memory or in a file, visited in a keyed random order.

    Position p of a run is row order(p % count) of epoch p // count; the cursor is p.
    """

    def __init__(self, ids, block_size: int, seed: int, shuffle: bool):
        """ids: has a length, read(start, count) and a fingerprint, as token_files.Ids."""
        self.ids, self.fingerprint = ids, ids.fingerprint
        self.block_size, self.seed, self.shuffle = block_size, seed, shuffle
        self.count = max(0, (len(ids) - 1) // block_size)
        self.remainder = len(ids) - 1 - self.count * block_size
        self.start = {"rows": 0}

    def rows_at(self, position: np.ndarray) -> np.ndarray:
        """Epochs and row numbers at positions of the run. int64 (N,) -> int64 (N, 2)."""
        epoch, index = np.divmod(position, self.count)
        rows = index.copy()
        if self.shuffle:
            for number in np.unique(epoch):
                chosen = epoch == number
                rows[chosen] = permute(index[chosen], self.count, (self.seed, int(number)))
        return np.stack([epoch, rows], axis=1)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """int32 (N, S): the ids of rows."""
        T = self.block_size
        ids_NxS = np.empty((len(rows), T + 1), np.int32)
        for n, row in enumerate(rows.tolist()):
            ids_NxS[n] = self.ids.read(row * T, T + 1)
        return ids_NxS

    def batches(self, cursor: dict, size: int, limit: float, slots: slice) -> Iterator[Taken]:
        """What each step of `size` rows takes, for the given slots of it, until `limit` rows."""
        first = cursor["rows"]
        while first < limit:
            position = first + np.arange(size)
            real = position < limit
            rows = self.rows_at(np.where(real, position, first))
            ids = self.read(rows[slots, 1])
            first += int(real.sum())
            yield Taken(make_batch(ids, real[slots], slots, size), rows[real], {"rows": first})


class StreamedRows:
    """Rows encoded as they are needed, shuffled within windows.

    The cursor names the window's first id by a position of the source and a number of ids to
    skip there, and how many of the window's rows were used: a resumed run reads that window
    again and goes on inside it.
    """

    def __init__(self, source, tokenizer, add_eos, block_size, seed, shuffle, window):
        self.source, self.tokenizer, self.add_eos = source, tokenizer, add_eos
        self.block_size, self.seed = block_size, seed
        self.shuffle, self.window = shuffle, window
        self.fingerprint = source.fingerprint
        self.count = self.remainder = None  # unknown until measured
        self.found = Counter()  # of an epoch, what the source and the cuts met in it
        self.start = {"rows": 0, "epoch": 0, "window": 0, "at": 0, "skip": 0, "used": 0}

    def encode(self, start: int = 0) -> Iterator[Encoded]:
        return encode(self.source, self.tokenizer, self.add_eos, start)

    def measure(self) -> dict:
        """Set `count` and `remainder` by encoding the whole text once.

        Returns what token_files.token_file knows of a text.
        """
        count = n_documents = n_bytes = 0
        blank, begins = True, True
        with contextlib.closing(Bar(f"counting tokens of {self.source.name}")) as bar:
            for encoded in self.encode():
                count += len(encoded.ids)
                n_bytes += len(encoded.text.encode())
                n_documents += begins and bool(len(encoded.ids))
                begins = encoded.ends_document
                blank = blank and (not encoded.text or encoded.text.isspace())
                bar.show(encoded.done, n_bytes, count)
        if count and blank:
            raise blank_error(self.source)
        self.set_count(count)
        return {
            "count": count,
            "documents": n_documents,
            "text_bytes": n_bytes,
            "found": dict(self.source.found),
        }

    def require_one(self) -> None:
        """Raise UserError for a text that has not one row; reads no further than that."""
        n_ids = 0
        for encoded in self.encode():
            n_ids += len(encoded.ids)
            if n_ids > self.block_size:
                self.source.found.clear()  # it is counted where it is trained on
                return
        self.set_count(n_ids)
        check_length(self, self.source.name)

    def set_count(self, n_ids: int) -> None:
        self.count = max(0, (n_ids - 1) // self.block_size)
        self.remainder = n_ids - 1 - self.count * self.block_size

    def windows(self, cursor: dict) -> Iterator[tuple[np.ndarray, np.ndarray, dict]]:
        """Windows for ever: (rows, their numbers, the cursor at the window's beginning)."""
        T, wanted = self.block_size, self.window * self.block_size + 1
        epoch, number, at, skip = (cursor[name] for name in ("epoch", "window", "at", "skip"))
        while True:
            marks = deque()  # (index in this stream of a piece's first id, its start)
            held, n_held, begin, n_read = [], 0, skip, 0
            for ids, start, *_ in self.encode(at):
                if not marks or marks[-1][1] != start:
                    marks.append((n_read, start))
                held.append(ids[max(0, begin - n_read) :])
                n_held += len(held[-1])
                n_read += len(ids)
                while n_held >= wanted:
                    flat = np.concatenate(held)
                    behind = here(marks, begin, epoch, number)
                    yield *self.shuffled(flat[:wanted], epoch, number), behind
                    held, n_held = [flat[wanted - 1 :]], n_held - wanted + 1
                    begin, number = begin + wanted - 1, number + 1
            if n_held > T:
                flat = np.concatenate(held)
                flat = flat[: (n_held - 1) // T * T + 1]
                yield *self.shuffled(flat, epoch, number), here(marks, begin, epoch, number)
            elif number == 0:  # it was the first window: the whole text is less than a row
                self.set_count(n_read)
                check_length(self, self.source.name)
            self.note_found()
            epoch, number, at, skip = epoch + 1, 0, 0, 0

    def note_found(self) -> None:
        """Take over what was met since the epoch began."""
        cuts, found = self.tokenizer.cuts, self.source.found
        self.found |= found + Counter(forced_cuts=cuts.forced)
        found.clear()
        cuts.forced = 0

    def shuffled(self, ids: np.ndarray, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of a window's ids in their order, their epochs and numbers (N, 2))."""
        T = self.block_size
        rows = np.lib.stride_tricks.sliding_window_view(ids, T + 1)[::T]
        order = np.arange(len(rows))
        if self.shuffle:
            order = permute(order, len(rows), (self.seed, epoch, number))
        names = np.stack([np.full_like(order, epoch), number * self.window + order], axis=1)
        return rows[order], names

    def batches(self, cursor: dict, size: int, limit: float, slots: slice) -> Iterator[Taken]:
        """What each step of `size` rows takes, for the given slots of it, until `limit` rows."""
        total, used = cursor["rows"], cursor["used"]
        waiting = np.empty((0, self.block_size + 1), np.int32)
        waiting_names = np.empty((0, 2), np.int64)
        windows = self.windows(cursor)
        behind = cursor
        while total < limit:
            n_taken = int(min(size, limit - total))
            while len(waiting) < n_taken:
                rows, names, behind = next(windows)
                waiting = np.concatenate([waiting, rows[used:]])
                waiting_names = np.concatenate([waiting_names, names[used:]])
                n_rows, used = len(rows), 0
            place = np.arange(size)
            real = place < n_taken
            ids = waiting[np.where(real, place, 0)[slots]].astype(np.int32)
            taken, waiting = waiting_names[:n_taken], waiting[n_taken:]
            waiting_names = waiting_names[n_taken:]
            total += n_taken
            # A window used up to its end is read again on resume, for none of its rows: cheap,
            # and the cursor needs no second case. `used` counts from the newest window's first
            # row; rows waiting from an older one cannot be: `waiting` was shorter than a batch.
            yield Taken(
                make_batch(ids, real[slots], slots, size),
                taken,
                behind | {"rows": total, "used": n_rows - len(waiting)},
            )


def here(marks: deque, index: int, epoch: int, number: int) -> dict:
    """The cursor at id `index` of a stream; forgets the marks before it."""
    while len(marks) > 1 and marks[1][0] <= index:
        marks.popleft()
    first, start = marks[0]
    return {"epoch": epoch, "window": number, "at": start, "skip": index - first}


def make_batch(ids: np.ndarray, real: np.ndarray, slots: slice, size: int) -> Batch:
    length = np.where(real, ids.shape[1] - 1, 0).astype(np.int32)
    return Batch(ids, np.arange(size, dtype=np.int32)[slots], length)


def evaluation_batches(ids, block_size: int, size: int, n_rows: int, slots: slice):
    """Batches over a text in its own order, its last, shorter row included.

    ids: as those of StoredRows. n_rows: rows to take at most, 0 for all. Every target is
    counted exactly once.
    """
    T, n_targets = block_size, len(ids) - 1
    total = -(-n_targets // T)
    total = min(total, n_rows) if n_rows else total
    for first in range(0, total, size):
        rows = first + np.arange(size)[slots]
        length = np.where(rows < total, np.clip(n_targets - rows * T, 0, T), 0)
        ids_NxS = np.zeros((len(rows), T + 1), np.int32)
        for n, (row, count) in enumerate(zip(rows.tolist(), length.tolist(), strict=True)):
            if count:
                ids_NxS[n, : count + 1] = ids.read(row * T, count + 1)
        yield Batch(ids_NxS, rows.astype(np.int32), length.astype(np.int32))


def permute(index: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """A pseudo-random bijection of [0, n), evaluated at `index`, without a table.

    A Feistel network over the next power of two, walked until the result is below n (Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). int64 (N,) -> int64 (N,).
    """
    bits = max(4, int(n - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    high_bits = np.uint64(bits - bits // 2)
    digest = hashlib.blake2b(repr(tuple(key)).encode(), digest_size=64).digest()
    round_keys = np.frombuffer(digest, np.uint64)
    one = np.uint64(1)

    def shuffle(x):
        left, right, n_left, n_right = (
            x >> low_bits,
            x & ((one << low_bits) - one),
            high_bits,
            low_bits,
        )
        for round_key in round_keys:
            mixed = scramble(right ^ round_key)
            left, right = right, (left ^ mixed) & ((one << n_left) - one)
            n_left, n_right = n_right, n_left
        return (left << low_bits) | right

    result = shuffle(index.astype(np.uint64))
    while (outside := result >= n).any():
        result[outside] = shuffle(result[outside])
    return result.astype(np.int64)


def scramble(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the result depends on every bit of x."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def check_length(rows, name: str) -> None:
    """Raise UserError for a text that has not one row to train on."""
    if rows.count < 1:
        raise UserError(
            f"{name} has {rows.remainder + 1} tokens, fewer than one row of block_size"
            f" {rows.block_size} + 1\n  use more text, or a smaller --block_size"
        )
