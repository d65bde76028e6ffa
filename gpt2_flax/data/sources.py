"""Where text comes from: a stream of pieces of documents, each with its position.

A source has
    name                  for messages
    key                   a string that changes when the text, or what is read of it, does
    fingerprint           the same, wherever the files lie: a resumed stream is checked by it
    found                 a Counter of what pieces met: replaced, nul, crlf, empty
    part                  None, or (how much is held out, whether this is what is held out, ...)
    pieces(start, cuts)   an iterator of `Piece` from a position on; 0 is its beginning
    split(share)          (this source without its last share, that share), cut between
                          documents where it can be
Pieces are cut (by `cuts`, data/cuts.py) where the ids of the pieces are those of the whole.
"""

import codecs
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from gpt2_flax.config.settings import plain
from gpt2_flax.config.train_config import EMBEDDED_DATASET, TrainConfig
from gpt2_flax.data import files
from gpt2_flax.data.chunking import cut_up
from gpt2_flax.errors import UserError

FILE = 1 << 44  # a position is FILE x the file's number + the place in it
SEARCH_BYTES = 1 << 20  # read at once where a place to split a file is looked for
BLANK_LINE = "blank_line"
# White space of a line that counts as blank, and of a document that is left out: bounds, so that
# no more of a text has to be held than this.
BLANK_CHARS, BLANK_DOCUMENT_CHARS = 4096, 1 << 20
REST_OF_BLANK_LINE = rf"[ \t\r]{{0,{BLANK_CHARS}}}\n"
BLANK_LINES = re.compile(f"(?:{REST_OF_BLANK_LINE})+")


class Piece(NamedTuple):
    """A stretch of text. `pieces(start)` begins with the first piece of the same `start`.

    done: how much of the source was read up to its end, 0 to 1; None where nobody knows.
    """

    text: str
    start: int
    ends_document: bool
    done: float | None = None


# ---------------------------------------------------------------- kinds of files
#
# A reader has
#     key                      what of its settings changes the text
#     size(path)               of a file, in units of position
#     pieces(path, start, end, cuts, found)
#                              (text, position, ends_document, fraction of the file) of a range
#     next_document(path, at)  where the first document begins at or after a position above 0;
#                              None where the file has no such
#     inside(path, at)         a place near a position where a document may be cut in two


