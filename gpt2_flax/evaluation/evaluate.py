"""The evaluation of a model from its settings to one JSON object: the order of events.

Settings and their faults need no JAX, as those of training.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import time
import typing
from dataclasses import dataclass
from typing import Literal

from gpt2_flax import command_names
from gpt2_flax.config.settings import (
    ArgumentParser,
    add_settings,
    convert,
    fields_of,
    find_secrets,
    setting,
    shown,
    wide_help,
)
from gpt2_flax.config.train_config import EMBEDDED_DATASET, TrainConfig
from gpt2_flax.errors import StorageError, UserError, say


@dataclass(frozen=True)
class EvaluateConfig:
    """The settings of one evaluation."""

    # Model
    model: str = setting(
        "", "directory, run, one of its checkpoints, weights file, or hub id", required=True
    )
    step: int = setting(0, "checkpoint of a run; 0: its final model, or the newest")
    tokenizer: str = setting("", "as for training (default: the model's own)")
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "type of activations; parameters and scores are float32"
    )
    batch_size: int = setting(8, "rows on each device at a time; changes no score")

    # Perplexity
    dataset: str = setting(
        "",
        f"name on the Hugging Face hub, a directory, or {EMBEDDED_DATASET} (default: wikitext,"
        " where nothing else is to be evaluated)",
    )
    dataset_config: str = setting(
        "", "configuration of the dataset (WikiText's default: wikitext-2-raw-v1)"
    )
    dataset_split: str = setting(
        "test", f"split, in datasets' notation; of {EMBEDDED_DATASET}: train, or test (held out)"
    )
    file: tuple[str, ...] = setting(
        (),
        "files, globs or directories instead, of the kinds of --train_file; - for standard input",
    )
    text_column: str = setting("text", "column of a dataset, .jsonl or .parquet file")
    document_separator: str = setting("", "what parts the documents of a text file")
    encoding_errors: Literal["strict", "replace"] = setting(
        "strict", "bytes of a file that are not UTF-8: end with their place, or put U+FFFD there"
    )
    add_eos: bool = setting(
        False, "put end-of-text behind each document and score it too, as in training"
    )
    detokenizer: Literal["none", "wikitext"] = setting(
        "none", "undo the word-by-word spacing of a text before it is tokenized"
    )
    context: int = setting(0, "ids that one is predicted from at most; 0: n_positions")
    stride: int = setting(0, "ids between windows, at most context; 0: context")

    # Zero-shot
    lambada: str = setting("", "LAMBADA's .jsonl file: accuracy and perplexity of the last word")
    hellaswag: str = setting("", "HellaSwag's .jsonl file: accuracy among four endings")
    limit: int = setting(0, "take the first N items of each of these; 0: all")
    items: str = setting("", "write the scores of each item there, a .jsonl file")

    # Output
    json: str = setting("", "also write the result there")
    cache_dir: str = setting("", "where what is unpacked is kept (default: Hugging Face's cache)")
    debug: bool = setting(False, "show the traceback of an error")


GROUPS = {"model": "model", "dataset": "perplexity", "lambada": "zero-shot", "json": "output"}
FIELDS = fields_of(EvaluateConfig)
TYPES = typing.get_type_hints(EvaluateConfig)
OF_TEXT = ("dataset", "dataset_config", "dataset_split", "file", "text_column",
           "document_separator", "encoding_errors", "add_eos", "detokenizer", "context",
           "stride")  # fmt: skip


# ---------------------------------------------------------------- settings


def load_config(argv: list[str]) -> EvaluateConfig:
    """The settings of a command line. Raises UserError that lists every fault found."""
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(argv)
    values, faults = convert(vars(parsed), EvaluateConfig, lambda name: f"--{name}")
    config = EvaluateConfig(**values)
    faults = [*parser.describe_unknown(unknown), *faults, *find_faults(config, set(values))]
    if faults:
        raise UserError("\nerror: ".join(faults))
    return config


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command_names.prog("evaluate"),
        description="Evaluate a model: perplexity of a text, LAMBADA, HellaSwag. One JSON object.",
        allow_abbrev=False,
        formatter_class=wide_help,
    )
    add_settings(parser, EvaluateConfig, GROUPS)
    return parser


def wants_perplexity(c: EvaluateConfig) -> bool:
    """Whether a text was named, or nothing else."""
    return bool(c.dataset or c.file) or not (c.lambada or c.hellaswag)


def find_faults(c: EvaluateConfig, given: set[str]) -> list[str]:
    """What is wrong with settings that are each of the right type. given: their names."""
    faults = []
    if c.dataset == EMBEDDED_DATASET and c.dataset_split not in ("train", "test"):
        faults.append(
            f"dataset_split {shown(c.dataset_split)} of {EMBEDDED_DATASET}: it has train and test"
        )
    for name in ("step", "context", "stride", "limit"):
        if getattr(c, name) < 0:
            faults.append(f"{name} must be 0 or more, got {getattr(c, name)}")
    if c.batch_size < 1:
        faults.append(f"batch_size must be at least 1, got {c.batch_size}")
    if not c.model and "model" in given:
        faults.append("model is empty\n  name a directory, a run or a model on the hub")
    if 0 < c.context < c.stride:
        faults.append(
            f"stride {c.stride} is over context {c.context}: ids between would be left out\n"
            "  lower stride"
        )
    if c.tokenizer.startswith("bpe:"):
        faults.append(
            f"tokenizer {c.tokenizer} is learned while training\n"
            "  name the directory that the run has saved it in"
        )
    faults += [f"{name} has no effect {why}" for name, why in find_conflicts(c, given)]
    return faults + find_secrets(c)


def find_conflicts(c: EvaluateConfig, given: set[str]):
    """(setting that was given, why it could not take effect)."""
    leave = "\n  leave one of the two out"
    conflicts = []
    if not wants_perplexity(c):
        why = "without a text\n  name one: --dataset or --file"
        conflicts += [(name, why) for name in OF_TEXT if name in given]
    if c.file:
        conflicts += [
            (name, f"with file{leave}")
            for name in ("dataset", "dataset_config", "dataset_split")
            if name in given
        ]
    else:
        conflicts += [
            (name, "without a file\n  name one: --file")
            for name in ("document_separator", "encoding_errors")
            if name in given and wants_perplexity(c)
        ]
    if c.dataset == EMBEDDED_DATASET and not c.file:
        conflicts += [
            (name, f"with dataset {EMBEDDED_DATASET}{leave}")
            for name in ("dataset_config", "text_column")
            if name in given
        ]
    if not (c.lambada or c.hellaswag):
        why = "without items\n  name a file: --lambada or --hellaswag"
        conflicts += [(name, why) for name in ("limit", "items") if name in given]
    return conflicts


# ---------------------------------------------------------------- evaluation


def evaluate(config: EvaluateConfig) -> dict:
    """What the settings ask for, as one object for JSON.

    Raises UserError, or one of its kinds, for what the user can put right.
    """
    from gpt2_flax.evaluation import zero_shot
    from gpt2_flax.evaluation.scorer import Scorer

    for path in filter(None, (config.json, config.items)):
        check_writable(path)
    if config.json and config.json == config.items:
        raise UserError(f"json and items are both {config.json}\n  name two files")
    model, params, tokenizer = load_model(config)
    text = None
    if wants_perplexity(config):
        check_windows(config, model.config.n_positions)
        text = read_text(config, tokenizer)
    scorer = Scorer(model, params, config.batch_size)
    result = {"model": config.model, "tokenizer": tokenizer.name, "dtype": config.dtype}
    if text is not None:
        result["perplexity"] = score_text(scorer, config, *text)
    rows = []
    for name in ("lambada", "hellaswag"):
        if path := getattr(config, name):
            score = getattr(zero_shot, name)
            result[name], of_items = timed(score, scorer, tokenizer, path, config.limit)
            rows += of_items
    if config.items:
        write(config.items, "".join(json.dumps(row) + "\n" for row in rows))
    if config.json:
        write(config.json, dump(result) + "\n")
    return result


@contextlib.contextmanager
def only_errors(name: str):
    """Keep a logger's warnings back for a while."""
    import logging

    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_model(config: EvaluateConfig):
    """(model, tokenizer). Raises UserError where they are missing, not whole, or no pair."""
    import jax.numpy as jnp

    from gpt2_flax.data.tokenizers import load_tokenizer, make_tokenizer
    from gpt2_flax.pretrained import orbax_files
    from gpt2_flax.pretrained.modeling import FlaxGPT2LMHeadModel

    where = pathlib.Path(config.model).expanduser()
    if config.step:
        where = orbax_files.locate(where, config.step)
    place = str(where) if where.exists() else config.model
    # Its warnings are of weights that are missing, refused below, or become float32.
    with only_errors("gpt2_flax"):
        model, params = FlaxGPT2LMHeadModel.from_pretrained(
            place, dtype=jnp.dtype(config.dtype), _do_init=False
        )
    if missing := model._missing_keys:
        raise UserError(
            f"the model in {config.model} lacks {len(missing)} weights, such as"
            f" {'/'.join(min(missing))}\n  is its config.json the right one?"
        )
    if model.config.add_cross_attention:
        raise UserError(
            f"the model in {config.model} has cross-attention, which text alone cannot feed\n"
            "  name a model without it"
        )
    if config.tokenizer:
        tokenizer = make_tokenizer(config.tokenizer, ())
    else:
        tokenizer = load_tokenizer(str(beside(where)) if where.exists() else config.model)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model in"
            f" {config.model} has {model.config.vocab_size}\n"
            "  name the one it was trained with: --tokenizer"
        )
    if tokenizer.vocab_size < model.config.vocab_size:
        say(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, fewer than the"
            f" model's {model.config.vocab_size}: is it the one it was trained with?"
        )
    return model, params, tokenizer


