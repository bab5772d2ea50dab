"""The tests of jaxgru, and the fixtures, data and comparison that several of their files share.

Layout: test_api.py proves what README says, and the table GUARDS in random_faults.py says which
files prove which module; oracle.py is the GRU in NumPy, golden/ holds results of other libraries.
random_faults.py breaks random lines of jaxgru to see that the fast tier notices.

Two tiers. `pytest` runs the fast one: a covering choice of options, compiled without most of XLA's
optimisations or not at all. `pytest -m slow` runs the rest: all products of options, killed and
parallel processes, long runs, interpreted GPU kernels. `pytest -m ""` runs both.
One file: `pytest tests/test_stacks.py`; one test: `-k PART_OF_ITS_NAME`; one process: `-n 0`.
With JAX_DISABLE_MOST_OPTIMIZATIONS=0 everything compiles as it does for users.
"""

import dataclasses
import importlib.metadata
import os
import signal

# What follows holds for the processes that tests start, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_FLAGS = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
# Without fusion emitters XLA compiles in half the time. Later versions end at the unknown flag.
HAS_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
if HAS_EMITTERS and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"].lower() not in ("0", "false"):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_FLAGS).strip()

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxgru import CHO_2014, training
from jaxgru.core.gradient import BPTT, Autodiff, Tangent
from jaxgru.core.noise import Noise
from jaxgru.core.parameters import GRUParams
from jaxgru.experimental.fused import HopperKernel
from jaxgru.stacks.dropout import Dropout

# A shell starts its background jobs with SIGINT ignored, and `fit` goes on where it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def strict_promotion():
    """No test relies on implicit broadcasting or casting."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def pytest_collection_modifyitems(items):
    """Tests for a GPU are skipped where there is none."""
    found = [item for item in items if item.get_closest_marker("gpu")]
    if not found:
        return
    capability = getattr(jax.devices()[0], "compute_capability", "none")
    if capability != "9.0":
        reason = f"needs a Hopper GPU, compute capability 9.0, found {capability}"
        for item in found:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def x64():
    """float64 for one test; the default of the process stays off."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimized():
    """XLA optimises, for what rounding, memory or the compiled program depend on.

    It still leaves out the fusion emitters where the flag above turns them off: only
    JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles everything as users do.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def uncompiled():
    """Every operation runs by itself, and loops over time are Python's.

    An operation is compiled once for each shape of its arguments, so tests that share shapes share
    nearly all of their compilation. For values and derivatives that do not depend on compilation.
    """
    with jax.disable_jit():
        yield


@pytest.fixture(scope="module")
def saved_programs(tmp_path_factory):
    """JAX keeps what a file compiles on disk, so that a second run of a command compiles little."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield


class Problem(NamedTuple):
    """The array arguments of `jaxgru.gru`, and random cotangents of its two results."""

    params: GRUParams
    xs: jax.Array
    h0: jax.Array
    mask: jax.Array
    resets: jax.Array
    cotangents: tuple[jax.Array, jax.Array]


def make_problem(
    seed,
    *,
    steps=7,
    batch=(3,),
    inputs=2,
    hidden=3,
    bias="both",
    dtype=jnp.float64,
    layer_norm=False,
):
    """Random arguments, float64 by default.

    They are drawn by NumPy, whose operations need no compilation. The mask has gaps, and masks its
    first row, where there is a batch, at every step; resets fall on valid and on masked steps.
    `bias` is "both", "none", "b_x" or "b_h": which of them exist. The scales of layer_norm are
    random too.
    """
    draw = np.random.default_rng(seed)
    bound = hidden**-0.5

    def cast(values):
        return jnp.asarray(np.asarray(values).astype(dtype))

    def weights(*shape):
        return cast(draw.uniform(-bound, bound, shape))

    params = GRUParams(
        w_x=weights(inputs, 3 * hidden),
        w_h=weights(hidden, 3 * hidden),
        b_x=weights(3 * hidden) if bias in ("both", "b_x") else None,
        b_h=weights(3 * hidden) if bias in ("both", "b_h") else None,
        spec=CHO_2014,
    )
    if layer_norm:
        g_x, g_h = 1 + 0.5 * draw.standard_normal((2, 3 * hidden))
        params = dataclasses.replace(params, g_x=cast(g_x), g_h=cast(g_h))
    mask = draw.random((steps, *batch)) < 0.7
    if batch and np.prod(batch):
        mask[(slice(None), *([0] * len(batch)))] = False
    return Problem(
        params,
        xs=cast(draw.standard_normal((steps, *batch, inputs))),
        h0=cast(draw.standard_normal((*batch, hidden))),
        mask=jnp.asarray(mask),
        resets=jnp.asarray(draw.random((steps, *batch)) < 0.3),
        cotangents=(
            cast(draw.standard_normal((*batch, hidden))),
            cast(draw.standard_normal((steps, *batch, hidden))),
        ),
    )


