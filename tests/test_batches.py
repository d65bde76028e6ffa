"""Every id is a target once, every row comes once an epoch, and a cursor is enough to go on.

Most texts here are numbers, `0 1 2 ...`, and a token is a number: an id tells its place.
"""

import itertools
import json
import random
import time

import numpy as np
import pytest

from gpt2_flax.data import sources
from gpt2_flax.data.batches import (
    Batch,
    StoredRows,
    StreamedRows,
    TokenFile,
    check_length,
    encode,
    evaluation_batches,
    permute,
    token_file,
)
from gpt2_flax.data.sources import Piece, TextFiles
from gpt2_flax.data.tokenizers import make_tokenizer
from gpt2_flax.errors import StorageError, UserError

T, SIZE, EPOCH, LEFT_OVER = 5, 4, 23, 3  # targets a row, rows a batch, rows an epoch, ids over
N_IDS = EPOCH * T + 1 + LEFT_OVER
ALL = slice(None)


class Numbers:
    """A tokenizer of numbers; counts how often it was asked."""

    def __init__(self, vocab_size: int = 1000, eos_id: int = 999, fails_at: int = -1):
        self.name, self.fingerprint = "numbers", f"numbers {eos_id}"
        self.vocab_size, self.eos_id = vocab_size, eos_id
        self.calls, self.fails_at = 0, fails_at

    def encode_batch(self, texts):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("in the middle")
        return [np.array(text.split(), np.int32) for text in texts]


class Documents:
    """Documents of numbers, in pieces. Some pieces hold nothing and some share a start."""

    def __init__(self, *documents, longest: int = 7):
        self.name, self.parts, start = "documents", [], 0
        for document in documents:
            lengths = itertools.cycle([3, 0, longest, 1])
            while document:
                part, document = np.split(document, [next(lengths)])
                text = "".join(f"{number} " for number in part)
                self.parts.append(Piece(text, start, ends_document=not len(document)))
                start += len(self.parts) % 3 > 0
                document = list(document)
        self.size, self.key = start + 1, repr(documents)

    def pieces(self, start=0):
        yield from itertools.dropwhile(lambda piece: piece.start < start, self.parts)


def stored(shuffle=True, seed=8, n_ids=N_IDS) -> StoredRows:
    return StoredRows(TokenFile(np.arange(n_ids, dtype=np.uint16), "digest"), T, seed, shuffle)


def streamed(window=6, shuffle=True, seed=8, n_ids=N_IDS) -> StreamedRows:
    return StreamedRows(Documents(list(range(n_ids))), Numbers(), False, T, seed, shuffle, window)


