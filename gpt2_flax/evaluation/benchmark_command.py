"""The settings of scripts/benchmark.py, and what is done with the figures; without JAX."""

import argparse
import contextlib
import importlib.util
import json
import os

from gpt2_flax import command_names
from gpt2_flax.config.settings import ArgumentParser
from gpt2_flax.errors import StorageError, UserError

SIZES = {  # layers, width, heads
    "124m": (12, 768, 12), "355m": (24, 1024, 16), "774m": (36, 1280, 20),
    "1558m": (48, 1600, 25),
}  # fmt: skip
# What is compared with, and the packages that it needs beside our own.
PEERS = {
    "torch": ("torch",),
    "torch_compile": ("torch",),
    "torch_trainer": ("torch", "accelerate"),
    # Our own step, which is measured by pmap, by the other engines of --parallel.
    "jit": (),
    "fsdp": (),
}
# `train` and `decode` measure ours with jax, flax, optax and transformers alone.
NEEDED = {"checkpoint": ("orbax", "xxhash"), "data": ("tokenizers", "xxhash")}
REMEDY = "; or, of a training step, --peer without a name measures ours alone"


def at_least_1(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def above_0(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")


def share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")


ABOUT = {
    "data": "rows ready per second, the share of a step that waits for data, tokenizing per core",
    "train": "our training step (by pmap) against others: speed, memory, time to the first step",
    "decode": "greedy decoding with a cache, ours and PyTorch's",
    "checkpoint": "what a save costs the steps around it",
}
PROCESSES = ("--processes", at_least_1, 3, "processes of each measurement")
ROWS = (
    ("--batch_size", at_least_1, 8, "rows of a step, over all devices"),
    ("--block_size", at_least_1, 128, "tokens of a row"),
    ("--steps", at_least_1, 5, "steps that are timed in a process"),
    ("--warm_up", at_least_1, 2, "steps before them, after the first"),
)
NUMBERS = {
    "data": (
        ("--batch_size", at_least_1, 64, "rows of a step"),
        ("--block_size", at_least_1, 1024, "tokens of a row"),
        ("--tokens_per_second", above_0, 600_000.0, "speed of the step that is fed"),
        ("--steps", at_least_1, 100, "steps that are fed in a process"),
        ("--seconds", above_0, 5.0, "length of a measurement of rows"),
        PROCESSES,
    ),
    "train": (*ROWS, ("--dropout", share, 0.0, "rate, as of scripts/train.py"), PROCESSES),
    "decode": (
        ("--batch_size", at_least_1, 1, "prompts"),
        ("--block_size", at_least_1, 32, "tokens of a prompt"),
        ("--new_tokens", at_least_1, 128, "tokens after it"),
        ("--repeats", at_least_1, 3, "calls that are timed in a process, after the first"),
        PROCESSES,
    ),
    "checkpoint": (*ROWS, PROCESSES),
}


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=command_names.prog("benchmark"),
        description="Measure the parts of training.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(ABOUT))
    for name, about in ABOUT.items():
        command = commands.add_parser(name, help=about, description=about)
        if name == "data":
            add_text(command)
        else:
            add_model(command)
        for flag, kind, default, unit in NUMBERS[name]:
            command.add_argument(
                flag, type=kind, default=default, help=f"{unit} (default: {default:g})"
            )
        if name == "train":
            command.add_argument("--peer", nargs="*", choices=PEERS, default=["torch"],
                                 help="what to compare with (default: torch); without a name:"
                                 " nothing")  # fmt: skip
        if name in ("train", "checkpoint"):
            command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                                 help="of activations (default: %(default)s)")  # fmt: skip
        if name == "checkpoint":
            command.add_argument("--folder", default="",
                                 help="where to save (default: for temporary files)")  # fmt: skip
        command.add_argument("--json", metavar="FILE", help="also write the figures there")
        command.add_argument("--debug", action="store_true", help="show an error's traceback")
    return parser


def add_text(command) -> None:
    command.add_argument("--train_file", default="", help="(default: Python's own source files)")
    command.add_argument("--tokenizer", default="bpe:8192", help="(default: %(default)s)")


def add_model(command) -> None:
    command.add_argument("--size", choices=SIZES, default="124m", help="(default: %(default)s)")
    for flag, what in (("--n_layers", "blocks"), ("--n_embd", "width"), ("--n_heads", "heads")):
        command.add_argument(flag, type=at_least_1, help=f"{what}, instead of the size's")
    command.add_argument(
        "--vocab_size", type=at_least_1, default=50257, help="(default: %(default)s)"
    )


def run(parser: ArgumentParser, argv: list[str]) -> None:
    """Measure what the command line asks for, print the table, write the file."""
    args = vars(parser.parse_args(argv))
    if size := args.pop("size", None):
        for name, value in zip(("n_layers", "n_embd", "n_heads"), SIZES[size], strict=True):
            args[name] = args[name] or value
        if args["n_embd"] % args["n_heads"]:
            raise UserError(
                f"n_embd {args['n_embd']} is not divisible by n_heads {args['n_heads']}"
            )

    for peer in ["torch"] if args["command"] == "decode" else args.get("peer", []):
        check_packages(f"comparing with {peer}", PEERS[peer], REMEDY)
    check_packages(args["command"], NEEDED.get(args["command"], ()))

    from gpt2_flax.evaluation import benchmark

    with open_json(args.pop("json")) as file:
        about = benchmark.about() | {"settings": args.copy()}
        results = getattr(benchmark, args.pop("command"))(args)
        print(benchmark.table(results))
        if file is not None:
            file.truncate(0)
            json.dump({"about": about, "figures": results}, file, indent=1)


def check_packages(what: str, packages: tuple[str, ...], otherwise: str = "") -> None:
    """Raise UserError where a package is missing, before minutes are spent on others' cells."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{what} needs packages that are not installed: {', '.join(missing)}\n"
            f"  pip install {' '.join(missing)}{otherwise}"
        )


def open_json(path: str | None):
    """The file for the figures, opened before minutes are spent on them."""
    if path is None:
        return contextlib.nullcontext()
    try:
        return open(os.fspath(path), "a", encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}\n  name another --json"
        ) from error
