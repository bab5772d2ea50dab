"""What the benchmark of the fused kernels compares: points, contenders, and when one is right."""

import functools
import importlib.util
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.layers import our_layer
from experiments.benchmarks.libraries import PEERS, SEQUENCES, TORCH, TRAINING, Library, ours
from experiments.benchmarks.problems import (
    Problem,
    Program,
    Reset,
    Result,
    Size,
    Task,
    as_result,
    cast,
    compile_program,
    differences,
    draw_problem,
    value_scale,
)

FUSED, FUSED_GATES = "fused", "fused gates"
SCAN, UNROLLED, STATES = "scan", "scan unrolled", "scan states"
Rows = list[dict[str, Any]]

# Of the largest entry of each leaf, from the scan in float32 with full products on the same arrays.
# A GPU rounds the operands of float32 products to TF32 unless told: emulated on a CPU, that made
# 6e-4 at T=512; bfloat16 made 4e-3 with float32 states.
TOLERANCES = {"float32": 3e-3, "bfloat16": 3e-2}
# Another library may keep its states, and sum its weight gradients, in bfloat16; torch on a CPU
# does, and is 7e-2 away.
OTHERS = 10


class Point(NamedTuple):
    """What is measured at once: every contender that has that task and equation."""

    task: Task
    reset: Reset
    dtype: str
    size: Size

    def __str__(self):
        """training, reset after, bfloat16, T=512 B=64 D=256 H=256, say."""
        return f"{self.task}, reset {self.reset}, {self.dtype}, {self.size}"

    def fields(self) -> dict[str, Any]:
        """As part of a row."""
        return {
            "task": self.task,
            "reset": self.reset,
            "dtype": self.dtype,
            **self.size._asdict(),
        }


def point_of(row: dict[str, Any]) -> Point:
    """The point that a row is of."""
    size = Size(*(row[field] for field in Size._fields))
    return Point(row["task"], row["reset"], row["dtype"], size)


class Grid(NamedTuple):
    """The counts and choices whose products are the points, each in the order of measuring."""

    steps: Sequence[int]
    resets: Sequence[Reset]
    tasks: Sequence[Task]
    dtypes: Sequence[str]
    batch: Sequence[int]
    hidden: Sequence[int]

    def points(self) -> list[Point]:
        """The rightmost changes first, so that a run that is cut short has whole tables."""
        found = [
            Point(task, reset, dtype, Size(num_steps, batch_size, hidden_size, hidden_size))
            for num_steps, reset, task, dtype, batch_size, hidden_size in itertools.product(*self)
        ]
        return list(dict.fromkeys(found))


FULL = Grid(
    steps=(512, 1024),
    resets=("after", "before"),
    tasks=("training", "forward"),
    dtypes=("bfloat16", "float32"),
    batch=(64, 1, 128, 16),
    hidden=(256, 64, 512, 128),
)
SMOKE = FULL._replace(steps=(3,), batch=(2,), hidden=(4, 8))


def contenders(backend: str) -> dict[str, Library]:
    """By name, the kernels last: what one of them breaks, the others have been tried before.

    What is kept for the backward makes no difference forward.
    """
    return {
        SCAN: ours(SEQUENCES),
        UNROLLED: ours(SEQUENCES, unroll=8),
        STATES: ours(TRAINING, residuals="states"),
        TORCH: PEERS[TORCH],
        FUSED: ours(SEQUENCES, backend=backend, residuals="states"),
        FUSED_GATES: ours(TRAINING, backend=backend, residuals="gates"),
    }


def why_no_torch() -> str | None:
    """What keeps torch from taking part, in words; None where nothing does."""
    if importlib.util.find_spec("torch") is None:
        return 'not here: torch is not installed; pip install -e ".[peers]"'
    torch = importlib.import_module("torch")
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return f"not here: torch {torch.__version__} sees no GPU while JAX runs on one"
    return None


class Exact(NamedTuple):
    """A problem in its dtype, as NumPy's arrays, and its results in float32 with full products."""

    problem: Problem
    leaves: Result
    scale: float  # of the value

    def expected(self, task: Task) -> Result:
        """The leaves that a program of that task gives."""
        forward = ("h_last", "hs")
        return {k: v for k, v in self.leaves.items() if (k in forward) == (task == "forward")}


