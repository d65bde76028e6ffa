"""The command `gpt2-flax`: its subcommands, its help, recipes by name, the wheel's contents."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from gpt2_flax import cli, command_names, huge_pages, recipes
from gpt2_flax.config.train_config import load_config
from gpt2_flax.errors import UserError
from gpt2_flax.reporting import summary

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def gpt2_flax(capsys, monkeypatch):
    """`gpt2_flax(*argv)` runs the command in this process; (exit code, stdout, stderr).

    The process is not started again for huge pages, and keeps PyTorch and its flags of XLA.
    """
    monkeypatch.setattr(huge_pages, "start_again", lambda: None)
    monkeypatch.setattr(cli.xla_flags, "set_defaults", lambda: None)
    monkeypatch.setattr(cli, "leave_out_torch", lambda: None)

    def run(*argv):
        try:
            code = cli.main([*argv])
        except SystemExit as end:  # argparse's, after --help
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_help_has_a_line_for_each_script(gpt2_flax):
    code, out, err = gpt2_flax("--help")
    assert (code, err) == (0, "")
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert scripts == set(cli.ABOUT)
    for name, text in cli.ABOUT.items():
        assert re.search(rf"^    {name}\s+{re.escape(text)}$", out, re.MULTILINE)


@pytest.mark.parametrize("name", cli.ABOUT)
def test_a_subcommand_has_the_help_of_its_script(gpt2_flax, name, capsys):
    code, out, err = gpt2_flax(name, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: gpt2-flax {name} ")
    with pytest.raises(SystemExit):
        getattr(cli, name)(["--help"])
    of_script = capsys.readouterr().out
    assert of_script.startswith(f"usage: scripts/{name}.py ")
    assert re.findall(r"--\w+", of_script) == re.findall(r"--\w+", out)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "unknown command trian\n  did you mean train?\n"),
        (["xyzzy"], "unknown command xyzzy\n  commands: train, generate, "),
        ([], "no command\n  commands: train, "),
        (["--versoin"], "unknown flag --versoin\n  did you mean --version?\n"),
        (["train", "--qqqq"], "unknown flag --qqqq\n  gpt2-flax train --help lists them\n"),
        (["convert", "to_pytorch"], "--output\n  gpt2-flax convert to_pytorch --help lists the"),
        (["generate"], "--model\n  gpt2-flax generate --help lists the flags\n"),
    ],
)
def test_what_is_wrong_is_said_with_a_remedy_that_can_be_typed(gpt2_flax, argv, said):
    code, out, err = gpt2_flax(*argv)
    assert (code, out) == (2, "")
    assert said in err and err.startswith("error: ")


def test_a_script_is_named_by_itself_again_afterwards(gpt2_flax):
    gpt2_flax("train", "--qqqq")
    with pytest.raises(UserError, match=r"python scripts/train\.py --help"):
        load_config(["--qqqq"])


def test_a_run_names_the_command_that_it_was_started_by():
    with command_names.typed_as_gpt2_flax():
        assert command_names.typed("generate") == "gpt2-flax generate"
    assert command_names.typed("generate") == "python scripts/generate.py"
    assert summary.typed is command_names.typed


def test_python_m_is_the_command_and_needs_no_jax_to_refuse():
    program = (
        "import runpy, sys\nsys.argv = ['gpt2-flax', 'train', '--n_layer', '3']\n"
        "try:\n    runpy.run_module('gpt2_flax', run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == "error: unknown flag --n_layer\n  did you mean --n_layers?\n"
    code, *modules = done.stdout.split()
    assert code == "2" and {"jax", "numpy", "transformers"}.isdisjoint(modules)


def test_a_module_that_is_run_starts_again_with_huge_pages(monkeypatch):
    """As `python -m gpt2_flax train`, whose sys.argv[0] is no word of the command line."""
    begun = []
    main = type(sys)("__main__")
    main.__spec__ = type("Spec", (), {"name": "gpt2_flax.__main__"})
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["/somewhere/gpt2_flax/__main__.py", "train"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "gpt2_flax", "train"])
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(huge_pages, "variables", lambda: {"A": "b"})
    monkeypatch.setattr(huge_pages.os, "execve", lambda *arguments: begun.append(arguments))
    huge_pages.start_again()
    ((executable, argv, environment),) = begun
    assert (executable, argv, environment["A"]) == (sys.executable, sys.orig_argv, "b")
    main.__spec__.name = "cProfile"
    huge_pages.start_again()
    assert len(begun) == 1


# ---------------------------------------------------------------- recipes


def test_a_recipe_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = load_config(["--config", "quickstart"])
    assert (named.n_layers, named.n_embd, named.config) == (2, 256, "quickstart")
    (tmp_path / "quickstart").write_text("n_layers: 7")
    assert load_config(["--config", "quickstart"]).n_layers == 7  # a file comes first


def test_an_unknown_recipe_is_answered_with_the_names_of_all():
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    with pytest.raises(UserError) as error:
        load_config(["--config", "quikstart"])
    assert str(error.value) == (
        f"cannot read --config quikstart: No such file or directory\n  recipes: {', '.join(names)}"
    )


def test_an_installed_package_has_its_recipes_within(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "gpt2_flax" / "recipes.py"))
    (tmp_path / "gpt2_flax" / "configs").mkdir(parents=True)
    (tmp_path / "configs").mkdir()  # another package's
    (tmp_path / "gpt2_flax" / "configs" / "mine.yaml").write_text("seed: 5")
    assert recipes.names() == ["mine"]
    assert load_config(["--config", "mine"]).seed == 5


# ---------------------------------------------------------------- what is installed


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_lowest_versions_are_what_the_floor_file_pins(pyproject):
    promised = {}
    for requirement in pyproject["project"]["dependencies"]:
        name, lowest = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        promised[name] = tuple(map(int, lowest.split(".")))
    lines = (ROOT / "requirements-floor.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    del pinned["jaxlib"]  # belongs to jax
    assert pinned.keys() == promised.keys()
    for name, lowest in promised.items():
        version = tuple(map(int, pinned[name].split(".")))
        assert version[: len(lowest)] == lowest and not any(version[len(lowest) :]), name


def test_the_wheel_is_told_of_all_packages_and_of_the_recipes(pyproject):
    setuptools = pyproject["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "gpt2_flax").rglob("*.py")}
    packages = {".".join(path.relative_to(ROOT).parts) for path in folders}
    assert {*setuptools["packages"]} == packages | {"gpt2_flax.configs"}
    assert setuptools["package-dir"] == {"gpt2_flax.configs": "configs"}
    assert setuptools["package-data"]["gpt2_flax.configs"] == ["*.yaml"]
    assert (ROOT / "gpt2_flax" / "py.typed").is_file()
    assert pyproject["project"]["scripts"] == {"gpt2-flax": "gpt2_flax.__main__:main"}


def test_the_workflow_runs_the_parts_of_the_gate():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    parts = re.findall(r"part: (\w+)", workflow)
    assert parts == ["lint", "oldest", "newest", "wheel"]
    assert ".ci/run ${{ matrix.part }}" in workflow
