"""GPT-2 as linen modules: ids -> logits, under Hugging Face's parameter names.

Shapes ride on the names of arrays:
    B rows   T positions fed in   K positions attended to   D n_embd   H heads
    C width of a head (D = H * C)   I width of the MLP   V vocabulary
A kernel is (out, in), as in Hugging Face's Flax GPT-2: the transpose of PyTorch's Conv1D.

`hf_flax_compat` gives the numerics of that class instead of PyTorch's, for whoever has to
reproduce an old curve: every kernel starts with a standard deviation of 0.02, one mask of
attention dropout serves all rows and heads, the settings scale_attn_weights and
scale_attn_by_inverse_layer_idx are ignored, and softmax and logits are of the type `dtype`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng

from gpt2_flax.config.train_config import MAX_LAYERS
from gpt2_flax.distributed import devices
from gpt2_flax.model.ops import flash_attention
from gpt2_flax.model.ops.dropout import Dropout, words_of, words_of_rows
from gpt2_flax.model.ops.layer_norm import LayerNorm
from gpt2_flax.model.outputs import (
    FlaxBaseModelOutputWithPastAndCrossAttentions,
    FlaxCausalLMOutputWithCrossAttentions,
)

Array = jax.Array
Dtype = Any
GELU_FACTOR, GELU_CUBIC = math.sqrt(2.0 / math.pi), 0.044715
MAX_SIZE = 2**26  # of an axis: beyond any GPT-2, and no product of two overflows


@jax.custom_jvp
def _gelu_tanh(x):
    return 0.5 * x * (1.0 + jnp.tanh(GELU_FACTOR * (x + GELU_CUBIC * x**3)))


@_gelu_tanh.defjvp
def _gelu_tanh_jvp(primals, tangents):
    """The slope in closed form, and not by tanh.

    XLA would keep the forward pass's tanh for it, as large as x, which is kept anyway.
    """
    (x,), (dx,) = primals, tangents
    half = jax.nn.sigmoid(2.0 * GELU_FACTOR * (x + GELU_CUBIC * x**3))  # (1 + tanh) / 2
    slope = half + x * half * (1.0 - half) * (2.0 * GELU_FACTOR) * (1.0 + 3.0 * GELU_CUBIC * x**2)
    return _gelu_tanh(x), dx * slope


def _gelu_erf(x):
    return jax.nn.gelu(x, approximate=False)


# The activations of transformers' ACT2FN that have no parameters of their own.
ACTIVATIONS = {
    "gelu": _gelu_erf,
    "gelu_10": lambda x: jnp.clip(_gelu_erf(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu_erf,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 * (1.0 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0)))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def _in_float32(function, x):
    """Rounded to x's type once, and not after each of its operations."""
    return function(x.astype(jnp.float32)).astype(x.dtype)


def check_config(config) -> None:
    """Raise ValueError for a GPT2Config that names no model; transformers 5 accepts such."""
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        most = MAX_LAYERS if name == "n_layer" else MAX_SIZE
        if getattr(config, name) > most:
            raise ValueError(f"{name} must be at most {most}, got {getattr(config, name)}")
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(config, name)}")
    for name in ("layer_norm_epsilon", "initializer_range"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be 0 or more, got {getattr(config, name)}")
    if config.n_inner is not None and not 1 <= config.n_inner <= MAX_SIZE:
        raise ValueError(
            f"n_inner must be at least 1, or None for 4 * n_embd, got {config.n_inner}"
        )
    if config.n_embd % config.n_head:
        raise ValueError(
            f"n_embd must be divisible by n_head, got n_embd={config.n_embd}"
            f" and n_head={config.n_head}"
        )
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation_function {config.activation_function!r};"
            f" known: {', '.join(ACTIVATIONS)}"
        )


@jax.custom_jvp
def softmax(scores: Array) -> Array:
    """Softmax over the last axis.

    It ends in an exponential, which XLA computes once and keeps. A quotient it would compute
    again wherever it is used, and keep its two parts.
    """
    scores = scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    return jnp.exp(scores - jnp.log(jnp.exp(scores).sum(-1, keepdims=True)))


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    (scores,), (dscores,) = primals, tangents
    probs = softmax(scores)
    weighted = probs * dscores
    return probs, weighted - probs * weighted.sum(-1, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product_of(function, x, arrays, kernel, bias):
    """function(x, *arrays) @ kernel.T + bias, of which x is kept for the gradient.

    The function is computed again there. To XLA it must not look like the same computation,
    whose result it would keep: it waits for the incoming gradient, as in `recomputed`.
    """
    return _product(function(x, *arrays), kernel) + bias


def _product(x, kernel):
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))


def _product_of_forward(function, x, arrays, kernel, bias):
    return product_of(function, x, arrays, kernel, bias), (x, arrays, kernel)


def _product_of_backward(function, saved, dout):
    x, arrays, kernel = saved
    first, rows = dout.ravel()[0], tuple(range(dout.ndim - 1))
    x = jnp.where(first == first, x, jnp.zeros((), x.dtype))
    inner, pull_back = jax.vjp(function, x, *arrays)
    dinner = jax.lax.dot_general(dout, kernel, (((dout.ndim - 1,), (0,)), ((), ())))
    dx, *darrays = pull_back(dinner.astype(inner.dtype))
    dkernel = jax.lax.dot_general(dout, inner, ((rows, rows), ((), ())))
    dbias = dout.sum(rows, keepdims=True)
    return dx, tuple(darrays), dkernel.astype(kernel.dtype), dbias