@functools.lru_cache(maxsize=32)  # of both dtypes and all usual B and H: the tasks share them
def exact_results(reset: Reset, dtype: str, size: Size, seed: int) -> Exact:
    """Draws a problem and computes states, value and gradients by the scan."""
    layer = our_layer(reset)

    def value(params, xs, h0, dh_last, dhs):
        h_last, hs = layer.run(params, xs, h0)
        return jnp.sum(h_last * dh_last) + jnp.sum(hs * dhs), (h_last, hs)

    def read(result) -> Result:
        (total, (h_last, hs)), (dparams, dxs, dh0) = result
        leaves = layer.unpack(dparams)
        return as_result(value=total, **leaves, xs=dxs, h0=dh0, h_last=h_last, hs=hs)

    problem = cast(jax.jit(draw_problem, static_argnums=(0, 1))(size, reset, seed), dtype)
    wide = cast(problem, jnp.float32)
    function = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)
    with jax.default_matmul_precision("highest"):
        program = compile_program(function, tuple(wide), read)
        leaves = program.read(program.call())
    leaves = {name: leaf.astype(np.float32) for name, leaf in leaves.items()}  # as they came
    return Exact(jax.tree.map(np.asarray, problem), leaves, value_scale(wide))


class Trial(NamedTuple):
    """A contender's program and its difference from the exact results, or why there is none."""

    program: Program | None
    difference: float | None
    reason: str | None


def attempt(name: str, library: Library, point: Point, problem: Problem, exact: Exact) -> Trial:
    """Compiles, runs once and compares; whatever goes wrong is a reason, for the others go on."""
    try:
        build = library.make(point.reset, point.size, jnp.dtype(point.dtype))
        program = build(point.task, problem, 1)
        result = program.read(program.call())
    except Exception as error:
        return Trial(None, None, reason_of(error))
    found = differences(exact.expected(point.task), result, {"value": exact.scale})
    tolerance = TOLERANCES[point.dtype] * (OTHERS if name == TORCH else 1)
    difference, reason = check(found, tolerance, "the scan's in float32 with full products")
    return Trial(program if reason is None else None, difference, reason)


def check(found: dict[str, float], tolerance: float, other: str) -> tuple[float, str | None]:
    """The greatest relative difference, and what is wrong about it; NaN is as far as can be."""
    worst = {leaf: math.inf if math.isnan(far) else far for leaf, far in found.items()}
    leaf = max(worst, key=lambda leaf: worst[leaf])
    if worst[leaf] <= tolerance:
        return worst[leaf], None
    return worst[leaf], (
        f"wrong: {leaf} differs from {other} by {worst[leaf]:.1e} of its size; at most "
        f"{tolerance:.0e} is rounding"
    )


def reason_of(error: Exception) -> str:
    """Refused where gru itself says that it cannot; everything else has failed."""
    text = str(error).strip().partition("\n")[0][:400]
    if isinstance(error, ValueError | NotImplementedError) and text.startswith("gru: "):
        return f"refused: {text}"
    return f"failed: {type(error).__name__}: {text}"


def make_rows(
    point: Point,
    trials: dict[str, Trial],
    times: dict[str, dict[str, Any]],
) -> Rows:
    """A row for each contender; what was not timed has the reason in place of times."""
    empty = {"median_ms": None, "min_ms": None, "quartiles_ms": None, "samples": 0}
    return [
        {
            **point.fields(),
            "contender": name,
            **times.get(name, empty),
            "difference": trial.difference,
            "compile_seconds": trial.program and trial.program.compile_seconds,
            "temporaries_bytes": trial.program and trial.program.temporaries_bytes,
            "note": trial.program.note if trial.program else "",
            "reason": trial.reason,
        }
        for name, trial in trials.items()
    ]


def timed(rows: Iterable[dict[str, Any]], names: Iterable[str]) -> dict[str, Any] | None:
    """The quickest of these contenders' rows, or None where none of them was timed."""
    names = tuple(names)
    found = [row for row in rows if row["contender"] in names and row["median_ms"] is not None]
    return min(found, key=lambda row: row["median_ms"], default=None)
