"""`hf_flax_compat=True` against recordings of the original: weights, numerics, decoding.

tests/recorded/record.py made them with transformers 4.57.6; nothing of it is needed here.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_flax.pretrained import modeling
from tests.recorded import record

RECORDED = {
    name: json.loads((record.HERE / f"{name}.json").read_text("utf-8"))
    for name in ("parameter_trees", "numerics", "generation")
}
CALLS = RECORDED["numerics"]["calls"]
# One unit in the last place of a bfloat16 between 1 and 2. The largest logit is 1.5.
BFLOAT16_STEP = 2.0**-7


def build(config_name="tied", cls="FlaxGPT2LMHeadModel", sizes=record.SIZES, **kwargs):
    config = transformers.GPT2Config(**sizes | record.CONFIGS[config_name])
    return getattr(modeling, cls)(config, **{"hf_flax_compat": True} | kwargs)


def filled(model, scale=1.0):
    """The weights that the original had in the recordings."""
    shapes = {k: v.shape for k, v in flatten_dict(model.params_shape_tree, sep="/").items()}
    return jax.tree.map(jnp.asarray, unflatten_dict(record.fill(shapes, scale), sep="/"))


def assert_recorded(outputs, recorded, **tolerance):
    assert list(outputs.keys()) == list(recorded)
    for name, expected in recorded.items():
        parts = outputs[name] if isinstance(outputs[name], tuple) else (outputs[name],)
        expected = expected if isinstance(outputs[name], tuple) else (expected,)
        for part, wanted in zip(parts, expected, strict=True):
            part = np.asarray(part, np.float32)
            np.testing.assert_allclose(part, np.asarray(wanted, np.float32), **tolerance)


@pytest.mark.parametrize("name", RECORDED["parameter_trees"])
def test_the_parameter_trees_are_the_originals(name):
    tree = RECORDED["parameter_trees"][name]
    cls = getattr(modeling, tree["class"])
    model = cls(transformers.GPT2Config(**tree["config"]), _do_init=False)
    flat = flatten_dict(model.params_shape_tree, sep="/")
    assert {key: list(leaf.shape) for key, leaf in flat.items()} == tree["shapes"]
    assert model.required_params == {tuple(key.split("/")) for key in tree["shapes"]}
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", RECORDED["numerics"]["initial"])
def test_a_seed_draws_the_originals_weights(name):
    config_name, cls, seed = name.split("/")
    recorded = RECORDED["numerics"]["initial"][name]
    flat = flatten_dict(build(config_name, cls, seed=int(seed)).params, sep="/")
    assert flat.keys() == recorded.keys()
    for path, summary in recorded.items():
        ours = record.summarize(flat[path])
        np.testing.assert_allclose(ours["first"], summary["first"], rtol=1e-6, err_msg=path)
        for total in ("sum", "abs_sum"):
            np.testing.assert_allclose(ours[total], summary[total], atol=1e-5, err_msg=path)


@pytest.mark.slow(but_every=5)
@pytest.mark.parametrize("name", record.CALLS)
def test_a_call_returns_the_originals_numbers(name):
    config_name, dtype, arguments = record.CALLS[name]
    model = build(config_name, dtype=jnp.dtype(dtype), _do_init=False)
    made = record.call_arguments(arguments)
    outputs = model(np.asarray(record.IDS), params=filled(model), **made)
    assert outputs.logits.dtype == dtype
    if name.startswith("activation"):
        outputs = outputs.replace(logits=outputs.logits[:, -1])
    step = BFLOAT16_STEP if dtype == "bfloat16" else 1e-5
    assert_recorded(outputs, CALLS[name], atol=step, rtol=0)


def test_the_base_model_returns_the_originals_states():
    model = build(cls="FlaxGPT2Model", _do_init=False)
    outputs = model(np.asarray(record.IDS), params=filled(model))
    assert_recorded(outputs, CALLS["base"], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_cache_is_filled_as_the_original_fills_it():
    recorded = RECORDED["numerics"]["cached"]
    model = build(_do_init=False)
    params, ids, cache = filled(model), np.asarray(record.IDS), model.init_cache(2, 6)
    for (start, stop), expected in zip(((0, 3), (3, 4), (4, 5)), recorded["logits"], strict=True):
        outputs = model(
            ids[:, start:stop],
            attention_mask=jnp.ones((2, 6), jnp.int32),
            position_ids=np.broadcast_to(np.arange(start, stop), (2, stop - start)),
            params=params,
            past_key_values=cache,
        )
        cache = outputs.past_key_values
        np.testing.assert_allclose(outputs.logits, expected, atol=1e-5)
    flat = flatten_dict(cache, sep="/")
    assert flat.keys() == recorded["cache"].keys()
    for path, facts in recorded["cache"].items():
        assert (list(flat[path].shape), str(flat[path].dtype)) == (facts["shape"], facts["dtype"])
        if "value" in facts:
            assert int(flat[path]) == facts["value"]
        else:
            ours = record.summarize(flat[path])["abs_sum"]
            np.testing.assert_allclose(ours, facts["abs_sum"], rtol=1e-5)


def test_by_default_the_numerics_are_pytorchs_where_the_original_went_astray():
    """What hf_flax_compat is for: without it each of these differs from the recording."""
    for name in ("unscaled", "by_layer", "train"):
        config_name, _, arguments = record.CALLS[name]
        model = build(config_name, hf_flax_compat=False, _do_init=False)
        made = record.call_arguments(arguments)
        logits = model(np.asarray(record.IDS), params=filled(model), **made).logits
        assert np.abs(logits - np.asarray(CALLS[name]["logits"])).max() > 1e-3, name
    half = build(hf_flax_compat=False, dtype=jnp.bfloat16, _do_init=False)
    assert half(np.asarray(record.IDS), params=filled(half)).logits.dtype == jnp.float32


def test_by_default_calls_without_dropout_are_the_originals_too():
    for name in ("plain", "left_padded_positions", "untied", "n_inner", "cross_masked", "upcast"):
        config_name, _, arguments = record.CALLS[name]
        model = build(config_name, hf_flax_compat=False, _do_init=False)
        made = record.call_arguments(arguments)
        outputs = model(np.asarray(record.IDS), params=filled(model), **made)
        recorded = np.asarray(CALLS[name]["logits"])
        np.testing.assert_allclose(outputs.logits, recorded, atol=1e-5, err_msg=name)


# ---------------------------------------------------------------- decoding

# PyTorch's here, in place of the original's.
# tests/generation/test_generation.py compares with PyTorch.
UNFINISHED = "the original prefers a finished beam, or divides no score by its length"
LIKE_PYTORCH = {
    "greedy_min_length": "the original's min_length forbids the end one token too long",
    "greedy_no_repeats": "the original fails under JAX 0.6",
    "beam": UNFINISHED,
    "beam_padded": UNFINISHED,
    "beam_early": "the original goes on, or stops, a step away from PyTorch",
    "beam_never": "the original stops early for a length_penalty below 0",
}
GENERATIONS = [name for name in record.GENERATIONS if name not in LIKE_PYTORCH]


@pytest.fixture(scope="module")
def generating_model():
    model = build(sizes=record.GENERATION_SIZES, hf_flax_compat=False)
    model.params = filled(model, 4.0)
    return model


def generate(model, name):
    prompts, mask, key, options = record.GENERATIONS[name]
    given = dict(options) | ({} if mask is None else {"attention_mask": np.asarray(mask)})
    if key is not None:
        given["prng_key"] = jax.random.PRNGKey(key)
    return model.generate(np.asarray(prompts), **given)


@pytest.mark.slow(but_every=12)
@pytest.mark.parametrize("name", GENERATIONS)
def test_generate_continues_as_the_original_did(generating_model, name):
    outputs = generate(generating_model, name)
    recorded = RECORDED["generation"]["outputs"][name]
    assert type(outputs).__name__ == recorded["class"]
    assert outputs.sequences.tolist() == recorded["sequences"]
    if "scores" in recorded:
        np.testing.assert_allclose(outputs.scores, recorded["scores"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIKE_PYTORCH)
def test_what_is_said_to_differ_from_the_original_does(generating_model, name):
    recorded = RECORDED["generation"]["outputs"][name]
    assert generate(generating_model, name).sequences.tolist() != recorded.get("sequences")
