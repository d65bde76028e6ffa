"""Wherever a text is cut, the ids of the pieces are the ids of the whole."""

import contextlib
import itertools
import json
import pathlib
import random
import re
from unittest import mock

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from gpt2_flax.data import chunking
from gpt2_flax.data.chunking import ByteLevelCuts, VerifiedCuts, cut_up, make_cuts
from gpt2_flax.data.tokenizers import (
    EOS,
    Tokenizer,
    as_fast,
    byte_level,
    load_tokenizer,
    make_tokenizer,
)

SHARED_GPT2 = pathlib.Path(__file__).resolve().parents[3] / "shared/data/gpt2-tokenizer"

# What a rule treats in its own way, or what tables of Unicode could disagree about.
SPACES = [
    *"    \n\n\n\t\r", "  ", "\n\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0",
    "\u1680", "\u180e", "\u2003", "\u200b", "\u2028", "\u202f", "\u205f", "\u3000", "\ufeff",
]  # fmt: skip
CONTRACTIONS = [*"''''\u2019strevmldSLL", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'LL"]
OTHERS = [
    *"aabZ109.,-!_\0", "the", " the", "\xe9", "e\u0301", "\u0301", "\u2167", "\u00b2", "\u0663",
    "\u0e53", "\u0939\u093f", "\u0e01\u0e33\u0e25", "\u6f22", "\u5b57", "\u3001", "\u3042\u304b",
    "\U00020000", "\U0001d7d8", "\U0001f600", "\U0001f469\u200d\U0001f680", "\ufe0f", "\u0378",
    "\U0003fffd", "\ue000", "\ufffd", "\ua7ae", "\u1c89", EOS, EOS, EOS[:7], EOS[7:],
]  # fmt: skip
anything = st.integers(0, 0x10FFFF - 0x800).map(lambda n: chr(n if n < 0xD800 else n + 0x800))
texts = st.lists(
    st.one_of(*map(st.sampled_from, (SPACES, CONTRACTIONS, OTHERS)), anything), max_size=40
).map("".join)
many_examples = settings(max_examples=300, derandomize=True, deadline=None, database=None)


def fuzz(seed: int, n: int = 2000) -> str:
    return "".join(random.Random(seed).choices([*SPACES, *CONTRACTIONS, *OTHERS], k=n))


def trained(model, trainer, normalizer=None, splitter=None) -> Tokenizer:
    inner = tokenizers.Tokenizer(model)
    if normalizer:
        inner.normalizer = normalizer
    if splitter:
        inner.pre_tokenizer = splitter
    inner.train_from_iterator([fuzz(seed) for seed in range(20)], trainer)
    return Tokenizer.of_fast(as_fast(inner), "trained")


def like_llama_2():
    """Merges over the whole text, and a mark before it: no cut gives the same ids."""
    mark = "\u2581"
    before = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<unk>", EOS], show_progress=False, limit_alphabet=300
    )
    return trained(models.BPE(unk_token="<unk>", fuse_unk=True), trainer, before)


def like_llama_3():
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    return trained(models.BPE(), trainer, splitter=splitter)


def like_bert():
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[UNK]", EOS], show_progress=False
    )
    model = models.WordPiece(unk_token="[UNK]")
    return trained(model, trainer, normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer())


def gpt2s_own():
    if not SHARED_GPT2.is_dir():
        pytest.skip("needs ../shared/data/gpt2-tokenizer")
    return load_tokenizer(str(SHARED_GPT2))


BYTE_LEVEL = {
    "bytes": lambda: make_tokenizer("bytes", []),
    "bpe:700": lambda: make_tokenizer("bpe:700", [fuzz(seed) for seed in range(20)]),
    "GPT-2": gpt2s_own,
}
OTHER = {"Llama 2": like_llama_2, "Llama 3": like_llama_3, "BERT": like_bert}


@pytest.fixture(scope="module", params=BYTE_LEVEL | OTHER)
def tokenizer(request):
    return (BYTE_LEVEL | OTHER)[request.param]()


@pytest.fixture(scope="module")
def bpe():
    return BYTE_LEVEL["bpe:700"]()


def pieces_of(n_chars: int, longest: int = chunking.LONGEST_PIECE_CHARS):
    """Pieces of a few characters instead of thousands."""
    return mock.patch.multiple(chunking, PIECE_CHARS=n_chars, LONGEST_PIECE_CHARS=longest)


