"""Text comes in pieces that are the text: same ids, same order, again from any piece on."""

import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import sysconfig
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_flax.config.train_config import EMBEDDED_DATASET, TrainConfig, load_config
from gpt2_flax.data import chunking, files, sources
from gpt2_flax.data.chunking import VerifiedCuts
from gpt2_flax.data.sources import (
    FILE,
    Files,
    JsonLines,
    Parquet,
    Text,
    open_sources,
    python_sources,
)
from gpt2_flax.data.tokenizers import EOS, make_tokenizer
from tests.text_fixtures import PACKINGS, check_restarts, documents, joined, refused, write

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOM = b"\xef\xbb\xbf"
CUTS = make_tokenizer("bytes", ()).cuts

# Everything that the rule of byte-level BPE treats in its own way, or that Python and the
# tokenizers could disagree about: which characters are white space, above all.
ALPHABET = [
    *"ab'.,7\n\n\n    \t\r\0", "\r\n", "\n\n", "  ", "'s", "'ll", "12", "the", " the", "\u00e9",
    "e\u0301", "\u00a0", "\u3000", "\u0085", "\u2028", "\u1680", "\u180e", "\u200b", "\ufeff",
    "\x0b", "\x0c", "\x1c", "\x1f", "\u65e5\u672c", "\U0001f600", "\U0001f469\u200d\U0001f680",
    EOS,
]  # fmt: skip


def fuzz(seed: int, n: int = 500) -> str:
    return "x" + "".join(random.Random(seed).choices(ALPHABET, k=n))  # x: no mark first


TEXTS = {
    "one letter": "x",
    "one newline": "\n",
    "smaller than a block": "Hi all",
    "white space only": " \n\n \t" * 9,
    "runs of newlines": "".join(f"line {n}" + "\n" * (n % 7) for n in range(60)),
    "runs of spaces": "".join(" " * (n % 9) + "of\t" for n in range(60)),
    "crlf": "one two\r\n\r\nthree \r\n" * 11,
    "unicode spaces": "a\u00a0 b\u3000\u3000 c\u0085\nd \u2028 e" * 13,
    "no spaces": "\u6f22\u5b57abc123" * 50,
    "emoji": "\U0001f600 \U0001f469\u200d\U0001f680\n" * 15,
    **{f"fuzz {seed}": fuzz(seed) for seed in range(4)},
}
every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
every_packing = pytest.mark.parametrize("suffix", PACKINGS)
many = settings(derandomize=True, database=None, deadline=None, max_examples=200)


@pytest.fixture(params=[1, 7, 64])
def piece_chars(request, monkeypatch):
    """Pieces of about so many characters, from blocks that are no multiple of that."""
    monkeypatch.setattr(chunking, "PIECE_CHARS", request.param)
    monkeypatch.setattr(files, "BLOCK_BYTES", max(1, request.param - 1))
    return request.param


@pytest.fixture(scope="module", params=["bytes", "bpe:700"])
def tokenizer(request):
    """`bpe:700` has merges across every kind of white space, so a wrong cut changes ids."""
    return make_tokenizer(request.param, [*TEXTS.values(), fuzz(99, 20_000)])


@pytest.fixture(scope="module")
def joining():
    """A tokenizer that may join any of a few letters, so that there is no place to cut them."""
    return make_tokenizer("bpe:400", ["\u6f22" * 9, "y" * 99, "x" * 99, "\ufeff1" * 9])


# ---------------------------------------------------------------- pieces of a file


