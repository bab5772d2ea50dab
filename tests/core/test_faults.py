"""Seeded faults: every one of these wrong backward passes is caught, in float64 and in float32."""

import dataclasses
import functools
import pkgutil

import jax
import jax.numpy as jnp
import pytest
from conftest import flat

from jaxgru import BPTT
from jaxgru.checks.gradients import check_gradients
from jaxgru.core import bptt, recurrence
from jaxgru.core.parameters import CHO_2014, CHUNG_2014, PYTORCH
from jaxgru.initializers import init_gru

# One of each kind of place; the fast tier leaves the others to the slow one.
FAST = {
    *("candidate_path_not_gated", "last_step_lost", "resets_ignored", "sums_swapped"),
    *("no_recurrent_weights_in_input_tangent", "norm_without_its_mean", "not_a_number"),
}


def cases(values, name=str):
    """Cases of a test by the name of their fault."""
    found = [(name(value), value) for value in values]
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), id=label,
                     marks=() if label.split("-")[-1] in FAST else pytest.mark.slow)
        for label, value in found
    ]  # fmt: skip


def of_step(change):
    """A fault of step_vjp: change(w_h, c, dnew, dh_tm1, dp) -> dh_tm1."""

    def mutate(original):
        def faulty(transposed, c, dnew):
            dh_tm1, dp = original(transposed, c, dnew)
            return change(jnp.concatenate(transposed.w).T, c, dnew, dh_tm1, dp), dp

        return faulty

    return mutate


def block(w, i):
    return jnp.split(w, 3, axis=-1)[i]


def no_kept_state(w_h, c, dnew, dh_tm1, dp):
    return dh_tm1 - dnew * c.K


def no_update_gate_path(w_h, c, dnew, dh_tm1, dp):
    return dh_tm1 - (dnew * c.Z) @ block(w_h, 1).T


def no_reset_gate_path(w_h, c, dnew, dh_tm1, dp):
    return dh_tm1 - ((dnew if dp is None else dp) * c.R) @ block(w_h, 0).T


def no_candidate_path(w_h, c, dnew, dh_tm1, dp):
    return dh_tm1 - dp * c.r


def candidate_path_not_gated(w_h, c, dnew, dh_tm1, dp):
    return dh_tm1 + dp * (1 - c.r)


def no_product_path(w_h, c, dnew, dh_tm1, dp):
    return dh_tm1 - (dnew * c.Q) @ block(w_h, 2).T


def of_coefficients(change):
    """A fault of coefficients: change(gates, c) -> the fields that it replaces."""

    def mutate(original):
        def faulty(recurrent, gates, h_tm1):
            c = original(recurrent, gates, h_tm1)
            return c._replace(**change(gates, c))

        return faulty

    return mutate


def update_gate_sign(gates, c):
    return {"Z": -c.Z}


def no_slope_of_reset_gate(gates, c):
    return {"R": c.R / (gates.r * (1 - gates.r))}


def half_slope_of_update_gate(gates, c):
    return {"Z": c.Z / (1 - gates.z)}


def no_slope_of_candidate(gates, c):
    return {"A": 1 - gates.z}


def product_not_gated(gates, c):
    return {"Q": c.A}


def kept_state_of_the_other_convention(gates, c):
    return {"K": gates.z}


def of_params(change):
    """A fault of params_vjp: change(xs, gates, h_tm1, da, du) before it."""

    def mutate(original):
        def faulty(params, xs, gates, h_tm1, da, du, dropout):
            return original(params, *change(xs, gates, h_tm1, da, du), dropout)

        return faulty

    return mutate


def without_last(d):
    return d.at[-1].set(jnp.zeros_like(d[-1]))


def state_not_gated(xs, gates, h_tm1, da, du):
    return xs, gates._replace(r=jnp.ones_like(gates.r)), h_tm1, da, du


def last_step_lost(xs, gates, h_tm1, da, du):
    return xs, gates, h_tm1, without_last(da), without_last(du)


