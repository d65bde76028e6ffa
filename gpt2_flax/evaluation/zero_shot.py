"""LAMBADA and HellaSwag from their published files: what a model does without an example.

What is asked, and how the answers are counted, is that of EleutherAI's lm-evaluation-harness
(tasks lambada_openai and hellaswag). docs/evaluation.md says where other protocols differ.
"""

import json
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gpt2_flax.config.settings import plain
from gpt2_flax.data import files
from gpt2_flax.errors import UserError
from gpt2_flax.evaluation.scorer import Scorer, perplexity

ITEMS_AT_ONCE = 1024  # that are sorted by length and held


class BadItemError(ValueError):
    """Why a line of a file is no item."""


class Item(NamedTuple):
    """A context with one or more endings. line: of the file, from 1 on.

    label: the right ending; None where there is but one.
    """

    line: int
    context: str
    endings: list[str]
    label: int | None = None


# ---------------------------------------------------------------- files


def read_items(path: str, parse: Callable, name: str, limit: int) -> Iterator[Item]:
    """The items of a .jsonl file, the first `limit` of them; all where that is 0.

    Raises UserError with the number of the line for what is no item, and for no item at all.
    """
    (path,) = files.find_files((path,), name)[:1]
    number = n_items = 0
    with files.Bytes(path) as file:
        while (not limit or n_items < limit) and (line := file.readline()):
            number += 1
            if line.strip():
                try:
                    item = parse(number, read_line(line))
                except BadItemError as error:
                    raise UserError(f"{path}, line {number}: {error}") from error
                n_items += 1
                yield item
    if not n_items:
        raise UserError(f"{name} {path} has no items\n  each line is to be a JSON object")


