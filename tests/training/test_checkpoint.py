"""What is saved comes back bitwise, and what cannot be read is set aside."""

import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_flax.distributed import parallel
from gpt2_flax.errors import CheckpointError, StorageError, UserError
from gpt2_flax.pretrained import manifest, orbax_files
from gpt2_flax.training import checkpoint


def make_state(seed=0):
    def make(key):
        return {
            "step": jnp.int32(seed),
            "params": {"a": jax.random.normal(key, (3, 5)), "b": {"0": jnp.ones(7)}},
            "opt_state": (jax.random.normal(key, (300, 500)), ()),
        }

    return parallel.replicate(make, jax.random.key(seed))


def like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.replicated()), state
    )


@pytest.fixture
def store(tmp_path):
    with_closing = []

    def open_store(keep=2):
        with_closing.append(checkpoint.Checkpoints(tmp_path / "run", keep))
        return with_closing[-1]

    yield open_store
    for opened in with_closing:
        opened.close()


def assert_same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype


def test_state_and_meta_come_back_on_every_device(store):
    meta = {"cursor": {"rows": 3}, "window": [[1, 0.1, 2.0**-30]], "none": None}
    opened = store()
    opened.save(5, make_state(5), meta, None)
    opened.wait()
    again = store()
    state, got = again.restore_latest(like(make_state(5)))
    assert got == meta
    assert_same(state, make_state(5))
    assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {parallel.replicated()}


def test_the_name_of_a_checkpoint_is_flushed_when_it_has_it(store, monkeypatch):
    opened, flushed = store(), []
    flush = manifest.flush

    def note(path):
        flush(path)
        flushed.append(path)

    monkeypatch.setattr(manifest, "flush", note)
    opened.save(1, make_state(1), {}, None)
    opened.wait()
    step = opened.folder / "1"
    assert flushed[-2:] == [step, opened.folder]
    # Orbax writes one of the two only where renaming is not atomic.
    assert step / manifest.STEP_METADATA in flushed


def test_headers_say_of_a_state_what_orbax_says(store, monkeypatch):
    types = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint8, jnp.bool_)
    state = make_state(3) | {"of": [jnp.ones((2, n), t) for n, t in enumerate(types, 1)]}
    opened = store()
    opened.save(3, state, {}, None)
    opened.wait()
    directory = opened.folder / "3"
    described = orbax_files.described_kinds(directory)
    assert described == orbax_files.kinds(orbax_files.stored_shapes(directory))
    assert described["of/1"] == "bfloat16[2, 2]" and described["step"] == "int32[]"
    monkeypatch.setattr(orbax_files, "stored_shapes", None)  # they are enough
    assert_same(opened.restore_latest(like(state))[0], state)


@pytest.mark.parametrize("found", [None, {}])
def test_where_headers_say_nothing_orbax_is_asked(store, monkeypatch, found):
    opened = store()
    opened.save(1, make_state(1), {}, None)
    opened.wait()
    assert not orbax_files.described_kinds(opened.folder / "none")
    monkeypatch.setattr(orbax_files, "described_kinds", lambda directory: found)
    assert_same(opened.restore_latest(like(make_state()))[0], make_state(1))
    other = make_state() | {"step": jnp.float32(0)}
    with pytest.raises(CheckpointError, match=r"step is int32\[\] instead of float32\[\]"):
        opened.restore_latest(like(other))


def test_another_type_is_found_by_headers_too(store):
    opened = store()
    opened.save(1, make_state(1), {}, None)
    opened.wait()
    other = make_state() | {"step": jnp.float32(0)}
    with pytest.raises(CheckpointError, match=r"step is int32\[\] instead of float32\[\]"):
        opened.restore_latest(like(other))


def test_a_state_may_be_donated_while_it_is_still_being_written(store):
    opened = store()
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=(0,))
    state = make_state(1)
    opened.save(1, state, {}, None)
    for _ in range(20):
        state = advance(state)
    opened.wait()
    restored, _ = opened.restore_latest(like(state))
    assert_same(restored, make_state(1))


def test_the_newest_and_the_best_are_kept(store):
    opened = store(keep=2)
    losses = {1: 5.0, 2: 1.0, 3: None, 4: float("nan"), 5: 3.0, 6: float("inf")}
    for step, loss in losses.items():
        opened.save(step, make_state(), {}, loss)
    opened.wait()
    assert opened.steps() == [2, 5, 6]