def inputs_of_next_step(xs, gates, h_tm1, da, du):
    return jnp.roll(xs, 1, axis=0), gates, h_tm1, da, du


def bias_inside_the_gate(xs, gates, h_tm1, da, du):
    return xs, gates, h_tm1, da, da


def scaled_recurrent_weights(original):
    def faulty(*args):
        dparams = original(*args)
        return dataclasses.replace(dparams, w_h=dparams.w_h * 1.001)

    return faulty


def bias_of_one_row(original):
    def faulty(params, xs, gates, h_tm1, da, du, dropout):
        dparams = original(params, xs, gates, h_tm1, da, du, dropout)
        return dataclasses.replace(dparams, b_h=du[:, 0].sum(axis=0))

    return faulty


def wrong_block_of_inputs(original):
    def faulty(params, w_x_t, xs, da):
        r, z, n = jnp.split(da, 3, axis=-1)
        return original(params, w_x_t, xs, jnp.concatenate([z, r, n], axis=-1))

    return faulty


def neighbour_state(original):
    def faulty(static, h_start, hs, steps):
        return hs

    return faulty


def of_loop(change):
    """A fault of the loop of the backward pass: change(g, dhs, flags) before it."""

    def mutate(original):
        def faulty(config, transposed, g, c, dhs, inputs):
            g, dhs, flags = change(g, dhs, inputs.flags)
            inputs = inputs._replace(flags=flags)
            return original(config, transposed, g, c, dhs, inputs)

        return faulty

    return mutate


def final_state_ignored(g, dhs, flags):
    return jnp.zeros_like(g), dhs, flags


def outputs_one_step_late(g, dhs, flags):
    return g, jnp.roll(dhs, 1, axis=0), flags


def mask_ignored(g, dhs, flags):
    return g, dhs, dataclasses.replace(flags, mask=None)


def resets_ignored(g, dhs, flags):
    return g, dhs, dataclasses.replace(flags, resets=None)


def faults_of(name, seed, *changes):
    """change's name -> the function it is a fault of, and the fault."""
    return {change.__name__: (name, seed(change)) for change in changes}


FAULTS = {
    **faults_of(
        "step_vjp",
        of_step,
        no_kept_state,
        no_update_gate_path,
        no_reset_gate_path,
        no_candidate_path,
        candidate_path_not_gated,
    ),
    **faults_of(
        "coefficients",
        of_coefficients,
        update_gate_sign,
        no_slope_of_reset_gate,
        half_slope_of_update_gate,
        no_slope_of_candidate,
    ),
    **faults_of("params_vjp", of_params, state_not_gated, last_step_lost, inputs_of_next_step),
    "scaled_recurrent_weights": ("params_vjp", scaled_recurrent_weights),
    "bias_of_one_row": ("params_vjp", bias_of_one_row),
    "wrong_block_of_inputs": ("inputs_vjp", wrong_block_of_inputs),
    "neighbour_state": ("Flags.states_before", neighbour_state),
    **faults_of(
        "reverse_scan",
        of_loop,
        final_state_ignored,
        outputs_one_step_late,
        mask_ignored,
        resets_ignored,
    ),
}


def no_reset_gate_in_tangent(original):
    def faulty(recurrent, c, th, e):
        first, *others = recurrent.w
        first = first.at[:, : th.shape[-1]].set(0)
        return original(dataclasses.replace(recurrent, w=(first, *others)), c, th, e)

    return faulty


def no_recurrent_weights_in_input_tangent(original):
    def faulty(params, tparams, xs, txs, gates, h_tm1, dropout):
        return original(
            params, dataclasses.replace(tparams, w_h=None), xs, txs, gates, h_tm1, dropout
        )

    return faulty


def input_tangent_of_half_the_inputs(original):
    def faulty(params, tparams, xs, txs, gates, h_tm1, dropout):
        return original(params, tparams, 0.5 * xs, txs, gates, h_tm1, dropout)

    return faulty


