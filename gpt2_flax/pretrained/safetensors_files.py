"""safetensors files of parameters, under PyTorch's names or under Flax's."""

import json
import pathlib

import ml_dtypes  # noqa: F401  gives numpy the name bfloat16, which older safetensors ask for
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2_flax.pretrained.weight_names import (
    FLAX_LEAVES,
    PYTORCH_BUFFERS,
    Entry,
    from_pytorch_name,
    to_pytorch_leaf,
    to_pytorch_name,
)

# safetensors' names of the types that numpy has.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip
CODES = {name: code for code, name in DTYPES.items()}
MAX_DIMENSIONS = 16
MAX_HEADER_BYTES = 10**8  # safetensors' own limit
DAMAGED = "\n  it was cut short or altered: copy, download or save it again"


def read(path: pathlib.Path) -> dict[str, Entry]:
    """The arrays of a file by their names in it; PyTorch's causal masks are passed over.

    A file without the metadata `format` is read by its names; transformers' Flax classes
    refused such files. Raises ValueError for a damaged file, for arrays that numpy has no
    type for, and where metadata and names contradict each other.
    """
    entries = {}
    _check_length(path)
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            flax = _is_flax((file.metadata() or {}).get("format"), names)
            for name in names:
                if not flax and PYTORCH_BUFFERS.search(name):
                    continue
                _check_kind(name, file.get_slice(name))
                leaf = file.get_tensor(name)
                if flax:
                    entries[name] = Entry(tuple(name.split(".")), leaf)
                else:
                    path_in_tree = from_pytorch_name(name)
                    entries[name] = Entry(path_in_tree, to_pytorch_leaf(path_in_tree, leaf))
    except SafetensorError as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"is damaged: {reason}{DAMAGED}") from error
    return entries


def write(file, leaves: dict[tuple[str, ...], np.ndarray]) -> None:
    """Write a file as PyTorch's GPT-2 has it, one array at a time.

    safetensors' own writer wants every array at once, the kernels transposed in memory.
    """
    # The format wants no gaps, and readers want each array on a multiple of its item's size.
    paths = sorted(leaves, key=lambda path: -leaves[path].dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for path in paths:
        leaf, start = leaves[path], end
        end += leaf.size * leaf.dtype.itemsize
        shape = leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape
        header[to_pytorch_name(path)] = {
            "dtype": CODES[leaf.dtype.name],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for path in paths:
        file.write(to_pytorch_leaf(path, leaves[path]).tobytes())


def _is_flax(metadata_format: str | None, names: list[str]) -> bool:
    """Whether the names and the orientation of a file are Flax's, and not PyTorch's."""
    if metadata_format not in (None, "pt", "flax"):
        raise ValueError(f"has the format {metadata_format!r:.40}, expected 'pt' or 'flax'")
    flax = [name for name in names if name.split(".")[-1] in FLAX_LEAVES]
    pytorch = [name for name in names if name.split(".")[-1] == "weight"]
    if metadata_format is None and flax and pytorch:
        raise ValueError(f"mixes Flax's names and PyTorch's: {flax[0]!r:.80}, {pytorch[0]!r:.80}")
    if metadata_format is None:
        return bool(flax)
    foreign = pytorch if metadata_format == "flax" else flax
    if foreign:
        raise ValueError(
            f"has the format {metadata_format!r} in its metadata, and a name of the other"
            f" kind: {foreign[0]!r:.80}\n  save it anew with the format that its kernels have"
        )
    return metadata_format == "flax"


def _check_length(path: pathlib.Path) -> None:
    """Refuse, before the file is mapped into memory, a header that it does not hold."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    longest = min(MAX_HEADER_BYTES, path.stat().st_size - 8)
    if length > longest:
        raise ValueError(
            f"is damaged: its header claims {length} bytes, of at most {longest}{DAMAGED}"
        )


def _check_kind(name: str, found) -> None:
    """Refuse, before it is read, an array that numpy could not hold."""
    code, shape = found.get_dtype(), found.get_shape()
    if code not in DTYPES:
        raise ValueError(f"{name!r:.80} holds {code}, expected one of {', '.join(DTYPES)}")
    if len(shape) > MAX_DIMENSIONS or 0 in shape:
        raise ValueError(f"{name!r:.80} has shape {shape!s:.40}, expected sizes above 0")
