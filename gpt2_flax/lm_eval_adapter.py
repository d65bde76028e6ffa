"""The adapter for lm_eval under its first name: `python -m gpt2_flax.lm_eval_adapter`."""

import sys

from gpt2_flax.errors import run_main
from gpt2_flax.evaluation.lm_eval_adapter import main

if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
