"""Decoding over the key/value cache, as one compiled program: one by one, and beam search.

Shapes: B prompts   P ids of a prompt   R rows decoded (B * beams, or B * samples)
    K beams   N candidates of a beam search   L max_length   V vocabulary
"""

import copy
import dataclasses
import functools
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_flax.generation import logits_processors as processors
from gpt2_flax.model.outputs import FlaxBeamSearchOutput, FlaxGreedySearchOutput, FlaxSampleOutput


class Plan(NamedTuple):
    """What the compiled program depends on, beside shapes and the kinds of processors."""

    max_length: int
    pad_id: int
    eos_ids: tuple[int, ...]  # none: a row never ends
    sample: bool
    num_beams: int
    num_return_sequences: int
    early_stopping: bool | str

    @property
    def rows_of_a_prompt(self) -> int:
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences


class ModelKey:
    """A model as a static argument of jit: equal to another of the same module.

    That of our own classes; a subclass may override the hooks that decoding goes through, so it
    equals only itself. Holds no parameters: they are an argument, and must not outlive the model.
    """

    HOOKS = ("__call__", "prepare_inputs_for_generation", "update_inputs_for_generation")

    def __init__(self, model):
        self.model = copy.copy(model)
        vars(self.model).pop("_params", None)
        self.model._module = model.module.clone(last_logits_only=True)
        self.content = type(model), *module_content(model.module)
        own = type(model).__module__ == "gpt2_flax.pretrained.modeling" and not any(
            name in vars(model) for name in self.HOOKS
        )
        self.original = None if own else weakref.ref(model)

    def __hash__(self):
        return hash(self.content)

    def __eq__(self, other):
        if not isinstance(other, ModelKey) or self.content != other.content:
            return False
        if self.original is None or other.original is None:
            return self.original is other.original
        mine = self.original()
        return mine is not None and mine is other.original()


def module_content(module) -> tuple:
    """What a linen module computes, as something hashable. (GPT2Config has no hash.)"""
    fields = [f.name for f in dataclasses.fields(module)]
    settings = tuple(
        (name, repr(getattr(module, name)))
        for name in fields
        if name not in ("config", "parent", "name")
    )
    return type(module), module.config.to_json_string(), settings


def is_traced(value) -> bool:
    return isinstance(value, jax.core.Tracer)


def is_tracing() -> bool:
    """Whether a transformation of JAX is at work; a nested jit would cache its tracers."""
    return is_traced(jnp.zeros(()))


# ---------------------------------------------------------------- decoding


def decode(key, plan, trace, params, prompt_BxP, prng_key, chain, length_penalty, model_kwargs):
    """Read the prompts once, then one id a step, each step over the cache."""
    model = key.model
    rows = plan.rows_of_a_prompt

    def feed(ids_RxT, kwargs):
        outputs = model(ids_RxT, params=params, return_dict=True, **kwargs)
        return outputs.logits[:, -1], model.update_inputs_for_generation(outputs, dict(kwargs))

    B, P = prompt_BxP.shape
    kwargs = model.prepare_inputs_for_generation(prompt_BxP, plan.max_length, **model_kwargs)
    logits_BxV, kwargs = feed(prompt_BxP, kwargs)
    filler = jnp.full((B, plan.max_length - P), plan.pad_id, jnp.int32)
    ids_BxL = jnp.concatenate([prompt_BxP, filler], axis=1)
    repeat = functools.partial(_repeat_rows, B=B, times=rows)
    ids_RxL, logits_RxV, kwargs = jax.tree.map(repeat, (ids_BxL, logits_BxV, kwargs))

    loop = jax.lax.while_loop if trace else _python_loop
    chain = processors.FlaxLogitsProcessorList(chain)
    start = Step(jnp.int32(P), prng_key, logits_RxV, kwargs)
    if plan.num_beams > 1:
        return _search_beams(plan, loop, feed, chain, ids_RxL, start, length_penalty)
    ids_RxL = _choose_one_by_one(plan, loop, feed, chain, ids_RxL, start)
    return (FlaxSampleOutput if plan.sample else FlaxGreedySearchOutput)(sequences=ids_RxL)


