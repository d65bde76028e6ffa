"""scripts/convert.py, every kind of file both ways; and training from what is there."""

import json
import pathlib
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_flax import FlaxGPT2LMHeadModel
from gpt2_flax.config.train_config import load_config
from gpt2_flax.data.tokenizers import make_tokenizer
from gpt2_flax.errors import CheckpointError, UserError, run_main
from gpt2_flax.pretrained import convert, orbax_files
from gpt2_flax.training.setup import choose_model
from gpt2_flax.training.train import train
from tests.recorded import record

ROOT = pathlib.Path(__file__).resolve().parents[2]
FACTS = json.loads((record.HERE / "numerics.json").read_text("utf-8"))["directories"]
SINGLE = record.FILES / "single"


def digest_of(directory, name="single"):
    """Of what is in a directory's files, read by the class that wrote the recording."""
    cls = getattr(convert.modeling, record.DIRECTORIES[name][1])
    _, params = cls.from_pretrained(directory, _do_init=False)
    return record.digest(flatten_dict(params, sep="/"))


@pytest.fixture(scope="module")
def pytorch_directory(tmp_path_factory):
    """A tiny model that PyTorch itself saved, in bfloat16, with a tokenizer and other files."""
    directory = tmp_path_factory.mktemp("pytorch") / "model"
    config = transformers.GPT2Config(**record.SIZES | {"vocab_size": 257})
    model = transformers.GPT2LMHeadModel(config).bfloat16()
    model.generation_config.update(do_sample=True, top_k=7)
    model.save_pretrained(directory)
    make_tokenizer("bytes", ()).save(directory)
    (directory / "README.md").write_text("a card")
    (directory / "modeling_custom.py").write_text("raise SystemExit")
    return directory


@pytest.fixture
def script(capsys):
    """Run scripts/convert.py's main; (exit code, stdout, stderr)."""
    main = runpy.run_path(str(ROOT / "scripts" / "convert.py"))["main"]

    def run(*argv):
        capsys.readouterr()
        code = run_main(main, [str(word) for word in argv])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", record.DIRECTORIES)
def test_what_the_original_wrote_opens_in_pytorch_to_the_bit(name, tmp_path):
    _, cls, dtype, _ = record.DIRECTORIES[name]
    done = convert.to_pytorch(record.FILES / name, tmp_path / "pytorch", verify=True)
    assert done.difference < 1e-5
    assert done.class_name == cls.removeprefix("Flax")
    opened = getattr(transformers, done.class_name).from_pretrained(tmp_path / "pytorch")
    assert str(opened.dtype) == f"torch.{dtype}"
    assert digest_of(tmp_path / "pytorch", name) == FACTS[name]["digest"]
    convert.from_pytorch(tmp_path / "pytorch", tmp_path / "flax")
    assert not list((tmp_path / "flax").glob("*.safetensors"))
    assert digest_of(tmp_path / "flax", name) == FACTS[name]["digest"]


def test_a_pytorch_model_becomes_msgpack_and_comes_back_to_the_byte(pytorch_directory, tmp_path):
    done = convert.from_pytorch(pytorch_directory, tmp_path / "flax", verify=True)
    assert done.difference < 1e-5
    names = {path.name for path in (tmp_path / "flax").iterdir()}
    assert names == set(done.files) == {
        "config.json", "generation_config.json", "flax_model.msgpack",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "flax" / name).read_bytes() == (pytorch_directory / name).read_bytes()
    model = FlaxGPT2LMHeadModel.from_pretrained(tmp_path / "flax")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    assert model.generation_config.top_k == 7
    convert.to_pytorch(tmp_path / "flax", tmp_path / "back")
    ours = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back").state_dict()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(pytorch_directory).state_dict()
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_large_models_are_written_in_shards(tmp_path):
    convert.to_pytorch(SINGLE, tmp_path / "pytorch", max_shard_size="4KB")
    assert len(list((tmp_path / "pytorch").glob("model-*.safetensors"))) > 2
    convert.from_pytorch(tmp_path / "pytorch", tmp_path / "flax", max_shard_size=4000)
    assert len(list((tmp_path / "flax").glob("flax_model-*.msgpack"))) > 2
    assert digest_of(tmp_path / "flax") == FACTS["single"]["digest"]


