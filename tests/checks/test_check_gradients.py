"""The checker accepts correct derivative rules and names the fault of each wrong one."""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgru import CHO_2014, checks, init_gru
from jaxgru.checks import check_gradients

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture
def compiled(uncompiled):
    """Everything is compiled, but not optimised."""
    with jax.disable_jit(False):
        yield


class Params(NamedTuple):
    w: jax.Array
    b: jax.Array | None


def reference(params, x):
    """A tanh layer over time: (last row, all rows)."""
    h = jnp.tanh(x @ params.w + (0.0 if params.b is None else params.b[None]))
    return h[-1], h


def gradients(params, x, h, d_last, d_all):
    da = (d_all.at[-1].add(d_last)) * (1 - h) * (1 + h)
    return Params(x.T @ da, None if params.b is None else da.sum(0)), da @ params.w.T


def make_rule(fault=lambda grads, *context: grads, primal=reference, forward=reference):
    """The layer with its derivative written by hand, then spoilt by `fault`."""

    @jax.custom_vjp
    def layer(params, x):
        return primal(params, x)

    def layer_fwd(params, x):
        return forward(params, x), (params, x, reference(params, x)[1])

    def layer_bwd(residuals, cotangents):
        params, x, h = residuals
        grads = gradients(params, x, h, *cotangents)
        return fault(grads, params, x, h, *cotangents)

    layer.defvjp(layer_fwd, layer_bwd)
    return layer


def arguments(dtype=jnp.float32, bias=True):
    draw = np.random.default_rng(7)
    # Small: where tanh saturates, rounding h to half precision moves 1 - h^2 by more than 2e-2.
    w, b, x = draw.uniform(-0.3, 0.3, (4, 5)), draw.uniform(-0.3, 0.3, 5), draw.normal(size=(3, 4))
    w, b, x = (jnp.asarray(v.astype(dtype)) for v in (w, b, x))
    return Params(w, b if bias else None), x


@functools.cache
def report_of(fault=None):
    """Of a rule with that fault; finite differences probe every coordinate."""
    rule = make_rule() if fault is None else make_rule(fault)
    return check_gradients(rule, reference, *arguments(), num_coordinates=20)


def failing(report, **fields):
    """The failures whose fields have the given values."""
    rows = map(dataclasses.asdict, report.failures)
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


# Correct rules


@pytest.mark.parametrize(
    ("dtype", "bias"),
    [
        (jnp.float32, True),
        (jnp.bfloat16, False),
        pytest.param(jnp.float16, True, marks=pytest.mark.slow),
        pytest.param(jnp.float32, False, marks=pytest.mark.slow),
    ],
)
def test_correct_rule_passes_in_the_callers_dtype_and_in_float64(dtype, bias):
    report = check_gradients(make_rule(), reference, *arguments(dtype, bias))
    report.raise_if_failed()
    assert {row.dtype for row in report.rows} == {jnp.dtype(dtype).name, "float64"}
    assert 0 < report.max_error("float64", "finite-difference") < 1e-6
    assert 0 < report.max_error(jnp.dtype(dtype).name, "autodiff") < 2e-2
    leaves = {row.leaf for row in report.rows if row.reference == "autodiff"}
    assert leaves == {"params.w", "x"} | ({"params.b"} if bias else set())


def test_float64_caller_is_checked_once():
    with jax.enable_x64(True):
        report = check_gradients(make_rule(), reference, *arguments(jnp.float64))
        assert report and {row.dtype for row in report.rows} == {"float64"}
        rows = [(row.reference, row.cotangent, row.leaf) for row in report.rows]
        assert len(set(rows)) == len(rows)


def test_jitted_rule_passes_in_both_modes_and_keeps_its_dtype_afterwards(compiled):
    fn, args = jax.jit(make_rule()), arguments()
    before = fn(*args)
    check_gradients(fn, jax.jit(reference), *args).raise_if_failed()
    after = fn(*args)
    assert [leaf.dtype for leaf in after] == [jnp.float32] * 2
    np.testing.assert_array_equal(after[1], before[1])


