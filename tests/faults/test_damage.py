"""Damage to a checkpoint is found before it trains, and the run goes on from an older one.

Each kind of damage is done at random places of the newest of three checkpoints. Then either an
older one is read, and a warning says which file is damaged, or the newest one is, bitwise.
"""

import json
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_flax.distributed import parallel
from gpt2_flax.errors import CheckpointError
from gpt2_flax.pretrained import manifest, orbax_files
from gpt2_flax.training import checkpoint

STEPS = (8, 9, 12)
NEWEST = "12"


def make_state(seed: int, dtype=jnp.float32, width: int = 40):
    def make(key):
        return {
            "step": jnp.int32(seed),
            "params": {
                "a": jax.random.normal(key, (30, width), dtype),
                "b": {"0": jnp.ones(7, dtype)},
            },
            "opt_state": (jax.random.normal(key, (300, 50), dtype), ()),
        }

    return parallel.replicate(make, jax.random.key(seed))


def like(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=parallel.replicated()), state
    )


def of_another_run(meta):
    return None if meta["run"] == "mine" else f"it was saved by a run with run {meta['run']!r}"


def open_store(folder):
    return checkpoint.Checkpoints(folder, 5, of_another_run)


def save(folder, state_of, run="mine", steps=STEPS):
    store = open_store(folder)
    for step in steps:
        store.save(step, state_of(step), {"run": run, "of": step}, None)
    store.wait()
    store.close()
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return save(tmp_path_factory.mktemp("sound"), make_state)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Checkpoints that are whole, and not of this run."""
    settings = {
        "another dtype": {"state_of": lambda step: make_state(step, jnp.bfloat16)},
        "another model": {"state_of": lambda step: make_state(step, width=41)},
        "another run": {"state_of": make_state, "run": "theirs"},
    }
    return {
        name: save(tmp_path_factory.mktemp("other"), steps=(12,), **setting)
        for name, setting in settings.items()
    }


# ---------------------------------------------------------------- kinds of damage


def files_of(step, pattern="*"):
    found = sorted(path for path in step.rglob(pattern) if path.is_file())
    assert found, pattern
    return found


def flip(pattern):
    """Of a random file of that name, a random bit."""

    def damage(step, rng, others):
        path = rng.choice([path for path in files_of(step, pattern) if path.stat().st_size])
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    return damage


def truncate(step, rng, others):
    path = rng.choice([path for path in files_of(step) if path.stat().st_size])
    os.truncate(path, rng.randrange(path.stat().st_size))


def put_zeros(step, rng, others):
    path = rng.choice(files_of(step / "state", "d/*"))
    content = bytearray(path.read_bytes())
    first = rng.randrange(len(content))
    length = rng.randrange(1, len(content) - first + 1)
    content[first : first + length] = bytes(length)
    path.write_bytes(content)


def put_zeros_everywhere(step, rng, others):
    for path in files_of(step / "state"):
        path.write_bytes(bytes(path.stat().st_size))


def append(step, rng, others):
    with open(rng.choice(files_of(step / "state")), "ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 99)))


def delete(step, rng, others):
    rng.choice(files_of(step)).unlink()


def delete_half(step, rng, others):
    for path in rng.sample(files_of(step), len(files_of(step)) // 2):
        path.unlink()


def delete_item(step, rng, others):
    shutil.rmtree(step / rng.choice(["state", "meta"]))


def empty(step, rng, others):
    shutil.rmtree(step)
    step.mkdir()


def be_a_file(step, rng, others):
    shutil.rmtree(step)
    step.write_text("12")


def link_to_another_step(step, rng, others):
    shutil.rmtree(step)
    step.symlink_to(step.with_name("9"), target_is_directory=True)


def link_a_file(step, rng, others):
    path = rng.choice(files_of(step))
    moved = step.parent.parent / "elsewhere"
    os.replace(path, moved)
    path.symlink_to(moved)


def add_a_file(step, rng, others):
    (rng.choice([step, step / "state", step / "meta"]) / "one.more").write_bytes(b"1")


def swap_files(step, rng, others):
    first, second = rng.sample(files_of(step / "state"), 2)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def swap_steps(step, rng, others):
    other, aside = step.with_name("9"), step.with_name("aside")
    os.replace(step, aside)
    os.replace(other, step)
    os.replace(aside, other)


def copy_an_older_step(step, rng, others):
    shutil.rmtree(step)
    shutil.copytree(step.with_name(rng.choice(["8", "9"])), step)


def replace_by(name):
    def damage(step, rng, others):
        shutil.rmtree(step)
        shutil.copytree(others[name] / "checkpoints" / NEWEST, step)

    return damage


def without_manifest(step, rng, others):
    (step / manifest.FILE).unlink()


def with_a_manifest_of_something_else(step, rng, others):
    content = rng.choice(
        ["", "{}", "[]", "null", '{"body": 1, "digest": 2}', "\ufffe", "[" * 9999]
    )
    (step / manifest.FILE).write_text(content)


KINDS = {
    "a bit of the arrays": flip("state/d/*"),
    "a bit of a process's arrays": flip("state/ocdbt.process_0/**/*"),
    "a bit of OCDBT's manifest": flip("state/manifest.ocdbt"),
    "a bit of the tree": flip("state/_METADATA"),
    "a bit of the shardings": flip("state/_sharding"),
    "a bit of the arrays' metadata": flip("state/array_metadatas/*"),
    "a bit of meta": flip("meta/metadata"),
    "a bit of the step's metadata": flip("_CHECKPOINT_METADATA"),
    "a bit of the manifest": flip(manifest.FILE),
    "a bit of a mark that nobody reads": flip("commit_success.txt"),
    **{
        damage.__name__.replace("_", " "): damage
        for damage in (
            truncate, put_zeros, put_zeros_everywhere, append, delete, delete_half, delete_item,
            empty, be_a_file, link_to_another_step, link_a_file, add_a_file, swap_files,
            swap_steps, copy_an_older_step, without_manifest, with_a_manifest_of_something_else,
        )
    },
    **{name: replace_by(name) for name in ("another dtype", "another model", "another run")},
}  # fmt: skip


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow(but_every=3)
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_or_harmless(kind, sound, others, tmp_path, thorough, capsys):
    harmless = 0
    for seed in range(10 if thorough else 2):
        run = tmp_path / str(seed)
        shutil.copytree(sound, run)
        KINDS[kind](run / "checkpoints" / NEWEST, random.Random(f"{kind} {seed}"), others)
        capsys.readouterr()
        store = open_store(run)
        state, meta = store.restore_latest(like(make_state(0)))
        assert store.newest_meta() == (meta["of"], meta)
        # It goes on from there, and what was damaged is in nobody's way.
        store.save(12 if meta["of"] < 12 else 13, state, meta, None)
        store.wait()
        store.close()
        assert_same(state, make_state(meta["of"]))
        told = capsys.readouterr().err
        if meta["of"] == 12:
            harmless += 1
            assert not told
        else:
            assert told.startswith("checkpoint 12 is damaged (")
            assert len(told.splitlines()) == (2 if meta["of"] == 8 else 1)
            assert os.path.lexists(run / "checkpoints" / "12.damaged")
    if harmless:
        assert kind in ("a bit of a mark that nobody reads", "a bit of the step's metadata",
                        "truncate", "delete", "delete half")  # fmt: skip


def test_the_warning_names_the_file(sound, tmp_path, capsys):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    (array,) = files_of(tmp_path / "checkpoints" / NEWEST, "state/d/*")[:1]
    array.write_bytes(array.read_bytes()[::-1])
    store = open_store(tmp_path)
    store.restore_latest(like(make_state(0)))
    store.close()
    name = array.relative_to(tmp_path / "checkpoints" / NEWEST).as_posix()
    expected = f"checkpoint 12 is damaged ({name} was changed); it is moved aside to 12.damaged\n"
    assert capsys.readouterr().err == expected


def test_with_none_that_is_whole_nothing_starts_afresh_and_nothing_is_moved(sound, tmp_path):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    for step in STEPS:
        (tmp_path / "checkpoints" / str(step) / manifest.FILE).unlink()
    for _ in range(2):
        store = open_store(tmp_path)
        with pytest.raises(CheckpointError, match=r"of step 12: manifest\.json is missing\n  "):
            store.restore_latest(like(make_state(0)))
        with pytest.raises(CheckpointError, match=r"of step 12: manifest\.json is missing\n  "):
            store.newest_meta()
        store.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"8", "9", "12"}


def test_converting_and_generating_find_damage_too(sound, tmp_path):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    assert orbax_files.locate(tmp_path, None).name == NEWEST
    flip("state/d/*")(tmp_path / "checkpoints" / NEWEST, random.Random(0), None)
    for path in (tmp_path, tmp_path / "checkpoints" / NEWEST):
        with pytest.raises(
            CheckpointError, match=r"12 is damaged: state/d/\w+ was changed\n  nam"
        ):
            orbax_files.locate(path, None)
    assert orbax_files.locate(tmp_path, 9).name == "9"


def test_a_manifest_says_what_was_saved(sound):
    for step in STEPS:
        directory = sound / "checkpoints" / str(step)
        manifest.check(directory, step)
        body = json.loads((directory / manifest.FILE).read_text())["body"]
        others = {manifest.FILE, "_CHECKPOINT_METADATA", "commit_success.txt"}
        names = {path.relative_to(directory).as_posix() for path in files_of(directory)}
        assert body["files"].keys() == names - others
