"""Scripts do without PyTorch, also where it is installed."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from gpt2_flax import xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow
def test_transformers_is_imported_as_if_there_were_no_pytorch():
    done = run(
        "from gpt2_flax.imports import leave_out_torch\nleave_out_torch()\n"
        "import importlib.util, sys\nassert importlib.util.find_spec('transformers')\n"
        "import transformers\nassert 'torch' not in sys.modules\n"
        "import gpt2_flax.pretrained.modeling\nassert 'torch' not in sys.modules\n"
        "import torch\n"  # whoever wants it gets it
        "assert not transformers.utils.is_torch_available()\nprint(torch.ones(2).sum())"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tensor(2.)\n"


def test_a_trainer_starts_without_transformers():
    done = run("import gpt2_flax.training.train, sys\nassert 'transformers' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("imported_before", [True, False])
def test_who_has_imported_pytorch_keeps_it(imported_before):
    """Before it was to be left out, or afterwards, before transformers."""
    before, after = "import torch\n", ""
    if not imported_before:
        before, after = after, before
    done = run(
        f"{before}from gpt2_flax.imports import leave_out_torch\nleave_out_torch()\n{after}"
        "import transformers\nassert transformers.utils.is_torch_available()"
    )
    assert done.returncode == 0, done.stderr


def test_where_there_is_no_pytorch_nothing_is_done_about_it(tmp_path):
    (tmp_path / "transformers.py").write_text(
        "import sys\nassert 'torch' not in sys.modules\nfound = True"
    )
    program = (
        "import sys\nfrom gpt2_flax.imports import leave_out_torch\nleave_out_torch()\n"
        f"sys.path[:] = [{str(tmp_path)!r}]\nimport transformers\nassert transformers.found"
    )
    done = run(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("imported_before", [True, False])
def test_transformers_is_quiet(imported_before):
    before, after = "", "import transformers\n"
    if imported_before:
        before, after = after, before
    done = run(
        f"{before}from gpt2_flax.imports import quiet_transformers\nquiet_transformers()\n{after}"
        "from transformers.utils import logging\nimport huggingface_hub\n"
        "assert logging.get_verbosity() == logging.ERROR\n"
        "assert not logging.is_progress_bar_enabled()\n"
        "assert huggingface_hub.utils.are_progress_bars_disabled()"
    )
    assert done.returncode == 0, done.stderr


def test_what_was_imported_is_no_garbage_afterwards():
    done = run(
        "import gc\nfrom gpt2_flax.imports import no_garbage\n"
        "with no_garbage():\n    assert not gc.isenabled()\n    import email, json\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 1000"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, "--xla_gpu_enable_triton_gemm=false"),
        (" --xla_dump_to=x ", "--xla_dump_to=x --xla_gpu_enable_triton_gemm=false"),
        ("--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
        ("a/file/of/flags", "a/file/of/flags"),  # XLA would take no more than its name
    ],
)
def test_measured_flags_are_added_for_nvidia_gpus_and_give_way(monkeypatch, given, expected):
    if given is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", given)
    found = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in found or None)
    xla_flags.set_defaults()
    assert os.environ.get("XLA_FLAGS") == given  # no such plugin is installed
    found.append(xla_flags.CUDA_PLUGINS[0])
    xla_flags.set_defaults()
    assert os.environ["XLA_FLAGS"] == expected


def test_the_flags_are_known_to_xla():
    """One that it does not know would end the process."""
    flags = " ".join(f"--{name}={value}" for name, value in xla_flags.FOR_CUDA.items())
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code = "import jax; jax.numpy.ones(3).block_until_ready()"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.slow
def test_a_run_goes_on_without_transformers(tmp_path):
    (tmp_path / "text.txt").write_text("a text of words, " * 200)
    argv = (
        f"--train_file {tmp_path}/text.txt --tokenizer bytes --n_layers 1 --n_embd 8 --n_heads 2"
        f" --n_positions 16 --block_size 16 --batch_size 2 --max_steps 2 --sample_tokens 4"
        f" --output_dir {tmp_path}/run --cache_dir {tmp_path}/cache"
    ).split()
    whole = f"import runpy\nmain = runpy.run_path('scripts/train.py')['main']\nmain({argv})"
    done = run(whole)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    before_the_loop = (
        "from gpt2_flax.training import train\nimport sys\n"
        "train.loop = lambda *a: sys.exit(f\"{a[2].step} {'transformers' in sys.modules}\")\n"
    )
    done = run(before_the_loop + whole)
    assert "continuing after step 1\n" in done.stderr
    assert "sys.exit('1 False')" in done.stderr
