"""The formats of weights: what is written, what is read, and what is refused."""

import json
import os
import pathlib
import random
import struct
import tracemalloc

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_flax import FlaxGPT2LMHeadModel
from gpt2_flax.errors import MissingFileError, UserError
from gpt2_flax.pretrained import msgpack_files, safetensors_files, weights
from gpt2_flax.pretrained.modeling import param_shapes
from gpt2_flax.pretrained.weight_names import from_pytorch_name, to_pytorch_name

V, P, D, I, L = 31, 7, 12, 20, 2  # noqa: E741  the inner width has this name everywhere


def make_leaves(dtype="float32", tied=True, base=False, cross=False):
    """Random weights of a tiny GPT-2, flat, in our names and orientation."""
    rng = np.random.default_rng(0)
    shapes = {("wte", "embedding"): (V, D), ("wpe", "embedding"): (P, D)}
    modules = {"attn/c_attn": (3 * D, D), "attn/c_proj": (D, D)}
    modules |= {"mlp/c_fc": (I, D), "mlp/c_proj": (D, I)}
    norms = ["ln_1", "ln_2"]
    if cross:
        modules |= {"crossattention/c_attn": (2 * D, D), "crossattention/q_attn": (D, D)}
        modules |= {"crossattention/c_proj": (D, D)}
        norms.append("ln_cross_attn")
    for layer in map(str, range(L)):
        for norm in norms:
            shapes |= {("h", layer, norm, leaf): (D,) for leaf in ("scale", "bias")}
        for module, shape in modules.items():
            path = ("h", layer, *module.split("/"))
            shapes |= {(*path, "kernel"): shape, (*path, "bias"): shape[:1]}
    shapes |= {("ln_f", leaf): (D,) for leaf in ("scale", "bias")}
    if not base:
        shapes = {("transformer", *path): shape for path, shape in shapes.items()}
    if not tied:
        shapes[("lm_head", "kernel")] = (D, V)
    return {p: rng.normal(size=shape).astype(dtype) for p, shape in shapes.items()}


def shapes_of(leaves):
    return unflatten_dict({p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in leaves.items()})


def assert_same(got, expected):
    """Bit for bit, types included."""
    assert got.keys() == expected.keys()
    for path, leaf in expected.items():
        assert got[path].dtype == leaf.dtype, path
        assert got[path].shape == leaf.shape, path
        assert got[path].tobytes() == leaf.tobytes(), path


def local(directory):
    return lambda name: path if (path := pathlib.Path(directory, name)).is_file() else None


def read(directory, **options):
    return weights.read(local(directory), str(directory), **options)


def flax_names(leaves):
    return {".".join(path): np.ascontiguousarray(leaf) for path, leaf in leaves.items()}


def pytorch_names(leaves):
    return weights.to_pytorch(unflatten_dict(leaves))


def write_safetensors(directory, tensors, metadata=None):
    directory.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", metadata=metadata)


def save_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refusal(error):
    """The text of an error, which is short enough for a user."""
    text = str(error.value)
    assert text.count("\n") <= 2 and len(text) < 800, text
    return text


# ------------------------------------------------------------------ names


@pytest.mark.parametrize("cross", [False, True])
def test_names_go_to_pytorch_and_back(cross):
    for path in make_leaves(tied=False, cross=cross):
        assert from_pytorch_name(to_pytorch_name(path)) == path


def test_every_parameter_of_pytorch_has_its_name(tiny_config):
    config = tiny_config(n_inner=I, add_cross_attention=True, tie_word_embeddings=False)
    state = transformers.GPT2LMHeadModel(config).state_dict()
    assert {from_pytorch_name(name) for name in state} == set(make_leaves(tied=False, cross=True))


# ------------------------------------------------------------------ round trips

