"""Model directories that the original wrote: what is in them is what we read from them."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from gpt2_flax.pretrained import modeling
from tests.recorded import record

FACTS = json.loads((record.HERE / "numerics.json").read_text("utf-8"))["directories"]


def assert_recorded(model, params, facts):
    # A bfloat16 model's own logits come of float32 arithmetic on its weights.
    outputs = model(np.asarray(record.IDS), params=params)
    name = next(iter(outputs.keys()))
    np.testing.assert_allclose(outputs[name], np.asarray(facts[name]), atol=1e-5)


@pytest.mark.parametrize("name", record.DIRECTORIES)
def test_a_directory_of_the_originals_is_read_bitwise(name, caplog):
    _, cls, dtype, _ = record.DIRECTORIES[name]
    with caplog.at_level(logging.WARNING, "gpt2_flax"):
        model = getattr(modeling, cls).from_pretrained(record.FILES / name)
    assert len(caplog.messages) == (dtype != "float32"), caplog.messages
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {dtype}
    assert record.digest(flatten_dict(model.params, sep="/")) == FACTS[name]["digest"]
    assert_recorded(model, None, FACTS[name])


@pytest.mark.parametrize("name", record.DIRECTORIES)
def test_do_init_false_gives_the_same_parameters_beside_the_model(name):
    _, cls, _, _ = record.DIRECTORIES[name]
    model, params = getattr(modeling, cls).from_pretrained(record.FILES / name, _do_init=False)
    assert record.digest(flatten_dict(params, sep="/")) == FACTS[name]["digest"]
    with pytest.raises(ValueError, match="_do_init=False"):
        _ = model.params
    assert_recorded(model, params, FACTS[name])


def test_a_base_models_file_makes_the_same_tied_model_with_its_head():
    """Weights are equal in the recordings, so the logits of `single` are expected."""
    model = modeling.FlaxGPT2LMHeadModel.from_pretrained(record.FILES / "base")
    single = modeling.FlaxGPT2LMHeadModel.from_pretrained(record.FILES / "single")
    expected = flatten_dict(single.params)
    for path, leaf in flatten_dict(model.params).items():
        assert leaf.shape == expected[path].shape
    assert (
        record.digest(flatten_dict(model.params["transformer"], sep="/"))
        == FACTS["base"]["digest"]
    )
    assert model(np.asarray(record.IDS)).logits.shape == (2, 5, 31)


def test_a_head_models_file_makes_the_same_base_model():
    base = modeling.FlaxGPT2Model.from_pretrained(record.FILES / "single")
    head = modeling.FlaxGPT2LMHeadModel.from_pretrained(record.FILES / "single")
    for ours, theirs in zip(
        jax.tree.leaves(base.params), jax.tree.leaves(head.params["transformer"]), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_single_files_load_as_the_original_loaded_them(name):
    shards = sorted((record.FILES / name).glob("flax_model*.msgpack"))
    cls = modeling.FlaxGPT2LMHeadModel
    if len(shards) == 1:
        tree = cls.load_flax_weights(shards[0])
    else:
        tree = cls.load_flax_sharded_weights(shards)
    assert record.digest(flatten_dict(tree, sep="/")) == FACTS[name]["digest"]


@pytest.mark.parametrize("name", record.DIRECTORIES)
def test_saved_again_in_the_originals_layout_the_parameters_are_the_same(name, tmp_path):
    _, cls, _, options = record.DIRECTORIES[name]
    cls = getattr(modeling, cls)
    model = cls.from_pretrained(record.FILES / name)
    options = {key: value for key, value in options.items() if key == "max_shard_size"}
    model.save_pretrained(tmp_path, safe_serialization=False, **options)
    assert not list(tmp_path.glob("*.safetensors"))
    again = cls.from_pretrained(tmp_path)
    assert record.digest(flatten_dict(again.params, sep="/")) == FACTS[name]["digest"]
    if name != "safetensors":
        names = {path.name for path in (record.FILES / name).glob("*.msgpack")}
        assert {path.name for path in tmp_path.glob("*.msgpack")} == names
    if len(list(tmp_path.glob("*.msgpack"))) == 1 and name != "safetensors":
        ours = (tmp_path / "flax_model.msgpack").read_bytes()
        assert ours == (record.FILES / name / "flax_model.msgpack").read_bytes()


def test_bfloat16_of_the_file_is_bfloat16_here():
    model = modeling.FlaxGPT2LMHeadModel.from_pretrained(record.FILES / "bfloat16")
    assert model.params["transformer"]["wte"]["embedding"].dtype == jnp.bfloat16
    wide = model.to_fp32(model.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