def test_a_weights_file_by_itself_is_enough_with_its_configuration_beside(tmp_path):
    convert.to_pytorch(SINGLE / "flax_model.msgpack", tmp_path / "out")
    assert digest_of(tmp_path / "out") == FACTS["single"]["digest"]


def test_from_pytorch_takes_pytorchs_weights_where_both_kinds_lie(tmp_path):
    both = tmp_path / "both"
    convert.to_pytorch(record.FILES / "bfloat16", both)
    (both / "flax_model.msgpack").write_bytes((SINGLE / "flax_model.msgpack").read_bytes())
    convert.from_pytorch(both, tmp_path / "out")
    assert digest_of(tmp_path / "out") == FACTS["bfloat16"]["digest"]
    convert.to_pytorch(both, tmp_path / "from_flax")
    assert digest_of(tmp_path / "from_flax") == FACTS["single"]["digest"]


def test_a_subfolder_is_looked_in(tmp_path):
    convert.to_pytorch(record.FILES, tmp_path / "out", subfolder="single")
    assert digest_of(tmp_path / "out") == FACTS["single"]["digest"]


# ---------------------------------------------------------------- refusals


def test_nothing_is_written_over_a_model(tmp_path):
    for name in ("model.safetensors", "flax_model-00001-of-00002.msgpack", "config.yaml",
                 "config.json", "pytorch_model.bin"):  # fmt: skip
        output = tmp_path / name.split(".")[0]
        output.mkdir(exist_ok=True)
        (output / name).write_bytes(b"precious")
        for convert_ in (convert.to_pytorch, convert.from_pytorch):
            with pytest.raises(UserError, match=rf"holds a model already \({name}\)\n  name ano"):
                convert_(SINGLE, output)
        assert [path.name for path in output.iterdir()] == [name]
        (output / name).unlink()
    with pytest.raises(UserError, match="is a file"):
        convert.to_pytorch(SINGLE, SINGLE / "config.json")


def test_random_weights_are_never_written_for_missing_ones(tmp_path):
    """An untied head that the files lack: from_pretrained draws it, a conversion must not."""
    source = tmp_path / "source"
    source.mkdir()
    settings = json.loads((SINGLE / "config.json").read_text()) | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(settings))
    (source / "flax_model.msgpack").write_bytes((SINGLE / "flax_model.msgpack").read_bytes())
    with pytest.raises(UserError, match=r"lacks lm_head/kernel\n  a model is converted whole"):
        convert.to_pytorch(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "code", "match"),
    [
        (["to_pytorch", "--checkpoint", SINGLE, "--step", 3], 3, "holds no checkpoint"),
        (["to_pytorch", "--checkpoint", "./nothing"], 2, "nothing"),
        (["from_pytorch", "--model", "no/such-model"], 2, "no/such-model"),
        (["from_pytorch", "--model", "no/such", "--local_files_only"], 2, "local_files_only"),
        (["from_pytorch", "--model", record.FILES], 2, "has no config.json"),
        (["from_pytorch", "--model", SINGLE, "--max_shard_size", "big"], 2, "max_shard_size"),
        (["from_pytorch", "--model", SINGLE, "--verify"], 2, "PyTorch, which cannot open"),
        (["from_pytorch", "--model", SINGLE, "--step", 3], 2, "unknown flag --step"),
    ],
)
def test_bad_input_exits_in_three_lines_and_writes_nothing(script, tmp_path, argv, code, match):
    returned, out, err = script(*argv, "--output", tmp_path / "out")
    assert (returned, out) == (code, "")
    assert match in err and err.startswith("error: ") and err.count("\n") <= 3
    assert not (tmp_path / "out").exists()