@every_text
def test_pieces_joined_are_the_text_and_from_any_on_the_same(tmp_path, piece_chars, text):
    source = Files([write(tmp_path / "a.txt", text)], Text())
    pieces = check_restarts(source, CUTS, n_places=3)
    assert joined(pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    starts = [0, *itertools.accumulate(len(piece.text.encode()) for piece in pieces)]
    assert [*(piece.start for piece in pieces), len(text.encode())] == starts


@every_text
def test_ids_of_the_pieces_are_the_ids_of_the_text(tmp_path, piece_chars, tokenizer, text):
    path = write(tmp_path / "a.txt", text)
    expected = tokenizer.encode(text)
    # The separator is in none of the texts: a document is read another way, and is the same.
    for reader in (Text(), Text("~~"))[: 1 + (piece_chars > 1)]:
        pieces = [piece.text for piece in Files([path], reader).pieces(0, tokenizer.cuts)]
        if text.startswith("line"):  # a test of cuts needs cuts
            assert len(pieces) > 4
        if pieces:  # with a separator, white space alone is no document
            np.testing.assert_array_equal(np.concatenate(tokenizer.encode_batch(pieces)), expected)


def test_a_text_without_white_space_is_cut_where_reading_it_again_cuts_it(
    tmp_path, monkeypatch, joining
):
    """Such a cut changes a pair of ids: a resumed run has to make it at the same letter."""
    monkeypatch.setattr(chunking, "PIECE_CHARS", 8)
    monkeypatch.setattr(chunking, "LONGEST_PIECE_CHARS", 50)
    text = "some words, then " + "\u6f22" * 133 + " and " + "y" * 49 + " z" + "x" * 50
    source = Files([write(tmp_path / "a.txt", text)], Text())
    pieces = check_restarts(source, joining.cuts)
    assert joined(pieces) == text
    lengths = [len(piece.text) for piece in pieces]
    assert max(lengths) == 50 and lengths.count(50) >= 3
    assert [*chunking.cut_up(text, joining.cuts)] == [piece.text for piece in pieces]


@contextlib.contextmanager
def memory_below(n_bytes: int):
    """That Python never holds more than this at once, beside what it holds already."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("suffix", "n_bytes", "separator"),
    [
        ("", 30_000_000, ""), (".gz", 9_000_000, "blank_line"), (".xz", 9_000_000, EOS),
        (".zst", 9_000_000, ""),
    ],
)  # fmt: skip
def test_a_giant_line_takes_little_memory(tmp_path, suffix, n_bytes, separator):
    """Less than the line, even to place a fault, however it is packed."""
    path = write(tmp_path / f"a.txt{suffix}", b"x" * n_bytes + b"\xff")
    pieces = Files([path], Text(separator)).pieces(0, CUTS)
    with memory_below(8_000_000), refused(f"offset {n_bytes} "):
        for piece in pieces:
            assert len(piece.text) <= chunking.PIECE_CHARS


def test_line_ends_nul_and_inner_byte_order_marks_are_kept(tmp_path, piece_chars):
    text = "one\r\ntwo\x00three\rfour \ufeff five\ufeff\n"
    source = Files([write(tmp_path / "a.txt", BOM + text.encode())], Text())
    pieces = check_restarts(source, CUTS)
    assert joined(pieces) == text and pieces[0].start == 0
    source.found.clear()
    assert joined(source.pieces(0, CUTS)) == text
    assert source.found["nul"] == 1 and not source.found["replaced"]
    assert source.found["crlf"] == 1 or piece_chars < 9


def test_a_byte_order_mark_behind_a_forced_cut_is_kept(tmp_path, monkeypatch, joining):
    monkeypatch.setattr(chunking, "PIECE_CHARS", 4)
    monkeypatch.setattr(chunking, "LONGEST_PIECE_CHARS", 8)
    text = "xxxxxxxx\ufeffxxxxxxx"
    source = Files([write(tmp_path / "a.txt", text)], Text())
    assert "\ufeff" in [piece.text[0] for piece in source.pieces(0, joining.cuts)]
    assert documents(source, joining.cuts) == [text]


@pytest.mark.parametrize("separator", ["", "blank_line"])
def test_a_byte_order_mark_alone_is_no_document(tmp_path, separator):
    paths = [write(tmp_path / "a", BOM), write(tmp_path / "b", BOM + b"second")]
    source = Files(paths, Text(separator))
    assert documents(source, CUTS) == ["second"]
    assert [piece.start for piece in source.pieces(0, CUTS)] == [FILE]


# ---------------------------------------------------------------- documents of a text


def split_whole(text: str, separator: str) -> list[str]:
    """What `document_separator` means, said of a whole text."""
    if separator == "blank_line":
        text = re.sub(r"\A([ \t\r]*\n)+", "", text)
        parts = re.split(r"\r?\n(?:[ \t\r]*\n)+", text)
    else:
        parts = text.split(separator.replace("\\n", "\n").replace("\\t", "\t"))
    return [part for part in parts if part and not part.isspace()]


@pytest.mark.parametrize(
    ("separator", "text", "expected"),
    [
        ("blank_line", "a\nb\n\nc", ["a\nb", "c"]),
        ("blank_line", "a\r\nb\r\n\r\nc\r\n", ["a\r\nb", "c\r\n"]),
        ("blank_line", "a\n \t \nb\n  \r\n\n \n  c d\n", ["a", "b", "  c d\n"]),
        ("blank_line", "\n\n  \n\ta\n\nb\n\n\n", ["\ta", "b"]),
        ("blank_line", "a\n\n\x0c\n\n\u3000\u0085\n\nb", ["a", "b"]),
        ("blank_line", "a\n  ", ["a\n  "]),
        ("blank_line", "a\rb\r\rc", ["a\rb\r\rc"]),
        ("blank_line", " \n\n\t\n", []),
        ("blank_line", "no such line\nat all\n", ["no such line\nat all\n"]),
        (EOS, f"a\n{EOS}b{EOS}{EOS} \n{EOS}c<|endoftext|\n", ["a\n", "b", "c<|endoftext|\n"]),
        ("\\n---\\n", "a---b\n---\n---\nc\n--- \n---\n", ["a---b", "---\nc\n--- "]),
        ("\\n---\\n", "a\r\n---\r\nb", ["a\r\n---\r\nb"]),
        ("\\n", "one\n\ntwo\r\n \n three", ["one", "two\r", " three"]),
        ("\\t", "one\ttwo\t", ["one", "two"]),
        (".", "a.b|.c", ["a", "b|", "c"]),
        ("\u6f22\u5b57", "\u6f22\u6f22\u5b57\u5b57\u6f22\u5b57z", ["\u6f22", "\u5b57", "z"]),
    ],
)  # fmt: skip
def test_separators_stand_between_documents(tmp_path, piece_chars, separator, text, expected):
    assert split_whole(text, separator) == expected
    for n, content in enumerate((text.encode(), BOM + text.encode())):
        source = Files([write(tmp_path / f"{n}.txt", content)], Text(separator))
        assert documents(source, CUTS) == expected
        pieces = check_restarts(source, CUTS)
        # All pieces of a document have its position.
        ends = [n for n, piece in enumerate(pieces, 1) if piece.ends_document]
        for first, end in itertools.pairwise([0, *ends]):
            assert len({piece.start for piece in pieces[first:end]}) == 1
        assert len({piece.start for piece in pieces}) == len(ends)


SEPARATORS = ["blank_line", "\\n", EOS, "\\n---\\n", "ab", "aa", "\u6f22", " ", "\\n\\n"]
PARTS = [
    *"ab  \t\r\n\n-", "\r\n", "\n\n", "\n \n", "---", "\n---\n", EOS, EOS[:5], "\u00e9", "\u6f22",
    "\u00a0", "\x85", "\ufeff", "\0", "x y",
]  # fmt: skip


@many
@given(
    st.lists(st.sampled_from(PARTS), max_size=30).map("".join),
    st.sampled_from(SEPARATORS),
    st.integers(1, 7),
    st.integers(1, 5),
)
def test_documents_are_those_of_splitting_the_whole_text(
    tmp_path_factory, text, separator, block_bytes, piece_chars
):
    path = write(tmp_path_factory.getbasetemp() / "split.txt", text)
    source = Files([path], Text(separator))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", block_bytes)
        patch.setattr(chunking, "PIECE_CHARS", piece_chars)
        expected = split_whole(text.removeprefix("\ufeff"), separator)
        assert documents(source, CUTS) == expected
        check_restarts(source, CUTS)


@many
@given(
    st.lists(st.sampled_from([*map(str.encode, PARTS), b"\xff", b"\xc3", b"\xf0\x9f\x98"])).map(
        b"".join
    ),
    st.sampled_from(["", *SEPARATORS]),
    st.integers(1, 7),
    st.integers(1, 5),
)
def test_replaced_bytes_are_those_of_decoding_the_whole_text(
    tmp_path_factory, content, separator, block_bytes, piece_chars
):
    path = write(tmp_path_factory.getbasetemp() / "replaced.txt", content)
    source = Files([path], Text(separator, "replace"))
    text = content.removeprefix(BOM).decode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", block_bytes)
        patch.setattr(chunking, "PIECE_CHARS", piece_chars)
        expected = split_whole(text, separator) if separator else [text] if text else []
        assert documents(source, CUTS) == expected
        replaced = text.count("\ufffd") - content.count("\ufffd".encode())
        assert source.found["replaced"] == replaced
        check_restarts(source, CUTS)


def test_documents_over_real_block_sizes(tmp_path):
    """A document longer than blocks and pieces; separators far apart, and many in a block."""
    long = "".join(f"{n} words in a line\n" for n in range(20_000))
    texts = [long, "short", *(f"document {n}" for n in range(9_999)), long + "end"]
    for separator, between in (("blank_line", "\n\r\n \n"), (EOS, EOS)):
        path = write(tmp_path / "a.txt", between.join(texts))
        source = Files([path], Text(separator))
        assert documents(source, CUTS) == split_whole(between.join(texts), separator)
        pieces = check_restarts(source, CUTS)
        assert sum(not piece.ends_document for piece in pieces) > 9
        shares = [piece.done for piece in pieces]
        assert shares == sorted(shares) and shares[-1] == 1.0 and shares[0] < 0.3


@pytest.mark.parametrize(("separator", "between"), [("blank_line", "\n\n"), ("<>", "<>")])
def test_white_space_around_a_document_is_kept(tmp_path, piece_chars, separator, between):
    texts = [" " * 150 + "a" + "\t" * 150, "b" + " " * 300]
    source = Files([write(tmp_path / "a.txt", between.join([*texts, " " * 400]))], Text(separator))
    assert documents(source, CUTS) == texts
    check_restarts(source, CUTS)


@pytest.mark.parametrize(("separator", "between"), [("blank_line", "\n\n"), ("<>", "<>")])
def test_white_space_is_held_back_up_to_a_limit(tmp_path, monkeypatch, separator, between):
    """Beyond it, it is a document of its own, wherever blocks end: memory is bounded."""
    monkeypatch.setattr(chunking, "PIECE_CHARS", 99)
    monkeypatch.setattr(files, "BLOCK_BYTES", 17)
    monkeypatch.setattr(sources, "BLANK_DOCUMENT_CHARS", 50)
    blank = sources.BLANK_CHARS + 9  # more than a blank line has
    texts = [" " * 50, " " * blank, "a\n" + " " * blank, "b"]
    source = Files([write(tmp_path / "a.txt", between.join(texts))], Text(separator))
    assert documents(source, CUTS) == texts[1:]
    check_restarts(source, CUTS)


@pytest.mark.parametrize("block_bytes", [1, 4094, 4095, 4096, 4097, 4098, 4099, 4100])
def test_the_longest_blank_line_separates_wherever_blocks_end(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(chunking, "PIECE_CHARS", 1)
    monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
    longest = " " * sources.BLANK_CHARS
    path = write(tmp_path / "a.txt", f"a\r\n{longest}\nb\r\n{longest}\r\n")
    assert documents(Files([path], Text("blank_line")), CUTS) == ["a", f"b\r\n{longest}\r\n"]


def test_much_white_space_takes_little_memory(tmp_path):
    path = write(tmp_path / "a.txt", b"word\n" + b" " * 9_000_000 + b"\nword")
    for separator in ("blank_line", "<>"):
        pieces = Files([path], Text(separator)).pieces(0, CUTS)
        with memory_below(40_000_000):
            first = next(pieces)
            n_chars = len(first.text) + sum(len(piece.text) for piece in pieces)
        assert n_chars == 9_000_010 and first.done < 0.6


def test_text_with_replaced_bytes_is_cut_as_if_it_had_been_decoded_before(tmp_path, piece_chars):
    """Marks in it would be no text to a tokenizer that a cut is tried out with."""
    content = b"one two\xff three \xc3four five \xf0\x9f\x98 six " * 9
    text = content.decode("utf-8", "replace")
    trying = VerifiedCuts(lambda text: list(text.encode("utf-8")))
    for separator, by in itertools.product(["", "six"], [CUTS, trying]):
        pieces, expected = (
            list(Files([write(tmp_path / "a.txt", whole)], Text(separator, errors)).pieces(0, by))
            for whole, errors in ((content, "replace"), (text, "strict"))
        )
        assert [piece.text for piece in pieces] == [piece.text for piece in expected]
        assert len(pieces) > 9 or piece_chars > 7


# ---------------------------------------------------------------- kinds of files

DOCUMENTS = [
    "one", " two words\r\n", "\u6f22\u5b57" * 40, "a\0b", "\ufeffmark \U0001f600", "\n\nlines\n",
    "x" * 99, "q\u2028r\"'\\",
]  # fmt: skip
END = "<|end|>"


def write_text(path, texts):
    return write(path.with_name(f"{path.stem}.txt{path.suffix}"), END.join(texts))


def write_jsonl(path, rows):
    lines = [
        json.dumps(row if isinstance(row, dict) else {"n": n, "text": row}, ensure_ascii=n % 2 > 0)
        for n, row in enumerate(rows)
    ]
    return write(path.with_name(f"{path.stem}.jsonl{path.suffix}"), "\n".join(lines))


def parquet(rows_in_a_group=3, **columns) -> bytes:
    """The content of a Parquet file with these columns."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=rows_in_a_group)
    return sink.getvalue().to_pybytes()


def write_parquet(path, texts, kind=None, rows_in_a_group=3):
    content = parquet(rows_in_a_group, n=range(len(texts)), text=pyarrow.array(texts, kind))
    return write(path.with_name(f"{path.stem}.parquet{path.suffix}"), content)


KINDS = {
    "text": (write_text, lambda folder: Text(END)),
    "jsonl": (write_jsonl, lambda folder: JsonLines("text")),
    "parquet": (write_parquet, lambda folder: Parquet("text", folder / "cache")),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, folder, *parts, suffix="") -> Files:
    """A source of files that hold these documents."""
    write_one, make_reader = KINDS[kind]
    paths = [write_one(folder / f"{n}{suffix}", part) for n, part in enumerate(parts)]
    return Files(paths, make_reader(folder))


@every_packing
@every_kind
def test_every_kind_of_file_gives_its_documents(tmp_path, monkeypatch, kind, suffix):
    monkeypatch.setattr(chunking, "PIECE_CHARS", 9)
    monkeypatch.setattr(files, "BLOCK_BYTES", 4)
    source = make(kind, tmp_path, DOCUMENTS, DOCUMENTS[::-1], ["alone"], suffix=suffix)
    assert documents(source, CUTS) == [*DOCUMENTS, *DOCUMENTS[::-1], "alone"]
    found = {name: source.found[name] for name in ("nul", "replaced", "empty")}
    assert found == {"nul": 2, "replaced": 0, "empty": 0}
    pieces = check_restarts(source, CUTS)
    assert {piece.start // FILE for piece in pieces} == {0, 1, 2}
    shares = [piece.done for piece in pieces]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())


@every_kind
def test_more_rows_than_are_read_at_once(tmp_path, kind):
    texts = [f"row {n}" for n in range(2_345)]
    source = make(kind, tmp_path, texts, texts[:7])
    if kind == "parquet":
        write_parquet(tmp_path / "0", texts, rows_in_a_group=1_500)
    assert documents(source, CUTS) == texts + texts[:7]
    check_restarts(source, CUTS)


@pytest.mark.parametrize(
    "kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
)
def test_every_type_of_text_in_parquet_is_read(tmp_path, kind):
    path = write_parquet(tmp_path / "a", ["a", None, "b", "a", ""], kind)
    source = Files([path], Parquet("text", tmp_path))
    assert documents(source, CUTS) == ["a", "b", "a"]
    assert source.found["empty"] == 2


def test_rows_without_text_are_left_out_and_counted(tmp_path):
    content = b'\n{"text": ""}\n  \n{"text": null}\n{"text": "a"}\n{"text": " "}\n\n'
    source = Files([write(tmp_path / "a.jsonl", content)], JsonLines("text"))
    assert documents(source, CUTS) == ["a", " "]
    assert source.found["empty"] == 5
    assert [piece.start for piece in source.pieces(0, CUTS)] == [
        content.index(b'{"text": "a"'),
        content.index(b'{"text": " "'),
    ]


def test_lines_of_json_end_as_they_like_and_may_begin_with_a_mark(tmp_path):
    content = BOM + b'{"text": "a\\r\\n\\u0000\\ud83d\\ude00"}\r\n' + BOM + b' {"text":"b"}'
    source = Files([write(tmp_path / "a.jsonl", content)], JsonLines("text"))
    assert documents(source, CUTS) == ["a\r\n\0\U0001f600", "b"]
    assert (source.found["nul"], source.found["crlf"]) == (1, 1)
    assert [piece.start for piece in check_restarts(source, CUTS)] == [
        0,
        content.index(b"\r\n") + 2,
    ]


@pytest.mark.parametrize("mark", [b"", BOM])
def test_json_with_bytes_that_are_not_utf8(tmp_path, mark):
    content = mark + b'{"text": "a\xff\\ud800b\xf0\x9f"}\n{"text": "\xe9\\udc01", "\xff": 1}\n'
    path = write(tmp_path / "a.jsonl", content)
    with refused(rf"is not UTF-8: byte 0xff at offset {11 + len(mark)} \(line 1\)\n"):
        documents(Files([path], JsonLines("text")), CUTS)
    source = Files([path], JsonLines("text", "replace"))
    assert documents(source, CUTS) == ["a\ufffd\ufffdb\ufffd", "\ufffd\ufffd"]
    assert source.found["replaced"] == 5
    check_restarts(source, CUTS)


@pytest.mark.parametrize("suffix", ["", ".xz"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", r": no column text\n  set --text_column to one of: none of this file$"),
        (
            '{"body": "x", "n\\nm": 1}',
            r": no column text\n  set --text_column to one of: body, 'n\\nm'$",
        ),
        (
            json.dumps({"k" * 50 + str(n): n for n in range(99)}),
            r": no column text\n  set --text_column to one of: [k0-9, ]{200}$",
        ),
        (
            '{"text": 5}',
            r": column text holds int, not text\n  set --text_column to one that holds text$",
        ),
        ('{"text": ["x"]}', r": column text holds list, not text\n"),
        ('{"text": false}', r": column text holds bool, not text\n"),
        (
            '["text"]',
            r": list instead of an object with columns\n"
            r'  each line must be of the kind \{"text": "the text"\}$',
        ),
        ("null", r": NoneType instead of an object"),
        (
            '{"text": "x"',
            r": not valid JSON: Expecting ',' delimiter\n  mend the line or take it out$",
        ),
        ('{"text": "x"} {"text": "y"}', r": not valid JSON: Extra data\n"),
        ("text", r": not valid JSON: Expecting value\n"),
        ('{"text": "a\tb"}', r": not valid JSON: Invalid control character at\n"),
        ("[" * 100_000, r": not valid JSON: nested too deeply, or a number too long\n"),
        (f'{{"text": {"9" * 9999}}}', r": not valid JSON: nested too deeply, or a number too"),
        (
            '{"text": "a\\ud83d b"}',
            r": half of a surrogate pair, \\ud83d\n"
            r"  mend the line, or put U\+FFFD there: --encoding_errors replace$",
        ),
        (
            b'{"text": "caf\xe9"}',
            r" is not UTF-8: byte 0xe9 at offset 45 \(line 3\)\n  convert it \(iconv",
        ),
    ],
)
def test_a_line_of_json_that_cannot_be_used_is_numbered(tmp_path, line, message, suffix):
    line = line if isinstance(line, bytes) else line.encode()
    path = tmp_path / f"a.jsonl{suffix}"
    write(path, b'{"text": "one"}\n{"text": "two"}\n' + line + b'\n{"text": "three"}\n')
    where = "" if "UTF-8" in message else ", line 3"
    with refused(rf"^\S*a\.jsonl{suffix}{where}{message}"):
        list(Files([path], JsonLines("text")).pieces(0, CUTS))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"body": ["x"], "n\nm": [1]},
            r"^\S*a\.parquet has no column text\n  set --text_column to one of: body, 'n\\nm'$",
        ),
        (
            {"text": [1], "body": ["x"]},
            r"^column text of \S*a\.parquet is no text but int64\n"
            r"  set --text_column to one of: body$",
        ),
        ({"text": [["x"]]}, r"is no text but list\n  set --text_column to one of: none of this f"),
        ({"text": [{"a": "x"}]}, r"is no text but struct\n"),
        ({"text": [b"x"]}, r"is no text but binary\n"),
        ({"text": pyarrow.nulls(3)}, r"is no text but null\n"),
    ],
)
def test_a_column_of_parquet_that_holds_no_text_is_named(tmp_path, columns, message):
    reader = Parquet("text", tmp_path)
    path = write(tmp_path / "a.parquet", parquet(**columns))
    for read in (lambda: list(Files([path], reader).pieces(0, CUTS)), lambda: reader.size(path)):
        with refused(message):
            read()