SMALL = 3000  # bytes: a few leaves a shard, and wte with its 31 * 12 * 4 fits


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "msgpack"])
@pytest.mark.parametrize("limit", ["5GB", SMALL], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_what_is_saved_is_read_back(tmp_path, safe, limit, dtype):
    leaves = make_leaves(jnp.bfloat16 if dtype == "bfloat16" else dtype, tied=False, cross=True)
    paths = weights.save(
        unflatten_dict(leaves), tmp_path, safe_serialization=safe, max_shard_size=limit
    )
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert (len(paths) > 4) == (limit == SMALL)
    assert_same(read(tmp_path), leaves)


@pytest.mark.parametrize("safe", [True, False])
def test_other_kinds_of_trees_and_arrays_are_saved(tmp_path, safe):
    """Arrays of JAX, FrozenDict, transposed views, models without a head."""
    leaves = make_leaves(base=True)
    tree = flax.core.freeze(unflatten_dict({p: jnp.asarray(x) for p, x in leaves.items()}))
    weights.save(tree, tmp_path / "jax", safe_serialization=safe)
    assert_same(read(tmp_path / "jax"), leaves)
    views = {path: np.asfortranarray(leaf) for path, leaf in leaves.items()}
    weights.save(unflatten_dict(views), tmp_path / "views", safe_serialization=safe)
    assert_same(read(tmp_path / "views"), leaves)
    if safe:
        assert "h.0.attn.c_attn.weight" in safetensors.numpy.load_file(
            tmp_path / "jax/model.safetensors"
        )


def test_types_may_differ_within_a_file(tmp_path):
    leaves = make_leaves()
    for n, path in enumerate(leaves):
        leaves[path] = leaves[path][..., :11].astype(
            ["float16", "float32", "float64", ml_dtypes.bfloat16][n % 4]
        )
    weights.save(unflatten_dict(leaves), tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, spec in header.items():  # where a view of the file can be an array
        size = {"F64": 8, "F32": 4}.get(spec["dtype"], 2)
        assert (8 + length + spec["data_offsets"][0]) % size == 0, name
    opened = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in opened.values()} == {
        *(torch.float16, torch.float32, torch.float64, torch.bfloat16)
    }
    assert_same(safetensors_as_leaves(opened), leaves)


def safetensors_as_leaves(state):
    """Leaves of PyTorch's tensors."""
    found = {}
    for name, tensor in state.items():
        path = from_pytorch_name(name)
        x = tensor.detach().cpu()
        bits = x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        leaf = bits if x.dtype == torch.bfloat16 else x.numpy()
        found[path] = leaf.T if path[-1] == "kernel" else leaf
    return found


@pytest.mark.parametrize("limit", ["5GB", SMALL], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("cross", [True, False], ids=["cross", "plain"])
def test_pytorch_opens_what_is_saved(tiny_config, tmp_path, limit, tied, cross):
    config = tiny_config(n_inner=I, add_cross_attention=cross, tie_word_embeddings=tied)
    leaves = make_leaves(tied=tied, cross=cross)
    config.save_pretrained(tmp_path)
    weights.save(unflatten_dict(leaves), tmp_path, max_shard_size=limit)
    opened, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values())
    state = opened.state_dict()
    if tied:
        del state["lm_head.weight"]
    assert_same(safetensors_as_leaves(state), leaves)


def test_pytorch_opens_a_model_without_a_head(tiny_config, tmp_path):
    leaves = make_leaves(base=True)
    tiny_config(n_inner=I).save_pretrained(tmp_path)
    weights.save(unflatten_dict(leaves), tmp_path)
    opened, report = transformers.GPT2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same(safetensors_as_leaves(opened.state_dict()), leaves)


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2Model"])
@pytest.mark.parametrize("limit", ["5GB", "3KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_pytorch_saves_is_read(tiny_config, tmp_path, kind, limit, dtype):
    config = tiny_config(n_inner=I, add_cross_attention=True, tie_word_embeddings=False)
    model = getattr(transformers, kind)(config).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=limit)
    assert (tmp_path / "model.safetensors.index.json").exists() == (limit == "3KB")
    for from_pt in (True, False):
        expected = safetensors_as_leaves(model.state_dict())
        assert_same(read(tmp_path, from_pt=from_pt), expected)


def test_msgpack_is_flax_s_own_encoding(tmp_path):
    tree = unflatten_dict(make_leaves(jnp.bfloat16, tied=False))
    (path,) = weights.save(tree, tmp_path, safe_serialization=False)
    assert path.name == "flax_model.msgpack"
    assert path.read_bytes() == flax.serialization.to_bytes(tree)


def test_msgpack_arrays_in_chunks(tmp_path, monkeypatch):
    """As flax writes arrays above 2**30 bytes."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 50)  # "10" sorts before "2"
    leaves = make_leaves(jnp.bfloat16)
    data = flax.serialization.to_bytes(unflatten_dict(leaves))
    assert data.count(b"__msgpack_chunked_array__") > 4
    (tmp_path / "flax_model.msgpack").write_bytes(data)
    assert_same(read(tmp_path), leaves)
    (path,) = weights.save(unflatten_dict(leaves), tmp_path / "b", safe_serialization=False)
    assert path.read_bytes() == data


def test_a_level_of_params_is_taken_off(tmp_path):
    leaves = make_leaves()
    tree = {"params": unflatten_dict(leaves)}
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    assert_same(read(tmp_path), leaves)
    tree["opt_state"] = {"count": np.int32(3)}
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    with pytest.raises(UserError, match="holds 'opt_state' beside 'params'") as error:
        read(tmp_path)
    refusal(error)


@pytest.mark.parametrize("metadata", [{"format": "flax"}, None])
def test_safetensors_under_flax_names(tmp_path, metadata):
    """As transformers 4's Flax classes wrote them with safe_serialization=True."""
    leaves = make_leaves(tied=False)
    write_safetensors(tmp_path, flax_names(leaves), metadata)
    assert_same(read(tmp_path), leaves)


def test_safetensors_under_pytorch_names_without_metadata(tmp_path):
    leaves = make_leaves(tied=False)
    write_safetensors(tmp_path, pytorch_names(leaves))
    assert_same(read(tmp_path), leaves)


def test_old_buffers_are_dropped_and_unknown_arrays_are_kept(tmp_path):
    leaves = make_leaves(base=True)
    buffers = {
        "h.0.attn.bias": np.ones((1, 1, P, P), bool),
        "h.1.attn.masked_bias": np.full((), -1e4, np.float32),
        "h.0.crossattention.bias": np.ones((1, 1, P, P), np.uint8),
    }
    extra = {"steps": np.arange(3)}
    write_safetensors(tmp_path, pytorch_names(leaves) | buffers | extra, {"format": "pt"})
    assert_same(read(tmp_path), leaves | {("steps",): np.arange(3)})


def test_formats_have_an_order(tmp_path):
    """msgpack before safetensors, unless from_pt; a single file before shards."""
    leaves = make_leaves()
    other = {path: leaf + 1 for path, leaf in leaves.items()}
    for n, (safe, limit) in enumerate([(False, "1GB"), (False, SMALL), (True, "1GB")]):
        values = {path: leaf + n for path, leaf in leaves.items()}
        weights.save(
            unflatten_dict(values),
            tmp_path / str(n),
            safe_serialization=safe,
            max_shard_size=limit,
        )
        for path in (tmp_path / str(n)).iterdir():
            os.link(path, tmp_path / path.name)
    assert_same(read(tmp_path), leaves)
    (tmp_path / "flax_model.msgpack").unlink()
    assert_same(read(tmp_path), other)
    assert_same(read(tmp_path, from_pt=True), {p: x + 2 for p, x in leaves.items()})


# ------------------------------------------------------------------ saving


def test_shards_are_cut_by_size(tmp_path):
    leaves = make_leaves()
    paths = weights.save(unflatten_dict(leaves), tmp_path, max_shard_size=1200)
    index = json.loads(paths[-1].read_text())
    assert paths[-1].name == "model.safetensors.index.json"
    assert index["metadata"] == {
        "total_size": sum(leaf.nbytes for leaf in leaves.values()),
        "total_parameters": sum(leaf.size for leaf in leaves.values()),
    }
    held = {}
    for n, path in enumerate(paths[:-1], 1):
        assert path.name == f"model-{n:05d}-of-{len(paths) - 1:05d}.safetensors"
        tensors = safetensors.numpy.load_file(path)
        held |= dict.fromkeys(tensors, path.name)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 1200
    assert held == index["weight_map"]
    assert len(safetensors.numpy.load_file(paths[0])) == 1  # wte: 1488 bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (5, 5),
        ("7B", 7),
        ("200MB", 2 * 10**8),
        ("1GB", 10**9),
        ("3GiB", 3 * 2**30),
        ("4 KB", 4000),
        ("150kB", 150_000),
        ("50kiB", 51_200),
    ],
)
def test_sizes_are_read(size, expected):
    assert weights.parse_size(size) == expected


