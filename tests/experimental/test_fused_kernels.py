"""The fused kernels have the oracle's values and gradients, and refuse what they do not support.

JAX's interpreter of GPU kernels runs them here, with race detection. On a machine with a Hopper GPU
`pytest -m gpu -n 0 -x` runs the same tests compiled, in the order of this file: one block, clusters
from the smallest, then without and in CUDA graphs.
"""

import functools
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, flat, make_problem, oracle_pullback
from jaxlib.mlir import ir

import jaxgru
from jaxgru.core.parameters import CHO_2014, CHUNG_2014, PYTORCH, GRUParams, GRUSpec
from jaxgru.experimental import fused
from jaxgru.experimental.fused import HopperKernel, hopper, kernels, tiling
from jaxgru.experimental.fused.exchange import OperandBuffer
from jaxgru.experimental.fused.operations import HopperOps
from jaxgru.experimental.fused.tiling import UNITS, choose_tiles
from jaxgru.stacks import init_taps

gru = flat(jaxgru.gru)
# Relative to the largest entry of a leaf. Operands of float32 carry 16 bits, which gives errors up
# to 4e-6; half types are rounded in the same places as in the scan.
FLOAT32, HALF = 2e-5, 2e-2
slow = pytest.mark.slow
both_resets = pytest.mark.parametrize("spec", [CHO_2014, PYTORCH], ids=["before", "after"])
in_newer_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="the interpreter of JAX 0.10 has no clusters",
)


@pytest.fixture(params=["interpreted", pytest.param("fused", marks=pytest.mark.gpu)])
def backend(request, capfd, monkeypatch):
    """A backend and its device; the interpreter must not have reported a race."""
    if request.param == "fused":
        # Products outside the kernels must not be in TensorFloat-32; those inside are unchanged.
        monkeypatch.setattr(hopper, "count_splits", lambda d: 2 if d == jnp.float32 else 1)
        with jax.default_matmul_precision("highest"):
            yield request.param
        return
    with jax.default_device(jax.devices("cpu")[0]):
        yield request.param
    assert "RACE" not in capfd.readouterr().out


# No size fills a tile.
small_problem = functools.partial(make_problem, steps=3, hidden=5, dtype=jnp.float32)


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
    """The same with the flags as arguments, so that tests of one shape share a compilation."""

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
# Together: each reset and update, flag, option and kind of residuals, two slices in a block, two
# tiles of 16 rows, and both activations that the kernels define themselves. Slices and tiles are in
# two cases, since the interpreter compiles every slice of every tile separately.
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
    monkeypatch.setattr(tiling, "_MULTIPROCESSORS", 2)  # so that 17 rows make tiles of 16
    spec, sizes, inside, policy = COVERING[case]
    problem = small_problem(100 + len(case), **sizes)
    if "key" in inside:
        inside = {**inside, "key": jax.random.key(inside["key"])}
    assert_oracles(problem, spec, backend, policy=policy, **inside, **flags_of(problem))


# Each option alone: sizes of the problem, activation, arguments of `gru`.
ALONE = {
    "sigmoid": ({}, "sigmoid", {}),
    "identity": ({}, "identity", {}),
    "b_h": ({"bias": "b_h"}, "tanh", {}),
    "mask": ({}, "tanh", {"mask": True}),
    "resets": ({}, "tanh", {"resets": True}),
    "zoneout": ({}, "tanh", {"zoneout": 0.4, "key": 7}),
    "mean of zoneout": ({}, "tanh", MEAN_OF_ZONEOUT),
    "recurrent dropout": ({}, "tanh", {"recurrent_dropout": 0.4, "key": 7}),
    "truncation": ({}, "tanh", {"truncate": 2}),
    "reverse": ({}, "tanh", {"reverse": True}),
    "one unit": ({"hidden": 1}, "tanh", {}),
    "a whole tile": ({"hidden": 64, "batch": (8,)}, "tanh", {}),
    "two slices": ({"hidden": 65}, "tanh", {}),
    "two tiles": ({"batch": (9,)}, "tanh", {}),
    "one step": ({"steps": 1}, "tanh", {}),
}