def test_each_kind_of_cotangent_is_drawn():
    report = check_gradients(make_rule(), reference, *arguments(), num_cotangents=2)
    assert {row.cotangent for row in report.rows if row.reference == "autodiff"} == {
        "random[0]", "random[1]", "only[out[0]]", "only[out[1]]", "zero",
        "one-hot[out[0]][0]", "one-hot[out[0]][4]",
        "one-hot[out[1]][0, 0]", "one-hot[out[1]][2, 4]",
    }  # fmt: skip


def test_constants_of_every_kind_reach_both_functions_untouched():
    def plain(x, count, flip, nothing, name, mask, key):
        assert type(count) is int and flip is True and nothing is None and name == "sin"
        noise = jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
        return {"y": jnp.where(mask, count * jnp.sin(x) + noise, x), "n": mask.sum(), "key": key}

    args = (jnp.arange(3.0), 2, True, None, "sin", np.array([1, 0, 1], bool), jax.random.key(1))
    fn = jax.custom_vjp(plain, nondiff_argnums=(1, 2, 3, 4))
    fn.defvjp(
        lambda x, count, flip, nothing, name, mask, key: (
            plain(x, count, flip, nothing, name, mask, key),
            (x, mask),
        ),
        lambda count, flip, nothing, name, residuals, d: (
            jnp.where(residuals[1], count * jnp.cos(residuals[0]), 1) * d["y"],
            None,
            None,
        ),
    )
    report = check_gradients(fn, plain, *args)
    report.raise_if_failed()
    assert {row.leaf for row in report.rows if row.reference == "autodiff"} == {"x"}
    assert {row.leaf for row in report.rows if row.reference == "primal"} == {
        "out['y']", "out['n']", "out['key']"
    }  # fmt: skip


def test_empty_leaf_and_scalar_leaf_pass():
    def plain(x, s):
        return jnp.sum(x) + jnp.exp(s)

    fn = jax.custom_vjp(plain)
    fn.defvjp(
        lambda x, s: (plain(x, s), (x, jnp.exp(s))),
        lambda residuals, d: (jnp.full_like(residuals[0], d), d * residuals[1]),
    )
    assert check_gradients(fn, plain, jnp.zeros((0, 2)), jnp.array(0.5))


def test_vanishing_gradient_is_not_blamed_on_rounding_of_the_quotients():
    def plain(x):
        return 1.0 + 1e-6 * jnp.sin(x)

    fn = jax.custom_vjp(plain)
    fn.defvjp(lambda x: (plain(x), x), lambda x, d: (1e-6 * jnp.cos(x) * d,))
    report = check_gradients(fn, plain, jnp.linspace(0.1, 1.0, 5))
    assert report.max_error("float64", "finite-difference") > 1e-6
    report.raise_if_failed()


# Faults of the rule


def scaled(grads, *_):
    return Params(1.01 * grads[0].w, grads[0].b), grads[1]


def negated(grads, *_):
    return grads[0], -grads[1]


def without_last(grads, params, x, h, d_last, d_all):
    return gradients(params, x, h, jnp.zeros_like(d_last), d_all)


def summed_wrong(grads, params, x, h, d_last, d_all):
    da = d_all * (1 - h) * (1 + h)
    return Params(grads[0].w, da.sum(0)), grads[1]


def offset_by_one_entry(grads, *_):
    return Params(grads[0].w.at[2, 3].add(1.0), grads[0].b), grads[1]


FAULTS = {
    scaled: {"params.w"},
    negated: {"x"},
    without_last: {"params.w", "params.b", "x"},
    summed_wrong: {"params.b"},
    offset_by_one_entry: {"params.w"},
}


@pytest.mark.parametrize(
    ("fault", "leaves"), FAULTS.items(), ids=lambda f: getattr(f, "__name__", "")
)
def test_wrong_values_are_found_in_the_faulty_leaves_alone(fault, leaves):
    report = report_of(fault)
    assert not report
    for dtype in ("float32", "float64"):
        assert {row["leaf"] for row in failing(report, reason="value", dtype=dtype)} == leaves
    assert {row["leaf"] for row in failing(report, reason="finite-difference")} == leaves
    assert {row.reason for row in report.failures} == {"value", "finite-difference"}


