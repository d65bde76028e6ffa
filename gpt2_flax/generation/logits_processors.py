"""What `generate` does to scores before an id is chosen: the Flax processors of transformers 4.

Shapes: B rows (prompts, times beams or samples), L max_length, V vocabulary.
A processor is called as processor(input_ids_BxL, scores_BxV, cur_len) and returns scores_BxV.
Of input_ids the first cur_len columns are filled. scores are logits, or log-probabilities in
beam search; -inf rules an id out. cur_len may be traced.

The classes below are pytrees: what may change without a new compilation is a leaf.
"""

import inspect
import numbers

import jax
import jax.numpy as jnp
import numpy as np

_PYTREES = set()


def _pytree(*leaves):
    """Class decorator: instances cross jit with the attributes `leaves` as arrays."""

    def register(cls):
        def flatten(processor):
            rest = {k: v for k, v in vars(processor).items() if k not in leaves}
            return [getattr(processor, name) for name in leaves], tuple(sorted(rest.items()))

        def unflatten(rest, values):
            processor = object.__new__(cls)
            vars(processor).update(rest, **dict(zip(leaves, values, strict=True)))
            return processor

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)
        _PYTREES.add(cls)
        return cls

    return register


def is_pytree(processor) -> bool:
    """Whether it is one of the classes below itself; a subclass may hold anything."""
    return type(processor) in _PYTREES


class FlaxLogitsProcessor:
    """Base of the classes that change scores in every mode of decoding."""

    def __call__(self, input_ids, scores, cur_len):
        raise NotImplementedError(f"{type(self).__name__} has no __call__ of its own")


class FlaxLogitsWarper:
    """Base of the classes that `generate` uses in sampling only."""

    def __call__(self, input_ids, scores, cur_len):
        raise NotImplementedError(f"{type(self).__name__} has no __call__ of its own")


class FlaxLogitsProcessorList(list):
    """Processors, applied one after the other."""

    def __call__(self, input_ids, scores, cur_len, **kwargs):
        """scores_BxV. kwargs go to the processors that take more than three arguments."""
        for processor in self:
            names = list(inspect.signature(processor.__call__).parameters)
            missing = [name for name in names[3:] if name not in kwargs]
            if len(names) > 3 and missing:
                raise ValueError(
                    f"{type(processor).__name__} takes {', '.join(names)};"
                    f" pass {', '.join(missing)} to the list by name"
                )
            extra = {name: kwargs[name] for name in names[3:]}
            scores = processor(input_ids, scores, cur_len, **extra)
        return scores


def _check_positive_int(name, value, least=1):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_real(name, value, low, high, open_low=False, open_high=False):
    fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
    fits = fits and (low < value if open_low else low <= value)
    if not (fits and (value < high if open_high else value <= high)):
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(f"{name} must be a number in {left}{low}, {high}{right}, got {value!r}")


def _as_ids(name, ids) -> tuple[int, ...]:
    """One id or several, as a tuple; a negative one or a float is refused."""
    ids = np.asarray(ids)
    if ids.ndim > 1 or ids.size == 0 or ids.dtype.kind not in "iu" or (ids < 0).any():
        raise ValueError(f"{name} must be one token id or several, 0 or above, got {ids.tolist()}")
    return tuple(int(i) for i in ids.reshape(-1))


def _ids_mask(ids, vocab_size):
    """bool (V,): True for the given ids."""
    mask = np.zeros(vocab_size, bool)
    mask[[i for i in ids if i < vocab_size]] = True
    return mask


def _ban(scores_BxV, ids, when=True):
    banned_V = _ids_mask(ids, scores_BxV.shape[-1])
    return jnp.where(jnp.asarray(banned_V)[None, :] & when, -jnp.inf, scores_BxV)


def _force(scores_BxV, ids, when):
    """0 for ids and -inf for all others where `when` holds."""
    forced_V = np.where(_ids_mask(ids, scores_BxV.shape[-1]), 0.0, -np.inf)
    return jnp.where(when, jnp.asarray(forced_V, scores_BxV.dtype)[None, :], scores_BxV)


