"""Runs from text to model, in this process: what they leave, and how they go on."""

import json
import math
import re
import shutil
import signal

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
import yaml

from gpt2_flax import FlaxGPT2LMHeadModel
from gpt2_flax.config.train_config import load_config
from gpt2_flax.data.batches import StoredRows
from gpt2_flax.distributed import devices, memory, parallel
from gpt2_flax.errors import CheckpointError, NumericsError, StorageError, UserError
from gpt2_flax.model.ops import cross_entropy
from gpt2_flax.pretrained import convert, orbax_files
from gpt2_flax.reporting import metrics
from gpt2_flax.training import optim, run_directory
from gpt2_flax.training.run_directory import locked
from gpt2_flax.training.train import train
from tests.tiny_runs import TINY, assert_same_run, learned, stop_at


def test_a_finished_run_leaves_the_promised_files(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {
        "config.yaml", "metrics.jsonl", "loss.png", "checkpoints", "config.json",
        "generation_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert not [name for name in names if "tmp" in name]
    steps = {path.name for path in (finished_run / "checkpoints").iterdir()}
    assert steps == {"9", "12"}
    assert {p.name for p in (finished_run / "checkpoints" / "12").iterdir()} >= {"state", "meta"}
    rows = metrics.read_log(finished_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    training = {
        "step", "epoch", "tokens", "train_loss", "learning_rate", "grad_norm",
        "tokens_per_second", "mfu", "seconds", "bad_steps", "process_peak_memory_bytes",
    }  # fmt: skip
    assert rows[0].keys() == training
    assert rows[1].keys() == training | {"validation_loss", "perplexity"}
    assert rows[3]["tokens"] == 12 * 8 * 16
    assert rows[3]["train_loss"] < rows[0]["train_loss"]
    assert yaml.safe_load((finished_run / "config.yaml").read_text())["n_embd"] == 8
    assert (finished_run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_pytorch_opens_the_run_with_our_weights_bitwise(finished_run):
    oracle = transformers.GPT2LMHeadModel.from_pretrained(
        finished_run, attn_implementation="eager"
    )
    state, _ = learned(finished_run)
    wte = state["params"]["transformer"]["wte"]["embedding"]
    np.testing.assert_array_equal(oracle.transformer.wte.weight.detach().numpy(), wte)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished_run)
    ids = np.array(tokenizer("milk and tea")["input_ids"])[None]
    assert ids.tolist()[0] == list(b"milk and tea")
    ours = FlaxGPT2LMHeadModel.from_pretrained(finished_run)(ids).logits
    np.testing.assert_allclose(ours, oracle(torch.tensor(ids)).logits.detach(), atol=1e-5)


@pytest.mark.slow(but_every=2)
@pytest.mark.parametrize("stops", [(4,), (5, 6)], ids=["once", "twice"])
def test_a_stopped_and_resumed_run_equals_an_unbroken_one(
    train_tiny, finished_run, tmp_path, monkeypatch, stops
):
    """Stopped off the saving steps and inside a window of the log; dropout on."""
    output_dir = tmp_path / "run"
    for step in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert train_tiny(output_dir) == 143
        saved = max(int(path.name) for path in (output_dir / "checkpoints").iterdir())
        assert saved == step
    assert train_tiny(output_dir) == 0
    assert_same_run(output_dir, finished_run)


def test_a_run_that_lost_its_newest_steps_does_them_again_bitwise(
    train_tiny, finished_run, tmp_path
):
    """As after a kill: the log is ahead of the checkpoint, its last row half written."""
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run, output_dir)
    shutil.rmtree(output_dir / "checkpoints" / "12")
    (output_dir / "model.safetensors").unlink()
    (output_dir / "checkpoints" / "12.orbax-checkpoint-tmp").mkdir()
    with open(output_dir / "metrics.jsonl", "a") as log:
        log.write('{"step": 15, "train_l')
    assert train_tiny(output_dir) == 0
    assert_same_run(output_dir, finished_run)
    assert {path.name for path in (output_dir / "checkpoints").iterdir()} == {"9", "12"}


def test_a_finished_run_only_writes_its_model_again(train_tiny, finished_run, tmp_path, capsys):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run, output_dir)
    (output_dir / "model.safetensors").unlink()
    log = (output_dir / "metrics.jsonl").read_text()
    assert train_tiny(output_dir) == 0
    assert_same_run(output_dir, finished_run)
    assert (output_dir / "metrics.jsonl").read_text() == log
    assert "scripts/generate.py --model" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stream_learns_and_goes_on_bitwise(train_tiny, tmp_path, monkeypatch):
    flags = ("--streaming", "--shuffle_window", "20", "--dropout", "0")
    assert train_tiny(tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert train_tiny(tmp_path / "parts", *flags) == 143
    assert train_tiny(tmp_path / "parts", *flags) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_an_epoch_uses_every_row_once(train_tiny, tiny_text, tmp_path):
    """The last step's batch is filled up with rows that count nothing."""
    assert (
        train_tiny(tmp_path, "--max_steps", "0", "--epochs", "0.5", "--validation_share", "0") == 0
    )
    n_rows = tiny_text.stat().st_size // 16  # and the end-of-text as the last target
    last = metrics.read_log(tmp_path / "metrics.jsonl")[-1]
    assert last["tokens"] == round(n_rows / 2) * 16
    assert last["step"] == -(-round(n_rows / 2) // 8)
    assert "validation_loss" not in last


@pytest.mark.slow
def test_accumulation_makes_up_the_same_steps(train_tiny, finished_run, tmp_path):
    """2 x 8 rows a step, by accumulation and by batch size: the same losses."""
    flags = ("--dropout", "0", "--max_steps", "6")
    assert train_tiny(tmp_path / "accumulated", *flags, "--grad_accum", "2") == 0
    assert train_tiny(tmp_path / "at_once", *flags, "--batch_size", "2") == 0
    a, b = (
        [row["train_loss"] for row in metrics.read_log(tmp_path / name / "metrics.jsonl")]
        for name in ("accumulated", "at_once")
    )
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.slow
def test_training_can_begin_from_a_model(finished_run, tiny_text, tmp_path):
    flags = [*TINY[8:], "--init_from", str(finished_run), "--learning_rate", "1e-9"]
    config = load_config([*flags, "--train_file", str(tiny_text), "--output_dir", str(tmp_path)])
    assert train(config) == 0
    began, ended = (FlaxGPT2LMHeadModel.from_pretrained(path) for path in (finished_run, tmp_path))
    for a, b in zip(jax.tree.leaves(began.params), jax.tree.leaves(ended.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_other_settings_are_refused_and_change_nothing(train_tiny, finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run, output_dir)
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=r"other settings: learning_rate 0.01 -> 0.02, seed 42 -> 1"
    ):
        train_tiny(output_dir, "--learning_rate", "2e-2", "--seed", "1")
    with pytest.raises(UserError, match=r"other settings: vocab_size 0 -> 300\n"):
        train_tiny(output_dir, "--vocab_size", "300", "--pad_vocab_to_multiple_of", "128")
    with pytest.raises(UserError, match="--resume never"):
        train_tiny(output_dir, "--resume", "never")
    other = tmp_path / "other.txt"
    other.write_text("something else entirely " * 200)
    with pytest.raises(UserError, match="train_file"):
        train_tiny(output_dir, "--train_file", str(other))
    with pytest.raises(
        UserError, match=r"steps have 8 rows; 8 devices x batch_size 3 .*\n.*\[1\]"
    ):
        train_tiny(output_dir, "--batch_size", "3")
    with locked(output_dir), pytest.raises(UserError, match="is in use by process"):
        train_tiny(output_dir)
    after = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    lock = output_dir / ".lock"
    assert {**after, lock: b""} == {**before, lock: b""}


def test_fewer_steps_than_were_made_are_refused(train_tiny, finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run, output_dir)
    log = (output_dir / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="is at step 12 already, past the 8 that are asked for"):
        train_tiny(output_dir, "--max_steps", "8")
    assert (output_dir / "metrics.jsonl").read_text() == log


@pytest.mark.slow
def test_more_steps_extend_a_run(train_tiny, finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run, output_dir)
    assert train_tiny(output_dir, "--max_steps", "15") == 0
    rows = metrics.read_log(output_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 9, 12, 15]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--streaming",)], ids=["stored", "streamed"])
def test_more_epochs_extend_a_run_whose_last_step_was_short(train_tiny, tmp_path, flags):
    """Each row is used once an epoch, as in a run of that many epochs from the start."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of {n * n}\n" for n in range(150)))
    flags = (*flags, "--train_file", str(text), "--ledger", "--eval_every", "0", "--max_steps",
             "0", "--validation_share", "0", "--block_size", "24")  # fmt: skip

    def rows(name, *epochs):
        for n_epochs in epochs:
            assert train_tiny(tmp_path / name, *flags, "--epochs", n_epochs) == 0
        lines = metrics.read_log(tmp_path / name / "ledger.jsonl")
        assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]
        return [len(line["rows"]) for line in lines], [
            row for line in lines for row in line["rows"]
        ]

    sizes, extended = rows("extended", "1", "1.3", "2")
    at_once_sizes, at_once = rows("at once", "2")
    assert extended == at_once
    batch = at_once_sizes[0]
    assert [size for size in at_once_sizes if size < batch] == [len(at_once) % batch]
    assert len([size for size in sizes if size < batch]) == 3
    log = metrics.read_log(tmp_path / "extended" / "metrics.jsonl")
    assert log[-1]["epoch"] == 2 and log[-1]["step"] == len(sizes)


@pytest.mark.slow
def test_a_damaged_short_step_is_made_again(train_tiny, tmp_path, capsys):
    """The steps left are counted from the checkpoint that the run goes on from."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of {n * n}\n" for n in range(150)))
    flags = ("--train_file", str(text), "--eval_every", "0", "--max_steps", "0",
             "--validation_share", "0")  # fmt: skip
    train_tiny(tmp_path / "run", *flags)
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(steps[-1]) / "state")
    assert train_tiny(tmp_path / "run", *flags, "--epochs", "2") == 0
    assert train_tiny(tmp_path / "at once", *flags, "--epochs", "2") == 0
    last = [
        metrics.read_log(tmp_path / name / "metrics.jsonl")[-1]["step"]
        for name in ("run", "at once")
    ]
    assert last[0] == last[1]
    assert f"checkpoint {steps[-1]} is damaged (state/" in capsys.readouterr().err


def test_a_stopped_run_is_saved_though_nobody_reads_its_output(train_tiny, tmp_path, monkeypatch):
    """Ctrl-C in `train.py 2>&1 | tee log` also ends tee."""

    def broken(*words):
        raise BrokenPipeError

    monkeypatch.setattr("gpt2_flax.training.signals.os.write", broken)
    monkeypatch.setattr(metrics, "print", broken, raising=False)
    stop_at(monkeypatch, 2, signal.SIGINT)
    assert train_tiny(tmp_path) == 130
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


@pytest.mark.slow
def test_what_a_stop_left_unevaluated_may_be_the_best(train_tiny, tmp_path, monkeypatch):
    """Its checkpoint was saved without a loss; it is kept for as long as none is better."""
    flags = ("--eval_every", "2", "--save_every", "2", "--keep", "1", "--max_steps")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train_tiny(tmp_path, *flags, "12") == 143
    losses = iter([1.0, 3.0, 2.0, 4.0, 0.5, 0.6])
    loss_of = "gpt2_flax.training.train.held_out_loss"
    monkeypatch.setattr(loss_of, lambda *arguments: (next(losses), 1))
    for step in (7, 9):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            assert train_tiny(tmp_path, *flags, "12") == 143
        assert saved_steps(tmp_path) == [2, step]
    assert train_tiny(tmp_path, *flags, "12") == 0
    assert saved_steps(tmp_path) == [10, 12]


def saved_steps(output_dir) -> list[int]:
    return sorted(int(path.name) for path in (output_dir / "checkpoints").glob("[0-9]*"))


def test_a_full_disk_at_the_start_leaves_nothing_half(train_tiny, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def save(self, directory):
        (folder / "tokenizer.json").write_text("{")
        raise Exception("No space left on device (os error 28)")  # as the library says it

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save)
        with pytest.raises(
            StorageError, match=r"tokenizer\.json: No space left on device\n.*free"
        ):
            train_tiny(folder)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    (folder / ".model.safetensors.1.tmp").write_text("of an export that was killed")
    assert train_tiny(folder) == 0
    assert not [*folder.glob("*.tmp"), *folder.glob(".*.tmp")]


@pytest.mark.slow
def test_the_tokenizer_is_not_written_over_what_is_there_but_comes_back(
    train_tiny, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert train_tiny(tmp_path) == 143
    written = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").unlink()
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert train_tiny(tmp_path) == 143
    assert (tmp_path / "tokenizer.json").read_bytes() == written

    def save(self, directory):
        raise AssertionError("a kill would leave half of it")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save)
    assert train_tiny(tmp_path) == 0
    assert (tmp_path / "tokenizer.json").read_bytes() == written


def test_a_foreign_tokenizer_is_refused_unless_a_killed_start_left_it(
    train_tiny, tmp_path, monkeypatch
):
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(UserError, match=r"holds tokenizer\.json but no config\.yaml"):
        train_tiny(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    (tmp_path / ".lock").write_text("")
    stop_at(monkeypatch, 1)
    assert train_tiny(tmp_path) == 143


def test_a_changed_text_is_refused(train_tiny, tiny_text, tmp_path, monkeypatch):
    own = tmp_path / "text.txt"
    shutil.copy(tiny_text, own)
    stop_at(monkeypatch, 1)
    assert train_tiny(tmp_path / "run", "--train_file", str(own)) == 143
    own.write_text(own.read_text() + " more")
    with pytest.raises(UserError, match="the text is not the one"):
        train_tiny(tmp_path / "run", "--train_file", str(own))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.safetensors"], r"holds model\.safetensors but no config\.yaml"),
        (["samples.txt"], r"holds samples\.txt but no config\.yaml"),
        (["report.html"], r"holds report\.html but no config\.yaml"),
        (
            ["config.yaml", "model.safetensors"],
            r"a config\.yaml that is not of this trainer",
        ),
    ],
    ids=str,
)
def test_files_that_this_trainer_did_not_write_are_left_alone(
    train_tiny, tmp_path, names, message
):
    for name in names:
        (tmp_path / name).write_text("model: {name: mine}")
    with pytest.raises(UserError, match=message):
        train_tiny(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert {path.read_text() for path in tmp_path.iterdir()} == {"model: {name: mine}"}


def test_a_file_is_no_output_directory_and_nothing_is_nothing_to_resume(train_tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        train_tiny(tmp_path / "file")
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        train_tiny(tmp_path / "nothing", "--resume", "require")
    assert not (tmp_path / "nothing").exists()


def poison(monkeypatch, steps):
    """Let these steps of training have an id that is none: their loss is not a number."""
    batches_of = StoredRows.batches

    def with_poison(self, cursor, size, limit, slots):
        for taken in batches_of(self, cursor, size, limit, slots):
            if -(-taken.cursor["rows"] // size) in steps:
                taken.batch.ids_BxS[0, 0] = 9999
            yield taken

    monkeypatch.setattr(StoredRows, "batches", with_poison)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--parallel", "jit", "--grad_accum", "2")], ids=str)
def test_bad_steps_are_left_out_and_the_run_goes_on_bitwise(
    train_tiny, tmp_path, monkeypatch, flags
):
    """Stopped among bad steps: the count of those in a row is the whole run's, too."""
    flags = (*flags, "--max_bad_steps", "3", "--save_every", "0", "--optimizer", "adafactor")
    poison(monkeypatch, {4, 6, 7, 8})
    assert train_tiny(tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert train_tiny(tmp_path / "parts", *flags) == 143
    assert orbax_files.read_meta(tmp_path / "parts" / "checkpoints" / "7")["bad_in_a_row"] == 2
    assert train_tiny(tmp_path / "parts", *flags) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    rows = metrics.read_log(tmp_path / "whole" / "metrics.jsonl")
    assert [row["bad_steps"] for row in rows] == [0, 2, 4, 4]
    assert rows[-1]["tokens"] == 12 * 8 * 16 * (2 if "jit" in flags else 1)


def test_a_run_of_bad_steps_ends_with_a_finite_checkpoint(train_tiny, tmp_path, monkeypatch):
    poison(monkeypatch, range(5, 99))
    with pytest.raises(NumericsError, match=r"^step 8: for 4 steps in a row the loss or"):
        train_tiny(tmp_path, "--max_bad_steps", "3", "--log_every", "1")
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [3, 6]
    state, _ = learned(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"]))


def test_parameters_that_are_not_finite_are_not_saved(train_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "make_schedule", lambda *settings: lambda n: math.inf)
    with pytest.raises(NumericsError, match=r"^step 3: parameters or optimizer are not finite"):
        train_tiny(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


# ---------------------------------------------------------------- lengths


def rates_of(path):
    return [row["learning_rate"] for row in metrics.read_log(path / "metrics.jsonl")]


def test_lengths_may_be_words(train_tiny, finished_run, tmp_path):
    """128 tokens a step: the run of 12 steps, said otherwise, is the same run."""
    flags = ("--max_steps", "1.5k tokens", "--log_every", "384 tokens", "--eval_every")
    assert train_tiny(tmp_path, *flags, "768 tokens", "--save_every", "0.02 epochs") == 0
    assert_same_run(tmp_path, finished_run)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"9", "12"}


@pytest.mark.thorough(but_every=3)
@pytest.mark.slow(but_every=6)
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("length", [("--max_steps", "0.1 epochs"), ("--epochs", "0.1")], ids=str)
def test_the_learning_rate_ends_with_the_last_step(
    train_tiny, tiny_text, tmp_path, length, accumulated
):
    """Also of a fraction of an epoch, whose last step is short, and with accumulation."""
    flags = ("--max_steps", "0", *length, "--lr_schedule", "linear", "--warmup_steps", "2")
    flags += ("--grad_accum", str(accumulated), "--log_every", "1", "--validation_share", "0")
    assert train_tiny(tmp_path, *flags) == 0
    n_steps = -(-round(0.1 * (tiny_text.stat().st_size // 16)) // (8 * accumulated))
    expected = [5e-3, 1e-2, *np.linspace(1e-2, 0, n_steps - 1)[:-1]]
    np.testing.assert_allclose(rates_of(tmp_path), expected, rtol=1e-5)


@pytest.mark.slow
def test_a_length_in_time_is_measured_once_and_resumed_bitwise(
    train_tiny, tmp_path, monkeypatch, capsys
):
    flags = ("--max_steps", "12 minutes", "--warmup_steps", "256 tokens", "--lr_schedule", "wsd")
    flags += ("--decay_steps", "512 tokens")
    monkeypatch.setattr("gpt2_flax.training.setup.measure_step", lambda *train_tiny: 59.0)
    assert train_tiny(tmp_path / "whole", *flags) == 0
    rows = metrics.read_log(tmp_path / "whole" / "metrics.jsonl")
    assert rows[-1]["step"] == 12
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert train_tiny(tmp_path / "parts", *flags) == 143
    monkeypatch.setattr("gpt2_flax.training.setup.measure_step", None)
    assert train_tiny(tmp_path / "parts", *flags) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert train_tiny(tmp_path / "parts", *flags, "--max_steps", "15 minutes") == 0
    assert metrics.read_log(tmp_path / "parts" / "metrics.jsonl")[-1]["step"] == 15


@pytest.mark.slow
def test_a_length_that_becomes_a_time_is_measured_once_too(train_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2_flax.training.setup.measure_step", lambda *train_tiny: 59.0)
    assert train_tiny(tmp_path, "--max_steps", "2") == 0
    assert train_tiny(tmp_path, "--max_steps", "4 minutes") == 0
    monkeypatch.setattr("gpt2_flax.training.setup.measure_step", None)
    assert train_tiny(tmp_path, "--max_steps", "6 minutes") == 0
    assert orbax_files.read_meta(tmp_path / "checkpoints" / "6")["seconds_a_step"] == 59.0


def test_a_run_that_is_refused_leaves_no_directory(train_tiny, tmp_path):
    flags = ("--max_steps", "0", "--epochs", "1")
    with pytest.raises(UserError, match=r"profile 5000:5001 goes beyond the run's \d+ steps\n"):
        train_tiny(tmp_path / "run", *flags, "--profile", "5000:5001")
    with pytest.raises(UserError, match=r"epochs of \d+ rows are no step"):
        train_tiny(tmp_path / "run", "--max_steps", "0", "--epochs", "1e-9")
    with pytest.raises(UserError, match=r"a run of [\d,]+ steps is too long: 2,147,483,647 can"):
        train_tiny(tmp_path / "run", "--max_steps", "0", "--epochs", "1000000",
                   "--train_file", __file__, "--batch_size", "1", "--block_size", "1")  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_time_is_as_many_steps_as_are_measured(train_tiny, tmp_path, capsys):
    assert train_tiny(tmp_path, "--max_steps", "0.1 seconds", "--eval_every", "0.01 seconds") == 0
    measured, n_steps = re.search(
        r"a step takes (\S+) s: .* are (\d+) steps", capsys.readouterr().err
    ).groups()
    assert abs(float(measured) * int(n_steps) - 0.1) < 2 * float(measured)
    assert metrics.read_log(tmp_path / "metrics.jsonl")[-1]["step"] == max(1, int(n_steps))


# ---------------------------------------------------------------- memory


@pytest.mark.slow
def test_batch_size_auto_is_the_largest_that_fits(train_tiny, tmp_path, monkeypatch, capsys):
    seen = []
    fits = memory.largest_batch

    def noting(bytes_of, limit, allowed):
        chosen = fits(bytes_of, limit, allowed)
        seen.append((chosen, limit, bytes_of(chosen), bytes_of(2 * chosen)))
        return chosen

    monkeypatch.setattr(memory, "largest_batch", noting)
    monkeypatch.setattr(memory, "device_bytes", lambda: 1_000_000)
    flags = ("--batch_size", "auto", "--max_steps", "3")
    assert train_tiny(tmp_path, *flags) == 0
    ((chosen, limit, fitting, too_large),) = seen
    assert limit == 900_000
    assert fitting <= limit < too_large
    assert chosen > 1
    assert f"batch_size auto: {chosen} rows a device; a step takes" in capsys.readouterr().err
    assert orbax_files.read_meta(tmp_path / "checkpoints" / "3")["global_batch"] == 8 * chosen
    # With less memory the steps keep their rows, by accumulation.
    monkeypatch.setattr(memory, "device_bytes", lambda: 500_000)
    assert train_tiny(tmp_path, *flags, "--max_steps", "6") == 0
    assert seen[-1][0] < chosen
    assert f"have {8 * chosen} rows and keep them" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"of 1 row a device takes .*\n  use --remat block"):
        monkeypatch.setattr(memory, "device_bytes", lambda: 1000)
        train_tiny(tmp_path / "none", *flags)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pmap", pytest.param("jit", marks=pytest.mark.thorough)])
def test_batch_size_auto_counts_the_bytes_of_one_device(train_tiny, tmp_path, monkeypatch, engine):
    """Under jit the compiler's plan is of one device, too, if it is told where a batch lies."""
    planned = []

    def noting(bytes_of, limit, allowed):
        planned.append(bytes_of(64))
        return 1

    monkeypatch.setattr(memory, "largest_batch", noting)
    flags = ("--batch_size", "auto", "--max_steps", "1", "--eval_every", "0")
    assert train_tiny(tmp_path, *flags, "--parallel", engine, "--validation_share", "0") == 0
    # The logits of 64 rows in float32, a few times over; of eight devices' rows it is more.
    logits = 64 * 16 * 257 * 4
    assert logits < planned[0] < 8 * logits


def test_devices_that_cannot_make_up_a_run_s_steps_are_refused_with_auto_too(
    train_tiny, finished_run, tmp_path, monkeypatch
):
    shutil.copytree(finished_run, tmp_path / "run")  # 8 rows a step
    monkeypatch.setattr(devices, "count", lambda: 16)
    with pytest.raises(UserError, match=r"steps have 8 rows; 16 devices x batch_size 1 cannot"):
        train_tiny(tmp_path / "run", "--max_steps", "15", "--batch_size", "auto")


@pytest.mark.parametrize("when", ["compile_train_step", "put_batch"])
def test_running_out_of_memory_ends_with_the_sizes_and_remedies(
    train_tiny, tmp_path, monkeypatch, when
):
    def exhausted(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    if when == "compile_train_step":
        monkeypatch.setattr(parallel, when, lambda step, engine: exhausted)
    else:
        monkeypatch.setattr(parallel, when, exhausted)
    with pytest.raises(UserError) as caught:
        train_tiny(tmp_path)
    assert re.fullmatch(
        r"out of memory: 1 rows of 16 tokens at a time, beside 0.00 GB of parameters and"
        r" optimizer, on a cpu that has \d+\.\d\d GB\n  use a smaller --batch_size .*, or"
        r" --remat block, or --parallel fsdp",  # there are eight devices
        str(caught.value),
    )
    assert caught.value.exit_code == 2


def test_settings_that_would_not_be_read_again_are_refused_before_training(
    train_tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(run_directory, "MAX_SAVED_BYTES", 999)
    with pytest.raises(UserError, match=r"the settings are [\d,]+ bytes, and config.yaml holds"):
        train_tiny(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_error_of_xla_is_not_called_a_lack_of_memory():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        memory.out_of_memory(str, ""),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["block", "attention"])
def test_what_is_computed_again_changes_no_run(train_tiny, finished_run, tmp_path, remat):
    assert train_tiny(tmp_path, "--remat", remat) == 0
    losses = [
        [row["train_loss"] for row in metrics.read_log(path / "metrics.jsonl")]
        for path in (finished_run, tmp_path)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def test_any_checkpoint_converts_for_pytorch(finished_run, tmp_path):
    for step, name in ((9, "by_step"), (None, "newest")):
        convert.to_pytorch(finished_run, tmp_path / name, step)
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name)
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / name).eos_token_id == 256
    final = (finished_run / "model.safetensors").read_bytes()
    assert (tmp_path / "newest" / "model.safetensors").read_bytes() == final
    assert (tmp_path / "by_step" / "model.safetensors").read_bytes() != final
    settings = json.loads((tmp_path / "newest" / "config.json").read_text())
    assert settings == json.loads((finished_run / "config.json").read_text())
    with pytest.raises(UserError, match="holds a model already"):
        convert.to_pytorch(finished_run, tmp_path / "newest")
    with pytest.raises(CheckpointError, match="has no step 7; it has 9, 12"):
        convert.to_pytorch(finished_run, tmp_path / "x", 7)


@pytest.fixture
def logit_widths(monkeypatch):
    """The last axis of the logits of every program that is traced for a loss."""
    widths, logits_of = set(), cross_entropy._logits

    def noting(*arguments):
        logits = logits_of(*arguments)
        widths.add(logits.shape[-1])
        return logits

    monkeypatch.setattr(cross_entropy, "_logits", noting)
    return widths


@pytest.mark.slow
def test_a_padded_vocabulary_is_only_in_the_steps(
    train_tiny, finished_run, tmp_path, logit_widths, capsys
):
    """The same losses; the model, its sample and PyTorch have the tokenizer's 257 ids."""
    flags = ("--pad_vocab_to_multiple_of", "128", "--sample_tokens", "20")
    assert train_tiny(tmp_path, *flags) == 0
    assert logit_widths == {384}
    assert "--- a sample ---" in capsys.readouterr().out
    for name in ("train_loss", "validation_loss"):
        a, b = (
            [row[name] for row in metrics.read_log(path / "metrics.jsonl") if name in row]
            for path in (tmp_path, finished_run)
        )
        np.testing.assert_allclose(a, b, rtol=1e-5)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert [n for n, tensor in tensors.items() if 384 in tensor.shape] == []
    assert tensors["transformer.wte.weight"].shape == (257, 8)
    assert learned(tmp_path)[0]["params"]["transformer"]["wte"]["embedding"].shape == (257, 8)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 257
    oracle = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert oracle(torch.tensor([[116]])).logits.shape == (1, 1, 257)


@pytest.mark.slow
def test_the_model_may_have_more_rows_than_the_tokenizer(train_tiny, tmp_path, logit_widths):
    with pytest.raises(
        UserError,
        match=r"vocab_size 256 is smaller than the tokenizer's 257 tokens\n  raise --vocab_size",
    ):
        train_tiny(tmp_path / "small", "--vocab_size", "256")
    assert not (tmp_path / "small").exists()
    flags = ("--vocab_size", "300", "--max_steps", "2", "--sample_tokens", "20")
    assert train_tiny(tmp_path / "large", *flags) == 0
    assert train_tiny(tmp_path / "large", *flags) == 0
    assert logit_widths == {300}
    assert json.loads((tmp_path / "large" / "config.json").read_text())["vocab_size"] == 300
    oracle = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "large")
    assert oracle.transformer.wte.weight.shape == (300, 8)


@pytest.mark.slow
def test_a_model_with_its_own_head_is_trained_with_padding(tiny_text, tmp_path, logit_widths):
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, n_positions=24, vocab_size=300, tie_word_embeddings=False
    )
    FlaxGPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    flags = [*TINY[8:], "--max_steps", "2", "--init_from", str(tmp_path / "model")]
    flags += ["--pad_vocab_to_multiple_of", "128", "--train_file", str(tiny_text)]
    assert train(load_config([*flags, "--output_dir", str(tmp_path / "run")])) == 0
    assert logit_widths == {384}
    tensors = safetensors.numpy.load_file(tmp_path / "run" / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (300, 8)