def damaged_parquet():
    good = parquet(999, text=[f"{n} letters" for n in range(5_000)])
    not_utf8 = pyarrow.array([b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    turned = bytearray(good)
    turned[100:200] = bytes(100)
    return {
        "first byte": good[:1], "half": good[: len(good) // 2], "all but one": good[:-1],
        "end alone": good[-2_000:], "text": b"text " * 99, "a hole in it": bytes(turned),
        "not UTF-8": parquet(text=not_utf8),
    }  # fmt: skip


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("damage", "content"), damaged_parquet().items(), ids=damaged_parquet())
def test_parquet_that_is_damaged_is_named(tmp_path, damage, content, suffix):
    path = write(tmp_path / f"a.parquet{suffix}", content)
    cause = r"'utf-8' codec can't decode" if damage == "not UTF-8" else r"\S"
    with refused(
        rf"^\S*a\.parquet{suffix} is no Parquet file that can be read: {cause}.*\n"
        r"  fetch it again$"
    ):
        list(Files([path], Parquet("text", tmp_path / "cache")).pieces(0, CUTS))


def test_packed_parquet_that_is_damaged_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.xz", ["one"])
    path.write_bytes(path.read_bytes()[:-1])
    with refused(r"^\S*a\.parquet\.xz is damaged or not complete: it ends too early\n  fetch it"):
        list(Files([path], Parquet("text", tmp_path / "cache")).pieces(0, CUTS))


# ---------------------------------------------------------------- several files


def test_each_file_is_a_document(tmp_path, piece_chars):
    texts = ["".join(f"{size} {n} w\n" for n in range(size)) for size in (7, 90, 13)]
    paths = [write(tmp_path / f"{n}.txt", text) for n, text in enumerate(texts)]
    source = Files(paths[::-1], Text())
    assert documents(source, CUTS) == texts[::-1]
    check_restarts(source, CUTS)
    assert source.name == "3 files"
    assert Files(paths[:1], Text()).name == str(paths[0])


def test_key_changes_with_the_files_and_with_what_is_read_of_them(tmp_path):
    path, other = write(tmp_path / "a.txt", "some text"), write(tmp_path / "b.txt", "some text")
    os.utime(other, ns=(path.stat().st_mtime_ns,) * 2)

    def key(paths, *reader):
        return Files(paths, Text(*reader)).key

    before = key([path])
    keys = {
        before, key([other]), key([path, path]), key([path, other]), key([other, path]),
        key([path], "blank_line"), key([path], "", "replace"),
        Files([path], JsonLines("text")).key, Files([path], JsonLines("body")).key,
        Files([path], Parquet("text", tmp_path)).key,
        *(part.key for share in (0.1, 0.2) for part in Files([path], Text()).split(share)),
    }  # fmt: skip
    assert len(keys) == 14 and key([path]) == before
    write(path, "same size")
    os.utime(path, ns=(1, 1))
    assert key([path]) not in keys


def test_fingerprint_is_the_same_where_the_file_is_moved_to(tmp_path):
    """A run goes on with a copy that kept its time; not with one that was changed."""
    path = write(tmp_path / "a.txt", "some text")
    (tmp_path / "moved").mkdir()
    copy = write(tmp_path / "moved" / "a.txt", "some text")
    os.utime(copy, ns=(path.stat().st_mtime_ns,) * 2)
    of_path, of_copy = Files([path], Text()), Files([copy], Text())
    assert of_path.fingerprint == of_copy.fingerprint and of_path.key != of_copy.key
    assert of_path.split(0.1)[0].fingerprint == of_copy.split(0.1)[0].fingerprint
    assert Files([path], Text("\\n")).fingerprint != of_path.fingerprint
    write(copy, "some texts")
    assert Files([copy], Text()).fingerprint != of_path.fingerprint


# ---------------------------------------------------------------- split


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.5, 0.93, 0.999])
@every_packing
def test_split_gives_the_text_once_each(tmp_path, monkeypatch, share, suffix):
    monkeypatch.setattr(chunking, "PIECE_CHARS", 7)
    monkeypatch.setattr(files, "BLOCK_BYTES", 5)
    texts = [
        "".join(f"{name}{n} w\n" for n in range(size)) for name, size in [("a", 97), ("b", 13)]
    ]
    paths = [write(tmp_path / f"{n}.txt{suffix}", text) for n, text in enumerate(texts)]
    train, held_out = Files(paths, Text()).split(share)
    first, second = joined(train.pieces(0, CUTS)), joined(held_out.pieces(0, CUTS))
    whole = "".join(texts)
    assert first + second == whole
    if share > 0.01:  # a share smaller than the last line takes the last word
        assert first.endswith("\n")
    assert first and 0 < len(second) <= max(2 * share * len(whole) + 1, len("w\n"))
    assert len(second) >= share / 2 * len(whole) - len("b13 w\n")
    for part in (train, held_out):
        pieces = check_restarts(part, CUTS)
        assert pieces[-1].ends_document
        shares = [piece.done for piece in pieces]
        assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1


