"""The recurrence is the oracle's loop: over masks, resets, directions, axes, edge sizes, dtypes."""

import dataclasses
import functools
import itertools
import re
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import assert_close, flat, make_problem

import jaxgru
from jaxgru.core.gradient import Kernel
from jaxgru.core.parameters import CHO_2014, CHUNG_2014, PYTORCH, GRUParams, GRUSpec
from jaxgru.masks import length_mask

gru = flat(jaxgru.gru)
gru_cell = flat(jaxgru.gru_cell)

EXACT = 1e-12  # float64, relative to the largest entry: rounding of different orders of summation
GRADIENTS = ("bptt", "tangent", "autodiff")
SPECS = [GRUSpec(*choice) for choice in itertools.product(("before", "after"), ("keep", "write"))]
in_float64 = pytest.mark.usefixtures("x64")
each_gradient = pytest.mark.parametrize("gradient", GRADIENTS)


def run_oracle(problem, spec, mask=None, resets=None, reverse=False, h0=None):
    """(h_last, hs)."""
    h0 = np.zeros(problem.h0.shape) if h0 is None else h0
    equation = oracle.Equation(*dataclasses.astuple(spec))
    return oracle.forward(problem.params, equation, problem.xs, h0, mask, resets, reverse)[:2]


@in_float64
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.reset}-{s.update}")
def test_sequence_is_the_loop_of_published_steps(spec):
    problem = make_problem(0)
    flags = list(itertools.product((None, "mask"), (None, "resets"), (False, True), (None, "h0")))

    def arguments(mask, resets, reverse, h0):
        return {
            "mask": mask and problem.mask,
            "resets": resets and problem.resets,
            "reverse": reverse,
            "h0": h0 and problem.h0,
        }

    @jax.jit
    def every_case(params, xs):
        return [gru(params, xs, spec=spec, **arguments(*case)) for case in flags]

    for case, got in zip(flags, every_case(problem.params, problem.xs)):
        assert_close(got, run_oracle(problem, spec, **arguments(*case)), EXACT, str(case))


@in_float64
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "softplus", "identity"])
@pytest.mark.parametrize("reset", ["before", "after"])
def test_sequence_uses_the_activation_of_its_spec(activation, reset):
    problem, spec = make_problem(1), GRUSpec(reset, activation=activation)
    got = jax.jit(functools.partial(gru, spec=spec))(problem.params, problem.xs, problem.h0)
    assert_close(got, run_oracle(problem, spec, h0=problem.h0), EXACT)


@in_float64
def test_default_equation_is_cho_2014():
    problem = make_problem(2)
    got = jax.jit(gru)(problem.params, problem.xs)
    assert_close(got, run_oracle(problem, CHO_2014), EXACT)


@in_float64
@pytest.mark.parametrize(
    "sizes",
    [
        {"steps": 1},
        {"hidden": 1, "inputs": 1},
        {"batch": ()},
        {"batch": (1,)},
        {"batch": (2, 3)},
        {"batch": (0,)},
        {"batch": (2, 0, 3)},
    ],
    ids=str,
)
def test_edge_sizes_follow_the_loop(sizes):
    problem = make_problem(3, **sizes)
    case = {"mask": problem.mask, "resets": problem.resets, "h0": problem.h0, "reverse": True}

    @jax.jit
    def every_gradient(params, xs):
        return [gru(params, xs, spec=PYTORCH, gradient=g, **case) for g in GRADIENTS]

    for got in every_gradient(problem.params, problem.xs):
        assert_close(got, run_oracle(problem, PYTORCH, **case), EXACT)


