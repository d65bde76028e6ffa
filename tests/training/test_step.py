"""One update is PyTorch's update, on any number of devices and micro-batches."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict

from gpt2_flax.data.batches import Batch, make_batch
from gpt2_flax.distributed import parallel
from gpt2_flax.model.gpt2 import FlaxGPT2LMHeadModule
from gpt2_flax.pretrained import weights
from gpt2_flax.pretrained.modeling import param_shapes
from gpt2_flax.training import optim, step
from tests.model.test_gpt2 import torch_twin

T = 5


def make_optimizer(learning_rate=1e-2, grad_clip=1.0):
    return optim.make_optimizer(
        "adamw", optax.constant_schedule(learning_rate), 0.1, 0.9, 0.95, 1e-8, grad_clip
    )


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "lion", "sgd"])
def test_shapes_of_a_state_need_no_state(tiny_config, name):
    model = FlaxGPT2LMHeadModule(tiny_config())
    optimizer = optim.make_optimizer(name, optax.constant_schedule(1e-3), 0.1, 0.9, 0.95, 1e-8, 1)
    make = functools.partial(step.init_state, model=model, optimizer=optimizer)
    expected = jax.eval_shape(make, jax.random.key(0))
    assert step.state_shapes(model, optimizer) == expected


def random_batches(n_rows, count, seed=0, T=T):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        ids = rng.integers(0, 31, (n_rows, T + 1)).astype(np.int32)
        batch = make_batch(ids, np.ones(n_rows, bool), slice(None), n_rows)
        yield batch._replace(length_B=rng.integers(1, T + 1, n_rows).astype(np.int32))


def run(config, batches, engine=None, micro_batches=1, step_function=step.train_step):
    """Losses of steps and the last state; engine None: plain jit on one device."""
    optimizer, module = make_optimizer(), FlaxGPT2LMHeadModule(config)
    make = functools.partial(step.init_state, model=module, optimizer=optimizer)
    one = functools.partial(step_function, model=module, optimizer=optimizer, seed=3)
    if engine is None:
        state, update = jax.jit(make)(jax.random.key(0)), jax.jit(one)

        def put(batch):
            return jax.tree.map(
                lambda x: jnp.asarray(x).reshape(micro_batches, -1, *x.shape[1:]), batch
            )
    else:
        state = parallel.replicate(make, jax.random.key(0))
        update = parallel.compile_train_step(one, engine)

        def put(batch):
            return parallel.put_batch(batch, micro_batches)

    losses = []
    for batch in batches:
        state, metrics = update(state, put(batch))
        losses.append(float(metrics["loss_sum"] / metrics["tokens"]))
    return np.array(losses), state


def test_one_adamw_step_is_pytorchs(tiny_config):
    """Loss, clipped gradient, decay on matrices only: against torch.optim.AdamW."""
    config = tiny_config()
    oracle, params = torch_twin(config)
    module, optimizer = FlaxGPT2LMHeadModule(config), make_optimizer(grad_clip=0.3)
    # torch shares this memory and updates it in place
    params = jax.tree.map(np.copy, params)
    batch = next(random_batches(2, 1))._replace(length_B=np.array([T, T], np.int32))
    state = step.state_from_params(jax.tree.map(jnp.asarray, params), optimizer)
    update = functools.partial(step.train_step, model=module, optimizer=optimizer, seed=0)
    new, metrics = jax.jit(update)(state, jax.tree.map(lambda x: x[None], batch))

    groups = [
        {"params": [p for p in oracle.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in oracle.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    ids = torch.tensor(batch.ids_BxS).long()
    loss = oracle(ids, labels=ids).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.3)
    assert norm > 0.3
    adamw.step()
    expected = weights.from_pytorch(
        {name: p.detach().numpy() for name, p in oracle.named_parameters()}, param_shapes(config)
    )

    np.testing.assert_allclose(metrics["loss_sum"] / metrics["tokens"], loss.item(), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-5)
    before, got = flatten_dict(params), flatten_dict(new.params)
    for name, leaf in flatten_dict(expected).items():
        moved = np.abs(leaf - before[name]).max()
        assert moved > 1e-3, name
        # AdamW's first step divides a gradient by its own size: where that is next to
        # nothing, the last bit of the gradient decides. Biases of keys have none at all.
        if name[-2:] == ("c_attn", "bias"):
            continue
        np.testing.assert_allclose(got[name], leaf, atol=1e-5, err_msg=str(name))


@pytest.fixture(scope="module")
def one_device(tiny_config):
    """(configuration, batches of 20 steps with rows of unequal length, losses on one device)."""
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2)
    config, batches = tiny_config(n_layer=1, **rates), 5 * list(random_batches(16, 4))
    losses, _ = run(config, batches)
    assert losses[0] - losses[-1] > 0.1
    return config, batches, losses


@pytest.mark.parametrize(
    ("engine", "micro_batches"),
    [("pmap", 1), pytest.param("pmap", 2, marks=pytest.mark.slow), ("jit", 2)],
)
def test_eight_devices_are_one(one_device, engine, micro_batches):
    """20 steps give the same losses, dropout included."""
    config, batches, expected = one_device
    got, state = run(config, batches, engine, micro_batches)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding == parallel.replicated()
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all(np.array_equal(shard, shards[0]) for shard in shards)


def test_accumulated_micro_batches_are_one_batch(tiny_config):
    """Weighted by targets, not by micro-batches: the rows' lengths are unequal."""
    config, batches = tiny_config(n_layer=1), list(random_batches(8, 3))
    expected, one = run(config, batches)
    got, accumulated = run(config, batches, micro_batches=4)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(accumulated.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("engine", [None, pytest.param("pmap", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(tiny_config, engine):
    """An id outside the vocabulary makes one row's loss NaN; the whole batch is skipped."""
    good, bad = list(random_batches(16, 2))
    bad.ids_BxS[3, 1] = 9999
    config = tiny_config(n_layer=1)
    _, before = run(config, [good], engine, micro_batches=2)
    losses, after = run(config, [good, bad], engine, micro_batches=2)
    assert np.isfinite(losses[0]) and not np.isfinite(losses[1])
    assert (before.step, after.step) == (1, 2)
    for a, b in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(after[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found(value):
    tree = {"a": jnp.zeros((2, 3)), "n": jnp.zeros((), jnp.int32), "b": jnp.ones(4)}
    assert step.all_finite(tree)
    assert not step.all_finite(tree | {"b": tree["b"].at[2].set(value)})


def test_padding_rows_change_nothing(tiny_config):
    config = tiny_config(n_layer=1)
    batch = next(random_batches(4, 1))
    padded = Batch(
        np.concatenate([batch.ids_BxS, batch.ids_BxS[::-1]]),
        np.arange(8, dtype=np.int32),
        np.concatenate([batch.length_B, np.zeros(4, np.int32)]),
    )
    (expected, a), (got, b) = run(config, [batch]), run(config, [padded])
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a.params, b.params)


@pytest.mark.slow
def test_the_compiled_step_reduces_once_donates_and_traces_once(tiny_config):
    optimizer, module = make_optimizer(), FlaxGPT2LMHeadModule(tiny_config(n_layer=1))
    make = functools.partial(step.init_state, model=module, optimizer=optimizer)
    traces = []

    def counted(state, batch, *, axis_name):
        traces.append(1)
        return step.train_step(
            state, batch, model=module, optimizer=optimizer, seed=0, axis_name=axis_name
        )

    update = parallel.compile_train_step(counted, "pmap")
    state = parallel.replicate(make, jax.random.key(0))
    batches = [parallel.put_batch(batch, 1) for batch in random_batches(8, 3)]
    program = update.lower(state, batches[0]).compile().as_text()
    assert program.count(" all-reduce(") + program.count(" all-reduce-start(") == 1
    traces.clear()
    first = state
    for batch in batches:
        with jax.transfer_guard("disallow"):
            state, _ = update(state, batch)
    assert len(traces) <= 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))


@pytest.mark.slow
def test_the_optimizers_state_is_not_copied_to_be_updated(tiny_config, monkeypatch):
    """On a CPU. The plain update, which is that of other backends, shows what would be counted."""
    module, optimizer = FlaxGPT2LMHeadModule(tiny_config(n_layer=1)), make_optimizer()
    make = functools.partial(step.init_state, model=module, optimizer=optimizer)
    state = parallel.replicate(make, jax.random.key(0))
    batch = parallel.put_batch(next(random_batches(8, 1)), 1)

    def copied_matrices():
        one = functools.partial(step.train_step, model=module, optimizer=optimizer, seed=0)
        update = parallel.compile_train_step(one, "pmap")
        program = update.lower(state, batch).compile()
        return len(re.findall(r"f32\[36,12\]\S* copy\(", program.as_text()))

    copied = copied_matrices()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert copied == 0 and copied_matrices() == 2  # the two moments


@pytest.mark.parametrize("engine", ["pmap", pytest.param("jit", marks=pytest.mark.slow)])
def test_evaluation_sums_over_devices_and_ignores_padding(tiny_config, engine):
    module = FlaxGPT2LMHeadModule(tiny_config(n_layer=1, resid_pdrop=0.5))
    params = module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    batch = next(random_batches(16, 1))
    evaluate = parallel.compile_eval_step(functools.partial(step.eval_step, model=module), engine)
    loss, targets = evaluate(
        jax.device_put(params, parallel.replicated()), parallel.put_batch(batch, None)
    )
    assert targets == batch.length_B.sum()
    logits = jax.jit(module.apply)({"params": params}, batch.ids_BxS[:, :-1]).logits
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    by_hand = sum(
        -log_probs[row, t, batch.ids_BxS[row, t + 1]]
        for row in range(16)
        for t in range(batch.length_B[row])
    )
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)


def test_bfloat16_keeps_parameters_and_loss_in_float32(tiny_config):
    module, optimizer = FlaxGPT2LMHeadModule(tiny_config(), jnp.bfloat16), make_optimizer()
    batch = jax.tree.map(lambda x: x[None], next(random_batches(4, 1)))
    one = functools.partial(step.train_step, model=module, optimizer=optimizer, seed=0)
    new, metrics = jax.eval_shape(one, step.state_shapes(module, optimizer), batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(new.params)} == {jnp.dtype("float32")}
    assert metrics["loss_sum"].dtype == jnp.float32


@pytest.mark.slow
def test_bfloat16_learns_what_float32_learns(tiny_config):
    """The last of 60 losses on rows that can be learned, within 0.02."""
    config = tiny_config(n_embd=24, n_layer=1)
    rng = np.random.default_rng(0)
    starts = [rng.integers(0, 31, (16, 1)) for _ in range(60)]
    rows = [(start + 3 * np.arange(T + 1)) % 31 for start in starts]
    batches = [
        make_batch(ids.astype(np.int32), np.ones(16, bool), slice(None), 16) for ids in rows
    ]
    exact, _ = run(config, batches)
    rounded, _ = run(config, batches, step_function=bfloat16_train_step)
    assert exact[0] > 3 and exact[-1] < 0.5 * exact[0]
    assert (exact != rounded).any()
    assert abs(exact[-5:].mean() - rounded[-5:].mean()) < 0.02


def bfloat16_train_step(state, batch, *, model, **fixed):
    return step.train_step(state, batch, model=model.clone(dtype=jnp.bfloat16), **fixed)


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "remat"), [(True, True), (False, False)])
def test_padding_the_vocabulary_changes_neither_loss_nor_gradient_in_bfloat16(
    tiny_config, tied, remat
):
    """The same products, summed in another order. test_head_loss.py has float32."""
    config = tiny_config(tie_word_embeddings=tied, n_layer=1)
    plain = FlaxGPT2LMHeadModule(config, jnp.bfloat16, gradient_checkpointing=remat)
    params, batch = torch_twin(config)[1], next(random_batches(2, 1))

    def loss_and_gradient(module):
        loss = functools.partial(step.loss_sum, batch=batch, key=None, model=module)
        (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return value, flatten_dict(gradient)

    expected, gradient = loss_and_gradient(plain)
    loss, got = loss_and_gradient(plain.clone(pad_vocab_to_multiple_of=20))
    np.testing.assert_allclose(loss, expected, rtol=2**-8)
    for name, leaf in gradient.items():
        error = np.linalg.norm(got[name] - leaf) / np.linalg.norm(leaf)
        assert error < 2**-8, name


@pytest.mark.slow
def test_the_compiled_steps_have_the_padded_size(tiny_config):
    optimizer, plain = make_optimizer(), FlaxGPT2LMHeadModule(tiny_config(n_layer=1))
    make = functools.partial(step.init_state, model=plain, optimizer=optimizer)
    state, rows = parallel.replicate(make, jax.random.key(0)), next(random_batches(16, 1))
    for multiple, sizes in ((1, {31}), (20, {31, 40})):
        module = plain.clone(pad_vocab_to_multiple_of=multiple)
        train = functools.partial(step.train_step, model=module, optimizer=optimizer, seed=0)
        update = parallel.compile_train_step(train, "pmap")
        evaluate = parallel.compile_eval_step(
            functools.partial(step.eval_step, model=module), "pmap"
        )
        for lowered in (
            update.lower(state, parallel.put_batch(rows, 1)),
            evaluate.lower(state.params, parallel.put_batch(rows, None)),
        ):
            shapes = re.findall(r"f32\[([\d,]+)\]", lowered.compile().as_text())
            assert {31, 40} & {int(n) for shape in shapes for n in shape.split(",")} == sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance", "rate", "changes"),
    [
        ("float32", 1e-5, 0.3, {}),
        ("bfloat16", 2**-6, 0.3, {}),  # roundings fall elsewhere
        ("float32", 1e-5, 0.0, {"add_cross_attention": True}),
    ],
    ids=str,
)
def test_what_is_computed_again_changes_no_gradient(tiny_config, dtype, tolerance, rate, changes):
    """Of the model that keeps little; of ln_1, ln_2 and all kernels as of the others."""
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), rate)
    config = tiny_config(n_layer=1, **rates, **changes)
    model = FlaxGPT2LMHeadModule(config, jnp.dtype(dtype))
    params, batch = torch_twin(config)[1], next(random_batches(2, 1))
    key = jax.random.key(1) if rate else None

    def gradient(model):
        loss = functools.partial(step.loss_sum, batch=batch, key=key, model=model)
        return flatten_dict(jax.jit(jax.grad(loss, has_aux=True))(params)[0])

    expected, got = gradient(model), gradient(model.clone(keeps_little=True))
    for name, leaf in expected.items():
        if not leaf.any():  # cross-attention has no encoder to attend to
            assert not got[name].any()
            continue
        if name[-2:] == ("c_attn", "bias"):  # that of keys is rounding noise
            leaf, got[name] = (np.delete(a, np.s_[12:24]) for a in (leaf, got[name]))
        assert np.linalg.norm(got[name] - leaf) < tolerance * np.linalg.norm(leaf), name


