"""Text <-> ids. Every tokenizer is a transformers fast tokenizer with an end-of-text token."""

import hashlib
import pathlib
from collections.abc import Iterable

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from gpt2_flax.data.hub import hub_error
from gpt2_flax.errors import UserError

EOS = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"


class Tokenizer:
    """ids of text and back.

    eos_id: the id of the end-of-text token. vocab_size: ids are below it.
    fingerprint: hex digest that changes with any change of the vocabulary or the rules.
    """

    def __init__(self, fast, name: str):
        eos = fast.eos_token_id
        if eos is None:
            raise UserError(
                f"tokenizer {name} has no end-of-text token\n"
                "  set eos_token in its tokenizer_config.json"
            )
        self.name = name
        self.fast = fast
        self.eos_id: int = eos
        # Ids may have gaps, and then the largest is not below their number.
        self.vocab_size: int = 1 + max(fast.get_vocab().values())
        # Settings that a tokenizer.json carries along; they would cut off every piece of text.
        fast.backend_tokenizer.no_truncation()
        fast.backend_tokenizer.no_padding()
        self.fingerprint = hashlib.blake2b(
            fast.backend_tokenizer.to_str().encode(), digest_size=16
        ).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """int32 ids of each text, without special tokens added."""
        encodings = self.fast.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids) -> str:
        return self.fast.decode(ids, clean_up_tokenization_spaces=False)

    def save(self, directory) -> None:
        """Write the files that transformers.AutoTokenizer reads."""
        self.fast.save_pretrained(str(directory))


def make_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that a `--tokenizer` setting names; `texts` train `bpe:N`."""
    if name == "bytes":
        return Tokenizer(as_fast(byte_tokenizer()), name)
    if name.startswith("bpe:"):
        size = int(name.removeprefix("bpe:"))
        return Tokenizer(as_fast(train_bpe(texts, size)), name)
    return load_tokenizer(name)


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer from a local directory or the hub. Raises UserError where there is none."""
    import transformers

    local = pathlib.Path(name).is_dir()
    files = {path.name for path in pathlib.Path(name).iterdir()} if local else {TOKENIZER_FILE}
    if TOKENIZER_FILE in files:
        kind = transformers.PreTrainedTokenizerFast
    elif {"vocab.json", "merges.txt"} <= files:
        kind = transformers.GPT2TokenizerFast
    else:
        raise UserError(
            f"{name} holds no tokenizer: neither {TOKENIZER_FILE} nor vocab.json and merges.txt"
        )
    try:
        # Not AutoTokenizer: it would follow what a stranger's config.json asks for.
        fast = kind.from_pretrained(name)
    except Exception as error:  # the clients raise a dozen kinds, some of them plain Exception
        if local:
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"cannot read the tokenizer in {name}: {reason}") from error
        raise hub_error(f"tokenizer {name}", error) from error
    if fast.eos_token is None and EOS in fast.get_vocab():
        fast.add_special_tokens({"bos_token": EOS, "eos_token": EOS})
    return Tokenizer(fast, name)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """256 ids for the 256 bytes in order, and end-of-text as id 256."""
    # GPT-2 writes bytes as printable characters; a BPE without merges then works on bytes.
    by_byte = {char: byte for byte, char in enumerate(bytes_to_characters())}
    tokenizer = byte_level(models.BPE(vocab=by_byte, merges=[]))
    tokenizer.add_special_tokens([EOS])
    return tokenizer


def bytes_to_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it is printable Latin-1."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    stand_in = {byte: 256 + n for n, byte in enumerate(others)}
    return [chr(stand_in.get(byte, byte)) for byte in range(256)]


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
