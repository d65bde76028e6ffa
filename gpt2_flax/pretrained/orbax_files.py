"""What is in a checkpoint: found, described, read by whoever opens one, also without its run."""

import contextlib
import json
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore

from gpt2_flax.errors import CheckpointError, UserError
from gpt2_flax.pretrained import manifest

FOLDER = "checkpoints"  # of a run directory
HEADER = b"/.zarray"  # what the key of an array's own description ends in


def is_run(path: pathlib.Path) -> bool:
    """Whether a path is a run directory, its checkpoints/ or one step of them."""
    is_step = path.name.isdigit() and (path / "state").is_dir()
    return is_step or (path / FOLDER).is_dir() or path.name == FOLDER


def locate(path, step: int | None) -> pathlib.Path:
    """The directory of one checkpoint: of a run directory, its checkpoints/ or the step itself.

    step: which; None for the newest. Raises CheckpointError that lists the steps there are, or
    says what is damaged.
    """
    path = pathlib.Path(path).absolute()
    if path.name.isdigit() and (path / "state").is_dir():
        if step not in (None, int(path.name)):
            raise UserError(f"{path} is step {path.name}, not {step}\n  name one of the two")
        return whole(path)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    found = sorted(
        int(child.name)
        for child in (folder.iterdir() if folder.is_dir() else ())
        if child.name.isdigit() and (child / "state").is_dir()
    )
    if not found:
        raise CheckpointError(
            f"{path} holds no checkpoint\n  name a run directory or one of its steps"
        )
    if step is not None and step not in found:
        raise CheckpointError(f"{folder} has no step {step}; it has {', '.join(map(str, found))}")
    return whole(folder / str(found[-1] if step is None else step))


def whole(directory: pathlib.Path) -> pathlib.Path:
    """A checkpoint's directory. Raises CheckpointError where it has a manifest it doesn't fit."""
    if (directory / manifest.FILE).exists():
        try:
            manifest.check(directory, int(directory.name))
        except manifest.DamagedError as error:
            raise CheckpointError(
                f"checkpoint {directory} is damaged: {error}\n  name an older step"
            ) from error
    return directory


def read_meta(directory: pathlib.Path) -> dict:
    """Without Orbax, whose reader waits for all processes. Raises ValueError and OSError."""
    meta = manifest.read_json(directory / "meta" / "metadata")
    if not isinstance(meta, dict):
        raise ValueError("it is no JSON object")
    return meta


def read_params(directory: pathlib.Path, like) -> dict:
    """The parameters alone of a checkpoint, on this machine's first device.

    like: tree of the parameters' shapes and types.
    """
    # Before anything is allocated: Orbax takes the shapes that the files claim.
    compare(kinds(stored_shapes(directory)["params"]), kinds(like))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), like)
    arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=here), target)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            directory / "state",
            args=ocp.args.PyTreeRestore(
                item={"params": target},
                restore_args={"params": arguments},
                partial_restore=True,
            ),
        )
    return restored["params"]


def stored_shapes(directory: pathlib.Path):
    """The state of a checkpoint as its files describe it, without its arrays."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        return checkpointer.metadata(directory / "state").item_metadata.tree


def described_kinds(directory: pathlib.Path) -> dict[str, str] | None:
    """`kinds` of a checkpoint's state by its arrays' own headers; None where they can't tell.

    A twentieth of the time that `stored_shapes` takes, which has Orbax open each array.
    """
    files = {"driver": "file", "path": f"{directory / 'state'}/"}
    try:
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": files}).result()
        keys = [key for key in store.list().result() if key.endswith(HEADER)]
        values = [store.read(key) for key in keys]
        headers = [json.loads(value.result().value) for value in values]
        return {
            key.removesuffix(HEADER).decode().replace(".", "/"): (
                f"{jnp.dtype(header['dtype'])}{header['shape']}"
            )
            for key, header in zip(keys, headers, strict=True)
        }
    except Exception:  # TensorStore raises whatever it pleases; Orbax says what is wrong
        return None


def kinds(tree) -> dict[str, str]:
    """Type and shape of each array of a state, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def check_kinds(directory: pathlib.Path, like) -> None:
    """Raise DamagedError where a state has not the arrays of `like`: Orbax would cast, silently.

    Raises CheckpointError where they cannot be told.
    """
    wanted = kinds(like)
    if described_kinds(directory) != wanted:
        with read_errors(directory):
            stored = stored_shapes(directory)
        compare(kinds(stored), wanted)


def compare(stored: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise DamagedError that names an array of another kind, or of one of them alone."""
    for name in sorted(stored.keys() ^ wanted.keys()):
        where = "the checkpoint" if name in wanted else "the run"
        raise manifest.DamagedError(f"{where} has no {name}")
    for name, kind in wanted.items():
        if stored[name] != kind:
            raise manifest.DamagedError(f"{name} is {stored[name]} instead of {kind}")


@contextlib.contextmanager
def read_errors(directory: pathlib.Path):
    """Context that turns what reading a damaged checkpoint raises into a CheckpointError.

    Running out of memory is no damage, and stays what it is.
    """
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever they please
        reason = str(error).strip().split("\n")[0][:200]
        raise CheckpointError(f"checkpoint {directory} cannot be read: {reason}") from error
