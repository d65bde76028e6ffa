"""Ids of text and back; the tokenizer that is saved is the one that was used."""

import concurrent.futures
import json
import random
import re
import shutil
import socket
import sys
from unittest import mock

import numpy as np
import pytest
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from gpt2_flax import hub
from gpt2_flax.data import tokenizers
from gpt2_flax.data.chunking import bytes_to_characters
from gpt2_flax.data.tokenizers import (
    EOS,
    Encoder,
    Tokenizer,
    as_fast,
    byte_level,
    load_saved,
    load_tokenizer,
    make_tokenizer,
    train_bpe,
)
from gpt2_flax.errors import UserError
from tests.data.test_chunking import (
    BYTE_LEVEL,
    OTHER,
    SHARED_GPT2,
    fuzz,
    like_bert,
    many_examples,
    texts,
)

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


def test_end_of_text_is_one_token_and_no_text_is_none(tokenizer):
    assert tokenizer.encode("").shape == (0,)
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


# ---------------------------------------------------------------- ids by the word


@pytest.fixture(scope="module", params=BYTE_LEVEL | OTHER)
def any_tokenizer(request):
    return (BYTE_LEVEL | OTHER)[request.param]()


@pytest.fixture
def encoder():
    return Encoder(train_bpe([fuzz(seed) for seed in range(20)], 700))


def check_ids(encoder: Encoder, batch: list[str]):
    """That ids are those that the tokenizers library gives for each whole text."""
    encodings = encoder.backend.encode_batch(batch, add_special_tokens=False)
    for found, encoding in zip(encoder.encode_batch(batch), encodings, strict=True):
        assert found.dtype == np.int32 and found.flags.writeable
        assert found.tolist() == encoding.ids


@pytest.mark.slow(but_every=3)
@many_examples
@given(batch=st.lists(texts, max_size=4), longest=st.integers(0, 9), most=st.integers(0, 5000))
@example(
    batch=["x\u180e y\x1c z\u200b \x85 a\u2028 b\u0378 c", " \t", "a  \n"], longest=9, most=999
)
@example(
    batch=["a\xa0 b\u3000  c\x0b \x0b d\x1c\n\n'", "\u205f \u205f \u1680"], longest=9, most=999
)
def test_ids_are_those_of_the_tokenizers_library(any_tokenizer, batch, longest, most):
    with mock.patch.multiple(tokenizers, LONGEST_KEPT_CHARS=longest, MOST_KEPT_BYTES=most):
        for _ in range(2):
            check_ids(any_tokenizer.encoder, batch)
            assert any_tokenizer.encoder.kept_bytes <= max(most, 5000)


def test_words_end_where_no_token_crosses(encoder):
    assert encoder.split("  f(x_1)+=12ab, don't''s \n\n\tna\xefve,b c\u0301(d ") == [
        *("  f", "(", "x", "_1)+=12", "ab", ",", " don", "'t''s"),
        *(" \n\n\tna\xefve,b", " c\u0301(d", " "),
    ]
    assert encoder.split("(a-b)\x0bc  \xe9 \U0001d7d8 d") == [
        "(", "a", "-", "b", ")\x0bc", "  \xe9", " \U0001d7d8", " d",
    ]  # fmt: skip
    # An added token is one, so a text that holds it is split at spaces alone.
    assert encoder.split(f"a,b\n{EOS}c (d)") == ["a,b", f"\n{EOS}c", " (d)"]


def test_what_may_be_white_space_is_not_torn_from_the_space_behind_it(encoder):
    for doubtful in "\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u3000\u0378\0":
        for text in (f"\xe4{doubtful} {doubtful} \nb", f"{doubtful}\n{EOS}"):
            assert encoder.split(f"{text} c") == [text, " c"]


def test_a_word_is_asked_for_once(encoder):
    asked = []
    real = encoder.ask
    encoder.ask = lambda words: asked.append(sorted(words)) or real(words)
    check_ids(encoder, ["the cat and the dog", "the end"])
    check_ids(encoder, ["the end and the dog"])
    check_ids(encoder, ["the cow", "the the", " the end"])
    # A batch asks once for all that it lacks: that is done by several threads.
    words = [" and", " cat", " dog", " end", " the", "the"]
    assert asked == [words, [" cow"]]