def _keep(kept_BxV, scores_BxV, warper):
    """filter_value for all that is not kept, but for the min_tokens_to_keep likeliest."""
    if warper.min_tokens_to_keep > 1:
        count = min(warper.min_tokens_to_keep, scores_BxV.shape[-1])
        kept_BxV = kept_BxV | (scores_BxV >= jax.lax.top_k(scores_BxV, count)[0][:, -1:])
    return jnp.where(kept_BxV, scores_BxV, warper.filter_value)


# ---------------------------------------------------------------- sampling


@_pytree("temperature")
class FlaxTemperatureLogitsWarper(FlaxLogitsWarper):
    """Scores over the temperature."""

    def __init__(self, temperature: float):
        _check_real("temperature", temperature, 0, np.inf, open_low=True, open_high=True)
        self.temperature = temperature

    def __call__(self, input_ids, scores, cur_len):
        return scores / self.temperature


@_pytree()
class FlaxTopKLogitsWarper(FlaxLogitsWarper):
    """Only the top_k likeliest, and what ties with the last of them."""

    def __init__(self, top_k: int, filter_value: float = -float("inf"), min_tokens_to_keep=1):
        _check_positive_int("top_k", top_k)
        self.top_k = max(top_k, min_tokens_to_keep)
        self.filter_value = filter_value

    def __call__(self, input_ids, scores, cur_len):
        kth = jax.lax.top_k(scores, min(self.top_k, scores.shape[-1]))[0][:, -1:]
        return jnp.where(scores < kth, self.filter_value, scores)


@_pytree("top_p")
class FlaxTopPLogitsWarper(FlaxLogitsWarper):
    """Only the likeliest whose probabilities first add up to top_p, and ties with the last."""

    def __init__(self, top_p: float, filter_value: float = -float("inf"), min_tokens_to_keep=1):
        _check_real("top_p", top_p, 0, 1)
        _check_positive_int("min_tokens_to_keep", min_tokens_to_keep)
        self.top_p = top_p
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids, scores, cur_len):
        ordered = jnp.sort(scores, axis=-1, descending=True)
        reached = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
        # The likeliest is always in; another is while those before it fall short of top_p.
        inside = jnp.pad(reached[:, :-1] < self.top_p, ((0, 0), (1, 0)), constant_values=True)
        least = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
        return _keep(scores >= least, scores, self)


@_pytree("min_p")
class FlaxMinPLogitsWarper(FlaxLogitsWarper):
    """Only what is at least min_p times as likely as the likeliest (arXiv:2407.01082)."""

    def __init__(self, min_p: float, filter_value: float = -float("inf"), min_tokens_to_keep=1):
        _check_real("min_p", min_p, 0, 1)
        _check_positive_int("min_tokens_to_keep", min_tokens_to_keep)
        self.min_p = min_p
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids, scores, cur_len):
        probs = jax.nn.softmax(scores, axis=-1)
        return _keep(probs >= self.min_p * probs.max(-1, keepdims=True), scores, self)


@_pytree("top_h")
class FlaxTopHLogitsWarper(FlaxLogitsWarper):
    """Of the 100 likeliest those whose entropy adds up to top_h of theirs (arXiv:2509.02510)."""

    candidates = 100

    def __init__(self, top_h: float, filter_value: float = -float("inf")):
        _check_real("top_h", top_h, 0, 1, open_low=True)
        self.top_h = top_h
        self.filter_value = filter_value

    def __call__(self, input_ids, scores, cur_len):
        ordered = jax.lax.top_k(scores, min(self.candidates, scores.shape[-1]))[0]
        terms = _entropy_terms(jax.nn.log_softmax(ordered, axis=-1))
        inside = jnp.cumsum(terms, axis=-1) <= self.top_h * terms.sum(-1, keepdims=True)
        inside = inside.at[:, 0].set(True)
        least = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
        return jnp.where(scores >= least, scores, self.filter_value)


def _entropy_terms(log_probs):
    return jnp.where(jnp.isneginf(log_probs), 0.0, -jnp.exp(log_probs) * log_probs)


