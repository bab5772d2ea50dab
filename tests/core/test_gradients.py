"""Three ways to one derivative: handwritten BPTT and tangents, JAX's own, and the oracle's loop."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, flat, make_problem, oracle_pullback
from jax.extend import core as jex
from jax.flatten_util import ravel_pytree

import jaxgru
from jaxgru import Noise, init_gru
from jaxgru.core.parameters import CHO_2014, PYTORCH, GRUSpec

# float64, relative to the largest entry of a leaf. Rounding reaches about 1e-14 here.
EXACT = 1e-11
in_float64 = pytest.mark.usefixtures("x64")
slow = pytest.mark.slow
both_resets = pytest.mark.parametrize("spec", [CHO_2014, PYTORCH], ids=["before", "after"])
BEFORE, AFTER = pytest.param(CHO_2014, id="before"), pytest.param(PYTORCH, id="after")
mostly_before = pytest.mark.parametrize(
    "spec", [BEFORE, pytest.param(PYTORCH, id="after", marks=slow)]
)
mostly_after = pytest.mark.parametrize(
    "spec", [pytest.param(CHO_2014, id="before", marks=slow), AFTER]
)

gru = flat(jaxgru.gru)

AUTODIFF = {"gradient": "autodiff"}
TANGENT = {"gradient": "tangent"}
POLICIES = [{"residuals": r} for r in ("gates", "states", "boundaries")]
CHUNKS = (None, 1, 3, 7, 100)  # of T = 7: one step, a rest of one, the whole, more than there is
SPECS = [GRUSpec(*choice) for choice in itertools.product(("before", "after"), ("keep", "write"))]
OTHERS = [
    dataclasses.replace(spec, activation=activation)
    for spec in SPECS
    for activation in ("relu", "sigmoid", "softplus", "identity")
]


def spec_name(spec):
    return "-".join(dataclasses.astuple(spec))


def pullbacks(problem, variants, **case):
    """(values, (dparams, dxs, dh0)) of each variant of gru's choices, compiled as one program."""

    @jax.jit
    def every_variant(params, xs, h0, cotangents):
        results = []
        for variant in variants:
            run = functools.partial(gru, **case, **variant)
            values, pull = jax.vjp(run, params, xs, h0)
            results.append((values, pull(cotangents)))
        return results

    return every_variant(problem.params, problem.xs, problem.h0, problem.cotangents)


def share(variants, parts, *numbers):
    """One of the parts of variants, that of the sum of numbers.

    Compiling all variants in all cases would take most of the time. Cases that are numbered so deal
    them out: each option of a test meets each variant, but not with each of its other options.
    """
    return variants[sum(numbers) % parts :: parts]


def assert_oracles(problem, spec, variants, unroll=1, **case: Any):
    """Each variant's values and gradient are the oracle's."""
    wanted = oracle_pullback(problem, spec, **case)
    results = pullbacks(problem, variants, spec=spec, unroll=unroll, **case)
    for variant, result in zip(variants, results):
        assert_close(result, wanted, EXACT, str(variant))


# First order.


@in_float64
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_name)
def test_every_rule_and_chunk_gives_one_gradient(spec, reverse):
    """Each chunk size with each equation, direction and policy, and these with each other."""
    problem = make_problem(0)
    first = SPECS.index(spec) + 3 * reverse
    variants = [p | {"chunk_size": CHUNKS[(first + i) % 5]} for i, p in enumerate(POLICIES)]
    variants += share(
        [AUTODIFF, TANGENT], 2, spec.reset == "after", spec.update == "write", reverse
    )
    flags: Any = {"mask": problem.mask, "resets": problem.resets}
    assert_oracles(problem, spec, variants, reverse=reverse, **flags)


@in_float64
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=spec_name(spec), marks=slow if sum(divmod(i, 4)) % 2 else ())
        for i, spec in enumerate(OTHERS)
    ],
)
def test_every_activation_has_one_gradient(spec):
    problem = make_problem(1)
    equation, activation = divmod(OTHERS.index(spec), 4)
    variants = share([AUTODIFF, TANGENT, *POLICIES], 3, equation, activation)
    assert_oracles(problem, spec, variants, mask=problem.mask)


