"""Evaluate a model. `python scripts/evaluate.py --help` lists the settings."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax import cli

main = cli.evaluate

if __name__ == "__main__":
    sys.exit(cli.start("evaluate", sys.argv[1:]))