def test_scale_of_one_percent_passes_bfloat16_but_not_float64():
    report = check_gradients(make_rule(scaled), reference, *arguments(jnp.bfloat16))
    assert {row.dtype for row in report.failures} == {"float64"}
    error = max(row["error"] for row in failing(report, reason="value"))
    np.testing.assert_allclose(error, 0.01, rtol=1e-6)


def test_row_reports_the_worst_entry_and_its_errors():
    report = report_of(offset_by_one_entry)
    (row,) = failing(report, reason="value", dtype="float64", cotangent="random[1]")
    assert row["index"] == (2, 3)
    np.testing.assert_allclose(row["actual"] - row["expected"], 1.0)
    np.testing.assert_allclose(row["absolute"], 1.0)
    np.testing.assert_allclose(row["element_error"], 1.0 / abs(row["expected"]))
    assert row["error"] < row["element_error"]


def test_finite_difference_row_names_the_coordinate_of_the_leaf():
    report = report_of(offset_by_one_entry)
    assert {row["index"] for row in failing(report, reason="finite-difference")} == {(2, 3)}


def test_finite_differences_sample_holds_the_largest_entry():
    def plain(x):
        return jnp.sum(x.at[77].multiply(1e3) ** 2)

    fn = jax.custom_jvp(plain)  # a tangent rule wrong at one entry, shared by both functions
    fn.defjvp(lambda x, t: (plain(*x), jax.jvp(plain, x, (t[0].at[77].multiply(2),))[1]))
    report = check_gradients(fn, fn, jnp.ones(100), num_coordinates=1)
    assert {row.index for row in report.failures} == {(77,)}


def test_fault_shared_with_the_reference_is_found_by_finite_differences_alone():
    wrong = make_rule(negated)
    report = check_gradients(wrong, wrong, *arguments())
    assert {(row.reason, row.leaf) for row in report.failures} == {("finite-difference", "x")}
    assert check_gradients(wrong, wrong, *arguments(), finite_differences=False)


def test_fault_in_the_final_state_cotangent_shows_where_that_one_is_not_zero():
    report = report_of(without_last)
    failed = {row.cotangent for row in report.failures}
    assert "only[out[0]]" in failed and "one-hot[out[0]][0]" in failed
    assert not failed & {"only[out[1]]", "one-hot[out[1]][0, 0]", "zero"}


def widened(grads, *_):
    return Params(grads[0].w.astype(jnp.float32), grads[0].b), grads[1]


def test_float32_gradient_of_a_bfloat16_leaf_is_a_dtype_failure_and_still_compared():
    report = check_gradients(make_rule(widened), reference, *arguments(jnp.bfloat16))
    rows = failing(report, dtype="bfloat16")
    assert {(row["reason"], row["leaf"]) for row in rows} == {("dtype", "params.w")}
    assert {(row["actual"], row["expected"]) for row in rows} == {("float32", "bfloat16")}
    compared = [row for row in report.rows if row.dtype == "bfloat16" and row.leaf == "params.w"]
    assert any(row.ok and row.error > 0 for row in compared)


def test_wrong_dtype_and_wrong_value_are_both_reported():
    def both(grads, *_):
        return widened((Params(-grads[0].w, grads[0].b), grads[1]))

    report = check_gradients(make_rule(both), reference, *arguments(jnp.bfloat16))
    assert {row["reason"] for row in failing(report, dtype="bfloat16")} == {"dtype", "value"}


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_equal_non_finite_gradients_on_both_sides_fail(poison):
    def poisoned(grads, *_):
        return Params(grads[0].w.at[1, 2].set(poison), grads[0].b), grads[1]

    fn = make_rule(poisoned)
    report = check_gradients(fn, fn, *arguments(), finite_differences=False)
    assert {(row.reason, row.leaf, row.index) for row in report.failures} == {
        ("non-finite", "params.w", (1, 2))
    }
    assert {row.cotangent for row in report.rows if row.reference == "autodiff"} == {
        row.cotangent for row in report.failures
    }


