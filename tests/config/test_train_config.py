"""Settings: where they come from, what they accept, and what is said about a wrong one."""

import dataclasses
import itertools
import pathlib
import random
import re
import shlex
import tracemalloc
import types
import typing

import pytest
import yaml

import scripts.train
from gpt2_flax.config import durations
from gpt2_flax.config.settings import MAX_YAML_BYTES
from gpt2_flax.config.train_config import (
    COMMAND_ONLY,
    FIELDS,
    FREE_ON_RESUME,
    TYPES,
    TrainConfig,
    build_parser,
    differing_keys,
    dump_yaml,
    load_config,
)
from gpt2_flax.errors import UserError
from gpt2_flax.training.setup import make_interval

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))

# A value beside the default, and what else must be given for it to take effect.
ANOTHER = {
    "coordinator_address": "10.0.0.1:8476",
    "n_heads": 16,
    "n_embd": 816,
    "optimizer": "lion",
    "lr_schedule": "linear",
    "dtype": "bfloat16",
    "parallel": "jit",
    "resume": "never",
    "report_to": "wandb",
    "min_learning_rate": 1e-5,
    "tokenizer": "bpe:300",
    "encoding_errors": "replace",
    "profile": "1:1",
    "remat": "block",
    "attention": "xla",
    "kernels": "xla",
    "batch_size": "auto",
    "max_steps": 1000,
    "warmup_steps": "2000000 tokens",
    "decay_steps": 0.25,
    "log_every": "50000 tokens",
    "eval_every": "0.5 epochs",
    "save_every": "30 minutes",
}
COMPANIONS = {
    "shuffle_window": ["--streaming"],
    "document_separator": ["--train_file", "a"],
    "encoding_errors": ["--train_file", "a"],
    "decay_steps": ["--lr_schedule", "wsd"],
    "topology": ["--dry_run"],
    "process_id": ["--num_processes", "9", "--coordinator_address", "a:1"],
}


def another_value(name):
    kind, default = TYPES[name], FIELDS[name].default
    if name in ANOTHER:
        return ANOTHER[name]
    if kind is bool:
        return not default
    if kind is int:
        return default + 1
    if kind is float:
        return default / 2 or 0.25
    return ("one.txt", "two words.txt") if kind is not str else "näme: #1"


def as_flags(name, value):
    if name == "debug":
        return ["--debug"]
    values = value if isinstance(value, tuple) else [value]
    return [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]


@pytest.fixture
def write_yaml(tmp_path):
    """The path of a file with this content."""

    def write(content):
        path = tmp_path / "run.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def faults_of(*argv):
    """The faults that a command line is refused with, each of at most three lines."""
    with pytest.raises(UserError) as caught:
        load_config(list(argv))
    faults = str(caught.value).split("\nerror: ")
    assert all(1 <= len(fault.splitlines()) <= 3 for fault in faults), faults
    return faults


def only_fault_of(*argv):
    (fault,) = faults_of(*argv)
    return fault


# ---------------------------------------------------------------- where settings come from


def test_the_bare_command_trains_gpt2_124m_on_wikitext_2():
    config = load_config([])
    assert config == TrainConfig()
    assert (config.n_layers, config.n_heads, config.n_embd, config.n_positions) == (
        12, 12, 768, 1024,
    )  # fmt: skip
    assert (config.dataset, config.tokenizer, config.train_file) == ("wikitext", "gpt2", ())
    assert (config.block_size, config.epochs, config.output_dir) == (128, 1.0, "./model_output")


@pytest.mark.parametrize("name", FIELDS)
def test_a_flag_sets_its_setting_and_no_other(name, write_yaml):
    value = write_yaml("") if name == "config" else another_value(name)
    extra = COMPANIONS.get(name, [])
    config = load_config([*extra, *as_flags(name, value)])
    assert config == dataclasses.replace(load_config(extra), **{name: value})


# What is refused in a file.
NO_KEY = ("config", "debug", "show_data", "dry_run", "show_sharding", "topology", "print_config")


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in NO_KEY])
def test_a_yaml_key_sets_what_the_flag_sets(name, write_yaml):
    value = another_value(name)
    path = write_yaml(yaml.safe_dump({name: list(value) if isinstance(value, tuple) else value}))
    extra = COMPANIONS.get(name, [])
    assert load_config(["--config", path, *extra]) == dataclasses.replace(
        load_config([*extra, *as_flags(name, value)]), config=path
    )


