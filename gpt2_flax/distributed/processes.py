"""Many processes of one run, on one machine or many: how they meet, agree, and end together.

JAX's own runtime joins them. What they agree upon goes through its collectives, so that all
must ask the same, in the same order. What each says of itself lies in output_dir, which all
must share: by it a process that ended, or hangs, is named.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import sys
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt2_flax import errors
from gpt2_flax.errors import Interrupted, OtherProcessError, StorageError, UserError

FOLDER = ".processes"  # below output_dir, while several processes use it
JOIN_SECONDS = 20  # to wait for the coordinator, beside which JAX waits for the others
HEARTBEAT_SECONDS = 80  # after which JAX's runtime would end the others, in words of its own
BEAT_SECONDS = 1.0  # between two signs of life
SILENT_SECONDS = 30  # without one, for a process that waits meanwhile
FAREWELL_SECONDS = 3  # for the others to read why a process ends, before it takes JAX's with it


_handlers: list = []  # of C's signals, which must outlive all that uses them


def several() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


# ---------------------------------------------------------------- joining


def join(config) -> None:
    """Be one of the processes of a run, where it has several.

    By --coordinator_address, --num_processes and --process_id, or as the launcher's environment
    says: SLURM, Open MPI, Cloud TPU, Kubernetes. --num_processes 1 keeps to oneself.
    Raises UserError where the others are not found.
    """
    given = wanted(config)
    if given is None:
        return
    # Stop requests are agreed upon in stopping.py, by which Ctrl-C and SIGTERM are alike.
    jax.config.update("jax_enable_preemption_service", False)
    address = given.get("coordinator_address") or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and given.get("process_id"):
        wait_for(address, given["process_id"])
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=300,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        # A TPU machine by itself, of which JAX knows nothing.
        if not given and launcher() == "tpu" and isinstance(error, ValueError):
            return
        raise UserError(
            f"the processes of this run did not meet: {str(error).strip().splitlines()[0][:160]}\n"
            "  give all of them --coordinator_address HOST:PORT and --num_processes, and each"
            " its --process_id; or --num_processes 1 for a run of one process"
        ) from error
    errors.is_silent = not is_first()
    of_processes = [device.process_index for device in jax.devices()]
    counts = [of_processes.count(number) for number in range(jax.process_count())]
    if len({*counts}) > 1:
        refuse_together(
            f"the processes have {', '.join(map(str, counts))} devices: they must have the same"
            " number\n  start one process a machine, or one a device"
        )


def wanted(config) -> dict | None:
    """Arguments of jax.distributed.initialize; None for a run of one process."""
    if config.num_processes == 1:
        return None
    if config.num_processes:
        return {
            "coordinator_address": config.coordinator_address,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
        }
    address = config.coordinator_address
    rest = {"coordinator_address": address} if address else {}  # JAX finds what is not there
    if launcher() == "open mpi 5":
        return rest | {
            "num_processes": number_in("OMPI_COMM_WORLD_SIZE"),
            "process_id": number_in("OMPI_COMM_WORLD_RANK"),
        }
    if launcher():
        return rest
    if address:
        raise UserError(
            f"coordinator_address {address} has no effect without num_processes\n"
            "  say how many processes there are, and which this is: --num_processes, --process_id"
        )
    return None


def launcher() -> str | None:
    """Who started this process as one of several, by the environment; None for nobody."""
    if "SLURM_STEP_NODELIST" in os.environ and number_in("SLURM_NTASKS") > 1:
        return "slurm"
    if number_in("OMPI_COMM_WORLD_SIZE") > 1:  # JAX knows those before version 5
        return "open mpi" if "OMPI_MCA_orte_hnp_uri" in os.environ else "open mpi 5"
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return "kubernetes"
    on_tpu = "cpu" not in os.environ.get("JAX_PLATFORMS", "").split(",")
    return "tpu" if on_tpu and importlib.util.find_spec("libtpu") else None


def number_in(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() else 0


def wait_for(address: str, process_id: int) -> None:
    """Raise UserError where nobody listens at an address in time: JAX would abort."""
    host, _, port = address.rpartition(":")
    deadline, reason = time.monotonic() + JOIN_SECONDS, "no answer"
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise UserError(
        f"process {process_id}: the coordinator at {address} does not answer ({reason})\n"
        "  start process 0 there; is --coordinator_address the same for all, and the port open?"
    )


# ---------------------------------------------------------------- agreeing


def gather(value) -> list:
    """The JSON values of all processes, in their order."""
    if not several():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(max(1, int(lengths.max())), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [
        json.loads(bytes(row[:length]).decode())
        for row, length in zip(texts, lengths.tolist(), strict=True)
    ]


def agree(value):
    """The first process's JSON value, for all."""
    return gather(value if is_first() else None)[0]


