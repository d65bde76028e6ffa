"""What the package as a whole never does: code from data, and imports that cost or bind."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("gpt2_flax/**/*.py"), *ROOT.glob("scripts/**/*.py")])
FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
    *("jsonpickle", "torch"),
}
# The one file that trains PyTorch's model beside ours, and imports it when it does.
MAY_IMPORT_PYTORCH = {"gpt2_flax/evaluation/benchmark_train.py", "gpt2_flax/evaluation/parity.py"}
# These need lm_eval, an optional extra: tests/evaluation/test_lm_eval_adapter.py imports them.
NEEDS_AN_EXTRA = {"gpt2_flax.evaluation.lm_eval_adapter", "gpt2_flax.lm_eval_adapter"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    *("os.system", "os.popen", "torch.load", "torch.jit.load", "pandas.read_pickle"),
}
# yaml.Loader and its like build any Python object.
FORBIDDEN_ATTRIBUTES = {"yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader"}
FORBIDDEN_ARGUMENTS = {"shell", "trust_remote_code", "allow_pickle"}


def forbidden_things(source):
    """Uses of what can run code that came with data, and of PyTorch, in a module's text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(f"{node.module}.{name}" for name in modules)]
            if FORBIDDEN_MODULES & {module.split(".")[0] for module in modules}:
                yield f"line {node.lineno}: import of {modules[0]}"
            if FORBIDDEN_CALLS & set(modules):
                yield f"line {node.lineno}: import of {modules[-1]}"
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            yield f"line {node.lineno}: {node.id}"
        elif isinstance(node, ast.Attribute):
            if ast.unparse(node) in FORBIDDEN_CALLS | FORBIDDEN_ATTRIBUTES:
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif (
            isinstance(node, ast.keyword)
            and node.arg in FORBIDDEN_ARGUMENTS
            and ast.unparse(node.value) != "False"
        ):
            yield f"line {node.value.lineno}: {node.arg}={ast.unparse(node.value)}"
        elif isinstance(node, ast.Dict):  # arguments that are passed on by **
            for key, value in zip(node.keys, node.values, strict=True):
                name = getattr(key, "value", None)
                if name in FORBIDDEN_ARGUMENTS and ast.unparse(value) != "False":
                    yield f"line {value.lineno}: {name}={ast.unparse(value)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_comes_from_data(path):
    found = list(forbidden_things(path.read_text("utf-8")))
    if str(path.relative_to(ROOT)) in MAY_IMPORT_PYTORCH:
        found = [thing for thing in found if not thing.endswith(": import of torch")]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import torch.nn as nn",
        "def f():\n    from torch import save",
        "from yaml import load",
        "eval('1')",
        "run = exec",
        "yaml.load(text, yaml.SafeLoader)",
        "class L(yaml.Loader): pass",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=how)",
        "load_dataset(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, **{'allow_pickle': True})",
        "torch.load(path)",
        "import _pickle",
    ],
)
def test_the_search_finds(source):
    assert len(list(forbidden_things(source))) == 1


@pytest.mark.parametrize(
    "source",
    ["np.load(path, allow_pickle=False)", "f(**{'shell': False})", "model.eval()", "a.exec"],
)
def test_the_search_passes_over(source):
    assert list(forbidden_things(source)) == []


def imported_with(statements):
    """The modules that a fresh process holds after these statements."""
    process = subprocess.run(
        [sys.executable, "-c", f"{statements}\nimport sys\nprint(*sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


def test_settings_and_their_faults_need_no_jax():
    scripts = [str(path) for path in SOURCES if path.parent.name == "scripts"]
    modules = imported_with(
        "import gpt2_flax, gpt2_flax.config.train_config, gpt2_flax.hub, runpy\n"
        f"for script in {scripts}: runpy.run_path(script)"
    )
    assert "gpt2_flax.config.train_config" in modules
    assert modules.isdisjoint({"jax", "numpy", "flax", "transformers", "huggingface_hub"})


def test_every_module_imports_without_pytorch_and_leaves_slow_libraries_for_later():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in SOURCES
        if path.is_relative_to(ROOT / "gpt2_flax") and path.name != "__init__.py"
    ]
    names = [name for name in names if name not in NEEDS_AN_EXTRA]
    # None makes it look not installed: where it is, transformers imports it for GPT2Config.
    modules = imported_with(
        f"import sys\nsys.modules['torch'] = None\nimport {', '.join(names)}\n"
        "del sys.modules['torch']"
    )
    assert modules >= {"jax", *names}
    assert modules.isdisjoint({"torch", "datasets", "pandas", "matplotlib", "wandb"})


def test_requirements_are_the_project_s_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    required = [line for line in (re.sub(r"#.*", "", line).strip() for line in lines) if line]
    assert required == project["dependencies"]
    extras = dict(project["optional-dependencies"])
    del extras["lm_eval"]  # large; its test is skipped where it is not installed
    extras = [name for names in extras.values() for name in names]
    dev = (ROOT / "requirements-dev.txt").read_text("utf-8")
    assert all(re.search(rf"^{name}>=", dev, re.M) for name in extras)
