"""Files that PyTorch opens, and files of PyTorch, without a bit changed on the way."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax.traverse_util import flatten_dict

from gpt2_flax import FlaxGPT2LMHeadModel, weights
from gpt2_flax.errors import UserError
from gpt2_flax.pretrained import load_with_tokenizer, make_config, param_shapes
from tests.test_model import random_ids, torch_twin


def assert_same_tree(got, expected):
    got, expected = flatten_dict(got), flatten_dict(expected)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=str(name))


@pytest.mark.parametrize("tied", [True, False])
def test_pytorch_opens_what_we_save(tiny_config, tmp_path, tied):
    config = tiny_config(tie_word_embeddings=tied)
    model = FlaxGPT2LMHeadModel(config, seed=5)
    model.save_pretrained(tmp_path)
    opened, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    saved = {name: tensor.numpy() for name, tensor in opened.state_dict().items()}
    assert_same_tree(weights.from_pytorch(saved, param_shapes(config)), model.params)
    ids = random_ids(config)
    expected = opened(torch.tensor(ids)).logits.detach()
    np.testing.assert_allclose(model(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", [transformers.GPT2LMHeadModel, transformers.GPT2Model])
def test_we_open_what_pytorch_saves(tiny_config, tmp_path, kind):
    """Also of the model without a head, whose names lack `transformer.`."""
    config = tiny_config()
    oracle, params = torch_twin(config)
    saved = oracle if kind is transformers.GPT2LMHeadModel else oracle.transformer
    saved.save_pretrained(tmp_path)
    opened = FlaxGPT2LMHeadModel.from_pretrained(tmp_path)
    assert_same_tree(opened.params, params)
    assert opened.config.to_diff_dict().keys() >= {"n_layer", "n_embd"}


def test_square_kernels_are_transposed_too(tiny_config):
    """A missed transpose of a square matrix passes every check of shapes."""
    params = FlaxGPT2LMHeadModel(tiny_config()).params
    kernel = params["transformer"]["h"]["1"]["attn"]["c_proj"]["kernel"]
    got = weights.to_pytorch(params)["transformer.h.1.attn.c_proj.weight"]
    assert got.shape == (12, 12)
    np.testing.assert_array_equal(got, np.asarray(kernel).T)
    assert got.flags.c_contiguous


def test_old_buffers_and_a_written_tied_head_are_passed_over(tiny_config):
    config = tiny_config()
    params = FlaxGPT2LMHeadModel(config).params
    tensors = weights.to_pytorch(params) | {
        "transformer.h.0.attn.bias": np.ones((1, 1, 7, 7), bool),
        "transformer.h.0.attn.masked_bias": np.float32(-1e4),
        "lm_head.weight": np.asarray(params["transformer"]["wte"]["embedding"]),
    }
    assert_same_tree(weights.from_pytorch(tensors, param_shapes(config)), params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.ln_f.bias"), "ln_f.bias is missing"),
        (lambda t: t.update({"transformer.wpe.weight": np.zeros((3, 12))}), r"wpe.*\(3, 12\)"),
        (lambda t: t.update({"transformer.h.9.ln_1.bias": np.zeros(12)}), "h.9.ln_1.bias is unk"),
    ],
)
def test_weights_that_do_not_fit_are_named(tiny_config, change, message):
    tensors = weights.to_pytorch(FlaxGPT2LMHeadModel(tiny_config()).params)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        weights.from_pytorch(tensors, param_shapes(tiny_config()))


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    weights.write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        weights.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_holds_no_model_is_named(tiny_config, tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        load_with_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot read .*config.json"):
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"a run that has not ended.*\n.*scripts/convert.py"):
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + bytes(30))
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path)
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="do not fit the model"):
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "is not a JSON object but a list"),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"n_layer": "two"}, "names no GPT-2"),
        ({"n_embd": 100, "n_head": 12}, "n_embd=100 and n_head=12"),
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


def test_train_needs_a_key_for_dropout(tiny_config):
    model = FlaxGPT2LMHeadModel(tiny_config(resid_pdrop=0.5))
    ids = random_ids(model.config)
    with pytest.raises(ValueError, match="dropout_rng"):
        model(ids, train=True)
    dropped = model(ids, train=True, dropout_rng=jax.random.key(0)).logits
    assert not np.allclose(dropped, model(ids)["logits"])