def test_files_with_byte_order_marks_are_split(tmp_path):
    paths = [write(tmp_path / name, BOM + name.encode() * 9) for name in "abc"]
    train, held_out = Files(paths, Text()).split(1 / 3)
    assert documents(train, CUTS) == ["a" * 9, "b" * 9]
    assert documents(held_out, CUTS) == ["c" * 9]


def test_progress_is_that_in_the_part(tmp_path, monkeypatch):
    monkeypatch.setattr(chunking, "PIECE_CHARS", 9)
    monkeypatch.setattr(files, "BLOCK_BYTES", 9)
    paths = [write(tmp_path / name, "some words\n" * 99) for name in "abcd"]
    for part in Files(paths, Text()).split(0.25):
        shares = [piece.done for piece in part.pieces(0, CUTS)]
        assert shares == sorted(shares) and shares[0] < 0.1 and shares[-1] == pytest.approx(1)
        assert shares[len(shares) // 2] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("text", "held_out"),
    [
        ("one two three four", "four"),
        ("one two three four\n", "four\n"),
        ("\u6f22\u5b57\u6f22\u5b57\u6f22z", "\u6f22z"),
        ("abcde", "de"),
    ],
)
@pytest.mark.parametrize("separator", ["", "blank_line"])
def test_split_of_a_single_line_keeps_words_else_characters_whole(
    tmp_path, text, held_out, separator
):
    parts = Files([write(tmp_path / "a.txt", text)], Text(separator)).split(0.37)
    got = [joined(part.pieces(0, CUTS)) for part in parts]
    assert got == [text.removesuffix(held_out), held_out]


