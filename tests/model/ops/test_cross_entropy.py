"""The head's loss and gradient are those of the plain path, whatever is held at a time."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from gpt2_flax.model.gpt2 import FlaxGPT2LMHeadModule
from gpt2_flax.model.ops.cross_entropy import cross_entropy_sum
from gpt2_flax.training import step
from tests.model.test_gpt2 import torch_twin
from tests.training.test_step import T, random_batches

B, V = 2, 31


def plain_loss_sum(params, batch, model):
    """By the logits of all positions, and autodiff."""
    logits = model.apply({"params": params}, batch.ids_BxS[:, :-1]).logits
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.ids_BxS[:, 1:])
    return jnp.where(jnp.arange(T)[None, :] < batch.length_B[:, None], loss, 0.0).sum()


@pytest.mark.parametrize(
    ("at_once", "tied", "multiple"),
    [
        (None, True, 20),
        (2, False, 20),
        pytest.param(1, True, 1, marks=pytest.mark.slow),
        pytest.param(3, False, 1, marks=pytest.mark.slow),
        pytest.param(9, True, 20, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_are_those_of_the_plain_path(tiny_config, at_once, tied, multiple):
    """Padded to a multiple or not, they are those of the vocabulary as it is."""
    config = tiny_config(tie_word_embeddings=tied, n_layer=1)
    model = FlaxGPT2LMHeadModule(config)
    params, batch = torch_twin(config)[1], next(random_batches(B, 1))
    assert batch.length_B.min() < T  # some positions don't count
    plain = functools.partial(plain_loss_sum, batch=batch, model=model)
    expected, gradient = jax.jit(jax.value_and_grad(plain))(params)
    loss = functools.partial(
        step.loss_sum, batch=batch, key=None, logits_at_once=at_once,
        model=model.clone(pad_vocab_to_multiple_of=multiple),
    )  # fmt: skip
    value, n_targets = jax.jit(loss)(params)  # without a gradient it is computed in another way
    assert n_targets == batch.length_B.sum()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    (value, _), got = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    got = flatten_dict(got)
    for name, leaf in flatten_dict(gradient).items():
        error = np.linalg.norm(got[name] - leaf) / np.linalg.norm(leaf)
        assert error < 1e-5, name


def arguments(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(B, 6, 14)), dtype)
    head = jnp.asarray(rng.normal(size=(V, 14)), dtype)
    return x, head, jnp.asarray(rng.integers(0, V, (B, 6))), jnp.ones((B, 6), bool)


def test_the_gradient_follows_the_weight_of_the_loss():
    x, head, targets, counts = arguments(jnp.float32)
    once, thrice = (
        jax.grad(lambda x, head, c=c: c * cross_entropy_sum(x, head, targets, counts, V, 2),
                 argnums=(0, 1))(x, head)
        for c in (1.0, 3.0)
    )  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-6), once, thrice)


def test_a_target_that_is_no_id_gives_nan():
    x, head, targets, counts = arguments(jnp.float32)
    bad = targets.at[1, 3].set(V)
    assert np.isfinite(cross_entropy_sum(x, head, targets, counts, V, 6))
    assert np.isnan(cross_entropy_sum(x, head, bad, counts, V, 6))
    assert np.isnan(jax.value_and_grad(cross_entropy_sum)(x, head, bad, counts, V, 2)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_all_positions_are_never_held(dtype):
    """By the arrays of the compiled program; in bfloat16 none of float32 but a chunk's."""
    x, head, targets, counts = arguments(dtype)

    def shapes(at_once):
        loss = functools.partial(
            cross_entropy_sum, targets_BxT=targets, counts_BxT=counts, n_ids=V, at_once=at_once
        )
        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, head).compile()
        return set(re.findall(r"\w+\[([\d,]+)\]", program.as_text()))

    of_all, of_two = {"2,6,31", "12,31"}, {"2,2,31", "4,31"}
    assert shapes(6) & of_all and not shapes(6) & of_two
    assert shapes(2) & of_two and not shapes(2) & of_all
