"""The fused kernels: the values and gradients of the oracle, and of JAX's own derivative.

Here JAX's interpreter of GPU kernels runs them, and looks for races; on a machine with a Hopper GPU
`pytest -m gpu` runs the same tests compiled.
"""

import dataclasses
import functools
import itertools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Problem, assert_close, flat, oracle_pullback
from jaxlib.mlir import ir

import jaxgru
from jaxgru.core import recurrence
from jaxgru.core.parameters import CHO_2014, CHUNG_2014, PYTORCH, GRUParams, GRUSpec
from jaxgru.experimental.fused import hopper as chip_module
from jaxgru.experimental.fused import kernels, tiling
from jaxgru.experimental.fused.exchange import Board, ClusterBoard, MemoryBoard, board_kind
from jaxgru.experimental.fused.hopper import Chip
from jaxgru.experimental.fused.tiling import UNITS, cut
from jaxgru.stacks import init_taps

# Relative to the largest entry of a leaf. Operands of float32 carry 16 bits and reach 4e-6; half
# types reach what they do in the scan: they are rounded in the same places.
FLOAT32, HALF = 2e-5, 2e-2
SPECS = [GRUSpec(*choice) for choice in itertools.product(("before", "after"), ("keep", "write"))]
slow = pytest.mark.slow
both_resets = pytest.mark.parametrize("spec", [CHO_2014, PYTORCH], ids=["before", "after"])
in_newer_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="the interpreter of JAX 0.10 knows no clusters",
)

gru = flat(jaxgru.gru)


@pytest.fixture(params=["interpreted", pytest.param("fused", marks=pytest.mark.gpu)])
def backend(request, capfd, monkeypatch):
    """A backend that runs here, on its device; the interpreter must have seen no race."""
    if request.param == "fused":
        # Products outside the kernels would else be in TensorFloat-32; the kernels' stay.
        monkeypatch.setattr(recurrence, "count_terms", lambda d: 2 if d == jnp.float32 else 1)
        with jax.default_matmul_precision("highest"):
            yield request.param
        return
    with jax.default_device(jax.devices("cpu")[0]):
        yield request.param
    assert "RACE" not in capfd.readouterr().out


def small_problem(
    seed=0, *, steps=3, batch=(3,), inputs=2, hidden=5, bias="both", dtype=jnp.float32, gains=False
):
    """Random arguments of `gru`, made by NumPy, which compiles nothing; no size fills a tile.

    The first row is masked throughout, and resets fall on valid and on masked steps.
    """
    draw = np.random.default_rng(seed)

    def weights(*shape):
        return jnp.asarray((draw.uniform(-1, 1, shape) / np.sqrt(hidden)).astype(dtype))

    def normal(*shape):
        return jnp.asarray(draw.normal(size=shape).astype(dtype))

    mask = draw.random((steps, *batch)) < 0.7
    if batch and mask.size:
        mask.reshape(steps, -1)[:, 0] = False
    params = GRUParams(
        weights(inputs, 3 * hidden),
        weights(hidden, 3 * hidden),
        weights(3 * hidden) if bias in ("both", "b_x") else None,
        weights(3 * hidden) if bias in ("both", "b_h") else None,
        *([weights(3 * hidden)] * 2 if gains else []),
        spec=CHO_2014,
    )
    return Problem(
        params,
        normal(steps, *batch, inputs),
        normal(*batch, hidden),
        jnp.asarray(mask),
        jnp.asarray(draw.random((steps, *batch)) < 0.3),
        (normal(*batch, hidden), normal(steps, *batch, hidden)),
    )


def flags_of(problem) -> dict[str, Any]:
    """Both flags."""
    return {"mask": problem.mask, "resets": problem.resets}


def pull_back(problem, **choices):
    """(h_last, hs) and (dparams, dxs, dh0), compiled."""

    @jax.jit
    def run(params, xs, h0, cotangents):
        values, pull = jax.vjp(functools.partial(gru, **choices), params, xs, h0)
        return values, pull(cotangents)

    return run(problem.params, problem.xs, problem.h0, problem.cotangents)


@functools.cache
def jitted_with_flags(**choices):
    """The same with flags that are arguments too: compiled once for the tests of one shape."""

    @jax.jit
    def run(params, xs, h0, mask, resets, cotangents):
        whole = functools.partial(gru, mask=mask, resets=resets, **choices)
        values, pull = jax.vjp(whole, params, xs, h0)
        return values, pull(cotangents)

    return run


def assert_oracles(problem, spec, backend, *, tolerance=FLOAT32, policy=None, **case: Any):
    """Values and gradient are those of the oracle, in float64."""
    got = pull_back(problem, spec=spec, backend=backend, **case, **(policy or {}))
    assert_close(got, oracle_pullback(problem, spec, **case), tolerance)


ZONEOUT_AND_DROPOUT = {"zoneout": 0.4, "recurrent_dropout": 0.4, "key": 7}
MEAN_OF_ZONEOUT = {"zoneout": 0.4, "deterministic": True}
# Together: each reset and update, each flag, choice and kind of residuals, two slices in a block,
# two tiles of 16 rows, and both activations that the kernels write themselves. Slices and tiles are
# in two cases, since the interpreter compiles every slice of every tile for itself.
COVERING = {
    "before, keep": (
        GRUSpec("before", "keep"),
        {"hidden": 65},
        {**ZONEOUT_AND_DROPOUT, "truncate": 2},
        {"residuals": "gates"},
    ),
    "after, write": (
        GRUSpec("after", "write"),
        {"batch": (17,)},
        {**ZONEOUT_AND_DROPOUT, "truncate": 2, "reverse": True},
        {"residuals": "states"},
    ),
    "before, write": (
        GRUSpec("before", "write", "softplus"),
        {"batch": (2, 3), "bias": "none"},
        MEAN_OF_ZONEOUT,
        {"residuals": "gates", "chunk_size": 2},
    ),
    "after, keep": (
        GRUSpec("after", "keep", "relu"),
        {"batch": (), "bias": "b_x"},
        {**MEAN_OF_ZONEOUT, "reverse": True},
        {"residuals": "boundaries"},
    ),
}


