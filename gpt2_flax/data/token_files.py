"""Ids on disk: a text tokenized once, or files of ids that somebody made before.

A token file is plain uint16 or uint32 ids, one after another, `<key>.tokens`. Beside it lie
`<key>.documents`, where each document begins (uint64, in ids), and `<key>.json`, written last:
without it the others don't count.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import struct
import threading
import time
import uuid
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from gpt2_flax import errors
from gpt2_flax.data.sources import blank_error, digest
from gpt2_flax.errors import StorageError, UserError, say

VERSION = 2
GROUP_CHARS = 1 << 20  # of text, encoded together
SMALL_TEXT_CHARS = 8 << 20  # not worth the start of other processes
CHECKED_BYTES = 1 << 28  # a file up to this size is read through at each start
# The headers of llm.c's files: (number that they begin with, version) and the type of the ids.
LLM_C_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
LLM_C_HEADER_BYTES = 1024
MOST_OPEN = 64  # files of ids at a time; a shell allows a process some 256 to 1024
TEMPORARY_NAME = re.compile(r"[0-9a-f]{32}(\.[a-z]+)?\.[0-9a-f]{32}\.tmp")
LEFT_OVER_SECONDS = 24 * 3600  # nobody has written to a temporary file for so long: it is nobody's


# ---------------------------------------------------------------- reading ids


class OpenFiles:
    """Files that are read here and there, by several threads, a bounded number open at a time.

    Reads are `pread`s, not a memory map: what was read stays out of this process's memory, and
    a file cut short under it is an error and no signal.
    """

    def __init__(self, paths: list[pathlib.Path]):
        """Raises UserError for a file that is not to be had."""
        self.paths, self.lock = paths, threading.Lock()
        self.descriptors: OrderedDict[int, int] = OrderedDict()  # last used last
        weakref.finalize(self, close_all, self.descriptors)
        try:
            self.states = [state_of(os.stat(path)) for path in paths]
            for number in range(min(len(paths), MOST_OPEN)):
                self.descriptor(number)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    def read(self, number: int, n_bytes: int, place: int) -> bytes:
        """Bytes of a file from a place on. Raises StorageError where they are gone."""
        try:
            with self.lock:
                data = os.pread(self.descriptor(number), n_bytes, place)
        except OSError as error:
            raise StorageError(
                f"{self.paths[number]} cannot be read any more: {error.strerror}"
            ) from error
        if len(data) != n_bytes:
            raise StorageError(
                f"{self.paths[number]} was cut short while it was in use\n"
                "  run the same command again; what is missing is made anew"
            )
        return data

    def descriptor(self, number: int) -> int:
        if number in self.descriptors:
            self.descriptors.move_to_end(number)
            return self.descriptors[number]
        while len(self.descriptors) >= MOST_OPEN:
            os.close(self.descriptors.popitem(last=False)[1])
        descriptor = self.descriptors[number] = os.open(self.paths[number], os.O_RDONLY)
        if state_of(os.fstat(descriptor)) != self.states[number]:
            raise StorageError(
                f"{self.paths[number]} was changed while it was in use\n"
                "  bring it back, or start anew with another --output_dir"
            )
        return descriptor


def state_of(stat: os.stat_result) -> tuple:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def close_all(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


class Ids:
    """Ids of one or more files, one after another, read where they are wanted.

    fingerprint: hex digest of all ids.
    """

    def __init__(
        self,
        parts: list[tuple],
        fingerprint: str,
        documents: np.ndarray | None = None,
        opened: OpenFiles | None = None,
    ):
        """parts: (path, dtype, bytes before the first id, ids) of each file.

        documents: int64, where documents begin; None where only end-of-text ids tell.
        opened: the files, where they are in use already.
        """
        self.parts, self.fingerprint, self.documents = parts, fingerprint, documents
        self.bounds = np.cumsum([0, *(count for *_, count in parts)])
        self.files = opened or OpenFiles([path for path, *_ in parts])
        self.begin, self.end = 0, int(self.bounds[-1])

    def __len__(self) -> int:
        return self.end - self.begin

    def read(self, start: int, count: int) -> np.ndarray:
        """int32 (count,): ids from a place on. Raises StorageError where they are gone."""
        at, left, found = self.begin + start, count, []
        number = int(np.searchsorted(self.bounds, at, side="right")) - 1
        while left:
            _, dtype, skipped, n_ids = self.parts[number]
            place = at - int(self.bounds[number])
            n_here, size = min(left, n_ids - place), dtype.itemsize
            if n_here:  # a file may have no ids
                data = self.files.read(number, n_here * size, skipped + place * size)
                found.append(np.frombuffer(data, dtype).astype(np.int32))
            at, left, number = at + n_here, left - n_here, number + 1
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.int32), *found])

    def part(self, begin: int, end: int) -> "Ids":
        """The ids [begin, end) alone."""
        digest_of_part = digest(self.fingerprint, begin, end)
        part = Ids(self.parts, digest_of_part, self.documents, self.files)
        part.begin, part.end = self.begin + begin, self.begin + end
        return part

    def documents_in(self, start: int, count: int, eos_id: int) -> np.ndarray:
        """int64: the places in [start, start + count) where documents begin."""
        if self.documents is not None:
            first, last = self.begin + start, self.begin + start + count
            bounds = np.searchsorted(self.documents, [first, last])
            return np.asarray(self.documents[slice(*bounds)], np.int64) - self.begin
        before = max(start - 1, 0)
        ids = self.read(before, start + count - before)
        starts = before + 1 + np.flatnonzero(ids[:-1] == eos_id)
        return np.concatenate([[0], starts]) if start == 0 else starts

    def count_documents(self) -> int | None:
        if self.documents is None:
            return None
        return int(np.diff(np.searchsorted(self.documents, [self.begin, self.end]))[0])


# ---------------------------------------------------------------- text -> ids


class Encoded(NamedTuple):
    """ids of a piece of text, end-of-text included, and of the piece what else is needed."""

    ids: np.ndarray
    start: int
    ends_document: bool
    text: str
    done: float | None


def encode(source, tokenizer, add_eos: bool, start: int = 0, make_pool=None) -> Iterator[Encoded]:
    """The ids of a source's pieces from a position on, in order.

    make_pool: returns an EncodePool, started when the text proves to be long; else, and until
    then, pieces are encoded here.
    """
    eos = np.array([tokenizer.eos_id], np.int32)
    waiting, pool, n_chars = deque(), None, 0

    def first_of_waiting():
        pieces, encoded = waiting.popleft()
        for piece, ids in zip(pieces, encoded() if callable(encoded) else encoded, strict=True):
            if piece.ends_document and add_eos:
                ids = np.concatenate([ids, eos])
            yield Encoded(ids, piece.start, piece.ends_document, piece.text, piece.done)

    for pieces in groups(source.pieces(start, tokenizer.cuts)):
        texts = [piece.text for piece in pieces]
        n_chars += sum(map(len, texts))
        if make_pool is not None and pool is None and n_chars > SMALL_TEXT_CHARS:
            pool = make_pool()
        encoded = pool.submit(texts).result if pool else tokenizer.encode_batch(texts)
        waiting.append((pieces, encoded))
        if pool is None or len(waiting) > 2 * pool.processes:
            yield from first_of_waiting()
    while waiting:
        yield from first_of_waiting()


def groups(pieces) -> Iterator[list]:
    """Pieces by the megabyte, or by the thousand."""
    group, n_chars = [], 0
    for piece in pieces:
        group.append(piece)
        n_chars += len(piece.text)
        if n_chars >= GROUP_CHARS or len(group) >= 1000:
            yield group
            group, n_chars = [], 0
    if group:
        yield group


# ---------------------------------------------------------------- token files


def token_file(
    source, tokenizer, add_eos: bool, folder: pathlib.Path, processes: int = 1
) -> tuple[Ids, dict]:
    """(the ids of a source, what is known of the text), made now or found in `folder`.

    The second holds count, documents, text_bytes and found (the Counter of the source).
    Raises UserError for text that cannot be read, StorageError where ids cannot be written.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    key = digest(VERSION, source.key, tokenizer.fingerprint, add_eos, dtype.str)
    path = folder / f"{key}.tokens"
    about = read_description(path)
    if about is None:
        if path.with_suffix(".json").exists():
            say(f"the token file {path} is damaged and is made anew")
        with storage_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            with alone(path.with_suffix(".lock")) as is_alone:
                if is_alone:
                    for left_over in folder.glob(f"{key}.*.tmp"):  # of a process that was killed
                        left_over.unlink(missing_ok=True)
                about = read_description(path) or write_tokens(  # another may have made it
                    path, source, tokenizer, add_eos, dtype, processes
                )
    documents = np.zeros(0, np.uint64)
    if about["documents"]:
        documents = np.memmap(path.with_suffix(".documents"), np.uint64, "r")
    parts = [(path, dtype, 0, about["count"])]
    return Ids(parts, about["fingerprint"], documents), about


