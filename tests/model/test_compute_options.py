"""Ways to compute the same faster, or with less: each against the plain one."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_flax.config.train_config import TrainConfig
from gpt2_flax.distributed import devices, fsdp, parallel
from gpt2_flax.model.gpt2 import ACTIVATIONS, FlaxGPT2Block, FlaxGPT2LMHeadModule, _in_float32
from gpt2_flax.training import optim, setup, step
from tests.training.test_step import T, random_batches

DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def loss_and_gradient(config, params=None, dtype=jnp.float32, key=None, positions=T, **fields):
    """Of one batch, by a module with these fields; params of the plain one by default."""
    module = FlaxGPT2LMHeadModule(config, dtype, **fields)
    if params is None:
        params = initial(config)
    batch = jax.tree.map(jnp.asarray, next(random_batches(4, 1, T=positions)))
    one = jax.value_and_grad(step.loss_sum, has_aux=True)
    (loss, _), gradient = jax.jit(lambda params: one(params, batch, key, module))(params)
    return loss, gradient


def initial(config):
    ids = jnp.zeros((1, 1), jnp.int32)
    return FlaxGPT2LMHeadModule(config).init(jax.random.key(1), ids)["params"]


def assert_alike(got, expected, rtol=1e-5):
    np.testing.assert_allclose(got[0], expected[0], rtol=rtol)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(got[1]), jax.tree.leaves(expected[1]), strict=True
    ):
        scale = np.abs(np.asarray(other)).max()
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, other, atol=rtol * max(scale, 1e-2), err_msg=name)


# ---------------------------------------------------------------- layers, scanned or traced once


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        (DROPOUT, {"scanned": True, "keeps_little": True}),
        (DROPOUT, {"traced_once": True, "keeps_little": True}),
        slow({"n_inner": 7, "n_layer": 3}, {"scanned": True, "gradient_checkpointing": True}),
        slow(DROPOUT, {"traced_once": True, "attention_checkpointing": True}),
        # Layers that differ, and masks of the original class.
        slow({"scale_attn_by_inverse_layer_idx": True}, {"scanned": True}),
        slow(DROPOUT, {"scanned": True, "hf_flax_compat": True}),
        slow(DROPOUT, {"traced_once": True, "hf_flax_compat": True}),
    ],
    ids=str,
)
def test_layers_scanned_or_traced_once_are_the_same_layers(tiny_config, changes, fields):
    config, key = tiny_config(**changes), jax.random.key(5)
    expected = loss_and_gradient(config, key=key, hf_flax_compat="hf_flax_compat" in fields)
    assert_alike(loss_and_gradient(config, key=key, **fields), expected)


def test_a_scan_s_program_is_that_of_one_layer(tiny_config):
    config = tiny_config(n_layer=6)
    shapes = jax.eval_shape(lambda: initial(config))
    batch = next(random_batches(4, 1))

    def products(**fields):
        module = FlaxGPT2LMHeadModule(config, **fields)
        lowered = jax.jit(lambda p: step.loss_sum(p, batch, None, module)[0]).lower(shapes)
        return lowered.as_text().count("dot_general")

    assert products(scanned=True) * 3 < products()


@pytest.mark.slow
def test_a_scan_gathers_shards_layer_by_layer(tiny_config, monkeypatch):
    monkeypatch.setattr(fsdp, "LEAST", 64)
    config = tiny_config(n_embd=24, n_layer=2, **DROPOUT)
    batch = parallel.put_batch(next(random_batches(16, 1)), 1, "fsdp")
    params = parallel.make_state(lambda key: initial(config), jax.random.key(0), "fsdp")

    def loss_and_gradient(**fields):
        module = FlaxGPT2LMHeadModule(config, **fields)
        shards = functools.partial(fsdp.over_shards, mesh=parallel.mesh(), has_gradient=True)
        key = jax.random.key(2)
        return jax.jit(lambda p, b: shards(step.gradient_sums, p, b, key, module, None)[::2])(
            params, batch
        )

    assert_alike(loss_and_gradient(scanned=True, gradient_checkpointing=True), loss_and_gradient())


def test_of_layers_traced_once_all_states_and_probabilities_are_there(tiny_config):
    config = tiny_config(n_layer=3)
    params, ids = initial(config), jnp.asarray(next(random_batches(4, 1)).ids_BxS)

    def run(**fields):
        module = FlaxGPT2LMHeadModule(config, **fields)
        flags = {"output_attentions": True, "output_hidden_states": True}
        return jax.jit(lambda params: module.apply({"params": params}, ids, **flags))(params)

    plain, once = run(), run(traced_once=True)
    assert len(once.hidden_states) == 4 and len(once.attentions) == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), once, plain)


@pytest.mark.parametrize(
    ("deterministic", "remat", "times"),
    [(False, "none", 1), (True, "none", 1), (False, "attention", 1), (False, "block", 3)],
)
def test_a_step_is_traced_with_one_layer(tiny_config, monkeypatch, deterministic, remat, times):
    """As train.py makes it. What is computed again is traced for the gradient, too."""
    calls, called = [], FlaxGPT2Block.__call__

    def call(self, *args):
        calls.append(self.layer)
        return called(self, *args)

    monkeypatch.setattr(FlaxGPT2Block, "__call__", call)
    module = setup.make_module(TrainConfig(remat=remat), tiny_config(n_layer=5, **DROPOUT))
    params, batch = initial(module.config), next(random_batches(4, 1))
    key = None if deterministic else jax.random.key(0)
    calls.clear()
    jax.jit(jax.grad(lambda p: step.loss_sum(p, batch, key, module)[0])).lower(params)
    assert calls == [0] * times


def test_the_update_is_traced_once_for_both_its_halves(tiny_config):
    module = setup.make_module(TrainConfig(), tiny_config())
    calls, optimizer = [], optim.make_optimizer("adamw", lambda n: 0.1, 0.1, 0.9, 0.99, 1e-8, 1.0)

    def update(*arguments, **more):
        calls.append(arguments)
        return optimizer.update(*arguments, **more)

    state = jax.eval_shape(lambda key: step.init_state(key, module, optimizer), jax.random.key(0))
    batch = jax.tree.map(lambda x: x[None], next(random_batches(4, 1)))
    counted = optimizer._replace(update=update)
    one = functools.partial(step.train_step, model=module, optimizer=counted, seed=0)
    jax.jit(one).lower(state, batch)
    assert len(calls) == 1


# ---------------------------------------------------------------- dropout


def test_each_layer_and_each_key_has_masks_of_its_own(tiny_config):
    """Layers of equal parameters would else do the same to equal inputs."""
    config = tiny_config(n_layer=2, **DROPOUT)
    params, batch = initial(config), next(random_batches(4, 1))
    module = FlaxGPT2LMHeadModule(config)
    loss = jax.jit(lambda params, key: step.loss_sum(params, batch, key, module)[0])
    assert len({float(loss(params, jax.random.key(seed))) for seed in range(5)}) == 5
    blocks = params["transformer"]["h"]
    in_turn = {"0": blocks["1"], "1": blocks["0"]}
    swapped = params | {"transformer": params["transformer"] | {"h": in_turn}}
    assert loss(params, jax.random.key(9)) != loss(swapped, jax.random.key(9))


# ---------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("in_dtype", [False, True])
def test_the_gradient_of_an_id_that_comes_often_is_summed_in_float32(tiny_config, in_dtype):
    """A row's sum of a thousand like numbers; cast to bfloat16 first it stops far below."""
    config = tiny_config(n_layer=1, n_positions=1024, tie_word_embeddings=False)
    params, ids = initial(config), jnp.full((1, 1024), 7)

    def total(params, dtype):
        module = FlaxGPT2LMHeadModule(config, dtype, embeds_in_dtype=in_dtype)
        embedded = module.bind({"params": params}).transformer._embedded(ids, None)
        return (embedded.astype(jnp.float32) * 1.01).sum()

    found = jax.grad(total)(params, jnp.bfloat16)["transformer"]["wte"]["embedding"][7]
    error = abs(found / (1024 * 1.01) - 1).max()
    assert error > 0.1 if in_dtype else error < 0.01


