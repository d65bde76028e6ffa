"""samples.txt and what is put into it."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_flax import FlaxGPT2LMHeadModel
from gpt2_flax.distributed import parallel
from gpt2_flax.errors import StorageError, UserError
from gpt2_flax.generation import decoding
from gpt2_flax.reporting.samples import SampleLog, Sampler, printable


class Letters:
    """A tokenizer of the ids 1 to 30 as letters; 0 ends a text."""

    eos_id = 0

    def encode(self, text):
        return np.array([ord(letter) - ord("@") for letter in text], np.int32)

    def decode(self, ids):
        return "".join(chr(64 + int(n)) for n in ids)


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config(n_layer=1, n_positions=24)


@pytest.fixture(scope="module")
def params(config):
    # Far from uniform, so that noise and parameters both show.
    params = FlaxGPT2LMHeadModel(config).params
    return jax.tree.map(lambda leaf: leaf * 8, params)


def make_sampler(config, prompt="AB", n_tokens=15, seed=3):
    return Sampler(config, jnp.float32, Letters(), prompt, n_tokens, seed)


def test_a_sample_depends_on_parameters_seed_and_step_and_is_compiled_once(config, params):
    sampler = make_sampler(config)
    before = decoding.decode_compiled._cache_size()
    texts = [sampler.sample(params, step) for step in (5, 6)]
    assert all(text.startswith("AB") for text in texts)
    assert len(set(texts)) == 2
    assert sampler.sample(jax.tree.map(jnp.negative, params), 5) != texts[0]
    assert decoding.decode_compiled._cache_size() == before + 1
    assert make_sampler(config).sample(params, 5) == texts[0]
    assert make_sampler(config, seed=4).sample(params, 5) != texts[0]


@pytest.mark.slow
def test_a_state_on_eight_devices_gives_the_sample_of_one_and_lives_on(config, params):
    expected = make_sampler(config).sample(params, 2)
    replicated = parallel.replicate(lambda tree: tree, params)
    assert len(jax.tree.leaves(replicated)[0].sharding.device_set) == 8
    assert make_sampler(config).sample(parallel.whole(replicated), 2) == expected
    # As the step does: what was sampled from is donated afterwards.
    jax.jit(lambda tree: jax.tree.map(jnp.add, tree, tree), donate_argnums=0)(replicated)
    assert jax.tree.leaves(replicated)[0].is_deleted()


def test_without_a_prompt_a_new_text_begins(config, params):
    sampler = make_sampler(config, prompt="", n_tokens=4)
    assert 0 < len(sampler.sample(params, 1)) <= 4


def test_a_sample_takes_what_room_the_prompt_leaves(config):
    assert make_sampler(config, prompt="A" * 20).n_tokens == 4
    assert make_sampler(config, prompt="A" * 23).n_tokens == 1
    with pytest.raises(UserError, match=r"24 tokens long, and the model has 24 .*\n  shorten"):
        make_sampler(config, prompt="A" * 24)


# ---------------------------------------------------------------- the file


ODD = "one\n\nstep 3\n    indented\u2028line\x85separators\ttab\n"


def test_samples_are_read_as_they_were_put_whatever_they_say(tmp_path):
    log = SampleLog(tmp_path)
    assert log.read() == {}
    log.put(2, ODD)
    log.put(10, "")
    log.put(4, "four")
    assert list(log.read().items()) == [(2, ODD), (4, "four"), (10, "")]
    log.put(4, "again")
    assert log.read()[4] == "again"
    assert os.listdir(tmp_path) == ["samples.txt"]


def test_the_file_is_for_people(tmp_path):
    log = SampleLog(tmp_path)
    log.put(1, "a\nb")
    log.put(20, "c")
    assert log.path.read_text() == "step 1\n    a\n    b\n\nstep 20\n    c\n"


def test_samples_after_a_step_are_forgotten(tmp_path):
    log = SampleLog(tmp_path)
    log.forget_after(0)
    assert os.listdir(tmp_path) == []
    for step in (1, 2, 3):
        log.put(step, ODD)
    log.forget_after(2)
    assert log.read() == {1: ODD, 2: ODD}


def test_foreign_lines_are_no_samples(tmp_path):
    log = SampleLog(tmp_path)
    log.path.write_bytes(b"    lost\nstep x\nstep 1\n    a\nstep 2 \n    b\n\xff\n")
    assert log.read() == {1: "a\nb"}


def test_a_file_that_cannot_be_written_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*samples\.txt"):
        SampleLog(tmp_path / "missing").put(1, "x")


def test_control_characters_are_shown_and_not_sent():
    assert printable("a\x1b[2J\x00b\tc\r\nd\re\x7f\x9b") == "a␛[2J␀b\tc\nd␍e��"
    assert printable("día 日本 👩‍👩‍👧 \u2028") == "día 日本 👩‍👩‍👧 \u2028"
    printable("\ud800").encode()