def test_storage_that_refuses_exits_with_4_and_leaves_no_half_of_a_model(
    script, tmp_path, monkeypatch
):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.weights, "save", full)
    code, out, err = script("to_pytorch", "--checkpoint", SINGLE, "--output", tmp_path / "out")
    assert (code, out) == (4, "")
    assert "No space left on device" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_verify_without_pytorch_says_what_to_install(script, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_torch_available", lambda: False)
    code, _, err = script(
        "to_pytorch", "--checkpoint", SINGLE, "--verify", "--output", tmp_path / "out"
    )
    assert (code, "pip install torch" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_verify_finds_a_wrong_conversion(tmp_path, monkeypatch):
    """As if the square kernels had not been transposed."""
    write = convert.write

    def wrong(model, *args, **kwargs):
        path = ("transformer", "h", "0", "attn", "c_proj", "kernel")
        leaves = model.leaves | {path: np.ascontiguousarray(model.leaves[path].T)}
        return write(model._replace(leaves=leaves), *args, **kwargs)

    monkeypatch.setattr(convert, "write", wrong)
    with pytest.raises(UserError, match="differ by up to"):
        convert.to_pytorch(SINGLE, tmp_path / "out", verify=True)


def test_the_script_says_what_it_wrote_and_the_line_that_opens_it(
    script, pytorch_directory, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, out, err = script(
        "from_pytorch", "--model", pytorch_directory, "--output", "flax", "--verify"
    )
    assert (code, err) == (0, "")
    assert "flax_model.msgpack" in out and "largest difference" in out
    assert "open it with gpt2_flax.FlaxGPT2LMHeadModel.from_pretrained('flax')" in out
    code, out, _ = script("to_pytorch", "--checkpoint", "flax", "--output", "pytorch")
    assert code == 0
    assert "open it with transformers.GPT2LMHeadModel.from_pretrained('pytorch')" in out


# ---------------------------------------------------------------- training from a model

TINY_RUN = [
    "--block_size", "6", "--batch_size", "1", "--tokenizer", "bytes", "--sample_tokens", "0",
    "--eval_every", "0", "--validation_share", "0", "--learning_rate", "1e-9", "--dropout", "0.2",
]  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of a run that begins from a model and learns next to nothing."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("tea and milk and sugar and honey " * 9)

    def make(init_from, output_dir, *flags):
        where = ["--init_from", str(init_from), "--output_dir", str(output_dir)]
        return load_config([*TINY_RUN, "--train_file", str(text), *where, *map(str, flags)])

    return make


def save_filled(model, directory):
    """Save a model with weights that no compiler had to make; returns them."""
    flat = flatten_dict(model.params_shape_tree, sep="/")
    filled = record.fill({name: leaf.shape for name, leaf in flat.items()})
    params = unflatten_dict(filled, sep="/")
    model.save_pretrained(directory, params=params)
    return params


def choose(config):
    return choose_model(config, make_tokenizer("bytes", ()), None)


def assert_same(params, expected):
    """Float32, and equal to what was begun from, whatever that is in."""
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, np.asarray(b, np.float32), atol=1e-6)


@pytest.fixture(scope="module")
def run(settings, pytorch_directory, tmp_path_factory):
    """A run that began from bfloat16 msgpack files, which were moved away after its first step."""
    directory = tmp_path_factory.mktemp("runs")
    convert.from_pytorch(pytorch_directory, directory / "model")
    config = settings(directory / "model", directory / "run", "--max_steps", "1")
    assert train(config) == 0
    (directory / "model").rename(directory / "moved")
    config = settings(directory / "model", directory / "run", "--max_steps", "2")
    assert train(config) == 0
    return directory / "run"


@pytest.mark.slow
def test_a_run_from_bfloat16_files_is_of_float32_and_goes_on_without_them(run):
    assert orbax_files.locate(run, None).name == "2"
    ended = FlaxGPT2LMHeadModel.from_pretrained(run)
    began = FlaxGPT2LMHeadModel.from_pretrained(run.parent / "moved")
    assert began.params["transformer"]["wte"]["embedding"].dtype == jnp.bfloat16
    assert_same(ended.params, began.params)
    saved = json.loads((run / "config.json").read_text())
    assert [saved[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")] == [0.2] * 3


@pytest.mark.slow
def test_a_run_and_one_of_its_checkpoints_can_be_started_from(run, settings, tmp_path):
    expected = FlaxGPT2LMHeadModel.from_pretrained(run).params
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run / "checkpoints", unfinished / "checkpoints")
    for source in (run, unfinished, orbax_files.locate(run, None)):
        _, params = choose(settings(source, tmp_path / "new"))
        assert_same(params, expected)


@pytest.mark.slow
def test_a_checkpoint_opens_in_pytorch(run, tmp_path):
    convert.to_pytorch(orbax_files.locate(run, 1), tmp_path / "step", verify=True)
    assert (tmp_path / "step" / "tokenizer.json").is_file()
    convert.to_pytorch(run, tmp_path / "newest", verify=True)
    final = (run / "model.safetensors").read_bytes()
    assert (tmp_path / "newest" / "model.safetensors").read_bytes() == final
    convert.from_pytorch(run, tmp_path / "flax")
    assert_same(
        FlaxGPT2LMHeadModel.from_pretrained(tmp_path / "flax").params,
        FlaxGPT2LMHeadModel.from_pretrained(run).params,
    )


def test_a_checkpoint_that_cannot_be_read_exits_with_3(run, script, tmp_path):
    (tmp_path / "2" / "state").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert.to_pytorch(tmp_path / "2", tmp_path / "out")
    code, _, err = script(
        "to_pytorch", "--checkpoint", run, "--step", 7, "--output", tmp_path / "out"
    )
    assert (code, "has no step 7; it has 1, 2" in err) == (3, True)


@pytest.mark.parametrize("kind", ["untied", "base", "untied_base"])
def test_untied_models_and_base_models_can_be_started_from(kind, settings, tmp_path):
    config = transformers.GPT2Config(
        **record.SIZES | {"vocab_size": 257}, tie_word_embeddings="untied" not in kind
    )
    cls = convert.modeling.FlaxGPT2Model if "base" in kind else FlaxGPT2LMHeadModel
    expected = save_filled(cls(config, _do_init=False), tmp_path)
    chosen, params = choose(settings(tmp_path, tmp_path / "run"))
    assert chosen.tie_word_embeddings is config.tie_word_embeddings
    assert ("lm_head" in params) is not chosen.tie_word_embeddings
    if "base" in kind:
        assert_same(params["transformer"], expected)
    else:
        assert_same(params, expected)


def test_what_cannot_be_started_from_is_refused_before_anything_is_written(settings, tmp_path):
    with pytest.raises(UserError, match="no/such-model"):
        choose(settings("no/such-model", tmp_path / "run"))
    with pytest.raises(UserError, match=r"has 257 tokens, the model in .* has 31\n  use the mod"):
        choose(settings(SINGLE, tmp_path / "run"))
    config = transformers.GPT2Config(**record.SIZES | {"vocab_size": 257, "n_layer": 1})
    config.add_cross_attention = True
    save_filled(FlaxGPT2LMHeadModel(config, _do_init=False), tmp_path / "crossing")
    with pytest.raises(UserError, match="has cross-attention, which text alone cannot train"):
        choose(settings(tmp_path / "crossing", tmp_path / "run"))
    with pytest.raises(UserError, match="over the 7 positions of"):
        train(settings(tmp_path / "crossing", tmp_path / "run", "--block_size", "8"))
    assert not (tmp_path / "run").exists()
