"""The same training by this project and by PyTorch, at a tiny size."""

import functools
import json
import sys

import jax
import pytest
import torch

from gpt2_flax.errors import NumericsError
from gpt2_flax.evaluation import parity
from gpt2_flax.training import optim
from tests.test_errors import check_refusal, run_script
from tests.text_fixtures import refused, write

TEXT = "The tea is in the pot, and the milk is in the jug. " * 60


@pytest.fixture
def settings(tmp_path):
    return {
        "n_layers": 2, "n_heads": 3, "n_embd": 12, "block_size": 7, "batch_size": 1, "steps": 30,
        "learning_rate": 1e-2, "seed": 1, "tokenizer": "bytes",
        "output_dir": str(tmp_path / "out"),
        "train_file": [str(write(tmp_path / "text.txt", TEXT))],
    }  # fmt: skip


@pytest.mark.slow
def test_both_learn_the_same(settings, tmp_path):
    result = parity.run(settings)
    assert json.loads((tmp_path / "out" / "parity.json").read_text()) == result
    assert (tmp_path / "out" / "parity.png").read_bytes().startswith(b"\x89PNG")
    assert result["settings"]["rows"] == 8  # one on each of the devices
    assert len(result["losses"]) == len(result["losses_torch"]) == 30
    assert result["first_loss"] - result["last_loss"] > 1  # there was something to part over
    assert 0 < result["largest_gap"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("what", ["learning rate", "weight decay", "clipping", "a weight"])
def test_a_training_that_differs_is_found(settings, tmp_path, monkeypatch, what):
    if what == "learning rate":
        given = parity.learning_rate
        monkeypatch.setattr(parity, "learning_rate", lambda n, *rest: given(n + 1, *rest))
    elif what == "weight decay":
        everything = functools.partial(jax.tree.map, lambda leaf: True)
        monkeypatch.setattr(optim, "decay_mask", everything)
        settings["learning_rate"] = 0.05
    elif what == "clipping":
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: 0 * norm)
    else:
        given = parity.open_oracle

        def open_and_change(folder):
            oracle = given(folder)
            with torch.no_grad():
                oracle.transformer.wte.weight *= 1.1
            return oracle

        monkeypatch.setattr(parity, "open_oracle", open_and_change)
    with refused("the losses differ by up to .*; 0.001 is allowed\n", NumericsError):
        parity.run(settings)
    result = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert result["largest_gap"] > 1e-3  # what shows it is written all the same


@pytest.mark.parametrize("steps", [1, 2, 20, 21, 200])
def test_the_two_schedules_are_one(steps):
    warmup = min(parity.WARMUP_STEPS, steps)
    ours = optim.make_schedule("cosine", 3e-3, 3e-4, warmup, steps)
    for n in range(steps):
        assert parity.learning_rate(n, 3e-3, steps) == pytest.approx(float(ours(n)), rel=1e-5)


def test_without_pytorch_it_says_what_to_install(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with refused("PyTorch, which is not installed\n  pip install torch"):
        parity.run(settings)


def test_all_bad_settings_come_at_once(settings):
    with pytest.raises(ValueError, match="steps must be") as error:
        parity.run(settings | {"steps": 0, "learning_rate": -1.0, "seed": -1})
    assert str(error.value).count("error: ") == 2
    with refused("n_embd 12 is not divisible by n_heads 5"):
        parity.run(settings | {"n_heads": 5})


def test_a_bad_flag_ends_with_2(tmp_path):
    process = run_script("parity", "--step", "3", "--output_dir", tmp_path / "out")
    assert (process.returncode, process.stdout) == (2, "")
    check_refusal(process.stderr, "unknown flag --step\n  did you mean --steps")
    assert not (tmp_path / "out").exists()
