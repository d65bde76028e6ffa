"""Ids from other processes are the ids from here; and what happens when processes die."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from gpt2_flax.data import encode_pool, encode_worker
from gpt2_flax.data.encode_pool import EncodePool
from gpt2_flax.data.encode_worker import FAILED, numbers, read_block, read_numbers
from gpt2_flax.data.tokenizers import EOS, Tokenizer, as_fast, byte_level, make_tokenizer
from gpt2_flax.errors import UserError
from tests.data.test_chunking import fuzz, like_bert

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 60
BATCHES = [
    ["one text", "", "and a second one"],
    [],
    ["na\u00efve \u6f22\u5b57 \U0001f469\u200d\U0001f680\0\r\n", f"{EOS} 's{EOS}"],
    *([fuzz(seed), fuzz(seed + 1)] for seed in range(20)),
    ["a long one " * 50_000],
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("bpe:400", [fuzz(seed) for seed in range(9)])


@pytest.fixture
def pool(tokenizer):
    with EncodePool(tokenizer, 2) as pool:
        yield pool


def check_encoded(future, tokenizer, texts):
    """That a process gives the ids that this one finds; they are returned."""
    found = future.result(PATIENCE_SECONDS)
    for ids, right in zip(found, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, right)
    return found


def wait_until(holds):
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- the same ids


def test_ids_are_those_of_this_process(tokenizer, pool):
    assert pool.processes == 2 == len(pool.workers)
    futures = [pool.submit(batch) for batch in BATCHES]
    for batch, future in zip(BATCHES, futures, strict=True):
        check_encoded(future, tokenizer, batch)


def with_ids_over_two_bytes():
    inner = byte_level(make_tokenizer("bytes", []).fast.backend_tokenizer.model)
    vocabulary = inner.get_vocab() | {"ab": 70_000}
    inner.model = type(inner.model)(vocab=vocabulary, merges=[("a", "b")])
    inner.add_special_tokens([EOS])
    return Tokenizer.of_fast(as_fast(inner), "large")


@pytest.mark.parametrize("make", [like_bert, with_ids_over_two_bytes])
def test_any_tokenizer_works(make):
    tokenizer = make()
    with EncodePool(tokenizer, 1) as pool:
        batch = ["the cab", fuzz(1)]
        found = check_encoded(pool.submit(batch), tokenizer, batch)
    if make is with_ids_over_two_bytes:
        assert 70_000 in found[0]


def test_all_processes_work(tokenizer, pool):
    """More batches than one can have done: each is held until both have one."""
    both = threading.Barrier(2, timeout=PATIENCE_SECONDS)
    ask = pool.ask

    def ask_together(*arguments):
        both.wait()
        return ask(*arguments)

    pool.ask = ask_together
    for future in [pool.submit(["text"]) for _ in range(4)]:
        check_encoded(future, tokenizer, ["text"])


# ---------------------------------------------------------------- the program itself


def served(tokenizer, *requests: bytes) -> io.BytesIO:
    tokenizer_json = tokenizer.to_json().encode()
    data = b"".join([numbers(len(tokenizer_json)), tokenizer_json, *requests])
    answers = io.BytesIO()
    with pytest.raises(EOFError):
        encode_worker.serve(io.BytesIO(data), answers)
    answers.seek(0)
    return answers


def request(bytes_per_id: int, *texts: bytes) -> bytes:
    return numbers(len(texts), bytes_per_id, *map(len, texts)) + b"".join(texts)


@pytest.mark.parametrize("bytes_per_id", [2, 4])
def test_ids_take_as_many_bytes_as_were_asked_for(tokenizer, bytes_per_id):
    answers = served(tokenizer, request(bytes_per_id, b"text", "\u6f22".encode()))
    expected = tokenizer.encode_batch(["text", "\u6f22"])
    counts = [len(ids) for ids in expected]
    assert read_numbers(answers, 4) == [2, sum(counts), *counts]
    ids = np.frombuffer(answers.read(), f"<u{bytes_per_id}")
    np.testing.assert_array_equal(ids, np.concatenate(expected))


def test_an_error_is_an_answer_and_not_the_end(tokenizer):
    answers = served(tokenizer, request(2, b"caf\xe9"), request(2, b"a"))
    failed, size = read_numbers(answers, 2)
    assert failed == FAILED
    assert read_block(answers, size).startswith(b"UnicodeDecodeError: 'utf-8' codec can't decode")
    assert read_numbers(answers, 2) == [1, 1]


def test_the_program_imports_no_slow_library():
    code = "import gpt2_flax.data.tokenizers, sys; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = {*process.stdout.split()}
    assert modules.isdisjoint({"jax", "transformers", "huggingface_hub", "datasets", "yaml"})


def test_what_a_library_prints_is_not_taken_for_an_answer(tokenizer, tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Loud:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'numpy': print('a library says hello', flush=True)\n"
        "sys.meta_path.insert(0, Loud())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with EncodePool(tokenizer, 1) as pool:
        check_encoded(pool.submit(["text"]), tokenizer, ["text"])
    assert "hello" in capfd.readouterr().err


# ---------------------------------------------------------------- what goes wrong


def test_what_goes_wrong_in_a_process_is_said_here(tokenizer, pool, monkeypatch):
    monkeypatch.setattr(pool, "ids_dtype", np.dtype("<c16"))  # no unsigned kind is of 16 bytes
    with pytest.raises(RuntimeError, match=r"^a process that tokenizes failed: TypeError: .*u16"):
        pool.submit(["text"]).result(PATIENCE_SECONDS)
    monkeypatch.undo()
    check_encoded(pool.submit(["text"]), tokenizer, ["text"])


def test_text_that_is_no_unicode_is_refused_and_the_next_is_encoded(tokenizer, pool):
    with pytest.raises(UnicodeEncodeError):
        pool.submit(["\ud800"]).result(PATIENCE_SECONDS)
    check_encoded(pool.submit(["text"]), tokenizer, ["text"])


DIED = (
    r"^a process that tokenizes died \(exit code -9\), perhaps for lack of memory\n  fewer at a "
)


def test_a_process_that_is_killed_is_an_error_with_a_remedy(pool):
    pool.submit(["text"]).result(PATIENCE_SECONDS)
    for worker in pool.workers:
        os.kill(worker.pid, signal.SIGKILL)
    futures = [pool.submit(["text"]) for _ in range(9)]
    for future in futures:
        with pytest.raises(UserError, match=DIED):
            future.result(PATIENCE_SECONDS)
    with pytest.raises(UserError, match=DIED):
        pool.submit(["text"])


def test_a_process_that_is_killed_at_work_ends_the_pool(tokenizer):
    """Not only what it worked on fails: nothing waits for ever."""
    with EncodePool(tokenizer, 1) as pool:
        os.kill(pool.workers[0].pid, signal.SIGSTOP)  # so that all have been submitted
        futures = [pool.submit(["text " * 100_000]) for _ in range(4)]
        os.kill(pool.workers[0].pid, signal.SIGKILL)
        for future in futures:
            with pytest.raises(UserError, match=DIED):
                future.result(PATIENCE_SECONDS)


def test_a_process_that_cannot_start_is_an_error_with_a_remedy(tokenizer, monkeypatch):
    started = []
    start = encode_pool.start_worker

    def start_one():
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(start())
        return started[0]

    monkeypatch.setattr(encode_pool, "start_worker", start_one)
    with pytest.raises(UserError, match=r"^cannot start .*unavailable\n  fewer at a time: --tok"):
        EncodePool(tokenizer, 2)
    assert started[0].poll() == -signal.SIGKILL


# ---------------------------------------------------------------- the end


def test_a_pool_that_is_closed_leaves_nothing(tokenizer):
    threads = threading.active_count()
    with EncodePool(tokenizer, 2) as pool:
        futures = [pool.submit(["text " * 100_000]) for _ in range(20)]
    assert all(worker.poll() is not None for worker in pool.workers)
    assert threading.active_count() == threads
    assert all(future.done() for future in futures)
    assert any(future.cancelled() for future in futures)
    with pytest.raises(RuntimeError, match="is closed"):
        pool.submit(["text"])
    pool.close()


def test_what_was_in_work_when_the_pool_was_closed_says_so(tokenizer):
    with EncodePool(tokenizer, 1) as pool:
        os.kill(pool.workers[0].pid, signal.SIGSTOP)
        future = pool.submit(["text"])
        wait_until(future.running)
    with pytest.raises(RuntimeError, match="is closed"):
        future.result(PATIENCE_SECONDS)


def test_ctrl_c_and_sigterm_are_left_to_the_process_that_started_it(tokenizer, pool):
    pool.submit(["text"]).result(PATIENCE_SECONDS)
    for worker in pool.workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    for future in [pool.submit(["text"]) for _ in range(9)]:
        check_encoded(future, tokenizer, ["text"])


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="needs /proc")
@pytest.mark.parametrize("at_work", [False, True])
def test_processes_end_with_the_one_that_started_them_even_if_it_is_killed(at_work):
    script = f"""
import sys, time, types
sys.path.insert(0, {str(ROOT)!r})
from gpt2_flax.data.encode_pool import EncodePool
from gpt2_flax.data.tokenizers import byte_tokenizer
tokenizer = types.SimpleNamespace(vocab_size=257, to_json=byte_tokenizer().to_str)
pool = EncodePool(tokenizer, 2)
pool.submit(["text"]).result()
for _ in range({99 * at_work}):
    pool.submit(["text " * 200_000])
print(*(worker.pid for worker in pool.workers), flush=True)
time.sleep(600)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdout=pipe, stderr=pipe) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(is_running, workers))
        parent.kill()
        wait_until(lambda: not any(map(is_running, workers)))
        assert parent.stderr.read() == b""