@pytest.mark.parametrize(
    ("sizes", "share", "n_train"),
    [
        ((40, 40, 20), 0.2, 80),  # the share is a file
        ((90, 10), 0.12, 90),  # the next file is half the share or more
        ((94, 6), 0.12, 94),
        ((95, 5), 0.12, 90),  # it is not, and this one is more than twice the share
        ((85, 15), 0.1, 85),  # it is not, and this one is no more than that
        ((79, 21), 0.1, 90),
        ((30, 70), 0.1, 90),
        ((5, 90, 5), 0.5, 5),
        ((100,), 0.999, 5),
    ],
)
@every_packing
def test_files_stay_whole_where_the_share_allows_it(tmp_path, sizes, share, n_train, suffix):
    """Lines of five bytes; `n_train` is the rule in the docstring of find_cut, by hand."""
    whole = "".join(f"{n:03d}.\n" for n in range(20))
    assert sum(sizes) == len(whole)
    bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    paths = [
        write(tmp_path / f"{n}.txt{suffix}", whole[first:end])
        for n, (first, end) in enumerate(bounds)
    ]
    train, held_out = Files(paths, Text()).split(share)
    assert joined(train.pieces(0, CUTS)) == whole[:n_train]
    assert joined(held_out.pieces(0, CUTS)) == whole[n_train:]