@pytest.mark.parametrize("case", COVERING)
def test_all_choices_together_have_the_oracles_gradient(case, backend, monkeypatch):
    monkeypatch.setattr(tiling, "_BLOCKS", 2)  # so that tiles of a batch of 17 have 16 rows
    spec, sizes, inside, policy = COVERING[case]
    problem = small_problem(100 + len(case), **sizes)
    if "key" in inside:
        inside = {**inside, "key": jax.random.key(inside["key"])}
    assert_oracles(problem, spec, backend, policy=policy, **inside, **flags_of(problem))


POLICIES = [
    {"residuals": "gates"},
    {"residuals": "states"},
    {"residuals": "boundaries"},
    {"residuals": "gates", "chunk_size": 2},
]


@slow
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("number, spec", list(enumerate(SPECS)))
def test_every_equation_has_the_oracles_gradient(number, spec, reverse, backend):
    problem = small_problem(number)
    flags = flags_of(problem)
    policy = POLICIES[(number + 2 * reverse) % 4]  # each of them with either reset
    assert_oracles(problem, spec, backend, policy=policy, reverse=reverse, **flags)


@slow
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "softplus", "identity"])
@both_resets
def test_every_activation_has_the_oracles_gradient(spec, activation, backend):
    spec = GRUSpec(spec.reset, spec.update, activation)
    assert_oracles(small_problem(1), spec, backend)


def test_softplus_is_accurate_at_every_size():
    a = np.asarray([-3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0], np.float32)
    a = np.concatenate([a * np.float32(scale) for scale in (1e-6, 1.0, 50.0)])
    want = np.logaddexp(0, a.astype(np.float64))
    np.testing.assert_allclose(jax.jit(kernels._softplus)(a), want, rtol=1e-6, atol=1e-37)


@slow
@pytest.mark.parametrize("bias", ["none", "b_x", "b_h"])
@both_resets
def test_absent_biases_have_no_gradient(spec, bias, backend):
    assert_oracles(small_problem(2, bias=bias), spec, backend)


@slow
@pytest.mark.parametrize("flag", ["mask", "resets"])
@both_resets
def test_either_flag_alone_has_the_oracles_gradient(spec, flag, backend):
    problem = small_problem(3)
    assert_oracles(problem, spec, backend, **{flag: getattr(problem, flag)})


INSIDE = {
    "zoneout": {"zoneout": 0.4, "key": 7},
    "mean of zoneout": MEAN_OF_ZONEOUT,
    "recurrent dropout": {"recurrent_dropout": 0.4, "key": 7},
    "truncation": {"truncate": 2},
}


@slow
@pytest.mark.parametrize("number, choice", list(enumerate(INSIDE)))
@both_resets
def test_what_acts_inside_the_recurrence_has_the_oracles_gradient(spec, number, choice, backend):
    problem, case = small_problem(4), dict(INSIDE[choice])
    if "key" in case:
        case["key"] = jax.random.key(case["key"])
    policy = POLICIES[(number + (spec == PYTORCH)) % 2]
    flags = flags_of(problem)
    assert_oracles(problem, spec, backend, policy=policy, **case, **flags)


@pytest.mark.parametrize(
    "spec", [CHO_2014, pytest.param(PYTORCH, marks=slow)], ids=["before", "after"]
)
def test_tap_has_the_oracles_gradient(spec, backend):
    problem = small_problem(5)
    taps = init_taps(problem.params, problem.xs.shape[:-1])
    taps = jax.tree.map(lambda v: v + 0.3, taps)  # what it holds is added

    def loss(tap, **choices):
        h_last, hs = gru(
            problem.params, problem.xs, problem.h0, mask=problem.mask, tap=tap, spec=spec, **choices
        )
        return (h_last * problem.cotangents[0]).sum() + (hs * problem.cotangents[1]).sum()

    got = jax.jit(jax.value_and_grad(functools.partial(loss, backend=backend)))(taps)
    want = jax.jit(jax.value_and_grad(functools.partial(loss, gradient="autodiff")))(taps)
    assert_close(got, want, FLOAT32)


SIZES = {
    "one unit": {"hidden": 1},
    "a whole tile": {"hidden": 64, "batch": (8,)},
    "two slices": {"hidden": 65},
    "two tiles": {"batch": (9,)},
    "no batch": {"batch": ()},
    "two batch axes": {"batch": (2, 3)},
    "one step": {"steps": 1},
}


@slow
@pytest.mark.parametrize("number, size", list(enumerate(SIZES)))
def test_every_size_has_the_oracles_gradient(number, size, backend):
    problem = small_problem(6, **SIZES[size])
    flags = flags_of(problem)
    spec = (CHO_2014, PYTORCH)[number % 2]
    assert_oracles(problem, spec, backend, **flags)


SHARED_BYTES = {1: 100_000, 2: 200_000}  # by terms: a block then holds one slice of two, not both