@pytest.mark.parametrize(
    "size", [0, -5, True, 1.5, None, "", "5", "GB", "-1GB", "5Gb", "0MB", "5XB"]
)
def test_sizes_that_are_none_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match="is no size, expected bytes or text like '5GB'"):
        weights.save(unflatten_dict(make_leaves()), tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_only_floats_are_saved(tmp_path):
    leaves = make_leaves()
    leaves[("transformer", "ln_f", "bias")] = np.arange(D)
    with pytest.raises(ValueError, match="transformer/ln_f/bias is no array of float32"):
        weights.save(unflatten_dict(leaves), tmp_path)
    with pytest.raises(ValueError, match="nothing to save"):
        weights.save({}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("limit", ["1GB", 1200])
def test_an_earlier_save_leaves_nothing_that_would_be_read(tmp_path, safe, limit):
    kept = {"config.json", "pytorch_model.bin", "model-card.safetensors", "model-1.safetensors"}
    stale = {
        *("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack.index.json"),
        *("flax_model.msgpack", "model-00009-of-00010.safetensors"),
        *("flax_model-00009-of-00010.msgpack",),
    }
    for name in kept | stale:
        (tmp_path / name).write_text("old")
    leaves = make_leaves()
    paths = weights.save(
        unflatten_dict(leaves), tmp_path, safe_serialization=safe, max_shard_size=limit
    )
    assert {p.name for p in tmp_path.iterdir()} == kept | {p.name for p in paths}
    assert_same(read(tmp_path), leaves)


@pytest.mark.parametrize("limit", ["1GB", SMALL])
def test_a_save_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch, limit):
    leaves = make_leaves()
    weights.save(unflatten_dict(leaves), tmp_path, max_shard_size=limit)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == len(before):  # the last of them
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    other = unflatten_dict({path: leaf + 1 for path, leaf in leaves.items()})
    with pytest.raises(OSError, match="No space"):
        weights.save(other, tmp_path, max_shard_size=limit)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_kill_between_two_renames_is_never_a_mixture(tmp_path, monkeypatch):
    leaves = make_leaves()
    weights.save(unflatten_dict(leaves), tmp_path, max_shard_size=SMALL)
    other = unflatten_dict({path: leaf + 1 for path, leaf in leaves.items()})
    real, calls = os.replace, []

    def killed(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        weights.save(other, tmp_path, max_shard_size=SMALL)
    with pytest.raises(MissingFileError, match="has no weights"):
        read(tmp_path)


# ------------------------------------------------------------------ what is refused


def test_a_place_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        OSError, match=r"has no weights\n.*flax_model\.msgpack, .*, model\.saf"
    ) as e:
        read(tmp_path)
    assert isinstance(e.value, MissingFileError) and isinstance(e.value, ValueError)
    refusal(e)
    weights.save(unflatten_dict(make_leaves()), tmp_path, safe_serialization=False)
    with pytest.raises(MissingFileError, match="without from_pt, Flax's files are read too") as e:
        read(tmp_path, from_pt=True)
    refusal(e)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"a pickle.*\n.*GPT2LMHeadModel.from_pretrained\('.*'\).save_pret"),
        ("pytorch_model.bin.index.json", r"in pytorch_model.bin.index.json only"),
        ("tf_model.h5", r"in tf_model.h5 only.*\n.*from_tf=True"),
    ],
)
def test_pickles_are_not_read_and_not_fetched(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    asked = []

    def get(wanted):
        asked.append(wanted)

    with pytest.raises(UserError, match=message) as error:
        weights.read(get, str(tmp_path), has=lambda name: (tmp_path / name).is_file())
    assert name not in asked
    refusal(error)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "name",
    ["flax_model.msgpack", "model.safetensors", "model.safetensors.index.json"],
)
def test_what_is_there_instead_of_a_file_is_named(tmp_path, name):
    for content, message in [
        (POINTER, rf"{name}: is a git-lfs pointer \(\d\d bytes.*\n.*git lfs pull"),
        (b"", rf"{name}: is empty \(0 bytes\)"),
        (b"<html>Not found</html>", name),
        (bytes(100), name),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as error:
            read(tmp_path)
        refusal(error)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"cannot read .*{name}: Is a directory"):
        weights.read(lambda wanted: tmp_path / name if wanted == name else None, "here")


