"""Files: finding them, opening them whatever they are packed in, decoding them with positions.

A position in a file counts its bytes after decompression.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import lzma
import os
import pathlib
import re
import sys
import tempfile
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator

from gpt2_flax.errors import StorageError, UserError

BLOCK_BYTES = 64 * 1024
MAX_LINE_BYTES = 1 << 28  # of a file of lines; a text may have lines of any length
MAX_XZ_BYTES = 1 << 29  # memory for unpacking: `xz -9` asks for 65 MiB, a header may for 4 GiB
STANDARD_INPUT = "-"
PACKED = (".gz", ".zst", ".xz")
KINDS = {".txt": "text", ".jsonl": "jsonl", ".parquet": "parquet", ".bin": "bin"}


# ---------------------------------------------------------------- finding


def find_files(patterns: tuple[str, ...], setting: str) -> list[pathlib.Path]:
    """The files that paths, globs and directories name, in order, each once.

    Of a directory: the files below it whose names say what they are, hidden and empty ones
    left out. Raises UserError for what is missing, empty or unreadable.
    """
    found = {}
    for pattern in patterns:
        # os.path's own two take any text; pathlib's raise for ~nobody and for names too long.
        path = os.path.expanduser(pattern)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UserError(f"{setting} {pattern} does not exist (looked in {os.getcwd()})")
        for match in map(pathlib.Path, matches):
            found |= dict.fromkeys(files_below(match, setting) if match.is_dir() else [match])
    for path in found:
        if not path.exists():
            raise UserError(f"{setting} {path} is a link to a file that does not exist")
        if not os.access(path, os.R_OK):
            raise UserError(f"{setting} {path} may not be read by this user")
        if path.is_file() and path.stat().st_size == 0:
            raise UserError(f"{setting} {path} is empty (0 bytes)")
        if not path.is_file():
            raise UserError(
                f"{setting} {path} is no file that can be read twice\n"
                "  pipe it into standard input instead: --train_file -"
            )
        if is_packed(path) and kind_of(path) == "bin":
            raise UserError(
                f"{setting} {path} is packed, and ids are read out of order\n  unpack it first"
            )
    kinds = {kind_of(path): path for path in found}
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise UserError(
            f"{setting} names files of different kinds: {first} ({one}) and {second} ({other})\n"
            "  give files of one kind, by a glob for example"
        )
    return list(found)


def files_below(folder: pathlib.Path, setting: str) -> list[pathlib.Path]:
    def refuse(error):
        raise UserError(f"{setting} {error.filename} cannot be read: {error.strerror}") from error

    files, n_others = [], 0
    for at, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (pathlib.Path(at, name) for name in sorted(names) if name[0] != "."):
            if suffix_of(path) not in KINDS:
                n_others += 1
            elif path.is_file() and path.stat().st_size:
                files.append(path)
    if not files:
        others = f"; {n_others} files of other names" if n_others else ""
        raise UserError(
            f"{setting} {folder} is a directory without text: no {', '.join(KINDS)} in it{others}"
            f"\n  name its files: --{setting} '{folder}/*'"
        )
    return files


def suffix_of(path: pathlib.Path) -> str:
    """The ending that tells a file's kind: `.txt` of a.txt and of a.txt.gz."""
    endings = [ending.lower() for ending in path.suffixes]
    return endings[-2] if endings[-1:] and endings[-1] in PACKED and endings[1:] else "".join(
        endings[-1:]
    )  # fmt: skip


def kind_of(path: pathlib.Path) -> str:
    """text, jsonl, parquet or bin; a name that says nothing is text's."""
    return KINDS.get(suffix_of(path), "text")


def is_packed(path) -> bool:
    return pathlib.Path(path).suffix.lower() in PACKED


# ---------------------------------------------------------------- opening


