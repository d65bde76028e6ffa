"""Files that others made are data: none of them runs code, writes elsewhere, or hangs us.

Each artefact is opened by a process of its own, through the door that a user has: our scripts, or
from_pretrained. The process has a limit of memory and of time. What it may see of the world is one
folder, which is compared before and after: only what the command is to write may be new. Whatever
would run code leaves a file there.
"""

import gzip
import json
import lzma
import os
import pathlib
import pickle
import re
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest

from gpt2_flax import FlaxGPT2LMHeadModel
from gpt2_flax.data import tokenizers
from gpt2_flax.pretrained import manifest
from tests.conftest import make_config
from tests.fork_server import ForkServer

GIB = 2**30
MODELS = "tests.pretrained.open_models"  # the script that opens a model as a user does from Python
MEMORY = 2 * GIB  # that a process may map beyond what its imports have
SECONDS = 30  # that it may take; on an idle machine none takes more than a few
SIZES = {"n_positions": 24, "vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
TINY = {
    "n_layers": 1, "n_heads": 2, "n_embd": 8, "n_positions": 24, "block_size": 16,
    "batch_size": 1, "tokenizer": "bytes", "sample_tokens": 0, "max_steps": 3, "log_every": 1,
    "save_every": 2, "validation_share": 0,
}  # fmt: skip
TEXT = "".join(f"line {n} of {n * n}\n" for n in range(99))
# What runs of ours may write beside their output: token files and what Hugging Face's own
# libraries keep, programs that JAX compiled, fonts that matplotlib found.
OUR_CACHES = ("hf_home/gpt2_flax", "hf_home/datasets", "compiled", "matplotlib")


# ---------------------------------------------------------------- what would run, if it could


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def pickled(world, protocol=2) -> bytes:
    return pickle.dumps({"wte.weight": Bomb(world.canary)}, protocol)


def zipped(path, world) -> None:
    """As torch.save lays it out."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled(world))
        file.writestr("archive/version", "3\n")


def plant_code(folder, world, *names) -> None:
    """Modules of which the import alone leaves a file behind."""
    for name in names:
        code = f"open({str(world.canary)!r}, 'w').close()\nclass Evil: pass\n"
        (folder / f"{name}.py").write_text(code)


# ---------------------------------------------------------------- artefacts
#
# Each makes its files in a folder of its own and returns the script and its arguments.

ARTEFACTS = {}


def artefact(code: int, match: str = ""):
    """code: the expected exit code. match: what is said on the way. Named after the function."""

    def note(make):
        ARTEFACTS[make.__name__] = make, code, match
        return make

    return note


def each(code: int, cases: dict):
    """An artefact of each case: name -> (content or the like, what is said)."""

    def note(make):
        for name, (content, match) in cases.items():

            def made(folder, world, content=content):
                return make(folder, world, content)

            ARTEFACTS[f"{make.__name__}: {name}"] = made, code, match
        return make

    return note


def open_model(folder, **options):
    return MODELS, [str(folder), json.dumps(options)]


def train_on(folder, *argv, **settings):
    """A run whose text is `folder`/text.txt unless settings say otherwise; None: not given."""
    (folder / "text.txt").write_text(TEXT)
    settings = TINY | {"train_file": folder / "text.txt", "output_dir": folder / "out"} | settings
    words = (
        str(w)
        for name, value in settings.items()
        if value is not None
        for w in (f"--{name}", value)
    )
    return "scripts.train", [*words, *map(str, argv)]


def sparse(path, size=2 * GIB, begin=b"{") -> None:
    """A file that takes no room on the disk."""
    with open(path, "wb") as file:
        file.write(begin)
        file.truncate(size)


def deep(n=100_000, opening="[", closing="]") -> str:
    return opening * n + closing * n


# ------------------------------------------------ a model's directory


@artefact(2, r"pytorch_model\.bin only: a pickle")
def pickled_weights(folder, world):
    world.model(folder, weights=False)
    (folder / "pytorch_model.bin").write_bytes(pickled(world))
    return open_model(folder)


@artefact(2, r"no weights in PyTorch's layout|pytorch_model\.bin only: a pickle")
def pickled_weights_as_pytorch_s(folder, world):
    pickled_weights(folder, world)
    return open_model(folder, from_pt=True)


@artefact(2, r"a \.bin is a pickle and never read")
def a_pickle_by_its_name(folder, world):
    pickled_weights(folder, world)
    return open_model(folder / "pytorch_model.bin")


@artefact(2, r"pytorch_model\.bin.* only: a pickle")
def a_pickle_in_shards(folder, world):
    world.model(folder, weights=False)
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(pickled(world))
    index = {"weight_map": {"wte.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return "scripts.convert", ["to_pytorch", "--checkpoint", str(folder), "--output",
                               str(folder / "out")]  # fmt: skip


@each(2, {
    "safetensors": ("model.safetensors", "is damaged"),
    "msgpack": ("flax_model.msgpack", "msgpack"),
    "config": ("config.json", "not valid JSON"),
    "an index": ("model.safetensors.index.json", "is no index"),
    "generation": ("generation_config.json", "not valid JSON"),
})  # fmt: skip
def a_pickle_called(folder, world, name):
    world.model(folder, weights=name != "model.safetensors.index.json")
    (folder / name).write_bytes(pickled(world))
    return open_model(folder)


@each(2, {
    "safetensors": ("model.safetensors", "is damaged"),
    "msgpack": ("flax_model.msgpack", "msgpack"),
})  # fmt: skip
def a_file_of_torch_s_called(folder, world, name):
    world.model(folder)
    zipped(folder / name, world)
    return open_model(folder)


CODE_KEYS = {
    "auto_map": {"AutoConfig": "evil.Evil", "FlaxAutoModelForCausalLM": "evil.Evil"},
    "_attn_implementation_internal": "someone/evil",
    "_attn_implementation": "someone/evil",
    "trust_remote_code": True,
    "custom_pipelines": {"text-generation": {"impl": "evil.Evil"}},
    "quantization_config": {"quant_method": "evil", "modules_to_not_convert": ["evil.Evil"]},
    "text_config": {"auto_map": {"AutoConfig": "evil.Evil"}, "trust_remote_code": True},
}


@artefact(0)
def code_in_a_configuration(folder, world):
    world.model(folder, **CODE_KEYS)
    plant_code(folder, world, "evil", "configuration_gpt2", "modeling_flax_gpt2")
    return open_model(folder)


@artefact(0)
def code_in_a_generation_configuration(folder, world):
    world.model(folder)
    plant_code(folder, world, "evil", "generate")
    raw = {"custom_generate": "evil", "assistant_model": "evil", **CODE_KEYS}
    (folder / "generation_config.json").write_text(json.dumps(raw))
    return open_model(folder)


@each(2, {
    "nested": ('{"n_layer": ' + deep() + "}", "not valid JSON"),
    "a long number": ('{"n_layer": 1' + "0" * 5000 + "}", "not valid JSON"),
    "not a number": ('{"layer_norm_epsilon": NaN}', "layer_norm_epsilon must be 0 or more"),
    "infinite": ('{"initializer_range": Infinity}', "initializer_range must be 0 or more"),
    "a key twice": ('{"n_layer": 2, "n_layer": 1000000000}', "n_layer must be at most 1024"),
    "Latin-1": ('{"n_layer": "é"}'.encode("latin-1"), "not valid JSON"),
    "zeros": (b"\0" * 4096, "not valid JSON"),
    "layers in a float": ('{"n_layer": 1e9}', "n_layer"),
    "many layers": ('{"n_layer": 1000000000}', "n_layer must be at most 1024"),
    "wide": ('{"n_embd": 1000000000000, "n_head": 1}', "n_embd must be at most"),
    "many words": ('{"vocab_size": 1000000000000}', "vocab_size must be at most"),
    "long": ('{"n_positions": 99999999999}', "n_positions must be at most"),
    "a wide MLP": ('{"n_inner": 1000000000000}', "n_inner must be"),
    "a table that the file lacks": ('{"vocab_size": 60000000, "n_embd": 60000}', "shape"),
    "another model": (json.dumps({"model_type": "x" * 10**6}), "model_type 'xxx"),
    "text for a number": (json.dumps({"n_layer": "9" * 10**6}), "n_layer"),
    "a list": ("[]", "not a JSON object"),
})  # fmt: skip
def a_configuration(folder, world, content):
    world.model(folder)
    content = content if isinstance(content, bytes) else content.encode()
    (folder / "config.json").write_bytes(content)
    return open_model(folder)


@artefact(2, "would take .* GB|shape")
def a_model_that_the_file_is_a_thousandth_of(folder, world):
    world.model(folder, weights=False, n_embd=12288, n_head=1, vocab_size=2**20, n_layer=96)
    header = {"wpe.weight": {"dtype": "F32", "shape": [24, 12288], "data_offsets": [0, 1179648]}}
    save_raw(folder / "model.safetensors", header, b"\0" * 1179648)
    return open_model(folder)


@each(2, {
    "config.json": ("config.json", "too many for a configuration"),
    "generation_config.json": ("generation_config.json", "too many for a configuration"),
    "an index": ("model.safetensors.index.json", "expected an index of at most"),
    "a header": ("model.safetensors", "is damaged"),
    "msgpack": ("flax_model.msgpack", "msgpack"),
})  # fmt: skip
def two_gigabytes_of(folder, world, name):
    world.model(folder, weights=name != "model.safetensors.index.json")
    begin = struct.pack("<Q", 2 * GIB - 8) if name == "model.safetensors" else b"{"
    sparse(folder / name, begin=b"\x85" if name == "flax_model.msgpack" else begin)
    return open_model(folder)


@each(2, {
    "one level up": ("../model.safetensors", "is no name of a shard"),
    "two levels up": ("a/../../../model.safetensors", "is no name of a shard"),
    "from the root": ("{victim}/model.safetensors", "is no name of a shard"),
    "a folder": ("sub/model.safetensors", "is no name of a shard"),
    "with backslashes": ("..\\model.safetensors", "is no name of a shard"),
    "of a pickle": ("pytorch_model.bin", "is no name of a shard"),
    "an address": ("https://huggingface.co/x.safetensors", "is no name of a shard"),
    "a number": (7, "expected a file's name"),
    "nothing there": ("model-00001-of-00002.safetensors", "which is not there"),
})  # fmt: skip
def an_index_that_names(folder, world, home):
    world.model(folder, weights=False)
    (folder / "sub").mkdir()
    for at in (folder / "sub", folder.parent):
        shutil.copy(world.good / "model.safetensors", at)
    home = home.format(victim=world.victim) if isinstance(home, str) else home
    index = {"weight_map": {"transformer.wte.weight": home}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return open_model(folder)


@artefact(2, "is no index of weights")
def an_index_nested(folder, world):
    world.model(folder, weights=False)
    (folder / "flax_model.msgpack.index.json").write_text('{"weight_map": ' + deep() + "}")
    return open_model(folder)


@artefact(2, "which is not there")
def a_shard_that_is_a_device(folder, world):
    world.model(folder, weights=False)
    (folder / "model-1.safetensors").symlink_to("/dev/zero")
    index = {"weight_map": {"transformer.wte.weight": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return open_model(folder)


@artefact(2, "has no weights")
def weights_that_are_a_pipe(folder, world):
    world.model(folder, weights=False)
    os.mkfifo(folder / "model.safetensors")
    return open_model(folder)


@artefact(0)
def a_directory_of_links(folder, world):
    """Hugging Face's cache consists of them: files of a model may be links to anywhere."""
    for path in world.good.iterdir():
        (folder / path.name).symlink_to(path)
    return open_model(folder)


@each(2, {
    "up": ("../victim", "is no relative path"),
    "from the root": ("/etc", "is no relative path"),
    "with a zero": ("a\0b", "is no relative path"),
})  # fmt: skip
def a_subfolder(folder, world, subfolder):
    world.model(folder)
    return open_model(folder, subfolder=subfolder)


def save_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + text + data)


