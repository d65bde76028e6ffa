"""Kernels for GPUs against the plain path, run by JAX's interpreter, and when they are taken.

What a GPU makes of them is compared at the start of each run (kernels.what_fails).
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from gpt2_flax.config.train_config import load_config
from gpt2_flax.distributed import devices, fsdp, parallel
from gpt2_flax.errors import UserError
from gpt2_flax.model.gpt2 import FlaxGPT2LMHeadModule
from gpt2_flax.model.ops import cross_entropy, dropout, flash_attention, kernels
from gpt2_flax.model.ops.layer_norm import kept_and_normed, layer_norm
from gpt2_flax.training import step
from tests.model.test_compute_options import DROPOUT, assert_alike, initial, loss_and_gradient

T = 128


def random(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# ---------------------------------------------------------------- attention


def plainly_mixed(qkv, words, scale, rate):
    q, k, v = (qkv[:, :, part] for part in range(3))
    scores = jnp.einsum("BTHC,BKHC->BHTK", q, k) * scale
    probs = jax.nn.softmax(jnp.where(jnp.tri(qkv.shape[1], dtype=bool), scores, -jnp.inf))
    if words is not None:
        probs = jnp.where(dropout.is_kept(*words, rate), probs / (1 - rate), 0.0)
    return jnp.einsum("BHTK,BKHC->BTHC", probs, v)


@pytest.mark.parametrize(
    "positions, width, scale, rate",
    [
        (64, 32, 1.0, 0.3),
        pytest.param(192, 64, 0.125, 0.3, marks=pytest.mark.slow),
        pytest.param(128, 128, 0.05, 0.0, marks=pytest.mark.slow),
    ],
)
def test_flash_attention_is_attention(positions, width, scale, rate):
    B, H = 2, 3
    qkv, cotangent = random(B, positions, 3, H, width), random(B, positions, H, width, seed=1)
    words = None
    if rate:
        shape = H, positions, positions
        of_rows = dropout.words_of_rows(jax.random.key(5), jnp.array([3, 8]), 1)
        words = dropout.words_of(of_rows[:, 0], shape)
    out, pull_back = jax.vjp(
        lambda x: flash_attention.flash_attention(x, words, scale, rate, True), qkv
    )
    expected, plain_pull_back = jax.vjp(lambda x: plainly_mixed(x, words, scale, rate), qkv)
    np.testing.assert_allclose(out, expected, atol=3e-5)
    (got,), (gradient,) = pull_back(cotangent), plain_pull_back(cotangent)
    np.testing.assert_allclose(got, gradient, atol=3e-5 * float(abs(gradient).max()))


def test_flash_attention_survives_large_scores():
    qkv = random(1, 64, 3, 1, 32) * 30
    out = flash_attention.flash_attention(qkv, None, 1.0, 0.0, True)
    np.testing.assert_allclose(out, plainly_mixed(qkv, None, 1.0, 0.0), atol=1e-3)


def test_which_sizes_flash_attention_has():
    assert flash_attention.why_not(1024, 64) is None
    assert "block_size 100 is not a multiple of 64" in flash_attention.why_not(100, 64)
    assert "heads of width 48 are none of 32, 64, 128" in flash_attention.why_not(1024, 48)


def long_config(tiny_config, **changes):
    return tiny_config(n_embd=64, n_head=2, n_positions=T, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, fields",
    [
        ({"scale_attn_by_inverse_layer_idx": True}, {}),
        (DROPOUT, {"keeps_little": True, "scanned": True}),
    ],
    ids=str,
)
def test_a_model_with_kernels_is_the_same_model(tiny_config, config, fields):
    config = long_config(tiny_config, **config)
    key, params = jax.random.key(5), initial(config)
    take = functools.partial(loss_and_gradient, config, params, key=key, positions=T)
    assert_alike(take(fused_attention="flash", kernels=True, **fields), take())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "fields"),
    [(DROPOUT, {"hf_flax_compat": True}), ({"attn_pdrop": 1.0, "resid_pdrop": 0.0}, {})],
    ids=str,
)
def test_masks_that_flash_attention_does_not_make_are_left_to_plain_attention(
    tiny_config, config, fields
):
    config, key = long_config(tiny_config, n_layer=1, **config), jax.random.key(5)
    take = functools.partial(loss_and_gradient, config, key=key, positions=T, **fields)
    assert_alike(take(fused_attention="flash"), take())


@pytest.mark.slow
def test_kernels_work_by_pmap_and_in_shards(tiny_config):
    """On 8 devices, the loss and the gradient of one."""
    config = long_config(tiny_config, n_layer=1, **DROPOUT)
    params = initial(config)
    ids = jax.random.randint(jax.random.key(0), (8, 1, 1, T + 1), 0, config.vocab_size)
    batch = step_batch(ids)
    module = FlaxGPT2LMHeadModule(config, fused_attention="flash", kernels=True)
    key = jax.random.key(2)
    plain = FlaxGPT2LMHeadModule(config)
    whole = jax.tree.map(lambda x: parallel.merge_devices(x, 1), batch)
    expected = jax.jit(lambda p: step.gradient_sums(p, whole, key, plain))(params)

    def on_each(params, batch):
        return jax.lax.psum(step.gradient_sums(params, batch, key, module), "batch")

    got = jax.pmap(on_each, "batch", in_axes=(None, 0), out_axes=None)(params, batch)
    assert_alike(got[::2], expected[::2])

    shardings = fsdp.shardings_of(params, parallel.mesh())
    sharded = jax.device_put(params, shardings)
    placed = jax.device_put(batch, NamedSharding(parallel.mesh(), PartitionSpec(parallel.AXIS)))
    shards = functools.partial(fsdp.over_shards, mesh=parallel.mesh(), has_gradient=True)
    got = jax.jit(lambda p, b: shards(step.gradient_sums, p, b, key, module, None))(
        sharded, placed
    )
    assert_alike(got[::2], expected[::2])


def step_batch(ids):
    from gpt2_flax.data.batches import Batch

    lead = ids.shape[:-1]
    slots = jnp.arange(np.prod(lead)).reshape(lead)
    return Batch(ids, slots, jnp.full(lead, ids.shape[-1] - 1))


# ---------------------------------------------------------------- LayerNorm


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 7, 20), "float32"),
        pytest.param((4, 256, 48), "bfloat16", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_gradient_of_layer_norm_and_of_its_input_are_added_up(shape, dtype):
    x, dkept, dnormed = (2 * random(*shape, seed=n, dtype=dtype) + 1 for n in range(3))
    scale, bias = (random(1, 1, shape[-1], seed=n) for n in (3, 4))
    got, pull_back = jax.vjp(lambda *a: kept_and_normed(*a, 1e-3, True), x, scale, bias)
    expected, plain = jax.vjp(lambda *a: (a[0], layer_norm(*a, 1e-3)), x, scale, bias)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    rtol = 1e-5 if dtype == "float32" else 1e-2
    cotangents = dkept, dnormed
    for one, other in zip(pull_back(cotangents), plain(cotangents), strict=True):
        assert one.dtype == other.dtype
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=rtol * abs(other).max())


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("dtype", "at_once"),
    [("float32", 2), pytest.param("bfloat16", 6, marks=pytest.mark.slow)],
)
def test_the_loss_and_its_gradient_in_the_place_of_the_logits(dtype, at_once):
    """More ids than are handled at a time, some of them padding, positions that don't count."""
    n_ids, rows = 5000, 5100
    x, head = random(2, 6, 16, dtype=dtype), random(rows, 16, seed=1, dtype=dtype)
    targets = jax.random.randint(jax.random.key(2), (2, 6), 0, n_ids)
    counts = jnp.arange(6)[None] < jnp.array([[6], [3]])

    def take(kernel):
        loss = functools.partial(
            cross_entropy.cross_entropy_sum, targets_BxT=targets, counts_BxT=counts, n_ids=n_ids,
            at_once=at_once, kernel=kernel,
        )  # fmt: skip
        return jax.value_and_grad(loss, argnums=(0, 1))(x, head)

    (loss, gradient), (expected, plain) = take(True), take(False)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    rtol = 1e-5 if dtype == "float32" else 1e-2
    for one, other in zip(gradient, plain, strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=rtol * abs(other).max())
    assert not np.asarray(gradient[1], np.float32)[n_ids:].any()
    assert not np.asarray(gradient[0], np.float32)[1, 3:].any()