class Spool:
    """A file without a name, gone with this process: what cannot be read twice, or not freely.

    It takes the place of a path in `Bytes`.
    """

    def __init__(self, name: str, read, folder: pathlib.Path):
        """read: returns the next bytes, none at the end. Raises StorageError on a full disk."""
        self.name = name
        hasher = hashlib.blake2b(digest_size=16)
        with storage_errors(name, folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        while block := read():
            hasher.update(block)
            with storage_errors(name, folder):
                self.write(block)
        self.digest = hasher.hexdigest()

    def write(self, block: bytes) -> None:
        try:
            self.file.write(block)
            self.file.flush()
        except OSError:
            self.file.close()  # which tries to write it again, and fails as well
            raise

    def __str__(self):
        return self.name

    def open(self):
        return io.BufferedReader(_FromSpool(self))

    @property
    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size


@contextlib.contextmanager
def storage_errors(name: str, folder: pathlib.Path):
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot keep {name} in {folder}: {error.strerror}\n"
            "  choose another place with --cache_dir, or make room there"
        ) from error


class _FromSpool(io.RawIOBase):
    """Reads a spool from a place of its own, so that several can."""

    def __init__(self, spool: Spool):
        self.spool, self.at = spool, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.spool.size}
        self.at = bases[whence] + offset
        return self.at

    def readinto(self, buffer):
        data = os.pread(self.spool.file.fileno(), len(buffer), self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def standard_input(folder: pathlib.Path) -> Spool:
    """All of standard input. Raises UserError where nothing comes."""
    if sys.stdin is None:
        raise UserError("train_file - is standard input, which is closed here")
    if sys.stdin.isatty():
        print("reading text from standard input, to its end (Ctrl-D)", file=sys.stderr)
    spool = Spool("standard input", lambda: sys.stdin.buffer.read(1 << 20), folder)
    if not spool.size:
        raise UserError("train_file - is empty: standard input gave 0 bytes")
    return spool


class Bytes:
    """The bytes of a file, unpacked, from a position on. A context manager.

    Raises UserError for a damaged or truncated file and for one that cannot be read.
    """

    def __init__(self, path, start: int = 0):
        self.path, self.at = path, 0
        try:
            self.raw = path.open() if isinstance(path, Spool) else open(path, "rb")  # noqa: SIM115
            self.n_raw = self.raw.seek(0, os.SEEK_END)
            self.raw.seek(0)
            self.stream = unpacked(self.raw, path)
        except READ_ERRORS as error:
            raise unreadable(path, error) from error
        if self.stream is self.raw:
            self.at = self.raw.seek(start)
        try:
            while self.at < start and self.read(min(start - self.at, 1 << 20)):
                pass
        except UserError:
            self.__exit__()
            raise

    def read(self, size: int) -> bytes:
        try:
            data = self.stream.read(size)
        except READ_ERRORS as error:
            raise unreadable(self.path, error) from error
        self.at += len(data)
        return data

    def readline(self) -> bytes:
        try:
            line = self.stream.readline(MAX_LINE_BYTES + 1)
        except READ_ERRORS as error:
            raise unreadable(self.path, error) from error
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"{self.path}: the line at byte {self.at} is over {MAX_LINE_BYTES} bytes long\n"
                "  a document must fit into memory; cut it into several, or make it a .txt"
            )
        self.at += len(line)
        return line

    def fraction(self) -> float:
        """How much of the file, as it is on disk, was read: 0 to 1."""
        return min(1.0, self.raw.tell() / max(1, self.n_raw))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()
        self.raw.close()


def unpacked(raw, path):
    suffix = "" if isinstance(path, Spool) else pathlib.Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".xz":
        return io.BufferedReader(_Xz(raw), 1 << 18)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(_Reading(pyarrow.CompressedInputStream(raw, "zstd")), 1 << 18)
    return raw


class _Xz(io.RawIOBase):
    """xz streams, one behind another, and the zeros that may follow each.

    What follows and is neither raises LZMAError; lzma.LZMAFile leaves it out without a word.
    """

    def __init__(self, raw):
        self.raw, self.decoder, self.block = raw, lzma.LZMADecompressor(memlimit=MAX_XZ_BYTES), b""

    def readable(self):
        return True

    def readinto(self, buffer):
        data = b""
        while not data:
            if self.decoder.eof and not self.begin_next():
                return 0
            if self.decoder.needs_input and not self.block:
                self.block = self.raw.read(1 << 16)
                if not self.block:
                    raise EOFError
            data = self.decoder.decompress(self.block, len(buffer))
            self.block = b""
        buffer[: len(data)] = data
        return len(data)

    def begin_next(self) -> bool:
        """Whether there is one more stream."""
        block = self.decoder.unused_data
        while not block.strip(b"\0"):
            block = self.raw.read(1 << 16)
            if not block:
                return False
        self.decoder, self.block = (
            lzma.LZMADecompressor(memlimit=MAX_XZ_BYTES),
            block.lstrip(b"\0"),
        )
        return True


