"""Train the same GPT-2 by this project and by PyTorch, and plot both losses."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax import cli

main = cli.parity

if __name__ == "__main__":
    sys.exit(cli.start("parity", sys.argv[1:]))
