"""Ids of text and back; the tokenizer that is saved is the one that was used."""

import json
import pathlib
import random

import numpy as np
import pytest
import transformers
from tokenizers import models, pre_tokenizers

from gpt2_flax.data.tokenizers import (
    EOS,
    Tokenizer,
    as_fast,
    byte_level,
    bytes_to_characters,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
)
from gpt2_flax.errors import UserError

SHARED_GPT2 = pathlib.Path(__file__).resolve().parents[2] / "shared/data/gpt2-tokenizer"

TEXTS = [
    "Hello world, hello  words!\n\n\tIt's 1999 and we'll go .",
    "na\u00efve \u6f22\u5b57\u304b\u306a \u0645\u0631 \U0001f469\u200d\U0001f680 e\u0301\r\n",
    "\0\x01\x7f\x80\xa0\xad\u2028\ufeff\ufffd\U0010ffff",
    f"a text {EOS}{EOS} that holds the token itself",
    "".join(map(chr, range(0x500))),
    "".join(map(chr, random.Random(3).choices(range(0xE000, 0x11_0000), k=200))),
    " don 't , clean up . these n't spaces ? ",
]  # fmt: skip
CORPUS = [*TEXTS, "the words of the world are the words that we have heard of " * 7]


@pytest.fixture(scope="module", params=["bytes", "bpe:257", "bpe:411"])
def tokenizer(request):
    return make_tokenizer(request.param, CORPUS)


def assert_same(tokenizer, expected):
    """Two tokenizers are one: what they make of text, and what a token file is known by."""
    for text in TEXTS:
        np.testing.assert_array_equal(tokenizer.encode(text), expected.encode(text))
    assert tokenizer.fingerprint == expected.fingerprint
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (expected.eos_id, expected.vocab_size)


# ---------------------------------------------------------------- text <-> ids


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text


def test_ids_of_a_batch_are_the_ids_of_each_text(tokenizer):
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode("").shape == (0,)


def test_end_of_text_is_one_token(tokenizer):
    assert tokenizer.encode(EOS).tolist() == [tokenizer.eos_id]
    assert tokenizer.decode([tokenizer.eos_id]) == EOS


def test_ids_of_bytes_are_the_bytes():
    tokenizer = make_tokenizer("bytes", [])
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11_0000, 64)]))
    assert tokenizer.encode(text).tolist() == [*text.encode()]
    # UTF-8 has no use for these bytes, so no text shows their ids.
    unused = {*range(256)} - {*text.encode()}
    assert unused == {0xC0, 0xC1, *range(0xF5, 0x100)}
    vocabulary = tokenizer.fast.get_vocab()
    assert {vocabulary[bytes_to_characters()[byte]] for byte in unused} == unused
    assert {*bytes_to_characters()} == {*pre_tokenizers.ByteLevel.alphabet()}


# ---------------------------------------------------------------- bpe:N


@pytest.mark.parametrize("size", [257, 300, 411])
def test_bpe_has_the_size_asked_for(size):
    tokenizer = make_tokenizer(f"bpe:{size}", CORPUS)
    vocabulary = tokenizer.fast.get_vocab()
    assert sorted(vocabulary.values()) == [*range(size)]
    assert tokenizer.vocab_size == size
    assert vocabulary[EOS] == tokenizer.eos_id
    n_ids = len(tokenizer.encode(CORPUS[-1]))
    n_bytes = len(CORPUS[-1].encode())
    assert n_ids == n_bytes if size == 257 else n_ids < n_bytes


def test_bpe_is_the_same_for_the_same_text():
    assert_same(make_tokenizer("bpe:411", iter(CORPUS)), make_tokenizer("bpe:411", CORPUS))


