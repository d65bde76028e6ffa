"""Models from one kind of files to the other: for PyTorch, and for transformers 4's Flax classes.

Weights go through as they are, to the bit and of their own types. Nothing here needs PyTorch,
but for `verify`.
"""

import functools
import logging
import os
import pathlib
import shutil
import tempfile
from typing import NamedTuple

import numpy as np
import transformers
from flax.traverse_util import unflatten_dict

from gpt2_flax.errors import StorageError, UserError
from gpt2_flax.pretrained import modeling, orbax_files, weights
from gpt2_flax.pretrained.config_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    read_generation_config,
    read_json,
    write_configs,
)
from gpt2_flax.pretrained.repository import Repository

# What of a tokenizer is carried along. Its files hold no weights and no code.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "spiece.model", "chat_template.jinja",
)  # fmt: skip
# What shows that a directory is a model's, beside weights.
MODEL_FILES = {"config.json", "config.yaml", *weights.PICKLED_FILES, weights.TENSORFLOW_FILE}
# Logits of the same float32 weights differ by the order of sums, far less than this.
LARGEST_DIFFERENCE = 1e-3
log = logging.getLogger("gpt2_flax")


class Source(NamedTuple):
    """A model as it was read. leaves: numpy arrays by path, of the types in the files."""

    name: str
    model_class: type[modeling.FlaxGPT2PreTrainedModel]
    config: transformers.GPT2Config
    generation_config: transformers.GenerationConfig | None
    leaves: dict[tuple[str, ...], np.ndarray]
    tokenizer_files: list[pathlib.Path]


class Conversion(NamedTuple):
    """source: what was read. files: names of what was written. class_name: what opens it.

    difference: the largest between our logits and PyTorch's, or None where not asked for.
    """

    source: str
    files: list[str]
    class_name: str
    difference: float | None


def to_pytorch(
    source,
    output,
    step: int | None = None,
    *,
    max_shard_size: int | str = "10GB",
    verify: bool = False,
    **where,
) -> Conversion:
    """Write a model, its settings and its tokenizer into `output`, for PyTorch to open.

    source: a run directory, its checkpoints/, one step of it, a directory or a file with
    weights of either kind, or an id on the hub. step: of a run; None for its newest checkpoint.
    verify: compare the logits with PyTorch's, which must be installed. where: revision,
    subfolder and local_files_only of a model on the hub.
    Raises UserError for what cannot be read or holds a model already, CheckpointError where
    a run has no such checkpoint, StorageError where nothing can be written.
    """
    check(output, max_shard_size, verify)
    model = read_source(source, step, from_pt=False, **where)
    files = write(model, output, max_shard_size, safe_serialization=True)
    difference = None
    if verify:
        ours = model.model_class(model.config, _do_init=False)
        theirs = open_with_pytorch(model, output)
        difference = compare(ours, unflatten_dict(model.leaves), theirs, model.name)
    name = model.model_class.__name__.removeprefix("Flax")
    return Conversion(model.name, files, name, difference)


def from_pytorch(
    source, output, *, max_shard_size: int | str = "10GB", verify: bool = False, **where
) -> Conversion:
    """Write a model into `output` as transformers 4's Flax classes have it, in msgpack.

    As `to_pytorch`; where `source` has weights of both kinds, PyTorch's are taken.
    """
    check(output, max_shard_size, verify)
    model = read_source(source, None, from_pt=True, **where)
    theirs = open_with_pytorch(model, source, **where) if verify else None
    files = write(model, output, max_shard_size, safe_serialization=False)
    difference = None
    if verify:
        ours, params = model.model_class.from_pretrained(output, _do_init=False)
        difference = compare(ours, params, theirs, model.name)
    return Conversion(model.name, files, model.model_class.__name__, difference)


# ---------------------------------------------------------------- read


def read_source(source, step: int | None, from_pt: bool, **where) -> Source:
    """A model from wherever it is. from_pt: prefer weights in safetensors to those in msgpack."""
    path = pathlib.Path(source)
    directory = None
    if step is not None or orbax_files.is_run(path):
        directory = orbax_files.locate(path, step)
        # The tokenizer of a run lies beside its checkpoints.
        place, name = Repository(str(directory.parent.parent)), str(directory)
    elif path.is_file():
        place, name = Repository(str(path.absolute().parent)), str(path)
    else:
        place = Repository(str(source), **where)
        name = str(source)
    if directory is not None:
        model_class = modeling.FlaxGPT2LMHeadModel
        config, leaves = read_step(directory)
    else:
        config, model_class = modeling.read_config(place), class_of(place)
        get = modeling.only(path) if path.is_file() else place.get
        layout = weights.SAFETENSORS
        from_pt = from_pt and (get(layout.file) or get(layout.index)) is not None
        leaves = weights.read(get, name, from_pt, None if path.is_file() else place.has)
        has_head = model_class.can_generate()
        leaves, config = weights.settle_head(leaves, config, name, has_head)
    leaves = complete(leaves, model_class(config, _do_init=False).params_shape_tree, name)
    return Source(
        name, model_class, config, read_generation(place, config, model_class), leaves,
        [file for file in map(place.get, TOKENIZER_FILES) if file is not None],
    )  # fmt: skip


