"""JAX's own random bits, four times sooner on a CPU: the generator's rounds are written out.

There JAX makes a loop of them, for smaller programs, which goes through memory at each of its five
turns: 40 ns a number by one core. Written out they are one pass, on whole vectors.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl, threefry_prng_impl

from gpt2_flax.distributed import devices

# Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405: Threefry-2x32 with 20 rounds.
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


def sooner(key):
    """The same key, whose bits are computed in one pass where that is known to help."""
    if devices.platform() != "cpu" or str(jax.random.key_impl(key)) != "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=IN_ONE_PASS)


def random_bits(key, bit_width: int, shape: tuple):
    """uint32 of a shape: of each place's index in it, encrypted with the key (2,)."""
    size = math.prod(shape)
    options: Any = jax.config  # no type checker knows its attributes
    if bit_width != 32 or size >= 2**32 or not options.jax_threefry_partitionable:
        return threefry_prng_impl.random_bits(key, bit_width, shape)
    index = jax.lax.iota(jnp.uint32, size).reshape(shape)
    high, low = encrypted(key, jnp.zeros(shape, jnp.uint32), index)
    return high ^ low


def encrypted(key, a, b):
    keys = key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY)
    a, b = a + keys[0], b + keys[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            a = a + b
            b = a ^ (b << rotation | b >> 32 - rotation)
        a = a + keys[(group + 1) % 3]
        b = b + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return a, b


IN_ONE_PASS = define_prng_impl(
    key_shape=(2,),
    seed=threefry_prng_impl.seed,
    split=threefry_prng_impl.split,
    random_bits=random_bits,
    fold_in=threefry_prng_impl.fold_in,
    name="threefry2x32_in_one_pass",
    tag="fry1",
)