def test_long_words_are_not_kept(encoder):
    longest = "x" * (tokenizers.LONGEST_KEPT_CHARS - 1)
    check_ids(encoder, [f"a {longest} {longest}x b"])
    assert encoder.kept.keys() == {"a", f" {longest}", " b"}


def test_what_is_kept_is_bounded(encoder):
    words = [
        "word" + "".join("abcdefghij"[int(digit)] for digit in f"{n:04}") for n in range(1000)
    ]
    encoder.encode_batch(words[:1])
    per_word = encoder.kept_bytes
    assert 140 < per_word < 200
    with mock.patch.object(tokenizers, "MOST_KEPT_BYTES", 100 * per_word):
        n_kept = []
        for start in range(0, 1000, 30):
            check_ids(encoder, words[start : start + 30])
            assert encoder.kept_bytes <= 100 * per_word
            n_kept.append(len(encoder.kept))
        assert {30, 60, 90} <= {*n_kept} and max(n_kept) < 110
        check_ids(encoder, words)  # more at once than may be kept
        assert not encoder.kept and not encoder.kept_bytes


@pytest.mark.parametrize("name", ["bytes", "BERT"])
def test_what_a_tokenizer_adds_to_a_text_is_left_out(name):
    """BERT's puts a token before each text, Llama 3's, too."""
    tokenizer = (BYTE_LEVEL | OTHER)[name]()
    before = tokenizer.encode("some text").tolist()
    backend = tokenizer.fast.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, tokenizer.eos_id)]
    )
    assert backend.encode("some text").ids == [tokenizer.eos_id, *before]
    assert Encoder(backend).encode_batch(["some text"])[0].tolist() == before


def test_threads_can_share_a_tokenizer(encoder):
    batches = [[fuzz(seed % 7, 300), fuzz(seed % 5, 300)] for seed in range(60)]
    expected = [[ids.tolist() for ids in encoder.encode_batch(batch)] for batch in batches]
    fresh = Encoder(encoder.backend)
    with (
        mock.patch.object(tokenizers, "MOST_KEPT_BYTES", 20_000),
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        for found, ids in zip(threads.map(fresh.encode_batch, batches), expected, strict=True):
            assert [of_text.tolist() for of_text in found] == ids


def test_a_tokenizer_s_json_is_enough_to_encode(any_tokenizer):
    copy = Encoder.from_json(any_tokenizer.to_json())
    assert copy.splits == any_tokenizer.encoder.splits
    for text in TEXTS:
        np.testing.assert_array_equal(copy.encode_batch([text])[0], any_tokenizer.encode(text))


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
        Tokenizer.of_fast(as_fast(rules), "rules"),
    ]
    assert len({bpe.fingerprint, *(other.fingerprint for other in others)}) == 5


# ---------------------------------------------------------------- files


def test_code_and_paths_of_others_are_not_saved(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "theirs")
    path = tmp_path / "theirs" / "tokenizer_config.json"
    templates = [{"name": name, "template": "{{ x }}"} for name in ("default", "../up", "ok")]
    more = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "chat_template": templates}
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    load_tokenizer(str(path.parent)).save(tmp_path / "a" / "ours")
    assert "auto_map" not in (tmp_path / "a" / "ours" / "tokenizer_config.json").read_text()
    names = {path.name for path in tmp_path.rglob("*.jinja")}
    assert names == {"chat_template.jinja", "ok.jinja"}


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


def test_a_run_s_own_tokenizer_is_loaded_as_it_was_saved(tmp_path, any_tokenizer):
    any_tokenizer.save(tmp_path)
    ours = load_saved(tmp_path)
    assert "fast" not in vars(ours)  # without transformers
    assert_same(ours, any_tokenizer)
    assert_same(load_tokenizer(str(tmp_path)), ours)
    text = "It's 12 small-ish words;\n\tand a tab."
    assert ours.encode(text).tolist() == any_tokenizer.encode(text).tolist()
    assert ours.decode(ours.encode(text)) == any_tokenizer.decode(any_tokenizer.encode(text))
    ours.save(tmp_path / "again")
    assert_same(load_saved(tmp_path / "again"), any_tokenizer)