def with_spec(tree, spec):
    """The tree with that equation in every GRUParams."""

    def change(leaf):
        return dataclasses.replace(leaf, spec=spec) if isinstance(leaf, GRUParams) else leaf

    return jax.tree.map(change, tree, is_leaf=lambda leaf: isinstance(leaf, GRUParams))


RULES = {"bptt": BPTT, "tangent": Tangent, "autodiff": Autodiff}
DROPOUT = {"input_dropout": "input", "dropout": "between", "output_dropout": "output",
           "variational": "variational"}  # fmt: skip


def grouped(options):
    """Options given one by one as the values that they belong to: gradient, noise and dropout."""
    options = dict(options)

    def take(*names):
        return {name: options.pop(name) for name in names if name in options}

    of_rule = take("residuals", "chunk_size", "unroll", "truncate")
    backend = options.pop("backend", "scan")
    if backend != "scan":
        of_rule["kernel"] = HopperKernel(interpret=backend == "interpreted")
    if of_rule:
        options["gradient"] = RULES[options.get("gradient", "bptt")](**of_rule)
    if noise := take("recurrent_dropout", "zoneout"):
        options["noise"] = Noise(**noise)
    if dropout := take(*DROPOUT):
        options["dropout"] = Dropout(**{DROPOUT[name]: value for name, value in dropout.items()})
    return options


def flat(function):
    """A function of parameters that takes their spec, and `grouped` options, one by one.

    Tests that run over products of equations and options write them all alike.
    """

    def run(params, *arguments, spec=None, **options):
        params = params if spec is None else with_spec(params, spec)
        return function(params, *arguments, **grouped(options))

    return run


def oracle_pullback(
    problem: Any, spec, mask=None, resets=None, reverse=False, truncate=None, key=None,
    recurrent_dropout=0.0, zoneout=0.0, deterministic=False,
) -> Any:  # fmt: skip
    """(h_last, hs), (dparams, dxs, dh0) of the oracle, in float64; it is given what the key draws.

    The arguments beside the problem are those of `gru`.
    """
    params, xs, h0 = problem.params, problem.xs, problem.h0
    equation = oracle.Equation(*dataclasses.astuple(spec))
    dropout, zoned_out = None, zoneout
    if key is not None and not deterministic:
        dropout_key, zoneout_key = jax.random.split(key)
        drawn = jax.random.bernoulli(dropout_key, 1 - recurrent_dropout, h0.shape)
        dropout = np.asarray(drawn) / (1 - recurrent_dropout)
        steps = len(xs)
        step_keys = [jax.random.fold_in(zoneout_key, t) for t in range(steps)]
        written = [jax.random.bernoulli(k, 1 - zoneout, h0.shape) for k in step_keys]
        zoned_out = 1.0 - np.asarray(jnp.stack(written))
    h_last, hs, tape = oracle.forward(
        params, equation, xs, h0, mask, resets, reverse, dropout, zoned_out
    )
    packed, dxs, dh0 = oracle.backward(params, equation, xs, tape, *problem.cotangents, truncate)
    arrays = params.arrays()
    dparams = {name: None if arrays[name] is None else d for name, d in zip(arrays, packed)}
    return (h_last, hs), (dataclasses.replace(params, **dparams), dxs, dh0)


def assert_close(got, want, tolerance, label=""):
    """Same tree, and every leaf within tolerance times the largest entry of the wanted leaf.

    A wanted leaf of zeros must be met exactly; NaN and infinity are never close.
    """
    got_leaves, got_tree = jax.tree.flatten(got)
    want_leaves, want_tree = jax.tree.flatten(want)
    assert got_tree == want_tree, f"{label}: {got_tree} is not {want_tree}"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(want)]
    for path, a, b in zip(paths, got_leaves, want_leaves):
        a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
        assert a.shape == b.shape, f"{label}{path}: shape {a.shape} is not {b.shape}"
        assert np.isfinite(a).all() and np.isfinite(b).all(), f"{label}{path}: not finite"
        if a.size == 0:
            continue
        error, scale = np.abs(a - b).max(), np.abs(b).max()
        assert error <= tolerance * scale, f"{label}{path}: off by {error:.2e} of {scale:.2e}"


def stop_and_resume(main, arguments, out, update, number=signal.SIGTERM):
    """Runs an experiment that a signal stops during that update, and then goes on with it."""
    make_train_step, left = training.make_train_step, [update]

    def make_stopping(*given, **options):
        train_step = make_train_step(*given, **options)

        def step(state, batch):
            if left and int(state.step) + 1 == left[0]:
                left.clear()
                os.kill(os.getpid(), number)
            return train_step(state, batch)

        return step

    with jax.numpy_dtype_promotion("standard"):  # for optax.adam
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "make_train_step", make_stopping)
            assert main([*arguments, "--out", str(out)]) == 128 + number
        assert not left
        assert main(["--resume", str(out)]) == 0
    return out