@in_float64
@pytest.mark.parametrize("number, bias", list(enumerate(["none", "b_x", "b_h"])))
@both_resets
def test_absent_biases_have_no_gradient_and_leave_the_others_right(spec, number, bias):
    problem = make_problem(2, bias=bias)
    variants = [TANGENT, {}, {"residuals": "states", "chunk_size": 3}]
    assert_oracles(problem, spec, share(variants, 2, number, spec == PYTORCH))


@in_float64
@pytest.mark.parametrize("flags", [("mask",), ("resets",), ()], ids=lambda f: "+".join(f) or "none")
@both_resets
def test_masks_and_resets_alone_have_one_gradient(spec, flags):
    problem = make_problem(3)
    case = {name: getattr(problem, name) for name in flags}
    variants = [TANGENT, {"residuals": "states", "chunk_size": 3}]
    variants = share(variants, 2, "mask" in flags, spec == PYTORCH)
    assert_oracles(problem, spec, variants, reverse=True, **case)


NOISE = {"key": jax.random.key(8), "recurrent_dropout": 0.4, "zoneout": 0.3}


INSIDE = {
    "noise": NOISE,
    "reverse_noise_truncate": {**NOISE, "reverse": True, "truncate": 3},
    "mean_of_zoneout": {"zoneout": 0.3, "deterministic": True},
    "truncate": {"truncate": 2},
    "nothing": {},
}


@in_float64
@pytest.mark.parametrize(
    "spec, number, choice, layer_norm",
    [
        pytest.param(
            spec, number, choice, layer_norm,
            marks=() if (number + (spec == PYTORCH) + 2 * layer_norm) % 4 == 0 else slow,
            id=f"{spec.reset}-{choice}-{'normalized' if layer_norm else 'plain'}",
        )
        for number, choice in enumerate(INSIDE)
        for spec in (CHO_2014, PYTORCH)
        for layer_norm in (False, True)
    ],
)  # fmt: skip
def test_what_acts_inside_the_recurrence_has_one_gradient(spec, number, choice, layer_norm):
    """Layer norm, recurrent dropout, zoneout, truncation: every rule and policy, with flags."""
    problem = make_problem(33, layer_norm=layer_norm)
    variants = [AUTODIFF, TANGENT, {}, *({**policy, "chunk_size": 3} for policy in POLICIES)]
    variants = share(variants, 3, number, spec == PYTORCH, 2 * layer_norm)
    flags = {"mask": problem.mask, "resets": problem.resets}
    assert_oracles(problem, spec, variants, **flags, **INSIDE[choice])


@in_float64
@pytest.mark.parametrize(
    "reverse", [pytest.param(False, id="forward"), pytest.param(True, id="reverse", marks=slow)]
)
@mostly_before
def test_second_order_of_what_acts_inside_is_autodiffs(spec, reverse):
    """Reverse over reverse for "bptt", forward over reverse for "tangent", by turns."""
    problem = make_problem(34, steps=3, layer_norm=not reverse)
    case = {"spec": spec, "mask": problem.mask, "reverse": reverse, "truncate": 2, **NOISE}
    flat, rebuild = ravel_pytree((problem.params, problem.xs, problem.h0))
    direction = jnp.cos(jnp.arange(flat.size, dtype=flat.dtype))

    def gradient(variant):
        def loss(flat):
            params, xs, h0 = rebuild(flat)
            h_last, hs = gru(params, xs, h0, **case, **variant)
            return jnp.sum(jnp.sin(hs)) + jnp.sum(h_last**2)

        return jax.grad(loss)

    @jax.jit
    def products(flat):
        def along(variant):
            return jax.jvp(gradient(variant), (flat,), (direction,))[1]

        if reverse == (spec == PYTORCH):
            variant = {"residuals": "boundaries", "chunk_size": 2} if reverse else {}
            twice = jax.grad(lambda flat: jnp.vdot(gradient(variant)(flat), direction))(flat)
        else:
            twice = along(TANGENT)
        return along(AUTODIFF), twice

    wanted, got = products(flat)
    assert_close(got, wanted, EXACT)


