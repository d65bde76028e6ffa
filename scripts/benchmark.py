"""Measure the parts of training. `python scripts/benchmark.py data --help` lists the settings."""

import argparse
import contextlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax.errors import StorageError, run_main
from gpt2_flax.settings import ArgumentParser


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="scripts/benchmark.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="data")
    text = "rows ready per second, the share of a step that waits for data, tokenizing per core"
    data = commands.add_parser("data", help=text, description=text)
    data.add_argument("--train_file", default="", help="(default: Python's own source files)")
    data.add_argument("--tokenizer", default="bpe:8192", help="(default: %(default)s)")
    for flag, kind, default, unit in (
        ("--batch_size", at_least_1, 64, "rows of a step"),
        ("--block_size", at_least_1, 1024, "tokens of a row"),
        ("--tokens_per_second", above_0, 600_000.0, "speed of the step that is fed"),
        ("--steps", at_least_1, 100, "steps that are fed in a process"),
        ("--seconds", above_0, 5.0, "length of a measurement of rows"),
        ("--processes", at_least_1, 3, "processes of each measurement"),
    ):
        data.add_argument(flag, type=kind, default=default, help=f"{unit} (default: {default:g})")
    data.add_argument("--json", metavar="FILE", help="also write the figures there")
    data.add_argument("--debug", action="store_true", help="show an error's traceback")
    args = vars(parser.parse_args(argv))

    from gpt2_flax import benchmark

    with open_json(args.pop("json")) as file:
        results = getattr(benchmark, args.pop("command"))(args)
        print(benchmark.table(results))
        if file is not None:
            file.truncate(0)
            json.dump(results, file, indent=1)


def at_least_1(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def above_0(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")


def open_json(path: str | None):
    """The file for the figures, opened before minutes are spent on them."""
    if path is None:
        return contextlib.nullcontext()
    try:
        return open(path, "a", encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}\n  name another --json"
        ) from error


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
