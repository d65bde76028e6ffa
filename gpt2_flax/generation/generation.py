"""`FlaxGPT2LMHeadModel.generate`: what a call asks for, made into a plan and processors.

Shapes: B prompts   P ids of a prompt   R rows decoded (B * beams, or B * samples)
"""

import copy
import inspect
import logging
import operator
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from transformers import GenerationConfig

from gpt2_flax.errors import UserError
from gpt2_flax.generation import decoding
from gpt2_flax.generation import logits_processors as processors
from gpt2_flax.generation.decoding import ModelKey, Plan, is_traced, is_tracing

logger = logging.getLogger(__name__)

# transformers 5 leaves a field at None where nobody has set it; these are what it then means.
DEFAULTS = {
    "max_length": 20, "min_length": 0, "do_sample": False, "num_beams": 1,
    "num_return_sequences": 1, "early_stopping": False, "length_penalty": 1.0,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "forced_decoder_ids": None,
}  # fmt: skip

OBEYED = (
    "max_new_tokens", "min_new_tokens", "pad_token_id", "eos_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids",
    "sequence_bias", "no_repeat_ngram_size", "repetition_penalty", "remove_invalid_values",
    "exponential_decay_length_penalty", "renormalize_logits", "min_p", "top_h", "typical_p",
    "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip

# Without influence on what GPT-2 generates, or only on how an assistant model would be used.
IGNORED = (
    "bos_token_id", "decoder_start_token_id", "use_cache", "return_dict_in_generate",
    "transformers_version", "assistant_confidence_threshold", "assistant_lookbehind",
    "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "target_lookbehind",
)  # fmt: skip

# What generate can't do, with the values that ask for nothing.
REFUSED = {
    "assistant_early_exit": (None,), "assistant_ensemble_weight": (None,),
    "cache_config": (None,), "cache_implementation": (None, "static"), "compile_config": (None,),
    "constraints": (None,), "continuous_batching_config": (None,),
    "disable_compile": (None, False), "diversity_penalty": (None, 0.0), "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0), "encoder_repetition_penalty": (None, 1.0),
    "force_words_ids": (None,), "guidance_scale": (None, 1.0), "is_assistant": (None, False),
    "low_memory": (None, False), "max_cache_len": (None,), "max_time": (None,),
    "num_beam_groups": (None, 1), "output_logits": (None, False), "output_scores": (None, False),
    "penalty_alpha": (None, 0.0), "prefill_chunk_size": (None,),
    "prompt_lookup_num_tokens": (None,), "speculation_type": (None,), "stop_strings": (None,),
    "token_healing": (None, False), "use_mtp": (None, False), "watermarking_config": (None,),
}  # fmt: skip
# A model's configuration may hold these for the sake of model(...), so only a request counts.
REFUSED_ON_REQUEST = {"output_attentions": (None, False), "output_hidden_states": (None, False)}


def generate(
    model,
    input_ids,
    generation_config=None,
    prng_key=None,
    trace: bool = True,
    params=None,
    logits_processor=None,
    **kwargs,
):
    """Continue prompts: greedily, by sampling, by beam search, or by a sampling beam search.

    input_ids: integers (B, P), shorter prompts padded on the left and `attention_mask` (B, P)
    False there. Returns FlaxGreedySearchOutput, FlaxSampleOutput or FlaxBeamSearchOutput, whose
    sequences are int32 (B * num_return_sequences, max_length): prompts included, padded with
    pad_token_id (else the first eos_token_id, else 0) after their end.

    generation_config: a transformers.GenerationConfig (default: model.generation_config);
    keyword arguments with the names of its fields override it. Processors run in PyTorch's
    order. `use_cache` changes no id and is ignored, and so is `return_dict_in_generate`.
    prng_key: default jax.random.PRNGKey(0), so that samples repeat. The noise of a row depends
    on its index. trace: False runs a Python loop, one step at a time, for debugging.
    params: instead of the model's. logits_processor: callables (input_ids, scores, cur_len)
    -> scores; they are compiled in, and anew when their attributes change.

    Raises ValueError for settings that can't be obeyed, unknown arguments and ids, and lengths
    beyond the model's positions; TypeError for a model without a head.
    """
    if not model.can_generate():
        raise TypeError(
            f"{type(model).__name__} has no language-model head; use FlaxGPT2LMHeadModel"
        )
    options, model_kwargs = _read_options(model, generation_config, kwargs)
    vocab_size = model.config.vocab_size
    prompt_BxP, mask_BxP = _check_prompt(
        input_ids, model_kwargs.pop("attention_mask", None), vocab_size
    )
    P = prompt_BxP.shape[1]
    _set_lengths(options, P, model.config.n_positions, kwargs)
    _check_token_ids(options, vocab_size)
    plan = _make_plan(options)
    if mask_BxP is not None:
        model_kwargs["attention_mask"] = mask_BxP
    if not trace:
        _warn_of_right_padding(prompt_BxP, mask_BxP, options.pad_token_id, plan)

    chain = _build_processors(options, plan, P, _starts(mask_BxP, plan), logits_processor)
    if not plan.sample:
        prng_key = None
    elif prng_key is None:
        prng_key = jax.random.PRNGKey(0)
    run = decoding.decode_compiled if trace and not is_tracing() else decoding.decode
    return run(
        ModelKey(model),
        plan,
        trace,
        model.params if params is None else params,
        prompt_BxP,
        prng_key,
        list(chain),
        float(options.length_penalty),
        model_kwargs,
    )


def continue_text(
    model,
    tokenizer,
    prompt,
    max_new_tokens,
    temperature,
    top_k,
    top_p,
    seed,
    *,
    params=None,
    step: int | None = None,
) -> str:
    """A prompt and what the model makes of it, up to an end of text. An empty prompt: a new text.

    temperature 0 takes the likeliest id each time. params: instead of the model's. step: of
    training, so that the noise of the same seed is another at each.
    Raises UserError for values out of range.
    """
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eos_id]
    if max_new_tokens < 1 or top_k < 0 or temperature < 0:
        raise UserError("max_new_tokens must be 1 or more, top_k and temperature 0 or more")
    eos_id = tokenizer.eos_id
    options = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos_id, pad_token_id=eos_id
    )
    if temperature > 0:
        options.update(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    key = jax.random.key(seed)
    if step is not None:
        key = jax.random.fold_in(key, step)
    try:
        prompt_1xP = np.asarray(ids, np.int32)[None, :]
        out = generate(model, prompt_1xP, options, prng_key=key, params=params)
    except ValueError as error:
        raise UserError(str(error)) from error
    new = np.asarray(out.sequences)[0, len(ids) :]
    ends = np.flatnonzero(new == eos_id)
    return prompt + tokenizer.decode(new[: ends[0]] if len(ends) else new)


# ---------------------------------------------------------------- settings


def _read_options(model, generation_config, kwargs):
    """(a GenerationConfig of its own with nothing unset, arguments for the model's hook)."""
    _refuse(generation_config, REFUSED_ON_REQUEST)
    options = copy.deepcopy(
        _models_own_options(model) if generation_config is None else generation_config
    )
    options._max_length_is_set = kwargs.get("max_length", options.max_length) is not None
    for name, value in DEFAULTS.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    left = options.update(**kwargs)
    _refuse(options, REFUSED)
    for name, values in REFUSED_ON_REQUEST.items():
        if kwargs.get(name) not in values:
            _raise_refused(name, kwargs[name], values)
    known = {*DEFAULTS, *OBEYED, *IGNORED, *REFUSED, *REFUSED_ON_REQUEST}
    for name, value in vars(options).items():
        if value is not None and name not in known and not name.startswith("_"):
            raise ValueError(
                f"the generation_config sets {name}={value!r}, which generate does not know;"
                " set it to None"
            )
    left = {name: value for name, value in left.items() if value is not None}
    _check_model_kwargs(model, left)
    return options, left


def _models_own_options(model):
    """model.generation_config, renewed where the user has set something on model.config."""
    options = model.generation_config
    untouched = options._from_model_config and (
        getattr(options, "_original_object_hash", None) == hash(options)
    )
    if not untouched:
        return options
    renewed = GenerationConfig.from_model_config(model.config)
    outputs = {"return_dict_in_generate", "use_cache", *REFUSED_ON_REQUEST}
    before, after = options.to_dict(), renewed.to_dict()
    changed = sorted(
        name
        for name in before.keys() | after.keys()
        if name not in outputs and before.get(name) != after.get(name)
    )
    if not changed:
        return options
    warnings.warn(
        f"model.config sets {', '.join(changed)} for generate; this still works, but"
        " model.generation_config is the place for it",
        stacklevel=4,
    )
    model.generation_config = renewed
    return renewed


def _refuse(options, refused):
    for name, values in refused.items():
        value = getattr(options, name, None)
        if not any(value is other or value == other for other in values):
            _raise_refused(name, value, values)


def _raise_refused(name, value, values):
    raise ValueError(
        f"generate can't obey {name}={value!r}; leave it out"
        f" (values it takes: {', '.join(map(repr, values))})"
    )


def _check_model_kwargs(model, model_kwargs):
    known = set(inspect.signature(model.prepare_inputs_for_generation).parameters)
    if known & {"kwargs", "model_kwargs"}:
        known |= set(inspect.signature(model.__call__).parameters)
    unknown = [name for name in model_kwargs if name not in known]
    if unknown:
        raise ValueError(
            f"generate got unknown arguments: {', '.join(unknown)}; neither a field of"
            f" GenerationConfig nor an argument of {type(model).__name__}"
            ".prepare_inputs_for_generation"
        )


def _check_prompt(input_ids, attention_mask, vocab_size):
    """(int32 (B, P), int32 mask (B, P) or None). Values are looked at where there are any."""
    ids = input_ids if is_traced(input_ids) else np.asarray(input_ids)
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(
            f"input_ids must be of shape (rows, ids of a prompt), neither of them 0, got"
            f" {tuple(ids.shape)}; one prompt is [ids], and an empty one begins with the"
            " end-of-text id"
        )
    if ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids must be integers, got {ids.dtype}")
    if not is_traced(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(
            f"input_ids holds {bad}, but the model's vocabulary has the ids 0 to {vocab_size - 1};"
            " is the tokenizer another model's?"
        )
    if attention_mask is None:
        return jnp.asarray(ids, jnp.int32), None
    mask = attention_mask if is_traced(attention_mask) else np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {ids.shape}, got {mask.shape}"
        )
    return jnp.asarray(ids, jnp.int32), jnp.asarray(mask != 0, jnp.int32)


def _set_lengths(options, P, n_positions, kwargs):
    """Make max_length and min_length the lengths of whole sequences, prompts included."""
    if options.max_new_tokens is not None:
        if kwargs.get("max_length") is not None:
            logger.warning(
                "both max_new_tokens=%s and max_length=%s are set; max_new_tokens counts",
                options.max_new_tokens,
                options.max_length,
            )
        options.max_length = P + _as_int("max_new_tokens", options.max_new_tokens)
    elif not options._max_length_is_set:
        options.max_length = min(DEFAULTS["max_length"], n_positions)
        warnings.warn(
            f"neither max_new_tokens nor max_length is set: sequences end at max_length="
            f"{options.max_length}, prompt included; set max_new_tokens",
            stacklevel=4,
        )
    options.max_length = _as_int("max_length", options.max_length)
    if options.max_length > n_positions:
        raise ValueError(
            f"{P} prompt ids and {options.max_length - P} new ones are more than the model's"
            f" {n_positions} positions; shorten the prompt, or ask for at most"
            f" {max(0, n_positions - P)} new ones"
        )
    if options.max_length <= P:
        raise ValueError(
            f"max_length={options.max_length} leaves no room after a prompt of {P} ids;"
            " set max_new_tokens"
        )
    if options.min_new_tokens is not None:
        options.min_length = P + _as_int("min_new_tokens", options.min_new_tokens)
    if options.min_length is not None and options.min_length > options.max_length:
        raise ValueError(
            f"min_length={options.min_length} is more than max_length={options.max_length}"
            f" (both count the prompt of {P} ids)"
        )


def _as_int(name, value) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def _check_token_ids(options, vocab_size):
    """Raise ValueError for ids outside the vocabulary that would be forced or suppressed."""
    forced = [id for _, id in options.forced_decoder_ids or () if id is not None]
    biased = options.sequence_bias or {}
    given = {
        "forced_bos_token_id": options.forced_bos_token_id,
        "forced_eos_token_id": options.forced_eos_token_id,
        "suppress_tokens": options.suppress_tokens,
        "begin_suppress_tokens": options.begin_suppress_tokens,
        "forced_decoder_ids": forced,
        "bad_words_ids": [id for word in options.bad_words_ids or () for id in word],
        "sequence_bias": [
            id for entry in biased for id in (entry if isinstance(biased, dict) else entry[0])
        ],
    }
    for name, ids in given.items():
        for id in () if ids is None else np.asarray(ids).reshape(-1).tolist():
            if not (isinstance(id, int) and 0 <= id < vocab_size):
                raise ValueError(
                    f"{name} holds {id!r}, but the model's vocabulary has the ids 0 to"
                    f" {vocab_size - 1}"
                )


def _make_plan(options) -> Plan:
    eos = options.eos_token_id
    eos_ids = () if eos is None else tuple(int(id) for id in np.asarray(eos).reshape(-1))
    if options.pad_token_id is not None:
        pad_id = int(options.pad_token_id)
    else:
        pad_id = eos_ids[0] if eos_ids else 0
    num_beams = _as_int("num_beams", 1 if options.num_beams is None else options.num_beams)
    returned = options.num_return_sequences
    returned = 1 if returned is None else _as_int("num_return_sequences", returned)
    if min(num_beams, returned) < 1:
        raise ValueError(
            f"num_beams and num_return_sequences must be 1 or more, got {num_beams} and {returned}"
        )
    return Plan(
        max_length=options.max_length,
        pad_id=pad_id,
        eos_ids=eos_ids,
        sample=bool(options.do_sample),
        num_beams=num_beams,
        num_return_sequences=returned,
        early_stopping=options.early_stopping or False,
    )


def _starts(mask_BxP, plan):
    """(R,) index of each row's first real id, None without a mask."""
    if mask_BxP is None:
        return None
    return jnp.repeat(mask_BxP.argmax(-1), plan.rows_of_a_prompt)


def _warn_of_right_padding(prompt_BxP, mask_BxP, pad_token_id, plan):
    pad_id = plan.pad_id if pad_token_id is not None or plan.eos_ids else None
    last_is_padding = prompt_BxP[:, -1] == pad_id if pad_id is not None else np.zeros(1)
    if mask_BxP is not None:
        last_is_padding = mask_BxP[:, -1] == 0
    if np.any(last_is_padding):
        logger.warning(
            "a prompt ends in padding, and would be continued after it;"
            " pad on the left (padding_side='left' of the tokenizer)"
        )


# ---------------------------------------------------------------- processors


def _build_processors(options, plan, P, starts_R, custom):
    """All that acts on scores, in PyTorch's order: processors, the caller's, warpers."""
    chain = _score_processors(options, plan, P, starts_R)
    for processor in custom or ():
        if type(processor) in {type(built) for built in chain}:
            raise ValueError(
                f"logits_processor holds a {type(processor).__name__}, and the arguments or the"
                " generation_config ask for one as well; give one of the two"
            )
    chain += [p if processors.is_pytree(p) else Custom(p) for p in custom or ()]
    if plan.sample:
        chain += _warpers(options, plan)
    if options.renormalize_logits:
        chain.append(processors.FlaxLogitNormalization())
    return chain


def _score_processors(options, plan, P, starts_R) -> list:
    o, ends = options, [id for id in plan.eos_ids if id >= 0]
    chain: list[processors.FlaxLogitsProcessor] = []
    if o.sequence_bias is not None:
        chain.append(processors.FlaxSequenceBiasLogitsProcessor(o.sequence_bias))
    if o.repetition_penalty not in (None, 1.0):
        penalty = processors.FlaxRepetitionPenaltyLogitsProcessor
        chain.append(penalty(o.repetition_penalty, starts_R))
    if o.no_repeat_ngram_size:
        chain.append(processors.FlaxNoRepeatNGramLogitsProcessor(o.no_repeat_ngram_size, starts_R))
    if o.bad_words_ids is not None:
        chain.append(processors.FlaxNoBadWordsLogitsProcessor(o.bad_words_ids, ends or None))
    if o.min_length and ends:
        chain.append(processors.FlaxMinLengthLogitsProcessor(o.min_length, ends))
    if o.forced_bos_token_id is not None:
        chain.append(processors.FlaxForcedBOSTokenLogitsProcessor(o.forced_bos_token_id))
    if o.forced_eos_token_id is not None:
        forced = processors.FlaxForcedEOSTokenLogitsProcessor
        chain.append(forced(o.max_length, o.forced_eos_token_id))
    if o.remove_invalid_values:
        chain.append(processors.FlaxInfNanRemoveLogitsProcessor())
    if o.exponential_decay_length_penalty is not None:
        if not ends:
            raise ValueError("exponential_decay_length_penalty needs an eos_token_id")
        decay = processors.FlaxExponentialDecayLengthPenalty
        chain.append(decay(o.exponential_decay_length_penalty, ends, P))
    if o.suppress_tokens:
        chain.append(processors.FlaxSuppressTokensLogitsProcessor(o.suppress_tokens))
    if o.begin_suppress_tokens:
        at_begin = processors.FlaxSuppressTokensAtBeginLogitsProcessor
        chain.append(at_begin(o.begin_suppress_tokens, _begin_index(o, P)))
    if o.forced_decoder_ids:
        pairs = [(P + index - 1, id) for index, id in o.forced_decoder_ids]
        chain.append(processors.FlaxForceTokensLogitsProcessor(pairs))
    return chain


def _begin_index(options, P) -> int:
    """Where the first id stands that nothing forces."""
    begin = P + 1 if P == 1 and options.forced_bos_token_id is not None else P
    return begin + (options.forced_decoder_ids[-1][0] if options.forced_decoder_ids else 0)


def _warpers(options, plan) -> list:
    o = options
    # A beam search must find at least one id that is no end.
    least = max(2, len(plan.eos_ids) + 1) if plan.num_beams > 1 else 1
    kept = {"min_tokens_to_keep": least}
    warpers: list[processors.FlaxLogitsWarper] = []
    if o.temperature not in (None, 1.0):
        warpers.append(processors.FlaxTemperatureLogitsWarper(o.temperature))
    if o.top_h is not None:
        warpers.append(processors.FlaxTopHLogitsWarper(o.top_h))
    if o.top_k not in (None, 0):
        warpers.append(processors.FlaxTopKLogitsWarper(o.top_k, **kept))
    if o.top_p not in (None, 1.0):
        warpers.append(processors.FlaxTopPLogitsWarper(o.top_p, **kept))
    if o.min_p is not None:
        warpers.append(processors.FlaxMinPLogitsWarper(o.min_p, **kept))
    if o.typical_p not in (None, 1.0):
        warpers.append(processors.FlaxTypicalLogitsWarper(o.typical_p, **kept))
    if o.epsilon_cutoff not in (None, 0.0):
        warpers.append(processors.FlaxEpsilonLogitsWarper(o.epsilon_cutoff, **kept))
    if o.eta_cutoff not in (None, 0.0):
        warpers.append(processors.FlaxEtaLogitsWarper(o.eta_cutoff, **kept))
    return warpers


@jax.tree_util.register_pytree_node_class
class Custom:
    """A caller's processor: no arrays to jit, but part of what is compiled."""

    def __init__(self, processor, state=None):
        self.processor = processor
        self.state = _content(getattr(processor, "__dict__", None)) if state is None else state

    def __call__(self, input_ids, scores, cur_len):
        one = processors.FlaxLogitsProcessorList([self.processor])
        return one(input_ids, scores, cur_len)

    def tree_flatten(self):
        return (), (ById(self.processor), self.state)

    @classmethod
    def tree_unflatten(cls, aux, _):
        return cls(aux[0].value, aux[1])


def _content(value):
    """What a processor's attributes hold, as something hashable; the unknown by identity."""
    if isinstance(value, dict):
        return tuple((_content(key), _content(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_content, value))
    if isinstance(value, np.ndarray | jax.Array) and not is_traced(value):
        array = np.asarray(value)
        return array.dtype.name, array.shape, array.tobytes()
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return type(value), value
    return ById(value)


class ById:
    """Hashable by identity, whatever the value."""

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return id(self.value)

    def __eq__(self, other):
        return isinstance(other, ById) and self.value is other.value
