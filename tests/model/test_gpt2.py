"""The model is PyTorch's GPT-2: same logits, same gradients, same initial distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from gpt2_flax.model.gpt2 import (
    ACTIVATIONS,
    FlaxGPT2LMHeadModule,
    FlaxGPT2Module,
    check_config,
    empty_cache,
    softmax,
)
from gpt2_flax.model.ops import dropout
from gpt2_flax.model.ops.layer_norm import layer_norm
from gpt2_flax.pretrained import weights
from gpt2_flax.pretrained.modeling import FlaxGPT2LMHeadModel, param_shapes

B, T = 2, 5


def torch_twin(config, seed=0):
    """(PyTorch's model with random weights, the same weights as our tree)."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    oracle = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():  # biases and scales off their initial 0 and 1
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = {name: tensor.numpy() for name, tensor in oracle.state_dict().items()}
    return oracle, weights.from_pytorch(state, param_shapes(config))


def random_ids(config, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (B, T))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_inner": 20},
        {"tie_word_embeddings": False},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"layer_norm_epsilon": 0.1},
        *({"activation_function": name} for name in ACTIVATIONS),
    ],
    ids=lambda changes: "-".join(map(str, *changes.items())) if changes else "default",
)
def test_logits_are_pytorchs(tiny_config, changes):
    config = tiny_config(**changes)
    oracle, params = torch_twin(config)
    ids = random_ids(config)
    expected = oracle(torch.tensor(ids)).logits.detach().numpy()
    got = FlaxGPT2LMHeadModule(config).apply({"params": params}, jnp.asarray(ids)).logits
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_logits_of_left_padded_rows_are_pytorchs(tiny_config):
    config = tiny_config()
    oracle, params = torch_twin(config)
    ids = random_ids(config)
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    expected = oracle(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(positions),
    ).logits.detach()
    model = FlaxGPT2LMHeadModel(config, params=params)
    got = model(ids, attention_mask=mask, position_ids=positions).logits
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_gradients_are_pytorchs(tiny_config):
    """Compiled: XLA's CPU fusions have had wrong gradients (jaxlib 0.10.2 and later)."""
    config = tiny_config()
    oracle, params = torch_twin(config)
    ids = random_ids(config)
    oracle(torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
    expected = weights.from_pytorch(
        {name: p.grad.numpy() for name, p in oracle.named_parameters()}, param_shapes(config)
    )

    def loss(params):
        logits = FlaxGPT2LMHeadModule(config).apply({"params": params}, jnp.asarray(ids)).logits
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(log_probs, jnp.asarray(ids)[:, 1:, None], -1).mean()

    got = flatten_dict(jax.jit(jax.grad(loss))(params))
    for name, leaf in flatten_dict(expected).items():
        assert np.abs(leaf).max() > 1e-5, name
        np.testing.assert_allclose(got[name], leaf, atol=1e-6, err_msg=str(name))


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_tree_is_that_of_hugging_faces_flax_class(tiny_config, tied):
    """As `FlaxGPT2LMHeadModel(config).params` of transformers 4.57.6 lists it."""
    D, I, V, P = 12, 48, 31, 7  # noqa: E741
    block = {
        "ln_1/scale": (D,), "ln_1/bias": (D,), "ln_2/scale": (D,), "ln_2/bias": (D,),
        "attn/c_attn/kernel": (3 * D, D), "attn/c_attn/bias": (3 * D,),
        "attn/c_proj/kernel": (D, D), "attn/c_proj/bias": (D,),
        "mlp/c_fc/kernel": (I, D), "mlp/c_fc/bias": (I,),
        "mlp/c_proj/kernel": (D, I), "mlp/c_proj/bias": (D,),
    }  # fmt: skip
    expected = {
        "transformer/wte/embedding": (V, D),
        "transformer/wpe/embedding": (P, D),
        "transformer/ln_f/scale": (D,),
        "transformer/ln_f/bias": (D,),
        **{f"transformer/h/{n}/{name}": shape for n in "01" for name, shape in block.items()},
    }
    if not tied:
        expected["lm_head/kernel"] = (D, V)
    shapes = flatten_dict(param_shapes(tiny_config(tie_word_embeddings=tied)), sep="/")
    assert {name: leaf.shape for name, leaf in shapes.items()} == expected


def test_initial_weights_have_gpt2s_distribution(tiny_config):
    config = tiny_config(n_embd=192, n_layer=8, vocab_size=311, n_positions=97)
    params = flatten_dict(FlaxGPT2LMHeadModel(config).params, sep="/")
    for name, leaf in params.items():
        if name.endswith("bias"):
            assert not leaf.any(), name
        elif name.endswith("scale"):
            assert (leaf == 1).all(), name
        else:
            std = 0.02 / np.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert abs(leaf.std() / std - 1) < 0.03, name
            assert abs(leaf.mean()) < 5 * std / np.sqrt(leaf.size), name


@pytest.mark.parametrize("masked", [False, True])
def test_cached_steps_give_the_logits_of_one_pass(tiny_config, masked):
    config = tiny_config()
    _, params = torch_twin(config)
    module, ids = FlaxGPT2LMHeadModule(config), jnp.asarray(random_ids(config))
    mask = jnp.ones((B, T), jnp.int32).at[0, 1].set(0) if masked else None
    whole = module.apply({"params": params}, ids, mask).logits
    cache = empty_cache(config, B, T, jnp.float32)
    made = module.init(jax.random.key(0), ids, init_cache=True)["cache"]
    jax.tree.map(np.testing.assert_array_equal, cache, made)
    for start, end in ((0, 2), (2, 3), (3, 5)):
        positions = jnp.broadcast_to(jnp.arange(start, end), (B, end - start))
        output, updated = module.apply(
            {"params": params, "cache": cache},
            ids[:, start:end],
            mask,
            position_ids=positions,
            mutable=["cache"],
        )
        cache = updated["cache"]
        np.testing.assert_allclose(output.logits, whole[:, start:end], atol=1e-6)


def test_layer_norm_and_its_derivatives_are_autodiffs():
    def plain(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred / jnp.sqrt(variance + 1e-3) * scale + bias

    def ours(x, scale, bias):
        return layer_norm(x, scale, bias, 1e-3)

    rng = np.random.default_rng(0)
    x, dx = rng.normal(2, 3, (2, 5, 12)), rng.normal(size=(2, 5, 12))
    arguments = tuple(
        map(jnp.float32, (x, rng.normal(size=(1, 1, 12)), rng.normal(size=(1, 1, 12))))
    )
    tangents = tuple(
        map(jnp.float32, (dx, rng.normal(size=(1, 1, 12)), rng.normal(size=(1, 1, 12))))
    )
    for got, expected in zip(
        jax.jvp(ours, arguments, tangents), jax.jvp(plain, arguments, tangents), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    weigh = jnp.float32(dx)
    got, expected = (
        jax.grad(lambda *a, f=f: (f(*a) * weigh).sum(), (0, 1, 2))(*arguments)
        for f in (ours, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_softmax_and_its_derivatives_are_autodiffs():
    rng = np.random.default_rng(0)
    scores, dscores = (jnp.float32(rng.normal(0, 2, (2, 3, 5, 7))) for _ in range(2))
    scores = scores.at[0, 0, 0, :3].set(jnp.finfo(jnp.float32).min)  # not to be attended to
    scores = scores.at[1, 1, 1].set(jnp.finfo(jnp.float32).min)  # a row of nothing but padding
    got, expected = (jax.jvp(f, (scores,), (dscores,)) for f in (softmax, jax.nn.softmax))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)
    np.testing.assert_allclose(got[0][1, 1, 1], 1 / 7, rtol=1e-6)
    got, expected = (
        jax.grad(lambda scores, f=f: (f(scores) * dscores).sum())(scores)
        for f in (softmax, jax.nn.softmax)
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_derivative_of_gelu_is_that_of_its_formula():
    """By the formula in float64: float32's tanh is 1 where the slope is not yet."""
    x = np.linspace(-8.0, 8.0, 1601)
    tanh = np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))
    inside = np.sqrt(2.0 / np.pi) * (1.0 + 3 * 0.044715 * x**2)
    slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh**2) * inside
    gelu, one = ACTIVATIONS["gelu_new"], jnp.float32(x)
    np.testing.assert_allclose(jax.jvp(gelu, (one,), (jnp.ones_like(one),))[1], slope, atol=3e-6)
    np.testing.assert_allclose(jax.grad(lambda x: gelu(x).sum())(one), slope, atol=3e-6)
    far = jax.vmap(jax.grad(gelu))(jnp.array([-1e4, -30.0, 30.0, 1e4]))
    np.testing.assert_array_equal(far, [0.0, 0.0, 1.0, 1.0])


def test_bfloat16_computes_softmax_norm_and_logits_in_float32(tiny_config):
    config = tiny_config()
    _, params = torch_twin(config)
    ids = jnp.asarray(random_ids(config))
    exact = FlaxGPT2LMHeadModule(config).apply({"params": params}, ids).logits
    module = FlaxGPT2LMHeadModule(config, jnp.bfloat16)
    logits = module.apply({"params": params}, ids).logits
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, atol=0.03)
    program = jax.make_jaxpr(lambda p: module.apply({"params": p}, ids))(params)
    for name in ("exp", "rsqrt"):  # of softmax and of LayerNorm
        types = {str(out.aval.dtype) for eqn in equations(program) if eqn.primitive.name == name
                 for out in eqn.outvars}  # fmt: skip
        assert types == {"float32"}, name


def equations(program):
    """All equations of a jaxpr, those of its inner jaxprs too."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(value)


def test_dropout_follows_the_row_not_its_place(tiny_config):
    config = tiny_config(n_layer=1, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    _, params = torch_twin(config)
    ids, rows = jnp.asarray(random_ids(config)), jnp.array([4, 9])
    module, key = FlaxGPT2LMHeadModule(config), jax.random.key(1)

    @jax.jit
    def run(ids, rows, key):
        return module.apply(
            {"params": params}, ids, deterministic=False, row_ids=rows, rngs={"dropout": key}
        ).logits

    logits = run(ids, rows, key)
    np.testing.assert_allclose(run(ids[::-1], rows[::-1], key)[::-1], logits, atol=1e-6)
    np.testing.assert_allclose(run(ids[1:], rows[1:], key), logits[1:], atol=1e-6)
    assert not np.allclose(run(ids, rows + 1, key), logits)
    assert not np.allclose(run(ids, rows, jax.random.key(2)), logits)
    twins = run(jnp.tile(ids[:1], (2, 1)), rows, key)
    assert not np.allclose(twins[0], twins[1])


@pytest.mark.parametrize("fields", [{}, {"gradient_checkpointing": True}])
def test_no_two_masks_of_a_model_are_of_the_same_words(tiny_config, monkeypatch, fields):
    """Embedding; of 3 layers the probabilities and output of both attentions, and the MLP."""
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    config = tiny_config(n_layer=3, add_cross_attention=True, **rates)
    module, ids = FlaxGPT2LMHeadModule(config, **fields), jnp.asarray(random_ids(config))
    params = module.init(jax.random.key(0), ids)["params"]
    drawn, made = [], dropout.words_of

    def words_of(words_Bx2, shape):
        drawn.append(np.asarray(words_Bx2))
        return made(words_Bx2, shape)

    monkeypatch.setattr(dropout, "words_of", words_of)
    module.apply(
        {"params": params}, ids, deterministic=False, rngs={"dropout": jax.random.key(1)},
        encoder_hidden_states=jnp.ones((len(ids), 4, config.n_embd)),
    )  # fmt: skip
    assert len(drawn) == 1 + 3 * 5
    assert len(np.unique(drawn)) == np.size(drawn) == len(drawn) * len(ids) * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 13}, "n_embd=13 and n_head=3"),
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"activation_function": "gleu"}, "unknown activation_function 'gleu'"),
        ({"n_inner": 0}, "n_inner must be at least 1"),
        ({"attn_pdrop": 1.5}, "attn_pdrop must be between 0 and 1, got 1.5"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon must be 0 or more, got -1.0"),
    ],
)
def test_a_config_that_names_no_model_is_refused(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        check_config(tiny_config(**changes))


NEEDS_NEW_MASKS = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24),
    reason="before transformers 5.24 PyTorch's class treats an encoder's mask otherwise",
)


def encoder_states(config, seed=1):
    """(states (B, 4, D), mask (B, 4)) of an encoder."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(B, 4, config.n_embd)).astype(np.float32)
    return states, np.array([[1, 1, 1, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    "changes",
    [{}, {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}],
    ids=["plain", "scales"],
)
@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=NEEDS_NEW_MASKS)])
def test_cross_attention_is_pytorchs(tiny_config, changes, masked):
    config = tiny_config(add_cross_attention=True, **changes)
    oracle, params = torch_twin(config)
    ids, (states, mask) = random_ids(config), encoder_states(config)
    mask = mask if masked else np.ones_like(mask)
    expected = oracle(
        torch.tensor(ids),
        encoder_hidden_states=torch.tensor(states),
        encoder_attention_mask=torch.tensor(mask),
        output_attentions=True,
    )
    got = FlaxGPT2LMHeadModule(config).apply(
        {"params": params}, ids, encoder_hidden_states=states,
        encoder_attention_mask=mask if masked else None, output_attentions=True,
    )  # fmt: skip
    np.testing.assert_allclose(got.logits, expected.logits.detach(), atol=1e-5)
    assert len(got.cross_attentions) == 2
    for ours, theirs in zip(got.cross_attentions, expected.cross_attentions, strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), atol=1e-6)
    without = FlaxGPT2LMHeadModule(config).apply({"params": params}, ids).logits
    np.testing.assert_allclose(without, oracle(torch.tensor(ids)).logits.detach(), atol=1e-5)
    assert np.abs(without - got.logits).max() > 1e-3


