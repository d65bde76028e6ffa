"""Sharded state: less of it on each device, and the same numbers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from gpt2_flax.distributed import fsdp, parallel
from gpt2_flax.model import initialization
from gpt2_flax.model.gpt2 import FlaxGPT2LMHeadModule
from gpt2_flax.training import optim, setup, step
from tests.training.test_step import random_batches

DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def some_devices(n: int) -> Mesh:
    return Mesh(jax.devices()[:n], (parallel.AXIS,))


@pytest.fixture(autouse=True)
def shard_small_ones_too(monkeypatch):
    monkeypatch.setattr(fsdp, "LEAST", 64)


def make_optimizer(name="adamw"):
    return optim.make_optimizer(name, optax.constant_schedule(3e-3), 0.1, 0.9, 0.95, 1e-8, 1.0)


def make_run(config, engine, optimizer="adamw", dtype=jnp.float32, **fields):
    """(what makes a state, a compiled update, its module)."""
    optimizer, module = make_optimizer(optimizer), FlaxGPT2LMHeadModule(config, dtype, **fields)
    make = functools.partial(step.init_state, model=module, optimizer=optimizer)
    one = functools.partial(step.train_step, model=module, optimizer=optimizer, seed=3)
    return make, parallel.compile_train_step(one, engine), module


def train(config, batches, engine, micro_batches=1, **settings):
    make, update, _ = make_run(config, engine, **settings)
    state, losses = parallel.make_state(make, jax.random.key(0), engine), []
    for batch in batches:
        state, metrics = update(state, parallel.put_batch(batch, micro_batches, engine))
        losses.append(float(metrics["loss_sum"] / metrics["tokens"]))
    return np.array(losses), state


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((768, 2304), (None, "batch")),
        ((50257, 768), (None, "batch")),  # no device gets half an id
        ((50304, 768), ("batch",)),
        ((768, 768), ("batch",)),
        ((8, 1), ()),  # small
        ((3072,), ()),
        ((), ()),
        ((1001, 1001), ()),
    ],
)
def test_the_largest_axis_that_devices_divide_is_sharded(shape, expected):
    assert fsdp.spec_of(shape, some_devices(8)) == PartitionSpec(*expected)
    assert fsdp.spec_of(shape, some_devices(1)) == PartitionSpec()


def test_a_state_is_made_in_shards_and_is_that_of_one_device(tiny_config, monkeypatch):
    config = tiny_config(n_embd=64, n_head=4, n_positions=64, vocab_size=500)
    make, _, module = make_run(config, "fsdp")
    memory, program = [], initialization.program

    def noted(parameters):
        draw = program(parameters)

        def run(keys):
            memory.append(draw.lower(keys).compile().memory_analysis())
            return draw(keys)

        return run

    with monkeypatch.context() as while_it_is_made:
        while_it_is_made.setattr(initialization, "program", noted)
        state = setup.new_state(jax.random.key(0), module, make_optimizer(), "fsdp")
    expected = jax.jit(make)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    sharded = [leaf for leaf in jax.tree.leaves(state) if not leaf.is_fully_replicated]
    assert len(sharded) == 3 * sum(leaf.ndim == 2 for leaf in jax.tree.leaves(expected.params))
    for leaf in sharded:
        assert leaf.addressable_data(0).size == leaf.size // 8
    # Nor does a device hold more of it while it is made.
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(expected.params))
    assert sum(size.output_size_in_bytes for size in memory) < whole / 4
    assert max(size.temp_size_in_bytes for size in memory) < whole / 4


def test_parameters_of_the_host_go_into_shards(tiny_config):
    config = tiny_config(n_embd=64, n_head=4)
    module, optimizer = FlaxGPT2LMHeadModule(config), make_optimizer()
    given = jax.device_get(module.init(jax.random.key(5), jnp.zeros((1, 1), jnp.int32))["params"])
    make = functools.partial(step.state_from_params, optimizer=optimizer)
    state = parallel.make_state(make, given, "fsdp")
    jax.tree.map(np.testing.assert_array_equal, state.params, given)
    assert parallel.shardings(state, "fsdp") == jax.tree.map(lambda x: x.sharding, state)
    whole = parallel.whole(state.params)
    jax.tree.map(np.testing.assert_array_equal, whole, given)
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(whole) if x.ndim == 1)


@pytest.mark.parametrize(
    ("changes", "settings", "rtol"),
    [
        (DROPOUT, {"micro_batches": 2}, 1e-5),
        slow(DROPOUT, {"attention_checkpointing": True, "pad_vocab_to_multiple_of": 16}, 1e-5),
        slow(DROPOUT, {"gradient_checkpointing": True, "keeps_little": True}, 1e-5),
        # Optimizers that look at whole arrays.
        slow({}, {"optimizer": "adafactor"}, 1e-5),
        slow({"tie_word_embeddings": False}, {"optimizer": "muon"}, 1e-5),
        slow({}, {"dtype": jnp.bfloat16}, 5e-3),
    ],
    ids=str,
)
def test_losses_are_those_of_pmap(tiny_config, changes, settings, rtol):
    config = tiny_config(n_embd=24, n_layer=1, **changes)
    # Few steps of other optimizers: Adafactor makes noise as large as any other gradient.
    rounds = 1 if "optimizer" in settings else 5
    batches = rounds * list(random_batches(16, 4))
    of_both = {k: v for k, v in settings.items() if k in ("optimizer", "dtype")}
    expected, _ = train(config, batches, "pmap", **of_both)
    got, state = train(config, batches, "fsdp", **settings)
    np.testing.assert_allclose(got, expected, rtol=rtol)
    assert rounds == 1 or expected[0] - expected[-1] > 0.1
    assert parallel.shardings(state, "fsdp") == jax.tree.map(lambda x: x.sharding, state)
    leaves = jax.tree.leaves(state)
    assert any(not leaf.is_fully_replicated for leaf in leaves)
    for leaf in leaves:
        if leaf.is_fully_replicated:
            copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
            assert all(np.array_equal(copy, copies[0]) for copy in copies)
    if not config.tie_word_embeddings:
        assert not state.params["lm_head"]["kernel"].is_fully_replicated


def test_evaluation_is_that_of_one_device(tiny_config):
    config = tiny_config(n_embd=24, n_layer=1)
    make, _, module = make_run(config, "fsdp")
    params = parallel.make_state(make, jax.random.key(0), "fsdp").params
    batch = next(random_batches(16, 1))
    evaluate = functools.partial(step.eval_step, model=module)
    got = parallel.compile_eval_step(evaluate, "fsdp")(
        params, parallel.put_batch(batch, None, "fsdp")
    )
    expected = evaluate(jax.device_get(params), batch)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_no_whole_matrix_is_kept_for_the_gradient(tiny_config):
    """Without remat of blocks, too: between the two passes there are shards."""
    config = tiny_config(n_embd=64, n_head=4)
    make, _, module = make_run(config, "fsdp")
    params = parallel.make_state(make, jax.random.key(0), "fsdp").params
    batch = parallel.put_batch(next(random_batches(16, 1)), None, "fsdp")
    kept = []

    def residuals(params, rows, key, model, logits_at_once):
        _, pull_back, _ = jax.vjp(
            lambda params: step.loss_sum(params, rows, key, model), params, has_aux=True
        )
        kept.extend(x.shape for x in jax.tree.leaves(pull_back))
        return jnp.zeros(()), jnp.zeros(())

    shards = functools.partial(fsdp.over_shards, mesh=parallel.mesh(), has_gradient=False)
    jax.eval_shape(lambda p, b: shards(residuals, p, b, None, module, None), params, batch)
    block = params["transformer"]["h"]["0"]
    matrices = {leaf.shape for leaf in jax.tree.leaves(block) if leaf.ndim == 2}
    assert kept
    assert not matrices & set(kept)


@pytest.mark.slow
def test_the_program_gathers_and_scatters(tiny_config):
    """Each sharded array is gathered, and its gradient summed into shards: none whole."""
    config = tiny_config(n_embd=64, n_head=4, n_layer=1)
    make, update, _ = make_run(config, "fsdp")
    state = parallel.make_state(make, jax.random.key(0), "fsdp")
    batch = parallel.put_batch(next(random_batches(16, 1)), 1, "fsdp")
    compiled = update.lower(state, batch).compile()
    program = compiled.as_text()
    whole = {leaf.shape for leaf in jax.tree.leaves(state.params) if leaf.ndim == 2}
    summed = re.findall(r"= \(?([^=]*?)\)? all-reduce\(", program)
    shapes = {
        tuple(map(int, dims.split(",")))
        for one in summed
        for dims in re.findall(r"f32\[([0-9,]+)\]", one)
    }
    assert not whole & shapes
    assert "all-gather(" in program
    assert "reduce-scatter(" in program
    donated = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= donated