def test_an_activation_is_rounded_once(tiny_config):
    x = jnp.linspace(-6, 6, 4001).astype(jnp.bfloat16)
    exact = ACTIVATIONS["gelu_new"](x.astype(jnp.float32))
    np.testing.assert_array_equal(
        _in_float32(ACTIVATIONS["gelu_new"], x), exact.astype(jnp.bfloat16)
    )
    assert (ACTIVATIONS["gelu_new"](x) != exact.astype(jnp.bfloat16)).mean() > 0.1


@pytest.mark.slow
def test_matrices_are_cast_once_a_step_and_not_in_each_micro_batch(tiny_config):
    config = tiny_config()
    module = FlaxGPT2LMHeadModule(config, jnp.bfloat16)
    params = initial(config)
    batch = next(random_batches(4, 1))
    batch = jax.tree.map(lambda x: jnp.asarray(x).reshape(2, 2, *x.shape[1:]), batch)
    sums = functools.partial(step.gradient_sums, key=None, model=module)
    program = jax.make_jaxpr(sums)(params, batch)
    (scan,) = [eqn for eqn in program.eqns if eqn.primitive.name == "scan"]
    kernel = params["transformer"]["h"]["0"]["mlp"]["c_fc"]["kernel"].shape
    inside = str(scan.params["jaxpr"])
    assert f"f32[{kernel[0]},{kernel[1]}]" in inside  # the sums are float32
    taken = [var.aval for var in scan.invars]
    assert any(a.shape == kernel and a.dtype == jnp.bfloat16 for a in taken)

    _, _, gradient = jax.jit(sums)(params, batch)
    halves = [jax.tree.map(lambda x, n=n: x[n : n + 1], batch) for n in range(2)]
    parts = [jax.jit(sums)(params, half)[2] for half in halves]
    expected = jax.tree.map(jnp.add, *parts)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02), gradient,
                 expected)  # fmt: skip


def instructions(compiled) -> list[str]:
    """Those of a compiled program, but for the names of values and where in the code they are."""
    text = re.sub(r", metadata={[^}]*}", "", compiled.as_text())
    lines = [line for line in text.splitlines() if " = " in line and "%" in line]
    names = itertools.count()
    numbers = collections.defaultdict(lambda: f"%{next(names)}")
    return re.sub(r"%[\w.-]+", lambda found: numbers[found[0]], "\n".join(lines)).splitlines()


@pytest.mark.slow
def test_on_one_device_pmap_and_jit_run_the_same_program(tiny_config, monkeypatch):
    monkeypatch.setattr(devices, "_imagined", jax.devices()[:1])
    programs = []
    for engine in ("pmap", "jit"):
        settings = TrainConfig(batch_size=2, parallel=engine)
        module = setup.make_module(settings, tiny_config(resid_pdrop=0.1))
        optimizer, update = setup.trial(settings, module)
        state = parallel.shapes_on_devices(step.state_shapes(module, optimizer), engine)
        batch = parallel.batch_shapes(setup.blank_batch(2, 5), 1, engine)
        programs.append(instructions(update.lower(state, batch).compile()))
    assert len(programs[0]) > 1000
    assert programs[0] == programs[1]
