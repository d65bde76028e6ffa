"""How a command is typed: `python scripts/train.py`, or `gpt2-flax train` where that was typed."""

import contextlib
from collections.abc import Iterator

_is_gpt2_flax = False


@contextlib.contextmanager
def typed_as_gpt2_flax() -> Iterator[None]:
    """Context in which messages name the subcommands of `gpt2-flax` instead of the scripts."""
    global _is_gpt2_flax
    before, _is_gpt2_flax = _is_gpt2_flax, True
    try:
        yield
    finally:
        _is_gpt2_flax = before


def prog(command: str) -> str:
    """The name that the help of a command begins with."""
    return f"gpt2-flax {command}" if _is_gpt2_flax else f"scripts/{command}.py"


def typed(command: str) -> str:
    """What a user types for a command, as its remedies and reports quote it."""
    return typed_prog(prog(command))


def typed_prog(prog: str) -> str:
    """What a user types for the name of a command."""
    return f"python {prog}" if prog.startswith("scripts/") else prog