@pytest.mark.parametrize("argv", [["--n_layers", "5", "--config"], ["--n_layers=5", "--config"]])
def test_flags_win_over_the_file_wherever_they_stand(argv, write_yaml):
    config = load_config([*argv, write_yaml("n_layers: 3\nn_heads: 4\n")])
    assert (config.n_layers, config.n_heads) == (5, 4)


def test_train_files_of_repeated_flags_are_all_kept_in_order():
    config = load_config(["--train_file", "a", "b", "--train_file", "c"])
    assert config.train_file == ("a", "b", "c")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 3e-4", "learning_rate", 3e-4),  # text to YAML 1.1
        ("learning_rate: '0.5'", "learning_rate", 0.5),
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 7.0", "max_steps", 7),
        ("epochs: 2", "epochs", 2.0),
        ("shuffle: no", "shuffle", False),
        ("shuffle: 'false'", "shuffle", False),
        ("train_file: one.txt", "train_file", ("one.txt",)),
        ("output_dir: '007'", "output_dir", "007"),
        ("\ufeffseed: 3", "seed", 3),  # a byte-order mark, as Windows editors write
    ],
)
def test_yaml_values_become_the_settings_type(line, name, value, write_yaml):
    loaded = getattr(load_config(["--config", write_yaml(line)]), name)
    assert (loaded, type(loaded)) == (value, type(value))


@pytest.mark.parametrize("word", ["", " true", " yes", " 1", "=true"])
def test_a_boolean_flag_stands_alone_or_with_a_word(word):
    assert load_config(f"--streaming{word}".split()).streaming is True
    assert load_config(["--shuffle", "False"]).shuffle is False


@pytest.mark.parametrize("content", ["", "# nothing but this\n"])
def test_a_file_without_settings_changes_nothing(content, write_yaml):
    path = write_yaml(content)
    assert load_config(["--config", path]) == TrainConfig(config=path)


def test_the_recipes_are_these():
    assert {path.stem for path in RECIPES} >= {
        "quickstart", "gpt2_124m_wikitext2", "gpt2_124m_wikitext103", "gpt2_124m_text_file",
        "gpt2_124m_openwebtext", "gpt2_medium", "gpt2_large", "gpt2_xl", "shakespeare_bytes",
        "finetune_gpt2",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_loads_and_is_headed_by_its_command_and_what_to_expect(path):
    lines = path.read_text("utf-8").splitlines()
    head = [line for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    (command,) = (line for line in head if f"--config configs/{path.name}" in line)
    words = shlex.split(command.lstrip("# "))
    assert words[:2] == ["python", "scripts/train.py"]
    config = load_config(["--config", str(path), *words[4:]])
    assert config.output_dir != TrainConfig.output_dir  # recipes don't mix in one directory
    assert "not yet measured" in "\n".join(head) or re.search(r"loss \d\.\d\d", "\n".join(head))


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("gpt2_124m_openwebtext", 491_520),
        ("gpt2_medium", 524_288),
        ("gpt2_large", 524_288),
        ("gpt2_xl", 524_288),
    ],
)
def test_a_recipe_s_steps_have_half_a_million_tokens(name, tokens):
    c = load_config(["--config", str(ROOT / "configs" / f"{name}.yaml")])
    assert 8 * c.batch_size * c.grad_accum * c.block_size == tokens
    assert c.block_size == 1024


def test_the_recipe_of_the_bare_command_has_its_settings():
    recipe = load_config(["--config", str(ROOT / "configs" / "gpt2_124m_wikitext2.yaml")])
    bare = {"config": "", "output_dir": TrainConfig.output_dir, "dataset_config": ""}
    assert dataclasses.replace(recipe, **bare) == TrainConfig()


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("name", "words", "value"),
    [
        ("max_steps", "500", 500),
        ("max_steps", "10k", 10_000),
        ("max_steps", "1.5k steps", 1500),
        ("max_steps", "1 step", 1),
        ("max_steps", "1e3", 1000),
        ("max_steps", "1B tokens", "1000000000 tokens"),
        ("max_steps", "2.5MTokens", "2500000 tokens"),
        ("max_steps", "2 hours", "2 hours"),
        ("max_steps", "2 Minutes", "2 minutes"),
        ("max_steps", "1Minute", "1 minutes"),
        ("max_steps", "1.5 day", "1.5 days"),
        ("eval_every", "90 minutes", "90 minutes"),
        ("save_every", "30 seconds", "30 seconds"),
        ("eval_every", "1 epoch", "1 epochs"),
        ("log_every", ".25 epochs", "0.25 epochs"),
        ("warmup_steps", "0.05", 0.05),
        ("warmup_steps", "2k", 2000),
        ("warmup_steps", "10M tokens", "10000000 tokens"),
    ],
)
def test_a_length_may_be_words(name, words, value, write_yaml):
    for argv in (
        [f"--{name}", words],
        ["--config", write_yaml(yaml.safe_dump({name: words}))],
        ["--config", write_yaml(yaml.safe_dump({name: value}))],
    ):
        assert getattr(load_config(argv), name) == value


