"""Ids -> rows -> batches, in an order that a few integers can continue.

Shapes: B rows of a batch, S = T + 1 ids in a row, T targets in a row.
Row i of a text holds its ids [i*T, i*T + T]: a row's last id is the next row's first, so that
every id but the very first is a target exactly once.
"""

import hashlib
import json
import os
import pathlib
import uuid
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gpt2_flax.errors import StorageError, UserError

CACHE_VERSION = 1
PIECES_AT_ONCE = 16  # encoded together, in parallel threads


class Batch(NamedTuple):
    """Rows of one step. Arrays may carry more axes in front of B."""

    ids_BxS: np.ndarray  # int32
    slot_B: np.ndarray  # int32, the row's place in the global batch: dropout's row id
    length_B: np.ndarray  # int32, targets that count: T, less in a text's last row, 0 in padding


# ---------------------------------------------------------------- text -> ids


def encode(source, tokenizer, add_eos: bool, start: int = 0) -> Iterator[tuple[np.ndarray, int]]:
    """(ids of a piece, the piece's start) through a source from a position on."""
    eos = np.array([tokenizer.eos_id], np.int32)
    pieces = source.pieces(start)
    while group := [piece for _, piece in zip(range(PIECES_AT_ONCE), pieces, strict=False)]:
        encoded = tokenizer.encode_batch([piece.text for piece in group])
        for piece, ids in zip(group, encoded, strict=True):
            if piece.ends_document and add_eos:
                ids = np.concatenate([ids, eos])
            yield ids, piece.start


class TokenFile(NamedTuple):
    """All ids of a text, on disk. fingerprint: a digest of the ids."""

    ids: np.ndarray
    fingerprint: str


