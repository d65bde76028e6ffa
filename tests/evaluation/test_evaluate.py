"""Scores of texts and of items: PyTorch's, and the same however rows are grouped."""

import functools
import json
import math
import random
import re

import jax
import numpy as np
import pytest
import torch
import transformers

from gpt2_flax import FlaxGPT2LMHeadModel
from gpt2_flax.data import batches, sources
from gpt2_flax.data.tokenizers import make_tokenizer
from gpt2_flax.distributed import parallel
from gpt2_flax.errors import MissingFileError, UserError
from gpt2_flax.evaluation import evaluate as evaluate_command
from gpt2_flax.evaluation import zero_shot
from gpt2_flax.evaluation.detokenize import Counted, wikitext
from gpt2_flax.evaluation.scorer import Scorer, mean_loss, score_text, windows
from gpt2_flax.model.gpt2 import FlaxGPT2LMHeadModule
from gpt2_flax.training import step
from gpt2_flax.training.train import train
from tests.conftest import ROOT
from tests.test_errors import check_refusal, run_script
from tests.text_fixtures import refused, write

P = 40  # positions
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def oracle(tiny_config):
    """PyTorch's model of the bytes, its weights large enough that no two scores are alike."""
    torch.manual_seed(3)
    config = tiny_config(
        n_positions=P, vocab_size=257, bos_token_id=256, eos_token_id=256, initializer_range=0.4
    )
    config._attn_implementation = "eager"
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def exported(oracle, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "model"
    oracle.save_pretrained(directory)
    make_tokenizer("bytes", ()).save(directory)
    return directory


@pytest.fixture(scope="module")
def make_scorer(exported):
    model, params = FlaxGPT2LMHeadModel.from_pretrained(exported, _do_init=False)

    def make(batch_size=2, n_devices=8):
        return Scorer(model, params, batch_size, jax.devices()[:n_devices])

    return make


@pytest.fixture(scope="module")
def scorer(make_scorer):
    return make_scorer()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("bytes", ())


def oracle_nll(oracle, ids):
    """(nll, whether it is the likeliest) of each id but the first, by PyTorch."""
    ids = torch.tensor(np.asarray(ids, np.int64))[None]
    with torch.no_grad():
        logits = oracle(ids[:, :-1]).logits.double().log_softmax(-1)
    nll = -logits.gather(-1, ids[:, 1:, None])[0, :, 0]
    return nll.numpy(), (logits.argmax(-1) == ids[:, 1:])[0].numpy()


def run(*argv):
    return evaluate_command.evaluate(evaluate_command.load_config([*map(str, argv)]))


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("n_ids", [2, 3, 5, 6, 7, 8, 30])
@pytest.mark.parametrize(("context", "stride"), [(1, 1), (5, 1), (5, 2), (5, 4), (5, 5)])
def test_every_id_but_the_first_is_counted_once(n_ids, context, stride):
    counted = []
    for n, (begin, first, end) in enumerate(windows(n_ids, context, stride)):
        assert begin == n * stride
        assert begin < first < end <= begin + context + 1
        counted += range(first, end)
        if n:  # an id is predicted from no less than that
            assert first - begin == context - stride + 1
    assert counted == list(range(1, n_ids))


def test_windows_written_out():
    assert [*windows(9, 4, 2)] == [(0, 1, 5), (2, 5, 7), (4, 7, 9)]


@pytest.mark.parametrize(("context", "stride"), [(P, P), (P, 5), (7, 3), (1, 1)])
@pytest.mark.parametrize("n_ids", [2, 100])
def test_a_text_s_loss_is_pytorch_s(oracle, scorer, context, stride, n_ids):
    ids = np.random.default_rng(n_ids).integers(0, 257, n_ids).astype(np.int32)
    expected, first = 0.0, 1
    for begin in range(0, n_ids, stride):
        end = min(begin + context + 1, n_ids)
        if first < end:
            nll, _ = oracle_nll(oracle, ids[begin:end])
            expected += nll[first - begin - 1 :].sum()
            first = end
    got, n_targets = score_text(scorer, ids, context, stride)
    assert n_targets == n_ids - 1
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_text_s_loss_is_the_same_for_any_batch_and_number_of_devices(make_scorer):
    ids = np.random.default_rng(0).integers(0, 257, 1000).astype(np.int32)
    reference, _ = score_text(make_scorer(1, 1), ids, P, 5)
    for batch_size, n_devices in [(64, 1), (3, 2), (7, 8)]:
        got, _ = score_text(make_scorer(batch_size, n_devices), ids, P, 5)
        assert got == pytest.approx(reference, rel=1e-6)


def test_rows_of_any_lengths_keep_their_order_and_compile_few_programs(oracle, make_scorer):
    rng = np.random.default_rng(1)
    scorer = make_scorer(1, 2)
    lengths = (13, 2, 30, 9, P + 1, 13, 5, 33, 3, 4, P)
    rows = [rng.integers(0, 257, n).astype(np.int32) for n in lengths]
    for row, scores in zip(rows, scorer.score_any(rows), strict=True):
        nll, is_greedy = oracle_nll(oracle, row)
        np.testing.assert_allclose(scores.nll_T, nll, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(scores.is_greedy_T, is_greedy)
    assert scorer.program._cache_size() == 3  # of 16, 32 and 40 targets


# ---------------------------------------------------------------- inside a run


@pytest.mark.slow
def test_the_loss_inside_a_run_is_the_same_for_any_batch_and_number_of_devices(tiny_config):
    """Rows of 250 targets, the last one shorter: a mean of batches' means would differ."""
    module = FlaxGPT2LMHeadModule(tiny_config(n_positions=250))
    params = module.init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    params = jax.tree.map(lambda leaf: leaf * 5, params)
    ids = StoredIds(np.random.default_rng(0).integers(0, 31, 5_017))
    step_function = functools.partial(step.eval_step, model=module)
    alone = jax.jit(step_function)

    def loss(size, evaluate, put):
        rows = batches.evaluation_batches(ids, 250, size, 0, slice(0, size))
        return mean_loss(evaluate, params, map(put, rows))

    reference, n_targets = loss(1, alone, lambda batch: batch)
    assert n_targets == 5_016
    assert reference > 3.5
    for size in (7, 96):
        assert loss(size, alone, lambda batch: batch)[0] == pytest.approx(reference, rel=1e-6)
    for engine in ("pmap", "jit"):
        on_eight = parallel.compile_eval_step(step_function, engine)
        for size in (8, 96):
            got, n = loss(size, on_eight, lambda batch: parallel.put_batch(batch, None))
            assert n == n_targets
            assert got == pytest.approx(reference, rel=1e-6)


class StoredIds:
    """Ids as token files give them."""

    def __init__(self, ids):
        self.ids = ids.astype(np.int32)

    def __len__(self):
        return len(self.ids)

    def read(self, start, count):
        return self.ids[start : start + count]


# ---------------------------------------------------------------- the command on a text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    content = "The cat sat on the mat .\n\n A second line , with more .\n" * 3 + "öü end"
    return write(tmp_path_factory.mktemp("text") / "text.txt", content)


def test_the_command_counts_tokens_words_lines_and_bytes(oracle, exported, text, tmp_path):
    out = tmp_path / "out.json"
    result = run("--model", exported, "--file", text, "--stride", 7, "--json", out)
    assert json.loads(out.read_text()) == result
    content = text.read_text("utf-8")
    ids = np.frombuffer(content.encode(), np.uint8).astype(np.int32)
    got = result["perplexity"]
    assert got["tokens"] == len(ids) - 1
    assert got["words"] == len(content.split()) == 44
    assert got["lines"] == 9
    assert got["bytes"] == got["bytes_detokenized"] == len(content.encode())
    assert (got["context"], got["stride"], got["detokenizer"]) == (P, 7, "none")
    expected = sum(
        oracle_nll(oracle, ids[w.begin : w.end])[0][w.first - w.begin - 1 :].sum()
        for w in windows(len(ids), P, 7)
    )
    assert got["nll_sum"] == pytest.approx(expected, rel=1e-5)
    assert got["perplexity_per_token"] == pytest.approx(math.exp(expected / (len(ids) - 1)))
    assert got["perplexity_per_word"] == pytest.approx(math.exp(expected / 44))
    assert got["perplexity_per_word_and_line_end"] == pytest.approx(math.exp(expected / 53))
    assert got["bits_per_byte"] == pytest.approx(expected / math.log(2) / len(content.encode()))


def test_detokenizing_changes_what_is_scored_and_not_what_it_is_divided_by(exported, text):
    as_it_is = run("--model", exported, "--file", text)["perplexity"]
    joined = run("--model", exported, "--file", text, "--detokenizer", "wikitext")["perplexity"]
    for count in ("words", "lines", "bytes"):
        assert joined[count] == as_it_is[count]
    expected = wikitext(text.read_text("utf-8"))
    assert joined["bytes_detokenized"] == len(expected.encode()) < joined["bytes"]
    assert joined["tokens"] == len(expected.encode()) - 1
    assert joined["bits_per_byte"] == joined["nll_sum"] / math.log(2) / as_it_is["bytes"]


def test_ends_of_text_are_scored_where_they_are_asked_for(exported, tmp_path):
    documents = write(tmp_path / "two.jsonl", '{"text": "tea"}\n{"text": "milk"}\n')
    assert run("--model", exported, "--file", documents)["perplexity"]["tokens"] == 6
    got = run("--model", exported, "--file", documents, "--add_eos")["perplexity"]
    assert (got["tokens"], got["words"], got["bytes"]) == (8, 2, 7)


def test_files_of_ids_have_no_words(exported, tmp_path):
    ids = np.arange(50, dtype=np.uint16)
    (tmp_path / "ids.bin").write_bytes(ids.tobytes())
    got = run("--model", exported, "--file", tmp_path / "ids.bin")["perplexity"]
    assert got["tokens"] == 49
    assert not got.keys() & {"words", "bytes", "perplexity_per_word", "bits_per_byte"}
    with refused("detokenizer has no effect on ids"):
        run("--model", exported, "--file", tmp_path / "ids.bin", "--detokenizer", "wikitext")


def test_a_perplexity_beyond_all_floats_is_null():
    result = {"perplexity": {"perplexity_per_word": math.inf, "tokens": 3}}
    assert json.loads(evaluate_command.dump(result))["perplexity"] == {
        "perplexity_per_word": None,
        "tokens": 3,
    }


# ---------------------------------------------------------------- zero-shot


LAMBADA = [
    "tea is milk",
    "a much longer text than the model has positions for, and then the last wörd",
    "two  spaces",
    'said\n\n"no" she  answered ',
]
HELLASWAG = [
    {
        "ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Sitting", "label": 3,
        "endings": ["eats", "is [note] here", "sings a long song", "stands up"],
    },
    {
        "ctx": "The pot [title] boils", "label": "1",
        "endings": ["over.", "a", "bb", "and then it is taken off"],
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    lines = [json.dumps({"text": text}) for text in LAMBADA]
    lambada = write(folder / "lambada.jsonl", "\n\n".join(lines) + "\n")
    hellaswag = write(folder / "hellaswag.jsonl.gz", "\n".join(map(json.dumps, HELLASWAG)))
    return lambada, hellaswag


def oracle_ending(oracle, context, ending):
    """(log-probability, tokens, whether greedy) of an ending after a context, by PyTorch."""
    ids = [*(context + ending).encode()]
    n = len(ids) - len(context.encode())
    nll, is_greedy = oracle_nll(oracle, ids[-(P + 1) :])
    return -nll[-n:].sum(), n, bool(is_greedy[-n:].all())


def test_lambada_is_pytorch_s_item_by_item(oracle, exported, items, tmp_path):
    out = tmp_path / "items.jsonl"
    got = run("--model", exported, "--lambada", items[0], "--items", out)
    assert "perplexity" not in got
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["line"] for row in rows] == [1, 3, 5, 7]
    split = [("tea is", " milk"), (LAMBADA[1].rpartition(" ")[0], " wörd"), ("two", "  spaces"),
             ('said\n\n"no" she', "  answered")]  # fmt: skip
    expected = [oracle_ending(oracle, *pair) for pair in split]
    for row, (logprob, tokens, correct) in zip(rows, expected, strict=True):
        assert row["logprob"] == pytest.approx(logprob, rel=1e-5)
        assert (row["tokens"], row["correct"]) == (tokens, correct)
    nll = -sum(logprob for logprob, *_ in expected)
    assert got["lambada"]["nll_sum"] == pytest.approx(nll, rel=1e-5)
    assert got["lambada"]["perplexity_per_word"] == pytest.approx(math.exp(nll / 4), rel=1e-4)


def test_hellaswag_is_pytorch_s_item_by_item(oracle, exported, items, tmp_path):
    out = tmp_path / "items.jsonl"
    got = run("--model", exported, "--hellaswag", items[1], "--items", out)["hellaswag"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    contexts = ["Sitting: A man sits. He", "The pot. boils"]
    endings = [[" eats", " is here", " sings a long song", " stands up"],
               [" over.", " a", " bb", " and then it is taken off"]]  # fmt: skip
    right = {"choice": 0, "choice_norm": 0, "choice_norm_tokens": 0}
    for row, item, context, texts in zip(rows, HELLASWAG, contexts, endings, strict=True):
        scored = [oracle_ending(oracle, context, text) for text in texts]
        np.testing.assert_allclose(row["logprobs"], [s[0] for s in scored], rtol=1e-5)
        assert row["tokens"] == [s[1] for s in scored]
        values = {
            "choice": [s[0] for s in scored],
            "choice_norm": [s[0] / (len(t) - 1) for s, t in zip(scored, texts, strict=True)],
            "choice_norm_tokens": [s[0] / s[1] for s in scored],
        }
        for name, of_endings in values.items():
            assert row[name] == int(np.argmax(of_endings))
            right[name] += row[name] == int(item["label"])
    assert [got[n] for n in ("acc", "acc_norm", "acc_norm_tokens")] == [
        n / 2 for n in right.values()
    ]


BAD_ITEMS = [
    ("lambada", "[1]", "line 3: list instead of an object"),
    ("lambada", '{"text": "tea', "line 3: not valid JSON"),
    ("lambada", '{"txt": "tea is"}', "line 3: text is missing\\n  it has txt"),
    ("lambada", '{"text": 3}', "line 3: text is int, not text"),
    ("lambada", '{"text": " tea "}', "line 3: text has fewer than two words"),
    ("lambada", '{"text": "a \\ud800"}', "line 3: text has half of a surrogate pair"),
    ("lambada", '{"text": "a ' + P * "b" + '"}', "line 3: an ending has 41 tokens; the model has"),
    (
        "hellaswag",
        '{"ctx": "a", "endings": ["b"], "label": 0}',
        "line 3: endings is no list of fo",
    ),
    (
        "hellaswag",
        '{"endings": [], "label": 0}',
        "line 3: ctx is missing\\n  it has endings, label",
    ),
    (
        "hellaswag",
        '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": ""}',
        "line 3: label is '', not 0 to 3\\n  HellaSwag's test file has no labels",
    ),
    (
        "hellaswag",
        '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 4}',
        "line 3: label is '4', not 0 to 3",
    ),
    (
        "hellaswag",
        '{"ctx": "a", "endings": ["b", 1, "d", "e"], "label": 0}',
        "line 3: an ending is int, not text",
    ),
    (
        "hellaswag",
        '{"ctx": "a", "endings": ["b", " ", "d", "e"], "label": 0}',
        "line 3: the context or an ending is empty",
    ),
]


@pytest.mark.parametrize(("task", "line", "match"), BAD_ITEMS)
def test_a_bad_line_is_named(scorer, tokenizer, tmp_path, task, line, match):
    good = {"lambada": {"text": "tea is"}, "hellaswag": HELLASWAG[1]}[task]
    path = write(tmp_path / "items.jsonl", f"{json.dumps(good)}\n\n{line}\n")
    with refused(f"items.jsonl, {match}"):
        getattr(zero_shot, task)(scorer, tokenizer, str(path))
    # What was asked for is read, and nothing else.
    assert getattr(zero_shot, task)(scorer, tokenizer, str(path), 1)[0]["items"] == 1


def test_a_file_without_items_is_refused(scorer, tokenizer, tmp_path):
    with refused("lambada .*items.jsonl has no items"):
        zero_shot.lambada(scorer, tokenizer, str(write(tmp_path / "items.jsonl", "\n \n")))


# ---------------------------------------------------------------- models


TINY = [
    "--n_layers", "1", "--n_heads", "2", "--n_embd", "8", "--n_positions", "24",
    "--block_size", "16", "--batch_size", "1", "--tokenizer", "bytes", "--sample_tokens", "0",
    "--max_steps", "4", "--save_every", "1", "--keep", "9", "--learning_rate", "1e-2",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """(a finished run, the text that it was evaluated on)."""
    from gpt2_flax.config.train_config import load_config

    output_dir = tmp_path_factory.mktemp("trained") / "run"
    files = ["--train_file", str(text), "--validation_file", str(text)]
    flags = [*TINY, *files, "--output_dir", str(output_dir), "--eval_every", "1"]
    assert train(load_config(flags)) == 0
    return output_dir, text


@pytest.mark.slow
def test_every_kind_of_place_gives_a_run_s_own_validation_loss(trained):
    output_dir, text = trained
    rows = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    logged = {row["step"]: row["validation_loss"] for row in rows}
    assert len({*logged.values()}) == 4
    as_in_training = ["--file", text, "--context", "16", "--add_eos"]
    places = [
        (4, ["--model", output_dir]),
        (4, ["--model", output_dir / "model.safetensors"]),
        (2, ["--model", output_dir, "--step", "2"]),
        (3, ["--model", output_dir / "checkpoints" / "3"]),
        (4, ["--model", output_dir / "checkpoints"]),
    ]
    for n, place in places:
        got = run(*place, *as_in_training)["perplexity"]
        assert got["nll_sum"] / got["tokens"] == pytest.approx(logged[n], rel=1e-6)


def test_a_model_that_is_not_there_or_not_whole(exported, text, tmp_path):
    with refused("no_such_model", MissingFileError):
        run("--model", tmp_path / "no_such_model", "--file", text)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    config = json.loads((exported / "config.json").read_text()) | {"n_layer": 3}
    write(damaged / "config.json", json.dumps(config))
    (damaged / "model.safetensors").symlink_to(exported / "model.safetensors")
    with refused("lacks 12 weights, such as transformer/h/2/"):
        run("--model", damaged, "--file", text)


def test_a_tokenizer_that_is_not_the_model_s(exported, text, tmp_path, capsys):
    tokenizer = make_tokenizer("bpe:300", ["tea and milk and tea " * 50])
    tokenizer.save(tmp_path)
    with refused(r"has \d+ tokens, the model in .* has 257\n  name the one it was trained with"):
        run("--model", exported, "--file", text, "--tokenizer", tmp_path)


# ---------------------------------------------------------------- bad settings


BAD_SETTINGS = [
    (["--stride", "9", "--context", "8"], "stride 9 is over context 8"),
    (["--stride", "-1"], "stride must be 0 or more, got -1"),
    (["--context", "x"], "--context: expected a whole number, got 'x'"),
    (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
    (["--lambada", "x", "--stride", "3"], "stride has no effect without a text"),
    (["--lambada", "x", "--text_column", "y"], "text_column has no effect without a text"),
    (["--file", "x", "--dataset", "y"], "dataset has no effect with file"),
    (["--file", "x", "--dataset_split", "y"], "dataset_split has no effect with file"),
    (["--encoding_errors", "replace"], "encoding_errors has no effect without a file"),
    (["--limit", "3"], "limit has no effect without items"),
    (["--items", "x"], "items has no effect without items"),
    (["--tokenizer", "bpe:300"], "tokenizer bpe:300 is learned while training"),
    (["--dataset", "python_stdlib", "--dataset_split", "dev"], "it has train and test"),
    (["--dataset", "python_stdlib", "--text_column", "x"], "text_column has no effect with data"),
    (["--detokeniser", "none"], "unknown flag --detokeniser\n  did you mean --detokenizer"),
    (["--detokenizer", "moses"], "--detokenizer: expected one of none, wikitext, got 'moses'"),
]


@pytest.mark.parametrize(("flags", "match"), BAD_SETTINGS)
def test_a_bad_setting_is_refused_before_anything_is_read(flags, match):
    with refused(match):
        evaluate_command.load_config(["--model", "m", *flags])


def test_all_faults_come_at_once():
    with pytest.raises(UserError) as error:
        evaluate_command.load_config(["--model", "m", "--stride", "-1", "--limit", "2", "--x"])
    assert str(error.value).count("error: ") == 2


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--context", P + 1], "context 41 is over the 40 positions of the model"),
        (["--stride", P + 1], "stride 41 is over the context of 40"),
        (["--file", "none.txt"], "^file none.txt does not exist"),
        (["--lambada", "none.jsonl"], "^lambada none.jsonl does not exist"),
        (["--json", "/no_such_folder/out.json"], "cannot write /no_such_folder/out.json"),
        (["--text_column", "x"], "text_column has no effect on files of kind text"),
    ],
)
def test_what_only_the_model_and_the_files_tell(exported, text, flags, match):
    named = [] if {"--file", "--lambada"} & {*flags} else ["--file", text]
    with refused(match):
        run("--model", exported, *named, *flags)


def test_a_text_too_short_to_predict_anything(exported, tmp_path):
    with refused(r"one.txt has 1 tokens, too few: the first is predicted from nothing"):
        run("--model", exported, "--file", write(tmp_path / "one.txt", "a"))


@pytest.mark.slow
def test_the_script_prints_one_object_and_a_mistake_ends_with_2(exported, text, tmp_path):
    process = run_script("evaluate", "--model", exported, "--file", text)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["perplexity"]["words"] == 44
    process = run_script("evaluate", "--model", tmp_path, "--file", text)
    assert (process.returncode, process.stdout) == (2, "")
    check_refusal(process.stderr, "has no config.json")


def test_python_s_own_files_have_a_held_out_part(monkeypatch, exported, tmp_path):
    parts = [tmp_path / "train.py", tmp_path / "held_out.py"]
    for n, path in enumerate(parts):
        write(path, "x = 1\n" * (n + 1))
    monkeypatch.setattr(
        sources, "python_sources", lambda: [sources.Files([p], sources.Text()) for p in parts]
    )
    command = ["--model", exported, "--dataset", "python_stdlib"]
    assert run(*command)["perplexity"]["lines"] == 2
    assert run(*command, "--dataset_split", "train")["perplexity"]["lines"] == 1


# ---------------------------------------------------------------- detokenizing


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a @-@ b , 1 @,@ 000 @.@ 5 .", "a-b, 1,000.5."),
        ('said " yes ( or no ) " . " No " ; x', 'said "yes (or no)". "No"; x'),
        ("did n 't , O 'Brien 's , the boys ' hats", "did n't, O'Brien's, the boys' hats"),
        ("5 % of $ 3 , 10 km / h at 20 \u00b0 C", "5% of $3, 10 km/h at 20 \u00b0C"),
        ("1990 \u2013 2000 , he \u2013 or she", "1990\u20132000, he \u2013 or she"),
        (" = = Early life = = ", "== Early life =="),
        (" = Robert = ", "= Robert ="),
        ("2 + 2 = 4", "2 + 2 = 4"),
        ("= = =", "= = ="),
        ("", ""),
    ],
)
def test_detokenizing_wikitext(words, expected):
    assert wikitext(words) == expected
    assert wikitext(f"{words} \n{words}") == f"{expected}\n{expected}"


@pytest.mark.parametrize("detokenize", [None, wikitext])
def test_a_text_in_pieces_is_detokenized_and_counted_as_a_whole(tmp_path, tokenizer, detokenize):
    text = "The cat , on @-@ line \u00fc .\n \n" * 5000 + "a last line ,"
    path = write(tmp_path / "text.txt", text)
    counted = Counted(sources.Files([path], sources.Text()), detokenize)
    pieces = [*counted.pieces(0, tokenizer.cuts)]
    assert len(pieces) > 1
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    expected = wikitext(text) if detokenize else text
    assert "".join(piece.text for piece in pieces) == expected
    assert counted.words == len(text.split())
    assert counted.lines == text.count("\n")
    assert counted.bytes == len(text.encode())
    assert counted.bytes_out == len(expected.encode())


@pytest.mark.skipif(not (SHARED / "wikitext-2").is_dir(), reason="needs ../shared/data/wikitext-2")
def test_wikitext_2_loses_nothing_but_spaces_and_its_marks(tokenizer):
    text = (SHARED / "wikitext-2" / "test.txt").read_text("utf-8")
    counted = Counted(
        sources.Files([SHARED / "wikitext-2" / "test.txt"], sources.Text()), wikitext
    )
    joined = "".join(piece.text for piece in counted.pieces(0, tokenizer.cuts))
    # The published count of words has an <eos> for every line.
    assert counted.words + counted.lines == 245_569
    bare = text
    for sign in "-,.":
        bare = bare.replace(f" @{sign}@ ", sign)
    assert "".join(joined.split()) == "".join(bare.split())
    for left_over in (" , ", " . ", " @", "@ ", "( ", " )", ' " '):
        assert left_over not in joined
    # A line's own `' s` is taken for the beginning of a quotation.
    assert joined.count(" 's ") <= bare.count(" ' s ")


def test_brackets_are_taken_out_as_the_harness_does():
    """Which says `re.sub(r"\\[.*?\\]", "", text)`, and takes the square of a text's length."""
    rng = random.Random(0)
    for _ in range(2000):
        text = "x" + "".join(rng.choices("[]a \n", k=rng.randrange(30))) + "x"
        assert zero_shot.clean(text) == re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def test_a_mean_loss_counts_every_target_alike():
    assert mean_loss(lambda params, sums: sums, None, [(2.0, 1), (3.0, 9)]) == (0.5, 10)