class Text:
    """UTF-8 text. Positions are bytes. A file is a document, or several with separators.

    separator: "blank_line", or what stands between documents; empty for none. Separators are
    left out, and so are documents of nothing but white space.
    """

    def __init__(self, separator: str = "", errors: str = "strict"):
        self.errors = errors
        self.blank_lines = separator == BLANK_LINE
        self.separator = separator.replace("\\n", "\n").replace("\\t", "\t")
        pattern = rf"\n{REST_OF_BLANK_LINE}" if self.blank_lines else re.escape(self.separator)
        self.pattern, self.pattern_of_bytes = re.compile(pattern), re.compile(pattern.encode())
        self.key = ("text", separator, errors)

    size = staticmethod(files.unpacked_size)

    def pieces(self, path, start, end, cuts, found) -> Iterator:
        begin = after_mark(path) if start == 0 else start
        blocks = files.decode(path, begin, end, self.errors)
        cuts = cuts if self.errors == "strict" else CutsOfMarked(cuts)
        read = self.separated if self.separator else self.whole
        for text, at, ends, fraction in read(blocks, begin, cuts):
            # The mark that a file may begin with belongs to its first piece.
            yield files.unmark(text, found), start if at == begin else at, ends, fraction

    def whole(self, blocks, at, cuts) -> Iterator:
        """One document, each piece with its own position."""
        text = ""
        for decoded, fraction in blocks:
            text += decoded
            ends = not decoded
            while cut := cuts.first_cut(text, 0, ends):
                yield text[:cut], at, ends and cut == len(text), fraction
                at, text = at + files.n_bytes(text[:cut]), text[cut:]

    def separated(self, blocks, at, cuts) -> Iterator:
        """Documents between separators; all pieces of one have the position of its first."""
        text = ""
        for part, at_document, ends, fraction in self.parts(blocks, at):
            text += part
            while cut := cuts.first_cut(text, 0, ends):
                yield text[:cut], at_document, ends and cut == len(text), fraction
                text = text[cut:]

    def parts(self, blocks, at) -> Iterator:
        """(text, the document's position, whether it ends, fraction), as soon as it is sure."""
        text, first, begun = "", at, False
        for decoded, fraction in blocks:
            text += decoded
            ends = True
            while ends:
                if not begun:
                    if self.blank_lines and (blank := BLANK_LINES.match(text)):
                        at, text = at + files.n_bytes(blank.group()), text[blank.end() :]
                    first = at
                length, behind, ends = self.next_end(text, is_all=not decoded)
                if begun or not is_blank(text[:length]):
                    yield text[:length], first, ends, fraction
                    begun = not ends
                elif not ends:
                    break  # white space, of which nobody knows yet whether a document begins
                at, text = at + files.n_bytes(text[:behind]), text[behind:]
                ends = ends and bool(text)

    def next_end(self, text: str, is_all: bool) -> tuple[int, int, bool]:
        """(how much of a text is its first document, how much that and a separator, whether the
        document ends there). Where it does not, what could begin a separator is left out.
        """
        if found := self.pattern.search(text):
            start, end = found.span()
            return start - (self.blank_lines and text[:start].endswith("\r")), end, True
        if is_all:
            return len(text), len(text), True
        if self.blank_lines:
            tail = text[-BLANK_CHARS - 2 :]
            sure = len(text) - len(tail) + len(tail.rstrip(" \t\r\n"))
        else:
            sure = max(0, len(text) - len(self.separator) + 1)
        return sure, sure, False

    def next_document(self, path, at: int) -> int | None:
        if not self.separator:
            return None
        longest = BLANK_CHARS + 2 if self.blank_lines else len(self.separator.encode())
        held = b""
        with files.Bytes(path, max(0, at - longest)) as file:
            while block := file.read(SEARCH_BYTES):
                held += block
                for found in self.pattern_of_bytes.finditer(held):
                    if (begins := file.at - len(held) + found.end()) >= at:
                        return begins
                held = held[-longest:]
        return None

    def inside(self, path, at: int) -> int:
        """The first start of a line at or after a byte; else of a word; else of a character."""
        at = max(at, after_mark(path) + 1)
        separator = b"" if self.blank_lines else self.separator.encode()
        begin = max(0, at - 1 - len(separator))
        with files.Bytes(path, begin) as file:
            block = file.read(SEARCH_BYTES)
        before = at - 1 - begin
        marks = (block.find(mark, before) + 1 for mark in (b"\n", b" "))
        cut = next((cut for cut in marks if 0 < cut < len(block)), 0)
        if not cut:
            past_character = re.compile(rb".?[\x80-\xbf]*").match(block, before)
            assert past_character is not None  # it matches nothing, too
            cut = past_character.end()
        # Not inside a separator: it would be none any more.
        begins = block.find(separator, max(0, cut - len(separator) + 1), cut + len(separator) - 1)
        return begin + (cut if not separator or begins < 0 else begins)


class CutsOfMarked:
    """Cuts of a text that `files.unmark` is still to be applied to: those of what it becomes."""

    def __init__(self, cuts):
        self.cuts = cuts

    def first_cut(self, text: str, at: int, ends: bool) -> int:
        return self.cuts.first_cut(files.unmark(text, Counter()), at, ends)


def is_blank(text: str) -> bool:
    """Whether a document is nothing but white space, and not too much of it."""
    return not text or (len(text) <= BLANK_DOCUMENT_CHARS and text.isspace())


def after_mark(path) -> int:
    """Where the text of a file begins: behind a byte order mark, if it has one."""
    with files.Bytes(path) as file:
        mark = file.read(len(codecs.BOM_UTF8))
    return len(mark) if mark == codecs.BOM_UTF8 else 0


