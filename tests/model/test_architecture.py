"""Architecture against transformers.GPT2Config, whose place it takes in a run."""

import ast
import dataclasses
import inspect

import jax
import pytest
import transformers

from gpt2_flax.config.train_config import load_config
from gpt2_flax.data.tokenizers import make_tokenizer
from gpt2_flax.errors import UserError
from gpt2_flax.model import gpt2, initialization
from gpt2_flax.model.architecture import Architecture, as_gpt2_config
from gpt2_flax.model.ops import kernels
from gpt2_flax.pretrained.config_files import make_config
from gpt2_flax.training.setup import choose_model

FIELDS = [field.name for field in dataclasses.fields(Architecture)]
SMALL = {"vocab_size": 31, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3}


def test_defaults_are_those_of_gpt2config():
    theirs = transformers.GPT2Config()
    assert dataclasses.asdict(Architecture()) == {name: getattr(theirs, name) for name in FIELDS}


@pytest.mark.parametrize(("module", "name"), [(gpt2, "config"), (kernels, "model_config")])
def test_it_has_all_that_is_read_of_a_configuration(module, name):
    read = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Attribute)
        and name in (getattr(node.value, "attr", None), getattr(node.value, "id", None))
    }
    assert read <= {*FIELDS}
    assert {"n_embd", "n_head"} <= read


def test_the_gpt2config_of_it_has_the_same_values():
    ours = Architecture(**SMALL, n_inner=40, resid_pdrop=0.0, bos_token_id=3, eos_token_id=4)
    theirs = as_gpt2_config(ours)
    assert {name: getattr(theirs, name) for name in FIELDS} == dataclasses.asdict(ours)
    assert as_gpt2_config(theirs) is theirs
    again = make_config(ours.to_dict(), "a checkpoint")
    assert again.to_dict() == theirs.to_dict()


def test_a_module_is_the_same_with_either():
    ours = Architecture(**SMALL)
    shapes = [
        initialization.parameter_shapes(gpt2.FlaxGPT2LMHeadModule(config))
        for config in (ours, as_gpt2_config(ours))
    ]
    assert shapes[0] == shapes[1]
    assert len(jax.tree.leaves(shapes[0])) == 28
    assert ours.n_layer == 2


def test_a_size_of_no_model_is_refused_at_the_start():
    config = load_config(["--vocab_size", str(2**26 + 1), "--tokenizer", "bytes"])
    with pytest.raises(UserError, match="vocab_size must be at most"):
        choose_model(config, make_tokenizer("bytes", ()), None)
