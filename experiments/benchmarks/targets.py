"""The targets of jaxgru's speed and memory, and whether rows of measurements reach them.

A ratio is the time of another contender over jaxgru's, so jaxgru is faster above 1. A target counts
as measured if the rows contain every size, equation and contender that it needs.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.libraries import (
    CUT,
    GATES,
    JAX_PEERS,
    LINEN,
    OURS,
    PEERS,
    STATES,
    TORCH,
    can_run,
)
from experiments.benchmarks.problems import (
    DIVISORS,
    GENERATION_SIZE,
    PADDED_SIZE,
    RESETS,
    SIZES,
    STEP_SIZE,
    Reset,
    Size,
    Task,
)

LIMIT = "matmul limit"
LONG = Size(2048, 8, 32, 64)
SHARES = ((Size(128, 32, 128, 256), 0.6), (Size(96, 64, 512, 512), 0.8))
Rows = list[dict[str, Any]]


class Target(NamedTuple):
    """A claim with its figure and bound; `reached` is None if it was not measured."""

    claim: str
    figure: float | None
    wanted: str
    reached: bool | None
    place: str = ""  # where a worst case was measured

    def __str__(self):
        """The target in one line."""
        state = {True: "reached", False: "MISSED", None: "not measured"}[self.reached]
        figure = "" if self.figure is None else f": {self.figure:.2f} (wanted {self.wanted})"
        return f"{state:13}{self.claim}{figure}{self.place and f'; {self.place}'}"


class NotMeasured(Exception):
    """Raised if a row that a target needs is missing."""


def size_of(row: dict[str, Any]) -> Size:
    """The size of a row."""
    return Size(*(row[field] for field in Size._fields))


def find(rows: Rows, task: Task, reset: Reset, size: Size, contender: str, field: str) -> float:
    """A field of a contender's row.

    Raises:
      NotMeasured: there is no such row, or the field is None.
    """
    for row in rows:
        where = (row["task"], row["reset"], size_of(row), row["contender"])
        if where == (task, reset, size, contender) and row[field] is not None:
            return row[field]
    raise NotMeasured(f"{contender}: {task}, {reset}, {size}")


def best(
    rows: Rows, task: Task, reset: Reset, size: Size, names: Iterable[str], field: str
) -> float:
    """The smallest value of a field among the contenders that support the task and equation."""
    able = [name for name in names if can_run(PEERS[name], task, reset)]
    return min(find(rows, task, reset, size, name, field) for name in able)


def ratios(
    rows: Rows,
    task: Task,
    names: Iterable[str],
    sizes: Iterable[Size] = SIZES,
    resets: Iterable[Reset] = RESETS,
) -> list[float]:
    """Time of the best of these peers over jaxgru's, for every size and equation."""
    return [
        best(rows, task, reset, size, names, "median_ms")
        / find(rows, task, reset, size, OURS, "median_ms")
        for reset in resets
        for size in sizes
    ]


def geometric_mean(values: Iterable[float]) -> float:
    """exp of the mean of the logarithms."""
    return float(np.exp(np.mean(np.log(list(values)))))


def _worst(rows: Rows, task: Task, sizes: Iterable[Size] = SIZES) -> float:
    """The smallest ratio of the best peer's time to jaxgru's."""
    return min(ratios(rows, task, PEERS, sizes))


def _mean(
    rows: Rows, task: Task, names: Iterable[str] = PEERS, resets: Iterable[Reset] = RESETS
) -> float:
    """The geometric mean of the ratios of the best peer's time to jaxgru's."""
    return geometric_mean(ratios(rows, task, names, resets=resets))


def _share_of_limit(rows: Rows, reset: Reset, size: Size) -> float:
    """The time of the matmul limit over jaxgru's."""
    limit = find(rows, "training", reset, size, LIMIT, "median_ms")
    return limit / find(rows, "training", reset, size, OURS, "median_ms")


def _share_of_temporaries(rows: Rows, reset: Reset, name: str) -> float:
    """jaxgru's temporaries over the smallest of a JAX peer, for a long sequence."""
    theirs = best(rows, "training", reset, LONG, JAX_PEERS, "temporaries_bytes")
    return find(rows, "training", reset, LONG, name, "temporaries_bytes") / theirs


