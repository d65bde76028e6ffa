"""A text is tokenized once; what is damaged is found; ids that others made are read."""

import concurrent.futures
import errno
import fcntl
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gpt2_flax.data import token_files
from gpt2_flax.data.batches import StoredRows, StreamedRows
from gpt2_flax.data.sources import Files, Piece, Text
from gpt2_flax.data.token_files import Ids, encode, id_files, split_ids, token_file
from gpt2_flax.data.tokenizers import make_tokenizer
from gpt2_flax.errors import StorageError, UserError
from tests.text_fixtures import Documents, Numbers

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = [1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]
JOINED = [1, 2, 3, 4, 5, 6, 7, 999, 8, 999, 9, 10, 11, 999]
SUFFIXES = [".documents", ".json", ".tokens"]


def make(folder, *documents, tokenizer=None, add_eos=True, **settings) -> Ids:
    source = Documents(*documents or DOCUMENTS)
    return token_file(source, tokenizer or Numbers(), add_eos, folder, **settings)[0]


def every_id(ids) -> list[int]:
    return ids.read(0, len(ids)).tolist()


# ---------------------------------------------------------------- writing


def test_end_of_text_stands_behind_each_document():
    encoded = list(encode(Documents(*DOCUMENTS), Numbers(), True))
    assert np.concatenate([e.ids for e in encoded]).tolist() == JOINED
    assert [e.start for e in encoded] == [piece.start for piece in Documents(*DOCUMENTS).parts]
    without = [e.ids for e in encode(Documents(*DOCUMENTS), Numbers(), False)]
    assert np.concatenate(without).tolist() == [*range(1, 12)]


def test_a_token_file_is_written_once(tmp_path):
    tokenizer, folder = Numbers(), tmp_path / "to be" / "made"
    first = make(folder, tokenizer=tokenizer)
    calls, files = tokenizer.calls, sorted(folder.iterdir())
    assert every_id(first) == JOINED and calls > 0
    assert [path.suffix for path in files] == SUFFIXES
    second = make(folder, tokenizer=tokenizer)
    assert every_id(second) == JOINED and second.fingerprint == first.fingerprint
    assert tokenizer.calls == calls and sorted(folder.iterdir()) == files


def test_what_is_known_of_a_text_is_kept_with_its_ids(tmp_path):
    source = Documents(*DOCUMENTS)
    source.found["nul"] = 3
    text = "".join(piece.text for piece in source.parts)
    for _ in range(2):
        _, about = token_file(source, Numbers(), True, tmp_path)
        assert (about["count"], about["documents"], about["text_bytes"]) == (14, 3, len(text))
        assert about["found"] == {"nul": 3}
        source.found.clear()


def test_another_text_tokenizer_or_separator_is_another_token_file(tmp_path):
    made = [
        make(tmp_path),
        make(tmp_path, add_eos=False),
        make(tmp_path, tokenizer=Numbers(eos_id=998)),
        make(tmp_path, [1, 2]),
    ]
    assert len({tuple(every_id(ids)) for ids in made}) == 4
    assert len({ids.fingerprint for ids in made}) == 4
    assert len(list(tmp_path.glob("*.tokens"))) == 4
    # The fingerprint is of the ids: the same for the same ids from another text.
    pieces = Documents(*DOCUMENTS, longest=2)
    pieces.key = "other"
    ids, _ = token_file(pieces, Numbers(), True, tmp_path)
    assert ids.fingerprint == made[0].fingerprint
    assert len(list(tmp_path.glob("*.tokens"))) == 5


@pytest.mark.parametrize(("vocab_size", "n_bytes"), [(2**16, 2), (2**16 + 1, 4)])
def test_ids_take_as_many_bytes_as_the_vocabulary_needs(tmp_path, vocab_size, n_bytes):
    largest = vocab_size - 1
    ids = make(tmp_path, [3, largest], tokenizer=Numbers(vocab_size, largest))
    assert every_id(ids) == [3, largest, largest]
    (file,) = tmp_path.glob("*.tokens")
    assert np.fromfile(file, f"<u{n_bytes}").tolist() == [3, largest, largest]


def test_ids_are_the_same_whatever_is_encoded_at_once(tmp_path, monkeypatch):
    documents = [[*range(n, n + n % 13 + 1)] for n in range(200)]
    expected = every_id(make(tmp_path / "0", *documents))
    for n, chars in enumerate((1, 50, 333), 1):
        monkeypatch.setattr(token_files, "GROUP_CHARS", chars)
        assert every_id(make(tmp_path / str(n), *documents)) == expected


