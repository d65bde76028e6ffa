"""Names of parameters, and which way round kernels lie: our tree <-> PyTorch's GPT-2.

Our tree is Hugging Face's Flax tree: kernels are (out, in). PyTorch's Conv1D weights are
(in, out), so every kernel is transposed on the way, also the square ones, where a missed
transpose would pass every check of shapes. lm_head's kernel is (in, out) here and (out, in)
in PyTorch, so it is transposed too.
"""

import re
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

PREFIX = "transformer"
HEAD = ("lm_head", "kernel")
WTE = ("wte", "embedding")
FLOAT_TYPES = ("float32", "float16", "bfloat16", "float64")
FLAX_LEAVES = {"kernel", "scale", "embedding"}
# Causal masks that old PyTorch GPT-2 files carry beside the weights.
PYTORCH_BUFFERS = re.compile(r"(^|\.)(attn|crossattention)\.(bias|masked_bias)$")
PARAMETERS = re.compile(
    r"(transformer/)?(wte/embedding|wpe/embedding|ln_f/(scale|bias)|h/\d+/("
    r"ln_(1|2|cross_attn)/(scale|bias)|(attn|mlp|crossattention)/(c_attn|q_attn|c_proj|c_fc)"
    r"/(kernel|bias)))|lm_head/kernel"
)
# The axis of a kernel that is n_embd wide, by its module's name. The others are square.
EMBD_AXIS = {
    "attn/c_attn": 1,
    "mlp/c_fc": 1,
    "mlp/c_proj": 0,
    "crossattention/c_attn": 1,
    "lm_head": 0,
}


class Entry(NamedTuple):
    """One array of a file, under our path and in our orientation."""

    path: tuple[str, ...]
    leaf: np.ndarray


def to_pytorch_name(path: tuple[str, ...]) -> str:
    """("transformer", "h", "0", "ln_1", "scale") -> "transformer.h.0.ln_1.weight"."""
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(path[-1], path[-1])
    return ".".join((*path[:-1], leaf))


def from_pytorch_name(name: str) -> tuple[str, ...]:
    """ "transformer.h.0.ln_1.weight" -> ("transformer", "h", "0", "ln_1", "scale")."""
    *modules, leaf = name.split(".")
    if leaf == "weight":
        module = modules[-1] if modules else ""
        if module in ("wte", "wpe"):
            leaf = "embedding"
        else:
            leaf = "scale" if module.startswith("ln_") else "kernel"
    return (*modules, leaf)


def to_pytorch_leaf(path: tuple[str, ...], leaf) -> np.ndarray:
    """The array as PyTorch has it: a kernel's transposed view. Its own inverse."""
    leaf = np.asarray(leaf)
    return leaf.T if path[-1] == "kernel" else leaf


def to_pytorch(params: dict) -> dict[str, np.ndarray]:
    """PyTorch's state dict of a parameter tree, as C-contiguous numpy arrays.

    A tied head is left out, as PyTorch's own files leave it out.
    """
    return {
        to_pytorch_name(path): np.ascontiguousarray(to_pytorch_leaf(path, leaf))
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


def check_dtypes(entries: dict[str, Entry]) -> None:
    """Raise ValueError for a parameter of GPT-2's that holds no floating-point numbers."""
    for name, (path, leaf) in entries.items():
        if leaf.dtype.name not in FLOAT_TYPES and PARAMETERS.fullmatch("/".join(path)):
            raise ValueError(
                f"{name!r} holds {leaf.dtype.name}, expected one of {', '.join(FLOAT_TYPES)}"
            )


def check_orientation(entries: dict[str, Entry]) -> None:
    """Raise ValueError where a kernel that isn't square lies the wrong way round.

    The square ones of such a file do too, and no shape tells: taking any of it in would
    give a model that runs and is wrong. Needs no configuration: D stands in the file.
    """
    D = _width(entries)
    for name, (path, leaf) in entries.items():
        axis = EMBD_AXIS.get("/".join(path[-3:-1])) if path[-1] == "kernel" else None
        if axis is None or leaf.ndim != 2 or D is None:
            continue
        if leaf.shape[axis] != D and leaf.shape[1 - axis] == D:
            raise ValueError(
                f"{name!r} lies the wrong way round: as a Flax kernel it is {leaf.shape},"
                f" expected {leaf.shape[::-1]}\n"
                "  so do the square kernels of this file, which no shape shows;"
                " write it anew, with each kernel transposed"
            )


def _width(entries: dict[str, Entry]) -> int | None:
    """n_embd as the LayerNorms have it, or else the embeddings."""
    norms = (e.leaf for e in entries.values() if e.path[-2:-1] == ("ln_f",))
    others = (e.leaf for e in entries.values() if e.path[-2:-1] in (("ln_1",), ("ln_2",)))
    tables = (e.leaf for e in entries.values() if e.path[-1] == "embedding")
    for leaves, ndim in ((norms, 1), (others, 1), (tables, 2)):
        for leaf in leaves:
            if leaf.ndim == ndim:
                return leaf.shape[-1]
    return None