@in_newer_jax
@pytest.mark.parametrize(
    "spec, dtype, tolerance",
    [(CHO_2014, jnp.float32, FLOAT32), (PYTORCH, jnp.bfloat16, HALF)],
    ids=["before-float32", "after-bfloat16"],
)
def test_cluster_of_two_has_the_oracles_gradient(spec, dtype, tolerance, backend, monkeypatch):
    monkeypatch.setattr(tiling, "_SHARED_BYTES", SHARED_BYTES[tiling.count_terms(dtype)])
    problem = small_problem(7, hidden=65, steps=2, batch=(9,), dtype=dtype)
    flags = flags_of(problem)
    assert_oracles(problem, spec, backend, tolerance=tolerance, **flags)


@slow
@in_newer_jax
@pytest.mark.parametrize(
    "spec, dtype, tolerance",
    [(CHO_2014, jnp.float32, FLOAT32), (PYTORCH, jnp.bfloat16, HALF)],
    ids=["before-float32", "after-bfloat16"],
)
def test_cluster_of_blocks_has_the_oracles_gradient(spec, dtype, tolerance, backend):
    """Three slices of float32, or four of bfloat16, are more than one block holds."""
    problem = small_problem(7, hidden=130 if dtype == jnp.float32 else 200, dtype=dtype)
    flags = flags_of(problem)
    assert_oracles(problem, spec, backend, tolerance=tolerance, **flags)


@pytest.mark.parametrize(
    "spec, residuals, sizes",
    [
        (CHO_2014, "gates", {"steps": 0}),
        (CHO_2014, "states", {"batch": (0,)}),
        (PYTORCH, "gates", {"batch": (0,)}),
        (PYTORCH, "states", {"steps": 0}),
    ],
    ids=["before-no steps", "before-no rows", "after-no rows", "after-no steps"],
)
def test_nothing_gives_the_initial_state_and_gradients_of_zero(spec, residuals, sizes, backend):
    problem = small_problem(8, **sizes)
    (h_last, hs), (dparams, dxs, dh0) = pull_back(
        problem, spec=spec, backend=backend, residuals=residuals
    )
    np.testing.assert_array_equal(h_last, problem.h0)
    np.testing.assert_array_equal(dh0, problem.cotangents[0])
    assert hs.shape == problem.cotangents[1].shape
    assert dxs.shape == problem.xs.shape
    assert all(not np.any(d) for d in jax.tree.leaves(dparams))


@pytest.mark.parametrize(
    "spec", [CHO_2014, pytest.param(PYTORCH, marks=slow)], ids=["before", "after"]
)
def test_bfloat16_is_near_the_oracle_and_keeps_its_dtype(spec, backend):
    problem = small_problem(9, dtype=jnp.bfloat16)
    got = pull_back(problem, spec=spec, backend=backend)
    assert_close(got, oracle_pullback(problem, spec), HALF)
    assert {v.dtype for v in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}


@slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@both_resets
def test_half_types_are_near_autodiff_and_keep_their_dtype(spec, dtype, backend):
    problem = small_problem(9, dtype=dtype, hidden=33)
    residuals = "gates" if dtype == jnp.float16 else "states"
    got = pull_back(problem, spec=spec, backend=backend, residuals=residuals)
    assert_close(got, pull_back(problem, spec=spec, gradient="autodiff"), HALF)
    assert {v.dtype for v in jax.tree.leaves(got)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    "terms, least, most",
    [
        pytest.param(1, 3e-4, 2e-2, marks=slow),
        pytest.param(2, 1e-7, 1e-5, marks=slow),
        (3, 0.0, 1e-6),
    ],
    ids=["one term", "two terms", "three terms"],
)
def test_float32_is_as_exact_as_its_terms(terms, least, most, backend, monkeypatch):
    problem = small_problem(10, hidden=64)
    want = oracle_pullback(problem, PYTORCH)[0][1]
    monkeypatch.setattr(recurrence, "count_terms", lambda dtype: terms)
    run = jax.jit(functools.partial(gru, spec=PYTORCH, backend=backend))
    got = np.asarray(run(problem.params, problem.xs, problem.h0)[1], np.float64)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert least <= error <= most


def test_state_of_half_types_is_carried_in_float32(backend):
    """A state that moves by less than bfloat16 resolves at 0.9 still gets where it should."""
    steps = 20

    def zeros(*shape):
        return jnp.asarray(np.zeros(shape, jnp.bfloat16))

    b_x = np.asarray([0.0, 4.0, 20.0], jnp.bfloat16)  # 1/56 of the way to the candidate, 1, a step
    params = GRUParams(zeros(1, 3), zeros(1, 3), jnp.asarray(b_x), None, spec=CHO_2014)
    h0 = jnp.asarray(np.full((1, 1), 0.9, jnp.bfloat16))
    run = jax.jit(functools.partial(gru, spec=PYTORCH, backend=backend))
    h_last, _ = run(params, zeros(steps, 1, 1), h0)
    want = 1 - (1 - float(h0[0, 0])) * (1 / (1 + np.exp(-4.0))) ** steps
    np.testing.assert_allclose(np.asarray(h_last, np.float64), want, rtol=3e-3)


# What is exact, to the bit: of one compiled function each, all flags being arguments.

# NumPy, by which the interpreter multiplies, warns of NaN.
of_nan = pytest.mark.filterwarnings("ignore::RuntimeWarning")
one_compilation = pytest.mark.parametrize(
    "spec, residuals",
    [
        (CHUNG_2014, "gates"),
        (PYTORCH, "gates"),
        pytest.param(CHO_2014, "gates", marks=slow),
        pytest.param(CHO_2014, "states", marks=slow),
    ],
    ids=["chung", "pytorch", "cho-gates", "cho-states"],
)