class _Reading(io.RawIOBase):
    """An Arrow stream as what `io` can buffer."""

    def __init__(self, stream):
        self.stream = stream

    def readable(self):
        return True

    def readinto(self, buffer):
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


def unreadable(path, error: Exception) -> UserError:
    """The error for what was raised while a file was read."""
    if (
        isinstance(error, OSError) and error.errno is not None
    ):  # gzip's and Arrow's OSErrors have none
        return UserError(f"cannot read {path}: {error.strerror}")
    reason = first_line(error) if str(error) else "it ends too early"
    return UserError(
        f"{path} is damaged or not complete: {reason}\n"
        f"  fetch it again, or test it: {tester(path)} -t {path}"
    )


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a length that a message bears."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def tester(path) -> str:
    return {".gz": "gzip", ".xz": "xz"}.get(pathlib.Path(str(path)).suffix.lower(), "zstd")


def unpacked_size(path) -> int:
    """Bytes of a file after decompression; reads a packed one through."""
    if isinstance(path, Spool):
        return path.size
    if not is_packed(path):
        return os.stat(path).st_size
    with Bytes(path) as file:
        while file.read(1 << 20):
            pass
        return file.at


# ---------------------------------------------------------------- decoding

# Stands for 1, 2 or 3 bytes that are not UTF-8; text from outside cannot hold it.
_MARKS = {n: chr(0xDC00 + n) for n in (1, 2, 3)}
_MARK = re.compile("[\ud800-\udfff]")


def _mark(error):
    return _MARKS[error.end - error.start], error.end


codecs.register_error("gpt2_flax_mark", _mark)


def decode(path, start: int, end: int | None, errors: str) -> Iterator[tuple[str, float]]:
    """(text, fraction read) of the bytes [start, end) of a file; an empty text is the last.

    errors: "strict", or "replace" for marks in the place of bytes that are not UTF-8, which
    `unmark` turns into U+FFFD and `n_bytes` knows the length of.
    """
    handler = "strict" if errors == "strict" else "gpt2_flax_mark"
    decoder = codecs.getincrementaldecoder("utf-8")(handler)
    with Bytes(path, start) as file:
        block = b"-"
        while block:
            left = BLOCK_BYTES if end is None else min(BLOCK_BYTES, end - file.at)
            pending = len(decoder.getstate()[0])
            before = file.at - pending
            block = file.read(left)
            try:
                decoded = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise not_utf8(path, before + error.start) from error
            if decoded or not block:
                yield decoded, file.fraction()
        if decoded:
            yield "", 1.0


def n_bytes(text: str) -> int:
    """Bytes that a decoded text took up in its file."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())  # a search for marks takes many times as long
    except UnicodeEncodeError:
        too_many = sum(3 - (ord(mark) - 0xDC00) for mark in _MARK.findall(text))
        return len(text.encode("utf-8", "surrogatepass")) - too_many


def unmark(text: str, found: Counter) -> str:
    """The text with U+FFFD for every mark; counts them, NULs and CRLFs in `found`."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text, n_marks = _MARK.subn("\ufffd", text)
        found["replaced"] += n_marks
    found["nul"] += text.count("\0")
    found["crlf"] += text.count("\r\n") if "\r" in text else 0
    return text


def not_utf8(path, offset: int) -> UserError:
    with Bytes(path, offset) as file:
        byte = file.read(1)[0]
    return UserError(
        f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset} (line {line_at(path, offset)})"
        f"\n  convert it (iconv -f latin1 -t utf-8), or put U+FFFD there:"
        " --encoding_errors replace"
    )


def line_at(path, offset: int) -> int:
    """The number, from 1, of the line that a byte stands in."""
    line = 1
    with Bytes(path) as file:
        while file.at < offset and (block := file.read(min(1 << 20, offset - file.at))):
            line += block.count(b"\n")
    return line
