"""One step is the equation of the papers; its transpose and tangent are the derivatives of it."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import assert_close, flat, make_problem, with_spec

from jaxgru.core import cell, derivatives
from jaxgru.core.cell import Gates
from jaxgru.core.parameters import CHO_2014, CHUNG_2014, PYTORCH, GRUParams, GRUSpec
from jaxgru.initializers import init_gru

gru_cell = flat(cell.gru_cell)
EXACT = 1e-12  # float64, relative to the largest entry: rounding of different orders of summation
ACTIVATIONS = ("tanh", "relu", "sigmoid", "softplus", "identity")
BIASES = ("both", "none", "b_x", "b_h")
SPECS = [
    GRUSpec(*choice)
    for choice in itertools.product(("before", "after"), ("keep", "write"), ACTIVATIONS)
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(dataclasses.astuple(s)))
jitted_cell = jax.jit(gru_cell, static_argnames="spec")
in_float64 = pytest.mark.usefixtures("x64", "uncompiled")


def biases_for(spec):
    """Every choice of biases for the two equations that treat b_h differently, else both."""
    return BIASES if spec.activation == "tanh" and spec.update == "keep" else BIASES[:1]


def one_step_problem(seed, bias="both", batch=(4,)):
    """params, x [..., I], h [..., H] in float64."""
    problem = make_problem(seed, steps=1, batch=batch, bias=bias)
    return problem.params, problem.xs[0], problem.h0


def oracle_step(params, x, h, spec):
    equation = oracle.Equation(*dataclasses.astuple(spec))
    return oracle.forward(params, equation, x[None], h)[0]


def whole_step(params, x, h, spec, dropout=None):
    """h' and the gates from the parameters and the input."""
    params = with_spec(params, spec)
    return cell.step(cell.split_recurrent(params, dropout), cell.project(params, x), h)


@functools.partial(jax.jit, static_argnames="spec")
def step_and_rules(params, x, h, dnew, spec, dropout=None):
    """The step's value, its handwritten VJP, and JAX's."""
    params = with_spec(params, spec)
    a, recurrent = cell.project(params, x), cell.split_recurrent(params, dropout)
    transposed = recurrent.transposed()
    new, gates = cell.step(recurrent, a, h)
    c = derivatives.coefficients(recurrent, gates, h)
    dh_tm1, dp = derivatives.step_vjp(transposed, c, dnew)
    da, du = derivatives.gates_vjp(c, dnew, dp)
    by_hand = (
        derivatives.params_vjp(params, x, gates, h, da, du, dropout),
        derivatives.inputs_vjp(params, params.w_x.T, x, da),
        dh_tm1,
    )

    def whole(params, x, h):
        return whole_step(params, x, h, spec, dropout)[0]

    _, pull = jax.vjp(whole, params, x, h)
    _, pull_a = jax.vjp(lambda a, h: cell.step(recurrent, a, h)[0], a, h)
    return new, by_hand, pull(dnew), (tuple(jnp.split(da, 3, -1)), dh_tm1), pull_a(dnew)


@in_float64
@each_spec
def test_cell_is_the_published_equation(spec):
    for number, bias in enumerate(BIASES):
        params, x, h = one_step_problem(number, bias)
        got = jitted_cell(params, x, h, spec=spec)
        assert_close(got, oracle_step(params, x, h, spec), EXACT, bias)


@in_float64
@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)])
def test_cell_treats_leading_axes_as_rows(batch):
    for spec in (CHO_2014, PYTORCH):
        params, x, h = one_step_problem(5, batch=batch)
        got = jitted_cell(params, x, h, spec=spec)
        assert_close(got, oracle_step(params, x, h, spec), EXACT)


@in_float64
def test_zero_parameters_halve_the_state():
    """r = z = 1/2 and n = tanh(0) = 0, so h' = h / 2 in every equation: known without an oracle."""
    params, x, h = one_step_problem(6)
    zero = jax.tree.map(jnp.zeros_like, params)
    for spec in (CHO_2014, CHUNG_2014, PYTORCH):
        np.testing.assert_array_equal(gru_cell(zero, x, h, spec=spec), np.asarray(h) / 2)


