"""The lm-evaluation-harness on our models: a task of local files, and its own backend's results.

Skipped where lm_eval is not installed: pip install 'lm_eval[hf]'.
"""

import json
import os
import subprocess
import sys

import jax
import pytest
import torch
import transformers

from gpt2_flax.data.tokenizers import make_tokenizer
from tests.conftest import ROOT
from tests.text_fixtures import refused, write

lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval, an optional extra")
pytest.importorskip("accelerate", reason="needs lm_eval[hf], to compare with")
# The harness's own imports and its datasets warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")

P = 48
TASKS = {
    "choices": """
task: choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{answers}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "stories": """
task: stories
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answers[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
ROWS = [
    {"question": "What is tea?", "answers": ["a drink", "a boat, mostly"], "right": 0},
    {"question": "And what is longer than the model has positions for, about?",
     "answers": ["this", "that one here"], "right": 1},
    {"question": "x", "answers": ["y", "zz"], "right": 1},
    {"question": "Spaces ", "answers": ["behind", "the question"], "right": 0},
]  # fmt: skip
TEXTS = [{"text": "a"}, {"text": "tea and milk " * 10}, {"text": "x" * P}, {"text": "y" * 49}]


@pytest.fixture(scope="module")
def exported(tiny_config, tmp_path_factory):
    torch.manual_seed(5)
    config = tiny_config(
        n_positions=P, vocab_size=257, bos_token_id=256, eos_token_id=256, initializer_range=0.4
    )
    directory = tmp_path_factory.mktemp("exported")
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    make_tokenizer("bytes", ()).save(directory)
    return directory


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """A folder with the tasks and their files, as a user would lay them out."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("rows", ROWS), ("texts", TEXTS)):
        write(folder / f"{name}.jsonl", "\n".join(map(json.dumps, rows)))
    for name, content in TASKS.items():
        file = folder / f"{'texts' if name == 'texts' else 'rows'}.jsonl"
        data = (
            f"dataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        )
        write(folder / f"{name}.yaml", content.lstrip() + data)
    return folder


@pytest.fixture(scope="module")
def tasks(task_folder):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(task_folder), include_defaults=False)


@pytest.fixture(scope="module")
def results(exported, tasks, tmp_path_factory):
    """What our backend and the harness's own find, in this order."""
    from gpt2_flax.evaluation.lm_eval_adapter import GPT2Flax  # registers the name

    assert GPT2Flax
    cache = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        found = []
        for model, arguments in (
            ("gpt2_flax", {"pretrained": str(exported), "batch_size": 3}),
            ("hf", {"pretrained": str(exported), "batch_size": 1, "dtype": "float32",
                    "device": "cpu"}),
        ):  # fmt: skip
            found.append(
                lm_eval.simple_evaluate(
                    model=model, model_args=arguments, tasks=list(TASKS), task_manager=tasks,
                    bootstrap_iters=0, log_samples=True,
                )
            )  # fmt: skip
    return found


@pytest.mark.parametrize("task", TASKS)
def test_each_answer_is_the_harness_s_own_backend_s(results, task):
    ours, theirs = (result["samples"][task] for result in results)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        if task == "stories":
            assert a["resps"] == b["resps"]
        else:
            for (x,), (y,) in zip(a["resps"], b["resps"], strict=True):
                x, y = (x, y) if task == "choices" else ((x,), (y,))
                assert float(x[0]) == pytest.approx(float(y[0]), rel=1e-5)
                assert [*map(str, x[1:])] == [*map(str, y[1:])]
    assert len({json.dumps(sample["resps"]) for sample in ours}) > 1


@pytest.mark.parametrize("task", TASKS)
def test_the_scores_are_the_harness_s_own_backend_s(results, task):
    ours, theirs = (result["results"][task] for result in results)
    assert ours.keys() == theirs.keys()
    numbers = [name for name, value in theirs.items() if isinstance(value, float)]
    assert numbers
    for name in numbers:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


@pytest.fixture(scope="module")
def ours(exported):
    from gpt2_flax.evaluation.lm_eval_adapter import GPT2Flax

    return GPT2Flax(str(exported), batch_size="2")


def request(*arguments):
    from lm_eval.api.instance import Instance

    return Instance("any", {}, arguments, 0)


def test_what_a_backend_may_be_asked_besides(ours, exported):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(str(exported), dtype="float32", device="cpu")
    pairs = [request("", "tea"), request("a b", " c"), request("", "<|endoftext|>x")]
    for (a, greedy_a), (b, greedy_b) in zip(
        ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
    ):
        assert a == pytest.approx(b, rel=1e-5)
        assert greedy_a == greedy_b
    assert ours.loglikelihood_rolling([request("")]) == [0]


def test_sampling_follows_its_settings_and_repeats_for_a_seed(ours):
    settings = {"do_sample": True, "max_gen_toks": 12}
    prompts = [request(text, settings) for text in ("tea", "a longer prompt than that", "tea")]

    def texts(seed, **changes):
        ours.key = jax.random.key(seed)
        return ours.generate_until([request(p.args[0], settings | changes) for p in prompts])

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert texts(0, temperature=0.0) == texts(1, temperature=0)
    assert texts(0, top_k=1) == texts(0, do_sample=False)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_beams": 3, "max_gen_toks": 4}, "generation_kwargs num_beams: not known"),
        ({}, "max_gen_toks 256 must be 1 to 47: the model has 48 positions"),
        ({"max_gen_toks": 0}, "max_gen_toks 0 must be"),
    ],
)
def test_what_generation_cannot_obey_is_refused(ours, settings, match):
    with refused(match):
        ours.generate_until([request("tea", settings)])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"max_batch_size": 4}, "max_batch_size has no effect with gpt2_flax"),
        ({"batch_size": "auto"}, "batch_size must be a whole number from 1 on, got auto"),
    ],
)
def test_what_the_harness_offers_and_we_do_not_have_is_refused(exported, arguments, match):
    from gpt2_flax.evaluation.lm_eval_adapter import GPT2Flax

    with refused(match):
        GPT2Flax(str(exported), **arguments)


def test_a_continuation_longer_than_the_model(ours):
    with refused("a continuation has 49 tokens; the model has 48 positions"):
        ours.loglikelihood([request("a", "b" * 49)])


def test_the_command_runs_a_task_of_local_files(exported, task_folder, tmp_path):
    """As a user runs it: the harness's own flags, and its table of results."""
    process = subprocess.run(
        [sys.executable, "-m", "gpt2_flax.evaluation.lm_eval_adapter", "--model", "gpt2_flax",
         "--model_args", f"pretrained={exported}", "--batch_size", "2", "--tasks", "choices",
         "--include_path", str(task_folder)],
        cwd=ROOT, env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "acc_norm" in process.stdout
