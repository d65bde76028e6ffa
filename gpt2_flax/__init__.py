"""GPT-2 in JAX: the Flax model class, a trainer, checkpoints that open in PyTorch."""

import os

# transformers would advise to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
__all__ = ["FlaxGPT2LMHeadModel"]


def __getattr__(name: str):
    # Loaded on first use: gpt2_flax.config must not cost an import of JAX.
    if name in __all__:
        from gpt2_flax import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
