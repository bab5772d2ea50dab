"""What the benchmarks compute: sizes, weights and data, the training functional, compiled programs.

A training step is the value of <h_last, dh_last> + <hs, dhs> for fixed random dh_last and dhs, and
all its gradients: weights, xs, h0. Everything is drawn in float32.
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
Task = Literal["training", "forward", "step", "generation"]
RESETS: tuple[Reset, ...] = ("before", "after")
TASKS: tuple[Task, ...] = ("training", "forward", "step", "generation")

# Of the largest entry of each leaf. float32 rounds at 6e-8, but the contenders add up the T * B
# rows of a weight gradient in different orders, and every rounding of h_t is carried on by the
# recurrence: a CPU shows 2e-6 at T = 2048. More would be ordinary for longer T; a formula that is
# wrong in one step of 2048 would show 5e-4.
TOLERANCE = 1e-4

Result = dict[str, np.ndarray]  # name of a leaf -> it, in the layout of GRUParams, time first


class Size(NamedTuple):
    """Steps T, batch B, input D, hidden H."""

    num_steps: int
    batch_size: int
    input_size: int
    hidden_size: int

    def __str__(self):
        """T=64 B=32 D=64 H=64, say."""
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


class CharModel(NamedTuple):
    """A character model (one layer), its first character, and how many are to follow."""

    params: TokenParams
    first: int
    num_tokens: int


class Program(NamedTuple):
    """Something to time.

    call returns a result that is ready; read turns that into arrays to compare, outside of what is
    timed. One call does `repeats` units of work. note says how, where there was a choice.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Result]
    compile_seconds: float | None = None
    temporaries_bytes: int | None = None
    repeats: int = 1
    note: str = ""


def draw_problem(size: Size, reset: Reset, seed: int) -> Problem:
    """Biases are drawn too, but b_h's candidate block is zero where reset is after.

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


def draw_model(size: Size, reset: Reset, seed: int) -> CharModel:
    """A character model; what it writes is fixed by the seed."""
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
    """b_h with zeros in its block n."""
    assert params.b_h is not None
    return dataclasses.replace(params, b_h=params.b_h.at[2 * params.w_h.shape[0] :].set(0))


def cast(problem: Any, dtype: Any) -> Any:
    """Every float array in that dtype."""
    return jax.tree.map(lambda v: v.astype(dtype) if isinstance(v, Array) else v, problem)


def training_step(run: Callable[..., Any]) -> Callable[..., Any]:
    """(weights, xs, h0, dh_last, dhs) -> the functional and all its gradients."""

    def value(weights, xs, h0, dh_last, dhs):
        h_last, hs = run(weights, xs, h0)
        return jnp.sum(h_last * dh_last) + jnp.sum(hs * dhs)

    return jax.value_and_grad(value, argnums=(0, 1, 2))


def limit_program(size: Size, task: Task, seed: int, dtype: Any) -> Program:
    """The floating-point operations of a task as large products with no recurrence between them.

    6TBH(D + H) of the forward pass are [TB, D+H] [D+H, 3H]; the 18TBH(D + H) of a training step add
    the product's cotangent of its inputs and that of its weights.
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
    """The function compiled for these arguments; the seconds are the median of all compilations."""

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
    """Named arrays as NumPy's: float64 if they are floats; None is left out."""
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items() if leaf is not None}
    return {
        name: leaf if leaf.dtype.kind in "iu" else leaf.astype(np.float64)
        for name, leaf in arrays.items()
    }


def value_scale(problem: Problem) -> float:
    """The size that the functional has for states of one and random signs.

    Its own size may be small by chance, while its rounding is that of its summands.
    """
    cotangents = (problem.dh_last, problem.dhs)
    return float(np.sqrt(sum(np.sum(np.square(as_result(d=d)["d"])) for d in cotangents)))


def differences(expected: Result, actual: Result, scales: dict[str, float]) -> dict[str, float]:
    """leaf -> greatest deviation, relative to the expected leaf's largest entry (or its scale).

    Integers count as infinitely far unless equal, and so does a leaf that is missing, but for b_hn,
    which not every library has.
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
    """The worst leaf's |actual - expected| / |expected| in Euclidean norm; of tokens, the share."""
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
