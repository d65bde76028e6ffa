"""One update and one evaluation batch, as pure functions of arrays.

Shapes: A micro-batches whose gradients are added up, B rows of one, S = T + 1 ids of a row.
A `batch` has `ids_BxS`, `slot_B` and `length_B`, described in data/batches.py.
`axis_name` is the pmap axis to reduce over; None where the arrays already are global.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpt2_flax.distributed import devices
from gpt2_flax.model import initialization
from gpt2_flax.model.ops import cross_entropy


class TrainState(NamedTuple):
    """What a step maps to the next one. step: int32, steps made so far."""

    step: jax.Array
    params: Any
    opt_state: Any


def init_state(key, model, optimizer) -> TrainState:
    """A new run's state. `plan.new_state` makes the same where the devices want it."""
    return state_from_params(initialization.draw_parameters(model, key), optimizer)


def state_from_params(params, optimizer) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shapes(model, optimizer) -> TrainState:
    """Shapes and types of `init_state`'s arrays; nothing is computed."""
    make = functools.partial(state_from_params, optimizer=optimizer)
    return jax.eval_shape(make, initialization.parameter_shapes(model))


def loss_sum(params, batch, key, model, logits_at_once: int | None = None):
    """(summed cross-entropy in nats, number of targets) of a micro-batch, both float32.

    params: whole, or one device's shards of them with a model that gathers.

    key: of the step, for dropout; None for none. logits_at_once: positions of every row whose
    logits are held at a time, None for all.
    """
    inputs_BxT, targets_BxT = batch.ids_BxS[:, :-1], batch.ids_BxS[:, 1:]
    T = inputs_BxT.shape[1]
    counts_BxT = jnp.arange(T)[None, :] < batch.length_B[:, None]
    params = model.outside_blocks(params)
    x_BxTxD = model.apply(
        {"params": params},
        inputs_BxT,
        deterministic=key is None,
        row_ids=batch.slot_B,
        rngs=None if key is None else {"dropout": key},
        method="states",
    )
    loss = cross_entropy.cross_entropy_sum(
        x_BxTxD, model.head(params), targets_BxT, counts_BxT, model.config.vocab_size,
        min(logits_at_once or T, T), model.kernels,
    )  # fmt: skip
    return loss, counts_BxT.sum(dtype=jnp.float32)


def gradient_sums(params, batch, key, model, logits_at_once: int | None = None):
    """(loss, targets, gradient) of a batch of shape (A, B, ...), each summed over all of it."""
    loss_of = functools.partial(loss_sum, logits_at_once=logits_at_once)
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    cast = model.kernels_cast(params)  # once, and not in each micro-batch

    def add_micro_batch(sums, micro_batch):
        (loss, tokens), grads = value_and_grad(cast, micro_batch, key, model)
        grads = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, params)
        return jax.tree.map(jnp.add, sums, (loss, tokens, grads)), None

    if batch.ids_BxS.shape[0] == 1:
        first = jax.tree.map(lambda leaf: leaf[0], batch)
        (loss, tokens), grads = value_and_grad(params, first, key, model)
        return loss, tokens, grads
    zeros = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add_micro_batch, zeros, batch)[0]


def train_step(
    state: TrainState,
    batch,
    *,
    model,
    optimizer,
    seed: int,
    logits_at_once: int | None = None,
    axis_name=None,
    over_shards=None,
):
    """One optimizer update from a batch of shape (A, B, ...). Returns (state, metrics).

    The gradient is that of the mean loss over all targets of all micro-batches and devices,
    however unevenly they are spread. metrics: loss_sum (nats), tokens, grad_norm (before
    clipping), as float32 scalars.

    Where the loss or the gradient's norm is not finite, parameters and optimizer stay as they
    are; the step, its rows, its dropout and its learning rate are used up all the same.

    over_shards: `fsdp.over_shards` where the state is sharded; the batch is then
    (devices, A, B, ...).
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    arguments = state.params, batch, key
    if over_shards is not None:
        loss, tokens, grads = over_shards(gradient_sums, *arguments, model, logits_at_once)
    else:
        sums = gradient_sums(*arguments, model, logits_at_once)
        loss, tokens, grads = sums if axis_name is None else jax.lax.psum(sums, axis_name)

    share = 1.0 / tokens
    grads = jax.tree.map(lambda grad: grad * share, grads)
    norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    in_place = devices.platform() == "cpu" and over_shards is None
    params, opt_state = update(state, grads, optimizer, is_finite, in_place)
    metrics = {"loss_sum": loss, "tokens": tokens, "grad_norm": norm}
    return TrainState(state.step + 1, params, opt_state), metrics


def update(state: TrainState, grads, optimizer, is_wanted, in_place: bool):
    """(parameters, optimizer's state) after an update, or as they were if it is not wanted.

    in_place: on a CPU, of a state that is not sharded. Each half is then an update of its own,
    the second of an old state that is there only after the new parameters: they are computed from
    it, and XLA would copy all of it to write the new one over the old. (Of either update it drops
    what is not used.)
    """

    @jax.jit  # to be traced once
    def updated(old):
        return optimizer.update(grads, old, state.params, step=state.step)

    old = state.opt_state
    updates, new = updated(old)
    params = select(is_wanted, optax.apply_updates(state.params, updates), state.params)
    if in_place:
        old = select(are_there(params), old, jax.tree.map(jnp.zeros_like, old))
        _, new = updated(old)
    return params, select(is_wanted, new, old)


def select(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def are_there(tree) -> jax.Array:
    """True as soon as every array of a tree is computed, if no number in it is NaN."""
    firsts = jnp.stack([leaf.ravel()[0] for leaf in jax.tree.leaves(tree)])
    return (firsts == firsts).all()


def all_finite(tree) -> jax.Array:
    """Whether every number of a tree is finite, as a boolean scalar."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def eval_step(
    params, batch, *, model, logits_at_once: int | None = None, axis_name=None, over_shards=None
):
    """(summed loss, number of targets) of a batch of shape (B, ...), without dropout."""
    if over_shards is not None:
        return over_shards(loss_sum, params, batch, None, model, logits_at_once)
    sums = loss_sum(params, batch, None, model, logits_at_once)
    return jax.lax.psum(sums, axis_name) if axis_name is not None else sums
