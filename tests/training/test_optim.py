"""The learning rate of every update, what decays, what is clipped, and the update rules."""

import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax.traverse_util import flatten_dict

from gpt2_flax.config.train_config import TYPES
from gpt2_flax.pretrained.modeling import param_shapes
from gpt2_flax.training import optim

PEAK, FLOOR = 1e-3, 1e-4
KINDS = ("constant", "linear", "cosine", "wsd")
OPTIMIZERS = typing.get_args(TYPES["optimizer"])


def rates(kind, warmup, total, floor=FLOOR, decay=2):
    schedule = optim.make_schedule(kind, PEAK, floor, warmup, total, decay)
    return np.array([schedule(n) for n in range(total + 1)], np.float64)


def make_optimizer(name="adamw", rate=0.1, weight_decay=0.0, grad_clip=0.0, **options):
    schedule = rate if callable(rate) else optax.constant_schedule(rate)
    betas = {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-3} | options
    return optim.make_optimizer(
        name, schedule, weight_decay=weight_decay, grad_clip=grad_clip, **betas
    )


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize("warmup", [0, 1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_rises_linearly_and_then_is_optax_s_own(kind, warmup):
    left = 40 - warmup
    after = {
        "constant": optax.constant_schedule(PEAK),
        "linear": optax.linear_schedule(PEAK, FLOOR, left),
        "cosine": optax.cosine_decay_schedule(PEAK, left, alpha=FLOOR / PEAK),
        "wsd": optax.linear_schedule(PEAK, FLOOR, 10, transition_begin=left - 10),
    }[kind]
    expected = [PEAK * (n + 1) / warmup for n in range(warmup)]  # the first update learns, too
    expected += [after(n) for n in range(left + 1)]
    np.testing.assert_allclose(rates(kind, warmup, 40, decay=10), expected, rtol=1e-5)


@pytest.mark.parametrize(("warmup", "decay"), [(5, 100), (7, 3), (3, 4)])
def test_a_fall_longer_than_what_the_warmup_leaves_is_cut_to_it(warmup, decay):
    got = rates("wsd", warmup, 7, decay=decay)
    np.testing.assert_allclose(got, rates("linear", warmup, 7), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (0, 7), (1, 7), (6, 7), (7, 7)])
def test_every_update_learns_and_the_last_is_above_the_floor(kind, warmup, total):
    got = rates(kind, warmup, total, floor=0.0)[:total]
    assert (got > 0).all()
    assert (np.diff(got[:warmup]) > 0).all()
    assert (np.diff(got[warmup:]) <= 0).all()
    assert got.max() == pytest.approx(PEAK)
    if warmup:
        assert got[0] == pytest.approx(PEAK / warmup)
    if kind != "constant" and warmup < total:
        np.testing.assert_allclose(rates(kind, warmup, total)[total], FLOOR, rtol=1e-5)


def test_an_unknown_schedule_is_our_own_bug():
    with pytest.raises(KeyError, match="step"):
        optim.make_schedule("step", PEAK, FLOOR, 0, 10)


@pytest.mark.parametrize(
    ("setting", "total", "steps"),
    [
        (0.0, 100, 0),
        (0.05, 100, 5),
        (0.05, 109, 5),
        (0.05, 5, 0),
        (0.999, 100, 100),
        (1.0, 100, 1),
        (1.4, 100, 1),
        (30.0, 420, 30),
        (500.0, 420, 420),
    ],
)
def test_warmup_is_a_share_below_1_and_a_count_from_1_on(setting, total, steps):
    assert optim.count_part(setting, total) == steps


def test_update_n_has_rate_n():
    optimizer = make_optimizer("sgd", rate=lambda n: 10.0**-n, beta1=0.0)
    params = {"w": jnp.zeros(())}
    state = optimizer.init(params)
    for n in range(3):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params, step=n)
        assert float(updates["w"]) == pytest.approx(-(10.0**-n))


# ---------------------------------------------------------------- decay


def expected_mask(config):
    layer = {
        "ln_1": {"scale": False, "bias": False},
        "attn": {
            "c_attn": {"kernel": True, "bias": False},
            "c_proj": {"kernel": True, "bias": False},
        },
        "ln_2": {"scale": False, "bias": False},
        "mlp": {
            "c_fc": {"kernel": True, "bias": False},
            "c_proj": {"kernel": True, "bias": False},
        },
    }
    tree = {
        "transformer": {
            "wte": {"embedding": True},
            "wpe": {"embedding": True},
            "h": {str(n): layer for n in range(config.n_layer)},
            "ln_f": {"scale": False, "bias": False},
        }
    }
    return tree if config.tie_word_embeddings else tree | {"lm_head": {"kernel": True}}


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_nothing_else(tied, tiny_config):
    config = tiny_config(tie_word_embeddings=tied)
    assert optim.decay_mask(param_shapes(config)) == expected_mask(config)


def test_what_decays_is_said(tiny_config):
    shapes = param_shapes(tiny_config(n_layer=1))
    flat = flatten_dict(shapes).items()
    chosen = flatten_dict(expected_mask(tiny_config(n_layer=1)))
    decaying = [leaf.size for path, leaf in flat if chosen[path]]
    still = [leaf.size for path, leaf in flat if not chosen[path]]
    assert optim.describe_decay(shapes, 0.1) == (
        f"weight decay: 0.1 on 6 tensors ({sum(decaying):,} parameters),"
        f" none on {len(still)} tensors ({sum(still):,} parameters)"
    )
    everything = sum(decaying) + sum(still)
    assert optim.describe_decay(shapes, 0.0) == (
        f"weight decay: none on {6 + len(still)} tensors ({everything:,} parameters)"
    )
    assert optim.describe_decay({"w": jnp.zeros((2, 3))}, 0.5) == (
        "weight decay: 0.5 on 1 tensor (6 parameters)"
    )


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else(tied, tiny_config):
    dimensions = optim.muon_dimensions(param_shapes(tiny_config(tie_word_embeddings=tied)))
    for path, chosen in flatten_dict(dimensions).items():
        in_a_block = path[:2] == ("transformer", "h") and path[-1] == "kernel"
        # A kernel is (out, in).
        expected = optax.contrib.MuonDimensionNumbers((1,), (0,)) if in_a_block else None
        assert chosen == expected, path


