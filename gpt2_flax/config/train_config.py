"""Every setting of a training run: its type, default, unit and meaning.

A setting is written as a flag (`--n_layers 6`) or as a YAML key (`n_layers: 6`) of the same
name; flags win over the file given by `--config`.
"""

import dataclasses
import re
import typing
from dataclasses import dataclass
from typing import Literal

import yaml

from gpt2_flax import command_names, recipes
from gpt2_flax.config import durations
from gpt2_flax.config.settings import (
    ArgumentParser,
    add_settings,
    convert,
    fields_of,
    find_secrets,
    meant,
    plain,
    read_yaml,
    setting,
    wide_help,
)
from gpt2_flax.errors import UserError

# WikiText left its short name; the hub knows it by this one.
DATASET_ALIASES = {"wikitext": "Salesforce/wikitext"}
EMBEDDED_DATASET = "python_stdlib"
MAX_LAYERS = 1024  # each is traced by itself: GPT-2 XL has 48
MAX_PROFILED = 100  # steps: a trace holds every operation of each, in memory at first


@dataclass(frozen=True)
class TrainConfig:
    """The resolved settings of one run."""

    # Model
    n_layers: int = setting(12, "transformer blocks")
    n_heads: int = setting(12, "attention heads; must divide n_embd")
    n_embd: int = setting(768, "width of the residual stream")
    n_positions: int = setting(1024, "longest context the model has positions for, tokens")
    vocab_size: int = setting(
        0, "rows of the embedding table, at least the tokenizer's tokens; 0: as many as those"
    )
    pad_vocab_to_multiple_of: int = setting(
        0,
        "compute logits as if for a multiple of so many ids; those beyond vocab_size are never"
        " predicted, and no parameter is added; 0: 128 on GPUs and TPUs, which are made for"
        " such sizes, else 1",
    )
    dropout: float = setting(0.1, "rate for embeddings, attention and residual branches")
    init_from: str = setting(
        "", "model to start from instead of random weights: a directory, a run or a hub id"
    )

    # Text
    dataset: str = setting(
        "wikitext",
        f"name on the Hugging Face hub, or {EMBEDDED_DATASET}: Python's own source files,"
        " no network needed",
    )
    dataset_config: str = setting(
        "", "configuration of the dataset (WikiText's default: wikitext-2-raw-v1)"
    )
    dataset_split: str = setting("train", "split to train on, in datasets' notation: train[:10%]")
    text_column: str = setting(
        "text", "column that holds the text, of the dataset or of .jsonl and .parquet files"
    )
    train_file: tuple[str, ...] = setting(
        (),
        "files, globs or directories to train on instead of a dataset: .txt, .jsonl or .parquet,"
        " also .gz, .zst or .xz; ids of nanoGPT or llm.c in .bin; - for standard input;"
        " any other name is read as text",
    )
    validation_file: tuple[str, ...] = setting((), "files of the same kinds to evaluate on")
    validation_share: float = setting(
        0.05,
        "share of the text held out from its end (of a dataset that is streamed: from its"
        " beginning) when there is no validation text; 0: no evaluation",
    )
    tokenizer: str = setting(
        "gpt2", "gpt2, another name on the hub, a local directory, bytes, or bpe:N"
    )
    block_size: int = setting(128, "tokens in a training row; at most n_positions")
    document_separator: str = setting(
        "",
        "what stands between the documents of a text file and is left out: blank_line, or any"
        " text (\\n is a line's end); empty: a file is one document",
    )
    encoding_errors: Literal["strict", "replace"] = setting(
        "strict", "bytes of a file that are not UTF-8: end with their place, or put U+FFFD there"
    )
    add_eos: bool = setting(True, "put the end-of-text token between documents")
    shuffle: bool = setting(True, "visit the rows in a new random order each epoch")
    streaming: bool = setting(
        False, "tokenize while training instead of once into a token file beforehand"
    )
    shuffle_window: int = setting(
        4096, "rows shuffled together when streaming; memory grows with it"
    )
    cache_dir: str = setting("", "where token files are kept (default: Hugging Face's cache)")
    tokenize_processes: int = setting(0, "processes that make token files; 0: one a core")
    show_data: int = setting(
        0, "print so many rows as ids and text, and the counts, and train nothing"
    )

    # Optimization
    epochs: float = setting(1.0, "passes over the training text")
    max_steps: int | str = setting(
        0,
        "length of the run instead of epochs: steps, '3 epochs', '1B tokens' or '2 hours' of"
        " steps (their speed is measured before the first); 0: as long as epochs says",
        units=("steps", "epochs", "tokens", "time"),
    )
    batch_size: int | Literal["auto"] = setting(
        8,
        "rows on each device at a time; auto: the largest power of two whose step fits into a"
        " device's memory, up to 262,144 tokens (8,192 on a CPU), no faster beyond that",
    )
    grad_accum: int = setting(1, "batches whose gradients are added up for one step")
    optimizer: Literal["adamw", "adafactor", "muon", "lion", "sgd"] = setting(
        "adamw",
        "update rule, from optax; muon leaves embeddings, scales and biases to Adam,"
        " adafactor keeps no momentum",
    )
    learning_rate: float = setting(6e-4, "peak learning rate")
    min_learning_rate: float = setting(
        0.0, "learning rate that the fall would reach one step after the last"
    )
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = setting(
        "cosine",
        "how the learning rate falls after the warmup; wsd: not until the last decay_steps,"
        " then linearly",
    )
    warmup_steps: float | str = setting(
        0.05,
        "steps of rising learning rate, or '0.1 epochs', '10M tokens'; below 1: that share of"
        " all steps",
        units=("steps", "epochs", "tokens"),
    )
    decay_steps: float | str = setting(
        0.2,
        "length of the fall that ends lr_schedule wsd, counted as warmup_steps is",
        units=("steps", "epochs", "tokens"),
    )
    weight_decay: float = setting(0.1, "decoupled decay, on matrices only")
    beta1: float = setting(0.9, "decay of the optimizer's mean of gradients (sgd: momentum)")
    beta2: float = setting(0.95, "decay of the optimizer's mean of squared gradients")
    adam_epsilon: float = setting(1e-8, "added to Adam's denominator")
    grad_clip: float = setting(1.0, "largest global norm of the gradient; 0: no clipping")
    max_bad_steps: int = setting(
        10,
        "steps in a row whose loss or gradient may not be finite; each is left out, and after"
        " more of them the run ends",
    )
    replica_check_every: int = setting(
        1000,
        "steps between two comparisons of the devices' copies of the model and the optimizer,"
        " which are also compared before each save; 0: never",
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "type of activations; parameters and optimizer stay float32"
    )
    remat: Literal["none", "block", "attention"] = setting(
        "none",
        "what the backward pass computes again instead of keeping it in memory: whole blocks,"
        " or attention's scores alone",
    )
    attention: Literal["auto", "xla", "flash", "cudnn"] = setting(
        "auto",
        "how attention is computed; flash: a fused kernel for NVIDIA GPUs and bfloat16; cudnn:"
        " NVIDIA's own, for dropout 0; auto: flash where it works, then cudnn, else xla",
    )
    kernels: Literal["auto", "xla", "pallas"] = setting(
        "auto",
        "how LayerNorm's gradient and the loss are computed; pallas: by kernels for NVIDIA GPUs;"
        " auto: by those where they work, for bfloat16, else by xla",
    )
    scan_layers: bool = setting(
        False,
        "compile one layer and run it n_layers times: the program is compiled in much less time,"
        " and may be slower, with a second copy of the layers' parameters during a step; what is"
        " learned stays the same (no effect with scale_attn_by_inverse_layer_idx)",
    )
    logits_at_once: int = setting(
        0,
        "positions of each row whose logits are in memory at a time: less of it for large"
        " vocabularies and long rows; 0: all",
    )
    seed: int = setting(42, "fixes initialisation, order of rows and dropout")
    parallel: Literal["pmap", "jit", "fsdp"] = setting(
        "pmap",
        "how the step runs on many devices: pmap and jit hold all of the model and the optimizer"
        " on each, fsdp a part on each (with --remat block for models that are large)",
    )
    num_processes: int = setting(
        0,
        "processes of the run, on one machine or many; 0: what SLURM, Open MPI, Cloud TPU or"
        " Kubernetes say, else 1",
    )
    process_id: int = setting(0, "which of the processes this is, counted from 0")
    coordinator_address: str = setting(
        "", "HOST:PORT on which process 0 awaits the others, the same for all"
    )
    step_timeout: float = setting(
        0.0,
        "seconds in which a step but the first, or a batch of an evaluation, must be done: a run"
        " that hangs for longer ends; 0: no limit",
    )

    # Run
    config: str = setting(
        "", "YAML file of settings, or the name of a recipe in configs/; flags are read after it"
    )
    output_dir: str = setting("./model_output", "where checkpoints, logs and the model go")
    resume: Literal["auto", "never", "require"] = setting(
        "auto", "continue the run in output_dir: if there is one, never, or else stop"
    )
    log_every: int | str = setting(
        10,
        "steps between rows of metrics.jsonl, or '0.01 epochs', '1M tokens'",
        units=("steps", "epochs", "tokens"),
    )
    eval_every: int | str = setting(
        500,
        "steps between evaluations, or '1 epoch', '100M tokens', '30 minutes'; 0: only at the end",
        units=("steps", "epochs", "tokens", "time"),
    )
    eval_rows: int = setting(
        0, "rows of an evaluation; 0: all, or in a run of fewer rows as many as it trains on"
    )
    save_every: int | str = setting(
        250,
        "steps between checkpoints, or '1 epoch', '100M tokens', at most a quarter of the run;"
        " or '30 minutes'; so is each that is the best yet by validation loss; 0: only the last",
        units=("steps", "epochs", "tokens", "time"),
    )
    compilation_cache: str = setting(
        "auto",
        "directory for compiled programs, with which the next start need not compile; auto: one"
        " in the user's cache; off: none",
    )
    keep: int = setting(2, "newest checkpoints to keep, beside the best by validation loss")
    report_to: Literal["none", "tensorboard", "wandb"] = setting(
        "none", "also log to TensorBoard or Weights & Biases (to be installed by you)"
    )
    ledger: bool = setting(
        False, "write the epoch and row number of all rows of each step to ledger.jsonl"
    )
    sample_prompt: str = setting(
        "",
        "text that a sample continues at each evaluation, into samples.txt; empty: a new text,"
        " from the end-of-text token",
    )
    sample_tokens: int = setting(
        100, "tokens of a sample, as far as n_positions leaves room after the prompt; 0: none"
    )
    profile: str = setting(
        "",
        f"trace these steps, first:last such as 10:15, into output_dir/profile; at most"
        f" {MAX_PROFILED} steps",
    )
    dry_run: bool = setting(
        False,
        "compile the step and print its memory, FLOPs and time, and the steps of the run; read no"
        " text and train nothing",
    )
    show_sharding: bool = setting(
        False, "print how the parameters lie on the devices, and train nothing"
    )
    topology: str = setting(
        "",
        "TPUs that need not be there, such as v5e:2x4, for which --dry_run compiles and"
        " --show_sharding counts; pip install libtpu",
    )
    print_config: bool = setting(
        False, "print the resolved settings as YAML, which --config reads, and train nothing"
    )
    debug: bool = setting(False, "show the traceback of an error")