def of_one(shape=(2, 2), dtype="F32", offsets=(0, 16), name="wte.weight"):
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


DATA = b"\0" * 16
TWICE = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},' * 2
SAFETENSORS = {
    "a header beyond the file": (of_one(), DATA, 10**6),
    "a header of 2**63": (of_one(), DATA, 2**63),
    "a header of 2**64 - 1": (of_one(), DATA, 2**64 - 1),
    "an empty header": (b"", DATA, None),
    "a nested header": ((deep()).encode(), DATA, None),
    "a header that is no text": (b"\xff" * 64, DATA, None),
    "an overflowing shape": (of_one(shape=(2**32, 2**32)), DATA, None),
    "a negative shape": (of_one(shape=(-2, -2)), DATA, None),
    "a shape of fractions": (of_one(shape=(2.5, 2)), DATA, None),
    "a shape of a thousand axes": (of_one(shape=[1] * 1000 + [4]), DATA, None),
    "an axis of 0": (of_one(shape=(0, 4), offsets=(0, 0)), b"", None),
    "offsets beyond the file": (of_one(shape=(2**40,), offsets=(0, 2**42)), DATA, None),
    "offsets backwards": (of_one(offsets=(16, 0)), DATA, None),
    "overlapping arrays": (of_one() | of_one(name="wpe.weight"), DATA, None),
    "a type that is none": (of_one(dtype="OBJECT"), DATA, None),
    "one name twice": (TWICE[:-1] + b"}", DATA, None),
}