def test_a_run_of_epochs_is_the_same_in_words():
    assert load_config(["--max_steps", "2.5 epochs"]) == TrainConfig(epochs=2.5)


@pytest.mark.parametrize(
    ("content", "flags", "epochs", "max_steps"),
    [
        ("epochs: 3", ["--max_steps", "30"], 1.0, 30),
        ("max_steps: 30", ["--epochs", "3"], 3.0, 0),
        ("max_steps: 2 epochs", ["--max_steps", "1B tokens"], 1.0, "1000000000 tokens"),
        ("max_steps: 30", ["--seed", "3"], 1.0, 30),
    ],
)
def test_a_length_as_a_flag_replaces_the_files(write_yaml, content, flags, epochs, max_steps):
    config = load_config(["--config", write_yaml(content), *flags])
    assert (config.epochs, config.max_steps) == (epochs, max_steps)


def test_a_flag_that_leaves_a_setting_of_the_file_without_effect_wins(write_yaml):
    path = write_yaml("optimizer: adamw\nbeta1: 0.8\nbeta2: 0.9\nlr_schedule: wsd\ndecay_steps: 9")
    config = load_config(["--config", path, "--optimizer", "adafactor", "--lr_schedule", "linear"])
    assert config == TrainConfig(optimizer="adafactor", lr_schedule="linear", config=path)
    path = write_yaml("streaming: true\nshuffle_window: 9")
    flags = ["--streaming", "false", "--shuffle", "false"]  # each leaves it without effect
    config = load_config(["--config", path, *flags])
    assert config == TrainConfig(shuffle=False, config=path)
    # Two settings of the file, or two flags, that do not go together are still refused.
    assert "beta1 has no effect with optimizer" in only_fault_of(
        "--config", write_yaml("optimizer: adafactor\nbeta1: 0.8"), "--seed", "1"
    )
    assert "beta1 has no effect with optimizer" in only_fault_of(
        "--config", write_yaml("optimizer: adafactor"), "--beta1", "0.8"
    )


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (
            "--log_every 2hours",
            r"cannot be counted in hours: expected .*'1B tokens', got '2hours'$",
        ),
        ("--warmup_steps 1day", r"cannot be counted in days: expected a number of steps, a share"),
        ("--max_steps 2weeks", r"expected a whole number of steps, '3 epochs', .*'2 hours', got"),
        ("--max_steps 1.5steps", r"expected a whole number of steps, got '1.5steps'$"),
        ("--max_steps 1.5tokens", r"expected a whole number of tokens, got '1.5tokens'$"),
        ("--warmup_steps 0.5steps", r"expected a whole number of steps, got '0.5steps'$"),
        ("--max_steps 5m", r"expected a whole number of steps, "),  # minutes or millions
        ("--max_steps 9e999tokens", r"expected a whole number of steps, "),
        ("--max_steps hours", r"expected a whole number of steps, "),
        ("--max_steps=-2hours", r"expected a whole number of steps, "),
        ("--eval_every true", r"expected a whole number of steps, "),
    ],
)
def test_a_length_in_other_words_is_refused(argv, match):
    assert re.search(match, only_fault_of(*argv.split()))


@pytest.mark.parametrize(
    ("value", "n_steps"),
    [
        (7, 7),
        (0.25, 0.25),
        ("1 epochs", 13),  # 100 rows, 8 a step
        ("0.5 epochs", 7),
        ("0.001 epochs", 0),
        ("161 tokens", 2),  # 8 x 20 a step
        ("160 tokens", 1),
    ],
)
def test_words_are_rounded_up_to_steps(value, n_steps):
    assert durations.in_steps(value, 8, 20, 100) == n_steps


def test_an_interval_of_time_is_due_when_it_has_passed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(durations.time, "monotonic", lambda: now[0])
    interval = durations.Interval(seconds=durations.split("1.5 minutes")[0], last=100.0)
    due = []
    for step, now[0] in enumerate([130.0, 189.9, 190.0, 191.0, 281.0, 300.0, 371.0]):
        if interval.is_due(step):
            due.append(step)
            interval.done()
    assert due == [2, 4, 6]