@pytest.mark.parametrize("settings", ["", "[]", "{}", '{"eos_token": {"content": "x"}}'])
def test_a_run_s_own_tokenizer_is_left_to_transformers_where_it_is_not_plain(
    tmp_path, tokenizer, settings
):
    tokenizer.save(tmp_path)
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    else:
        (tmp_path / "tokenizer_config.json").unlink()
    try:
        expected = load_tokenizer(str(tmp_path))
    except UserError as error:
        with pytest.raises(UserError, match=re.escape(str(error))):
            load_saved(tmp_path)
    else:
        assert_same(load_saved(tmp_path), expected)


def test_other_files_of_a_tokenizer_are_left_to_transformers(tmp_path):
    make_tokenizer("bytes", []).save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "fast" not in vars(load_saved(tmp_path))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "a"}')
    assert load_saved(tmp_path).eos_id == load_tokenizer(str(tmp_path)).eos_id
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "added_tokens.json").write_text("{damaged")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_saved(tmp_path)


def test_a_file_is_loaded_with_what_lies_beside_it(tmp_path):
    bert = like_bert()
    bert.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "[UNK]"}))
    by_folder, by_file = map(load_tokenizer, (str(tmp_path), str(tmp_path / "tokenizer.json")))
    assert_same(by_file, by_folder)
    assert by_file.eos_id == bert.fast.get_vocab()["[UNK]"] != bert.eos_id


@pytest.mark.parametrize("name", ["tokenizer.json", "mine.json"])
def test_a_file_alone_is_enough_whatever_its_name(tmp_path, tokenizer, name):
    (tmp_path / name).write_text(tokenizer.to_json(), "utf-8")
    # A directory is searched for tokenizer.json; another name is given as a file.
    path = str(tmp_path if name == "tokenizer.json" else tmp_path / name)
    loaded = make_tokenizer(path, [])
    assert_same(loaded, tokenizer)
    assert loaded.name == path


@pytest.mark.parametrize("name", OTHER)
def test_tokenizers_of_other_kinds_are_loaded(tmp_path, name):
    saved = OTHER[name]()
    saved.save(tmp_path)
    assert_same(load_tokenizer(str(tmp_path)), saved)


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0:DeprecationWarning")  # transformers 5.9
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
    tokenizer = Tokenizer.of_fast(as_fast(inner), "gaps")
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


# ---------------------------------------------------------------- the hub


def test_what_the_hub_s_cache_holds_is_loaded_without_a_connection(
    tmp_path, monkeypatch, tokenizer
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--nobody--something"
    tokenizer.save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    # Else nothing would be tried anyway, and not a second time.
    if of_callers := sys.modules.get("huggingface_hub.utils._detect_agent"):
        monkeypatch.setattr(of_callers, "_registry", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    tried = []

    def refuse(*arguments):
        tried.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = load_tokenizer("nobody/something")
    assert tried == []
    assert_same(loaded, tokenizer)
    assert loaded.name == "nobody/something"


@pytest.mark.parametrize("there", [True, False])
def test_what_the_cache_lacks_comes_from_the_hub_if_it_answers(monkeypatch, tokenizer, there):
    def from_pretrained(name):
        if not there:
            raise OSError(f"{name} is unknown")
        return tokenizer.fast

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", from_pretrained)
    if there:
        assert_same(load_tokenizer("some/thing"), tokenizer)
    else:
        with pytest.raises(UserError, match=r"^tokenizer some/thing: some/thing is unknown\n"):
            load_tokenizer("some/thing")


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
        (without_end_of_text, r" has no end-of-text token\n  set eos_token in a tokenizer_config"),
    ],
    ids=["empty directory", "merges only", "damaged", "of no kind", "no end-of-text"],
)
def test_places_without_a_usable_tokenizer_are_named(tmp_path, make, message):
    """A directory, and a file in it under its usual name and under another."""
    make(tmp_path)
    places = [tmp_path]
    if (tmp_path / "tokenizer.json").exists():
        places += [tmp_path / "tokenizer.json", tmp_path / "mine.json"]
        shutil.copy(*places[1:])
    for place in places:
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(str(place))
        assert str(place) in str(error.value) and str(error.value).count("\n") <= 1


@pytest.mark.parametrize("name", ["nobody/nothing", "no/name/of/a/repository"])
def test_a_name_that_the_hub_would_know_is_an_error_with_ways_on_offline(name):
    with pytest.raises(UserError, match=rf"^tokenizer {name}: the hub .* cannot") as error:
        load_tokenizer(name)
    for way_on in ("--train_file FILE", "bpe:8192", "bytes", "--config quickstart"):
        assert way_on in str(error.value)
