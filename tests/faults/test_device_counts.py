"""A checkpoint doesn't know on how many devices it was made, nor does what comes after it."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gpt2_flax.reporting import metrics
from gpt2_flax.training import checkpoint
from tests.faults.runs import SETTINGS, as_argv, steps_of

COUNTS = (1, 2, 4, 8)
PAIRS = [(1, 1), (8, 1), (4, 2)]  # before and after; with --thorough all sixteen


def on_devices(count):
    return NamedSharding(Mesh(jax.devices()[:count], ("batch",)), PartitionSpec())


@pytest.mark.parametrize("saved_on", COUNTS)
def test_a_state_is_bitwise_the_same_on_any_number_of_devices(tmp_path, saved_on):
    """Warnings are errors here: there are none."""

    def make(key):
        return {"step": jax.numpy.int32(3), "params": {"a": jax.random.normal(key, (33, 17))}}

    state = jax.jit(make, out_shardings=on_devices(saved_on))(jax.random.key(saved_on))
    store = checkpoint.Checkpoints(tmp_path, 1)
    store.save(3, state, {}, None)
    store.wait()
    store.close()
    for count in COUNTS:
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_devices(count)),  # noqa: B023
            state,
        )
        store = checkpoint.Checkpoints(tmp_path, 1)
        restored, _ = store.restore_latest(like)
        store.close()
        for got, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
            assert len(got.addressable_shards) == count
            for shard in got.addressable_shards:
                np.testing.assert_array_equal(shard.data, expected)


@pytest.fixture(scope="module")
def start(fork_server, text):
    def start(output_dir, devices, n_rows, fault=None):
        settings = SETTINGS | {
            "train_file": text, "output_dir": output_dir, "max_steps": 26, "dropout": 0.1,
            "batch_size": n_rows, "log_every": 1, "eval_every": 0, "save_every": 0,
        }  # fmt: skip
        return fork_server.start(as_argv(settings), devices, fault=fault)

    return start


@pytest.fixture(scope="module")
def begun(start, tmp_path_factory, thorough):
    """Runs that were stopped after 6 of 26 steps of 8 rows, by the number of their devices."""
    folder = tmp_path_factory.mktemp("begun")
    for devices in COUNTS if thorough else sorted({before for before, _ in PAIRS}):
        run = start(folder / str(devices), devices, 8 // devices, ["stop_after", 6])
        assert run.wait() == 143, run.text()
    return folder


def losses(output_dir):
    return [row["train_loss"] for row in metrics.read_log(output_dir / "metrics.jsonl")]


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_devices(start, begun, tmp_path, thorough):
    """It keeps the rows of its steps, their order, and what it learns from them."""
    import shutil

    pairs = [(a, b) for a in COUNTS for b in COUNTS] if thorough else PAIRS
    expected, rows = None, None
    for before, after in pairs:
        output_dir = tmp_path / f"{before} {after}"
        shutil.copytree(begun / str(before), output_dir)
        run = start(output_dir, after, 1)  # what a device takes at a time may be anything
        assert run.wait() == 0, run.text()
        if after < 8:
            words = f"the run's steps have 8 rows and keep them: grad_accum is {8 // after} here"
            assert words in run.text()
        assert not re.search("warning|Sharding|topology", run.text(), re.IGNORECASE), run.text()
        assert steps_of(output_dir) == [*range(1, 27)]
        ledger = (output_dir / "ledger.jsonl").read_text()
        if expected is None:
            expected, rows = losses(output_dir), ledger
        np.testing.assert_allclose(losses(output_dir), expected, rtol=1e-5)
        assert ledger == rows


@pytest.mark.slow
def test_what_devices_cannot_make_up_is_refused_with_what_they_can(start, begun, tmp_path):
    import shutil

    output_dir = tmp_path / "run"
    shutil.copytree(begun / "1", output_dir)
    run = start(output_dir, 2, 3)
    assert run.wait() == 2
    assert run.text().endswith(
        "error: the run's steps have 8 rows; 2 devices x batch_size 3 cannot make that up\n"
        "  set --batch_size to one of [1, 2, 4]\n"
    )
    run = start(output_dir, 3, 1)
    assert run.wait() == 2
    assert run.text().endswith(
        "3 devices x batch_size 1 cannot make that up\n  use fewer devices\n"
    )
