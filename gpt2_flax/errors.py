"""What a user is told: errors, what each makes the process return, and notes on the way."""

import contextlib
import os
import re
import signal
import sys
import threading
import traceback

# Names of environment variables that hold secrets, such as HF_TOKEN and WANDB_API_KEY; not those
# that say where one lies, nor TOKENIZERS_PARALLELISM.
SECRET_NAME = re.compile(
    r"(.*_)?(API_?KEY|KEY|TOKENS?|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_.*)?(?<!_(PATH|FILE))"
    r"(?<!_DIR)",
    re.IGNORECASE,
)
SHORTEST_SECRET = 8  # characters; what is shorter, such as "true", stands in many a text
PASSWORD_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]{0,15}://)[^\s/@'\"]+@", re.IGNORECASE)


class UserError(ValueError):
    """Something the user can put right. Lines: what and where, then the remedy."""

    exit_code = 2


class MissingFileError(UserError, OSError):
    """A directory, a file or a hub id that isn't there.

    Also an OSError: that is what Hugging Face's own classes raise here, and what their
    callers catch.
    """


class CheckpointError(UserError):
    """No checkpoint of the run can be used."""

    exit_code = 3


class StorageError(UserError):
    """The file system refused a write."""

    exit_code = 4


class NumericsError(UserError):
    """The loss or the gradient stopped being a finite number."""

    exit_code = 5


class OtherProcessError(UserError):
    """Another process of the run failed, and says why itself."""

    default_exit_code = 6

    def __init__(self, number: int, exit_code: int = default_exit_code):
        super().__init__(f"process {number} failed")
        self.exit_code = exit_code


class Interrupted(KeyboardInterrupt):
    """A signal came before there was anything to save. number: which."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def redacted(text: str) -> str:
    """A text without secrets: those in the environment, and who logs in by a URL."""
    secrets = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= SHORTEST_SECRET and SECRET_NAME.fullmatch(name)
    }
    for value in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, f"<{secrets[value]}>")
    return PASSWORD_IN_URL.sub(r"\1...@", text)


is_silent = False  # of the processes of a run only one gives notes


def say(line: str) -> None:
    """A note to whoever runs the command. The work outlives its reader (`2>&1 | head`)."""
    if is_silent:
        return
    with contextlib.suppress(BrokenPipeError):
        print(redacted(line), file=sys.stderr, flush=True)


def print_traceback(kind, error, trace) -> None:
    """Python's own report of an exception, without secrets."""
    lines = traceback.format_exception(kind, error, trace)
    print(redacted("".join(lines)), end="", file=sys.stderr)


@contextlib.contextmanager
def interruptible():
    """Context in which SIGTERM raises Interrupted, as Ctrl-C does KeyboardInterrupt.

    Python drops what is raised within a finalizer or a callback of the garbage collector; an
    interrupt that came there comes once more.
    """

    def interrupt(number, frame):
        raise Interrupted(number)

    def repeat(dropped):
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            return hook_before(dropped)
        number = getattr(dropped.exc_value, "number", signal.SIGINT)
        timer = threading.Timer(0.01, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    before, hook_before = signal.signal(signal.SIGTERM, interrupt), sys.unraisablehook
    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = hook_before
        signal.signal(signal.SIGTERM, before)


def report(error: BaseException, debug: bool) -> int:
    """Tell of the error that ends the process. Returns its exit code."""
    if isinstance(error, UserError):
        if debug:
            print_traceback(type(error), error, error.__traceback__)
        if debug or not isinstance(error, OtherProcessError):
            print(redacted(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)
    print_traceback(type(error), error, error.__traceback__)
    return 1


def run_main(main, argv: list[str]) -> int:
    """Run `main(argv)` and turn what it raises into an exit code.

    A `UserError` is printed without its traceback unless `--debug` is given; any other
    exception is a bug of ours and keeps its traceback (exit code 1). Neither shows a secret.
    """
    sys.excepthook = print_traceback
    try:
        with interruptible():
            return main(argv) or 0
    except (UserError, KeyboardInterrupt) as error:
        return report(error, "--debug" in argv)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
        return 1