def test_nan_of_the_reference_alone_fails():
    report = check_gradients(
        lambda x: x, lambda x: x * jnp.array([1, np.nan], x.dtype), jnp.ones(2)
    )
    rows = failing(report, reference="autodiff", cotangent="random[0]")
    assert {(row["reason"], row["index"]) for row in rows} == {("non-finite", (1,))}


def test_zero_cotangent_must_give_exactly_zero():
    def leaking(grads, *_):
        return grads[0], grads[1] + 1e-30

    report = check_gradients(make_rule(leaking), reference, *arguments())
    assert {(row.reason, row.cotangent, row.leaf) for row in report.failures} == {
        ("value", "zero", "x")
    }


def test_rule_that_differs_between_runs_is_a_rerun_failure(compiled):
    calls = []

    def drifting(grads, *_):
        def drift(value):
            calls.append(None)
            return value + np.asarray(1e-7 * (len(calls) % 2), value.dtype)

        b = grads[0].b
        return Params(grads[0].w, jax.pure_callback(drift, b, b)), grads[1]

    report = check_gradients(make_rule(drifting), reference, *arguments(), dtypes=("caller",),
                             finite_differences=False, tolerances={"float32": 1e-3})  # fmt: skip
    assert ("rerun", "params.b") in {(row.reason, row.leaf) for row in report.failures}
    assert {row.leaf for row in report.failures} == {"params.b"}


@pytest.mark.parametrize("place", ["primal", "forward"])
def test_wrong_output_of_plain_call_and_of_forward_rule_are_told_apart(place):
    def wrong(params, x):
        return reference(params, x)[0] + 0.5, reference(params, x)[1]

    report = check_gradients(make_rule(**{place: wrong}), reference, *arguments())
    assert {(row.reference, row.reason, row.leaf) for row in report.failures} == {
        (place, "primal", "out[0]")
    }


def test_wrong_integer_output_fails():
    report = check_gradients(lambda x: (x, jnp.array(1000001)), lambda x: (x, jnp.array(1000000)),
                             jnp.ones(2))  # fmt: skip
    assert {(row.dtype, row.reason, row.leaf) for row in report.failures} == {
        ("float32", "primal", "out[1]"),
        ("float64", "primal", "out[1]"),
    }


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: (jnp.sin(x),), "structure"),
        (lambda x: jnp.sin(x)[None], "shape"),
        (lambda x: jnp.sin(x).astype(jnp.bfloat16), "dtype"),
    ],
)
def test_output_unlike_the_references_is_a_failure_not_an_exception(fn, reason):
    report = check_gradients(fn, jnp.sin, jnp.ones(2))
    assert reason in {row.reason for row in report.failures}
    assert {row.reference for row in report.rows} == {"primal"}


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x: {"y": jnp.sin(x)}, r"fn returns structure PyTreeDef\(\{'y': \*\}\), reference"),
        (lambda x: jnp.sin(x)[None], r"fn returns shape \(1, 2\) at out, reference returns \(2,\)"),
        (lambda x: x.astype(jnp.bfloat16), r"fn returns dtype bfloat16 at out, reference returns"),
    ],
)
def test_second_line_says_how_to_make_the_outputs_comparable(fn, words):
    line = str(check_gradients(fn, jnp.sin, jnp.ones(2))).splitlines()[1]
    assert re.match(f"check_gradients: {words}.*: make it return the same pytree", line), line


def test_second_line_names_the_forward_rule_where_only_that_one_is_wrong():
    row = checks.GradientRow("float32", "forward", 1e-5, "dtype", leaf="out[0]", actual="bfloat16",
                            expected="float32")  # fmt: skip
    line = str(checks.GradientReport((row,))).splitlines()[1]
    assert line.startswith(
        "check_gradients: the forward rule of fn returns dtype bfloat16 at out[0]"
    )


def test_advice_about_outputs_is_not_given_for_gradients():
    options = {"dtypes": "caller", "finite_differences": False}
    report = check_gradients(make_rule(widened), reference, *arguments(jnp.bfloat16), **options)
    assert str(report).count("check_gradients: ") == 1
    assert {row.reason for row in report.failures} == {"dtype"}
    assert "\nparams.w  WRONG  " in str(report)


