"""The fused kernels: the values and gradients of the oracle, and of JAX's own derivative.

Here JAX's interpreter of GPU kernels runs them, and looks for races; on a machine with a Hopper GPU
`pytest -m gpu` runs the same tests compiled.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, make_problem, oracle_pullback

from jaxgru import kernels, recurrence
from jaxgru.boards import Board
from jaxgru.chip import Chip
from jaxgru.layers import init_taps
from jaxgru.parameters import CHO_2014, CHUNG_2014, PYTORCH, GRUParams, GRUSpec
from jaxgru.recurrence import gru

# Relative to the largest entry of a leaf. Operands of float32 carry 16 bits and reach 4e-6; half
# types reach what they do in the scan: they are rounded in the same places.
FLOAT32, HALF = 2e-5, 2e-2
SPECS = [GRUSpec(*choice) for choice in itertools.product(("before", "after"), ("keep", "write"))]
both_resets = pytest.mark.parametrize("spec", [CHO_2014, PYTORCH], ids=["before", "after"])
in_newer_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="the interpreter of JAX 0.10 knows no clusters",
)


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


def small_problem(seed=0, **sizes):
    """float32; neither size fills a tile."""
    return make_problem(seed, **{"steps": 3, "hidden": 5, "dtype": jnp.float32, **sizes})


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


def assert_oracles(problem, spec, backend, *, tolerance=FLOAT32, policy=None, **case: Any):
    """Values and gradient are those of the oracle, in float64."""
    got = pull_back(problem, spec=spec, backend=backend, **case, **(policy or {}))
    assert_close(got, oracle_pullback(problem, spec, **case), tolerance)


# Compiling is most of what these tests cost, and XLA's optimisations are not what they are about.
quick = pytest.mark.usefixtures("quick_compilation")

POLICIES = [
    {"residuals": "gates"},
    {"residuals": "states"},
    {"residuals": "boundaries"},
    {"residuals": "gates", "chunk_size": 2},
]


@quick
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("number, spec", list(enumerate(SPECS)))
def test_every_equation_has_the_oracles_gradient(number, spec, reverse, backend):
    problem = small_problem(number)
    flags = flags_of(problem)
    policy = POLICIES[(number + 2 * reverse) % 4]  # each of them with either reset
    assert_oracles(problem, spec, backend, policy=policy, reverse=reverse, **flags)


@quick
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "softplus", "identity"])
@both_resets
def test_every_activation_has_the_oracles_gradient(spec, activation, backend):
    spec = GRUSpec(spec.reset, spec.update, activation)
    assert_oracles(small_problem(1), spec, backend)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 50.0])
def test_softplus_is_accurate_at_every_size(scale):
    a = jnp.asarray([-3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0]) * scale
    want = np.logaddexp(0, np.asarray(a, np.float64))
    np.testing.assert_allclose(jax.jit(kernels._softplus)(a), want, rtol=1e-6, atol=1e-37)


@quick
@pytest.mark.parametrize("bias", ["none", "b_x", "b_h"])
@both_resets
def test_absent_biases_have_no_gradient(spec, bias, backend):
    assert_oracles(small_problem(2, bias=bias), spec, backend)


@quick
@pytest.mark.parametrize("flag", ["mask", "resets"])
@both_resets
def test_either_flag_alone_has_the_oracles_gradient(spec, flag, backend):
    problem = small_problem(3)
    assert_oracles(problem, spec, backend, **{flag: getattr(problem, flag)})


INSIDE = {
    "zoneout": {"zoneout": 0.4, "key": 7},
    "mean of zoneout": {"zoneout": 0.4, "deterministic": True},
    "recurrent dropout": {"recurrent_dropout": 0.4, "key": 7},
    "truncation": {"truncate": 2},
}


@quick
@pytest.mark.parametrize("number, choice", list(enumerate(INSIDE)))
@both_resets
def test_what_acts_inside_the_recurrence_has_the_oracles_gradient(spec, number, choice, backend):
    problem, case = small_problem(4), dict(INSIDE[choice])
    if "key" in case:
        case["key"] = jax.random.key(case["key"])
    policy = POLICIES[(number + (spec == PYTORCH)) % 2]
    flags = flags_of(problem)
    assert_oracles(problem, spec, backend, policy=policy, **case, **flags)


@quick
@both_resets
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


@quick
@pytest.mark.parametrize("number, size", list(enumerate(SIZES)))
def test_every_size_has_the_oracles_gradient(number, size, backend, monkeypatch):
    monkeypatch.setattr("jaxgru.tiles._BLOCKS", 2)  # so that a batch of 9 fills two tiles
    problem = small_problem(6, **SIZES[size])
    flags = flags_of(problem)
    spec = (CHO_2014, PYTORCH)[number % 2]
    assert_oracles(problem, spec, backend, **flags)


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


@pytest.mark.parametrize("sizes", [{"steps": 0}, {"batch": (0,)}], ids=["no steps", "no rows"])
@pytest.mark.parametrize("residuals", ["gates", "states"])
@both_resets
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
    [(1, 3e-4, 2e-2), (2, 1e-7, 1e-5), (3, 0.0, 1e-6)],
    ids=["one term", "two terms", "three terms"],
)
def test_float32_is_as_exact_as_its_terms(terms, least, most, backend, monkeypatch):
    problem = small_problem(10, hidden=64)
    want = pull_back(problem, spec=PYTORCH, gradient="autodiff")[0][1]
    monkeypatch.setattr(recurrence, "count_terms", lambda dtype: terms)
    got = pull_back(problem, spec=PYTORCH, backend=backend)[0][1]
    error = np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(want).max()
    assert least <= error <= most


def test_state_of_half_types_is_carried_in_float32(backend):
    """A state that moves by less than bfloat16 resolves at 0.9 still gets where it should."""
    steps = 20
    b_x = jnp.asarray([0.0, 4.0, 20.0], jnp.bfloat16)  # 1/56 of the way to the candidate, 1, a step
    params = GRUParams(jnp.zeros((1, 3), jnp.bfloat16), jnp.zeros((1, 3), jnp.bfloat16), b_x, None)
    h0 = jnp.full((1, 1), 0.9, jnp.bfloat16)
    xs = jnp.zeros((steps, 1, 1), jnp.bfloat16)
    h_last, _ = gru(params, xs, h0, spec=PYTORCH, backend=backend)
    want = 1 - (1 - float(h0[0, 0])) * (1 / (1 + np.exp(-4.0))) ** steps
    np.testing.assert_allclose(np.asarray(h_last, np.float64), want, rtol=3e-3)


def test_row_of_length_zero_returns_the_initial_state_exactly(backend):
    problem = small_problem(11)  # the mask holds its first row throughout
    for spec in (CHO_2014, CHUNG_2014):
        h_last, hs = gru(
            problem.params, problem.xs, problem.h0, mask=problem.mask, spec=spec, backend=backend
        )
        np.testing.assert_array_equal(h_last[0], problem.h0[0])
        np.testing.assert_array_equal(hs[:, 0], np.broadcast_to(problem.h0[0], hs[:, 0].shape))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which multiplies there
@pytest.mark.parametrize("spec", [CHO_2014, CHUNG_2014, PYTORCH], ids=["cho", "chung", "pytorch"])
def test_held_row_keeps_any_state_to_the_bit(spec, backend):
    """Where z h + (1 - z) n would be NaN: h is not finite, or the candidate overflows."""
    problem = small_problem(28, hidden=4)
    h0 = jnp.asarray([[1.0, jnp.nan, jnp.inf, 2.0]] * 3)
    mask = jnp.zeros_like(problem.mask)
    run = functools.partial(gru, problem.params, problem.xs, mask=mask, backend=backend)
    np.testing.assert_array_equal(run(h0, spec=spec)[0], h0)
    large = jnp.full_like(h0, 1e30)
    spec = GRUSpec(spec.reset, spec.update, "identity")
    np.testing.assert_array_equal(run(large, spec=spec)[0], large)


@pytest.mark.parametrize("residuals", ["gates", "states"])
def test_padding_of_nan_changes_no_bit_and_gives_no_gradient(residuals, backend):
    problem = small_problem(12)
    mask = problem.mask[..., None]
    choices = {"mask": problem.mask, "backend": backend, "residuals": residuals}
    clean = problem._replace(xs=jnp.where(mask, problem.xs, 0.0))
    dirty = problem._replace(xs=jnp.where(mask, problem.xs, jnp.nan))
    want, got = pull_back(clean, **choices), pull_back(dirty, **choices)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    nothing = pull_back(problem, **{**choices, "mask": jnp.zeros_like(problem.mask)})
    assert all(not np.any(d) for d in jax.tree.leaves(nothing[1][0]))


def test_reset_cuts_the_gradient_and_forgets_nan_exactly(backend):
    problem = small_problem(13)
    problem = problem._replace(h0=jnp.full_like(problem.h0, jnp.nan))
    resets = jnp.zeros_like(problem.resets).at[0].set(True)
    (_, hs), (_, _, dh0) = pull_back(problem, resets=resets, backend=backend, spec=PYTORCH)
    assert np.isfinite(hs).all()
    np.testing.assert_array_equal(dh0, 0)


@quick
@pytest.mark.parametrize("pick", [0, 1], ids=["h_last", "hs"])
@both_resets
def test_loss_that_uses_one_result_has_the_oracles_gradient(spec, pick, backend):
    problem = small_problem(14)

    def loss(params, **choices):
        results = gru(params, problem.xs, problem.h0, spec=spec, **choices)
        return (results[pick] * problem.cotangents[pick]).sum()

    got = jax.jit(jax.grad(functools.partial(loss, backend=backend)))(problem.params)
    want = jax.grad(functools.partial(loss, gradient="autodiff"))(problem.params)
    assert_close(got, want, FLOAT32)


def test_two_halves_with_the_carried_state_are_the_whole_to_the_bit(backend):
    problem = small_problem(15)
    run = functools.partial(gru, problem.params, spec=PYTORCH, backend=backend)
    h_last, hs = run(problem.xs, problem.h0)
    h_half, hs_half = run(problem.xs[:2], problem.h0)
    h_end, hs_end = run(problem.xs[2:], h_half)
    np.testing.assert_array_equal(jnp.concatenate([hs_half, hs_end]), hs)
    np.testing.assert_array_equal(h_end, h_last)


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


@quick
def test_ensemble_under_vmap_is_each_member_alone(backend):
    problems = [small_problem(17), small_problem(18)]
    xs = problems[0].xs
    params = jax.tree.map(lambda *p: jnp.stack(p), *(p.params for p in problems))
    grad = jax.grad(lambda p: gru(p, xs, backend=backend)[1].sum())
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


def test_shard_map_has_the_gradient_of_the_scan(backend):
    """Over one device: the interpreter cannot run on several at once."""
    problem = small_problem(19)
    got = sharded_gradient(backend, 1)(problem.params, problem.xs)
    assert_close(got, sharded_gradient("scan", 1)(problem.params, problem.xs), FLOAT32)


# For a GPU that is not there: what is compiled for it.


def lower_for_cuda(function, *arguments):
    """The program that XLA is given for a GPU."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def test_shard_map_over_many_devices_lowers_for_a_gpu():
    problem = small_problem(19, batch=(8,))
    sharded = sharded_gradient("fused", 4)
    text = sharded.trace(problem.params, problem.xs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize("hidden, dtype", [(64, jnp.float32), (512, jnp.bfloat16)], ids=str)
@both_resets
def test_whole_sequence_is_one_kernel_each_way(spec, hidden, dtype):
    """One block, and a cluster of eight that no interpreter runs, with much to read."""
    problem = small_problem(20, hidden=hidden, dtype=dtype, batch=(9,))

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

    text = lower_for_cuda(train, problem.params, problem.xs, problem.h0, problem.cotangents)
    assert text.count("@mosaic_gpu_v2") == 2
    assert "stablehlo.while" not in text


def test_rematerialised_layer_lowers_for_a_gpu():
    problem = small_problem(20)
    layer = jax.checkpoint(lambda p: gru(p, problem.xs, backend="fused")[1].sum())
    assert lower_for_cuda(jax.grad(layer), problem.params).count("@mosaic_gpu_v2") == 2


def test_cpu_refuses_the_compiled_kernel():
    problem = small_problem(21)
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(ValueError, match="interpret"):
        gru(problem.params, problem.xs, backend="fused")


# What is refused, and what is not left to chance.


@pytest.mark.parametrize(
    "transform", [jax.hessian, lambda f: jax.grad(lambda x: jax.grad(f)(x).sum())]
)
def test_second_derivatives_are_refused_with_the_cure(transform):
    problem = small_problem(22)

    def loss(xs):
        return gru(problem.params, xs, backend="interpreted")[1].sum()

    with pytest.raises(NotImplementedError, match=r"gradient='tangent'"):
        transform(loss)(problem.xs)


def call_fused(dtype=jnp.float32, layer_norm=False, **choices):
    """A small call of the compiled kernels."""
    problem = small_problem(25, dtype=dtype, layer_norm=layer_norm)
    return gru(problem.params, problem.xs, **{"backend": "fused", **choices})


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


@pytest.mark.usefixtures("x64")
def test_float64_is_refused_with_its_cure():
    with pytest.raises(TypeError, match=r"must be float32.*got float64; use backend='scan'"):
        call_fused(jnp.float64)


@both_resets
def test_backward_has_the_precision_of_the_call(spec):
    """Which JAX's setting is not any more, when the backward is traced."""
    problem = small_problem(29, hidden=20)

    def gradient(backend, inside, outside):
        def loss(params):
            with jax.default_matmul_precision(inside):
                return (gru(params, problem.xs, spec=spec, backend=backend)[1] ** 2).sum()

        with jax.default_matmul_precision(outside):
            return jax.jit(jax.grad(loss))(problem.params)

    got = gradient("interpreted", "highest", "bfloat16")
    assert_close(got, gradient("scan", "highest", "highest"), 1e-6)


def test_arrays_divided_over_an_explicit_mesh_are_refused_with_their_cure():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    problem = small_problem(30, batch=(4,))
    xs = jax.device_put(problem.xs, jax.NamedSharding(mesh, jax.P(None, "data")))
    with pytest.raises(ValueError, match=r"inside jax\.shard_map where"):
        gru(problem.params, xs, backend="fused")


def test_interpreter_refuses_several_devices_with_its_cure():
    problem = small_problem(31, batch=(4,))
    with pytest.raises(NotImplementedError, match=r"must run on one device.*use backend='scan'"):
        sharded_gradient("interpreted", 2)(problem.params, problem.xs)


def test_mesh_with_auto_axes_is_refused_with_its_cure():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"must be called inside jax\.shard_map"),
    ):
        call_fused()