def row_numbers(batches) -> list[int]:
    """Which rows of the text the batches hold, padding left out."""
    rows = []
    for batch, _ in batches:
        ids = batch.ids_BxS[batch.length_B > 0]
        assert (np.diff(ids) == 1).all() and (ids[:, 0] % T == 0).all()
        rows += (ids[:, 0] // T).tolist()
    return rows


def assert_same_batches(got, expected):
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for (batch, _), (other, _) in zip(got, expected, strict=True):
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
    rows = StoredRows(TokenFile(np.array([7, 1, 8, 2, 9, 3, 6, 4]), "digest"), 3, 0, False)
    assert (rows.count, rows.remainder) == (2, 1)
    assert rows.read(np.array([1, 0])).tolist() == [[2, 9, 3, 6], [7, 1, 8, 2]]
    ((batch, cursor),) = rows.batches(rows.start, 2, 2, ALL)
    assert batch.ids_BxS.tolist() == [[7, 1, 8, 2], [2, 9, 3, 6]]
    assert (batch.slot_B.tolist(), batch.length_B.tolist()) == ([0, 1], [3, 3])
    assert cursor == {"rows": 2}


@pytest.mark.parametrize("n_ids", [T + 1, N_IDS - LEFT_OVER, N_IDS, N_IDS + 1])
@pytest.mark.parametrize("make", [stored, streamed], ids=["stored", "streamed"])
def test_every_id_but_the_first_is_a_target_once(make, n_ids):
    rows = make(n_ids=n_ids)
    if rows.count is None:
        rows.measure()
    targets = [
        batch.ids_BxS[batch.length_B > 0][:, 1:]
        for batch, _ in rows.batches(rows.start, SIZE, rows.count, ALL)
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
    for epoch in range(3):
        assert sorted(seen[epoch * EPOCH :][:EPOCH]) == [*range(EPOCH)]
    assert [batch.slot_B.tolist() for batch, _ in batches] == [[*range(SIZE)]] * len(batches)
    lengths = np.concatenate([batch.length_B for batch, _ in batches]).tolist()
    assert lengths == [T] * (3 * EPOCH) + [0] * (-3 * EPOCH % SIZE)
    assert [cursor["rows"] for _, cursor in batches[:-1]] == [*range(SIZE, 3 * EPOCH, SIZE)]


def test_a_run_that_is_given_more_epochs_goes_on_with_the_next_row():
    """Padding of its last batch used up no row."""
    rows = stored()
    first = list(rows.batches(rows.start, SIZE, EPOCH, ALL))
    assert first[-1][1] == {"rows": EPOCH}
    assert (first[-1][0].length_B == 0).any()
    more = list(rows.batches(first[-1][1], SIZE, 2 * EPOCH, ALL))
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
        cursors = [cursor for _, cursor in parts_of_step]
        assert cursors == [cursors[0]] * n_processes
        arrays = zip(*(batch for batch, _ in parts_of_step), strict=True)
        rejoined.append((Batch(*map(np.concatenate, arrays)), cursors[0]))
    assert_same_batches(rejoined, make().batches(make().start, SIZE, limit, ALL))


# ---------------------------------------------------------------- the cursor


@every_kind
def test_any_cursor_continues_the_run(make):
    """From each step on, and from there once more, as a run does that is stopped twice."""
    limit = 2 * EPOCH + 1
    rows = make()
    whole = list(rows.batches(rows.start, SIZE, limit, ALL))
    before = [rows.start, *(cursor for _, cursor in whole)]
    for step, cursor in enumerate(before):
        stored_cursor = json.loads(json.dumps(cursor))
        rest = list(make().batches(stored_cursor, SIZE, limit, ALL))
        assert_same_batches(rest, whole[step:])
        for further in range(step % 3, len(rest), 9):
            again = make().batches(rest[further][1], SIZE, limit, ALL)
            assert_same_batches(again, whole[step + further + 1 :])


def test_a_cursor_continues_a_run_over_files(tmp_path, monkeypatch):
    """The same with real text and ids: several files, and a word so long that it is cut."""
    monkeypatch.setattr(sources, "PIECE_CHARS", 16)
    monkeypatch.setattr(sources, "LONGEST_PIECE_CHARS", 50)
    long_word = "".join(random.Random(0).choices("abc", k=601))
    lines = "".join(f"{n} words\n" for n in range(50))
    texts = [lines, f"a word: {long_word}", "\u6f22\u5b57\r\n" * 40]
    paths = [tmp_path / f"{n}.txt" for n in range(3)]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    tokenizer = make_tokenizer("bpe:300", texts)

    def batches(cursor=None, limit=200):
        rows = StreamedRows(TextFiles(paths), tokenizer, True, T, 8, True, 6)
        return rows.batches(cursor or rows.start, SIZE, limit, ALL)

    whole = list(batches())
    assert {cursor["epoch"] for _, cursor in whole} == {0, 1}
    for step in range(1, len(whole)):
        assert_same_batches(batches(whole[step - 1][1]), whole[step:])


def test_a_position_deep_in_a_huge_file_is_found_at_once(tmp_path):
    """2 GB of ids; the order is a function of the position, and a read touches its rows only."""
    path, n_ids = tmp_path / "sparse.tokens", 2**30
    with open(path, "wb") as file:
        file.truncate(2 * n_ids)
    ids = np.memmap(path, np.uint16, "r+")
    rows = StoredRows(TokenFile(ids, "digest"), 127, 8, shuffle=True)
    position = 3 * rows.count - 1001
    (number,) = rows.rows_at(np.array([position]))
    ids[number * 127 : number * 127 + 128] = np.arange(1, 129)
    seconds = []
    for _ in range(3):  # other work on the machine must not count
        start = time.perf_counter()
        batch, _ = next(rows.batches({"rows": position}, 64, np.inf, ALL))
        seconds.append(time.perf_counter() - start)
    assert batch.ids_BxS[0].tolist() == [*range(1, 129)]
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
    ids, share = 100 + np.arange(n_ids, dtype=np.uint16), size // n_processes
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


# ---------------------------------------------------------------- token files

DOCUMENTS = [1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]
JOINED = [1, 2, 3, 4, 5, 6, 7, 999, 8, 999, 9, 10, 11, 999]


def test_end_of_text_stands_behind_each_document():
    ids, starts = zip(*encode(Documents(*DOCUMENTS), Numbers(), True), strict=True)
    assert np.concatenate(ids).tolist() == JOINED
    assert [*starts] == [piece.start for piece in Documents(*DOCUMENTS).parts]
    without = [ids for ids, _ in encode(Documents(*DOCUMENTS), Numbers(), False)]
    assert np.concatenate(without).tolist() == [*range(1, 12)]


def test_a_token_file_is_written_once(tmp_path):
    tokenizer, folder = Numbers(), tmp_path / "to be" / "made"
    first = token_file(Documents(*DOCUMENTS), tokenizer, True, folder)
    calls, files = tokenizer.calls, sorted(folder.iterdir())
    assert first.ids.tolist() == JOINED and calls > 0
    assert [path.suffix for path in files] == [".json", ".tokens"]
    second = token_file(Documents(*DOCUMENTS), tokenizer, True, folder)
    assert second.ids.tolist() == JOINED and second.fingerprint == first.fingerprint
    assert tokenizer.calls == calls and sorted(folder.iterdir()) == files


def test_another_text_tokenizer_or_separator_is_another_token_file(tmp_path):
    made = [
        token_file(Documents(*DOCUMENTS), Numbers(), True, tmp_path),
        token_file(Documents(*DOCUMENTS), Numbers(), False, tmp_path),
        token_file(Documents(*DOCUMENTS), Numbers(eos_id=998), True, tmp_path),
        token_file(Documents([1, 2]), Numbers(), True, tmp_path),
    ]
    assert len({tuple(tokens.ids) for tokens in made}) == 4
    assert len({tokens.fingerprint for tokens in made}) == 4
    assert len(list(tmp_path.glob("*.tokens"))) == 4
    # The fingerprint is of the ids: the same for the same ids from another text.
    pieces = Documents(*DOCUMENTS, longest=2)
    pieces.key = "other"
    assert token_file(pieces, Numbers(), True, tmp_path).fingerprint == made[0].fingerprint
    assert len(list(tmp_path.glob("*.tokens"))) == 5


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_as_many_bytes_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    largest = vocab_size - 1
    tokens = token_file(Documents([3, largest]), Numbers(vocab_size, largest), True, tmp_path)
    assert tokens.ids.dtype == dtype and tokens.ids.tolist() == [3, largest, largest]


def truncate(file):
    file.write_bytes(file.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("tokens", truncate),
        ("tokens", lambda file: file.unlink()),
        ("json", lambda file: file.unlink()),
        ("json", truncate),
        ("json", lambda file: file.write_text("[]")),
        ("json", lambda file: file.write_text("{}")),
        ("json", lambda file: file.write_bytes(b"\xff\xfe\x00")),
    ],
    ids=["cut", "gone", "no json", "json cut", "json a list", "json empty", "json of no text"],
)
def test_a_damaged_token_file_is_made_again(tmp_path, suffix, damage):
    token_file(Documents(*DOCUMENTS), Numbers(), True, tmp_path)
    (file,) = tmp_path.glob(f"*.{suffix}")
    damage(file)
    tokenizer = Numbers()
    tokens = token_file(Documents(*DOCUMENTS), tokenizer, True, tmp_path)
    assert tokens.ids.tolist() == JOINED and tokenizer.calls > 0
    tokenizer.calls = 0
    assert token_file(Documents(*DOCUMENTS), tokenizer, True, tmp_path).ids.tolist() == JOINED
    assert tokenizer.calls == 0 and len(list(tmp_path.iterdir())) == 2


def test_an_exception_leaves_no_file_behind(tmp_path):
    source = Documents([*range(200)])
    with pytest.raises(RuntimeError, match="in the middle"):
        token_file(source, Numbers(fails_at=2), True, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert token_file(source, Numbers(), True, tmp_path).ids.tolist() == [*range(200), 999]


def test_two_writers_of_one_token_file_do_not_meet(tmp_path):
    """Hosts that share a folder start together, in containers with the same process number."""
    source, tokenizer, encode_batch = Documents(*DOCUMENTS), Numbers(), Numbers().encode_batch

    def encode_while_another_finishes(texts):
        token_file(source, Numbers(), True, tmp_path)
        return encode_batch(texts)

    tokenizer.encode_batch = encode_while_another_finishes
    assert token_file(source, tokenizer, True, tmp_path).ids.tolist() == JOINED
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        StorageError, match=r"(?s)^cannot write .*Not a dir.*--cache_dir, or make room"
    ):
        token_file(Documents(*DOCUMENTS), Numbers(), True, tmp_path / "file" / "folder")


def test_text_that_cannot_be_read_is_not_blamed_on_the_folder(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    source = TextFiles([path])
    path.unlink()
    with pytest.raises(UserError, match=r"^cannot read .*a.txt: No such file") as error:
        token_file(source, Numbers(), True, tmp_path / "cache")
    assert not isinstance(error.value, StorageError)


# ---------------------------------------------------------------- too little text


@pytest.mark.parametrize("n_ids", [0, 1, T])
def test_a_text_shorter_than_a_row_is_refused(n_ids):
    message = rf"^a.txt has {n_ids} tokens, fewer than one row of block_size {T} \+ 1\n  use more"
    for rows in (stored(n_ids=n_ids), streamed(n_ids=n_ids)):
        if rows.count is None:
            rows.measure()
        assert rows.count == 0
        with pytest.raises(UserError, match=message):
            check_length(rows, "a.txt")
    check_length(stored(n_ids=T + 1), "a.txt")


@pytest.mark.parametrize("n_ids", [0, 1, T])
def test_streaming_a_text_shorter_than_a_row_ends_with_the_same_message(n_ids):
    """With max_steps nothing was measured before, and no epoch would ever give a row."""
    rows = streamed(n_ids=n_ids)
    with pytest.raises(UserError, match=rf"^documents has {n_ids} tokens, fewer than one row"):
        next(rows.batches(rows.start, SIZE, np.inf, ALL))


def test_measuring_counts_what_a_token_file_would_hold(tmp_path):
    rows = StreamedRows(Documents(*DOCUMENTS), Numbers(), True, 4, 8, True, 6)
    rows.measure()
    tokens = token_file(Documents(*DOCUMENTS), Numbers(), True, tmp_path)
    in_file = StoredRows(tokens, 4, 8, True)
    assert (rows.count, rows.remainder) == (in_file.count, in_file.remainder) == (3, 1)
