"""What the benchmarks compute: sizes, weights, data, the training step and compiled programs.

A training step computes <h_last, dh_last> + <hs, dhs> for fixed random dh_last and dhs, and its
gradients with respect to weights, xs and h0. All arrays are drawn in float32. Where sequences have
different lengths, dhs is zero after the end of each, so that outputs on padding do not matter.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgru import GRUParams, GRUSpec, init_gru
from jaxgru.models import TokenParams, init_token_model

Array = jax.Array
Reset = Literal["before", "after"]
Task = Literal["training", "padded", "padded-short", "forward", "step", "generation"]
RESETS: tuple[Reset, ...] = ("before", "after")
DIVISORS: dict[Task, int] = {
    "padded": 1,
    "padded-short": 5,
}  # no sequence is longer than T // divisor
TASKS: tuple[Task, ...] = ("training", *DIVISORS, "forward", "step", "generation")

# Relative to the largest entry of each leaf. float32 rounds at 6e-8, but the contenders sum the
# T * B rows of a weight gradient in different orders, and the recurrence propagates every rounding
# of h_t: on a CPU the differences are 2e-6 at T = 2048, and larger for longer T. A formula that is
# wrong in one step of 2048 would give 5e-4.
TOLERANCE = 1e-4

Result = dict[str, np.ndarray]  # name of a leaf -> array, in the layout of GRUParams, time first


class Size(NamedTuple):
    """Time steps T, batch size B, input size D and hidden size H."""

    num_steps: int
    batch_size: int
    input_size: int
    hidden_size: int

    def __str__(self):
        """For example T=64 B=32 D=64 H=64."""
        return "T={} B={} D={} H={}".format(*self)


SIZES = (
    Size(64, 32, 64, 64),
    Size(128, 32, 128, 256),
    Size(96, 64, 512, 512),
    Size(2048, 8, 32, 64),
    Size(256, 1, 64, 128),
    Size(25, 16, 1, 32),
    Size(784, 128, 1, 128),
)
SMOKE_SIZES = (Size(12, 3, 4, 5),)
PADDED_SIZE = Size(512, 32, 128, 128)
STEP_SIZE = Size(1, 1, 64, 128)
GENERATION_SIZE = Size(1000, 1, 64, 256)  # characters, batch, embedding, hidden
VOCABULARY = 65


class Problem(NamedTuple):
    """Weights, data and cotangents of one layer over one sequence."""

    params: GRUParams
    xs: Array  # [T, B, D]
    h0: Array  # [B, H]
    dh_last: Array  # [B, H]
    dhs: Array  # [T, B, H]
    lengths: np.ndarray | None = None  # [B], if sequences have different lengths


class CharModel(NamedTuple):
    """A character model of one layer, its first character, and how many to generate."""

    params: TokenParams
    first: int
    num_tokens: int


class Program(NamedTuple):
    """A program to time.

    `call` returns a result that is ready. `read` converts that into arrays for comparison and is
    not timed. One call does `repeats` units of work. `note` names the variant, if there are any.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Result]
    compile_seconds: float | None = None
    temporaries_bytes: int | None = None
    repeats: int = 1
    note: str = ""


def draw_problem(size: Size, reset: Reset, seed: int) -> Problem:
    """Random weights and data; with reset after, the candidate block of b_h is zero.

    A cell without that bias (Flax nnx) then computes the same function as all others.
    """
    num_steps, batch_size, input_size, hidden_size = size
    keys = jax.random.split(jax.random.key(seed), 5)
    spec = GRUSpec(reset=reset)
    params = init_gru(keys[0], input_size, hidden_size, spec=spec, scheme="pytorch")
    if reset == "after":
        params = _without_candidate_bias(params)
    h0 = jax.random.uniform(keys[2], (batch_size, hidden_size), minval=-1.0, maxval=1.0)
    return Problem(
        params,
        jax.random.normal(keys[1], (num_steps, batch_size, input_size)),
        h0,
        jax.random.normal(keys[3], h0.shape),
        jax.random.normal(keys[4], (num_steps, *h0.shape)),
    )


