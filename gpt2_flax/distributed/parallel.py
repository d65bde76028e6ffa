"""Devices: how a step runs on many of them, and how arrays get there.

The state has no device axis and is replicated, or sharded under the engine fsdp: the same arrays
go into pmap or jit, into Orbax and into the exported file. With several processes pmap hands
back arrays that know of their own process's devices alone; `of_all_processes` puts them together.
"""

import functools
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_flax.distributed import devices, fsdp

AXIS = "batch"
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes


def mesh() -> Mesh:
    """The devices of all processes."""
    return Mesh(devices.everywhere(), (AXIS,))


def local_mesh() -> Mesh:
    return Mesh(devices.here(), (AXIS,))


def replicated() -> NamedSharding:
    return NamedSharding(mesh(), PartitionSpec())


def replicate(make: Callable, *args):
    """Run `make` under jit; its arrays end up whole on every device, sharing no memory.

    (`device_put` may alias its source, which a donating step would then destroy.)
    """
    return jax.jit(make, out_shardings=replicated())(*args)


def make_state(make: Callable, argument, engine: str):
    """The arrays that `make` returns, where an engine wants them; none is whole under fsdp.

    argument: a key, or parameters on the host.
    """
    if engine != "fsdp":
        return replicate(make, argument)
    out = shardings(jax.eval_shape(make, argument), engine)
    if not isinstance(argument, jax.Array):
        argument = jax.tree.map(put_shards, argument, shardings(argument, engine))
    return jax.jit(make, out_shardings=out)(argument)


def put_shards(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array of the host, of which each device takes its shard."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shardings(tree, engine: str):
    """Where the arrays of a state, or of shapes, are to be."""
    if engine == "fsdp":
        return fsdp.shardings_of(tree, mesh())
    return jax.tree.map(lambda x: replicated(), tree)


def over_devices(engine: str) -> NamedSharding:
    """A batch's leading axis, a device each: pmap takes those of a process alone."""
    taking = local_mesh() if engine == "pmap" else mesh()
    return NamedSharding(taking, PartitionSpec(AXIS))


def of_all_processes(tree):
    """A state as arrays that all processes share, as Orbax takes them. No copy."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: copies_as(x, replicated()) if x.is_fully_replicated else x, tree)


def whole(tree):
    """A state's arrays in this process: one copy of what is replicated, the rest on the host.

    All processes must ask.
    """

    gather = jax.jit(lambda x: x, out_shardings=replicated())

    def of_one(x):
        if isinstance(x, np.ndarray):
            return x
        if x.is_fully_replicated:
            return x.addressable_data(0)
        # Leaf by leaf, so that no device holds more than one of them whole.
        return np.asarray(gather(x).addressable_data(0))

    return jax.tree.map(of_one, tree)


def bytes_there(tree, engine: str) -> int:
    """Bytes of a state on one device."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(shapes_on_devices(tree, engine))
    )


def copies_as(tree, sharding: NamedSharding):
    """The copies of a replicated tree, under a sharding that says so too."""
    return jax.tree.map(
        lambda x: jax.make_array_from_single_device_arrays(
            x.shape, sharding, [shard.data for shard in x.addressable_shards]
        ),
        tree,
    )