def flagged_problem():
    """A problem, a mask that holds the first row, a mask that holds none, and no resets."""
    problem = small_problem(12)
    valid = jnp.asarray(np.ones(problem.mask.shape, bool))
    return problem, problem.mask, valid, ~valid


@of_nan
@one_compilation
def test_masked_row_keeps_any_state_to_the_bit(spec, residuals, backend):
    """Where z h + (1 - z) n would be NaN, since h is not finite, or n by the product with it."""
    problem, mask, _, none = flagged_problem()
    run = jitted_with_flags(spec=spec, residuals=residuals, backend=backend)
    h0 = np.array(problem.h0)
    h0[0] = [1.0, np.nan, np.inf, 2.0, -np.inf]
    (h_last, hs), _ = run(problem.params, problem.xs, h0, mask, none, problem.cotangents)
    np.testing.assert_array_equal(h_last[0], h0[0])
    np.testing.assert_array_equal(hs[:, 0], np.broadcast_to(h0[0], hs[:, 0].shape))
    assert np.isfinite(hs[:, 1:]).all()


@of_nan
@one_compilation
def test_padding_of_nan_changes_no_bit_and_gives_no_gradient(spec, residuals, backend):
    problem, mask, _, none = flagged_problem()
    params, xs, h0, cotangents = problem.params, problem.xs, problem.h0, problem.cotangents
    run = jitted_with_flags(spec=spec, residuals=residuals, backend=backend)
    clean, dirty = (jnp.where(mask[..., None], xs, jnp.float32(v)) for v in (0.0, jnp.nan))
    want, got = (run(params, v, h0, mask, none, cotangents) for v in (clean, dirty))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(np.any(d) for d in jax.tree.leaves(want[1][0]))
    nothing = run(params, xs, h0, none, none, cotangents)
    assert all(not np.any(d) for d in jax.tree.leaves(nothing[1][0]))


@of_nan
@one_compilation
def test_reset_cuts_the_gradient_and_forgets_nan_exactly(spec, residuals, backend):
    problem, _, valid, none = flagged_problem()
    run = jitted_with_flags(spec=spec, residuals=residuals, backend=backend)
    h0, resets = np.full_like(problem.h0, np.nan), np.array(none)
    resets[0] = True
    (_, hs), (_, _, dh0) = run(problem.params, problem.xs, h0, valid, resets, problem.cotangents)
    assert np.isfinite(hs).all()
    np.testing.assert_array_equal(dh0, 0)


@pytest.mark.parametrize(
    "spec, pick",
    [
        (CHO_2014, 0),
        pytest.param(CHO_2014, 1, marks=slow),
        pytest.param(PYTORCH, 0, marks=slow),
        pytest.param(PYTORCH, 1, marks=slow),
    ],
    ids=["before-h_last", "before-hs", "after-h_last", "after-hs"],
)
def test_loss_that_uses_one_result_has_the_oracles_gradient(spec, pick, backend):
    problem = small_problem(14)

    def loss(params):
        results = gru(params, problem.xs, problem.h0, spec=spec, backend=backend)
        return (results[pick] * problem.cotangents[pick]).sum()

    got = jax.jit(jax.grad(loss))(problem.params)
    used = [np.asarray(ct) * (number == pick) for number, ct in enumerate(problem.cotangents)]
    want = oracle_pullback(problem._replace(cotangents=tuple(used)), spec)
    assert_close(got, want[1][0], FLOAT32)


@slow
def test_two_halves_with_the_carried_state_are_the_whole_to_the_bit(backend):
    problem = small_problem(15)
    run = functools.partial(gru, problem.params, spec=PYTORCH, backend=backend)
    h_last, hs = run(problem.xs, problem.h0)
    h_half, hs_half = run(problem.xs[:2], problem.h0)
    h_end, hs_end = run(problem.xs[2:], h_half)
    np.testing.assert_array_equal(jnp.concatenate([hs_half, hs_end]), hs)
    np.testing.assert_array_equal(h_end, h_last)


@slow
def test_batch_major_input_is_the_transposed_time_major_one(backend):
    problem = small_problem(16)
    _, hs = gru(problem.params, problem.xs, problem.h0, mask=problem.mask, backend=backend)
    turned = gru(
        problem.params,
        problem.xs.swapaxes(0, 1),
        problem.h0,
        mask=problem.mask.T,
        axis=1,
        backend=backend,
    )[1]
    np.testing.assert_array_equal(turned.swapaxes(0, 1), hs)


@slow
def test_ensemble_under_vmap_is_each_member_alone(backend):
    problems = [small_problem(17), small_problem(18)]
    xs = problems[0].xs
    params = jax.tree.map(lambda *p: jnp.stack(p), *(p.params for p in problems))
    grad = jax.jit(jax.grad(lambda p: gru(p, xs, backend=backend)[1].sum()))
    together = jax.jit(jax.vmap(grad))(params)
    for member, problem in enumerate(problems):
        alone = jax.tree.map(lambda d, m=member: d[m], together)
        assert_close(alone, grad(problem.params), FLOAT32)