@pytest.mark.parametrize("value", ["0 minutes", "0 epochs", 0])
def test_no_length_between_evaluations_means_none(value):
    interval = make_interval(value, lambda value: durations.in_steps(value, 8, 20, 100))
    assert not any(interval.is_due(n) for n in range(1, 10))


def test_an_interval_of_steps_is_due_at_their_multiples():
    every = durations.Interval(3)
    assert [n for n in range(1, 10) if every.is_due(n)] == [3, 6, 9]


# ---------------------------------------------------------------- help


def test_print_config_prints_what_config_reads(write_yaml, capsys):
    argv = ["--max_steps", "1B tokens", "--learning_rate", "3e-4", "--sample_prompt", "a: #b"]
    assert scripts.train.main([*argv, "--print_config"]) == 0
    path = write_yaml(capsys.readouterr().out)
    assert load_config(["--config", path]) == dataclasses.replace(load_config(argv), config=path)


@pytest.mark.parametrize("name", FIELDS)
def test_help_says_what_a_setting_means_and_its_default(name):
    entries = re.split(r"\n  (?=-)", build_parser().format_help())
    (entry,) = [entry for entry in entries if re.match(rf"--{name}\b", entry)]
    field = FIELDS[name]
    said = "".join(entry.split())  # the terminal's line breaks don't count
    assert len(field.metadata["help"]) > 10
    assert "".join(field.metadata["help"].split()) in said
    if field.default not in ("", ()):
        default = str(field.default).lower() if TYPES[name] is bool else str(field.default)
        assert f"(default:{default})" in said


def test_help_fits_a_terminal():
    assert max(map(len, build_parser().format_help().splitlines())) <= 96


