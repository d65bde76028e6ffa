"""GPT-2 in JAX: the Flax model class, a trainer, checkpoints that open in PyTorch."""

import os

# transformers would advise to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
# The names that transformers 4 had, by the room they are in.
_ROOMS = {
    "pretrained.modeling": (
        "FlaxGPT2LMHeadModel",
        "FlaxGPT2Model",
        "FlaxGPT2PreTrainedModel",
    ),
    "model.gpt2": ("FlaxGPT2LMHeadModule", "FlaxGPT2Module"),
    "generation.logits_processors": (
        "FlaxForceTokensLogitsProcessor",
        "FlaxForcedBOSTokenLogitsProcessor",
        "FlaxForcedEOSTokenLogitsProcessor",
        "FlaxLogitsProcessor",
        "FlaxLogitsProcessorList",
        "FlaxLogitsWarper",
        "FlaxMinLengthLogitsProcessor",
        "FlaxNoRepeatNGramLogitsProcessor",
        "FlaxSuppressTokensAtBeginLogitsProcessor",
        "FlaxSuppressTokensLogitsProcessor",
        "FlaxTemperatureLogitsWarper",
        "FlaxTopKLogitsWarper",
        "FlaxTopPLogitsWarper",
    ),
}
__all__ = sorted(name for names in _ROOMS.values() for name in names)


def __getattr__(name: str):
    # Loaded on first use: gpt2_flax.config.train_config must not cost an import of JAX.
    import importlib

    for room, names in _ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(f"gpt2_flax.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