@_pytree("mass")
class FlaxTypicalLogitsWarper(FlaxLogitsWarper):
    """Only those whose surprise is nearest the entropy, up to a probability of `mass`.

    Locally typical sampling, arXiv:2202.00666.
    """

    def __init__(self, mass: float = 0.9, filter_value=-float("inf"), min_tokens_to_keep=1):
        _check_real("typical_p", mass, 0, 1, open_low=True, open_high=True)
        _check_positive_int("min_tokens_to_keep", min_tokens_to_keep)
        self.mass = mass
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids, scores, cur_len):
        log_probs = jax.nn.log_softmax(scores, axis=-1)
        entropy = _entropy_terms(log_probs).sum(-1, keepdims=True)
        distance = jnp.abs(-log_probs - entropy)
        ordered, probs = jax.lax.sort((distance, jnp.exp(log_probs)), num_keys=1)
        last = (jnp.cumsum(probs, axis=-1) < self.mass).sum(-1, keepdims=True)
        # The first min_tokens_to_keep are counted by distance, as in PyTorch, not by likelihood.
        last = jnp.clip(last, self.min_tokens_to_keep - 1, scores.shape[-1] - 1)
        farthest = jnp.take_along_axis(ordered, last, axis=-1)
        return jnp.where(distance <= farthest, scores, self.filter_value)


@_pytree("epsilon")
class FlaxEpsilonLogitsWarper(FlaxLogitsWarper):
    """Only what is at least as likely as epsilon (arXiv:2210.15191)."""

    def __init__(self, epsilon: float, filter_value=-float("inf"), min_tokens_to_keep=1):
        _check_real("epsilon_cutoff", epsilon, 0, 1, open_low=True, open_high=True)
        _check_positive_int("min_tokens_to_keep", min_tokens_to_keep)
        self.epsilon = epsilon
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids, scores, cur_len):
        likely = jax.nn.softmax(scores, axis=-1) >= self.epsilon
        return _keep(likely | (scores >= scores.max(-1, keepdims=True)), scores, self)


@_pytree("epsilon")
class FlaxEtaLogitsWarper(FlaxLogitsWarper):
    """As epsilon, but lower where the entropy is high (arXiv:2210.15191)."""

    def __init__(self, epsilon: float, filter_value=-float("inf"), min_tokens_to_keep=1):
        _check_real("eta_cutoff", epsilon, 0, 1, open_low=True, open_high=True)
        _check_positive_int("min_tokens_to_keep", min_tokens_to_keep)
        self.epsilon = epsilon
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids, scores, cur_len):
        log_probs = jax.nn.log_softmax(scores, axis=-1)
        entropy = _entropy_terms(log_probs).sum(-1, keepdims=True)
        eta = jnp.minimum(self.epsilon, jnp.sqrt(self.epsilon) * jnp.exp(-entropy))
        likely = jnp.exp(log_probs) >= eta
        return _keep(likely | (scores >= scores.max(-1, keepdims=True)), scores, self)


# ---------------------------------------------------------------- ids forced and banned


@_pytree()
class FlaxForcedBOSTokenLogitsProcessor(FlaxLogitsProcessor):
    """The second id of a text, after a prompt of one, is bos_token_id."""

    def __init__(self, bos_token_id: int):
        self.bos_token_id = bos_token_id

    def __call__(self, input_ids, scores, cur_len):
        return _force(scores, (self.bos_token_id,), cur_len == 1)


@_pytree()
class FlaxForcedEOSTokenLogitsProcessor(FlaxLogitsProcessor):
    """The last id that fits is eos_token_id, or one of several."""

    def __init__(self, max_length: int, eos_token_id):
        self.max_length = max_length
        self.eos_token_id = _as_ids("forced_eos_token_id", eos_token_id)

    def __call__(self, input_ids, scores, cur_len):
        return _force(scores, self.eos_token_id, cur_len == self.max_length - 1)


@_pytree("min_length")
class FlaxMinLengthLogitsProcessor(FlaxLogitsProcessor):
    """No end (eos_token_id: one or several) before min_length ids are there.

    As PyTorch counts: an end may stand at index min_length. transformers 4's Flax class kept
    it out there too.
    """

    def __init__(self, min_length: int, eos_token_id):
        _check_positive_int("min_length", min_length, least=0)
        self.min_length = min_length
        self.eos_token_id = _as_ids("eos_token_id", eos_token_id)

    def __call__(self, input_ids, scores, cur_len):
        return _ban(scores, self.eos_token_id, cur_len < self.min_length)


@_pytree()
class FlaxSuppressTokensAtBeginLogitsProcessor(FlaxLogitsProcessor):
    """None of begin_suppress_tokens at index begin_index."""

    def __init__(self, begin_suppress_tokens, begin_index: int):
        self.begin_suppress_tokens = tuple(begin_suppress_tokens)
        self.begin_index = begin_index

    def __call__(self, input_ids, scores, cur_len):
        return _ban(scores, self.begin_suppress_tokens, cur_len == self.begin_index)


