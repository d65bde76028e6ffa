"""Scripts do without PyTorch, also where it is installed."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )


def test_transformers_is_imported_as_if_there_were_no_pytorch():
    done = run(
        "from gpt2_flax.imports import leave_out_torch\nleave_out_torch()\n"
        "import gpt2_flax.train, sys\nassert 'torch' not in sys.modules\n"
        "import torch, transformers\n"  # whoever wants it gets it
        "assert not transformers.utils.is_torch_available()\nprint(torch.ones(2).sum())"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tensor(2.)\n"


def test_who_has_imported_pytorch_keeps_it():
    done = run(
        "import torch\nfrom gpt2_flax.imports import leave_out_torch\nleave_out_torch()\n"
        "import transformers\nassert transformers.utils.is_torch_available()"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("train", "--n_layers 1 --n_embd 8 --n_heads 2 --tokenizer bytes --dry_run"),
        ("generate", "--model there_is_none"),
        ("evaluate", "--model there_is_none --file README.md"),
    ],
)
def test_no_script_imports_pytorch(script, argv):
    program = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        f"sys.argv = ['scripts/{script}.py', *{argv.split()}]\n"
        f"runpy.run_path('scripts/{script}.py', run_name='__main__')"
    )
    done = run(program)
    assert done.stderr.endswith("False\n"), done.stderr
    assert "Traceback" not in done.stderr and "PyTorch" not in done.stderr, done.stderr
    assert done.returncode == (0 if script == "train" else 2)
