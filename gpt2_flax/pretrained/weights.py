"""The files of a model's weights: finding, reading, fitting to a model, and saving. No torch.

Leaves are numpy arrays in a flat dict by path: {("transformer", "wte", "embedding"): ...},
under Flax's names and in Flax's orientation (weight_names.py).
"""

import copy
import dataclasses
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flax.traverse_util import flatten_dict

from gpt2_flax.errors import MissingFileError, UserError
from gpt2_flax.pretrained import msgpack_files, safetensors_files
from gpt2_flax.pretrained.weight_names import (
    FLOAT_TYPES,
    HEAD,
    PREFIX,
    PYTORCH_BUFFERS,
    WTE,
    Entry,
    check_dtypes,
    check_orientation,
    from_pytorch,
    to_pytorch,
    to_pytorch_name,
)

__all__ = [
    "MSGPACK",
    "SAFETENSORS",
    "WEIGHTS_FILE",
    "Fit",
    "Layout",
    "fit",
    "from_pytorch",
    "read",
    "save",
    "to_pytorch",
    "to_pytorch_name",
]


T = TypeVar("T")


class Layout(NamedTuple):
    """One of the two ways to lay weights out in files."""

    file: str
    index: str  # type: ignore[assignment]  # not the method of a tuple
    shard: str  # of number and count
    read: Callable[[pathlib.Path], dict[str, Entry]]
    write: Callable[[Any, dict], None]
    name: Callable[[tuple[str, ...]], str]


MSGPACK = Layout(
    file="flax_model.msgpack",
    index="flax_model.msgpack.index.json",
    shard="flax_model-{:05d}-of-{:05d}.msgpack",
    read=msgpack_files.read,
    write=msgpack_files.write,
    name="/".join,
)
SAFETENSORS = Layout(
    file="model.safetensors",
    index="model.safetensors.index.json",
    shard="model-{:05d}-of-{:05d}.safetensors",
    read=safetensors_files.read,
    write=safetensors_files.write,
    name=to_pytorch_name,
)
WEIGHTS_FILE = SAFETENSORS.file
# What save() writes, and so what it may take away as an earlier save's.
OUR_FILES = re.compile(
    r"(flax_model(-\d{5,}-of-\d{5,})?\.msgpack|model(-\d{5,}-of-\d{5,})?\.safetensors"
    r"|flax_model\.msgpack\.index\.json|model\.safetensors\.index\.json)"
)
PICKLED_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TENSORFLOW_FILE = "tf_model.h5"
log = logging.getLogger("gpt2_flax")
POINTER = b"version https://git-lfs"
MAX_INDEX_BYTES = 2**26
UNITS = {"B": 1} | {
    f"{letter}{i}B": (1024 if i else 1000) ** power
    for power, letter in enumerate("KMGT", 1)
    for i in ("", "I")
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """What of a file goes into a model.

    leaves: the arrays that fit, by the model's paths. missing: paths that the file lacks.
    unexpected: paths, as in the file, that the model lacks. mismatched: (path, shape in the
    file, shape in the model) of those left out for their shape.
    """

    leaves: dict[tuple[str, ...], np.ndarray]
    missing: set[tuple[str, ...]]
    unexpected: set[tuple[str, ...]]
    mismatched: list[tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]]


def read(
    get: Callable[[str], pathlib.Path | None],
    where: str,
    from_pt: bool = False,
    has: Callable[[str], bool] | None = None,
) -> dict[tuple[str, ...], np.ndarray]:
    """All arrays of a model's files, of the types that they have in the files.

    get: from a file's name to its path, or None where there is no such file. where: the
    place's name in messages. from_pt: pass Flax's msgpack files over. has: whether a file
    is there, without fetching it.
    The first of these is read: flax_model.msgpack, its index, model.safetensors, its index.
    Raises MissingFileError where there is none of them, and UserError, which names the file
    and the array, for files that are damaged or contradict themselves.
    """
    layouts = [SAFETENSORS] if from_pt else [MSGPACK, SAFETENSORS]
    for layout in layouts:
        path = get(layout.file)
        if path is not None:
            return _finish(path, _read_file(path, layout.read))
        path = get(layout.index)
        if path is not None:
            return _finish(path, _read_shards(get, path, layout))
    _refuse_foreign(has or (lambda name: get(name) is not None), where, from_pt)
    looked_for = ", ".join(f"{layout.file}, {layout.index}" for layout in layouts)
    raise MissingFileError(
        f"{where} has no weights\n  looked for {looked_for}"
        if not from_pt
        else f"{where} has no weights in PyTorch's layout\n  looked for {looked_for};"
        " without from_pt, Flax's files are read too"
    )


