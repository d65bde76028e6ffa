"""Names and signatures of the class against those of transformers 4.57.6, one by one.

tests/recorded/surface.json holds the original's; record.py beside it made it.
"""

import dataclasses
import inspect
import json

import jax
import pytest
import transformers

from gpt2_flax.model import gpt2, outputs
from gpt2_flax.pretrained import modeling
from tests.recorded import record

SURFACE = json.loads((record.HERE / "surface.json").read_text("utf-8"))
CLASSES = list(SURFACE["classes"])
# (method, parameter) -> (the original's default, ours, why)
OTHER_DEFAULTS = {
    ("save_pretrained", "safe_serialization"): (
        "False", "True", "a file that PyTorch opens; the original's did not"
    ),
    ("push_to_hub", "max_shard_size"): ("'5GB'", "'10GB'", "as save_pretrained"),
}  # fmt: skip
# The original has None where it refuses to generate: a base model has no head.
ONLY_WITH_A_HEAD = {"prepare_inputs_for_generation"}
# **kwargs that took nothing but deprecated words.
NO_CATCH_ALL = {"push_to_hub"}


def positional(signature):
    return [name for name, kind, _ in signature if kind.startswith("POSITIONAL")]


def compare(method, theirs, ours):
    """What a call that the original took would stumble over, or find changed, here."""
    known = {name: (kind, default) for name, kind, default in ours}
    catch_all = any(kind == "VAR_KEYWORD" for _, kind, _ in ours)
    for name, kind, default in theirs:
        if kind == "VAR_KEYWORD":
            if not catch_all and method not in NO_CATCH_ALL:
                yield f"{method}: takes no **{name}"
        elif kind == "VAR_POSITIONAL":
            if "VAR_POSITIONAL" not in [other for _, other, _ in ours]:
                yield f"{method}: takes no *{name}"
        elif name not in known:
            yield f"{method}: has no parameter {name}"
        elif default is not None and known[name][1] != default:
            allowed = OTHER_DEFAULTS.get((method, name), ())[:2]
            if allowed != (default, known[name][1]):
                yield f"{method}: {name} is {known[name][1]} instead of {default} by default"
    order = positional(theirs)
    if positional(ours)[: len(order)] != order:
        yield f"{method}: takes {positional(ours)}, in the original {order}"
    required = [
        name
        for name, kind, default in ours
        if default is None and not kind.startswith("VAR") and name not in {n for n, *_ in theirs}
    ]
    if required:
        yield f"{method}: needs {required}, unknown to the original"


def differences(name):
    theirs, ours = SURFACE["classes"][name], record.describe_class(getattr(modeling, name))
    for member, facts in theirs.items():
        has_head = name == "FlaxGPT2LMHeadModel"
        if member not in ours:
            yield f"{member} is missing"
        elif ours[member]["kind"] != facts["kind"]:
            yield f"{member} is a {ours[member]['kind']}, in the original a {facts['kind']}"
        elif facts.get("settable", False) and not ours[member]["settable"]:
            yield f"{member} cannot be set"
        elif "signature" in facts and (has_head or member not in ONLY_WITH_A_HEAD):
            yield from compare(member, facts["signature"], ours[member]["signature"])
        elif member != "_missing_keys" and ours[member].get("value") != facts.get("value"):
            yield f"{member} is {ours[member]['value']}, in the original {facts['value']}"


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_of_the_originals_class_is_missing(name):
    assert list(differences(name)) == []


@pytest.mark.parametrize("name", SURFACE["instances"])
def test_an_instance_has_the_originals_attributes(name):
    instance = getattr(modeling, name)(transformers.GPT2Config(**record.SIZES), _do_init=False)
    for attribute, type_name in SURFACE["instances"][name].items():
        value = getattr(instance, attribute)
        if type_name in ("NoneType", "GenerationConfig", "tuple"):
            assert type(value).__name__ == type_name, attribute
    assert instance.can_generate() is SURFACE["can_generate"][name]
    assert instance._missing_keys == set()
    assert (instance.key == jax.random.PRNGKey(0)).all()


@pytest.mark.parametrize("name", ["FlaxGPT2Module", "FlaxGPT2LMHeadModule"])
def test_the_modules_are_built_and_called_as_the_originals(name):
    """The order of `module.apply`, which training code of the time depended on."""
    module, facts = getattr(gpt2, name), SURFACE["modules"][name]
    fields = [field.name for field in dataclasses.fields(module)]
    assert fields[: len(facts["fields"])] == [field for field, _ in facts["fields"]]
    ours = record.describe_signature(module.__call__)
    assert list(compare("__call__", facts["call"], ours)) == []


@pytest.mark.parametrize("name", SURFACE["modules"])
def test_the_originals_modules_have_their_namesakes(name):
    assert inspect.isclass(getattr(gpt2, name))


@pytest.mark.parametrize("name", SURFACE["outputs"])
def test_outputs_have_the_originals_fields_in_their_order(name):
    fields = [field.name for field in dataclasses.fields(getattr(outputs, name))]
    assert fields == SURFACE["outputs"][name]


def test_the_comparison_sees_what_is_missing():
    """Of the comparison itself: each kind of difference is reported."""
    theirs = [["a", "POSITIONAL_OR_KEYWORD", None], ["b", "POSITIONAL_OR_KEYWORD", "1"]]
    assert list(compare("f", theirs, theirs)) == []
    assert len(list(compare("f", theirs, theirs[::-1]))) == 1
    assert "no parameter b" in next(compare("f", theirs, theirs[:1]))
    assert "b is 2" in next(compare("f", theirs, [theirs[0], ["b", theirs[1][1], "2"]]))
    extra = [*theirs, ["c", "POSITIONAL_OR_KEYWORD", None]]
    assert list(compare("f", theirs, extra)) == ["f: needs ['c'], unknown to the original"]
    assert "takes no **k" in next(compare("f", [["k", "VAR_KEYWORD", None]], []))