@contextlib.contextmanager
def together():
    """Context in which an error of one process ends all of them, with its exit code.

    The first that failed speaks. All must enter and leave it.
    """
    error = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as caught:
        error = caught
    codes = gather(None if error is None else getattr(error, "exit_code", 1))
    failed = [number for number, code in enumerate(codes) if code is not None]
    if not failed:
        return
    if failed[0] != jax.process_index():
        error = OtherProcessError(failed[0], codes[failed[0]])
    error.ends_all = True
    raise error


@contextlib.contextmanager
def leaving_together():
    """Context at whose end processes that come to it together wait for one another.

    With the first goes what JAX's runtime is held together by: JAX aborts who is then still in
    it, be it on the way to the same end.
    """
    try:
        yield
    except BaseException as error:
        if getattr(error, "ends_all", False):
            jax.distributed.shutdown()
        raise
    jax.distributed.shutdown()


def first_only(work):
    """What `work` gives in the first process, for all. Its errors end all."""
    value = None
    with together():
        if is_first():
            value = work()
    return agree(value)


def check_alike(about: dict) -> None:
    """Raise UserError where a process differs from the first: name -> JSON value of it."""
    everyone = gather(about)
    for number, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                refuse_together(
                    f"process {number} differs from process 0 in {name}:"
                    f" {short(other[name])} instead of {short(value)}\n"
                    "  start all of them by the same command, on the same code and text"
                )


def refuse_together(message: str) -> None:
    """Raise UserError for what all processes have found alike; the first speaks."""
    error = UserError(message) if is_first() else OtherProcessError(0, UserError.exit_code)
    error.ends_all = True  # type: ignore[attr-defined]  # `together` looks for it
    raise error


def short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def code_version() -> str:
    """A digest of this package's code and the version of JAX."""
    digest = hashlib.sha256(jax.__version__.encode())
    for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- watching


@contextlib.contextmanager
def watching(output_dir, config):
    """Context of a Watch. An error that this process is alone with ends it at once.

    What others wait for, and what closing files would wait for, does not come then.
    """
    watch = Watch(output_dir, config.step_timeout)
    try:
        yield watch
    except BaseException as error:
        if not several() or getattr(error, "ends_all", False):
            watch.ended.set()
            raise
        if is_of_a_broken_connection(error):  # the watch soon knows whose, and ends this process
            time.sleep(SILENT_SECONDS + 5)
        code = errors.report(error, config.debug)
        sys.stdout.flush()
        sys.stderr.flush()
        watch.fail(error)
        os._exit(code)
    watch.close()