@each(2, {name: (content, "") for name, content in SAFETENSORS.items()})
def safetensors_with(folder, world, content):
    world.model(folder)
    save_raw(folder / "model.safetensors", *content)
    return open_model(folder)


def array(shape=b"\x92\x02\x02", dtype=b"\xa7float32", data=b"\xc4\x10" + DATA):
    packed = b"\x93" + shape + dtype + data
    return b"\x81\xa1a\xc7" + bytes([len(packed)]) + b"\x01" + packed


MSGPACK = {
    "an array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "a map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "a text of 4 billion": b"\xdb\xff\xff\xff\xff",
    "an extension of 4 billion": b"\xc9\xff\xff\xff\xff\x01",
    "100,000 levels": b"\x81\xa1a" * 100_000 + b"\xc0",
    "objects": array(dtype=b"\xa1O"),
    "records": array(dtype=b"\xa3V16"),
    "a shape of 2**64": array(shape=b"\x92\xcf" + b"\xff" * 8 + b"\x02"),
    "a negative shape": array(shape=b"\x92\xff\xff"),
    "an unknown extension": b"\x81\xa1a\xd4\x63\x00",
    "keys that are no text": b"\x81\x01" + array()[3:],
    "a date": b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",
    "chunks that are missing": b"\x82\xb9__msgpack_chunked_array__\xc3\xa5shape\x81\xa10\xce"
    + b"\xff" * 4,
}


