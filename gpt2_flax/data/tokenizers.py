"""Text <-> ids. Every tokenizer is a transformers fast tokenizer with an end-of-text token."""

import array
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import sys
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gpt2_flax import hub
from gpt2_flax.data.chunking import (
    SOLID,
    Cuts,
    bytes_to_characters,
    is_byte_level,
    kinds_of_characters,
    make_cuts,
)
from gpt2_flax.errors import UserError

EOS = "<|endoftext|>"
TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
# What transformers opens of a directory.
READ_FILES = re.compile(
    r"tokenizer.*\.json|vocab\.json|merges\.txt|added_tokens\.json|special_tokens_map\.json"
    r"|config\.json|chat_template.*"
)
MAX_FILE_BYTES = 1 << 28  # the largest tokenizers have some 35 MB
# An id may lie so far beyond the number of tokens: each id below it has a row of the model.
MOST_UNUSED_IDS = 1 << 17
PLAIN_NAME = re.compile(r"\w[\w.-]{0,63}")
LONGEST_KEPT_CHARS = 64  # longer words hardly come twice
MOST_KEPT_BYTES = 1 << 27
BYTES_A_WORD = 64  # that the dict takes, beside the word and its ids


class Encoder:
    """Text -> ids, without special tokens added. Threads may share one.

    A byte-level BPE is asked once for the ids of a word or of what stands between two, with the
    white space before it, and they are kept: most text consists of few words. What is kept takes
    at most about MOST_KEPT_BYTES.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        description = json.loads(backend.to_str())
        self.splits = is_byte_level(description)
        self.added = [token["content"] for token in description["added_tokens"]]
        self.kept: dict[str, bytes] = {}
        self.kept_bytes = 0
        self.lock = threading.Lock()

    @classmethod
    def from_json(cls, text: str) -> "Encoder":
        """The encoder of a tokenizer whose tokenizer.json says `text`."""
        return cls(tokenizers.Tokenizer.from_str(text))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """int32 ids of each text."""
        if not self.splits:
            return [np.array(ids, np.int32) for ids in self.ask(texts)]
        words = [*map(self.split, texts)]
        found = [[*map(self.kept.get, of_text)] for of_text in words]
        pairs = [
            [*zip(of_text, ids, strict=True)] if None in ids else []
            for of_text, ids in zip(words, found, strict=True)
        ]
        if lacking := {word for of_text in pairs for word, ids in of_text if ids is None}:
            learned = self.learn([*lacking])
            for n, of_text in enumerate(pairs):
                found[n] = [learned.get(*pair) for pair in of_text] or found[n]
        # No id is None any more.
        return [np.frombuffer(bytearray().join(filter(None, ids)), np.int32) for ids in found]

    def split(self, text: str) -> list[str]:
        """A text in words: no token of a byte-level BPE is of two of them."""
        in_words, at_spaces = word_patterns()
        # An added token is found before anything is split, whatever it consists of but spaces.
        return (at_spaces if any(token in text for token in self.added) else in_words).findall(
            text
        )

    def learn(self, words: list[str]) -> dict[str, bytes]:
        """The ids of words, which are kept."""
        learned = dict(zip(words, (ids.tobytes() for ids in self.ask(words)), strict=True))
        short = {word: ids for word, ids in learned.items() if len(word) <= LONGEST_KEPT_CHARS}
        size = sum(sum(map(sys.getsizeof, pair), BYTES_A_WORD) for pair in short.items())
        with self.lock:
            if self.kept_bytes + size > MOST_KEPT_BYTES:
                self.kept.clear()
                self.kept_bytes = 0
            if size <= MOST_KEPT_BYTES:
                self.kept.update(short)
                self.kept_bytes += size
        return learned

    def ask(self, texts: list[str]) -> Iterable[array.array]:
        """The ids of texts from the tokenizer itself, which uses all cores."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return (array.array("i", encoding.ids) for encoding in encodings)