class Watch:
    """Signs of life of all processes, in output_dir; ends this one when another is gone.

    A process that has not moved on for SILENT_SECONDS, and has heard nothing of another for as
    long, ends. So does one that has not moved on for `step_timeout` seconds, whoever is to blame.
    """

    def __init__(self, output_dir, step_timeout: float):
        """step_timeout: seconds; 0 for no limit. Raises UserError where nothing is shared."""
        self.step_timeout, self.step = step_timeout, 0
        self.moved, self.has_begun = time.monotonic(), False
        self.folder = pathlib.Path(output_dir) / FOLDER
        self.seen: dict[int, tuple[dict | None, float]] = {}  # the last sign, and when it was new
        self.ended = threading.Event()
        self.thread = None
        if several():
            self.begin()
        else:  # what several processes left that were killed
            shutil.rmtree(self.folder, ignore_errors=True)
        if several() or step_timeout:
            self.thread = threading.Thread(target=self.run, name="watch", daemon=True)
            self.thread.start()

    def begin(self) -> None:
        def make_folder():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            token = secrets.token_hex(8)
            (self.folder / "token").write_text(token)
            return token

        token = first_only(lambda: stored(make_folder, self.folder))
        with together():
            found = read(self.folder / "token")
            if found != token:
                raise UserError(
                    f"process {jax.process_index()} on {socket.gethostname()} does not see what"
                    f" process 0 wrote into {self.folder.parent}\n"
                    "  name an --output_dir on a file system that all of them share"
                )
            stored(self.beat, self.folder)
        if not is_first():
            self.take_aborts()

    def take_aborts(self) -> None:
        """Let this process end in our words where process 0 is gone.

        With it goes the service of JAX's runtime, which then aborts this process from a thread
        in which no handler of Python's `signal` runs: this one is C's.
        """
        aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: self.look_at_first())
        _handlers.append(aborted)  # for as long as the process lives
        handle = ctypes.CDLL(None).signal
        handle.argtypes, handle.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        handle(signal.SIGABRT, ctypes.cast(aborted, ctypes.c_void_p))

    def look_at_first(self) -> None:
        """End this process if process 0 shows no sign of life; else return, and it aborts."""
        path = self.folder / "0.json"
        last = read(path)
        for _ in range(3):
            time.sleep(BEAT_SECONDS)
            if self.ended.is_set() or read(path) != last:
                return
        self.give_up(f"process 0{described(parse(last))} is gone")

    def move_on(self, step: int | None = None) -> None:
        """Called where this process has waited for all others and goes on."""
        self.moved, self.has_begun = time.monotonic(), True
        self.step = self.step if step is None else step

    def beat(self, ended: str = "") -> None:
        sign = {
            "n": time.monotonic(), "step": self.step, "host": socket.gethostname(),
            "pid": os.getpid(), "where": where(), "ended": ended,
        }  # fmt: skip
        path = self.folder / f"{jax.process_index()}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(sign))
        os.replace(temporary, path)

    def run(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            if several():
                with contextlib.suppress(OSError):  # a full disk is for who saves to report
                    self.beat()
                self.look()
            idle = time.monotonic() - self.moved
            has_time = not self.has_begun or self.ended.is_set()  # to compile, to save
            if self.step_timeout and idle > self.step_timeout and not has_time:
                self.give_up(f"no step was finished for {idle:.0f} s: {self.whereabouts()}")

    def look(self) -> None:
        now = time.monotonic()
        for number in range(jax.process_count()):
            sign = parse(read(self.folder / f"{number}.json"))
            if number == jax.process_index() or self.ended.is_set():
                continue
            if sign is not None and sign.get("ended"):
                self.give_up(f"process {number} on {sign.get('host')} ended: {sign['ended']}")
            if number not in self.seen or (sign and self.seen[number][0] != sign):
                self.seen[number] = sign, now
            last, since = self.seen[number]
            silent = min(now - since, now - self.moved)
            if silent > SILENT_SECONDS:
                self.give_up(
                    f"process {number}{described(last)} has not been heard of for {silent:.0f} s"
                )

    def whereabouts(self) -> str:
        """Where the processes are: who hangs is where the others do not wait."""
        signs = {n: sign for n, (sign, _) in self.seen.items() if sign}
        signs[jax.process_index()] = {"step": self.step, "where": where()}
        return "; ".join(
            f"process {n} is at step {sign.get('step')}, in {sign.get('where')}"
            for n, sign in sorted(signs.items())
        )

    def give_up(self, why: str) -> None:
        """End this process at once: its main thread may wait for ever."""
        with contextlib.suppress(OSError):
            text = f"\nerror: {why}\n  the same command goes on from the newest checkpoint\n"
            os.write(2, text.encode())
        if is_first():  # with it goes what JAX's runtime holds the others together by
            time.sleep(FAREWELL_SECONDS + 1)
        os._exit(OtherProcessError.default_exit_code)

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process ends alone, and give them time to read it."""
        self.ended.set()
        if several():
            with contextlib.suppress(OSError):
                self.beat(ended=first_line(error))
            time.sleep(FAREWELL_SECONDS)

    def close(self) -> None:
        """At the end that all come to."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join()
        if several():
            gather(None)
            if is_first():
                shutil.rmtree(self.folder, ignore_errors=True)
            jax.distributed.shutdown()


def is_of_a_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed since another process is gone."""
    words = ("Gloo", "NCCL", "Connection reset", "Connection closed", "UNAVAILABLE")
    return isinstance(error, ValueError | RuntimeError) and any(w in str(error) for w in words)


def where() -> str:
    """The line of code that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return f"{pathlib.Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"


def stored(work, folder):
    try:
        return work()
    except OSError as error:
        raise StorageError(f"cannot write into {folder}: {error.strerror}") from error


def read(path: pathlib.Path) -> str:
    """A small file's text, empty where there is none. Opened anew: network file systems then
    ask for what is there now."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(4096)
    except (OSError, UnicodeDecodeError):
        return ""


def parse(text: str) -> dict | None:
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        return value if isinstance(value, dict) else None
    return None


def described(sign: dict | None) -> str:
    if sign is None:
        return ""
    return f" (number {sign.get('pid')} on {sign.get('host')}, at step {sign.get('step')})"


def first_line(error: BaseException) -> str:
    if isinstance(error, Interrupted):
        return signal.Signals(error.number).name
    return errors.redacted((str(error).strip() or type(error).__name__).split("\n")[0][:200])
