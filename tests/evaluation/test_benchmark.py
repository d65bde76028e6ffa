"""scripts/benchmark.py measures what it says, and says what it cannot measure."""

import importlib.util
import json
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import pytest

from gpt2_flax.errors import StorageError, run_main
from gpt2_flax.evaluation import benchmark

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def measure(capsys):
    """Run the script on these words: (exit code, stdout, stderr)."""
    main = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))["main"]

    def run(*argv, command="data"):
        code = run_main(main, [command, *map(str, argv)])
        return code, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_data_is_measured(measure, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {n} of {n * n}\n" for n in range(999)))
    figures = tmp_path / "figures.json"
    figures.write_text("older ones")
    code, out, err = measure(
        "--train_file", tmp_path / "a.txt", "--tokenizer", "bytes", "--batch_size", 8,
        "--block_size", 16, "--tokens_per_second", 32_000, "--steps", 4, "--seconds", 0.05,
        "--processes", 1, "--json", figures,
    )  # fmt: skip
    assert code == 0, err
    results = json.loads(figures.read_text())["figures"]
    assert [result["unit"] for result in results.values()] == [
        *["rows/s"] * 2, "%", *["MB/s"] * 3
    ]  # fmt: skip
    assert "of a step at 32,000 tokens/s, waiting for data" in results
    for name, result in results.items():
        assert 0 < result["low"] <= result["median"] <= result["high"]
        assert f"{name} " in out and benchmark.shown(result["median"]) in out


TINY = [
    "--n_layers", "1", "--n_embd", "6", "--n_heads", "3", "--vocab_size", "31",
    "--batch_size", "8", "--block_size", "5", "--processes", "1",
]  # fmt: skip
STEPS = ("--steps", "2", "--warm_up", "1")


@pytest.mark.slow
def test_our_step_is_measured_beside_torchs_and_its_own_by_jit(measure, tmp_path):
    figures = tmp_path / "figures.json"
    flags = "--peer", "torch", "jit", "--dropout", "0.1", "--json", figures
    code, out, err = measure(*TINY, *STEPS, *flags, command="train")
    assert code == 0, err
    written = json.loads(figures.read_text())
    results, about = written["figures"], written["about"]
    assert about["packages"]["jax"] == jax.__version__ and about["processor"]
    assert about["settings"]["n_embd"] == 6 and about["cores"] >= 1
    for cell in ("ours", "torch", "jit"):
        tokens, seconds = (results[f"{cell}: {what}"]["median"] for what in ("tokens/s", "s/step"))
        assert tokens == pytest.approx(8 * 5 / seconds)
        assert 0.1 < results[f"{cell}: GB of the host"]["median"] < 10
        assert results[f"{cell}: s to the first step"]["low"] > 0.5
        first = results[f"{cell}: s of the first step, compiled in it"]["low"]
        assert 0 < first < results[f"{cell}: s to the first step"]["low"]
    ratio = results["ours: tokens/s"]["median"] / results["torch: tokens/s"]["median"]
    assert results["ours / torch: tokens/s"]["median"] == pytest.approx(ratio)
    assert results["ours: MFU"]["median"] is None  # the peak of this CPU isn't known
    assert re.search("^ours: MFU +unknown$", out, re.MULTILINE)
    assert results["ours: s to the first step, compiled before"]["low"] > 0.5
    lines = re.findall(r"^(\d of 4: .*), [\d,.]+ (.*)$", err, re.MULTILINE)
    assert lines == [
        ("1 of 4: ours", "tokens/s"), ("2 of 4: torch", "tokens/s"), ("3 of 4: jit", "tokens/s"),
        ("4 of 4: ours, compiled before", "s to the first step"),
    ]  # fmt: skip


def test_cells_take_turns():
    asked = []

    def measure(cell, n):
        asked.append((cell, n))
        return {"s": len(asked)}

    found = benchmark.in_turn(("a", "b"), {"processes": 2}, measure)
    assert asked == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert benchmark.spreads(found)["b: s"] == {
        "unit": "", "median": 3, "low": 2, "high": 4, "values": [2, 4]
    }  # fmt: skip


@pytest.mark.parametrize(("load", "busy"), [(0.1, False), (3.2, True)])
def test_a_busy_machine_is_said(capsys, monkeypatch, load, busy):
    monkeypatch.setattr(benchmark.os, "getloadavg", lambda: (load, 0, 0))
    benchmark.in_turn(("a",), {"processes": 1}, lambda cell, n: {"s": 1.0})
    assert (f"load {load}" in capsys.readouterr().err) == busy
    assert benchmark.about()["load of the last minute"] == load


@pytest.mark.slow
def test_decoding_is_measured_beside_torchs(measure):
    code, out, err = measure(*TINY, "--new_tokens", "3", "--repeats", "1", command="decode")
    assert code == 0, err
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        *(f"decode {whose}: {what}" for whose in ("ours", "torch")
          for what in ("tokens/s", "s/call", "s of the first call")),
        "ours / torch: tokens/s",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_save_is_measured(measure, tmp_path):
    code, out, err = measure(*TINY, *STEPS, "--folder", tmp_path, command="checkpoint")
    assert code == 0, err
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert names == [
        f"save: {what}"
        for what in (
            "s/step",
            "s the first save holds up the loop", "s until it is on disk",
            "s it costs altogether",
            "s a later save holds up the loop", "s until that is on disk",
            "s that costs altogether",
        )
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_our_step_needs_nothing_of_what_reads_data_saves_or_draws():
    missing = ("datasets", "pyarrow", "xxhash", "matplotlib", "orbax.checkpoint")
    settings = {
        "n_layers": 1, "n_embd": 6, "n_heads": 3, "vocab_size": 31, "batch_size": 8,
        "block_size": 5, "dropout": 0.0, "dtype": "bfloat16", "steps": 1, "warm_up": 0, "seed": 0,
        "began": 0.0, "compilation_cache": "off",
    }  # fmt: skip
    program = (
        f"import sys\nfor name in {missing}: sys.modules[name] = None\n"
        "from gpt2_flax.evaluation import benchmark_train\n"
        f"print(benchmark_train.ours({settings}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "'tokens/s': " in done.stdout


def test_mfu_is_that_of_any_cell_where_the_peak_is_known():
    settings = {"n_layers": 12, "n_embd": 768, "vocab_size": 50257, "block_size": 1024}
    assert benchmark.mfu(549_900, settings, 989.4e12) == pytest.approx(0.475, abs=1e-3)
    assert benchmark.mfu(549_900, settings, None) is None


def test_mfu_of_ours_is_of_all_devices_and_a_peer_s_of_one(monkeypatch):
    """Two devices of 10 TFLOP/s each; torch, and ours that know of no peak."""

    def cell(name, settings, variables=None):
        ours = {"peak FLOP/s": [2, 1e13]} if name in ("ours", "jit") else {}
        return {"tokens/s": 1000.0, benchmark.FIRST: 1.0} | ours

    monkeypatch.setattr(benchmark, "of_training", cell)
    settings = {
        "peer": ["torch", "jit"], "processes": 2, "n_layers": 12, "n_embd": 768,
        "vocab_size": 50257, "block_size": 1024,
    }  # fmt: skip
    results = benchmark.train(settings)
    of_one = benchmark.mfu(1000.0, settings, 1e13)
    assert results["torch: MFU"]["values"] == [of_one] * 2
    for name in ("ours", "jit"):
        assert results[f"{name}: MFU"]["values"] == pytest.approx([of_one / 2] * 2)


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ("train --peer numpy", "argument --peer: invalid choice: 'numpy'"),
        ("train --n_embd 100", "n_embd 100 is not divisible by n_heads 12"),
        ("train --dropout 1", "argument --dropout: must be at least 0 and below 1, got 1\n"),
        ("decode --repeats 0", "argument --repeats: must be a whole number of at least 1, got 0"),
        ("checkpoint --size 7b", "argument --size: invalid choice: '7b'"),
    ],
)
def test_faults_of_settings_are_found_before_anything_is_measured(measure, argv, match):
    command, *words = argv.split()
    code, out, err = measure(*words, command=command)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {match}")


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        ("train", "torch"),
        ("train --peer torch_compile", "torch"),
        ("train --peer torch_trainer", "accelerate"),
        ("decode", "torch"),
    ],
)
def test_a_peer_s_package_that_is_missing_is_named_first(measure, monkeypatch, argv, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == missing else find(name)
    )
    command, *words = argv.split()
    code, out, err = measure(*words, command=command)
    assert (code, out) == (2, "")
    assert re.fullmatch(
        rf"error: comparing with torch\w* needs packages that are not installed: .*{missing}\n"
        rf"  pip install .*{missing}; or, .*\n",
        err,
    )