@each(2, {name: (content, "") for name, content in MSGPACK.items()})
def msgpack_with(folder, world, content):
    world.model(folder)
    (folder / "flax_model.msgpack").write_bytes(content)
    return open_model(folder)


# ------------------------------------------------ tokenizers


@artefact(0, "done: 3 steps")
def a_tokenizer_with_code(folder, world):
    """The names of its templates become names of files: one that leads elsewhere is left out."""
    evil = "{{ ''.__class__.__base__.__subclasses__() }}" + "{% for i in range(10**12) %}x"
    names = ("default", "../../../../victim/new", "ok")
    world.tokenizer(
        folder / "tok", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        tokenizer_class="Evil", processor_class="evil.Evil",
        chat_template=[{"name": name, "template": evil} for name in names],
    )  # fmt: skip
    plant_code(folder / "tok", world, "evil", "tokenization_evil")
    (folder / "tok" / "config.json").write_text(json.dumps(CODE_KEYS | {"model_type": "evil"}))
    return train_on(folder, tokenizer=folder / "tok")


@each(2, {
    "nested": (("tokenizer.json", deep()), "cannot read the tokenizer"),
    "a pickle": (("tokenizer.json", None), "cannot read the tokenizer"),
    "empty": (("tokenizer.json", ""), "cannot read the tokenizer"),
    "its settings nested": (("tokenizer_config.json", '{"a": ' + deep() + "}"), "cannot read"),
    "its settings a list": (("tokenizer_config.json", "[1, 2]"), "cannot read the tokenizer"),
    "tokens with a long number": (
        ("special_tokens_map.json", '{"a": 1' + "0" * 5000 + "}"), "cannot read the tokenizer"
    ),
    "tokens nested": (("added_tokens.json", '{"a": ' + deep() + "}"), "cannot read the tok"),
})  # fmt: skip
def a_tokenizer(folder, world, case):
    name, content = case
    world.tokenizer(folder / "tok")
    content = pickled(world) if content is None else content.encode()
    (folder / "tok" / name).write_bytes(content)
    return train_on(folder, tokenizer=folder / "tok")


@each(2, {
    "tokenizer.json": ("tokenizer.json", "a tokenizer's files have at most"),
    "its settings": ("tokenizer_config.json", "a tokenizer's files have at most"),
    "a template": ("chat_template.jinja", "a tokenizer's files have at most"),
    "vocab.json": ("vocab.json", "a tokenizer's files have at most"),
})  # fmt: skip
def two_gigabytes_of_a_tokenizer(folder, world, name):
    world.tokenizer(folder / "tok")
    if name == "vocab.json":
        (folder / "tok" / "tokenizer.json").unlink()
        (folder / "tok" / "merges.txt").write_text("a b\n")
    sparse(folder / "tok" / name)
    return train_on(folder, tokenizer=folder / "tok")


@artefact(2, "and one with the id 4294967295")
def a_token_with_a_large_id(folder, world):
    world.tokenizer(folder / "tok")
    path = folder / "tok" / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["far"] = 2**32 - 1
    path.write_text(json.dumps(raw))
    return train_on(folder, tokenizer=folder / "tok")


@each(2, {name: (name, "holds no tokenizer") for name in ("tokenizer.pkl", "tokenizer.model")})
def a_tokenizer_pickled_as(folder, world, name):
    (folder / "tok").mkdir()
    (folder / "tok" / name).write_bytes(pickled(world))
    return train_on(folder, tokenizer=folder / "tok")


@artefact(0, "The river")
def a_model_to_generate_with(folder, world):
    """The same files through scripts/generate.py."""
    world.model(folder, **CODE_KEYS)
    world.tokenizer(folder, auto_map={"AutoTokenizer": ["evil.Evil", None]})
    plant_code(folder, world, "evil", "modeling_gpt2")
    return "scripts.generate", ["--model", str(folder), "--prompt", "The river",
                                "--max_new_tokens", "3"]  # fmt: skip