@pytest.mark.parametrize("bad", ["target", "nan", "inf"])
def test_what_is_not_finite_shows(bad):
    x, head = random(1, 4, 16), random(300, 16, seed=1)
    targets, counts = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    if bad == "target":
        targets = targets.at[0, 2].set(300)
    else:
        head = head.at[7].set(float(bad))
    loss, gradient = jax.value_and_grad(cross_entropy.cross_entropy_sum)(
        x, head, targets, counts, 300, 4, True
    )
    assert not np.isfinite(loss) and (bad == "target" or not np.isfinite(gradient).all())


# ---------------------------------------------------------------- compiled for a GPU


def programs_for_cuda(function, *shapes) -> list[str]:
    """Names of the kernels of a gradient that is lowered for a GPU, which need not be there."""
    gradient = jax.jit(jax.grad(lambda x, *rest: function(x, *rest).astype(jnp.float32).sum()))
    mesh = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):  # which asks what kind it is
        device = jax.sharding.AbstractDevice("NVIDIA H100", 132, "cuda")
        axes = (jax.sharding.AxisType.Auto,)
        mesh = jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh((1,), ("x",), axes, abstract_device=device)
        )
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    with mesh:
        text = gradient.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic" not in text
    return re.findall(r"__gpu\$xla\.gpu\.triton.*?name = \"(\w+)\"", text)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # by jax 0.12
