"""Headers of safetensors files, altered at random: read as they say, or refused in a sentence."""

import copy
import json
import random
import struct
import time

import numpy as np

from gpt2_flax.errors import UserError
from gpt2_flax.pretrained import safetensors_files, weights

N_FILES, N_FILES_IN_FULL = 2_000, 20_000
SECONDS = 1.0  # that one file may take
DATA = np.arange(1, 97, dtype=np.uint8).tobytes()
HEADER = {
    "__metadata__": {"format": "pt"},
    "transformer.wte.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "transformer.h.0.attn.c_attn.weight": {
        "dtype": "BF16", "shape": [2, 6], "data_offsets": [24, 48],
    },
    "transformer.h.0.attn.bias": {"dtype": "U8", "shape": [1, 1, 24], "data_offsets": [48, 72]},
    "transformer.ln_f.bias": {"dtype": "F64", "shape": [3], "data_offsets": [72, 96]},
}  # fmt: skip
NUMBERS = [0, 1, -1, 2, 23, 25, 97, 2**31, 2**32, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 10**40, 0.5]
VALUES = [*NUMBERS, None, True, "F32", "BOOL", "F8_E4M3", "F4", "", "x" * 10**4, [], {}, [0, 24],
          [[1]], [2] * 70, {"format": "flax"}, {"format": 1}, {"a": {"b": {}}}]  # fmt: skip
PIECES = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\0", b"\xff", b"\\ud800", b"1e999",
          b"NaN", b"null", b" " * 99, b'"__metadata__":', b"[" * 2000]  # fmt: skip


def places(value, path=()):
    """Paths of all that a JSON value holds."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, part in value.items() if isinstance(value, dict) else ():
        yield from places(part, (*path, key))


def change_value(rng, header: bytes) -> bytes:
    """Another value, or name, somewhere in the object."""
    raw = json.loads(header)
    for _ in range(rng.randint(1, 3)):
        *above, last = rng.choice([path for path in places(raw) if path])
        holder = raw
        for key in above:
            holder = holder[key]
        if isinstance(holder, dict) and rng.random() < 0.3:
            name = rng.choice(["dtype", "shape", "data_offsets", "__metadata__", "lm_head.weight",
                               "wte.embedding", "../x", "", "é\n"])  # fmt: skip
            holder[name] = holder.pop(last)
        elif rng.random() < 0.2:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(raw).encode()


def change_bytes(rng, header: bytes) -> bytes:
    changed = bytearray(header)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def insert(rng, header: bytes) -> bytes:
    at = rng.randrange(len(header))
    return header[:at] + rng.choice(PIECES) + header[at:]


def cut_out(rng, header: bytes) -> bytes:
    first, last = sorted(rng.sample(range(len(header)), 2))
    return header[:first] + header[last:]


def repeat(rng, header: bytes) -> bytes:
    first, last = sorted(rng.sample(range(len(header)), 2))
    return header[:last] + header[first:last] * rng.randint(1, 3) + header[last:]


def write_anew(rng, header: bytes) -> bytes:
    """Another order, another name, another shape of as many items: mostly a good file."""
    raw = json.loads(header)
    names = rng.sample(list(raw), len(raw))
    raw = {name: raw[name] for name in names}
    name = rng.choice([name for name in names if name != "__metadata__"])
    if rng.random() < 0.5:
        raw[name]["shape"] = rng.choice([raw[name]["shape"][::-1], [*raw[name]["shape"], 1]])
    if rng.random() < 0.5:
        raw[rng.choice(["transformer.wpe.weight", "x", "é.scale"])] = raw.pop(name)
    return json.dumps(raw).encode() + b" " * rng.randrange(9)


def mutate(rng) -> bytes:
    """A file: its length, its header, its data."""
    header = json.dumps(HEADER).encode()
    changes = [change_value, change_value, change_bytes, insert, cut_out, repeat, write_anew]
    change = rng.choice(changes)
    header = change(rng, header)
    length, data = len(header), DATA
    if rng.random() < 0.1:
        length = rng.choice([0, 1, length - 1, length + 1, length + 96, 2**31, 2**63, 2**64 - 1])
    if rng.random() < 0.1:
        data = rng.choice([b"", DATA[:-1], DATA + b"\0", DATA * 2])
    return struct.pack("<Q", length) + header + data


def check(content: bytes, entries: dict) -> None:
    """That what was read is what the header says, by a reading of our own."""
    n = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + n]), content[8 + n :]
    header.pop("__metadata__", None)
    assert entries
    for name, (_, leaf) in entries.items():
        first, last = header[name]["data_offsets"]
        said = np.frombuffer(data[first:last], safetensors_files.DTYPES[header[name]["dtype"]])
        said = said.reshape(header[name]["shape"])
        assert leaf.dtype == said.dtype
        assert leaf.tobytes() in (said.tobytes(), said.T.tobytes())


def test_altered_headers_are_read_as_they_say_or_refused(tmp_path, thorough):
    rng = random.Random(20)
    path = tmp_path / "model.safetensors"
    n_read = n_refused = 0
    slowest = 0.0
    for number in range(N_FILES_IN_FULL if thorough else N_FILES):
        content = mutate(rng)
        path.write_bytes(content)
        began = time.perf_counter()
        try:
            weights.read(lambda name: path if name == path.name else None, str(tmp_path))
            entries = safetensors_files.read(path)
        except UserError as error:
            n_refused += 1
            assert len(str(error).splitlines()) <= 3 and len(str(error)) < 1000, error
        except BaseException as error:
            raise AssertionError(f"file {number}: {content[:2000]!r}") from error
        else:
            n_read += 1
            check(content, entries)
        slowest = max(slowest, time.perf_counter() - began)
    print(f"{n_read} read, {n_refused} refused; the slowest took {slowest * 1000:.0f} ms")
    assert slowest < SECONDS
    assert min(n_read, n_refused) > (n_read + n_refused) / 50  # or the mutations are too dull