@pytest.mark.slow
def test_a_model_that_keeps_little_takes_less_memory(tiny_config):
    config = tiny_config(n_layer=3, n_inner=96, n_positions=64)
    params = torch_twin(config)[1]
    ids = np.random.default_rng(0).integers(0, 31, (8, 65)).astype(np.int32)
    batch = make_batch(ids, np.ones(8, bool), slice(None), 8)

    def planned(little):
        model = FlaxGPT2LMHeadModule(config, keeps_little=little)
        loss = functools.partial(step.loss_sum, batch=batch, key=None, model=model)
        program = jax.jit(jax.grad(loss, has_aux=True)).lower(params).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert planned(True) < 0.85 * planned(False)


def test_dropout_is_another_in_each_step(tiny_config):
    optimizer, module = (
        make_optimizer(),
        FlaxGPT2LMHeadModule(tiny_config(n_layer=1, resid_pdrop=0.5)),
    )
    state = step.init_state(jax.random.key(0), module, optimizer)
    update = jax.jit(functools.partial(step.train_step, model=module, optimizer=optimizer, seed=3))
    batch = jax.tree.map(lambda x: x[None], next(random_batches(4, 1)))
    first, second, again = (
        update(state._replace(step=jnp.int32(n)), batch)[1]["loss_sum"] for n in (0, 1, 0)
    )
    assert first == again != second


def test_an_error_of_the_thread_that_makes_batches_is_raised_in_its_place():
    def items():
        yield from (1, 2)
        raise ValueError("no third")

    ready = parallel.prefetch(items(), lambda n: 10 * n)
    assert [next(ready), next(ready)] == [10, 20]
    with pytest.raises(ValueError, match="no third"):
        next(ready)


def test_a_device_whose_copy_differs_is_named():
    devices = jax.devices()
    values = [np.arange(5, dtype=np.float32) + (n == 2) for n in range(len(devices))]
    copies = list(map(jax.device_put, values, devices))
    tree = jax.make_array_from_single_device_arrays((5,), parallel.replicated(), copies)
    assert parallel.differing_replicas({"a": tree}) == [devices[2]]
    assert parallel.differing_replicas({"a": parallel.replicate(lambda: jnp.ones(5))}) == []