def stream(text: str, chosen, block: int) -> list[str]:
    """The pieces of a text that comes in blocks, as from a file."""
    pieces, held = [], ""
    for start in range(0, len(text) + block, block):
        held += text[start : start + block]
        while cut := chosen.first_cut(held, 0, ends=start >= len(text)):
            pieces.append(held[:cut])
            held = held[cut:]
    assert held == ""
    return pieces


def ids_of(tokenizer, texts: list[str]) -> list[int]:
    """By the tokenizers library itself, not by our encoder."""
    encode = tokenizer.fast.backend_tokenizer.encode_batch
    return [id for found in encode(texts, add_special_tokens=False) for id in found.ids]


# ---------------------------------------------------------------- any text, any tokenizer


@many_examples
@given(text=texts, n_chars=st.integers(1, 16))
@example(text="''s-'s'ss'rest're 're're", n_chars=1)
@example(text="x\u180e y\x1c z\u200b \x85 a\u2028 b\u0378 c", n_chars=1)
@example(text=f"a{EOS}{EOS}b {EOS} 's{EOS}'s", n_chars=1)
@example(text="12\u00b2\u0663a\u03012\u0301-\u2167x\ua7ae7\u1c89", n_chars=1)
def test_ids_of_the_pieces_are_the_ids_of_the_whole(tokenizer, text, n_chars):
    chosen = tokenizer.cuts
    with pieces_of(n_chars):
        pieces = list(cut_up(text, chosen))
        for n in {1, len(pieces) // 2, len(pieces) - 1} & {*range(len(pieces))}:
            assert list(cut_up("".join(pieces[n:]), chosen)) == pieces[n:]
    assert "".join(pieces) == text and "" not in pieces
    assert chosen.forced == 0
    assert ids_of(tokenizer, pieces) == ids_of(tokenizer, [text])


@many_examples
@given(text=texts, n_chars=st.integers(1, 8), longest=st.integers(8, 30), block=st.integers(1, 20))
def test_text_that_comes_bit_by_bit_is_cut_at_the_same_places(bpe, text, n_chars, longest, block):
    with pieces_of(n_chars, longest):
        whole, bitwise = make_cuts(bpe), make_cuts(bpe)
        pieces = list(cut_up(text, whole))
        assert stream(text, bitwise, block) == pieces
    assert bitwise.forced == whole.forced
    assert whole.forced <= sum(len(piece) == longest for piece in pieces)
    if not whole.forced:
        assert ids_of(bpe, pieces) == ids_of(bpe, [text])


def test_many_cuts_are_made():
    """The property above would hold without any."""
    text = fuzz(1)
    for name, at_least in {"bytes": 1400, "bpe:700": 900}.items():
        with pieces_of(1):
            assert len(list(cut_up(text, BYTE_LEVEL[name]().cuts))) > at_least
    words = "words 12 and more words, and more! " * 9
    for name in ("Llama 3", "BERT"):
        with pieces_of(1):
            assert len(list(cut_up(words, OTHER[name]().cuts))) == 1 + 4 * 9


@pytest.mark.parametrize("name", ["GPT-2", "Llama 3"])
def test_long_texts(name):
    text = "".join(f"{fuzz(seed, 50)} and then the words went on to say so " for seed in range(99))
    tokenizer = (BYTE_LEVEL | OTHER)[name]()
    with pieces_of(400):
        pieces = list(cut_up(text, tokenizer.cuts))
    assert max(map(len, pieces)) <= 400 and "".join(pieces) == text
    assert ids_of(tokenizer, pieces) == ids_of(tokenizer, [text])


def test_a_text_that_is_short_enough_is_one_piece(bpe):
    with pieces_of(7):
        assert [*cut_up("a b c d", bpe.cuts)] == ["a b c d"]
        assert [*cut_up("a b c d ", bpe.cuts)] == ["a b c d", " "]
        assert [*cut_up("a b c de", bpe.cuts)] == ["a b c", " de"]
        assert [*cut_up("", bpe.cuts)] == []


# ---------------------------------------------------------------- the rules of byte-level BPE

BETWEEN_PARTS = ByteLevelCuts([], np.zeros((256, 256), bool))


def test_where_parts_end():
    with pieces_of(1):
        pieces = list(
            cut_up("don't stop12 abc--'s (x) \u6f22\u5b57\u3001e\u0301\n\n 're", BETWEEN_PARTS)
        )
    assert pieces == [
        "don", "'t", " stop", "12", " abc", "--'s", " (", "x", ")", " \u6f22\u5b57", "\u3001",
        "e", "\u0301", "\n\n 're",
    ]  # fmt: skip


def test_what_is_sure_about_characters_is_so_in_the_tokenizers_library():
    """Its table of Unicode is another than Python's."""
    kinds = chunking.kinds_of_characters()
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str

    def characters(kind, but=0):
        codes = np.flatnonzero((kinds & (kind | but)) == kind)
        return "".join(map(chr, codes))

    assert len(split(characters(chunking.LETTER | chunking.SOLID))) == 1
    assert len(split(characters(chunking.NUMBER | chunking.SOLID))) == 1
    signs = characters(chunking.SIGN | chunking.SOLID, but=chunking.APOSTROPHE)
    assert len(split(signs)) == 1
    solid = characters(chunking.SOLID)
    assert len(split(" ".join(solid))) == len(solid)
    blank = characters(chunking.SIGN, but=chunking.SOLID)
    assert {*" \t\r\n\xa0\u3000"} <= {*blank} and len(blank) < 30
    for char in blank:
        assert len(split(f"a{char}")) == len(split(f"1{char}")) == 2
    assert characters(chunking.SPACE) == "\t\n\r "
    assert characters(chunking.APOSTROPHE) == "'"
    # Most of what is written, or it would be of no use.
    n_letters = len(characters(chunking.LETTER))
    assert (n_letters > 80_000, len(signs) > 4000, len(solid) - n_letters > 8000) == (True,) * 3
    assert all(
        kinds[ord(char)] & chunking.LETTER for char in "a\xe9\u0436\u6f22\u3042\ud55c\u0e01"
    )
    # A letter and a number that older tables than Python's don't have.
    assert [*kinds[[0xA7AE, 0x1D2E0]]] == [chunking.SOLID] * 2


def test_bytes_that_stand_side_by_side_in_no_token():
    stand_in = chunking.bytes_to_characters()
    tokens = [b"ab", b"bcd", b" \xff\x00", b"z"]
    vocabulary = ["".join(stand_in[byte] for byte in token) for token in tokens] + ["\u6f22ac"]
    together = np.argwhere(~chunking.never_side_by_side(vocabulary))
    pairs = {pair for token in [*tokens, b"ac"] for pair in itertools.pairwise(token)}
    assert {*map(tuple, together.tolist())} == pairs


def test_a_run_of_letters_is_cut_where_no_token_crosses(bpe):
    """Chinese has few spaces. Here no token is longer than a character."""
    text = "".join(map(chr, random.Random(1).choices(range(0x4E00, 0x9FA5), k=999)))
    chosen = make_tokenizer("bpe:400", [text[:300]] * 2).cuts
    with pieces_of(8):
        pieces = list(cut_up(text, chosen))
        assert max(map(len, pieces)) <= 8 < 80 < len(pieces)
        assert [*cut_up("a" * 99, make_tokenizer("bpe:258", ["aaaa"]).cuts)] == ["a" * 99]


def test_no_added_token_is_torn(bpe):
    """Though a cut would be safe inside of one if it were plain text."""
    by_bytes = BYTE_LEVEL["bytes"]().cuts
    with pieces_of(1):
        assert [*cut_up(f"{EOS}-x{EOS}{EOS}x", by_bytes)] == [EOS, "-", "x", EOS, EOS, "x"]
        assert [*cut_up(EOS, BETWEEN_PARTS)] == ["<|", "endoftext", "|>"]
        assert [*cut_up(EOS * 3, bpe.cuts)] == [EOS * 3]


def merging(*pairs: str):
    """A byte-level BPE that joins these pairs of letters only."""
    by_character = {char: n for n, char in enumerate(chunking.bytes_to_characters())}
    merged = {pair: 256 + n for n, pair in enumerate(pairs)}
    inner = byte_level(models.BPE(vocab=by_character | merged, merges=[*map(tuple, pairs)]))
    inner.add_special_tokens([EOS])
    return Tokenizer.of_fast(as_fast(inner), "merging")


@pytest.mark.parametrize("text", ["x'sax", "x'reax", "x'llax", "x's'sax", "'veax", "-'sax"])
def test_no_contraction_is_torn_or_made(text):
    """The letters behind 's are a part of their own, and no token holds both of its bytes."""
    tokenizer = merging("sa", "ea", "la")
    with pieces_of(1):
        pieces = list(cut_up(text, tokenizer.cuts))
    assert len(pieces) > 1
    assert ids_of(tokenizer, pieces) == ids_of(tokenizer, [text])


@pytest.mark.parametrize("n_chars", [4, 5])
def test_an_apostrophe_counts_though_it_was_looked_at_before(n_chars):
    """The piece grows, and a place is judged by two characters before it."""
    with pieces_of(n_chars):
        assert list(cut_up("'" * 4 + "re x", merging().cuts)) == ["'" * 4 + "re", " x"]


def test_a_space_ends_a_piece_though_other_places_are_nearer():
    text = "words and" + "b!" * 300
    with pieces_of(400):
        assert list(cut_up(text, BETWEEN_PARTS))[:2] == ["words", " and" + "b!" * 198]


def test_a_piece_that_has_grown_ends_before_a_space():
    """Even where a token has the bytes on both sides."""
    with pieces_of(2):
        assert list(cut_up("!!!!!! x", merging("!!", "!\u0120").cuts)) == ["!!!!!!", " x"]


@contextlib.contextmanager
def characters_looked_at():
    """The lengths of the stretches of text that the rules are applied to."""
    lengths, kinds_of = [], chunking.kinds_of
    with mock.patch.object(chunking, "kinds_of", lambda t: lengths.append(len(t)) or kinds_of(t)):
        yield lengths


def test_little_is_looked_at_where_spaces_are_many():
    with pieces_of(1000), characters_looked_at() as lengths:
        assert len(list(cut_up("some words " * 900, BETWEEN_PARTS))) == 10
    assert sum(lengths) < 10 * 300


def description_of(tokenizer) -> dict:
    return json.loads(tokenizer.to_json())


def with_added(**changes):
    def change(description):
        description["added_tokens"][0] |= changes

    return change


def with_model(**changes):
    return lambda description: description["model"].update(changes)


def with_splitter(**changes):
    return lambda description: description["pre_tokenizer"].update(changes)


@pytest.mark.parametrize(
    "change",
    {
        "normalizer": lambda d: d.update(normalizer={"type": "NFC"}),
        "truncation": lambda d: d.update(truncation={"max_length": 5}),
        "padding": lambda d: d.update(padding={"pad_id": 0}),
        "no splitter": lambda d: d.update(pre_tokenizer=None),
        "another splitter": with_splitter(type="Whitespace"),
        "prefix": with_splitter(add_prefix_space=True),
        "no regex": with_splitter(use_regex=False),
        "another model": with_model(type="WordPiece"),
        "dropout": with_model(dropout=0.1),
        "word prefix": with_model(continuing_subword_prefix="##"),
        "word suffix": with_model(end_of_word_suffix="</w>"),
        "byte fallback": with_model(byte_fallback=True),
        "ignored merges": with_model(ignore_merges=True),
        "a byte lacks": lambda d: d["model"]["vocab"].pop("\u0120"),
        "an added token with a space": with_added(content="<end of text>"),
        "an added token of white space": with_added(content="\n"),
        "an added token that takes spaces before it": with_added(lstrip=True),
        "an added token that takes spaces behind it": with_added(rstrip=True),
        "an added token that must be a word": with_added(single_word=True),
    }.items(),
    ids=lambda item: item[0],
)
def test_which_tokenizers_have_other_rules(change, bpe):
    description = description_of(bpe)
    assert chunking.is_byte_level(description)
    change[1](description)
    assert not chunking.is_byte_level(description)


@pytest.mark.parametrize("name", BYTE_LEVEL | OTHER)
def test_the_kind_of_cuts_follows_from_the_tokenizer(name):
    chosen = (BYTE_LEVEL | OTHER)[name]().cuts
    assert type(chosen) is (ByteLevelCuts if name in BYTE_LEVEL else VerifiedCuts)


# ---------------------------------------------------------------- tokenizers that are tried


class Pairs:
    """Ids of words; ` of the` is one id. Counts what it is asked."""

    def __init__(self, prefix: str = ""):
        self.prefix, self.n_calls, self.longest = prefix, 0, 0

    def __call__(self, text: str) -> list[str]:
        self.n_calls, self.longest = self.n_calls + 1, max(self.longest, len(text))
        return re.findall(r" ?of the| ?[^ ]+", self.prefix + text)


def test_a_cut_between_words_is_tried_and_refused():
    text = "some of the words of the story, 12 of the kind _ x"
    with pieces_of(1):
        pieces = list(cut_up(text, VerifiedCuts(Pairs())))
    assert pieces == ["some", " of the", " words", " of the", " story, 12", " of the", " kind _ x"]


def test_a_piece_of_the_full_length_is_tried():
    with pieces_of(4):
        assert list(cut_up("some word", VerifiedCuts(Pairs()))) == ["some", " word"]


def test_trials_are_few():
    """A few in a piece, and again each time that it has grown to twice the size."""
    encode = Pairs()
    chosen = VerifiedCuts(encode)
    before = encode.n_calls
    text = "of the" + ", of the" * 900 + " 1"
    with pieces_of(1000), mock.patch.object(chunking, "TRIALS", 4):
        assert list(cut_up(text, chosen)) == [text]
    stretches = 4  # up to 1000, 2000, 4000, 8000 characters
    assert encode.n_calls - before == 3 * 4 * stretches
    assert encode.longest == 2 * chunking.TRIAL_CHARS


def test_a_tokenizer_that_puts_something_first_gets_whole_documents():
    encode = Pairs(prefix="_")
    chosen = VerifiedCuts(encode)
    before = encode.n_calls
    with pieces_of(4):
        assert list(cut_up("some words and more words", chosen)) == ["some words and more words"]
    assert encode.n_calls == before and chosen.forced == 0


def test_a_document_too_long_is_cut_between_words_and_counted():
    text = "ab cd, ef 12 gh" * 20
    chosen = VerifiedCuts(Pairs(prefix="_"))
    with pieces_of(4, longest=50):
        pieces = list(cut_up(text, chosen))
        assert stream(text, VerifiedCuts(Pairs(prefix="_")), 7) == pieces
    assert "".join(pieces) == text and chosen.forced == len(pieces) - 1 > 5
    assert {piece[:3] for piece in pieces[1:]} <= {" cd", " gh"}
    assert all(40 < len(piece) <= 50 for piece in pieces[:-1])


def test_a_space_at_the_very_beginning_is_no_place():
    chosen = VerifiedCuts(Pairs(prefix="_"))
    with pieces_of(4, longest=50):
        pieces = list(itertools.islice(cut_up(" " + "a" * 99, chosen), 9))
    assert [len(piece) for piece in pieces] == [50, 50] and chosen.forced == 1


# ---------------------------------------------------------------- words without end


def test_a_word_without_end_is_cut_at_the_longest_length_and_counted():
    chosen = make_tokenizer("bpe:258", ["aaaa"]).cuts
    text = "some words, then " + "a" * 133 + " and " + "a" * 49 + " z" + "a" * 50
    with pieces_of(8, longest=50):
        pieces = list(cut_up(text, chosen))
        assert stream(text, make_tokenizer("bpe:258", ["aaaa"]).cuts, 5) == pieces
    assert "".join(pieces) == text and chosen.forced == 2
    assert [len(piece) for piece in pieces] == [4, 7, 5, 50, 50, 34, 4, 50, 2, 50]
    assert pieces[3] == " " + 49 * "a"


def test_an_endless_word_is_looked_at_once():
    """However often it comes, each time a little longer."""
    chosen = make_tokenizer("bpe:258", ["aaaa"]).cuts
    text = "a" * 20_000
    with pieces_of(100), characters_looked_at() as lengths:
        assert stream(text, chosen, 10) == [text]
    assert sum(lengths) < 1.2 * len(text)
    assert chosen.hopeless == ("", 0)  # and not kept in memory


def test_what_is_known_of_one_text_is_not_taken_for_another():
    chosen = make_tokenizer("bpe:258", ["aaaa"]).cuts
    with pieces_of(4):
        assert chosen.first_cut("a" * 30, 0, ends=False) == 0
        assert chosen.first_cut("aa b" * 9, 0, ends=False) == 2
        assert chosen.first_cut("a" * 30, 0, ends=False) == 0
        assert chosen.first_cut("a" * 30 + " b" * 9, 25, ends=False) == 30
