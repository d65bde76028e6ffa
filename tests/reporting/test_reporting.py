"""What a run shows of itself, through the trainer: samples, traces, reporters, its last words."""

import base64
import re
import signal

import numpy as np
import pytest
import transformers

from gpt2_flax.config.train_config import load_config
from gpt2_flax.errors import UserError
from gpt2_flax.generation import decoding
from gpt2_flax.reporting import metrics, model_card
from gpt2_flax.reporting.samples import SampleLog
from gpt2_flax.training.train import train
from tests.reporting.test_profiling import read_steps
from tests.reporting.test_trackers import HAS_TENSORBOARD, needs_tensorboard, read_tensorboard

REPORT_TO = "tensorboard" if HAS_TENSORBOARD else "none"

# A rate that depends on no length: one compiled step serves all runs here.
FLAGS = [
    "--lr_schedule", "constant", "--warmup_steps", "0",
    "--n_layers", "1", "--n_heads", "2", "--n_embd", "8", "--n_positions", "24",
    "--block_size", "16", "--batch_size", "1", "--tokenizer", "bytes", "--max_steps", "9",
    "--log_every", "2", "--eval_every", "3", "--learning_rate", "1e-2", "--dropout", "0",
    "--sample_prompt", "tea", "--sample_tokens", "12",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = np.random.default_rng(1).choice(["tea", "milk", "sugar", "\n"], 2000)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(text):
    def start(output_dir, *flags):
        argv = [*FLAGS, "--train_file", str(text), "--output_dir", str(output_dir), *flags]
        return train(load_config(argv))

    return start


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A run that was never interrupted; three evaluations and its end sampled by one program."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    before = decoding.decode_compiled._cache_size()
    assert run(output_dir, "--report_to", REPORT_TO) == 0
    assert decoding.decode_compiled._cache_size() == before + 1
    return output_dir


def interrupt(monkeypatch, step, act):
    """Call `act` right after a step of training."""
    add = metrics.Meter.add

    def add_and_act(self, n, values):
        add(self, n, values)
        if n == step:
            act()

    monkeypatch.setattr(metrics.Meter, "add", add_and_act)


def kill():
    raise RuntimeError("killed")


# ---------------------------------------------------------------- samples


@pytest.mark.slow
def test_a_sample_is_made_at_each_evaluation(finished):
    samples = SampleLog(finished).read()
    assert list(samples) == [3, 6, 9]
    assert all(text.startswith("tea") for text in samples.values())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_resumed_run_has_the_samples_of_a_whole_one(how, run, finished, tmp_path, monkeypatch):
    """Killed after step 7: the sample of step 6 is there, the newest checkpoint is of step 4."""
    output_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        if how == "stopped":
            interrupt(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
            assert run(output_dir, "--save_every", "4") == 143
        else:
            interrupt(patch, 7, kill)
            with pytest.raises(RuntimeError, match="killed"):
                run(output_dir, "--save_every", "4")
            SampleLog(output_dir).put(8, "from after the checkpoint")
    assert run(output_dir, "--save_every", "4") == 0
    assert (output_dir / "samples.txt").read_bytes() == (finished / "samples.txt").read_bytes()


@pytest.mark.slow
def test_a_run_without_held_out_text_has_samples_and_curves_too(run, tmp_path, monkeypatch):
    drawn = []
    draw = "gpt2_flax.training.train.plots.draw"
    monkeypatch.setattr(draw, lambda rows, path: drawn.append(len(rows)) or path.write_bytes(b""))
    assert run(tmp_path, "--validation_share", "0", "--max_steps", "6") == 0
    assert list(SampleLog(tmp_path).read()) == [3, 6]
    assert drawn == [1, 3]  # at steps 3 and 6; the end has nothing to add


@pytest.mark.slow
def test_no_sample_is_made_if_none_is_wanted(run, tmp_path, capsys):
    assert run(tmp_path, "--sample_tokens", "0", "--sample_prompt", "", "--max_steps", "3") == 0
    assert not (tmp_path / "samples.txt").exists()
    assert "a sample" not in capsys.readouterr().out
    with pytest.raises(UserError, match="sample_prompt has no effect with sample_tokens 0"):
        run(tmp_path / "other", "--sample_tokens", "0")


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(UserError, match="sample_prompt is 24 tokens long"):
        run(tmp_path / "run", "--sample_prompt", "x" * 24)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- traces


@pytest.mark.slow
def test_a_trace_of_steps_of_a_resumed_run(run, tmp_path, monkeypatch, capsys):
    """Stopped at step 4, it goes on with 5: of the steps 3 to 6, two are in either trace."""
    flags = ("--profile", "3:6", "--sample_tokens", "0", "--sample_prompt", "")
    with monkeypatch.context() as patch:
        interrupt(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        assert run(tmp_path, *flags) == 130
    assert read_steps(tmp_path) == [3, 4]
    (first,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()
    first.rename(tmp_path / "first")
    assert run(tmp_path, *flags) == 0
    assert read_steps(tmp_path) == [5, 6]
    assert "the trace of steps 3:6 is in" in capsys.readouterr().err
    assert run(tmp_path, *flags, "--max_steps", "10") == 0
    assert "these steps were made before; nothing is traced" in capsys.readouterr().err


# ---------------------------------------------------------------- reporters


@pytest.mark.slow
@needs_tensorboard
def test_tensorboard_has_the_rows_of_the_log_and_the_samples(finished):
    shown = read_tensorboard(finished)
    rows = metrics.read_log(finished / "metrics.jsonl")
    for name in ("train_loss", "validation_loss", "learning_rate", "process_peak_memory_bytes"):
        expected = [(row["step"], row[name]) for row in rows if name in row]
        steps, values = zip(*shown[name], strict=True)
        assert list(steps) == [step for step, _ in expected]
        np.testing.assert_allclose(values, [value for _, value in expected], rtol=1e-6)
    samples = {step: text.removeprefix("    ").replace("\n    ", "\n")
               for step, text in shown["sample/text_summary"]}  # fmt: skip
    assert samples == SampleLog(finished).read()


# ---------------------------------------------------------------- at the end


def test_a_run_ends_with_its_report_its_card_and_a_summary_each_time(run, text, tmp_path, capsys):
    output_dir = tmp_path / "run"
    assert run(output_dir, "--max_steps", "3") == 0
    summary = capsys.readouterr().out
    assert len(summary.splitlines()) <= 40
    assert "done: 3 steps, 384 tokens; validation loss " in summary
    page = (output_dir / "report.html").read_text("utf-8")
    picture = base64.b64encode((output_dir / "loss.png").read_bytes()).decode()
    assert picture in page
    assert "2,000 documents" not in page and "1 document, " in page
    assert str(text.parent) not in page  # a path of this machine; its last part may be shown
    card = (output_dir / "README.md").read_text("utf-8")
    assert str(text.parent) not in card and str(tmp_path) not in card
    assert model_card.is_ours(output_dir / "README.md")
    (loss,) = re.findall(r"validation loss (\d\.\d{4})$", summary, re.M)
    assert f"{loss} nats per token" in page and f"{loss} nats per token" in card
    transformers.GPT2LMHeadModel.from_pretrained(output_dir)  # whatever else lies beside it

    # It goes on, and renews its own card; another prompt is sampled.
    assert run(output_dir, "--max_steps", "4", "--sample_prompt", "milk") == 0
    assert "| 4 of 8 rows each |" in (output_dir / "README.md").read_text("utf-8")
    assert SampleLog(output_dir).read()[4].startswith("milk")
    assert "--prompt milk" in capsys.readouterr().out

    # A finished run may say its last words again; a card of somebody's own stays.
    (output_dir / "README.md").write_text("mine")
    assert run(output_dir, "--max_steps", "4", "--sample_prompt", "milk") == 0
    assert (output_dir / "README.md").read_text() == "mine"
    assert "README.md is somebody's own" in capsys.readouterr().err
