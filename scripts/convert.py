"""Convert a model: for PyTorch, or for the Flax classes of transformers 4."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax import cli

main = cli.convert

if __name__ == "__main__":
    sys.exit(cli.start("convert", sys.argv[1:]))