def read_step(directory: pathlib.Path):
    """(configuration, leaves) of one checkpoint. Raises CheckpointError where it is damaged."""
    config = modeling.read_config(None, directory)
    leaves = modeling.read_checkpoint(directory, config)
    return config, {path: np.asarray(leaf) for path, leaf in leaves.items()}


def class_of(place) -> type[modeling.FlaxGPT2PreTrainedModel]:
    """The class whose files these are: with a head, unless config.json says otherwise."""
    named = read_json(place.get(CONFIG_FILE)).get("architectures")
    headless = named in (["GPT2Model"], ["FlaxGPT2Model"])
    return modeling.FlaxGPT2Model if headless else modeling.FlaxGPT2LMHeadModel


def complete(leaves: dict, shapes: dict, name: str) -> dict:
    """The leaves of the model, all of them. Random weights are never written for missing ones."""
    fit = weights.fit(leaves, shapes, name)
    if fit.missing:
        missing = sorted(map("/".join, fit.missing))
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{name} lacks {', '.join(missing[:3])}{more}\n"
            "  a model is converted whole; is its config.json the right one?"
        )
    if fit.unexpected:
        unused = ", ".join(sorted(map("/".join, fit.unexpected)))
        log.warning("%s: left out, for GPT-2 has no such weights: %s", name, unused[:200])
    return {path: fit.leaves[path] for path in sorted(fit.leaves)}


def read_generation(place, config, model_class):
    if not model_class.can_generate():
        return None
    path = place.get(GENERATION_FILE)
    if path is not None:
        return read_generation_config(path)
    return transformers.GenerationConfig.from_model_config(config)


# ---------------------------------------------------------------- write


def check(output, max_shard_size, verify: bool) -> None:
    """Raise UserError for what would fail only after the model was read."""
    output = pathlib.Path(output)
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file\n  name a directory")
    names = (path.name for path in output.iterdir()) if output.is_dir() else ()
    held = sorted(n for n in names if n in MODEL_FILES or weights.OUR_FILES.fullmatch(n))
    if held:
        raise UserError(
            f"output {output} holds a model already ({held[0]})\n  name another directory"
        )
    try:
        weights.parse_size(max_shard_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    if verify and not transformers.utils.is_torch_available():
        raise UserError(
            "verify needs PyTorch, which is not installed\n  pip install torch, or leave it out"
        )


def write(model: Source, output, max_shard_size, safe_serialization: bool) -> list[str]:
    """Write all files or none. Returns their names."""
    output = pathlib.Path(output)
    model.config.architectures = [model.model_class.__name__.removeprefix("Flax")]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".convert.") as staging:
            staging = pathlib.Path(staging)
            write_configs(model.config, model.generation_config, staging)
            for file in model.tokenizer_files:
                shutil.copyfile(file, staging / file.name)
            written = weights.save(
                unflatten_dict(model.leaves), staging,
                safe_serialization=safe_serialization, max_shard_size=max_shard_size,
            )  # fmt: skip
            last = {path.name for path in written}  # with them the directory is a model
            names = sorted(os.listdir(staging), key=lambda name: (name in last, name))
            for name in names:
                os.replace(staging / name, output / name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"cannot write into {output}: {reason}") from error
    return names


# ---------------------------------------------------------------- verify


def open_with_pytorch(model: Source, source, **where):
    """PyTorch's model from a directory or the hub, in float32."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, model.model_class.__name__.removeprefix("Flax"))
    try:
        theirs = cls.from_pretrained(str(source), attn_implementation="eager", **where)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"verify compares with PyTorch, which cannot open {source}: {reason}\n"
            "  leave verify out"
        ) from error
    return theirs.float().eval().requires_grad_(False)


def compare(ours, params, theirs, name: str) -> float:
    """The largest difference between two models' outputs for fixed ids.

    Raises UserError where they are not the same model's.
    """
    length = min(ours.config.n_positions, 16)
    ids = (np.arange(2 * length).reshape(2, length) * 7919 + 1) % ours.config.vocab_size
    # A way to a tensor that needs no import of PyTorch.
    tensor = next(theirs.parameters()).new_tensor(ids.tolist()).long()
    expected = theirs(tensor)[0].numpy()
    call = functools.partial(ours, params=ours.to_fp32(params))
    difference = float(np.abs(np.asarray(call(ids)[0]) - expected).max())
    if not difference <= LARGEST_DIFFERENCE:
        raise UserError(
            f"{name}: our outputs and PyTorch's differ by up to {difference:.3g}\n"
            "  the conversion is not to be trusted; please report it with the model's name"
        )
    return difference