def pt(change):
    """A hostile change of PyTorch's tensors."""
    tensors = pytorch_names(make_leaves(tied=False, cross=True))
    change(tensors)
    return tensors


def turn(*names):
    def change(tensors):
        for name in names:
            tensors[name] = np.ascontiguousarray(tensors[name].T)

    return change


BLOCK = "transformer.h.1."


@pytest.mark.parametrize(
    "name",
    [
        *("attn.c_attn", "mlp.c_fc", "mlp.c_proj", "crossattention.c_attn"),
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("form", ["pt", "none", "flax", "msgpack", "sharded"])
def test_kernels_the_wrong_way_round_are_refused(tmp_path, name, form):
    """Without any configuration: the square ones of such a file would not be seen."""
    name = name if name == "lm_head.weight" else BLOCK + name + ".weight"
    leaves = make_leaves(tied=False, cross=True)
    path = from_pytorch_name(name)
    leaves[path] = np.ascontiguousarray(leaves[path].T)
    if form == "flax":
        write_safetensors(tmp_path, flax_names(leaves), {"format": "flax"})
    elif form in ("msgpack", "sharded"):
        weights.save(
            unflatten_dict(leaves),
            tmp_path,
            safe_serialization=False,
            max_shard_size=SMALL if form == "sharded" else "1GB",
        )
    else:
        metadata = {"format": "pt"} if form == "pt" else None
        write_safetensors(tmp_path, pytorch_names(leaves), metadata)
    module = path[-2]
    with pytest.raises(UserError, match=rf"'.*{module}.*' lies the wrong way round.*\n") as error:
        read(tmp_path)
    refusal(error)


def test_a_kernel_of_another_width_is_not_taken_for_a_turned_one(tmp_path):
    """That is a matter of the configuration, and of fit()."""
    tensors = pt(lambda t: t.update({BLOCK + "mlp.c_fc.weight": np.zeros((5, 6), "float32")}))
    write_safetensors(tmp_path, tensors, {"format": "pt"})
    assert read(tmp_path)[("transformer", "h", "1", "mlp", "c_fc", "kernel")].shape == (6, 5)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (
            "flax",
            {"format": "pt"},
            r"the format 'pt' .* name of the other kind: '.*kernel'",
        ),
        ("pt", {"format": "flax"}, r"the format 'flax' .* other kind: '.*weight'"),
        ("pt", {"format": "tf"}, "has the format 'tf', expected 'pt' or 'flax'"),
        ("mixed", None, "mixes Flax's names and PyTorch's: '.*', '.*'"),
    ],
)
def test_metadata_and_names_that_contradict_each_other(tmp_path, tensors, metadata, message):
    leaves = make_leaves()
    kinds = {"flax": flax_names(leaves), "pt": pytorch_names(leaves)}
    kinds["mixed"] = kinds["flax"] | kinds["pt"]
    write_safetensors(tmp_path, kinds[tensors], metadata)
    with pytest.raises(UserError, match=r"model.safetensors: .*" + message) as error:
        read(tmp_path)
    refusal(error)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
