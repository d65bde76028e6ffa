"""What users of FlaxGPT2LMHeadModel wrote against transformers 4, with only the import changed.

The uses are those that its documentation and its example script showed: each test is one.
A tiny model and tokenizer on disk stand in for the hub's `gpt2`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from flax import traverse_util
from flax.core import freeze
from flax.training import train_state
from flax.training.common_utils import onehot, shard
from transformers import AutoTokenizer, GPT2Config

from gpt2_flax import FlaxGPT2LMHeadModel
from gpt2_flax.data.tokenizers import make_tokenizer
from gpt2_flax.pretrained.modeling import FlaxGPT2Model

SIZES = {
    "n_layer": 1, "n_head": 3, "n_embd": 12, "n_positions": 40, "vocab_size": 257,
    "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A directory to be named where the documentation names "gpt2"."""
    directory = tmp_path_factory.mktemp("hub") / "gpt2"
    FlaxGPT2LMHeadModel(GPT2Config(**SIZES)).save_pretrained(directory)
    make_tokenizer("bytes", ()).save(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(gpt2):
    return AutoTokenizer.from_pretrained(gpt2)


@pytest.fixture(scope="module")
def model(gpt2):
    return FlaxGPT2LMHeadModel.from_pretrained(gpt2)


def test_next_token_logits_of_a_sentence(model, tokenizer):
    inputs = tokenizer("Hello, my dog is cute", return_tensors="np")
    outputs = model(**inputs)
    next_token_logits = outputs.logits[:, -1]
    assert next_token_logits.shape == (1, 257)
    assert outputs[0] is outputs.logits is outputs["logits"]


def test_last_hidden_states_of_the_bare_model(gpt2, tokenizer):
    model = FlaxGPT2Model.from_pretrained(gpt2)
    inputs = tokenizer("Hello, my dog is cute", return_tensors="np")
    last_hidden_states = model(**inputs).last_hidden_state
    assert last_hidden_states.shape == (1, 21, 12)


@pytest.mark.slow
def test_generate_from_an_encoding(model, tokenizer):
    input_ids = tokenizer("The dog", return_tensors="np").input_ids
    greedy = model.generate(input_ids, max_length=12, do_sample=False).sequences
    key = jax.random.PRNGKey(3)
    sampled = model.generate(
        input_ids, do_sample=True, max_length=12, top_k=50, top_p=0.95, prng_key=key
    ).sequences
    beams = model.generate(input_ids, num_beams=2, max_length=12).sequences
    for sequences in (greedy, sampled, beams):
        assert sequences.shape == (1, 12)
        # Tokenizers of transformers 5 take no arrays of JAX any more.
        assert tokenizer.batch_decode(np.asarray(sequences))[0].startswith("The dog")


@pytest.mark.slow
def test_generate_for_a_left_padded_batch(model, gpt2):
    tokenizer = AutoTokenizer.from_pretrained(gpt2, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(["The dog", "My"], return_tensors="np", padding=True)
    outputs = model.generate(**inputs, max_new_tokens=4, pad_token_id=tokenizer.pad_token_id)
    alone = model.generate(tokenizer("My", return_tensors="np").input_ids, max_new_tokens=4)
    assert outputs.sequences[1, -4:].tolist() == alone.sequences[0, -4:].tolist()


def test_generate_under_jit(model, tokenizer):
    input_ids = tokenizer("The dog", return_tensors="np").input_ids
    fast_generate = jax.jit(
        lambda ids, params: model.generate(ids, params=params, max_length=12).sequences
    )
    expected = model.generate(input_ids, max_length=12).sequences
    assert fast_generate(input_ids, model.params).tolist() == expected.tolist()


@pytest.mark.slow
def test_decoding_by_hand_with_the_cache(model, tokenizer):
    input_ids = jnp.asarray(tokenizer("The dog", return_tensors="np").input_ids)
    kwargs = model.prepare_inputs_for_generation(input_ids, 9)
    ids, token = input_ids, input_ids
    for _ in range(2):
        outputs = model(token, **kwargs)
        token = outputs.logits[:, -1:].argmax(-1).astype("i4")
        ids = jnp.concatenate([ids, token], axis=1)
        kwargs = model.update_inputs_for_generation(outputs, kwargs)
    expected = model.generate(input_ids, max_length=9, eos_token_id=None, pad_token_id=0)
    assert ids.tolist() == expected.sequences.tolist()


@pytest.mark.slow
def test_compute_in_half_precision_and_cast_the_parameters(gpt2, tokenizer):
    model = FlaxGPT2LMHeadModel.from_pretrained(gpt2, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree_util.tree_leaves(model.params)} == {jnp.float32.dtype}
    model.params = model.to_bf16(model.params)
    assert model.params["transformer"]["wte"]["embedding"].dtype == jnp.bfloat16
    assert np.isfinite(model(**tokenizer("Hi", return_tensors="np")).logits).all()

    flat_params = traverse_util.flatten_dict(model.to_fp32(model.params))
    mask = {path: path[-2] not in ("ln_1", "ln_2", "ln_f") for path in flat_params}
    cast = model.to_fp16(model.to_fp32(model.params), traverse_util.unflatten_dict(mask))
    assert cast["transformer"]["ln_f"]["scale"].dtype == jnp.float32
    assert cast["transformer"]["wpe"]["embedding"].dtype == jnp.float16


def test_save_and_load_again(model, tmp_path):
    model.save_pretrained(tmp_path / "default")
    model.save_pretrained(tmp_path / "msgpack", safe_serialization=False)
    for directory in (tmp_path / "default", tmp_path / "msgpack"):
        again = FlaxGPT2LMHeadModel.from_pretrained(directory)
        jax.tree_util.tree_map(np.testing.assert_array_equal, again.params, model.params)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "default")
    theirs.save_pretrained(tmp_path / "pytorch")
    back = FlaxGPT2LMHeadModel.from_pretrained(tmp_path / "pytorch", from_pt=True)
    jax.tree_util.tree_map(np.testing.assert_array_equal, back.params, model.params)


def test_parameters_outside_the_model(gpt2, tokenizer):
    model, params = FlaxGPT2LMHeadModel.from_pretrained(gpt2, _do_init=False)
    inputs = tokenizer("Hello", return_tensors="np")
    logits = model(**inputs, params=params).logits
    with pytest.raises(ValueError, match="params"):
        model(**inputs)
    again = FlaxGPT2LMHeadModel.from_pretrained(gpt2)
    again.params = freeze(params)  # a FrozenDict is unfrozen
    np.testing.assert_array_equal(again(**inputs).logits, logits)


def test_a_model_from_a_configuration_and_a_seed(gpt2):
    config = GPT2Config.from_pretrained(gpt2)
    model = FlaxGPT2LMHeadModel(config, seed=0, dtype=jnp.float32, input_shape=(1, 8))
    config = FlaxGPT2LMHeadModel.from_pretrained(gpt2, n_positions=40, attn_pdrop=0.0).config
    assert (config.attn_pdrop, model.config.attn_pdrop) == (0.0, 0.1)


def test_attentions_and_hidden_states_as_a_tuple(model, tokenizer):
    inputs = tokenizer("Hello", return_tensors="np")
    logits, hidden_states, attentions = model(
        **inputs, output_hidden_states=True, output_attentions=True, return_dict=False
    )
    assert logits.shape == (1, 5, 257)
    assert [state.shape for state in hidden_states] == [(1, 5, 12)] * 2
    assert [probabilities.shape for probabilities in attentions] == [(1, 3, 5, 5)]


# ---------------------------------------------------------------- run_clm_flax.py's way


class TrainState(train_state.TrainState):
    dropout_rng: jnp.ndarray


def loss_fn(logits, labels):
    shift_logits, shift_labels = logits[..., :-1, :], labels[..., 1:]
    targets = onehot(shift_labels, shift_logits.shape[-1])
    return optax.softmax_cross_entropy(shift_logits, targets).mean()


def decay_mask_fn(params):
    """No decay for biases and for the scales of LayerNorm, which the script found by name."""
    flat_params = traverse_util.flatten_dict(params)
    candidates = ("layernorm", "layer_norm", "ln")
    layer_norm_named = {
        layer[-2:]
        for name in candidates
        for layer in flat_params
        if name in "".join(layer).lower()
    }
    mask = {path: path[-1] != "bias" and path[-2:] not in layer_norm_named for path in flat_params}
    return traverse_util.unflatten_dict(mask)


def make_state(model):
    optimizer = optax.adamw(learning_rate=1e-2, weight_decay=0.1, mask=decay_mask_fn)
    return TrainState.create(
        apply_fn=model.__call__,
        params=model.params,
        tx=optimizer,
        dropout_rng=jax.random.PRNGKey(1),
    )


def train_step(state, batch, axis_name=None):
    dropout_rng, new_dropout_rng = jax.random.split(state.dropout_rng)

    def compute_loss(params):
        labels = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = state.apply_fn(**inputs, params=params, dropout_rng=dropout_rng, train=True)[0]
        return loss_fn(logits, labels)

    loss, grad = jax.value_and_grad(compute_loss)(state.params)
    if axis_name is not None:
        loss, grad = jax.lax.pmean((loss, grad), axis_name)
    return state.apply_gradients(grads=grad, dropout_rng=new_dropout_rng), loss


@pytest.fixture(scope="module")
def batch():
    text = np.frombuffer(b"tea and milk and sugar and honey" * 8, np.uint8)
    ids = text.reshape(8, 32).astype(np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}


@pytest.mark.slow
def test_a_training_loop_under_jit(gpt2, batch):
    state = make_state(FlaxGPT2LMHeadModel.from_pretrained(gpt2))
    step = jax.jit(train_step, donate_argnums=(0,))
    losses = []
    for _ in range(9):
        state, loss = step(state, batch)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_a_training_loop_under_pmap(gpt2, batch):
    """With the state replicated by hand: JAX 0.10 has no device_put_replicated."""
    model = FlaxGPT2LMHeadModel.from_pretrained(gpt2)
    state, n = make_state(model), jax.device_count()
    replicated = jax.tree_util.tree_map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * n), state)
    keys = jax.random.split(jax.random.PRNGKey(1), n)
    replicated = replicated.replace(dropout_rng=keys)
    step = jax.pmap(functools.partial(train_step, axis_name="batch"), "batch")
    replicated, losses = step(replicated, shard(batch))
    assert losses.tolist() == [losses[0]] * n
    params = jax.tree_util.tree_map(lambda leaf: leaf[0], jax.device_get(replicated.params))
    assert jax.tree_util.tree_structure(params) == jax.tree_util.tree_structure(model.params)
    after = loss_fn(model(batch["input_ids"], params=params).logits, batch["labels"])
    assert float(after) < float(losses[0])
