"""Random bits in one pass against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_flax.distributed import devices
from gpt2_flax.model.ops import threefry

KEYS = [jax.random.key(0), jax.random.key(2**31 + 5), jax.random.fold_in(jax.random.key(1), 7)]


@pytest.mark.parametrize("partitionable", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(), (3, 0), (2, 3, 5), (1000, 33)])
def test_the_bits_are_jaxs(shape, partitionable):
    with jax.threefry_partitionable(partitionable):
        for key in KEYS:
            ours = threefry.sooner(key)
            assert jax.random.key_impl(ours) != jax.random.key_impl(key)
            for dtype in (jnp.uint8, jnp.uint16, jnp.uint32):
                found = jax.random.bits(ours, shape, dtype)
                np.testing.assert_array_equal(found, jax.random.bits(key, shape, dtype))
            for draw in (jax.random.normal, jax.random.uniform):
                np.testing.assert_array_equal(draw(ours, shape), draw(key, shape))


def test_bits_of_64_are_jaxs():
    with jax.enable_x64(True):
        found = jax.random.bits(threefry.sooner(KEYS[0]), (5, 2), jnp.uint64)
        np.testing.assert_array_equal(found, jax.random.bits(KEYS[0], (5, 2), jnp.uint64))


def test_keys_that_come_of_such_a_key_are_jaxs():
    for derive in (jax.random.split, lambda key: jax.random.fold_in(key, 3)):
        ours, theirs = derive(threefry.sooner(KEYS[1])), derive(KEYS[1])
        np.testing.assert_array_equal(jax.random.key_data(ours), jax.random.key_data(theirs))


def test_others_are_left_alone(monkeypatch):
    other = jax.random.key(0, impl="rbg")
    assert threefry.sooner(other) is other
    old = jax.random.PRNGKey(3)
    np.testing.assert_array_equal(jax.random.bits(threefry.sooner(old)), jax.random.bits(old))
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    assert threefry.sooner(KEYS[0]) is KEYS[0]