def test_many_processes_write_the_ids_of_one(tmp_path, monkeypatch):
    """Real processes, on real text, started in the midst of it."""
    monkeypatch.setattr(token_files, "SMALL_TEXT_CHARS", 300_000)
    monkeypatch.setattr(token_files, "GROUP_CHARS", 100_000)
    paths = []
    for n, name in enumerate(("argparse", "typing", "pickletools", "turtle", "doctest")):
        paths.append(tmp_path / f"{n}.txt")
        source = pathlib.Path(os.__file__).with_name(f"{name}.py").read_text("utf-8")
        paths[-1].write_text(source * 3, "utf-8")
    tokenizer = make_tokenizer("bytes", ())
    made = [
        token_file(Files(paths, Text()), tokenizer, True, tmp_path / f"cache {n}", n)
        for n in (1, 2)
    ]
    assert made[0][0].fingerprint == made[1][0].fingerprint
    assert made[0][1]["documents"] == made[1][1]["documents"] == 5


# ---------------------------------------------------------------- damage


def truncate(file):
    file.write_bytes(file.read_bytes()[:-2])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def flip_unseen(file):
    """As a disk does it: the time of the last change stays."""
    stat = file.stat()
    flip(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


DAMAGE = {
    **{f"{kind} cut": (kind, truncate) for kind in ("tokens", "documents", "json")},
    **{f"{kind} flipped": (kind, flip) for kind in ("tokens", "documents")},
    **{f"{kind} flipped unseen": (kind, flip_unseen) for kind in ("tokens", "documents")},
    **{f"{k} gone": (k, lambda file: file.unlink()) for k in ("tokens", "documents", "json")},
    "json a list": ("json", lambda file: file.write_text("[]")),
    "json empty": ("json", lambda file: file.write_text("{}")),
    "json of no text": ("json", lambda file: file.write_bytes(b"\xff\xfe\x00")),
}


@pytest.mark.parametrize(("suffix", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_token_file_is_made_again(tmp_path, suffix, damage):
    make(tmp_path)
    (file,) = tmp_path.glob(f"*.{suffix}")
    damage(file)
    tokenizer = Numbers()
    assert every_id(make(tmp_path, tokenizer=tokenizer)) == JOINED and tokenizer.calls > 0
    tokenizer.calls = 0
    assert every_id(make(tmp_path, tokenizer=tokenizer)) == JOINED
    assert tokenizer.calls == 0 and len(list(tmp_path.iterdir())) == 3


def test_a_large_file_is_read_through_only_if_it_was_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "CHECKED_BYTES", 4)
    make(tmp_path)
    (file,) = tmp_path.glob("*.tokens")
    tokenizer = Numbers()
    os.utime(file)  # a copy, say: it is good
    assert every_id(make(tmp_path, tokenizer=tokenizer)) == JOINED and tokenizer.calls == 0
    flip(file)
    assert every_id(make(tmp_path, tokenizer=tokenizer)) == JOINED and tokenizer.calls > 0


def test_an_exception_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "GROUP_CHARS", 50)
    with pytest.raises(RuntimeError, match="in the middle"):
        make(tmp_path, [*range(200)], tokenizer=Numbers(fails_at=2))
    assert list(tmp_path.iterdir()) == []
    assert every_id(make(tmp_path, [*range(200)])) == [*range(200), 999]


def test_a_file_that_is_cut_short_in_use_is_an_error_and_no_crash(tmp_path):
    ids = make(tmp_path)
    (file,) = tmp_path.glob("*.tokens")
    os.truncate(file, 8)
    with pytest.raises(StorageError, match=r"tokens was cut short while it was in use\n  run the"):
        ids.read(3, 2)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        StorageError, match=r"(?s)^cannot write .*Not a dir.* GB free.*--cache_dir, or make room"
    ):
        make(tmp_path / "file" / "folder")


def test_a_full_disk_is_an_error_of_storage_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk's."""
    command = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "from gpt2_flax.errors import run_main\n"
        "from tests.data.test_token_files import make\n"
        "folder = pathlib.Path(sys.argv[2])\n"
        "sys.exit(run_main(lambda argv: make(folder, [*range(9000)]) and 0, []))\n"
    )
    process = run_python(command, ROOT, tmp_path)
    assert process.returncode == 4, process.stderr
    assert process.stderr.startswith("error: cannot write the token file")
    assert len(process.stderr.splitlines()) == 2 and list(tmp_path.iterdir()) == []