def test_states_of_an_encoder_need_a_model_with_cross_attention(tiny_config):
    config = tiny_config()
    params = torch_twin(config)[1]
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        FlaxGPT2LMHeadModule(config).apply(
            {"params": params}, random_ids(config), encoder_hidden_states=np.zeros((B, 4, 12))
        )


def test_hidden_states_and_attentions_are_pytorchs(tiny_config):
    """The last hidden state comes after ln_f; with padding, attention rows are compared too."""
    config = tiny_config()
    oracle, params = torch_twin(config)
    ids = random_ids(config)
    expected = oracle(torch.tensor(ids), output_hidden_states=True, output_attentions=True)
    got = FlaxGPT2LMHeadModule(config).apply(
        {"params": params}, ids, output_hidden_states=True, output_attentions=True
    )
    assert len(got.hidden_states) == 3 and len(got.attentions) == 2
    assert got.cross_attentions is None and got.past_key_values is None
    for name in ("hidden_states", "attentions"):
        for ours, theirs in zip(got[name], expected[name], strict=True):
            np.testing.assert_allclose(ours, theirs.detach(), atol=1e-5)
    bare = FlaxGPT2Module(config).apply({"params": params["transformer"]}, ids)
    np.testing.assert_array_equal(bare.last_hidden_state, got.hidden_states[-1])
    assert list(bare.keys()) == ["last_hidden_state"]
    in_order = FlaxGPT2LMHeadModule(config).apply(
        {"params": params}, ids, None, None, None, None, True, False, True, True, False
    )
    assert [type(part) for part in in_order[1:]] == [tuple, tuple]
    np.testing.assert_array_equal(in_order[0], got.logits)
    assert len(in_order) == 3 and len(in_order[1]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "share", "attn_pdrop", "changes"),
    [
        ("gradient_checkpointing", 0.6, 0.0, {}),
        ("attention_checkpointing", 0.7, 0.3, {"add_cross_attention": True}),
    ],
)
def test_remat_changes_memory_only(tiny_config, kind, share, attn_pdrop, changes):
    """Gradients, dropout included; the memory of 124M is measured in docs/benchmarks.md."""
    config = tiny_config(
        n_layer=3, n_positions=128, resid_pdrop=0.3, attn_pdrop=attn_pdrop, **changes
    )
    params = torch_twin(config)[1]
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 31, (B, 128)))
    states = encoder_states(config)[0] if changes else None

    def gradient(checkpointing):
        module = FlaxGPT2LMHeadModule(config, **{kind: checkpointing})

        def loss(params):
            logits = module.apply(
                {"params": params}, ids, encoder_hidden_states=states, deterministic=False,
                rngs={"dropout": jax.random.key(3)},
            ).logits  # fmt: skip
            return jnp.square(jax.nn.log_softmax(logits)).mean()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    (plain, much), (again, little) = gradient(False), gradient(True)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    assert largest > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, again)
    assert little < share * much


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("compat", [False, True], ids=["plain", "hf_flax_compat"])
def test_a_padded_vocabulary_has_no_parameters_and_no_probability(tiny_config, tied, compat):
    config = tiny_config(tie_word_embeddings=tied)
    params, ids = torch_twin(config)[1], random_ids(config)
    module = FlaxGPT2LMHeadModule(config, hf_flax_compat=compat, pad_vocab_to_multiple_of=20)
    drawn = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)
    # Far below the zero that a padded row's product is: ln_f gives -1e30, and the head is above 0.
    params = jax.tree.map(jnp.abs, params)
    params["transformer"]["ln_f"] = {"scale": jnp.zeros(12), "bias": jnp.full(12, -1e30)}
    logits = jax.jit(lambda params: module.apply({"params": params}, ids).logits)(params)
    assert logits.shape == (B, T, 40)
    assert logits[..., :31].max() < -1e27
    assert logits.argmax(-1).max() < 31
    probs = jax.nn.softmax(logits)
    np.testing.assert_array_equal(probs[..., 31:], 0.0)
    np.testing.assert_allclose(probs.sum(-1), 1.0, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (jnp.float32, {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
        (jnp.bfloat16, {}),
    ],
    ids=str,
)
def test_one_more_position_is_what_it_is_elsewhere(monkeypatch, dtype, settings):
    """On a CPU the new key and value are taken beside the cache, and written afterwards."""
    config = transformers.GPT2Config(
        n_layer=2, n_head=3, n_embd=24, vocab_size=31, n_positions=16, **settings
    )
    model = FlaxGPT2LMHeadModel(config, seed=2, dtype=dtype)
    ids = jax.random.randint(jax.random.key(1), (2, 7), 0, 31)
    mask = np.ones((2, 9), int)
    mask[1, :3] = 0

    def in_turn(platform):
        monkeypatch.setattr("gpt2_flax.distributed.devices.platform", lambda: platform)
        kwargs = {"attention_mask": mask, "past_key_values": model.init_cache(2, 9)}
        found = []
        for first, last in ((0, 5), (5, 6), (6, 7)):
            positions = jnp.broadcast_to(jnp.arange(first, last), (2, last - first))
            out = model(
                ids[:, first:last], position_ids=positions, output_attentions=True, **kwargs
            )
            kwargs["past_key_values"] = out.past_key_values
            found.append((out.logits, out.attentions, out.past_key_values))
        return found

    here, elsewhere = in_turn("cpu"), in_turn("gpu")
    assert jax.tree.structure(here) == jax.tree.structure(elsewhere)
    atol = 1e-6 if dtype == jnp.float32 else 0.02
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(elsewhere), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=atol, rtol=atol)
    assert here[-1][-1]["transformer"]["h"]["0"]["attn"]["cache_index"] == 7


@pytest.mark.slow
def test_a_full_cache_takes_one_more_in_its_last_place_as_it_does_elsewhere(monkeypatch):
    """As far as the place is not known, as under jit; else it is refused."""
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=31, n_positions=16)
    model = FlaxGPT2LMHeadModel(config, seed=2)
    ids = jax.random.randint(jax.random.key(1), (2, 4), 0, 31)

    def one_too_many(platform):
        monkeypatch.setattr("gpt2_flax.distributed.devices.platform", lambda: platform)
        positions = jnp.broadcast_to(jnp.arange(4), (2, 4))
        full = model(ids, position_ids=positions, past_key_values=model.init_cache(2, 4))

        def more(cache):
            last = positions[:, -1:] + 1
            out = model(ids[:, :1], position_ids=last, past_key_values=cache)
            return out.logits, out.past_key_values

        return jax.jit(more)(full.past_key_values)

    here, elsewhere = one_too_many("cpu"), one_too_many("gpu")
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(elsewhere), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