# ---------------------------------------------------------------- faults: names and types


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--n_layer", "6"], r"^unknown flag --n_layer\n  did you mean --n_layers\?$"),
        (["--epoch=2"], r"^unknown flag --epoch=2\n  did you mean --epochs\?$"),
        (["-n_embd", "6"], r"^unknown flag -n_embd\n  did you mean --n_embd\?$"),
        (["--n-layers", "6"], r"did you mean --n_layers\?$"),
        (["--learning_rat", "1"], r"did you mean --learning_rate\?$"),  # no abbreviations
        (["--qqqq"], r"^unknown flag --qqqq\n  python scripts/train\.py --help lists them$"),
        (["stray.txt"], r"^unknown argument stray\.txt\n"),
        ([""], r"^unknown argument ''\n"),
        (["--debug", "false"], r"^unknown argument false\n"),  # `run_main` sees the flag alone
        (["--x" + "y" * 9999], r"^unknown flag '--xyyy.*\.\.\.\n"),
        (["--n_layers"], r"^argument --n_layers: expected one argument\n.*--help"),
    ],
)
def test_an_unknown_flag_is_named_with_the_nearest_one(argv, match):
    assert re.search(match, only_fault_of(*argv))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("n_layer: 6", r"run\.yaml: n_layer: unknown setting\n  did you mean n_layers\?$"),
        ("7: 6", r"run\.yaml: 7: unknown setting\n.*--help lists them$"),
        ("'a\\nb': 6", r"unknown setting\n"),
        ('"a\\nb\\nc\\nd\\ne": 6', r"unknown setting\n"),
        ("config: other.yaml", r"config has no effect in a file\n  give it as a flag: --config$"),
        ("debug: true", r"debug has no effect in a file\n  give it as a flag: --debug$"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(line, match, write_yaml):
    assert re.search(match, only_fault_of("--config", write_yaml(line)))


@pytest.mark.parametrize(
    ("name", "yaml_value", "match"),
    [
        ("n_layers", "two", "expected a whole number, got 'two'$"),
        ("n_layers", "2.5", "expected a whole number, got 2.5$"),
        ("n_layers", "true", "expected a whole number, got True$"),
        ("n_layers", "", "expected a whole number, got None$"),
        ("n_layers", "[3]", r"expected a whole number, got \[3\]$"),
        ("n_layers", "9" * 400, r"expected a whole number, got 9+\.\.\.$"),
        ("n_layers", "x" * 999, r"expected a whole number, got 'x+\.\.\.$"),
        ("learning_rate", "fast", "expected a number, got 'fast'$"),
        ("shuffle", "maybe", "expected true or false, got 'maybe'$"),
        ("optimizer", "adam", "expected one of adamw, adafactor, muon, lion, sgd, got 'adam'$"),
        ("optimizer", "[adamw]", r"expected one of .*, got \['adamw'\]$"),
        # What YAML has made of these is no longer what was written.
        ("output_dir", "007", "expected text .in quotes.*, got 7$"),
        ("output_dir", "2024-01-01", "expected text .in quotes.*"),
        ("output_dir", "null", "expected text .*got None$"),
        ("train_file", "{a: b}", "expected text or a list of texts, got {'a': 'b'}$"),
        ("train_file", "[a, [b]]", "expected text or a list of texts"),
    ],
)
def test_a_value_of_another_type_is_refused(name, yaml_value, match, write_yaml):
    path = write_yaml(f"{name}: {yaml_value}")
    fault = only_fault_of("--config", path)
    assert fault.startswith(f"{path}: {name}: ")
    assert re.search(match, fault)


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("n_layers: 3\nseed: 1\nn_layers: 4\n", r"line 3: .*key n_layers stands twice"),
        (f"{LAUGHS}n_layers: *j\n", r"line 2: .*alias \*a; write the value itself"),
        (f"{MERGES}n_layers: *j\n", r"line 2: .*alias \*a; write the value itself"),
        ("n_layers: &a [*a]\n", r"line 1: .*alias \*a"),
        ("n_layers: !!python/object/apply:os.getcwd []\n", r"line 1: .*constructor for the tag"),
        ("n_layers: !!python/name:os.getcwd\n", r"line 1: .*constructor for the tag"),
        ("n_layers: !mine 3\n", r"line 1: .*constructor for the tag"),
        ("- n_layers\n", "expected lines of `name: value`, got list"),
        ("n_layers\n", "expected lines of `name: value`, got str"),
        ("n_layers: 3\n---\nn_layers: 4\n", r"line 2: not valid YAML"),
        ("n_layers: [3\n", r"not valid YAML"),
        ("n_layers: a: b\n", r"line 1: not valid YAML: mapping values are not allowed"),
        ("n_layers:\t\x00\n", r"not valid YAML: special characters are not allowed"),
        ("[" * 1500, r"not valid YAML: nested too deeply"),
        ("? []\n: 1\n? []\n: 2\n", r"line 1: not valid YAML: found unhashable key"),
        # PyYAML answers these with errors of int(), datetime, re and dict.
        ("seed: 2024-13-45\n", r"not valid YAML: month must be"),
        ("seed: 0b_\n", r"not valid YAML: invalid literal"),
        ("seed: " + "9" * 5000, r"not valid YAML: Exceeds the limit"),
        ("seed: !!bool 3\n", r"not valid YAML"),
        ("seed: !!timestamp 3\n", r"not valid YAML"),
        ("seed: !!int ''\n", r"not valid YAML"),
        ("!!map seed\n", r"line 1: not valid YAML: expected a mapping node"),
        ("# " + "x" * MAX_YAML_BYTES, rf"over {MAX_YAML_BYTES} bytes is too long"),
        ("output_dir: caf\xe9".encode("latin-1"), r"is not UTF-8 text\n  configs/ holds examples"),
    ],
)
def test_a_file_that_is_no_list_of_settings_is_refused(content, match, write_yaml):
    path = write_yaml(content)
    fault = only_fault_of("--config", path)
    assert path in fault
    assert re.search(match, fault)


@pytest.mark.parametrize(
    ("make", "match"),
    [(lambda path: None, "No such file"), (lambda path: path.mkdir(), "Is a directory")],
)
def test_a_file_that_cannot_be_read_is_named_with_a_remedy(make, match, tmp_path):
    path = tmp_path / "none.yaml"
    make(path)
    fault = only_fault_of("--config", str(path))
    assert re.search(rf"^cannot read --config {path}: {match}.*\n  configs/ holds", fault)