def run_python(command: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", command, *map(str, arguments)], capture_output=True, text=True
    )


def test_text_that_cannot_be_read_is_not_blamed_on_the_folder(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    source = Files([path], Text())
    path.unlink()
    with pytest.raises(UserError, match=r"^cannot read .*a.txt: No such file") as error:
        token_file(source, make_tokenizer("bytes", ()), True, tmp_path / "cache")
    assert not isinstance(error.value, StorageError)


def test_a_text_of_white_space_alone_is_refused(tmp_path):
    source = Documents([])
    source.parts = [Piece(text, 0, ends_document=True) for text in (" \n", "\t\u3000")]
    tokenizer = make_tokenizer("bytes", ())
    for part, where in ((None, ""), ((0.1, True, 7), " where it is held out")):
        source.part = part
        match = rf"^documents{where} holds nothing but white space\n  \w+"
        with pytest.raises(UserError, match=match):
            token_file(source, tokenizer, True, tmp_path)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(UserError, match=match):
            StreamedRows(source, tokenizer, True, 2, 0, True, 4).measure()


# ---------------------------------------------------------------- several writers

WRITER = """
import sys, time; sys.path.insert(0, sys.argv[1])
import pathlib
from tests.text_fixtures import Documents, Numbers
from gpt2_flax.data.token_files import token_file
tokenizer = Numbers()
plain = tokenizer.encode_batch
def slowly(texts):
    print("encoding", flush=True)
    time.sleep(float(sys.argv[3]))
    return plain(texts)
tokenizer.encode_batch = slowly
ids, _ = token_file(Documents([*range(50)]), tokenizer, True, pathlib.Path(sys.argv[2]))
print("done", len(ids), tokenizer.calls, flush=True)
"""


def start_writer(folder, seconds) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(ROOT), str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_second_of_two_processes_waits_and_finds_it_made(tmp_path):
    with start_writer(tmp_path, 2) as first:
        assert first.stdout.readline() == "encoding\n"
        with start_writer(tmp_path, 0) as second:
            assert second.communicate()[0] == "done 51 0\n"
        assert first.communicate()[0] == "done 51 1\n"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == SUFFIXES


def test_after_a_kill_the_next_process_starts_anew_and_clears_up(tmp_path):
    with start_writer(tmp_path, 60) as first:
        assert first.stdout.readline() == "encoding\n"
        assert list(tmp_path.glob("*.tmp"))
        first.send_signal(signal.SIGKILL)
    assert every_id(make(tmp_path, [*range(50)])) == [*range(50), 999]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == SUFFIXES


def test_without_locks_nobody_removes_what_another_process_writes(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    with start_writer(tmp_path, 60) as first:
        assert first.stdout.readline() == "encoding\n"
        written = set(tmp_path.glob("*.tmp"))
        monkeypatch.setattr(fcntl, "flock", refuse)
        assert every_id(make(tmp_path, [*range(50)])) == [*range(50), 999]
        assert written and set(tmp_path.glob("*.tmp")) == written
        first.kill()


def test_a_lock_holds_though_its_file_is_removed_meanwhile(tmp_path, monkeypatch):
    """Between opening it and looking whether it is still there, whoever had it removes it."""
    path, flock, taken = tmp_path / "lock", fcntl.flock, []

    def slow(*arguments):
        flock(*arguments)
        taken.append(arguments)
        if len(taken) == 1:
            path.unlink()
        if len(taken) == 2:
            path.unlink()
            path.touch()

    monkeypatch.setattr(fcntl, "flock", slow)
    with token_files.alone(path) as is_alone:
        assert is_alone and path.exists()
    assert len(taken) == 3 and not path.exists()


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path):
    """Of our names only: the folder may be one that somebody uses for other things, too."""
    ours = [
        f"{'0a' * 16}{kind}.{'1b' * 16}.tmp" for kind in ("", ".tokenizer", ".bin", ".dataset")
    ]
    for name in (*ours, "somebody.tmp", f"{'0a' * 16}.tmp"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, time.time() - 25 * 3600))
    fresh = tmp_path / ours[0].replace("1b", "2c")
    fresh.touch()
    with token_files.temporary_beside(tmp_path / "note.json") as temporary:
        temporary.touch()
        kept = {path.name for path in tmp_path.iterdir()}
        assert kept == {"somebody.tmp", f"{'0a' * 16}.tmp", fresh.name, temporary.name}


