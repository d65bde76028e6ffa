"""Masks of dropout: spread, independence, and what they are functions of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_flax.model.ops import dropout


def words(key, rows):
    """Of the rows' only mask."""
    return dropout.words_of_rows(key, rows, 1)[:, 0]


def test_random_bits_are_evenly_spread_and_independent():
    """Every bit, between neighbours, rows, keys; each within 5 standard deviations."""
    rows, shape = jnp.arange(8), (64, 1024)
    one = np.asarray(dropout.random_bits(words(jax.random.key(0), rows), shape))
    other = np.asarray(dropout.random_bits(words(jax.random.key(1), rows), shape))
    assert one.shape == (8, 64, 1024) and one.dtype == np.uint32
    n = one.size

    def is_even(bits):
        for bit in range(32):
            share = ((bits >> bit) & 1).mean()
            assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(bits.size), bit

    is_even(one)
    is_even(one ^ other)  # keys
    is_even(one[:-1] ^ one[1:])  # rows
    is_even(one[..., :-1] ^ one[..., 1:])  # neighbours
    is_even(one[:, :-1] ^ one[:, 1:])
    kept = one < np.uint32(0.9 * 2**32)
    assert abs(kept.mean() - 0.9) < 5 * 0.3 / np.sqrt(n)
    counts = np.bincount((one >> 24).ravel(), minlength=256)
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)
    assert len(np.unique(one)) > n - 2 * n**2 / 2**33  # repeats as chance has them


def test_random_bits_are_32_where_jax_counts_in_64():
    expected = dropout.random_bits(words(jax.random.key(0), jnp.arange(2)), (50,))
    with jax.enable_x64(True):
        got = dropout.random_bits(words(jax.random.key(0), jnp.arange(2)), (50,))
        assert got.dtype == jnp.uint32
    np.testing.assert_array_equal(got, expected)


def test_random_bits_follow_the_row():
    key, shape = jax.random.key(3), (5, 7)
    all_rows = dropout.random_bits(words(key, jnp.arange(6)), shape)
    np.testing.assert_array_equal(
        dropout.random_bits(words(key, jnp.array([4, 1])), shape), all_rows[jnp.array([4, 1])]
    )


def test_every_mask_has_words_of_its_own_and_a_further_one_changes_none():
    key, rows = jax.random.key(3), jnp.array([4, 2**31 - 1])
    few, more = (np.asarray(dropout.words_of_rows(key, rows, n)) for n in (5, 6))
    assert more.shape == (2, 6, 2) and len(np.unique(more)) == more.size
    np.testing.assert_array_equal(more[:, :5], few)


# ---------------------------------------------------------------- masks


def masks(rate, n_masks=40, shape=(2, 192, 320)):
    """float64 (n_masks * 2, 192, 320), standardized."""
    drawn = dropout.words_of(words(jax.random.key(7), jnp.arange(n_masks)), shape)
    kept = np.asarray(dropout.is_kept(*drawn, rate)).reshape(-1, *shape[1:])
    assert kept.dtype == bool
    return (kept - (1.0 - rate)) / np.sqrt(rate * (1.0 - rate))


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
def test_masks_keep_their_share_and_lines_are_independent(rate):
    """Lines, columns and tiles: products of two are those of independent draws.

    The variance of sums of products is what four corners of a rectangle add to, if anything.
    """
    found = masks(rate)
    n = found.size
    assert abs(found.mean()) < 5 / np.sqrt(n) + 1e-4 / np.sqrt(rate * (1 - rate))
    of_masks = found.mean((1, 2)) * np.sqrt(found[0].size)
    assert 0.6 < of_masks.var() < 1.5  # of 80
    tiles = found.reshape(-1, 3, 64, 5, 64).swapaxes(2, 3).reshape(len(found), 15, 64 * 64)
    for kind in (found, found.swapaxes(1, 2), tiles):
        products = kind @ kind.swapaxes(1, 2) / np.sqrt(kind.shape[-1])
        lines = products.shape[-1]
        above = products[:, *np.triu_indices(lines, 1)]
        assert abs(above.mean()) < 5 / np.sqrt(above.size)
        variances = (above**2).mean(1)
        error = variances.std() / np.sqrt(len(variances))
        assert abs(variances.mean() - 1.0) < 5 * error + 0.003
        # Of one mask's lines with those of another.
        others = kind[:-1] @ kind[1:].swapaxes(1, 2) / np.sqrt(kind.shape[-1])
        assert abs((others**2).mean() - 1.0) < 5 * error + 0.003


def test_the_share_kept_is_right_for_every_rate():
    """By all 2**16 upper halves of a sum, each with some lower halves."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lower = np.random.default_rng(0).integers(0, 2**16, 256, dtype=np.uint32)
    rates = [0.001, 0.1, 0.5, 0.999]
    kept = dict.fromkeys(rates, 0)
    for part in np.split(lower, 256):
        for rate in rates:
            kept[rate] += int(np.asarray(dropout.is_kept(upper, part, rate)).sum())
    for rate, count in kept.items():
        share = count / (upper.size * lower.size)
        assert abs(share - (1 - rate)) < 1e-4, rate


def test_masks_follow_the_row_and_the_shape():
    drawn = dropout.words_of(words(jax.random.key(3), jnp.array([4, 9])), (3, 70, 130))
    assert [w.shape for w in drawn] == [(2, 3, 70), (2, 3, 130)]
    again = dropout.words_of(words(jax.random.key(3), jnp.array([9])), (3, 70, 130))
    for a, b in zip(drawn, again, strict=True):
        assert a.dtype == jnp.uint32
        np.testing.assert_array_equal(a[1:], b)
        assert len(np.unique(a)) > 0.9 * a.size


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_dropout_zeroes_its_share_and_scales_the_rest(rate):
    """And their gradients."""
    x, module = jnp.ones((6, 128, 192)), dropout.Dropout(rate)

    def drop(x):
        return module.apply({}, x, words(jax.random.key(0), jnp.arange(6)), False)

    out = drop(x)
    np.testing.assert_array_equal(module.apply({}, x, None, True), x)
    assert set(np.unique(out)) <= {0.0, np.float32(1 / (1 - rate)) if rate < 1 else 0.0}
    spread = np.sqrt(rate / max(1e-9, 1 - rate) / x.size)
    assert abs(float(out.mean()) - (rate < 1)) <= 5 * spread
    np.testing.assert_array_equal(jax.grad(lambda x: drop(x).sum())(x), out)  # x is all ones