def read_description(path: pathlib.Path) -> dict | None:
    """What was written beside a token file; None where it must be made anew.

    A file that is small, or was touched since it was made, is compared with its digest.
    """
    documents = path.with_suffix(".documents")
    try:
        about = json.loads(path.with_suffix(".json").read_text("utf-8"))
        stat = path.stat()
        whole = (
            stat.st_size == about["count"] * about["bytes_per_id"]
            and documents.stat().st_size == about["documents"] * 8
            and file_digest(documents) == about["documents_digest"]
        )
        if whole and (stat.st_size <= CHECKED_BYTES or stat.st_mtime_ns != about["mtime_ns"]):
            whole = file_digest(path) == about["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return about if whole else None


def file_digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, new_hasher).hexdigest()


def new_hasher():
    return hashlib.blake2b(digest_size=16)


def write_tokens(path, source, tokenizer, add_eos, dtype, processes) -> dict:
    """Encode a source into a token file."""
    with temporary_beside(path) as temporary, temporary_beside(path) as starts:
        with open(temporary, "wb") as file, open(starts, "wb") as starts_file:
            about = write_ids(file, starts_file, source, tokenizer, add_eos, dtype, processes)
            for written in (file, starts_file):
                written.flush()
                os.fsync(written.fileno())
        about |= {
            "version": VERSION,
            "bytes_per_id": dtype.itemsize,
            "mtime_ns": temporary.stat().st_mtime_ns,
            "documents_digest": file_digest(starts),
            "text": source.name,
            "tokenizer": tokenizer.name,
        }
        path.with_suffix(".json").unlink(missing_ok=True)
        os.replace(temporary, path)
        os.replace(starts, path.with_suffix(".documents"))
        temporary.write_text(json.dumps(about), "utf-8")
        os.replace(temporary, path.with_suffix(".json"))
    return about


