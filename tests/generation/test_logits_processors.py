"""The processors give what PyTorch's give, with traced lengths and with padding at both ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as oracle

from gpt2_flax.generation import logits_processors as ours

B, L, V, EOS = 2, 9, 31, 3
# A few ids only, so that they repeat.
IDS = np.random.default_rng(5).integers(4, 8, (B, L)).astype(np.int32)
SCORES = np.random.default_rng(6).normal(0, 3, (B, V)).astype(np.float32)

BIAS = {(5,): 1.5, (6, 7): -2.0, (4, 7, 9): 3.0}
CASES = [
    ("TemperatureLogitsWarper", 0.7),
    ("TopKLogitsWarper", 5),
    ("TopKLogitsWarper", 1, -np.inf, 3),
    ("TopKLogitsWarper", 99),
    ("TopPLogitsWarper", 0.8),
    ("TopPLogitsWarper", 0.0),
    ("TopPLogitsWarper", 0.1, -9.0, 4),
    ("MinPLogitsWarper", 0.2),
    ("MinPLogitsWarper", 1.0, -np.inf, 3),
    ("TopHLogitsWarper", 0.6),
    ("TypicalLogitsWarper", 0.5),
    ("TypicalLogitsWarper", 0.1, -np.inf, 5),
    ("EpsilonLogitsWarper", 0.05),
    ("EpsilonLogitsWarper", 0.9, -np.inf, 3),
    ("EtaLogitsWarper", 0.1),
    ("ForcedBOSTokenLogitsProcessor", 4),
    ("ForcedEOSTokenLogitsProcessor", 7, 4),
    ("ForcedEOSTokenLogitsProcessor", 7, [4, 9]),
    ("MinLengthLogitsProcessor", 6, EOS),
    ("MinLengthLogitsProcessor", 7, [1, EOS]),
    ("SuppressTokensAtBeginLogitsProcessor", [2, 5], 6),
    ("SuppressTokensLogitsProcessor", [2, 5]),
    ("NoRepeatNGramLogitsProcessor", 1),
    ("NoRepeatNGramLogitsProcessor", 2),
    ("NoRepeatNGramLogitsProcessor", 3),
    ("NoRepeatNGramLogitsProcessor", L + 1),
    ("RepetitionPenaltyLogitsProcessor", 1.5),
    ("RepetitionPenaltyLogitsProcessor", 0.7, 2),
    ("RepetitionPenaltyLogitsProcessor", 1.5, np.array([0, 3])),
    ("SequenceBiasLogitsProcessor", BIAS),
    ("SequenceBiasLogitsProcessor", [[[5, 7], 2.5]]),
    ("NoBadWordsLogitsProcessor", [[5], [6, 8], [4, 9], [EOS]], EOS),
    ("ExponentialDecayLengthPenalty", (2, 1.5), EOS, 3),
    ("LogitNormalization",),
]


def both(name, *arguments):
    """(our processor, PyTorch's) of the same arguments."""
    as_torch = [torch.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
    return getattr(ours, f"Flax{name}")(*arguments), getattr(oracle, name)(*as_torch)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_scores_are_pytorchs(case):
    processor, expected = both(*case)
    compiled = jax.jit(lambda p, ids, scores, cur_len: p(ids, scores, cur_len))
    assert ours.is_pytree(processor)
    for cur_len in (1, 2, 5, 6, 7, L):
        ids = np.where(np.arange(L) < cur_len, IDS, EOS)  # as generate has it: padding behind
        want = expected(torch.tensor(ids[:, :cur_len].astype(np.int64)), torch.tensor(SCORES))
        got = compiled(processor, ids, SCORES, jnp.int32(cur_len))
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6, err_msg=str(cur_len))


def test_scores_that_are_ruled_out_stay_so():
    """Behind another warper, -inf must not become NaN, nor come back."""
    scores = jnp.where(jnp.arange(V)[None, :] % 3 == 0, SCORES, -jnp.inf)
    for case in CASES:
        processor, expected = both(*case)
        if isinstance(processor, ours.FlaxLogitsWarper):
            got = processor(jnp.asarray(IDS), scores, 5)
            want = expected(torch.tensor(IDS), torch.tensor(np.array(scores)))
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=type(processor).__name__)


def test_invalid_scores_are_replaced():
    scores = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    got = ours.FlaxInfNanRemoveLogitsProcessor()(IDS, jnp.asarray(scores), 1)
    want = oracle.InfNanRemoveLogitsProcessor()(None, torch.tensor(scores))
    np.testing.assert_array_equal(got, want)


