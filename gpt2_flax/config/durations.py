"""Lengths as people say them: 500 steps, 3 epochs, 1B tokens, 2 hours.

A setting holds a number, which counts steps, or the words in their one spelling: "3 epochs",
"1000000000 tokens", "90 minutes".
"""

import math
import re
import time
from dataclasses import dataclass, field

# A factor, or the beginning of a unit: 2M tokens, 2 Minutes.
PATTERN = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*([kKMB]?)(?!inutes?$)\s*([A-Za-z]*)")
FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
UNITS = ("steps", "epochs", "tokens", *SECONDS)


def parse(value, units: tuple[str, ...], whole: bool) -> int | float | str:
    """A setting's value: a number of steps, or an amount with its unit in one spelling.

    units: those allowed, "time" for all of SECONDS. whole: steps may have no fraction.
    Raises ValueError that says what was expected.
    """
    match = PATTERN.fullmatch(str(value).strip())
    if isinstance(value, bool) or not match:
        raise ValueError(f"expected {describe(units, whole)}")
    digits, exponent, factor, word = match.groups()
    amount = float(digits + (exponent or "")) * FACTORS[factor]
    unit = word.lower().removesuffix("s") + "s" if word else "steps"
    if unit not in UNITS or not math.isfinite(amount):
        raise ValueError(f"expected {describe(units, whole)}")
    if unit not in units and not (unit in SECONDS and "time" in units):
        raise ValueError(f"cannot be counted in {unit}: expected {describe(units, whole)}")
    is_share = not word and not whole
    if unit in ("steps", "tokens") and not amount.is_integer() and not is_share:
        raise ValueError(f"expected a whole number of {unit}")
    if unit == "steps":
        return int(amount) if whole else amount
    return f"{int(amount) if amount.is_integer() else amount} {unit}"


def describe(units: tuple[str, ...], whole: bool) -> str:
    examples = {"epochs": "3 epochs", "tokens": "1B tokens", "time": "2 hours"}
    number = "a whole number of steps" if whole else "a number of steps, a share below 1"
    return ", ".join([number, *(f"'{examples[unit]}'" for unit in units if unit in examples)])


def split(value) -> tuple[float, str]:
    """(amount, unit) of a setting's value; time is in seconds."""
    if not isinstance(value, str):
        return value, "steps"
    amount, unit = value.split()
    if unit in SECONDS:
        return float(amount) * SECONDS[unit], "seconds"
    return float(amount), unit


def in_steps(value, global_batch: int, block_size: int, rows_an_epoch: int | None) -> float:
    """A setting's value as steps, rounded up; a bare number is handed back as it is.

    global_batch: rows a step. rows_an_epoch: None where no setting counts epochs.
    """
    amount, unit = split(value)
    if unit == "epochs":
        assert rows_an_epoch is not None
        return math.ceil(round(amount * rows_an_epoch) / global_batch)
    if unit == "tokens":
        return math.ceil(amount / (global_batch * block_size))
    assert unit == "steps", unit
    return amount


@dataclass
class Interval:
    """Says when what happens every so many steps, or seconds, is due. 0 steps: never.

    Seconds are counted from the last call of `done`, or from the beginning.
    """

    steps: int = 0
    seconds: float | None = None
    last: float = field(default_factory=time.monotonic)

    def is_due(self, step: int) -> bool:
        """Whether it is due after a step."""
        if self.seconds is None:
            return bool(self.steps) and step % self.steps == 0
        return time.monotonic() - self.last >= self.seconds

    def done(self) -> None:
        self.last = time.monotonic()
