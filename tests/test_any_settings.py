"""A thousand random configurations: each is refused in few words, or is one that can be run."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_flax import durations
from gpt2_flax.config import FIELDS, load_config
from gpt2_flax.errors import UserError
from gpt2_flax.plan import make_interval, make_optimizer
from gpt2_flax.train import train

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
    "batch_size": ["1", "2", "auto", "0", "many"],
    "optimizer": ["adamw", "adafactor", "muon", "lion", "sgd", "adam"],
    "lr_schedule": ["cosine", "linear", "constant", "wsd", "step"],
    "dtype": ["float32", "bfloat16", "float16"],
    "remat": ["none", "block", "attention", "all"],
    "parallel": ["pmap", "jit", "none"],
    "shuffle": ["true", "false", "2"],
    "validation_share": ["0", "0.1", "1"],
    "block_size": ["1", "16", "24", "25"],
}
TINY = {
    "n_layers": "1", "n_heads": "2", "n_embd": "8", "n_positions": "24", "block_size": "16",
    "batch_size": "1", "tokenizer": "bytes", "sample_tokens": "0",
}  # fmt: skip


def random_settings(rng):
    """Between one and six settings; half of the time of values that are mostly right."""
    names = rng.sample(sorted(VALUES), rng.randint(1, 6))
    most = rng.choice([3, 99])
    chosen = {name: rng.choice(VALUES[name][:most]) for name in names}
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
    """(settings, configuration or None) of each of a thousand."""
    rng, found = random.Random(0), []
    for _ in range(1000):
        settings = random_settings(rng)
        try:
            found.append((settings, load_config(as_argv(TINY | settings))))
        except UserError as error:
            faults = str(error).split("\nerror: ")
            assert all(1 <= len(fault.splitlines()) <= 3 for fault in faults), settings
            assert len(faults) <= 2 * len(settings), settings
            found.append((settings, None))
    return found


def test_each_is_refused_or_can_be_planned(outcomes):
    accepted = [config for _, config in outcomes if config is not None]
    assert 100 < len(accepted) < 900  # else they try too little
    for config in accepted:
        check_plan(config)


def test_every_setting_that_is_tried_is_one_and_was_accepted_and_refused(outcomes):
    assert set(FIELDS) >= set(VALUES)
    for name in VALUES:
        fine = {settings[name] for settings, c in outcomes if c is not None and name in settings}
        refused = {settings[name] for settings, c in outcomes if c is None and name in settings}
        assert fine and refused, name


def test_some_of_the_accepted_make_a_step(outcomes, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("tea milk sugar lemon honey " * 200)
    lengths = {"max_steps", "epochs", "batch_size", "block_size", "seed"}
    chosen = [settings for settings, c in outcomes if c and lengths.isdisjoint(settings)]
    rich = sorted(chosen, key=len, reverse=True)[:2]
    assert min(map(len, rich)) >= 4
    for n, settings in enumerate(rich):
        argv = as_argv(TINY | settings | {"max_steps": "1"})
        argv += ["--train_file", str(text), "--output_dir", str(tmp_path / str(n))]
        assert train(load_config(argv)) == 0
        assert (tmp_path / str(n) / "model.safetensors").is_file()
