"""A row of the table: what a document prints, its error, the error of its correction, a verdict.

Errors are max|a - b| / max|b| in float64 with b from autodiff of the document's own forward
equations. A verdict says which errors a row must have:

    OK          as printed at 1e-12; nothing to correct
    NOTATION    one reading of the print is right, the other is not
    WRONG       as printed at least 1e-3 or nan, corrected at 1e-12
    ILL-FORMED  wrong, and it cannot be evaluated: shapes or parentheses do not conform
    MISSING     referred to or garbled; rebuilt at 1e-12, what leaves it out is wrong
    UNSAFE      right in exact arithmetic, wrong in floating point
    LIMIT       neither: off by more than 1e-12, and vanishing as gates saturate
    TEXT        a claim in prose that a number contradicts
"""

import math
from typing import NamedTuple

import numpy as np

EXACT, WRONG = 1e-12, 1e-3
ILL_FORMED = math.inf


class Row(NamedTuple):
    """One equation: errors as printed and as corrected, None where there is nothing to evaluate."""

    place: str  # the number of the equation, or where it stands
    says: str
    verdict: str
    printed: float | None
    cure: str = ""
    corrected: float | None = None
    limit: float = EXACT  # of what counts as exact

    @property
    def holds(self) -> bool:
        """Whether the errors are those of the verdict."""
        printed, corrected = self.printed, self.corrected
        exact = corrected is not None and corrected <= self.limit
        wrong = printed is not None and (math.isnan(printed) or printed >= WRONG)
        match self.verdict:
            case "OK":
                return printed is not None and printed <= self.limit and corrected is None
            case "LIMIT":
                return printed is not None and self.limit < printed < 0.1 and exact
            case "MISSING":
                return exact and (printed is None or wrong)
            case "ILL-FORMED":
                return exact and printed == ILL_FORMED
            case "WRONG" | "UNSAFE" | "TEXT":
                return exact and wrong and printed != ILL_FORMED
            case "NOTATION":
                return exact and wrong
        raise ValueError(f"Row.holds: verdict must be one of the module's, got {self.verdict}.")


def absolute_error(got, want) -> float:
    """max|got - want|; ValueError where the shapes differ."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise ValueError(f"absolute_error: shapes must be equal, got {got.shape}, {want.shape}.")
    return float(np.abs(got - want).max())


def relative_error(got, want) -> float:
    """max|got - want| / max|want|, or max|got| where the wanted value is 0."""
    return absolute_error(got, want) / (float(np.abs(np.asarray(want)).max()) or 1.0)


def largest_error(got, want) -> float:
    """The largest relative error over two dicts with the same keys; nan where one of them is."""
    if got.keys() != want.keys():
        raise ValueError(f"largest_error: keys must be equal, got {set(got)}, {set(want)}.")
    return float(np.max([relative_error(got[name], want[name]) for name in got]))


def evaluate(expression: str, **values) -> np.ndarray:
    """The value of a formula written as Python source; @ is the matrix product."""
    return eval(expression, {"__builtins__": {}}, values)


def attempt(expression: str, want, **values) -> float:
    """The error of a formula, infinite where it cannot be evaluated to the shape that is wanted."""
    try:
        return relative_error(evaluate(expression, **values), want)
    except (SyntaxError, ValueError, IndexError):
        return ILL_FORMED