decode_compiled = jax.jit(decode, static_argnums=(0, 1, 2))


class Step(NamedTuple):
    """Where a row is: cur_len ids are there, and the logits of the next."""

    cur_len: Any
    prng_key: Any
    logits_RxV: Any
    kwargs: dict


def _repeat_rows(leaf, B, times):
    """Each row of the batch `times` times; leaves without a batch axis as they are."""
    leaf = jnp.asarray(leaf)
    if times == 1 or leaf.ndim == 0 or leaf.shape[0] != B:
        return leaf
    return jnp.repeat(leaf, times, axis=0)


def _python_loop(condition, body, state):
    while condition(state):
        state = body(state)
    return state


def _is_end(ids, eos_ids):
    if not eos_ids:
        return jnp.zeros(ids.shape, bool)
    return (ids[..., None] == jnp.asarray(eos_ids).reshape((1,) * ids.ndim + (-1,))).any(-1)


def _choose_one_by_one(plan, loop, feed, chain, ids_RxL, start):
    """(R, L): greedy decoding, or sampling."""

    def choose(ids_RxL, done_R, step):
        scores_RxV = chain(ids_RxL, step.logits_RxV, step.cur_len)
        prng_key = step.prng_key
        if plan.sample:
            now, prng_key = jax.random.split(prng_key)
            new_R = jax.random.categorical(now, scores_RxV)
        else:
            new_R = scores_RxV.argmax(-1)
        new_R = jnp.where(done_R, plan.pad_id, new_R).astype(jnp.int32)
        ids_RxL = jax.lax.dynamic_update_slice(ids_RxL, new_R[:, None], (0, step.cur_len))
        return ids_RxL, done_R | _is_end(new_R, plan.eos_ids), new_R, prng_key

    def goes_on(state):
        _, done_R, step = state
        return (step.cur_len < plan.max_length - 1) & ~done_R.all()

    def advance(state):
        ids_RxL, done_R, step = state
        ids_RxL, done_R, new_R, prng_key = choose(*state)
        fed_R = jnp.where(done_R, 0, new_R)  # padding may be no id of the model
        logits_RxV, kwargs = feed(fed_R[:, None], step.kwargs)
        return ids_RxL, done_R, Step(step.cur_len + 1, prng_key, logits_RxV, kwargs)

    # The last id is not fed, so it is chosen after the loop. Where all have ended it is padding.
    done_R = jnp.zeros(ids_RxL.shape[0], bool)
    return choose(*loop(goes_on, advance, (ids_RxL, done_R, start)))[0]


# ---------------------------------------------------------------- beam search

# Added to a score that must not win. Finite, as in PyTorch: -inf - -inf would be NaN.
NEVER = np.float32(-1e9)


class Beams(NamedTuple):
    """Open beams, best first, and the best that have ended."""

    open_ids_BxKxL: Any
    open_scores_BxK: Any  # sums of log-probabilities
    ended_ids_BxKxL: Any
    ended_scores_BxK: Any  # sums over length ** length_penalty
    is_ended_BxK: Any  # False: the slot of ended_ids is still free
    hope_Bx1: Any  # whether an open beam can still beat the worst that has ended


