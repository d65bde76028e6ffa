"""Convert a model: for PyTorch, or for the Flax classes of transformers 4."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax.errors import run_main
from gpt2_flax.settings import ArgumentParser

WHAT = "run, one of its steps, directory, weights file or hub id"


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="scripts/convert.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="to_pytorch|from_pytorch"
    )
    for name, flag, text in (
        ("to_pytorch", "--checkpoint", "write model.safetensors, which PyTorch opens"),
        ("from_pytorch", "--model", "write flax_model.msgpack, as transformers 4 did"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(flag, dest="source", required=True, metavar="WHAT", help=WHAT)
        command.add_argument("--output", required=True, metavar="DIR", help="directory to write")
        if name == "to_pytorch":
            command.add_argument("--step", type=int, help="of a run (default: the newest)")
        command.add_argument("--revision", default="main", help="of a model on the hub")
        command.add_argument("--subfolder", default="", help="where in its place the model is")
        command.add_argument("--local_files_only", action="store_true", help="ask no hub")
        command.add_argument("--max_shard_size", default="10GB", help="(default: %(default)s)")
        command.add_argument("--verify", action="store_true", help="compare logits with PyTorch")
        command.add_argument("--debug", action="store_true", help="show an error's traceback")
    args = vars(parser.parse_args(argv))
    command, output = args.pop("command"), args.pop("output")
    args.pop("debug")

    from gpt2_flax import convert

    done = getattr(convert, command)(args.pop("source"), output, **args)
    print(f"{done.source} -> {output}: {', '.join(done.files)}")
    if done.difference is not None:
        print(f"largest difference from PyTorch's output: {done.difference:.2g}")
    package = "transformers" if command == "to_pytorch" else "gpt2_flax"
    print(f"open it with {package}.{done.class_name}.from_pretrained({output!r})")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