def shapes_on_devices(tree, engine: str = "pmap"):
    """The shapes of a state, as Orbax and the compiler take them."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings(tree, engine),
    )


def compile_train_step(step: Callable, engine: str) -> Callable:
    """(state, batch with a leading device axis) -> (state, metrics); the state is donated.

    `step` takes `axis_name`. engine "pmap": one program a device and a psum in it. With
    out_axes=None a result that was not reduced would silently be the first device's.
    engine "jit": one program for all; XLA puts the reductions in. engine "fsdp": the same,
    with the state in shards.
    """
    if engine == "pmap":
        # XLA would copy the gradients to reduce them over one device.
        axis_name = AXIS if devices.count() > 1 else None
        return jax.pmap(
            functools.partial(step, axis_name=axis_name),
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=(None, None),
            donate_argnums=(0,),
            devices=devices.imagined() or None,
        )

    if engine == "fsdp":
        over_shards = functools.partial(fsdp.over_shards, mesh=mesh(), has_gradient=True)

        def step_on_shards(state, batch):
            state, metrics = step(state, batch, over_shards=over_shards)
            return jax.lax.with_sharding_constraint(state, shardings(state, engine)), metrics

        return jax.jit(step_on_shards, donate_argnums=(0,))

    def step_on_whole_batch(state, batch):
        # (devices, A, B, ...) -> (A, devices * B, ...): micro-batches stay one after another
        whole = jax.tree.map(lambda x: merge_devices(x, 1), batch)
        return step(state, whole, axis_name=None)

    return jax.jit(step_on_whole_batch, donate_argnums=(0,), out_shardings=replicated())


def takes_shapes(engine: str) -> bool:
    """Whether a step of this engine is lowered from shapes; pmap of several processes is not."""
    return engine != "pmap" or jax.process_count() == 1


def compile_eval_step(step: Callable, engine: str) -> Callable:
    """(params, batch with a leading device axis) -> sums over all devices."""
    if engine == "pmap":
        mapped = functools.partial(step, axis_name=AXIS)
        return jax.pmap(mapped, axis_name=AXIS, in_axes=(None, 0), out_axes=None)
    if engine == "fsdp":
        over_shards = functools.partial(fsdp.over_shards, mesh=mesh(), has_gradient=False)
        return jax.jit(
            lambda params, batch: step(params, batch, over_shards=over_shards),
            out_shardings=replicated(),
        )

    def step_on_whole_batch(params, batch):
        return step(params, jax.tree.map(lambda x: merge_devices(x, 0), batch), axis_name=None)

    return jax.jit(step_on_whole_batch, out_shardings=replicated())


def checksums(tree) -> jax.Array:
    """uint32 (local devices,): a sum over each device's own copy of a replicated tree.

    One flipped bit anywhere in a copy changes its sum: words are weighted with odd numbers.
    """
    here = NamedSharding(local_mesh(), PartitionSpec())
    return sum_copies(here.mesh)(copies_as(tree, here))


def differing_replicas(tree) -> list[jax.Device]:
    """The devices whose copy of a state is not that of most; all where none is.

    Of a sharded array there is one copy, and nothing to compare it with.

    All processes get the same answer, and must ask.
    """
    sums = np.asarray(
        checksums([leaf for leaf in jax.tree.leaves(tree) if leaf.is_fully_replicated])
    )
    compared = jax.local_devices()
    if jax.process_count() > 1:
        sums = multihost_utils.process_allgather(sums).ravel()
        compared = sorted(jax.devices(), key=lambda device: device.process_index)
    values, counts = np.unique(sums, return_counts=True)
    if len(values) == 1:
        return []
    most = values[counts.argmax()] if 2 * counts.max() > len(sums) else None
    return [device for device, of_it in zip(compared, sums, strict=True) if of_it != most]


def compile_maximum() -> Callable:
    """int -> the largest of all processes' ints, as an array that may still be under way."""
    largest = jax.pmap(lambda x: jax.lax.pmax(x, AXIS), axis_name=AXIS, out_axes=None)
    return lambda number: largest(np.full(jax.local_device_count(), number, np.int32))


@functools.lru_cache(maxsize=1)
def sum_copies(mesh: Mesh) -> Callable:
    def of_one(tree):
        return sum(map(weighted_sum, jax.tree.leaves(tree)))[None]

    return jax.jit(
        jax.shard_map(
            of_one, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(AXIS),
            check_vma=False,
        )
    )  # fmt: skip


def weighted_sum(x) -> jax.Array:
    words = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    weights = 2 * jax.lax.iota(jnp.uint32, words.size) + 1
    return (words.ravel() * weights).sum(dtype=jnp.uint32)


def merge_devices(x, axis: int):
    """Move the leading device axis in front of `axis + 1` and merge the two."""
    moved = jnp.moveaxis(x, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])


def split_batch(batch, micro_batches: int | None):
    """A process's rows, split over its devices: (rows, ...) -> (devices, [A,] B, ...).

    A device's rows, and a micro-batch's, are neighbours in the batch.
    """
    n_devices = len(devices.here())
    lead = (n_devices,) if micro_batches is None else (n_devices, micro_batches)
    return jax.tree.map(lambda array: array.reshape(*lead, -1, *array.shape[1:]), batch)


def batch_shapes(batch, micro_batches: int | None, engine: str = "pmap"):
    """What `put_batch` would return, as shapes for the compiler."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (len(x) if engine == "pmap" else devices.count(), *x.shape[1:]),
            x.dtype,
            sharding=over_devices(engine),
        ),
        split_batch(batch, micro_batches),
    )


def put_batch(batch, micro_batches: int | None, engine: str = "pmap"):
    """`split_batch` of this process's rows, on its devices by one transfer."""
    split, sharding = split_batch(batch, micro_batches), over_devices(engine)
    if jax.process_count() == 1 or engine == "pmap":
        return jax.device_put(split, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), split)


def prefetch(items: Iterable, prepare: Callable, ahead: int = 2) -> Generator:
    """`prepare(item)` of each item, made by a worker thread up to `ahead` items early.

    An exception in the worker is raised here, in its place in the order.
    """
    ready: queue.Queue = queue.Queue(ahead)
    stopped = threading.Event()

    def offer(item) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for item in items:
                if not offer((prepare(item), None)):
                    return
            offer((None, StopIteration()))
        except BaseException as error:
            offer((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        thread.join(5)  # it may be inside a read of the network, and it is a daemon