@pytest.mark.parametrize("form", ["safetensors", "msgpack"])
def test_parameters_that_are_no_floats_are_refused(tmp_path, dtype, form):
    leaves = make_leaves()
    path = ("transformer", "h", "1", "attn", "c_proj", "kernel")
    leaves[path] = np.ones((D, D), dtype)
    if form == "safetensors":
        write_safetensors(tmp_path, pytorch_names(leaves), {"format": "pt"})
    else:
        data = flax.serialization.to_bytes(unflatten_dict(leaves))
        (tmp_path / "flax_model.msgpack").write_bytes(data)
    with pytest.raises(UserError, match=rf"1.attn.c_proj.*' holds {dtype}, expected.* float32"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (
            {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
            b"abcd",
            "holds F8_E4M",
        ),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"abcd", "is damaged: "),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"abc", "is damaged: "),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"abcde", "is damaged: "),
        ({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"abcd", "is damaged: "),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"abcd", "is damaged: "),
        ({"a": {"dtype": "I32", "shape": [1] * 70, "data_offsets": [0, 4]}}, b"abcd", "has shape"),
        ({"a": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}, b"", "has shape"),
        (
            {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"},
            b"abcd",
            "is damaged: ",
        ),
        (b'{"a": ', b"", "is damaged: "),
        (b"\xff" * 8, b"", "is damaged: "),
    ],
)
def test_malformed_safetensors_are_refused(tmp_path, header, data, message):
    save_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(UserError, match=r"model.safetensors: .*" + message) as error:
        read(tmp_path)
    refusal(error)


def ext(shape, name, data, code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, name, data)))


def chunked(shape, chunks):
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}


GOOD = ext([2], "float32", bytes(8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": ext([2], "float32", bytes(7))}, r"shape \(2,\) and float32 has another length"),
        ({"a": ext([2**62, 4], "float32", b"")}, "has another length"),
        ({"a": ext([0], "float32", b"")}, "expected sizes above 0"),
        ({"a": ext([-2], "float32", bytes(8))}, "expected sizes above 0"),
        ({"a": ext([2.0], "float32", bytes(8))}, "expected sizes above 0"),
        ({"a": ext([True], "float32", bytes(4))}, "expected sizes above 0"),
        ({"a": ext("ab", "float32", bytes(8))}, "expected sizes above 0"),
        ({"a": ext([1] * 15 + [2], "O", bytes(16))}, r"dtype b'O', expected one of bfloat16, "),
        ({"a": ext([1], "object", bytes(8))}, "dtype b'object', expected"),
        ({"a": ext([1], "<U2,O", bytes(8))}, "dtype b'<U2,O', expected"),
        ({"a": ext([1], 7, bytes(8))}, "dtype 7, expected"),
        ({"a": ext([1], "float32", 4)}, "another length"),
        ({"a": msgpack.ExtType(1, msgpack.packb([1, 2]))}, "not made of a shape, a dtype and byt"),
        ({"a": msgpack.ExtType(1, b"\xc1")}, "byte codes that msgpack does not have"),
        ({"a": msgpack.ExtType(2, msgpack.packb([0.0, 1.0]))}, "extension 2 is unknown"),
        ({"a": msgpack.ExtType(77, b"")}, "extension 77 is unknown"),
        ({"a": [GOOD]}, "'a' is a list, not an array"),
        ({"a": {"b": 3}}, "'a/b' is a int, not an array"),
        ({"a": None}, "'a' is a NoneType, not an array"),
        ({3: GOOD}, "int is not allowed for map key"),
        ({b"a": GOOD}, "a key of its tree is a bytes, expected text"),
        ([1, 2], "holds a list, expected a tree of parameters"),
        ("text", "holds a str, expected a tree of parameters"),
        (list(range(200)), "exceeds max_array_len"),
        (
            {"a": chunked({"0": 4}, {"0": GOOD})},
            r"chunks of an array of shape \(4,\) have another",
        ),
        ({"a": chunked({"0": 2}, {"1": GOOD})}, "lacks its numbered shape or chunks"),
        ({"a": chunked([2], {"0": GOOD})}, "lacks its numbered shape or chunks"),
        ({"a": chunked({"0": 2}, {})}, "lacks its numbered shape or chunks"),
        ({"a": chunked({"0": 2}, {"0": 5})}, "something else than flat arrays of one dtype"),
        (
            {"a": chunked({"0": 4}, {"0": GOOD, "1": ext([2], "int32", bytes(8))})},
            "something else than flat arrays of one dtype",
        ),
    ],
)
def test_malformed_msgpack_is_refused(tmp_path, content, message):
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(content))
    with pytest.raises(UserError, match=r"flax_model.msgpack: .*" + message) as error:
        read(tmp_path)
    refusal(error)


