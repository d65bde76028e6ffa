"""What a run would train on, for people to look at: `--show_data`."""

import itertools
import json
from collections.abc import Iterator

import numpy as np

from gpt2_flax.data.batches import StoredRows


def lines(rows, held_out, about: dict, add_eos: bool, tokenizer, n: int) -> Iterator[str]:
    """The counts of a text and its first n rows in training order, line by line.

    rows: StoredRows or StreamedRows. held_out: ids, or None. about: what is known of the text,
    as token_files.token_file gives it; empty where nothing is.
    """
    yield from counts(rows, held_out, about)
    if isinstance(rows, StoredRows):
        numbers = rows.rows_at(np.arange(min(n, rows.count)))[:, 1]
        ids_NxS = rows.read(numbers)
    else:
        taken = rows.batches(rows.start, 1, n, slice(None))
        # More than there are come again in the next epoch.
        taken = list(itertools.takewhile(lambda one: one.rows[0, 0] == 0, taken))
        numbers = np.concatenate([one.rows[:, 1] for one in taken])
        ids_NxS = np.concatenate([one.batch.ids_BxS for one in taken])
    bounds = boundaries(rows, numbers, tokenizer)
    for row, ids, starts in zip(numbers.tolist(), ids_NxS, bounds, strict=True):
        yield f"\nrow {row:,}: {' '.join(map(str, ids.tolist()))}"
        yield from segments(ids, starts, tokenizer)


def counts(rows, held_out, about: dict) -> Iterator[str]:
    if about.get("count"):
        n_documents = about["documents"]
        known = [f"{n_documents:,} documents"] if n_documents is not None else []
        known.append(f"{about['count']:,} tokens")
        if about.get("text_bytes"):
            known.append(f"{about['text_bytes']:,} bytes")
            known.append(f"{about['text_bytes'] / about['count']:.3f} bytes per token")
        yield f"training text: {', '.join(known)}"
    if rows.count is None:
        yield f"rows of {rows.block_size} tokens; how many is unknown: the text is streamed"
    else:
        yield (
            f"rows: {rows.count:,} of {rows.block_size} tokens, each a target once an epoch;"
            f" {rows.remainder:,} tokens at the end are left over"
        )
    if held_out is not None:
        targets, T = len(held_out) - 1, rows.block_size
        last = f", the last one shorter ({targets % T})" if targets % T else ""
        yield f"held out: {len(held_out):,} tokens, {-(-targets // T):,} rows{last}"


def boundaries(rows, numbers: np.ndarray, tokenizer) -> list[np.ndarray]:
    """For each row, the places in it where documents begin."""
    T = rows.block_size
    if isinstance(rows, StoredRows):
        ids = rows.ids
        return [ids.documents_in(r * T, T + 1, tokenizer.eos_id) - r * T for r in numbers.tolist()]
    wanted = (int(numbers.max()) + 1) * T + 1
    starts, at, begins = [], 0, True
    for encoded in rows.encode():
        if begins and len(encoded.ids):
            starts.append(at)
            begins = False
        at += len(encoded.ids)
        begins = begins or encoded.ends_document
        if at >= wanted:
            break
    starts = np.array(starts)
    return [starts[(starts >= r * T) & (starts <= r * T + T)] - r * T for r in numbers.tolist()]


def segments(ids: np.ndarray, starts: np.ndarray, tokenizer) -> Iterator[str]:
    """The text of a row, a line for each document in it."""
    cuts = [int(start) for start in starts if 0 < start < len(ids)]
    begins_here = bool(len(starts)) and starts[0] == 0
    for n, part in enumerate(np.split(ids, cuts)):
        where = "a document begins" if n or begins_here else "inside a document"
        yield f"  {where}: {json.dumps(tokenizer.decode(part), ensure_ascii=False)}"