@slow
@pytest.mark.parametrize("number, name", list(enumerate(ALONE)))
@both_resets
def test_each_option_alone_has_the_oracles_gradient(spec, number, name, backend):
    sizes, activation, case = ALONE[name]
    problem = small_problem(number, **sizes)
    flags = {flag: getattr(problem, flag) for flag in ("mask", "resets") if flag in case}
    key = {"key": jax.random.key(case["key"])} if "key" in case else {}
    policy = {"residuals": ("gates", "states")[(number + (spec == PYTORCH)) % 2]}
    spec = GRUSpec(spec.reset, spec.update, activation)
    assert_oracles(problem, spec, backend, policy=policy, **{**case, **flags, **key})


def test_softplus_is_accurate_at_every_size():
    a = np.asarray([-3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0], np.float32)
    a = np.concatenate([a * np.float32(scale) for scale in (1e-6, 1.0, 50.0)])
    want = np.logaddexp(0, a.astype(np.float64))
    np.testing.assert_allclose(jax.jit(kernels._softplus)(a), want, rtol=1e-6, atol=1e-37)


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


@pytest.mark.parametrize("sizes", [{"steps": 0}, {"batch": (0,)}], ids=["no steps", "no rows"])
@pytest.mark.parametrize("spec, residuals", [(CHO_2014, "states"), (PYTORCH, "gates")])
def test_empty_input_gives_the_initial_state_and_zero_gradients(spec, residuals, sizes, backend):
    problem = small_problem(8, **sizes)
    got = pull_back(problem, spec=spec, backend=backend, residuals=residuals)
    (h_last, hs), (dparams, dxs, dh0) = got
    np.testing.assert_array_equal(h_last, problem.h0)
    np.testing.assert_array_equal(dh0, problem.cotangents[0])
    assert hs.shape == problem.cotangents[1].shape
    assert dxs.shape == problem.xs.shape
    assert all(not np.any(d) for d in jax.tree.leaves(dparams))


@pytest.mark.parametrize(
    "spec, dtype",
    [
        (CHO_2014, jnp.bfloat16),
        pytest.param(PYTORCH, jnp.bfloat16, marks=slow),
        pytest.param(PYTORCH, jnp.float16, marks=slow),
    ],
)
def test_half_types_are_near_the_oracle_and_keep_their_dtype(spec, dtype, backend):
    problem = small_problem(9, dtype=dtype)
    residuals = "gates" if dtype == jnp.float16 else "states"
    got = pull_back(problem, spec=spec, backend=backend, residuals=residuals)
    assert_close(got, oracle_pullback(problem, spec), HALF)
    assert {v.dtype for v in jax.tree.leaves(got)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    "splits, least, most",
    [(3, 0.0, 1e-6), *(pytest.param(*v, marks=slow) for v in [(2, 1e-7, 1e-5), (1, 3e-4, 2e-2)])],
)
def test_float32_is_as_exact_as_its_splits(splits, least, most, backend, monkeypatch):
    problem = small_problem(10, hidden=64)
    want = oracle_pullback(problem, PYTORCH)[0][1]
    monkeypatch.setattr(hopper, "count_splits", lambda dtype: splits)
    run = jax.jit(functools.partial(gru, spec=PYTORCH, backend=backend))
    got = np.asarray(run(problem.params, problem.xs, problem.h0)[1], np.float64)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert least <= error <= most


def test_state_of_half_types_is_carried_in_float32(backend):
    """A state whose changes are below bfloat16's resolution at 0.9 still arrives."""
    b_x = jnp.asarray([0.0, 4.0, 20.0], jnp.bfloat16)  # a step goes 1/56 of the way to 1
    params = small_problem(11, inputs=1, hidden=1, dtype=jnp.bfloat16, bias="b_x").params
    params = jax.tree.map(lambda p: b_x if p.ndim == 1 else jnp.zeros_like(p), params)
    h0 = jnp.full((1, 1), 0.9, jnp.bfloat16)
    run = jax.jit(functools.partial(gru, spec=PYTORCH, backend=backend))
    h_last, _ = run(params, jnp.zeros((20, 1, 1), jnp.bfloat16), h0)
    want = 1 - (1 - float(h0[0, 0])) * (1 / (1 + np.exp(-4.0))) ** 20
    np.testing.assert_allclose(np.asarray(h_last, np.float64), want, rtol=3e-3)


