"""Every id is a target once, every row comes once an epoch, and a cursor is enough to go on.

Most texts here are numbers, `0 1 2 ...`, and a token is a number: an id tells its place.
"""

import json
import random
import time

import numpy as np
import pytest

from gpt2_flax.data import chunking
from gpt2_flax.data.batches import (
    Batch,
    StoredRows,
    StreamedRows,
    Taken,
    check_length,
    evaluation_batches,
    permute,
)
from gpt2_flax.data.sources import Files, Text
from gpt2_flax.data.token_files import Ids
from gpt2_flax.data.tokenizers import make_tokenizer
from gpt2_flax.errors import UserError
from tests.text_fixtures import Documents, Numbers

T, SIZE, EPOCH, LEFT_OVER = 5, 4, 23, 3  # targets a row, rows a batch, rows an epoch, ids over
N_IDS = EPOCH * T + 1 + LEFT_OVER
ALL = slice(None)


class InMemory:
    """Ids as a token file gives them, from an array."""

    def __init__(self, ids):
        self.ids, self.fingerprint = np.asarray(ids), "digest"

    def __len__(self):
        return len(self.ids)

    def read(self, start, count):
        assert start >= 0 and start + count <= len(self.ids)
        return self.ids[start : start + count].astype(np.int32)


def stored(shuffle=True, seed=8, n_ids=N_IDS) -> StoredRows:
    return StoredRows(InMemory(np.arange(n_ids, dtype=np.uint16)), T, seed, shuffle)


def streamed(window=6, shuffle=True, seed=8, n_ids=N_IDS) -> StreamedRows:
    return StreamedRows(Documents(list(range(n_ids))), Numbers(), False, T, seed, shuffle, window)