def sharded_gradient(backend, devices):
    """jit of loss and gradient by params, rows of xs over a mesh."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(params, xs):
        return jax.lax.psum((gru(params, xs, backend=backend)[1] ** 2).sum(), "data")

    specs = {"in_specs": (jax.P(), jax.P(None, "data")), "out_specs": jax.P()}
    return jax.jit(jax.shard_map(jax.value_and_grad(loss), mesh=mesh, **specs))


@slow
def test_shard_map_has_the_gradient_of_the_scan(backend):
    """Over one device: the interpreter cannot run on several at once."""
    problem = small_problem(19)
    got = sharded_gradient(backend, 1)(problem.params, problem.xs)
    assert_close(got, sharded_gradient("scan", 1)(problem.params, problem.xs), FLOAT32)


# For a GPU that is not there: what is compiled for it.


def lower_for_cuda(function, *arguments):
    """The program that XLA is given for a GPU, as MLIR and as text."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compiler_ir("stablehlo"), lowered.as_text()


def kernels_of(module):
    """The GPU programs of the kernels in a lowered module, as text."""
    found = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call" and "mhlo.backend_config" in (
            operation.attributes
        ):
            config = ir.DictAttr(operation.attributes["mhlo.backend_config"])
            with module.context as context:
                context.allow_unregistered_dialects = True
                program = ir.Module.parse(ir.StringAttr(config["module"]).value_bytes)
            found.append(program.operation.get_asm(print_generic_op_form=True))
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def gradient_by_kernels(problem, spec):
    """What a training step computes with much to read: (function, arguments)."""

    def train(params, xs, h0, cotangents):
        run = functools.partial(
            gru,
            spec=spec,
            backend="fused",
            residuals="gates",
            mask=problem.mask,
            resets=problem.resets,
            recurrent_dropout=0.1,
            key=jax.random.key(0),
        )
        return jax.vjp(run, params, xs, h0)[1](cotangents)

    return train, problem.params, problem.xs, problem.h0, problem.cotangents


# Instructions of the GPU, as JAX 0.10 and 0.12 write them.
INSTRUCTIONS = {
    "fetches": r"nvvm\.cp\.async\.bulk\.tensor|cp\.async\.bulk\.tensor\.\dd",  # weights
    "waits": r"mbarrier\.try_wait",
    "commits": r"nvvm\.fence\.proxy",
    "products": r"wgmma\.mma_async",  # each of 16 of the 64 units that it adds up
    "stores": r"llvm\.store.*vector<2xbf16>",  # by one of 128 threads, of two of its numbers
    "remote blocks": r'nvvm\.mapa"|asm_string = "mapa\.',  # blocks that a term is stored in
    "remote arrivals": r"mbarrier\.arrive\.shared::cluster",
    "fences": r'asm_string = "fence\.acq_rel\.cluster;", constraints = "", has_side_effects',
}


def count_instructions(program):
    """How often each is written in a program."""
    return {name: len(re.findall(text, program)) for name, text in INSTRUCTIONS.items()}


@pytest.mark.parametrize("spec, dtype", [(CHO_2014, jnp.bfloat16), (PYTORCH, jnp.float32)])
@pytest.mark.parametrize("cluster", [1, 2], ids=["one block", "cluster"])
def test_programs_for_a_gpu_have_the_instructions_of_their_steps(spec, dtype, cluster, monkeypatch):
    """No interpreter knows the stores of a cluster: here at least each of them is present."""
    terms = tiling.count_terms(dtype)
    if cluster == 2:
        monkeypatch.setattr(tiling, "_SHARED_BYTES", SHARED_BYTES[terms])
    for name in ("_BLOCKS", "_PARTS"):  # so that a tile has all rows: 16 in memory are 2 by 8
        monkeypatch.setattr(tiling, name, 1)
    monkeypatch.setattr(tiling, "_PART", 2)
    rows = 16
    problem = small_problem(20, hidden=65, batch=(rows,), dtype=dtype)
    module, text = lower_for_cuda(*gradient_by_kernels(problem, spec))
    assert text.count("@mosaic_gpu_v2") == 2
    assert "stablehlo.while" not in text
    programs = kernels_of(module)
    for name, program in zip(("gru_forward", "gru_backward"), programs, strict=True):
        assert f'"{name}' in program  # in profiles
    forward, backward = map(count_instructions, programs)
    before = spec == CHO_2014
    boards, slices, gates = 2 if before else 1, 2, 3
    passes = {1: 1, 2: 3}[terms]
    operands = {"forward": boards, "backward": 3}  # h, r h where "before"; the cotangents of gates
    writes_half = {"forward": terms == 1, "backward": False}  # hs
    for way, found in (("forward", forward), ("backward", backward)):
        assert found == {
            "fetches": gates * slices * terms,
            "waits": 1 + 2 * boards + boards,  # for the weights; a step's two of a board; the end's
            "commits": boards * (3 if cluster == 2 else 1),
            "products": gates * slices * passes * UNITS // 16,
            "stores": (rows // 4) * (operands[way] * terms * cluster + writes_half[way]),
            "remote blocks": operands[way] * terms * cluster if cluster == 2 else 0,
            "remote arrivals": boards + 2 * boards if cluster == 2 else 0,  # the first; a step's
            "fences": boards if cluster == 2 else 0,
        }


@slow
@both_resets
def test_eight_blocks_are_one_kernel_each_way(spec):
    """The largest cluster, which no interpreter runs."""
    problem = small_problem(20, hidden=512, dtype=jnp.bfloat16, batch=(9,))
    _, text = lower_for_cuda(*gradient_by_kernels(problem, spec))
    assert text.count("@mosaic_gpu_v2") == 2
    assert "stablehlo.while" not in text


def test_shard_map_over_many_devices_lowers_for_a_gpu():
    problem = small_problem(19, batch=(8,), dtype=jnp.bfloat16)
    sharded = sharded_gradient("fused", 4)
    text = sharded.trace(problem.params, problem.xs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2


@slow
def test_rematerialised_layer_lowers_for_a_gpu():
    problem = small_problem(20)
    layer = jax.checkpoint(lambda p: gru(p, problem.xs, backend="fused")[1].sum())
    _, text = lower_for_cuda(jax.grad(layer), problem.params)
    assert text.count("@mosaic_gpu_v2") == 2


def test_cpu_refuses_the_compiled_kernel():
    problem = small_problem(21)
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(ValueError, match="interpret"):
        jax.jit(functools.partial(gru, backend="fused"))(problem.params, problem.xs)


# What the slices of a layer do in turn, so that each reads what the others wrote.


class Memory:
    """Memory whose places are named, not read."""

    def __init__(self, name, *shape):
        self.name, self.shape, self.at = name, shape, self

    def __getitem__(self, index):
        return (self.name, *(index if isinstance(index, tuple) else (index,)))


class WritingChip:
    """A chip that writes down what it is asked for; of two slices, two terms and two operands."""

    def __init__(self, cluster):
        self.tiles = types.SimpleNamespace(
            terms=2, slices=2, warpgroups=2 // cluster, cluster=cluster, count=7, rows=8,
            passes=[(0, 1), (0, 0)], dtype=jnp.dtype(jnp.bfloat16),
        )  # fmt: skip
        self.calls = []

    def place(self):
        return "tile", "slice", "own"

    def round_off(self, v):
        return np.floor(v * 64) / 64

    def by_rows(self, term):
        return float(term)

    def multiply(self, total, *operands):
        self.calls.append(("multiply", total.name, *operands))

    def accumulate(self, body, count):
        return body(*(Memory(f"sum {number}") for number in range(count)))

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments)) or (name, *arguments)