def write_ids(file, starts_file, source, tokenizer, add_eos, dtype, processes) -> dict:
    """Write the ids of a source and the places where its documents begin."""
    count, n_bytes, n_documents, hasher = 0, 0, 0, new_hasher()
    blank, begins = True, True
    with contextlib.ExitStack() as cleanup:
        bar = cleanup.enter_context(contextlib.closing(Bar(f"tokenizing {source.name}")))

        def make_pool():
            from gpt2_flax.data.encode_pool import EncodePool

            return cleanup.enter_context(EncodePool(tokenizer, processes))

        for encoded in encode(source, tokenizer, add_eos, 0, make_pool if processes > 1 else None):
            if begins and len(encoded.ids):
                starts_file.write(np.uint64(count).tobytes())
                n_documents, begins = n_documents + 1, False
            data = encoded.ids.astype(dtype).tobytes()
            file.write(data)
            hasher.update(data)
            count += len(encoded.ids)
            text = encoded.text
            n_bytes += len(text) if text.isascii() else len(text.encode())
            blank = blank and (not text or text.isspace())
            begins = begins or encoded.ends_document
            bar.show(encoded.done, n_bytes, count)
    if count and blank:
        raise blank_error(source)
    return {
        "count": count,
        "fingerprint": hasher.hexdigest(),
        "documents": n_documents,
        "text_bytes": n_bytes,
        "found": {name: n for name, n in source.found.items() if n},
        "forced_cuts": tokenizer.cuts.forced,
    }


