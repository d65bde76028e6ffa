"""What is said of a finished run: the summary, report.html, the model card, the commands."""

import argparse
import base64
import dataclasses
import html.parser
import re
import shlex

import pytest
import yaml

from gpt2_flax.config.train_config import TrainConfig, dump_yaml, load_config
from gpt2_flax.errors import StorageError
from gpt2_flax.reporting import model_card, report, summary
from gpt2_flax.reporting.summary import Outcome

EVIL = "</pre><script>alert(1)</script>&'\"| `x` ``` # [a](b)"
PNG = b"\x89PNG not really"
ROWS = [
    {"step": 5, "epoch": 0.25, "tokens": 50, "train_loss": 3.0, "tokens_per_second": None},
    {"step": 10, "epoch": 0.5, "tokens": 100, "train_loss": 2.0, "tokens_per_second": 400.0,
     "validation_loss": 2.25, "perplexity": 9.49, "process_peak_memory_bytes": 10**9},
    {"step": 20, "epoch": 1.0, "tokens": 200, "train_loss": 1.0, "tokens_per_second": 600.0,
     "validation_loss": 2.5, "perplexity": 12.18, "process_peak_memory_bytes": 2 * 10**9,
     "seconds": 61.0, "mfu": 0.25, "bad_steps": 3},
]  # fmt: skip


def make(rows=ROWS, peak=2e12, samples=None, saved=None, **settings):
    settings = {"output_dir": "runs/one", "max_steps": 20, "sample_prompt": "x"} | settings
    config = TrainConfig(**settings)
    return Outcome(
        config=config,
        saved=yaml.safe_load(dump_yaml(config)) if saved is None else saved,
        model={
            "layers": 2, "width": 12, "heads": 3, "positions": 7, "vocabulary": 31,
            "parameters": 2_500_000,
        },
        about_text="words.txt: 3 documents",
        step=20,
        rows_per_step=8,
        peak=peak,
        rows=rows,
        samples={10: "ten", 20: "twenty"} if samples is None else samples,
        checkpoints=[10, 20],
    )  # fmt: skip


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("parameters", "size"), [(124_439_808, "124.4M"), (1e6, "1.0M"), (999_999, "999,999")]
)
def test_a_model_is_described_in_a_line(parameters, size):
    model = make().model | {"parameters": parameters}
    assert summary.describe_model(model) == (
        f"2 layers x 12, 3 heads, 7 positions, vocabulary 31: {size} parameters"
    )


def test_results_are_those_of_the_rows():
    assert dict(summary.results(make())) == {
        "steps": "20 of 8 rows each",
        "tokens": "200, 1.00 epochs",
        "training loss": "1.0000 nats per token, at the last log point",
        "validation loss": "2.5000 nats per token (perplexity 12.18), at step 20",
        "best of the run": "2.2500 nats per token (perplexity 9.49), at step 10",
        "speed": "500 tokens/s, median of log points",
        "MFU": "25.0% of 2 TFLOP/s, median",
        "time": "1:01 in all sessions",
        "peak memory": "2.00 GB of the process in main memory",
        "bad steps": "3 left out, not finite",
    }


def test_what_was_not_measured_is_not_said():
    found = dict(summary.results(make(rows=[{"step": 1, "tokens": 10, "train_loss": 2.0}])))
    assert found.keys() == {"steps", "tokens", "training loss", "validation loss"}
    assert found["validation loss"] == "not measured: no text was held out"
    rows = [{"step": 1, "device_peak_memory_bytes": 3e9, "tokens_per_second": 1.0}]
    found = dict(summary.results(make(rows=rows, peak=None)))
    assert found["peak memory"] == "3.00 GB of the fullest device"
    assert found["MFU"].startswith("unknown")


def test_paths_of_the_machine_are_not_shown():
    config = TrainConfig(
        output_dir="/home/me/run", train_file=("/home/me/a.txt", "b/c.txt"), cache_dir="~/cache",
        init_from="/home/me/model", sample_prompt="/usr is a word", tokenizer="gpt2",
    )  # fmt: skip
    shown = summary.settings(config)
    assert shown["output_dir"] == "/home/me/run"
    assert shown["train_file"] == [".../a.txt", "b/c.txt"]
    assert (shown["cache_dir"], shown["init_from"]) == (".../cache", ".../model")
    assert (shown["sample_prompt"], shown["tokenizer"]) == ("/usr is a word", "gpt2")


