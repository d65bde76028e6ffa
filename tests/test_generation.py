"""Cached decoding gives what decoding without a cache gives, and what PyTorch gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gpt2_flax import generation
from gpt2_flax.data.tokenizers import make_tokenizer
from gpt2_flax.errors import UserError
from gpt2_flax.model import FlaxGPT2LMHeadModule
from tests.test_model import torch_twin


@pytest.fixture(scope="module")
def twin(tiny_config):
    """(module, our weights, PyTorch's model), with logits far enough apart for no ties."""
    config = tiny_config(n_positions=17)
    oracle, params = torch_twin(config)
    params = jax.tree.map(lambda leaf: 4 * leaf, params)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.mul_(4)
    return FlaxGPT2LMHeadModule(config), params, oracle


def test_greedy_decoding_is_pytorchs(twin):
    module, params, oracle = twin
    prompt = np.random.default_rng(1).integers(1, 31, (3, 4))
    expected = oracle.generate(
        torch.tensor(prompt), attention_mask=torch.ones(3, 4, dtype=torch.long),
        max_new_tokens=13, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    got = generation.generate(module, params, prompt, 13)
    assert len(np.unique(expected)) > 4
    np.testing.assert_array_equal(got, expected)


def test_a_row_that_has_ended_goes_on_with_end_of_text(twin):
    module, params, _ = twin
    prompt = np.random.default_rng(1).integers(1, 31, (3, 4))
    free = np.asarray(generation.generate(module, params, prompt, 9))
    eos = int(free[0, 6])
    got = np.asarray(generation.generate(module, params, prompt, 9, eos_id=eos))
    for row, expected in zip(got, free, strict=True):
        ends = np.flatnonzero(expected[4:] == eos)
        length = 4 + ends[0] + 1 if len(ends) else len(expected)
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert (row[length:] == eos).all()


def test_sampling_follows_the_models_probabilities(twin):
    module, params, _ = twin
    prompt = np.tile(np.array([[3, 7, 5]]), (4000, 1))
    new = generation.generate(
        module, params, prompt, 1, key=jax.random.key(0), temperature=2.0, top_k=5
    )
    seen = np.bincount(np.asarray(new)[:, -1], minlength=31) / 4000
    logits = module.apply({"params": params}, jnp.asarray(prompt[:1]))[0, -1] / 2.0
    likeliest = np.argsort(logits)[-5:]
    probabilities = np.zeros(31)
    probabilities[likeliest] = jax.nn.softmax(logits[likeliest])
    assert probabilities.max() < 0.95
    np.testing.assert_allclose(seen, probabilities, atol=0.03)


def test_a_seed_fixes_the_sample(twin):
    module, params, _ = twin
    prompt = np.array([[3, 7, 5]])

    def sample(seed):
        key = jax.random.key(seed)
        return np.asarray(generation.generate(module, params, prompt, 9, key=key, temperature=9.0))

    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()


def test_top_k_and_top_p_keep_the_likeliest():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    kept = np.isfinite(generation.keep_top_k(logits, 2))
    np.testing.assert_array_equal(kept, [[False, True, False, True]])
    for p, expected in (
        (0.3, [False, True, False, False]),
        (0.5, [False, True, False, True]),
        (0.75, [False, True, True, True]),
        (0.95, [True, True, True, True]),
    ):
        kept = np.isfinite(generation.keep_top_p(logits, p))
        np.testing.assert_array_equal(kept, [expected], err_msg=str(p))


def test_one_program_serves_a_second_model_of_the_same_shape(twin):
    module, params, _ = twin
    prompt = np.array([[3, 7, 5, 2, 1]])
    generation._decode.clear_cache()
    generation.generate(module, params, prompt, 3)
    generation.generate(FlaxGPT2LMHeadModule(module.config), params, prompt + 1, 3)
    assert generation._decode._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 15}, r"3 prompt ids and 15 .* 17 positions.* at most 14"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"key": jax.random.key(0), "temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_values_out_of_range_are_refused(twin, options, message):
    module, params, _ = twin
    options = {"max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):
        generation.generate(module, params, np.array([[3, 7, 5]]), **options)


def test_text_goes_in_and_out(tiny_config):
    tokenizer = make_tokenizer("bytes", ())
    module = FlaxGPT2LMHeadModule(tiny_config(vocab_size=257, n_positions=40))
    params = module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def run(prompt, new=8, temperature=1.0, top_k=0, top_p=0.9, seed=3):
        return generation.continue_text(
            module, params, tokenizer, prompt, new, temperature, top_k, top_p, seed
        )

    assert run("héllo").startswith("héllo")
    assert run("abc") == run("abc") != run("abc", seed=4)
    assert run("abc", temperature=0.0) == run("abc", temperature=0.0, seed=4)
    assert isinstance(run(""), str)
    with pytest.raises(UserError, match="at most 0 new ones"):
        run("a" * 40)
    with pytest.raises(UserError, match="max_new_tokens must be 1 or more"):
        run("a", new=0)