AFTER = {
    **faults_of("step_vjp", of_step, no_product_path, no_reset_gate_path),
    **faults_of("coefficients", of_coefficients, product_not_gated, update_gate_sign),
    **faults_of("params_vjp", of_params, bias_inside_the_gate),
    "sums_swapped": ("gates_vjp", lambda original: lambda *args: original(*args)[::-1]),
}
WRITE = {
    **faults_of("coefficients", of_coefficients, kept_state_of_the_other_convention),
    **faults_of("coefficients", of_coefficients, update_gate_sign),
}


def dropout_ignored(original):
    return lambda weights, *rest: original(dataclasses.replace(weights, dropout=None), *rest)


def dropout_ignored_by_weights(original):
    def faulty(params, xs, gates, h_tm1, da, du, dropout):
        return original(params, xs, gates, h_tm1, da, du, None)

    return faulty


def zoned_out_units_written(original):
    """The backward that takes the mask without the units that zoneout leaves as they are."""

    def faulty(config, transposed, g, c, dhs, inputs):
        mask = inputs.flags.mask.any(axis=-1, keepdims=True)
        inputs = inputs._replace(flags=dataclasses.replace(inputs.flags, mask=mask))
        return original(config, transposed, g, c, dhs, inputs)

    return faulty


def cut_ignored(g, dhs, flags):
    return g, dhs, dataclasses.replace(flags, cuts=None)


def norms_of_the_wrong_gate(original):
    def faulty(transposed, c, dnew):
        r, z, n = c.norms
        return original(transposed, c._replace(norms=(z, r, n)), dnew)

    return faulty


def layer_norm_scale_of_inputs_ignored(original):
    def faulty(params, w_x_t, xs, da):
        return original(dataclasses.replace(params, g_x=None), w_x_t, xs, da)

    return faulty


def mean_of_zoneout_not_kept(original):
    """The share of the old state gets no cotangent."""
    return lambda flags, dh: (original(flags, dh)[0], None)


def norm_without_its_mean(original):
    def faulty(d, scale, norm):
        wrong = original(d, scale, norm)
        return wrong if scale is None else wrong + 0.1 * norm.i

    return faulty


def layer_norm_scale_not_normalized(original):
    def faulty(g, da, norms):
        right = original(g, da, norms)
        return None if right is None else 1.01 * right

    return faulty


# Each with what it acts on alone: all of it together would take thrice as long to compile.
KEY = {"key": jax.random.key(3)}
DROPOUT, ZONEOUT = KEY | {"recurrent_dropout": 0.4}, KEY | {"zoneout": 0.3}
MEAN = {"zoneout": 0.3, "deterministic": True}
EVERYTHING = DROPOUT | ZONEOUT | {"truncate": 2}
INSIDE = {
    "mean_of_zoneout_not_kept": ("flags.Flags.leave_vjp", mean_of_zoneout_not_kept, MEAN),
    "norm_without_its_mean": ("derivatives.normalize_vjp", norm_without_its_mean, "layer_norm"),
    "layer_norm_scale_not_normalized": (
        "derivatives._scale_rows",
        layer_norm_scale_not_normalized,
        "layer_norm",
    ),
    "dropout_ignored_by_tangent": ("tangent.step_jvp", dropout_ignored, DROPOUT),
    "dropout_ignored": ("bptt.step_vjp", dropout_ignored, DROPOUT),
    "dropout_ignored_by_weights": ("bptt.params_vjp", dropout_ignored_by_weights, DROPOUT),
    "zoned_out_units_written": ("bptt.reverse_scan", zoned_out_units_written, ZONEOUT),
    "cut_ignored": ("bptt.reverse_scan", of_loop(cut_ignored), {"truncate": 2}),
    "norms_of_the_wrong_gate": ("bptt.step_vjp", norms_of_the_wrong_gate, "layer_norm"),
    "layer_norm_scale_of_inputs_ignored": (
        "bptt.inputs_vjp",
        layer_norm_scale_of_inputs_ignored,
        "layer_norm",
    ),
}
TANGENT = {
    "no_reset_gate_in_tangent": ("step_jvp", no_reset_gate_in_tangent),
    "no_recurrent_weights_in_input_tangent": (
        "step_jvp_inputs",
        no_recurrent_weights_in_input_tangent,
    ),
    "input_tangent_of_half_the_inputs": ("step_jvp_inputs", input_tangent_of_half_the_inputs),
}


