"""What a user does with models from Python, as a script: `tests.fork_server` runs it.

Opens one after the other, and says of each, in a line of JSON, what a script would have said.
"""

import contextlib
import functools
import io
import json
import time

from gpt2_flax import FlaxGPT2LMHeadModel
from gpt2_flax.errors import run_main


def main(argv: list[str]) -> None:
    """argv: directories, each with keywords of from_pretrained as JSON behind it."""
    for directory, options in zip(argv[::2], argv[1::2], strict=True):
        said, began = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stderr(said):
            code = run_main(functools.partial(open_model, directory), [options])
        seconds = time.perf_counter() - began
        print(json.dumps({"code": code, "text": said.getvalue(), "seconds": seconds}), flush=True)


def open_model(directory: str, argv: list[str]) -> None:
    FlaxGPT2LMHeadModel.from_pretrained(directory, **json.loads(argv[0]))