def _search_beams(plan, loop, feed, chain, ids_RxL, start, length_penalty):
    """PyTorch's beam search (transformers 5), which differs from transformers 4's Flax search.

    Only the best K of the N candidates may end; at max_length all do, and are scored like the
    others; a prompt whose ended beams can't be beaten is closed for itself, not with the batch.
    Both apply the processors to log-probabilities.
    """
    L = plan.max_length
    extend = functools.partial(_extend, plan, chain, start.cur_len, length_penalty)

    def is_open(beams):
        all_full = beams.is_ended_BxK.all() if plan.early_stopping is True else jnp.bool_(False)
        return beams.hope_Bx1.any() & ~all_full

    def goes_on(state):
        beams, step = state
        return (step.cur_len < L - 1) & is_open(beams)

    def advance(state):
        beams, step = state
        beams, parents_R, prng_key = extend(beams, step)
        new_BxKx1 = jax.lax.dynamic_slice_in_dim(beams.open_ids_BxKxL, step.cur_len, 1, axis=2)
        kwargs = dict(step.kwargs)
        kwargs["past_key_values"] = jax.tree.map(
            lambda leaf: leaf[parents_R] if leaf.ndim else leaf, kwargs["past_key_values"]
        )
        logits_RxV, kwargs = feed(new_BxKx1.reshape(-1, 1), kwargs)
        return beams, Step(step.cur_len + 1, prng_key, logits_RxV, kwargs)

    beams, step = loop(goes_on, advance, (_first_beams(plan, ids_RxL), start))
    # The last id is not fed. Where the search had closed before, nothing more may change.
    longer, _, _ = extend(beams, step)
    beams = jax.tree.map(functools.partial(jnp.where, is_open(beams)), longer, beams)
    returned = slice(None, plan.num_return_sequences)
    return FlaxBeamSearchOutput(
        sequences=beams.ended_ids_BxKxL[:, returned].reshape(-1, L),
        scores=beams.ended_scores_BxK[:, returned].reshape(-1),
    )


def _first_beams(plan, ids_RxL) -> Beams:
    K, L = plan.num_beams, plan.max_length
    ids_BxKxL = ids_RxL.reshape(-1, K, L)
    B = ids_BxKxL.shape[0]
    first_1xK = jnp.where(jnp.arange(K) == 0, 0.0, NEVER)[None, :]  # the K are still the same
    return Beams(
        open_ids_BxKxL=ids_BxKxL,
        open_scores_BxK=jnp.broadcast_to(first_1xK, (B, K)),
        ended_ids_BxKxL=ids_BxKxL,
        ended_scores_BxK=jnp.full((B, K), NEVER),
        is_ended_BxK=jnp.zeros((B, K), bool),
        hope_Bx1=jnp.ones((B, 1), bool),
    )


def _extend(plan, chain, P, length_penalty, beams, step):
    """The beams one id longer, the rows (R,) that the open ones go on from, the next key."""
    K, L, cur_len = plan.num_beams, plan.max_length, step.cur_len
    B = beams.open_ids_BxKxL.shape[0]
    ids_RxL = beams.open_ids_BxKxL.reshape(B * K, L)
    log_probs_RxV = chain(ids_RxL, jax.nn.log_softmax(step.logits_RxV), cur_len)
    scores_BxKxV = log_probs_RxV.reshape(B, K, -1) + beams.open_scores_BxK[:, :, None]
    prng_key, now = step.prng_key, None
    if plan.sample:
        now, prng_key = jax.random.split(prng_key)
    scores_BxN, parents_BxN, ids_BxNxL = _candidates(plan, beams, scores_BxKxV, now, cur_len)
    new_ids_BxN = jax.lax.dynamic_index_in_dim(ids_BxNxL, cur_len, 2, keepdims=False)
    ends_BxN = _is_end(new_ids_BxN, plan.eos_ids) | (cur_len + 1 == L)
    beams = _close(plan, beams, scores_BxN, ids_BxNxL, ends_BxN, cur_len + 1 - P, length_penalty)
    open_scores_BxK, kept_BxK = jax.lax.top_k(scores_BxN + ends_BxN * NEVER, K)
    beams = beams._replace(
        open_scores_BxK=open_scores_BxK, open_ids_BxKxL=_take(ids_BxNxL, kept_BxK)
    )
    hope_Bx1 = _hope(plan, beams, cur_len + 1 - P, L - P, length_penalty)
    first_row_Bx1 = K * jnp.arange(B)[:, None]
    parents_R = (_take(parents_BxN, kept_BxK) + first_row_Bx1).reshape(-1)
    return beams._replace(hope_Bx1=hope_Bx1), parents_R, prng_key


