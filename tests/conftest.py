"""Four CPU devices, strict promotion, and the data and comparison that several test files share."""

import dataclasses
import os
import signal

_FLAGS = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{_FLAGS} --xla_force_host_platform_device_count=4".strip()
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxgru
from jaxgru.parameters import GRUParams, init_gru


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


def _without_optimisations():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def quick_compilation():
    """Without XLA's optimisations, which the mathematics checked here does not depend on.

    Compiling is nearly the whole cost of the tests that ask for this: in float64, and where a
    seeded fault must be seen. The others, among them those of jit, sharding, and of what float32
    and half precision must reach, compile as users do.
    """
    yield from _without_optimisations()


@pytest.fixture(scope="module")
def quick_runs():
    """The same for all of a file of short runs of an experiment, whose every line they execute."""
    yield from _without_optimisations()


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
    """Random arguments, float64 unless told.

    The mask has gaps and its first row, where there is a batch, is held throughout; resets fall on
    real and on held steps. `bias` is "both", "none", "b_x" or "b_h": which of them exist. The gains
    of layer_norm are random too.
    """
    keys = jax.random.split(jax.random.key(seed), 7)
    params = init_gru(keys[0], inputs, hidden, scheme="pytorch", dtype=dtype)
    if layer_norm:
        gains = 1 + 0.5 * jax.random.normal(jax.random.fold_in(keys[0], 1), (2, 3 * hidden), dtype)
        params = params._replace(g_x=gains[0], g_h=gains[1])
    mask = jax.random.bernoulli(keys[3], 0.7, (steps, *batch))
    if batch and np.prod(batch):
        mask = mask.at[(slice(None), *([0] * len(batch)))].set(False)
    return Problem(
        params._replace(
            b_x=params.b_x if bias in ("both", "b_x") else None,
            b_h=params.b_h if bias in ("both", "b_h") else None,
        ),
        jax.random.normal(keys[1], (steps, *batch, inputs), dtype),
        jax.random.normal(keys[2], (*batch, hidden), dtype),
        mask,
        jax.random.bernoulli(keys[4], 0.3, (steps, *batch)),
        (
            jax.random.normal(keys[5], (*batch, hidden), dtype),
            jax.random.normal(keys[6], (steps, *batch, hidden), dtype),
        ),
    )


def oracle_pullback(
    problem: Any, spec, mask=None, resets=None, reverse=False, truncate=None, key=None,
    recurrent_dropout=0.0, zoneout=0.0, deterministic=False,
) -> Any:  # fmt: skip
    """(h_last, hs), (dparams, dxs, dh0) of the oracle, in float64; it is given what the key draws.

    The arguments beside the problem are those of `gru`.
    """
    params, xs, h0 = problem.params, problem.xs, problem.h0
    equation = oracle.Equation(*dataclasses.astuple(spec))
    scale, held = None, zoneout
    if key is not None and not deterministic:
        scale_key, zoneout_key = jax.random.split(key)
        kept = jax.random.bernoulli(scale_key, 1 - recurrent_dropout, h0.shape)
        scale = np.asarray(kept) / (1 - recurrent_dropout)
        steps = len(xs)
        step_keys = [jax.random.fold_in(zoneout_key, t) for t in range(steps)]
        written = [jax.random.bernoulli(k, 1 - zoneout, h0.shape) for k in step_keys]
        held = 1.0 - np.asarray(jnp.stack(written))
    h_last, hs, tape = oracle.forward(params, equation, xs, h0, mask, resets, reverse, scale, held)
    packed, dxs, dh0 = oracle.backward(params, equation, xs, tape, *problem.cotangents, truncate)
    dparams = (None if p is None else d for p, d in zip(params, packed))
    return (h_last, hs), (type(params)(*dparams), dxs, dh0)


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
    make_train_step, left = jaxgru.make_train_step, [update]

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
            patch.setattr(jaxgru, "make_train_step", make_stopping)
            assert main([*arguments, "--out", str(out)]) == 128 + number
        assert not left
        assert main(["--resume", str(out)]) == 0
    return out
