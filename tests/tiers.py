"""Parameters of tests in the two tiers: some run always, the rest with --all."""

import itertools

import pytest


def combinations(*axes: list, every: int) -> list:
    """All combinations of the axes' values, for `pytest.mark.parametrize` with several names.

    Every n-th combination is in the fast tier. `every` should share no factor with the lengths
    of the axes, so that each value of each axis is tried there.
    """
    products = enumerate(itertools.product(*axes))
    return [
        pytest.param(*values, marks=[pytest.mark.slow] if number % every else [])
        for number, values in products
    ]
