"""Flags of XLA's that were measured to help. They are read once, before JAX starts a backend."""

import importlib.util
import os

# JAX's plugins for NVIDIA GPUs, of which one is installed where such a GPU is used.
CUDA_PLUGINS = "jax_cuda13_plugin", "jax_cuda12_plugin"
# Products by cuBLAS, and not by XLA's own Triton kernels: docs/benchmarks.md.
FOR_CUDA = {"xla_gpu_enable_triton_gemm": "false"}


def set_defaults() -> None:
    """Add to the environment's XLA_FLAGS what it does not mention. The log shows all of them."""
    if not any(importlib.util.find_spec(name) for name in CUDA_PLUGINS):
        return
    given = os.environ.get("XLA_FLAGS", "").strip()
    if given and not given.startswith("-"):  # the name of a file of flags
        return
    added = [f"--{name}={value}" for name, value in FOR_CUDA.items() if name not in given]
    if added:
        os.environ["XLA_FLAGS"] = " ".join([*given.split(), *added])
