"""Measure the parts of training. `python scripts/benchmark.py train --help` lists the settings."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax.benchmark_command import build_parser, run
from gpt2_flax.errors import run_main


def main(argv: list[str]) -> None:
    run(build_parser("scripts/benchmark.py", __doc__), argv)


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