@in_float64
def test_one_unit_matches_numbers_worked_out_by_hand():
    """All weights 1, biases (b_x, b_h) = (0, 1), x = 0, h = 1: gates are sigmoid(2)."""
    params = GRUParams(jnp.ones((1, 3)), jnp.ones((1, 3)), jnp.zeros(3), jnp.ones(3), spec=CHO_2014)
    x, h = jnp.zeros(1), jnp.ones(1)
    gate = 1 / (1 + np.exp(-2.0))
    before, after = np.tanh(gate + 1), np.tanh(gate * 2)
    for spec, wanted in (
        (CHO_2014, gate + (1 - gate) * before),
        (CHUNG_2014, (1 - gate) + gate * before),
        (PYTORCH, gate + (1 - gate) * after),
    ):
        assert_close(gru_cell(params, x, h, spec=spec), np.array([wanted]), EXACT, str(spec))


def test_named_specs_are_the_equations_of_their_papers():
    assert dataclasses.astuple(CHO_2014) == ("before", "keep", "tanh")
    assert dataclasses.astuple(CHUNG_2014) == ("before", "write", "tanh")
    assert dataclasses.astuple(PYTORCH) == ("after", "keep", "tanh")
    assert GRUSpec() == CHO_2014
    assert len({GRUSpec(), CHO_2014, CHUNG_2014, PYTORCH}) == 3  # hashed by value


def test_spec_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHO_2014.reset = "after"  # type: ignore[misc]


@in_float64
@pytest.mark.parametrize("reset", ["before", "after"])
def test_writing_is_keeping_with_a_negated_update_gate(reset):
    params, x, h = one_step_problem(7)
    hidden = params.w_h.shape[0]
    sign = np.repeat([1.0, -1.0, 1.0], hidden)
    negated = jax.tree.map(lambda v: v * sign.reshape((1,) * (v.ndim - 1) + (-1,)), params)
    keep = gru_cell(params, x, h, spec=GRUSpec(reset, "keep"))
    write = gru_cell(negated, x, h, spec=GRUSpec(reset, "write"))
    assert_close(write, keep, EXACT)
    plain = gru_cell(params, x, h, spec=GRUSpec(reset, "write"))
    assert np.abs(np.asarray(plain - keep)).max() > 0.01


@in_float64
@each_spec
def test_step_transpose_is_the_vjp_of_the_step(spec):
    for number, bias in enumerate(biases_for(spec)):
        params, x, h = one_step_problem(10 + number, bias)
        dh = jax.random.normal(jax.random.key(20), h.shape, h.dtype)
        h_t, by_hand, by_jax, by_hand_a, by_jax_a = step_and_rules(params, x, h, dh, spec)
        assert_close(h_t, oracle_step(params, x, h, spec), EXACT, bias)
        assert_close(by_hand, by_jax, EXACT, bias)
        assert_close(by_hand_a, by_jax_a, EXACT, bias)


@in_float64
@pytest.mark.parametrize("spec", [CHO_2014, PYTORCH], ids=["before", "after"])
@pytest.mark.parametrize("batch", [(), (2, 3), (0,)])
def test_parameter_cotangents_sum_over_all_leading_axes(spec, batch):
    params, x, h = one_step_problem(30, batch=batch)
    dh = jax.random.normal(jax.random.key(31), h.shape, h.dtype)
    _, by_hand, by_jax, _, _ = step_and_rules(params, x, h, dh, spec)
    assert_close(by_hand, by_jax, EXACT)


@functools.partial(jax.jit, static_argnames="spec")
def tangents_by_hand_and_by_jax(params, tparams, x, tx, h, th, spec, dropout=None):
    """None among the tangents stands for zero."""
    params, tparams = with_spec((params, tparams), spec)
    _, gates = whole_step(params, x, h, spec, dropout)
    e = derivatives.step_jvp_inputs(params, tparams, x, tx, gates, h, dropout)
    recurrent = cell.split_recurrent(params, dropout)
    by_hand = derivatives.step_jvp(recurrent, derivatives.coefficients(recurrent, gates, h), th, e)
    zeros = jax.tree.map(jnp.zeros_like, (params, x))
    tangents = {
        k: zero if t is None else t
        for (k, t), zero in zip(tparams.arrays().items(), zeros[0].arrays().values())
    }
    filled = dataclasses.replace(tparams, **tangents)

    def whole(params, x, h):
        return whole_step(params, x, h, spec, dropout)[0]

    tx = zeros[1] if tx is None else tx
    return by_hand, jax.jvp(whole, (params, x, h), (filled, tx, th))[1]