def test_ids_are_forced_at_their_index():
    processor = ours.FlaxForceTokensLogitsProcessor([[2, 7], [4, 9], [3, None]])
    compiled = jax.jit(lambda cur_len: processor(IDS, jnp.asarray(SCORES), cur_len))
    for cur_len, id in ((2, 7), (4, 9)):
        got = np.asarray(compiled(cur_len))
        assert (got[:, id] == 0).all() and np.isneginf(np.delete(got, id, axis=1)).all()
    for cur_len in (1, 3, 5, 8):
        np.testing.assert_array_equal(compiled(cur_len), SCORES)


def test_padding_is_no_part_of_an_n_gram():
    ids = jnp.array([[6, 6, 5, 7, 6, 0, 0]])
    scores = jnp.zeros((1, V))
    banned = np.isneginf(ours.FlaxNoRepeatNGramLogitsProcessor(2)(ids, scores, 5))
    assert np.flatnonzero(banned).tolist() == [5, 6]
    banned = np.isneginf(ours.FlaxNoRepeatNGramLogitsProcessor(2, [1])(ids, scores, 5))
    assert np.flatnonzero(banned).tolist() == [5]


def test_a_list_applies_its_processors_in_order():
    chain = ours.FlaxLogitsProcessorList(
        [ours.FlaxTemperatureLogitsWarper(2.0), lambda ids, scores, cur_len: scores + cur_len]
    )
    np.testing.assert_allclose(chain(IDS, SCORES, 3), SCORES / 2 + 3)


def test_a_list_passes_named_arguments_on():
    class Shift(ours.FlaxLogitsProcessor):
        def __call__(self, input_ids, scores, cur_len, by):
            return scores + by

    chain = ours.FlaxLogitsProcessorList([Shift()])
    np.testing.assert_allclose(chain(IDS, SCORES, 3, by=2.0), SCORES + 2)
    with pytest.raises(ValueError, match="Shift takes input_ids, scores, cur_len, by; pass by"):
        chain(IDS, SCORES, 3)


def test_the_bases_are_abstract():
    for base in (ours.FlaxLogitsProcessor, ours.FlaxLogitsWarper):
        with pytest.raises(NotImplementedError, match="has no __call__ of its own"):
            base()(IDS, SCORES, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours.FlaxTemperatureLogitsWarper(0.0), r"temperature .* in \(0, inf\), got 0.0"),
        (lambda: ours.FlaxTemperatureLogitsWarper("1"), "temperature .* got '1'"),
        (lambda: ours.FlaxTopPLogitsWarper(1.5), r"top_p must be a number in \[0, 1\], got 1.5"),
        (lambda: ours.FlaxTopPLogitsWarper(0.5, min_tokens_to_keep=0), "min_tokens_to_keep"),
        (lambda: ours.FlaxTopKLogitsWarper(-1), "top_k must be an integer of at least 1, got -1"),
        (lambda: ours.FlaxMinPLogitsWarper(-0.1), "min_p .* got -0.1"),
        (lambda: ours.FlaxTopHLogitsWarper(0.0), r"top_h .* \(0, 1\], got 0.0"),
        (lambda: ours.FlaxTypicalLogitsWarper(1.0), r"typical_p .* \(0, 1\), got 1.0"),
        (lambda: ours.FlaxEpsilonLogitsWarper(1.0), "epsilon_cutoff .* got 1.0"),
        (lambda: ours.FlaxEtaLogitsWarper(0.0), "eta_cutoff .* got 0.0"),
        (lambda: ours.FlaxMinLengthLogitsProcessor(-1, 0), "min_length .* at least 0, got -1"),
        (lambda: ours.FlaxMinLengthLogitsProcessor(1, -1), "eos_token_id .* got -1"),
        (lambda: ours.FlaxNoRepeatNGramLogitsProcessor(0), "ngram_size .* got 0"),
        (lambda: ours.FlaxRepetitionPenaltyLogitsProcessor(0), "repetition_penalty .* got 0"),
        (lambda: ours.FlaxSequenceBiasLogitsProcessor({}), "sequence_bias must be a dictionary"),
        (lambda: ours.FlaxSequenceBiasLogitsProcessor({(): 1.0}), "sequence_bias must be one"),
        (lambda: ours.FlaxNoBadWordsLogitsProcessor([]), "bad_words_ids must be a list"),
        (lambda: ours.FlaxNoBadWordsLogitsProcessor([[-1]]), r"bad_words_ids .* got \[-1\]"),
    ],
)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