def _read_file(path: pathlib.Path, reader: Callable[[pathlib.Path], dict[str, T]]) -> dict[str, T]:
    """A reader's arrays, its errors under the file's name."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(POINTER))
        if not head:
            raise ValueError("is empty (0 bytes)\n  copy, download or save it again")
        if head == POINTER:
            raise ValueError(
                f"is a git-lfs pointer ({path.stat().st_size} bytes of text), expected the file"
                " that it stands for\n  fetch it in that repository: git lfs pull"
            )
        return reader(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes and does not fit into memory"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _read_shards(get, index_path: pathlib.Path, layout: Layout) -> dict[str, Entry]:
    """The arrays of all files that an index names, which must hold what it says they hold."""
    homes = _read_file(index_path, _read_index)
    found = {}
    for shard in dict.fromkeys(homes.values()):
        # Plain names with the right ending: a file's text never leads out of its directory.
        if not re.fullmatch(r"\w[\w.-]*" + re.escape(pathlib.Path(layout.file).suffix), shard):
            raise UserError(
                f"{index_path}: {shard!r:.80} is no name of a shard, expected one like"
                f" {layout.shard.format(1, 2)}"
            )
        path = get(shard)
        if path is None:
            raise MissingFileError(
                f"{index_path} names {shard}, which is not there\n"
                "  copy or download all files of the model"
            )
        entries = _read_file(path, layout.read)
        expected = {name for name, home in homes.items() if home == shard}
        for name in sorted(entries.keys() ^ expected):
            if name not in entries:
                raise UserError(f"{path}: lacks {name!r:.80}, which {index_path.name} expects")
            home = homes.get(name)
            at = f"in {home}" if home else "nowhere"
            raise UserError(f"{path}: holds {name!r:.80}, which {index_path.name} expects {at}")
        found |= entries
    return found


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """{name of an array: name of its file} of an index."""

    def unique(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("one key stands twice in it")
        return dict(pairs)

    size = path.stat().st_size
    if size > MAX_INDEX_BYTES:
        raise ValueError(f"has {size} bytes, expected an index of at most {MAX_INDEX_BYTES}")
    try:
        index = json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no index of weights: {error!s:.200}") from error
    homes = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(homes, dict) or not homes:
        raise ValueError('is no index of weights: it has no "weight_map" of names to files')
    for name, home in homes.items():
        if not isinstance(home, str):
            raise ValueError(f"places {name!r:.80} in {home!r:.40}, expected a file's name")
    return {name: home for name, home in homes.items() if not PYTORCH_BUFFERS.search(name)}


def _finish(path: pathlib.Path, entries: dict[str, Entry]) -> dict[tuple[str, ...], np.ndarray]:
    """Leaves by path, after the checks that need all of a model's files."""
    try:
        check_dtypes(entries := _unwrap(entries))
        check_orientation(entries)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return dict(entries.values())