def test_fingerprint_changes_with_the_vocabulary_and_the_rules():
    bpe = make_tokenizer("bpe:300", CORPUS)
    rules = train_bpe(CORPUS, 300)
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    others = [
        make_tokenizer("bytes", []),
        make_tokenizer("bpe:301", CORPUS),
        make_tokenizer("bpe:300", CORPUS[:2]),
        Tokenizer(as_fast(rules), "rules"),
    ]
    assert len({bpe.fingerprint, *(other.fingerprint for other in others)}) == 5


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("in_a_model_directory", [False, True])
def test_what_is_saved_is_what_transformers_and_we_load(tmp_path, tokenizer, in_a_model_directory):
    """config.json makes AutoTokenizer pick GPT-2's own class: the ids must not change."""
    tokenizer.save(tmp_path)
    if in_a_model_directory:
        transformers.GPT2Config(n_layer=1, n_head=3, n_embd=12).save_pretrained(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (auto.eos_token_id, auto.eos_token) == (tokenizer.eos_id, EOS)
    assert len(auto) == tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert auto(text)["input_ids"] == ids.tolist()
        assert auto.decode(ids) == text
    assert_same(load_tokenizer(str(tmp_path)), tokenizer)


def test_a_tokenizer_json_alone_is_enough(tmp_path, tokenizer):
    tokenizer.fast.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert_same(make_tokenizer(str(tmp_path), []), tokenizer)


def test_vocabulary_and_merges_alone_are_enough(tmp_path):
    tokenizer = make_tokenizer("bpe:411", CORPUS)
    tokenizer.fast.backend_tokenizer.model.save(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.eos_id, loaded.vocab_size) == (tokenizer.eos_id, 411)
    for text in TEXTS:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
        assert loaded.decode(loaded.encode(text)) == text


def test_settings_that_cut_or_fill_texts_are_left_out(tmp_path):
    """Many a tokenizer.json on the hub carries its model's length along."""
    inner = train_bpe(CORPUS, 300)
    inner.save(str(tmp_path / "tokenizer.json"))
    plain = load_tokenizer(str(tmp_path))
    inner.enable_truncation(5)
    inner.enable_padding(length=5000, pad_id=plain.eos_id, pad_token=EOS)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert "max_length" in (tmp_path / "tokenizer.json").read_text()
    assert_same(load_tokenizer(str(tmp_path)), plain)


def test_every_id_is_below_the_vocabulary_size_though_ids_have_gaps():
    by_character = {char: n for n, char in enumerate(bytes_to_characters())}
    inner = byte_level(models.BPE(vocab=by_character | {"ab": 400}, merges=[("a", "b")]))
    inner.add_special_tokens([EOS])
    tokenizer = Tokenizer(as_fast(inner), "gaps")
    assert tokenizer.encode("abc").tolist() == [400, ord("c")]
    assert tokenizer.vocab_size == 401


@pytest.mark.skipif(not SHARED_GPT2.is_dir(), reason="needs ../shared/data/gpt2-tokenizer")
@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"]])
def test_gpt2s_tokenizer(tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes((SHARED_GPT2 / name).read_bytes())
    gpt2 = load_tokenizer(str(tmp_path))
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    assert gpt2.encode("Hello world\n\n  12").tolist() == [15496, 995, 628, 220, 1105]
    assert gpt2.encode(f"a{EOS}").tolist() == [64, 50256]


# ---------------------------------------------------------------- what cannot be used


def without_end_of_text(folder):
    by_character = {char: n for n, char in enumerate(bytes_to_characters())}
    byte_level(models.BPE(vocab=by_character, merges=[])).save(str(folder / "tokenizer.json"))


def damaged(folder):
    make_tokenizer("bpe:300", CORPUS).save(folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])


def of_no_kind(folder):
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unheard"}}))


def merges_without_vocabulary(folder):
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r" holds no tokenizer: neither tokenizer.json nor vocab.json and m"),
        (merges_without_vocabulary, r" holds no tokenizer: neither tokenizer.json nor "),
        (damaged, r"^cannot read the tokenizer in .*: \S.*"),
        (of_no_kind, r"^cannot read the tokenizer in .*: \S.*"),
        (without_end_of_text, r" has no end-of-text token\n  set eos_token in its tokenizer_conf"),
    ],
    ids=["empty directory", "merges only", "damaged", "of no kind", "no end-of-text"],
)
def test_directories_without_a_usable_tokenizer_are_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(error.value) and str(error.value).count("\n") <= 1


def test_a_name_that_the_hub_would_know_is_an_error_with_ways_on_offline():
    with pytest.raises(UserError, match=r"^tokenizer nobody/nothing: the hub .* cannot") as error:
        load_tokenizer("nobody/nothing")
    for way_on in ("--train_file FILE", "bpe:8192", "bytes", "configs/quickstart.yaml"):
        assert way_on in str(error.value)
