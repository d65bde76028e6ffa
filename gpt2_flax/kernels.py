"""Which parts of a step a run computes by fused kernels for NVIDIA GPUs, and which by XLA."""

import functools

import jax
import jax.numpy as jnp

from gpt2_flax import devices, dropout, flash_attention, head_loss, layer_norm, processes
from gpt2_flax.errors import UserError, say

CUDNN_WIDTHS = 8, 128  # of a head: a multiple of the one, and at most the other
LARGEST_ERROR = 0.03  # of a gradient in bfloat16, relative: rounding makes a tenth of that


def choose_attention(config, model_config) -> str | None:
    """FlaxGPT2Attention's `fused`: "flash", "cudnn", or None for the plain one, by XLA.

    Neither kernel keeps a (B, H, T, T) array; cuDNN's knows no dropout. What is chosen was tried
    once on the device: where `auto` finds that it fails, a line says why. Raises UserError where
    one was asked for that does not work.
    """
    choices = {"xla": (), "auto": ("flash", "cudnn")}.get(config.attention, (config.attention,))
    return _first_that_works("attention", choices, config, model_config)


def choose_others(config, model_config) -> bool:
    """Whether LayerNorm's gradient and the loss are computed by kernels; as `choose_attention`."""
    choices = {"xla": (), "auto": ("pallas",)}.get(config.kernels, (config.kernels,))
    return _first_that_works("kernels", choices, config, model_config) is not None


def _first_that_works(setting: str, choices, config, model_config) -> str | None:
    reasons = {}
    for kernel in choices:
        # All processes take the same.
        found = processes.gather(why_not(kernel, config, model_config))
        reasons[kernel] = next(filter(None, found), None)
        if reasons[kernel] is None:
            return kernel
    if choices and getattr(config, setting) != "auto":
        raise UserError(
            f"{setting} {kernel} does not work here: {reasons[kernel]}\n"
            f"  use --{setting} xla, or auto, which takes the best that works"
        )
    # What they are not made for is not worth a line.
    if choices and devices.platform() == "gpu" and config.dtype == "bfloat16":
        whys = "; ".join(f"{kernel} does not work here: {why}" for kernel, why in reasons.items())
        say(f"{setting} by XLA, as {whys}")
    return None


def why_not(kernel: str, config, model_config) -> str | None:
    """Why a kernel cannot be had, in a few words; None where it works."""
    if devices.platform() != "gpu":
        return f"it is for NVIDIA GPUs, and this is {devices.everywhere()[0].device_kind}"
    width = model_config.n_embd // model_config.n_head
    if kernel == "cudnn":
        return why_not_cudnn(config, model_config.n_head, width)
    if config.dtype != "bfloat16" and (kernel == "flash" or config.kernels == "auto"):
        return f"it is not for {config.dtype}"
    if config.parallel == "jit" and devices.count() > 1:
        return "XLA cannot divide it over devices; --parallel pmap and fsdp can"
    if kernel == "pallas":
        if model_config.n_embd > layer_norm.MOST_WIDE:
            return f"n_embd {model_config.n_embd} is over {layer_norm.MOST_WIDE}"
        return try_others(model_config.n_embd)
    return flash_attention.why_not(config.block_size, width) or try_flash(
        config.block_size, model_config.n_head, width, config.dropout
    )


def why_not_cudnn(config, n_heads: int, width: int) -> str | None:
    if config.dtype != "bfloat16":
        return f"it has no {config.dtype}"
    if config.dropout:
        return "it has no dropout"
    multiple, most = CUDNN_WIDTHS
    if width % multiple or width > most:
        return f"heads of width {width} are not a multiple of {multiple} up to {most}"
    return try_cudnn(config.block_size, n_heads, width)


# ---------------------------------------------------------------- tried on the device


@functools.lru_cache
def try_cudnn(block_size: int, n_heads: int, width: int) -> str | None:
    def mixed(x_BxTx3xHxC):
        q, k, v = (x_BxTx3xHxC[:, :, part] for part in range(3))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    plain = functools.partial(_plainly_mixed, words=None, rate=0.0)
    return what_fails(mixed, plain, (1, block_size, 3, n_heads, width))


@functools.lru_cache
def try_flash(block_size: int, n_heads: int, width: int, rate: float) -> str | None:
    words = None
    if rate:
        shape = n_heads, block_size, block_size
        words = dropout.words_of(jax.random.key(0), jnp.arange(1), shape)

    def mixed(x_BxTx3xHxC):
        return flash_attention.flash_attention(x_BxTx3xHxC, words, width**-0.5, rate)

    plain = functools.partial(_plainly_mixed, words=words, rate=rate)
    return what_fails(mixed, plain, (1, block_size, 3, n_heads, width))


def _plainly_mixed(x_BxTx3xHxC, words, rate):
    q, k, v = (x_BxTx3xHxC[:, :, part] for part in range(3))
    scores = jnp.einsum("BTHC,BKHC->BHTK", q, k) * q.shape[-1] ** -0.5
    T = q.shape[1]
    probs = jax.nn.softmax(jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf))
    if words is not None:
        probs = jnp.where(dropout.is_kept(*words, rate), probs / (1.0 - rate), 0.0)
    return jnp.einsum("BHTK,BKHC->BTHC", probs, v)


@functools.lru_cache
def try_others(n_embd: int) -> str | None:
    targets_BxT, counts_BxT = jnp.arange(8)[None] * 7, jnp.arange(8)[None] < 6

    def loss(x_BxTxD, kernel):
        scale = jnp.linspace(0.5, 2.0, n_embd).reshape(1, 1, -1)
        if kernel:
            kept, normed = layer_norm.kept_and_normed(x_BxTxD, scale, scale, 1e-5)
        else:
            kept, normed = x_BxTxD, layer_norm.layer_norm(x_BxTxD, scale, scale, 1e-5)
        head_WxD = jnp.sin(jnp.arange(384.0 * n_embd)).reshape(384, -1).astype(x_BxTxD.dtype)
        return head_loss.cross_entropy_sum(
            kept + normed, head_WxD, targets_BxT, counts_BxT, 300, 8, kernel
        )

    by_kernel, plain = (functools.partial(loss, kernel=kernel) for kernel in (True, False))
    return what_fails(by_kernel, plain, (1, 8, n_embd))


def what_fails(by_kernel, plain, shape: tuple[int, ...]) -> str | None:
    """What goes wrong where the gradient of a kernel is compared with XLA's; None for nothing.

    The one gets random numbers in bfloat16, the other the same in float32.
    """
    try:
        x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        weights = jax.random.normal(jax.random.key(1), ())  # a cotangent that is not 1

        def gradient(function, x):
            summed = jax.grad(lambda x: jnp.sum(function(x).astype(jnp.float32) ** 2) * weights)
            return jax.jit(summed)(x).astype(jnp.float32)

        got, expected = gradient(by_kernel, x), gradient(plain, x.astype(jnp.float32))
        error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
        return None if error < LARGEST_ERROR else f"its gradient is off by {error:.2g}"
    except Exception as error:  # JAX, XLA, Triton and cuDNN raise whatever they please
        return (str(error).strip() or type(error).__name__).split("\n")[0][:160]