# ---------------------------------------------------------------- reading


def write_shards(folder, n_shards) -> list[tuple]:
    """Parts of 3 ids each: 0 1 2, 3 4 5, ..."""
    parts = []
    for n in range(n_shards):
        path = folder / f"{n}.bin"
        np.arange(3 * n, 3 * n + 3, dtype=np.uint16).tofile(path)
        parts.append((path, np.dtype("<u2"), 0, 3))
    return parts


def count_open(folder) -> int:
    links = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
    return sum(link.startswith(f"{folder}/") for link in links)


def test_more_files_than_a_process_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MOST_OPEN", 4)
    ids = Ids(write_shards(tmp_path, 30), "digest")
    train, held_out = ids.part(0, 80), ids.part(80, 90)
    order = np.random.default_rng(0).permutation(78)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        found = list(threads.map(train.read, order.tolist(), itertools.repeat(3)))
    np.testing.assert_array_equal(found, [[at, at + 1, at + 2] for at in order])
    assert held_out.read(0, 10).tolist() == [*range(80, 90)]
    assert count_open(tmp_path) == 4
    del ids, train
    assert held_out.read(1, 1).tolist() == [81]
    del held_out
    assert count_open(tmp_path) == 0


def test_files_that_change_or_go_while_they_are_in_use_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "MOST_OPEN", 1)
    ids = Ids(write_shards(tmp_path, 4), "digest")
    (tmp_path / "1.bin").write_bytes(b"123456")
    (tmp_path / "2.bin").unlink()
    with pytest.raises(StorageError, match=r"1\.bin was changed while it was in use\n  bring it"):
        ids.read(3, 1)
    with pytest.raises(StorageError, match=r"2\.bin cannot be read any more: No such file"):
        ids.read(6, 1)
    with pytest.raises(UserError, match=r"^cannot read \S+/2\.bin: No such file"):
        Ids(ids.parts, "digest")


def test_reading_any_stretch_over_several_files(tmp_path):
    expected, parts = np.arange(23), []
    for n, (first, last) in enumerate(((0, 9), (9, 10), (10, 10), (10, 23))):
        dtype = np.dtype(f"<u{2 + 2 * (n % 2)}")
        path = tmp_path / str(n)
        path.write_bytes(b"\xff" * n + expected[first:last].astype(dtype).tobytes())
        parts.append((path, dtype, n, last - first))
    ids = Ids(parts, "digest")
    assert len(ids) == 23
    for start in range(24):
        for count in range(24 - start):
            read = ids.read(start, count)
            assert read.dtype == np.int32
            assert read.tolist() == expected[start : start + count].tolist()
    part = ids.part(4, 20).part(3, 15)
    assert every_id(part) == [*range(7, 19)] and len({ids.fingerprint, part.fingerprint}) == 2


def test_the_beginnings_of_documents_are_known(tmp_path):
    ids = make(tmp_path)
    whole = [0, 8, 10]
    for start in range(len(JOINED)):
        for count in range(len(JOINED) - start):
            found = [place for place in whole if start <= place < start + count]
            assert ids.documents_in(start, count, 999).tolist() == found
    part = ids.part(3, 12)
    assert part.documents_in(0, 9, 999).tolist() == [5, 7]
    assert (ids.count_documents(), part.count_documents()) == (3, 2)
    # Without end-of-text ids too, where only the file knows.
    assert make(tmp_path, add_eos=False).documents_in(0, 11, 999).tolist() == [0, 7, 8]
    # Ids that others made: behind each end-of-text id.
    others = Ids(ids.parts, "digest")
    for start in range(len(JOINED)):
        found = [place for place in [*whole, 14] if start <= place < len(JOINED)]
        assert others.documents_in(start, len(JOINED) - start, 999).tolist() == found[:3]