def _unwrap(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries without the level "params" that linen's variables have."""
    levels = {entry.path[0] for entry in entries.values() if len(entry.path) > 1}
    if "params" not in levels:
        return entries
    if others := {entry.path[0] for entry in entries.values()} - {"params"}:
        raise ValueError(
            f"holds {sorted(others)[0]!r:.40} beside 'params', expected parameters alone\n"
            "  save the tree of its params by itself"
        )
    return {name: Entry(path[1:], leaf) for name, (path, leaf) in entries.items()}


def _refuse_foreign(has: Callable[[str], bool], where: str, from_pt: bool) -> None:
    """Raise UserError with the way to convert weights that are not read here."""
    load = f"transformers.GPT2LMHeadModel.from_pretrained({where!r}{{}}).save_pretrained(OUT)"
    for name in PICKLED_FILES:
        if has(name):
            raise UserError(
                f"{where} has its weights in {name} only: a pickle, which can run code, so it"
                " is not read here\n"
                f"  convert it where PyTorch is installed: {load.format('')}"
            )
    if has(TENSORFLOW_FILE):
        raise UserError(
            f"{where} has its weights in {TENSORFLOW_FILE} only, which is not read here\n  convert"
            f" it with transformers 4, PyTorch and TensorFlow: {load.format(', from_tf=True')}"
        )


def settle_head(leaves: dict, config, where: str, has_head: bool) -> tuple[dict, Any]:
    """(leaves, configuration) by PyTorch's rule for the head of a model that is said to be tied.

    A file may hold the head alone, as `safetensors.torch.save_model` writes it: that is wte, too.
    A head in the file that differs from wte is used as it is: the model isn't tied.
    has_head: whether the model that is opened has a head at all.
    """
    if HEAD not in leaves or not config.tie_word_embeddings:
        return leaves, config
    wte = leaves.get((PREFIX, *WTE), leaves.get(WTE))
    if wte is None:
        leaves = leaves | {(PREFIX, *WTE): leaves[HEAD].T}
        del leaves[HEAD]
    elif has_head and not np.array_equal(leaves[HEAD].T, wte):
        log.warning(
            "%s: its output head differs from wte, so the model is not tied, though its"
            " configuration says so; it is opened with tie_word_embeddings=False",
            where,
        )
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
    return leaves, config


def fit(leaves: dict, shapes: dict, where: str, ignore_mismatched_sizes: bool = False) -> Fit:
    """Sort a file's leaves by what a model wants.

    shapes: the tree of the model's shapes, with or without the level `transformer`; the
    file may differ in that. A head that is written although it is tied to wte is passed
    over, and so is the head where the model has none. Raises UserError where shapes differ, but
    for ignore_mismatched_sizes, and where no name of the file is one of the model's.
    """
    expected = {path: tuple(leaf.shape) for path, leaf in flatten_dict(shapes).items()}
    fitting, unexpected, mismatched = {}, set(), []
    met = set()
    for found_path, leaf in leaves.items():
        path = _in_model(found_path, expected)
        if path is None:
            unexpected.add(found_path)
        elif path in met:
            raise UserError(f"{where}: {'/'.join(path)} stands in it with and without {PREFIX}/")
        elif leaf.shape != expected[path]:
            mismatched.append((path, leaf.shape, expected[path]))
        else:
            fitting[path] = leaf
        met.add(path)
    if not fitting and not mismatched:
        some = "/".join(next(iter(leaves), ("nothing",)))
        raise UserError(
            f"{where}: holds no parameter of this model, but {len(leaves)} others: {some:.80}\n"
            "  are these the weights of a GPT-2?"
        )
    if mismatched and not ignore_mismatched_sizes:
        path, found, wanted = mismatched[0]
        more = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
        raise UserError(
            f"{where}: {'/'.join(path)} has shape {found}, the model's is {wanted}{more}\n"
            "  change the configuration, or drop such weights with ignore_mismatched_sizes=True"
        )
    unexpected.discard(HEAD)  # `settle_head` has decided about it
    return Fit(fitting, expected.keys() - met, unexpected, mismatched)


def _in_model(path: tuple[str, ...], expected: dict) -> tuple[str, ...] | None:
    """A file's path as the model has it: as it is, without the prefix or with it."""
    for candidate in (path, path[1:] if path[0] == PREFIX else (PREFIX, *path)):
        if candidate in expected:
            return candidate
    return None


def save(
    params: dict,
    directory: str | os.PathLike,
    *,
    safe_serialization: bool = True,
    max_shard_size: int | str = "5GB",
) -> list[pathlib.Path]:
    """Write a tree's weights, whole or not at all. Returns the paths of the files.

    safe_serialization: model.safetensors in PyTorch's layout; else flax_model.msgpack, for
    transformers 4's Flax classes. max_shard_size: bytes, or text like "200MB" or "1GiB";
    what is larger goes into numbered files and an index, an array larger than it into one
    of its own. Files of an earlier save, which could be read instead, are removed at the
    end. Raises ValueError for arrays that are not of floating-point numbers, and OSError.
    """
    layout = SAFETENSORS if safe_serialization else MSGPACK
    leaves = flatten_dict(params)
    for path, leaf in leaves.items():
        if getattr(getattr(leaf, "dtype", None), "name", None) not in FLOAT_TYPES:
            raise ValueError(f"{'/'.join(path)} is no array of {', '.join(FLOAT_TYPES)}")
    if not leaves:
        raise ValueError("params is empty: there is nothing to save")
    shards = _split(leaves, parse_size(max_shard_size))
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        names, contents = [layout.file], [_writer(layout, shards[0])]
    else:
        names = [layout.shard.format(i, len(shards)) for i in range(1, len(shards) + 1)]
        contents = [_writer(layout, shard) for shard in shards]
        contents.append(lambda file: file.write(_make_index(layout, names, shards)))
        names = [*names, layout.index]
    _replace(directory, dict(zip(names, contents, strict=True)))
    return [directory / name for name in names]


def _writer(layout: Layout, shard: dict):
    return lambda file: layout.write(file, shard)


def _replace(directory: pathlib.Path, contents: dict[str, Callable]) -> None:
    """Write files, rename all of them in order, and remove an earlier save's others."""
    staged = {}
    try:
        for name, content in contents.items():
            staged[name] = _stage(directory / name, content)
        for index in (MSGPACK.index, SAFETENSORS.index):
            if index in staged:  # or a kill between two renames leaves two saves' mixture
                (directory / index).unlink(missing_ok=True)
        for name, temporary in staged.items():
            os.replace(temporary, directory / name)
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)
    _sync_directory(directory)
    for path in directory.iterdir():
        if OUR_FILES.fullmatch(path.name) and path.name not in staged and not path.is_dir():
            path.unlink()