@in_float64
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=["no_batch", "two_batch_axes"])
@both_resets
def test_any_number_of_batch_axes_has_one_gradient(spec, batch):
    problem = make_problem(4, batch=batch)
    variants = [TANGENT, {"residuals": "states", "chunk_size": 3}]
    variants = share(variants, 2, len(batch) // 2, spec == PYTORCH)
    assert_oracles(problem, spec, variants, mask=problem.mask, resets=problem.resets)


@in_float64
@both_resets
def test_single_step_has_one_gradient(spec):
    problem = make_problem(5, steps=1)
    assert_oracles(problem, spec, [TANGENT, *POLICIES])


@in_float64
@both_resets
def test_unrolled_loops_have_one_gradient(spec):
    problem = make_problem(6)
    assert_oracles(problem, spec, [TANGENT, {}], unroll=3)


@in_float64
@pytest.mark.parametrize("number, choice", list(enumerate(["only_h_last", "only_hs", "zero"])))
@both_resets
def test_cotangent_of_either_result_may_be_zero(spec, number, choice):
    """A zero array, as autodiff of a loss that multiplies by zero would send."""
    problem = make_problem(7)
    dh_last, dhs = problem.cotangents
    dh_last = dh_last if choice == "only_h_last" else jnp.zeros_like(dh_last)
    dhs = dhs if choice == "only_hs" else jnp.zeros_like(dhs)
    problem = problem._replace(cotangents=(dh_last, dhs))
    variants = share([TANGENT, {"chunk_size": 3}], 2, number, spec == PYTORCH)
    assert_oracles(problem, spec, variants, mask=problem.mask)


@in_float64
@pytest.mark.parametrize("pick", [0, 1], ids=["h_last", "hs"])
@both_resets
def test_loss_that_uses_one_result_has_one_gradient(spec, pick):
    """Here the other result's cotangent is symbolic, known to be zero when traced."""
    problem = make_problem(8)
    arguments = (problem.params, problem.xs, problem.h0)

    @jax.jit
    def every_variant(*arguments):
        def gradient(**variant):
            def loss(*arguments):
                return jnp.sin(gru(*arguments, spec=spec, mask=problem.mask, **variant)[pick]).sum()

            return jax.grad(loss, (0, 1, 2))(*arguments)

        return [gradient(**v) for v in (TANGENT, {}, {"residuals": "states", "chunk_size": 3})]

    values = oracle_pullback(problem, spec, mask=problem.mask)[0]
    dead = jax.tree.map(jnp.zeros_like, problem.cotangents)
    dead = tuple(np.cos(v) if i == pick else d for i, (v, d) in enumerate(zip(values, dead)))
    wanted = oracle_pullback(problem._replace(cotangents=dead), spec, mask=problem.mask)[1]
    for result in every_variant(*arguments):
        assert_close(result, wanted, EXACT)


@in_float64
@pytest.mark.parametrize("spec", [*SPECS, OTHERS[2]], ids=spec_name)
def test_gradients_are_the_slopes_of_finite_differences(spec):
    """Central differences at 1e-5: about 1e-10 of curvature and 1e-11 of rounding; 1e-6 asked."""
    problem = make_problem(9)
    flat, unravel = ravel_pytree((problem.params, problem.xs, problem.h0))
    dh_last, dhs = problem.cotangents
    run = functools.partial(gru, spec=spec, mask=problem.mask, resets=problem.resets)

    @jax.jit
    def both(flat):
        def loss(flat):
            h_last, hs = run(*unravel(flat))
            return (h_last * dh_last).sum() + (hs * dhs).sum()

        steps = 1e-5 * jnp.eye(flat.size)
        ends = jax.lax.map(lambda d: loss(flat + d) - loss(flat - d), steps)
        return jax.grad(loss)(flat), ends / 2e-5

    assert_close(*both(flat), 1e-6)


@in_float64
@both_resets
def test_wholly_masked_data_gives_weight_gradients_of_exactly_zero(spec):
    problem = make_problem(10)
    nothing = jnp.zeros_like(problem.mask)
    dh_last, dhs = problem.cotangents
    for _, (dparams, dxs, dh0) in pullbacks(problem, [TANGENT, *POLICIES], spec=spec, mask=nothing):
        assert not any(np.any(d) for d in jax.tree.leaves(dparams))
        assert not np.any(dxs)
        assert_close(dh0, dh_last + dhs.sum(axis=0), EXACT)


@in_float64
def test_reset_cuts_the_gradient_exactly():
    problem = make_problem(11)
    resets = jnp.zeros((7, 3), bool).at[4].set(True)
    dh_last, dhs = problem.cotangents
    problem = problem._replace(cotangents=(dh_last, dhs.at[:4].set(0.0)))
    for _, (_, dxs, dh0) in pullbacks(problem, [TANGENT, *POLICIES], resets=resets):
        assert not np.any(dxs[:4]) and not np.any(dh0)
        assert np.abs(np.asarray(dxs[4:])).min() > 0


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    "spec, reverse",
    [
        pytest.param(CHO_2014, False, id="before-forward", marks=slow),
        pytest.param(PYTORCH, True, id="after-reverse"),
    ],
)
def test_float32_gradients_agree_with_float32_autodiff(spec, reverse):
    """2e-5: float32 keeps 6e-8, T = 40 steps and sums over 120 rows lose two digits."""
    problem = make_problem(12, steps=40, hidden=8, dtype=jnp.float32)
    variants = [AUTODIFF, TANGENT, {}, {"residuals": "states", "chunk_size": 7}]
    reference, *results = pullbacks(
        problem, variants, spec=spec, mask=problem.mask, reverse=reverse
    )
    for variant, result in zip(variants[1:], results):
        assert_close(result, reference, 2e-5, str(variant))
        assert {v.dtype for v in jax.tree.leaves(result)} == {jnp.dtype(jnp.float32)}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    "spec, dtype",
    [
        pytest.param(CHO_2014, jnp.bfloat16, id="before-bfloat16", marks=slow),
        pytest.param(PYTORCH, jnp.bfloat16, id="after-bfloat16", marks=slow),
        pytest.param(PYTORCH, jnp.float16, id="after-float16"),
    ],
)
def test_half_precision_gradients_are_near_and_in_their_parameters_dtype(spec, dtype):
    """2e-2 of the oracle's gradient at the same parameters: operands have 8 or 11 bits."""
    problem = make_problem(13, hidden=8, dtype=dtype)
    reference = oracle_pullback(problem, spec, mask=problem.mask)[1]
    variants = [TANGENT, {}, {"residuals": "states", "chunk_size": 3}]
    for variant, (values, result) in zip(
        variants, pullbacks(problem, variants, spec=spec, mask=problem.mask)
    ):
        assert {v.dtype for v in jax.tree.leaves((values, result))} == {jnp.dtype(dtype)}
        assert_close(result, reference, 2e-2, str(variant))