def test_triton_is_given_all_kernels_at_their_real_sizes(monkeypatch):
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    bf16, f32, int32 = jnp.bfloat16, jnp.float32, jnp.int32

    def attention(qkv, rows):
        of_rows = dropout.words_of_rows(jax.random.key(0), rows, 1)
        words = dropout.words_of(of_rows[:, 0], (12, 1024, 1024))
        return flash_attention.flash_attention(qkv, words, 0.125, 0.1)

    shapes = ((64, 1024, 3, 12, 64), bf16), ((64,), int32)
    names = ["flash_attention_forward", "flash_attention_backward"]
    assert programs_for_cuda(attention, *shapes) == names
    for width in (768, 1600, 8192):
        norm = functools.partial(kept_and_normed, epsilon=1e-5)
        shapes = ((64, 1024, width), bf16), ((1, 1, width), f32), ((1, 1, width), f32)
        found = programs_for_cuda(lambda *a, norm=norm: sum(norm(*a)), *shapes)
        assert found == ["layer_norm_backward"]

    def loss(x, head, targets, counts):
        return cross_entropy.cross_entropy_sum(x, head, targets, counts, 50257, 1024, True)

    shapes = ((64, 1024, 768), bf16), ((50304, 768), bf16), ((64, 1024), int32), ((64, 1024), bool)
    assert programs_for_cuda(loss, *shapes) == ["cross_entropy"]


# ---------------------------------------------------------------- which are taken