def test_symbolic_sizes_are_refused_with_their_cure():
    problem = small_problem(26)
    (steps,) = jax.export.symbolic_shape("T")
    xs = jax.ShapeDtypeStruct((steps, *problem.xs.shape[1:]), jnp.float32)
    run = functools.partial(gru, problem.params, backend="fused")
    with pytest.raises(ValueError, match=r"sizes that are known.*use backend='scan'"):
        jax.eval_shape(run, xs)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="JAX 0.11 interprets clusters")
def test_old_interpreter_refuses_a_cluster_with_its_cure():
    problem = small_problem(27, hidden=193, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"H=193, which takes 4 blocks; use JAX 0\.11"):
        gru(problem.params, problem.xs, backend="interpreted")


def test_jax_without_such_kernels_is_named_with_the_cure(monkeypatch):
    monkeypatch.delattr("jax.experimental.pallas.mosaic_gpu.inline_mgpu")
    with pytest.raises(ImportError, match=r"needs .*mosaic_gpu of JAX .*use backend='scan'"):
        call_fused()


@pytest.mark.parametrize("count", [3, pytest.param(100, marks=pytest.mark.gpu)])
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


@pytest.mark.parametrize("barrier", ["ready", "free"])
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
    jax.block_until_ready(gru(problem.params, problem.xs, spec=PYTORCH, backend="interpreted"))
    assert "RACE" in capfd.readouterr().out
