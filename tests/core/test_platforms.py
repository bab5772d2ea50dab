"""Defaults by the device that a program is compiled for; no GPU and no TPU is needed here.

JAX lowers a program for any device on any machine. What it lowers is counted, and the rules of the
other devices are run on the CPU by choosing their branch of `lax.platform_dependent`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_problem
from jax import export

from jaxgru import BPTT, CHO_2014, PYTORCH, gru, init_gru
from jaxgru.core import chunks, scan

TPU = 64  # steps of a chunk there
EQUATIONS = pytest.mark.parametrize("spec", [CHO_2014, PYTORCH], ids=["before", "after"])


def training_step(params, xs, h0, gradient: str | BPTT = "bptt", **options):
    def loss(params, xs, h0):
        h_last, hs = gru(params, xs, h0, gradient=gradient, **options)
        return jnp.sum(jnp.sin(h_last)) + jnp.mean(jnp.cos(hs))

    return jax.value_and_grad(loss, (0, 1, 2))(params, xs, h0)


def shapes(num_steps, batch, size, spec):
    params = jax.eval_shape(lambda: init_gru(jax.random.key(0), size, size, spec=spec))
    xs = jax.ShapeDtypeStruct((num_steps, batch, size), jnp.float32)
    return params, xs, jax.ShapeDtypeStruct((batch, size), jnp.float32)


def count_calls(platform, function, arguments):
    """Products, and calls of steps, in the program that JAX lowers for the platform."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    return text.count("stablehlo.dot_general") + text.count("call @closed_call")


CHOICES = {  # (T, B, I and H): residuals, chunk_size and unroll on a CPU, a GPU and a TPU
    (64, 32, 64): [("gates", None, 1), ("states", None, 8), ("gates", None, 1)],
    (512, 32, 128): [("states", 32, 1), ("states", 128, 8), ("states", TPU, 1)],
    (512, 32, 512): [("gates", 8, 1), ("states", 64, 8), ("states", TPU, 1)],
    (512, 33, 128): [("states", 32, 1), ("states", 64, 8), ("states", TPU, 1)],
    (200, 32, 128): [("states", 40, 1), ("states", 100, 8), ("states", 100, 1)],
    (384, 32, 128): [("states", 32, 1), ("states", 128, 8), ("states", TPU, 1)],
    (512, 129, 128): [("states", 8, 1), ("states", 64, 4), ("states", TPU, 1)],
}


@pytest.mark.parametrize("sizes", CHOICES)
def test_defaults_of_each_device(sizes):
    _, xs, h0 = shapes(*sizes, PYTORCH)
    found = [chunks.resolve_options(BPTT(), kind, xs, h0) for kind in ("cpu", "gpu", "tpu")]
    assert found == CHOICES[sizes]


def test_chunk_of_boundaries_is_the_same_on_every_device():
    _, xs, h0 = shapes(48, 16, 64, PYTORCH)
    found = [chunks.resolve_options(BPTT("boundaries"), kind, xs, h0) for kind in ("cpu", "gpu")]
    assert [size for _, size, _ in found] == [6, 6]


def test_chunk_of_a_gpu_is_not_doubled_in_half_types():
    xs, h0 = (v.update(dtype=jnp.bfloat16) for v in shapes(512, 32, 128, PYTORCH)[1:])
    assert chunks.resolve_options(BPTT(), "gpu", xs, h0) == ("states", 64, 8)


@EQUATIONS
@pytest.mark.parametrize(("platform", "unroll"), [("cuda", 8), ("rocm", 8), ("tpu", 1), ("cpu", 1)])
def test_program_of_a_platform_is_its_own_choice(spec, platform, unroll):
    """As large as with these options; an unrolled loop has its steps one by one."""
    arguments = shapes(512, 32, 128, spec)
    count = functools.partial(count_calls, platform, arguments=arguments)
    default = count(training_step)
    for other in (1, 8):
        rule = BPTT("states", unroll=other)
        explicit = count(functools.partial(training_step, gradient=rule))
        assert (explicit == default) == (other == unroll)


@pytest.mark.parametrize("platform", ["cuda", pytest.param("tpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", ["plain", "bfloat16", "layer_norm", "everything"])
@EQUATIONS
def test_gradient_of_every_platform_is_that_of_autodiff(spec, case, platform, monkeypatch):
    """At sizes where the residuals differ: "gates" on a CPU, "states" on the others."""
    chosen = []

    def choose(*arguments, default, **kinds):
        chosen.append(platform in kinds)
        return kinds.get(platform, default)(*arguments)

    monkeypatch.setattr(scan.lax, "platform_dependent", choose)
    dtype = jnp.bfloat16 if case == "bfloat16" else jnp.float32
    keys = jax.random.split(jax.random.key(0), 3)
    steps, batch, size = (150, 28, 130) if platform == "tpu" else (21, 3, 5)
    params = init_gru(
        keys[0], size, size, spec=spec, dtype=dtype, scheme="pytorch",
        layer_norm=case == "layer_norm",
    )  # fmt: skip
    xs = jax.random.normal(keys[1], (steps, batch, size), dtype)
    options = {}
    if case == "everything":
        mask = jnp.arange(steps)[:, None] < jnp.arange(batch)[None] + 3
        resets = jax.random.bernoulli(keys[2], 0.2, mask.shape)
        options = {"mask": mask, "resets": resets, "reverse": True}
    got = training_step(params, xs, jnp.ones((batch, size), dtype), **options)
    assert chosen and all(chosen)
    wanted = training_step(
        params, xs, jnp.ones((batch, size), dtype), gradient="autodiff", **options
    )
    tolerance = 3e-2 if case == "bfloat16" else 3e-5  # of the largest entry
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_one_export_serves_several_platforms():
    """The program for all three holds the loops of each, and computes the values of this one."""
    problem = make_problem(0, dtype=jnp.float32)
    arguments = (problem.params, problem.xs, problem.h0)
    exported = export.export(jax.jit(training_step), platforms=("cpu", "cuda", "tpu"))(*arguments)
    got, wanted = exported.call(*arguments), training_step(*arguments, gradient="autodiff")
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(np.abs(b).max()))
