"""Comparisons of pytrees as rows that say where and by how much two things differ, and why.

All of it is done in NumPy on the host, in float64, whatever dtype is judged.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MAX_EXTRA_FAILURES = 40


@dataclasses.dataclass(frozen=True)
class GradientRow:
    """One compared leaf, summed up by the entry that deviates most.

    `error` is `|actual - expected|` over the leaf's largest `|expected|` (absolute where that is
    zero), and `element_error` the same over this entry's own `|expected|`. Both are inf where there
    are no numbers to compare, and 0 where a row is about dtypes alone.
    """

    dtype: str  # of the differentiated arguments, e.g. "float32"
    witness: str  # "autodiff", "finite-difference", "primal", "forward" or "rerun"
    tolerance: float
    reason: str  # empty if ok, else what is wrong: "value", "dtype", "shape", "structure", ...
    case: str = "-"  # what was checked, where a report holds several, e.g. "reverse chunk_size=2"
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
    """All compared leaves of a check; it is true where all agree, and prints as a table."""

    rows: tuple[GradientRow, ...]

    @property
    def failures(self) -> tuple[GradientRow, ...]:
        """The rows that do not agree."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def passed(self) -> bool:
        """True if something was compared and all of it agrees."""
        return bool(self.rows) and not self.failures

    def __bool__(self) -> bool:
        return self.passed

    def max_error(self, dtype: str | None = None, witness: str | None = None) -> float:
        """Largest `error` over the rows of a dtype and witness (None: of all).

        Raises:
          ValueError: there is no such row.
        """
        rows = [row for row in self.rows if dtype in (None, row.dtype)]
        errors = [row.error for row in rows if witness in (None, row.witness)]
        if not errors:
            raise ValueError(f"max_error: no row has dtype={dtype!r} and witness={witness!r}.")
        return max(errors)

    def raise_if_failed(self) -> None:
        """Raises AssertionError, with the table as its message, unless the check passed."""
        if not self.passed:
            raise AssertionError(f"\n{self}")

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[GradientRow]] = {}
        for row in sorted(self.rows, key=lambda row: -row.error / (row.tolerance or 1e-300)):
            groups.setdefault((row.dtype, row.witness, row.leaf, row.reason), []).append(row)
        tails = [group[1:] for group in groups.values() if group[0].reason not in ("", "dtype")]
        others = [row for tail in tails for row in tail]
        shown = [group[0] for group in groups.values()] + others[:_MAX_EXTRA_FAILURES]
        lines = _table(sorted(shown, key=lambda row: (row.ok, row.dtype, row.witness, row.leaf)))
        if len(others) > _MAX_EXTRA_FAILURES:
            lines.append(f"... and {len(others) - _MAX_EXTRA_FAILURES} more rows in .failures")
        reasons = collections.Counter(row.reason for row in self.failures)
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        failed = (
            f"FAILED, {len(self.failures)} of {len(self.rows)} comparisons disagree ({counts})."
        )
        passed = f"passed, all {len(self.rows)} comparisons agree."
        lines.append(f"check_gradients: {passed if self.passed else failed}")
        return "\n".join([*lines, *_advice(self.failures)])


def _advice(failures: Sequence[GradientRow]) -> list[str]:
    """What to change where an output of fn is of another form than the reference's."""
    subjects = {"primal": "fn", "forward": "the forward rule of fn"}
    for row in failures:
        if row.witness in subjects and row.reason in ("structure", "shape", "dtype"):
            place = "" if row.reason == "structure" else f" at {row.leaf}"
            both = f"returns {row.reason} {row.actual}{place}, reference returns {row.expected}"
            subject = subjects[row.witness]
            cure = "make it return the same pytree, shapes and dtypes as reference"
            return [f"check_gradients: {subject} {both}: {cure}."]
    return []


