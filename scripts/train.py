"""Train GPT-2 from text. `python scripts/train.py --help` lists the settings."""

import contextlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax import huge_pages
from gpt2_flax.config import dump_yaml, load_config
from gpt2_flax.errors import run_main
from gpt2_flax.imports import leave_out_torch, no_garbage
from gpt2_flax.xla_flags import set_defaults


def main(argv: list[str]) -> int:
    config = load_config(argv)
    if config.print_config:
        print(dump_yaml(config), end="")
        return 0
    with contextlib.ExitStack() as importing:
        if __name__ == "__main__":  # tests, which import this, compare with PyTorch
            leave_out_torch()
            set_defaults()
            importing.enter_context(no_garbage())
        from gpt2_flax.train import train  # after a fault of the settings, which needs no JAX

    return train(config)


if __name__ == "__main__":
    huge_pages.start_again()
    sys.exit(run_main(main, sys.argv[1:]))