def test_the_environment_names_versions_and_devices_and_nothing_of_the_machine(monkeypatch):
    import os
    import platform

    import jax

    found = dict(summary.environment())
    assert found["devices"] == "8 x cpu"
    assert f"jax {jax.__version__}," in found["packages"]
    text = repr(found)
    for private in (platform.node(), os.getcwd(), os.path.expanduser("~")):
        assert private not in text
    assert summary.version("no such package") == "unknown"


# ---------------------------------------------------------------- commands


def test_the_command_that_trains_on_is_read_as_the_run_twice_as_long(tmp_path):
    """As a shell and the trainer read it; settings that changed since the start are given."""
    folder = tmp_path / "my run"
    folder.mkdir()
    began = TrainConfig(
        output_dir="moved/since", train_file=("it's.txt", "b.txt"), tokenizer="bytes",
        sample_prompt="a 'b' $HOME", max_steps=5, n_embd=24, n_heads=3, add_eos=False,
    )  # fmt: skip
    (folder / "config.yaml").write_text(dump_yaml(began))
    now = dataclasses.replace(began, output_dir=str(folder), max_steps=20, ledger=True)
    now = dataclasses.replace(now, profile="3:4")  # for one session
    run = dataclasses.replace(make(), config=now, saved=yaml.safe_load(dump_yaml(began)))
    command = dict(summary.commands(run))["train on"]
    python, script, *argv = shlex.split(command)
    assert (python, script) == ("python", "scripts/train.py")
    expected = dataclasses.replace(
        now, max_steps=40, profile="", config=str(folder / "config.yaml")
    )
    assert load_config(argv) == expected
    for_epochs = make(max_steps=0, epochs=1.5)
    assert summary.resume_command(for_epochs).endswith("config.yaml --epochs 3.0")


def test_commands_are_those_that_the_scripts_take():
    found = dict(summary.commands(make(output_dir="runs/it's one")))
    assert all("'runs/it'\"'\"'s one" in command for command in found.values())
    found = dict(summary.commands(make()))
    assert found["convert a checkpoint for PyTorch"] == (
        "python scripts/convert.py to_pytorch --checkpoint runs/one --step 10"
        " --output runs/one_step_10"
    )
    assert summary.resume_command(make(train_file=("-",))).endswith(" < TEXT")


# ---------------------------------------------------------------- summary


def test_the_summary_fits_on_a_screen():
    long = "\n".join(["word " * 60] * 70)
    lines = summary.summary(make(samples={20: long}))
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert "[the rest is in samples.txt]" in lines
    assert "done: 20 steps, 200 tokens; validation loss 2.5000" in lines


def test_the_summary_of_a_run_without_samples_has_none():
    assert not [line for line in summary.summary(make(samples={})) if "sample ---" in line]


# ---------------------------------------------------------------- report.html


class Page(html.parser.HTMLParser):
    """Tags that were opened, the texts in them, and that all were closed in order."""

    VOID = ("meta", "img")

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def inside(self, tag):
        return [text for name, text in self.texts if name == tag]


def test_the_page_is_whole_and_needs_nothing_else():
    content = report.page(make(), PNG)
    page = Page(content)
    (picture,) = page.named("img")
    assert base64.b64decode(picture["src"].removeprefix("data:image/png;base64,")) == PNG
    assert not page.named("script") and not page.named("link")
    assert not re.findall(r"https?:|url\(|@import", content)
    assert page.inside("h2") == [
        "Results", "Curves", "Samples", "Going on", "Settings", "Environment",
    ]  # fmt: skip
    assert page.inside("pre")[:2] == ["twenty", "ten"]
    assert set(page.inside("pre")[2:]) == {command for _, command in summary.commands(make())}
    assert "12 L D T" in content


def test_the_page_shows_every_setting_and_which_are_not_the_defaults():
    page = Page(report.page(make(n_layers=3, train_file=("a", "b"), add_eos=False), PNG))
    names = page.inside("th")
    for name in summary.settings(TrainConfig()):
        assert names.count(name) == 1
    assert [text for text in page.inside("h3")] == ["model", "text", "optimization", "run"]
    assert len([row for row in page.named("tr") if row.get("class") == "changed"]) == 6
    assert "a, b" in page.inside("td") and "false" in page.inside("td")


def test_nothing_from_outside_is_markup():
    run = make(samples={20: EVIL, 10: EVIL}, output_dir=EVIL, sample_prompt=EVIL, tokenizer=EVIL)
    run = dataclasses.replace(run, about_text=EVIL)
    page = Page(report.page(run, PNG))
    assert not page.named("script")
    assert page.inside("pre")[:2] == [EVIL, EVIL]
    assert EVIL in page.inside("td")
    assert f"gpt2_flax: {EVIL}" in page.inside("title")


