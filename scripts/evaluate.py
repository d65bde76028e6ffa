"""Evaluate a model. `python scripts/evaluate.py --help` lists the settings."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax.errors import run_main
from gpt2_flax.evaluate_command import dump, evaluate, load_config
from gpt2_flax.imports import leave_out_torch


def main(argv: list[str]) -> None:
    config = load_config(argv)
    if __name__ == "__main__":  # tests, which import this, compare with PyTorch
        leave_out_torch()
    print(dump(evaluate(config)))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
