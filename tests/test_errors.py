"""What a user gets to see of a mistake: exit code, at most three lines, and a way on."""

import contextlib
import gc
import gzip
import http.server
import io
import os
import pathlib
import re
import runpy
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from gpt2_flax import hub
from gpt2_flax.config.train_config import TrainConfig, dump_yaml
from gpt2_flax.errors import (
    CheckpointError,
    NumericsError,
    StorageError,
    UserError,
    report,
    run_main,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_script(script, *argv, **environment):
    """A finished process of a real script, in an environment without the tests' settings."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "HF_HUB_OFFLINE" and not name.lower().endswith("_proxy")
    }
    return subprocess.run(
        [sys.executable, f"scripts/{script}.py", *map(str, argv)],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def check_refusal(stderr, *matches, faults=1):
    """That stderr is `faults` errors of at most three lines each, and says this."""
    said = re.split(r"^error: ", stderr, flags=re.MULTILINE)
    assert said[0] == "", stderr
    assert len(said) == faults + 1, stderr
    assert all(len(fault.splitlines()) <= 3 for fault in said), stderr
    assert "Traceback" not in stderr
    for match in matches:
        assert re.search(match, stderr), stderr


# ---------------------------------------------------------------- real processes, no JAX


@pytest.mark.parametrize(
    ("script", "argv", "match"),
    [
        ("train", ["--n_layer", "6"], "unknown flag --n_layer\n  did you mean --n_layers"),
        ("train", ["--n_embd", "100"], "n_embd 100 is not divisible by n_heads 12\n  set n_embd"),
        ("train", ["--block_size", "2000"], "block_size 2000 is over n_positions 1024\n  lower"),
        ("train", ["--config", "none.yaml"], "cannot read --config none.yaml: No such file"),
        ("generate", ["--model", "x", "--promt", "y"], "flag --promt\n  did you mean --prompt"),
        ("generate", [], "required: --model\n  python scripts/generate.py --help"),
        (
            "generate",
            ["--model", "x", "--seed", str(2**64)],
            "argument --seed: must be at least 0 and below 2\\*\\*32, got 18446744073709551616\n",
        ),
        ("convert", [], r"required: to_pytorch\|from_pytorch\n  python scripts/convert.py --help"),
        (
            "convert",
            ["to_pytorch", "--checkpoint", "x", "--output", "y", "--stp", "3"],
            "unknown flag --stp\n  did you mean --step",
        ),
        (
            "convert",
            ["to_pytorch", "--checkpoint", "x", "--output", "y", "--step", "last"],
            "argument --step: invalid int value: 'last'\n  python scripts/convert.py to_pytorch",
        ),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_the_remedy(script, argv, match, tmp_path):
    output_dir = ["--output_dir", tmp_path / "out"] if script == "train" else []
    process = run_script(script, *argv, *output_dir)
    assert (process.returncode, process.stdout) == (2, "")
    check_refusal(process.stderr, match)
    assert not any(tmp_path.iterdir())


def test_all_faults_of_a_configuration_come_at_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"n_layer: 6\nn_embd: 100\nblock_size: 2000\noutput_dir: {tmp_path}/out\n")
    process = run_script("train", "--config", path)
    assert process.returncode == 2
    check_refusal(
        process.stderr, r"n_layer: unknown setting\n  did you mean n_layers", "n_embd 100",
        "block_size 2000", faults=3,
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("script", ["train", "generate", "convert"])
def test_help_exits_with_0(script):
    process = run_script(script, "--help")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith(f"usage: scripts/{script}.py")


# ---------------------------------------------------------------- real processes, with JAX


def test_a_missing_text_exits_with_2_before_anything_is_written(tmp_path):
    process = run_script(
        "train", "--train_file", tmp_path / "none.txt", "--tokenizer", "bytes",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (2, "")
    check_refusal(process.stderr, r"train_file .*none\.txt does not exist")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_hub_out_of_reach_is_reported_within_15_seconds_with_the_ways_on(tmp_path):
    silent = socket.create_server(("127.0.0.1", 0))  # takes connections, answers nothing
    with silent:
        took = []
        for port in (9, silent.getsockname()[1]):
            began = time.perf_counter()
            process = run_script(
                "train", "--output_dir", tmp_path / "out",
                HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_HOME=str(tmp_path / "hf"),
            )  # fmt: skip
            took.append(time.perf_counter() - began)
            assert (process.returncode, process.stdout) == (2, "")
            check_refusal(
                process.stderr,
                rf"dataset Salesforce/wikitext.* hub http://127\.0\.0\.1:{port} cannot be",
                "--train_file FILE",
                "local directory",
                "--config quickstart",
            )
            assert not (tmp_path / "out").exists()
    refused, waited = took
    # Nearly all of it is the import of JAX, which a busy machine makes slow.
    assert refused < 15
    assert waited - refused < hub.PATIENCE_SECONDS + 4


# ---------------------------------------------------------------- the script in this process


# Should a refusal fail to come, the run is over soon.
TINY = {"n_layers": 1, "n_heads": 1, "n_embd": 8, "max_steps": 1, "sample_tokens": 0}


@pytest.fixture
def train(tmp_path, capsys):
    """Run scripts/train.py's main on text of `tmp_path`; (exit code, stderr)."""
    main = runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"]

    def run(*argv):
        capsys.readouterr()
        code = run_main(
            main,
            [
                *("--tokenizer", "bytes", "--cache_dir", str(tmp_path / "cache")),
                *("--output_dir", str(tmp_path / "out")),
                *(f"--{name}={value}" for name, value in TINY.items()),
                *map(str, argv),
            ],
        )
        return code, capsys.readouterr().err

    return run


def write_text(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = b'{"text": "some words of a document"}\n' * 99
NO_TEXT = {
    "empty": ("text.txt", b"", r"train_file .*text\.txt is empty \(0 bytes\)"),
    "not UTF-8": (
        "text.txt", "caf\xe9\n".encode("latin-1") * 99,
        r"text\.txt is not UTF-8: byte 0xe9 at offset 3 \(line 1\)\n.*--encoding_errors replace",
    ),
    "short": ("text.txt", b"A word.\n" * 5, r"txt has \d+ tokens, fewer than one row of .* 128"),
    "a mark alone": ("text.txt", b"\xef\xbb\xbf", r"text\.txt has 0 tokens, fewer than one row"),
    "blank": ("text.txt", b" \n\t\r\n" * 99, r"text\.txt holds nothing but white space"),
    "cut short": ("a.txt.gz", gzip.compress(ROWS)[:-1], r"a\.txt\.gz is damaged or not complete"),
    "a bad line": ("a.jsonl", ROWS + b'{"text": "', r"a\.jsonl, line 100: not valid JSON: Unt"),
    "no column": ("a.jsonl", ROWS + b"{}", r"a\.jsonl, line 100: no column text\n  set --t"),
    "no text": ("a.jsonl", b'{"text": null}\n' * 9, r"a\.jsonl has 0 tokens, fewer than one row"),
    "no Parquet": ("a.parquet", b"PAR1", r"a\.parquet is no Parquet file that can be read: \S"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [[], ["--streaming", "--max_steps", "0"]])
@pytest.mark.parametrize(("name", "content", "match"), NO_TEXT.values(), ids=NO_TEXT)
def test_a_text_that_is_no_text_to_train_on_is_refused(
    name, content, match, streaming, train, tmp_path
):
    path = write_text(tmp_path / name, content)
    code, stderr = train("--train_file", path, "--validation_share", 0, *streaming)
    assert code == 2
    check_refusal(stderr, match)
    assert not (tmp_path / "out").exists()
    left = [path.name for path in (tmp_path / "cache").rglob("*")]
    assert not [name for name in left if name.endswith((".tmp", ".lock"))]


def test_a_held_out_part_of_white_space_is_refused(train, tmp_path):
    path = write_text(tmp_path / "text.txt", "Some words of a line.\n" * 99 + "\n" * 999)
    code, stderr = train("--train_file", path)
    assert code == 2
    check_refusal(
        stderr,
        r"text\.txt where it is held out holds nothing but white space\n"
        r"  give a --validation_file, another --validation_share, or --validation_share 0",
    )


@pytest.mark.slow
def test_what_a_stream_held_is_told_at_the_end(train, tmp_path):
    """With max_steps it was not read before."""
    path = write_text(tmp_path / "text.txt", b"caf\xe9 \0 words\r\n" * 99)
    flags = ("--streaming", "--encoding_errors", "replace", "--validation_share", 0)
    code, stderr = train("--train_file", path, "--max_steps", 2, *flags)
    assert code == 0
    read = r"text\.txt, as far as it was read: "
    assert re.search(rf"{read}bytes that are not UTF-8 became U\+FFFD in 99 places\n", stderr)
    assert re.search(rf"{read}99 NUL characters are kept", stderr)
    assert re.search(rf"{read}99 line ends are CRLF", stderr)


@pytest.mark.parametrize(
    ("flag", "match"),
    [("--train_file", "train_file .* is a directory without text: .*\n  name its files"),
     ("--validation_file", "validation_file .* is a directory without text: .*\n  name its fi")],
)  # fmt: skip
def test_a_directory_without_text_is_no_text(flag, match, train, tmp_path):
    text = write_text(tmp_path / "text.txt", "A word.\n" * 99)
    argv = ["--train_file", text] if flag != "--train_file" else []
    (tmp_path / "folder").mkdir()
    code, stderr = train(*argv, flag, tmp_path / "folder")
    assert code == 2
    check_refusal(stderr, match)
    assert not (tmp_path / "out").exists()


def make_run(path, **settings):
    path.mkdir()
    (path / "config.yaml").write_text(dump_yaml(TrainConfig(**TINY | settings)))


@pytest.mark.parametrize(
    ("make", "argv", "code", "matches"),
    [
        (
            lambda path: make_run(path, n_layers=3, tokenizer="bytes", seed=7),
            [],
            2,
            [
                "holds a run with other settings: .*n_layers 3 -> 1,",
                "seed 7 -> 42",
                "--output_dir",
            ],
        ),
        (make_run, ["--resume", "never"], 2, ["--resume never forbids.*\n.*--output_dir"]),
        (
            lambda path: path.mkdir() or (path / "model.safetensors").touch(),
            [],
            2,
            [r"holds model\.safetensors but no config\.yaml.*\n.*another --output_dir"],
        ),
        (lambda path: path.touch(), [], 2, ["is a file\n  name a directory"]),
        (lambda path: None, ["--resume", "require"], 3, ["holds no run to resume"]),
    ],
)
def test_an_output_dir_that_is_not_this_run_s_is_left_as_it_is(
    make, argv, code, matches, train, tmp_path
):
    text = write_text(tmp_path / "text.txt", "A word.\n" * 99)
    out = tmp_path / "out"
    make(out)

    def content():
        return {
            path: path.read_bytes()
            for path in (out, *out.rglob("*"))
            if path.is_file() and path.name != ".lock"  # the mark of a process, not of a run
        }

    before = content()
    got, stderr = train("--train_file", text, *argv)
    assert got == code
    check_refusal(stderr, *matches)
    assert content() == before


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError, 2), (CheckpointError, 3), (StorageError, 4), (NumericsError, 5)],
)
@pytest.mark.parametrize("debug", [False, True])
def test_each_kind_of_error_has_its_exit_code(error, code, debug, capsys):
    def main(argv):
        raise error("what and where\n  the remedy")

    assert run_main(main, ["--debug"] if debug else []) == code
    stderr = capsys.readouterr().err
    assert stderr.endswith("error: what and where\n  the remedy\n")
    assert stderr.startswith("Traceback" if debug else "error: ")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (143, 143)])