@pytest.mark.slow(but_every=5)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_decoupled_from_the_gradient(name, tiny_config):
    config = tiny_config(n_layer=1)
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 2.0), param_shapes(config))
    optimizer = make_optimizer(name, rate=0.1, weight_decay=0.3)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(still, optimizer.init(params), params, step=0)
    decays = flatten_dict(expected_mask(config))
    for path, update in flatten_dict(updates).items():
        expected = -0.1 * 0.3 * 2.0 if decays[path] else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg="/".join(path))


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize(
    ("clip", "factor"), [(0.0, 1.0), (13.0, 1.0), (20.0, 1.0), (6.5, 0.5), (1.3, 0.1)]
)
def test_the_gradient_is_clipped_to_its_global_norm(clip, factor):
    grads = {"a": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "b": jnp.array([12.0])}  # norm 13
    optimizer = make_optimizer("sgd", rate=1.0, grad_clip=clip, beta1=0.0)
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads, step=0)
    for name, grad in grads.items():
        np.testing.assert_allclose(updates[name], -factor * grad, rtol=1e-6)


def test_decay_is_not_clipped():
    params = {"w": jnp.full((1, 1), 100.0)}
    optimizer = make_optimizer("sgd", rate=1.0, weight_decay=0.5, grad_clip=1.0)
    still = {"w": jnp.zeros((1, 1))}
    updates, _ = optimizer.update(still, optimizer.init(params), params, step=0)
    assert float(updates["w"][0, 0]) == -50.0


# ---------------------------------------------------------------- update rules

B1, B2, EPSILON = 0.8, 0.9, 1e-3


def adamw_by_hand(grad, state, n):
    m, v = B1 * state[0] + (1 - B1) * grad, B2 * state[1] + (1 - B2) * grad**2
    m_hat, v_hat = m / (1 - B1**n), v / (1 - B2**n)
    return m_hat / (np.sqrt(v_hat) + EPSILON), (m, v)


def lion_by_hand(grad, state, n):
    return np.sign(B1 * state[0] + (1 - B1) * grad), (B2 * state[0] + (1 - B2) * grad, 0)


def sgd_by_hand(grad, state, n):
    velocity = B1 * state[0] + grad
    return velocity, (velocity, 0)


def nesterov(m, grad, n):
    return B1 * m / (1 - B1 ** (n + 1)) + (1 - B1) * grad / (1 - B1**n)


def muon_by_hand(grad, state, n):
    m = B1 * state[0] + (1 - B1) * grad
    x = nesterov(m, grad, n)
    x = x / (np.linalg.norm(x) + EPSILON)
    for _ in range(5):  # Newton-Schulz: drives every singular value towards 1
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return 0.2 * np.sqrt(max(grad.shape)) * x, (m, 0)


def nadam_by_hand(grad, state, n):
    m, v = B1 * state[0] + (1 - B1) * grad, B2 * state[1] + (1 - B2) * grad**2
    return nesterov(m, grad, n) / (np.sqrt(v / (1 - B2**n)) + EPSILON), (m, v)


@pytest.mark.parametrize(
    ("name", "leaf", "rule"),
    [
        ("adamw", "kernel", adamw_by_hand),
        ("lion", "kernel", lion_by_hand),
        ("sgd", "kernel", sgd_by_hand),
        ("muon", "kernel", muon_by_hand),
        ("muon", "embedding", nadam_by_hand),
    ],
)
def test_updates_follow_the_published_rule(name, leaf, rule):
    rate, decay = 0.05, 0.3
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2, 3))
    optimizer = make_optimizer(name, rate=rate, weight_decay=decay)
    params = {"a": {leaf: jnp.asarray(w, jnp.float32)}}
    opt_state, state = optimizer.init(params), (np.zeros_like(w), np.zeros_like(w))
    for n in (1, 2, 3):
        grad = rng.normal(size=w.shape)
        updates, opt_state = optimizer.update(
            {"a": {leaf: jnp.asarray(grad, jnp.float32)}}, opt_state, params, step=n
        )
        params = optax.apply_updates(params, updates)
        direction, state = rule(grad, state, n)
        w = w - rate * (direction + decay * w)
        np.testing.assert_allclose(params["a"][leaf], w, rtol=1e-5)


@pytest.mark.parametrize("shape", [(128, 130), (5, 200), (7,)], ids=str)
def test_adafactor_is_optax_s(shape):
    """Factored from 128 rows and columns on."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    ours = make_optimizer("adafactor", rate=0.05)
    theirs = optax.adafactor(0.05, multiply_by_parameter_scale=False)
    state, oracle_state = ours.init(params), theirs.init(params)
    sizes = {leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 1}
    assert sizes == ({128, 130} if shape == (128, 130) else {math.prod(shape)})
    for n in range(3):
        grads = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        got, state = ours.update(grads, state, params, step=n)
        expected, oracle_state = theirs.update(grads, oracle_state, params)
        np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-6)
