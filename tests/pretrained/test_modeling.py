"""The class that left transformers: its state, its calls, its files."""

import copy
import dataclasses
import json
import pickle

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_flax import FlaxGPT2LMHeadModel, FlaxGPT2Model
from gpt2_flax.errors import CheckpointError, UserError
from gpt2_flax.pretrained.config_files import make_config, read_generation_config
from gpt2_flax.pretrained.modeling import load_with_tokenizer, param_shapes
from tests.model.test_gpt2 import B, T, encoder_states, random_ids, torch_twin


def assert_same_tree(got, expected):
    got, expected = flatten_dict(got), flatten_dict(expected)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=str(name))
        assert got[name].dtype == leaf.dtype, name


@pytest.fixture(scope="module")
def model(tiny_config):
    config = tiny_config()
    return FlaxGPT2LMHeadModel(config, params=torch_twin(config)[1])


# ---------------------------------------------------------------- state


def test_positional_arguments_are_the_originals(tiny_config):
    config = tiny_config()
    model = FlaxGPT2LMHeadModel(config, (1, 3), 5, jnp.bfloat16)
    assert (model.config, model.input_shape, model.dtype) == (config, (1, 3), jnp.bfloat16)
    assert (model.framework, model.base_model_prefix) == ("flax", "transformer")
    np.testing.assert_array_equal(model.key, jax.random.PRNGKey(5))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("float32")}
    assert_same_tree(model.params, FlaxGPT2LMHeadModel(config, seed=5).params)
    other = FlaxGPT2LMHeadModel(config, seed=6).params
    assert (
        other["transformer"]["wte"]["embedding"] != model.params["transformer"]["wte"]["embedding"]
    ).all()
    assert FlaxGPT2LMHeadModel._from_config(config, dtype="bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": None}, ValueError, "config cannot be None"),
        ({"config": {"n_layer": 1}}, ValueError, "must be a transformers.GPT2Config, got dict"),
        ({"dtype": jnp.int32}, ValueError, "floating-point type"),
        ({"gradient_chekpointing": True}, TypeError, "gradient_chekpointing"),
    ],
)
def test_a_constructor_refuses(tiny_config, arguments, error, message):
    with pytest.raises(error, match=message):
        FlaxGPT2LMHeadModel(**{"config": tiny_config()} | arguments)


def test_a_model_without_weights_takes_them_with_each_call(tiny_config, model):
    config = tiny_config()
    empty = FlaxGPT2LMHeadModel(config, _do_init=False)
    for use in (lambda: empty.params, lambda: setattr(empty, "params", {})):
        with pytest.raises(ValueError, match="_do_init=False"):
            use()
    shapes = flatten_dict(empty.params_shape_tree)
    assert empty.required_params == set(shapes) == set(flatten_dict(model.params))
    params = jax.jit(empty.init_weights, static_argnums=1)(empty.key, empty.input_shape)
    for path, leaf in flatten_dict(params).items():
        assert (leaf.shape, leaf.dtype) == (shapes[path].shape, shapes[path].dtype)
    ids = random_ids(config)
    np.testing.assert_array_equal(empty(ids, params=model.params).logits, model(ids).logits)


def test_parameters_that_lack_something_are_refused(model):
    leaves = dict(flatten_dict(model.params))
    del leaves[("transformer", "ln_f", "bias")]
    fresh = FlaxGPT2LMHeadModel(model.config)
    with pytest.raises(ValueError, match=r"params lacks transformer/ln_f/bias$"):
        fresh.params = unflatten_dict(leaves)
    fresh.params = flax.core.freeze(model.params)
    assert type(fresh.params) is dict