def token_file(source, tokenizer, add_eos: bool, folder: pathlib.Path) -> TokenFile:
    """The ids of a source, encoded now or found in `folder` from an earlier time.

    Raises UserError for text that cannot be read, StorageError where ids cannot be written.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    key = repr((CACHE_VERSION, source.key, tokenizer.fingerprint, add_eos, dtype.str))
    path = folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.tokens"
    about = read_description(path)
    if about is None:
        try:
            about = write_tokens(path, source, tokenizer, add_eos, dtype)
        except OSError as error:
            raise StorageError(
                f"cannot write the token file {path}: {error.strerror}\n"
                "  choose another place with --cache_dir, or make room there"
            ) from error
    ids = np.memmap(path, dtype, "r") if about["count"] else np.zeros(0, dtype)
    return TokenFile(ids, about["fingerprint"])


def read_description(path: pathlib.Path) -> dict | None:
    """What was written beside a token file; None where either is missing or incomplete."""
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        complete = path.stat().st_size == about["count"] * about["bytes_per_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return about if complete else None


def write_tokens(path, source, tokenizer, add_eos, dtype) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's number: hosts that share the folder may have the same.
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    count, hasher = 0, hashlib.blake2b(digest_size=16)
    bar = tqdm(
        total=source.size, desc="tokenizing", disable=None, leave=False, unit_scale=True, unit=""
    )
    try:
        with bar, open(temporary, "wb") as file:
            for ids, start in encode(source, tokenizer, add_eos):
                data = ids.astype(dtype).tobytes()
                file.write(data)
                hasher.update(data)
                count += len(ids)
                bar.update(start - bar.n)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        about = {
            "count": count,
            "bytes_per_id": dtype.itemsize,
            "fingerprint": hasher.hexdigest(),
            "text": source.name,
            "tokenizer": tokenizer.name,
        }
        temporary.write_text(json.dumps(about))
        os.replace(temporary, path.with_suffix(".json"))
    finally:
        temporary.unlink(missing_ok=True)
    return about


# ---------------------------------------------------------------- ids -> rows in order


class StoredRows:
    """Rows of ids that lie in memory or in a file, visited in a keyed random order.

    Position p of a run is row order(p % count) of epoch p // count; the cursor is p.
    """

    def __init__(self, tokens: TokenFile, block_size: int, seed: int, shuffle: bool):
        self.ids, self.fingerprint = tokens
        self.block_size, self.seed, self.shuffle = block_size, seed, shuffle
        self.count = max(0, (len(self.ids) - 1) // block_size)
        self.remainder = len(self.ids) - 1 - self.count * block_size
        self.start = {"rows": 0}

    def rows_at(self, position: np.ndarray) -> np.ndarray:
        """Row numbers at positions of the run. int64 (N,) -> int64 (N,)."""
        epoch, index = np.divmod(position, self.count)
        if not self.shuffle:
            return index
        rows = np.empty_like(index)
        for number in np.unique(epoch):
            chosen = epoch == number
            rows[chosen] = permute(index[chosen], self.count, (self.seed, int(number)))
        return rows

    def read(self, rows: np.ndarray) -> np.ndarray:
        """int32 (N, S): the ids of rows."""
        T = self.block_size
        return self.ids[rows[:, None] * T + np.arange(T + 1)].astype(np.int32)

    def batches(self, cursor: dict, size: int, limit: float, slots: slice) -> Iterator:
        """(Batch of the given slots, the cursor behind it) for each step, until `limit` rows."""
        first = cursor["rows"]
        while first < limit:
            position = first + np.arange(size)[slots]
            real = position < limit
            ids = self.read(self.rows_at(np.where(real, position, first)))
            first = min(first + size, limit)
            yield make_batch(ids, real, slots, size), {"rows": first}


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
        self.fingerprint = source.key
        self.count = self.remainder = None  # unknown until measured
        self.start = {"rows": 0, "epoch": 0, "window": 0, "at": 0, "skip": 0, "used": 0}

    def measure(self) -> None:
        """Set `count` and `remainder` by encoding the whole text once."""
        bar = tqdm(total=self.source.size, desc="counting tokens", disable=None, leave=False)
        n_ids = 0
        with bar:
            for ids, start in encode(self.source, self.tokenizer, self.add_eos):
                n_ids += len(ids)
                bar.update(start - bar.n)
        self.set_count(n_ids)

    def require_one(self) -> None:
        """Raise UserError for a text that has not one row; reads no further than that."""
        n_ids = 0
        for ids, _ in encode(self.source, self.tokenizer, self.add_eos):
            n_ids += len(ids)
            if n_ids > self.block_size:
                return
        self.set_count(n_ids)
        check_length(self, self.source.name)

    def set_count(self, n_ids: int) -> None:
        self.count = max(0, (n_ids - 1) // self.block_size)
        self.remainder = n_ids - 1 - self.count * self.block_size

    def windows(self, cursor: dict) -> Iterator[tuple[np.ndarray, dict]]:
        """(rows of a window in their shuffled order, the cursor at its beginning), for ever."""
        T, wanted = self.block_size, self.window * self.block_size + 1
        epoch, number, at, skip = (cursor[name] for name in ("epoch", "window", "at", "skip"))
        while True:
            marks = deque()  # (index in this stream of a piece's first id, its start)
            held, n_held, begin, n_read = [], 0, skip, 0
            for ids, start in encode(self.source, self.tokenizer, self.add_eos, at):
                if not marks or marks[-1][1] != start:
                    marks.append((n_read, start))
                held.append(ids[max(0, begin - n_read) :])
                n_held += len(held[-1])
                n_read += len(ids)
                while n_held >= wanted:
                    flat = np.concatenate(held)
                    yield (
                        self.shuffled(flat[:wanted], epoch, number),
                        here(marks, begin, epoch, number),
                    )
                    held, n_held = [flat[wanted - 1 :]], n_held - wanted + 1
                    begin, number = begin + wanted - 1, number + 1
            if n_held > T:
                flat = np.concatenate(held)
                flat = flat[: (n_held - 1) // T * T + 1]
                yield self.shuffled(flat, epoch, number), here(marks, begin, epoch, number)
            elif number == 0:  # it was the first window: the whole text is less than a row
                self.set_count(n_read)
                check_length(self, self.source.name)
            epoch, number, at, skip = epoch + 1, 0, 0, 0

    def shuffled(self, ids: np.ndarray, epoch: int, number: int) -> np.ndarray:
        T = self.block_size
        rows = np.lib.stride_tricks.sliding_window_view(ids, T + 1)[::T]
        if not self.shuffle:
            return rows
        return rows[permute(np.arange(len(rows)), len(rows), (self.seed, epoch, number))]

    def batches(self, cursor: dict, size: int, limit: float, slots: slice) -> Iterator:
        """(Batch of the given slots, the cursor behind it) for each step, until `limit` rows."""
        total, used = cursor["rows"], cursor["used"]
        waiting = np.empty((0, self.block_size + 1), np.int32)
        windows = self.windows(cursor)
        behind = cursor
        while total < limit:
            while len(waiting) < size:
                rows, behind = next(windows)
                waiting = np.concatenate([waiting, rows[used:]])
                n_rows, used = len(rows), 0
            ids, waiting = waiting[:size], waiting[size:]
            real = total + np.arange(size) < limit
            total += size
            # A window used up to its end is read again on resume, for none of its rows: cheap,
            # and the cursor needs no second case. `used` counts from the newest window's first
            # row; rows waiting from an older one cannot be, as `waiting` was shorter than size.
            yield (
                make_batch(ids[slots].astype(np.int32), real[slots], slots, size),
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


def evaluation_batches(ids: np.ndarray, block_size: int, size: int, n_rows: int, slots: slice):
    """Batches over a text in its own order, its last, shorter row included.

    n_rows: rows to take at most, 0 for all. Every target is counted exactly once.
    """
    T, n_targets = block_size, len(ids) - 1
    total = -(-n_targets // T)
    total = min(total, n_rows) if n_rows else total
    for first in range(0, total, size):
        rows = first + np.arange(size)[slots]
        length = np.where(rows < total, np.clip(n_targets - rows * T, 0, T), 0)
        index = np.minimum(rows[:, None] * T + np.arange(T + 1), n_targets)
        yield Batch(ids[index].astype(np.int32), rows.astype(np.int32), length.astype(np.int32))


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
