"""Files are found, unpacked and decoded; whatever is wrong with one is said with its place."""

import errno
import os
import pathlib
import random
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_flax.data import files
from gpt2_flax.data.files import Bytes, Spool, decode, find_files, kind_of, n_bytes, unmark
from gpt2_flax.errors import StorageError
from tests.text_fixtures import PACKINGS, refused, write

many = settings(derandomize=True, database=None, deadline=None, max_examples=200)
every_packing = pytest.mark.parametrize("suffix", PACKINGS)

# ---------------------------------------------------------------- finding


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working directory, and home."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work))
    return work


def found(*patterns) -> list[str]:
    return [str(path) for path in find_files(patterns, "train_file")]


def test_files_come_in_the_order_given_and_each_once(work):
    for name in ("b.txt", "a.txt", "c.md", "d[1].txt"):
        write(work / name, name)
    assert found("c.md", "*.txt", "./a.txt", "c.md", "d[1].txt") == [
        "c.md", "a.txt", "b.txt", "d[1].txt"
    ]  # fmt: skip
    assert found("~/c.md") == [str(work / "c.md")]


def test_a_directory_is_the_text_below_it(work):
    for name in (
        "z.txt", "a.TXT.gz", "READ.me", "empty.txt", ".hidden.txt", "b/2.txt.xz", "b/1.txt",
        "a/b/3.txt.zst", "a/c.py", ".hidden/4.txt",
    ):  # fmt: skip
        path = work / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if "empty" in name else b"text")
    (work / "texts" / "nowhere.txt").symlink_to("nothing")
    (work / "texts" / "link.txt").symlink_to("z.txt")
    expected = ["a.TXT.gz", "link.txt", "z.txt", "a/b/3.txt.zst", "b/1.txt", "b/2.txt.xz"]
    assert found("texts") == found("texts/") == [f"texts/{name}" for name in expected]
    assert found("texts/b/2.txt.xz", "texts/b") == ["texts/b/2.txt.xz", "texts/b/1.txt"]
    # A directory that a star names is read as one.
    assert found("texts/b*") == found("texts/b/**") == ["texts/b/1.txt", "texts/b/2.txt.xz"]
    assert found("texts/**/[13].txt*") == ["texts/a/b/3.txt.zst", "texts/b/1.txt"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"), ("a.jsonl", "jsonl"), ("a.parquet", "parquet"), ("a.bin", "bin"),
        ("a.txt.gz", "text"), ("a.jsonl.zst", "jsonl"), ("A.PARQUET.XZ", "parquet"),
        ("a.jsonl.txt", "text"), ("a.txt.jsonl", "jsonl"), ("a", "text"), ("a.gz", "text"),
        ("a.md", "text"), ("wiki.train.raw", "text"), ("a.b.c.jsonl.gz", "jsonl"),
        (".jsonl", "text"), ("a.parquet/b", "text"), ("a.jsonl.bak", "text"),
    ],
)  # fmt: skip
def test_the_name_says_the_kind(name, kind):
    assert kind_of(pathlib.Path(name)) == kind


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none.txt", r"^train_file none\.txt does not exist \(looked in .*work\)$"),
        ("*.none", r"^train_file \*\.none does not exist \(looked"),
        ("~nobody-of-that-name/a.txt", r"^train_file ~nobody-of-that-name/a\.txt does not exist"),
        ("n" * 5000, r"^train_file n* does not exist"),
        ("link.txt", r"^train_file link\.txt is a link to a file that does not exist$"),
        ("empty.txt", r"^train_file empty\.txt is empty \(0 bytes\)$"),
        ("empty.txt.gz", r"^train_file empty\.txt\.gz is empty \(0 bytes\)$"),
        (
            "folder",
            r"^train_file folder is a directory without text: no \.txt, \.jsonl, \.parquet, \.bin"
            r" in it\n  name its files: --train_file 'folder/\*'$",
        ),
        ("others", r"\.bin in it; 2 files of other names\n  name its files: --train_file 'others"),
        (
            "pipe",
            r"^train_file pipe is no file that can be read twice\n"
            r"  pipe it into standard input instead: --train_file -$",
        ),
        (
            "ids.bin.zst",
            r"^train_file ids\.bin\.zst is packed, and ids are read out of order\n  unpack it",
        ),
        (
            "mixed",
            r"^train_file names files of different kinds: mixed/a\.jsonl\.gz \(jsonl\) and"
            r" mixed/b\.txt \(text\)\n  give files of one kind, by a glob for example$",
        ),
    ],
)
def test_files_that_cannot_be_trained_on_are_named(work, pattern, message):
    (work / "folder").mkdir()
    (work / "empty.txt").touch()
    (work / "empty.txt.gz").touch()
    (work / "link.txt").symlink_to("nothing")
    for name in ("others/a.pdf", "others/b", "mixed/a.jsonl.gz", "mixed/b.txt", "ids.bin.zst"):
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("x")
    os.mkfifo(work / "pipe")
    with refused(message):
        find_files((pattern,), "train_file")


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    """The superuser may read everything, so the answer of the system is made up."""
    path = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    with refused(r"^validation_file .*a\.txt may not be read by this user$"):
        find_files((str(path),), "validation_file")