def config_of(*flags):
    return load_config(["--dtype=bfloat16", *flags])


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A function that says what each kernel fails with; what was tried, in turn."""
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    tried = []

    def answers(**reasons):
        for name in ("flash", "cudnn", "others"):
            monkeypatch.setattr(
                kernels, f"try_{name}",
                lambda *sizes, name=name: tried.append((name, *sizes)) or reasons.get(name),
            )  # fmt: skip
        return tried

    return answers


def test_kernels_are_taken_where_they_work(tiny_config, on_a_gpu, capsys):
    tried = on_a_gpu()
    small = tiny_config(n_embd=96, n_head=3)
    assert kernels.choose_attention(config_of(), small) == "flash"
    assert kernels.choose_attention(config_of("--dropout=0"), small) == "flash"
    assert kernels.choose_attention(config_of("--attention=flash"), small) == "flash"
    assert (
        kernels.choose_attention(config_of("--dropout=0", "--attention=cudnn"), small) == "cudnn"
    )
    assert kernels.choose_others(config_of(), small)
    assert tried == [
        ("flash", 128, 3, 32, 0.1), ("flash", 128, 3, 32, 0.0), ("flash", 128, 3, 32, 0.1),
        ("cudnn", 128, 3, 32), ("others", 96, "bfloat16"),
    ]  # fmt: skip
    assert kernels.choose_attention(config_of("--attention=xla"), small) is None
    assert not kernels.choose_others(config_of("--kernels=xla"), small)
    # What they are not made for is not worth a line.
    assert kernels.choose_attention(load_config([]), small) is None
    assert not kernels.choose_others(load_config([]), small)
    assert len(tried) == 5
    assert kernels.choose_others(load_config(["--kernels=pallas"]), small)
    assert capsys.readouterr().err == ""


def test_where_flash_fails_the_next_is_tried_and_a_line_says_why(tiny_config, on_a_gpu, capsys):
    on_a_gpu(flash="ptxas failed")
    small = tiny_config(n_embd=96, n_head=3)
    assert kernels.choose_attention(config_of("--dropout=0"), small) == "cudnn"
    assert kernels.choose_attention(config_of(), small) is None
    assert capsys.readouterr().err.strip() == (
        "attention by XLA, as flash does not work here: ptxas failed;"
        " cudnn does not work here: it has no dropout"
    )
    assert kernels.choose_attention(config_of(), tiny_config(n_embd=30, n_head=3)) is None
    assert "heads of width 10" in capsys.readouterr().err
    with pytest.raises(UserError, match="attention flash does not work here: ptxas failed"):
        kernels.choose_attention(config_of("--attention=flash"), small)
    on_a_gpu(others="its gradient is off by 0.5")
    assert not kernels.choose_others(config_of(), small)
    assert "kernels by XLA, as pallas does not work here: its gradient" in capsys.readouterr().err


def test_kernels_are_refused_where_they_cannot_be(tiny_config, monkeypatch):
    for flags in (["--attention=cudnn"], ["--attention=cudnn", "--dtype=bfloat16"]):
        with pytest.raises(UserError, match="needs dtype bfloat16 and dropout 0"):
            load_config(flags)
    with pytest.raises(UserError, match="attention flash needs dtype bfloat16"):
        load_config(["--attention=flash"])
    for choose, flag in (
        (kernels.choose_attention, "--attention=flash"),
        (kernels.choose_others, "--kernels=pallas"),
    ):
        with pytest.raises(UserError, match="it is for NVIDIA GPUs, and this is cpu"):
            choose(config_of(flag), tiny_config())
        with monkeypatch.context() as patch:
            patch.setattr(devices, "platform", lambda: "gpu")
            with pytest.raises(UserError, match="XLA cannot divide it over devices"):
                choose(config_of(flag, "--parallel=jit"), tiny_config())


@pytest.mark.slow
def test_a_kernel_that_fails_or_is_wrong_is_found(monkeypatch):
    assert kernels.try_cudnn.__wrapped__(64, 2, 32)  # really tried, and it says something
    assert kernels.try_flash.__wrapped__(64, 2, 32, 0.1)
    assert kernels.try_others.__wrapped__(32, "bfloat16")
    call = pl.pallas_call
    monkeypatch.setattr(
        pl, "pallas_call", lambda *args, **kwargs: call(*args, **kwargs | {"interpret": True})
    )
    assert kernels.try_flash.__wrapped__(64, 2, 32, 0.1) is None
    assert kernels.try_others.__wrapped__(48, "bfloat16") is None
    monkeypatch.setattr(flash_attention, "LOG2_E", 1.4)
    assert "its gradient is off by" in kernels.try_flash.__wrapped__(64, 2, 32, 0.1)
    monkeypatch.setattr(cross_entropy, "LOG2_E", 0.5)
    assert "its gradient is off by" in kernels.try_others.__wrapped__(48, "bfloat16")
