"""Texts into ids in several processes, so that all cores of a machine work."""

import concurrent.futures
import contextlib
import os
import queue
import subprocess
import sys
import threading

import numpy as np

from gpt2_flax.data import encode_worker
from gpt2_flax.data.encode_worker import FAILED, numbers, read_block, read_numbers
from gpt2_flax.errors import UserError

# A process for each core needs no threads of its own.
ENVIRONMENT = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OPENBLAS_NUM_THREADS": "1",
}


class EncodePool:
    """Processes that encode texts with one tokenizer. A context manager.

    They end with the pool, and with this process however it ends.
    """

    def __init__(self, tokenizer, processes: int):
        self.processes = processes
        self.ids_dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.jobs = queue.SimpleQueue()
        # Why no more is done: a process died, or the pool was closed.
        self.end: Exception | None = None
        self.lock = threading.Lock()
        self.workers: list[subprocess.Popen] = []
        self.threads: list[threading.Thread] = []
        tokenizer_json = tokenizer.to_json().encode()
        try:
            for _ in range(processes):
                worker = start_worker()
                self.workers.append(worker)
                thread = threading.Thread(
                    target=self.run, args=(worker, tokenizer_json), daemon=True
                )
                thread.start()
                self.threads.append(thread)
        except (OSError, RuntimeError) as error:  # RuntimeError: no more threads
            self.close()
            raise UserError(
                f"cannot start a process that tokenizes: {error}\n"
                "  fewer at a time: --tokenize_processes 1"
            ) from error

    def submit(self, texts: list[str]) -> concurrent.futures.Future:
        """A future of what `tokenizer.encode_batch(texts)` returns.

        It raises UserError where a process died, and RuntimeError with what went wrong in one.
        """
        future = concurrent.futures.Future()
        with self.lock:
            if self.end is not None:
                raise self.end
            self.jobs.put((future, texts))
        return future

    def run(self, worker: subprocess.Popen, tokenizer_json: bytes) -> None:
        """Hand jobs to one process, one at a time, until the pool is closed."""
        greeting = [numbers(len(tokenizer_json)), tokenizer_json]
        while job := self.jobs.get():
            future, texts = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if self.end is not None:
                    raise self.end
                future.set_result(self.ask(worker, texts, greeting))
            except Exception as error:
                future.set_exception(error)

    def ask(self, worker: subprocess.Popen, texts: list[str], greeting: list) -> list[np.ndarray]:
        data = [text.encode() for text in texts]
        bytes_per_id = self.ids_dtype.itemsize
        request = [numbers(len(data), bytes_per_id), numbers(*map(len, data)), *data]
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.writelines([*greeting, *request])
            worker.stdin.flush()
            greeting.clear()
            count, size = read_numbers(worker.stdout, 2)
            if count == FAILED:
                message = read_block(worker.stdout, size).decode()
                raise RuntimeError(f"a process that tokenizes failed: {message}")
            ends = np.cumsum(read_numbers(worker.stdout, count)).tolist()
            ids = np.frombuffer(read_block(worker.stdout, size * bytes_per_id), self.ids_dtype)
        except (OSError, EOFError) as error:
            raise self.died(worker) from error
        ids = ids.astype(np.int32)
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def died(self, worker: subprocess.Popen) -> Exception:
        """The reason why a process answers no more, which ends the pool."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(10)
        with self.lock:
            self.end = self.end or UserError(
                f"a process that tokenizes died (exit code {worker.poll()}), perhaps for lack of"
                " memory\n  fewer at a time: --tokenize_processes 1"
            )
            return self.end

    def close(self) -> None:
        """End the processes. What was submitted and isn't done is cancelled or fails."""
        with self.lock:
            self.end = self.end or RuntimeError("the pool of processes that tokenize is closed")
            with contextlib.suppress(queue.Empty):
                while True:
                    self.jobs.get_nowait()[0].cancel()
            for _ in self.threads:
                self.jobs.put(None)
        for worker in self.workers:
            worker.kill()
        for thread in self.threads:
            thread.join()
        for worker in self.workers:
            worker.wait()
            for pipe in filter(None, (worker.stdin, worker.stdout)):
                with contextlib.suppress(OSError):  # what was left to write has no reader
                    pipe.close()

    def __enter__(self) -> "EncodePool":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def start_worker() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-P", encode_worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | ENVIRONMENT,
    )
