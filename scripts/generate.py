"""Continue a prompt with a trained model."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax import cli

main = cli.generate

if __name__ == "__main__":
    sys.exit(cli.start("generate", sys.argv[1:]))
