"""The command `gpt2-flax` and its six subcommands, which scripts/*.py run, too.

What needs JAX is imported when the settings are known to be right.
"""

import argparse
import contextlib
import pathlib
import sys

from gpt2_flax import __version__, command_names, huge_pages, xla_flags
from gpt2_flax.config.settings import ArgumentParser, closest, plain, wide_help
from gpt2_flax.errors import UserError, run_main
from gpt2_flax.imports import leave_out_torch, no_garbage

ABOUT = {
    "train": "train GPT-2 from text, or resume a run",
    "generate": "continue a prompt with a trained model",
    "evaluate": "perplexity of a text, LAMBADA, HellaSwag",
    "convert": "convert a model: for PyTorch, or for the Flax classes of transformers 4",
    "benchmark": "measure the parts of training",
    "parity": "train the same GPT-2 by this project and by PyTorch, and compare the losses",
}


# ---------------------------------------------------------------- the whole command


def main(argv: list[str] | None = None) -> int:
    """The command `gpt2-flax`. Returns the exit code. argv: without the command's own name."""
    argv = sys.argv[1:] if argv is None else argv
    with command_names.typed_as_gpt2_flax():
        name = argv[0] if argv else ""
        if name in ABOUT:
            return start(name, argv[1:])
        return run_main(without_a_command, argv)


def start(name: str, argv: list[str]) -> int:
    """Run a command as the program of this process. Returns the exit code."""
    if name == "train":
        huge_pages.start_again()
        xla_flags.set_defaults()
    if name in ("train", "generate", "evaluate"):
        leave_out_torch()
    return run_main(globals()[name], argv)


def without_a_command(argv: list[str]) -> None:
    """Print the help or the version. Raises UserError for anything else."""
    parser = ArgumentParser(
        prog="gpt2-flax",
        usage="gpt2-flax COMMAND [settings]",
        description="Train GPT-2 in JAX, and use what was trained.",
        epilog="gpt2-flax COMMAND --help lists a command's settings.",
        allow_abbrev=False,
        formatter_class=wide_help,
    )
    parser.add_argument("--version", action="version", version=f"gpt2-flax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="")
    for name, text in ABOUT.items():
        commands.add_parser(name, help=text)
    if argv and not argv[0].startswith("-"):
        close = closest(argv[0], ABOUT)
        remedy = f"did you mean {close[0]}?" if close else f"commands: {', '.join(ABOUT)}"
        raise UserError(f"unknown command {plain(argv[0])}\n  {remedy}")
    parser.parse_args(argv)
    raise UserError(f"no command\n  commands: {', '.join(ABOUT)}")


# ---------------------------------------------------------------- its commands


def train(argv: list[str]) -> int:
    from gpt2_flax.config.train_config import dump_yaml, load_config

    config = load_config(argv)
    if config.print_config:
        print(dump_yaml(config), end="")
        return 0
    # What is imported for a run stays until its end, so the garbage collector need not look at it.
    is_imported = "gpt2_flax.training.train" in sys.modules
    with contextlib.nullcontext() if is_imported else no_garbage():
        from gpt2_flax.training.train import train

    return train(config)


def generate(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog=command_names.prog("generate"),
        description="Continue a prompt with a trained model:"
        " `--temperature 0` takes the likeliest token.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="directory of a finished run or export")
    parser.add_argument("--prompt", default="", help="text to continue (default: a new text)")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="(default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=0, help="likeliest only; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="share of probability; 1: all")
    parser.add_argument("--seed", type=_seed, default=0, help="of the sampling")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    from gpt2_flax.generation.generation import continue_text
    from gpt2_flax.pretrained.modeling import load_with_tokenizer

    model, tokenizer = load_with_tokenizer(args.model)
    print(
        continue_text(
            model,
            tokenizer,
            args.prompt,
            args.max_new_tokens,
            args.temperature,
            args.top_k,
            args.top_p,
            args.seed,
        )
    )


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2**32, got {text}")
    return int(text)


def evaluate(argv: list[str]) -> None:
    from gpt2_flax.evaluation.evaluate import dump, evaluate, load_config

    print(dump(evaluate(load_config(argv))))


def convert(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog=command_names.prog("convert"),
        description="Convert a model: for PyTorch, or for the Flax classes of transformers 4.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="to_pytorch|from_pytorch"
    )
    source = "run, one of its steps, directory, weights file or hub id"
    for name, flag, text in (
        ("to_pytorch", "--checkpoint", "write model.safetensors, which PyTorch opens"),
        ("from_pytorch", "--model", "write flax_model.msgpack, as transformers 4 did"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(flag, dest="source", required=True, metavar="WHAT", help=source)
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
    direction, output = args.pop("command"), args.pop("output")
    args.pop("debug")

    from gpt2_flax.pretrained import convert

    done = getattr(convert, direction)(args.pop("source"), output, **args)
    print(f"{done.source} -> {output}: {', '.join(done.files)}")
    if done.difference is not None:
        print(f"largest difference from PyTorch's output: {done.difference:.2g}")
    package = "transformers" if direction == "to_pytorch" else "gpt2_flax"
    print(f"open it with {package}.{done.class_name}.from_pretrained({output!r})")


def benchmark(argv: list[str]) -> None:
    from gpt2_flax.evaluation.benchmark_command import build_parser, run

    run(build_parser(), argv)


def parity(argv: list[str]) -> None:
    parser = ArgumentParser(
        prog=command_names.prog("parity"),
        description="Train the same GPT-2 by this project and by PyTorch, and plot both losses"
        " and their gap.",
        allow_abbrev=False,
    )
    for flag, kind, default, text in (
        ("--n_layers", int, 4, "transformer blocks"),
        ("--n_heads", int, 4, "attention heads; must divide n_embd"),
        ("--n_embd", int, 128, "width of the residual stream"),
        ("--block_size", int, 128, "tokens in a row"),
        ("--batch_size", int, 8, "rows on each device of JAX"),
        ("--steps", int, 200, "updates"),
        ("--learning_rate", float, 1e-3, "peak, after 20 steps of warmup; then a cosine"),
        ("--seed", int, 42, "fixes initialisation and order of rows"),
        ("--tokenizer", str, "bytes", "as for training"),
        ("--output_dir", str, "parity", "where parity.png and parity.json go"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: {default})")
    text = "files to train on (default: Python's own source files)"
    parser.add_argument("--train_file", nargs="+", default=[], metavar="FILE", help=text)
    parser.add_argument("--debug", action="store_true", help="show an error's traceback")
    settings = vars(parser.parse_args(argv))
    settings.pop("debug")

    from gpt2_flax.evaluation import parity

    result = parity.run(settings)
    print(
        f"largest gap {result['largest_gap']:.2g} nats at step {result['step_of_largest_gap']}"
        f" (allowed: {result['allowed_gap']:g}); loss {result['first_loss']:.4f} ->"
        f" {result['last_loss']:.6f}, PyTorch's {result['last_loss_torch']:.6f}\n"
        f"curves: {pathlib.Path(settings['output_dir']) / 'parity.png'}"
    )