class JsonLines:
    """One JSON object a line, each a document. Positions are bytes; only lines begin at them."""

    def __init__(self, column: str, errors: str = "strict"):
        self.column, self.errors = column, errors
        self.key = ("jsonl", column, errors)

    size = staticmethod(files.unpacked_size)

    def pieces(self, path, start, end, cuts, found) -> Iterator:
        with files.Bytes(path, start) as file:
            while end is None or file.at < end:
                at = file.at
                line = file.readline()
                if not line:
                    return
                mark = len(codecs.BOM_UTF8) if line.startswith(codecs.BOM_UTF8) else 0
                text = self.text_of(line[mark:], path, at + mark)
                if not text:
                    found["empty"] += 1
                    continue
                text = files.unmark(text, found)
                yield from whole_document(text, at, cuts, file.fraction())

    def text_of(self, line: bytes, path, at: int) -> str | None:
        """The text in a line; None in an empty one."""
        if not line.strip():
            return None

        def fault(what):
            return UserError(f"{path}, line {files.line_at(path, at)}: {what}")

        try:
            handler = "strict" if self.errors == "strict" else "gpt2_flax_mark"
            row = json.loads(line.decode("utf-8", handler))
        except UnicodeDecodeError as error:
            raise files.not_utf8(path, at + error.start) from error
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply, or a number too long")
            raise fault(f"not valid JSON: {reason}\n  mend the line or take it out") from error
        if not isinstance(row, dict):
            raise fault(
                f"{type(row).__name__} instead of an object with columns\n"
                "  each line must be of the kind " + json.dumps({self.column: "the text"})
            )
        if self.column not in row:
            raise fault(f"no column {self.column}{remedy(row)}")
        text = row[self.column]
        if text is not None and not isinstance(text, str):
            raise fault(
                f"column {self.column} holds {type(text).__name__}, not text\n"
                "  set --text_column to one that holds text"
            )
        if text and self.errors == "strict":
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise fault(
                    f"half of a surrogate pair, \\u{ord(text[error.start]):04x}\n"
                    "  mend the line, or put U+FFFD there: --encoding_errors replace"
                ) from error
        return text

    def next_document(self, path, at: int) -> int | None:
        with files.Bytes(path, at - 1) as file:
            file.readline()
            begins = file.at
            return begins if file.read(1) else None

    def inside(self, path, at: int) -> int:
        """The beginning of the line that a byte stands in."""
        begins = 0
        with files.Bytes(path) as file:
            while file.at < at and (block := file.read(min(SEARCH_BYTES, at - file.at))):
                if b"\n" in block:
                    begins = file.at - len(block) + block.rindex(b"\n") + 1
        return begins


class Parquet:
    """Rows of a column, each a document. Positions are rows."""

    def __init__(self, column: str, folder: pathlib.Path):
        """folder: where a packed file is unpacked to; it must be read out of order."""
        self.column, self.folder = column, folder
        self.key = ("parquet", column)

    def open(self, path):
        import pyarrow.parquet

        source = path
        if files.is_packed(path):
            with files.Bytes(path) as packed:
                source = files.Spool(str(path), lambda: packed.read(1 << 20), self.folder).open()
        try:
            file = pyarrow.parquet.ParquetFile(source)
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged_parquet(path, error) from error
        schema = file.schema_arrow
        if self.column not in schema.names:
            raise UserError(f"{path} has no column {self.column}{remedy(schema.names)}")
        kind = schema.field(self.column).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if str(kind) not in ("string", "large_string", "string_view"):
            others = [name for name in schema.names if name != self.column]
            what = str(kind).split("<")[0]
            raise UserError(
                f"column {self.column} of {path} is no text but {what}{remedy(others)}"
            )
        return file

    def size(self, path) -> int:
        with self.open(path) as file:
            return file.metadata.num_rows

    def pieces(self, path, start, end, cuts, found) -> Iterator:
        with self.open(path) as file:
            total = max(1, file.metadata.num_rows)
            for row, text in self.rows(file, path, start, end):
                if not text:
                    found["empty"] += 1
                    continue
                text = files.unmark(text, found)
                yield from whole_document(text, row, cuts, (row + 1) / total)

    def rows(self, file, path, start, end) -> Iterator[tuple[int, str | None]]:
        import pyarrow

        end = file.metadata.num_rows if end is None else end
        first = 0
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if first < end and first + n_rows > start:
                row = first
                try:
                    batches = file.iter_batches(1000, row_groups=[group], columns=[self.column])
                    for batch in batches:
                        texts = batch.column(0).to_pylist()
                        for number, text in enumerate(texts, row):
                            if start <= number < end:
                                yield number, text
                        row += len(texts)
                except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                    raise damaged_parquet(path, error) from error
            first += n_rows

    def next_document(self, path, at: int) -> int | None:
        return at

    def inside(self, path, at: int) -> int:
        return at


def remedy(columns) -> str:
    names = ", ".join(map(plain, columns)) or "none of this file"
    return f"\n  set --text_column to one of: {names[:200]}"


def damaged_parquet(path, error) -> UserError:
    return UserError(
        f"{path} is no Parquet file that can be read: {files.first_line(error)}\n  fetch it again"
    )


