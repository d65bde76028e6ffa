"""What a call of the model, or of its `generate`, returns: Hugging Face's Flax output classes.

Each is a pytree whose fields are read as attributes, by key and by index; fields that are None
have no key and take no index. So transformers' own ModelOutput did when it had these classes; it
is not the base here, as it is made for PyTorch's and renames their cache from 5.24 on.
"""

import collections
import dataclasses

import flax.struct
import jax


class FlaxModelOutput(collections.OrderedDict):
    """A dict of the fields that are not None, in their order. Change it by `replace` only."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def to_tuple(self) -> tuple:
        """The fields that are not None."""
        return tuple(self.values())

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def _refuse(self, *args, **kwargs):
        raise dataclasses.FrozenInstanceError(
            f"a {type(self).__name__} cannot be changed; use its replace(name=value)"
        )

    __setitem__ = __delitem__ = _refuse
    setdefault = pop = popitem = update = clear = move_to_end = _refuse

    def __reduce__(self):
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))


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
