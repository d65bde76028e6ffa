"""What the TPU compiler makes of a step: no TPU is needed, but libtpu, which nobody installs here.

On a CPU bfloat16 products are float32 ones: what a program keeps can only be seen here.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from gpt2_flax.errors import run_main
from scripts.train import main

ROOT = pathlib.Path(__file__).resolve().parents[2]
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
V, B, T, D = 5003, 4, 64, 256

# In a process of its own: of a process that once had a TPU's compiler others may not be tested.
PROGRAM = """
import functools, json, sys
import jax, jax.numpy as jnp
from gpt2_flax.distributed import devices, parallel
from gpt2_flax.training import setup, step
from gpt2_flax.config.train_config import TrainConfig
import transformers

settings = json.loads(sys.argv[1])
V, B, T, D = settings.pop("sizes")
devices.imagine("v5e:2x4")
config = TrainConfig(n_layers=2, n_heads=2, n_embd=D, block_size=T, batch_size=B, dropout=0.0,
                     **settings)
model = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=D, vocab_size=V, n_positions=T,
                                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
module = setup.make_module(config, model)
optimizer, update = setup.trial(config, module)
state = parallel.shapes_on_devices(step.state_shapes(module, optimizer), config.parallel)
batch = parallel.batch_shapes(setup.blank_batch(8 * B * config.grad_accum, T), config.grad_accum,
                              config.parallel)
compiled = update.lower(state, batch).compile()
there = sum(leaf.dtype.itemsize * jnp.prod(jnp.array(leaf.sharding.shard_shape(leaf.shape)))
            for leaf in jax.tree.leaves(state))
aliased = compiled.memory_analysis().alias_size_in_bytes
print(json.dumps({"text": compiled.as_text(), "state": int(there), "aliased": aliased}))
"""


@pytest.fixture(scope="module")
def compiled():
    """(program's text outside of fusions, bytes of the state, of which are donated)."""
    if not HAS_COMPILER:
        pytest.skip("libtpu is not installed")

    def compiled(**settings):
        command = [sys.executable, "-c", PROGRAM, json.dumps(settings | {"sizes": [V, B, T, D]})]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        outside, keeps = [], True
        for line in found["text"].splitlines():
            if line.endswith("{") and "->" in line:
                keeps = "fused" not in line.split("(")[0]
            if keeps:
                outside.append(line)
        return outside, found["state"], found["aliased"]

    return compiled


def results(lines, operation=r"[\w-]+"):
    """The types of what is computed, with shapes: bf16[4,128]."""
    pattern = re.compile(rf"\s*(?:ROOT )?%?[\w.-]+ = (.*?) {operation}\(")
    for line in lines:
        if match := pattern.match(line):
            yield from re.findall(r"\w+\[[\d,]*\]", match[1])


@pytest.mark.parametrize("engine", ["pmap", "jit"])
def test_one_sum_of_gradients_a_type_and_no_float32_logits(compiled, engine):
    lines, state, aliased = compiled(dtype="bfloat16", parallel=engine)
    W = -(-V // 128) * 128
    found = [one for one in results(lines) if {str(W), str(T)} <= {*re.findall(r"\d+", one)}]
    assert found
    assert {one.split("[")[0] for one in found} == {"bf16"}
    sums = [line for line in lines if re.search(r" all-reduce(-start)?\(", line)]
    types = [{one.split("[")[0] for one in results([line])} for line in sums]
    assert 0 < len(types) == len({frozenset(kinds) for kinds in types}), types
    assert aliased >= state


def test_shards_are_gathered_and_summed_into_shards(compiled):
    lines, state, aliased = compiled(dtype="bfloat16", parallel="fsdp", remat="block")
    assert aliased >= state
    whole = {f"{D * 3},{D}", f"{D * 4},{D}", f"{D},{D * 4}"}  # of a layer
    summed = {one.split("[")[1].rstrip("]") for one in results(lines, r"all-reduce(?:-start)?")}
    assert not whole & summed
    text = "\n".join(lines)
    assert "all-gather" in text
    assert "reduce-scatter" in text or "all-to-all" in text


def test_a_dry_run_for_devices_that_are_not_there(capsys):
    flags = (
        "--n_layers=1 --n_heads=2 --n_embd=64 --tokenizer=bytes --dtype=bfloat16 --dry_run"
        " --topology=v5e:2x2 --parallel=fsdp"
    )
    if not HAS_COMPILER:
        assert run_main(main, flags.split()) == 2
        assert "pip install libtpu" in capsys.readouterr().err
        return
    command = [sys.executable, "scripts/train.py", *flags.split()]
    bare = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=bare)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    v4 = [*command[:-2], "--topology=v4:2x2x2", "--show_sharding"]
    done_v4 = subprocess.run(v4, cwd=ROOT, capture_output=True, text=True, env=bare)
    assert "on each of 8 devices" in done_v4.stdout, done_v4.stderr
    assert "(devices 4 x rows 8 x accumulated 1), --parallel fsdp" in done.stdout
    assert "4 x TPU v5 lite" in done.stdout
    command[-1] = "--batch_size=100000"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "out of memory: 100000 rows of 128 tokens at a time on a TPU v5 lite" in done.stderr


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--topology v5e:2x4", "topology has no effect with dry_run false"),
        ("--dry_run --topology v5e:2x4 --batch_size auto", "batch_size auto needs to know"),
    ],
)
def test_what_a_topology_is_for(capsys, flags, match):
    assert run_main(main, flags.split()) == 2
    assert match in capsys.readouterr().err
