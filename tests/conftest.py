"""Eight CPU devices, strict ranks, no network, and the tiny things that tests share."""

import collections
import os
import pathlib
import sys
import tempfile

# Before JAX starts. Tests never reach out: whoever needs a hub starts one. Half of the time of
# most of them would be LLVM's optimization; they have it by --full. (pytest-xdist's processes,
# and the nursery's, find what the first one decided.)
os.environ.setdefault(
    "TESTS_XLA_FLAGS",
    ""
    if "--full" in sys.argv
    else "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        os.environ["TESTS_XLA_FLAGS"],
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Runs of the scripts leave the user's cache of compiled programs alone, and compile.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import jax
import pytest
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same tiny programs: one directory for all of them, gone at the end.
COMPILED = tempfile.TemporaryDirectory(prefix="compiled")
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
os.environ["COMPILED_BY_NURSERIES"] = os.path.join(COMPILED.name, "nurseries")
# Oracles are compared at full precision; on CPU this changes nothing.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Token files of a test stay in the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf_home"))


def make_config(**changes):
    """A GPT2Config whose sizes all differ, without dropout. Keyword arguments override."""
    sizes = {
        "n_layer": 2, "n_head": 3, "n_embd": 12, "n_positions": 7, "vocab_size": 31,
        "bos_token_id": 0, "eos_token_id": 0,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    return transformers.GPT2Config(**sizes | changes)


@pytest.fixture(scope="session")
def tiny_config():
    return make_config


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all cases, faults in their full number")


def pytest_configure(config):
    config.pluginmanager.register(FailuresAtOnce(config))


class FailuresAtOnce:
    """Name a failed test when it fails: a long run that is broken off has said so by then."""

    def __init__(self, config):
        self.plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report):
        terminal = self.plugins.get_plugin("terminalreporter")  # made after this object
        if report.failed and terminal:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message.splitlines()[0] if crash and crash.message else ""
            terminal.write_line(f"\n{report.when} of {report.nodeid} failed: {said}")


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked `full` or `thinned`, but for --full."""
    if config.getoption("--full"):
        return
    seen, kept, left_out = collections.Counter(), [], []
    for item in items:
        thinned, test = item.get_closest_marker("thinned"), (item.path, item.originalname)
        one_more = thinned is not None and seen[test] % thinned.args[0] != 0
        seen[test] += 1
        (left_out if one_more or item.get_closest_marker("full") else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def full(request) -> bool:
    return request.config.getoption("--full")


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """Compiled programs stay mapped into memory, and a process may have only so many maps.

    (65,530 on Linux. Beyond them XLA ends in a segmentation fault.)
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """Where runs of the script start at once."""
    from tests.nursery import Nursery  # only now is the project's folder on the path

    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery
