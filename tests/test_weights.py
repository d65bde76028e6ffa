"""Files that PyTorch opens, and files of PyTorch, without a bit changed on the way."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from gpt2_flax import FlaxGPT2LMHeadModel, weights
from gpt2_flax.pretrained import param_shapes


def assert_same_tree(got, expected):
    got, expected = flatten_dict(got), flatten_dict(expected)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=str(name))


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
