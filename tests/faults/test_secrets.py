"""Tokens and passwords of whoever trains stay where they are, whatever a run does or runs into.

Runs of our scripts with canaries for secrets in their environment. Afterwards no output and no
file has any of them.
"""

import gzip
import importlib.util
import os
import re

import pytest

from gpt2_flax.errors import redacted
from tests.fork_server import ForkServer

PASSWORD = "canary-of-a-url-4711"
CANARIES = {
    "HF_TOKEN": "hf_canaryOfTheHubAAAA",
    "HUGGING_FACE_HUB_TOKEN": "hf_canaryOfTheHubBBBB",
    "WANDB_API_KEY": "c0ffee" * 6 + "cafe",
    "AWS_SECRET_ACCESS_KEY": "canary/of+the/cloud==",
    "DATABASE_PASSWORD": "canary of the database",
}
ENDPOINT = f"http://someone:{PASSWORD}@127.0.0.1:9"
TINY = {
    "n_layers": 1, "n_heads": 2, "n_embd": 8, "n_positions": 24, "block_size": 16,
    "batch_size": 1, "tokenizer": "bytes", "sample_tokens": 4, "max_steps": 3, "log_every": 1,
    "save_every": 2, "sample_prompt": "tea",
}  # fmt: skip
SHOWN = re.compile(r"<(HF_TOKEN|WANDB_API_KEY)>|://\.\.\.@")  # what stands in a secret's place


def argv_of(**settings) -> list[str]:
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "text.txt").write_text("".join(f"line {n} of {n * n}\n" for n in range(99)))
    (folder / "token.yaml").write_text(f"seed: {CANARIES['HF_TOKEN']}\nn_lyers: 2\n")
    return folder


@pytest.fixture(scope="module")
def fork_server(folder):
    variables = CANARIES | {
        "HF_ENDPOINT": ENDPOINT, "HF_HUB_OFFLINE": "0", "HOME": str(folder),
        "WANDB_MODE": "offline", "WANDB_SILENT": "true",
    }  # fmt: skip
    with ForkServer(
        folder, ("scripts.generate", "tests.faults.crash"), **variables
    ) as fork_server:
        yield fork_server


@pytest.fixture
def start(fork_server, folder):
    """Run a script to its end; (exit code, output)."""

    def start(*argv, script="scripts.train", out="run", **settings):
        given = TINY | {"train_file": folder / "text.txt", "output_dir": folder / out} | settings
        given = {name: value for name, value in given.items() if value is not None}
        argv = [*map(str, argv)] if script == "scripts.generate" else [*argv_of(**given), *argv]
        run = fork_server.start(argv, script=script, cwd=str(folder))
        return run.wait(), run.text()

    return start


def check_nothing_is_said(folder) -> int:
    """That no file under a folder, output of runs included, holds a canary. How many there are."""
    canaries = [value.encode() for value in (*CANARIES.values(), PASSWORD)]
    n_files = 0
    for at, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(at, name)
            if os.path.isfile(path) and name != "token.yaml":
                with open(path, "rb") as file:
                    content = file.read()
                content += gzip.decompress(content) if name.endswith(".gz") else b""
                n_files += 1
                for canary in canaries:
                    assert canary not in content, f"{path}: {canary}"
    return n_files


@pytest.mark.slow
def test_a_run_from_its_beginning_to_a_model(start, folder):
    code, text = start()
    assert (code, "done: 3 steps" in text) == (0, True), text
    code, text = start(max_steps=5)
    assert (code, "continuing after step 3" in text) == (0, True), text
    prompt = ["--model", folder / "run", "--prompt", "tea", "--max_new_tokens", "4"]
    code, text = start(*prompt, script="scripts.generate")
    assert code == 0, text
    written = {path.name for path in (folder / "run").iterdir()}
    assert written >= {"config.yaml", "report.html", "README.md", "metrics.jsonl", "checkpoints"}
    assert check_nothing_is_said(folder) > 20


