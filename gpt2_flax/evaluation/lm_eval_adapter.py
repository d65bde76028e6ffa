"""EleutherAI's lm-evaluation-harness on our models: `pip install 'gpt2_flax[lm_eval]'`.

python -m gpt2_flax.evaluation.lm_eval_adapter \\
    --model gpt2_flax --model_args pretrained=DIR --tasks NAME
takes the flags of `lm_eval run`. In Python, importing this module registers the name gpt2_flax.
"""

import itertools
import json
import sys
from typing import Literal

import jax
import lm_eval.__main__
import lm_eval.models  # it is imported by the harness only while no model is registered
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows
from transformers import GenerationConfig

from gpt2_flax.errors import UserError, run_main
from gpt2_flax.evaluation.evaluate import EvaluateConfig, load_model
from gpt2_flax.evaluation.scorer import Scorer
from gpt2_flax.generation.generation import generate

DEFAULT_NEW_TOKENS = 256  # where a task names none, as with the harness's own models
SAMPLING = ("temperature", "top_k", "top_p")


@register_model("gpt2_flax")
class GPT2Flax(TemplateLM):
    """A model of this project under the harness. Encoding of pairs is the harness's own."""

    def __init__(
        self,
        pretrained: str,
        tokenizer: str = "",
        step: int = 0,
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int | str = 8,
        seed: int = 0,
        device=None,
        max_batch_size=None,
    ):
        """pretrained, tokenizer, step, dtype: as --model and so on of scripts/evaluate.py.

        batch_size: rows on each device. seed: of sampling. device: the harness hands in cuda:0
        without being asked; JAX chooses devices, by JAX_PLATFORMS. max_batch_size: refused.
        """
        super().__init__()
        if max_batch_size is not None:
            raise UserError("max_batch_size has no effect with gpt2_flax\n  leave it out")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size must be a whole number from 1 on, got {batch_size}")
        config = EvaluateConfig(
            model=str(pretrained), tokenizer=tokenizer, step=int(step), dtype=dtype
        )
        self.flax_model, params, self.ours = load_model(config)
        self.scorer = Scorer(self.flax_model, params, int(batch_size))
        self.n_rows, self.key = int(batch_size), jax.random.key(int(seed))

    @property
    def eot_token_id(self) -> int:
        return self.ours.eos_id

    @property
    def max_length(self) -> int:
        return self.scorer.n_positions

    @property
    def tokenizer_name(self) -> str:
        return self.ours.name

    def tok_encode(self, string: str, add_special_tokens=None, **kwargs) -> list[int]:
        return self.ours.encode(string).tolist()

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False) -> list:
        """(log-probability, whether greedy) of (_, context, continuation) in ids."""
        rows, lengths = [], []
        for _, context, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens; the model has"
                    f" {self.max_length} positions"
                )
            rows.append(np.array([*context, *continuation][-(self.max_length + 1) :], np.int32))
            lengths.append(len(continuation))
        scores = self.scorer.score_any(rows)
        ends = [of_row.last(n) for of_row, n in zip(scores, lengths, strict=True)]
        results = [(-of_end.nll(), bool(of_end.is_greedy_T.all())) for of_end in ends]
        for (pair, *_), result in zip(requests, results, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text; its first id is predicted from end-of-text."""
        windows, counts = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            of_text = [
                (None, [*given, wanted[-1]][: -len(wanted)], wanted)
                for given, wanted in get_rolling_token_windows(
                    ids, self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            windows += of_text
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows))
        results = [sum(value for value, _ in itertools.islice(scores, n)) for n in counts]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """What the model goes on with after each context, up to a stop sequence."""
        results: list = [""] * len(requests)
        prompts = [self.read_request(*request.args) for request in requests]

        def kind(n: int):
            _, options, _, room = prompts[n]
            return json.dumps(options, sort_keys=True), room

        order = sorted(range(len(requests)), key=kind)
        for _, group in itertools.groupby(order, kind):
            group = list(group)
            for first in range(0, len(group), self.n_rows):
                numbers = group[first : first + self.n_rows]
                texts = self.continue_prompts([prompts[n] for n in numbers])
                for n, text in zip(numbers, texts, strict=True):
                    results[n] = text
                    self.cache_hook.add_partial("generate_until", requests[n].args, text)
        return results

    def read_request(self, context: str, options: dict):
        """(ids of the prompt, settings of generation, stop sequences, length to pad it to)."""
        options = dict(options)
        until = options.pop("until", None) or []
        n_new = int(options.pop("max_gen_toks", DEFAULT_NEW_TOKENS))
        sampling = {name: options.pop(name) for name in SAMPLING if name in options}
        do_sample = options.pop("do_sample", False) and sampling.get("temperature", 1.0) > 0
        if options:
            raise UserError(f"generation_kwargs {', '.join(options)}: not known to gpt2_flax")
        longest = self.max_length - n_new
        if n_new < 1 or longest < 1:
            raise UserError(
                f"max_gen_toks {n_new} must be 1 to {self.max_length - 1}: the model has"
                f" {self.max_length} positions"
            )
        ids = self.tok_encode(context)[-longest:] or [self.eot_token_id]
        settings = {"max_new_tokens": n_new, "do_sample": bool(do_sample)}
        settings |= sampling if do_sample else {}
        until = [until] if isinstance(until, str) else until
        return ids, settings, until, min(longest, self.scorer.padded(len(ids)))

    def continue_prompts(self, prompts: list) -> list[str]:
        """The texts that follow prompts which share their settings and padded length."""
        _, settings, _, length = prompts[0]
        eos = self.eot_token_id
        # Rows that fill the batch up are of end-of-text; what comes of them is dropped.
        ids_BxP = np.full((self.n_rows, length), eos, np.int32)
        mask_BxP = np.zeros((self.n_rows, length), np.int32)
        mask_BxP[:, -1] = 1
        for n, (ids, *_) in enumerate(prompts):
            ids_BxP[n, length - len(ids) :] = ids
            mask_BxP[n, length - len(ids) :] = 1
        options = GenerationConfig(**settings, eos_token_id=eos, pad_token_id=eos)
        self.key, key = jax.random.split(self.key)
        out = generate(
            self.flax_model, ids_BxP, options, key, params=self.scorer.params,
            attention_mask=mask_BxP,
        )  # fmt: skip
        new_BxN = np.asarray(out.sequences)[:, length:]
        texts = []
        for (_, _, until, _), new in zip(prompts, new_BxN, strict=False):
            ends = np.flatnonzero(new == eos)
            text = self.ours.decode(new[: ends[0]] if len(ends) else new)
            for stop in filter(None, until):
                text = text.split(stop)[0]
            texts.append(text)
        return texts


def main(argv: list[str]) -> None:
    sys.argv = ["lm_eval", *argv]
    lm_eval.__main__.cli_evaluate()


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
