"""Text of the datasets library: a column of a dataset's rows, kept on disk or streamed.

A row is a document, except in WikiText, where a row is a line and an article begins with its
heading.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gpt2_flax import hub
from gpt2_flax.config.settings import plain
from gpt2_flax.config.train_config import DATASET_ALIASES, TrainConfig
from gpt2_flax.data.files import first_line
from gpt2_flax.data.sources import Piece, digest, whole_document
from gpt2_flax.data.token_files import temporary_beside
from gpt2_flax.errors import StorageError, UserError

SHARD = 1 << 40  # a position in a stream is SHARD x the shard's number + the row in it
ROWS_AT_ONCE = 1000


class Rows:
    """Rows of a dataset on disk, loaded when they are first read. Positions are rows."""

    def __init__(self, load: Callable, name: str, column: str, key: str, part=None):
        """load: returns a datasets.Dataset. key: its fingerprint.

        part: (share held out, whether this is what is held out).
        """
        self.load, self.name, self.column, self.part = load, name, column, part
        self.key = self.fingerprint = digest(key, column, part)
        self.found = Counter()
        self.rows_are_lines = are_lines(name)
        self.loaded_key = key

    def pieces(self, start: int, cuts) -> Iterator[Piece]:
        rows = self.load()
        begin, end = self.bounds(rows)
        position = max(start, begin)
        texts = self.texts(rows, position, end)
        size = max(1, end - begin)
        for row, text, ends in documents(texts, self.rows_are_lines, self.found):
            yield from as_pieces(text, row, ends, cuts, (row + 1 - begin) / size)

    def texts(self, rows, begin: int, end: int) -> Iterator[tuple[int, str | None]]:
        for first in range(begin, end, ROWS_AT_ONCE):
            try:
                texts = rows[first : min(first + ROWS_AT_ONCE, end)][self.column]
            except Exception as error:  # Arrow's, the system's, or of the codec
                raise UserError(
                    f"dataset {self.name} cannot be read: {first_line(error)}\n"
                    "  remove it from Hugging Face's cache, and it is fetched again"
                ) from error
            yield from enumerate(texts, first)

    def bounds(self, rows) -> tuple[int, int]:
        if self.part is None:
            return 0, len(rows)
        share, is_held_out = self.part
        cut = self.cut(rows, share)
        return (cut, len(rows)) if is_held_out else (0, cut)

    def cut(self, rows, share: float) -> int:
        """Where the last share begins: with a document, if that leaves half of it or more."""
        cut = max(1, int(len(rows) * (1 - share)))
        latest = len(rows) - (len(rows) - cut + 1) // 2
        if self.rows_are_lines:
            lines = self.texts(rows, cut, latest + 1)
            cut = next((row for row, text in lines if is_heading(text)), cut)
        return cut

    def split(self, share: float) -> tuple["Rows", ...]:
        return tuple(
            Rows(self.load, self.name, self.column, self.loaded_key, (share, is_held_out))
            for is_held_out in (False, True)
        )


class Stream:
    """Rows of a dataset that is read from where it lies, and never kept.

    A position names a shard, one of the dataset's files, and a row in it: to go on, only the
    rows before it in that shard are read again.
    """

    def __init__(self, rows, name: str, column: str, key: str, n_rows, failure, part=None):
        """rows: a datasets.IterableDataset. n_rows: how many it has, None where unknown.

        failure: makes a UserError of what reading raises.
        part: (rows held out from the beginning, whether this is what is held out).
        """
        self.rows, self.name, self.column, self.failure = rows, name, column, failure
        self.n_rows, self.part, self.dataset_key = n_rows, part, key
        self.key = self.fingerprint = digest("stream", key, column, part)
        self.found = Counter()
        self.rows_are_lines = are_lines(name)

    def pieces(self, start: int, cuts) -> Iterator[Piece]:
        n_held_out, is_held_out = self.part or (0, False)
        # Where the held-out rows end is known from the beginning only.
        texts = self.texts(0 if is_held_out else start)
        if is_held_out:
            texts = itertools.takewhile(self.until(n_held_out), texts)
            texts = itertools.dropwhile(lambda row: row[0] < start, texts)
        elif n_held_out and not start:
            texts = itertools.dropwhile(self.until(n_held_out), texts)
        for at, text, ends in documents(texts, self.rows_are_lines, self.found):
            yield from as_pieces(text, at, ends, cuts, None)

    def until(self, n_rows: int) -> Callable[[tuple], bool]:
        """A question to each row in turn: whether it is before the cut behind n rows.

        The cut is where a document begins, if that takes no more than half as many rows again.
        """
        numbers = itertools.count()

        def is_before(row: tuple) -> bool:
            number = next(numbers)
            if self.rows_are_lines and n_rows <= number < n_rows + n_rows // 2:
                return not is_heading(row[1])
            return number < n_rows

        return is_before

    def texts(self, start: int) -> Iterator[tuple[int, str | None]]:
        shard, row = divmod(start, SHARD)
        for number in range(shard, self.rows.num_shards):
            only = self.rows.shard(self.rows.num_shards, number)
            yield from self.texts_of(only, number, row if number == shard else 0)

    def texts_of(self, shard, number: int, begin: int) -> Iterator[tuple[int, str | None]]:
        first = 0
        batches = shard.with_format("arrow").iter(ROWS_AT_ONCE)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:  # the clients raise a dozen kinds, some plain Exception
                raise self.failure(error) from error
            check_column(self.name, columns_of(batch.schema), self.column)
            if first + len(batch) > begin:
                texts = batch[self.column].to_pylist()
                for row, text in enumerate(texts, first):
                    if row >= begin:
                        yield number * SHARD + row, text
            first += len(batch)

    def split(self, share: float) -> tuple["Stream", ...]:
        if not self.n_rows:
            raise UserError(
                f"dataset {self.name} does not say how many rows it has, so no share of its"
                " stream can be held out\n  give a --validation_file, or --validation_share 0"
            )
        held_out = max(1, round(self.n_rows * share))
        made = (self.rows, self.name, self.column, self.dataset_key, self.n_rows, self.failure)
        return tuple(Stream(*made, (held_out, is_held_out)) for is_held_out in (False, True))


def documents(texts: Iterable, rows_are_lines: bool, found: Counter) -> Iterator:
    """(position, text, whether a document ends with it) of the rows that hold text."""
    pending = None
    for at, text in texts:
        if not text:
            found["empty"] += not rows_are_lines
            continue
        if pending is not None:
            yield *pending, not rows_are_lines or is_heading(text)
        pending = at, text
    if pending is not None:
        yield *pending, True


def as_pieces(text: str, start: int, ends: bool, cuts, done: float | None) -> Iterator[Piece]:
    for part, at, is_last, _ in whole_document(text, start, cuts, None):
        yield Piece(part, at, ends and is_last, done)


def are_lines(name: str) -> bool:
    return "wikitext" in name.lower()


def is_heading(line: str | None) -> bool:
    """Whether a line of WikiText is an article's title, ` = Title = `, not a section's."""
    words = (line or "").split()
    return len(words) > 2 and words[0] == words[-1] == "=" and words[1] != "="


# ---------------------------------------------------------------- opening a dataset


def open_dataset(config: TrainConfig, folder: pathlib.Path):
    """(training source, the dataset's own validation split or None).

    What was learned of a dataset of the hub is kept in `folder`, so that with a token file
    at hand neither the dataset nor the hub is asked again.
    """
    name = DATASET_ALIASES.get(config.dataset, config.dataset)
    subset = config.dataset_config
    if not subset and name == DATASET_ALIASES["wikitext"]:
        subset = "wikitext-2-raw-v1"
    opened = Dataset(name, subset, config)
    column = config.text_column
    if config.streaming:
        return opened.streams(column)
    request = digest(name, subset, config.dataset_split, column, hub.endpoint())
    note = folder / f"{request}.dataset.json"
    known: Any = None if opened.is_local else read_note(note, hub.cached_revision(name))
    if known is None:
        known = {
            "train": opened.fingerprint(config.dataset_split),
            "validation": opened.fingerprint("validation") if opened.has_validation else None,
            "revision": hub.cached_revision(name),
        }
        if not opened.is_local:
            write_note(note, known)
    train = Rows(opened.train, opened.label, column, known["train"])
    if known["validation"] is None:
        return train, None
    return train, Rows(opened.validation, opened.label, column, known["validation"])


class Dataset:
    """A dataset of the hub or of a local directory, fetched on first use.

    Raises UserError where it, its split or its column is not to be had.
    """

    def __init__(self, name: str, subset: str, config: TrainConfig):
        self.name, self.subset, self.config = name, subset, config
        self.is_local = os.path.isdir(name)
        self.label = f"{name} {subset}".strip()

    @functools.cached_property
    def builder(self):
        if not self.is_local and not hub.reachable():
            os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when datasets is imported
        try:
            import datasets

            datasets.disable_progress_bars()
            datasets.logging.set_verbosity_error()
            builder = datasets.load_dataset_builder(self.name, self.subset or None)
            if not self.config.streaming:
                builder.download_and_prepare()
        except Exception as error:  # the clients raise a dozen kinds, some plain Exception
            raise self.failure(error) from error
        return builder

    def fingerprint(self, split: str) -> str:
        return self.read(split)._fingerprint

    @functools.cached_property
    def has_validation(self) -> bool:
        own = "validation"
        return own in (self.builder.info.splits or {}) and own not in self.config.dataset_split

    def train(self):
        return self.read(self.config.dataset_split)

    def validation(self):
        return self.read("validation")

    @functools.cache  # noqa: B019
    def read(self, split: str):
        builder = self.builder
        with self.split_errors(split, builder.info.splits or {}):
            rows = builder.as_dataset(split=split)
        check_column(self.name, kinds_of(rows.features), self.config.text_column)
        return rows

    def streams(self, column: str):
        """(training stream, validation stream or None)."""
        split, builder = self.config.dataset_split, self.builder
        try:
            found = builder.as_streaming_dataset()
        except Exception as error:  # as above
            raise self.failure(error) from error
        with self.split_errors(split, found):
            parts = {split: builder.as_streaming_dataset(split=split)}
        if "validation" in found and "validation" not in split:
            parts["validation"] = found["validation"]
        sources = []
        for part, rows in parts.items():
            if rows.features is not None:
                check_column(self.name, kinds_of(rows.features), column)
            about = (builder.info.splits or {}).get(part)
            # What was kept of it on disk may have other shards, and with them other positions.
            key = digest(self.label, part, builder.hash, rows.num_shards)
            n_rows = getattr(about, "num_examples", None)
            sources.append(Stream(rows, self.label, column, key, n_rows, self.failure))
        return sources[0], sources[1] if len(sources) > 1 else None

    @contextlib.contextmanager
    def split_errors(self, split: str, splits: Iterable[str]):
        """Context that says which splits there are where one is asked for that is not."""
        try:
            yield
        except Exception as error:
            if "corresponds to no data" in str(error):
                raise UserError(
                    f"split {split} of dataset {self.name} is empty (0 rows)"
                ) from error
            # Of what is no split the library raises these themselves, none of their kinds.
            if type(error) not in (ValueError, KeyError, AssertionError, TypeError):
                raise self.failure(error) from error
            raise UserError(
                f"dataset {self.name} has no split {split}: {first_line(error)}\n"
                f"  set --dataset_split to one of: {', '.join(splits)}"
            ) from error

    def failure(self, error: BaseException) -> UserError:
        """The error for what could not be had: no room for it, not there, or no hub."""
        what = f"dataset {self.name}{f' ({self.subset})' if self.subset else ''}"
        while type(error).__name__ == "DatasetGenerationError" and error.__cause__:
            error = error.__cause__
        no_room = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES
        if isinstance(error, OSError) and error.errno in no_room:
            return StorageError(
                f"{what} cannot be kept in Hugging Face's cache: {error.strerror}\n"
                "  make room there, or set HF_HOME to another place"
            )
        if self.is_local:
            return UserError(f"{what} cannot be read: {first_line(error)}")
        return hub.hub_error(what, error)


def kinds_of(features) -> dict[str, str]:
    """The type of each column of a datasets.Dataset."""
    return {name: getattr(kind, "dtype", "a list or object") for name, kind in features.items()}


def columns_of(schema) -> dict[str, str]:
    """The type of each column of an Arrow table."""
    return {field.name: str(field.type).split("<")[0] for field in schema}


def check_column(name: str, kinds: dict[str, str], column: str) -> None:
    if column not in kinds:
        raise UserError(
            f"dataset {name} has no column {column}\n"
            f"  set --text_column to one of {', '.join(map(plain, kinds))[:200]}"
        )
    if "string" not in kinds[column]:
        raise UserError(f"column {column} of dataset {name} is no text but {kinds[column]}")


def read_note(path: pathlib.Path, revision: str | None) -> dict | None:
    """What was kept of a dataset, if it is of the revision that the hub's cache holds."""
    try:
        known = json.loads(path.read_text("utf-8"))
        fits = known["revision"] == revision and {"train", "validation"} <= known.keys()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return known if fits else None


def write_note(path: pathlib.Path, known: dict) -> None:
    try:
        with temporary_beside(path) as temporary:
            temporary.write_text(json.dumps(known), "utf-8")
            os.replace(temporary, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}\n"
            "  choose another place with --cache_dir, or make room there"
        ) from error