def _split(leaves: dict, limit: int) -> list[dict]:
    """The leaves in their order, cut where the next one would pass the limit in bytes."""
    shards, size = [{}], 0
    for path, leaf in leaves.items():
        bytes_ = leaf.size * leaf.dtype.itemsize
        if shards[-1] and size + bytes_ > limit:
            shards.append({})
            size = 0
        shards[-1][path] = leaf
        size += bytes_
    return shards


def _make_index(layout: Layout, names: list[str], shards: list[dict]) -> bytes:
    leaves = [leaf for shard in shards for leaf in shard.values()]
    index = {
        "metadata": {
            "total_parameters": sum(leaf.size for leaf in leaves),
            "total_size": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        },
        "weight_map": {
            layout.name(path): name
            for name, shard in zip(names, shards, strict=False)
            for path in shard
        },
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def parse_size(size: int | str) -> int:
    """Bytes of 1000, "200MB" (powers of 1000) or "1GiB" (of 1024). Raises ValueError."""
    if isinstance(size, int) and not isinstance(size, bool):
        number = size
    else:
        match = None
        if isinstance(size, str):  # a small b would be bits
            match = re.fullmatch(r"(\d{1,15}) *([KMGTkmgt]?[iI]?B)", size)
        number = int(match[1]) * UNITS.get(match[2].upper(), 0) if match else 0
    if number < 1:
        raise ValueError(
            f"max_shard_size {size!r:.40} is no size, expected bytes or text like '5GB', '200MiB'"
        )
    return number


def _stage(path: pathlib.Path, content: Callable) -> pathlib.Path:
    """Write and sync a file under a temporary name beside `path`; returns that name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _sync_directory(directory: pathlib.Path) -> None:
    """Make renames last; systems that cannot open a directory do without."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
