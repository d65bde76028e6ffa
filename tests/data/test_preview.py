"""`--show_data` shows the rows of a run as they are trained on."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2_flax.data import preview, token_files
from gpt2_flax.data.batches import StoredRows, StreamedRows
from gpt2_flax.data.sources import Files, Piece, Text
from gpt2_flax.data.tokenizers import make_tokenizer
from tests.text_fixtures import write

T = 5
TOKENIZER = make_tokenizer("bytes", ())


def open_stored(source, folder, add_eos, shuffle=False):
    ids, about = token_files.token_file(source, TOKENIZER, add_eos, folder)
    return StoredRows(ids, T, 8, shuffle), about


def open_streamed(source, folder, add_eos, shuffle=False):
    rows = StreamedRows(source, TOKENIZER, add_eos, T, 8, shuffle, 2)
    return rows, rows.measure()


both_ways = pytest.mark.parametrize("open_rows", [open_stored, open_streamed])


@pytest.fixture
def shown(tmp_path):
    """Lines that are shown of a text whose documents stand in lines."""

    def show_lines(open_rows, text, n, add_eos=True, held_out=None, separator="\\n", **order):
        source = Files([write(tmp_path / "a.txt", text)], Text(separator))
        rows, about = open_rows(source, tmp_path / "cache", add_eos, **order)
        if held_out is not None:
            held_out = np.arange(held_out)
        lines = preview.lines(rows, held_out, about, add_eos, TOKENIZER, n)
        return "\n".join(lines).split("\n")

    return show_lines


@both_ways
def test_rows_are_shown_as_ids_and_text_with_documents(shown, open_rows):
    """The documents: "abc", "d" with a character of 3 bytes, "efghijklm" and "no"."""
    assert shown(open_rows, "abc\nd\u6f22\nefghijklm\nno", 9, held_out=3 * T + 3) == [
        "training text: 4 documents, 22 tokens, 18 bytes, 0.818 bytes per token",
        "rows: 4 of 5 tokens, each a target once an epoch; 1 tokens at the end are left over",
        "held out: 18 tokens, 4 rows, the last one shorter (2)",
        "",
        "row 0: 97 98 99 256 100 230",
        '  a document begins: "abc<|endoftext|>"',
        '  a document begins: "d\ufffd"',
        "",
        "row 1: 230 188 162 256 101 102",
        '  inside a document: "\u6f22<|endoftext|>"',
        '  a document begins: "ef"',
        "",
        "row 2: 102 103 104 105 106 107",
        '  inside a document: "fghijk"',
        "",
        "row 3: 107 108 109 256 110 111",
        '  inside a document: "klm<|endoftext|>"',
        '  a document begins: "no"',
    ]


@both_ways
def test_without_end_of_text_documents_are_told_all_the_same(shown, open_rows):
    assert shown(open_rows, "abc\ndefgh\nijkl", 2, add_eos=False, held_out=2 * T + 1) == [
        "training text: 3 documents, 12 tokens, 12 bytes, 1.000 bytes per token",
        "rows: 2 of 5 tokens, each a target once an epoch; 1 tokens at the end are left over",
        "held out: 11 tokens, 2 rows",
        "",
        "row 0: 97 98 99 100 101 102",
        '  a document begins: "abc"',
        '  a document begins: "def"',
        "",
        "row 1: 102 103 104 105 106 107",
        '  inside a document: "fgh"',
        '  a document begins: "ijk"',
    ]


@both_ways
def test_a_document_that_begins_a_row_is_told(shown, open_rows):
    """It begins with the last token of the row before, too, which that shows alone."""
    lines = shown(open_rows, "abcd\nefghijkl", 2)
    assert lines[3:] == [
        "row 0: 97 98 99 100 256 101",
        '  a document begins: "abcd<|endoftext|>"',
        '  a document begins: "e"',
        "",
        "row 1: 101 102 103 104 105 106",
        '  a document begins: "efghij"',
    ]


@both_ways
def test_quotes_and_line_ends_stand_in_one_line(shown, open_rows):
    lines = shown(open_rows, 'a"\n\\\tbcdef', 1, separator="")
    assert lines[2:] == ["", "row 0: 97 34 10 92 9 98", r'  a document begins: "a\"\n\\\tb"']


@both_ways
@pytest.mark.parametrize("n", [1, 3, 6, 50])
def test_rows_come_in_the_order_of_training_and_no_row_twice(shown, open_rows, n):
    text = "".join(f"line {number}\n" for number in range(5))
    lines = shown(open_rows, text, n, shuffle=True)
    numbers = [line.split(":")[0] for line in lines if line.startswith("row ")]
    assert len(numbers) == len({*numbers}) == min(n, 6)
    if n == 50:
        assert numbers != sorted(numbers) and sorted(numbers) == [f"row {n}" for n in range(6)]
    assert lines == shown(open_rows, text, 50, shuffle=True)[: len(lines)]


def test_a_stream_of_unknown_length_is_shown_to_its_end(shown):
    def open_unmeasured(source, folder, add_eos):
        return StreamedRows(source, TOKENIZER, add_eos, T, 8, False, 2), {}

    lines = shown(open_unmeasured, "abc\ndefgh\nijkl", 50)
    assert lines[0] == "rows of 5 tokens; how many is unknown: the text is streamed"
    assert [line for line in lines if line.startswith("row")][1:] == [
        "row 0: 97 98 99 256 100 101",
        "row 1: 101 102 103 104 256 105",
    ]


@both_ways
def test_pieces_without_ids_begin_no_document(tmp_path, open_rows):
    pieces = [("", 0, False), ("ab", 0, True), ("", 1, True), ("cde", 2, False), ("f", 2, True)]
    source = SimpleNamespace(
        name="made up", key="key", fingerprint="key", found=Counter(),
        pieces=lambda start, cuts: (Piece(*piece) for piece in pieces),
    )  # fmt: skip
    rows, about = open_rows(source, tmp_path, add_eos=False)
    lines = list(preview.lines(rows, None, about, False, TOKENIZER, 1))
    assert lines[3:] == ['  a document begins: "ab"', '  a document begins: "cdef"']


def test_ids_of_files_are_shown_with_documents_behind_end_of_text(tmp_path):
    path = tmp_path / "a.bin"
    np.array([97, 98, 256, 99, 100, 101, 256, 256, 102, 103, 104], np.uint16).tofile(path)
    ids, about = token_files.id_files([path], TOKENIZER, tmp_path / "cache")
    lines = list(preview.lines(StoredRows(ids, T, 8, False), None, about, True, TOKENIZER, 2))
    assert "\n".join(lines).split("\n") == [
        "training text: 11 tokens",
        "rows: 2 of 5 tokens, each a target once an epoch; 0 tokens at the end are left over",
        "",
        "row 0: 97 98 256 99 100 101",
        '  a document begins: "ab<|endoftext|>"',
        '  a document begins: "cde"',
        "",
        "row 1: 101 256 256 102 103 104",
        '  inside a document: "e<|endoftext|>"',
        '  a document begins: "<|endoftext|>"',
        '  a document begins: "fgh"',
    ]