def _compilation(rows: Rows) -> float:
    """The geometric mean of Flax linen's compilation time over jaxgru's, for training steps."""

    def seconds(size, name):
        return find(rows, "training", "after", size, name, "compile_seconds")

    return geometric_mean(seconds(size, LINEN) / seconds(size, OURS) for size in SIZES)


def _cost_of_padding(rows: Rows) -> float:
    """jaxgru's time over that of the batch cut to its longest sequence, for the worse equation."""

    def time(reset, name):
        return find(rows, "padded-short", reset, PADDED_SIZE, name, "median_ms")

    return max(time(reset, OURS) / time(reset, CUT) for reset in RESETS)


class Goal(NamedTuple):
    """A claim, how to measure it from rows, and its bound."""

    claim: str
    measure: Callable[[Rows], float]
    relation: str  # a key of RELATIONS
    bound: float


RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "above": operator.gt,
    "at least": operator.ge,
    "at most": operator.le,
}


def _goals_of(reset: Reset) -> list[Goal]:
    """The goals on the matmul limit and on the peers' temporaries, for one equation."""
    shares = [
        Goal(
            f"training: share of the matmul limit, H={size.hidden_size}, reset {reset}",
            functools.partial(_share_of_limit, reset=reset, size=size),
            "at least",
            share,
        )
        for size, share in SHARES
    ]
    temporaries = [
        Goal(
            f"training: temporaries of {name} / least of a JAX peer, T={LONG.num_steps}, "
            f"reset {reset}",
            functools.partial(_share_of_temporaries, reset=reset, name=name),
            "at most",
            share,
        )
        for name, share in ((GATES, 0.5), (STATES, 0.25))
    ]
    return [*shares, *temporaries]


GOALS = (
    Goal(
        "training: best peer / jaxgru, on the worst size",
        functools.partial(_worst, task="training"),
        "above",
        1.0,
    ),
    Goal(
        "training: best JAX peer / jaxgru, geometric mean",
        functools.partial(_mean, task="training", names=JAX_PEERS),
        "at least",
        1.5,
    ),
    Goal(
        "training: torch / jaxgru, geometric mean",
        functools.partial(_mean, task="training", names=(TORCH,), resets=("after",)),
        "at least",
        2.0,
    ),
    *(goal for reset in RESETS for goal in _goals_of(reset)),
    Goal(
        "forward: best peer / jaxgru, on the worst size",
        functools.partial(_worst, task="forward"),
        "at least",
        1.0,
    ),
    Goal(
        "forward: best peer / jaxgru, geometric mean",
        functools.partial(_mean, task="forward"),
        "at least",
        1.3,
    ),
    *(
        Goal(
            f"{task}: best peer / jaxgru, worse equation",
            functools.partial(_worst, task=task, sizes=(PADDED_SIZE,)),
            "above",
            1.0,
        )
        for task in DIVISORS
    ),
    Goal(
        "padded-short: jaxgru / jaxgru on the batch cut to its longest sequence, worse equation",
        _cost_of_padding,
        "at most",
        1.2,
    ),
    Goal(
        "generation: best loop of any peer / jaxgru, worse equation",
        functools.partial(_worst, task="generation", sizes=(GENERATION_SIZE,)),
        "above",
        1.0,
    ),
    Goal(
        "one step: best peer / jaxgru, worse equation",
        functools.partial(_worst, task="step", sizes=(STEP_SIZE,)),
        "above",
        1.0,
    ),
    Goal(
        "compilation of a training step: Flax linen / jaxgru, geometric mean",
        _compilation,
        "at least",
        1.0,
    ),
)


def judge(rows: Rows) -> list[Target]:
    """The target of every goal, for these rows."""
    return [_judge(goal, rows) for goal in GOALS]


def _judge(goal: Goal, rows: Rows) -> Target:
    """The target of one goal; it is not measured if a row is missing."""
    wanted = f"{goal.relation} {goal.bound:g}"
    try:
        figure = float(goal.measure(rows))
    except NotMeasured:
        return Target(goal.claim, None, wanted, None)
    return Target(goal.claim, figure, wanted, RELATIONS[goal.relation](figure, goal.bound))
