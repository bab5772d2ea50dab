"""TODO"""

from typing import NamedTuple

import jax
from jax import lax

from jaxgru.core.matmul import like_row

Array = jax.Array
_EPSILON = 1e-5


class Norm(NamedTuple):
    """What the derivatives of a normalization need."""

    y: Array  # [..., H], of mean 0 and variance 1
    i: Array  # [..., 1], the inverse of the standard deviation


def normalize(v: Array, gain: Array | None) -> tuple[Array, Norm | None]:
    """N(v) and what its derivatives need; v itself where there is no gain."""
    if gain is None:
        return v, None
    centered = v - v.mean(axis=-1, keepdims=True)
    i = lax.rsqrt((centered * centered).mean(axis=-1, keepdims=True) + _EPSILON)
    y = centered * i
    return y * like_row(gain, y), Norm(y, i)


def normalize_vjp(d: Array, gain: Array | None, norm: Norm | None) -> Array:
    """The cotangent of v given d, that of N(v): (g d - mean(g d) - y mean(g d y)) i."""
    return d if gain is None else _project_out(d * like_row(gain, d), norm)


def normalize_jvp(t: Array, gain: Array | None, norm: Norm | None) -> Array:
    """The tangent of N(v) given t, that of v: g (t - mean t - y mean(t y)) i."""
    return t if gain is None else _project_out(t, norm) * like_row(gain, t)


def _project_out(d, norm):
    """(d - mean d - y mean(d y)) i, a symmetric map: it is dy/dv and its own transpose."""
    y, i = norm
    along = (d * y).mean(axis=-1, keepdims=True)
    return (d - d.mean(axis=-1, keepdims=True) - y * along) * i