@functools.cache
def word_patterns() -> tuple[re.Pattern, re.Pattern]:
    """(words and what stands between them, what stands between spaces), both with spaces before.

    These are places where `ByteLevelCuts` would cut. Beyond ASCII, and behind an apostrophe, even
    the first pattern takes all up to the next space, and that up to the one after it where it is
    not certain that the last character isn't white space, too.
    """
    bounds = np.flatnonzero(np.diff(kinds_of_characters() & SOLID, prepend=0, append=0))
    solid = "".join(rf"\U{a:08x}-\U{b - 1:08x}" for a, b in bounds.reshape(-1, 2).tolist())
    space, other = r"[ \t\r\n]", r"[^ \t\r\n]"
    to_space = rf"{other}++(?:(?<![{solid}]){space}+{other}*)*+"
    letter, sign = "A-Za-z", r"!-&(-@\[-`{-~"  # digits are signs here, the apostrophe is neither
    letters = rf"[{letter}]++(?![^{letter}{sign}'\ \t\r\n])"
    signs = rf"[{sign}]++(?![^{letter}\ \t\r\n])"
    in_words = rf"{space}*+(?:{letters}|{signs}|{to_space})|{space}+"
    return re.compile(in_words), re.compile(rf"{space}*+{to_space}|{space}+")