def test_what_main_returns_is_the_exit_code(returned, code):
    assert run_main(lambda argv: returned, []) == code


def test_a_bug_keeps_its_traceback():
    def main(argv):
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        run_main(main, [])


def test_an_interrupt_before_training_is_130(capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert run_main(main, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_a_collection_of_garbage_is_not_lost(number, code, capsys):
    begun = []

    def callback(phase, info):
        if not begun:
            begun.append(phase)
            os.kill(os.getpid(), number)
            time.sleep(0)  # here Python runs the signal's handler

    def main(argv):
        gc.callbacks.append(callback)  # not before: Python collects when it pleases
        gc.collect()
        assert begun == ["start"]  # and what the handler raised was dropped
        time.sleep(10)

    before = sys.unraisablehook
    # What a shell starts in the background ignores SIGINT, tests included.
    ignores = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_main(main, []) == code
    finally:
        gc.callbacks.remove(callback)
        signal.signal(signal.SIGINT, ignores)
    assert sys.unraisablehook is before
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_of_the_output_may_leave(monkeypatch):
    def main(argv):
        raise BrokenPipeError

    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert run_main(main, []) == 1
    assert stderr.closed


# ---------------------------------------------------------------- the hub


@pytest.fixture
def ask_anew():
    """The hub is tried once a process: here as if nobody had, before and behind."""
    hub.reachable.cache_clear()
    yield
    hub.reachable.cache_clear()


@contextlib.contextmanager
def hub_that_answers(status):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def no_proxies(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("status", "expected"), [(200, True), (401, True), (404, True), (501, True), (503, False)]
)
@pytest.mark.usefixtures("no_proxies")
def test_any_answer_but_a_gateway_s_is_one(status, expected):
    with hub_that_answers(status) as url:
        assert hub.answers(url) is expected


@pytest.mark.usefixtures("no_proxies")
def test_a_hub_that_takes_the_connection_and_is_silent_does_not_answer(monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not hub.answers(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "huggingface.co", "http://a:b", "http://.x", "http://[::1", ""]
)
@pytest.mark.usefixtures("no_proxies")
def test_what_is_no_address_does_not_answer(url):
    assert not hub.answers(url)


@pytest.mark.usefixtures("no_proxies")
def test_the_proxy_is_asked(monkeypatch):
    with hub_that_answers(200) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        assert hub.answers("http://no-such-host.invalid")
        # A kind that urllib doesn't go through, and the hub's clients do.
        monkeypatch.setenv("http_proxy", "")
        monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
        assert hub.answers("http://no-such-host.invalid")


@pytest.mark.parametrize(
    ("reason", "expected"),
    [(ssl.SSLCertVerificationError("unknown"), True), (ssl.SSLError("cut off"), False)],
)
@pytest.mark.usefixtures("no_proxies")
def test_a_certificate_that_only_python_does_not_know_is_an_answer(reason, expected, monkeypatch):
    def refuse(opener, request, timeout):
        raise urllib.error.URLError(reason)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    assert hub.answers("https://huggingface.co") is expected


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.usefixtures("ask_anew")
def test_the_hub_is_tried_once(answers, monkeypatch):
    asked = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setattr(hub, "answers", lambda url: asked.append(url) or answers)
    assert [hub.reachable(), hub.reachable()] == [answers, answers]
    assert asked == ["http://hub.example"]


@pytest.mark.parametrize(
    ("setting", "offline"),
    [("1", True), ("true", True), ("YES", True), ("On", True), ("0", False), ("", False)],
)
@pytest.mark.usefixtures("ask_anew")
def test_the_hub_is_left_alone_where_the_user_says_so(setting, offline, monkeypatch):
    """In the words that the hub's own clients understand."""
    asked = []
    monkeypatch.setenv("HF_HUB_OFFLINE", setting)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(hub, "answers", lambda url: asked.append(url) or True)
    assert hub.is_offline() is offline and hub.reachable() is not offline
    assert asked == ([] if offline else ["https://huggingface.co"])
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not hub.is_offline()


def test_the_revision_in_the_cache_is_known_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "answers", lambda url: pytest.fail("the hub is asked"))
    assert hub.cached_revision("someone/stories") is None
    refs = tmp_path / "datasets--someone--stories" / "refs"
    refs.mkdir(parents=True)
    assert hub.cached_revision("someone/stories") is None
    (refs / "main").write_text("0123abc\n")
    assert hub.cached_revision("someone/stories") == "0123abc"
    assert hub.cached_revision("stories") is None
    (refs / "main").write_bytes(b"\xff")
    assert hub.cached_revision("someone/stories") is None


@pytest.mark.parametrize(
    ("offline", "error", "reason"),
    [
        ("1", OSError("x"), "the hub https://huggingface.co cannot be reached"),
        ("", OSError("one\ntwo\nthree"), "one"),
        ("", RuntimeError(), "RuntimeError"),
        ("", RuntimeError("x" * 999), "x" * 200),
    ],
)
@pytest.mark.usefixtures("ask_anew")
def test_an_error_of_the_hub_is_three_lines(offline, error, reason, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(hub, "answers", lambda url: True)
    first, *ways = str(hub.hub_error("dataset d", error)).splitlines()
    assert re.fullmatch(rf"dataset d: {re.escape(reason)}( and it is not in the cache)?", first)
    assert len(ways) == 2


@pytest.mark.usefixtures("ask_anew")
def test_a_hub_that_does_not_answer_is_the_reason(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setattr(hub, "answers", lambda url: False)
    error = hub.hub_error("tokenizer t", OSError("a page of retries"))
    assert str(error).startswith(
        "tokenizer t: the hub http://hub.example cannot be reached and it is not in the cache\n"
    )


def test_no_error_shows_a_secret(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    report(UserError("0123456789abcdef is no key for https://me:word@host/a"), debug=False)
    assert capsys.readouterr().err == "error: <WANDB_API_KEY> is no key for https://...@host/a\n"
