"""Which parts of a step a run computes by fused kernels for NVIDIA GPUs, and which by XLA."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gpt2_flax.distributed import devices, processes
from gpt2_flax.errors import UserError, say
from gpt2_flax.model.ops import cross_entropy, dropout, flash_attention, layer_norm

CUDNN_WIDTHS = 8, 128  # of a head: a multiple of the one, and at most the other
ENOUGH = 512  # positions: the plain one's memory grows with their square
LARGEST_ERROR = 0.03  # of a gradient in bfloat16, relative: rounding makes a tenth of that


def choose_attention(config, model_config) -> str | None:
    """FlaxGPT2Attention's `fused`: "flash", "cudnn", or None for the plain one, by XLA.

    Neither kernel keeps a (B, H, T, T) array; cuDNN's knows no dropout. What is chosen was tried
    once on the device: where `auto` finds that neither works, a line says why. Raises UserError
    where one was asked for that does not work.
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
        return try_others(model_config.n_embd, config.dtype)
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

    shape = 1, min(block_size, ENOUGH), 3, n_heads, width
    return what_fails(mixed, _plainly_mixed, [shape], "bfloat16")


@functools.lru_cache
def try_flash(block_size: int, n_heads: int, width: int, rate: float) -> str | None:
    T = min(block_size, ENOUGH)

    def words_for(rate):
        if not rate:
            return None
        words = dropout.words_of_rows(jax.random.key(0), jnp.arange(1), 1)
        return dropout.words_of(words[:, 0], (n_heads, T, T))

    def mixed(x_BxTx3xHxC, rate):
        words = words_for(rate)
        return flash_attention.flash_attention(x_BxTx3xHxC, words, width**-0.5, rate)

    def plainly(x_BxTx3xHxC, rate):
        return _plainly_mixed(x_BxTx3xHxC, words_for(rate), rate)

    # An evaluation drops nothing.
    fails = (
        what_fails(
            functools.partial(mixed, rate=r), functools.partial(plainly, rate=r),
            [(1, T, 3, n_heads, width)], "bfloat16",
        )
        for r in {0.0, rate}
    )  # fmt: skip
    return next(filter(None, fails), None)


def _plainly_mixed(x_BxTx3xHxC, words=None, rate=0.0):
    q, k, v = (x_BxTx3xHxC[:, :, part] for part in range(3))
    scores = jnp.einsum("BTHC,BKHC->BHTK", q, k) * q.shape[-1] ** -0.5
    T = q.shape[1]
    probs = jax.nn.softmax(jnp.where(jnp.tri(T, dtype=bool)[None, None], scores, -jnp.inf))
    if words is not None:
        probs = jnp.where(dropout.is_kept(*words, rate), probs / (1.0 - rate), 0.0)
    return jnp.einsum("BHTK,BKHC->BTHC", probs, v)


@functools.lru_cache
def try_others(n_embd: int, dtype: str) -> str | None:
    """LayerNorm and the loss, each with as many rows and ids as its loops need to turn."""

    def norm(x_BxTxD, scale_1x1xD, bias_1x1xD, kernel):
        arrays = x_BxTxD, scale_1x1xD.astype(jnp.float32), bias_1x1xD.astype(jnp.float32)
        if kernel:
            return jnp.stack(layer_norm.kept_and_normed(*arrays, 1e-5))
        return jnp.stack([x_BxTxD, layer_norm.layer_norm(*arrays, 1e-5)])

    def loss(x_BxTxD, head_WxD, kernel):
        B, T, _ = x_BxTxD.shape
        targets_BxT = (jnp.arange(B * T) * 97 % n_ids).reshape(B, T)
        counts_BxT = jnp.arange(T)[None] < T - jnp.arange(B)[:, None]
        return cross_entropy.cross_entropy_sum(
            x_BxTxD, head_WxD * jnp.asarray(0.02, dtype), targets_BxT, counts_BxT, n_ids, T, kernel
        )

    n_ids, n_rows = 2 * cross_entropy.LANES + 100, 256 * layer_norm.ROWS
    fails = (
        what_fails(
            functools.partial(function, kernel=True), functools.partial(function, kernel=False),
            shapes, dtype,
        )
        for function, shapes in (
            (norm, [(1, n_rows, n_embd), (1, 1, n_embd), (1, 1, n_embd)]),
            (loss, [(2, 8, n_embd), (n_ids + 28, n_embd)]),
        )
    )  # fmt: skip
    return next(filter(None, fails), None)


def what_fails(by_kernel, plain, shapes: Sequence[tuple[int, ...]], dtype: str) -> str | None:
    """What goes wrong where a kernel's gradients are compared with XLA's; None for nothing.

    The one gets random numbers of type `dtype`, the other the same in float32.
    """
    try:
        keys = jax.random.split(jax.random.key(0), len(shapes))
        arrays = [
            jax.random.normal(key, shape).astype(dtype)
            for key, shape in zip(keys, shapes, strict=True)
        ]

        def gradients(function, arrays):
            def summed(arrays):  # with cotangents that differ
                return jnp.sum(jnp.square(function(*arrays).astype(jnp.float32)))

            return jax.jit(jax.grad(summed))(arrays)

        pairs = zip(
            gradients(by_kernel, arrays),
            gradients(plain, [array.astype(jnp.float32) for array in arrays]),
            strict=True,
        )
        errors = [
            float(jnp.linalg.norm((got - expected).ravel()) / jnp.linalg.norm(expected.ravel()))
            for got, expected in pairs
        ]
        is_right = all(error < LARGEST_ERROR for error in errors)
        return None if is_right else f"its gradient is off by {max(errors):.2g}"
    except Exception as error:  # JAX, XLA, Triton and cuDNN raise whatever they please
        return (str(error).strip() or type(error).__name__).split("\n")[0][:160]
