"""Measure the parts of training. `python scripts/benchmark.py data --help` lists the settings."""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax.config import ArgumentParser
from gpt2_flax.errors import run_main


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="scripts/benchmark.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="data")
    text = "rows ready per second, the share of a step that waits for data, tokenizing per core"
    data = commands.add_parser("data", help=text, description=text)
    data.add_argument("--train_file", default="", help="(default: Python's own source files)")
    data.add_argument("--tokenizer", default="bpe:8192", help="(default: %(default)s)")
    for flag, kind, default, unit in (
        ("--batch_size", int, 64, "rows of a step"),
        ("--block_size", int, 1024, "tokens of a row"),
        ("--tokens_per_second", float, 600_000.0, "speed of the step that is fed"),
        ("--steps", int, 100, "steps that are fed in a process"),
        ("--seconds", float, 5.0, "length of a measurement of rows"),
        ("--processes", int, 3, "processes of each measurement"),
    ):
        data.add_argument(flag, type=kind, default=default, help=f"{unit} (default: {default:g})")
    data.add_argument("--json", metavar="FILE", help="also write the figures there")
    data.add_argument("--debug", action="store_true", help="show an error's traceback")
    args = vars(parser.parse_args(argv))

    from gpt2_flax import benchmark

    results = getattr(benchmark, args.pop("command"))(args)
    print(benchmark.table(results))
    if args["json"]:
        pathlib.Path(args["json"]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