def test_nan_under_a_mask_that_reaches_no_output_is_legal():
    def masked(x):
        return jnp.where(jnp.isnan(x), jnp.zeros_like(x), x) ** 2

    check_gradients(masked, masked, jnp.array([0.5, jnp.nan])).raise_if_failed()


def test_gradient_of_a_wrong_shape_is_refused_by_jax():
    def cut(grads, *_):
        return grads[0], grads[1][:1]

    with pytest.raises(ValueError, match="shapes do not match"):
        check_gradients(make_rule(cut), reference, *arguments())


# The process's 64-bit mode


@pytest.mark.parametrize("enabled", [False, True])
def test_64_bit_mode_is_restored(enabled):
    jax_enable_x64 = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", enabled)
    try:
        check_gradients(make_rule(), reference, *arguments(), num_cotangents=1).raise_if_failed()
        assert jax.config.jax_enable_x64 is enabled
        assert jnp.zeros(1).dtype == (jnp.float64 if enabled else jnp.float32)
    finally:
        jax.config.update("jax_enable_x64", jax_enable_x64)


def test_64_bit_mode_is_restored_after_an_exception_inside_it():
    seen, before = [], jax.config.jax_enable_x64

    def broken(x):
        seen.append(x.dtype)
        if x.dtype == jnp.float64:
            raise RuntimeError("broken")
        return jnp.sin(x)

    with pytest.raises(RuntimeError, match="broken"):
        check_gradients(broken, jnp.sin, jnp.ones(2, jnp.float32))
    assert seen[-1] == jnp.float64
    assert jax.config.jax_enable_x64 is before


# Report


def test_report_of_a_failure_begins_with_a_verdict_and_a_line_for_each_leaf():
    report = report_of(offset_by_one_entry)
    lines = str(report).splitlines()
    count = len(report.failures)
    assert lines[0].startswith(f"check_gradients: FAILED, {count} of {len(report.rows)} ")
    verdicts = dict(line.split()[:2] for line in lines[3:8])
    assert verdicts == {"params.w": "WRONG"} | dict.fromkeys(
        ("params.b", "x", "out[0]", "out[1]"), "right"
    )
    failed = lines[lines.index("params.w:") + 1 :]
    assert {tuple(line.split()[:3]) for line in failed[:3]} == {
        ("value", "float32", "autodiff"), ("value", "float64", "autodiff"),
        ("value", "float64", "finite-difference"),
    }  # fmt: skip
    assert all("[2, 3]" in line for line in failed[:3])
    assert failed[3] == f"... and {count - 3} more rows in .failures"
    assert max(map(len, lines)) <= 100


def test_report_of_a_passed_check_has_one_line_for_each_leaf_and_a_legend():
    report = report_of()
    lines = str(report).splitlines()
    assert lines[0] == f"check_gradients: passed, all {len(report.rows)} comparisons agree."
    assert {line.split()[0] for line in lines[3:8]} == {row.leaf for row in report.rows}
    for word in ("error", "limit", "index", *(row.reference for row in report.rows)):
        assert any(word in line for line in lines[9:]), word


def test_three_random_cotangents_and_three_others_are_tried_by_default():
    report = check_gradients(jnp.sin, jnp.sin, jnp.ones(12))
    tried = [row.cotangent for row in report.rows if row.reference == "finite-difference"]
    others = ["one-hot[out][0]", "one-hot[out][11]", "zero"]
    assert sorted(tried) == sorted([*others, *(f"random[{n}]" for n in range(3))])


def test_row_that_compares_no_numbers_has_errors_of_zero():
    row = checks.GradientRow("float32", "autodiff", 1e-5, "")
    assert (row.actual, row.expected) == (0.0, 0.0)
    assert (row.absolute, row.error, row.element_error) == (0.0, 0.0, 0.0)
    assert row.ok and row.index is None
    assert (row.case, row.cotangent, row.leaf) == ("-", "-", "")