def test_a_run_without_samples_has_no_place_for_them():
    assert "Samples" not in Page(report.page(make(samples={}), PNG)).inside("h2")


def test_a_report_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "loss.png").write_bytes(PNG)
    with pytest.raises(StorageError, match=r"cannot write .*report\.html"):
        report.write(make(), tmp_path / "loss.png", tmp_path / "missing" / "report.html")


# ---------------------------------------------------------------- the model card


def test_the_card_is_what_the_hub_reads(tmp_path):
    from huggingface_hub import ModelCard

    assert model_card.write(make(), tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["gpt2", "jax", "flax", "gpt2_flax"]
    assert card.data.datasets == ["Salesforce/wikitext"]
    text = card.text
    assert text.lstrip().startswith("# one\n")
    for said in (
        "2 layers x 12", "words.txt: 3 documents", "| validation loss | 2.5000", "twenty",
        "GPT2LMHeadModel.from_pretrained", "from gpt2_flax import FlaxGPT2LMHeadModel",
        "max_steps: 20", "No licence is stated",
    ):  # fmt: skip
        assert said in text
    assert "n_layers" not in text  # a default
    assert "runs/one" not in text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dataset": "me/corpus"}, {"datasets": ["me/corpus"]}),
        ({"dataset": "python_stdlib"}, {}),
        ({"train_file": ("a.txt",)}, {}),
        ({"dataset": "./corpus"}, {}),
        ({"dataset": "/data/corpus"}, {}),
        ({"dataset": "tests"}, {}),  # a directory here
        ({"dataset": "me/corpus", "init_from": "gpt2"},
         {"datasets": ["me/corpus"], "base_model": "gpt2"}),
        ({"train_file": ("a",), "init_from": "runs/before/"}, {}),
    ],
)  # fmt: skip
def test_the_front_matter_names_what_is_on_the_hub(settings, expected):
    about = model_card.front_matter(TrainConfig(**settings))
    assert {k: v for k, v in about.items() if k in ("datasets", "base_model")} == expected


def test_odd_texts_stay_texts_in_the_card():
    run = dataclasses.replace(make(samples={20: EVIL}), about_text="a|b\n# <b>c</b> `d`")
    text = model_card.card(run)
    assert f"````\n{EVIL}\n````" in text
    assert r"a\|b \# \<b\>c\</b\> \`d\`" in text


def test_a_card_is_renewed_only_as_long_as_it_is_ours(tmp_path):
    path = tmp_path / "README.md"
    assert model_card.write(make(), path)
    assert model_card.write(make(rows=ROWS[:2]), path)
    renewed = path.read_text()
    assert "2.5000" not in renewed
    path.write_text(renewed.replace("Nobody has looked", "I have looked"))
    theirs = path.read_text()
    assert not model_card.write(make(), path)
    assert path.read_text() == theirs


@pytest.mark.parametrize("content", ["", "# mine\n", "<!-- written by gpt2_flax, sha256 0 -->\n"])
def test_somebody_s_own_card_stays(content, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(content)
    assert not model_card.write(make(), path)
    assert path.read_text() == content


def test_a_link_or_a_directory_in_its_place_stays(tmp_path):
    (tmp_path / "README.md").mkdir()
    assert not model_card.write(make(), tmp_path / "README.md")
    link = tmp_path / "link.md"
    link.symlink_to(tmp_path / "nowhere.md")
    assert not model_card.write(make(), link)
    assert link.is_symlink() and not (tmp_path / "nowhere.md").exists()


@pytest.mark.parametrize("prompt", ["Once", "two words", "-flag", "--debug it's"])
def test_a_prompt_reaches_generate_whatever_it_begins_with(prompt):
    words = shlex.split(dict(summary.commands(make(sample_prompt=prompt)))["generate"])
    parser = argparse.ArgumentParser()
    for flag in ("--model", "--prompt", "--max_new_tokens"):
        parser.add_argument(flag)
    assert parser.parse_args(words[2:]).prompt == prompt


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, []),
        ({"dataset": "python_stdlib"}, ["--dataset", "python_stdlib"]),
        ({"validation_file": ("a b.txt", "c")}, ["--file", "a b.txt", "c"]),
        ({"dataset": "python_stdlib", "train_file": ("a",)}, []),
    ],
)
def test_evaluate_is_given_the_held_out_text_where_it_has_a_name(settings, flags):
    words = shlex.split(dict(summary.commands(make(**settings)))["evaluate"])
    assert words[:4] == ["python", "scripts/evaluate.py", "--model", "runs/one"]
    assert words[4:] == flags