def break_rule(monkeypatch, place, mutate):
    """Replaces what is at a place in `jaxgru.core` by its mutation."""
    monkeypatch.setattr(
        f"jaxgru.core.{place}", mutate(pkgutil.resolve_name(f"jaxgru.core.{place}"))
    )


def run_check(fn, spec=CHO_2014, layer_norm=False, inside=None, **options):
    keys = jax.random.split(jax.random.key(7), 4)
    params = init_gru(keys[0], 2, 3, scheme="pytorch", layer_norm=layer_norm)
    xs, h0 = jax.random.normal(keys[1], (5, 2, 2)), jax.random.normal(keys[2], (2, 3))
    options = {"num_cotangents": 1, "finite_differences": False, **options}
    choices = {"spec": spec, **(inside or {})}
    reference = functools.partial(plain, gradient="autodiff", **choices)
    return check_gradients(functools.partial(fn, **choices), reference, params, xs, h0, **options)


def plain(params, xs, h0, **choices):
    mask = jnp.array([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1]], bool)
    resets = jnp.array([[0, 0], [0, 0], [1, 0], [0, 1], [0, 0]], bool)
    return flat(recurrence.gru)(params, xs, h0, mask=mask, resets=resets, **choices)


def test_faults_of_the_fast_tier_are_faults():
    changes = {"not_a_number"}  # of the rule's results, further below
    assert {*FAULTS, *AFTER, *WRITE, *TANGENT, *INSIDE, *changes} >= FAST