@pytest.mark.parametrize(
    ("share", "suffix"),
    [*((share, "") for share in (0.02, 0.05, 0.21, 0.5, 0.8, 0.99)), (0.3, ".gz"), (0.3, ".zst")],
)
@every_kind
def test_split_is_between_documents(tmp_path, kind, share, suffix):
    texts = [
        [f"{name}{n} word" for n in range(size)]
        for name, size in zip("abc", (31, 8, 9), strict=True)
    ]
    whole = [text for part in texts for text in part]
    train, held_out = make(kind, tmp_path, *texts, suffix=suffix).split(share)
    first, second = documents(train, CUTS), documents(held_out, CUTS)
    assert first + second == whole
    assert first and len(second) == pytest.approx(share * len(whole), abs=1)
    for part in (train, held_out):
        shares = [piece.done for piece in check_restarts(part, CUTS)]
        assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    assert len({train.key, held_out.key, make(kind, tmp_path, *texts, suffix=suffix).key}) == 3


@pytest.mark.parametrize("search_bytes", [1, 3, sources.SEARCH_BYTES])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
def test_split_is_between_blank_lines(tmp_path, monkeypatch, share, search_bytes):
    monkeypatch.setattr(sources, "SEARCH_BYTES", search_bytes)
    texts = [f"document {n}\nin two lines" for n in range(50)]
    source = Files([write(tmp_path / "a.txt", "\n \r\n\n".join(texts))], Text("blank_line"))
    first, second = (documents(part, CUTS) for part in source.split(share))
    assert first + second == texts
    assert len(second) == pytest.approx(share * len(texts), abs=1)


@pytest.mark.parametrize(
    ("separator", "first", "second"),
    [(END, "aaaaaaaaaa", "b"), ("\n---\n", "aaaa bbbb cccc dddd", "b"), (" - ", "a" * 9, "b")],
)
def test_a_separator_is_never_cut_in_two(tmp_path, separator, first, second):
    """What is behind it is less than half of the share; the share begins in it or before it."""
    path = write(tmp_path / "a.txt", first + separator + second)
    for share in (0.25, 0.3, 0.35, 0.4, 0.45):
        parts = Files([path], Text(separator)).split(share)
        got = [document for part in parts for document in documents(part, CUTS)]
        assert "".join(got) == first + second, share


@many
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=3),
    st.floats(0.001, 0.999),
    st.sampled_from([*KINDS]),
)
def test_no_split_loses_text_or_leaves_nothing_to_train_on(tmp_path_factory, sizes, share, kind):
    folder = tmp_path_factory.mktemp("split")
    letters = itertools.cycle("abcdefg hijklm\nopq")
    texts = [[f"x{''.join(itertools.islice(letters, n))}." for n in part] for part in sizes]
    train, held_out = make(kind, folder, *texts).split(share)
    first, second = documents(train, CUTS), documents(held_out, CUTS)
    whole = [text for part in texts for text in part]
    assert first
    if kind == "text" and first + second != whole:  # one document was cut in two
        n = len(first)
        whole[n - 1 : n] = [whole[n - 1][: len(first[-1])], whole[n - 1][len(first[-1]) :]]
    assert first + second == whole
    if kind != "text":
        assert second or len(whole) == 1


