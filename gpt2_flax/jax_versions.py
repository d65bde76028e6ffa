"""Code that depends on the version of JAX. JAX 0.10 to 0.12 are supported.

JAX 0.10 is the newest version for Python 3.11. pyproject.toml excludes 0.13, which is not tested.
"""


def by_triton(num_warps: int, num_stages: int | None = None):
    """pallas_call's compiler_params for Triton. Without them jax 0.10 would compile by Mosaic.

    jax 0.12 raises a DeprecationWarning when a kernel is lowered with these: "The Pallas Triton
    backend is deprecated and will be removed". Mosaic needs a Hopper GPU and other kernels.
    Python hides that warning from users. Where it is an error, or where the backend is gone,
    `kernels.what_fails` sees it, and `auto` computes by XLA and says why.

    Args:
        num_warps: warps of a program.
        num_stages: steps of a loop whose loads are under way at a time.
    """
    from jax.experimental.pallas import triton  # only where a kernel is run

    return triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