PLACES = list(itertools.product(range(2), repeat=3))  # term, group of operands, slice
MULTIPLICATIONS = [
    ("multiply", f"sum {number}", ("weights", "own", p_w, gate, k), ("buffer", p_v, g, k))
    for p_w, p_v in [(0, 1), (0, 0)]
    for k in range(2)
    for number, gates in enumerate([(2, 0), (1, 2)])
    for g, gate in enumerate(gates)
]


def stored(name, *values):
    """The calls that store the terms of each operand at this slice's place."""
    return [
        (name, value, ("buffer", p, g, "slice"))
        for g, terms in enumerate(values)
        for p, value in enumerate(terms)
    ]


SEQUENCES = {
    Board: {
        "publish": [*stored("store", (2.0, 2**-10), (4.0, 2**-9)), ("commit",)],
        "collect": [],
        "release": [],
    },
    ClusterBoard: {
        "publish": [
            *stored("store_in_cluster", (2.0, 2**-10), (4.0, 2**-9)),
            ("fence_cluster",),
            ("commit",),
        ],
        "collect": [("commit",)],
        "release": [("commit",)],
    },
    MemoryBoard: {
        "publish": [
            *stored("store", (2.0, 2**-10), (4.0, 2**-9)),
            ("commit",),
            *(
                ("send_out", ("buffer", p, g, "slice"), ("wire", "tile", p, g, "slice"))
                for p, g in itertools.product(range(2), repeat=2)
            ),
            ("await_sent",),
        ],
        "collect": [
            *(("fetch", ("wire", "tile", *at), ("buffer", *at), "arrived") for at in PLACES),
            ("wait", "arrived"),
        ],
        "release": [("commit",)],
    },
}


@pytest.mark.parametrize("kind", SEQUENCES, ids=lambda kind: kind.__name__)
def test_slices_wait_for_each_other_as_the_board_needs(kind):
    chip, buffer = WritingChip(1 if kind is Board else 2), Memory("buffer", 2, 2, 2, 8, 64)
    memory = {"buffer": buffer, "ready": "ready", "free": "free"}
    if kind is MemoryBoard:
        memory |= {"wire": Memory("wire"), "arrived": "arrived"}
    board, want = kind(chip, Memory("weights"), **memory), SEQUENCES[kind]
    board.open()
    board.put([np.float32(2 + 2**-10), np.float32(4 + 2**-9)])
    sums, fetched = board.product([(2, 0), (1, 2)], lambda: chip.calls.append("fetched") or "next")
    assert (sums, fetched) == ([("sum 0", ...), ("sum 1", ...)], "next")
    assert board.product([], None) == ([], ())
    board.close()
    assert chip.calls == [
        ("arrive", "free"),
        ("wait", "free"),
        *want["publish"],
        ("arrive", "ready"),
        *(("wait", "ready"), *want["collect"], ("show_reads", buffer)),
        *("fetched", *MULTIPLICATIONS),
        *(*want["release"], ("arrive", "free")),
        *(("wait", "ready"), *want["collect"], ("show_reads", buffer)),
        *(*want["release"], ("arrive", "free")),
        ("wait", "free"),
    ]


def test_board_asks_for_the_memory_and_the_barriers_that_its_slices_need():
    chip = WritingChip(1)
    barrier = ("barrier", 2)
    shared = {"buffer": ("operands", (2, 3, 2))}
    assert Board.scratch(chip, 3) == {**shared, "ready": barrier, "free": barrier}
    assert Board.wire(chip, 3) is None
    barrier = ("cluster_barrier",)
    assert ClusterBoard.scratch(chip, 3) == {**shared, "ready": barrier, "free": barrier}
    assert MemoryBoard.scratch(chip, 3) == {
        **ClusterBoard.scratch(chip, 3),
        "arrived": ("barrier", 2 * 3 * 2),
    }
    wire = MemoryBoard.wire(chip, 3)
    assert (wire.shape, wire.dtype) == ((7, 2, 3, 2, 8, UNITS), jnp.bfloat16)