def test_an_endless_file_is_not_read_to_its_end():
    tracemalloc.start()
    try:
        assert "is too long for a configuration" in only_fault_of("--config", "/dev/zero")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- faults: values


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (
            "--n_embd 100 --n_heads 12",
            r"^n_embd 100 is not divisible by n_heads 12\n  set n_embd to 96 or 108, or change",
        ),
        ("--n_embd 5 --n_heads 12", r"not divisible.*\n  set n_embd to 12, or change n_heads$"),
        (
            "--block_size 2048",
            r"^block_size 2048 is over n_positions 1024\n  lower block_size, or give the model",
        ),
        ("--min_learning_rate 1", r"^min_learning_rate 1.0 is over learning_rate 0.0006$"),
        (
            "--sample_tokens 1024",
            r"^sample_tokens 1024 does not fit into n_positions 1024\n  lower sample_tokens",
        ),
        ("--tokenizer bpe:256", r"^tokenizer bpe:256: .*N of at least 257.*\n.*bpe:8192$"),
        ("--compilation_cache=", r"^compilation_cache is empty\n  name a directory, or off"),
        ("--tokenizer bpe:many", r"^tokenizer bpe:many: bpe:N needs"),
        ("--tokenizer bpe:", r"^tokenizer bpe:: bpe:N needs"),
        ("--tokenizer bpe:-300", r"^tokenizer bpe:-300: bpe:N needs"),
        ("--tokenizer bpe:³³³", r"^tokenizer bpe:³³³: bpe:N needs"),
        (f"--tokenizer bpe:{'9' * 5000}", r"^tokenizer 'bpe:9+\.\.\.: bpe:N needs"),
        ("--seed 4294967296", r"^seed must be at least 0 and below 2\*\*32, got 4294967296$"),
        ("--dropout 1", r"^dropout must be at least 0 and below 1, got 1.0$"),
        ("--learning_rate 0", r"^learning_rate must be above 0, got 0.0$"),
        ("--grad_accum 0", r"^grad_accum must be at least 1, got 0$"),
        ("--max_steps -1", r"^--max_steps: expected a whole number of steps, '3 epochs', .*'-1'$"),
        ("--max_bad_steps -1", r"^max_bad_steps must be 0 or more, got -1$"),
        ("--batch_size all", r"^--batch_size: expected a whole number or auto, got 'all'$"),
        ("--batch_size 0", r"^batch_size must be at least 1, got 0$"),
        ("--log_every 0", r"^log_every must be at least 1, got 0$"),
        ("--log_every 0epochs", r"^log_every must be above 0, got 0 epochs$"),
        ("--max_steps 0hours", r"^max_steps must be above 0, got 0 hours$"),
        (
            "--lr_schedule wsd --warmup_steps .5 --decay_steps .6",
            r"^warmup_steps 0.5 and decay_steps 0.6 are over the whole run\n  lower one",
        ),
    ],
)
def test_values_that_make_no_run_are_refused_with_a_remedy(argv, match):
    assert re.search(match, only_fault_of(*argv.split()))


@pytest.mark.parametrize(
    "argv",
    [
        "--block_size 1024",
        "--n_embd 96 --n_heads 12",
        "--sample_tokens 1023",
        "--min_learning_rate 6e-4",
        "--tokenizer bpe:257",
        "--seed 4294967295",
        "--validation_share 0",
        "--dataset python_stdlib --validation_share 0",
        "--dataset python_stdlib --validation_file a.jsonl --text_column body",
        "--train_file a --add_eos no --document_separator x",
        "--warmup_steps 0",
        "--optimizer muon --adam_epsilon 1e-5 --beta2 0.9",
        # The sizes of a model to start from are not known yet.
        "--init_from some_model --block_size 4096 --sample_tokens 2000",
        # A default that is written out is no conflict.
        "--train_file a --dataset wikitext --shuffle_window 4096",
    ],
)
def test_values_on_the_edge_are_accepted(argv):
    load_config(argv.split())


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind is float])
def test_no_number_may_be_infinite_undefined_or_negative(name, value):
    assert re.match(rf"{name} must be ", only_fault_of(f"--{name}={value}"))


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind is int])
def test_no_count_may_be_negative(name):
    assert re.match(rf"{name} must be .*, got -3$", only_fault_of(f"--{name}", "-3"))


@pytest.mark.parametrize(
    ("flag", "value", "limit"),
    [
        ("max_steps", "1e20", r"below 2\*\*31"),
        ("max_steps", "3e9", r"below 2\*\*31"),
        ("batch_size", "1e20", r"below 2\*\*31"),
        ("warmup_steps", "1e10", r"below 2\*\*31"),
        ("epochs", "1e308", "at most 1000000"),
    ],
)
def test_no_number_is_too_large_to_count(flag, value, limit):
    assert re.match(rf"{flag} must be {limit}, got ", only_fault_of(f"--{flag}", value))


def test_a_prompt_that_is_not_utf8_is_refused():
    fault = only_fault_of("--sample_prompt", b"\xff\xfe".decode("utf-8", "surrogateescape"))
    assert fault.startswith("sample_prompt is not UTF-8 text\n")


