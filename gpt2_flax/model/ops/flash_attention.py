"""Causal attention with dropout that never holds (B, H, T, T): kernels for NVIDIA GPUs.

The algorithm is FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691), in Pallas, which
compiles by Triton. Probabilities are made tile by tile in the chip's memory, dropped by the same
mask as in `dropout.Dropout`, and made again in the backward pass from each position's
log-sum-exp. Queries, keys and values are read where one product wrote them, and their gradients
written where the next product reads them: nothing is split, and nothing put together.

Shapes: B rows, T positions, H heads, C width of a head. In a kernel, of one row and head: Q
queries or K keys of a tile. Exponentials are of base 2, and so are the log-sum-exps.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gpt2_flax.jax_versions import by_triton
from gpt2_flax.model.ops.dropout import LINE, is_kept

Array = jax.Array
WIDTHS = 32, 64, 128  # of a head
TILE = LINE  # queries or keys at a time
FORWARD, BACKWARD = (4, 3), (4, 2)  # warps, and tiles whose loads are under way: docs/lab_notes.md
LOG2_E = math.log2(math.e)


def why_not(block_size: int, width: int) -> str | None:
    """Why rows or heads of this size cannot be had, in a few words; None where they can."""
    if block_size % TILE:
        return f"block_size {block_size} is not a multiple of {TILE}"
    if width not in WIDTHS:
        return f"heads of width {width} are none of {', '.join(map(str, WIDTHS))}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def flash_attention(
    qkv_BxTx3xHxC: Array,
    words: tuple[Array, Array] | None,
    scale: float,
    rate: float = 0.0,
    interpret: bool = False,
) -> Array:
    """Each position's mix of the values at and before it, (B, T, H, C), in qkv's type.

    words: two uint32 (B, H, T), as of `dropout.words_of` for (H, T, T); None for no dropout.
    scale: of the products of queries and keys. rate: share of probabilities that are dropped.
    interpret: run by JAX on any device, slowly. T and C: see `why_not`. Forward mode is not had.
    """
    return _forward(qkv_BxTx3xHxC, words, scale, rate, interpret)[0]


def _forward(qkv_BxTx3xHxC, words, scale, rate, interpret):
    B, T, _, H, C = qkv_BxTx3xHxC.shape
    n_tiles = T // TILE

    def place(n):  # those with most to do come first
        return n_tiles - 1 - n

    of_row = pl.BlockSpec((None, None, T), lambda n, h, b: (b, h, 0))
    out_BxTxHxC, lse_BxHxT = pl.pallas_call(
        functools.partial(_forward_kernel, scale * LOG2_E, rate),
        grid=(n_tiles, H, B),
        in_specs=[
            _of_qkv(TILE, C, 0, place),
            _of_qkv(T, C, 1),
            _of_qkv(T, C, 2),
            *([of_row, of_row] if words else []),
        ],
        out_specs=[
            pl.BlockSpec((None, TILE, None, C), lambda n, h, b: (b, place(n), h, 0)),
            pl.BlockSpec((None, None, TILE), lambda n, h, b: (b, h, place(n))),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, T, H, C), qkv_BxTx3xHxC.dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ],
        interpret=interpret,
        compiler_params=by_triton(*FORWARD),
        name="flash_attention_forward",
    )(*[qkv_BxTx3xHxC] * 3, *(words or ()))
    return out_BxTxHxC, (qkv_BxTx3xHxC, words, out_BxTxHxC, lse_BxHxT)


def _forward_kernel(scale, rate, q_ref, k_ref, v_ref, *refs):
    """The output of a tile of queries, by tiles of keys up to it."""
    *word_refs, out_ref, lse_ref = refs
    here = k_ref.shape[0] // TILE - 1 - pl.program_id(0)
    q_QxC = q_ref[...]
    weights_of = _weights(word_refs, here, rate)

    def of_keys(is_diagonal, n, sums):
        out_QxC, total_Q, largest_Q = sums
        keys = pl.ds(n * TILE, TILE)
        scores_QxK = _dot(q_QxC, k_ref[keys, :], 1, 1)  # not scaled yet
        if is_diagonal:
            scores_QxK = jnp.where(_is_before(), scores_QxK, -jnp.inf)
        now_largest_Q = jnp.maximum(largest_Q, scores_QxK.max(1))
        shrunk_Q = jnp.exp2((largest_Q - now_largest_Q) * scale)
        probs_QxK = jnp.exp2(scores_QxK * scale - (now_largest_Q * scale)[:, None])
        total_Q = total_Q * shrunk_Q + probs_QxK.sum(1)
        if word_refs:
            probs_QxK *= weights_of(n)
        v_KxC = v_ref[keys, :]
        out_QxC = out_QxC * shrunk_Q[:, None] + _dot(probs_QxK.astype(v_KxC.dtype), v_KxC, 1, 0)
        return out_QxC, total_Q, now_largest_Q

    sums = (
        jnp.zeros(q_QxC.shape, jnp.float32),
        jnp.zeros(TILE, jnp.float32),
        jnp.full(TILE, -jnp.inf, jnp.float32),
    )
    sums = jax.lax.fori_loop(0, here, functools.partial(of_keys, False), sums)
    out_QxC, total_Q, largest_Q = of_keys(True, here, sums)
    out_ref[...] = (out_QxC / total_Q[:, None]).astype(out_ref.dtype)
    lse_ref[...] = largest_Q * scale + jnp.log2(total_Q)


def _backward(scale, rate, interpret, saved, dout_BxTxHxC):
    qkv_BxTx3xHxC, words, out_BxTxHxC, lse_BxHxT = saved
    B, T, _, H, C = qkv_BxTx3xHxC.shape
    products = out_BxTxHxC.astype(jnp.float32) * dout_BxTxHxC.astype(jnp.float32)
    delta_BxHxT = products.sum(-1).transpose(0, 2, 1)
    of_row = pl.BlockSpec((None, None, T), lambda n, h, b: (b, h, 0))
    dqkv_BxTx3xHxC = pl.pallas_call(
        functools.partial(_backward_kernel, scale, rate),
        grid=(T // TILE, H, B),
        in_specs=[
            *(_of_qkv(T, C, part) for part in range(3)),
            pl.BlockSpec((None, T, None, C), lambda n, h, b: (b, 0, h, 0)),
            of_row,
            of_row,
            *([of_row, of_row] if words else []),
        ],
        out_specs=pl.BlockSpec((None, TILE, 3, None, C), lambda n, h, b: (b, n, 0, h, 0)),
        out_shape=jax.ShapeDtypeStruct(qkv_BxTx3xHxC.shape, qkv_BxTx3xHxC.dtype),
        interpret=interpret,
        compiler_params=by_triton(*BACKWARD),
        name="flash_attention_backward",
    )(*[qkv_BxTx3xHxC] * 3, dout_BxTxHxC, lse_BxHxT, delta_BxHxT, *(words or ()))
    return dqkv_BxTx3xHxC, None


def _backward_kernel(scale, rate, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs):
    """The gradients of a tile of keys and values, then those of the same tile of queries.

    The one takes the tiles of queries from it on, the other the tiles of keys up to it:
    together every program has the same work.
    """
    *word_refs, dqkv_ref = refs
    here = pl.program_id(0)
    rows = pl.ds(here * TILE, TILE)
    scale_of_2 = scale * LOG2_E
    zeros = jnp.zeros((TILE, k_ref.shape[1]), jnp.float32)

    k_KxC, v_KxC = k_ref[rows, :], v_ref[rows, :]
    weights_of_queries = _weights(word_refs[::-1], here, rate)

    def of_queries(is_diagonal, n, sums):
        dk_KxC, dv_KxC = sums
        queries = pl.ds(n * TILE, TILE)
        q_QxC, dout_QxC = q_ref[queries, :], dout_ref[queries, :]
        scores_KxQ = _dot(k_KxC, q_QxC, 1, 1) * scale_of_2
        probs_KxQ = jnp.exp2(scores_KxQ - lse_ref[queries][None, :])
        if is_diagonal:
            probs_KxQ = jnp.where(_is_before().T, probs_KxQ, 0.0)
        dprobs_KxQ, used_KxQ = _dot(v_KxC, dout_QxC, 1, 1), probs_KxQ
        if word_refs:
            weights_KxQ = weights_of_queries(n)
            dprobs_KxQ, used_KxQ = dprobs_KxQ * weights_KxQ, probs_KxQ * weights_KxQ
        dv_KxC += _dot(used_KxQ.astype(dout_QxC.dtype), dout_QxC, 1, 0)
        dscores_KxQ = probs_KxQ * (dprobs_KxQ - delta_ref[queries][None, :])
        dk_KxC += _dot(dscores_KxQ.astype(q_QxC.dtype), q_QxC, 1, 0)
        return dk_KxC, dv_KxC

    sums = of_queries(True, here, (zeros, zeros))
    dk_KxC, dv_KxC = jax.lax.fori_loop(
        here + 1, k_ref.shape[0] // TILE, functools.partial(of_queries, False), sums
    )
    dqkv_ref[:, 1, :] = (dk_KxC * scale).astype(dqkv_ref.dtype)
    dqkv_ref[:, 2, :] = dv_KxC.astype(dqkv_ref.dtype)

    q_QxC, dout_QxC = q_ref[rows, :], dout_ref[rows, :]
    lse_Q, delta_Q = lse_ref[rows], delta_ref[rows]
    weights_of_keys = _weights(word_refs, here, rate)

    def of_keys(is_diagonal, n, dq_QxC):
        keys = pl.ds(n * TILE, TILE)
        k_KxC = k_ref[keys, :]
        probs_QxK = jnp.exp2(_dot(q_QxC, k_KxC, 1, 1) * scale_of_2 - lse_Q[:, None])
        if is_diagonal:
            probs_QxK = jnp.where(_is_before(), probs_QxK, 0.0)
        dprobs_QxK = _dot(dout_QxC, v_ref[keys, :], 1, 1)
        if word_refs:
            dprobs_QxK *= weights_of_keys(n)
        dscores_QxK = probs_QxK * (dprobs_QxK - delta_Q[:, None])
        return dq_QxC + _dot(dscores_QxK.astype(k_KxC.dtype), k_KxC, 1, 0)

    dq_QxC = jax.lax.fori_loop(0, here, functools.partial(of_keys, False), zeros)
    dq_QxC = of_keys(True, here, dq_QxC)
    dqkv_ref[:, 0, :] = (dq_QxC * scale).astype(dqkv_ref.dtype)


flash_attention.defvjp(_forward, _backward)


def _of_qkv(size: int, width: int, part: int, place=lambda n: 0) -> pl.BlockSpec:
    """(size, C) of queries (part 0), keys or values; program n takes the tile `place(n)`."""
    return pl.BlockSpec((None, size, None, None, width), lambda n, h, b: (b, place(n), part, h, 0))


def _weights(word_refs, here, rate):
    """n -> 1 / (1 - rate) or 0, for tile `here` of the first words' axis and n of the second's.

    Words repeat from tile to tile, but for one word of each tile (`dropout.words_of`): the loop
    over n loads that one alone.
    """
    if not word_refs:
        return None
    of_here, of_others = word_refs
    lines = of_here[pl.ds(here * TILE, TILE)]
    columns = of_others[pl.ds(0, TILE)]

    def of_tile(n):
        kept = is_kept(lines + (of_others[n * TILE] - of_others[0]), columns, rate)
        return jnp.where(kept, 1.0 / (1.0 - rate), 0.0)

    return of_tile


def _is_before() -> Array:
    """(Q, K) of a tile on the diagonal: which keys are at or before which queries."""
    place = jnp.arange(TILE)
    return place[:, None] >= place[None, :]


def _dot(x, y, of_x: int, of_y: int) -> Array:
    """The product over these axes, summed up in float32."""
    return jax.lax.dot_general(
        x, y, (((of_x,), (of_y,)), ((), ())), preferred_element_type=jnp.float32
    )
