"""The head and the cross-entropy in one, so that logits of all positions never need exist.

Shapes: B rows, T positions, t positions at a time, D width of the states, V ids, W >= V rows of
the head's matrix. A row of it from V on is padding: it has no probability and gets no gradient.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gpt2_flax.distributed import devices
from gpt2_flax.jax_versions import by_triton

Array = jax.Array
LANES = 4096  # logits of a position that the kernel handles at a time
LOG2_E = math.log2(math.e)
LOWEST = -1e30  # below any logit, and finite


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy_sum(
    x_BxTxD: Array,
    head_WxD: Array,
    targets_BxT: Array,
    counts_BxT: Array,
    n_ids: int,
    at_once: int,
    kernel: bool = False,
) -> Array:
    """Summed cross-entropy in nats of the positions that count, a float32 scalar.

    x and head are of the type of computation, to which logits are rounded, once; what follows is
    float32, but in bfloat16 no float32 array of all logits is made. A target of no id gives NaN.
    n_ids: V. at_once: t, positions of every row whose logits are held at a time. The gradient is
    formed along with the loss, chunk by chunk, while the logits are there: none is computed twice.
    kernel: it takes the place of the logits, by a kernel for NVIDIA GPUs that reads them once.
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
    logits_BxtxW = _unmasked_logits(x_BxtxD, head_WxD)
    if n_ids == head_WxD.shape[0]:
        return logits_BxtxW
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, logits_BxtxW.shape, 2) < n_ids,
                     logits_BxtxW, -jnp.inf)  # fmt: skip


def _unmasked_logits(x_BxtxD, head_WxD):
    return jax.lax.dot_general(
        x_BxtxD, head_WxD, (((2,), (1,)), ((), ())), preferred_element_type=x_BxtxD.dtype
    )


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


def _forward(x_BxTxD, head_WxD, targets_BxT, counts_BxT, n_ids, at_once, kernel):
    total, dx_BxtxD, dhead_WxD = 0.0, [], None
    for x, targets, counts in _chunks(at_once, x_BxTxD, targets_BxT, counts_BxT):
        if dhead_WxD is not None:  # XLA would compute the logits of all chunks first
            x = _after(total + dhead_WxD.ravel()[0], x, jnp.zeros((), x.dtype))
        if kernel:
            loss, dlogits_BxtxW = _in_place(_unmasked_logits(x, head_WxD), targets, counts, n_ids)
        else:
            logits_BxtxW = _logits(x, head_WxD, n_ids)
            loss, log_sums_Bxtx1 = _loss_of_chunk(logits_BxtxW, targets, counts)
            probs_BxtxW = jnp.exp(_float32(logits_BxtxW) - log_sums_Bxtx1)
            dlogits_BxtxW = _dlogits(probs_BxtxW, targets, counts).astype(x.dtype)
        total += loss
        dx = _product(dlogits_BxtxW, head_WxD, ((2,), (0,)))
        dx_BxtxD.append(dx)
        if devices.platform() == "cpu" and x.dtype == jnp.float32 and not kernel:
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


def _in_place(logits_BxtxW, targets_Bxt, counts_Bxt, n_ids):
    """(summed loss, gradient of the logits), which is written over them."""
    W = logits_BxtxW.shape[-1]
    logits_NxW = logits_BxtxW.reshape(-1, W)
    targets_N, counts_N = (a.reshape(-1).astype(jnp.int32) for a in (targets_Bxt, counts_Bxt))
    row, number = pl.BlockSpec((None, W), lambda n: (n, 0)), pl.BlockSpec((1,), lambda n: (n,))
    dlogits_NxW, loss_N = pl.pallas_call(
        functools.partial(_kernel, W, n_ids),
        grid=(len(logits_NxW),),
        in_specs=[row, number, number],
        out_specs=[row, number],
        out_shape=[
            jax.ShapeDtypeStruct(logits_NxW.shape, logits_NxW.dtype),
            jax.ShapeDtypeStruct(targets_N.shape, jnp.float32),
        ],
        input_output_aliases={0: 0},
        interpret=devices.platform() != "gpu",
        compiler_params=by_triton(num_warps=16),
        name="cross_entropy",
    )(logits_NxW, targets_N, counts_N)
    return loss_N.sum(), dlogits_NxW.reshape(logits_BxtxW.shape)


def _kernel(W, n_ids, logits_ref, target_ref, counts_ref, dlogits_ref, loss_ref):
    """One position's loss, and the gradient of its logits in their place.

    They come through twice, the second time out of the chip's cache. In the first each lane keeps
    the largest that it has seen and a sum of exponentials below that: of the two that a logit
    asks for, that of the larger one is 1.
    """
    from jax.experimental.pallas import triton

    target, counts = target_ref[0], counts_ref[0] != 0
    is_id = (target >= 0) & (target < n_ids)
    chosen = triton.load(logits_ref.at[target], mask=is_id, other=jnp.nan).astype(jnp.float32)

    def ids(n):
        return n * LANES + jnp.arange(LANES)

    def scaled(n):
        at = pl.ds(n * LANES, LANES)
        logits = triton.load(logits_ref.at[at], mask=ids(n) < W, other=0.0).astype(jnp.float32)
        return jnp.where(ids(n) < n_ids, logits * LOG2_E, -jnp.inf)

    def add(n, sums):
        largest, total = sums
        logits = scaled(n)
        over = logits - largest
        smaller = jnp.exp2(-jnp.abs(over))
        total = jnp.where(over > 0, total * smaller + 1.0, total + smaller)
        return jnp.maximum(largest, logits), total

    n_parts = -(-W // LANES)
    zeros = jnp.zeros(LANES, jnp.float32)
    largest, total = jax.lax.fori_loop(0, n_parts, add, (zeros + LOWEST, zeros))
    of_all = largest.max()
    log_sum = of_all + jnp.log2((total * jnp.exp2(largest - of_all)).sum())
    loss_ref[0] = jnp.where(counts, log_sum / LOG2_E - chosen, 0.0)

    # Where a position does not count, all of its gradient is 0.
    log_sum, target = jnp.where(counts, log_sum, jnp.inf), jnp.where(counts, target, -1)

    def write(n, nothing):
        dlogits = jnp.exp2(scaled(n) - log_sum) - jnp.where(ids(n) == target, 1.0, 0.0)
        at = pl.ds(n * LANES, LANES)
        triton.store(dlogits_ref.at[at], dlogits.astype(dlogits_ref.dtype), mask=ids(n) < W)
        return nothing

    jax.lax.fori_loop(0, n_parts, write, 0)


def _backward(n_ids, at_once, kernel, gradients, cotangent):
    del n_ids, at_once, kernel
    dx, dhead = (gradient * cotangent.astype(gradient.dtype) for gradient in gradients)
    return dx, dhead, None, None


cross_entropy_sum.defvjp(_forward, _backward)