def row_numbers(batches) -> list[int]:
    """Which rows of the text the batches of whole steps hold, padding left out."""
    rows = []
    for batch, numbers, _ in batches:
        ids = batch.ids_BxS[batch.length_B > 0]
        assert (np.diff(ids) == 1).all() and (ids[:, 0] % T == 0).all()
        assert numbers[:, 1].tolist() == (ids[:, 0] // T).tolist()
        rows += (ids[:, 0] // T).tolist()
    return rows


def assert_same_batches(got, expected):
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for (batch, numbers, _), (other, wanted_numbers, _) in zip(got, expected, strict=True):
        np.testing.assert_array_equal(numbers, wanted_numbers)
        for array, wanted in zip(batch, other, strict=True):
            assert array.dtype == np.int32
            np.testing.assert_array_equal(array, wanted)


# every window: below, at and over the batch; a divisor of the epoch or not; over the epoch
ROWS = {
    "stored": stored,
    "stored in order": lambda **changes: stored(shuffle=False, **changes),
    **{
        f"streamed {window}": lambda window=window, **changes: streamed(window, **changes)
        for window in (1, 3, SIZE, 6, EPOCH, 50)
    },
    "streamed in order": lambda **changes: streamed(shuffle=False, **changes),
}
every_kind = pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)


# ---------------------------------------------------------------- packing


def test_rows_overlap_by_one_id():
    rows = StoredRows(InMemory([7, 1, 8, 2, 9, 3, 6, 4]), 3, 0, False)
    assert (rows.count, rows.remainder) == (2, 1)
    assert rows.read(np.array([1, 0])).tolist() == [[2, 9, 3, 6], [7, 1, 8, 2]]
    ((batch, numbers, cursor),) = rows.batches(rows.start, 2, 2, ALL)
    assert batch.ids_BxS.tolist() == [[7, 1, 8, 2], [2, 9, 3, 6]]
    assert (batch.slot_B.tolist(), batch.length_B.tolist()) == ([0, 1], [3, 3])
    assert numbers.tolist() == [[0, 0], [0, 1]] and cursor == {"rows": 2}


@pytest.mark.parametrize("n_ids", [T + 1, N_IDS - LEFT_OVER, N_IDS, N_IDS + 1])
@pytest.mark.parametrize("make", [stored, streamed], ids=["stored", "streamed"])
def test_every_id_but_the_first_is_a_target_once(make, n_ids):
    rows = make(n_ids=n_ids)
    if rows.count is None:
        rows.measure()
    targets = [
        batch.ids_BxS[batch.length_B > 0][:, 1:]
        for batch, *_ in rows.batches(rows.start, SIZE, rows.count, ALL)
    ]
    targets = np.sort(np.concatenate(targets), axis=None)
    np.testing.assert_array_equal(targets, np.arange(1, n_ids - rows.remainder))
    assert 0 <= rows.remainder < T


# ---------------------------------------------------------------- order


@every_kind
def test_every_row_comes_once_an_epoch(make):
    rows = make()
    assert 3 * EPOCH % SIZE  # else no batch is padded
    batches = list(rows.batches(rows.start, SIZE, 3 * EPOCH, ALL))
    seen = row_numbers(batches)
    epochs = np.concatenate([numbers[:, 0] for _, numbers, _ in batches]).tolist()
    assert epochs == [epoch for epoch in range(3) for _ in range(EPOCH)]
    for epoch in range(3):
        assert sorted(seen[epoch * EPOCH :][:EPOCH]) == [*range(EPOCH)]
    assert [batch.slot_B.tolist() for batch, *_ in batches] == [[*range(SIZE)]] * len(batches)
    lengths = np.concatenate([batch.length_B for batch, *_ in batches]).tolist()
    assert lengths == [T] * (3 * EPOCH) + [0] * (-3 * EPOCH % SIZE)
    assert [cursor["rows"] for *_, cursor in batches[:-1]] == [*range(SIZE, 3 * EPOCH, SIZE)]


@every_kind
@pytest.mark.parametrize("limit", [1, SIZE - 1, EPOCH, EPOCH + 3])
def test_a_run_that_is_given_more_epochs_goes_on_with_the_next_row(make, limit):
    """Padding of its last batch used up no row."""
    rows = make()
    first = list(rows.batches(rows.start, SIZE, limit, ALL))
    assert first[-1].cursor["rows"] == limit
    assert (first[-1].batch.length_B == 0).any()
    more = list(make().batches(first[-1].cursor, SIZE, 2 * EPOCH, ALL))
    at_once = list(rows.batches(rows.start, SIZE, 2 * EPOCH, ALL))
    assert row_numbers(first) + row_numbers(more) == row_numbers(at_once)


@pytest.mark.parametrize("make", [stored, streamed], ids=["stored", "streamed"])
def test_without_shuffle_rows_come_in_the_order_of_the_text(make):
    rows = make(shuffle=False)
    batches = list(rows.batches(rows.start, SIZE, 2 * EPOCH, ALL))
    assert row_numbers(batches) == 2 * [*range(EPOCH)]
    in_memory = stored(shuffle=False)
    expected = list(in_memory.batches(in_memory.start, SIZE, 2 * EPOCH, ALL))
    assert_same_batches(batches[:-1], expected[:-1])


@pytest.mark.parametrize("make", [stored, streamed], ids=["stored", "streamed"])
def test_the_order_is_another_for_each_epoch_and_seed(make):
    def order(seed):
        rows = make(seed=seed)
        return row_numbers(rows.batches(rows.start, SIZE, 2 * EPOCH, ALL))

    assert order(8) == order(8)
    orders = [order(seed)[first : first + EPOCH] for seed in (8, 9) for first in (0, EPOCH)]
    assert len({*map(tuple, orders), tuple(range(EPOCH))}) == 5


def test_rows_are_shuffled_within_windows_that_differ():
    window = 6
    rows = streamed(window)
    order = row_numbers(rows.batches(rows.start, SIZE, EPOCH, ALL))
    places = [tuple(row - first for row in order[first : first + window]) for first in (0, 6, 12)]
    assert [sorted(place) for place in places] == [[*range(window)]] * 3
    assert len({*places}) == 3


@pytest.mark.parametrize("n_processes", [2, 4])
@every_kind
def test_slices_of_the_processes_are_the_whole_batch(make, n_processes):
    limit, share = 2 * EPOCH - 1, SIZE // n_processes
    parts = [
        make().batches(make().start, SIZE, limit, slice(first, first + share))
        for first in range(0, SIZE, share)
    ]
    rejoined = []
    for parts_of_step in zip(*parts, strict=True):
        cursors = [cursor for *_, cursor in parts_of_step]
        assert cursors == [cursors[0]] * n_processes
        arrays = zip(*(batch for batch, *_ in parts_of_step), strict=True)
        numbers = [numbers.tolist() for _, numbers, _ in parts_of_step]
        assert numbers == [numbers[0]] * n_processes  # each knows the rows of all
        batch = Batch(*map(np.concatenate, arrays))
        rejoined.append(Taken(batch, np.array(numbers[0]), cursors[0]))
    assert_same_batches(rejoined, make().batches(make().start, SIZE, limit, ALL))


# ---------------------------------------------------------------- the cursor


@every_kind
def test_any_cursor_continues_the_run(make):
    """From each step on, and from there once more, as a run does that is stopped twice."""
    limit = 2 * EPOCH + 1
    rows = make()
    whole = list(rows.batches(rows.start, SIZE, limit, ALL))
    before = [rows.start, *(cursor for *_, cursor in whole)]
    for step, cursor in enumerate(before):
        stored_cursor = json.loads(json.dumps(cursor))
        rest = list(make().batches(stored_cursor, SIZE, limit, ALL))
        assert_same_batches(rest, whole[step:])
        for further in range(step % 3, len(rest), 9):
            again = make().batches(rest[further].cursor, SIZE, limit, ALL)
            assert_same_batches(again, whole[step + further + 1 :])


def test_a_cursor_continues_a_run_over_files(tmp_path, monkeypatch):
    """The same with real text and ids: several files, and a word so long that it is cut."""
    monkeypatch.setattr(chunking, "PIECE_CHARS", 16)
    monkeypatch.setattr(chunking, "LONGEST_PIECE_CHARS", 50)
    long_word = "".join(random.Random(0).choices("abc", k=601))
    lines = "".join(f"{n} words\n" for n in range(50))
    texts = [lines, f"a word: {long_word}", "\u6f22\u5b57\r\n" * 40]
    paths = [tmp_path / f"{n}.txt" for n in range(3)]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    tokenizer = make_tokenizer("bpe:300", texts)

    def batches(reader, cursor=None, limit=200):
        source = Files(paths, reader)
        rows = StreamedRows(source, tokenizer, True, T, 8, True, 6)
        return rows.batches(cursor or rows.start, SIZE, limit, ALL)

    for reader in (Text(), Text("\n"), Text("words")):
        whole = list(batches(reader))
        assert {cursor["epoch"] for *_, cursor in whole} == {0, 1}
        for step in range(1, len(whole)):
            assert_same_batches(batches(reader, whole[step - 1].cursor), whole[step:])


def test_a_position_deep_in_a_huge_file_is_found_at_once(tmp_path):
    """10 billion ids; the order is a function of the position, a read touches its rows only."""
    path, n_ids = tmp_path / "sparse.tokens", 10**10
    with open(path, "wb") as file:
        file.truncate(2 * n_ids)
    rows = StoredRows(Ids([(path, np.dtype(np.uint16), 0, n_ids)], "digest"), 127, 8, True)
    position = 3 * rows.count - 1001
    ((epoch, number),) = rows.rows_at(np.array([position]))
    with open(path, "r+b") as file:
        file.seek(2 * number * 127)
        file.write(np.arange(1, 129, dtype=np.uint16).tobytes())
    seconds = []
    for _ in range(3):  # other work on the machine must not count
        start = time.perf_counter()
        batch, *_ = next(rows.batches({"rows": position}, 64, np.inf, ALL))
        seconds.append(time.perf_counter() - start)
    assert epoch == 2 and batch.ids_BxS[0].tolist() == [*range(1, 129)]
    assert min(seconds) < 0.1


# ---------------------------------------------------------------- the permutation


@pytest.mark.parametrize("n", [*range(1, 35), 127, 128, 129, 1000, 4097])
def test_permute_is_a_bijection(n):
    for key in ((0, 0), (42, 1), (2**32 - 1, 10**9, 3)):
        permuted = permute(np.arange(n), n, key)
        assert permuted.dtype == np.int64
        np.testing.assert_array_equal(np.sort(permuted), np.arange(n))


def test_permute_of_a_part_is_the_part_of_the_permutation():
    whole = permute(np.arange(1000), 1000, (42, 0))
    some = np.array([999, 0, 500, 17])
    np.testing.assert_array_equal(permute(some, 1000, (42, 0)), whole[some])


@pytest.mark.parametrize("n", [2**31 + 11, 2**40 - 1, 2**52 + 1])
def test_permute_of_more_than_a_table_could_hold(n):
    steps = np.array([0, 2**16, 2**31, 2**32, n - 99])  # where a narrow integer would wrap
    near = np.add.outer(steps, np.arange(99)).ravel()
    spread = np.random.default_rng(0).integers(0, n, 5000)
    index = np.unique(np.concatenate([spread, near[near < n]]))
    permuted = permute(index, n, (42, 0))
    assert len(np.unique(permuted)) == len(index)
    assert permuted.min() >= 0 and permuted.max() < n
    assert abs(permuted.mean() / n - 0.5) < 0.02


def test_the_order_of_rows_is_the_one_that_old_checkpoints_count_on():
    assert permute(np.arange(11), 11, (42, 0)).tolist() == [3, 8, 7, 2, 4, 0, 6, 10, 5, 9, 1]


def test_permute_puts_any_row_anywhere():
    """Counts over 1200 keys; the bound is five standard deviations of a fair draw."""
    n, draws = 6, 1200
    orders = np.stack([permute(np.arange(n), n, (seed, 2)) for seed in range(draws)])
    counts = np.stack([(orders == row).sum(0) for row in range(n)])
    pairs = np.array([[(orders[:, 1:] - orders[:, :-1] == step).sum() for step in (1, -1)]])
    assert np.abs(counts - draws / n).max() < 5 * np.sqrt(draws / n * (1 - 1 / n))
    # Of n*(n-1) ordered pairs n-1 are one apart, in either direction, at each of n-1 places.
    expected = draws * (n - 1) / n
    assert np.abs(pairs - expected).max() < 5 * np.sqrt(expected)


def test_permute_keeps_no_trace_of_the_order():
    n = 5003
    for epoch in range(5):
        order, index = permute(np.arange(n), n, (42, epoch)), np.arange(n)
        following = permute(np.arange(n), n, (42, epoch + 1))
        for x, y in ((order, index), (order[1:], order[:-1]), (order, following)):
            assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(n)
        assert (order == index).sum() < 8  # one is expected


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("n_processes", [1, 2])
@pytest.mark.parametrize("size", [2, 6, 40])
@pytest.mark.parametrize("n_ids", [0, 1, 2, T, T + 1, T + 2, 6 * T + 1, 7 * T])
@pytest.mark.parametrize("n_rows", [0, 3, 1000])
def test_evaluation_counts_every_target_once(n_processes, size, n_ids, n_rows):
    ids, share = InMemory(100 + np.arange(n_ids, dtype=np.uint16)), size // n_processes
    seen, slots = [], []
    for first in range(0, size, share):
        for batch in evaluation_batches(ids, T, size, n_rows, slice(first, first + share)):
            assert all(array.dtype == np.int32 for array in batch)
            assert batch.ids_BxS.shape == (share, T + 1)
            for row, slot, length in zip(*batch, strict=True):
                seen += row[1 : 1 + length].tolist()
                slots += [slot] if length else []
                assert (np.diff(row[: length + 1]) == 1).all()
    n_targets = max(0, n_ids - 1)
    if n_rows:
        n_targets = min(n_targets, n_rows * T)
    assert sorted(seen) == [*range(101, 101 + n_targets)]
    assert sorted(slots) == [*range(-(-n_targets // T))]


# ---------------------------------------------------------------- too little text


@pytest.mark.parametrize("n_ids", [0, 1, T])
def test_a_text_shorter_than_a_row_is_refused(n_ids):
    message = rf"^a.txt has {n_ids} tokens, fewer than one row of block_size {T} \+ 1\n  use more"
    measured = streamed(n_ids=n_ids)
    measured.measure()
    for rows in (stored(n_ids=n_ids), measured):
        assert rows.count == 0
        with pytest.raises(UserError, match=message):
            check_length(rows, "a.txt")
    check_length(stored(n_ids=T + 1), "a.txt")
    # With max_steps nothing is measured before, and no epoch would ever give a row.
    rows = streamed(n_ids=n_ids)
    with pytest.raises(UserError, match=message.replace("a.txt", "documents")):
        next(rows.batches(rows.start, SIZE, np.inf, ALL))
