"""Layer normalization of one gate's product (Ba et al. 2016, arXiv:1607.06450, eq. 4).

N(v) = scale * y,    y = (v - mean v) * i,    i = 1 / sqrt(var v + 1e-5)
"""

from typing import NamedTuple

import jax
from jax import lax

from jaxgru.core.matmul import like_row

_EPSILON = 1e-5


class Norm(NamedTuple):
    """What the derivatives of a normalization need."""

    y: jax.Array  # [..., H], of mean 0 and variance near 1
    i: jax.Array  # [..., 1], 1 / (the standard deviation of v)


def normalize(v: jax.Array, scale: jax.Array | None) -> tuple[jax.Array, Norm | None]:
    """(N(v), its `Norm`), or (v, None) without a scale."""
    if scale is None:
        return v, None
    centered = v - v.mean(axis=-1, keepdims=True)
    i = lax.rsqrt((centered * centered).mean(axis=-1, keepdims=True) + _EPSILON)
    y = centered * i
    return y * like_row(scale, y), Norm(y, i)


def normalize_vjp(d: jax.Array, scale: jax.Array | None, norm: Norm | None) -> jax.Array:
    """The cotangent of v given d, that of N(v): (c - mean c - y mean(c y)) i with c = scale d."""
    return d if scale is None else _project_out(d * like_row(scale, d), norm)


def normalize_jvp(t: jax.Array, scale: jax.Array | None, norm: Norm | None) -> jax.Array:
    """The tangent of N(v) given t, that of v: scale (t - mean t - y mean(t y)) i."""
    return t if scale is None else _project_out(t, norm) * like_row(scale, t)


def _project_out(d, norm):
    """(d - mean d - y mean(d y)) i, which is d times dy/dv, a symmetric matrix."""
    y, i = norm
    along = (d * y).mean(axis=-1, keepdims=True)
    return (d - d.mean(axis=-1, keepdims=True) - y * along) * i