def test_a_share_that_begins_with_a_document_is_exact(tmp_path):
    lines = "".join(f'{{"text": "{n}"}}\n' for n in range(8))
    for path, reader in (
        (write(tmp_path / "a.jsonl", lines), JsonLines("text")),
        (write(tmp_path / "a.txt", "".join(f"{n}<>" for n in range(8))), Text("<>")),
        (write(tmp_path / "b.txt", "".join(f"{n}\n\n" for n in range(8))), Text("blank_line")),
        (write_parquet(tmp_path / "a", [str(n) for n in range(8)]), Parquet("text", tmp_path)),
    ):
        train, held_out = Files([path], reader).split(0.25)
        assert documents(train, CUTS) == [*"012345"] and documents(held_out, CUTS) == [*"67"]


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize(("n_files", "share"), [(2, 0.5), (4, 0.25), (4, 0.75)])
def test_a_share_that_begins_with_a_file_is_exact(tmp_path, kind, n_files, share):
    texts = [["one document.", "and another."] for _ in range(n_files)]
    train, held_out = make(kind, tmp_path, *texts).split(share)
    n_held_out = 2 * int(n_files * share)
    whole = [text for part in texts for text in part]
    assert documents(train, CUTS) == whole[:-n_held_out]
    assert documents(held_out, CUTS) == whole[-n_held_out:]


