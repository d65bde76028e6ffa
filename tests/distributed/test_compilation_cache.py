"""Compiled programs are kept where the setting says, and change nothing but the time."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from gpt2_flax.distributed import compilation_cache

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPTIONS = (
    "jax_enable_compilation_cache", "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes",
)  # fmt: skip


@pytest.fixture(autouse=True)
def options():
    """JAX's own as they are by default; after the test as they were."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name, value in zip(OPTIONS, (True, None, 1.0, 0), strict=True):
        jax.config.update(name, value)
    yield lambda: tuple(getattr(jax.config, name) for name in OPTIONS)
    for name, value in before.items():
        jax.config.update(name, value)


def test_auto_is_a_folder_of_the_user_that_only_he_can_write(options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compilation_cache.use("auto")
    assert pathlib.Path(folder).parent == tmp_path / "gpt2_flax" / "compiled"
    assert options() == (True, folder, 0, -1)
    assert os.stat(folder).st_mode & 0o77 == 0
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert str(compilation_cache.default_folder()).startswith(f"{tmp_path}/home/.cache/")


def test_processors_that_differ_have_folders_of_their_own(monkeypatch):
    names = set()
    for text in ("flags : sse avx\n", "flags : sse avx avx512f\n", "model : 1\n"):
        monkeypatch.setattr(pathlib.Path, "read_text", lambda self, text=text: text)
        names.add(compilation_cache.processor())
    assert len(names) == 3


def test_a_folder_that_is_named_is_used(options, tmp_path):
    named = str(tmp_path / "a" / "b")
    assert compilation_cache.use(named) == named
    assert options() == (True, named, 0, -1)


def test_auto_leaves_alone_what_jax_was_told(options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "/somewhere")
    assert compilation_cache.use("auto") == "/somewhere"
    assert options()[2:] == (1.0, 0)
    jax.config.update("jax_enable_compilation_cache", False)
    assert compilation_cache.use("auto") is None
    assert not list(tmp_path.iterdir())


def test_off_keeps_nothing(options):
    assert compilation_cache.use("off") is None
    assert not options()[0]


def test_a_folder_that_cannot_be_written_is_done_without(options, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    named = str(tmp_path / "file" / "folder")
    before = options()
    assert compilation_cache.use(named) is None
    assert options() == before
    err = capsys.readouterr().err
    assert (
        err == f"compiled programs are not kept (--compilation_cache {named}): Not a directory\n"
    )


@pytest.mark.slow
def test_a_run_learns_the_same_with_kept_programs_and_without(tmp_path):
    (tmp_path / "a.txt").write_text("some words to learn, " * 200)
    kept = tmp_path / "kept"
    models = {}
    for name, setting in (("off", "off"), ("first", str(kept)), ("again", str(kept))):
        command = [
            sys.executable, str(ROOT / "scripts" / "train.py"), "--train_file", "a.txt",
            "--tokenizer", "bytes", "--n_layers", "1", "--n_heads", "1", "--n_embd", "8",
            "--block_size", "16", "--max_steps", "4", "--eval_every", "0", "--sample_tokens", "0",
            "--save_every", "0", "--cache_dir", "cache", "--output_dir", name,
            "--compilation_cache", setting,
        ]  # fmt: skip
        environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "1", "XLA_FLAGS": ""}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        models[name] = (tmp_path / name / "model.safetensors").read_bytes()
        programs = {path.name for path in kept.glob("*-cache")} if kept.exists() else set()
        assert bool(programs) == (name != "off")
        if name == "first":
            after_first = programs
    assert programs == after_first  # none was compiled again
    assert models["off"] == models["first"] == models["again"]
