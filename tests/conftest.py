"""Eight CPU devices, strict ranks, no network, two tiers, and the tiny things that tests share."""

import collections
import functools
import os
import pathlib
import sys

# These must be set before JAX starts. LLVM's optimization would be half of the time of most
# tests, so only --thorough has it. Workers of pytest-xdist and forked runs inherit the variable.
os.environ.setdefault(
    "TESTS_XLA_FLAGS",
    ""
    if "--thorough" in sys.argv
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
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a hub starts one
# Runs of the scripts must neither use nor fill the user's cache of compiled programs.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import jax
import pytest
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

jax.config.update("jax_numpy_rank_promotion", "raise")
# Oracles are compared at full precision; on CPU this changes nothing.
jax.config.update("jax_default_matmul_precision", "highest")


def keep_compiled_programs(folder: pathlib.Path) -> None:
    """Share compiled programs between workers and forked runs, and keep them for the next call.

    They lie in .pytest_cache, a folder for each kind of processor; `pytest --cache-clear`
    removes them.
    """
    from gpt2_flax.distributed.compilation_cache import processor

    folder = folder / processor()
    os.environ["COMPILED_BY_TESTS"] = str(folder)  # for tests.fork_server
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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
    parser.addoption("--all", action="store_true", help="run the slow tests, too")
    parser.addoption(
        "--thorough",
        action="store_true",
        help="as --all, with long counts (50 kills, 1,000 configurations) and optimized programs",
    )


def pytest_configure(config):
    keep_compiled_programs(config.cache.mkdir("compiled"))
    config.pluginmanager.register(FailuresAtOnce(config))
    config.pluginmanager.register(Tiers(config))


class Tiers:
    """Leave out what belongs to a longer tier, and say so at the end.

    A test marked `slow` runs with --all, one marked `thorough` only with --thorough. With
    `slow(but_every=5)` every fifth case of a test stays in the shorter tier.
    """

    def __init__(self, config):
        self.is_thorough = config.getoption("--thorough")
        self.has_slow = self.is_thorough or config.getoption("--all")
        self.n_slow = 0  # left out, and run by --all

    def pytest_collection_modifyitems(self, config, items):
        seen = collections.Counter()  # cases of each test function
        kept, left_out = [], []
        for item in items:
            name = item.nodeid.split("[")[0]
            number, seen[name] = seen[name], seen[name] + 1
            if not self.is_thorough and belongs_to("thorough", item, number):
                left_out.append(item)
            elif not self.has_slow and belongs_to("slow", item, number):
                left_out.append(item)
                self.n_slow += 1
            else:
                kept.append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
            session.config.workeroutput["n_slow"] = self.n_slow

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        # Every worker collects all tests, so they all report the same number.
        self.n_slow = getattr(node, "workeroutput", {}).get("n_slow", self.n_slow)

    def pytest_terminal_summary(self, terminalreporter):
        if self.n_slow:
            terminalreporter.write_line(
                f"fast tier: {self.n_slow} slow tests were left out;"
                " `python -m pytest -n auto --all` runs them, too"
            )


def belongs_to(tier: str, item, number: int) -> bool:
    """Whether a test is marked for a longer tier. number: of the test's cases, from 0 on."""
    marker = item.get_closest_marker(tier)
    every = marker.kwargs.get("but_every") if marker else 1
    return every is None or number % every != 0


class FailuresAtOnce:
    """Name a failed test at once, so that a run that is cut off has still named it."""

    def __init__(self, config):
        self.plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report):
        terminal = self.plugins.get_plugin("terminalreporter")  # made after this object
        if report.failed and terminal:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message.splitlines()[0] if crash and crash.message else ""
            terminal.write_line(f"\n{report.when} of {report.nodeid} failed: {said}")


@pytest.fixture(scope="session")
def thorough(request) -> bool:
    """Whether random faults and configurations are tried in their long counts."""
    return request.config.getoption("--thorough")


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """Compiled programs stay mapped into memory, and a process may have only so many maps.

    (65,530 on Linux. Beyond them XLA ends in a segmentation fault.)
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> pathlib.Path:
    """The text that `train_tiny` and `finished_run` learn, the same file for all workers."""
    from tests import tiny_runs  # only now is the project's folder on the path

    with tiny_runs.made_once(tmp_path_factory, "tiny_text") as (folder, is_new):
        if is_new:
            tiny_runs.write_words(folder / "text.txt")
    return folder / "text.txt"


@pytest.fixture(scope="session")
def train_tiny(tiny_text):
    """`train_tiny(output_dir, *flags)` trains in this process and returns the exit code."""
    from tests import tiny_runs

    return functools.partial(tiny_runs.train_tiny, tiny_text)


@pytest.fixture(scope="session")
def finished_run(train_tiny, tmp_path_factory) -> pathlib.Path:
    """A run that was never interrupted, made once. Copy it before you change anything in it."""
    from tests import tiny_runs

    with tiny_runs.made_once(tmp_path_factory, "finished") as (folder, is_new):
        if is_new:
            assert train_tiny(folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """A process that has imported what a run needs, and forks runs of the scripts."""
    from tests.fork_server import ForkServer  # only now is the project's folder on the path

    with ForkServer(tmp_path_factory.mktemp("fork_server")) as fork_server:
        yield fork_server
