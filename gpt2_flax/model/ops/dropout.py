"""Dropout whose masks are hashes of (key, row id, module, place).

A row meets the same mask on whatever device, and in whatever micro-batch, it is; and a mask is
cheap enough to be computed where it is used, in both passes, instead of being kept.

Shapes: B rows; of a row's array, (..., T, K): T and K are its last two axes.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
LINE = 64
MULTIPLIERS = 0x7FEB352D, 0x846CA68B


def words_of_rows(key, row_ids_B, n_masks: int) -> Array:
    """uint32 (B, n_masks, 2), a function of key and row id: what a row's masks are made of.

    All at once, by JAX's own generator, whose loop is slow to trace and to load for each mask.
    """

    def of_row(row):
        return jax.random.bits(jax.random.fold_in(key, row), (n_masks, 2), jnp.uint32)

    return jax.vmap(of_row)(row_ids_B)


def random_bits(words_Bx2, shape: tuple[int, ...]) -> Array:
    """uint32 (B, *shape), a function of a row's two words and the place.

    A hash of the place, seeded by the words. The mixing is Chris Wellons' lowbias32
    (https://nullprogram.com/blog/2018/07/31/), twice.
    """
    first, second = (words_Bx2[:, n].reshape(-1, *[1] * len(shape)) for n in range(2))
    place = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(1, *shape)
    return _mixed(_mixed(place ^ first) + second)


def _mixed(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(MULTIPLIERS[0])
    x = (x ^ (x >> 15)) * jnp.uint32(MULTIPLIERS[1])
    return x ^ (x >> 16)


def words_of(words_Bx2, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """uint32 (B, ..., T) and (B, ..., K), which `is_kept` makes a mask of shape (..., T, K) of.

    Place n of an axis has word n % LINE of one list, plus word n // LINE of another.
    """
    *lead, T, K = shape
    counts = [LINE, -(-T // LINE), LINE, -(-K // LINE)]
    bits = random_bits(words_Bx2, (*lead, sum(counts)))
    of_lines, of_line, of_columns, of_column = jnp.split(bits, np.cumsum(counts[:-1]), axis=-1)

    def of_axis(inside, outside, size):
        words = outside[..., :, None] + inside[..., None, :]
        return words.reshape(*words.shape[:-2], -1)[..., :size]

    return of_axis(of_lines, of_line, T), of_axis(of_columns, of_column, K)


def is_kept(of_T: Array, of_K: Array, rate: float) -> Array:
    """Which places of (..., T, K) are kept, from a word for each line and one for each column.

    Two operations a place: a sum of words, and its square, whose high bits depend on all of it
    and are evenly spread: the share kept is off by less than 1e-4
    (tests/model/ops/test_dropout.py). Any three places are independent, as their sums are; that
    larger sets look so is the square's doing.
    """
    x = of_T[..., :, None] + of_K[..., None, :]
    x = x * x
    return x < jnp.uint32(min(round((1.0 - rate) * 2**32), 2**32 - 1))


class Dropout(nn.Module):
    """Zero a share `rate` of (B, ..., T, K), and divide the rest by 1 - rate.

    words_Bx2: of the rows, for this mask. With `hf_flax_compat` the mask is drawn for the whole
    batch at once, as linen's Dropout does, and there are no words.
    """

    rate: float
    hf_flax_compat: bool = False

    def __call__(self, x, words_Bx2, deterministic):
        if deterministic or self.rate == 0.0:
            return x
        if self.rate == 1.0:
            return jnp.zeros_like(x)
        if self.hf_flax_compat:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape)
        else:
            keep = is_kept(*words_of(words_Bx2, x.shape[1:]), self.rate)
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))