GROUPS = {
    "n_layers": "model",
    "dataset": "text",
    "epochs": "optimization",
    "config": "run",
}
FIELDS = fields_of(TrainConfig)
TYPES = typing.get_type_hints(TrainConfig)
FLAGS_ONLY = (
    "config", "debug", "show_data", "dry_run", "show_sharding", "topology", "print_config",
)  # fmt: skip
# Never written to config.yaml: they say how the command is run, not what the run is.
COMMAND_ONLY = (*FLAGS_ONLY, "resume", "num_processes", "process_id", "coordinator_address")
# May differ between the sessions of one run: none of them changes what is learned,
# except the two lengths, which move the end of the learning-rate schedule.
FREE_ON_RESUME = {
    *COMMAND_ONLY,
    "output_dir", "cache_dir", "parallel", "log_every", "eval_every", "eval_rows",
    "save_every", "keep", "report_to", "sample_prompt", "sample_tokens", "epochs",
    "max_steps", "batch_size", "grad_accum", "tokenize_processes", "ledger", "profile", "remat",
    "max_bad_steps", "replica_check_every", "step_timeout", "compilation_cache",
    "logits_at_once", "attention", "kernels", "scan_layers", "pad_vocab_to_multiple_of",
}  # fmt: skip


def load_config(argv: list[str]) -> TrainConfig:
    """The settings of a command line. Raises `UserError` that lists every fault found."""
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(argv)
    given = vars(parsed)
    faults = parser.describe_unknown(unknown)
    path = recipes.find(given.get("config", ""))
    raw, yaml_faults = read_yaml(path, FLAGS_ONLY) if path else ({}, [])
    values, value_faults = convert(raw, TrainConfig, lambda name: f"{path}: {name}")
    flags, flag_faults = convert(given, TrainConfig, lambda name: f"--{name}")
    faults += yaml_faults + value_faults + flag_faults

    # What was meant by these isn't known, so nothing is said about what depends on it.
    unread = [*unknown, *(raw.keys() - values.keys()), *(given.keys() - flags.keys())]
    doubtful = {name for word in unread for name in meant(str(word).lstrip("-"), FIELDS)}
    if yaml_faults and not raw:
        doubtful = set(FIELDS)
    # A length that is given as a flag replaces the file's, whichever of the two ways it has.
    if {"epochs", "max_steps"} & flags.keys():
        values = {n: value for n, value in values.items() if n not in ("epochs", "max_steps")}
    config = dataclasses.replace(TrainConfig(), **values | flags)
    # So does any other flag that leaves a setting of the file without effect.
    for name, other in conflicting(config, values.keys() - flags.keys(), doubtful):
        if other.split()[0] in flags:
            values.pop(name, None)  # it may conflict with two of them
    config = dataclasses.replace(TrainConfig(), **values | flags)
    faults += find_faults(config, set(values | flags), doubtful)
    if faults:
        raise UserError("\nerror: ".join(faults))
    amount, unit = durations.split(config.max_steps)
    if unit == "epochs":
        return dataclasses.replace(config, epochs=amount, max_steps=0)
    return config


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command_names.prog("train"),
        description="Train GPT-2 from text to a model that PyTorch opens.",
        allow_abbrev=False,
        formatter_class=wide_help,
    )
    add_settings(parser, TrainConfig, GROUPS)
    return parser