@pytest.mark.slow
def test_a_run_that_is_reported_and_traced(start, folder):
    if importlib.util.find_spec("tensorboardX") is None:
        pytest.skip("tensorboardX is optional")
    code, text = start(out="board", report_to="tensorboard", profile="2:3")
    assert code == 0, text
    assert list((folder / "board").glob("events.out.*"))
    assert list((folder / "board").glob("profile/**/*.gz"))
    check_nothing_is_said(folder)


@pytest.mark.slow
def test_a_run_that_weights_and_biases_watches(start, folder):
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is optional")
    code, text = start(out="watched", report_to="wandb")
    assert code == 0, text
    assert list((folder / "watched").glob("wandb/**/*.wandb"))
    check_nothing_is_said(folder)


@pytest.mark.slow
@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_in_the_middle_of_a_run(start, folder, debug):
    code, text = start(*["--debug"] * debug, script="tests.faults.crash", out=f"bug {debug}")
    assert code == 1, text
    assert "Traceback" in text and "RuntimeError: a bug, with <HF_TOKEN> and <WANDB_API" in text
    assert "http://...@127.0.0.1:9" in text
    check_nothing_is_said(folder)


REFUSED = {
    "a dataset of a hub that is away": {"train_file": None},
    "a model of a hub that is away": {
        "init_from": "someone/model",
        **dict.fromkeys(("n_layers", "n_heads", "n_embd", "n_positions")),
    },
    "a tokenizer of a hub that is away": {"tokenizer": "someone/tokenizer"},
    "a text by its address": {"train_file": f"https://someone:{PASSWORD}@example.org/a.txt"},
    "a model by its address": {"init_from": f"https://someone:{PASSWORD}@example.org/model"},
    "a dataset by its address": {
        "dataset": f"s3://{PASSWORD}@bucket/data",
        "train_file": None,
    },
    "a token for a prompt": {"sample_prompt": f"say {CANARIES['HF_TOKEN']}"},
    "a token for a number": {"seed": CANARIES["HF_TOKEN"]},
    "a token in a file": {"config": "token.yaml"},
    "a token for a flag": {f"{CANARIES['WANDB_API_KEY']}": "1"},
    "a token for a directory": {"output_dir": CANARIES["HF_TOKEN"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(start, folder, what, debug):
    code, text = start(*["--debug"] * debug, out="refused", **REFUSED[what])
    assert code == 2, text
    assert ("Traceback" in text) == debug
    assert SHOWN.search(text) or "holds a secret" in text, text
    assert check_nothing_is_said(folder)
    assert not (folder / "refused").exists()


@pytest.mark.slow
def test_settings_that_are_printed(start, folder):
    code, text = start("--print_config", out="printed")
    assert code == 0 and "sample_prompt: tea" in text
    address = f"https://{PASSWORD}@example.org/a.txt"
    code, text = start("--print_config", train_file=address)
    assert code == 2 and "train_file holds a secret" in text
    check_nothing_is_said(folder)


def test_the_search_finds_a_canary(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x" + CANARIES["HF_TOKEN"].encode()))
    with pytest.raises(AssertionError, match="hf_canary"):
        check_nothing_is_said(tmp_path)


def test_what_is_left_alone(monkeypatch):
    """Words that only look like secrets: short values, paths of secrets, other variables."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "truthfully", "HF_TOKEN_PATH": "/home/me/token/file",
        "MY_KEY": "short", "MONKEY": "bananabanana", "API_KEY_FILE": "/some/where/else",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    text = "truthfully short bananabanana /home/me/token/file /some/where/else a@b.org http://x/@"
    assert redacted(text) == text
    monkeypatch.setenv("MY_TOKEN_2", "of eight")
    monkeypatch.setenv("LONGER_TOKEN", "of eight and more")
    assert redacted("of eight and more, of eight") == "<LONGER_TOKEN>, <MY_TOKEN_2>"
    assert redacted("see https://me:pass@host/x@y") == "see https://...@host/x@y"