@artefact(0, "model.safetensors")
def a_model_to_convert(folder, world):
    world.model(folder, **CODE_KEYS)
    world.tokenizer(folder, auto_map={"AutoTokenizer": ["evil.Evil", None]})
    plant_code(folder, world, "evil", "modeling_gpt2")
    return "scripts.convert", ["to_pytorch", "--checkpoint", str(folder), "--output",
                               str(folder / "out")]  # fmt: skip


@artefact(2, "is no name of a shard")
def a_model_to_start_from(folder, world):
    world.tokenizer(folder)
    an_index_that_names(folder, world, "../model.safetensors")
    sizes = dict.fromkeys(("n_layers", "n_heads", "n_embd", "n_positions"))
    return train_on(folder, init_from=folder, **sizes)


# ------------------------------------------------ text


def npy_of_objects(world) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickled(world)


@each(2, {
    "pkl": ("a.pkl", "is not UTF-8"),
    "pt": ("a.pt", "is not UTF-8"),
    "npy": ("a.npy", "is not UTF-8"),
    "txt": ("a.txt", "is not UTF-8"),
    "jsonl": ("a.jsonl", "is not UTF-8|not valid JSON"),
    "parquet": ("a.parquet", "is no Parquet file"),
    "bin": ("a.bin", "holds the id|an odd number"),
    "gz": ("a.txt.gz", "is damaged or not complete"),
    "zst": ("a.txt.zst", "is damaged or not complete"),
    "xz": ("a.txt.xz", "is damaged or not complete"),
})  # fmt: skip
def a_pickle_to_train_on(folder, world, name):
    path = folder / name
    if name == "a.pt":
        zipped(path, world)
        path.write_bytes(path.read_bytes() + b"\xff")
    else:
        path.write_bytes(npy_of_objects(world) if name == "a.npy" else pickled(world) + b"\xff")
    return train_on(folder, train_file=path)


@artefact(0, "training text: 1 document")
def a_pickle_that_is_text(folder, world):
    """Protocol 0 is ASCII: it is shown, and would be trained on, like any other text."""
    (folder / "a.pkl").write_bytes(pickled(world, protocol=0) * 9)
    return train_on(folder, train_file=folder / "a.pkl", show_data=1)


LINE = '{"text": "some words of a document"}\n' * 20


@each(2, {
    "nested": (LINE + '{"text": ' + deep() + "}\n", "line 21: not valid JSON"),
    "a long number": (LINE + '{"text": 1' + "0" * 5000 + "}\n", "line 21: not valid JSON"),
    "columns with ends of lines": ('{"a\\nb\\u001b[2J": "x"}\n', "no column text"),
    "an array": (LINE + "[" * 10 + "]" * 10 + "\n", "line 21: list instead of an object"),
})  # fmt: skip
def lines_of_json(folder, world, content):
    (folder / "a.jsonl").write_text(content)
    return train_on(folder, train_file=folder / "a.jsonl")


@each(2, {
    "gz": (("a.jsonl.gz", gzip.compress), "is over 268435456 bytes long"),
    "xz": (("a.jsonl.xz", lzma.compress), "is over 268435456 bytes long"),
})  # fmt: skip
def one_packed_line_of_300_megabytes(folder, world, case):
    name, pack = case
    block = pack(b"\0" * 2**24)
    (folder / name).write_bytes(block * 19)  # streams, one behind another
    return train_on(folder, train_file=folder / name)


@artefact(2, "is damaged or not complete: Memory usage limit")
def a_dictionary_of_4_gigabytes(folder, world):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0}]
    content = bytearray(lzma.compress(TEXT.encode(), filters=filters))
    content[16] = 40  # the dictionary's size, in the header of the block
    size = (content[12] + 1) * 4
    content[12 + size - 4 : 12 + size] = struct.pack("<I", _crc32(content[12 : 12 + size - 4]))
    (folder / "a.txt.xz").write_bytes(content)
    return train_on(folder, train_file=folder / "a.txt.xz")


def _crc32(data) -> int:
    return zlib.crc32(bytes(data))


@artefact(2, "is damaged or not complete")
def a_window_of_2_gigabytes(folder, world):
    # Frame header: no single segment, a window of 2**31; then a raw block that ends it.
    frame = struct.pack("<IBB", 0xFD2FB528, 0, 21 << 3) + b"\x01\x00\x00"
    (folder / "a.txt.zst").write_bytes(frame)
    return train_on(folder, train_file=folder / "a.txt.zst")