@in_float64
@each_spec
def test_step_tangent_is_the_jvp_of_the_step(spec):
    for number, bias in enumerate(biases_for(spec)):
        params, x, h = one_step_problem(40 + number, bias)
        tparams, tx, th = one_step_problem(50 + number, bias)
        by_hand, by_jax = tangents_by_hand_and_by_jax(params, tparams, x, tx, h, th, spec)
        assert_close(by_hand, by_jax, EXACT, bias)


@in_float64
@pytest.mark.parametrize("spec", [CHO_2014, PYTORCH], ids=["before", "after"])
@pytest.mark.parametrize("only", ["w_x", "w_h", "b_x", "b_h", "x"])
def test_input_tangent_takes_none_for_a_tangent_that_is_zero(spec, only):
    params, x, h = one_step_problem(60)
    tparams, tx, _ = one_step_problem(61)
    absent = [name for name in tparams.arrays() if name != only]
    tparams = dataclasses.replace(tparams, **dict.fromkeys(absent))
    tx = tx if only == "x" else None
    th = jnp.zeros_like(h)
    by_hand, by_jax = tangents_by_hand_and_by_jax(params, tparams, x, tx, h, th, spec)
    assert np.abs(np.asarray(by_jax)).max() > 1e-3  # the tangent left in does reach the state
    assert_close(by_hand, by_jax, EXACT)


@in_float64
@pytest.mark.parametrize(
    "spec",
    [CHO_2014, PYTORCH, pytest.param(CHUNG_2014, marks=pytest.mark.slow)],
    ids=["before", "after", "write"],
)
@pytest.mark.parametrize("scales", ["both", "g_x", "g_h"])
def test_normalized_step_with_recurrent_dropout_has_its_value_and_rules(spec, scales):
    """Layer norm and recurrent dropout inside one step: the oracle's value, JAX's derivatives."""

    def problem(seed):
        params, xs, h = make_problem(seed, steps=1, batch=(4,), layer_norm=True)[:3]
        absent = {"both": (), "g_x": ("g_h",), "g_h": ("g_x",)}[scales]
        return dataclasses.replace(params, **dict.fromkeys(absent)), xs[0], h

    (params, x, h), (tparams, tx, th) = problem(62), problem(63)
    dropout = jax.random.bernoulli(jax.random.key(64), 0.6, h.shape).astype(h.dtype) / 0.6
    rules = step_and_rules(params, x, h, th, spec, dropout)
    equation = oracle.Equation(*dataclasses.astuple(spec))
    assert_close(rules[0], oracle.forward(params, equation, x[None], h, dropout=dropout)[0], EXACT)
    assert_close(rules[1], rules[2], EXACT)
    assert_close(rules[3], rules[4], EXACT)
    by_hand, by_jax = tangents_by_hand_and_by_jax(params, tparams, x, tx, h, th, spec, dropout)
    assert_close(by_hand, by_jax, EXACT)


def test_normalized_product_has_mean_zero_and_variance_one_in_every_gate():
    """Large weights change nothing: with scales of one and no bias, a is of unit size."""
    params = init_gru(jax.random.key(0), 5, 64, bias=False, layer_norm=True)
    params = dataclasses.replace(params, w_x=100 * params.w_x + 7)
    for a in cell.project(params, jax.random.normal(jax.random.key(1), (3, 5))):
        np.testing.assert_allclose(a.mean(-1), 0, atol=1e-5)
        np.testing.assert_allclose(a.std(-1), 1, atol=1e-3)


@in_float64
@pytest.mark.parametrize("reset", ["before", "after"])
def test_relu_at_its_kink_has_derivative_zero(reset):
    """jax.nn.relu has none there; with zero parameters every candidate sits on the kink."""
    params, x, h = one_step_problem(70)
    params = jax.tree.map(jnp.zeros_like, params)
    dh = jnp.ones_like(h)
    _, by_hand, by_jax, ((_, _, da_n), _), _ = step_and_rules(
        params, x, h, dh, GRUSpec(reset, activation="relu")
    )
    np.testing.assert_array_equal(da_n, np.zeros(h.shape))
    assert_close(by_hand, by_jax, EXACT)
    *_, ((_, _, da_n), _), _ = step_and_rules(
        params, x, h, dh, GRUSpec(reset, activation="identity")
    )
    np.testing.assert_array_equal(da_n, np.full(h.shape, 0.5))