@_pytree()
class FlaxSuppressTokensLogitsProcessor(FlaxLogitsProcessor):
    """None of suppress_tokens anywhere."""

    def __init__(self, suppress_tokens):
        self.suppress_tokens = tuple(suppress_tokens)

    def __call__(self, input_ids, scores, cur_len):
        return _ban(scores, self.suppress_tokens)


@_pytree("force_token_array")
class FlaxForceTokensLogitsProcessor(FlaxLogitsProcessor):
    """At the indices of force_token_map, pairs (index, id), the id given there; None: any."""

    def __init__(self, force_token_map):
        ids = {index: id for index, id in dict(force_token_map).items() if id is not None}
        array = np.full(max(dict(force_token_map), default=-1) + 1, -1, np.int32)
        array[list(ids)] = list(ids.values())
        self.force_token_array = jnp.asarray(array)

    def __call__(self, input_ids, scores, cur_len):
        length = self.force_token_array.shape[0]
        if length == 0:
            return scores
        forced = self.force_token_array[jnp.minimum(cur_len, length - 1)]
        chosen_V = jnp.arange(scores.shape[-1]) == forced
        scores_V = jnp.where(chosen_V, 0.0, -jnp.inf).astype(scores.dtype)
        return jnp.where((cur_len < length) & (forced >= 0), scores_V[None, :], scores)


# ---------------------------------------------------------------- repetition


def _real_ids(input_ids_BxL, starts_B, cur_len, vocab_size):
    """The ids, with vocab_size at what is padding on the left or is not yet filled."""
    index_1xL = jnp.arange(input_ids_BxL.shape[1])[None, :]
    real_BxL = index_1xL < cur_len
    if starts_B is not None:
        real_BxL = real_BxL & (index_1xL >= jnp.asarray(starts_B).reshape(-1, 1))
    return jnp.where(real_BxL, input_ids_BxL, vocab_size)


def _seen(ids_BxN, vocab_size):
    """bool (B, V): which ids occur in a row; vocab_size and above count for nothing."""
    rows_Bx1 = jnp.arange(ids_BxN.shape[0])[:, None]
    seen = jnp.zeros((ids_BxN.shape[0], vocab_size), bool)
    return seen.at[rows_Bx1, ids_BxN].set(True, mode="drop")


@_pytree("penalty", "prompt_ignore_length")
class FlaxRepetitionPenaltyLogitsProcessor(FlaxLogitsProcessor):
    """Scores of ids that have occurred are divided by the penalty, negative ones multiplied.

    prompt_ignore_length: how many ids at the start don't count, an integer or (B,).
    """

    def __init__(self, penalty: float, prompt_ignore_length=None):
        _check_real("repetition_penalty", penalty, 0, np.inf, open_low=True, open_high=True)
        self.penalty = penalty
        self.prompt_ignore_length = prompt_ignore_length

    def __call__(self, input_ids, scores, cur_len):
        V = scores.shape[-1]
        ids = _real_ids(input_ids, self.prompt_ignore_length, cur_len, V)
        penalized = jnp.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return jnp.where(_seen(ids, V), penalized, scores)


@_pytree("prompt_ignore_length")
class FlaxNoRepeatNGramLogitsProcessor(FlaxLogitsProcessor):
    """No ngram_size ids in a row occur twice.

    prompt_ignore_length: how many ids at the start don't count, an integer or (B,).
    """

    def __init__(self, ngram_size: int, prompt_ignore_length=None):
        _check_positive_int("ngram_size", ngram_size)
        self.ngram_size = ngram_size
        self.prompt_ignore_length = prompt_ignore_length

    def __call__(self, input_ids, scores, cur_len):
        (B, L), V, n = input_ids.shape, scores.shape[-1], self.ngram_size
        if n > L:
            return scores
        ids = _real_ids(input_ids, self.prompt_ignore_length, cur_len, V)
        # Of each n-gram in the row: do its first n - 1 ids equal the latest n - 1?
        equal = jnp.ones((B, L - n + 1), bool)
        for j in range(n - 1):
            at = jnp.maximum(cur_len - (n - 1) + j, 0)
            latest = jax.lax.dynamic_slice_in_dim(ids, at, 1, axis=1)
            equal = equal & (ids[:, j : j + L - n + 1] == latest)
        last_ids = jnp.where(equal & (cur_len >= n), ids[:, n - 1 :], V)
        return jnp.where(_seen(last_ids, V), -jnp.inf, scores)