def draw_padded(task: Task, size: Size, reset: Reset, seed: int) -> Problem:
    """A problem of sequences whose lengths are drawn uniformly from 1 to T // divisor."""
    problem = draw_problem(size, reset, seed)
    longest = max(size.num_steps // DIVISORS[task], 1)
    lengths = np.random.default_rng(seed).integers(1, longest, size.batch_size, endpoint=True)
    ended = np.arange(size.num_steps)[:, None] >= lengths[None]
    dhs = jnp.where(ended[:, :, None], 0, problem.dhs)
    return problem._replace(dhs=dhs, lengths=lengths.astype(np.int32))


def draw_model(size: Size, reset: Reset, seed: int) -> CharModel:
    """A random character model; the seed determines the characters that it generates."""
    num_tokens, _, embedding_size, hidden_size = size
    params = init_token_model(
        jax.random.key(seed),
        VOCABULARY,
        hidden_size,
        embedding_size=embedding_size,
        spec=GRUSpec(reset=reset),
        scheme="pytorch",
    )
    (layer,) = params.layers
    assert isinstance(layer, GRUParams)
    if reset == "after":
        params = params._replace(layers=(_without_candidate_bias(layer),))
    return CharModel(params, 1, num_tokens)


def _without_candidate_bias(params: GRUParams) -> GRUParams:
    """The parameters with zeros in the candidate block of b_h."""
    assert params.b_h is not None
    return dataclasses.replace(params, b_h=params.b_h.at[2 * params.w_h.shape[0] :].set(0))


def cast(problem: Any, dtype: Any) -> Any:
    """Casts every array to a dtype."""
    return jax.tree.map(lambda v: v.astype(dtype) if isinstance(v, Array) else v, problem)


def training_step(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (weights, xs, h0, dh_last, dhs) that returns the value and its gradients."""

    def value(weights, xs, h0, dh_last, dhs):
        h_last, hs = run(weights, xs, h0)
        return jnp.sum(h_last * dh_last) + jnp.sum(hs * dhs)

    return jax.value_and_grad(value, argnums=(0, 1, 2))


def limit_program(size: Size, task: Task, seed: int, dtype: Any) -> Program:
    """A program with as many floating-point operations as a task, in large matrix products.

    The forward pass has 6TBH(D + H) operations; they become the product [TB, D+H] [D+H, 3H]. A
    training step has 18TBH(D + H); the other two products have the shapes of the input and weight
    gradients.
    """
    rows, inner = size.num_steps * size.batch_size, size.input_size + size.hidden_size
    outer = 3 * size.hidden_size
    shapes = ((rows, inner), (inner, outer), (rows, outer), (outer, inner), (inner, rows))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    operands = tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes))

    def one_product(inputs, weights):
        return inputs @ weights

    def three_products(inputs, weights, cotangents, weights_t, inputs_t):
        return inputs @ weights, cotangents @ weights_t, inputs_t @ cotangents

    if task == "forward":
        return compile_program(one_product, operands[:2], lambda result: {})
    return compile_program(three_products, operands, lambda result: {})


def compile_program(
    function: Callable[..., Any],
    arguments: tuple,
    read: Callable[[Any], Result],
    compiles: int = 1,
) -> Program:
    """Compiles a function for these arguments, `compiles` times; records the median seconds."""

    def timed():
        jax.clear_caches()
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        return compiled, time.perf_counter() - start

    (compiled, *_), seconds = zip(*(timed() for _ in range(compiles)))
    analysis = compiled.memory_analysis()

    def call():
        return jax.block_until_ready(compiled(*arguments))

    temporaries = None if analysis is None else int(analysis.temp_size_in_bytes)
    return Program(call, read, float(np.median(seconds)), temporaries)


def as_result(**leaves: Any) -> Result:
    """Converts named arrays to NumPy, floats to float64; leaves out those that are None."""
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items() if leaf is not None}
    return {
        name: leaf if leaf.dtype.kind in "iu" else leaf.astype(np.float64)
        for name, leaf in arrays.items()
    }


def value_scale(problem: Problem) -> float:
    """The magnitude that the value would have for states of 1 with random signs.

    The value itself may be close to zero by chance, but its rounding is that of its summands.
    """
    cotangents = (problem.dh_last, problem.dhs)
    return float(np.sqrt(sum(np.sum(np.square(as_result(d=d)["d"])) for d in cotangents)))


def differences(expected: Result, actual: Result, scales: dict[str, float]) -> dict[str, float]:
    """{leaf: largest difference, relative to the largest expected entry or the given scale}.

    The difference is infinite for integers that are not equal, for a wrong shape and for a missing
    leaf. Only b_hn may be missing, as not every library has it.
    """
    found = {}
    for name, want in expected.items():
        got = actual.get(name)
        if got is None and name == "b_hn":
            continue
        if got is None or got.shape != want.shape:
            found[name] = float("inf")
        elif want.dtype.kind in "iu":
            found[name] = 0.0 if np.array_equal(got, want) else float("inf")
        else:
            scale = scales.get(name) or max(float(np.max(np.abs(want))), 1e-30)
            found[name] = float(np.max(np.abs(got - want))) / scale
    return found


def relative_error(expected: Result, actual: Result) -> float:
    """|actual - expected| / |expected| of the worst leaf in the Euclidean norm.

    For tokens it is the fraction of wrong ones. The value is left out.
    """
    errors = []
    for name, want in expected.items():
        got = actual.get(name)
        if got is None or name == "value":
            continue
        if want.dtype.kind in "iu":
            errors.append(float(np.mean(got != want)))
        else:
            errors.append(float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)))
    return max(errors)