def compare(template: GradientRow, prefix: str, actual: Any, expected: Any) -> list[GradientRow]:
    """Rows for two pytrees, leaf by leaf; leaves that are not floating must be equal."""
    structures = [str(jax.tree.structure(tree)) for tree in (actual, expected)]
    if structures[0] != structures[1]:
        return _mismatch(template, prefix, "structure", *structures)
    rows = []
    for name, a, b in named_leaves(prefix, actual, expected):
        tolerance = template.tolerance if is_kind(b, jnp.floating) else 0.0
        rows += compare_leaf(dataclasses.replace(template, tolerance=tolerance), name, a, b)
    return rows


def compare_leaf(template, leaf, actual, expected, size=None) -> list[GradientRow]:
    """A row for max |actual - expected| / max |expected|, after one for a dtype that is wrong."""
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
    numbers = dict(zip(("absolute", "error", "element_error"), (absolute, *ratios), strict=True))
    wrong = template.reason if finite.all() else "non-finite"
    reason = "" if finite.all() and ratios[0] <= template.tolerance else wrong
    place = {"leaf": leaf, "reason": reason, "index": index, "actual": a, "expected": b}
    return [*rows, dataclasses.replace(template, **place, **numbers)]


def _mismatch(template, leaf, reason, actual, expected) -> list[GradientRow]:
    """No row, or that of two properties which must be equal and are not."""
    error = 0.0 if reason == "dtype" else math.inf
    found = {"leaf": leaf, "reason": reason, "actual": actual, "expected": expected}
    found.update(absolute=error, error=error, element_error=error)
    return [] if actual == expected else [dataclasses.replace(template, **found)]


def rerun_row(template: GradientRow, leaf: str, first: Any, again: Any) -> GradientRow:
    """Row for two runs that must agree in every bit."""
    row = compare_leaf(template, leaf, again, first)[-1]
    reason = "" if host(first).tobytes() == host(again).tobytes() else "rerun"
    return dataclasses.replace(row, witness="rerun", tolerance=0.0, reason=reason)


def unravel(flat: Any, shape: Sequence[int]) -> tuple[int, ...]:
    """The index tuple of a flat position."""
    return tuple(int(i) for i in np.unravel_index(flat, tuple(shape)))


def host(leaf: Any) -> np.ndarray:
    """The leaf as a NumPy array; a typed key as its data."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def non_finite_entries(named: Iterable[tuple[str, Any]]) -> list[str]:
    """The first NaN or infinity of each floating leaf that holds one, e.g. "x[0, 2] = nan"."""
    found = []
    for name, leaf in named:
        values = host(leaf).astype(np.float64) if is_kind(leaf, jnp.floating) else np.zeros(0)
        for index in np.argwhere(~np.isfinite(values))[:1]:
            place = f"{[int(i) for i in index]}" if index.size else ""
            found.append(f"{name}{place} = {values[tuple(index)]}")
    return found


def named_leaves(prefix: str, *trees: Any) -> Iterator[tuple[Any, ...]]:
    """Path and leaves of pytrees of one structure."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(trees[0])[0]]
    names = [prefix + jax.tree_util.keystr(path) for path in paths]
    return zip(names, *map(jax.tree.leaves, trees), strict=True)


def is_kind(leaf: Any, kind: Any) -> bool:
    """Whether the leaf's dtype, or a Python float's, is of that kind."""
    dtype = getattr(leaf, "dtype", type(leaf) if isinstance(leaf, float | complex) else None)
    return dtype is not None and bool(jnp.issubdtype(dtype, kind))


def _table(rows: Sequence[GradientRow]) -> list[str]:
    head = ["reason", "dtype", "witness", "case", "cotangent", "leaf", "index"]
    cells = [[*head, "actual", "expected", "absolute", "error", "element", "limit"]]
    for row in rows:
        index = "-" if row.index is None else str(list(row.index))
        numbers = (row.actual, row.expected, row.absolute, row.error, row.element_error)
        texts = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in (*numbers, row.tolerance)]
        names = [
            row.reason or "ok",
            row.dtype,
            row.witness,
            row.case,
            row.cotangent,
            row.leaf,
            index,
        ]
        cells.append([*names, *texts])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