@artefact(2, "is no Parquet file|no text")
def a_parquet_of_long_rows(folder, world):
    """A few kilobytes that stand for terabytes: one text of 16 MB, named by 100,000 rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    long = pa.array(["x" * 2**24])
    rows = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), long)
    pq.write_table(pa.table({"text": rows}), folder / "a.parquet", compression="zstd",
                   store_schema=False)  # fmt: skip
    return train_on(folder, train_file=folder / "a.parquet")


@artefact(2, "cannot be read: .*(script|no data|No .*files|find)")
def a_dataset_with_a_script(folder, world):
    data = folder / "evil"
    data.mkdir()
    plant_code(data, world, "evil")
    words = train_on(folder)[1]
    at = words.index("--train_file")
    return "scripts.train", [*words[:at], "--dataset", str(data), *words[at + 2 :]]


# ------------------------------------------------ settings

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "apply": ("seed: !!python/object/apply:os.system ['touch {canary}']\n", "not valid YAML"),
    "new": ("seed: !!python/object/new:os.system ['touch {canary}']\n", "not valid YAML"),
    "a name": ("seed: !!python/name:os.system\n", "not valid YAML"),
    "a module": ("seed: !!python/module:evil\n", "not valid YAML"),
    "a tag of its own": ("seed: !evil {{}}\n", "not valid YAML"),
    "a bomb of aliases": (BOMB, "alias"),
    "an alias of itself": ("seed: &a [*a]\n", "alias"),
    "merged keys": ("seed: &a {{}}\nx: {{<<: *a}}\n", "alias"),
    "nested": ("seed: " + deep(20_000), "nested too deeply"),
    "nested maps": ("seed: " + "{{a: " * 10_000, "nested too deeply|not valid YAML"),
    "a long number": ("seed: 1" + "0" * 5000, "not valid YAML|expected a whole number"),
    "a long time": ("seed: 1" + ":1" * 20_000, "seed"),
    "zeros": ("\0" * 1000, "not valid YAML"),
    "thousands of names": ("".join(f"x{n}: 1\n" for n in range(6000)), "too many"),
    "a date that is none": ("seed: 2020-99-99\n", "not valid YAML|expected"),
}


@each(2, YAML)
def settings_in_yaml(folder, world, content):
    plant_code(folder, world, "evil")
    (folder / "evil.yaml").write_text(content.replace("{canary}", str(world.canary))
                                      .replace("{{", "{").replace("}}", "}"))  # fmt: skip
    return train_on(folder, "--config", folder / "evil.yaml")


@artefact(2, "over 65536 bytes is too long")
def two_gigabytes_of_yaml(folder, world):
    sparse(folder / "evil.yaml", begin=b"seed: ")
    return train_on(folder, "--config", folder / "evil.yaml")


# ------------------------------------------------ a run of somebody else's


def continued(folder, world, change, **settings):
    """The same command on a run that somebody has changed."""
    shutil.copytree(world.run, folder / "out", symlinks=True)
    change(folder / "out")
    return train_on(folder, train_file=world.run.parent / "text.txt", **settings)


@each(3, {name: YAML[name] for name in ("apply", "a module", "a bomb of aliases", "nested")})
def a_run_with_settings(folder, world, content):
    content = content.replace("{canary}", str(world.canary))
    return continued(folder, world, lambda run: (run / "config.yaml").write_text(content))


@artefact(3, "over 1048576 bytes is too long")
def a_run_with_two_gigabytes_of_settings(folder, world):
    return continued(folder, world, lambda run: sparse(run / "config.yaml", begin=b"seed: "))


METRICS = [
    '{"step": ' + deep() + "}", '{"step": "1", "train_loss": 1}', '{"step": 1, "tokens": "<b>"}',
    '{"step": 1' + "0" * 5000 + "}", '{"step": 2, "train_loss": [[1]], "tokens": {}}', "[]",
    '{"step": 1, "train_loss": 2.5}', '{"step": 1, "validation_loss": 1e999}', "\0" * 99,
    '{"step": 2, "seconds": 1' + "0" * 400 + "}", '{"step": 1, "epoch": "__import__(\'os\')"}',
    '{"step": -1, "tokens": 3, "train_loss": NaN, "mfu": true}', "x" * 3_000_000,
]  # fmt: skip


@artefact(0, "done: 3 steps")
def a_run_with_a_log(folder, world):
    def change(run):
        with open(run / "metrics.jsonl", "a") as file:
            file.write("\n".join(METRICS))
        with open(run / "samples.txt", "a") as file:
            file.write("step " + "9" * 5000 + "\n    <script>\n")

    return continued(folder, world, change)


@each(2, {name: (name, f"symbolic link, {re.escape(name)}") for name in (
    ".lock", "config.yaml", "metrics.jsonl", "loss.png", "report.html", "model.safetensors",
    "config.json", "tokenizer.json", "samples.txt", "checkpoints", "profile", "metrics.tmp",
)})  # fmt: skip
def a_run_with_a_link(folder, world, name):
    """It would be followed to a file of the user's, which is emptied or written over."""

    def change(run):
        is_folder = name in ("checkpoints", "profile")
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).unlink(missing_ok=True)
        if name == "config.yaml":  # it is read, and must be right to come that far
            shutil.copy(world.run / name, folder / "mine")
            (run / name).symlink_to(folder / "mine")
        else:
            (run / name).symlink_to(world.victim if is_folder else world.victim / "precious")

    return continued(folder, world, change)