def test_tables_are_aligned_and_failures_come_first():
    row = checks.GradientRow
    numbers = {"actual": 1.0, "expected": 1.0, "absolute": 1e-7, "error": 1e-7}
    passed = row("float32", "autodiff", 1e-5, "", cotangent="random[0]", leaf="x", index=(1, 2),
                 element_error=2e-7, **numbers)  # fmt: skip
    numbers = {"actual": 2.0, "expected": 1.0, "absolute": 1.0, "error": 0.5}
    wrong = row("float32", "autodiff", 1e-5, "value", leaf="params.w", index=(0,), case="reverse",
                element_error=1.0, **numbers)  # fmt: skip
    numbers = dict.fromkeys(("absolute", "error", "element_error"), np.inf)
    shape = row("float64", "forward", 1e-10, "shape", leaf="out", actual=(2,), expected=(3,),
                **numbers)  # fmt: skip
    assert str(checks.GradientReport((passed, wrong, shape))).splitlines()[:-5] == [
        "check_gradients: FAILED, 2 of 3 comparisons disagree (shape 1, value 1).",
        "check_gradients: the forward rule of fn returns shape (2,) at out, reference returns "
        "(3,): make it return the same pytree, shapes and dtypes as reference.",
        "",
        "leaf      verdict  error    limit    dtype    reference",
        "out       WRONG    inf      1.0e-10  float64  forward",
        "params.w  WRONG    5.0e-01  1.0e-05  float32  autodiff",
        "x         right    1.0e-07  1.0e-05  float32  autodiff",
        "",
        "  reason  dtype    reference  index  actual  expected  error    limit    cotangent",
        "out:",
        "  shape   float64  forward    -      (2,)    (3,)      inf      1.0e-10  -",
        "params.w of reverse:",
        "  value   float32  autodiff   [0]    2       1         5.0e-01  1.0e-05  -",
    ]


def test_table_shows_the_worst_of_each_group():
    row = checks.GradientRow(
        "float32", "autodiff", 1e-5, "", cotangent="small", leaf="x", error=1e-9
    )
    worse = dataclasses.replace(row, cotangent="large", error=1e-6)
    assert "1.0e-06" in str(checks.GradientReport((row, worse, row)))
    failed = [dataclasses.replace(each, reason="value") for each in (row, worse, row)]
    text = str(checks.GradientReport(tuple(failed)))
    assert "large" in text and "small" not in text


def test_table_says_how_many_failures_it_leaves_out():
    row = checks.GradientRow("float32", "autodiff", 1e-5, "value", error=1.0)
    rows = [dataclasses.replace(row, leaf=f"x[{n}]") for n in range(50)]
    text = str(checks.GradientReport((*rows, *rows)))
    assert "... and 60 more rows in .failures" in text and "100 of 100" in text


def test_raise_if_failed_carries_the_table():
    report = report_of(negated)
    with pytest.raises(AssertionError, match="FAILED") as caught:
        report.raise_if_failed()
    assert str(report) in str(caught.value)


def test_max_error_selects_dtype_and_reference():
    report = report_of(negated)
    np.testing.assert_allclose(report.max_error("float64", "autodiff"), 2.0, rtol=1e-6)
    assert report.max_error("float64", "primal") < 1e-10
    assert report.max_error() == max(row.error for row in report.rows)
    with pytest.raises(ValueError) as caught:
        report.max_error("float16", "primal")
    assert str(caught.value) == "max_error: no row has dtype='float16' and reference='primal'."


def test_report_without_rows_has_not_passed():
    with pytest.raises(AssertionError, match="0 of 0"):
        checks.GradientReport(()).raise_if_failed()


def test_key_decides_the_cotangents():
    def errors(seed):
        report = check_gradients(make_rule(scaled), reference, *arguments(), dtypes=("caller",),
                                 finite_differences=False, key=jax.random.key(seed))  # fmt: skip
        return [row.actual for row in report.rows if row.cotangent == "random[0]"]

    assert errors(1) == errors(1) != errors(2)


def test_tolerance_given_by_the_caller_decides():
    args, options = arguments(), {"dtypes": ("float32",), "finite_differences": False}
    fn = make_rule(scaled)
    assert check_gradients(fn, reference, *args, tolerances={"float32": 0.02}, **options)
    assert not check_gradients(fn, reference, *args, tolerances={"float32": 0.005}, **options)


