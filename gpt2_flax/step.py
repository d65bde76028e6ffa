"""One update and one evaluation batch, as pure functions of arrays.

Shapes: A micro-batches whose gradients are added up, B rows of one, S = T + 1 ids of a row.
A `batch` has `ids_BxS`, `slot_B` and `length_B`, described in data/batches.py.
`axis_name` is the pmap axis to reduce over; None where the arrays already are global.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
    """What a step maps to the next one. step: int32, steps made so far."""

    step: jax.Array
    params: Any
    opt_state: Any


def init_state(key, model, optimizer) -> TrainState:
    ids = jnp.zeros((1, 1), jnp.int32)
    return state_from_params(model.init(key, ids)["params"], optimizer)


def state_from_params(params, optimizer) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def loss_sum(params, batch, key, model):
    """(summed cross-entropy in nats, number of targets) of a micro-batch, both float32.

    key: of the step, for dropout; None for none.
    """
    inputs_BxT, targets_BxT = batch.ids_BxS[:, :-1], batch.ids_BxS[:, 1:]
    output = model.apply(
        {"params": params},
        inputs_BxT,
        deterministic=key is None,
        row_ids=batch.slot_B,
        rngs=None if key is None else {"dropout": key},
    )
    loss_BxT = optax.softmax_cross_entropy_with_integer_labels(output.logits, targets_BxT)
    counts_BxT = jnp.arange(inputs_BxT.shape[1])[None, :] < batch.length_B[:, None]
    return jnp.where(counts_BxT, loss_BxT, 0.0).sum(), counts_BxT.sum(dtype=jnp.float32)


def train_step(state: TrainState, batch, *, model, optimizer, seed: int, axis_name=None):
    """One optimizer update from a batch of shape (A, B, ...). Returns (state, metrics).

    The gradient is that of the mean loss over all targets of all micro-batches and devices,
    however unevenly they are spread. metrics: loss_sum (nats), tokens, grad_norm (before
    clipping), as float32 scalars.

    Where the loss or the gradient's norm is not finite, parameters and optimizer stay as they
    are; the step, its rows, its dropout and its learning rate are used up all the same.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    value_and_grad = jax.value_and_grad(loss_sum, has_aux=True)

    def add_micro_batch(sums, micro_batch):
        (loss, tokens), grads = value_and_grad(state.params, micro_batch, key, model)
        return jax.tree.map(jnp.add, sums, (loss, tokens, grads)), None

    if batch.ids_BxS.shape[0] == 1:
        first = jax.tree.map(lambda leaf: leaf[0], batch)
        (loss, tokens), grads = value_and_grad(state.params, first, key, model)
        sums = loss, tokens, grads
    else:
        zeros = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
        sums, _ = jax.lax.scan(add_micro_batch, zeros, batch)
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    loss, tokens, grads = sums

    grads = jax.tree.map(lambda grad: grad / tokens, grads)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
    params = optax.apply_updates(state.params, updates)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    metrics = {"loss_sum": loss, "tokens": tokens, "grad_norm": norm}
    return TrainState(state.step + 1, params, opt_state), metrics


def all_finite(tree) -> jax.Array:
    """Whether every number of a tree is finite, as a boolean scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def eval_step(params, batch, *, model, axis_name=None):
    """(summed loss, number of targets) of a batch of shape (B, ...), without dropout."""
    sums = loss_sum(params, batch, None, model)
    return jax.lax.psum(sums, axis_name) if axis_name is not None else sums