@artefact(0, "done: 3 steps")
def a_checkpoint_that_is_a_link(folder, world):
    def change(run):
        newest = run / "checkpoints" / "3"
        shutil.move(newest, folder / "3")
        newest.symlink_to(folder / "3")

    shutil.copytree(world.run, folder / "out")
    change(folder / "out")
    return train_on(folder, train_file=world.run.parent / "text.txt")


def sealed(step: pathlib.Path) -> None:
    """Make a changed checkpoint look whole, as whoever sends it can."""
    (step / manifest.FILE).unlink()
    manifest.write(step, int(step.name))


@each(3, {
    "a pickle for meta": ("meta/metadata", ""),
    "a pickle for a manifest": (manifest.FILE, "cannot be read"),
    "a pickle for the state": ("state/_METADATA", ""),
    "2 GB of a manifest": ("sparse", "cannot be read"),
    "meta that is nested": ("nested", "no checkpoint in"),
    "meta of something else": ("other", "meta has no"),
    "a link to a folder": ("link", "is a symbolic link"),
})  # fmt: skip
def a_run_with_checkpoints_with(folder, world, what):
    def change(run):
        for step in sorted((run / "checkpoints").glob("[0-9]*")):
            meta = step / "meta" / "metadata"
            if what == "sparse":
                sparse(step / manifest.FILE)
            elif what == "nested":
                meta.write_text(deep())
                sealed(step)
            elif what == "other":
                raw = json.loads(meta.read_text())
                meta.write_text(json.dumps({**raw, "window": "evil", "cursor": [1]}))
                sealed(step)
            elif what == "link":
                (step / "state" / "link").symlink_to(world.victim)
            else:
                (step / what).write_bytes(pickled(world))
                if what != manifest.FILE:
                    sealed(step)

    return continued(folder, world, change)


@artefact(3, "")
def a_checkpoint_of_another_shape(folder, world):
    """Without a manifest, as an early version wrote it, and with a model that is huge."""
    shutil.copytree(world.run / "checkpoints" / "3", folder / "3")
    (folder / "3" / manifest.FILE).unlink()
    meta = folder / "3" / "meta" / "metadata"
    raw = json.loads(meta.read_text())
    raw["model"] |= {"vocab_size": 2**26, "n_embd": 2**20}
    meta.write_text(json.dumps(raw))
    return "scripts.convert", ["to_pytorch", "--checkpoint", str(folder / "3"), "--output",
                               str(folder / "out")]  # fmt: skip


# ------------------------------------------------ items of an evaluation


@each(2, {
    "nested": ((deep() + "\n").encode(), "line 1: not valid JSON"),
    "a long number": (b'{"text": 1' + b"0" * 5000 + b"}", "line 1: not valid JSON"),
    "a pickle": (None, "line 1: not"),
    "keys with ends of lines": (b'{"a\\nb\\nc\\u001b[2J": 1}', "text is missing"),
})  # fmt: skip
def items_of_lambada(folder, world, content):
    (folder / "a.jsonl").write_bytes(pickled(world) if content is None else content)
    return "scripts.evaluate", ["--model", str(world.run), "--lambada", str(folder / "a.jsonl")]


@artefact(2, "an ending has .* tokens")
def items_of_hellaswag_with_a_million_brackets(folder, world):
    row = {"ctx": "a " + "[" * 10**6, "endings": ["[" * 10**6] * 4, "label": 0}
    (folder / "a.jsonl").write_text(json.dumps(row))
    return "scripts.evaluate", ["--model", str(world.run), "--hellaswag", str(folder / "a.jsonl")]


# ---------------------------------------------------------------- the world