# What is exact, to the bit. The flags are arguments, so that each spec is compiled once.

# NumPy, by which the interpreter multiplies, warns of NaN.
of_nan = pytest.mark.filterwarnings("ignore::RuntimeWarning")
one_compilation = pytest.mark.parametrize(
    "spec, residuals",
    [(CHUNG_2014, "gates"), (PYTORCH, "gates"), pytest.param(CHO_2014, "states", marks=slow)],
    ids=["chung", "pytorch", "cho"],
)


def flagged_problem():
    """A problem, a mask whose first row is padding, one of valid steps only, and one of none."""
    problem = small_problem(12)
    valid = jnp.asarray(np.ones(problem.mask.shape, bool))
    return problem, problem.mask, valid, ~valid


@of_nan
@one_compilation
def test_masked_row_keeps_any_state_to_the_bit(spec, residuals, backend):
    """z h + (1 - z) n would be NaN there, as h is not finite, and so may be n."""
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
    "spec, pick", [(CHO_2014, 0), pytest.param(PYTORCH, 1, marks=slow)], ids=["h_last", "hs"]
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
    """The jitted loss and gradient by params, with the rows of xs sharded over a mesh."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(params, xs):
        return jax.lax.psum((gru(params, xs, backend=backend)[1] ** 2).sum(), "data")

    specs = {"in_specs": (jax.P(), jax.P(None, "data")), "out_specs": jax.P()}
    return jax.jit(jax.shard_map(jax.value_and_grad(loss), mesh=mesh, **specs))


@slow
def test_shard_map_has_the_gradient_of_the_scan(backend):
    """On one device: the interpreter does not run on several."""
    problem = small_problem(19)
    got = sharded_gradient(backend, 1)(problem.params, problem.xs)
    assert_close(got, sharded_gradient("scan", 1)(problem.params, problem.xs), FLOAT32)


def assert_reruns_give_the_same_bits(problem, spec, backend, count):
    """Of values and gradient."""
    run = jitted_with_flags(spec=spec, backend=backend)
    first = run(*problem)
    for _ in range(count - 1):
        jax.tree.map(np.testing.assert_array_equal, run(*problem), first)


@slow
@both_resets
def test_reruns_give_the_same_bits(spec, backend):
    problem = small_problem(23, hidden=65, steps=2, dtype=jnp.bfloat16)
    assert_reruns_give_the_same_bits(problem, spec, backend, 3 if backend == "interpreted" else 100)


# Clusters, the smallest first. The interpreter shows that the tests are right, not the stores.

interpreted_slowly = pytest.mark.parametrize(
    "backend",
    [
        pytest.param("interpreted", marks=[slow, in_newer_jax]),
        pytest.param("fused", marks=pytest.mark.gpu),
    ],
    indirect=True,
)


@interpreted_slowly
@pytest.mark.parametrize("number", ["row", "unit"])
def test_smallest_cluster_reads_each_number_where_it_was_stored(number, backend):
    """One step that permutes the units of h0, whose entries are the number of their row or unit."""
    rows, units = np.mgrid[:8, :256]
    h0 = jnp.asarray({"row": rows, "unit": units}[number], jnp.bfloat16)
    assert choose_tiles(256, 8, h0.dtype, 1).cluster == 4
    source = 65 * np.arange(256) % 256  # each slice of 64 units reads from every slice
    w_h = np.zeros((256, 3, 256))
    w_h[source, 2, np.arange(256)] = 1
    b_x = np.repeat([100.0, -100.0, 0.0], 256)  # r = 1, z = 0
    params = GRUParams(
        w_x=jnp.zeros((1, 768), h0.dtype),
        w_h=jnp.asarray(w_h.reshape(256, 768), h0.dtype),
        b_x=jnp.asarray(b_x, h0.dtype),
        b_h=None,
        spec=GRUSpec("after", "keep", "identity"),
    )
    run = jax.jit(functools.partial(gru, backend=backend))
    _, hs = run(params, jnp.zeros((1, 8, 1), h0.dtype), h0)
    np.testing.assert_array_equal(hs[0], h0[:, source])


# By splits: a block then holds one of two slices, not both.
SHARED_BYTES = {1: 100_000, 2: 200_000}


@pytest.mark.parametrize("spec, dtype", [(CHO_2014, jnp.float32), (PYTORCH, jnp.bfloat16)])
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("interpreted", marks=in_newer_jax),
        pytest.param("fused", marks=pytest.mark.gpu),
    ],
    indirect=True,
)
def test_cluster_of_two_has_the_oracles_gradient(spec, dtype, backend, monkeypatch):
    """Of blocks with less shared memory than a GPU has."""
    monkeypatch.setattr(tiling, "_SHARED_BYTES", SHARED_BYTES[tiling.count_splits(dtype)])
    problem = small_problem(7, dtype=dtype, hidden=65, steps=2, batch=(9,))
    tolerance = FLOAT32 if dtype == jnp.float32 else HALF
    assert_oracles(problem, spec, backend, tolerance=tolerance, **flags_of(problem))


@interpreted_slowly
@both_resets
@pytest.mark.parametrize(
    "blocks, dtype", [(3, jnp.float32), *((blocks, jnp.bfloat16) for blocks in (4, 5, 7))]
)
def test_cluster_has_the_oracles_gradient(spec, blocks, dtype, backend):
    problem = small_problem(7, dtype=dtype, hidden=64 * blocks - 10)
    tiles = choose_tiles(64 * blocks - 10, 3, dtype, tiling.count_splits(dtype))
    assert tiles.cluster == blocks
    tolerance = FLOAT32 if dtype == jnp.float32 else HALF
    assert_oracles(problem, spec, backend, tolerance=tolerance, **flags_of(problem))


@pytest.mark.gpu
@both_resets
@pytest.mark.parametrize("hidden", [256, 448])
def test_reruns_of_a_cluster_give_the_same_bits(spec, hidden):
    problem = small_problem(34, hidden=hidden, steps=64, dtype=jnp.bfloat16)
    assert_reruns_give_the_same_bits(problem, spec, "fused", 100)


KINDS = ("kCustomCall", "kCommandBuffer")  # XLA's names of kernels and of graphs


def graph_options(graphs, folder):
    """XLA's options for a CUDA graph of each kernel, or none; it writes its program to a folder."""
    return {
        "xla_gpu_enable_command_buffer": "CUSTOM_CALL" if graphs else "",
        "xla_gpu_graph_min_graph_size": 1,
        "xla_dump_to": str(folder),
    }


