"""`jax.export` with symbolic time and batch: the values and gradients of the traced program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxgru import gru, init_gru


@pytest.mark.parametrize(
    "options",
    [{}, {"residuals": "states"}, {"residuals": "boundaries"}, {"gradient": "tangent"}],
    ids=str,
)
def test_exported_gradient_serves_every_length_and_batch(options):
    params = init_gru(jax.random.key(0), 2, 3, scheme="pytorch")

    def run(params, xs, **options):
        h_last, hs = gru(params, xs, **options)
        return jnp.sum(h_last**2) + jnp.sum(jnp.sin(hs))

    steps, batch = export.symbolic_shape("t, b")
    grad = jax.jit(jax.grad(lambda params, xs: run(params, xs, **options), argnums=(0, 1)))
    symbolic = jax.ShapeDtypeStruct((steps, batch, 2), jnp.float32)
    exported = export.export(grad)(params, symbolic)
    for shape in ((5, 4, 2), (1, 1, 2), (300, 2, 2)):
        xs = jax.random.normal(jax.random.key(1), shape)
        plain = jax.grad(lambda p, x: run(p, x, gradient="autodiff"), argnums=(0, 1))
        for a, b in zip(
            jax.tree.leaves(exported.call(params, xs)), jax.tree.leaves(plain(params, xs))
        ):
            # 2e-5 of the largest entry: float32, two orders of summation.
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()), rtol=0)