def test_init_weights_fills_in_what_a_file_lacked(model):
    leaves = dict(flatten_dict(model.params))
    path = ("transformer", "ln_f", "bias")
    del leaves[path]
    other = FlaxGPT2LMHeadModel(model.config, _do_init=False)
    other._missing_keys = {path}
    filled = flatten_dict(other.init_weights(other.key, (1, 1), unflatten_dict(leaves)))
    assert (filled.pop(path) == 0).all()
    assert_same_tree(unflatten_dict(filled), unflatten_dict(leaves))


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_casts_make_new_trees(model, name):
    dtype = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}[name]
    start = model.to_bf16(model.params) if name == "fp32" else model.params
    cast = getattr(model, f"to_{name}")
    assert {leaf.dtype for leaf in jax.tree.leaves(cast(start))} == {jnp.dtype(dtype)}
    mask = unflatten_dict({path: path[-1] == "kernel" for path in flatten_dict(start)})
    for path, leaf in flatten_dict(cast(start, mask)).items():
        before = flatten_dict(start)[path]
        assert leaf.dtype == (dtype if path[-1] == "kernel" else before.dtype)
    frozen = cast(flax.core.freeze(start), mask)
    assert isinstance(frozen, flax.core.FrozenDict)
    whole = {"ids": jnp.arange(3)}
    assert cast(whole)["ids"].dtype == jnp.int32
    assert flatten_dict(model.params)[("transformer", "ln_f", "bias")].dtype == jnp.float32


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_keeps_the_old_rows(tiny_config, tied):
    config = tiny_config(tie_word_embeddings=tied)
    model = FlaxGPT2LMHeadModel(config, params=torch_twin(config)[1])
    ids, before = random_ids(config), model.params
    logits = model(ids).logits
    returned = model.resize_token_embeddings(37, pad_to_multiple_of=8)
    assert returned is model.params
    assert config.vocab_size == 40
    assert model.params_shape_tree["transformer"]["wte"]["embedding"].shape == (40, 12)
    wte = model.params["transformer"]["wte"]["embedding"]
    np.testing.assert_array_equal(wte[:31], before["transformer"]["wte"]["embedding"])
    np.testing.assert_allclose(wte[31:], np.tile(wte[:31].mean(0), (9, 1)), atol=1e-6)
    assert ("lm_head" in model.params) == (not tied)
    grown = model(ids).logits
    assert grown.shape[-1] == 40
    np.testing.assert_allclose(grown[..., :31], logits, atol=1e-6)
    assert (grown[..., 31:].max(-1) < logits.max(-1)).all()
    model.resize_token_embeddings(31)
    assert_same_tree(model.params, jax.tree.map(jnp.asarray, before))
    model.resize_token_embeddings(33, params=model.params)
    assert model(ids).logits.shape[-1] == 33
    with pytest.raises(ValueError, match="must be 1 or more, got 0"):
        model.resize_token_embeddings(0)


def test_resizing_weights_that_are_kept_outside(tiny_config):
    model = FlaxGPT2Model(tiny_config(), _do_init=False)
    params = model.init_weights(model.key)
    with pytest.raises(ValueError, match="_do_init=False"):
        model.resize_token_embeddings(33)
    resized = model.resize_token_embeddings(33, params=params)
    assert resized["wte"]["embedding"].shape == (33, 12)
    assert model(np.array([[32]]), params=resized).last_hidden_state.shape == (1, 1, 12)


def test_gradient_checkpointing_is_switched_on(tiny_config):
    model = FlaxGPT2LMHeadModel(tiny_config())
    ids, before = random_ids(model.config), model(random_ids(model.config)).logits

    def count_recomputed():
        program = str(jax.make_jaxpr(lambda p: model(ids, params=p).logits)(model.params))
        return program.count("custom_vjp_call")

    assert count_recomputed() == 0
    model.enable_gradient_checkpointing()
    assert count_recomputed() == 2
    np.testing.assert_allclose(model(ids).logits, before, atol=1e-6)


# ---------------------------------------------------------------- calls