def counts_epochs(c: TrainConfig) -> bool:
    """Whether the run can only be planned once the rows of an epoch are counted."""
    lengths = (getattr(c, name) for name, field in FIELDS.items() if "units" in field.metadata)
    return not c.max_steps or any(durations.split(value)[1] == "epochs" for value in lengths)


def find_faults(c: TrainConfig, given: set[str], doubtful: set[str]) -> list[str]:
    """What is wrong with settings that are each of the right type.

    given: names of those that were given. doubtful: of those about which nothing is to be said.
    """
    out_of_range = find_out_of_range(c)
    faults = [fault for name, fault in out_of_range.items() if name not in doubtful]
    doubtful = doubtful | out_of_range.keys()
    faults += [
        fault for names, holds, fault in relations(c) if not holds and doubtful.isdisjoint(names)
    ]
    return faults + find_secrets(c) + find_conflicts(c, given, doubtful)


def find_out_of_range(c: TrainConfig) -> dict[str, str]:
    """name -> fault of the settings that are wrong by themselves."""
    at_least_1 = ("n_layers", "n_heads", "n_embd", "n_positions", "block_size", "batch_size",
                  "grad_accum", "log_every", "keep", "shuffle_window")  # fmt: skip
    at_least_0 = ("max_steps", "eval_every", "eval_rows", "save_every", "sample_tokens",
                  "weight_decay", "grad_clip", "warmup_steps", "min_learning_rate",
                  "vocab_size", "tokenize_processes", "show_data", "decay_steps",
                  "max_bad_steps", "replica_check_every", "num_processes", "process_id",
                  "step_timeout", "logits_at_once", "pad_vocab_to_multiple_of")  # fmt: skip
    above_0 = ("learning_rate", "epochs", "adam_epsilon")
    shares = ("dropout", "beta1", "beta2", "validation_share")
    # Beyond these a float32 is infinite, or 0.
    scales = ("learning_rate", "min_learning_rate", "weight_decay", "grad_clip", "adam_epsilon")
    counted = [name for name, kind in TYPES.items() if int in (kind, *typing.get_args(kind))]
    counted = [*(name for name in counted if name != "seed"), "warmup_steps", "decay_steps"]
    limits = [
        (at_least_1, lambda value: value >= 1, "at least 1"),
        (at_least_0, lambda value: 0 <= value < float("inf"), "0 or more"),
        (above_0, lambda value: 0 < value < float("inf"), "above 0"),
        (shares, lambda value: 0 <= value < 1, "at least 0 and below 1"),
        (scales, lambda value: value <= 1e30, "at most 1e30"),
        (("adam_epsilon",), lambda value: value >= 1e-30, "at least 1e-30"),
        (counted, lambda value: value < 2**31, "below 2**31"),
        (("n_layers",), lambda value: value <= MAX_LAYERS, f"at most {MAX_LAYERS}"),
        (("epochs",), lambda value: value <= 1e6, "at most 1000000"),
        (("pad_vocab_to_multiple_of",), lambda value: value <= 2**16, "at most 65536"),
        (("seed",), lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
    ]
    faults = {}
    for names, holds, words in limits:
        for name in names:
            value = getattr(c, name)
            # Words have been looked through when they were read.
            if name not in faults and not is_words(value) and not holds(value):
                faults[name] = f"{name} must be {words}, got {value}"
    return faults


def relations(c: TrainConfig):
    """Yield (names of settings, whether they go together, the fault if not)."""
    for name in ("max_steps", "log_every"):
        value = getattr(c, name)
        is_none = is_words(value) and durations.split(value)[0] == 0
        yield {name}, not is_none, f"{name} must be above 0, got {value}"
    parts = [value for value in (c.warmup_steps, c.decay_steps) if not isinstance(value, str)]
    yield (
        {"warmup_steps", "decay_steps", "lr_schedule"},
        c.lr_schedule != "wsd" or len(parts) < 2 or max(parts) >= 1 or sum(parts) <= 1,
        f"warmup_steps {c.warmup_steps} and decay_steps {c.decay_steps} are over the whole run\n"
        "  lower one of the two shares",
    )
    if not c.init_from:  # its sizes are not known here
        yield from relations_of_sizes(c)
    yield (
        {"min_learning_rate", "learning_rate"},
        c.min_learning_rate <= c.learning_rate,
        f"min_learning_rate {c.min_learning_rate} is over learning_rate {c.learning_rate}",
    )
    yield (
        {"attention", "dtype"},
        c.attention != "flash" or c.dtype == "bfloat16",
        f"attention flash needs dtype bfloat16, got {c.dtype}\n"
        "  change that, or leave it to --attention auto",
    )
    yield (
        {"attention", "dtype", "dropout"},
        c.attention != "cudnn" or (c.dtype == "bfloat16" and c.dropout == 0),
        f"attention cudnn needs dtype bfloat16 and dropout 0, got {c.dtype} and {c.dropout:g}\n"
        "  change those two, or leave it to --attention auto",
    )
    yield (
        {"topology", "batch_size"},
        not c.topology or c.batch_size != "auto",
        "batch_size auto needs to know the memory of a device, which topology does not say\n"
        "  give --batch_size a number; what does not fit is refused",
    )
    if c.tokenizer.startswith("bpe:"):
        size = c.tokenizer.removeprefix("bpe:")
        is_number = size.isascii() and size.isdigit() and len(size) < 9
        yield (
            {"tokenizer"},
            is_number and int(size) >= 257,
            f"tokenizer {plain(c.tokenizer)}: bpe:N needs N of at least 257"
            " (256 bytes and end-of-text)\n  for example --tokenizer bpe:8192",
        )
    yield (
        {"sample_prompt"},
        c.sample_prompt.isascii() or not re.search("[\ud800-\udfff]", c.sample_prompt),
        "sample_prompt is not UTF-8 text\n  is the terminal set to UTF-8?",
    )
    yield (
        {"compilation_cache"},
        c.compilation_cache.strip(),
        "compilation_cache is empty\n  name a directory, or off",
    )
    for fault in find_process_faults(c):
        yield {"num_processes", "process_id"}, False, fault
    if c.profile:
        yield from relations_of_profile(c)


def relations_of_sizes(c: TrainConfig):
    """The relations of what a model that is made anew is given."""
    if c.n_heads > 0 and c.n_embd % c.n_heads:
        below = c.n_embd - c.n_embd % c.n_heads
        near = [width for width in (below, below + c.n_heads) if width]
        yield (
            {"n_embd", "n_heads"},
            False,
            f"n_embd {c.n_embd} is not divisible by n_heads {c.n_heads}\n"
            f"  set n_embd to {' or '.join(map(str, near))}, or change n_heads",
        )
    yield (
        {"block_size", "n_positions"},
        c.block_size <= c.n_positions,
        f"block_size {c.block_size} is over n_positions {c.n_positions}\n"
        "  lower block_size, or give the model as many positions",
    )
    yield (
        {"sample_tokens", "n_positions"},
        c.sample_tokens < c.n_positions,
        f"sample_tokens {c.sample_tokens} does not fit into n_positions {c.n_positions}\n"
        "  lower sample_tokens; 0 for no sample",
    )


def relations_of_profile(c: TrainConfig):
    """The relations of `--profile`, which is given."""
    span = profiled_steps(c.profile)
    yield (
        {"profile"},
        span is not None,
        f"profile {plain(c.profile)}: expected first:last, the steps to trace\n"
        f"  for example --profile 10:15; step 1 is the first, and {MAX_PROFILED} are the most",
    )
    yield (
        {"profile", "max_steps"},
        span is None or not isinstance(c.max_steps, int) or span[1] <= (c.max_steps or span[1]),
        f"profile {plain(c.profile)} goes beyond max_steps {c.max_steps}\n  trace earlier steps",
    )


def find_process_faults(c: TrainConfig) -> list[str]:
    """The faults of the three settings by which processes find each other."""
    address, faults = c.coordinator_address, []
    if c.num_processes > 1 and not address:
        faults.append(
            f"num_processes {c.num_processes} needs a coordinator_address\n"
            "  give all processes the same --coordinator_address HOST:PORT"
        )
    if c.num_processes and c.process_id >= c.num_processes:
        faults.append(
            f"process_id {c.process_id} is not below num_processes {c.num_processes}\n"
            "  number the processes from 0"
        )
    port = re.fullmatch(r"[^\s/]+:([0-9]{1,5})", address)
    if address and not (port and 0 < int(port[1]) < 65536):
        faults.append(
            f"coordinator_address {plain(address)} is not of the form HOST:PORT\n"
            "  for example 10.0.0.1:8476"
        )
    return faults


def profiled_steps(text: str) -> tuple[int, int] | None:
    """(first, last) step that `--profile` names, both to be traced; None where it names none."""
    match = re.fullmatch(r"([0-9]{1,12}):([0-9]{1,12})", text)
    if match is None:
        return None
    first, last = map(int, match.groups())
    return (first, last) if 1 <= first <= last < first + MAX_PROFILED else None


def is_words(value) -> bool:
    return isinstance(value, str)


def find_conflicts(c: TrainConfig, given: set[str], doubtful: set[str]) -> list[str]:
    """The faults of settings that were given and could not take effect with the others."""
    return [
        f"{name} has no effect with {other}\n  leave one of the two out"
        for name, other in conflicting(c, given, doubtful)
    ]


def conflicting(c: TrainConfig, given: set[str], doubtful: set[str]) -> list[tuple[str, str]]:
    """(setting that was given, setting and value with which it has no effect), of each such."""
    conflicts = [
        ({"dataset", "dataset_config", "dataset_split"}, bool(c.train_file), "train_file"),
        (
            {"dataset_config", "dataset_split"},
            c.dataset == EMBEDDED_DATASET and not c.train_file,
            f"dataset {c.dataset}",
        ),
        (
            {"text_column"},
            c.dataset == EMBEDDED_DATASET and not (c.train_file or c.validation_file),
            f"dataset {c.dataset}",
        ),
        (
            {"document_separator", "encoding_errors"},
            not (c.train_file or c.validation_file),
            f"dataset {c.dataset}",
        ),
        ({"validation_share"}, bool(c.validation_file), "validation_file"),
        (
            {"validation_share"},
            c.validation_share > 0 and c.dataset == EMBEDDED_DATASET and not c.train_file,
            f"dataset {c.dataset}",
        ),
        ({"shuffle_window"}, not c.streaming, "streaming false"),
        ({"shuffle_window"}, not c.shuffle, "shuffle false"),
        (
            {"n_layers", "n_heads", "n_embd", "n_positions", "vocab_size"},
            bool(c.init_from),
            "init_from",
        ),
        ({"min_learning_rate"}, c.lr_schedule == "constant", "lr_schedule constant"),
        ({"decay_steps"}, c.lr_schedule != "wsd", f"lr_schedule {c.lr_schedule}"),
        ({"epochs"}, bool(c.max_steps), "max_steps"),
        ({"adam_epsilon"}, c.optimizer not in ("adamw", "muon"), f"optimizer {c.optimizer}"),
        ({"beta1"}, c.optimizer == "adafactor", "optimizer adafactor"),
        ({"beta2"}, c.optimizer in ("adafactor", "sgd"), f"optimizer {c.optimizer}"),
        ({"sample_prompt"}, c.sample_tokens == 0, "sample_tokens 0"),
        ({"topology"}, not (c.dry_run or c.show_sharding), "dry_run false"),
        ({"process_id"}, c.num_processes < 2, f"num_processes {c.num_processes}"),
        ({"coordinator_address"}, c.num_processes == 1, "num_processes 1"),
        (
            {"eval_rows"},
            c.validation_share == 0 and not c.validation_file,
            "validation_share 0",
        ),
    ]
    return [
        (name, other)
        for names, clash, other in conflicts
        if clash and other.split()[0] not in doubtful
        for name in sorted((names & given) - doubtful)
        if getattr(c, name) != FIELDS[name].default
    ]


def dump_yaml(config: TrainConfig) -> str:
    """The settings of a run as YAML, to be read again by `--config`."""
    values = dataclasses.asdict(config)
    kept = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name not in COMMAND_ONLY
    }
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def differing_keys(config: TrainConfig, saved: dict) -> dict[str, tuple]:
    """name -> (saved, wanted) of the settings that a resumed run may not change."""
    wanted = yaml.safe_load(dump_yaml(config))
    was = yaml.safe_load(dump_yaml(TrainConfig()))  # of a setting that came after the run began
    return {
        name: (saved.get(name, was[name]), value)
        for name, value in wanted.items()
        if name not in FREE_ON_RESUME and saved.get(name, was[name]) != value
    }
