"""scripts/train.py with a bug: its first step raises an error that quotes what it should not."""

import os
import sys

from gpt2_flax.reporting import metrics
from scripts import train

SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "HF_ENDPOINT")


def main(argv: list[str]) -> int:
    def fail(self, step, values):
        print("the step fails", file=sys.stderr)
        raise RuntimeError(f"a bug, with {' and '.join(os.environ[name] for name in SECRETS)}")

    metrics.Meter.add = fail
    return train.main(argv)
