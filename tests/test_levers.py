"""Ways to compute the same faster, or with less: each against the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_flax import attention, devices, fsdp, model, parallel, step
from gpt2_flax.config import load_config
from gpt2_flax.errors import UserError
from gpt2_flax.model import FlaxGPT2LMHeadModule
from tests.test_step import random_batches

DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2)


def loss_and_gradient(config, params=None, dtype=jnp.float32, key=None, **fields):
    """Of one batch, by a module with these fields; params of the plain one by default."""
    module = FlaxGPT2LMHeadModule(config, dtype, **fields)
    if params is None:
        params = initial(config)
    batch = jax.tree.map(jnp.asarray, next(random_batches(4, 1)))
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


# ---------------------------------------------------------------- layers in a scan


@pytest.mark.parametrize("config", [{}, DROPOUT, {"n_inner": 7, "n_layer": 3}], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gradient_checkpointing": True},
        {"attention_checkpointing": True, "keeps_little": True},
    ],
    ids=str,
)
def test_scanned_layers_are_the_same_layers(tiny_config, config, fields):
    config, key = tiny_config(**config), jax.random.key(5)
    expected = loss_and_gradient(config, key=key)
    got = loss_and_gradient(config, key=key, scanned=True, **fields)
    assert_alike(got, expected)


def test_a_scan_s_program_is_that_of_one_layer(tiny_config):
    config = tiny_config(n_layer=6)
    shapes = jax.eval_shape(lambda: initial(config))
    batch = next(random_batches(4, 1))

    def products(**fields):
        module = FlaxGPT2LMHeadModule(config, **fields)
        lowered = jax.jit(lambda p: step.loss_sum(p, batch, None, module)[0]).lower(shapes)
        return lowered.as_text().count("dot_general")

    assert products(scanned=True) * 3 < products()


def test_layers_that_differ_are_not_scanned(tiny_config):
    config = tiny_config(scale_attn_by_inverse_layer_idx=True)
    assert_alike(loss_and_gradient(config, scanned=True), loss_and_gradient(config))


def test_masks_of_the_original_class_are_not_scanned(tiny_config):
    config, key = tiny_config(**DROPOUT), jax.random.key(5)
    expected = loss_and_gradient(config, key=key, hf_flax_compat=True)
    assert_alike(loss_and_gradient(config, key=key, hf_flax_compat=True, scanned=True), expected)


def test_a_scan_gathers_shards_layer_by_layer(tiny_config, monkeypatch):
    monkeypatch.setattr(fsdp, "LEAST", 64)
    config = tiny_config(n_embd=24, n_layer=3, **DROPOUT)
    batch = parallel.put_batch(next(random_batches(16, 1)), 1, "fsdp")
    gradients = []
    for fields in ({}, {"scanned": True}, {"scanned": True, "gradient_checkpointing": True}):
        module = FlaxGPT2LMHeadModule(config, **fields)
        params = parallel.make_state(lambda key: initial(config), jax.random.key(0), "fsdp")

        def sums(params, batch, module=module):
            loss, _, gradient = fsdp.over_shards(
                step.gradient_sums, params, batch, jax.random.key(2), module, None,
                mesh=parallel.mesh(), has_gradient=True,
            )  # fmt: skip
            return loss, gradient

        gradients.append(jax.jit(sums)(params, batch))
    assert_alike(gradients[1], gradients[0])
    assert_alike(gradients[2], gradients[0])


# ---------------------------------------------------------------- fused attention


@pytest.mark.parametrize(
    "config",
    [{}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"n_head": 1}],
    ids=str,
)
def test_fused_attention_is_attention(tiny_config, config):
    """By XLA's implementation of the same function, which takes the same arguments as cuDNN's."""
    config = tiny_config(**config)
    expected = loss_and_gradient(config)
    assert_alike(loss_and_gradient(config, fused_attention="xla"), expected)
    got = loss_and_gradient(config, fused_attention="xla", gradient_checkpointing=True)
    assert_alike(got, expected)


def config_of(*flags):
    return load_config(["--dtype=bfloat16", "--dropout=0", *flags])


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    tried = []

    def answer(reason):
        monkeypatch.setattr(
            attention, "try_on_device", lambda *sizes: tried.append(sizes) or reason
        )
        return tried

    return answer


def test_cudnn_is_taken_where_it_works(tiny_config, on_a_gpu, capsys):
    tried = on_a_gpu(None)
    small = tiny_config(n_embd=48, n_head=3)
    assert attention.choose(config_of(), small) == "cudnn"
    assert attention.choose(config_of("--attention=cudnn"), small) == "cudnn"
    assert tried == [(128, 3, 16)] * 2
    assert attention.choose(config_of("--attention=xla"), small) is None
    # What it is not made for is not worth a line.
    assert attention.choose(load_config(["--dtype=bfloat16"]), small) is None
    assert attention.choose(load_config(["--dropout=0"]), small) is None
    assert len(tried) == 2
    assert capsys.readouterr().err == ""


def test_where_cudnn_fails_a_line_says_why(tiny_config, on_a_gpu, capsys):
    on_a_gpu("no valid engine")
    small = tiny_config(n_embd=48, n_head=3)
    assert attention.choose(config_of(), small) is None
    said = "attention by XLA, as cuDNN's does not work here: no valid engine"
    assert said in capsys.readouterr().err
    assert attention.choose(config_of(), tiny_config(n_embd=30, n_head=3)) is None
    assert "heads of width 10" in capsys.readouterr().err
    with pytest.raises(UserError, match="cudnn does not work here: no valid engine"):
        attention.choose(config_of("--attention=cudnn"), small)


def test_cudnn_is_refused_where_it_cannot_be(tiny_config):
    for flags in (["--attention=cudnn"], ["--attention=cudnn", "--dtype=bfloat16"]):
        with pytest.raises(UserError, match="needs dtype bfloat16 and dropout 0"):
            load_config(flags)
    with pytest.raises(UserError, match="it is for NVIDIA GPUs, and this is cpu"):
        attention.choose(config_of("--attention=cudnn"), tiny_config())
    assert attention.try_on_device.__wrapped__(16, 2, 8)  # really tried, and it says something


# ---------------------------------------------------------------- dropout


def test_random_bits_are_evenly_spread_and_independent():
    """Every bit, between neighbours, rows, keys; each within 5 standard deviations."""
    rows, shape = jnp.arange(8), (64, 1024)
    one = np.asarray(model.random_bits(jax.random.key(0), rows, shape))
    other = np.asarray(model.random_bits(jax.random.key(1), rows, shape))
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
    expected = model.random_bits(jax.random.key(0), jnp.arange(2), (50,))
    with jax.enable_x64(True):
        got = model.random_bits(jax.random.key(0), jnp.arange(2), (50,))
        assert got.dtype == jnp.uint32
    np.testing.assert_array_equal(got, expected)


def test_random_bits_follow_the_row():
    key, shape = jax.random.key(3), (5, 7)
    all_rows = model.random_bits(key, jnp.arange(6), shape)
    np.testing.assert_array_equal(
        model.random_bits(key, jnp.array([4, 1]), shape), all_rows[jnp.array([4, 1])]
    )


def test_each_layer_and_each_step_has_masks_of_its_own(tiny_config):
    """Layers of equal parameters would else do the same to equal inputs."""
    config = tiny_config(n_layer=2, **DROPOUT)
    losses = {float(loss_and_gradient(config, key=jax.random.key(seed))[0]) for seed in range(5)}
    assert len(losses) == 5
    params = initial(config)
    blocks = params["transformer"]["h"]
    swapped = params | {"transformer": params["transformer"] | {
        "h": {"0": blocks["1"], "1": blocks["0"]}}}  # fmt: skip
    key = jax.random.key(9)
    assert loss_and_gradient(config, params, key=key)[0] != loss_and_gradient(
        config, swapped, key=key)[0]  # fmt: skip


# ---------------------------------------------------------------- bfloat16


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