@in_float64
@each_spec
def test_derivatives_hold_where_gates_saturate(spec):
    params, x, h = one_step_problem(80)
    params = dataclasses.replace(params, b_x=jnp.tile(jnp.array([-30.0, 0.5, 30.0]), 3))
    dh = jnp.ones_like(h)
    _, by_hand, by_jax, _, _ = step_and_rules(params, x, h, dh, spec)
    # Where 1 - sigmoid is the difference of nearly equal numbers a few units in its last place
    # matter; the largest entry of each leaf does not come from there.
    assert_close(by_hand, by_jax, 1e-11)


@in_float64
def test_gates_have_q_only_where_the_reset_gate_acts_after():
    params, x, h = one_step_problem(90)
    for spec, has_q in ((CHO_2014, False), (PYTORCH, True)):
        _, gates = whole_step(params, x, h, spec)
        assert isinstance(gates, Gates) and (gates.q is not None) == has_q
        hidden_term = np.asarray(h) @ np.asarray(params.w_h)[:, 6:] + np.asarray(params.b_h)[6:]
        if has_q:
            assert_close(gates.q, hidden_term, EXACT)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_cell_returns_the_dtype_it_got(dtype):
    """2e-2 for half types: their products take operands of 8 (bfloat16) or 11 bits."""
    problem = make_problem(100, steps=1, dtype=dtype)
    params, x, h = problem.params, problem.xs[0], problem.h0
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    for spec in (CHO_2014, PYTORCH):
        got = gru_cell(params, x, h, spec=spec)
        assert got.dtype == dtype
        wide = jax.tree.map(lambda v: np.asarray(v).astype(np.float64), (params, x, h))
        assert_close(got, oracle_step(*wide, spec), tolerance)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_step_adds_in_float32(dtype):
    """With w_h = 0 no product sees the state, so the step is the float32 one, rounded once."""
    problem = make_problem(101, steps=1, hidden=64, dtype=dtype)
    params, x, h = problem.params, problem.xs[0], problem.h0
    params = dataclasses.replace(params, w_h=jnp.zeros_like(params.w_h))
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (params, x, h))
    got = np.asarray(gru_cell(params, x, h)).astype(np.float32)
    want = np.asarray(gru_cell(*wide))
    # One rounding is eps / 2; 1 % more for float32's own error next to a tie.
    bound = 0.505 * float(jnp.finfo(dtype).eps) * np.abs(want) + float(jnp.finfo(dtype).tiny)
    assert (np.abs(got - want) <= bound).all()


# Initialisation.


def gate_blocks(w):
    return np.split(np.asarray(w).astype(np.float64), 3, axis=-1)


def test_orthogonal_scheme_is_orthogonal_in_every_gate():
    params = init_gru(jax.random.key(0), 5, 16)
    blocks = gate_blocks(params.w_h)
    for block in blocks:
        # float32 QR of 16 columns: a few units of 6e-8.
        np.testing.assert_allclose(block @ block.T, np.eye(16), atol=2e-6)
    for one, other in itertools.combinations(blocks, 2):
        assert np.abs(one - other).max() > 0.1  # drawn from keys of their own


def test_orthogonal_scheme_draws_lecun_normal_input_weights():
    """Variance 1 / I; 64 * 128 draws a gate give the deviation to about 1 %."""
    params = init_gru(jax.random.key(1), 64, 128)
    for block in gate_blocks(params.w_x):
        assert abs(block.std() * np.sqrt(64) - 1) < 0.04
        assert abs(block.mean()) < 0.01
    one, two, _ = gate_blocks(params.w_x)
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.05


def test_pytorch_scheme_is_uniform_within_its_bound():
    """Every array is U(-b, b) with b = 1 / sqrt(H): deviation b / sqrt(3), and ends are reached."""
    params = init_gru(jax.random.key(2), 32, 64, scheme="pytorch")
    bound = 1 / 8
    for value in jax.tree.leaves(params):
        value = np.asarray(value)
        assert np.abs(value).max() <= bound
        assert value.max() > 0.95 * bound and value.min() < -0.95 * bound
        # A bias has 192 draws: its deviation is known to about 3.2 %, so 13 % is four of those.
        assert abs(value.std() * np.sqrt(3) / bound - 1) < (0.13 if value.ndim == 1 else 0.03)
    assert np.abs(np.asarray(params.b_x - params.b_h)).max() > 0.1 * bound


