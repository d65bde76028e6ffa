"""The head and the cross-entropy in one, so that logits of all positions never need exist.

Shapes: B rows, T positions, t positions at a time, D width of the states, V ids, W >= V rows of
the head's matrix. A row of it from V on is padding: it has no probability and gets no gradient.
"""

import functools

import jax
import jax.numpy as jnp

from gpt2_flax import devices

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy_sum(
    x_BxTxD: Array,
    head_WxD: Array,
    targets_BxT: Array,
    counts_BxT: Array,
    n_ids: int,
    at_once: int,
) -> Array:
    """Summed cross-entropy in nats of the positions that count, a float32 scalar.

    x and head are of the type of computation, to which logits are rounded, once; what follows is
    float32, but in bfloat16 no float32 array of all logits is made. A target of no id gives NaN.
    n_ids: V. at_once: t, positions of every row whose logits are held at a time. The gradient is
    formed along with the loss, chunk by chunk, while the logits are there: none is computed twice.
    """
    return sum(
        _loss_of_chunk(_logits(x, head_WxD, n_ids), targets, counts)[0]
        for x, targets, counts in _chunks(at_once, x_BxTxD, targets_BxT, counts_BxT)
    )


def _chunks(at_once, *arrays):
    T = arrays[0].shape[1]
    n_chunks = -(-T // at_once)
    size = -(-T // n_chunks)
    for first in range(0, T, size):
        yield [array[:, first : first + size] for array in arrays]


def _logits(x_BxtxD, head_WxD, n_ids):
    logits_BxtxW = jax.lax.dot_general(
        x_BxtxD, head_WxD, (((2,), (1,)), ((), ())), preferred_element_type=x_BxtxD.dtype
    )
    if n_ids == head_WxD.shape[0]:
        return logits_BxtxW
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits_BxtxW.shape, 2) < n_ids,
                     logits_BxtxW, -jnp.inf)  # fmt: skip


def _float32(array):
    return array.astype(jnp.float32)


def _loss_of_chunk(logits_BxtxW, targets_Bxt, counts_Bxt):
    """(summed loss, logarithm of each position's sum of exponentials (B, t, 1))."""
    largest_Bxtx1 = _float32(logits_BxtxW.max(-1, keepdims=True))
    sums_Bxtx1 = jnp.exp(_float32(logits_BxtxW) - largest_Bxtx1).sum(-1, keepdims=True)
    log_sums_Bxtx1 = jnp.log(sums_Bxtx1) + largest_Bxtx1
    chosen_Bxtx1 = jnp.take_along_axis(logits_BxtxW, targets_Bxt[:, :, None], -1)
    chosen_Bxtx1 = _float32(chosen_Bxtx1)
    loss_Bxt = (log_sums_Bxtx1 - chosen_Bxtx1)[:, :, 0]
    return jnp.where(counts_Bxt, loss_Bxt, 0.0).sum(), log_sums_Bxtx1


def _forward(x_BxTxD, head_WxD, targets_BxT, counts_BxT, n_ids, at_once):
    total, dx_BxtxD, dhead_WxD = 0.0, [], None
    for x, targets, counts in _chunks(at_once, x_BxTxD, targets_BxT, counts_BxT):
        if dhead_WxD is not None:  # XLA would compute the logits of all chunks first
            x = _after(total + dhead_WxD.ravel()[0], x, jnp.zeros((), x.dtype))
        logits_BxtxW = _logits(x, head_WxD, n_ids)
        loss, log_sums_Bxtx1 = _loss_of_chunk(logits_BxtxW, targets, counts)
        total += loss
        probs_BxtxW = jnp.exp(_float32(logits_BxtxW) - log_sums_Bxtx1)
        dlogits_BxtxW = _dlogits(probs_BxtxW, targets, counts).astype(x.dtype)
        dx = _product(dlogits_BxtxW, head_WxD, ((2,), (0,)))
        dx_BxtxD.append(dx)
        if devices.platform() == "cpu" and x.dtype == jnp.float32:
            # XLA transposes them for the other product: only once dx is there, so that the
            # two forms never are in memory at the same time.
            targets = _after(dx, targets, -1)
            dlogits_BxtxW = _dlogits(probs_BxtxW, targets, counts).astype(x.dtype)
        part_WxD = _product(dlogits_BxtxW, x, ((0, 1), (0, 1)))
        dhead_WxD = part_WxD if dhead_WxD is None else dhead_WxD + part_WxD
    dx_BxTxD = jnp.concatenate(dx_BxtxD, axis=1) if len(dx_BxtxD) > 1 else dx_BxtxD[0]
    return total, (dx_BxTxD.astype(x_BxTxD.dtype), dhead_WxD.astype(head_WxD.dtype))


def _after(array, waiting, instead):
    """`waiting`, computed only when `array` is; `instead` where that begins with NaN."""
    first = array.ravel()[0]
    return jnp.where(first == first, waiting, instead)


def _dlogits(probs_BxtxW, targets_Bxt, counts_Bxt):
    ids = jax.lax.broadcasted_iota(jnp.int32, probs_BxtxW.shape, 2)
    dlogits_BxtxW = probs_BxtxW - (ids == targets_Bxt[:, :, None])
    return jnp.where(counts_Bxt[:, :, None], dlogits_BxtxW, 0.0)


def _product(a, b, contracted):
    return jax.lax.dot_general(a, b, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _backward(n_ids, at_once, gradients, cotangent):
    del n_ids, at_once
    dx, dhead = (gradient * cotangent.astype(gradient.dtype) for gradient in gradients)
    return dx, dhead, None, None


cross_entropy_sum.defvjp(_forward, _backward)