@pytest.mark.parametrize("chunk_size", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_unbroken_rule_passes(chunk_size):
    assert run_check(functools.partial(plain, chunk_size=chunk_size)).passed


@pytest.mark.parametrize("fault", cases(FAULTS))
def test_fault_is_caught_in_both_precisions(fault, monkeypatch):
    name, mutate = FAULTS[fault]
    break_rule(monkeypatch, f"{'flags' if 'Flags' in name else 'bptt'}.{name}", mutate)
    report = run_check(plain)
    assert {row.dtype for row in report.failures if row.reason == "value"} == {"float32", "float64"}


@pytest.mark.parametrize(
    ("spec", "gradient", "fault"),
    cases(
        [
            *((PYTORCH, "bptt", fault) for fault in AFTER.items()),
            *((CHUNG_2014, "bptt", fault) for fault in WRITE.items()),
            *(
                (spec, "tangent", fault)
                for spec in (CHO_2014, PYTORCH)
                for fault in TANGENT.items()
            ),
        ],
        lambda case: f"{case[0].reset}-{case[0].update}-{case[1]}-{case[2][0]}",
    ),
)
def test_fault_of_another_equation_or_rule_is_caught(spec, gradient, fault, monkeypatch):
    name, mutate = fault[1]
    break_rule(monkeypatch, f"{gradient}.{name}", mutate)
    report = run_check(functools.partial(plain, gradient=gradient), spec=spec)
    assert {row.dtype for row in report.failures if row.reason == "value"} == {"float32", "float64"}


def test_unbroken_rule_with_all_that_acts_inside_passes():
    assert run_check(plain, inside=EVERYTHING, layer_norm=True).passed


@pytest.mark.parametrize("fault", cases(INSIDE))
def test_fault_of_what_acts_inside_the_recurrence_is_caught(fault, monkeypatch):
    place, mutate, inside = INSIDE[fault]
    break_rule(monkeypatch, place, mutate)
    fn = functools.partial(plain, gradient="tangent") if "step_jvp" in place else plain
    layer_norm = inside == "layer_norm"
    report = run_check(fn, layer_norm=layer_norm, inside=None if layer_norm else inside)
    assert {row.dtype for row in report.failures if row.reason == "value"} == {"float32", "float64"}


def broken_rule(change):
    """The "bptt" rule with its results passed through change(cotangents of params, xs, h0)."""
    rule = jax.custom_vjp(bptt.bptt.fun, nondiff_argnums=(0,))

    def bwd(static, residuals, cotangents):
        dparams, dxs, dh0, *rest = bptt._backward(static, residuals, cotangents)
        return (*change(dparams, dxs, dh0), *rest)

    rule.defvjp(bptt._forward, bwd, symbolic_zeros=True)
    return rule


def rounded(dparams, dxs, dh0):
    return dataclasses.replace(dparams, w_h=dparams.w_h.astype(jnp.float16)), dxs, dh0


def initial_state_forgotten(dparams, dxs, dh0):
    return dparams, dxs, jnp.zeros_like(dh0)


def swapped_biases_scaled(dparams, dxs, dh0):
    return (
        dataclasses.replace(dparams, b_h=2 * dparams.b_h),
        dxs,
        dh0,
    )


def not_a_number(dparams, dxs, dh0):
    return dataclasses.replace(dparams, w_x=dparams.w_x.at[0, 0].set(jnp.nan)), dxs, dh0


@pytest.mark.parametrize(
    ("change", "reason"),
    cases(
        [
            (rounded, "dtype"),
            (initial_state_forgotten, "value"),
            (swapped_biases_scaled, "value"),
            (not_a_number, "non-finite"),
        ],
        lambda case: case[0].__name__,
    ),
)
def test_wrong_result_of_the_rule_is_caught_in_both_precisions(change, reason, monkeypatch):
    monkeypatch.setattr(recurrence, "bptt", broken_rule(change))
    report = run_check(plain)
    assert {row.dtype for row in report.failures if row.reason == reason} == {"float32", "float64"}


def test_float32_gradient_of_a_bfloat16_parameter_is_caught(monkeypatch):
    def widened(dparams, dxs, dh0):
        return dataclasses.replace(dparams, w_x=dparams.w_x.astype(jnp.float32)), dxs, dh0

    monkeypatch.setattr(recurrence, "bptt", broken_rule(widened))
    report = run_check(plain, dtypes=("bfloat16",))
    assert [row.leaf for row in report.failures if row.reason == "dtype"] == (
        ["params.w_x"] * sum(row.reason == "dtype" for row in report.failures)
    )
    assert "dtype" in {row.reason for row in report.failures}


def test_lost_carry_between_chunks_is_caught(monkeypatch):
    original = bptt.reverse_scan

    def faulty(config, transposed, g, *rest):
        return original(config, transposed, jnp.zeros_like(g), *rest)

    monkeypatch.setattr(bptt, "reverse_scan", faulty)
    report = run_check(functools.partial(plain, chunk_size=2))
    assert {row.dtype for row in report.failures if row.reason == "value"} == {"float32", "float64"}


def test_grid_names_the_case_that_fails(monkeypatch):
    """check_gru says which of its points failed: here only the one that redoes its gates."""
    from jaxgru.checks.gru import check_gru

    original = bptt.step

    def faulty(recurrent, a, h):
        h, gates = original(recurrent, a, h)
        bulk = a[0].ndim == 3
        return h, gates._replace(r=gates.r * 0.9) if bulk else gates

    monkeypatch.setattr(bptt, "step", faulty)
    params = init_gru(jax.random.key(0), 2, 3, scheme="pytorch")
    xs = jax.random.normal(jax.random.key(1), (4, 2, 2))
    report = check_gru(
        params, xs, specs=[CHO_2014], reverses=[False],
        gradients=[BPTT("gates"), BPTT("states")],
        dtypes=("float64",), finite_differences=False, num_cotangents=1,
    )  # fmt: skip
    assert {row.case for row in report.failures} == {"before keep tanh BPTT residuals=states"}
    assert "residuals=states" in str(report)