def deep(levels):
    return b"\x81\xa1a" * levels + b"\xc0"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (msgpack.packb({"a": GOOD})[:-1], "ends too early"),
        (msgpack.packb({"a": GOOD}) + b"abc", "3 bytes follow the end of the msgpack data"),
        (b"\x82" + (b"\xa1a" + msgpack.packb(GOOD)) * 2, "one key twice"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\xc9\xff\xff\xff\xff\x01", "ends too early|exceeds max_ext_len"),
        (deep(20), "more than 16 levels deep"),
        (deep(900), "more than 16 levels deep"),
        (deep(100_000), "nested too deep"),
        (b"\x81\xa1\xff\xc0", "utf-8"),
    ],
)
def test_msgpack_bytes_that_lie_are_refused(tmp_path, data, message):
    (tmp_path / "flax_model.msgpack").write_bytes(data)
    with pytest.raises(UserError, match=r"flax_model.msgpack: .*" + message) as error:
        read(tmp_path)
    refusal(error)


def sharded(directory, safe):
    paths = weights.save(
        unflatten_dict(make_leaves()),
        directory,
        safe_serialization=safe,
        max_shard_size=SMALL,
    )
    return paths[-1], json.loads(paths[-1].read_text())


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "msgpack"])
def test_shards_that_are_not_as_the_index_says(tmp_path, safe):
    path, index = sharded(tmp_path, safe)
    homes = index["weight_map"]
    names = list(homes)
    first, last = homes[names[0]], homes[names[-1]]
    suffix = ".safetensors" if safe else ".msgpack"

    def check(changed, message, kind=UserError):
        path.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(kind, match=message) as error:
            read(tmp_path)
        refusal(error)

    check({n: h for n, h in homes.items() if n != names[0]}, f"{first}: holds .* expects nowhere")
    check(homes | {"made.up": first}, f"{first}: lacks 'made.up', which .*index.json expects")
    moved = homes | {names[1]: last}
    assert moved[names[0]] == homes[names[1]] == first != last
    check(moved, f"{first}: holds {names[1]!r}, which .*.json expects in {last}")
    check(homes | {"x": f"gone{suffix}"}, f"names gone{suffix}, which is not there", OSError)
    check(homes | {"x": 3}, "places 'x' in 3, expected a file's name")
    for name in ("../x", "/etc/passwd", "a/b", "a\\b", "..", "", "config.json", ".hid", "a\nb"):
        name = name + suffix if name in ("../x", "a/b", "a\\b", "a\nb", ".hid") else name
        check({"x": name}, "is no name of a shard, expected one like ")
    check({}, 'no "weight_map"')
    check([], 'no "weight_map"')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", 'has no "weight_map"'),
        (b"{", "is no index of weights"),
        (b"\xff{}", "is no index of weights: .*utf-8"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "one key stands twice"),
        (b"[" * 100_000, "is no index of weights"),
    ],
)
def test_malformed_indexes_are_refused(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(UserError, match=r"index.json: .*" + message) as error:
        read(tmp_path)
    refusal(error)


def test_an_index_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_INDEX_BYTES", 100)
    sharded(tmp_path, True)
    with pytest.raises(UserError, match="expected an index of at most 100"):
        read(tmp_path)


# ------------------------------------------------------------------ mutations


def mutate(data, choose):
    """A few bytes of data changed, cut out, doubled or put in."""
    data = bytearray(data)
    for _ in range(choose.randint(1, 4)):
        at = choose.randrange(len(data) + 1)
        kind = choose.randrange(6)
        if kind < 3:
            data[at : at + 1] = bytes(
                [choose.choice([0, 1, 0x7F, 0x80, 0xFF, choose.randrange(256)])]
            )
        elif kind == 3:
            del data[at : at + choose.randint(1, 9)]
        elif kind == 4:
            data[at:at] = choose.randbytes(choose.randint(1, 9))
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


def tiny_files():
    """Contents that are read, in each format, as small as they can be."""
    leaves = {
        ("transformer", "wte", "embedding"): np.ones((2, 3), np.float32),
        ("transformer", "h", "0", "attn", "c_attn", "kernel"): np.ones((9, 3), np.float16),
        ("transformer", "ln_f", "scale"): np.ones(3, ml_dtypes.bfloat16),
    }
    tree = unflatten_dict(leaves)
    yield "model.safetensors", safetensors.numpy.save(weights.to_pytorch(tree), {"format": "pt"})
    yield "model.safetensors", safetensors.numpy.save(flax_names(leaves), {"format": "flax"})
    yield "flax_model.msgpack", flax.serialization.to_bytes(tree)
    parts = {"0": np.ones(4, np.float32), "1": np.ones(2, np.float32)}
    tree["x"] = chunked({"0": 2, "1": 3}, parts)
    yield "flax_model.msgpack", flax.serialization.to_bytes(tree)
    yield "model.safetensors.index.json", b'{"weight_map": {"ln_f.weight": "model-1.safetensors"}}'


@pytest.mark.parametrize("which", range(5))
def test_mutated_files_are_read_or_refused(tmp_path, which):
    """Nothing but UserError, and no memory taken on a file's word."""
    name, data = list(tiny_files())[which]
    path, choose, outcomes = tmp_path / name, random.Random(which), {True: 0, False: 0}
    shard = safetensors.numpy.save({"ln_f.weight": np.ones(3, np.float32)})
    (tmp_path / "model-1.safetensors").write_bytes(shard)
    path.write_bytes(data)
    read(tmp_path)
    tracemalloc.start()
    try:
        for _ in range(600):
            path.write_bytes(mutate(data, choose))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                read(tmp_path)
                outcomes[True] += 1
            except UserError as error:
                outcomes[False] += 1
                assert str(error).count("\n") <= 2 and len(str(error)) < 1000
            assert tracemalloc.get_traced_memory()[1] - before < 2**22
    finally:
        tracemalloc.stop()
    assert min(outcomes.values()) > 0, outcomes


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
JSON = LEAF | st.lists(LEAF, max_size=3) | st.dictionaries(st.text(max_size=3), LEAF, max_size=3)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E5M2", "C64", "f32"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**70) | st.integers(0, 4), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    header=st.dictionaries(
        st.sampled_from(["wte.weight", "__metadata__", "a.kernel", "h.0.attn.bias", ""]),
        TENSOR | JSON | st.fixed_dictionaries({"format": st.sampled_from(["pt", "flax"])}),
    ),
    size=st.integers(0, 40),
)
def test_made_up_safetensors_headers_are_read_or_refused(tmp_path_factory, header, size):
    path = tmp_path_factory.getbasetemp() / "made_up.safetensors"
    save_raw(path, header, bytes(size))
    try:
        safetensors_files.read(path)
    except ValueError as error:
        assert str(error)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    tree=st.recursive(
        st.builds(
            ext,
            st.lists(st.integers(-1, 2**40) | st.integers(0, 3), max_size=3) | st.integers(0, 9),
            st.sampled_from(["float32", "bfloat16", "int8", "O", "V8", "float128", ""]),
            st.binary(max_size=16) | st.integers(0, 9),
            st.sampled_from([1, 1, 1, 3, 2, 5]),
        )
        | st.none()
        | st.integers(0, 2**63)
        | st.text(max_size=3),
        lambda inner: (
            st.dictionaries(
                st.sampled_from(
                    ["params", "0", "1", "shape", "chunks", "__msgpack_chunked_array__"]
                ),
                inner,
            )
            | st.lists(inner, max_size=2)
        ),
        max_leaves=8,
    )
)
def test_made_up_msgpack_trees_are_read_or_refused(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "made_up.msgpack"
    path.write_bytes(msgpack.packb(tree))
    try:
        for entry in msgpack_files.read(path).values():
            assert entry.leaf.size > 0
    except ValueError as error:
        assert str(error)


# ------------------------------------------------------------------ fitting


def without_prefix(leaves):
    return {path[1:] if path[0] == "transformer" else path: x for path, x in leaves.items()}


@pytest.mark.parametrize("model_base", [True, False], ids=["into_base", "into_head"])
@pytest.mark.parametrize("file_base", [True, False], ids=["of_base", "of_head"])
def test_the_level_transformer_is_put_on_and_taken_off(model_base, file_base):
    model = make_leaves(base=model_base)
    found = make_leaves(base=file_base)
    fit = weights.fit(found, shapes_of(model), "here")
    assert_same(fit.leaves, model)  # made with the same random numbers
    assert (fit.missing, fit.unexpected, fit.mismatched) == (set(), set(), [])


def test_a_head_is_missing_or_passed_over_or_unexpected():
    head = ("lm_head", "kernel")
    tied, untied = make_leaves(), make_leaves(tied=False)
    fit = weights.fit(tied, shapes_of(untied), "here")
    assert (fit.missing, fit.unexpected) == ({head}, set())
    written = tied | {head: tied[("transformer", "wte", "embedding")].T}
    fit = weights.fit(written, shapes_of(tied), "here")
    assert (fit.missing, fit.unexpected, head in fit.leaves) == (set(), set(), False)
    # A head that differs from wte makes the model untied, whatever its configuration says.
    said_tied = transformers.GPT2Config(tie_word_embeddings=True)
    settled, config = weights.settle_head(untied, said_tied, "here", has_head=True)
    assert (config.tie_word_embeddings, said_tied.tie_word_embeddings) == (False, True)
    assert_same(settled, untied)
    _, config = weights.settle_head(written, said_tied, "here", has_head=True)
    assert config.tie_word_embeddings
    assert weights.fit(untied, shapes_of(make_leaves(base=True)), "here").unexpected == set()
    bare = without_prefix(untied)
    assert_same(weights.fit(bare, shapes_of(untied), "here").leaves, untied)


def test_missing_and_unexpected_leaves_are_told():
    model = make_leaves()
    found = dict(model)
    gone = ("transformer", "h", "1", "ln_2", "bias")
    del found[gone]
    found[("transformer", "h", "2", "ln_2", "bias")] = np.zeros(D)
    found[("score", "kernel")] = np.zeros((2, D))
    fit = weights.fit(found, flax.core.freeze(shapes_of(model)), "here")
    assert fit.missing == {gone}
    assert fit.unexpected == {("transformer", "h", "2", "ln_2", "bias"), ("score", "kernel")}
    assert_same(fit.leaves, {path: x for path, x in model.items() if path != gone})


def test_shapes_that_differ_are_refused_or_left_out():
    model = make_leaves()
    wte = ("transformer", "wte", "embedding")
    found = without_prefix(model | {wte: np.zeros((V + 3, D))})
    message = (
        r"transformer/wte/embedding has shape \(34, 12\), the model's is \(31, 12\)\n.*ignore_m"
    )
    with pytest.raises(UserError, match=message) as error:
        weights.fit(found, shapes_of(model), "here")
    refusal(error)
    fit = weights.fit(found, shapes_of(model), "here", ignore_mismatched_sizes=True)
    assert fit.mismatched == [(wte, (V + 3, D), (V, D))]
    assert (fit.missing, fit.unexpected) == (set(), set())
    assert_same(fit.leaves, {path: x for path, x in model.items() if path != wte})


@pytest.mark.parametrize("found", [{}, {("bert", "pooler", "kernel"): np.zeros((2, 3))}])
def test_a_file_of_something_else_is_refused(found):
    with pytest.raises(UserError, match="here: holds no parameter of this model") as error:
        weights.fit(found, shapes_of(make_leaves()), "here", ignore_mismatched_sizes=True)
    refusal(error)


def test_one_leaf_under_two_names_is_refused():
    leaves = make_leaves()
    with pytest.raises(UserError, match="wte/embedding stands in it with and without transformer"):
        weights.fit(leaves | make_leaves(base=True), shapes_of(leaves), "here")


def test_square_kernels_are_transposed_too(tiny_config):
    """A missed transpose of a square matrix passes every check of shapes."""
    params = FlaxGPT2LMHeadModel(tiny_config()).params
    kernel = params["transformer"]["h"]["1"]["attn"]["c_proj"]["kernel"]
    got = weights.to_pytorch(params)["transformer.h.1.attn.c_proj.weight"]
    assert got.shape == (12, 12)
    np.testing.assert_array_equal(got, np.asarray(kernel).T)
    assert got.flags.c_contiguous


def test_old_buffers_and_a_written_tied_head_are_passed_over(tiny_config):
    config = tiny_config()
    params = FlaxGPT2LMHeadModel(config).params
    tensors = weights.to_pytorch(params) | {
        "transformer.h.0.attn.bias": np.ones((1, 1, 7, 7), bool),
        "transformer.h.0.attn.masked_bias": np.float32(-1e4),
        "lm_head.weight": np.asarray(params["transformer"]["wte"]["embedding"]),
    }
    got = weights.from_pytorch(tensors, param_shapes(config))
    assert_same(flatten_dict(got), flatten_dict(jax.device_get(params)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.ln_f.bias"), "ln_f.bias is missing"),
        (lambda t: t.update({"transformer.wpe.weight": np.zeros((3, 12))}), r"wpe.*\(3, 12\)"),
        (lambda t: t.update({"transformer.h.9.ln_1.bias": np.zeros(12)}), "h.9.ln_1.bias is unk"),
    ],
)
def test_weights_that_do_not_fit_are_named(tiny_config, change, message):
    tensors = weights.to_pytorch(FlaxGPT2LMHeadModel(tiny_config()).params)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        weights.from_pytorch(tensors, param_shapes(tiny_config()))