@pytest.mark.parametrize(
    "cluster, interpreted, kind",
    [(1, False, Board), (1, True, Board), (2, False, ClusterBoard), (2, True, MemoryBoard)],
)
def test_board_is_chosen_by_where_its_slices_are(cluster, interpreted, kind):
    chip = WritingChip(cluster)
    chip.interpreted = interpreted
    assert board_kind(chip) is kind


def test_copies_by_the_devices_memory_are_those_of_mosaic():
    """Which JAX 0.10, whose interpreter knows no clusters, runs nowhere."""
    chip = Chip(cut(64, 1, jnp.bfloat16, 1), interpreted=False)
    chip._gpu = mosaic = WritingChip(1)
    chip.send_out("shared", "device")
    chip.await_sent()
    assert mosaic.calls == [("copy_smem_to_gmem", "shared", "device"), ("wait_smem_to_gmem", 0)]


def test_interpreter_is_asked_to_look_for_races():
    """By the name that JAX has for it from 0.11 on; the other name is in use before."""
    newer = types.SimpleNamespace(InterpretGPUParams=dict)
    assert chip_module._interpreter_params(newer) == {"detect_races": True}


@pytest.mark.parametrize("hidden, slices", [(64, "warpgroup"), (256, "member")])
def test_slice_is_a_warpgroup_or_a_block_of_a_cluster(hidden, slices, monkeypatch):
    chip = Chip(cut(hidden, 1, jnp.bfloat16, 1), interpreted=False)
    monkeypatch.setattr("jaxgru.experimental.fused.hopper.lax.axis_index", lambda name: name)
    assert chip.place() == ("tile", slices, "warpgroup")


# What is refused, and what is not left to chance.


def refusal(function, *arguments) -> Exception:
    """The error with which tracing a call ends."""
    with pytest.raises(Exception) as caught:
        jax.eval_shape(function, *arguments)
    return caught.value


def call_fused(dtype=jnp.float32, layer_norm=False, **choices):
    """A small call of the compiled kernels."""
    problem = small_problem(25, dtype=dtype, gains=layer_norm)
    return gru(problem.params, problem.xs, **{"backend": "fused", **choices})


@pytest.mark.parametrize(
    "transform", [jax.hessian, lambda f: jax.grad(lambda x: jax.grad(f)(x).sum())]
)
def test_second_derivatives_are_refused_with_the_cure(transform):
    problem = small_problem(22)

    def loss(xs):
        return gru(problem.params, xs, backend="fused")[1].sum()

    error = refusal(transform(loss), problem.xs)
    assert type(error) is NotImplementedError
    assert str(error) == (
        "gru: backend='fused' has first derivatives in reverse mode alone, and the derivative of "
        "one of them was asked for; use backend='scan', with gradient='tangent' for every order."
    )


