"""Continue a prompt with a trained model: `--temperature 0` takes the likeliest token."""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax.errors import run_main
from gpt2_flax.imports import leave_out_torch
from gpt2_flax.settings import ArgumentParser


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="scripts/generate.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="directory of a finished run or export")
    parser.add_argument("--prompt", default="", help="text to continue (default: a new text)")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="(default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=0, help="likeliest only; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="share of probability; 1: all")
    parser.add_argument("--seed", type=seed, default=0, help="of the sampling")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    if __name__ == "__main__":  # tests, which import this, compare with PyTorch
        leave_out_torch()
    from gpt2_flax.generation import continue_text
    from gpt2_flax.pretrained import load_with_tokenizer

    model, tokenizer = load_with_tokenizer(args.model)
    print(
        continue_text(
            model,
            tokenizer,
            args.prompt,
            args.max_new_tokens,
            args.temperature,
            args.top_k,
            args.top_p,
            args.seed,
        )
    )


def seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2**32, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
