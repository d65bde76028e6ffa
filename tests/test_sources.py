"""Text comes in pieces that are the text: same ids, same order, again from any piece on."""

import itertools
import pathlib
import random
import sysconfig
import tracemalloc

import datasets
import numpy as np
import pytest

from gpt2_flax.config import EMBEDDED_DATASET, TrainConfig
from gpt2_flax.data import sources
from gpt2_flax.data.sources import Rows, TextFiles, find_files, open_sources, python_sources
from gpt2_flax.data.tokenizers import EOS, make_tokenizer
from gpt2_flax.errors import UserError

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared/data"

# Everything that the rule of byte-level BPE treats in its own way, or that Python and the
# tokenizers could disagree about: which characters are white space, above all.
ALPHABET = [
    *"ab'.,7\n\n\n    \t\r\0", "\r\n", "\n\n", "  ", "'s", "'ll", "12", "the", " the", "\u00e9",
    "e\u0301", "\u00a0", "\u3000", "\u0085", "\u2028", "\u1680", "\u180e", "\u200b", "\ufeff",
    "\x0b", "\x0c", "\x1c", "\x1f", "\u65e5\u672c", "\U0001f600", "\U0001f469\u200d\U0001f680",
    EOS,
]  # fmt: skip


def fuzz(seed: int, n: int = 700) -> str:
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
    **{f"fuzz {seed}": fuzz(seed) for seed in range(6)},
}
every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def joined(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def documents(source) -> list[str]:
    """The texts that a source's ends of documents separate."""
    texts = [""]
    for piece in source.pieces():
        texts[-1] += piece.text
        if piece.ends_document:
            texts.append("")
    assert texts.pop() == ""
    return texts


@pytest.fixture(params=[1, 2, 7, 64])
def piece_chars(request, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARS", request.param)
    return request.param


@pytest.fixture(scope="module", params=["bytes", "bpe:700"])
def tokenizer(request):
    """`bpe:700` has merges across every kind of white space, so a wrong cut changes ids."""
    return make_tokenizer(request.param, [*TEXTS.values(), fuzz(99, 20_000)])


# ---------------------------------------------------------------- pieces


@every_text
def test_pieces_joined_are_the_text(tmp_path, piece_chars, text):
    source = TextFiles([write(tmp_path / "a.txt", text)])
    pieces = list(source.pieces())
    assert joined(pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    starts = [0, *itertools.accumulate(len(piece.text.encode()) for piece in pieces)]
    assert [*(piece.start for piece in pieces), source.size] == starts


@every_text
def test_ids_of_the_pieces_are_the_ids_of_the_text(tmp_path, piece_chars, tokenizer, text):
    path = write(tmp_path / "a.txt", text)
    pieces = [piece.text for piece in TextFiles([path]).pieces()]
    if text.startswith("line"):  # a test of cuts needs cuts
        assert len(pieces) > 9
    expected = tokenizer.encode(text)
    np.testing.assert_array_equal(np.concatenate(tokenizer.encode_batch(pieces)), expected)
    rows = [piece.text for piece in sources.cut_up(text, 0, True)]
    np.testing.assert_array_equal(np.concatenate(tokenizer.encode_batch(rows)), expected)


@every_text
def test_pieces_from_any_piece_on_are_the_same_pieces(tmp_path, piece_chars, text):
    source = TextFiles([write(tmp_path / "a.txt", text)])
    pieces = list(source.pieces())
    for n in {0, 1, len(pieces) // 3, len(pieces) // 2, len(pieces) - 1} & {*range(len(pieces))}:
        assert list(source.pieces(pieces[n].start)) == pieces[n:]


def test_a_text_without_white_space_is_cut_where_reading_it_again_cuts_it(tmp_path, monkeypatch):
    """Such a cut changes a pair of ids: a resumed run has to make it at the same letter."""
    monkeypatch.setattr(sources, "PIECE_CHARS", 8)
    monkeypatch.setattr(sources, "LONGEST_PIECE_CHARS", 50)
    text = "some words, then " + "\u6f22" * 133 + " and " + "y" * 49 + " z" + "x" * 50
    source = TextFiles([write(tmp_path / "a.txt", text)])
    pieces = list(source.pieces())
    assert joined(pieces) == text
    lengths = [len(piece.text) for piece in pieces]
    assert max(lengths) == 50 and lengths.count(50) == 4
    for n, piece in enumerate(pieces):
        assert list(source.pieces(piece.start)) == pieces[n:]
    assert [piece.text for piece in sources.cut_up(text, 0, True)] == [p.text for p in pieces]


def test_a_giant_line_comes_in_pieces_of_a_bounded_size(tmp_path):
    text = "words before " + "gi\u00e4nt" * 520_001
    pieces = list(TextFiles([write(tmp_path / "a.txt", text)]).pieces())
    assert joined(pieces) == text
    assert max(len(piece.text) for piece in pieces) == sources.LONGEST_PIECE_CHARS


def test_a_giant_line_takes_little_memory(tmp_path):
    """30 MB, and a few times the longest piece of 1 MB to read them, even to place a fault."""
    path = tmp_path / "a.txt"
    with open(path, "wb") as file:
        for _ in range(30):
            file.write(b"x" * 1_000_000)
        file.write(b"\xff")
    pieces = TextFiles([path]).pieces()
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="offset 30000000 "):
            for piece in pieces:
                assert len(piece.text) <= sources.LONGEST_PIECE_CHARS
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000


def test_line_ends_nul_and_inner_byte_order_marks_are_kept(tmp_path, piece_chars):
    text = "one\r\ntwo\x00three\rfour \ufeff five\ufeff\n"
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.encode())
    source = TextFiles([path])
    pieces = list(source.pieces())
    assert joined(pieces) == text
    for n, piece in enumerate(pieces):
        assert list(source.pieces(piece.start)) == pieces[n:]


def test_a_byte_order_mark_behind_a_forced_cut_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARS", 4)
    monkeypatch.setattr(sources, "LONGEST_PIECE_CHARS", 8)
    text = "12345678\ufeffabcdefg"
    assert documents(TextFiles([write(tmp_path / "a.txt", text)])) == [text]


def test_a_byte_order_mark_alone_is_an_empty_document(tmp_path):
    bom = b"\xef\xbb\xbf"
    paths = [write(tmp_path / "a", bom), write(tmp_path / "b", bom + b"second")]
    assert documents(TextFiles(paths)) == ["", "second"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared: WikiText-2, GPT-2's tokenizer")
def test_gpt2s_ids_of_wikitext_are_the_ids_of_its_pieces(tmp_path):
    text = (SHARED / "wikitext-2/valid.txt").read_bytes()[:300_000].decode("ascii", "replace")
    pieces = [piece.text for piece in TextFiles([write(tmp_path / "a.txt", text)]).pieces()]
    assert len(pieces) > 4
    gpt2 = make_tokenizer(str(SHARED / "gpt2-tokenizer"), [])
    np.testing.assert_array_equal(np.concatenate(gpt2.encode_batch(pieces)), gpt2.encode(text))


# ---------------------------------------------------------------- several files, split


@pytest.fixture
def three_files(tmp_path):
    texts = [
        "".join(f"{name}{n} w\n" for n in range(size))
        for name, size in zip("abc", (7, 90, 13), strict=True)
    ]
    return texts, [write(tmp_path / f"{n}.txt", text) for n, text in enumerate(texts)]


def test_each_file_is_a_document(three_files, piece_chars):
    texts, paths = three_files
    source = TextFiles(paths[::-1])
    assert documents(source) == texts[::-1]
    pieces = list(source.pieces())
    assert source.size == sum(map(len, texts))
    for n in range(0, len(pieces), 5):
        assert list(source.pieces(pieces[n].start)) == pieces[n:]


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.5, 0.93, 0.999])
def test_split_gives_the_lines_once_each(three_files, piece_chars, share):
    texts, paths = three_files
    whole = "".join(texts)
    train, held_out = TextFiles(paths).split(share)
    first, second = joined(train.pieces()), joined(held_out.pieces())
    assert first + second == whole
    assert (train.size, held_out.size) == (len(first), len(second))
    assert train.key != held_out.key != TextFiles(paths).key
    if share > 0.01:  # a share smaller than the last line takes the last word
        assert first.endswith("\n")
    assert 0 < len(second) <= max(share * len(whole) + 1, len("w\n"))
    assert len(second) >= share * len(whole) - len("c13 w\n")
    for part in (train, held_out):
        pieces = list(part.pieces())
        assert pieces[0].start == 0 and pieces[-1].ends_document
        assert list(part.pieces(pieces[-1].start)) == pieces[-1:]


@pytest.mark.parametrize(
    ("text", "held_out"),
    [
        ("one two three four", "four"),
        ("one two three four\n", "four\n"),
        ("\u6f22\u5b57\u6f22\u5b57\u6f22z", "\u6f22z"),
        ("abcde", "de"),
    ],
)
def test_split_of_a_single_line_keeps_words_else_characters_whole(tmp_path, text, held_out):
    parts = TextFiles([write(tmp_path / "a.txt", text)]).split(0.37)
    assert [joined(part.pieces()) for part in parts] == [text.removesuffix(held_out), held_out]


def test_key_changes_with_the_files(tmp_path):
    path = write(tmp_path / "a.txt", "some text")
    before = TextFiles([path]).key
    assert TextFiles([path]).key == before
    write(path, "same size")
    sources.os.utime(path, ns=(1, 1))
    assert TextFiles([path]).key != before
    assert TextFiles([path, path]).key != TextFiles([path]).key


# ---------------------------------------------------------------- which files


def test_files_come_in_the_order_given_and_each_once(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c.md", "d[1].txt"):
        write(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find_files(("c.md", "*.txt", "./a.txt", "c.md", "d[1].txt"), "train_file")
    assert [str(path) for path in found] == ["c.md", "a.txt", "b.txt", "d[1].txt"]
    assert find_files(("~/c.md",), "train_file") == [tmp_path / "c.md"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none.txt", r"^train_file none.txt does not exist \(looked in .*work\)"),
        ("*.none", r"^train_file \*.none does not exist"),
        ("~nobody-of-that-name/a.txt", r"^train_file ~nobody-of-that-name/a.txt does not exist"),
        ("n" * 5000, r"^train_file n* does not exist"),
        ("folder", r"folder is a directory\n  name its files: --train_file 'folder/\*.txt'"),
        ("empty.txt", r"^train_file empty.txt is empty \(0 bytes\)"),
    ],
    ids=["missing", "glob", "home of nobody", "name too long", "directory", "empty"],
)
def test_files_that_cannot_be_trained_on_are_named(tmp_path, monkeypatch, pattern, message):
    work = tmp_path / "work"
    (work / "folder").mkdir(parents=True)
    write(work / "empty.txt", "")
    monkeypatch.chdir(work)
    with pytest.raises(UserError, match=message):
        find_files((pattern,), "train_file")


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    """The superuser may read everything, so the answer of the system is made up."""
    path = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(sources.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"validation_file .*a.txt may not be read by this user"):
        find_files((str(path),), "validation_file")


def test_a_file_that_vanishes_is_named(tmp_path):
    source = TextFiles([write(tmp_path / "a.txt", "text")])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a.txt: No such file or directory"):
        list(source.pieces())


USUAL = sources.PIECE_CHARS
NOT_UTF8 = {
    "latin1": (b"caf", b"\xe9 au lait\n", [1, 2, 3, 5, USUAL]),
    "last": (b"one\ntwo\n\n", b"\xff", [1, 2, 3, 5, USUAL]),
    "behind a mark": (b"\xef\xbb\xbfone\r\n", b"\x80 two", [1, 2, 3, 5, USUAL]),
    "truncated": ("\u6f22\n".encode() * 33_333, b"\xf0\x9f\x98", [USUAL]),
    "truncated in a line": ("\u6f22\n".encode() * 33_333, b"\xe6\xbc\n", [USUAL]),
    "over two blocks": (b"x" * (USUAL - 1), b"\xe6\xbcxyz", [USUAL]),
    "far": (b"word\n" * 300_000, b"\xc0\xafmore\n", [USUAL]),
}


@pytest.mark.parametrize(
    ("name", "block"), [(name, block) for name in NOT_UTF8 for block in NOT_UTF8[name][2]]
)
def test_bytes_that_are_not_utf8_are_placed(tmp_path, monkeypatch, name, block):
    before, bad, _ = NOT_UTF8[name]
    monkeypatch.setattr(sources, "PIECE_CHARS", block)
    path = write(tmp_path / "a.txt", before + bad)
    offset, line = len(before), before.count(b"\n") + 1
    place = f"byte 0x{bad[0]:02x} at offset {offset} \\(line {line}\\)\n  convert it: iconv "
    with pytest.raises(UserError, match=rf"a.txt is not UTF-8: {place}"):
        list(TextFiles([path]).pieces())


# ---------------------------------------------------------------- rows of a dataset

ARTICLES = [
    ["", " = Alpha = \n", "", " The first one . \n", " = = History = = \n", " x = y = z \n"],
    [" = Beta Gamma = \n", None, "", " = = = Deep = = = \n", " = \n", " = = \n"],
    [" = D = E = \n", " last \n", ""],
]


LINES = [line for article in ARTICLES for line in article]


def make_rows(texts: list, name: str = "Salesforce/wikitext wikitext-2-raw-v1") -> Rows:
    return Rows(
        datasets.Dataset.from_dict({"n": [*range(len(texts))], "body": texts}), name, "body"
    )


def test_an_article_of_wikitext_is_a_document(piece_chars):
    rows = make_rows(LINES)
    assert documents(rows) == ["".join(filter(None, article)) for article in ARTICLES]


def test_a_row_of_another_dataset_is_a_document(piece_chars):
    assert documents(make_rows(LINES, "someone/stories")) == [line for line in LINES if line]


@pytest.mark.parametrize("name", ["Salesforce/wikitext", "someone/stories"])
def test_rows_can_be_read_on_from_any_piece(monkeypatch, name):
    """Over more rows than are fetched at once, some cut up, with a piece's row as its start."""
    monkeypatch.setattr(sources, "PIECE_CHARS", 9)
    texts = LINES * 151
    texts[996:1003] = [None, "", None, " = End of a fetch = \n", "", None, "after it\n"]
    rows = make_rows(texts, name)
    pieces = list(rows.pieces())
    assert joined(pieces) == "".join(filter(None, texts))
    assert rows.size == len(texts) > 2000
    for start in (0, 1, 5, 950, 995, 999, 1002, 1003, 1999, 2000, 2001, rows.size - 1, rows.size):
        rest = [piece for piece in pieces if piece.start >= start]
        assert list(rows.pieces(start)) == rest


@pytest.mark.parametrize("share", [0.1, 0.5, 0.83])
def test_split_gives_the_rows_once_each(share):
    texts = [f"row {n}\n" for n in range(23)]
    whole = make_rows(texts)
    train, held_out = whole.split(share)
    assert joined(train.pieces()) + joined(held_out.pieces()) == "".join(texts)
    assert train.size + held_out.size == 23 and held_out.size == round(23 * share + 0.49)
    assert len({whole.key, train.key, held_out.key}) == 3
    (first, *_), (again, *_) = held_out.pieces(), held_out.pieces(2)
    assert (first.start, again.start) == (0, 2)


# ---------------------------------------------------------------- Python's own files


def test_python_sources_are_the_same_twice_disjoint_and_without_tests():
    (train, held_out), again = python_sources(), python_sources()
    assert [part.files for part in again] == [train.files, held_out.files]
    assert [part.key for part in again] == [train.key, held_out.key]
    assert train.key != held_out.key
    assert not {*train.files} & {*held_out.files}
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in train.files + held_out.files]
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not [name for name in names if left_out & {*name.parts}]
    assert pathlib.Path("argparse.py") in names and len(names) > 200
    assert 0.02 < len(held_out.files) / len(names) < 0.1


def test_a_python_source_file_is_a_document():
    _, source = python_sources()
    source.files = source.files[:7]
    texts = [path.read_text("utf-8", errors="replace") for path in source.files]
    assert documents(source) == texts
    pieces = list(source.pieces())
    assert list(source.pieces(4)) == [piece for piece in pieces if piece.start >= 4]


# ---------------------------------------------------------------- settings -> sources


@pytest.fixture
def two_files(tmp_path):
    text = "".join(f"line {n}\n" for n in range(40))
    return text, str(write(tmp_path / "a.txt", text)), str(write(tmp_path / "b.txt", "other\n"))


def test_open_sources_holds_out_the_share_asked_for(two_files):
    text, path, other = two_files
    parts = open_sources(TrainConfig(train_file=(path,), validation_share=0.25))
    assert [joined(part.pieces()) for part in parts] == [text[:-72], text[-72:]]
    train, held_out = open_sources(TrainConfig(train_file=(path,), validation_share=0.0))
    assert joined(train.pieces()) == text and held_out is None
    parts = open_sources(TrainConfig(train_file=(path,), validation_file=(other,)))
    assert [joined(part.pieces()) for part in parts] == [text, "other\n"]


def test_open_sources_of_the_embedded_text(two_files):
    _, _, other = two_files
    expected = python_sources()
    parts = open_sources(TrainConfig(dataset=EMBEDDED_DATASET))
    assert [part.key for part in parts] == [part.key for part in expected]
    train, held_out = open_sources(TrainConfig(dataset=EMBEDDED_DATASET, validation_file=(other,)))
    assert train.key == expected[0].key and joined(held_out.pieces()) == "other\n"


@pytest.fixture
def hub(monkeypatch):
    """Datasets by (name, configuration), in place of the hub."""
    stored = {}

    def load_dataset(name, subset):
        if (name, subset) not in stored:
            raise ConnectionError(f"Couldn't reach {name}\nand a page more")
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(table)
                for split, table in stored[name, subset].items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return stored


def test_open_sources_of_a_dataset(hub):
    train, valid = {"text": ["a\n", " = B = \n", "c\n"]}, {"text": ["v\n"]}
    hub["Salesforce/wikitext", "wikitext-2-raw-v1"] = {"train": train, "validation": valid}
    hub["someone/stories", None] = {"train": {"body": ["one", "two", "three", "four"]}}
    parts = open_sources(TrainConfig())
    assert [documents(part) for part in parts] == [["a\n", " = B = \nc\n"], ["v\n"]]
    config = TrainConfig(dataset="someone/stories", text_column="body", validation_share=0.25)
    parts = open_sources(config)
    assert [documents(part) for part in parts] == [["one", "two", "three"], ["four"]]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("a/test", r"^dataset a/test has no train split; it has test, validation"),
        ("a/body", r"^dataset a/body has no column text\n  set --text_column to one of n, body"),
        ("a/numbers", r"^column text of dataset a/numbers is no text but int64"),
        ("a/lists", r"^column text of dataset a/lists is no text but a list"),
        ("a/none", r"(?s)^dataset a/none: the hub .* cannot be reached.*--train_file.*quickstart"),
    ],
)
def test_datasets_that_cannot_be_trained_on_are_named(hub, dataset, message):
    hub["a/test", None] = {"test": {"text": ["x"]}, "validation": {"text": ["x"]}}
    hub["a/body", None] = {"train": {"n": [1], "body": ["x"]}}
    hub["a/numbers", None] = {"train": {"text": [1, 2]}}
    hub["a/lists", None] = {"train": {"text": [["x"], ["y"]]}}
    with pytest.raises(UserError, match=message):
        open_sources(TrainConfig(dataset=dataset))


def test_a_hub_that_answers_with_an_error_is_quoted(hub, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match=r"^dataset a/b \(c\): Couldn't reach a/b\n  ways on"):
        open_sources(TrainConfig(dataset="a/b", dataset_config="c"))