@in_float64
@each_gradient
@pytest.mark.parametrize("reverse", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_steps_return_the_initial_state_and_its_cotangent(gradient, reverse):
    problem = make_problem(4, steps=0)
    dh_last, dhs = problem.cotangents
    run = functools.partial(gru, gradient=gradient, reverse=reverse, mask=problem.mask)
    (h_last, hs), pull = jax.vjp(run, problem.params, problem.xs, problem.h0)
    np.testing.assert_array_equal(h_last, problem.h0)
    assert hs.shape == (0, 3, 3)
    dparams, dxs, dh0 = pull((dh_last, dhs))
    np.testing.assert_array_equal(dh0, dh_last)
    assert dxs.shape == problem.xs.shape
    assert_close(dparams, jax.tree.map(jnp.zeros_like, problem.params), 0)
    h_last, _ = run(problem.params, problem.xs)
    np.testing.assert_array_equal(h_last, np.zeros((3, 3)))


@in_float64
@each_gradient
def test_no_rows_give_parameter_gradients_of_zero(gradient):
    problem = make_problem(5, batch=(0,))
    run = functools.partial(gru, gradient=gradient, mask=problem.mask)
    _, pull = jax.vjp(run, problem.params, problem.xs, problem.h0)
    dparams, dxs, dh0 = pull(problem.cotangents)
    assert_close(dparams, jax.tree.map(jnp.zeros_like, problem.params), 0)
    assert dxs.shape == (7, 0, 2) and dh0.shape == (0, 3)


# Lengths, masks and resets.


@in_float64
@pytest.mark.parametrize("reverse", [False, True])
def test_row_of_any_length_is_that_row_cut_to_its_length(reverse):
    problem, lengths = make_problem(6, batch=(4,)), [0, 3, 7, 1]
    mask = length_mask(lengths, 7)
    run = jax.jit(functools.partial(gru, reverse=reverse))
    h_last, hs = run(problem.params, problem.xs, problem.h0, mask=mask)
    for row, length in enumerate(lengths):
        cut = problem._replace(xs=problem.xs[:length, row], h0=problem.h0[row])
        want_last, want = run_oracle(cut, CHO_2014, h0=cut.h0, reverse=reverse)
        assert_close((h_last[row], hs[:length, row]), (want_last, want), EXACT, f"row {row}")
        state = problem.h0[row] if reverse else h_last[row]
        np.testing.assert_array_equal(hs[length:, row], np.tile(state, (7 - length, 1)))


def test_zero_length_row_returns_initial_state():
    problem = make_problem(7, dtype=jnp.float32)  # its row 0 is masked throughout
    for reverse in (False, True):
        h_last, hs = gru(problem.params, problem.xs, problem.h0, mask=problem.mask, reverse=reverse)
        np.testing.assert_array_equal(h_last[0], problem.h0[0])
        np.testing.assert_array_equal(hs[:, 0], np.tile(problem.h0[0], (7, 1)))


def test_reset_zeroes_the_state_on_held_steps_too():
    problem = make_problem(8, dtype=jnp.float32)
    mask = jnp.zeros((7, 3), bool)
    resets = jnp.zeros((7, 3), bool).at[4, 1].set(True)
    h_last, hs = gru(problem.params, problem.xs, problem.h0, mask=mask, resets=resets)
    np.testing.assert_array_equal(hs[3, 1], problem.h0[1])
    np.testing.assert_array_equal(hs[4:, 1], np.zeros((3, 3)))
    np.testing.assert_array_equal(h_last, problem.h0.at[1].set(0.0))


@in_float64
def test_reset_separates_what_comes_before_from_what_follows():
    problem = make_problem(9)
    resets = jnp.zeros((7, 3), bool).at[3].set(True)
    run = jax.jit(gru)
    _, hs = run(problem.params, problem.xs, problem.h0, resets=resets)
    early = run_oracle(problem._replace(xs=problem.xs[:3]), CHO_2014, h0=problem.h0)[1]
    late = run_oracle(problem._replace(xs=problem.xs[3:]), CHO_2014)[1]
    assert_close(hs, np.concatenate([early, late]), EXACT)


@pytest.mark.usefixtures("optimized")
@each_gradient
@pytest.mark.parametrize("spec", [CHO_2014, PYTORCH], ids=["before", "after"])
def test_padding_of_nan_or_inf_changes_no_bit(gradient, spec):
    problem = make_problem(10, dtype=jnp.float32)

    @jax.jit
    def values_and_gradients(xs):
        def run(params, xs, h0):
            mask, resets = problem.mask, problem.resets
            return gru(params, xs, h0, mask=mask, resets=resets, spec=spec, gradient=gradient)

        values, pull = jax.vjp(run, problem.params, xs, problem.h0)
        return values, pull(problem.cotangents)

    masked = ~problem.mask[..., None]
    clean = values_and_gradients(jnp.where(masked, jnp.zeros_like(problem.xs), problem.xs))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(clean))
    for padding in (jnp.nan, jnp.inf, -jnp.inf, 1e30):
        padded = jnp.where(masked, jnp.full_like(problem.xs, padding), problem.xs)
        jax.tree.map(np.testing.assert_array_equal, values_and_gradients(padded), clean)
    masked = np.broadcast_to(np.asarray(masked), problem.xs.shape)
    np.testing.assert_array_equal(np.asarray(clean[1][1])[masked], 0)