def whole_document(text: str, start: int, cuts, done: float | None) -> Iterator[tuple]:
    """The pieces of one text, which share a start."""
    at = 0
    for part in cut_up(text, cuts):
        at += len(part)
        yield part, start, at == len(text), done


# ---------------------------------------------------------------- files as a source


class Files:
    """Files of one kind, one after another."""

    def __init__(self, paths: list, reader, name: str = "", part: tuple | None = None):
        """part: (share held out, whether this is what is held out, where that begins)."""
        self.paths, self.reader, self.part = paths, reader, part
        self.name = name or (str(paths[0]) if len(paths) == 1 else f"{len(paths)} files")
        self.found = Counter()
        self.sizes = [size_on_disk(path) for path in paths]
        *self.sizes_before, self.total = itertools.accumulate(self.sizes, initial=0)
        whole = reader.key, part and part[:2]
        self.key = digest([describe(path) for path in paths], whole)
        self.fingerprint = digest([describe(path)[1:3] for path in paths], whole)

    def pieces(self, start: int, cuts) -> Iterator[Piece]:
        begin, end = self.bounds()
        first, place = divmod(max(start, begin), FILE)
        for number, path in enumerate(self.paths[first:], first):
            stop = None
            if end is not None:
                if number * FILE >= end:
                    return
                stop = end % FILE if number == end // FILE else None
            pieces = self.reader.pieces(path, place, stop, cuts, self.found)
            for text, at, ends, fraction in pieces:
                yield Piece(text, number * FILE + at, ends, self.done(number, fraction))
            place = 0

    def bounds(self) -> tuple[int, int | None]:
        """(first position, position behind the last; None for all) of this source."""
        if self.part is None:
            return 0, None
        _, is_held_out, cut = self.part
        return (cut(), None) if is_held_out else (0, cut())

    def done(self, number: int, fraction: float) -> float:
        read = (self.sizes_before[number] + fraction * self.sizes[number]) / self.total
        if self.part is not None:
            share, is_held_out, _ = self.part
            read = (read - 1 + share) / share if is_held_out else read / (1 - share)
        return min(1.0, max(0.0, read))

    def split(self, share: float) -> tuple["Files", ...]:
        cut = functools.cache(lambda: find_cut(self.paths, self.reader, share))
        return tuple(
            Files(self.paths, self.reader, self.name, (share, is_held_out, cut))
            for is_held_out in (False, True)
        )


def find_cut(paths: list, reader, share: float) -> int:
    """The position where the last share of files begins.

    It is the next beginning of a document, if that leaves half of the share or more; else the
    beginning of the file, if that leaves no more than twice the share; else inside a document.
    What is before it is never empty.
    """
    sizes = [reader.size(path) for path in paths]
    total, number = sum(sizes), 0
    place = max(1, int(total * (1 - share)))
    if place >= total:
        return len(paths) * FILE
    while place >= sizes[number]:
        place -= sizes[number]
        number += 1
    if number and not place:
        return number * FILE
    behind = sum(sizes[number + 1 :])
    found = reader.next_document(paths[number], place)
    if found is not None and found < sizes[number]:
        left, found = sizes[number] - found + behind, number * FILE + found
    else:
        left, found = behind, (number + 1) * FILE
    if left >= share * total / 2:
        return found
    if number and sizes[number] + behind <= 2 * share * total:
        return number * FILE
    return number * FILE + reader.inside(paths[number], place) or len(paths) * FILE


def size_on_disk(path) -> int:
    return path.size if isinstance(path, files.Spool) else os.stat(path).st_size


def describe(path) -> tuple:
    """(where a file lies, its name, its state on disk, and more of that) to know it again."""
    if isinstance(path, files.Spool):
        return "", path.name, path.digest, 0
    stat = os.stat(path)
    state = stat.st_size, stat.st_mtime_ns
    return str(path.resolve()), path.name, state, stat.st_ctime_ns


def blank_error(source) -> UserError:
    """The error for a text without one character but white space."""
    what, remedy = source.name, "use another text"
    if source.part is not None:
        what += " where it is held out" if source.part[1] else " where it is not held out"
        remedy = "give a --validation_file, another --validation_share, or --validation_share 0"
    return UserError(f"{what} holds nothing but white space\n  {remedy}")


def digest(*parts) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


# ---------------------------------------------------------------- Python's own sources


