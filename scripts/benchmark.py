"""Measure the parts of training. `python scripts/benchmark.py --help` lists the settings."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax import cli

main = cli.benchmark

if __name__ == "__main__":
    sys.exit(cli.start("benchmark", sys.argv[1:]))
