"""The rows of the table: a printed equation, its error, its correction's error, and a verdict.

Errors are max|a - b| / max|b| in float64, where b is autodiff of the document's own forward
equations. A verdict defines the errors that a row must have. Unless it says otherwise, the printed
equation has an error of at least 1e-3 or NaN, and the corrected one an error of at most 1e-12.

    OK          the printed equation has an error of at most 1e-12 and needs no correction
    NOTATION    one reading of the printed equation is right, another one is wrong
    WRONG       the printed equation is wrong
    ILL-FORMED  the printed equation cannot be evaluated: its shapes or parentheses do not fit
    MISSING     the equation is referred to, but absent or garbled, and is reconstructed here
    UNSAFE      the printed equation is right in exact arithmetic, but wrong in floating point
    LIMIT       the error of the printed equation is between 1e-12 and 0.1, and vanishes as the
                gates saturate
    TEXT        a number contradicts a claim in prose
"""

import math
from typing import NamedTuple

import numpy as np

EXACT, WRONG = 1e-12, 1e-3
ILL_FORMED = math.inf


class Row(NamedTuple):
    """One equation with the errors of its printed and corrected form; None if there is no form."""

    place: str  # the number of the equation, or its place in the document
    says: str
    verdict: str
    printed: float | None
    cure: str = ""
    corrected: float | None = None
    limit: float = EXACT  # the largest error that counts as exact

    @property
    def holds(self) -> bool:
        """Whether the errors are as the verdict requires."""
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
    """max|got - want|.

    Raises:
      ValueError: the shapes differ.
    """
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise ValueError(f"absolute_error: shapes must be equal, got {got.shape}, {want.shape}.")
    return float(np.abs(got - want).max())


def relative_error(got, want) -> float:
    """max|got - want| / max|want|, or max|got| if want is 0."""
    return absolute_error(got, want) / (float(np.abs(np.asarray(want)).max()) or 1.0)


def largest_error(got, want) -> float:
    """The largest relative error over two dicts with the same keys; NaN if one of them is NaN."""
    if got.keys() != want.keys():
        raise ValueError(f"largest_error: keys must be equal, got {set(got)}, {set(want)}.")
    return float(np.max([relative_error(got[name], want[name]) for name in got]))


def evaluate(expression: str, **values) -> np.ndarray:
    """The value of a formula in Python syntax, where @ is the matrix product."""
    return eval(expression, {"__builtins__": {}}, values)


def attempt(expression: str, want, **values) -> float:
    """The error of a formula; infinite if it cannot be evaluated or has another shape."""
    try:
        return relative_error(evaluate(expression, **values), want)
    except (SyntaxError, ValueError, IndexError):
        return ILL_FORMED
