"""Decoding over the key/value cache, as one compiled program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_flax.errors import UserError

# Shapes: B prompts, P ids of a prompt, N new ids, V vocabulary.


def generate(
    module,
    params,
    prompt_BxP,
    max_new_tokens: int,
    *,
    key=None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | None = None,
):
    """int32 (B, P + N): the prompts and what follows them.

    key: None for the likeliest id each time, else the randomness of sampling.
    temperature: logits are divided by it. top_k: only the k likeliest (0: all).
    top_p: only the likeliest that together reach this probability (1: all), after top_k.
    eos_id: a row that has produced it goes on with it.
    Raises ValueError where the model has no positions for P + N ids.
    """
    P = prompt_BxP.shape[1]
    limit = module.config.n_positions
    if P < 1:
        raise ValueError("the prompt holds no ids; begin with the end-of-text id")
    if P + max_new_tokens > limit:
        raise ValueError(
            f"{P} prompt ids and {max_new_tokens} new ones are more than the model's {limit}"
            f" positions; shorten the prompt, or ask for at most {max(0, limit - P)} new ones"
        )
    if key is not None and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    return _decode(
        ByContent(module),
        max_new_tokens,
        min(top_k, module.config.vocab_size),
        top_p < 1,
        key is not None,
        params,
        jnp.asarray(prompt_BxP, jnp.int32),
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature),
        jnp.float32(top_p),
        jnp.int32(-1 if eos_id is None else eos_id),
    )


def continue_text(
    module, params, tokenizer, prompt, max_new_tokens, temperature, top_k, top_p, seed
) -> str:
    """A prompt and what the model makes of it, up to an end of text. An empty prompt: a new text.

    temperature 0 takes the likeliest id each time. Raises UserError for values out of range.
    """
    ids = tokenizer.encode(prompt) if prompt else [tokenizer.eos_id]
    if max_new_tokens < 1 or top_k < 0 or temperature < 0:
        raise UserError("max_new_tokens must be 1 or more, top_k and temperature 0 or more")
    try:
        out = generate(
            module,
            params,
            np.asarray(ids, np.int32)[None],
            max_new_tokens,
            key=jax.random.key(seed) if temperature else None,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_id=tokenizer.eos_id,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    new = np.asarray(out)[0, len(ids) :]
    ends = np.flatnonzero(new == tokenizer.eos_id)
    return prompt + tokenizer.decode(new[: ends[0]] if len(ends) else new)


class ByContent:
    """A module as a static argument of jit: equal to another of the same configuration.

    (GPT2Config has no hash of its own.)
    """

    def __init__(self, module):
        self.module = module
        self.content = module.config.to_json_string(), jnp.dtype(module.dtype).name

    def __hash__(self):
        return hash(self.content)

    def __eq__(self, other):
        return self.content == other.content


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _decode(
    static, max_new, top_k, use_top_p, sample, params, prompt, key, temperature, top_p, eos_id
):
    module = static.module
    B, P = prompt.shape

    def choose(logits_BxV, index):
        if not sample:
            return logits_BxV.argmax(-1)
        logits_BxV = logits_BxV / temperature
        if top_k:
            logits_BxV = keep_top_k(logits_BxV, top_k)
        if use_top_p:
            logits_BxV = keep_top_p(logits_BxV, top_p)
        return jax.random.categorical(jax.random.fold_in(key, index), logits_BxV)

    def feed(cache, ids, start):
        positions = start + jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        variables = {"params": params, "cache": cache}
        logits, updated = module.apply(
            variables, ids, position_ids_BxT=positions, mutable=["cache"]
        )
        return logits[:, -1], updated["cache"]

    def unfinished(carry):
        index, _, _, done, _ = carry
        return (index < max_new) & ~done.all()

    def advance(carry):
        index, cache, logits, done, ids = carry
        new = jnp.where(done, eos_id, choose(logits, index)).astype(jnp.int32)
        ids = jax.lax.dynamic_update_slice(ids, new[:, None], (0, P + index))
        done = done | (new == eos_id)
        logits, cache = feed(cache, new[:, None], P + index)
        return index + 1, cache, logits, done, ids

    logits, cache = feed(empty_cache(module, B, P + max_new), prompt, 0)
    filler = jnp.broadcast_to(jnp.maximum(eos_id, 0), (B, max_new)).astype(jnp.int32)
    ids = jnp.concatenate([prompt, filler], axis=1)
    done = jnp.zeros(B, bool)
    return jax.lax.while_loop(unfinished, advance, (0, cache, logits, done, ids))[-1]


def empty_cache(module, batch_size: int, length: int):
    """Zeros in the shape of the module's cache; no weights are made."""
    ids = jnp.zeros((batch_size, length), jnp.int32)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), ids, init_cache=True))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["cache"])


def keep_top_k(logits_BxV, k: int):
    """-inf for all but the k likeliest."""
    kth = jax.lax.top_k(logits_BxV, k)[0][:, -1:]
    return jnp.where(logits_BxV < kth, -jnp.inf, logits_BxV)


def keep_top_p(logits_BxV, p):
    """-inf for all but the likeliest ids whose probabilities together first reach p."""
    ordered = jnp.sort(logits_BxV, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    least = jnp.where(before < p, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits_BxV < least, -jnp.inf, logits_BxV)
