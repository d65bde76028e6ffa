"""What a call of the model, or of its `generate`, returns: Hugging Face's Flax output classes.

Each is a pytree whose fields are read as attributes, by key and by index; fields that are None
have no key and take no index, as in transformers' ModelOutput.
"""

import collections
import dataclasses

import flax.struct
import jax
from transformers.utils import ModelOutput


class FlaxModelOutput(ModelOutput):
    """A ModelOutput whose fields hold arrays of JAX.

    transformers 5 does not know those, and would read a lone one as a list of keys and values.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                collections.OrderedDict.__setitem__(self, field.name, value)


@flax.struct.dataclass
class FlaxBaseModelOutputWithPastAndCrossAttentions(FlaxModelOutput):
    """last_hidden_state: (B, T, D), after the last LayerNorm. The rest: see below."""

    last_hidden_state: jax.Array | None = None
    past_key_values: dict | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class FlaxCausalLMOutputWithCrossAttentions(FlaxModelOutput):
    """What the model with its head returns.

    logits: (B, T, V), float32 unless hf_flax_compat is set. past_key_values: the cache, for the
    next call.
    hidden_states: n_layer + 1 arrays (B, T, D): the embedded ids, then the output of each block,
    the last of them after the last LayerNorm. attentions, cross_attentions: n_layer arrays of
    probabilities (B, H, T, K), after dropout when training.
    """

    logits: jax.Array | None = None
    past_key_values: dict | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class FlaxGreedySearchOutput(FlaxModelOutput):
    """sequences: int32 (B, max_length), the prompts and what follows, padded at the end."""

    sequences: jax.Array | None = None


@flax.struct.dataclass
class FlaxSampleOutput(FlaxModelOutput):
    """sequences: int32 (B * num_return_sequences, max_length), padded at the end."""

    sequences: jax.Array | None = None


@flax.struct.dataclass
class FlaxBeamSearchOutput(FlaxModelOutput):
    """sequences: int32 (B * num_return_sequences, max_length); scores: float32, one for each.

    A score is the summed log-probability of the new ids over their number to the power of
    length_penalty.
    """

    sequences: jax.Array | None = None
    scores: jax.Array | None = None