def python_sources() -> tuple[Files, ...]:
    """(training, validation) files of the running Python, the same for the same Python.

    Tests and installed packages are left out; one file in twenty, chosen by a hash of its
    name, is held out.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - left_out)
        paths += [pathlib.Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    paths = [path for path in paths if path.stat().st_size]

    def held_out(path):
        name = path.relative_to(root).as_posix()
        return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0

    name = f"Python's own source files ({root})"
    reader = Text(errors="replace")
    parts = [[p for p in paths if held_out(p) == wanted] for wanted in (False, True)]
    return tuple(Files(part, reader, name) for part in parts)


# ---------------------------------------------------------------- the sources of a run


def open_sources(config: TrainConfig, folder: pathlib.Path):
    """(training source, validation source or None) of a run; neither of ids in .bin files.

    folder: of token files. Raises UserError for text that is missing, empty or unreadable.
    """
    check_options(config)
    if config.train_file:
        train, held_out = open_files(config, "train_file", folder), None
    elif config.dataset == EMBEDDED_DATASET:
        train, held_out = python_sources()
    else:
        from gpt2_flax.data.hub_datasets import open_dataset

        train, held_out = open_dataset(config, folder)
    if config.validation_file:
        held_out = open_files(config, "validation_file", folder)
    elif not config.validation_share:
        held_out = None
    elif held_out is None and train is not None:
        train, held_out = train.split(config.validation_share)
    elif held_out is not None and config.validation_share != TrainConfig().validation_share:
        raise UserError(
            f"validation_share {config.validation_share} has no effect: {config.dataset} has a"
            " validation split of its own\n  leave it out; 0 for no evaluation"
        )
    return train, held_out


def open_files(config: TrainConfig, setting: str, folder: pathlib.Path) -> Files | None:
    """The source that train_file or validation_file names; None where it is ids."""
    return open_patterns(getattr(config, setting), config, setting, folder)


def open_patterns(patterns, config: TrainConfig, setting: str, folder) -> Files | None:
    """As `open_files`. setting: what the patterns are called where they name no file."""
    text = Text(config.document_separator, config.encoding_errors)
    if files.STANDARD_INPUT in patterns:
        return Files([files.standard_input(folder)], text)
    paths = files.find_files(patterns, setting)
    readers = {
        "text": text,
        "jsonl": JsonLines(config.text_column, config.encoding_errors),
        "parquet": Parquet(config.text_column, folder),
        "bin": None,
    }
    reader = readers[files.kind_of(paths[0])]
    return Files(paths, reader) if reader else None


# What takes effect on which kinds of text, beside what `config` refuses.
NEEDED_KINDS = {
    "text_column": ("dataset", "jsonl", "parquet"),
    "document_separator": ("text",),
    "encoding_errors": ("text", "jsonl"),
    "add_eos": ("dataset", "embedded", "text", "jsonl", "parquet"),
    "streaming": ("dataset", "embedded", "text", "jsonl", "parquet"),
}


def check_options(config: TrainConfig) -> None:
    """Raise UserError for a setting that was given and has no effect on the text of a run."""
    train, held_out = kinds(config, "train_file"), kinds(config, "validation_file")
    defaults = TrainConfig()
    for name, needed in NEEDED_KINDS.items():
        found = train if name == "streaming" else train | held_out
        if getattr(config, name) != getattr(defaults, name) and found.isdisjoint(needed):
            endings = [end for end, kind in files.KINDS.items() if kind in needed]
            raise UserError(
                f"{name} has no effect on files of kind"
                f" {', '.join(sorted(found - {'dataset', 'embedded'}))}\n"
                f"  leave it out, or name the files {' or '.join(endings)}"
            )


def kinds(config: TrainConfig, setting: str) -> set[str]:
    """Of what kind the text is that train_file or validation_file names."""
    patterns = getattr(config, setting)
    if not patterns:
        kind = "embedded" if config.dataset == EMBEDDED_DATASET else "dataset"
        return {kind} if setting == "train_file" else set()
    if files.STANDARD_INPUT not in patterns:
        return {files.kind_of(files.find_files(patterns, setting)[0])}
    if setting != "train_file" or len(patterns) > 1:
        raise UserError(
            "standard input (-) must be the only train_file, and is no validation_file\n"
            "  put the text into files"
        )
    if config.streaming:
        raise UserError(
            "train_file - cannot be streamed: to continue a run, its text is read again\n"
            "  leave out --streaming, or put the text into a file"
        )
    return {"text"}
