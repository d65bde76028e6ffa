"""Names and files of weights: our parameter tree <-> PyTorch's GPT-2, without torch.

Our tree is Hugging Face's Flax tree: kernels are (out, in). PyTorch's Conv1D weights are
(in, out), so every kernel is transposed on the way, also the square ones, where a missed
transpose would pass every check of shapes.
"""

import json
import os
import pathlib
import re

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

WEIGHTS_FILE = "model.safetensors"
# Causal masks that old PyTorch GPT-2 files carry beside the weights.
PYTORCH_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$")


def to_pytorch_name(path: tuple[str, ...]) -> str:
    """("transformer", "h", "0", "ln_1", "scale") -> "transformer.h.0.ln_1.weight"."""
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(path[-1], path[-1])
    return ".".join((*path[:-1], leaf))


def to_pytorch(params: dict) -> dict[str, np.ndarray]:
    """PyTorch's state dict of a parameter tree, as C-contiguous numpy arrays.

    A tied head is left out, as PyTorch's own files leave it out.
    """
    return {
        to_pytorch_name(path): np.ascontiguousarray(
            np.asarray(leaf).T if path[-1] == "kernel" else np.asarray(leaf)
        )
        for path, leaf in flatten_dict(params).items()
    }


def from_pytorch(tensors: dict[str, np.ndarray], shapes: dict) -> dict:
    """The parameter tree of the shapes in `shapes` (a tree) from PyTorch's state dict.

    Takes files of GPT2LMHeadModel and of the bare GPT2Model. Raises ValueError that names
    the tensors that are missing, of another shape, or unknown.
    """
    found = {
        name.removeprefix("transformer."): tensor
        for name, tensor in tensors.items()
        if not PYTORCH_BUFFERS.search(name)
    }
    leaves, faults = {}, []
    for path, shape in flatten_dict(shapes).items():
        name = to_pytorch_name(path).removeprefix("transformer.")
        tensor = found.pop(name, None)
        if tensor is None:
            faults.append(f"{name} is missing")
            continue
        leaf = tensor.T if path[-1] == "kernel" else tensor
        if leaf.shape != shape.shape:
            faults.append(f"{name} has shape {tensor.shape}, expected another for {shape.shape}")
        leaves[path] = np.ascontiguousarray(leaf, shape.dtype)
    found.pop("lm_head.weight", None)  # a tied head that was written all the same
    faults += [f"{name} is unknown" for name in found]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError("weights do not fit the model: " + "; ".join(faults[:5]) + more)
    return unflatten_dict(leaves)


def save_pytorch(params: dict, directory) -> pathlib.Path:
    """Write model.safetensors, whole or not at all. Returns its path."""
    path = pathlib.Path(directory) / WEIGHTS_FILE
    data = safetensors.numpy.save(to_pytorch(params), metadata={"format": "pt"})
    write_atomically(path, data)
    return path


def load_pytorch(directory, shapes: dict) -> dict:
    """Read model.safetensors of a directory into a tree of the given shapes."""
    path = pathlib.Path(directory) / WEIGHTS_FILE
    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return from_pytorch(tensors, shapes)


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it, rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
