"""Fully sharded data parallelism: each device holds a part of the state and of the batch.

A layer's parameters are gathered from all devices when it is computed and dropped afterwards;
their gradient is summed over the devices straight into shards (Rajbhandari et al. 2020, ZeRO
stage 3, https://arxiv.org/abs/1910.02054). Gathering and summing are written out, by shard_map;
the update after them is left to XLA, which sees whole arrays: every optimizer stays what it is.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LEAST = 2**12  # numbers in a matrix that is worth sharding


def spec_of(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How an array is sharded: on its largest axis that the devices divide evenly.

    Vectors and small matrices are on every device, and so is what no axis fits. mesh: one axis.
    """
    fitting = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if mesh.size == 1 or len(shape) < 2 or math.prod(shape) < LEAST or not fitting:
        return PartitionSpec()
    largest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * largest, *mesh.axis_names)


def specs_of(tree, mesh: Mesh):
    """The PartitionSpec of each array of a tree, or of its shapes."""
    return jax.tree.map(lambda x: spec_of(x.shape, mesh), tree)


def shardings_of(tree, mesh: Mesh):
    return jax.tree.map(lambda x: NamedSharding(mesh, spec_of(x.shape, mesh)), tree)


def over_shards(function, params, batch, key, model, logits_at_once, *, mesh, has_gradient):
    """function(params, batch, key, model, logits_at_once), summed over all devices.

    It is run on each device, with that one's shards and rows; it returns sums. The third of
    them, where has_gradient says that there is one, comes back in shards.
    """
    (axis_name,), specs = mesh.axis_names, specs_of(params, mesh)
    model = model.clone(gather=functools.partial(gather, specs))

    def on_one_device(params, batch, key):
        rows = jax.tree.map(lambda x: x[0], batch)
        loss, tokens, *gradient = function(params, rows, key, model, logits_at_once)
        # What was gathered has a gradient that is summed already.
        gradient = [
            jax.tree.map(lambda x, spec: x if any(spec) else jax.lax.psum(x, axis_name), g, specs)
            for g in gradient
        ]
        return *jax.lax.psum((loss, tokens), axis_name), *gradient

    scalar = PartitionSpec()
    return jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(specs, PartitionSpec(axis_name), PartitionSpec()),
        out_specs=(scalar, scalar, specs) if has_gradient else (scalar, scalar),
        check_vma=False,
    )(params, batch, key)


def gather(specs, params, path: tuple[str, ...], dtype, after=None):
    """A part of the parameters, whole; what is sharded becomes `dtype` before it is sent.

    specs: of all parameters. path: where in their tree the part is. after: array that is
    computed first; left to itself, XLA may gather all of a model before it computes anything.
    """

    def whole(where, x):
        spec = functools.reduce(operator.getitem, [*path, *(key.key for key in where)], specs)
        if not any(spec):
            return x
        if after is not None:
            first = jax.lax.stop_gradient(after.ravel()[0])
            x = jnp.where(first == first, x, jnp.zeros((), x.dtype))  # unless it is NaN: x
        return _gathered(x, spec, dtype)

    return jax.tree_util.tree_map_with_path(whole, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x, spec, dtype):
    axis = len(spec) - 1
    return jax.lax.all_gather(x.astype(dtype), spec[axis], axis=axis, tiled=True)


def _forward(x, spec, dtype):
    axis = len(spec) - 1
    return jax.lax.all_gather(x.astype(dtype), spec[axis], axis=axis, tiled=True), None


def _backward(spec, dtype, _, cotangent):
    """Summed over the devices in float32, whatever `dtype` is, as elsewhere."""
    del dtype
    axis = len(spec) - 1
    summed = jax.lax.psum_scatter(
        cotangent.astype(jnp.float32), spec[axis], scatter_dimension=axis, tiled=True
    )
    return (summed,)


_gathered.defvjp(_forward, _backward)
