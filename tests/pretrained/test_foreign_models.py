"""Models that others wrote, opened as PyTorch opens them."""

import itertools
import json
import logging

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from gpt2_flax import FlaxGPT2LMHeadModel
from gpt2_flax.pretrained import convert, weights
from tests.conftest import make_config

IDS = np.arange(10).reshape(2, 5)


def logits_of_pytorch(directory) -> np.ndarray:
    model = transformers.GPT2LMHeadModel.from_pretrained(directory, attn_implementation="eager")
    return model.eval()(torch.tensor(IDS)).logits.detach().numpy()


def check_opens_like_pytorch(directory, tmp_path) -> None:
    """The same logits from the directory and from its conversions to both layouts."""
    expected = logits_of_pytorch(directory)
    assert np.abs(expected).max() > 0.1
    model = FlaxGPT2LMHeadModel.from_pretrained(directory)
    np.testing.assert_allclose(model(IDS).logits, expected, atol=1e-5)
    convert.to_pytorch(directory, tmp_path / "pytorch", verify=True)
    np.testing.assert_allclose(logits_of_pytorch(tmp_path / "pytorch"), expected, atol=1e-6)
    convert.from_pytorch(directory, tmp_path / "flax")
    model = FlaxGPT2LMHeadModel.from_pretrained(tmp_path / "flax")
    np.testing.assert_allclose(model(IDS).logits, expected, atol=1e-5)


def test_general_names_in_config_json_are_gpt2s_names(tmp_path):
    transformers.GPT2LMHeadModel(make_config(initializer_range=0.4)).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    names = {"n_head": "num_attention_heads", "n_embd": "hidden_size",
             "n_layer": "num_hidden_layers", "n_positions": "max_position_embeddings"}  # fmt: skip
    settings = {names.get(name, name): value for name, value in settings.items()}
    settings["n_head"] = 4  # the general name wins, as in PyTorch's class
    (tmp_path / "config.json").write_text(json.dumps(settings))
    check_opens_like_pytorch(tmp_path, tmp_path / "out")


@pytest.mark.slow(but_every=4)
@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["prefix", "no prefix"])
@pytest.mark.parametrize(
    ("tied", "held"),
    [
        *itertools.product([True, None], ["wte", "head", "both alike", "both"]),
        *itertools.product([False], ["both alike", "both"]),  # the missing one would be random
    ],
)
def test_the_head_is_the_one_that_pytorch_uses(tmp_path, caplog, prefix, tied, held):
    """tied: as config.json says, None where it says nothing. held: what the file holds."""
    config = make_config(initializer_range=0.4)
    torch.manual_seed(1)
    state = transformers.GPT2LMHeadModel(config).state_dict()
    tensors = {name.replace("transformer.", prefix): x.numpy().copy() for name, x in state.items()}
    if held == "both":
        tensors["lm_head.weight"] = tensors["lm_head.weight"][::-1].copy()
    for name, without in ((f"{prefix}wte.weight", "head"), ("lm_head.weight", "wte")):
        if held == without:
            del tensors[name]
    settings = config.to_dict() | {"architectures": ["GPT2LMHeadModel"]}
    settings |= {"tie_word_embeddings": tied}
    if tied is None:
        del settings["tie_word_embeddings"]
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(settings))
    safetensors.numpy.save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        check_opens_like_pytorch(model, tmp_path)
    is_told = "its output head differs from wte" in caplog.text
    assert is_told == (held == "both" and tied is not False)
    assert "drawn anew" not in caplog.text and "not used" not in caplog.text


def test_a_msgpack_file_s_head_follows_the_same_rule(tmp_path):
    """transformers 4 passed the head of such a file over where the configuration says tied."""
    model = FlaxGPT2LMHeadModel(make_config(initializer_range=0.4, tie_word_embeddings=False))
    weights.save(model.params, tmp_path, safe_serialization=False)
    make_config().save_pretrained(tmp_path)
    opened = FlaxGPT2LMHeadModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(opened(IDS).logits, model(IDS).logits)
