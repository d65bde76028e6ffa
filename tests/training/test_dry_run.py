"""--dry_run and --show_sharding: what a run would take, without text and without a run."""

import re

import jax
import pytest

from gpt2_flax.errors import run_main
from gpt2_flax.pretrained.modeling import FlaxGPT2LMHeadModel
from gpt2_flax.reporting import metrics
from gpt2_flax.training import dry_run
from scripts.train import main

SIZES = ["--n_layers=2", "--n_heads=4", "--n_embd=64", "--n_positions=64"]
REST = [
    "--block_size=32",
    "--tokenizer=bytes",
    "--batch_size=2",
    "--sample_tokens=0",
    "--train_file=there_is_no_such.txt",
]


@pytest.fixture
def tried(tmp_path, monkeypatch, capsys):
    """Run train.py with these flags, which may not make anything. Returns (code, said)."""
    monkeypatch.chdir(tmp_path)

    def tried(*flags, sizes=SIZES):
        before = sorted(tmp_path.rglob("*"))
        code = run_main(main, [*sizes, *REST, *flags])
        assert sorted(tmp_path.rglob("*")) == before
        said = capsys.readouterr()
        return code, said.out + said.err

    return tried


def number(pattern: str, said: str) -> float:
    return float(re.search(pattern, said)[1].replace(",", ""))


def in_bytes(pattern: str, said: str) -> float:
    found = re.search(pattern + r" ([\d.]+) (MB|GB)", said)
    return float(found[1]) * {"MB": 1e6, "GB": 1e9}[found[2]]


def test_the_table_says_where_each_parameter_lies(tried):
    code, said = tried("--show_sharding", "--parallel", "fsdp")
    assert code == 0
    assert re.search(r"^transformer/h/0..1/attn/c_attn/kernel +192 x 64 +24 x 64 +6,144 x 2$",
                     said, re.MULTILINE)  # fmt: skip
    assert re.search(r"^transformer/wte/embedding +257 x 64 +257 x 8 +8,224$", said, re.MULTILINE)
    assert re.search(r"^transformer/ln_f/bias +64 +all of it +256$", said, re.MULTILINE)
    rows = re.findall(r"^\S+ .*?  ([\d,]+)(?: x (\d))?$", said, re.MULTILINE)
    there = sum(int(n.replace(",", "")) * int(times or 1) for n, times in rows)
    assert re.search(rf"^parameters: .*, {there / 1e6:.2f} MB on each of 8 devices$", said,
                     re.MULTILINE)  # fmt: skip
    assert "compiled" not in said


def test_pmap_has_all_of_it_everywhere(tried):
    code, said = tried("--show_sharding")
    assert code == 0
    assert len(re.findall("all of it", said)) == said.split("\n\n")[0].count("\n")


@pytest.mark.slow
def test_the_plan_is_that_of_the_compiled_step(tried):
    code, said = tried("--dry_run", "--max_steps", "40")
    assert code == 0
    model = FlaxGPT2LMHeadModel.config_class(
        n_layer=2, n_head=4, n_embd=64, n_positions=64, vocab_size=257
    )
    shapes = jax.eval_shape(lambda: FlaxGPT2LMHeadModel(model).params)
    n_parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert "8 devices" not in said  # the table was not asked for
    assert "step: 16 rows, 512 tokens (devices 8 x rows 2 x accumulated 1)" in said
    state = in_bytes("plan:", said)
    assert state == pytest.approx(12 * n_parameters, rel=0.02)
    assert in_bytes("memory of a device:", said) == pytest.approx(
        state + in_bytes("optimizer,", said), rel=0.02
    )
    flops = metrics.flops_per_token(2, 64, 257, 32)
    assert number(r"compute: ([\d.e+]+) FLOP", said) == pytest.approx(512 * flops, rel=0.01)
    # A gradient goes around the ring twice, but for each device's own part.
    assert in_bytes("communication:", said) == pytest.approx(
        2 * 4 * n_parameters * 7 / 8, rel=0.02
    )
    assert "steps: 40, 20,480 tokens; at least" in said


@pytest.mark.slow
def test_shards_take_less(tried):
    whole, shards = (
        tried("--dry_run", "--parallel", engine, "--remat", "block")[1]
        for engine in ("pmap", "fsdp")
    )
    assert in_bytes("plan:", shards) < in_bytes("plan:", whole) / 5
    assert in_bytes("memory of a device:", shards) < in_bytes("memory of a device:", whole)


@pytest.mark.slow(but_every=6)
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], r"steps: as many as 1 epoch of the text come to$"),
        (["--epochs=2.5"], r"steps: as many as 2\.5 epochs of the text come to$"),
        (["--max_steps=2k tokens"], r"steps: 4, 2,048 tokens; at least [\d.]+ \w+$"),
        (["--max_steps=1 hour"], r"steps: at most [\d,]+ in 1 hours$"),
        (["--grad_accum=3"], r"step: 48 rows, 1,536 tokens"),
        (["--batch_size=auto"], r"batch_size auto: \d+ rows a device"),
    ],
    ids=str,
)  # fmt: skip
def test_the_length_of_a_run_as_far_as_it_is_known(tried, flags, expected):
    code, said = tried("--dry_run", *flags)
    assert code == 0, said
    assert re.search(expected, said, re.MULTILINE), said


@pytest.mark.slow
def test_the_sizes_of_known_vocabularies_need_no_network(tried):
    assert "vocabulary 50257" in tried("--dry_run", "--tokenizer", "gpt2")[1]
    assert "vocabulary 900" in tried("--dry_run", "--tokenizer", "bpe:900")[1]
    assert "vocabulary 600" in tried("--dry_run", "--vocab_size", "600")[1]
    code, said = tried("--dry_run", "--tokenizer", "./nothing_here")
    assert code == 2
    assert said.startswith("error: ")


@pytest.mark.slow
def test_a_model_to_start_from_has_its_own_size(tried, tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("model")
    FlaxGPT2LMHeadModel(tiny_config(vocab_size=300, n_positions=32)).save_pretrained(folder)
    code, said = tried("--dry_run", "--init_from", str(folder), sizes=[])
    assert code == 0, said
    assert "vocabulary 300" in said
    flags = ["--dry_run", "--init_from", str(folder), "--block_size", "64"]
    code, said = tried(*flags, sizes=[])
    assert code == 2
    assert "block_size 64 is over the 32 positions" in said


def test_no_file_of_settings_asks_for_it(tried, tmp_path_factory):
    path = tmp_path_factory.mktemp("settings") / "dry.yaml"
    path.write_text("dry_run: true\n")
    code, said = tried("--config", str(path))
    assert code == 2
    assert "dry_run" in said


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(1.234, "1.23 seconds"), (119, "119 seconds"), (120, "2.0 minutes"), (7300, "2.0 hours"),
     (86400 * 365, "365.0 days")],
)  # fmt: skip
def test_times_in_the_unit_that_people_would_use(seconds, expected):
    assert dry_run.words_for(seconds) == expected