# Higher orders and forward mode.


def small_loss(problem, spec, **variant):
    """(flat arguments, a scalar loss of them) of a problem small enough for whole Hessians."""
    flat, unravel = ravel_pytree((problem.params, problem.xs, problem.h0))

    def loss(flat):
        h_last, hs = gru(
            *unravel(flat), spec=spec, mask=problem.mask, resets=problem.resets, **variant
        )
        return jnp.sin(hs).sum() + (h_last**3).sum()

    return flat, loss


def small_problem(seed):
    """Four steps, one row, two units; one masked step and one reset, which fall together."""
    problem = make_problem(seed, steps=4, batch=(1,), inputs=1, hidden=2)
    mask = jnp.array([True, True, False, True])[:, None]
    resets = jnp.array([False, False, True, False])[:, None]
    return problem._replace(mask=mask, resets=resets)


@in_float64
@mostly_before
def test_hessian_of_every_rule_is_autodiffs(spec):
    problem = small_problem(20)
    variants = [AUTODIFF, TANGENT, *POLICIES]

    @jax.jit
    def hessians(flat):
        return [jax.hessian(small_loss(problem, spec, **v)[1])(flat) for v in variants]

    flat, _ = small_loss(problem, spec)
    reference, *results = hessians(flat)
    assert_close(reference, reference.T, EXACT, "symmetry")
    assert np.linalg.matrix_rank(np.asarray(reference)) > 10  # there is curvature to agree on
    for variant, result in zip(variants[1:], results):
        assert_close(result, reference, EXACT, str(variant))


