"""What goes wrong in a run: done inside its process, before it begins, by tests.fork_server."""

import errno
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np


def stop_after(step: int, number: int = signal.SIGTERM) -> None:
    """Send the process a signal right after a step."""
    from gpt2_flax.reporting import metrics

    def also(self, n, values):
        if n == step:
            os.kill(os.getpid(), number)

    follow(metrics.Meter, "add", also)


def set_variables(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def lose_patience(seconds: float, slow: float = 0.0) -> None:
    """Give up a process that is silent for so long."""
    from gpt2_flax.distributed import processes

    processes.SILENT_SECONDS = seconds
    slow_down(slow)


def hang_alone(step: int, process: int, patience: float) -> None:
    """One process hangs after a step, and the threads of it that show life go on."""
    from gpt2_flax.distributed import processes
    from gpt2_flax.reporting import metrics

    processes.SILENT_SECONDS = patience

    def also(self, n, values):
        if n == step and jax.process_index() == process:
            while True:
                time.sleep(1)

    follow(metrics.Meter, "add", also)


def fail_alone(step: int, process: int) -> None:
    from gpt2_flax.reporting import metrics

    def also(self, n, values):
        if n == step and jax.process_index() == process:
            raise RuntimeError("an injected fault in one process")

    follow(metrics.Meter, "add", also)


def linger(seconds: float) -> None:
    """Come later to what all processes refuse."""
    from gpt2_flax.distributed import processes

    precede(processes, "refuse_together", lambda *arguments: time.sleep(seconds))


def slow_down(seconds: float) -> None:
    """Let each step take that much longer."""
    from gpt2_flax.reporting import metrics

    follow(metrics.Meter, "add", lambda self, n, values: time.sleep(seconds))


def slow_device(seconds: float, long_step: float) -> None:
    """Let the device take that much longer for each step, which the host need not wait for."""
    from gpt2_flax.distributed import parallel
    from gpt2_flax.training import train

    train.LONG_STEP = long_step
    compile_train_step = parallel.compile_train_step

    def wait(values):
        time.sleep(seconds)
        return values

    late = jax.jit(lambda values: jax.pure_callback(wait, values, values))

    def compile_and_wait(*arguments):
        train_step = compile_train_step(*arguments)

        def slow_step(state, batch):
            state, values = train_step(state, batch)
            return state, late(values)

        return slow_step

    parallel.compile_train_step = compile_and_wait


def hold(step: int, path: str) -> None:
    """Wait after a step for as long as there is a file, made then, which a test takes away."""
    from gpt2_flax.reporting import metrics

    def also(self, n, values):
        if n == step:
            open(path, "x").close()
            while os.path.exists(path):
                time.sleep(0.01)

    follow(metrics.Meter, "add", also)


def fail_in_step(step: int) -> None:
    from gpt2_flax.reporting import metrics

    def also(self, n, values):
        if n == step:
            raise RuntimeError("an injected fault in the step")

    follow(metrics.Meter, "add", also)


def exit_in_step(step: int) -> None:
    from gpt2_flax.reporting import metrics

    def also(self, n, values):
        if n == step:
            sys.exit(0)

    follow(metrics.Meter, "add", also)


def fail_in_evaluation(step: int) -> None:
    from gpt2_flax.evaluation import scorer
    from gpt2_flax.reporting import metrics

    def also(self, n, values):
        if n >= step:
            scorer.mean_loss = fail

    follow(metrics.Meter, "add", also)


def fail_in_logging(step: int) -> None:
    from gpt2_flax.reporting import metrics

    def also(self, row):
        if row["step"] >= step:
            fail()

    follow(metrics.RunLog, "write", also)


def fail_in_data(step: int) -> None:
    from gpt2_flax.distributed import parallel

    prefetch = parallel.prefetch

    def failing(items):
        for n, item in enumerate(items, 1):
            if n == step:
                fail()
            yield item

    parallel.prefetch = lambda items, *rest: prefetch(failing(items), *rest)


def fail_in_save(step: int) -> None:
    """The disk is full when the last files of a step are written, in the thread that saves."""
    from gpt2_flax.pretrained import manifest

    def also(directory, saved):
        if saved == step:
            raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    precede(manifest, "write", also)


def flip_a_bit(step: int, device: int) -> None:
    """After a step, one bit of one weight in one device's copy is another."""
    from gpt2_flax.distributed import parallel

    compile_train_step = parallel.compile_train_step

    def compile_and_flip(*arguments):
        train_step = compile_train_step(*arguments)

        def step_and_flip(state, batch):
            state, values = train_step(state, batch)
            if int(state.step) == step:
                params = dict(state.params)
                params["transformer"] = jax.tree.map(
                    lambda x: flipped(x, device), state.params["transformer"]
                )
                state = state._replace(params=params)
            return state, values

        return step_and_flip

    parallel.compile_train_step = compile_and_flip


def flipped(x, device: int):
    copies = [np.array(shard.data) for shard in x.addressable_shards]
    copies[device].view(np.uint32).flat[-1] ^= 1 << 3
    put = [jax.device_put(jnp.asarray(c), s.device) for c, s in
           zip(copies, x.addressable_shards, strict=True)]  # fmt: skip
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, put)


def fail(*arguments):
    raise RuntimeError("an injected fault")


def follow(owner, name, also) -> None:
    before = getattr(owner, name)

    def both(*arguments):
        result = before(*arguments)
        also(*arguments)
        return result

    setattr(owner, name, both)


def precede(owner, name, also) -> None:
    before = getattr(owner, name)

    def both(*arguments):
        also(*arguments)
        return before(*arguments)

    setattr(owner, name, both)


def never_compare() -> None:
    """The copies of a state must not be compared."""
    from gpt2_flax.distributed import parallel

    parallel.differing_replicas = fail


def hang_in_step(step: int) -> None:
    """Wait for the device, which does not come back, inside a step."""
    from gpt2_flax.reporting import metrics

    def also(self, n, values):
        if n == step:
            hang()

    follow(metrics.Meter, "add", also)


def hang_in_compilation() -> None:
    from gpt2_flax.distributed import parallel

    parallel.compile_train_step = lambda *arguments: lambda *arguments: hang()


def hang() -> None:
    """Hold the main thread where no handler of Python's runs, as a wait for a device does."""
    import ctypes

    print("hanging", flush=True)
    mutex = ctypes.create_string_buffer(64)  # a signal ends a wait for most things, not for it
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
