"""Comparisons of pytrees as rows that say where, by how much and why two leaves differ.

They run in NumPy on the host, in float64, whatever dtype the leaves have.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MAX_FAILURES = 40
_LEGEND = """
error: |actual - expected| over the leaf's largest |expected|, at the index where it is worst;
  right up to the limit. It is |actual - expected| itself where all of the leaf is expected to be 0.
reference: gradients are compared with autodiff and finite-difference, and bit by bit with a rerun;
  the output, out, is compared in a plain call (primal) and in the forward rule (forward)."""


@dataclasses.dataclass(frozen=True)
class GradientRow:
    """The comparison of one leaf, described by its entry with the largest deviation.

    `absolute` is `|actual - expected|`, `error` the same over the leaf's largest `|expected|`
    (absolute if that is zero), and `element_error` over this entry's own `|expected|`. All are inf
    if there are no numbers to compare, and 0 in a row about dtypes.

    `reference` says what is compared: gradients with those of "autodiff", of "finite-difference",
    or of a second run, "rerun"; and outputs of the plain call, "primal", or of the forward rule,
    "forward", with those of the reference function.
    """

    dtype: str  # of the differentiated arguments, e.g. "float32"
    reference: str
    tolerance: float
    reason: str  # empty if the leaf agrees, else "value", "dtype", "shape", "structure", ...
    case: str = "-"  # what was checked if a report holds several cases, e.g. "reverse Tangent"
    cotangent: str = "-"  # e.g. "random[0]"
    leaf: str = ""  # path of the argument or output leaf, e.g. "params.w_x"
    index: tuple[int, ...] | None = None
    actual: Any = 0.0
    expected: Any = 0.0
    absolute: float = 0.0
    error: float = 0.0
    element_error: float = 0.0

    @property
    def ok(self) -> bool:
        """True if the leaf agrees."""
        return not self.reason


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """All comparisons of a check. It is true if all leaves agree.

    It prints as a verdict, a line for each leaf with its worst comparison, the failures, and what
    their columns mean.
    """

    rows: tuple[GradientRow, ...]

    @property
    def failures(self) -> tuple[GradientRow, ...]:
        """The rows that do not agree."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def passed(self) -> bool:
        """True if there is a comparison and all of them agree."""
        return bool(self.rows) and not self.failures

    def __bool__(self) -> bool:
        return self.passed

    def max_error(self, dtype: str | None = None, reference: str | None = None) -> float:
        """Returns the largest `error` over the rows of a dtype and a reference (None: of all).

        Raises:
          ValueError: there is no such row.
        """
        rows = [row for row in self.rows if dtype in (None, row.dtype)]
        errors = [row.error for row in rows if reference in (None, row.reference)]
        if not errors:
            raise ValueError(f"max_error: no row has dtype={dtype!r} and reference={reference!r}.")
        return max(errors)

    def raise_if_failed(self) -> None:
        """Raises AssertionError with the report as its message, unless the check passed."""
        if not self.passed:
            raise AssertionError(f"\n{self}")

    def __str__(self) -> str:
        failures = self.failures
        verdict = f"passed, all {len(self.rows)} comparisons agree."
        if not self.passed:
            reasons = collections.Counter(row.reason for row in failures)
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
            failed = f"{len(failures)} of {len(self.rows)}"
            verdict = f"FAILED, {failed} comparisons disagree ({counts})."
        leaves: dict[str, GradientRow] = {}  # the worst row of each leaf
        groups: dict[tuple[str, ...], GradientRow] = {}  # and of each kind of failure
        ranked = sorted(self.rows, key=lambda row: -row.error / (row.tolerance or 1e-300))
        for row in sorted(ranked, key=lambda row: row.ok):
            leaves.setdefault(row.leaf, row)
            if not row.ok:
                group = (row.case, row.leaf, row.dtype, row.reference, row.reason)
                groups.setdefault(group, row)
        cells = [["leaf", "verdict", "error", "limit", "dtype", "reference"]]
        for row in leaves.values():
            right = "right" if row.ok else "WRONG"
            cells.append([row.leaf, right, *_numbers(row), row.dtype, row.reference])
        lines = [f"check_gradients: {verdict}", *_advice(failures), "", *align(cells)]
        if failures:
            lines += ["", *_failure_table(list(groups.values())[:_MAX_FAILURES])]
            left = len(failures) - min(len(groups), _MAX_FAILURES)
            lines += [f"... and {left} more rows in .failures"] if left else []
        return "\n".join([*lines, _LEGEND])


def _advice(failures):
    """What to change if an output of fn does not have the reference's form."""
    subjects = {"primal": "fn", "forward": "the forward rule of fn"}
    for row in failures:
        if row.reference in subjects and row.reason in ("structure", "shape", "dtype"):
            place = "" if row.reason == "structure" else f" at {row.leaf}"
            both = f"returns {row.reason} {row.actual}{place}, reference returns {row.expected}"
            cure = "make it return the same pytree, shapes and dtypes as reference"
            return [f"check_gradients: {subjects[row.reference]} {both}: {cure}."]
    return []