@pytest.mark.parametrize(
    ("argv", "name", "other"),
    [
        ("--train_file a --dataset b", "dataset", "train_file"),
        ("--train_file a --dataset_config b", "dataset_config", "train_file"),
        ("--train_file a --dataset_split b", "dataset_split", "train_file"),
        ("--dataset python_stdlib --dataset_split b", "dataset_split", "dataset python_stdlib"),
        ("--document_separator blank_line", "document_separator", "dataset wikitext"),
        ("--encoding_errors replace", "encoding_errors", "dataset wikitext"),
        ("--init_from a --vocab_size 300", "vocab_size", "init_from"),
        ("--dataset python_stdlib --text_column b", "text_column", "dataset python_stdlib"),
        ("--dataset python_stdlib --validation_share .1", "validation_share", "dataset python_"),
        ("--validation_file a --validation_share .1", "validation_share", "validation_file"),
        ("--shuffle_window 9", "shuffle_window", "streaming false"),
        ("--streaming --shuffle no --shuffle_window 9", "shuffle_window", "shuffle false"),
        ("--init_from a --n_layers 3", "n_layers", "init_from"),
        ("--init_from a --n_heads 3", "n_heads", "init_from"),
        ("--init_from a --n_embd 3", "n_embd", "init_from"),
        ("--init_from a --n_positions 3000", "n_positions", "init_from"),
        ("--lr_schedule constant --min_learning_rate 1e-5", "min_learning_rate", "lr_schedule c"),
        ("--optimizer lion --adam_epsilon 1e-5", "adam_epsilon", "optimizer lion"),
        ("--optimizer sgd --beta2 .9", "beta2", "optimizer sgd"),
        ("--validation_share 0 --eval_rows 5", "eval_rows", "validation_share 0"),
        ("--optimizer adafactor --beta2 .9", "beta2", "optimizer adafactor"),
        ("--optimizer adafactor --beta1 .8", "beta1", "optimizer adafactor"),
        ("--optimizer adafactor --adam_epsilon 1", "adam_epsilon", "optimizer adafactor"),
        ("--decay_steps 9", "decay_steps", "lr_schedule cosine"),
        ("--epochs 2 --max_steps 9", "epochs", "max_steps"),
    ],
)
def test_a_setting_that_could_have_no_effect_is_refused(argv, name, other):
    fault = only_fault_of(*argv.split())
    assert fault.startswith(f"{name} has no effect with {other}")
    assert fault.endswith("\n  leave one of the two out")


# ---------------------------------------------------------------- faults: several


def test_all_faults_are_reported_at_once(write_yaml):
    path = write_yaml("n_embd: 100\nbath_size: 3\nlearning_rate: fast\nbeta2: 3\n")
    faults = faults_of(
        "--config", path, "--epoch", "3", "--zzzz", "--block_size", "2000", "--seed", "x",
        "--shuffle_window", "9",
    )  # fmt: skip
    starts = [
        "unknown flag --epoch",
        "unknown flag --zzzz",
        f"{path}: bath_size: unknown",
        f"{path}: learning_rate: expected a number",
        "--seed: expected a whole number",
        "beta2 must be",
        "n_embd 100 is not divisible",
        "block_size 2000 is over",
        "shuffle_window has no effect",
    ]
    assert len(faults) == len(starts)
    for fault, start in zip(faults, starts, strict=True):
        assert fault.startswith(start)


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        ("--n_embd 100 --n_head 5", "unknown flag --n_head"),
        ("--n_embd 100 --n_head=5", "unknown flag --n_head=5"),
        ("--n_embd 100 --n_heads five", "--n_heads: expected"),
        ("--n_embd 100 --n_heads 0", "n_heads must be at least 1"),
        ("--block_size 2000 --n_positions -1", "n_positions must be"),
        ("--shuffle_window 9 --streaming perhaps", "--streaming: expected"),
        ("--n_embd 100 --config missing.yaml", "cannot read --config missing.yaml"),
    ],
)
def test_nothing_is_concluded_from_a_value_that_could_not_be_read(argv, start):
    assert only_fault_of(*argv.split()).startswith(start)


# ---------------------------------------------------------------- settings of a saved run


def test_the_settings_of_a_run_can_be_read_again(write_yaml):
    values = {name: another_value(name) for name in FIELDS if name not in COMMAND_ONLY}
    # These would clash with others of the changed ones.
    for name in (
        "train_file", "validation_file", "init_from", "adam_epsilon", "shuffle",
        "document_separator", "encoding_errors", "decay_steps", "epochs",
    ):  # fmt: skip
        values.pop(name)
    odd = "tab\t nul\x00 quote' \" # : - é 漢 \U0001f600 \udcff\nnew line \x85 007"
    config = dataclasses.replace(TrainConfig(), **values | {"cache_dir": odd})
    path = write_yaml(dump_yaml(config))
    assert load_config(["--config", path]) == dataclasses.replace(config, config=path)