def test_a_damaged_checkpoint_is_set_aside_for_an_older_one(store, capsys):
    opened = store()
    for step in (1, 2):
        opened.save(step, make_state(step), {"of": step}, None)
    opened.wait()
    for file in (opened.folder / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    again = store()
    state, meta = again.restore_latest(like(make_state()))
    assert meta == {"of": 1}
    assert_same(state, make_state(1))
    assert capsys.readouterr().err.startswith("checkpoint 2 is damaged (state/")
    again.save(2, make_state(2), {"of": 2}, None)
    again.wait()
    assert again.steps() == [1, 2]
    assert (again.folder / "2.damaged").is_dir()


def test_with_no_readable_checkpoint_nothing_starts_afresh(store):
    opened = store()
    assert opened.restore_latest(like(make_state())) is None
    opened.save(1, make_state(), {}, None)
    opened.wait()
    shutil.rmtree(opened.folder / "1" / "state")
    again = store()
    for _ in range(2):  # the second start must not find an empty folder and begin afresh
        with pytest.raises(
            CheckpointError, match=r"no checkpoint in .* is whole; of step 1: state/"
        ):
            again.restore_latest(like(make_state()))


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (MemoryError("no more"), MemoryError, "no more"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), jax.errors.JaxRuntimeError, "RES"),
        (ValueError("a long\nreport"), CheckpointError, "2 cannot be read: a long$"),
    ],
)
def test_a_whole_checkpoint_that_cannot_be_read_is_not_moved(
    store, monkeypatch, raised, kind, words
):
    """Its files are what was saved: it is something else that is wrong."""
    opened = store()
    for step in (1, 2):
        opened.save(step, make_state(step), {"of": step}, None)
    opened.wait()

    def fail(*arguments, **keywords):
        raise raised

    with monkeypatch.context() as patch, pytest.raises(kind, match=words):
        patch.setattr(opened.manager, "restore", fail)
        opened.restore_latest(like(make_state()))
    assert opened.names() == [1, 2]
    assert opened.restore_latest(like(make_state()))[1] == {"of": 2}


def test_a_step_that_is_not_saved_is_an_error(store):
    """Orbax skips a step below the newest without a word."""
    opened = store()
    opened.save(5, make_state(), {}, None)
    with pytest.raises(RuntimeError, match="skipped the checkpoint of step 4"):
        opened.save(4, make_state(), {}, None)


def test_a_full_disk_is_named(store):
    opened = store()
    with (
        pytest.raises(StorageError, match=r"cannot save .* No space left.*\n.*GB are free"),
        checkpoint.storage_errors(opened.folder),
    ):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")


def test_parameters_are_read_alone_from_any_way_to_name_a_checkpoint(store, tmp_path):
    opened = store()
    for step in (3, 12):
        opened.save(step, make_state(step), {"step": step}, None)
    opened.wait()
    run = tmp_path / "run"
    for path, step, expected in (
        (run, None, 12),
        (run, 3, 3),
        (run / "checkpoints", None, 12),
        (run / "checkpoints" / "3", None, 3),
    ):
        found = orbax_files.locate(path, step)
        assert orbax_files.read_meta(found) == {"step": expected}
        shapes = like(make_state()["params"])
        params = orbax_files.read_params(found, shapes)
        assert_same(params, make_state(expected)["params"])
    with pytest.raises(CheckpointError, match="has no step 4; it has 3, 12"):
        orbax_files.locate(run, 4)
    with pytest.raises(UserError, match="is step 3, not 12"):
        orbax_files.locate(run / "checkpoints" / "3", 12)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        orbax_files.locate(tmp_path / "elsewhere", None)


def test_a_step_is_sealed_only_when_orbax_has_said_what_it_consists_of(store, monkeypatch):
    """Its thread writes that over a first file, which is empty for a moment: here, for long."""
    from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata

    write = orbax_metadata._MetadataStoreImpl.write

    def slowly(self, file_path, metadata):
        pathlib.Path(file_path).write_text("")
        time.sleep(0.3)
        write(self, file_path, metadata)

    monkeypatch.setattr(orbax_metadata._MetadataStoreImpl, "write", slowly)
    opened = store()
    opened.save(5, make_state(5), {}, None)
    opened.wait()
    state, _ = store().restore_latest(like(make_state(5)))
    assert_same(state, make_state(5))
