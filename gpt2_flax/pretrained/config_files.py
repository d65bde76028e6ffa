"""config.json and generation_config.json, read through an allow-list and never as code."""

import copy
import json
import pathlib

import transformers

from gpt2_flax.errors import MissingFileError, UserError
from gpt2_flax.model.gpt2 import check_config

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MAX_JSON_BYTES = 16 * 2**20
# Settings of GPT2Config, and those of every configuration that change what a call returns.
MODEL_KEYS = (set(transformers.GPT2Config.__annotations__) - {"model_type"}) | {
    "output_attentions", "output_hidden_states", "return_dict", "task_specific_params",
}  # fmt: skip
# Settings of decoding. transformers 4 kept them in config.json, too.
GENERATION_KEYS = {
    name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")
} - {"transformers_version"}


def read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size} bytes, too many for a configuration")
        raw = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise MissingFileError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object but a {type(raw).__name__}")
    return raw


def make_config(raw: dict, where: str, **overrides) -> transformers.GPT2Config:
    """A GPT2Config from a plain dictionary; keys that are not GPT-2's are left out.

    overrides: settings that win over the dictionary's. Raises UserError where the result
    names no model.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{where} is not a JSON object but a {type(raw).__name__}")
    model_type = raw.get("model_type") or "gpt2"
    if model_type not in ("gpt2", "gpt-sw3"):
        raise UserError(f"{where} is for model_type {model_type!r:.40}; this package reads gpt2")
    # gpt-sw3 is GPT-2 with another tokenizer
    known = {k: v for k, v in own_names(raw).items() if k in MODEL_KEYS}
    overrides = own_names(overrides)
    attentions = (known | overrides).get("output_attentions")
    settings = {k: v for k, v in (known | overrides).items() if k != "output_attentions"}
    try:
        config = transformers.GPT2Config(**settings)
        if attentions is not None:
            config.output_attentions = attentions
        check_config(config)
    except Exception as error:  # the strict dataclass has errors of its own kind
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where} names no GPT-2 that can be built: {reason}") from error
    for name in GENERATION_KEYS - MODEL_KEYS:
        if raw.get(name) is not None:  # GPT2Config itself would drop it
            setattr(config, name, raw[name])
    return config


def own_names(settings: dict) -> dict:
    """The settings under GPT-2's names: `hidden_size` is `n_embd`.

    A general name wins over GPT-2's own, as in transformers.
    """
    general = transformers.GPT2Config.attribute_map
    renamed = {general[name]: value for name, value in settings.items() if name in general}
    return {name: value for name, value in settings.items() if name not in general} | renamed


def is_config_key(name: str) -> bool:
    """Whether a keyword is a setting of the model, under its own or its general name."""
    return name in MODEL_KEYS or name in transformers.GPT2Config.attribute_map


def read_generation_config(path: pathlib.Path) -> transformers.GenerationConfig:
    raw = read_json(path)
    settings = {k: v for k, v in raw.items() if k in GENERATION_KEYS}
    settings["_from_model_config"] = raw.get("_from_model_config") is True
    try:
        config = transformers.GenerationConfig(**settings)
    except Exception as error:  # its checks have errors of several kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} is no generation configuration: {reason}") from error
    config._original_object_hash = hash(config)
    return config


def write_configs(config, generation_config, directory: pathlib.Path) -> None:
    """Write config.json and, unless it is None, generation_config.json.

    Settings of decoding that stand on the model's configuration go into the second file, where
    they belong since transformers 5, which refuses them in the first.
    """
    moved = [name for name in GENERATION_KEYS - MODEL_KEYS if name in vars(config)]
    plain = copy.deepcopy(config)
    for name in moved:
        delattr(plain, name)
    plain.save_pretrained(directory)
    if generation_config is not None:
        if moved and is_untouched(generation_config):
            generation_config = transformers.GenerationConfig.from_model_config(config)
        # Its own save_pretrained refuses combinations that earlier versions wrote.
        generation_config.to_json_file(directory / GENERATION_FILE)


def is_untouched(generation_config) -> bool:
    """Whether a GenerationConfig was made from the model's and is as it was then."""
    return generation_config._from_model_config and (
        getattr(generation_config, "_original_object_hash", None) == hash(generation_config)
    )
