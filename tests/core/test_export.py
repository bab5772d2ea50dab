"""`jax.export` with symbolic time and batch: the values and gradients of the traced program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import flat, make_problem
from jax import export

import jaxgru
from jaxgru import BPTT, Bidirectional, Noise, gru_stack, init_stack

gru = flat(jaxgru.gru)


def loss(params, xs, **options):
    h_last, hs = gru(params, xs, **options)
    return jnp.sum(h_last**2) + jnp.sum(jnp.sin(hs))


def test_model_of_lengths_is_exported_for_any_number_of_steps():
    problem = make_problem(3)
    num_steps, batch = export.symbolic_shape("t, b")

    def run(xs, lengths):
        return jaxgru.gru(problem.params, xs, mask=jaxgru.length_mask(lengths, xs.shape[0]))[0]

    size, dtype = problem.xs.shape[-1], problem.xs.dtype
    exported = export.export(jax.jit(run))(
        jax.ShapeDtypeStruct((num_steps, batch, size), dtype),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    for steps, lengths in ((3, [2, 0]), (5, [5, 1, 4])):
        xs = jax.random.normal(jax.random.key(steps), (steps, len(lengths), size), dtype)
        got = exported.call(xs, jnp.asarray(lengths, jnp.int32))
        for row, length in enumerate(lengths):
            h, _ = jaxgru.gru(problem.params, xs[:length, row])
            np.testing.assert_allclose(got[row], h, rtol=1e-6, atol=1e-7)


plain_gradient = jax.jit(jax.grad(functools.partial(loss, gradient="autodiff"), argnums=(0, 1)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"residuals": "states"},
                {"residuals": "boundaries"},
                {"gradient": "tangent"},
            )
        ),
    ],
    ids=str,
)
def test_exported_gradient_serves_every_length_and_batch(options):
    params = make_problem(0, dtype=jnp.float32).params
    steps, batch = export.symbolic_shape("t, b")
    grad = jax.jit(jax.grad(functools.partial(loss, **options), argnums=(0, 1)))
    symbolic = jax.ShapeDtypeStruct((steps, batch, 2), jnp.float32)
    exported = export.export(grad)(params, symbolic)
    for shape in ((1, 1, 2), (300, 3, 2)):
        xs = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        got, wanted = exported.call(params, xs), plain_gradient(params, xs)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
            # 2e-5 of the largest entry: float32, two orders of summation.
            np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()), rtol=0)


@pytest.mark.parametrize("num_layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_exported_stack_of_two_directions_serves_every_length_and_batch(num_layers):
    """Truncation and zoneout's mean: what depends on the number of the step."""
    if num_layers == 1:
        pair = Bidirectional(*(make_problem(n, dtype=jnp.float32).params for n in range(2)))
        layers = (pair,)
    else:
        layers = init_stack(jax.random.key(0), 2, 3, 2, bidirectional=True, layer_norm=True)

    def run(layers, xs):
        options = {"gradient": BPTT(truncate=3), "noise": Noise(zoneout=0.2), "deterministic": True}
        return jnp.sum(jnp.sin(gru_stack(layers, xs, **options)[1]))

    steps, batch = export.symbolic_shape("t, b")
    symbolic = jax.ShapeDtypeStruct((steps, batch, 2), jnp.float32)
    exported = export.export(jax.jit(jax.grad(run)))(layers, symbolic)
    xs = np.random.default_rng(1).normal(size=(7, 3, 2)).astype(np.float32)
    got, wanted = exported.call(layers, xs), jax.jit(jax.grad(run))(layers, xs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(np.abs(b).max()), rtol=0)


def test_exported_function_of_a_tap_is_written_and_read():
    params = make_problem(0, dtype=jnp.float32).params
    xs = jnp.ones((4, 3, 2))
    tap = jaxgru.init_taps(params, xs.shape[:-1])

    def gradient(params, xs, tap):
        return jax.grad(lambda tap: jnp.sum(jaxgru.gru(params, xs, tap=tap)[1] ** 2))(tap)

    data = export.export(jax.jit(gradient))(params, xs, tap).serialize()
    got, wanted = export.deserialize(data).call(params, xs, tap), gradient(params, xs, tap)
    assert isinstance(got, jaxgru.Tap)
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b, rtol=2e-5)