def test_reading_all_of_a_file_keeps_none_of_it(tmp_path):
    """What a memory map would add to the process: 256 MB here, sparse on disk."""
    path, n_ids = tmp_path / "sparse", 2**27
    with open(path, "wb") as file:
        file.truncate(2 * n_ids)
    command = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import resource, numpy as np\n"
        "from gpt2_flax.data.batches import StoredRows\n"
        "from gpt2_flax.data.token_files import Ids\n"
        "ids = Ids([(sys.argv[2], np.dtype('<u2'), 0, 2**27)], 'digest')\n"
        "rows = StoredRows(ids, 2**16, 0, True)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for taken in rows.batches(rows.start, 8, rows.count, slice(None)): pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    process = run_python(command, ROOT, path)
    assert int(process.stdout) < 30_000, process.stderr  # KiB


def test_measuring_a_stream_counts_what_a_token_file_holds(tmp_path):
    rows = StreamedRows(Documents(*DOCUMENTS), Numbers(), True, 4, 8, True, 6)
    about = rows.measure()
    ids, in_file = token_file(Documents(*DOCUMENTS), Numbers(), True, tmp_path)
    stored = StoredRows(ids, 4, 8, True)
    assert (rows.count, rows.remainder) == (stored.count, stored.remainder) == (3, 1)
    for name in ("count", "documents", "text_bytes"):
        assert about[name] == in_file[name]


# ---------------------------------------------------------------- ids that others made


def write_nanogpt(path, ids):
    np.asarray(ids, "<u2").tofile(path)
    return path


def write_llm_c(path, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, "<u2").tobytes())
    return path


def test_bin_files_of_nanogpt_and_llm_c_are_read_as_one(tmp_path):
    # The magic number of llm.c's header alone, in a file of 6 ids, is nanoGPT's: ids 54616, 308.
    paths = [
        write_nanogpt(tmp_path / "a.bin", [1, 2, 3]),
        write_llm_c(tmp_path / "b.bin", [4, 5, 999, 6]),
    ]
    ids, about = id_files(paths, Numbers(), tmp_path / "cache")
    assert every_id(ids) == [1, 2, 3, 4, 5, 999, 6] and about["count"] == 7
    again, _ = id_files(paths, Numbers(), tmp_path / "cache")
    assert again.fingerprint == ids.fingerprint
    write_nanogpt(paths[0], [1, 2, 4])
    assert id_files(paths, Numbers(), tmp_path / "cache")[0].fingerprint != ids.fingerprint


def test_a_bin_file_is_read_through_once(tmp_path, monkeypatch):
    path = write_nanogpt(tmp_path / "a.bin", [1, 2, 3])
    first, _ = id_files([path], Numbers(), tmp_path / "cache")
    monkeypatch.setattr(token_files, "new_hasher", None)
    second, _ = id_files([path], Numbers(), tmp_path / "cache")
    assert first.fingerprint == second.fingerprint
    (note,) = (tmp_path / "cache").iterdir()
    assert json.loads(note.read_text())["largest"] == 3


BAD_BINS = {
    "odd": (lambda p: p.write_bytes(b"abc"), r"has 3 bytes, an odd number.*another ending, .txt"),
    "cut": (lambda p: write_llm_c(p, [1, 2], count=3), r"cut short.*says 3 ids, 1030 bytes.*1028"),
    "version": (lambda p: write_llm_c(p, [1], version=7), r"llm.c's format 20240520 in version 7"),
    "id": (
        lambda p: write_llm_c(p, [5, 1000, 3]),
        r"holds the id 1000 \(at id 1 of the file, byte 1026\); tokenizer numbers has 1000 tokens",
    ),
}


@pytest.mark.parametrize(("write", "message"), BAD_BINS.values(), ids=BAD_BINS)
def test_bin_files_that_cannot_be_trained_on_are_named(tmp_path, write, message):
    write(tmp_path / "a.bin")
    with pytest.raises(UserError, match=rf"(?s)a\.bin .*{message}") as error:
        id_files([tmp_path / "a.bin"], Numbers(), tmp_path / "cache")
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("places", "cut"),
    [([83], 84), ([], 80), ([79], 80), ([91], 80), ([80, 85], 81), ([89], 90)],
)
def test_ids_are_split_behind_an_end_of_text_that_is_near(tmp_path, places, cut):
    values = np.arange(100)
    values[places] = 999
    ids, _ = id_files([write_nanogpt(tmp_path / "a.bin", values)], Numbers(), tmp_path)
    train, held_out = split_ids(ids, 0.2, 999)
    assert every_id(train) == values[:cut].tolist()
    assert every_id(held_out) == values[cut:].tolist()
    assert len({ids.fingerprint, train.fingerprint, held_out.fingerprint}) == 3