@contextlib.contextmanager
def alone(path: pathlib.Path):
    """Hold a lock that the system releases even if this process is killed; wait for it.

    Gives False on a file system without locks: there each process writes its own file, and the
    last one stays.
    """
    while True:
        file = open(path, "a+")  # noqa: SIM115
        with file:
            is_alone = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another process tokenizes this text; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                is_alone = False
            # Whoever had the lock removed the file: then this is a lock on nothing.
            if is_alone and not is_at(file, path):
                continue
            try:
                yield is_alone
            finally:
                path.unlink(missing_ok=True)
            return


def is_at(file, path: pathlib.Path) -> bool:
    """Whether an open file is the one that a path now names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def temporary_beside(path: pathlib.Path):
    """A path beside another, in a folder that exists, for a file that is then renamed or gone.

    Its name is not the process's number: hosts that share the folder may have the same. Files
    of that kind that a process left behind when it was killed are removed after a day.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.glob("*.tmp"):
        with contextlib.suppress(OSError):
            is_ours = TEMPORARY_NAME.fullmatch(other.name)
            if is_ours and time.time() - other.stat().st_mtime > LEFT_OVER_SECONDS:
                other.unlink()
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def storage_errors(path: pathlib.Path):
    try:
        yield
    except OSError as error:
        if isinstance(error, UserError):
            raise
        free = shutil.disk_usage(existing(path)).free / 1e9
        raise StorageError(
            f"cannot write the token file {path}: {error.strerror} ({free:.1f} GB free there)\n"
            "  choose another place with --cache_dir, or make room there"
        ) from error


def existing(path: pathlib.Path) -> pathlib.Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


class Bar:
    """How far the reading of a source is: of its bytes on disk where they are known."""

    def __init__(self, what: str):
        self.began, self.shown = time.perf_counter(), 0.0
        self.bar = tqdm(
            total=1000, desc=what, disable=errors.is_silent or None, leave=False,
            bar_format="{desc}: {percentage:3.0f}% |{bar:20}| [{elapsed}<{remaining}]{postfix}",
        )  # fmt: skip

    def show(self, done: float | None, n_bytes: int, n_ids: int) -> None:
        now = time.perf_counter()
        if self.bar.disable or now - self.shown < 0.2:
            return
        self.shown = now
        speed = n_bytes / 1e6 / (now - self.began)
        text = f"{n_bytes / 1e6:,.1f} MB of text, {n_ids / 1e6:,.1f}M tokens, {speed:.1f} MB/s"
        self.bar.set_postfix_str(text, refresh=False)
        if done is None:
            self.bar.bar_format = "{desc}: [{elapsed}]{postfix}"
        self.bar.update((done or 0) * 1000 - self.bar.n)
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


# ---------------------------------------------------------------- ids made by others


def id_files(paths: list[pathlib.Path], tokenizer, folder: pathlib.Path) -> tuple[Ids, dict]:
    """(ids of nanoGPT's or llm.c's .bin files, what is known of them).

    Raises UserError for a file that is none, is cut short, or holds an id that the tokenizer
    has not.
    """
    parts = [open_bin(path) for path in paths]
    known = [check_bin(part, folder) for part in parts]
    for (path, dtype, skipped, _), about in zip(parts, known, strict=True):
        if about["largest"] >= tokenizer.vocab_size:
            raise UserError(
                f"{path} holds the id {about['largest']} (at id {about['place']} of the file, byte"
                f" {skipped + dtype.itemsize * about['place']}); tokenizer {tokenizer.name} has"
                f" {tokenizer.vocab_size} tokens\n  name the --tokenizer that it was made with"
            )
    fingerprint = digest([about["fingerprint"] for about in known])
    count = sum(part[3] for part in parts)
    return Ids(parts, fingerprint), {"count": count, "documents": None, "found": {}}


