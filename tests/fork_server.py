"""Runs of our scripts that start at once: a process that has imported everything forks them.

A run is a process of its own, with its own devices; it can be killed like any other. Used as
    with ForkServer(folder) as fork_server:
        run = fork_server.start(["--max_steps", "3", ...], devices=2)
        run.kill(); run.wait()
"""

import importlib
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


class ForkServer:
    def __init__(self, folder: pathlib.Path, preload: tuple[str, ...] = (), **variables: str):
        """folder: where the runs' output goes, and compiled programs unless all share them.

        preload: modules to import beside those of training. variables: of the environment.
        """
        self.folder, self.n_runs = folder, 0
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_ENABLE_COMPILATION_CACHE": "1",
            "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                "COMPILED_BY_TESTS", str(folder / "compiled")
            ),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "HF_HOME": str(folder / "hf_home"),
            "PYTHONWARNINGS": "ignore",  # of a fork beside threads: those are not in the child
            **variables,
        }
        command = [sys.executable, "-m", "tests.fork_server", *preload]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=environment,
        )  # fmt: skip

    def start(
        self,
        argv: list[str],
        devices: int = 1,
        script: str = "scripts.train",
        cwd: str | None = None,
        memory: int | None = None,
        fault: list | None = None,
    ) -> "Run":
        """script: the module whose `main` is run. memory: bytes that it may map from then on.
        fault: name of a function of tests.faults.fault_injection and its arguments, called first.
        """
        self.n_runs += 1
        output = self.folder / f"run {self.n_runs}.out"
        pid = self.ask(
            "start", argv=argv, devices=devices, output=str(output), script=script, cwd=cwd,
            memory=memory, fault=fault,
        )  # fmt: skip
        return Run(self, pid, output)

    def ask(self, what: str, **arguments):
        self.process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Run:
    def __init__(self, fork_server: ForkServer, pid: int, output: pathlib.Path):
        self.fork_server, self.pid, self.output, self.code = fork_server, pid, output, None

    def poll(self) -> int | None:
        """The exit code as the shell gives it, negative for a signal; None while it runs."""
        if self.code is None:
            self.code = self.fork_server.ask("poll", pid=self.pid)
        return self.code

    def wait(self, seconds: float = 120) -> int:
        last = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < last, f"still running:\n{self.text()}"
            time.sleep(0.02)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def text(self) -> str:
        """What it has written: "begun" once it runs, then what the script prints."""
        if not self.output.exists():
            return ""
        return self.output.read_text("utf-8", errors="replace")


def serve() -> None:
    """In the server: import what a run needs, then fork one at each request."""
    needed = ("matplotlib.figure", "orbax.checkpoint", "gpt2_flax.training.train", "scripts.train")
    for name in (*needed, *sys.argv[1:]):
        importlib.import_module(name)

    children = set()
    for line in sys.stdin:
        request = json.loads(line)
        if request["what"] == "start":
            pid = os.fork()
            if pid == 0:
                live(request)
            children.add(pid)
            answer = pid
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            children.discard(pid)
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def live(request: dict) -> None:
    """In the child: be the run."""
    from gpt2_flax.errors import run_main
    from tests.faults import fault_injection

    main = importlib.import_module(request["script"]).main
    devices = f"--xla_force_host_platform_device_count={request['devices']}"
    os.environ["XLA_FLAGS"] = f"{devices} {os.environ.get('TESTS_XLA_FLAGS', '')}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["cwd"]:
        os.chdir(request["cwd"])
    if request["memory"]:
        mapped = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        limit = mapped * os.sysconf("SC_PAGE_SIZE") + request["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    code = 1
    try:
        if request["fault"]:
            name, *arguments = request["fault"]
            getattr(fault_injection, name)(*arguments)
        print("begun", flush=True)
        code = run_main(main, request["argv"])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