def test_outputs_are_read_by_attribute_key_and_index(model):
    ids = random_ids(model.config)
    output = model(ids, output_attentions=True, output_hidden_states=True)
    assert output["logits"] is output.logits is output[0]
    assert output[1] is output.hidden_states and output[2] is output["attentions"]
    assert list(output.keys()) == ["logits", "hidden_states", "attentions"]
    assert "logits" in output and "past_key_values" not in output
    assert output.get("cross_attentions") is None and len(output[1:]) == 2
    with pytest.raises(KeyError):
        output["past_key_values"]
    as_tuple = model(ids, None, None, None, None, None, None, None, False, True, True, False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 3
    doubled = jax.tree.map(lambda leaf: 2 * leaf, output)
    assert type(doubled) is type(output)
    np.testing.assert_array_equal(doubled["logits"], 2 * output.logits)
    jitted = jax.jit(lambda ids: model(ids))(ids)
    assert list(jitted) == ["logits"]
    np.testing.assert_allclose(jitted.logits, output.logits, atol=1e-6)


def test_outputs_are_copied_and_changed_only_by_replace(model):
    ids = random_ids(model.config)
    position_ids = np.broadcast_to(np.arange(T), (B, T))
    cache = model.init_cache(B, T)
    output = model(
        ids, past_key_values=cache, position_ids=position_ids, output_hidden_states=True
    )
    assert list(output) == ["logits", "past_key_values", "hidden_states"]
    for same in (copy.copy(output), copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert type(same) is type(output) and list(same) == list(output)
        np.testing.assert_array_equal(same.logits, output.logits)
    without = output.replace(hidden_states=None)
    assert list(without) == ["logits", "past_key_values"] and without.hidden_states is None
    for change in (
        lambda: setattr(output, "logits", 1),
        lambda: output.__setitem__("logits", 1),
        lambda: output.__delitem__("logits"),
        lambda: output.pop("logits"),
        lambda: output.update(logits=1),
        lambda: output.setdefault("attentions", 1),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    assert list(output) == ["logits", "past_key_values", "hidden_states"]


def test_the_configuration_decides_what_is_put_out(tiny_config):
    model = FlaxGPT2LMHeadModel(tiny_config(output_hidden_states=True))
    assert len(model(random_ids(model.config)).hidden_states) == 3
    assert model(random_ids(model.config), output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_cache_is_carried_from_call_to_call(model, return_dict):
    """As the original's own tests use it: a mask as long as the cache, positions given."""
    ids = random_ids(model.config)
    whole = model(ids).logits
    cache = model.init_cache(B, 7)
    mask = np.ones((B, 7), np.int32)
    first = model(
        ids[:, :-1], attention_mask=mask, past_key_values=cache, return_dict=return_dict,
        position_ids=np.broadcast_to(np.arange(T - 1), (B, T - 1)),
    )  # fmt: skip
    last = model(
        ids[:, -1:], attention_mask=mask, past_key_values=first[1], return_dict=return_dict,
        position_ids=np.full((B, 1), T - 1),
    )  # fmt: skip
    np.testing.assert_allclose(last[0], whole[:, -1:], atol=1e-5)
    np.testing.assert_allclose(first[0], whole[:, :-1], atol=1e-5)
    leaves = flatten_dict(last[1], sep="/")
    assert leaves["transformer/h/1/attn/cached_key"].shape == (B, 7, 3, 4)
    assert leaves["transformer/h/0/attn/cache_index"] == T
    assert flatten_dict(cache, sep="/")["transformer/h/0/attn/cache_index"] == 0


def test_a_cache_of_the_bare_model(tiny_config):
    model = FlaxGPT2Model(tiny_config(), dtype=jnp.bfloat16)
    ids = random_ids(model.config)
    cache = model.init_cache(B, T)
    assert cache["h"]["0"]["attn"]["cached_value"].dtype == jnp.bfloat16
    positions = np.broadcast_to(np.arange(T), (B, T))
    got = model(ids, position_ids=positions, past_key_values=cache)
    assert got.past_key_values["h"]["0"]["attn"]["cache_index"] == T
    np.testing.assert_allclose(
        got.last_hidden_state.astype(np.float32),
        model(ids).last_hidden_state.astype(np.float32),
        atol=0.05,
    )


def test_states_of_an_encoder_are_passed_on(tiny_config):
    config = tiny_config(add_cross_attention=True)
    model = FlaxGPT2LMHeadModel(config, params=torch_twin(config)[1])
    ids, (states, mask) = random_ids(config), encoder_states(config)
    got = model(
        ids, encoder_hidden_states=states, encoder_attention_mask=mask, output_attentions=True
    )
    assert list(got) == ["logits", "attentions", "cross_attentions"]
    assert (got.cross_attentions[0][0, :, :, 3] == 0).all()
    unmasked = model(ids, encoder_hidden_states=states).logits
    assert np.abs(unmasked - got.logits).max() > 1e-4


def test_a_mask_may_be_boolean(model):
    ids, mask = random_ids(model.config), np.array([[0, 0, 1, 1, 1], [1] * 5])
    np.testing.assert_array_equal(
        model(ids, attention_mask=mask.astype(bool)).logits, model(ids, mask).logits
    )


def test_train_needs_a_key_for_dropout(tiny_config):
    model = FlaxGPT2LMHeadModel(tiny_config(resid_pdrop=0.5))
    ids = random_ids(model.config)
    with pytest.raises(ValueError, match="dropout_rng"):
        model(ids, train=True)
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        dropped = model(ids, train=True, dropout_rng=key).logits
        assert not np.allclose(dropped, model(ids)["logits"])
    np.testing.assert_array_equal(model(ids, dropout_rng=key).logits, model(ids).logits)
    without = FlaxGPT2LMHeadModel(tiny_config())
    np.testing.assert_array_equal(without(ids, train=True).logits, without(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [[1, 31]]}, r"input_ids must be 0 to 30 \(vocab_size is 31\), got 31"),
        ({"input_ids": [[1, -1]]}, r"got -1"),
        ({"input_ids": [[1.0]]}, "must be integers, got float"),
        ({"input_ids": [1, 2]}, r"shape \(batch, length\), got \(2,\)"),
        ({"input_ids": [[1] * 8]}, "8 long; the model has 7 positions"),
        ({"input_ids": [[1]], "position_ids": [[7]]}, "position_ids must be 0 to 6"),
        ({"input_ids": [[1]], "encoder_hidden_states": np.zeros((1, 1, 12))}, "cross-attention"),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            r"attention_mask .* \(1, 2\),.* \(1, 1\)",
        ),
        (
            {"input_ids": [[1, 2]], "position_ids": [0, 1]},
            r"position_ids must have shape \(1, 2\)",
        ),
        ({"input_ids": [[1]], "encoder_hidden_states": np.zeros((1, 12))}, r"\(1, length, 12\)"),
        (
            {
                "input_ids": [[1]],
                "encoder_hidden_states": np.zeros((1, 4, 12)),
                "encoder_attention_mask": [[1, 1]],
            },
            r"encoder_attention_mask must have shape \(1, 4\)",
        ),
    ],
)
def test_input_out_of_range_is_refused_not_clamped(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)
    as_arrays = {name: jnp.asarray(value) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        model(**as_arrays)


def test_a_cache_that_is_full_or_without_positions_is_refused(model):
    ids, cache = random_ids(model.config), model.init_cache(B, T - 1)
    with pytest.raises(ValueError, match="need position_ids"):
        model(ids, past_key_values=cache)
    positions = np.broadcast_to(np.arange(T), (B, T))
    with pytest.raises(ValueError, match="room for 4 positions, 0 of them taken; 5 more"):
        model(ids, position_ids=positions, past_key_values=cache)
    cache = model.init_cache(B, 7)
    with pytest.raises(ValueError, match=r"\(2, 7\), as long as the cache in past_key_values"):
        model(ids, np.ones((B, T)), positions, past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values is of 2 rows, input_ids of 1"):
        model(ids[:1], position_ids=positions[:1], past_key_values=cache)


def test_generation_arguments_follow_the_mask(model):
    ids, mask = random_ids(model.config), np.array([[0, 0, 1, 1, 1], [1] * 5])
    got = model.prepare_inputs_for_generation(jnp.asarray(ids), 7, mask)
    np.testing.assert_array_equal(
        got["attention_mask"], np.pad(mask, ((0, 0), (0, 2)), constant_values=1)
    )
    np.testing.assert_array_equal(got["position_ids"], [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    assert model.can_generate() and not FlaxGPT2Model.can_generate()
    with pytest.raises(TypeError, match="FlaxGPT2Model"):
        FlaxGPT2Model(model.config).generate(ids)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("tied", [True, False])
def test_pytorch_opens_what_we_save(tiny_config, tmp_path, tied):
    config = tiny_config(tie_word_embeddings=tied)
    model = FlaxGPT2LMHeadModel(config, seed=5)
    model.save_pretrained(tmp_path)
    opened, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    ids = random_ids(config)
    expected = opened(torch.tensor(ids)).logits.detach()
    np.testing.assert_allclose(model(ids).logits, expected, atol=1e-5)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["GPT2LMHeadModel"]
    assert (tmp_path / "generation_config.json").is_file()


@pytest.mark.slow(but_every=4)
@pytest.mark.parametrize("kind", [FlaxGPT2LMHeadModel, FlaxGPT2Model])
@pytest.mark.parametrize("options", [
    {},
    {"max_shard_size": 3000},
    {"safe_serialization": False},
    {"safe_serialization": False, "max_shard_size": "3KB"},
], ids=["safetensors", "safetensors shards", "msgpack", "msgpack shards"])  # fmt: skip
def test_what_is_saved_is_read_again(tiny_config, tmp_path, kind, options, caplog):
    model = kind(tiny_config(tie_word_embeddings=False, add_cross_attention=True), seed=3)
    model.save_pretrained(tmp_path, **options)
    again = kind.from_pretrained(tmp_path)
    assert_same_tree(again.params, model.params)
    assert again.config.to_dict().items() >= {"n_embd": 12, "add_cross_attention": True}.items()
    empty, params = kind.from_pretrained(str(tmp_path), _do_init=False)
    assert_same_tree(params, model.params)
    np.testing.assert_array_equal(
        empty(random_ids(model.config), params=params)[0], model(random_ids(model.config))[0]
    )
    assert not caplog.records


def test_other_weights_than_the_models_own_can_be_saved(model, tmp_path):
    doubled = jax.tree.map(lambda leaf: 2 * jnp.asarray(leaf), model.params)
    model.save_pretrained(tmp_path, doubled)
    assert_same_tree(FlaxGPT2LMHeadModel.from_pretrained(tmp_path).params, doubled)
    with pytest.raises(TypeError, match="max_shardsize"):
        model.save_pretrained(tmp_path, max_shardsize="1GB")
    with pytest.raises(ValueError, match=r"holds none of FlaxGPT2LMHeadModel's .* \['params'\]"):
        model.save_pretrained(tmp_path, {"params": doubled})
    assert_same_tree(FlaxGPT2LMHeadModel.from_pretrained(tmp_path).params, doubled)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_half_precision_stays_and_is_said(model, tmp_path, caplog):
    params = model.to_bf16(model.params)
    for options in ({}, {"safe_serialization": False}):
        model.save_pretrained(tmp_path, params, **options)
        caplog.clear()
        again = FlaxGPT2LMHeadModel.from_pretrained(tmp_path)
        assert_same_tree(again.params, params)
        assert "bfloat16" in caplog.text and "to_fp32" in caplog.text


@pytest.mark.parametrize("kind", [transformers.GPT2LMHeadModel, transformers.GPT2Model])
@pytest.mark.parametrize("ours", [FlaxGPT2LMHeadModel, FlaxGPT2Model])
@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_we_open_what_pytorch_saves(tiny_config, tmp_path, kind, ours, shard, caplog):
    """Either kind from either, by adding or taking away the prefix, without any alarm."""
    config = tiny_config()
    oracle, params = torch_twin(config)
    saved = oracle if kind is transformers.GPT2LMHeadModel else oracle.transformer
    saved.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    for options in ({}, {"from_pt": True}):
        opened = ours.from_pretrained(tmp_path, **options)
        expected = params if ours is FlaxGPT2LMHeadModel else params["transformer"]
        assert_same_tree(opened.params, expected)
    _, params = ours.from_pretrained(tmp_path, from_pt=True, _do_init=False)
    assert_same_tree(params, expected)
    assert not caplog.records


def test_missing_unexpected_and_mismatched_weights_are_reported(tiny_config, tmp_path, caplog):
    model = FlaxGPT2LMHeadModel(tiny_config(), seed=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"wte.*31.*33(.|\n)*ignore_mismatched_sizes"):
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path, vocab_size=33)
    caplog.clear()
    other = FlaxGPT2LMHeadModel.from_pretrained(
        tmp_path, vocab_size=33, ignore_mismatched_sizes=True
    )
    assert "transformer/wte/embedding (31, 12) instead of (33, 12)" in caplog.text
    assert other(np.array([[32]])).logits.shape == (1, 1, 33)
    caplog.clear()
    shorter = FlaxGPT2LMHeadModel.from_pretrained(tmp_path, n_layer=1)
    assert "are not used" in caplog.text and "transformer/h/1/attn/c_attn/kernel" in caplog.text
    assert list(shorter.params["transformer"]["h"]) == ["0"]
    caplog.clear()
    longer = FlaxGPT2LMHeadModel.from_pretrained(tmp_path, num_hidden_layers=3)
    assert "which are drawn anew" in caplog.text and "transformer/h/2/ln_1/scale" in caplog.text
    assert list(longer.params["transformer"]["h"]) == ["0", "1", "2"]
    caplog.clear()
    part, params = FlaxGPT2LMHeadModel.from_pretrained(tmp_path, n_layer=3, _do_init=False)
    assert "are not in params; init_weights adds them" in caplog.text
    assert list(params["transformer"]["h"]) == ["0", "1"]
    assert ("transformer", "h", "2", "ln_1", "bias") in part._missing_keys
    assert list(part.init_weights(part.key, (1, 1), params)["transformer"]["h"]) == ["0", "1", "2"]


def test_old_buffers_and_a_written_tied_head_raise_no_alarm(model, tmp_path, caplog):
    from safetensors.numpy import load_file, save_file

    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path) | {
        "transformer.h.0.attn.bias": np.ones((1, 1, 7, 7), np.uint8),
        "transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32),
        "lm_head.weight": np.asarray(model.params["transformer"]["wte"]["embedding"]),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    again = FlaxGPT2LMHeadModel.from_pretrained(tmp_path)
    assert_same_tree(again.params, model.params)
    assert not caplog.records


def test_keywords_are_settings_of_the_model_of_generation_or_of_the_constructor(model, tmp_path):
    model.save_pretrained(tmp_path)
    got = FlaxGPT2LMHeadModel.from_pretrained(
        tmp_path, jnp.bfloat16, resid_pdrop=0.25, max_length=6, hf_flax_compat=True, seed=4,
    )  # fmt: skip
    assert got.dtype == jnp.bfloat16 and got.config.resid_pdrop == 0.25
    assert got.generation_config.max_length == 6 and got.module.hf_flax_compat
    np.testing.assert_array_equal(got.key, jax.random.PRNGKey(4))
    with pytest.raises(TypeError, match="from_pretrained got unknown arguments resid_drop"):
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path, resid_drop=0.1)
    config = transformers.GPT2Config.from_pretrained(tmp_path, attn_pdrop=0.75)
    assert FlaxGPT2LMHeadModel.from_pretrained(tmp_path, config=config).config is config
    for place in (str(tmp_path), tmp_path / "config.json"):
        by_path = FlaxGPT2LMHeadModel.from_pretrained(tmp_path, config=place, attn_pdrop=0.5)
        assert by_path.config.attn_pdrop == 0.5
    from_file = FlaxGPT2LMHeadModel.from_pretrained(tmp_path / "model.safetensors")
    assert_same_tree(from_file.params, model.params)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ValueError, match=r"weights.bin is neither a .msgpack nor a .safetensors"):
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="got None"):
        FlaxGPT2LMHeadModel.from_pretrained(None)


def test_settings_of_generation_are_kept(tiny_config, tmp_path):
    model = FlaxGPT2LMHeadModel(tiny_config())
    model.generation_config.update(do_sample=True, top_k=7, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    again = FlaxGPT2LMHeadModel.from_pretrained(tmp_path).generation_config
    assert (again.do_sample, again.top_k, again.max_new_tokens) == (True, 7, 3)
    model = FlaxGPT2LMHeadModel(tiny_config())
    model.config.max_length = 6  # the way of transformers 4
    model.save_pretrained(tmp_path)
    assert "max_length" not in json.loads((tmp_path / "config.json").read_text())
    assert FlaxGPT2LMHeadModel.from_pretrained(tmp_path).generation_config.max_length == 6
    assert model.config.max_length == 6


def test_decoding_settings_in_an_old_config_json_reach_the_model(tiny_config, tmp_path):
    FlaxGPT2LMHeadModel(tiny_config()).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_length": 6}))
    assert FlaxGPT2LMHeadModel.from_pretrained(tmp_path).generation_config.max_length == 6


def test_a_directory_that_holds_no_model_is_named(tiny_config, tmp_path):
    for kind in (OSError, UserError):  # the original's, and the house's
        with pytest.raises(kind, match="nowhere"):
            FlaxGPT2LMHeadModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a directory"):
        load_with_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config.json"):
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model.safetensors"):
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    for options in ({}, {"from_pt": True}):
        with pytest.raises(ValueError, match=r"pytorch_model.bin(.|\n)*save_pretrained"):
            FlaxGPT2LMHeadModel.from_pretrained(tmp_path, **options)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "is not a JSON object but a list"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"n_layer": "two"}, "names no GPT-2"),
        ({"n_embd": 100, "n_head": 12}, "n_embd=100 and n_head=12"),
        ({"activation_function": "gleu"}, "unknown activation_function 'gleu'"),
    ],
)
def test_a_foreign_config_is_refused(raw, message):
    with pytest.raises(UserError, match=message):
        make_config(raw, "config.json")


def test_a_config_can_set_only_gpt2s_own_keys(tmp_path):
    """Keys that make transformers run code are not passed on to it."""
    hostile = {"auto_map": {"AutoModel": "x.y"}, "_attn_implementation_internal": "evil/repo"}
    config = make_config(json.loads(json.dumps({"n_layer": 3} | hostile)), "config.json")
    assert config.n_layer == 3
    assert not hasattr(config, "auto_map")
    assert config._attn_implementation_internal is None
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"top_k": 3, "custom_generate": "evil/repo", "_x": 1}))
    generation_config = read_generation_config(path)
    assert generation_config.top_k == 3
    assert not hasattr(generation_config, "custom_generate")
    path.write_text("[" * 100000)
    with pytest.raises(UserError, match="is not valid JSON"):
        read_generation_config(path)


def test_param_shapes_are_the_models(model):
    assert flatten_dict(param_shapes(model.config)) == flatten_dict(model.params_shape_tree)