product_of.defvjp(_product_of_forward, _product_of_backward)


class FlaxConv1D(nn.Module):
    """x @ kernel.T + bias; the kernel is (out, in).

    before: (function, arrays) where function(x, *arrays) is to take the place of x, and not to
    be kept for the gradient.
    """

    features: int
    stddev: float = 0.02
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, before=None):
        init = nn.initializers.normal(self.stddev)
        kernel = self.param("kernel", init, (self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        bias = bias.reshape((1,) * (x.ndim - 1) + (-1,))
        if before is not None:
            function, arrays = before
            return product_of(function, x, arrays, kernel, bias)
        return _product(x, kernel) + bias


def initial_std(config, hf_flax_compat: bool, residual: bool = False) -> float:
    """Standard deviation of a kernel's first values; `residual`: of one that ends a branch.

    GPT-2 scales the latter by 1 / sqrt(number of branches), so that their sum does not grow.
    """
    if hf_flax_compat:
        return 0.02
    return config.initializer_range / (math.sqrt(2 * config.n_layer) if residual else 1.0)


def scores_by_all_heads(q_Bx1xHxC, k_BxKxHxC):
    """A query's products with the keys of its head, float32 (B, H, 1, K).

    It is multiplied by those of all heads, with zeros for all but one: so the keys are taken as
    they lie, position by position.
    """
    B, _, H, C = q_Bx1xHxC.shape
    own_HxH = jnp.eye(H, dtype=bool)[None, :, :, None]
    q_BxHxD = jnp.where(own_HxH, q_Bx1xHxC.swapaxes(1, 2), 0).reshape(B, H, H * C)
    k_BxKxD = k_BxKxHxC.reshape(B, -1, H * C)
    scores_BxHxK = jnp.einsum("BHD,BKD->BHK", q_BxHxD, k_BxKxD, preferred_element_type=jnp.float32)
    return scores_BxHxK[:, :, None]


def values_by_all_heads(probs_BxHx1xK, v_BxKxHxC):
    """The values of each head, weighted by its probabilities, float32 (B, 1, H, C).

    Those of the other heads are weighted, too, and left out.
    """
    B, K, H, C = v_BxKxHxC.shape
    mixed_BxHxD = jnp.einsum(
        "BHK,BKD->BHD", probs_BxHx1xK[:, :, 0], v_BxKxHxC.reshape(B, K, H * C),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    own_HxH = jnp.eye(H, dtype=bool)[None, :, :, None]
    return jnp.where(own_HxH, mixed_BxHxD.reshape(B, H, H, C), 0).sum(2)[:, None]


def split_words(words, n: int) -> list:
    """(B, n, ...) as n arrays, of a mask or a layer each; n times None where there are none."""
    return [None if words is None else words[:, mask] for mask in range(n)]


class FlaxGPT2Attention(nn.Module):
    """Attention of x to itself, causal and cached, or to the states of an encoder.

    Returns (B, T, D) and the probabilities (B, H, T, K), after dropout. With `checkpointing`
    the probabilities are computed again in the backward pass; not under hf_flax_compat.

    fused: for training on whole rows, without probabilities, in whose place None is returned:
    "flash" for flash_attention.py, or an implementation of jax.nn.dot_product_attention
    ("cudnn"), which drops none.
    """

    config: Any
    layer: int = 0
    dtype: Dtype = jnp.float32
    is_cross_attention: bool = False
    hf_flax_compat: bool = False
    checkpointing: bool = False
    fused: str | None = None

    @nn.compact  # for the cache's variables
    def __call__(
        self, x_BxTxD, source_BxKxD, mask_BxK, words_Bx2x2, deterministic, init_cache, before=None
    ):
        of_probs_Bx2, of_output_Bx2 = split_words(words_Bx2x2, 2)
        T = x_BxTxD.shape[1]
        can_fuse = mask_BxK is None and not self.hf_flax_compat and self.config.attn_pdrop < 1.0
        if self.fused == "flash" and can_fuse:
            mixed_BxTxHxC = self._flash(x_BxTxD, of_probs_Bx2, deterministic, before)
            return self._merge(mixed_BxTxHxC, of_output_Bx2, deterministic), None
        q_BxTxHxC, k_BxKxHxC, v_BxKxHxC = self._project(x_BxTxD, source_BxKxD, before)
        if self.fused and can_fuse:
            mixed_BxTxHxC = jax.nn.dot_product_attention(
                q_BxTxHxC, k_BxKxHxC, v_BxKxHxC, is_causal=True, scale=self._scale(),
                implementation=self.fused,
            )  # fmt: skip
            return self._merge(mixed_BxTxHxC, of_output_Bx2, deterministic), None
        allowed_BxHxTxK = None  # all
        if mask_BxK is not None:
            allowed_BxHxTxK = mask_BxK[:, None, None, :].astype(bool)
        if not self.is_cross_attention:
            start = 0
            is_ready = self.has_variable("cache", "cached_key")
            if is_ready and T == 1 and devices.platform() == "cpu" and not self.hf_flax_compat:
                mixed_Bx1xHxC, probs_BxHx1xK = self._mix_one_more(
                    q_BxTxHxC, k_BxKxHxC, v_BxKxHxC, allowed_BxHxTxK, of_probs_Bx2, deterministic
                )
                return self._merge(mixed_Bx1xHxC, of_output_Bx2, deterministic), probs_BxHx1xK
            if is_ready or init_cache:
                start, k_BxKxHxC, v_BxKxHxC = self._append_to_cache(k_BxKxHxC, v_BxKxHxC)
            positions_T, positions_K = start + jnp.arange(T), jnp.arange(k_BxKxHxC.shape[1])
            causal = positions_T[None, None, :, None] >= positions_K[None, None, None, :]
            allowed_BxHxTxK = causal if mask_BxK is None else causal & allowed_BxHxTxK

        mix = self._mix
        if self.checkpointing and not self.hf_flax_compat and not self.is_initializing():
            mix = self._mix_again
        mixed_BxTxHxC, probs_BxHxTxK = mix(
            q_BxTxHxC, k_BxKxHxC, v_BxKxHxC, allowed_BxHxTxK, of_probs_Bx2, deterministic
        )
        return self._merge(mixed_BxTxHxC, of_output_Bx2, deterministic), probs_BxHxTxK

    def _flash(self, x_BxTxD, words_Bx2, deterministic, before):
        """The heads' mixed values (B, T, H, C), from the one product that gives q, k and v."""
        (B, T, D), H, rate = x_BxTxD.shape, self.config.n_head, self.config.attn_pdrop
        std = initial_std(self.config, self.hf_flax_compat)
        qkv_BxTx3D = FlaxConv1D(3 * D, std, self.dtype, name="c_attn")(x_BxTxD, before)
        words = None
        if not deterministic and rate:
            words = words_of(words_Bx2, (H, T, T))
        return flash_attention.flash_attention(
            qkv_BxTx3D.reshape(B, T, 3, H, D // H), words, self._scale(), rate if words else 0.0,
            devices.platform() != "gpu",
        )  # fmt: skip

    def _merge(self, mixed_BxTxHxC, words_Bx2, deterministic):
        """The heads' mixed values as the branch's output (B, T, D)."""
        D = self.config.n_embd
        std = initial_std(self.config, self.hf_flax_compat, residual=True)
        c_proj = FlaxConv1D(D, std, self.dtype, name="c_proj")
        drop = Dropout(self.config.resid_pdrop, self.hf_flax_compat, name="resid_dropout")
        out_BxTxD = c_proj(mixed_BxTxHxC.reshape(*mixed_BxTxHxC.shape[:2], D))
        return drop(out_BxTxD, words_Bx2, deterministic)

    def _project(self, x_BxTxD, source_BxKxD, before):
        D, H = self.config.n_embd, self.config.n_head
        std = initial_std(self.config, self.hf_flax_compat)

        def heads(features, name, states, before=None):
            out = FlaxConv1D(features, std, self.dtype, name=name)(states, before)
            split = out.reshape(*out.shape[:2], features // D, H, D // H)
            return (split[:, :, n] for n in range(features // D))

        if not self.is_cross_attention:
            return heads(3 * D, "c_attn", x_BxTxD, before)
        return (*heads(D, "q_attn", x_BxTxD), *heads(2 * D, "c_attn", source_BxKxD))

    def _mix(self, q_BxTxHxC, k_BxKxHxC, v_BxKxHxC, allowed_BxHxTxK, words_Bx2, deterministic):
        """(values mixed by their probabilities (B, T, H, C), the probabilities)."""
        if self.hf_flax_compat:
            probs_BxHxTxK = self._hf_flax_probabilities(
                q_BxTxHxC, k_BxKxHxC, allowed_BxHxTxK, deterministic
            )
        else:
            probs_BxHxTxK = self._probabilities(q_BxTxHxC, k_BxKxHxC, allowed_BxHxTxK)
            drop = Dropout(self.config.attn_pdrop, name="attn_dropout")
            probs_BxHxTxK = drop(probs_BxHxTxK, words_Bx2, deterministic)
        return jnp.einsum("BHTK,BKHC->BTHC", probs_BxHxTxK, v_BxKxHxC), probs_BxHxTxK

    def _mix_again(self, *arrays_and_deterministic):
        """`_mix`, evaluated once more for its gradient."""
        *arrays, deterministic = arrays_and_deterministic
        drop = Dropout(self.config.attn_pdrop, parent=None)

        def mix(inputs):
            _, _, q_BxTxHxC, k_BxKxHxC, v_BxKxHxC, allowed_BxHxTxK, words_Bx2 = inputs
            probs_BxHxTxK = self._probabilities(q_BxTxHxC, k_BxKxHxC, allowed_BxHxTxK)
            probs_BxHxTxK = drop.apply({}, probs_BxHxTxK, words_Bx2, deterministic)
            return jnp.einsum("BHTK,BKHC->BTHC", probs_BxHxTxK, v_BxKxHxC), probs_BxHxTxK

        return recomputed(mix)(({}, None, *arrays))

    def _probabilities(self, q_BxTxHxC, k_BxKxHxC, allowed_BxHxTxK):
        """Softmax in float32, as PyTorch's eager attention has it; before dropout."""
        scores_BxHxTxK = jnp.einsum(
            "BTHC,BKHC->BHTK", q_BxTxHxC, k_BxKxHxC, preferred_element_type=jnp.float32
        )
        scores_BxHxTxK = scores_BxHxTxK * self._scale()
        if allowed_BxHxTxK is not None:
            lowest = jnp.finfo(jnp.float32).min
            scores_BxHxTxK = jnp.where(allowed_BxHxTxK, scores_BxHxTxK, lowest)
        return softmax(scores_BxHxTxK).astype(self.dtype)

    def _hf_flax_probabilities(self, q_BxTxHxC, k_BxKxHxC, allowed_BxHxTxK, deterministic):
        drops = not deterministic and self.config.attn_pdrop > 0.0
        bias = None
        if allowed_BxHxTxK is not None:
            lowest = jnp.finfo(self.dtype).min
            bias = jnp.where(allowed_BxHxTxK, 0.0, lowest).astype(self.dtype)
        return nn.attention.dot_product_attention_weights(
            q_BxTxHxC,
            k_BxKxHxC,
            bias=bias,
            dropout_rng=self.make_rng("dropout") if drops else None,
            dropout_rate=self.config.attn_pdrop,
            deterministic=deterministic,
            dtype=self.dtype,
        )

    def _scale(self) -> float:
        config = self.config
        scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        return scale / (self.layer + 1) if config.scale_attn_by_inverse_layer_idx else scale

    def _mix_one_more(
        self, q_Bx1xHxC, k_Bx1xHxC, v_Bx1xHxC, allowed_BxHx1xK, words_Bx2, deterministic
    ):
        """`_mix` for one more position of a cache, and for a CPU, where caches are not copied.

        XLA would copy all keys and values, head by head, and once more to write the new ones into
        what is still to be read. So those are taken by themselves, and written after the others
        were read.
        """
        held = {n: self.get_variable("cache", f"cached_{n}") for n in ("key", "value")}
        start = self.get_variable("cache", "cache_index")
        positions_1x1x1xK = jnp.arange(held["key"].shape[1])[None, None, None]
        place = jnp.minimum(start, held["key"].shape[1] - 1)  # of a full cache, the last
        is_new, is_allowed = positions_1x1x1xK == place, positions_1x1x1xK <= start
        if allowed_BxHx1xK is not None:
            is_allowed &= allowed_BxHx1xK

        new_BxHx1x1 = jnp.einsum(
            "BTHC,BKHC->BHTK", q_Bx1xHxC, k_Bx1xHxC, preferred_element_type=jnp.float32
        )
        old_BxHx1xK = scores_by_all_heads(q_Bx1xHxC, held["key"])
        scores_BxHx1xK = jnp.where(is_new, new_BxHx1x1, old_BxHx1xK) * self._scale()
        scores_BxHx1xK = jnp.where(is_allowed, scores_BxHx1xK, jnp.finfo(jnp.float32).min)
        probs_BxHx1xK = softmax(scores_BxHx1xK).astype(self.dtype)
        drop = Dropout(self.config.attn_pdrop, name="attn_dropout")
        probs_BxHx1xK = drop(probs_BxHx1xK, words_Bx2, deterministic)
        mixed_Bx1xHxC = values_by_all_heads(jnp.where(is_new, 0, probs_BxHx1xK), held["value"])
        share_BxHx1 = jnp.where(is_new, probs_BxHx1xK, 0).sum(-1, dtype=jnp.float32)
        both_Bx1xHxC = mixed_Bx1xHxC + share_BxHx1.swapaxes(1, 2)[..., None] * v_Bx1xHxC

        written = {"key": (k_Bx1xHxC, old_BxHx1xK), "value": (v_Bx1xHxC, mixed_Bx1xHxC)}
        for name, (new, read) in written.items():
            never = read.ravel()[0] > jnp.inf  # which is known only when all was read
            at = (0, place + never, 0, 0)
            array = jax.lax.dynamic_update_slice(held[name], new, at)
            self.put_variable("cache", f"cached_{name}", array)
        self.put_variable("cache", "cache_index", start + 1)
        return both_Bx1xHxC.astype(self.dtype), probs_BxHx1xK

    def _append_to_cache(self, k, v):
        """Write k and v behind what the cache holds; return (start, all keys, all values).

        The first call, with init_cache, only makes a cache of its own length.
        """
        ready = self.has_variable("cache", "cached_key")
        cached_key = self.variable("cache", "cached_key", jnp.zeros, k.shape, k.dtype)
        cached_value = self.variable("cache", "cached_value", jnp.zeros, v.shape, v.dtype)
        index = self.variable("cache", "cache_index", lambda: jnp.array(0, jnp.int32))
        if not ready:
            return 0, k, v
        start = index.value
        at = (0, start, 0, 0)
        cached_key.value = jax.lax.dynamic_update_slice(cached_key.value, k, at)
        cached_value.value = jax.lax.dynamic_update_slice(cached_value.value, v, at)
        index.value = start + k.shape[1]
        return start, cached_key.value, cached_value.value


class FlaxGPT2MLP(nn.Module):
    config: Any
    dtype: Dtype = jnp.float32
    hf_flax_compat: bool = False
    keeps_little: bool = False

    def setup(self):
        config, compat = self.config, self.hf_flax_compat
        inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = FlaxConv1D(inner, initial_std(config, compat), self.dtype)
        self.c_proj = FlaxConv1D(
            config.n_embd, initial_std(config, compat, residual=True), self.dtype
        )
        self.dropout = Dropout(config.resid_pdrop, compat)

    def __call__(self, x_BxTxD, words_Bx2, deterministic, before=None):
        activation = ACTIVATIONS[self.config.activation_function]
        if not self.hf_flax_compat:
            activation = functools.partial(_in_float32, activation)
        hidden_BxTxI = self.c_fc(x_BxTxD, before)
        if self.keeps_little:
            out_BxTxD = self.c_proj(hidden_BxTxI, (activation, ()))
        else:
            out_BxTxD = self.c_proj(activation(hidden_BxTxI))
        return self.dropout(out_BxTxD, words_Bx2, deterministic)


class FlaxGPT2Block(nn.Module):
    """One layer. Returns (B, T, D) and a tuple of the probabilities of its attentions."""

    config: Any
    layer: int = 0
    dtype: Dtype = jnp.float32
    hf_flax_compat: bool = False
    attention_checkpointing: bool = False
    keeps_little: bool = False
    fused_attention: str | None = None
    kernels: bool = False  # LayerNorm's

    def setup(self):
        epsilon, compat = self.config.layer_norm_epsilon, self.hf_flax_compat
        self.ln_1 = LayerNorm(epsilon, self.dtype, self.kernels)
        self.attn = FlaxGPT2Attention(
            self.config, self.layer, self.dtype, False, compat, self.attention_checkpointing,
            self.fused_attention,
        )  # fmt: skip
        if self.config.add_cross_attention:
            self.ln_cross_attn = LayerNorm(epsilon, self.dtype, self.kernels)
            self.crossattention = FlaxGPT2Attention(
                self.config, self.layer, self.dtype, True, compat
            )
        self.ln_2 = LayerNorm(epsilon, self.dtype, self.kernels)
        self.mlp = FlaxGPT2MLP(self.config, self.dtype, compat, self.keeps_little)

    def __call__(
        self, x_BxTxD, mask_BxK, encoder_BxKxD, encoder_mask_BxK, words_Bx5x2, deterministic,
        init_cache,
    ):  # fmt: skip
        of_attn, of_cross, of_mlp = None, None, None
        if words_Bx5x2 is not None:
            of_attn, of_cross, of_mlp = words_Bx5x2[:, :2], words_Bx5x2[:, 2:4], words_Bx5x2[:, 4]
        x_BxTxD, normed, before = self._normed(self.ln_1, x_BxTxD)
        mixed, probs = self.attn(
            normed, None, mask_BxK, of_attn, deterministic, init_cache, before
        )
        x_BxTxD, probabilities = x_BxTxD + mixed, (probs,)
        if encoder_BxKxD is not None:
            x_BxTxD, normed = self.ln_cross_attn(x_BxTxD)
            mixed, probs = self.crossattention(
                normed, encoder_BxKxD, encoder_mask_BxK, of_cross, deterministic, False
            )
            x_BxTxD, probabilities = x_BxTxD + mixed, (*probabilities, probs)
        x_BxTxD, normed, before = self._normed(self.ln_2, x_BxTxD)
        x_BxTxD = x_BxTxD + self.mlp(normed, of_mlp, deterministic, before)
        return x_BxTxD, probabilities

    def _normed(self, layer_norm, x_BxTxD):
        """(x, normed x, None), or (x, x, how it is normed) for a product that keeps x alone."""
        if self.keeps_little:
            return x_BxTxD, x_BxTxD, layer_norm(x_BxTxD, as_function=True)
        return *layer_norm(x_BxTxD), None


class FlaxGPT2BlockCollection(nn.Module):
    """All layers. Returns (B, T, D), the input of each layer, its probabilities.

    With gradient_checkpointing a layer's activations are computed again in the backward pass,
    with attention_checkpointing the probabilities of its attention to itself alone;
    forward-mode derivatives are then not to be had. Nor are they with keeps_little, which
    computes again what costs next to nothing: LayerNorm and the activation.

    gather: FlaxGPT2LMHeadModule's; a layer's parameters are whole only while it is computed.
    fused_attention: FlaxGPT2Attention's `fused`. kernels: LayerNorm's. scanned: one layer is
    compiled, and run n_layer times; inputs and probabilities are then not returned.
    traced_once: under jax.jit, where tracing all layers is slow: one is traced for all, if they
    are alike and whole; XLA puts it in n_layer times.
    """

    config: Any
    dtype: Dtype = jnp.float32
    hf_flax_compat: bool = False
    gradient_checkpointing: bool = False
    attention_checkpointing: bool = False
    keeps_little: bool = False
    gather: Callable | None = None
    fused_attention: str | None = None
    kernels: bool = False
    scanned: bool = False
    traced_once: bool = False

    @nn.compact
    def __call__(
        self, x_BxTxD, mask_BxK, encoder_BxKxD, encoder_mask_BxK, words_BxLx5x2, deterministic,
        init_cache,
    ):  # fmt: skip
        rows = mask_BxK, encoder_BxKxD, encoder_mask_BxK
        words = split_words(words_BxLx5x2, self.config.n_layer)
        if init_cache or self.is_initializing() or "cache" in self.variables:
            return self._by_modules((), x_BxTxD, rows, words, deterministic, init_cache)
        draws = self.hf_flax_compat and not deterministic and self.has_rng("dropout")
        layers_differ = self.config.scale_attn_by_inverse_layer_idx
        if self.scanned and not layers_differ and not draws:
            return self._scan(words_BxLx5x2, x_BxTxD, rows, deterministic), [], []
        is_traced = isinstance(x_BxTxD, jax.core.Tracer)
        once = self.traced_once and is_traced and not (self.gather or layers_differ or draws)
        if not (once or self.gradient_checkpointing or self.gather):
            return self._by_modules(self._for_training(), x_BxTxD, rows, words, deterministic)
        of_all = jax.jit(self._one_layer(0, deterministic)) if once else None
        inputs, probabilities = [], []
        for layer in range(self.config.n_layer):
            inputs.append(x_BxTxD)
            params, key = self.variables["params"][str(layer)], None
            if draws:  # the one that it would have as a submodule
                key = LazyRng.create(self.scope.rngs["dropout"], str(layer))
            # Gathered while the layer before is computed, and not all layers at once.
            after = inputs[max(0, layer - 1)] if self.gather else None
            run = of_all or self._one_layer(layer, deterministic)
            x_BxTxD, probs = run((params, key, after, x_BxTxD, *rows, words[layer]))
            probabilities.append(probs)
        return x_BxTxD, inputs, probabilities

    def _for_training(self):
        return (
            self.attention_checkpointing, self.keeps_little, self.fused_attention,
            self.kernels,
        )  # fmt: skip

    def _by_modules(self, for_training, x_BxTxD, rows, words, deterministic, init_cache=False):
        inputs, probabilities = [], []
        for layer in range(self.config.n_layer):
            fields = self.config, layer, self.dtype, self.hf_flax_compat, *for_training
            block = FlaxGPT2Block(*fields, name=str(layer))
            inputs.append(x_BxTxD)
            x_BxTxD, probs = block(x_BxTxD, *rows, words[layer], deterministic, init_cache)
            probabilities.append(probs)
        return x_BxTxD, inputs, probabilities

    def _one_layer(self, layer: int, deterministic: bool):
        """A layer as a function of (parameters, key, array to wait for, x, its other arrays)."""
        fields = self.config, layer, self.dtype, self.hf_flax_compat, *self._for_training()
        run = functools.partial(self._apply, fields, self.gather, deterministic)
        if self.gradient_checkpointing:
            return recomputed(run)
        return jax.checkpoint(run, policy=all_but_gathered) if self.gather else run

    def _scan(self, words_BxLx5x2, x_BxTxD, rows, deterministic):
        def cast(leaf):  # what is gathered is cast then
            return leaf.astype(self.dtype) if leaf.ndim == 2 and not self.gather else leaf

        n = self.config.n_layer
        layers = [jax.tree.map(cast, self.variables["params"][str(layer)]) for layer in range(n)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        words = None if words_BxLx5x2 is None else jnp.moveaxis(words_BxLx5x2, 1, 0)
        run = self._one_layer(0, deterministic)

        def one(states, of_layer):
            x_BxTxD, before_BxTxD = states
            params, words_Bx5x2 = of_layer
            after = before_BxTxD if self.gather else None
            out_BxTxD, _ = run((params, None, after, x_BxTxD, *rows, words_Bx5x2))
            return (out_BxTxD, x_BxTxD), None

        (x_BxTxD, _), _ = jax.lax.scan(one, (x_BxTxD, x_BxTxD), (stacked, words))
        return x_BxTxD

    @staticmethod
    def _apply(fields, gather, deterministic, inputs):
        params, key, after, *args = inputs
        if gather is not None:
            layer, dtype = fields[1:3]
            params = gather(params, ("transformer", "h", str(layer)), dtype, after)
        block = FlaxGPT2Block(*fields, parent=None)
        rngs = None if key is None else {"dropout": key}
        return block.apply({"params": params}, *args, deterministic, False, rngs=rngs)


def all_but_gathered(primitive, *_, **unused) -> bool:
    """What jax.checkpoint may keep: parameters are gathered again in the backward pass."""
    return primitive is not jax.lax.all_gather_p


def recomputed(function):
    """`function` of one tree, evaluated once more for its gradient instead of remembered.

    jax.checkpoint does this with optimization barriers, which XLA's CPU compiler removes before
    it orders the program: all blocks are then recomputed early, and no memory is saved. Here
    what is recomputed waits for the incoming gradient because it depends on it.
    """

    def forward(inputs):
        return function(inputs), inputs

    def backward(inputs, cotangents):
        first = jax.tree.leaves(cotangents)[0].ravel()[0]
        params, key, *arrays = inputs

        def wait(array):  # unchanged, unless the gradient is NaN already
            return jnp.where(first == first, array, jnp.zeros((), array.dtype))

        _, pull_back = jax.vjp(function, (params, key, *jax.tree.map(wait, arrays)))
        return pull_back(cotangents)

    run = jax.custom_vjp(function)
    run.defvjp(forward, backward)
    return run


class FlaxGPT2Module(nn.Module):
    """GPT-2 without its head: ids -> states after the last LayerNorm.

    See FlaxGPT2LMHeadModule for the arguments.
    """

    config: Any
    dtype: Dtype = jnp.float32
    hf_flax_compat: bool = False
    gradient_checkpointing: bool = False
    attention_checkpointing: bool = False
    keeps_little: bool = False
    gather: Callable | None = None
    fused_attention: str | None = None
    kernels: bool = False
    scanned: bool = False
    traced_once: bool = False
    embeds_in_dtype: bool = False

    def setup(self):
        config, compat = self.config, self.hf_flax_compat
        init = nn.initializers.normal(config.initializer_range)
        self.wte = nn.Embed(config.vocab_size, config.n_embd, self.dtype, embedding_init=init)
        self.wpe = nn.Embed(config.n_positions, config.n_embd, self.dtype, embedding_init=init)
        self.dropout = Dropout(config.embd_pdrop, compat)
        self.h = FlaxGPT2BlockCollection(
            config, self.dtype, compat, self.gradient_checkpointing, self.attention_checkpointing,
            self.keeps_little, self.gather, self.fused_attention, self.kernels, self.scanned,
            self.traced_once,
        )  # fmt: skip
        self.ln_f = LayerNorm(config.layer_norm_epsilon, self.dtype, self.kernels)

    def __call__(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        deterministic: bool = True,
        init_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        row_ids=None,
    ):
        if row_ids is None:
            row_ids = jnp.arange(len(input_ids))
        if self.config.add_cross_attention and self.is_initializing():
            # Without it the parameters of cross-attention would not be made.
            encoder_hidden_states = jnp.zeros((len(input_ids), 1, self.config.n_embd))
            encoder_attention_mask = None
        elif encoder_hidden_states is not None and not self.config.add_cross_attention:
            raise ValueError(
                "encoder_hidden_states were given to a model without cross-attention;"
                " build it with add_cross_attention=True in its configuration"
            )
        x_BxTxD = self._embedded(input_ids, position_ids)
        of_embedding_Bx2, words_BxLx5x2 = self._words(row_ids, deterministic)
        x_BxTxD = self.dropout(x_BxTxD, of_embedding_Bx2, deterministic)
        x_BxTxD, inputs, probabilities = self.h(
            x_BxTxD, attention_mask, encoder_hidden_states, encoder_attention_mask,
            words_BxLx5x2, deterministic, init_cache,
        )  # fmt: skip
        _, x_BxTxD = self.ln_f(x_BxTxD)

        crosses = output_attentions and encoder_hidden_states is not None
        output = FlaxBaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x_BxTxD,
            hidden_states=(*inputs, x_BxTxD) if output_hidden_states else None,
            attentions=tuple(probs[0] for probs in probabilities) if output_attentions else None,
            cross_attentions=tuple(probs[1] for probs in probabilities) if crosses else None,
        )
        return output if return_dict else output.to_tuple()

    def _words(self, row_ids_B, deterministic):
        """Words for the embedding's mask, (B, 2), and for those of the layers, (B, L, 5, 2).

        A layer has masks of its attention's probabilities and output, of the same of
        cross-attention, and of the MLP's output. None where nothing is drawn by words.
        """
        c = self.config
        is_drawn = any(0.0 < rate < 1.0 for rate in (c.embd_pdrop, c.attn_pdrop, c.resid_pdrop))
        if deterministic or self.hf_flax_compat or not is_drawn:
            return None, None
        words = words_of_rows(self.make_rng("dropout"), row_ids_B, 1 + c.n_layer * 5)
        return words[:, 0], words[:, 1:].reshape(-1, c.n_layer, 5, 2)

    def _embedded(self, ids_BxT, positions_BxT):
        """(B, T, D) of ids and positions (None: from 0 on), added up, and rounded once.

        Tables are read as they are, so that the gradient of an id that comes often is summed up
        in their type, too (by fsdp they come in the type of computation; with embeds_in_dtype
        they are cast to it). Positions from 0 on are a slice, whose gradient is a plain sum.
        """
        B, T = ids_BxT.shape
        from_0_on = positions_BxT is None
        if from_0_on:
            positions_BxT = jnp.broadcast_to(jnp.arange(T)[None, :], (B, T))
        if self.hf_flax_compat or self.embeds_in_dtype or self.is_initializing():
            return self.wte(ids_BxT) + self.wpe(positions_BxT)
        if from_0_on and self.config.n_positions >= T:
            position_BxTxD = self.wpe.embedding[None, :T]
        else:
            position_BxTxD = jnp.take(self.wpe.embedding, positions_BxT, axis=0)
        id_BxTxD = jnp.take(self.wte.embedding, ids_BxT, axis=0)
        x_BxTxD = id_BxTxD.astype(jnp.float32) + position_BxTxD.astype(jnp.float32)
        return x_BxTxD.astype(self.dtype)


class FlaxGPT2LMHeadModule(nn.Module):
    """GPT-2 with its language-model head: ids -> logits, float32 but for hf_flax_compat.

    input_ids: int (B, T). attention_mask: (B, K), 1 or True for what may be attended to, by
    positions at or after it; None for all. K is T, or the length of the cache if there is one.
    position_ids: int (B, T), 0 to T - 1 by default. encoder_hidden_states: (B, S, D) for
    cross-attention, with encoder_attention_mask (B, S). row_ids: (B,) int32, the rows' names
    for dropout, used with deterministic=False only. Ids out of range give NaN.
    Returns FlaxCausalLMOutputWithCrossAttentions, or with return_dict=False a tuple of its
    fields that are not None. The order of the arguments is Hugging Face's.
    """

    config: Any
    dtype: Dtype = jnp.float32
    hf_flax_compat: bool = False
    gradient_checkpointing: bool = False
    last_logits_only: bool = False  # (B, 1, V), all that the prompt of `generate` needs
    attention_checkpointing: bool = False
    pad_vocab_to_multiple_of: int = 1  # width of the logits; ids from V on have logit -inf
    keeps_little: bool = False  # LayerNorm and activation are computed again for the gradient
    # Where parameters are shards of one device among many: (part of them, its path, dtype, an
    # array to be computed first or None) -> the same, whole. `apply` then takes a layer in
    # shards, and the rest as `outside_blocks` has it.
    gather: Callable | None = None
    fused_attention: str | None = None  # FlaxGPT2Attention's `fused`
    kernels: bool = False  # Pallas's, of LayerNorm and of head_loss.cross_entropy_sum
    scanned: bool = False  # FlaxGPT2BlockCollection's
    traced_once: bool = False  # as well
    # Tables are cast before they are read, so that their gradient is of the type `dtype`, too.
    embeds_in_dtype: bool = False

    def setup(self):
        config = self.config
        self.transformer = FlaxGPT2Module(
            config, self.dtype, self.hf_flax_compat, self.gradient_checkpointing,
            self.attention_checkpointing, self.keeps_little, self.gather, self.fused_attention,
            self.kernels, self.scanned, self.traced_once, self.embeds_in_dtype,
        )  # fmt: skip
        if not config.tie_word_embeddings:
            self.lm_head = nn.Dense(
                config.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(config.initializer_range),
                dot_general=self._dot,
            )

    def __call__(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        deterministic: bool = True,
        init_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        row_ids=None,
    ):
        states = self.transformer(
            input_ids,
            attention_mask,
            position_ids,
            encoder_hidden_states,
            encoder_attention_mask,
            deterministic,
            init_cache,
            output_attentions,
            output_hidden_states,
            row_ids=row_ids,
        )
        output = FlaxCausalLMOutputWithCrossAttentions(
            logits=self._logits(states.last_hidden_state),
            hidden_states=states.hidden_states,
            attentions=states.attentions,
            cross_attentions=states.cross_attentions,
        )
        return output if return_dict else output.to_tuple()

    def states(self, input_ids, deterministic: bool = True, row_ids=None):
        """The last layer's states after LayerNorm (B, T, D), without logits."""
        output = self.transformer(input_ids, deterministic=deterministic, row_ids=row_ids)
        return output.last_hidden_state

    def kernels_cast(self, params):
        """The parameters, of which the layers' matrices are of the type that they are used in.

        Those that are gathered are left alone: what is sent is cast, and summed in float32.
        """
        if self.gather is not None:
            return params
        transformer = params["transformer"]
        blocks = jax.tree.map(
            lambda leaf: leaf.astype(self.dtype) if leaf.ndim == 2 else leaf, transformer["h"]
        )
        return params | {"transformer": transformer | {"h": blocks}}

    def outside_blocks(self, params):
        """The parameters, gathered but for those of the layers. Unchanged without `gather`."""
        if self.gather is None:
            return params
        transformer = params["transformer"]
        others = {name: part for name, part in transformer.items() if name != "h"}
        whole = self.gather(params | {"transformer": others}, (), self.dtype, None)
        return whole | {"transformer": whole["transformer"] | {"h": transformer["h"]}}

    def head(self, params):
        """The head's matrix of type `dtype`: a row for each id, and the rows of the padding."""
        if self.config.tie_word_embeddings:
            head_VxD = params["transformer"]["wte"]["embedding"]
        else:
            head_VxD = params["lm_head"]["kernel"].T
        padding = -self.config.vocab_size % self.pad_vocab_to_multiple_of
        return jnp.pad(head_VxD.astype(self.dtype), ((0, padding), (0, 0)))

    def _logits(self, x_BxTxD):
        if self.last_logits_only:
            x_BxTxD = x_BxTxD[:, -1:]
        if not self.config.tie_word_embeddings:
            return self.lm_head(x_BxTxD)
        wte_VxD = self.transformer.wte.embedding.astype(self.dtype)
        return self._dot(x_BxTxD, wte_VxD, (((2,), (1,)), ((), ())))

    def _dot(self, x, y, dimension_numbers, precision=None, preferred_element_type=None):
        """A product of `dtype` operands that is summed up, and returned, in float32.

        x: states (B, T, D). y: the head's matrix, (V, D) or (D, V), which is padded here and not
        in the parameters, so that no file holds padding and no optimizer updates it.
        """
        del preferred_element_type
        wanted = None if self.hf_flax_compat else jnp.float32
        V = self.config.vocab_size
        padding = -V % self.pad_vocab_to_multiple_of
        if padding:
            (_, (axis_of_D,)), _ = dimension_numbers
            y = jnp.pad(y, ((0, 0), (0, padding)) if axis_of_D == 0 else ((0, padding), (0, 0)))
        logits = jax.lax.dot_general(
            x, y, dimension_numbers, precision, preferred_element_type=wanted
        )
        if padding:
            is_id = jnp.arange(V + padding).reshape(1, 1, -1) < V
            logits = jnp.where(is_id, logits, -jnp.inf)
        return logits


def empty_cache(config, batch_size: int, max_length: int, dtype, has_head: bool = True) -> dict:
    """A cache for `max_length` positions of each row, in the modules' own shape; nothing is run.

    In it, for each layer, cached_key and cached_value (B, max_length, H, C) of type `dtype`,
    and cache_index, an int32 scalar: the positions filled so far, by all rows alike.
    """
    shape = (batch_size, max_length, config.n_head, config.n_embd // config.n_head)
    blocks = {
        str(layer): {
            "attn": {
                "cached_key": jnp.zeros(shape, dtype),
                "cached_value": jnp.zeros(shape, dtype),
                "cache_index": jnp.zeros((), jnp.int32),
            }
        }
        for layer in range(config.n_layer)
    }
    return {"transformer": {"h": blocks}} if has_head else {"h": blocks}