def test_mixed_dtypes_are_judged_by_the_loosest():
    x = jnp.linspace(0.1, 1.0, 4)

    def sines(x, y):
        return jnp.sin(x), jnp.sin(y)

    report = check_gradients(sines, sines, x, x.astype(jnp.bfloat16))
    assert {(row.dtype, row.tolerance) for row in report.rows if row.reference == "primal"} == {
        ("bfloat16+float32", 2e-2), ("float64", 1e-10)
    }  # fmt: skip


def test_grid_of_nothing_is_refused():
    params, xs = init_gru(jax.random.key(0), 1, 1), np.ones((2, 1), np.float32)
    for name in ("specs", "reverses", "gradients"):
        with pytest.raises(ValueError) as caught:
            checks.check_gru(params, xs, **{name: []})
        assert str(caught.value) == "check_gru: specs, reverses and gradients must not be empty."
    with pytest.raises(TypeError, match=r"^check_gru: params must be a GRUParams, got tuple\.$"):
        checks.check_gru((params.w_x, params.w_h), xs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"specs": [CHO_2014, "cho"]},
          "specs[1] must be a GRUSpec, such as jaxgru.PYTORCH, got 'cho'."),
        ({"specs": "cho"}, "specs[0] must be a GRUSpec, such as jaxgru.PYTORCH, got 'cho'."),
        ({"reverses": [False, "no"]}, "reverses[1] must be a bool, got 'no'."),
        ({"mask": np.ones((2, 1))}, 
          "mask must be a bool array, got float64; length_mask makes one from lengths."),
        ({"gradients": "bp"}, "gradient must be one of 'bptt', 'tangent', 'autodiff', got 'bp'."),
        ({"h0": np.ones((1, 2), np.float32)},
         "h0 must have shape (1, 1) (the batch axes of xs, then H=1, the rows of params.w_h), got "
         "(1, 2)."),
        ({"noise": 0.5},
          "noise must be a Noise or None, got 0.5; pass its rates by name, "
          "Noise(recurrent_dropout=...)."),
    ],
)  # fmt: skip
def test_bad_option_of_check_gru_is_named_by_it(options, message):
    params, xs = init_gru(jax.random.key(0), 1, 1), np.ones((2, 1, 1), np.float32)
    with pytest.raises((TypeError, ValueError)) as caught:
        checks.check_gru(params, xs, **options)
    assert str(caught.value) == f"check_gru: {message}"


def test_one_value_is_a_sequence_of_one():
    params, xs = init_gru(jax.random.key(0), 1, 1), np.ones((2, 1), np.float32)
    report = checks.check_gru(
        params, xs, specs=CHO_2014, reverses=True, gradients="bptt", dtypes="float64",
        finite_differences=False, num_cotangents=1,
    )  # fmt: skip
    assert {(row.case, row.dtype) for row in report.rows} == {
        ("before keep tanh reverse BPTT", "float64")
    }


# Bad calls