@pytest.mark.parametrize("residuals", ["states", "boundaries"])
def test_padding_of_nan_stays_out_when_gates_are_redone(residuals):
    problem = make_problem(11, dtype=jnp.float32)
    run = functools.partial(gru, mask=problem.mask, residuals=residuals, chunk_size=3)

    @jax.jit
    def gradients(xs):
        return jax.vjp(run, problem.params, xs, problem.h0)[1](problem.cotangents)

    masked = ~problem.mask[..., None]
    clean = gradients(jnp.where(masked, jnp.zeros_like(problem.xs), problem.xs))
    padded = gradients(jnp.where(masked, jnp.full_like(problem.xs, jnp.nan), problem.xs))
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(clean))
    jax.tree.map(np.testing.assert_array_equal, padded, clean)


# Axes, streaming, unrolling.


@in_float64
@pytest.mark.parametrize("axis", [1, -2])
def test_batch_major_input_is_the_transposed_time_major_one(axis):
    problem = make_problem(12, batch=(3,))
    by_row = jax.tree.map(
        lambda v: jnp.swapaxes(v, 0, 1), (problem.xs, problem.mask, problem.resets)
    )
    xs, mask, resets = by_row
    h_last, hs = jax.jit(functools.partial(gru, axis=axis))(
        problem.params, xs, problem.h0, mask=mask, resets=resets
    )
    want_last, want = run_oracle(
        problem, CHO_2014, mask=problem.mask, resets=problem.resets, h0=problem.h0
    )
    assert_close((h_last, hs), (want_last, np.swapaxes(want, 0, 1)), EXACT)


@in_float64
def test_time_may_lie_between_two_batch_axes():
    problem = make_problem(13, batch=(2, 3))
    xs, mask = jnp.moveaxis(problem.xs, 0, 1), jnp.moveaxis(problem.mask, 0, 1)
    h_last, hs = gru(problem.params, xs, problem.h0, mask=mask, axis=1)
    want_last, want = run_oracle(problem, CHO_2014, mask=problem.mask, h0=problem.h0)
    assert_close((h_last, hs), (want_last, np.moveaxis(want, 0, 1)), EXACT)


@in_float64
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_change_no_value(chunk_size):
    problem = make_problem(14)
    case = {"mask": problem.mask, "resets": problem.resets, "h0": problem.h0}

    @jax.jit
    def both_ways(params, xs):
        run = functools.partial(gru, params, xs, chunk_size=chunk_size, **case)
        return [run(reverse=False), run(reverse=True, residuals="boundaries")]

    for reverse, got in zip((False, True), both_ways(problem.params, problem.xs)):
        assert_close(got, run_oracle(problem, CHO_2014, reverse=reverse, **case), EXACT)


@in_float64
def test_unrolling_changes_no_value():
    problem = make_problem(15)
    for unroll in (2, 7):
        got = gru(problem.params, problem.xs, problem.h0, unroll=unroll)
        assert_close(got, run_oracle(problem, CHO_2014, h0=problem.h0), EXACT)


@in_float64
@pytest.mark.parametrize("reverse", [False, True])
def test_last_state_is_the_state_of_the_last_step_taken(reverse):
    problem = make_problem(16)
    h_last, hs = gru(
        problem.params, problem.xs, mask=problem.mask, resets=problem.resets, reverse=reverse
    )
    np.testing.assert_array_equal(h_last, hs[0 if reverse else -1])


@in_float64
@pytest.mark.parametrize("reverse", [False, True])
def test_two_halves_with_the_carried_state_are_the_whole(reverse):
    problem = make_problem(17)
    halves = [slice(3), slice(3, None)]
    h, outputs = problem.h0, [None, None]
    for place in reversed((0, 1)) if reverse else (0, 1):
        part = halves[place]
        h, outputs[place] = gru(
            problem.params,
            problem.xs[part],
            h,
            mask=problem.mask[part],
            resets=problem.resets[part],
            reverse=reverse,
        )
    case = {"mask": problem.mask, "resets": problem.resets, "h0": problem.h0}
    want = run_oracle(problem, CHO_2014, reverse=reverse, **case)
    assert_close((h, jnp.concatenate(outputs)), want, EXACT)


# Dtypes.


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("spec", [CHO_2014, CHUNG_2014, PYTORCH], ids=["cho", "chung", "pytorch"])
def test_results_have_the_dtype_of_the_input(dtype, spec):
    """2e-2 for half types, whose products take operands of 8 or 11 bits; 1e-5 for float32."""
    problem = make_problem(20, dtype=dtype)
    h_last, hs = jax.jit(functools.partial(gru, spec=spec))(
        problem.params, problem.xs, problem.h0, mask=problem.mask
    )
    assert h_last.dtype == hs.dtype == dtype
    wide = jax.tree.map(lambda v: np.asarray(v).astype(np.float64), problem)
    want = run_oracle(wide, spec, mask=problem.mask, h0=wide.h0)
    assert_close((h_last, hs), want, 1e-5 if dtype == jnp.float32 else 2e-2)


