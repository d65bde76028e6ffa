"""Train the same GPT-2 by this project and by PyTorch, and plot both losses and their gap."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from gpt2_flax.errors import run_main
from gpt2_flax.settings import ArgumentParser


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="scripts/parity.py", description=__doc__, allow_abbrev=False)
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

    from gpt2_flax import parity

    result = parity.run(settings)
    print(
        f"largest gap {result['largest_gap']:.2g} nats at step {result['step_of_largest_gap']}"
        f" (allowed: {result['allowed_gap']:g}); loss {result['first_loss']:.4f} ->"
        f" {result['last_loss']:.6f}, PyTorch's {result['last_loss_torch']:.6f}\n"
        f"curves: {pathlib.Path(settings['output_dir']) / 'parity.png'}"
    )


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