@pytest.mark.parametrize(
    "choices, kind, message",
    [
        (
            {"backend": "cuda"},
            ValueError,
            "gru: backend must be one of 'scan', 'fused', 'interpreted', got 'cuda'.",
        ),
        (
            {"gradient": "tangent"},
            ValueError,
            "gru: gradient must be 'bptt' with backend='fused', whose kernels have that derivative "
            "alone, got 'tangent'; use backend='scan'.",
        ),
        (
            {"unroll": 2},
            ValueError,
            "gru: unroll must be 1 with backend='fused', which has no loop of XLA's to unroll, "
            "got 2; leave it out.",
        ),
        (
            {"layer_norm": True},
            ValueError,
            "gru: params must have no gains with backend='fused', whose kernels have no layer "
            "normalization, got g_x and g_h; use backend='scan'.",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_the_kernels_lack_is_refused_with_its_cure(choices, kind, message):
    with pytest.raises(kind) as caught:
        call_fused(**choices)
    assert str(caught.value) == message


@pytest.mark.parametrize("gain", ["g_x", "g_h"])
def test_either_gain_is_refused(gain):
    problem = small_problem(25, gains=True)
    params = dataclasses.replace(problem.params, **{gain: None})
    error = refusal(functools.partial(gru, backend="fused"), params, problem.xs)
    assert "must have no gains" in str(error)


@pytest.mark.usefixtures("x64")
def test_float64_is_refused_with_its_cure():
    with pytest.raises(TypeError) as caught:
        call_fused(jnp.float64)
    assert str(caught.value) == (
        "gru: xs must be float32, bfloat16 or float16 with backend='fused': tensor cores add up "
        "float32 numbers at most, got float64; use backend='scan'."
    )


def test_both_kernels_have_the_precision_of_the_call(monkeypatch):
    """Which JAX's setting is not any more, when the backward is traced."""
    problem, terms = small_problem(29), []

    class CountingChip(Chip):
        def __init__(self, tiles, interpreted):
            super().__init__(tiles, interpreted)
            terms.append(tiles.terms)

    def loss(params):
        with jax.default_matmul_precision("highest"):
            return gru(params, problem.xs, backend="fused")[1].sum()

    monkeypatch.setattr(kernels, "Chip", CountingChip)
    with jax.default_matmul_precision("bfloat16"):
        jax.eval_shape(jax.grad(loss), problem.params)
    assert len(terms) >= 2
    assert set(terms) == {3}


@slow
@both_resets
def test_backward_is_as_exact_as_the_call(spec):
    """At the precision of the call, where that of the backward's trace is another."""
    problem = small_problem(29, hidden=20)

    def gradient(backend, inside, outside):
        def loss(params):
            with jax.default_matmul_precision(inside):
                return (gru(params, problem.xs, spec=spec, backend=backend)[1] ** 2).sum()

        with jax.default_matmul_precision(outside):
            return jax.jit(jax.grad(loss))(problem.params)

    got = gradient("interpreted", "highest", "bfloat16")
    assert_close(got, gradient("scan", "highest", "highest"), 1e-6)


def refused_mesh(backend, mesh):
    """What is said of a mesh whose devices would divide a kernel's arrays."""
    return (
        f"gru: backend='{backend}' must be called inside jax.shard_map where a mesh divides "
        f"arrays, got the mesh {mesh.abstract_mesh.shape}, over which a kernel cannot be divided; "
        "use backend='scan'."
    )


def test_arrays_divided_over_an_explicit_mesh_are_refused_with_their_cure():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    problem = small_problem(30, batch=(4,))
    xs = jax.device_put(problem.xs, jax.NamedSharding(mesh, jax.P(None, "data")))
    with jax.set_mesh(mesh), pytest.raises(ValueError) as caught:
        gru(problem.params, xs, backend="fused")
    assert str(caught.value) == refused_mesh("fused", mesh)


def test_interpreter_refuses_several_devices_with_its_cure():
    problem = small_problem(31, batch=(4,))
    sharded_gradient("interpreted", 1).trace(problem.params, problem.xs)
    with pytest.raises(NotImplementedError) as caught:
        sharded_gradient("interpreted", 2).trace(problem.params, problem.xs)
    mesh = jax.make_mesh((2,), ("data",)).abstract_mesh
    assert str(caught.value) == (
        f"gru: backend='interpreted' must run on one device, got the mesh {mesh.shape}: JAX's "
        "interpreter runs one kernel at a time; use backend='scan'."
    )


def test_mesh_with_auto_axes_is_refused_with_its_cure():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError) as caught:
        call_fused()
    assert str(caught.value) == refused_mesh("fused", mesh)


def test_symbolic_sizes_are_refused_with_their_cure():
    problem = small_problem(26)
    (steps,) = jax.export.symbolic_shape("T")
    xs = jax.ShapeDtypeStruct((steps, *problem.xs.shape[1:]), jnp.float32)
    error = refusal(functools.partial(gru, problem.params, backend="fused"), xs)
    assert type(error) is ValueError
    assert str(error) == (
        "gru: xs must have sizes that are known with backend='fused', which cuts them into tiles, "
        "got (T, 3, 2); use backend='scan'."
    )


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="JAX 0.11 interprets clusters")
def test_old_interpreter_refuses_a_cluster_with_its_cure():
    problem = small_problem(27, hidden=193, dtype=jnp.bfloat16)
    error = refusal(functools.partial(gru, backend="interpreted"), problem.params, problem.xs)
    assert type(error) is NotImplementedError
    assert str(error) == (
        "gru: backend='interpreted' must find all of w_h in one block with JAX "
        f"{jax.__version__}, whose interpreter knows no clusters, got H=193, which takes 4 blocks; "
        "use JAX 0.11."
    )


def test_jax_without_such_kernels_is_named_with_the_cure(monkeypatch):
    name = "jax.experimental.pallas.mosaic_gpu"
    for missing in ("kernel", "load", "inline_mgpu", "RefType", "ClusterBarrier"):
        with monkeypatch.context() as patch:
            patch.delattr(f"{name}.{missing}")
            error = refusal(call_fused)
        assert type(error) is ImportError
        assert str(error) == (
            f"gru: backend='fused' needs {name} of JAX 0.10.2 or 0.11, got JAX {jax.__version__} "
            f"(module '{name}' has no attribute '{missing}'); use backend='scan', or another JAX."
        )


@pytest.mark.parametrize(
    "count", [pytest.param(3, marks=slow), pytest.param(100, marks=pytest.mark.gpu)]
)
def test_reruns_give_the_same_bits(count):
    backend = "interpreted" if count == 3 else "fused"
    problem = small_problem(23, hidden=65, steps=2, dtype=jnp.bfloat16)

    @jax.jit
    def run(params, xs):
        return jax.value_and_grad(lambda p: gru(p, xs, backend=backend)[1].sum())(params)

    first = run(problem.params, problem.xs)
    for _ in range(count - 1):
        again = run(problem.params, problem.xs)
        jax.tree.map(np.testing.assert_array_equal, again, first)


@pytest.mark.parametrize("barrier", [pytest.param("ready", marks=slow), "free"])
def test_interpreter_sees_the_race_where_a_barrier_is_left_out(barrier, monkeypatch, capfd):
    """So that its silence in all other tests says something."""
    left_out, init = set(), Board.__init__

    def remember(self, *arguments, **barriers):
        init(self, *arguments, **barriers)
        left_out.add(id(getattr(self, barrier)))

    def unless_left_out(operation):
        return lambda self, at: None if id(at) in left_out else operation(self, at)

    monkeypatch.setattr(Board, "__init__", remember)
    for name in ("wait", "arrive"):
        monkeypatch.setattr(Chip, name, unless_left_out(getattr(Chip, name)))
    problem = small_problem(24, hidden=65)
    run = jax.jit(functools.partial(gru, spec=PYTORCH, backend="interpreted"))
    said = ""
    try:
        jax.block_until_ready(run(problem.params, problem.xs))
    except jax.errors.JaxRuntimeError as error:  # JAX 0.10 and 0.11 print it
        said = str(error)
    assert "RACE" in said + capfd.readouterr().out