def read_line(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadItemError(f"not UTF-8 text\n  {line[:40]!r}") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply, or a number too long")
        raise BadItemError(f"not valid JSON: {reason}\n  mend the line or take it out") from error
    if not isinstance(row, dict):
        raise BadItemError(
            f"{type(row).__name__} instead of an object\n  mend the line or take it out"
        )
    return row


def text_of(row: dict, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        what = f"is {type(value).__name__}, not text" if key in row else "is missing"
        raise BadItemError(
            f"{key} {what}\n  it has {', '.join(map(plain, row)) or 'nothing'}"[:300]
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadItemError(f"{key} has half of a surrogate pair\n  mend the line") from error
    return value


def parse_lambada(line: int, row: dict) -> Item:
    """{"text": ...}: all but the last word is the context. Words end at a space."""
    context, space, word = text_of(row, "text").rstrip().rpartition(" ")
    if not (context.strip() and word):
        raise BadItemError(
            "text has fewer than two words\n  the last one is to be predicted from others"
        )
    return Item(line, context, [space + word])


def parse_hellaswag(line: int, row: dict) -> Item:
    """{"ctx_a", "ctx_b" or "ctx", "endings", "label"}, and "activity_label" to begin with."""
    if "ctx_a" in row:
        context = f"{text_of(row, 'ctx_a')} {text_of(row, 'ctx_b').capitalize()}"
    else:
        context = text_of(row, "ctx")
    if "activity_label" in row:
        context = f"{text_of(row, 'activity_label')}: {context}"
    endings, label = row.get("endings"), row.get("label")
    if not isinstance(endings, list) or len(endings) != 4:
        raise BadItemError("endings is no list of four texts\n  mend the line or take it out")
    if isinstance(label, str) and label.strip() in {*"0123"}:
        label = int(label)
    if type(label) is not int or not 0 <= label < 4:
        raise BadItemError(
            f"label is {str(label)[:40]!r}, not 0 to 3\n"
            "  HellaSwag's test file has no labels; use the validation file"
        )
    endings = [text_of({"an ending": ending}, "an ending") for ending in endings]
    if not context.strip() or not all(ending.strip() for ending in endings):
        raise BadItemError("the context or an ending is empty\n  mend the line or take it out")
    return Item(line, clean(context), [f" {clean(ending)}" for ending in endings], label)


def clean(text: str) -> str:
    """WikiHow's marks taken out: `[title]` begins a sentence, other brackets are notes."""
    lines = text.strip().replace(" [title]", ". ").split("\n")
    return "\n".join(map(without_brackets, lines)).replace("  ", " ")


def without_brackets(line: str) -> str:
    r"""What `re.sub(r"\[.*?\]", "", line)` gives, which takes hours for a line of [ alone."""
    parts, at = [], 0
    while (opens := line.find("[", at)) >= 0 and (closes := line.find("]", opens)) >= 0:
        parts.append(line[at:opens])
        at = closes + 1
    return "".join([*parts, line[at:]])


# ---------------------------------------------------------------- scores


def encode_pair(tokenizer, context: str, ending: str, n_positions: int):
    """(ids of both, how many are the ending's); the beginning is cut off where they are too long.

    The ids are those of the whole text; spaces at the end of the context count as the ending's,
    as GPT-2's tokens begin with a space. An ending without a context follows end-of-text.
    Raises BadItemError for an ending that is too long.
    """
    bare = context.rstrip()
    context, ending = bare, context[len(bare) :] + ending
    ids = tokenizer.encode(context + ending)
    n_context = len(tokenizer.encode(context))
    if not n_context:
        ids, n_context = np.concatenate([[tokenizer.eos_id], ids]), 1
    n_ending = len(ids) - n_context
    if not 1 <= n_ending <= n_positions:
        raise BadItemError(
            f"an ending has {n_ending} tokens; the model has {n_positions} positions"
        )
    return ids[-(n_positions + 1) :].astype(np.int32), n_ending


def score_items(scorer: Scorer, tokenizer, items: Iterator[Item], path: str) -> Iterator[dict]:
    """The log-probabilities of each item's endings, and what else its row of results has."""
    items, done = iter(items), False
    while not done:
        chunk = [item for item, _ in zip(items, range(ITEMS_AT_ONCE), strict=False)]
        done = len(chunk) < ITEMS_AT_ONCE
        pairs = []
        for item in chunk:
            try:
                pairs += [
                    encode_pair(tokenizer, item.context, ending, scorer.n_positions)
                    for ending in item.endings
                ]
            except BadItemError as error:
                raise UserError(f"{path}, line {item.line}: {error}") from error
        scores = scorer.score_any([ids for ids, _ in pairs])
        endings = [of_row.last(n) for of_row, (_, n) in zip(scores, pairs, strict=True)]
        for item in chunk:
            own, endings = endings[: len(item.endings)], endings[len(item.endings) :]
            yield {
                "line": item.line,
                "logprobs": [-of_ending.nll() for of_ending in own],
                "tokens": [len(of_ending.nll_T) for of_ending in own],
                "is_greedy": [bool(of_ending.is_greedy_T.all()) for of_ending in own],
                "characters": [max(1, len(ending) - 1) for ending in item.endings],
                "label": item.label,
            }


def lambada(scorer: Scorer, tokenizer, path: str, limit: int = 0) -> tuple[dict, list[dict]]:
    """(accuracy and perplexity of the last word, a row of scores for each item).

    A word is right where each of its tokens is the likeliest. The perplexity is that of a
    word, however many tokens it has.
    """
    rows = []
    items = read_items(path, parse_lambada, "lambada", limit)
    for row in score_items(scorer, tokenizer, items, path):
        rows.append(
            {
                "task": "lambada",
                "line": row["line"],
                "logprob": row["logprobs"][0],
                "tokens": row["tokens"][0],
                "correct": row["is_greedy"][0],
            }
        )
    nll = -math.fsum(row["logprob"] for row in rows)
    right = [row["correct"] for row in rows]
    return {
        "file": path,
        "items": len(rows),
        "accuracy": mean(right),
        "accuracy_stderr": stderr(right),
        "nll_sum": nll,
        "tokens": sum(row["tokens"] for row in rows),
        "perplexity_per_word": perplexity(nll / len(rows)),
    }, rows


def hellaswag(scorer: Scorer, tokenizer, path: str, limit: int = 0) -> tuple[dict, list[dict]]:
    """(accuracies, a row of scores for each item).

    acc: the ending of the highest log-probability is the right one; acc_norm: that of the
    highest a character; acc_norm_tokens: that of the highest a token.
    """
    rows = []
    items = read_items(path, parse_hellaswag, "hellaswag", limit)
    for row in score_items(scorer, tokenizer, items, path):
        logprobs = np.array(row["logprobs"])
        chosen = {
            "choice": logprobs,
            "choice_norm": logprobs / np.array(row["characters"]),
            "choice_norm_tokens": logprobs / np.array(row["tokens"]),
        }
        choices = {name: int(values.argmax()) for name, values in chosen.items()}
        del row["is_greedy"]
        rows.append({"task": "hellaswag", **row, **choices})
    summary = {"file": path, "items": len(rows)}
    for name in ("acc", "acc_norm", "acc_norm_tokens"):
        right = [row[name.replace("acc", "choice")] == row["label"] for row in rows]
        summary |= {name: mean(right), f"{name}_stderr": stderr(right)}
    return summary, rows


def mean(right: list[bool]) -> float:
    return sum(right) / len(right)


def stderr(right: list[bool]) -> float | None:
    """The standard error of a share, from the sample's variance; None of a single item."""
    share, n = mean(right), len(right)
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