def test_keras_scheme_has_orthonormal_rows_and_glorot_inputs():
    params = init_gru(jax.random.key(3), 40, 24, scheme="keras")
    w_h, w_x = np.asarray(params.w_h), np.asarray(params.w_x)
    np.testing.assert_allclose(w_h @ w_h.T, np.eye(24), atol=2e-6)  # float32 QR
    bound = np.sqrt(6 / (40 + 3 * 24))
    assert np.abs(w_x).max() <= bound
    assert w_x.max() > 0.98 * bound and w_x.min() < -0.98 * bound
    assert abs(w_x.std() * np.sqrt(3) / bound - 1) < 0.03  # 2880 draws: about 0.8 %


@pytest.mark.parametrize("scheme", ["orthogonal", "keras"])
def test_biases_start_at_zero(scheme):
    params = init_gru(jax.random.key(4), 2, 3, scheme=scheme)
    np.testing.assert_array_equal(params.b_x, np.zeros(9))
    np.testing.assert_array_equal(params.b_h, np.zeros(9))


@pytest.mark.parametrize("scheme", ["orthogonal", "pytorch", "keras"])
def test_initialisation_follows_its_arguments(scheme):
    make = functools.partial(init_gru, input_size=2, hidden_size=3, scheme=scheme)
    params = make(jax.random.key(5))
    wanted = {"w_x": (2, 9), "w_h": (3, 9), "b_x": (9,), "b_h": (9,), "g_x": None, "g_h": None}
    assert {k: v if v is None else v.shape for k, v in params.arrays().items()} == wanted
    assert params.spec == CHO_2014 and make(jax.random.key(5), spec=PYTORCH).spec == PYTORCH
    normalized = make(jax.random.key(5), layer_norm=True)
    np.testing.assert_array_equal(normalized.g_x, np.ones(9))
    np.testing.assert_array_equal(normalized.g_h, np.ones(9))
    np.testing.assert_array_equal(normalized.w_h, params.w_h)
    without = make(jax.random.key(5), bias=False)
    assert without.b_x is None and without.b_h is None
    np.testing.assert_array_equal(without.w_h, params.w_h)
    again, other = make(jax.random.key(5)), make(jax.random.key(6))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert not np.array_equal(other.w_x, params.w_x)
    assert not np.array_equal(other.w_h, params.w_h)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        drawn = make(jax.random.key(5), dtype=dtype)
        assert {v.dtype for v in jax.tree.leaves(drawn)} == {jnp.dtype(dtype)}
        rounded = jax.tree.map(lambda v, dtype=dtype: v.astype(dtype), params)
        jax.tree.map(np.testing.assert_array_equal, drawn, rounded)


@in_float64
def test_float64_parameters_are_drawn_in_float64():
    """Orthogonal to 1e-14, which a float32 draw that was cast would miss by eight digits."""
    params = init_gru(jax.random.key(7), 4, 8, dtype=jnp.float64)
    assert {v.dtype for v in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}
    for block in gate_blocks(params.w_h):
        np.testing.assert_allclose(block @ block.T, np.eye(8), atol=1e-14)


# Errors: the message names the function, the argument, what it must be, and what came.

KEY = jax.random.key(0)


def bad_params(**changes):
    """Parameters for I=2, H=3 with some arrays exchanged."""
    good = GRUParams(
        jnp.zeros((2, 9)), jnp.zeros((3, 9)), jnp.zeros(9), jnp.zeros(9), spec=CHO_2014
    )
    return dataclasses.replace(good, **changes)


def call_cell(x=(4, 2), h=(4, 3), params=None, dtype=jnp.float32, **choices):
    """gru_cell on zeros of the given shapes, or on the values themselves."""
    x, h = (jnp.zeros(v, dtype) if isinstance(v, tuple) else v for v in (x, h))
    return gru_cell(bad_params() if params is None else params, x, h, **choices)