ONE = np.ones(2, np.float32)
HOLES = np.ones((4, 5), np.float32), np.ones((3, 4), np.float32)
HOLES[0][1, 2], HOLES[1][0, 3] = np.nan, -np.inf
BAD_CALLS = [
    (TypeError, "check_gradients: fn must be callable, got int.", (3, jnp.sin, ONE), {}),
    (TypeError, "check_gradients: reference must be callable, got str.", (jnp.sin, "sin", ONE), {}),
    (TypeError, "check_gradients: args must hold real leaves, some of them floating, got "
                "['int32']; cast integers to a floating dtype, or pass them beside a floating "
                "argument.",
     (jnp.sin, jnp.sin, np.ones(2, np.int32)), {}),
    (TypeError, "check_gradients: args must hold real leaves, some of them floating, got "
                "['bool']; cast integers to a floating dtype, or pass them beside a floating "
                "argument.", (jnp.sin, jnp.sin, np.ones(2, bool)), {}),
    (TypeError, "check_gradients: args must hold real leaves, some of them floating, got "
                "['complex64']; pass and return real and imaginary parts as two real arrays.",
     (jnp.sin, jnp.sin, ONE.astype(np.complex64)), {}),
    (TypeError, "check_gradients: the reference's output must hold real leaves, some of them "
                "floating, got ['bool']; return a floating array: nothing else has a derivative.",
     (jnp.isnan, jnp.isnan, ONE), {}),
    (ValueError, "check_gradients: args must be finite where they reach the reference's output, "
                 "got params.w[1, 2] = nan, x[0, 3] = -inf in float32; replace them by finite "
                 "numbers, or mask them inside both functions.",
     (reference, reference, Params(HOLES[0], None), HOLES[1]), {}),
    (ValueError, "check_gradients: args must be finite where they reach the reference's output, "
                 "got x = inf in float32; replace them by finite numbers, or mask them inside "
                 "both functions.", (jnp.sin, jnp.sin, np.float32(np.inf)), {}),
    (ValueError, "check_gradients: args must be finite where they reach the reference's output, "
                 "got x[1] = inf in float16; replace them by finite numbers, or mask them inside "
                 "both functions.", (jnp.sin, jnp.sin, np.float32([1e4, 1e5])),
     {"dtypes": ("float16", "float64")}),
    (ValueError, "check_gradients: dtypes must name at least one dtype, got ().",
     (jnp.sin, jnp.sin, ONE), {"dtypes": ()}),
    (ValueError, "check_gradients: dtypes must be named by floating dtypes or 'caller', got "
                 "['int8', 'half-ish'].",
     (jnp.sin, jnp.sin, ONE), {"dtypes": ("int8", "half-ish")}),
    (ValueError, "check_gradients: dtypes must hold 'float64' for finite differences, got "
                 "('caller',); pass finite_differences=False to skip them.",
     (jnp.sin, jnp.sin, ONE), {"dtypes": ("caller",)}),
    (ValueError, "check_gradients: num_cotangents must be an integer >= 1, got 0.",
     (jnp.sin, jnp.sin, ONE), {"num_cotangents": 0}),
    (ValueError, "check_gradients: num_cotangents must be an integer >= 1, got 1.0.",
     (jnp.sin, jnp.sin, ONE), {"num_cotangents": 1.0}),
    (ValueError, "check_gradients: num_coordinates must be an integer >= 1, got 0.",
     (jnp.sin, jnp.sin, ONE), {"num_coordinates": 0}),
    (ValueError, "check_gradients: tolerances['float64'] must be positive, got inf.",
     (jnp.sin, jnp.sin, ONE), {"tolerances": {"float64": float("inf")}}),
    (ValueError, "check_gradients: dtypes must be named by floating dtypes or 'caller', got [3].",
     (jnp.sin, jnp.sin, ONE), {"dtypes": (3, "float64")}),
    (TypeError, "check_gradients: args must hold real leaves, some of them floating, got "
                "['int']; cast integers to a floating dtype, or pass them beside a floating "
                "argument.", (jnp.sin, jnp.sin, 2), {}),
    (ValueError, "check_gradients: args must be finite where they reach the reference's output, "
                 "got xs[0][0] = nan in float32; replace them by finite numbers, or mask them "
                 "inside both functions.",
     (lambda *xs: xs[0], lambda *xs: xs[0], ONE * np.float32(np.nan)), {}),
    (ValueError, "check_gradients: num_coordinates must be an integer >= 1, got 1.5.",
     (jnp.sin, jnp.sin, ONE), {"num_coordinates": 1.5}),
    (ValueError, "check_gradients: tolerances must be named by floating dtypes or "
                 "'finite-difference', got ['loose'].",
     (jnp.sin, jnp.sin, ONE), {"tolerances": {"loose": 1.0}}),
    (ValueError, "check_gradients: tolerances['float32'] must be positive, got 0.0.",
     (jnp.sin, jnp.sin, ONE), {"tolerances": {"float32": 0.0}}),
    (ValueError, "check_gradients: tolerances must hold ['float8_e4m3fn'], got ['float64', "
                 "'float32', 'float16', 'bfloat16', 'finite-difference'].",
     (jnp.sin, jnp.sin, ONE), {"dtypes": ("float8_e4m3fn", "float64")}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "message", "args", "options"), BAD_CALLS)
def test_bad_call_is_named(kind, message, args, options):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        check_gradients(*args, **options)