def test_a_package_that_a_save_takes_and_is_missing_is_named(measure, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "xxhash" else find(name)
    )
    code, out, err = measure(command="checkpoint")
    assert (code, out) == (2, "")
    expected = "error: checkpoint needs packages that are not installed: xxhash\n"
    assert err == f"{expected}  pip install xxhash\n"


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ("--processes 0", "argument --processes: must be a whole number of at least 1, got 0\n"),
        ("--steps x", "argument --steps: must be a whole number of at least 1, got x\n"),
        ("--seconds nan", "argument --seconds: must be a number above 0, got nan\n"),
        ("--seconds soon", "argument --seconds: must be a number above 0, got soon\n"),
        ("--tokenizer bpe:abc", "tokenizer bpe:abc: bpe:N needs N of at least 257"),
        ("--train_file a.bin", "a.bin holds ids, and nothing to tokenize\n  name a file of text"),
        ("--train_file a.txt", "a.txt has 2 tokens, fewer than one row of block_size 1024 + 1\n"),
        ("--train_file b.txt", "train_file b.txt does not exist"),
    ],
)
def test_what_cannot_be_measured_is_said(measure, tmp_path, monkeypatch, argv, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.bin").write_bytes(bytes(4096))
    (tmp_path / "a.txt").write_text("a")
    if "--tokenizer" not in argv:
        argv += " --tokenizer bytes"
    code, out, err = measure(*argv.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {match}") and len(err.splitlines()) <= 3


def test_a_place_that_cannot_be_written_is_named_before_anything_is_measured(measure, tmp_path):
    code, out, err = measure("--json", tmp_path / "none" / "a.json", "--train_file", "none")
    assert (code, out) == (4, "")
    assert err.startswith("error: cannot write ") and "none/a.json: No such file" in err


def test_the_error_of_a_cell_keeps_its_kind_and_is_said_without_the_notes_before_it(tmp_path):
    (tmp_path / "folder").write_text("in the way")
    (tmp_path / "a.txt").write_text("some words " * 99)
    settings = {
        "train_file": str(tmp_path / "a.txt"), "tokenizer": "bpe:300", "block_size": 64,
        "folder": str(tmp_path / "folder"),
    }  # fmt: skip
    match = r"^cannot write the token file [^:]*: (File exists|Not a directory) "
    with pytest.raises(StorageError, match=match):  # behind "learning 300 tokens from"
        benchmark.in_fresh_process("prepare", settings)
