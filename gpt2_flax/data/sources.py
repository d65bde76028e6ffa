"""Where text comes from: a stream of pieces of documents, each with its position.

A source has
    name            for messages
    size            its length in units of position
    key             a string that changes when the text does
    pieces(start)   an iterator of `Piece` from a position on
Pieces are cut before white space that follows a letter, digit or mark. Byte-level BPE
always starts a new token there, so the ids of the pieces are the ids of the whole text.
"""

import codecs
import glob
import hashlib
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterator
from typing import NamedTuple

from gpt2_flax.config import DATASET_ALIASES, EMBEDDED_DATASET, TrainConfig
from gpt2_flax.data.hub import hub_error
from gpt2_flax.errors import UserError

PIECE_CHARS = 64 * 1024
# A text without white space is cut all the same, at the cost of one token pair a cut.
LONGEST_PIECE_CHARS = 1024 * 1024
CUT = re.compile(r"(?<=\S)[ \t\r\n]")


class Piece(NamedTuple):
    """A stretch of text. `pieces(start)` begins with the first piece of the same `start`."""

    text: str
    start: int
    ends_document: bool


class TextFiles:
    """UTF-8 files, one document each, as one run of bytes; read block by block.

    begin, end: the bytes of that run that belong to this source. Positions are bytes.
    """

    def __init__(self, paths: list[pathlib.Path], begin: int = 0, end: int | None = None):
        self.paths = paths
        self.name = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files"
        self.stats = [path.stat() for path in paths]
        self.begin = begin
        self.end = sum(stat.st_size for stat in self.stats) if end is None else end
        self.size = self.end - self.begin
        described = [
            (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
            for path, stat in zip(paths, self.stats, strict=True)
        ]
        self.key = digest(described, self.begin, self.end)

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        position = self.begin + start
        offset = 0
        for path, stat in zip(self.paths, self.stats, strict=True):
            last = min(offset + stat.st_size, self.end)
            if position < last:
                try:
                    for text, n_bytes in read_text(path, position - offset, last - offset):
                        ends = position + n_bytes >= last
                        yield Piece(text, position - self.begin, ends)
                        position += n_bytes
                except OSError as error:
                    raise UserError(f"cannot read {path}: {error.strerror}") from error
            offset += stat.st_size

    def split(self, share: float) -> tuple["TextFiles", "TextFiles"]:
        """This source without its last `share`, cut at the end of a line, and that share."""
        cut = self.begin + int(self.size * (1 - share))
        offset = 0
        for path, stat in zip(self.paths, self.stats, strict=True):
            if cut < offset + stat.st_size:
                cut = offset + next_line(path, cut - offset)
                break
            offset += stat.st_size
        return TextFiles(self.paths, self.begin, cut), TextFiles(self.paths, cut, self.end)


def read_text(path: pathlib.Path, start: int, end: int) -> Iterator[tuple[str, int]]:
    """Pieces of the bytes [start, end) of a file: text and the bytes it took."""
    text, bom = "", 0
    if start == 0:
        with open(path, "rb") as file:
            bom = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
    for decoded in decode(path, start + bom, end):
        text += decoded
        while cut := first_cut(text, 0, ends=not decoded):
            yield text[:cut], bom + len(text[:cut].encode())
            text, bom = text[cut:], 0
    if bom:
        yield "", bom


def decode(path: pathlib.Path, start: int, end: int) -> Iterator[str]:
    """The text of the bytes [start, end) of a file, block by block; an empty one is the last."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        file.seek(start)
        at, block = start, b"-"
        while block:
            block = file.read(min(PIECE_CHARS, end - at))
            try:
                decoded = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise not_utf8(path, at - len(decoder.getstate()[0]) + error.start) from error
            at += len(block)
            if decoded or not block:
                yield decoded


def first_cut(text: str, at: int, ends: bool) -> int:
    """Where the piece that begins at `at` ends; 0 where only more text can tell.

    A function of nothing but the text from `at` on, so that reading from the start of any
    piece gives the same pieces again. ends: whether `text` is all there is.
    """
    left = len(text) - at
    if left <= PIECE_CHARS:
        return len(text) if ends else 0
    if cut := last_cut(text[at : at + PIECE_CHARS]):
        return at + cut
    if left <= LONGEST_PIECE_CHARS and not ends:
        return 0
    longest = min(len(text), at + LONGEST_PIECE_CHARS)
    later = CUT.search(text, at + PIECE_CHARS, longest)
    return later.start() if later else longest


def last_cut(text: str) -> int:
    """The last place to cut a text; 0 where there is none."""
    for size in (256, len(text)):
        tail = text[-size:]
        cut = max((match.start() for match in CUT.finditer(tail)), default=0)
        if cut:
            return len(text) - len(tail) + cut
    return 0


def not_utf8(path: pathlib.Path, offset: int) -> UserError:
    line, left = 1, offset
    with open(path, "rb") as file:
        while before := file.read(min(left, LONGEST_PIECE_CHARS)):
            line, left = line + before.count(b"\n"), left - len(before)
        byte = file.read(1)[0]
    return UserError(
        f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset} (line {line})\n"
        f"  convert it: iconv -f latin1 -t utf-8 {path} > converted.txt"
    )


def next_line(path: pathlib.Path, offset: int) -> int:
    """The first start of a line at or after a byte offset; else of a word; else of a character."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(LONGEST_PIECE_CHARS)
    for mark in (b"\n", b" "):
        found = block.find(mark)
        if found >= 0 and found + 1 < len(block):
            return offset + found + 1
    continued = re.match(rb"[\x80-\xbf]*", block)
    return offset + continued.end()


class Rows:
    """Rows of a dataset's text column. Positions are rows.

    A row is a document, except in WikiText, where a row is a line and an article begins
    with its heading.
    """

    def __init__(self, rows, name: str, column: str, begin: int = 0, end: int | None = None):
        self.rows, self.name, self.column = rows, name, column
        self.begin = begin
        self.end = len(rows) if end is None else end
        self.size = self.end - self.begin
        self.key = digest(rows._fingerprint, column, self.begin, self.end)
        self.rows_are_lines = "wikitext" in name.lower()

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        rows = self.read(self.begin + start)
        row, text = next(rows, (None, None))
        while row is not None:
            following, next_text = next(rows, (None, None))
            ends = following is None or not self.rows_are_lines or is_heading(next_text)
            yield from cut_up(text, row - self.begin, ends)
            row, text = following, next_text

    def read(self, row: int) -> Iterator[tuple[int, str]]:
        """The rows from one on that hold text, each with its number."""
        for first in range(row, self.end, 1000):
            texts = self.rows[first : min(first + 1000, self.end)][self.column]
            yield from ((n, text) for n, text in enumerate(texts, first) if text)

    def split(self, share: float) -> tuple["Rows", "Rows"]:
        cut = self.begin + int(self.size * (1 - share))
        parts = (self.begin, cut), (cut, self.end)
        return tuple(Rows(self.rows, self.name, self.column, *part) for part in parts)


def is_heading(line: str) -> bool:
    """Whether a line of WikiText is an article's title, ` = Title = `, not a section's."""
    words = line.split()
    return len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "="


class PythonSources:
    """Source files of Python's standard library, one document each. Positions are files."""

    def __init__(self, root: pathlib.Path, files: list[pathlib.Path]):
        self.name = f"Python's own source files ({root})"
        self.files = files
        self.size = len(files)
        sizes = [(str(path.relative_to(root)), path.stat().st_size) for path in files]
        self.key = digest(sizes)

    def pieces(self, start: int = 0) -> Iterator[Piece]:
        for at, path in enumerate(self.files[start:], start):
            yield from cut_up(path.read_text("utf-8", errors="replace"), at, True)


def python_sources() -> tuple[PythonSources, PythonSources]:
    """(training, validation) files of the running Python, the same for the same Python.

    Tests and installed packages are left out; one file in twenty, chosen by a hash of its
    name, is held out.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - left_out)
        files += [pathlib.Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    files = [path for path in files if path.stat().st_size]

    def held_out(path):
        name = path.relative_to(root).as_posix()
        return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0

    train = [path for path in files if not held_out(path)]
    return PythonSources(root, train), PythonSources(root, [p for p in files if held_out(p)])


def cut_up(text: str, start: int, ends_document: bool) -> Iterator[Piece]:
    """One text as pieces that share a start."""
    at = 0
    while at < len(text):
        cut = first_cut(text, at, ends=True)
        yield Piece(text[at:cut], start, ends_document and cut == len(text))
        at = cut


def digest(*parts) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def open_sources(config: TrainConfig):
    """(training source, validation source or None) of a run.

    Raises UserError for text that is missing, empty or unreadable.
    """
    if config.train_file:
        train = TextFiles(find_files(config.train_file, "train_file"))
    elif config.dataset == EMBEDDED_DATASET:
        train, held_out = python_sources()
    else:
        train, held_out = open_dataset(config)
    if config.validation_file:
        return train, TextFiles(find_files(config.validation_file, "validation_file"))
    if config.train_file or held_out is None:
        return train.split(config.validation_share) if config.validation_share else (train, None)
    return train, held_out


def find_files(patterns: tuple[str, ...], setting: str) -> list[pathlib.Path]:
    """The files that paths and globs name, in order, each once."""
    found = {}
    for pattern in patterns:
        # os.path's own two take any text; pathlib's raise for ~nobody and for names too long.
        path = os.path.expanduser(pattern)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path))
        if not matches:
            raise UserError(f"{setting} {pattern} does not exist (looked in {os.getcwd()})")
        found |= dict.fromkeys(map(pathlib.Path, matches))
    for path in found:
        if path.is_dir():
            raise UserError(
                f"{setting} {path} is a directory\n  name its files: --{setting} '{path}/*.txt'"
            )
        if not os.access(path, os.R_OK):
            raise UserError(f"{setting} {path} may not be read by this user")
        if path.stat().st_size == 0:
            raise UserError(f"{setting} {path} is empty (0 bytes)")
    return list(found)


def open_dataset(config: TrainConfig) -> tuple[Rows, Rows | None]:
    """The training split of a hub dataset, and its validation split if it has one."""
    name = DATASET_ALIASES.get(config.dataset, config.dataset)
    subset = config.dataset_config
    if not subset and name == DATASET_ALIASES["wikitext"]:
        subset = "wikitext-2-raw-v1"
    try:
        import datasets

        datasets.disable_progress_bars()
        splits = datasets.load_dataset(name, subset or None)
    except Exception as error:  # the clients raise a dozen kinds, some of them plain Exception
        raise hub_error(f"dataset {name}{f' ({subset})' if subset else ''}", error) from error
    if "train" not in splits:
        raise UserError(f"dataset {name} has no train split; it has {', '.join(splits)}")
    columns = splits["train"].column_names
    if config.text_column not in columns:
        raise UserError(
            f"dataset {name} has no column {config.text_column}\n"
            f"  set --text_column to one of {', '.join(columns)}"
        )
    kind = getattr(splits["train"].features[config.text_column], "dtype", "a list")
    if "string" not in kind:
        raise UserError(f"column {config.text_column} of dataset {name} is no text but {kind}")
    label = f"{name} {subset}".strip()
    parts = [
        Rows(splits[split], label, config.text_column) if split in splits else None
        for split in ("train", "validation")
    ]
    return parts[0], parts[1]