@pytest.mark.parametrize(
    "text", ["007", "1e3", "null", "yes", "2024-01-01", "~", "", "a: b", "*a"]
)
def test_text_that_yaml_could_take_for_something_else_survives(text, write_yaml):
    config = TrainConfig(train_file=("x", text), sample_prompt=text)
    path = write_yaml(dump_yaml(config))
    assert load_config(["--config", path]) == dataclasses.replace(config, config=path)


def test_how_the_command_was_run_is_not_part_of_the_run():
    assert set(yaml.safe_load(dump_yaml(TrainConfig()))) == set(FIELDS) - set(COMMAND_ONLY)


@pytest.mark.parametrize("name", FIELDS)
def test_a_run_is_told_apart_by_what_changes_its_learning(name):
    saved = yaml.safe_load(dump_yaml(TrainConfig()))
    assert differing_keys(TrainConfig(), saved) == {}
    value = another_value(name)
    changed = differing_keys(dataclasses.replace(TrainConfig(), **{name: value}), saved)
    if name in FREE_ON_RESUME:
        assert changed == {}
    else:
        default, value = (
            list(v) if isinstance(v, tuple) else v for v in (FIELDS[name].default, value)
        )
        assert changed == {name: (default, value)}


def test_a_setting_that_came_after_the_run_began_had_its_default():
    saved = yaml.safe_load(dump_yaml(TrainConfig()))
    del saved["seed"]
    assert differing_keys(TrainConfig(), saved) == {}
    assert differing_keys(TrainConfig(seed=7), saved) == {"seed": (42, 7)}


# What may differ is a promise: a setting that changes what is learned never gets into it.
def test_free_settings_are_these():
    assert set(FIELDS) >= FREE_ON_RESUME
    assert FREE_ON_RESUME.isdisjoint(
        {"seed", "dataset", "train_file", "tokenizer", "block_size", "shuffle", "learning_rate"}
        | {"n_layers", "n_heads", "n_embd", "n_positions", "dropout", "optimizer", "dtype"}
    )


# ---------------------------------------------------------------- anything at all


def random_command(rng, write_yaml):
    """A command line of nonsense, of plausible settings, and of both."""
    scraps = [
        "", " ", "0", "1", "2", "3", "-1", "1e3", "3e-4", "nan", "inf", "1e999", "9" * 400, "0x10",
        "true", "no", "~", "null", "[]", "[1, [2]]", "{a: b}", "*a", "&a b", "!!int x",
        "!!set {a}", "!!binary aGk=", "2024-01-01", "12:30", "'", '"', "\x00", "\ud800", "é",
        "a\nb", "|\n  x",
        "bpe:300", "bpe:x", "adamw", "cosine", "x" * 3000, "%s %(prog)s", "- a", "a: b: c", "<<",
    ]  # fmt: skip
    names = [*FIELDS, *FIELDS, "n_layer", "", "<<", "?", "a b", "é", "-", "1", "~", "#", "a\nb"]
    lines = [f"{rng.choice(names)}: {rng.choice(scraps)}" for _ in range(rng.randrange(4))]
    argv = []
    for _ in range(rng.randrange(4)):
        name = rng.choice([name for name in names if name != "config"])
        argv += rng.choice([[f"--{name}", rng.choice(scraps)], [f"--{name}={rng.choice(scraps)}"]])
    if rng.random() < 0.3:  # as a person would write it
        lines, argv = [], []
        for name in rng.sample(sorted(set(FIELDS) - {"config", "debug"}), 2):
            argv += as_flags(name, another_value(name))
    if rng.random() < 0.7:
        argv += ["--config", write_yaml("\n".join(lines).encode("utf-8", "surrogatepass"))]
    return argv


def python_types(kind):
    """What a value of a setting may be an instance of."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(python_types(part) for part in typing.get_args(kind))
    kind = typing.get_origin(kind) or kind
    return str if kind is typing.Literal else kind


@pytest.mark.slow
def test_any_command_gives_settings_or_faults(write_yaml):
    rng = random.Random(0)
    outcomes = {TrainConfig: 0, UserError: 0}
    for _ in range(300):
        argv = random_command(rng, write_yaml)
        try:
            config = load_config(argv)
        except UserError:
            outcomes[UserError] += 1
            faults_of(*argv)
        else:
            outcomes[TrainConfig] += 1
            for name, value in dataclasses.asdict(config).items():
                assert isinstance(value, python_types(TYPES[name])), argv
    assert min(outcomes.values()) > 30  # else the commands try too little
