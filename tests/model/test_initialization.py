"""First parameters against flax's own `init` of the same modules."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpt2_flax import FlaxGPT2LMHeadModel
from gpt2_flax.distributed import parallel
from gpt2_flax.model import initialization
from gpt2_flax.model.gpt2 import FlaxGPT2LMHeadModule, FlaxGPT2Module
from gpt2_flax.model.initialization import draw_parameters, parameter_shapes
from gpt2_flax.training import optim, step
from gpt2_flax.training import setup as plan

IDS = jnp.zeros((1, 1), jnp.int32)
CHANGES = [
    {}, {"tie_word_embeddings": False, "n_layer": 1}, {"add_cross_attention": True, "n_layer": 3},
    {"initializer_range": 0.5, "n_inner": 20},
]  # fmt: skip


def assert_same(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


@pytest.mark.parametrize("make", [FlaxGPT2Module, FlaxGPT2LMHeadModule])
@pytest.mark.parametrize("changes", CHANGES)
def test_shapes_from_one_block_are_those_of_all(tiny_config, make, changes):
    module = make(tiny_config(**changes))
    expected = jax.eval_shape(module.init, jax.random.key(0), IDS)
    assert parameter_shapes(module) == expected["params"]
    assert module.config.n_layer == changes.get("n_layer", 2)  # is not touched


@pytest.mark.slow(but_every=3)
@pytest.mark.parametrize(
    ("make", "changes", "compat"),
    # Every third: each module, each change and both ways to draw are among them.
    [*itertools.product([FlaxGPT2Module, FlaxGPT2LMHeadModule], CHANGES, [False, True])][::3],
)
def test_what_is_drawn_is_what_init_draws(tiny_config, make, changes, compat):
    module = make(tiny_config(**changes), hf_flax_compat=compat)
    key = jax.random.key(7)
    assert_same(draw_parameters(module, key), jax.jit(module.init)(key, IDS)["params"])


@pytest.mark.slow
def test_a_key_may_be_of_the_old_kind_and_all_of_it_be_traced(tiny_config):
    module, key = FlaxGPT2LMHeadModule(tiny_config()), jax.random.PRNGKey(8)
    expected = jax.jit(module.init)(key, IDS)["params"]
    assert_same(draw_parameters(module, key), expected)
    assert_same(jax.jit(functools.partial(draw_parameters, module))(key), expected)


def test_models_of_one_kind_share_two_programs(tiny_config):
    initialization.program.cache_clear()
    config = tiny_config(n_layer=5, n_embd=18, n_head=2)
    trees = [FlaxGPT2LMHeadModel(config, seed=seed).params for seed in (0, 1)]
    assert initialization.program.cache_info()[:2] == (10, 2)  # of 2 x 6 uses
    kernels = [tree["transformer"]["h"]["4"]["attn"]["c_attn"]["kernel"] for tree in trees]
    assert (kernels[0] != kernels[1]).any()


@pytest.mark.slow
def test_a_module_of_ones_own_is_drawn_by_its_init(tiny_config):
    class Other(FlaxGPT2LMHeadModule):
        def setup(self):
            super().setup()
            self.more = self.param("more", jax.nn.initializers.normal(3.0), (5,))

    class Model(FlaxGPT2LMHeadModel):
        module_class = Other

    model = Model(tiny_config(), seed=3)
    key, _ = jax.random.split(jax.random.PRNGKey(3))
    assert_same(model.params, jax.jit(model.module.init)(key, IDS)["params"])
    assert model.params["more"].shape == model.params_shape_tree["more"].shape == (5,)
    with pytest.raises(TypeError, match="what a Other draws"):
        draw_parameters(model.module, key)


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("fsdp", "adamw"),
        ("pmap", "adafactor"),
        pytest.param("jit", "muon", marks=pytest.mark.slow),
        pytest.param("fsdp", "muon", marks=pytest.mark.slow),
    ],
)
def test_a_new_state_is_init_states(tiny_config, engine, name):
    module = FlaxGPT2LMHeadModule(tiny_config(n_embd=24, n_layer=1))
    optimizer = optim.make_optimizer(name, optax.constant_schedule(1e-3), 0.1, 0.9, 0.95, 1e-8, 1)
    make = functools.partial(step.init_state, model=module, optimizer=optimizer)
    expected = parallel.make_state(make, jax.random.key(2), engine)
    state = plan.new_state(jax.random.key(2), module, optimizer, engine)
    assert_same(state, expected)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, expected
    )