@in_float64
@mostly_after
def test_gradient_of_gradient_of_bptt_is_autodiffs(spec):
    problem = small_problem(21)
    variants = [AUTODIFF, {}, {"residuals": "states", "chunk_size": 3}]

    @jax.jit
    def twice(flat, direction):
        def once(variant):
            loss = small_loss(problem, spec, **variant)[1]
            return jax.grad(lambda flat: jnp.vdot(jax.grad(loss)(flat), direction))(flat)

        return [once(variant) for variant in variants]

    flat, _ = small_loss(problem, spec)
    direction = jax.random.normal(jax.random.key(22), flat.shape, flat.dtype)
    reference, *results = twice(flat, direction)
    for variant, result in zip(variants[1:], results):
        assert_close(result, reference, EXACT, str(variant))


def hessian_product(loss, order):
    """flat, v -> H v (or v H v where both derivatives are forward) in the named order."""

    def forward(f, v):
        return lambda flat: jax.jvp(f, (flat,), (v,))[1]

    return {
        "forward_over_reverse": lambda flat, v: forward(jax.grad(loss), v)(flat),
        "reverse_over_forward": lambda flat, v: jax.grad(forward(loss, v))(flat),
        "reverse_over_reverse": lambda flat, v: jax.grad(
            lambda flat: jnp.vdot(jax.grad(loss)(flat), v)
        )(flat),
        "forward_over_forward": lambda flat, v: forward(forward(loss, v), v)(flat),
    }[order]


@in_float64
@mostly_after
def test_hessian_products_of_tangent_agree_in_every_order(spec):
    problem = small_problem(23)
    orders = (
        "forward_over_reverse",
        "reverse_over_forward",
        "reverse_over_reverse",
        "forward_over_forward",
    )

    @jax.jit
    def products(flat, v):
        tangent, autodiff = (small_loss(problem, spec, **g)[1] for g in (TANGENT, AUTODIFF))
        reference = hessian_product(autodiff, "forward_over_reverse")(flat, v)
        return reference, [hessian_product(tangent, order)(flat, v) for order in orders]

    flat, _ = small_loss(problem, spec)
    v = jax.random.normal(jax.random.key(24), flat.shape, flat.dtype)
    reference, (*products_, quadratic) = products(flat, v)
    for order, product in zip(orders, products_):
        assert_close(product, reference, EXACT, order)
    assert_close(quadratic, np.vdot(v, reference), EXACT, orders[-1])


@in_float64
@mostly_before
def test_third_derivatives_of_tangent_are_autodiffs(spec):
    problem = small_problem(25)

    @jax.jit
    def third(flat, v):
        def along(f):
            return lambda flat: jax.jvp(f, (flat,), (v,))[1]

        tangent, autodiff = (small_loss(problem, spec, **g)[1] for g in (TANGENT, AUTODIFF))
        return (
            along(along(jax.grad(autodiff)))(flat),
            along(along(jax.grad(tangent)))(flat),
            along(along(along(tangent)))(flat),
        )

    flat, _ = small_loss(problem, spec)
    v = jax.random.normal(jax.random.key(26), flat.shape, flat.dtype)
    wanted, got, cubic = third(flat, v)
    assert_close(got, wanted, EXACT)
    assert_close(cubic, np.vdot(wanted, v), EXACT)


@in_float64
@mostly_before
def test_forward_and_reverse_jacobians_of_tangent_are_autodiffs(spec):
    problem = small_problem(27)
    flat, unravel = ravel_pytree((problem.params, problem.xs, problem.h0))

    @jax.jit
    def jacobians(flat):
        def run(flat, **variant):
            return gru(*unravel(flat), spec=spec, mask=problem.mask, reverse=True, **variant)

        tangent = functools.partial(run, **TANGENT)
        return (
            jax.jacrev(functools.partial(run, **AUTODIFF))(flat),
            jax.jacfwd(tangent)(flat),
            jax.jacrev(tangent)(flat),
            jax.jacrev(run)(flat),
            jax.vmap(jax.linearize(tangent, flat)[1], out_axes=-1)(jnp.eye(flat.size)),
        )

    reference, *others = jacobians(flat)
    for other in others:
        assert_close(other, reference, EXACT)