BAD_CALLS = {
    "spec_reset": (
        lambda: GRUSpec(reset="during"),
        ValueError,
        "GRUSpec: reset must be one of 'before', 'after', got 'during'.",
    ),
    "spec_update": (
        lambda: GRUSpec(update="take"),
        ValueError,
        "GRUSpec: update must be one of 'keep', 'write', got 'take'.",
    ),
    "spec_activation": (
        lambda: GRUSpec(activation="gelu"),
        ValueError,
        "GRUSpec: activation must be one of 'tanh', 'relu', 'sigmoid', 'softplus', 'identity', "
        "got 'gelu'.",
    ),
    "init_input_zero": (
        lambda: init_gru(KEY, 0, 3),
        ValueError,
        "init_gru: input_size must be at least 1, got 0.",
    ),
    "init_hidden_negative": (
        lambda: init_gru(KEY, 2, -1),
        ValueError,
        "init_gru: hidden_size must be at least 1, got -1.",
    ),
    "init_input_float": (
        lambda: init_gru(KEY, 2.0, 3),
        TypeError,
        "init_gru: input_size must be an integer, got 2.0.",
    ),
    "init_hidden_bool": (
        lambda: init_gru(KEY, 2, True),
        TypeError,
        "init_gru: hidden_size must be an integer, got True.",
    ),
    "init_scheme": (
        lambda: init_gru(KEY, 2, 3, scheme="xavier"),
        ValueError,
        "init_gru: scheme must be one of 'orthogonal', 'pytorch', 'keras', got 'xavier'.",
    ),
    "init_dtype": (
        lambda: init_gru(KEY, 2, 3, dtype=jnp.int32),
        TypeError,
        "init_gru: dtype must be one of float64, float32, bfloat16, float16, got int32.",
    ),
    "init_dtype_not_enabled": (
        lambda: init_gru(KEY, 2, 3, dtype=jnp.float64),
        TypeError,
        "init_gru: dtype must be enabled, got float64; set "
        "jax.config.update('jax_enable_x64', True) or cast to float32.",
    ),
    "params_kind": (
        lambda: call_cell(params=tuple(bad_params().arrays().values())),
        TypeError,
        "gru_cell: params must be a GRUParams, got tuple.",
    ),
    "params_stack": (
        lambda: call_cell(params=[bad_params()]),
        TypeError,
        "gru_cell: params must be a GRUParams, got list; pass one layer, such as params[0], or run "
        "a stack by gru_stack_cell.",
    ),
    "w_x_kind": (
        lambda: call_cell(params=bad_params(w_x=[[0.0] * 9] * 2)),
        TypeError,
        "gru_cell: params.w_x must be an array, got list; convert it with jnp.asarray.",
    ),
    "w_h_missing": (
        lambda: call_cell(params=bad_params(w_h=None)),
        TypeError,
        "gru_cell: params.w_h must be an array, got NoneType; convert it with jnp.asarray.",
    ),
    "w_x_integer": (
        lambda: call_cell(params=bad_params(w_x=jnp.zeros((2, 9), jnp.int32))),
        TypeError,
        "gru_cell: params.w_x must be a floating array, got dtype int32; cast it first.",
    ),
    "w_x_eight_bits": (
        lambda: call_cell(params=bad_params(w_x=jnp.zeros((2, 9), jnp.float8_e4m3fn))),
        TypeError,
        "gru_cell: the dtype of params.w_x must be one of float64, float32, bfloat16, float16, "
        "got float8_e4m3fn.",
    ),
    "x_of_numpy_float64": (
        lambda: call_cell(x=np.zeros((4, 2))),
        TypeError,
        "gru_cell: the dtype of x must be enabled, got float64; set "
        "jax.config.update('jax_enable_x64', True) or cast to float32.",
    ),
    "w_h_dtype": (
        lambda: call_cell(params=bad_params(w_h=jnp.zeros((3, 9), jnp.bfloat16))),
        TypeError,
        "gru_cell: params.w_h must have the dtype of the parameters, float32, got bfloat16; "
        "cast one of them.",
    ),
    "b_h_dtype": (
        lambda: call_cell(params=bad_params(b_h=jnp.zeros(9, jnp.float16))),
        TypeError,
        "gru_cell: params.b_h must have the dtype of the parameters, float32, got float16; "
        "cast one of them.",
    ),
    "w_x_axes": (
        lambda: call_cell(params=bad_params(w_x=jnp.zeros(9))),
        ValueError,
        "gru_cell: params.w_x must have two axes, got shape (9,).",
    ),
    "w_h_axes": (
        lambda: call_cell(params=bad_params(w_h=jnp.zeros((1, 3, 9)))),
        ValueError,
        "gru_cell: params.w_h must have two axes, got shape (1, 3, 9).",
    ),
    "w_h_shape": (
        lambda: call_cell(params=bad_params(w_h=jnp.zeros((3, 12)))),
        ValueError,
        "gru_cell: params.w_h must have shape (3, 9) (H=3, the rows of params.w_h), got (3, 12).",
    ),
    "w_x_shape": (
        lambda: call_cell(params=bad_params(w_x=jnp.zeros((2, 6)))),
        ValueError,
        "gru_cell: params.w_x must have shape (2, 9) (H=3, the rows of params.w_h), got (2, 6).",
    ),
    "b_x_shape": (
        lambda: call_cell(params=bad_params(b_x=jnp.zeros(3))),
        ValueError,
        "gru_cell: params.b_x must have shape (9,) (H=3, the rows of params.w_h), got (3,).",
    ),
    "b_h_shape": (
        lambda: call_cell(params=bad_params(b_h=jnp.zeros((1, 9)))),
        ValueError,
        "gru_cell: params.b_h must have shape (9,) (H=3, the rows of params.w_h), got (1, 9).",
    ),
    "x_kind": (
        lambda: call_cell(x=[0.0, 0.0]),
        TypeError,
        "gru_cell: x must be an array, got list; convert it with jnp.asarray.",
    ),
    "x_integer": (
        lambda: call_cell(dtype=jnp.int32),
        TypeError,
        "gru_cell: x must be a floating array, got dtype int32; cast it first.",
    ),
    "x_dtype": (
        lambda: call_cell(dtype=jnp.bfloat16),
        TypeError,
        "gru_cell: x must have the dtype of the parameters, float32, got bfloat16; "
        "cast one of them.",
    ),
    "x_shape": (
        lambda: call_cell(x=(4, 3)),
        ValueError,
        "gru_cell: x must have shape [..., I] with I=2 (rows of params.w_x), got (4, 3).",
    ),
    "x_scalar": (
        lambda: call_cell(x=()),
        ValueError,
        "gru_cell: x must have shape [..., I] with I=2 (rows of params.w_x), got ().",
    ),
    "h_missing": (
        lambda: call_cell(h=None),
        TypeError,
        "gru_cell: h must be an array, got NoneType; convert it with jnp.asarray.",
    ),
    "h_dtype": (
        lambda: call_cell(h=jnp.zeros((4, 3), jnp.float16)),
        TypeError,
        "gru_cell: h must have the dtype of the parameters, float32, got float16; "
        "cast one of them.",
    ),
    "h_dtype_of_half_parameters": (
        lambda: cell.gru_cell(
            init_gru(jax.random.key(0), 2, 3, dtype=jnp.bfloat16),
            jnp.zeros((4, 2), jnp.bfloat16),
            jnp.zeros((4, 3), jnp.float16),
        ),
        TypeError,
        "gru_cell: h must have the dtype of the parameters, bfloat16, or float32, got float16; "
        "cast one of them.",
    ),
    "x_wider_than_half_parameters": (
        lambda: cell.gru_cell(
            init_gru(jax.random.key(0), 2, 3, dtype=jnp.bfloat16), jnp.zeros((4, 2)), None
        ),
        TypeError,
        "gru_cell: x must have the dtype of the parameters, bfloat16, got float32; "
        "cast one of them.",
    ),
    "h_never_broadcast": (
        lambda: call_cell(h=(3,)),
        ValueError,
        "gru_cell: h must have shape (4, 3) (x's leading axes, then H=3, the rows of params.w_h), "
        "got (3,).",
    ),
    "spec_kind": (
        lambda: call_cell(spec="before"),
        TypeError,
        "gru_cell: params.spec must be a GRUSpec, such as jaxgru.PYTORCH, got 'before'.",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_is_refused_with_its_reason(case):
    call, kind, message = BAD_CALLS[case]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
