"""A thousand random configurations: each is refused in few words, or trains a step.

Hypothesis makes them. That a step is trained is tried of the richest in the normal run, of all
with --thorough; of the others it is tried in the normal run that all is there to begin with one.
"""

import contextlib
import io

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from gpt2_flax.config import durations
from gpt2_flax.config.train_config import FIELDS
from gpt2_flax.errors import run_main
from gpt2_flax.training import train
from gpt2_flax.training.setup import make_interval, make_optimizer
from scripts.train import main

# What a person may write, right or wrong. Sizes stay small: some of it is trained.
NUMBERS = ["0", "1", "2", "3", "8", "0.5", "0.1", "1e-3", "-1", "nan", "x", "1e99", ""]
LENGTHS = ["0", "1", "5", "0.3", "2k", "1 epoch", "0.2 epochs", "300 tokens", "1B tokens",
           "2 hours", "1 second", "-3", "9 weeks", "1.5 steps", "0 tokens"]  # fmt: skip
VALUES = {
    **dict.fromkeys(("max_steps", "warmup_steps", "decay_steps"), LENGTHS),
    **dict.fromkeys(("log_every", "eval_every", "save_every"), LENGTHS),
    **dict.fromkeys(("learning_rate", "min_learning_rate", "weight_decay", "beta1"), NUMBERS),
    **dict.fromkeys(("beta2", "adam_epsilon", "grad_clip", "dropout", "epochs"), NUMBERS),
    **dict.fromkeys(("n_layers", "n_heads", "n_embd", "grad_accum", "keep"), NUMBERS),
    **dict.fromkeys(("max_bad_steps", "seed", "pad_vocab_to_multiple_of"), NUMBERS),
    "logits_at_once": ["0", "5", "16", "99", "-1"],
    "batch_size": ["1", "2", "auto", "0", "many"],
    "optimizer": ["adamw", "adafactor", "muon", "lion", "sgd", "adam"],
    "lr_schedule": ["cosine", "linear", "constant", "wsd", "step"],
    "dtype": ["float32", "bfloat16", "float16"],
    "attention": ["auto", "xla", "cudnn", "flash"],
    "kernels": ["auto", "xla", "pallas", "on"],
    "scan_layers": ["true", "false", "3"],
    "remat": ["none", "block", "attention", "all"],
    "parallel": ["pmap", "jit", "fsdp", "none"],
    "shuffle": ["true", "false", "2"],
    "validation_share": ["0", "0.1", "1"],
    "block_size": ["1", "16", "24", "25"],
}
TINY = {
    "n_layers": "1", "n_heads": "2", "n_embd": "8", "n_positions": "24", "block_size": "16",
    "batch_size": "1", "tokenizer": "bytes", "sample_tokens": "0",
}  # fmt: skip


@strategies.composite
def settings(draw):
    """Between one and six settings; half of the time of values that are mostly right."""
    names = draw(strategies.lists(strategies.sampled_from(sorted(VALUES)), min_size=1,
                                  max_size=6, unique=True))  # fmt: skip
    most = draw(strategies.sampled_from([3, 99]))
    chosen = {name: draw(strategies.sampled_from(VALUES[name][:most])) for name in names}
    # By themselves these hardly ever meet what they need.
    if "decay_steps" in chosen:
        chosen["lr_schedule"] = "wsd"
    return chosen


def as_argv(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def check_plan(config):
    """What a run makes of settings before its first step can be made, for any of them."""

    def in_steps(value):
        return durations.in_steps(value, 8, config.block_size, 100)

    total = 50
    schedule, optimizer = make_optimizer(config, total, in_steps)
    rates = np.array([schedule(n) for n in (0, total // 2, total - 1)])
    assert np.isfinite(rates).all() and (rates >= 0).all()
    assert rates.max() <= config.learning_rate * 1.0001
    params = {"transformer": {"h": {"0": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(2)}}}}
    jax.eval_shape(optimizer.init, params)
    for value in (config.log_every, config.eval_every, config.save_every):
        interval = make_interval(value, in_steps)
        assert interval.seconds or interval.steps >= (1 if durations.split(value)[0] else 0)


@pytest.fixture(scope="module")
def outcomes():
    """(settings, configuration or None, what was said) of each of a thousand."""
    found = []

    @hypothesis.settings(
        max_examples=1000, derandomize=True, deadline=None, database=None,
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(settings())
    def start(chosen):
        """The script itself, up to where it would begin to train."""
        configs, said = [], io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
            patch.setattr(train, "train", lambda config: configs.append(config) or 0)
            code = run_main(main, as_argv(TINY | chosen))
        assert code == (0 if configs else 2), chosen
        found.append((chosen, configs[0] if configs else None, said.getvalue()))

    start()
    return found


@pytest.mark.slow
def test_each_is_refused_in_few_words_or_can_be_planned(outcomes):
    assert len(outcomes) == 1000
    accepted = [config for _, config, _ in outcomes if config is not None]
    assert 100 < len(accepted) < 900  # else they try too little
    for config in accepted:
        check_plan(config)
    for chosen, config, said in outcomes:
        faults = said.split("error: ")[1:]
        assert (config is None) == bool(faults), chosen
        assert all(1 <= len(fault.splitlines()) <= 3 for fault in faults), said
        assert len(faults) <= 2 * len(chosen), said
        assert "Traceback" not in said


@pytest.mark.slow
def test_every_setting_that_is_tried_is_one_and_was_accepted_and_refused(outcomes):
    assert set(FIELDS) >= set(VALUES)
    for name in VALUES:
        fine = {chosen[name] for chosen, config, _ in outcomes if config and name in chosen}
        refused = {chosen[name] for chosen, config, _ in outcomes if not config and name in chosen}
        assert fine and refused, name


@pytest.mark.slow
def test_the_accepted_make_a_step_or_say_why_not(outcomes, tmp_path, thorough, capfd):
    text = tmp_path / "text.txt"
    text.write_text("tea milk sugar lemon honey " * 200)
    chosen = [settings for settings, config, _ in outcomes if config]
    chosen.sort(key=len, reverse=True)
    trained = 0
    for n, settings in enumerate(chosen if thorough else chosen[:6]):
        output_dir = tmp_path / str(n)
        argv = as_argv({"max_steps": "1"} | TINY | settings)
        argv += ["--train_file", str(text), "--output_dir", str(output_dir)]
        if one_step_only(settings):
            argv += ["--max_steps=1"]
        code = run_main(main, argv)
        if n % 20 == 19:
            jax.clear_caches()  # a process can map only so many compiled programs
        said = capfd.readouterr().err
        assert "Traceback" not in said, (settings, said)
        assert code in (0, 2), (settings, said)
        if code == 0:
            trained += 1
            assert (output_dir / "model.safetensors").is_file()
        else:  # what only shows with the text at hand
            assert 1 <= len(said.split("error: ")[1].splitlines()) <= 3, (settings, said)
            assert not output_dir.exists()
    assert trained > (100 if thorough else 2)


def one_step_only(settings) -> bool:
    """Whether a length would let the run go on for longer than a test may take."""
    return settings.get("max_steps") not in (None, "1") or "epochs" in settings
