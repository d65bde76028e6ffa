"""Which implementation of attention a run trains with: XLA's, or a fused kernel."""

import functools

import jax
import jax.numpy as jnp

from gpt2_flax import devices, processes
from gpt2_flax.errors import UserError, say

CUDNN_WIDTHS = 8, 128  # of a head: a multiple of the one, and at most the other


def choose(config, model_config) -> str | None:
    """The implementation for jax.nn.dot_product_attention; None for the model's own, by XLA.

    cuDNN's keeps no (B, H, T, T) array and knows no dropout. It is tried once on the device: where
    `auto` finds that it fails, a line says why. Raises UserError where it was asked for.
    """
    if config.attention == "xla":
        return None
    # All processes take the same.
    reasons = processes.gather(why_not_cudnn(config, model_config))
    why_not = next(filter(None, reasons), None)
    if why_not is None:
        return "cudnn"
    is_expected = devices.platform() != "gpu" or config.dtype != "bfloat16" or config.dropout
    if config.attention == "cudnn":
        raise UserError(
            f"attention cudnn does not work here: {why_not}\n"
            "  use --attention xla, or auto, which takes the best that works"
        )
    if not is_expected:
        say(f"attention by XLA, as cuDNN's does not work here: {why_not}")
    return None


def why_not_cudnn(config, model_config) -> str | None:
    """Why cuDNN's attention cannot be had, in a few words; None where it works."""
    if devices.platform() != "gpu":
        return f"it is for NVIDIA GPUs, and this is {devices.everywhere()[0].device_kind}"
    if config.dtype != "bfloat16":
        return f"it has no {config.dtype}"
    if config.dropout:
        return "it has no dropout"
    width = model_config.n_embd // model_config.n_head
    multiple, most = CUDNN_WIDTHS
    if width % multiple or width > most:
        return f"heads of width {width} are not a multiple of {multiple} up to {most}"
    return try_on_device(config.block_size, model_config.n_head, width)


@functools.lru_cache
def try_on_device(block_size: int, n_heads: int, width: int) -> str | None:
    """What goes wrong in a forward and backward pass of one row; None for nothing."""
    x_BxTxHxC = jnp.ones((1, block_size, n_heads, width), jnp.bfloat16)

    def summed(x):
        out = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
        return out.astype(jnp.float32).sum()

    try:
        gradient = jax.jit(jax.grad(summed))(x_BxTxHxC)
        return None if bool(jnp.isfinite(gradient).all()) else "its gradient is not finite"
    except Exception as error:  # JAX, XLA and cuDNN raise whatever they please
        return (str(error).strip() or type(error).__name__).split("\n")[0][:160]
