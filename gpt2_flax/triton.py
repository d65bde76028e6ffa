"""Pallas's way to Triton, imported only where a kernel is run."""


def by_triton(num_warps: int, num_stages: int | None = None):
    """What pallas_call takes as compiler_params: left out, jax 0.10 would not compile by Triton.

    num_warps: of a program. num_stages: steps of a loop whose loads are under way at a time.
    """
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
