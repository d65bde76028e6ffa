"""Texts for tests, and what to ask of them.

Some are numbers, `0 1 2 ...`, with a tokenizer whose tokens are numbers: an id tells its place.
"""

import contextlib
import gzip
import itertools
import lzma
import pathlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest

from gpt2_flax.data.sources import Piece
from gpt2_flax.errors import UserError


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    """A file, packed as its name says."""
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(PACKINGS.get(path.suffix, bytes)(content))
    return path


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def xz(content: bytes) -> bytes:
    return lzma.compress(content, preset=0)  # whose dictionary takes the least memory


PACKINGS = {"": bytes, ".gz": gzip.compress, ".xz": xz, ".zst": zstd}


def joined(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def documents(source, cuts) -> list[str]:
    """The texts that a source's ends of documents separate."""
    texts = [""]
    for piece in source.pieces(0, cuts):
        texts[-1] += piece.text
        if piece.ends_document:
            texts.append("")
    assert texts.pop() == ""
    return texts


def check_restarts(source, cuts, n_places: int = 5) -> list[Piece]:
    """All pieces of a source, seen to be the same when it is read from a later place on.

    n_places: so many starts of pieces are tried, in equal distances, and the last.
    """

    def without_progress(pieces):
        return [piece[:3] for piece in pieces]

    pieces = list(source.pieces(0, cuts))
    starts = [piece.start for piece in pieces]
    places = sorted({*starts})
    assert starts == sorted(starts)
    for start in [*places[:: max(1, len(places) // n_places)], *places[-1:]]:
        expected = pieces[starts.index(start) :]
        assert without_progress(source.pieces(start, cuts)) == without_progress(expected)
    return pieces


@contextlib.contextmanager
def refused(match: str, kind=UserError):
    """That what is done here ends with a message of at most three lines that says this."""
    with pytest.raises(kind, match=match) as error:
        yield
    assert type(error.value) is kind
    assert len(str(error.value).splitlines()) <= 3


class Numbers:
    """A tokenizer of numbers; counts how often it was asked."""

    def __init__(self, vocab_size: int = 1000, eos_id: int = 999, fails_at: int = -1):
        self.name, self.fingerprint = "numbers", f"numbers {eos_id}"
        self.vocab_size, self.eos_id = vocab_size, eos_id
        self.calls, self.fails_at = 0, fails_at
        self.cuts = SimpleNamespace(forced=0)  # `Documents` come in pieces already

    def encode_batch(self, texts):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("in the middle")
        return [np.array(text.split(), np.int32) for text in texts]


class Documents:
    """Documents of numbers, in pieces. Some pieces hold nothing and some share a start."""

    def __init__(self, *documents, longest: int = 7):
        self.name, self.part, self.parts, start = "documents", None, [], 0
        for document in documents:
            lengths = itertools.cycle([3, 0, longest, 1])
            while document:
                part, document = np.split(document, [next(lengths)])
                text = "".join(f"{number} " for number in part)
                self.parts.append(Piece(text, start, ends_document=not len(document)))
                start += len(self.parts) % 3 > 0
                document = list(document)
        self.key = self.fingerprint = repr(documents)
        self.found = Counter()

    def pieces(self, start, cuts):
        yield from itertools.dropwhile(lambda piece: piece.start < start, self.parts)