class Tokenizer:
    """ids of text and back.

    eos_id: the id of the end-of-text token. vocab_size: ids are below it.
    fingerprint: hex digest that changes with any change of the vocabulary or the rules.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_id: int | None, name: str, load_fast):
        """load_fast: () -> transformers' tokenizer around `backend`, or around its equal."""
        if eos_id is None:
            raise UserError(
                f"tokenizer {name} has no end-of-text token\n"
                f"  set eos_token in a tokenizer_config.json beside its {TOKENIZER_FILE}"
            )
        self.name, self.backend, self.load_fast = name, backend, load_fast
        self.eos_id: int = eos_id
        # Ids may have gaps, and then the largest is not below their number.
        vocabulary = backend.get_vocab()
        self.vocab_size: int = 1 + max(vocabulary.values())
        if self.vocab_size > len(vocabulary) + MOST_UNUSED_IDS:
            raise UserError(
                f"tokenizer {name} has {len(vocabulary)} tokens, and one with the id"
                f" {self.vocab_size - 1}: most rows of a model's table would be of none\n"
                f"  is its {TOKENIZER_FILE} damaged?"
            )
        # Settings that a tokenizer.json carries along; they would cut off every piece of text.
        backend.no_truncation()
        backend.no_padding()
        self.fingerprint = hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    @classmethod
    def of_fast(cls, fast, name: str) -> "Tokenizer":
        return cls(fast.backend_tokenizer, fast.eos_token_id, name, lambda: fast)

    @functools.cached_property
    def fast(self):
        """transformers' tokenizer: made when it is needed, since its import takes a second."""
        return self.load_fast()

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Made when it is needed: a run whose text is tokenized already does not."""
        return Encoder(self.backend)

    @functools.cached_property
    def cuts(self) -> Cuts:
        """Where texts may be cut."""
        return make_cuts(self)

    def to_json(self) -> str:
        """What tokenizer.json says; `Encoder.from_json` takes it."""
        return self.backend.to_str()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """int32 ids of each text, without special tokens added."""
        return self.encoder.encode_batch(texts)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids) -> str:
        return self.fast.decode(ids, clean_up_tokenization_spaces=False)

    def save(self, directory) -> None:
        """Write the files that transformers.AutoTokenizer reads. What would run code is left out.

        The names of its templates become names of files, and may be anything. Raises OSError.
        """
        templates = self.fast.chat_template
        if isinstance(templates, dict):
            kept = {name: text for name, text in templates.items() if PLAIN_NAME.fullmatch(name)}
            self.fast.chat_template = kept or None
        self.fast.init_kwargs.pop("auto_map", None)
        try:
            self.fast.save_pretrained(str(directory))
        except Exception as error:  # the library, which is not Python's, raises nothing else
            found = re.search(r"\(os error (\d+)\)", str(error))
            if not found:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(directory)) from error


def make_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that a `--tokenizer` setting names; `texts` train `bpe:N`."""
    if name == "bytes":
        return Tokenizer.of_fast(as_fast(byte_tokenizer()), name)
    if name.startswith("bpe:"):
        size = int(name.removeprefix("bpe:"))
        return Tokenizer.of_fast(as_fast(train_bpe(texts, size)), name)
    return load_tokenizer(name)


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer from a directory, a tokenizer.json or the hub.

    Raises UserError where there is none.
    """
    fast = load_local(name) if os.path.exists(name) else load_from_hub(name)
    if fast.eos_token is None and EOS in fast.get_vocab():
        fast.add_special_tokens({"bos_token": EOS, "eos_token": EOS})
    return Tokenizer.of_fast(fast, name)


def load_saved(directory: pathlib.Path) -> Tokenizer:
    """The tokenizer that `save` wrote, as it was; by transformers only where it isn't plain.

    That is one of two files, which hold all that there is to know.
    """
    name = str(directory)
    eos_id = None
    with contextlib.suppress(Exception):  # the library raises plain Exception; said below
        found = {file.name for file in directory.iterdir() if READ_FILES.fullmatch(file.name)}
        if found - {"config.json"} == {TOKENIZER_FILE, SETTINGS_FILE}:
            files = [directory / TOKENIZER_FILE, directory / SETTINGS_FILE]
            check_sizes(files)
            eos = json.loads(files[1].read_text("utf-8"))["eos_token"]
            backend = tokenizers.Tokenizer.from_file(str(files[0]))
            eos_id = backend.token_to_id(eos)
    if eos_id is None:
        return load_tokenizer(name)
    return Tokenizer(backend, eos_id, name, functools.partial(load_local, name))


def load_local(name: str):
    import transformers

    # What lies beside a tokenizer.json counts however it was named.
    path = pathlib.Path(name)
    folder = path.parent if path.name == TOKENIZER_FILE else path
    try:
        files = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        check_sizes([path, *(folder / name for name in files if READ_FILES.fullmatch(name))])
        # Not AutoTokenizer: it would follow what a stranger's config.json asks for.
        options: dict[str, Any] = {"trust_remote_code": False}  # so that nobody is asked, either
        if TOKENIZER_FILE in files:
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), **options)
        if {"vocab.json", "merges.txt"} <= files:
            fast = transformers.GPT2TokenizerFast  # type: ignore[attr-defined]  # an alias
            return fast.from_pretrained(str(folder), **options)
        if path.is_file():
            return transformers.PreTrainedTokenizerFast(tokenizer_file=name)
    except UserError:
        raise
    except Exception as error:  # the clients raise a dozen kinds, some of them plain Exception
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"cannot read the tokenizer in {name}: {reason}") from error
    raise UserError(
        f"{name} holds no tokenizer: neither {TOKENIZER_FILE} nor vocab.json and merges.txt"
    )


def check_sizes(paths: list[pathlib.Path]) -> None:
    """Raise UserError for a file that is too long to be one of a tokenizer."""
    for path in paths:
        if path.is_file() and (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise UserError(
                f"{path} has {size} bytes; a tokenizer's files have at most {MAX_FILE_BYTES}\n"
                "  is it the right file?"
            )


def load_from_hub(name: str):
    import transformers

    if folder := cached_folder(name):
        return load_local(folder)
    what = f"tokenizer {name}"
    if not hub.reachable():
        raise hub.hub_error(what, OSError("not in the cache"))
    try:
        return transformers.PreTrainedTokenizerFast.from_pretrained(name)
    except Exception as error:  # the clients raise a dozen kinds, some of them plain Exception
        raise hub.hub_error(what, error) from error


def cached_folder(name: str) -> str | None:
    """Where Hugging Face's cache holds a tokenizer of the hub; no connection is made.

    Even with local_files_only from_pretrained asks the hub for something (huggingface_hub 2.4
    for a list of programs that may be calling).
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(name, TOKENIZER_FILE)
    except ValueError:  # no name of a repository
        return None
    return os.path.dirname(file) if isinstance(file, str) else None


def byte_tokenizer() -> tokenizers.Tokenizer:
    """256 ids for the 256 bytes in order, and end-of-text as id 256."""
    # GPT-2 writes bytes as printable characters; a BPE without merges then works on bytes.
    by_byte = {char: byte for byte, char in enumerate(bytes_to_characters())}
    tokenizer = byte_level(models.BPE(vocab=by_byte, merges=[]))
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of `vocab_size` tokens, end-of-text among them, learned from `texts`."""
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level(model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def as_fast(tokenizer: tokenizers.Tokenizer):
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS
    )