def count_graphs(folder):
    """(kernels, CUDA graphs) in the program that XLA wrote to a folder."""
    program = max(folder.glob("*.thunk_sequence*.txt")).read_text()  # after all passes
    return tuple(len(re.findall(rf"\d: {kind} ", program)) for kind in KINDS)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("hidden", [64, 256], ids=["one block", "cluster"])
def test_kernels_run_without_and_in_cuda_graphs(hidden, graphs, tmp_path):
    problem = small_problem(35, hidden=hidden, dtype=jnp.bfloat16)
    lowered = jitted_with_flags(spec=PYTORCH, backend="fused").lower(*problem)
    run = lowered.compile(compiler_options=graph_options(graphs, tmp_path))
    assert count_graphs(tmp_path) == (2, 2 * graphs)
    want = oracle_pullback(problem, PYTORCH, **flags_of(problem))
    for _ in range(3):  # XLA records a graph first and then replays it
        assert_close(run(*problem), want, HALF)


# Programs for a GPU, lowered without one.


def lower_for_cuda(function, *arguments):
    """The program for XLA on a GPU, as MLIR and as text."""
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
    """A training step with many inputs: (function, arguments)."""

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


AT_MEMORY = r'constraints = "~\{memory\}", has_side_effects'  # nothing moves past it
# GPU instructions, as JAX 0.10 and 0.12 write them.
INSTRUCTIONS = {
    "fetches": r"nvvm\.cp\.async\.bulk\.tensor|cp\.async\.bulk\.tensor\.\dd",  # weights
    "waits": r"mbarrier\.try_wait",
    "commits": r"nvvm\.fence\.proxy",
    "products": r"wgmma\.mma_async",  # each sums over 16 of 64 units
    "stores": r"llvm\.store.*vector<2xbf16>",  # each is by one of 128 threads, of two numbers
    "remote blocks": r'nvvm\.mapa"|asm_string = "mapa\.',  # blocks in which a split is stored
    "cluster arrivals": r'"barrier\.cluster\.arrive\.release\.aligned;", ' + AT_MEMORY,
    "cluster waits": r'"barrier\.cluster\.wait\.acquire\.aligned;", ' + AT_MEMORY,
    "arrivals at mbarriers of other blocks": r"mbarrier\.arrive\S*shared::cluster",
}