@pytest.mark.parametrize("text", ["ab", "a\u6f22", "\u6f22"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_something_is_left_to_train_on_behind_a_byte_order_mark(tmp_path, text, share):
    parts = Files([write(tmp_path / "a.txt", BOM + text.encode())], Text()).split(share)
    first, second = (joined(part.pieces(0, CUTS)) for part in parts)
    assert first and first + second == text


# ---------------------------------------------------------------- Python's own files


def test_python_sources_are_the_same_twice_disjoint_and_without_tests():
    (train, held_out), again = python_sources(), python_sources()
    assert [part.paths for part in again] == [train.paths, held_out.paths]
    assert [part.key for part in again] == [train.key, held_out.key]
    assert train.key != held_out.key
    assert not {*train.paths} & {*held_out.paths}
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in train.paths + held_out.paths]
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not [name for name in names if left_out & {*name.parts}]
    assert pathlib.Path("argparse.py") in names and len(names) > 200
    assert 0.02 < len(held_out.paths) / len(names) < 0.1
    assert train.name == f"Python's own source files ({root})"


def test_a_python_source_file_is_a_document():
    _, source = python_sources()
    source.paths = source.paths[:7]
    texts = [path.read_bytes().decode("utf-8-sig", "replace") for path in source.paths]
    assert documents(source, CUTS) == texts
    starts = [piece.start for piece in source.pieces(0, CUTS)]
    assert {*range(7)} == {start // FILE for start in starts}
    pieces = [piece for piece in source.pieces(0, CUTS) if piece.start >= 4 * FILE]
    assert [piece[:3] for piece in source.pieces(4 * FILE, CUTS)] == [p[:3] for p in pieces]


# ---------------------------------------------------------------- settings -> sources


@pytest.fixture
def two_files(tmp_path):
    text = "".join(f"line {n}\n" for n in range(40))
    return text, str(write(tmp_path / "a.txt", text)), str(write(tmp_path / "b.txt", "other\n"))


def open_texts(folder, **settings) -> list[str | None]:
    parts = open_sources(TrainConfig(**settings), folder)
    return [part and joined(part.pieces(0, CUTS)) for part in parts]


def test_open_sources_holds_out_the_share_asked_for(two_files, tmp_path):
    text, path, other = two_files
    parts = open_texts(tmp_path, train_file=(path,), validation_share=0.25)
    assert parts == [text[:-72], text[-72:]]
    assert open_texts(tmp_path, train_file=(path,), validation_share=0.0) == [text, None]
    assert open_texts(tmp_path, train_file=(path,), validation_file=(other,)) == [text, "other\n"]


def test_open_sources_of_the_embedded_text(two_files, tmp_path):
    _, _, other = two_files
    expected = python_sources()
    for changes, held_out in (
        ({}, expected[1].key),
        ({"validation_file": (other,)}, Files([pathlib.Path(other)], Text()).key),
        ({"validation_share": 0.0}, None),
    ):
        parts = open_sources(TrainConfig(dataset=EMBEDDED_DATASET, **changes), tmp_path)
        assert [part and part.key for part in parts] == [expected[0].key, held_out]


@pytest.mark.parametrize(("ending", "takes_effect"), [("jsonl", True), ("txt", False)])
def test_a_column_of_the_validation_file_beside_the_embedded_text(tmp_path, ending, takes_effect):
    path = str(write(tmp_path / f"a.{ending}", '{"body": "one"}'))
    flags = ["--dataset", EMBEDDED_DATASET, "--validation_file", path, "--text_column", "body"]
    config = load_config(flags)
    if takes_effect:
        assert documents(open_sources(config, tmp_path)[1], CUTS) == ["one"]
    else:
        with refused(r"^text_column has no effect on files of kind text\n  leave it out, or name"):
            open_sources(config, tmp_path)


@pytest.mark.parametrize("kind", [*KINDS, "bin"])
def test_files_of_every_kind_are_trained_and_evaluated_on(tmp_path, two_files, kind):
    _, text, _ = two_files
    if kind == "bin":
        path, expected = write(tmp_path / "a.bin", bytes(64)), None  # ids: no text at all
    else:
        path, expected = KINDS[kind][0](tmp_path / "b", ["one", "two"]), ["one", "two"]
    shaping = {"document_separator": END} if kind == "text" else {}
    files = {"train_file": (text,), "validation_file": (str(path),)}
    for setting in (files, {"train_file": (str(path),), "validation_file": (text,)}):
        train, held_out = open_sources(TrainConfig(**setting, **shaping), tmp_path)
        wanted = held_out if setting is files else train
        assert (wanted and documents(wanted, CUTS)) == expected
    alone, held_out = open_sources(TrainConfig(train_file=(str(path),)), tmp_path)
    assert (alone is None) is (held_out is None) is (kind == "bin")


def test_settings_reach_the_reader(tmp_path):
    body, replaced = {"text_column": "body"}, {"encoding_errors": "replace"}
    text = write(tmp_path / "a.txt", b"one\xff\n\ntwo")
    jsonl = write(tmp_path / "a.jsonl", b'{"body": "one\xff"}')
    for path, changes, expected in (
        (text, {"document_separator": "blank_line"} | replaced, ["one\ufffd", "two"]),
        (jsonl, body | replaced, ["one\ufffd"]),
        (write(tmp_path / "a.parquet", parquet(body=["one"])), body, ["one"]),
    ):
        config = TrainConfig(train_file=(str(path),), validation_share=0.0, **changes)
        assert documents(open_sources(config, tmp_path)[0], CUTS) == expected


@pytest.mark.parametrize(
    ("train", "held_out", "setting", "match"),
    [
        ("txt", "", {"text_column": "x"}, r"text\n  leave it out, .* files \.jsonl or \.parquet$"),
        ("-", "", {"text_column": "x"}, r"text\n"),
        ("bin", "", {"text_column": "x"}, r"bin\n"),
        ("bin", "txt", {"text_column": "x"}, r"bin, text\n"),
        ("bin", "jsonl", {"text_column": "x"}, None),
        ("jsonl", "", {"document_separator": "x"}, r"jsonl\n  leave it out, or .* files \.txt$"),
        ("jsonl", "txt", {"document_separator": "x"}, None),
        ("parquet", "", {"encoding_errors": "replace"}, r"parquet\n.* files \.txt or \.jsonl$"),
        ("jsonl", "", {"encoding_errors": "replace"}, None),
        ("bin", "", {"add_eos": False}, r"bin\n.* files \.txt or \.jsonl or \.parquet$"),
        ("bin", "txt", {"add_eos": False}, None),
        ("bin", "", {"streaming": True}, r"bin\n.* files \.txt or \.jsonl or \.parquet$"),
        ("bin", "txt", {"streaming": True}, r"bin\n"),
        ("txt", "bin", {"streaming": True}, None),
        ("", "bin", {"document_separator": "x"}, r"bin\n  leave it out, or .* files \.txt$"),
        ("", "parquet", {"encoding_errors": "replace"}, r"parquet\n"),
        ("", "txt", {"encoding_errors": "replace", "text_column": "x", "streaming": True}, None),
    ],
)
def test_a_setting_that_could_not_take_effect_is_refused(
    tmp_path, train, held_out, setting, match
):
    for ending in ("txt", "jsonl", "bin", "parquet"):
        write(tmp_path / f"a.{ending}", "some")

    def patterns(ending):
        return {"": (), "-": ("-",)}.get(ending, (str(tmp_path / f"a.{ending}"),))

    config = TrainConfig(train_file=patterns(train), validation_file=patterns(held_out), **setting)
    if match is None:
        sources.check_options(config)
    else:
        with refused(rf"^{next(iter(setting))} has no effect on files of kind {match}"):
            open_sources(config, tmp_path)


# ---------------------------------------------------------------- standard input


@pytest.fixture
def stdin(monkeypatch):
    """Put bytes into standard input: a pipe, which can be read once."""
    with contextlib.ExitStack() as opened:

        def put(content: bytes):
            read, written = os.pipe()
            with open(written, "wb") as file:
                file.write(content)
            pipe = opened.enter_context(open(read, encoding="utf-8"))
            monkeypatch.setattr(sys, "stdin", pipe)

        yield put


def test_standard_input_is_read_once_and_its_text_many_times(stdin, tmp_path):
    text = "".join(f"line {n}\n" for n in range(40))
    folder = tmp_path / "cache"
    stdin(text.encode())
    config = TrainConfig(train_file=("-",), validation_share=0.25, document_separator="\\n")
    train, held_out = open_sources(config, folder)
    assert documents(train, CUTS) + documents(held_out, CUTS) == text.splitlines()
    assert 0.2 * 40 < len(documents(held_out, CUTS)) <= 0.25 * 40
    assert train.name == held_out.name == "standard input" and list(folder.iterdir()) == []
    for part in (train, held_out):
        check_restarts(part, CUTS)
    stdin(text.encode())
    again = open_sources(config, folder)
    assert [part.key for part in again] == [train.key, held_out.key]
    stdin(text.encode() + b"more")
    assert open_sources(config, folder)[0].key != train.key
    stdin(b"caf\xe9")
    train, _ = open_sources(TrainConfig(train_file=("-",), validation_share=0.0), folder)
    with refused(r"^standard input is not UTF-8: byte 0xe9 at offset 3 \(line 1\)\n"):
        documents(train, CUTS)


def test_standard_input_that_is_empty_is_refused(stdin, tmp_path):
    stdin(b"")
    with refused(r"^train_file - is empty: standard input gave 0 bytes$"):
        open_sources(TrainConfig(train_file=("-",)), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_file": ("-", "-")}, "must be the only train_file"),
        ({"train_file": ("-", "a.txt")}, "must be the only train_file"),
        ({"train_file": ("a.txt",), "validation_file": ("-",)}, "is no validation_file"),
        ({"train_file": ("-",), "validation_file": ("-",)}, "is no validation_file"),
        ({"validation_file": ("-",)}, "is no validation_file"),
        (
            {"train_file": ("-",), "streaming": True},
            r"^train_file - cannot be streamed: .*\n  leave out --streaming, or put the text into",
        ),
    ],
)
def test_standard_input_where_it_cannot_be_is_refused(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(sys, "stdin", None)
    with refused(message):
        open_sources(TrainConfig(**settings), tmp_path)


def test_the_command_reads_a_pipe(tmp_path):
    process = subprocess.run(
        [
            sys.executable, "scripts/train.py", "--train_file", "-", "--show_data", "1",
            "--tokenizer", "bytes", "--block_size", "8", "--shuffle", "no",
            "--document_separator", "blank_line", "--validation_share", "0",
            "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out",
        ],
        cwd=ROOT, input="one\n\ntwo lines", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == (
        "training text: 2 documents, 14 tokens, 12 bytes, 0.857 bytes per token\n"
        "rows: 1 of 8 tokens, each a target once an epoch; 5 tokens at the end are left over\n"
        "\n"
        "row 0: 111 110 101 256 116 119 111 32 108\n"
        '  a document begins: "one<|endoftext|>"\n'
        '  a document begins: "two l"\n'
    )
    assert not (tmp_path / "out").exists()
