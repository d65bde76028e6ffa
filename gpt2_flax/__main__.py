"""`python -m gpt2_flax` is the command `gpt2-flax`."""

import sys

from gpt2_flax.cli import main

if __name__ == "__main__":
    sys.exit(main())