class World:
    """One folder in which everything happens, with something precious beside the artefacts."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.home, self.victim, self.good = (folder / n for n in ("home", "victim", "good"))
        self.canary = folder / "EXECUTED"
        for path in (self.home, self.victim, folder / "tmp"):
            path.mkdir()
        (self.victim / "precious").write_text("precious")
        FlaxGPT2LMHeadModel(make_config(**SIZES)).save_pretrained(self.good)
        shutil.copy(self.good / "model.safetensors", self.victim)
        self.run = self.home / "run" / "out"

    def model(self, folder, weights=True, **settings):
        """A good model, but for what is changed afterwards."""
        for path in self.good.iterdir():
            if weights or path.name != "model.safetensors":
                shutil.copy(path, folder)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | settings))

    def tokenizer(self, folder, **settings):
        tokenizers.make_tokenizer("bytes", ()).save(folder)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    def tree(self, *but: pathlib.Path) -> dict:
        """What there is: path -> (kind, size, time of the last change, target of a link)."""
        left_out = {*but, *(self.folder / name for name in OUR_CACHES)}
        found = {}
        for at, folders, names in os.walk(self.folder):
            folders[:] = [name for name in folders if pathlib.Path(at, name) not in left_out]
            for name in (*folders, *names):
                path = pathlib.Path(at, name)
                if path in left_out or path.match("run *.out"):
                    continue
                stat = path.lstat()
                link = os.readlink(path) if path.is_symlink() else None
                is_folder = path.is_dir() and not link
                state = (0, 0) if is_folder else (stat.st_size, stat.st_mtime_ns)
                found[path.relative_to(self.folder).as_posix()] = stat.st_mode, *state, link
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def fork_server(world):
    modules = ("scripts.convert", "scripts.generate", "scripts.evaluate", MODELS,
               "gpt2_flax.pretrained.convert", "gpt2_flax.evaluation.scorer",
               "gpt2_flax.evaluation.zero_shot", "pyarrow.parquet",
               "gpt2_flax.evaluation.detokenize", "datasets")  # fmt: skip
    variables = {
        "HOME": str(world.home), "TMPDIR": str(world.folder / "tmp"), "HF_HUB_OFFLINE": "1",
        "MPLCONFIGDIR": str(world.folder / "matplotlib"),
    }  # fmt: skip
    with ForkServer(world.folder, modules, **variables) as fork_server:
        world.run.parent.mkdir()
        run = fork_server.start(train_on(world.run.parent)[1], cwd=str(world.home))
        assert run.wait() == 0, run.text()
        yield fork_server


def do_nothing(world, fork_server, folder, script, argv, seconds):
    """(exit code, output) of a process that is seen to run nothing and to write nowhere else."""
    before = world.tree(folder / "out")
    run = fork_server.start(argv, script=script, cwd=str(world.home), memory=MEMORY)
    code = run.wait(seconds)
    executed = world.canary.exists()
    world.canary.unlink(missing_ok=True)
    assert not executed, "it was executed"
    assert world.tree(folder / "out") == before
    return code, run.text()


@pytest.fixture(scope="module")
def of_models(world, fork_server):
    """What became of each artefact opened as a model: name -> line of open_models.

    One process opens all of them, as a new one for each would take most of the time.
    """
    folder, argv, names = world.home / "models", [], []
    folder.mkdir()
    for number, (name, (make, *_)) in enumerate(ARTEFACTS.items()):
        place = folder / str(number)
        place.mkdir()
        script, its_argv = make(place, world)
        if script == MODELS:
            argv += its_argv
            names.append(name)
        else:
            shutil.rmtree(place)
    code, text = do_nothing(world, fork_server, folder, MODELS, argv, 4 * SECONDS)
    shutil.rmtree(folder)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"code"')]
    assert (code, len(lines)) == (0, len(names)), f"{names[len(lines) :][:1]}: {text[-2000:]}"
    return dict(zip(names, lines, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_hostile_file_does_nothing(name, world, fork_server, of_models):
    make, code, match = ARTEFACTS[name]
    if name in of_models:
        got, text = of_models[name]["code"], of_models[name]["text"]
        assert of_models[name]["seconds"] < SECONDS
    else:
        folder = world.home / "artefact"
        folder.mkdir()
        try:
            got, text = do_nothing(world, fork_server, folder, *make(folder, world), SECONDS)
        finally:
            shutil.rmtree(folder)
    assert got == code, text
    assert re.search(match, text), text
    if code:
        check_refusal(text)
    else:
        assert "Traceback" not in text


def check_refusal(text):
    said = re.split(r"^error: ", text, flags=re.MULTILINE)
    assert len(said) == 2, text
    assert len(said[1].splitlines()) <= 3 and len(said[1]) < 2000, text
    assert "Traceback" not in text and "\x1b" not in text


def test_the_canaries_sing(world, tmp_path):
    """What the artefacts plant does leave a file, where something runs it."""
    for trigger in ("pickle", "module"):
        if trigger == "pickle":
            pickle.loads(pickled(world))["wte.weight"].close()
        else:
            plant_code(tmp_path, world, "evil")
            exec((tmp_path / "evil.py").read_text(), {})
        assert world.canary.exists()
        world.canary.unlink()