@_pytree()
class FlaxSequenceBiasLogitsProcessor(FlaxLogitsProcessor):
    """Adds a bias to the last id of a sequence wherever the ids before it have just occurred.

    sequence_bias: {(id, ...): bias}, or [[[id, ...], bias], ...].
    """

    def __init__(self, sequence_bias):
        if not isinstance(sequence_bias, dict | list | tuple) or not sequence_bias:
            raise ValueError(
                "sequence_bias must be a dictionary {(id, ...): bias} or a list"
                f" [[[id, ...], bias], ...] that is not empty, got {sequence_bias!r}"
            )
        pairs = sequence_bias.items() if isinstance(sequence_bias, dict) else sequence_bias
        self.sequence_bias = tuple((_as_ids("sequence_bias", s), float(b)) for s, b in pairs)

    def __call__(self, input_ids, scores, cur_len):
        V, L = scores.shape[-1], input_ids.shape[1]
        single_V, bias = np.zeros(V, scores.dtype), jnp.zeros_like(scores)
        for ids, value in self.sequence_bias:
            n = len(ids) - 1
            if n == 0:
                single_V[ids[0]] = value
            elif n <= L:
                latest = jax.lax.dynamic_slice_in_dim(input_ids, cur_len - n, n, axis=1)
                hit_B = (latest == jnp.asarray(ids[:-1])[None, :]).all(-1) & (cur_len >= n)
                bias = bias.at[:, ids[-1]].add(jnp.where(hit_B, value, 0.0))
        return scores + jnp.asarray(single_V)[None, :] + bias


@_pytree()
class FlaxNoBadWordsLogitsProcessor(FlaxSequenceBiasLogitsProcessor):
    """None of the sequences of ids in bad_words_ids; an end alone is not a bad word."""

    def __init__(self, bad_words_ids, eos_token_id=None):
        if not isinstance(bad_words_ids, list | tuple) or not bad_words_ids:
            raise ValueError(
                f"bad_words_ids must be a list of lists of ids, not empty, got {bad_words_ids!r}"
            )
        ends = () if eos_token_id is None else _as_ids("eos_token_id", eos_token_id)
        words = [_as_ids("bad_words_ids", word) for word in bad_words_ids]
        self.sequence_bias = tuple(
            (word, -np.inf) for word in words if len(word) > 1 or word[0] not in ends
        )


# ---------------------------------------------------------------- the rest


@_pytree("regulation_factor")
class FlaxExponentialDecayLengthPenalty(FlaxLogitsProcessor):
    """From a number of new ids on, (start, factor), ends become likelier with each id."""

    def __init__(self, exponential_decay_length_penalty, eos_token_id, input_ids_seq_length: int):
        start, self.regulation_factor = exponential_decay_length_penalty
        self.regulation_start = start + input_ids_seq_length
        self.eos_token_id = _as_ids("eos_token_id", eos_token_id)

    def __call__(self, input_ids, scores, cur_len):
        beyond = jnp.maximum(cur_len - self.regulation_start, 0)
        growth = jnp.power(jnp.float32(self.regulation_factor), beyond) - 1
        is_end_V = jnp.asarray(_ids_mask(self.eos_token_id, scores.shape[-1]))
        raised = scores + (jnp.abs(scores) * growth).astype(scores.dtype)
        return jnp.where(is_end_V[None, :] & jnp.isfinite(scores), raised, scores)


@_pytree()
class FlaxInfNanRemoveLogitsProcessor(FlaxLogitsProcessor):
    """0 for NaN, and the largest and the smallest number for the infinities."""

    def __call__(self, input_ids, scores, cur_len):
        return jnp.nan_to_num(scores)


@_pytree()
class FlaxLogitNormalization(FlaxLogitsProcessor):
    """Scores as log-probabilities: they add up to 1 again after others have changed them."""

    def __call__(self, input_ids, scores, cur_len):
        return jax.nn.log_softmax(scores, axis=-1)
