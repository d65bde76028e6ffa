"""Records what the original FlaxGPT2 classes do, for tests that compare ours with them.

Runs where the original still does, never in the tests:

    python -m venv oracle
    oracle/bin/pip install transformers==4.57.6 jax==0.6.2 flax==0.10.7 torch
    oracle/bin/python tests/recorded/record.py

It writes the JSON files and the model directories beside this file. The tests import from here
what both sides need: the configurations, the weights, the inputs and the list of calls.
"""

import hashlib
import inspect
import json
import os
import pathlib
import shutil

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
FILES = HERE / "files"
SIZES = {
    "n_layer": 2, "n_head": 3, "n_embd": 12, "n_positions": 7, "vocab_size": 31,
    "bos_token_id": 0, "eos_token_id": 0,
    "resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3,
}  # fmt: skip
# name -> what its configuration has beside SIZES
CONFIGS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "cross": {"add_cross_attention": True},
    "untied_cross": {"tie_word_embeddings": False, "add_cross_attention": True},
    "n_inner": {"n_inner": 20},
    "unscaled": {"scale_attn_weights": False},
    "by_layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    **{
        name: {"activation_function": name}
        for name in (
            "gelu", "relu", "silu", "swish", "gelu_new", "quick_gelu", "gelu_pytorch_tanh", "tanh"
        )
    },
}  # fmt: skip
IDS = [[3, 14, 15, 9, 26], [5, 0, 30, 8, 9]]
LEFT_PADDED = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
ENCODER_MASK = [[1, 1, 1, 0], [1, 1, 1, 1]]
# (configuration, class, seed) of the models whose random weights are recorded
INITIAL = (
    ("tied", "FlaxGPT2LMHeadModel", 0),
    ("tied", "FlaxGPT2LMHeadModel", 1),
    ("tied", "FlaxGPT2Model", 0),
    ("untied_cross", "FlaxGPT2LMHeadModel", 0),
)
DROPOUT_KEY = 3
# name -> (configuration, dtype, arguments of the call). "train" makes a dropout_rng of
# DROPOUT_KEY, "encoder" the encoder's states.
CALLS = {
    "plain": ("tied", "float32", {}),
    "plain_bfloat16": ("tied", "bfloat16", {}),
    "left_padded": ("tied", "float32", {"attention_mask": LEFT_PADDED}),
    "left_padded_positions": (
        "tied",
        "float32",
        {"attention_mask": LEFT_PADDED, "position_ids": [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]},
    ),
    "everything": (
        "tied",
        "float32",
        {"output_attentions": True, "output_hidden_states": True},
    ),
    "untied": ("untied", "float32", {}),
    "n_inner": ("n_inner", "float32", {}),
    "cross": ("cross", "float32", {"encoder": True}),
    "cross_masked": (
        "cross",
        "float32",
        {"encoder": True, "encoder_attention_mask": ENCODER_MASK, "output_attentions": True},
    ),
    "cross_without_encoder": ("cross", "float32", {}),
    "unscaled": ("unscaled", "float32", {}),
    "by_layer": ("by_layer", "float32", {}),
    "upcast": ("upcast", "float32", {}),
    "train": ("tied", "float32", {"train": True}),
    "train_attentions": ("tied", "float32", {"train": True, "output_attentions": True}),
    "train_left_padded": ("tied", "float32", {"train": True, "attention_mask": LEFT_PADDED}),
    "train_cross": ("cross", "float32", {"train": True, "encoder": True}),
    "train_bfloat16": ("tied", "bfloat16", {"train": True}),
    **{
        f"activation_{name}": (name, "float32", {})
        for name in CONFIGS
        if CONFIGS[name].get("activation_function")
    },
}
# What `generate` is asked: name -> (prompts, attention mask, key or None, options)
GENERATION_SIZES = SIZES | {"n_positions": 17}
PROMPTS = [[3, 14, 15], [5, 30, 8]]
PADDED = ([[0, 0, 15], [5, 30, 8]], [[0, 0, 1], [1, 1, 1]])
SAMPLE = {"do_sample": True, "max_length": 13}
BEAMS = {"num_beams": 3, "max_length": 11}
GENERATIONS = {
    "greedy": (PROMPTS, None, None, {"max_new_tokens": 9}),
    "greedy_one": ([[7]], None, None, {"max_length": 9}),
    "greedy_padded": (*PADDED, None, {"max_length": 10}),
    "greedy_eos": (PROMPTS, None, None, {"max_length": 12, "eos_token_id": 24, "pad_token_id": 1}),
    "greedy_min_length": (
        PROMPTS, None, None, {"max_length": 12, "min_length": 11, "eos_token_id": 24}
    ),
    "greedy_forced": (
        PROMPTS, None, None, {"max_length": 9, "forced_eos_token_id": 2, "forced_bos_token_id": 4}
    ),
    "greedy_suppressed": (
        PROMPTS, None, None,
        {"max_length": 12, "suppress_tokens": [17, 24], "begin_suppress_tokens": [23]},
    ),
    "greedy_no_repeats": (PROMPTS, None, None, {"max_length": 15, "no_repeat_ngram_size": 2}),
    "sample": (PROMPTS, None, 5, SAMPLE),
    "sample_default_key": (PROMPTS, None, None, SAMPLE),
    "sample_padded": (*PADDED, 5, SAMPLE),
    "sample_all": (
        PROMPTS, None, 8, SAMPLE | {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_length": 6}
    ),
    "sample_eos": (PROMPTS, None, 5, SAMPLE | {"eos_token_id": 24, "pad_token_id": 1}),
    "beam": (PROMPTS, None, None, BEAMS),
    "beam_padded": (*PADDED, None, BEAMS),
    "beam_returns": (
        PROMPTS, None, None, BEAMS | {"num_return_sequences": 2, "eos_token_id": 24}
    ),
    "beam_early": (
        PROMPTS, None, None,
        BEAMS | {"early_stopping": True, "length_penalty": 2.0, "eos_token_id": 24},
    ),
    "beam_never": (
        PROMPTS, None, None,
        BEAMS | {"early_stopping": "never", "length_penalty": -1.0, "eos_token_id": 24},
    ),
}  # fmt: skip
# Directories the original wrote: name -> (configuration, class, dtype of the parameters, options)
DIRECTORY_SIZES = SIZES | {"n_layer": 1}
DIRECTORIES = {
    "single": ("tied", "FlaxGPT2LMHeadModel", "float32", {}),
    "sharded": ("tied", "FlaxGPT2LMHeadModel", "float32", {"max_shard_size": "3KB"}),
    "safetensors": ("tied", "FlaxGPT2LMHeadModel", "float32", {"safe_serialization": True}),
    "base": ("tied", "FlaxGPT2Model", "float32", {}),
    "bfloat16": ("tied", "FlaxGPT2LMHeadModel", "bfloat16", {}),
    "untied": ("untied", "FlaxGPT2LMHeadModel", "float32", {}),
    "cross": ("cross", "FlaxGPT2LMHeadModel", "float32", {}),
}
# Beside the public names, those that code outside the class has used.
UNDERSCORED = ("_from_config", "_auto_class", "_missing_keys", "__call__", "__init__")


def fill(shapes: dict[str, tuple], scale: float = 1.0) -> dict[str, np.ndarray]:
    """Float32 weights for flat names: the same numbers everywhere, for they are fractions.

    shapes: "a/b/c" -> shape. Scales of LayerNorms lie around 1, the rest around 0.
    """
    random = np.random.RandomState(7)  # its integers are frozen for good
    filled = {}
    for name in sorted(shapes):
        drawn = random.randint(-(2**15), 2**15, size=shapes[name]) / 2**17
        filled[name] = np.float32(drawn * scale + name.endswith("/scale"))
    return filled


def encoder_states() -> np.ndarray:
    """float32 (2, 4, n_embd)."""
    drawn = np.random.RandomState(9).randint(-(2**15), 2**15, size=(2, 4, SIZES["n_embd"]))
    return np.float32(drawn / 2**14)


def digest(leaves: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes of a flat tree."""
    total = hashlib.sha256()
    for name in sorted(leaves):
        leaf = np.asarray(leaves[name])
        total.update(f"{name} {leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return total.hexdigest()


def summarize(leaf) -> dict:
    """What tells one random leaf from another in a line."""
    leaf = np.asarray(leaf, np.float32)
    return {
        "sum": shorten(leaf.sum(dtype=np.float64)),
        "abs_sum": shorten(np.abs(leaf).sum(dtype=np.float64)),
        "first": [shorten(value) for value in leaf.ravel()[:3]],
    }


def shorten(value) -> float:
    return float(f"{float(value):.7g}")


def as_lists(array):
    array = np.asarray(array)
    if array.dtype.kind in "iub":
        return array.tolist()
    return np.vectorize(shorten, otypes=[object])(array.astype(np.float32)).tolist()


# ---------------------------------------------------------------- recording


def describe_signature(function) -> list:
    """[name, kind, default's repr or None] of each parameter."""
    return [
        [p.name, p.kind.name, None if p.default is p.empty else repr_default(p.default)]
        for p in inspect.signature(function).parameters.values()
    ]


def repr_default(value) -> str:
    """As an inspected default reads in any version of JAX."""
    name = getattr(value, "__name__", None)
    return name if isinstance(value, type) or name else repr(value)


def describe_class(cls) -> dict:
    """name -> {kind, signature or value} of what a class offers."""
    found = {}
    for name in sorted(dir(cls)):
        if name.startswith("_") and name not in UNDERSCORED:
            continue
        raw = inspect.getattr_static(cls, name)
        if isinstance(raw, property):
            found[name] = {"kind": "property", "settable": raw.fset is not None}
        elif isinstance(raw, classmethod | staticmethod):
            kind = type(raw).__name__
            found[name] = {"kind": kind, "signature": describe_signature(raw.__func__)}
        elif inspect.isfunction(raw):
            found[name] = {"kind": "method", "signature": describe_signature(raw)}
        else:
            value = raw.__name__ if isinstance(raw, type) else repr(raw)
            found[name] = {"kind": "attribute", "value": value}
    return found


def record_surface(transformers) -> dict:
    import dataclasses

    from transformers.generation import flax_utils as generation
    from transformers.models.gpt2 import modeling_flax_gpt2 as original

    classes = ("FlaxGPT2PreTrainedModel", "FlaxGPT2Model", "FlaxGPT2LMHeadModel")
    modules = (
        "FlaxGPT2Module", "FlaxGPT2LMHeadModule", "FlaxGPT2BlockCollection", "FlaxGPT2Block",
        "FlaxGPT2Attention", "FlaxGPT2MLP", "FlaxConv1D",
    )  # fmt: skip
    outputs = (
        (original, "FlaxBaseModelOutputWithPastAndCrossAttentions"),
        (original, "FlaxCausalLMOutputWithCrossAttentions"),
        (generation, "FlaxGreedySearchOutput"),
        (generation, "FlaxSampleOutput"),
        (generation, "FlaxBeamSearchOutput"),
    )
    instances = {
        name: getattr(original, name)(transformers.GPT2Config(**SIZES)) for name in classes[1:]
    }
    return {
        "classes": {name: describe_class(getattr(original, name)) for name in classes},
        "instances": {
            name: {
                key: type(value).__name__
                for key, value in sorted(vars(instance).items())
                if not key.startswith("_")
            }
            for name, instance in instances.items()
        },
        "can_generate": {name: model.can_generate() for name, model in instances.items()},
        "modules": {
            name: {
                "fields": [
                    [field.name, None if field.default is dataclasses.MISSING
                     else repr_default(field.default)]
                    for field in dataclasses.fields(getattr(original, name))
                    if field.name not in ("parent", "name")
                ],
                "call": describe_signature(getattr(original, name).__call__),
            }
            for name in modules
        },
        "outputs": {
            name: [field.name for field in dataclasses.fields(getattr(where, name))]
            for where, name in outputs
        },
    }  # fmt: skip


def record_trees(transformers) -> dict:
    from flax.traverse_util import flatten_dict

    trees = {}
    wanted = [(name, "FlaxGPT2LMHeadModel", SIZES | CONFIGS[name]) for name in
              ("tied", "untied", "cross", "n_inner")]  # fmt: skip
    wanted += [
        ("base", "FlaxGPT2Model", SIZES),
        ("124M", "FlaxGPT2LMHeadModel", {}),
    ]
    for name, cls, settings in wanted:
        model = getattr(transformers, cls)(transformers.GPT2Config(**settings), _do_init=False)
        flat = flatten_dict(model.params_shape_tree, sep="/")
        trees[name] = {
            "class": cls,
            "config": settings,
            "shapes": {key: list(leaf.shape) for key, leaf in sorted(flat.items())},
        }
    return trees


def filled_params(model, scale: float = 1.0):
    from flax.traverse_util import flatten_dict, unflatten_dict

    flat = flatten_dict(model.params_shape_tree, sep="/")
    return unflatten_dict(fill({k: v.shape for k, v in flat.items()}, scale), sep="/")


def call_arguments(arguments: dict) -> dict:
    """A call's keyword arguments from an entry of CALLS."""
    import jax

    made = {
        key: np.asarray(value) if isinstance(value, list) else value
        for key, value in arguments.items()
    }
    if made.pop("encoder", False):
        made["encoder_hidden_states"] = encoder_states()
    if made.get("train"):
        made["dropout_rng"] = jax.random.PRNGKey(DROPOUT_KEY)
    return made


def record_output(outputs) -> dict:
    """key -> nested lists of what a call returned."""
    return {
        key: [as_lists(part) for part in value] if isinstance(value, tuple) else as_lists(value)
        for key, value in outputs.items()
    }


def record_numerics(transformers) -> dict:
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict

    initial = {}
    for config_name, cls, seed in INITIAL:
        config = transformers.GPT2Config(**SIZES | CONFIGS[config_name])
        model = getattr(transformers, cls)(config, seed=seed)
        flat = flatten_dict(model.params, sep="/")
        initial[f"{config_name}/{cls}/{seed}"] = {k: summarize(v) for k, v in flat.items()}
    calls = {}
    for name, (config_name, dtype, arguments) in CALLS.items():
        config = transformers.GPT2Config(**SIZES | CONFIGS[config_name])
        model = transformers.FlaxGPT2LMHeadModel(config, dtype=jnp.dtype(dtype))
        params = filled_params(model)
        made = call_arguments(arguments)
        outputs = model(jnp.asarray(IDS), params=params, **made)
        if name.startswith("activation"):
            outputs = {"logits": outputs.logits[:, -1]}
        calls[name] = record_output(outputs)
    model = transformers.FlaxGPT2Model(transformers.GPT2Config(**SIZES))
    calls["base"] = record_output(model(jnp.asarray(IDS), params=filled_params(model)))

    model = transformers.FlaxGPT2LMHeadModel(transformers.GPT2Config(**SIZES))
    params, ids = filled_params(model), jnp.asarray(IDS)
    cache = model.init_cache(2, 6)
    mask, steps = jnp.ones((2, 6), jnp.int32), []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        outputs = model(
            ids[:, start:stop], attention_mask=mask, position_ids=positions,
            params=params, past_key_values=cache,
        )  # fmt: skip
        cache = outputs.past_key_values
        steps.append(as_lists(outputs.logits))
    cached = {
        "logits": steps,
        "cache": {
            key: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} | (
                {"value": int(leaf)} if leaf.ndim == 0 else {"abs_sum": summarize(leaf)["abs_sum"]}
            )
            for key, leaf in flatten_dict(cache, sep="/").items()
        },
    }  # fmt: skip
    return {
        "made_with": versions(transformers, jax),
        "initial": initial,
        "calls": calls,
        "cached": cached,
    }


def record_generation(transformers) -> dict:
    import jax
    import jax.numpy as jnp

    model = transformers.FlaxGPT2LMHeadModel(transformers.GPT2Config(**GENERATION_SIZES))
    model.params = jax.tree_util.tree_map(jnp.asarray, filled_params(model, 4.0))
    recorded = {}
    for name, (prompts, mask, key, options) in GENERATIONS.items():
        given = dict(options)
        if mask is not None:
            given["attention_mask"] = jnp.asarray(mask)
        if key is not None:
            given["prng_key"] = jax.random.PRNGKey(key)
        try:
            outputs = model.generate(jnp.asarray(prompts), **given)
        except ValueError as error:  # of no_repeat_ngram_size, with this JAX
            recorded[name] = {"error": str(error)}
            continue
        recorded[name] = {"class": type(outputs).__name__} | record_output(outputs)
    return {"made_with": versions(transformers, jax), "outputs": recorded}


def write_directories(transformers) -> dict:
    import jax
    import jax.numpy as jnp
    from flax.traverse_util import flatten_dict

    shutil.rmtree(FILES, ignore_errors=True)
    facts = {}
    for name, (config_name, cls, dtype, options) in DIRECTORIES.items():
        config = transformers.GPT2Config(**DIRECTORY_SIZES | CONFIGS[config_name])
        model = getattr(transformers, cls)(config)
        params = jax.tree_util.tree_map(
            lambda leaf, dtype=dtype: jnp.asarray(leaf, dtype), filled_params(model)
        )
        model.save_pretrained(FILES / name, params=params, **options)
        outputs = model(jnp.asarray(IDS), params=params)
        facts[name] = {
            "digest": digest(flatten_dict(params, sep="/")),
            **record_output({key: outputs[key] for key in list(outputs.keys())[:1]}),
        }
    return facts


def versions(transformers, jax) -> dict:
    import flax

    return {
        "transformers": transformers.__version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
    }


def write(name: str, content) -> None:
    """JSON with a line an entry of the first two levels, so that changes can be read."""

    def lines(value, depth):
        if depth == 2 or not isinstance(value, dict):
            return json.dumps(value, separators=(",", ":"))
        entries = (f"{json.dumps(key)}: {lines(part, depth + 1)}" for key, part in value.items())
        return "{\n" + ",\n".join(entries) + "\n}"

    path = HERE / name
    path.write_text(lines(content, 0) + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    write("surface.json", record_surface(transformers))
    write("parameter_trees.json", record_trees(transformers))
    numerics = record_numerics(transformers)
    numerics["directories"] = write_directories(transformers)
    write("numerics.json", numerics)
    write("generation.json", record_generation(transformers))


if __name__ == "__main__":
    main()
