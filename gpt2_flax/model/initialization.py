"""A model's first parameters: those of flax's `init`, on a CPU bit for bit, by smaller programs.

`init` is a forward pass, and under jit a program with a random generator for each matrix, which
takes seconds to compile. Here one program draws a block, and is run for each of them.
"""

import copy
import functools

import flax
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_flax.model.gpt2 import FlaxGPT2LMHeadModule, FlaxGPT2Module, initial_std
from gpt2_flax.model.ops import threefry

OURS = (FlaxGPT2Module, FlaxGPT2LMHeadModule)


def parameter_shapes(module) -> dict:
    """The tree of shapes and types of the parameters of one of OURS, as `init` has them.

    Only one block is traced, since all are alike: at 124M in 0.2 s instead of 0.6, medians of
    three processes.
    """
    config = copy.copy(module.config)
    config.n_layer = 1
    one = module.clone(config=config)
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: one.init(jax.random.key(0), ids)["params"])
    blocks = shapes.get("transformer", shapes)["h"]
    for layer in range(1, module.config.n_layer):
        blocks[str(layer)] = jax.tree.map(lambda leaf: leaf, blocks["0"])
    return shapes


def draw_parameters(module, key, like=None) -> dict:
    """The parameters that one of OURS draws from `key`: matrices normal, others 0 or 1.

    like: their shapes, with the shardings that they are to have.
    """
    if type(module) not in OURS:
        raise TypeError(f"it is not known what a {type(module).__name__} draws; call its init")
    like = flatten_dict(parameter_shapes(module) if like is None else like)
    # Flax's rule for the key of a parameter: the names of its path are folded in, and a count.
    root = flax.core.bind({}, rngs={"params": key}, mutable=["params"])
    parts: dict[tuple, dict] = {}
    for path, leaf in like.items():
        part = path[: path.index("h") + 2] if "h" in path else ()
        std = standard_deviation(module, path)
        its_key = None if std is None else scope_of(root, path[:-1]).make_rng("params")
        about = (leaf.shape, leaf.dtype, std, leaf.sharding)
        parts.setdefault(part, {})[path[len(part) :]] = about, its_key
    drawn = {}
    for part, leaves in parts.items():
        draw = program(tuple((path[-1], *about) for path, (about, _) in leaves.items()))
        found = draw([its_key for _, its_key in leaves.values()])
        drawn |= {part + path: leaf for path, leaf in zip(leaves, found, strict=True)}
    return unflatten_dict(drawn)


def scope_of(scope, names):
    for name in names:
        scope = scope.push(name, reuse=True)
    return scope


def standard_deviation(module, path: tuple) -> float | None:
    """Of a parameter's first values; None for a bias, or the scale of a LayerNorm."""
    if path[-1] == "embedding" or path[0] == "lm_head":
        return module.config.initializer_range
    if path[-1] == "kernel":
        return initial_std(module.config, module.hf_flax_compat, path[-2] == "c_proj")
    return None


@functools.lru_cache(maxsize=64)
def program(parameters: tuple):
    """Keys -> parameters, each given as (name, shape, type, standard deviation, sharding)."""

    def draw(keys):
        return [
            first_values(*about, key) for (*about, _), key in zip(parameters, keys, strict=True)
        ]

    return jax.jit(draw, out_shardings=[sharding for *_, sharding in parameters])


def first_values(name, shape, dtype, std, key):
    if std is None:
        return jnp.full(shape, name == "scale", dtype)
    return jax.nn.initializers.normal(std)(threefry.sooner(key), shape, dtype)