def test_a_directory_without_permission_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "text")
    (tmp_path / "b").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", refuse)
    with refused(r"^train_file .*/b cannot be read: Permission denied$"):
        find_files((str(tmp_path),), "train_file")


# ---------------------------------------------------------------- opening

TEXT = bytes(random.Random(1).choices(b"some letters\n", k=50_000))


@every_packing
@pytest.mark.parametrize("start", [0, 1, 4_000, 49_999, 50_000])
def test_a_file_is_read_from_any_position(tmp_path, suffix, start):
    path = write(tmp_path / f"a.txt{suffix}", TEXT)
    assert files.unpacked_size(path) == len(TEXT)
    with Bytes(path, start) as file:
        assert file.at == start
        blocks = [b"-"]
        while blocks[-1]:
            blocks.append(file.read(3_333))
            assert file.at == start + sum(map(len, blocks[1:]))
        assert b"".join(blocks[1:]) == TEXT[start:]
        assert file.read(5) == b"" and file.fraction() == 1.0
    with Bytes(path, start) as file:
        assert file.readline() + file.readline() == b"".join(TEXT[start:].splitlines(True)[:2])
        assert file.at == start + len(b"".join(TEXT[start:].splitlines(True)[:2]))
        assert 0 <= file.fraction() <= 1


def test_a_place_far_in_a_file_is_reached_at_once(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(10**12)
    with Bytes(tmp_path / "a.txt", 10**12 - 3) as file:
        assert file.read(9) == bytes(3)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_packed_files_one_behind_another_are_one_text(tmp_path, suffix):
    """As `cat a.gz b.gz` makes them; xz and gzip allow zeros behind."""
    pack, path = PACKINGS[suffix], tmp_path / f"a.txt{suffix}"
    padding = b"" if suffix == ".zst" else bytes(4)
    path.write_bytes(pack(TEXT) + pack(b"second") + pack(b"") + pack(b"third") + padding)
    with Bytes(path) as file:
        assert file.read(100_000) + file.read(100_000) == TEXT + b"secondthird"


def test_progress_is_that_in_the_packed_file(tmp_path):
    path = write(tmp_path / "a.txt.gz", random.Random(0).randbytes(500_000))
    with Bytes(path) as file:
        shares = []
        while file.read(50_000):
            shares.append(file.fraction())
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert 0.3 < shares[4] < 0.7


GOOD = {suffix: PACKINGS[suffix](TEXT) for suffix in (".gz", ".xz", ".zst")}
# `echo hello | zstd`, which writes a checksum, as Arrow does not.
CHECKED = bytes.fromhex("28b52ffd045831000068656c6c6f0a5388bd91")
UNPACKER = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}


