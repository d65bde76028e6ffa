"""Convert a checkpoint of a run into a directory that PyTorch's transformers opens."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax.config import ArgumentParser
from gpt2_flax.errors import run_main


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="scripts/convert.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="to_pytorch")
    command = commands.add_parser("to_pytorch", help=__doc__, description=__doc__)
    command.add_argument("--checkpoint", required=True, help="run directory, or one of its steps")
    command.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    command.add_argument("--output", required=True, help="directory to write")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    from gpt2_flax.convert import to_pytorch

    step = to_pytorch(args.checkpoint, args.output, args.step)
    print(f"step {step} of {args.checkpoint} is in {args.output}; it opens in PyTorch with")
    print(f"  transformers.GPT2LMHeadModel.from_pretrained({args.output!r})")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
