"""A program that turns texts into ids for another process; `encode_pool.EncodePool` runs it.

Standard input: the tokenizer's JSON behind its length, then requests until the end of file.
    request    number of texts, bytes an id is to take; each text's length; the texts in UTF-8
    answer     number of texts, number of ids; each text's number of ids; the ids
    or         -1, length; what went wrong, in UTF-8
Numbers are int64 and, like ids, little endian.
"""

import os
import pathlib
import signal
import sys
from collections.abc import Iterable

FAILED = -1


def main() -> None:
    # They reach a whole group of processes at once; the one that runs this decides what ends.
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    # Not the folder of this file, which -P keeps out: tokenizers.py there would hide the library.
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    try:
        serve(requests, answers)
    except (EOFError, BrokenPipeError):  # nobody asks any more
        os._exit(0)


def serve(requests, answers) -> None:
    """Answer until the requests end, which is an EOFError."""
    from gpt2_flax.data.tokenizers import Encoder

    encoder = Encoder.from_json(read_block(requests, *read_numbers(requests, 1)).decode())
    while True:
        count, bytes_per_id = read_numbers(requests, 2)
        lengths = read_numbers(requests, count)
        data = memoryview(read_block(requests, sum(lengths)))
        try:
            answer = encode(encoder, data, lengths, bytes_per_id)
        except Exception as error:
            message = f"{type(error).__name__}: {error}".encode()
            answer = [numbers(FAILED, len(message)), message]
        answers.writelines(answer)
        answers.flush()


def encode(encoder, data: memoryview, lengths: Iterable[int], bytes_per_id: int) -> list[bytes]:
    """The answer with the ids of the texts that lie one after another in `data`."""
    texts, at = [], 0
    for length in lengths:
        texts.append(str(data[at : at + length], "utf-8"))
        at += length
    ids = encoder.encode_batch(texts)
    counts = [len(of_text) for of_text in ids]
    arrays = (of_text.astype(f"<u{bytes_per_id}").tobytes() for of_text in ids)
    return [numbers(len(ids), sum(counts)), numbers(*counts), *arrays]


def numbers(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little", signed=True) for value in values)


def read_numbers(file, count: int) -> list[int]:
    data = read_block(file, 8 * count)
    return [int.from_bytes(data[n : n + 8], "little", signed=True) for n in range(0, 8 * count, 8)]


def read_block(file, size: int) -> bytes:
    """The next `size` bytes. Raises EOFError where there are fewer."""
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


if __name__ == "__main__":
    main()