def open_bin(path: pathlib.Path) -> tuple:
    """(path, dtype, bytes before the first id, ids) of a .bin file."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            begins = file.read(1 << 16)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    magic, version, count = struct.unpack("<3i", begins[:12].ljust(12, b"\0"))
    if size >= LLM_C_HEADER_BYTES and magic in {known for known, _ in LLM_C_TYPES}:
        if (magic, version) not in LLM_C_TYPES:
            raise UserError(
                f"{path} has the header of llm.c's format {magic} in version {version}, which is"
                " not known\n  write it again with a newer llm.c, or train on the text itself"
            )
        dtype = np.dtype(LLM_C_TYPES[magic, version])
        if size != LLM_C_HEADER_BYTES + count * dtype.itemsize:
            raise UserError(
                f"{path} is cut short or too long: its header says {count} ids,"
                f" {LLM_C_HEADER_BYTES + count * dtype.itemsize} bytes, and it has {size}\n"
                "  fetch it again"
            )
        return path, dtype, LLM_C_HEADER_BYTES, count
    dtype = type_of_ids(begins, size)
    if size % dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes, an odd number: it is no file of uint16 ids\n"
            "  .bin is read as nanoGPT or llm.c write it; give text another ending, .txt"
        )
    return path, dtype, 0, size // dtype.itemsize


def type_of_ids(begins: bytes, size: int) -> np.dtype:
    """How wide the ids of a file without a header are, by its first bytes: 16, 32 or 64 bits.

    No vocabulary has more than 2**20 ids, so of wider ids the upper bits are zero, or nearly so.
    Fewer than 16 ids are taken for uint16, and so are ids that are all 0.
    """
    for width in (8, 4):
        parts = np.frombuffer(begins[: len(begins) // width * width], "<u2")
        lowest, second, *others = parts.reshape(-1, width // 2).T
        is_wide = not any(other.any() for other in others) and (
            second.max(initial=0) < 16 <= lowest.max(initial=0) or not second.any()
        )
        if is_wide and lowest.any() and len(lowest) >= 16 and size % width == 0:
            return np.dtype(f"<u{width}")
    return np.dtype("<u2")


def check_bin(part: tuple, folder: pathlib.Path) -> dict:
    """fingerprint, largest id and its place of a .bin file, kept in `folder` once known."""
    path, dtype, skipped, _ = part
    stat = path.stat()
    state = str(path.resolve()), dtype.str, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    note = folder / f"{digest(VERSION, state)}.bin.json"
    try:
        about = json.loads(note.read_text("utf-8"))
        about = {name: about[name] for name in ("fingerprint", "largest", "place")}
        if [type(value) for value in about.values()] == [str, int, int]:
            return about
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    hasher, largest, place, at = new_hasher(), -1, 0, 0
    with contextlib.closing(Bar(f"checking {path}")) as bar, open(path, "rb") as file:
        file.seek(skipped)
        while block := file.read(1 << 24):
            hasher.update(block)
            ids = np.frombuffer(block, dtype)
            if ids.max() > largest:
                largest, place = int(ids.max()), at + int(ids.argmax())
            at += len(ids)
            bar.show(file.tell() / stat.st_size, file.tell(), at)
    about = {"fingerprint": hasher.hexdigest(), "largest": largest, "place": place}
    with storage_errors(note), temporary_beside(note) as temporary:
        temporary.write_text(json.dumps(about), "utf-8")
        os.replace(temporary, note)
    return about


def split_ids(ids: Ids, share: float, eos_id: int) -> tuple[Ids, Ids]:
    """(ids without their last share, that share), cut behind an end-of-text id if one is near.

    Near: it leaves at least half of the share.
    """
    cut = int(len(ids) * (1 - share))
    latest = len(ids) - int(len(ids) * share / 2)
    at = cut
    while at < latest:
        block = ids.read(at, min(1 << 20, latest - at))
        found = np.flatnonzero(block == eos_id)
        if len(found):
            cut = at + int(found[0]) + 1
            break
        at += len(block)
    return ids.part(0, cut), ids.part(cut, len(ids))