def beside(where: pathlib.Path) -> pathlib.Path:
    """The directory where a model's tokenizer lies: of a run for one of its checkpoints."""
    where = where.absolute()
    if where.is_file():
        return where.parent
    if where.name.isdigit() and (where / "state").is_dir():
        where = where.parent
    return where.parent if where.name == "checkpoints" else where


def check_windows(config: EvaluateConfig, n_positions: int) -> None:
    if config.context > n_positions:
        raise UserError(
            f"context {config.context} is over the {n_positions} positions of the model\n"
            "  lower context, or leave it out"
        )
    if config.stride > (config.context or n_positions):
        raise UserError(
            f"stride {config.stride} is over the context of {n_positions}: ids between would be"
            " left out\n  lower stride"
        )


def read_text(config: EvaluateConfig, tokenizer):
    """(name, all ids of the text, the Counted that read it; None where it was ids)."""
    import numpy as np

    from gpt2_flax.data import pipeline, sources, token_files
    from gpt2_flax.data.files import find_files
    from gpt2_flax.evaluation.detokenize import DETOKENIZERS, Counted

    # add_eos has another default there, and is applied here.
    same = {field.name for field in dataclasses.fields(TrainConfig)} & (
        {"cache_dir", *OF_TEXT} - {"add_eos"}
    )
    about_text = TrainConfig(
        train_file=config.file, validation_share=0.0,
        **{name: getattr(config, name) for name in same if getattr(config, name) != ""},
    )  # fmt: skip
    folder = pipeline.cache_folder(about_text)
    if config.file:
        source = sources.open_patterns(config.file, about_text, "file", folder)
        sources.check_options(about_text)
    elif config.dataset == EMBEDDED_DATASET:
        source = sources.python_sources()[config.dataset_split != "train"]
    else:
        source, _ = sources.open_sources(about_text, folder)
    if source is None:
        for name in ("detokenizer", "add_eos"):
            if getattr(config, name) != FIELDS[name].default:
                raise UserError(
                    f"{name} has no effect on ids in .bin files\n  leave it out, or name text"
                )
        ids, _ = token_files.id_files(find_files(config.file, "file"), tokenizer, folder)
        return ", ".join(config.file), check_length(ids.read(0, len(ids)), config.file), None
    counted = Counted(source, DETOKENIZERS[config.detokenizer])
    encoded = token_files.encode(counted, tokenizer, config.add_eos)
    ids = np.concatenate([np.zeros(0, np.int32), *(piece.ids for piece in encoded)])
    pipeline.warn_of_text({"found": source.found}, source.name)
    return source.name, check_length(ids, source.name), counted