def _candidates(plan, beams, scores_BxKxV, prng_key, cur_len):
    """The N best, or sampled, continuations: scores (B, N), beams they extend (B, N), ids.

    N leaves K open ones even where all ends of all beams are among them.
    """
    B, K, V = scores_BxKxV.shape
    N = max(2, 1 + len(plan.eos_ids)) * K
    scores = scores_BxKxV.reshape(B, K * V)
    if plan.sample:  # without replacement: the N largest after Gumbel noise (arXiv:1903.06059)
        noisy = scores + jax.random.gumbel(prng_key, scores.shape, scores.dtype)
        chosen_BxN = jax.lax.top_k(noisy, N)[1]
        scores_BxN = jnp.take_along_axis(scores, chosen_BxN, axis=1)
    else:
        scores_BxN, chosen_BxN = jax.lax.top_k(scores, N)
    parents_BxN = chosen_BxN // V
    ids_BxNxL = _take(beams.open_ids_BxKxL, parents_BxN)
    new_BxNx1 = (chosen_BxN % V)[:, :, None].astype(jnp.int32)
    ids_BxNxL = jax.lax.dynamic_update_slice(ids_BxNxL, new_BxNx1, (0, 0, cur_len))
    return scores_BxN, parents_BxN, ids_BxNxL


def _close(plan, beams, scores_BxN, ids_BxNxL, ends_BxN, length, length_penalty):
    """Put the candidates that end among those that have ended before; the best K stay."""
    K, N = plan.num_beams, scores_BxN.shape[1]
    ends_BxN = ends_BxN & (jnp.arange(N) < K)[None, :]
    shut_Bx1 = ~beams.hope_Bx1
    if plan.early_stopping is True:
        shut_Bx1 = shut_Bx1 | beams.is_ended_BxK.all(-1, keepdims=True)
    scores_BxN = scores_BxN / jnp.float32(length) ** length_penalty
    scores_BxN = scores_BxN + shut_Bx1 * NEVER + ~ends_BxN * NEVER
    merged = jnp.concatenate([beams.ended_scores_BxK, scores_BxN], axis=1)
    ended_scores_BxK, kept_BxK = jax.lax.top_k(merged, K)
    ids = jnp.concatenate([beams.ended_ids_BxKxL, ids_BxNxL], axis=1)
    is_ended = jnp.concatenate([beams.is_ended_BxK, ends_BxN], axis=1)
    return beams._replace(
        ended_scores_BxK=ended_scores_BxK,
        ended_ids_BxKxL=_take(ids, kept_BxK),
        is_ended_BxK=_take(is_ended, kept_BxK),
    )


def _hope(plan, beams, length, longest, length_penalty):
    """(B, 1): whether the best open beam could still beat the worst that has ended.

    Its score is taken over the length it has; with early_stopping="never", and where length
    is rewarded, over the longest it may come to have.
    """
    if plan.early_stopping == "never":
        length = jnp.where(length_penalty > 0.0, longest, length)
    best_Bx1 = beams.open_scores_BxK[:, :1] / jnp.float32(length) ** length_penalty
    worst_Bx1 = beams.ended_scores_BxK.min(-1, keepdims=True)
    worst_BxK = jnp.where(beams.is_ended_BxK, worst_Bx1, NEVER)
    return beams.hope_Bx1 & (best_Bx1 > worst_BxK).any(-1, keepdims=True)


def _take(leaf_BxNx_, index_BxM):
    """The rows of axis 1 that index names, for each prompt."""
    index = index_BxM.reshape(index_BxM.shape + (1,) * (leaf_BxNx_.ndim - 2))
    return jnp.take_along_axis(leaf_BxNx_, index, axis=1)