@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "linearize"])
def test_forward_mode_of_bptt_is_refused_and_the_rule_that_has_it_named(transform):
    """JAX raises its own error later for `jax.linearize`, when no code of jaxgru runs."""
    problem = make_problem(28, dtype=jnp.float32)
    calls = {
        "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
        "jacfwd": lambda f, x: jax.jacfwd(f)(x),
        "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    }
    message = "^gradient must be 'tangent' or 'autodiff' for jax.jvp and jax.jacfwd, got 'bptt'."
    with pytest.raises(TypeError, match="custom_vjp" if transform == "linearize" else message):
        calls[transform](lambda h0: gru(problem.params, problem.xs, h0), problem.h0)


@in_float64
@mostly_after
def test_tangent_takes_any_part_of_the_arguments(spec):
    """The others' tangents are symbolic zeros, which the rule leaves out."""
    problem, direction = make_problem(29, layer_norm=True), make_problem(30, layer_norm=True)
    case = {"spec": spec, "mask": problem.mask, "resets": problem.resets}
    names = (*problem.params.arrays(), "xs", "h0")

    @jax.jit
    def every_part(values, tangents):
        def along(name, **variant):
            def run(value):
                *arrays, xs, h0 = (value if n == name else values[n] for n in names)
                params = dataclasses.replace(problem.params, **dict(zip(names, arrays)))
                return gru(params, xs, h0, **case, **variant)

            return jax.jvp(run, (values[name],), (tangents[name],))

        return [(along(name, **AUTODIFF), along(name, **TANGENT)) for name in names]

    values, tangents = (p.params.arrays() | {"xs": p.xs, "h0": p.h0} for p in (problem, direction))
    for name, (wanted, got) in zip(names, every_part(values, tangents)):
        assert np.abs(np.asarray(wanted[1][1])).max() > 1e-3, name
        assert_close(got, wanted, EXACT, name)


@in_float64
@mostly_before
def test_gradient_of_any_part_of_the_arguments_is_the_whole_gradients_part(spec):
    problem = make_problem(31)
    wanted_params, wanted_xs, wanted_h0 = oracle_pullback(problem, spec, mask=problem.mask)[1]
    dh_last, dhs = problem.cotangents

    def loss(params, xs, h0, **variant):
        h_last, hs = gru(params, xs, h0, spec=spec, mask=problem.mask, **variant)
        return (h_last * dh_last).sum() + (hs * dhs).sum()

    @jax.jit
    def every_part(*arguments):
        def gradient(argument, variant):
            return jax.grad(functools.partial(loss, **variant), argument)(*arguments)

        return [[gradient(i, v) for i in range(3)] for v in (TANGENT, {}, POLICIES[2])]

    for result in every_part(problem.params, problem.xs, problem.h0):
        assert_close(tuple(result), (wanted_params, wanted_xs, wanted_h0), EXACT)


# What the backward sweep keeps and carries.

SIZES = {"steps": 12, "batch": (5,), "inputs": 2, "hidden": 7}  # T, B, I, H
TBH, BH = 12 * 5 * 7, 5 * 7


def saved_numbers(problem, **choices):
    """How many floats the backward sweep keeps beside the arguments and hs."""
    run = functools.partial(gru, **choices)
    arguments = (problem.params, problem.xs, problem.h0)
    (_, hs), pull = jax.eval_shape(functools.partial(jax.vjp, run), *arguments)
    saved = sum(v.size for v in jax.tree.leaves(pull) if jnp.issubdtype(v.dtype, jnp.floating))
    given = sum(v.size for v in jax.tree.leaves(arguments))
    return saved - given - (hs.size if choices.get("residuals") != "boundaries" else 0)


@pytest.mark.parametrize("chunk_size", [12, 4, 5])
@pytest.mark.parametrize("residuals", ["gates", "states", "boundaries"])
@both_resets
def test_backward_keeps_what_its_residuals_say(spec, residuals, chunk_size):
    """Beside hs: the gates, nothing, or the state at the start of every chunk, BH each."""
    problem = make_problem(40, dtype=jnp.float32, **SIZES)
    chunks = -(-12 // chunk_size)
    gates = 3 if spec.reset == "before" else 4
    wanted = {"gates": gates * TBH, "states": 0, "boundaries": chunks * BH}
    saved = saved_numbers(problem, spec=spec, residuals=residuals, chunk_size=chunk_size)
    assert saved == wanted[residuals]


@both_resets
def test_backward_of_bptt_keeps_less_than_autodiff(spec):
    problem = make_problem(41, dtype=jnp.float32, **SIZES)
    bptt = saved_numbers(problem, spec=spec)
    assert bptt < saved_numbers(problem, spec=spec, gradient="autodiff")


def scans(jaxpr):
    """Every scan equation in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda v: isinstance(v, (jex.Jaxpr, jex.ClosedJaxpr)),
        ):
            if isinstance(value, jex.ClosedJaxpr):
                yield from scans(value.jaxpr)
            elif isinstance(value, jex.Jaxpr):
                yield from scans(value)


def backward_carries(problem, **choices):
    """The sizes of what each scan that runs backwards in time carries."""

    def gradient(params, xs, h0, cotangents):
        return jax.vjp(functools.partial(gru, **choices), params, xs, h0)[1](cotangents)

    jaxpr = jax.make_jaxpr(gradient)(problem.params, problem.xs, problem.h0, problem.cotangents)
    found = []
    for equation in scans(jaxpr.jaxpr):
        if equation.params["reverse"]:
            body = equation.params["jaxpr"]
            ends = getattr(body, "jaxpr", body).outvars
            # What is stacked has an axis of time more outside the loop than in it.
            carried = [
                v for v, end in zip(equation.outvars, ends) if v.aval.shape == end.aval.shape
            ]
            found.append([v.aval.size for v in carried])
    return found


@pytest.mark.parametrize("residuals", ["gates", "states", "boundaries"])
@both_resets
def test_backward_sweep_carries_the_cotangent_of_the_state_alone(spec, residuals):
    problem = make_problem(42, dtype=jnp.float32, **SIZES)
    carries = backward_carries(problem, spec=spec, residuals=residuals, chunk_size=12)
    assert carries == [[BH], [BH]]  # the loops for a CPU and for a GPU, of which one is compiled
    autodiff = backward_carries(problem, spec=spec, gradient="autodiff")
    assert max(len(carry) for carry in autodiff) > 1  # JAX's own sums weight gradients in there


PADDED = {
    "plain": {},
    "reverse": {"reverse": True},
    "resets_in_the_padding": {"resets": True},
    "tap": {"tap": True},
    "layer_norm": {},
    "zoneout": {"noise": Noise(zoneout=0.3), "deterministic": True},
    "truncate": {"truncate": 5},
}


@in_float64
@pytest.mark.parametrize(
    ("case", "residuals"),
    [
        pytest.param(case, residuals, marks=[] if number % 3 == place else slow)
        for number, case in enumerate(PADDED)
        for place, residuals in enumerate(("gates", "states", "boundaries"))
    ],
)
@mostly_before
def test_chunks_without_a_valid_step_pass_state_and_gradient_on(spec, case, residuals):
    """Steps 8 to 15 are masked in every row, and so are the last ones: chunks of 4 are skipped."""
    steps, batch, size = 26, 3, 4
    keys = jax.random.split(jax.random.key(3), 4)
    params = init_gru(
        keys[0], size, size, spec=spec, scheme="pytorch", dtype=jnp.float64,
        layer_norm=case == "layer_norm",
    )  # fmt: skip
    xs = jax.random.normal(keys[1], (steps, batch, size), jnp.float64)
    dhs = jax.random.normal(keys[2], (steps, batch, size), jnp.float64)
    t = jnp.arange(steps)[:, None]
    mask = (t < jnp.array([[8, 3, 20]])) & ((t < 8) | (t > 15))
    options = dict(PADDED[case])
    if "resets" in options:
        options["resets"] = jnp.zeros((steps, batch), bool).at[10, 0].set(True).at[24, 2].set(True)
    tapped = options.pop("tap", False)

    def gradients(**rule):
        def loss(params, xs, h0, tap):
            h_last, hs = gru(params, xs, h0, mask=mask, tap=tap, **options, **rule)
            return jnp.vdot(dhs, hs) + jnp.vdot(h_last, h_last)

        h0 = jnp.full((batch, size), 0.5, jnp.float64)
        tap = jaxgru.init_taps(params, xs.shape[:-1]) if tapped else None
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(params, xs, h0, tap)

    got = gradients(residuals=residuals, chunk_size=4)
    wanted = gradients(gradient="autodiff")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * float(jnp.abs(b).max()))