def count_instructions(program):
    """How often each occurs in a program."""
    return {name: len(re.findall(text, program)) for name, text in INSTRUCTIONS.items()}


@pytest.mark.parametrize("spec, dtype", [(CHO_2014, jnp.bfloat16), (PYTORCH, jnp.float32)])
@pytest.mark.parametrize("cluster", [1, 2], ids=["one block", "cluster"])
def test_programs_for_a_gpu_have_the_instructions_of_their_steps(spec, dtype, cluster, monkeypatch):
    """No interpreter runs the stores within a cluster; here they are at least counted."""
    splits = tiling.count_splits(dtype)
    if cluster == 2:
        monkeypatch.setattr(tiling, "_SHARED_BYTES", SHARED_BYTES[splits])
    for name in ("_MULTIPROCESSORS", "_GPCS"):  # so that one tile has all 16 rows
        monkeypatch.setattr(tiling, name, 1)
    monkeypatch.setattr(tiling, "_BLOCKS_PER_GPC", 2)
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
    buffers, slices, gates = 2 if before else 1, 2, 3
    # One for each of two buffers; two for the only one, and one around all steps.
    exchanges = 2 if before else 3
    passes = {1: 1, 2: 3}[splits]
    operands = {"forward": buffers, "backward": 3}  # h, r h; the cotangents of gates
    writes_half = {"forward": splits == 1, "backward": False}  # hs
    for way, found in (("forward", forward), ("backward", backward)):
        assert found == {
            "fetches": gates * slices * splits,
            "waits": 1 + (exchanges if cluster == 1 else 0),  # for the weights
            "commits": buffers * cluster,  # of what a block stores; of what others store in it
            "products": gates * slices * passes * UNITS // 16,
            "stores": (rows // 4) * (operands[way] * splits * cluster + writes_half[way]),
            "remote blocks": operands[way] * splits * cluster if cluster == 2 else 0,
            "cluster arrivals": exchanges if cluster == 2 else 0,
            "cluster waits": exchanges if cluster == 2 else 0,
            "arrivals at mbarriers of other blocks": 0,
        }


@slow
@both_resets
@pytest.mark.parametrize("transform", [lambda f: f, jax.checkpoint])
def test_largest_cluster_is_one_kernel_each_way(spec, transform):
    """Eight blocks; also inside `jax.checkpoint`, which runs the forward kernel in the backward."""
    problem = small_problem(20, hidden=512, dtype=jnp.bfloat16, batch=(9,))
    layer = transform(lambda p: gru(p, problem.xs, spec=spec, backend="fused")[1].sum())
    _, text = lower_for_cuda(jax.grad(layer), problem.params)
    assert text.count("@mosaic_gpu_v2") == 2
    assert "stablehlo.while" not in text


def test_shard_map_over_many_devices_lowers_for_a_gpu():
    problem = small_problem(19, batch=(8,), dtype=jnp.bfloat16)
    sharded = sharded_gradient("fused", 4)
    text = sharded.trace(problem.params, problem.xs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs JAX's CUDA plugin"
)
# What orders memory in PTX, by the name that a test gives it.
ORDERING = {
    "store": r"st\.shared::cluster\.b32",
    "make_visible": r"fence\.proxy\.async\.shared::cta",
    "arrive": r"barrier\.cluster\.arrive\.release\.aligned",
    "wait": r"barrier\.cluster\.wait\.acquire\.aligned",
    "multiply": r"wgmma\.mma_async[\w.]*",
    "finish": r"wgmma\.wait_group\.sync\.aligned 0",
    "wait_for_weights": r"mbarrier\.try_wait\.parity\.shared\.b64",
    "start_arrive": r"barrier\.cluster\.arrive\.relaxed\.aligned",  # JAX's, before all stores
    "start_wait": r"barrier\.cluster\.wait\.aligned",
    "other": r"barrier\.cluster\.[\w.]*|mbarrier\.(?:arrive[\w.]*shared::cluster|\w*wait)[\w.:]*",
}


def compile_for_an_h100(reset, **environment):
    """PTX of a cluster of four; a process that has used JAX may have lost the compiler for it."""
    code = (
        "from experiments import hopper\n"
        "size = (4, 8, 256)\n"
        f"print(hopper.compile_step(hopper.describe_device(), {reset!r}, 'bfloat16', size))"
    )
    environment = {**os.environ, **environment, "MOSAIC_GPU_DUMP_PTX": "1"}
    command, root = [sys.executable, "-c", code], pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_compiler
@pytest.mark.parametrize("reset", ["before", "after"])
def test_scope_of_what_orders_stores_between_blocks_is_the_cluster(reset):
    """In the PTX of both kernels: without a scope PTX takes that of one block."""
    pattern = "|".join(f"(?P<{name}>{of})" for name, of in ORDERING.items())
    start = ["start_arrive", "start_wait"]
    exchange = ["store", "make_visible", "arrive", "wait", "make_visible", "multiply", "finish"]
    want = {
        "before": [*start, "wait_for_weights", *exchange, *exchange],
        "after": [*start, "arrive", "wait_for_weights", "wait", *exchange, "arrive", "wait"],
    }
    programs = compile_for_an_h100(reset).split(".visible .entry ")[1:]
    assert [p[: p.index("_mosaic")] for p in programs] == ["gru_forward", "gru_backward"]
    for program in programs:
        found = (match.lastgroup for match in re.finditer(rf"(?<![\w.])(?:{pattern})", program))
        assert [name for name, _ in itertools.groupby(found)] == want[reset]


@needs_compiler
@pytest.mark.parametrize("graphs", [False, True])
def test_options_put_kernels_into_cuda_graphs_or_leave_them_out(graphs, tmp_path):
    options = graph_options(graphs, tmp_path)
    compile_for_an_h100("after", XLA_FLAGS=" ".join(f"--{k}={v}" for k, v in options.items()))
    assert count_graphs(tmp_path) == (2, 2 * graphs)


def test_cpu_refuses_the_compiled_kernel():
    problem = small_problem(21)
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(ValueError, match="interpret"):
        jax.jit(functools.partial(gru, backend="fused"))(problem.params, problem.xs)


# The order in which slices of a cluster write, signal, wait and read: no interpreter runs it.


class Memory:
    """An array whose elements are named, not read."""

    def __init__(self, name, *shape):
        self.name, self.shape, self.at = name, shape, self

    def __getitem__(self, index):
        return (self.name, *(index if isinstance(index, tuple) else (index,)))


class RecordingOps:
    """Operations that are recorded: one group of two splits, in two slices of a cluster."""

    tiles = types.SimpleNamespace(
        splits=2, slices=2, warpgroups=1, cluster=2, passes=[(0, 0)], dtype=jnp.bfloat16
    )

    def __init__(self):
        self.calls = []

    def indices(self):
        return "tile", "slice", "own"

    @property
    def gpu(self):
        return self

    def round_to_split(self, v):
        return np.floor(v * 64) / 64

    def multiply(self, total, *operands):
        self.calls.append(("multiply", *operands))

    def accumulate(self, body, count):
        return body(*(Memory(f"sum {number}") for number in range(count)))

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.mark.parametrize("only", [True, False], ids=["the only buffer", "one of two"])
def test_slices_of_a_cluster_wait_for_each_other(only):
    """A buffer that is not the only one has the barrier of the other to know that all have read."""
    ops: Any = RecordingOps()
    operands = Memory("operands", 2, 1, 2, 8, 64)
    buffer: Any = OperandBuffer(ops, Memory("weights"), "all", only, operands, None)
    buffer.signal_read()
    buffer.write([np.float32(2 + 2**-10)])
    assert buffer.multiply([(2,)], lambda: "next") == ([("sum 0", ...)], "next")
    buffer.wait_read()
    have_read = [("arrive", "all")] * only
    assert ops.calls == [
        *(*have_read, *[("wait", "all")] * only),
        *(("store", 2.0, operands, 0, 0), ("store", 2**-10, operands, 1, 0)),
        *(("commit_smem",), ("arrive", "all")),
        *(("wait", "all"), ("commit_smem",), ("report_reads", operands)),
        *(("multiply", ("weights", "own", 0, 2, k), ("operands", 0, 0, k)) for k in range(2)),
        *(*have_read, *[("wait", "all")] * only),
    ]


def test_readme_python_examples_run(monkeypatch):
    """In JAX's interpreter, for which they do not ask."""
    readme = (pathlib.Path(fused.__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    monkeypatch.setattr(fused, "HopperKernel", functools.partial(HopperKernel, interpret=True))
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert_close(names["hs"], jaxgru.gru(names["params"], names["xs"])[1], FLOAT32)
    assert_close(names["ys"], jaxgru.gru_stack(names["layers"], names["xs"])[1], FLOAT32)


# Refusals, and reproducibility.


def refusal(function, *arguments) -> Exception:
    """The error that tracing a call raises."""
    with pytest.raises(Exception) as caught:
        jax.eval_shape(function, *arguments)
    return caught.value


def call_fused(dtype=jnp.float32, layer_norm=False, **choices):
    """A small call of the compiled kernels."""
    problem = small_problem(25, dtype=dtype, layer_norm=layer_norm)
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
        "HopperKernel: it has first derivatives in reverse mode only, and a derivative of its "
        "kernels was requested; use gradient='tangent' for every order."
    )


SCAN = "; leave BPTT's kernel out."
REFUSALS = {
    "HopperKernel: params must have no layer-norm scales, since the kernels have no layer "
    "normalization, got g_x or g_h" + SCAN: {"layer_norm": True},
    "HopperKernel: xs must be float32, bfloat16 or float16, since tensor cores sum in float32, "
    "got float64" + SCAN: {"dtype": jnp.float64},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("message", REFUSALS, ids=lambda m: next(iter(REFUSALS[m])))
def test_what_the_kernels_lack_is_refused_with_its_cure(message):
    error = refusal(functools.partial(call_fused, **REFUSALS[message]))
    assert type(error) is (TypeError if "float64" in message else ValueError)
    assert str(error) == message


def test_both_kernels_have_the_precision_of_the_call(monkeypatch):
    """JAX's setting is a different one when the backward pass is traced."""
    problem, splits = small_problem(29), []

    class CountingOps(HopperOps):
        def __init__(self, tiles, interpreted):
            super().__init__(tiles, interpreted)
            splits.append(tiles.splits)

    def loss(params):
        with jax.default_matmul_precision("highest"):
            return gru(params, problem.xs, backend="fused")[1].sum()

    monkeypatch.setattr(kernels, "HopperOps", CountingOps)
    with jax.default_matmul_precision("bfloat16"):
        jax.eval_shape(jax.grad(loss), problem.params)
    assert len(splits) >= 2
    assert set(splits) == {3}


def test_kernel_is_a_static_value_whose_splits_no_user_sets():
    problem, kernel = small_problem(33), HopperKernel(interpret=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'splits'"):
        HopperKernel(splits=3)  # type: ignore
    assert kernel == HopperKernel(interpret=True) != HopperKernel()
    assert hash(kernel) == hash(HopperKernel(interpret=True))
    prepared, again = (kernel.prepare(problem.params, problem.xs) for _ in range(2))
    with jax.default_matmul_precision("highest"):
        exact = kernel.prepare(problem.params, problem.xs)
    assert prepared == again != exact
    assert hash(prepared) == hash(again)


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_mesh_that_would_shard_a_kernel_is_refused_with_its_cure(kind):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType[kind],))
    problem = small_problem(30, batch=(4,))
    xs = jax.device_put(problem.xs, jax.NamedSharding(mesh, jax.P(None, "data")))
    with jax.set_mesh(mesh), pytest.raises(ValueError) as caught:
        gru(problem.params, xs, backend="fused")
    assert str(caught.value) == (
        "HopperKernel: gru must be called inside jax.shard_map where a mesh shards arrays, "
        f"since XLA cannot shard a kernel, got the mesh {mesh.abstract_mesh.shape}" + SCAN
    )


def test_interpreter_refuses_several_devices_with_its_cure():
    problem = small_problem(31, batch=(4,))
    sharded_gradient("interpreted", 1).trace(problem.params, problem.xs)
    with pytest.raises(NotImplementedError) as caught:
        sharded_gradient("interpreted", 2).trace(problem.params, problem.xs)
    mesh = jax.make_mesh((2,), ("data",)).abstract_mesh
    assert str(caught.value) == (
        f"HopperKernel: interpret=True must run on one device, got the mesh {mesh.shape}: JAX's "
        "interpreter runs one kernel at a time" + SCAN
    )


def test_symbolic_sizes_are_refused_with_their_cure():
    problem = small_problem(26)
    (steps,) = jax.export.symbolic_shape("T")
    xs = jax.ShapeDtypeStruct((steps, *problem.xs.shape[1:]), jnp.float32)
    error = refusal(functools.partial(gru, problem.params, backend="fused"), xs)
    assert type(error) is ValueError
    assert str(error) == (
        "HopperKernel: xs must have a concrete shape, since the kernels divide it into tiles, got "
        "(T, 3, 2)" + SCAN
    )


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="JAX 0.11 interprets clusters")
def test_old_interpreter_refuses_a_cluster_with_its_cure():
    problem = small_problem(27, hidden=193, dtype=jnp.bfloat16)
    error = refusal(functools.partial(gru, backend="interpreted"), problem.params, problem.xs)
    assert type(error) is NotImplementedError
    assert str(error) == (
        "HopperKernel: interpret=True must find all of w_h in one block with JAX "
        f"{jax.__version__}, whose interpreter has no clusters, got H=193, which takes 4 blocks; "
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
            f"HopperKernel: it needs {name} of JAX 0.10.2 or 0.11, got JAX {jax.__version__} "
            f"(module '{name}' has no attribute '{missing}'); leave BPTT's kernel out, or use "
            "another JAX."
        )


@pytest.mark.parametrize("spec", [pytest.param(CHO_2014, marks=slow), PYTORCH])
def test_interpreter_sees_the_race_where_a_wait_is_left_out(spec, monkeypatch, capfd):
    """So that its silence in the other tests is a result.

    CHO_2014 has two buffers, and no slice waits until the others have written; PYTORCH has one, and
    no slice waits until the others have read.
    """
    if spec == PYTORCH:
        monkeypatch.setattr(OperandBuffer, "signal_read", lambda buffer: None)
        monkeypatch.setattr(OperandBuffer, "wait_read", lambda buffer: None)
    else:
        for name in ("arrive", "wait"):
            monkeypatch.setattr(HopperOps, name, lambda ops, barrier: None)
    problem = small_problem(24, hidden=65)
    run = jax.jit(functools.partial(gru, spec=spec, backend="interpreted"))
    said = ""
    try:
        jax.block_until_ready(run(problem.params, problem.xs))
    except jax.errors.JaxRuntimeError as error:  # JAX 0.10 and 0.11 print it
        said = str(error)
    assert "RACE" in said + capfd.readouterr().out