def _failure_table(rows):
    """The rows by case and leaf, each under its name."""
    rows = sorted(rows, key=lambda row: (row.case, row.leaf))
    names = ["reason", "dtype", "reference", "index", "actual", "expected", "error", "limit"]
    cells = [[*names, "cotangent"]]
    for row in rows:
        reason = "value" if row.reason in ("finite-difference", "primal") else row.reason
        index = "-" if row.index is None else str(list(row.index))
        both = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.actual, row.expected)]
        values = [shorten(text, 16) for text in both]
        cells.append([reason, row.dtype, row.reference, index, *values, *_numbers(row)])
        cells[-1].append(row.cotangent)
    header, *lines = align(cells)
    table, above = ["  " + header], ""
    for row, line in zip(rows, lines, strict=True):
        name = row.leaf if row.case == "-" else f"{row.leaf} of {row.case}"
        table += [f"  {line}"] if name == above else [f"{name}:", f"  {line}"]
        above = name
    return table


def _numbers(row):
    return [f"{number:.1e}" for number in (row.error, row.tolerance)]


def shorten(text: str, most: int) -> str:
    """The text, cut to that many characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def align(cells: list[list[str]]) -> list[str]:
    """The rows of a table as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def compare(template: GradientRow, prefix: str, actual: Any, expected: Any) -> list[GradientRow]:
    """Rows for two pytrees, leaf by leaf. Leaves that are not floating must be equal."""
    structures = [str(jax.tree.structure(tree)) for tree in (actual, expected)]
    rows = _mismatch(template, prefix, "structure", *structures)
    if rows:
        return rows
    for name, a, b in named_leaves(prefix, actual, expected):
        tolerance = template.tolerance if is_kind(b, jnp.floating) else 0.0
        rows += compare_leaf(dataclasses.replace(template, tolerance=tolerance), name, a, b)
    return rows


def compare_leaf(template, leaf, actual, expected, size=None) -> list[GradientRow]:
    """A row for max |actual - expected| / max |expected|, preceded by one for a wrong dtype."""
    actual, expected = host(actual), host(expected)
    rows = _mismatch(template, leaf, "dtype", str(actual.dtype), str(expected.dtype))
    if actual.shape != expected.shape:
        return rows + _mismatch(template, leaf, "shape", actual.shape, expected.shape)
    if not actual.size:
        return [*rows, dataclasses.replace(template, leaf=leaf, reason="")]
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(actual) & np.isfinite(expected)
    with np.errstate(all="ignore"):
        # argmax then points at the first entry that is inf or NaN, if there is one.
        deviation = np.where(finite, np.abs(actual - expected), np.inf)
    index = unravel(np.argmax(deviation), deviation.shape)
    a, b, absolute = float(actual[index]), float(expected[index]), float(deviation[index])
    size = float(np.max(np.abs(expected))) if size is None else size
    ratios = [absolute / (abs(x) or 1.0) if math.isfinite(x) else math.inf for x in (size, b)]
    reason = "" if ratios[0] <= template.tolerance else template.reason  # NaN must not pass
    row = dataclasses.replace(
        template, leaf=leaf, reason=reason if finite.all() else "non-finite", index=index,
        actual=a, expected=b, absolute=absolute, error=ratios[0], element_error=ratios[1],
    )  # fmt: skip
    return [*rows, row]


def _mismatch(template, leaf, reason, actual, expected):
    """No row, or one for two properties that must be equal and differ."""
    if actual == expected:
        return []
    error = 0.0 if reason == "dtype" else math.inf
    found = {"leaf": leaf, "reason": reason, "actual": actual, "expected": expected}
    errors = dict.fromkeys(("absolute", "error", "element_error"), error)
    return [dataclasses.replace(template, **found, **errors)]


def as_sequence(value: Any) -> tuple[Any, ...]:
    """The values of a sequence; one value, such as a string, by itself."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return tuple(value) if several else (value,)


def unravel(flat: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """The index tuple of a flat position."""
    return tuple(int(i) for i in np.unravel_index(flat, tuple(shape)))


def host(leaf: Any) -> np.ndarray:
    """The leaf as a NumPy array; a typed key as its data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def named_leaves(prefix: str, *trees: Any) -> Iterator[tuple[Any, ...]]:
    """The path and the leaves of pytrees of one structure."""
    paths = jax.tree.leaves_with_path(trees[0])
    names = [prefix + jax.tree_util.keystr(path) for path, _ in paths]
    return zip(names, *map(jax.tree.leaves, trees), strict=True)


def is_kind(leaf: Any, kind: Any) -> bool:
    """Whether the dtype of the leaf, or of a Python float, is of that kind."""
    dtype = getattr(leaf, "dtype", type(leaf) if isinstance(leaf, float | complex) else None)
    return dtype is not None and bool(jnp.issubdtype(dtype, kind))