@in_float64
def test_float64_input_gives_float64_results():
    problem = make_problem(21)
    h_last, hs = gru(problem.params, problem.xs)
    assert h_last.dtype == hs.dtype == jnp.float64


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("dtype", [jnp.float16, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_state_of_half_types_is_carried_in_float32(dtype):
    """With w_h = 0 only z * h sees the state, so hs is the float32 run, rounded once a step.

    z stays near 1, where a state that is rounded every step gets stuck: that is shown beside it.
    """
    steps, hidden = 200, 8
    problem = make_problem(22, steps=steps, hidden=hidden, dtype=dtype)
    slow = jnp.concatenate([jnp.zeros(hidden), jnp.full(hidden, 4.0), jnp.full(hidden, 0.7)])
    params = dataclasses.replace(
        problem.params, w_h=jnp.zeros_like(problem.params.w_h), b_x=slow.astype(dtype)
    )
    wide_params, wide_xs = jax.tree.map(lambda v: v.astype(jnp.float32), (params, problem.xs))
    _, want = jax.jit(gru)(wide_params, wide_xs)
    _, hs = jax.jit(gru)(params, problem.xs)
    zero = jnp.zeros((3, hidden), dtype)
    step = jax.jit(gru_cell)
    rounded = [zero]
    for x in problem.xs:
        rounded.append(step(params, x, rounded[-1]))
    want, hs = np.asarray(want), np.asarray(hs).astype(np.float32)
    # One rounding is eps / 2; 5 % more for float32's own error over 200 steps.
    bound = 0.525 * float(jnp.finfo(dtype).eps) * np.abs(want) + float(jnp.finfo(dtype).tiny)
    assert (np.abs(hs - want) <= bound).all()
    drifted = np.asarray(jnp.stack(rounded[1:])).astype(np.float32)
    assert np.abs(drifted - want).max() > 5 * np.abs(hs - want).max()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("spec", [CHO_2014, PYTORCH])
def test_steps_of_half_types_from_a_float32_state_are_the_whole_run(dtype, spec):
    """100 steps from one state; beside them the steps whose state has the half type."""
    problem = make_problem(24, steps=100, hidden=8, dtype=dtype)
    params = dataclasses.replace(problem.params, spec=spec)
    _, whole = jax.jit(jaxgru.gru)(params, problem.xs, problem.h0)

    def share_that_differs(h):
        def body(h, x):
            h_t = jaxgru.gru_cell(params, x, h)
            return h_t, h_t

        hs = jax.jit(lambda h: jax.lax.scan(body, h, problem.xs))(h)[1]
        assert hs.dtype == h.dtype
        return float((hs.astype(dtype) != whole).mean())

    # Sums in another order may round an entry to its neighbour.
    assert share_that_differs(problem.h0.astype(jnp.float32)) < 0.01
    assert share_that_differs(problem.h0) > 0.1


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("dtype", [pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.bfloat16])
@each_gradient
def test_cotangent_of_the_state_of_half_types_is_carried_in_float32(dtype, gradient):
    """h_T = z^T h_0 with constant gates: dh_0 after 200 steps is one rounding from float32's."""
    steps, hidden = 200, 8
    problem = make_problem(23, steps=steps, hidden=hidden, dtype=dtype)
    zero = jax.tree.map(jnp.zeros_like, problem.params)
    z_bias = jnp.zeros(3 * hidden).at[hidden : 2 * hidden].set(jnp.linspace(4.0, 6.0, hidden))

    @jax.jit
    def cotangent(params, xs, h0, dh_last):
        def run(h0):
            return gru(params, xs, h0, gradient=gradient)[0]

        return jax.vjp(run, h0)[1](dh_last)[0]

    arguments = dataclasses.replace(zero, b_x=z_bias.astype(dtype)), problem.xs, problem.h0
    dh_last = problem.cotangents[0]
    got = cotangent(*arguments, dh_last)
    assert got.dtype == dtype
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (*arguments, dh_last))
    want = np.asarray(cotangent(*wide))
    bound = 0.525 * float(jnp.finfo(dtype).eps) * np.abs(want) + float(jnp.finfo(dtype).tiny)
    assert (np.abs(np.asarray(got).astype(np.float32) - want) <= bound).all()


def test_default_precision_of_the_process_is_left_alone():
    assert not jax.config.jax_enable_x64
    problem = make_problem(24, dtype=jnp.float32)
    for gradient in GRADIENTS:
        h_last, _ = gru(problem.params, problem.xs, gradient=gradient)
        assert h_last.dtype == jnp.float32
    assert not jax.config.jax_enable_x64
    assert jnp.zeros(()).dtype == jnp.float32


# Compilation.


@pytest.mark.usefixtures("x64", "optimized")
@pytest.mark.parametrize(
    ("spec", "gradient"),
    [
        pytest.param(CHO_2014, "bptt"),
        pytest.param(PYTORCH, "tangent"),
        pytest.param(PYTORCH, "bptt", marks=pytest.mark.slow),
        pytest.param(CHO_2014, "tangent", marks=pytest.mark.slow),
        pytest.param(CHO_2014, "autodiff", marks=pytest.mark.slow),
        pytest.param(PYTORCH, "autodiff", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_and_eager_runs_agree(spec, gradient):
    """Up to the rounding of fused multiply-adds."""
    problem = make_problem(30)

    def everything(params, xs, h0):
        run = functools.partial(gru, spec=spec, gradient=gradient, mask=problem.mask)
        values, pull = jax.vjp(run, params, xs, h0)
        return values, pull(problem.cotangents)

    arguments = (problem.params, problem.xs, problem.h0)
    assert_close(jax.jit(everything)(*arguments), everything(*arguments), EXACT)


@each_gradient
def test_one_shape_is_traced_once(gradient):
    chex.clear_trace_counter()

    @functools.partial(jax.jit, static_argnames="spec")
    @chex.assert_max_traces(n=1)
    def loss(params, xs, mask, spec):
        return gru(params, xs, mask=mask, spec=spec, gradient=gradient)[1].sum()

    values = [
        jax.grad(loss)(p.params, p.xs, p.mask, GRUSpec(reset="after")).w_h
        for p in (make_problem(seed, dtype=jnp.float32) for seed in (31, 32))
    ]
    assert not np.array_equal(*values)


# length_mask.


@pytest.mark.parametrize("lengths", [[0, 1, 3], (3, 3), [[0, 2], [3, 1]], 2, 0, []], ids=str)
def test_length_mask_is_true_on_the_steps_before_the_length(lengths):
    got = length_mask(lengths, 3)
    wanted = np.arange(3).reshape(3, *([1] * np.ndim(lengths))) < np.asarray(lengths)[None]
    assert got.dtype == jnp.bool_
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32])
def test_length_mask_takes_any_integer_type(dtype):
    """300 steps do not fit in eight bits; the lengths do."""
    lengths = np.array([0, 100], dtype)
    for given in (lengths, jnp.asarray(lengths)):
        got = length_mask(given, 300)
        np.testing.assert_array_equal(got, np.arange(300)[:, None] < [0, 100])


def test_length_mask_has_time_on_the_axis_that_is_asked_for():
    wanted = [[True, True, False], [False, False, False]]
    for axis in (1, -1, np.int64(1)):
        assert length_mask([2, 0], 3, axis=axis).tolist() == wanted


def test_length_mask_of_no_steps_is_empty():
    assert length_mask([0, 0], 0).shape == (0, 2)


def test_traced_lengths_outside_the_range_act_as_its_ends():
    got = jax.jit(length_mask, static_argnums=1)(jnp.array([-2, 0, 2, 9]), 3)
    np.testing.assert_array_equal(got, np.asarray(length_mask([0, 0, 2, 3], 3)))


LENGTH_ERRORS = {
    "floats": (
        lambda: length_mask([1.0], 3),
        TypeError,
        "length_mask: lengths must be integers, got dtype float64.",
    ),
    "bools": (
        lambda: length_mask(jnp.array([True]), 3),
        TypeError,
        "length_mask: lengths must be integers, got dtype bool.",
    ),
    "too_long": (
        lambda: length_mask([1, 4], 3),
        ValueError,
        "length_mask: lengths must lie between 0 and num_steps=3, got 4.",
    ),
    "negative": (
        lambda: length_mask(jnp.array([5, -1]), 3),
        ValueError,
        "length_mask: lengths must lie between 0 and num_steps=3, got -1.",
    ),
    "steps_negative": (
        lambda: length_mask([1], -1),
        ValueError,
        "length_mask: num_steps must be at least 0, got -1.",
    ),
    "steps_float": (
        lambda: length_mask([1], 3.0),
        TypeError,
        "length_mask: num_steps must be an integer, got 3.0.",
    ),
    "steps_bool": (
        lambda: length_mask([1], True),
        TypeError,
        "length_mask: num_steps must be an integer, got True.",
    ),
}


def call_gru(xs=(5, 4, 2), h0=None, mask=None, resets=None, params=None, **choices):
    """gru on zeros of the given shapes, or on the values themselves."""
    if params is None:
        params = GRUParams(
            jnp.zeros((2, 9)), jnp.zeros((3, 9)), jnp.zeros(9), jnp.zeros(9), spec=CHO_2014
        )
    xs, h0 = (jnp.zeros(v) if isinstance(v, tuple) else v for v in (xs, h0))
    mask, resets = (jnp.zeros(v, bool) if isinstance(v, tuple) else v for v in (mask, resets))
    return gru(params, xs, h0, mask=mask, resets=resets, **choices)


GRU_ERRORS = {
    "spec": (
        lambda: call_gru(spec="pytorch"),
        TypeError,
        "gru: params.spec must be a GRUSpec, such as jaxgru.PYTORCH, got 'pytorch'.",
    ),
    "gradient": (
        lambda: call_gru(gradient="rtrl"),
        ValueError,
        "gru: gradient must be one of 'bptt', 'tangent', 'autodiff', got 'rtrl'.",
    ),
    "gradient_of_residuals": (
        lambda: call_gru(gradient="states"),
        ValueError,
        "gru: gradient must be one of 'bptt', 'tangent', 'autodiff', got 'states'; pass "
        "BPTT('states').",
    ),
    "gradient_kind": (
        lambda: call_gru(gradient=1),
        TypeError,
        "gru: gradient must be one of 'bptt', 'tangent', 'autodiff', or a BPTT, a Tangent or an "
        "Autodiff, got 1.",
    ),
    "gradient_class": (
        lambda: call_gru(gradient=jaxgru.BPTT),
        TypeError,
        "gru: gradient must be one of 'bptt', 'tangent', 'autodiff', or a BPTT, a Tangent or an "
        "Autodiff, got <class 'jaxgru.core.gradient.BPTT'>; call it: BPTT().",
    ),
    "residuals": (
        lambda: jaxgru.BPTT(residuals="all"),
        ValueError,
        "BPTT: residuals must be one of 'gates', 'states', 'boundaries', got 'all'.",
    ),
    "unroll_kind": (
        lambda: jaxgru.Tangent(unroll=True),
        TypeError,
        "Tangent: unroll must be an integer, got True.",
    ),
    "unroll_none": (
        lambda: jaxgru.Tangent(unroll=None),
        TypeError,
        "Tangent: unroll must be an integer, got None.",
    ),
    "unroll_zero": (
        lambda: jaxgru.Autodiff(unroll=0),
        ValueError,
        "Autodiff: unroll must be at least 1, got 0.",
    ),
    "truncate_zero": (
        lambda: jaxgru.Tangent(truncate=0),
        ValueError,
        "Tangent: truncate must be at least 1, got 0.",
    ),
    "chunk_zero": (
        lambda: jaxgru.BPTT(chunk_size=0),
        ValueError,
        "BPTT: chunk_size must be at least 1, got 0.",
    ),
    "chunk_kind": (
        lambda: jaxgru.BPTT(chunk_size=2.0),
        TypeError,
        "BPTT: chunk_size must be an integer, got 2.0.",
    ),
    "kernel_kind": (
        lambda: jaxgru.BPTT(kernel="fused"),
        TypeError,
        "BPTT: kernel must be a Kernel of jaxgru.experimental or None, got 'fused'.",
    ),
    "kernel_unroll": (
        lambda: jaxgru.BPTT(kernel=Kernel(), unroll=2),
        ValueError,
        "BPTT: unroll must be 1 with a kernel, which has no loop of XLA to unroll, got 2; leave it "
        "out.",
    ),
    "noise_kind": (
        lambda: call_gru(noise=0.1),
        TypeError,
        "gru: noise must be a Noise or None, got 0.1; pass its rates by name, "
        "Noise(recurrent_dropout=...).",
    ),
    "noise_range": (
        lambda: jaxgru.Noise(zoneout=1.0),
        ValueError,
        "Noise: zoneout must be in [0, 1), got 1.0.",
    ),
    "noise_without_key": (
        lambda: call_gru(noise=jaxgru.Noise(recurrent_dropout=0.1)),
        ValueError,
        "gru: key must be a jax.random.key for recurrent_dropout=0.1, got None; pass "
        "deterministic=True for evaluation.",
    ),
    "deterministic_traced": (
        lambda: jax.jit(lambda value: call_gru(deterministic=value))(True),
        TypeError,
        "gru: deterministic must be a bool, got a traced value; inside jit, make it a static "
        "argument.",
    ),
    "truncate_traced": (
        lambda: jax.jit(lambda value: call_gru(gradient=jaxgru.BPTT(truncate=value)))(2),
        TypeError,
        "BPTT: truncate must be an integer, got a traced value; inside jit, make it a static "
        "argument.",
    ),
    "reverse": (
        lambda: call_gru(reverse=1),
        TypeError,
        "gru: reverse must be a bool, got 1.",
    ),
    "params_kind": (
        lambda: call_gru(params={"w_x": jnp.zeros((2, 9))}),
        TypeError,
        "gru: params must be a GRUParams, got dict.",
    ),
    "params_stack": (
        lambda: call_gru(params=(jaxgru.init_gru(jax.random.key(0), 2, 3),)),
        TypeError,
        "gru: params must be a GRUParams, got tuple; pass one layer, such as params[0], or run a "
        "stack by gru_stack.",
    ),
    "params_bidirectional": (
        lambda: call_gru(params=jaxgru.init_stack(jax.random.key(0), 2, 3, bidirectional=True)[0]),
        TypeError,
        "gru: params must be a GRUParams, got Bidirectional; pass one direction, or run both by "
        "gru_bidirectional.",
    ),
    "params_arrays": (
        lambda: call_gru(params=jaxgru.init_gru(jax.random.key(0), 2, 3).arrays()),
        TypeError,
        "gru: params must be a GRUParams, got dict; GRUParams(**params, spec=...) holds these "
        "arrays.",
    ),
    "xs_of_another_library": (
        lambda: call_gru(xs=types.SimpleNamespace(dtype="torch.float32", shape=(5, 2))),
        TypeError,
        "gru: xs must be an array, got SimpleNamespace; convert it with jnp.asarray.",
    ),
    "lengths_for_a_mask": (
        lambda: call_gru(mask=jnp.array([3, 2])),
        TypeError,
        "gru: mask must be a bool array, got int32; length_mask makes one from lengths.",
    ),
    "params_w_x_kind": (
        lambda: call_gru(params=GRUParams(1.0, jnp.zeros((3, 9)), None, None, spec=CHO_2014)),
        TypeError,
        "gru: params.w_x must be an array, got float; convert it with jnp.asarray.",
    ),
    "xs_kind": (
        lambda: call_gru(xs=[[0.0, 0.0]]),
        TypeError,
        "gru: xs must be an array, got list; convert it with jnp.asarray.",
    ),
    "xs_integer": (
        lambda: call_gru(xs=jnp.zeros((5, 2), jnp.int32)),
        TypeError,
        "gru: xs must be a floating array, got dtype int32; cast it first.",
    ),
    "xs_dtype": (
        lambda: call_gru(xs=jnp.zeros((5, 2), jnp.bfloat16)),
        TypeError,
        "gru: xs must have the dtype of the parameters, float32, got bfloat16; cast one of them.",
    ),
    "xs_features": (
        lambda: call_gru(xs=(6, 3, 3)),
        ValueError,
        "gru: xs must have shape [T, ..., I] with I=2 (rows of params.w_x), got (6, 3, 3).",
    ),
    "xs_one_axis": (
        lambda: call_gru(xs=(2,)),
        ValueError,
        "gru: xs must have shape [T, ..., I] with I=2 (rows of params.w_x), got (2,).",
    ),
    "axis_kind": (
        lambda: call_gru(axis=0.0),
        TypeError,
        "gru: axis must be an integer, got 0.0.",
    ),
    "axis_bool": (
        lambda: call_gru(axis=True),
        TypeError,
        "gru: axis must be an integer, got True.",
    ),
    "axis_last": (
        lambda: call_gru(axis=2),
        ValueError,
        "gru: axis must name an axis of xs other than its last, got 2 for shape (5, 4, 2).",
    ),
    "axis_minus_one": (
        lambda: call_gru(axis=-1),
        ValueError,
        "gru: axis must name an axis of xs other than its last, got -1 for shape (5, 4, 2).",
    ),
    "axis_below": (
        lambda: call_gru(axis=-4),
        ValueError,
        "gru: axis must name an axis of xs other than its last, got -4 for shape (5, 4, 2).",
    ),
    "mask_float": (
        lambda: call_gru(mask=jnp.ones((5, 4))),
        TypeError,
        "gru: mask must be a bool array, got float32; length_mask makes one from lengths.",
    ),
    "mask_kind": (
        lambda: call_gru(mask=[True] * 5),
        TypeError,
        "gru: mask must be a bool array, got list; length_mask makes one from lengths.",
    ),
    "mask_shape": (
        lambda: call_gru(mask=(4, 5)),
        ValueError,
        "gru: mask must have shape (5, 4) (xs without its last axis), got (4, 5); time and batch "
        "are swapped.",
    ),
    "mask_never_broadcast": (
        lambda: call_gru(mask=(5, 1)),
        ValueError,
        "gru: mask must have shape (5, 4) (xs without its last axis), got (5, 1).",
    ),
    "mask_axis": (
        lambda: call_gru(mask=(4, 5), axis=1),
        ValueError,
        "gru: mask must have shape (5, 4) (xs without its last axis), got (4, 5); time and batch "
        "are swapped.",
    ),
    "resets_integer": (
        lambda: call_gru(resets=jnp.zeros((5, 4), jnp.int32)),
        TypeError,
        "gru: resets must be a bool array, got int32; cast it to bool.",
    ),
    "resets_shape": (
        lambda: call_gru(resets=(5,)),
        ValueError,
        "gru: resets must have shape (5, 4) (xs without its last axis), got (5,).",
    ),
    "h0_kind": (
        lambda: call_gru(h0=0.0),
        TypeError,
        "gru: h0 must be an array, got float; convert it with jnp.asarray.",
    ),
    "h0_mask": (
        lambda: call_gru(h0=jnp.ones((5, 4), bool)),
        TypeError,
        "gru: h0 must be a floating array, got dtype bool; cast it if it is a state; pass a mask "
        "by name, lengths as mask=length_mask(lengths, T).",
    ),
    "h0_of_torch": (
        lambda: call_gru(h0=(1, 4, 3)),
        ValueError,
        "gru: h0 must have shape (4, 3) (the batch axes of xs, then H=3, the rows of params.w_h), "
        "got (1, 4, 3); h0[0] has this shape, as torch's h_0 is [1, B, H].",
    ),
    "h0_dtype": (
        lambda: call_gru(h0=jnp.zeros((4, 3), jnp.float16)),
        TypeError,
        "gru: h0 must have the dtype of the parameters, float32, got float16; cast one of them.",
    ),
    "h0_never_broadcast": (
        lambda: call_gru(h0=(3,)),
        ValueError,
        "gru: h0 must have shape (4, 3) (the batch axes of xs, then H=3, the rows of params.w_h), "
        "got (3,).",
    ),
    "h0_batch_major": (
        lambda: call_gru(h0=(4, 3), axis=1),
        ValueError,
        "gru: h0 must have shape (5, 3) (the batch axes of xs, then H=3, the rows of params.w_h), "
        "got (4, 3).",
    ),
}
BAD_CALLS = {f"length_{k}": v for k, v in LENGTH_ERRORS.items()} | GRU_ERRORS


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_is_refused_with_its_reason(case):
    call, kind, message = BAD_CALLS[case]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


@in_float64
@pytest.mark.parametrize("gradient", ["bptt", "tangent"])
def test_readme_resets_to_a_learned_state(gradient):
    """Its recipe gives the values and gradients of an explicit loop."""
    readme = Path(jaxgru.__file__).parent / "core" / "README.md"
    (recipe,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.S)
    names = {}
    with jax.enable_x64(False):  # its example is of float32
        exec(compile(recipe, str(readme), "exec"), names)
    problem = make_problem(44)
    resets = problem.resets.at[0].set(jnp.array([True, False, False]))
    begin = jnp.cos(jnp.arange(9.0).reshape(3, 3))

    def by_recipe(*arrays):
        h_last, hs = names["gru_with_resets_to"](*arrays, resets, gradient=gradient)
        return h_last, hs[1::2]

    def by_loop(state, params, xs, h):
        hs = []
        for x, reset in zip(xs, resets):
            h = jaxgru.gru_cell(params, x, jnp.where(reset[:, None], state, h))
            hs.append(h)
        return h, jnp.stack(hs)

    @functools.partial(jax.jit, static_argnums=0)
    def pullback(run, *arrays):
        found, pull = jax.vjp(run, *arrays)
        return found, pull(problem.cotangents)

    arrays = (begin, problem.params, problem.xs, problem.h0)
    assert_close(pullback(by_recipe, *arrays), pullback(by_loop, *arrays), EXACT)
