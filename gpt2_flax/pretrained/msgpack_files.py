"""Flax's msgpack files of parameters, read without trusting them.

flax.serialization's own reader takes any dtype that a file names and any length that it
claims; this one takes arrays of plain numbers whose bytes are all there.
"""

import math
import mmap
import pathlib

import ml_dtypes
import msgpack
import numpy as np
from flax.serialization import msgpack_serialize

from gpt2_flax.pretrained.weight_names import Entry

# What flax calls its kinds of msgpack extension.
NDARRAY, NUMPY_SCALAR = 1, 3
CHUNKED = "__msgpack_chunked_array__"
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{
        name: np.dtype(name)
        for name in (
            *("float16", "float32", "float64", "bool"),
            *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        )
    },
}
# A parameter tree of GPT-2 is 6 deep and holds no lists but shapes.
MAX_DEPTH, MAX_LIST = 16, 16
MAX_KEYS = 2**16
DAMAGED = "\n  it was cut short or altered: copy, download or save it again"


def read(path: pathlib.Path) -> dict[str, Entry]:
    """The arrays of a file by "a/b/c", the levels of its tree.

    Holds one array twice at a time. Raises ValueError for anything but a tree of arrays.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            tree = msgpack.unpackb(
                data,
                ext_hook=_decode,
                object_pairs_hook=_to_dict,
                max_array_len=MAX_LIST,
                max_map_len=MAX_KEYS,
            )
        except msgpack.ExtraData as error:
            raise ValueError(
                f"{len(error.extra)} bytes follow the end of the msgpack data{DAMAGED}"
            ) from None
        except ValueError as error:
            raise ValueError(f"is no msgpack file of parameters: {_reason(error)}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"holds {_kind(tree)}, expected a tree of parameters")
    return {"/".join(path): Entry(path, leaf) for path, leaf in _flatten(tree, ())}


def write(file, leaves: dict[tuple[str, ...], np.ndarray]) -> None:
    """Write what flax.serialization.to_bytes gives of the tree, one array at a time."""
    tree = {}
    for path, leaf in leaves.items():
        level = tree
        for key in path[:-1]:
            level = level.setdefault(key, {})
        level[path[-1]] = leaf
    _write_level(file, tree, msgpack.Packer())


def _write_level(file, tree, packer):
    if not isinstance(tree, dict):
        file.write(msgpack_serialize(np.asarray(tree)))
        return
    file.write(packer.pack_map_header(len(tree)))
    for key, branch in tree.items():
        file.write(packer.pack(key))
        _write_level(file, branch, packer)


def _decode(code: int, data: bytes) -> np.ndarray:
    """An array of one of flax's extensions: packed (shape, name of the dtype, bytes)."""
    if code not in (NDARRAY, NUMPY_SCALAR):
        raise ValueError(f"extension {code} is unknown, expected {NDARRAY}, an array")
    parts = msgpack.unpackb(data, raw=True, use_list=False, max_array_len=MAX_LIST)
    if not isinstance(parts, tuple) or len(parts) != 3:
        raise ValueError("an array is not made of a shape, a dtype and bytes")
    shape, name, buffer = parts
    dtype = DTYPES.get(name.decode("ascii", "replace")) if isinstance(name, bytes) else None
    if dtype is None:
        raise ValueError(f"an array has dtype {name!r:.40}, expected one of {', '.join(DTYPES)}")
    _check_shape(shape)
    if not isinstance(buffer, bytes) or math.prod(shape) * dtype.itemsize != len(buffer):
        raise ValueError(f"an array of shape {shape} and {dtype.name} has another length{DAMAGED}")
    return np.frombuffer(buffer, dtype).reshape(shape)


def _check_shape(shape) -> None:
    whole = isinstance(shape, tuple) and all(type(size) is int and size > 0 for size in shape)
    if not whole:
        raise ValueError(f"an array has shape {shape!r:.40}, expected sizes above 0")


def _to_dict(pairs: list) -> dict | np.ndarray:
    """A level of the tree, or the array that flax has written in chunks."""
    level = dict(pairs)
    if len(level) != len(pairs):
        raise ValueError("a level of the tree has one key twice")
    return _join(level) if CHUNKED in level else level


def _join(level: dict) -> np.ndarray:
    """The array of {marker, "shape": {"0": 2, "1": 3}, "chunks": {"0": flat, ...}}."""
    shape, chunks = (_to_tuple(level.get(name)) for name in ("shape", "chunks"))
    _check_shape(shape)
    if not all(
        isinstance(chunk, np.ndarray) and chunk.ndim == 1 and chunk.dtype == chunks[0].dtype
        for chunk in chunks
    ):
        raise ValueError("a chunked array holds something else than flat arrays of one dtype")
    if sum(chunk.size for chunk in chunks) != math.prod(shape):
        raise ValueError(f"the chunks of an array of shape {shape} have another length{DAMAGED}")
    return np.concatenate(chunks).reshape(shape)


def _to_tuple(numbered) -> tuple:
    """(x, y) of {"0": x, "1": y}."""
    keys = [str(i) for i in range(len(numbered))] if isinstance(numbered, dict) else None
    if not keys or set(keys) != numbered.keys():
        raise ValueError("a chunked array lacks its numbered shape or chunks")
    return tuple(numbered[key] for key in keys)


def _flatten(tree: dict, path: tuple[str, ...]):
    if len(path) > MAX_DEPTH:
        raise ValueError(f"its tree is more than {MAX_DEPTH} levels deep")
    for key, branch in tree.items():
        if not isinstance(key, str):
            raise ValueError(f"a key of its tree is {_kind(key)}, expected text")
        if isinstance(branch, dict):
            yield from _flatten(branch, (*path, key))
        elif isinstance(branch, np.ndarray):
            yield (*path, key), branch
        else:
            raise ValueError(f"{'/'.join((*path, key))!r:.80} is {_kind(branch)}, not an array")


def _kind(value) -> str:
    return f"a {type(value).__name__}"


def _reason(error: ValueError) -> str:
    """msgpack's own errors say little, and nothing at all for some."""
    if isinstance(error, msgpack.StackError):
        return "it is nested too deep"
    if isinstance(error, msgpack.FormatError):
        return f"byte codes that msgpack does not have{DAMAGED}"
    text = str(error) or type(error).__name__
    return f"it ends too early{DAMAGED}" if "incomplete" in text else text
