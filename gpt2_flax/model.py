"""GPT-2 as linen modules: ids -> logits, under Hugging Face's parameter names.

Shapes ride on the names of arrays:
    B rows   T positions fed in   K positions attended to   D n_embd   H heads
    C width of a head (D = H * C)   I width of the MLP   V vocabulary
A kernel is (out, in), as in Hugging Face's Flax GPT-2: the transpose of PyTorch's Conv1D.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Dtype = Any


def _gelu_tanh(x, cubic=0.044715):
    return 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + cubic * x**3)))


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


def check_config(config) -> None:
    """Raise ValueError for a GPT2Config that names no model; transformers 5 accepts such."""
    if config.n_embd % config.n_head:
        raise ValueError(
            f"n_embd must be divisible by n_head, got n_embd={config.n_embd}"
            f" and n_head={config.n_head}"
        )
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.add_cross_attention:
        raise ValueError("add_cross_attention is not built yet; set it to False")
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation_function {config.activation_function!r};"
            f" known: {', '.join(ACTIVATIONS)}"
        )


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


class LayerNorm(nn.Module):
    epsilon: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD):
        width = x_BxTxD.shape[-1]
        scale_D = self.param("scale", nn.initializers.ones, (width,))
        bias_D = self.param("bias", nn.initializers.zeros, (width,))
        scale_1x1xD, bias_1x1xD = (
            leaf.astype(jnp.float32).reshape(1, 1, -1) for leaf in (scale_D, bias_D)
        )
        return layer_norm(x_BxTxD, scale_1x1xD, bias_1x1xD, self.epsilon).astype(self.dtype)


class Conv1D(nn.Module):
    """x @ kernel.T + bias; the kernel is (out, in)."""

    features: int
    stddev: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(self.stddev)
        kernel = self.param("kernel", init, (self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        product = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())))
        return product + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class Dropout(nn.Module):
    """Dropout whose mask is a function of (key, module, row id) alone.

    A row therefore meets the same mask on whatever device, and in whatever micro-batch, it is.
    """

    rate: float

    @nn.compact
    def __call__(self, x, row_ids_B, deterministic):
        if deterministic or self.rate == 0.0:
            return x
        key = self.make_rng("dropout")
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids_B)
        draw = functools.partial(jax.random.bernoulli, p=1.0 - self.rate, shape=x.shape[1:])
        return jnp.where(jax.vmap(draw)(keys_B), x / (1.0 - self.rate), jnp.zeros_like(x))


class Attention(nn.Module):
    config: Any
    layer: int
    dtype: Dtype = jnp.float32

    @nn.compact  # for the cache's variables
    def __call__(self, x_BxTxD, mask_BxK, row_ids_B, deterministic, init_cache):
        config = self.config
        B, T, D = x_BxTxD.shape
        H = config.n_head
        std = config.initializer_range
        qkv = Conv1D(3 * D, std, self.dtype, name="c_attn")(x_BxTxD).reshape(B, T, 3, H, D // H)
        q_BxTxHxC, k_BxKxHxC, v_BxKxHxC = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        start = 0
        if self.has_variable("cache", "cached_key") or init_cache:
            start, k_BxKxHxC, v_BxKxHxC = self._append_to_cache(k_BxKxHxC, v_BxKxHxC)

        positions_T, positions_K = start + jnp.arange(T), jnp.arange(k_BxKxHxC.shape[1])
        allowed = positions_T[None, None, :, None] >= positions_K[None, None, None, :]
        if mask_BxK is not None:
            allowed = allowed & mask_BxK[:, None, None, :].astype(bool)

        scores_BxHxTxK = jnp.einsum(
            "BTHC,BKHC->BHTK", q_BxTxHxC, k_BxKxHxC, preferred_element_type=jnp.float32
        )
        scores_BxHxTxK = scores_BxHxTxK * self._scale()
        lowest = jnp.finfo(jnp.float32).min
        probs_BxHxTxK = jax.nn.softmax(jnp.where(allowed, scores_BxHxTxK, lowest), axis=-1)
        probs_BxHxTxK = probs_BxHxTxK.astype(self.dtype)
        attn_dropout = Dropout(config.attn_pdrop, name="attn_dropout")
        probs_BxHxTxK = attn_dropout(probs_BxHxTxK, row_ids_B, deterministic)
        mixed_BxTxHxC = jnp.einsum("BHTK,BKHC->BTHC", probs_BxHxTxK, v_BxKxHxC)
        c_proj = Conv1D(D, std / math.sqrt(2 * config.n_layer), self.dtype, name="c_proj")
        resid_dropout = Dropout(config.resid_pdrop, name="resid_dropout")
        return resid_dropout(c_proj(mixed_BxTxHxC.reshape(B, T, D)), row_ids_B, deterministic)

    def _scale(self) -> float:
        config = self.config
        scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        return scale / (self.layer + 1) if config.scale_attn_by_inverse_layer_idx else scale

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


class MLP(nn.Module):
    config: Any
    dtype: Dtype = jnp.float32

    def setup(self):
        config = self.config
        std = config.initializer_range
        self.c_fc = Conv1D(config.n_inner or 4 * config.n_embd, std, self.dtype)
        self.c_proj = Conv1D(config.n_embd, std / math.sqrt(2 * config.n_layer), self.dtype)
        self.dropout = Dropout(config.resid_pdrop)

    def __call__(self, x_BxTxD, row_ids_B, deterministic):
        hidden_BxTxI = ACTIVATIONS[self.config.activation_function](self.c_fc(x_BxTxD))
        return self.dropout(self.c_proj(hidden_BxTxI), row_ids_B, deterministic)


class Block(nn.Module):
    config: Any
    layer: int
    dtype: Dtype = jnp.float32

    def setup(self):
        epsilon = self.config.layer_norm_epsilon
        self.ln_1 = LayerNorm(epsilon, self.dtype)
        self.attn = Attention(self.config, self.layer, self.dtype)
        self.ln_2 = LayerNorm(epsilon, self.dtype)
        self.mlp = MLP(self.config, self.dtype)

    def __call__(self, x_BxTxD, mask_BxK, row_ids_B, deterministic, init_cache):
        normed = self.ln_1(x_BxTxD)
        x_BxTxD = x_BxTxD + self.attn(normed, mask_BxK, row_ids_B, deterministic, init_cache)
        return x_BxTxD + self.mlp(self.ln_2(x_BxTxD), row_ids_B, deterministic)


class Blocks(nn.Module):
    config: Any
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxTxD, *args):
        for layer in range(self.config.n_layer):
            x_BxTxD = Block(self.config, layer, self.dtype, name=str(layer))(x_BxTxD, *args)
        return x_BxTxD


class FlaxGPT2Module(nn.Module):
    """GPT-2 without its head: ids -> states after the last LayerNorm."""

    config: Any
    dtype: Dtype = jnp.float32

    def setup(self):
        config = self.config
        init = nn.initializers.normal(config.initializer_range)
        self.wte = nn.Embed(config.vocab_size, config.n_embd, self.dtype, embedding_init=init)
        self.wpe = nn.Embed(config.n_positions, config.n_embd, self.dtype, embedding_init=init)
        self.dropout = Dropout(config.embd_pdrop)
        self.h = Blocks(config, self.dtype)
        self.ln_f = LayerNorm(config.layer_norm_epsilon, self.dtype)

    def __call__(
        self,
        input_ids_BxT,
        attention_mask_BxK=None,
        position_ids_BxT=None,
        deterministic=True,
        init_cache=False,
        row_ids_B=None,
    ):
        B, T = input_ids_BxT.shape
        if position_ids_BxT is None:
            position_ids_BxT = jnp.broadcast_to(jnp.arange(T), (B, T))
        if row_ids_B is None:
            row_ids_B = jnp.arange(B)
        x_BxTxD = self.wte(input_ids_BxT) + self.wpe(position_ids_BxT)
        x_BxTxD = self.dropout(x_BxTxD, row_ids_B, deterministic)
        x_BxTxD = self.h(x_BxTxD, attention_mask_BxK, row_ids_B, deterministic, init_cache)
        return self.ln_f(x_BxTxD)


class FlaxGPT2LMHeadModule(nn.Module):
    """GPT-2 with its language-model head: ids -> float32 logits.

    A position may attend to those up to itself that `attention_mask` (B, K), 1 = real token,
    leaves open; without a mask, to all of them. `row_ids` (B,) int32 name the rows for
    dropout, needed with `deterministic=False` only. Out-of-range ids give NaN.
    """

    config: Any
    dtype: Dtype = jnp.float32

    def setup(self):
        config = self.config
        self.transformer = FlaxGPT2Module(config, self.dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Dense(
                config.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(config.initializer_range),
                dot_general=_float32_dot,
            )

    def __call__(self, input_ids_BxT, *args, **kwargs):
        x_BxTxD = self.transformer(input_ids_BxT, *args, **kwargs)
        if not self.config.tie_word_embeddings:
            return self.lm_head(x_BxTxD)
        wte_VxD = self.transformer.wte.embedding.astype(self.dtype)
        return _float32_dot(x_BxTxD, wte_VxD, (((2,), (1,)), ((), ())))


def _float32_dot(x, y, dimension_numbers, precision=None, preferred_element_type=None):
    """A product of `dtype` operands that is summed up, and returned, in float32."""
    del preferred_element_type
    return jax.lax.dot_general(
        x, y, dimension_numbers, precision, preferred_element_type=jnp.float32
    )
