"""LayerNorm, with derivatives in closed form; on NVIDIA GPUs its backward pass as one kernel.

Shapes: N rows of width D; in the kernel, R rows at a time, padded to a width of P.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gpt2_flax.distributed import devices
from gpt2_flax.jax_versions import by_triton

Array = jax.Array
AT_ONCE = 2  # rows that a program of the kernel holds at a time
ROWS = 64  # rows of a program, at most
MOST_WIDE = 8192  # of a row in its registers


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def layer_norm(x_BxTxD: Array, scale_1x1xD: Array, bias_1x1xD: Array, epsilon: float) -> Array:
    """LayerNorm over the last axis, computed in float32, returned in x's type.

    Its derivative is given in closed form, instead of autodiff of the mean and
    the variance. What that gains was measured once: docs/lab_notes.md.
    """
    normed, _ = _normalize(x_BxTxD, epsilon)
    return (normed * scale_1x1xD + bias_1x1xD).astype(x_BxTxD.dtype)


def _normalize(x, epsilon):
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return centred * inverse_std, inverse_std


@layer_norm.defjvp
def _layer_norm_jvp(epsilon, primals, tangents):
    x, scale, bias = primals
    dx, dscale, dbias = tangents
    normed, inverse_std = _normalize(x, epsilon)
    out = (normed * scale + bias).astype(x.dtype)
    dx = dx.astype(jnp.float32)
    dnormed = dx - dx.mean(-1, keepdims=True) - normed * (normed * dx).mean(-1, keepdims=True)
    dout = dnormed * inverse_std * scale + normed * dscale + dbias
    return out, dout.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def kept_and_normed(
    x_BxTxD: Array, scale_1x1xD: Array, bias_1x1xD: Array, epsilon: float, interpret: bool = False
) -> tuple[Array, Array]:
    """(x, layer_norm of x), whose two gradients one kernel adds up: x is read once for both.

    Nothing but x is kept for it. interpret: run the kernel by JAX on any device, slowly.
    """
    return x_BxTxD, layer_norm(x_BxTxD, scale_1x1xD, bias_1x1xD, epsilon)


def _forward(x, scale, bias, epsilon, interpret):
    return kept_and_normed(x, scale, bias, epsilon, interpret), (x, scale, bias)


def _backward(epsilon, interpret, saved, cotangents):
    x_BxTxD, scale_1x1xD, bias_1x1xD = saved
    D = x_BxTxD.shape[-1]
    x_NxD, dkept_NxD, dout_NxD = (a.reshape(-1, D) for a in (x_BxTxD, *cotangents))
    N, P = len(x_NxD), pl.next_power_of_2(D)
    n_rows = next(n for n in (ROWS, 16, AT_ONCE, 1) if N % n == 0 and (n == 1 or N // n >= 256))
    tile = pl.BlockSpec((n_rows, P), lambda n: (n, 0))
    parts = jax.ShapeDtypeStruct((N // n_rows, D), jnp.float32)
    dx_NxD, dscale, dbias = pl.pallas_call(
        functools.partial(_backward_kernel, D, min(AT_ONCE, n_rows), epsilon),
        grid=(N // n_rows,),
        in_specs=[tile, tile, tile, pl.BlockSpec((P,), lambda n: (0,))],
        out_specs=[tile, *[pl.BlockSpec((None, P), lambda n: (n, 0))] * 2],
        out_shape=[jax.ShapeDtypeStruct(x_NxD.shape, x_NxD.dtype), parts, parts],
        interpret=interpret,
        compiler_params=by_triton(min(32, max(4, P // 256))),
        name="layer_norm_backward",
    )(x_NxD, dkept_NxD, dout_NxD, scale_1x1xD.reshape(-1).astype(jnp.float32))
    return (
        dx_NxD.reshape(x_BxTxD.shape),
        dscale.sum(0).reshape(scale_1x1xD.shape).astype(scale_1x1xD.dtype),
        dbias.sum(0).reshape(bias_1x1xD.shape).astype(bias_1x1xD.dtype),
    )


def _backward_kernel(
    D, at_once, epsilon, x_ref, dkept_ref, dout_ref, scale_ref, dx_ref, dscale_ref, dbias_ref
):
    """The gradient of some rows' x, and their sums for scale and bias."""
    from jax.experimental.pallas import triton

    is_there_P = jnp.arange(x_ref.shape[1]) < D
    scale_P = triton.load(scale_ref, mask=is_there_P, other=0.0)

    def of_rows(n, sums):
        dscale_P, dbias_P = sums
        at = pl.ds(n * at_once, at_once), slice(None)
        mask = jnp.broadcast_to(is_there_P[None, :], (at_once, len(is_there_P)))
        x_RxP, dkept_RxP, dout_RxP = (
            triton.load(ref.at[at], mask=mask, other=0.0).astype(jnp.float32)
            for ref in (x_ref, dkept_ref, dout_ref)
        )
        centred_RxP = jnp.where(mask, x_RxP - (x_RxP.sum(1) / D)[:, None], 0.0)
        inverse_std_R = jax.lax.rsqrt((centred_RxP * centred_RxP).sum(1) / D + epsilon)
        normed_RxP = centred_RxP * inverse_std_R[:, None]
        scaled_RxP = dout_RxP * scale_P[None, :]
        mean_R, along_R = scaled_RxP.sum(1) / D, (scaled_RxP * normed_RxP).sum(1) / D
        dx_RxP = scaled_RxP - mean_R[:, None] - normed_RxP * along_R[:, None]
        dx_RxP = dx_RxP * inverse_std_R[:, None] + dkept_RxP
        triton.store(dx_ref.at[at], dx_RxP.astype(dx_ref.dtype), mask=mask)
        return dscale_P + (dout_RxP * normed_RxP).sum(0), dbias_P + dout_RxP.sum(0)

    zeros_P = jnp.zeros(len(is_there_P), jnp.float32)
    sums = jax.lax.fori_loop(0, x_ref.shape[0] // at_once, of_rows, (zeros_P, zeros_P))
    for ref, sum_P in zip((dscale_ref, dbias_ref), sums, strict=True):
        triton.store(ref, sum_P, mask=is_there_P)


kept_and_normed.defvjp(_forward, _backward)


class LayerNorm(nn.Module):
    """LayerNorm with the parameters scale and bias (D,). kernels: see `kept_and_normed`."""

    epsilon: float
    dtype: Any = jnp.float32
    kernels: bool = False

    @nn.compact
    def __call__(self, x_BxTxD, as_function: bool = False):
        """(x, normed x); as_function: (function, arrays) with which x gives the latter."""
        width = x_BxTxD.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (width,))
        bias_D = self.param("bias", nn.initializers.zeros, (width,))
        arrays = [leaf.astype(jnp.float32).reshape(1, 1, -1) for leaf in (scale_D, bias_D)]
        if as_function:
            return functools.partial(_normed_as, self.epsilon, self.dtype), tuple(arrays)
        if self.kernels:
            interpret = devices.platform() != "gpu"
            x_BxTxD, normed = kept_and_normed(x_BxTxD, *arrays, self.epsilon, interpret)
            return x_BxTxD, normed.astype(self.dtype)
        return x_BxTxD, _normed_as(self.epsilon, self.dtype, x_BxTxD, *arrays)


def _normed_as(epsilon, dtype, x_BxTxD, scale_1x1xD, bias_1x1xD):
    return layer_norm(x_BxTxD, scale_1x1xD, bias_1x1xD, epsilon).astype(dtype)