def check_length(ids, name):
    if len(ids) < 2:
        raise UserError(
            f"{name} has {len(ids)} tokens, too few: the first is predicted from nothing\n"
            "  use more text"
        )
    return ids


def score_text(scorer, config: EvaluateConfig, name: str, ids, counted) -> dict:
    """NLL sum, counts and what is divided by what."""
    from gpt2_flax.evaluation.scorer import perplexity, score_text

    context = config.context or scorer.n_positions
    stride = config.stride or context
    nll, n_tokens = timed(score_text, scorer, ids, context, stride)

    def per(n: int) -> float | None:
        """None where it is no number that JSON could hold."""
        value = perplexity(nll / n) if n else math.inf
        return value if math.isfinite(value) else None

    result = {
        "text": name,
        "split": None if config.file else config.dataset_split,
        "detokenizer": config.detokenizer,
        "add_eos": config.add_eos,
        "context": context,
        "stride": stride,
        "nll_sum": nll,
        "tokens": n_tokens,
        "perplexity_per_token": per(n_tokens),
    }
    if counted is not None:
        result |= {
            "words": counted.words,
            "lines": counted.lines,
            "bytes": counted.bytes,
            "bytes_detokenized": counted.bytes_out,
            "perplexity_per_word": per(counted.words),
            "perplexity_per_word_and_line_end": per(counted.words + counted.lines),
            "bits_per_byte": nll / math.log(2) / counted.bytes if counted.bytes else None,
        }
    return result


def timed(score, *arguments):
    """Call it, and say how long it took."""
    began = time.perf_counter()
    result = score(*arguments)
    what = score.__name__.removeprefix("score_")
    say(f"{what}: {time.perf_counter() - began:.1f} s")
    return result


# ---------------------------------------------------------------- output


def dump(result: dict) -> str:
    """As JSON, which has no infinity: null stands for a perplexity too large for a float."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(result), indent=1, allow_nan=False)


def check_writable(path: str) -> None:
    """Raise UserError for a file that could not be written once all is done."""
    file = pathlib.Path(path).expanduser().absolute()
    folder = file.parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"cannot write {path}: it is a directory, or in none that can be written to\n"
            "  name a file in a directory that exists"
        )


def write(path: str, text: str) -> None:
    try:
        pathlib.Path(path).expanduser().write_text(text, "utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
