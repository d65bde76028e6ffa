"""A GPT-2's settings as its module reads them: no transformers is needed to train one."""

import dataclasses


@dataclasses.dataclass(eq=False)
class Architecture:
    """Those fields of transformers.GPT2Config that a module reads, with its names and defaults.

    A run from random weights has this instead of a GPT2Config until its model is exported: to
    import transformers takes longer than all else at a start. n_inner None: 4 * n_embd.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256

    def to_dict(self) -> dict:
        """What a config.json says of it."""
        return {"model_type": "gpt2", **dataclasses.asdict(self)}


def as_gpt2_config(settings):
    """The transformers.GPT2Config of an Architecture; one that is a GPT2Config, as it is."""
    if not isinstance(settings, Architecture):
        return settings
    import transformers

    return transformers.GPT2Config(**dataclasses.asdict(settings))