def damaged():
    for suffix, good in GOOD.items():
        for length in (1, 3, 9, 20, len(good) // 2, len(good) - 9, len(good) - 3, len(good) - 1):
            yield pytest.param(suffix, good[:length], id=f"{suffix} first {length}")
        others = [other for name, other in GOOD.items() if name != suffix]
        for what, content in {
            "is text": TEXT,
            "is another": others[0],
            "is yet another": others[1],
            "and garbage": good + b"garbage!",
            "and a damaged one": good + good[: len(good) // 2],
            "and text": good + TEXT,
        }.items():
            yield pytest.param(suffix, content, id=f"{suffix} {what}")
    yield pytest.param(".zst", CHECKED.replace(b"hello", b"hallo"), id="a wrong letter")
    for suffix in (".gz", ".xz"):  # their checksums are always there
        good = GOOD[suffix]
        hole = good[:5_000] + b"\xff" * 500 + good[5_500:]
        yield pytest.param(suffix, hole, id=f"{suffix} with a hole")
        turned = bytearray(good)
        turned[len(turned) // 2] ^= 0x10
        yield pytest.param(suffix, bytes(turned), id=f"{suffix} a bit turned")


@pytest.mark.parametrize(("suffix", "content"), [*damaged()])
def test_a_damaged_file_is_named(tmp_path, suffix, content):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(content)
    message = (
        rf"^\S*a\.txt\{suffix} is damaged or not complete: \S.*\n"
        rf"  fetch it again, or test it: {UNPACKER[suffix]} -t \S*a\.txt\{suffix}$"
    )
    with Bytes(path) as file, refused(message):
        while file.read(1000):
            pass
    with refused(message), Bytes(path, 10**6):  # while what is before the place is passed over
        pass
    with refused(message):
        files.unpacked_size(path)


def test_a_checksum_that_is_right_is_accepted(tmp_path):
    (tmp_path / "a.zst").write_bytes(CHECKED)
    assert files.unpacked_size(tmp_path / "a.zst") == len("hello\n")


def test_a_file_that_vanishes_is_named(tmp_path):
    with refused(r"^cannot read .*a\.txt: No such file or directory$"):
        Bytes(tmp_path / "a.txt")
    with refused(r"^cannot read .*: Is a directory$"):
        Bytes(tmp_path)


# ---------------------------------------------------------------- a spool


def spool(*blocks, folder) -> Spool:
    blocks = iter(blocks)
    return Spool("the pipe", lambda: next(blocks, b""), folder)


def test_a_spool_is_read_like_a_file_and_leaves_none(tmp_path):
    folder = tmp_path / "to be" / "made"
    kept = spool(TEXT[:777], TEXT[777:], folder=folder)
    assert str(kept) == "the pipe" and files.unpacked_size(kept) == kept.size == len(TEXT)
    assert list(folder.iterdir()) == []
    with Bytes(kept, 5) as one, Bytes(kept, 30_000) as other:  # each at its own place
        assert (one.read(10), other.read(10)) == (TEXT[5:15], TEXT[30_000:30_010])
        assert (one.read(10), other.read(10)) == (TEXT[15:25], TEXT[30_010:30_020])
        assert abs(other.fraction() - 0.6) < 0.2
        assert other.read(10**6) == TEXT[30_020:] and other.read(1) == b""
    reader = kept.open()
    reader.seek(-3, os.SEEK_END)
    del kept
    assert reader.read() == TEXT[-3:]  # it holds what it reads from


def test_a_spool_is_known_by_what_it_holds(tmp_path):
    texts = [(b"a", b"b"), (b"ab",), (b"abc",)]
    digests = [spool(*blocks, folder=tmp_path).digest for blocks in texts]
    assert digests[0] == digests[1] != digests[2]


def test_a_place_where_nothing_can_be_kept_is_named(tmp_path):
    (tmp_path / "file").touch()
    message = (
        r"^cannot keep the pipe in .*file/x: Not a directory\n"
        r"  choose another place with --cache_dir, or make room there$"
    )
    with refused(message, StorageError):
        spool(b"text", folder=tmp_path / "file" / "x")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full: a full disk")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    full = open("/dev/full", "r+b")  # noqa: SIM115
    monkeypatch.setattr(files.tempfile, "TemporaryFile", lambda dir: full)
    with refused(r"^cannot keep the pipe in .*: No space left on device\n", StorageError):
        spool(b"text", b"more", folder=tmp_path)


def test_standard_input_that_is_closed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with refused(r"^train_file - is standard input, which is closed here$"):
        files.standard_input(tmp_path)


# ---------------------------------------------------------------- decoding


def read_decoded(path, errors="strict", start=0, end=None) -> list[str]:
    decoded = list(decode(path, start, end, errors))
    assert decoded[-1][0] == "" and "" not in [text for text, _ in decoded[:-1]]
    shares = [share for _, share in decoded]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1
    return [text for text, _ in decoded]


@pytest.fixture(params=[1, 2, 3, 5, files.BLOCK_BYTES])
def block_bytes(request, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", request.param)
    return request.param


@every_packing
def test_text_is_decoded_block_by_block(tmp_path, block_bytes, suffix):
    text = "one \u6f22\u5b57 \U0001f600\0\r\n\ufeff\ufffd\ud7ff\ue000\U0010ffff\x80"
    path = write(tmp_path / f"a.txt{suffix}", text)
    parts = read_decoded(path)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= block_bytes
    whole, start, end = text.encode(), len("one "), len("one \u6f22\u5b57 ".encode())
    assert "".join(read_decoded(path, "strict", start, end)) == whole[start:end].decode()


def bad_utf8():
    """Bytes in which much is nearly UTF-8."""
    starts = st.sampled_from([*"aé漢😀\u07ff\ud7ff".encode(), 0xC0, 0xED, 0xF5, 0xA0, 0, 10, 32])
    return st.lists(st.one_of(starts, st.integers(0, 255)), max_size=24).map(bytes)


@many
@given(content=bad_utf8(), block=st.integers(1, 7), cuts=st.lists(st.integers(0, 30)))
def test_bytes_that_are_not_utf8_are_replaced_as_python_does(
    tmp_path_factory, content, block, cuts
):
    path = tmp_path_factory.getbasetemp() / "random.txt"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", block)
        marked = "".join(read_decoded(path, "replace"))
    counts = Counter()
    expected = content.decode("utf-8", "replace")
    assert unmark(marked, counts) == expected
    assert counts["replaced"] == expected.count("\ufffd") - content.count("\ufffd".encode())
    # The length is right up to any character: from there on the rest is read.
    assert n_bytes(marked) == len(content)
    for cut in cuts:
        rest = content[n_bytes(marked[:cut]) :]
        assert rest.decode("utf-8", "replace") == expected[cut:]


@many
@given(content=bad_utf8(), block=st.integers(1, 7))
def test_strict_decoding_stops_where_pythons_does(tmp_path_factory, content, block):
    path = tmp_path_factory.getbasetemp() / "random.txt"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK_BYTES", block)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            byte = content[error.start]
            with refused(rf"byte 0x{byte:02x} at offset {error.start} \(line {line}\)\n"):
                read_decoded(path)
        else:
            assert "".join(read_decoded(path)) == text


def test_what_was_met_is_counted():
    counts = Counter()
    assert unmark("a\0\r\n\0 \udc01b\udc03\r\n\n\r\ufffd", counts) == (
        "a\0\r\n\0 \ufffdb\ufffd\r\n\n\r\ufffd"
    )
    unmark("plain", counts)
    unmark("\0", counts)
    assert counts == {"replaced": 2, "nul": 3, "crlf": 2}
    assert (n_bytes("a\udc01\udc02\udc03é漢😀"), n_bytes("abc"), n_bytes("")) == (16, 3, 0)


USUAL = files.BLOCK_BYTES
NOT_UTF8 = {
    "latin1": (b"caf", b"\xe9 au lait\n", [1, 2, 3, 5, USUAL]),
    "last": (b"one\ntwo\n\n", b"\xff", [1, 2, 3, 5, USUAL]),
    "behind a mark": (b"\xef\xbb\xbfone\r\n", b"\x80 two", [1, 2, 3, 5, USUAL]),
    "truncated": ("\u6f22\n".encode() * 33_333, b"\xf0\x9f\x98", [USUAL]),
    "truncated in a line": ("\u6f22\n".encode() * 33_333, b"\xe6\xbc\n", [USUAL]),
    "over two blocks": (b"x" * (USUAL - 1), b"\xe6\xbcxyz", [USUAL]),
    "far": (b"word\n" * 300_000, b"\xc0\xafmore\n", [USUAL]),
}


@every_packing
@pytest.mark.parametrize(
    ("name", "block"), [(name, block) for name in NOT_UTF8 for block in NOT_UTF8[name][2]]
)
def test_bytes_that_are_not_utf8_are_placed(tmp_path, monkeypatch, name, block, suffix):
    before, bad, _ = NOT_UTF8[name]
    monkeypatch.setattr(files, "BLOCK_BYTES", block)
    path = write(tmp_path / f"a.txt{suffix}", before + bad)
    offset, line = len(before), before.count(b"\n") + 1
    with refused(
        rf"^\S*a\.txt\S* is not UTF-8: byte 0x{bad[0]:02x} at offset {offset} \(line {line}\)\n"
        r"  convert it \(iconv -f latin1 -t utf-8\), or put U\+FFFD there:"
        r" --encoding_errors replace$"
    ):
        read_decoded(path)
