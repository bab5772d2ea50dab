"""Draws the parameters of one GRU layer."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxgru.core import checks
from jaxgru.core.matmul import state_dtype
from jaxgru.core.parameters import CHO_2014, GRUParams, GRUSpec, require_spec

Scheme = Literal["orthogonal", "pytorch", "keras"]


@checks.explain_unknown_arguments
def init_gru(
    key: jax.Array, input_size: int, hidden_size: int, *, spec: GRUSpec = CHO_2014,
    bias: bool = True, layer_norm: bool = False, scheme: Scheme = "orthogonal",
    dtype: Any = jnp.float32,
) -> GRUParams:  # fmt: skip
    """Draws the parameters of one GRU layer.

    ============  ======================  =============================  ==================
    scheme        w_x                     w_h                            b_x, b_h
    ============  ======================  =============================  ==================
    orthogonal    LeCun normal per gate   orthogonal per gate            0
    pytorch       U(-1/sqrt(H), 1/sqrt(H)) for every array, as `torch.nn.GRU`
    keras         Glorot uniform [I, 3H]  orthonormal rows of [H, 3H]    0
    ============  ======================  =============================  ==================

    Args:
      key: a `jax.random.key`.
      input_size: I, at least 1.
      hidden_size: H, at least 1.
      spec: the equation, stored in the parameters: Cho et al. 2014 by default. Pass `PYTORCH` for
        the GRU of PyTorch, cuDNN, Flax, Equinox and Keras.
      bias: False leaves both biases out (None).
      layer_norm: True adds layer-norm scales, all ones.
      scheme: "orthogonal" (default; Saxe et al. 2014, arXiv:1312.6120), "pytorch" or "keras".
      dtype: the dtype of every array; half types are drawn in float32 and rounded.

    Returns:
      The GRUParams; b_x and b_h are None without bias, g_x and g_h without layer_norm.

    Raises:
      ValueError: a size is not positive, or the scheme is unknown.
      TypeError: another argument has the wrong kind, or dtype is not one of float64 (which needs
        JAX's x64 mode), float32, bfloat16 and float16.

    Cost: "orthogonal" takes three QR decompositions of [H, H], "keras" one of [3H, H].

    >>> params = init_gru(jax.random.key(0), 2, 3)
    >>> params.w_x.shape, params.w_h.shape, params.b_x.shape
    ((2, 9), (3, 9), (9,))
    """
    checks.require_count("init_gru", "input_size", input_size)
    checks.require_count("init_gru", "hidden_size", hidden_size)
    require_spec("init_gru", spec)
    checks.require_bool("init_gru", "bias", bias)
    checks.require_bool("init_gru", "layer_norm", layer_norm)
    checks.require_choice("init_gru", "scheme", scheme, get_args(Scheme))
    checks.require_key("init_gru", key)
    dtype = checks.require_dtype("init_gru", dtype)
    draw = state_dtype(dtype)
    shape_x, shape_h = (input_size, 3 * hidden_size), (hidden_size, 3 * hidden_size)
    key_x, key_h, key_bx, key_bh = jax.random.split(key, 4)
    init, b_x = jax.nn.initializers, jnp.zeros(3 * hidden_size, draw)
    b_h = b_x

    def per_gate(initializer, key, rows):
        drawn = [initializer(k, (rows, hidden_size), draw) for k in jax.random.split(key, 3)]
        return jnp.concatenate(drawn, axis=-1)

    if scheme == "pytorch":
        bound = hidden_size**-0.5
        uniform = functools.partial(jax.random.uniform, dtype=draw, minval=-bound, maxval=bound)
        w_x, w_h = uniform(key_x, shape_x), uniform(key_h, shape_h)
        b_x, b_h = uniform(key_bx, b_x.shape), uniform(key_bh, b_h.shape)
    elif scheme == "keras":
        w_x = init.glorot_uniform()(key_x, shape_x, draw)
        w_h = init.orthogonal()(key_h, shape_h, draw)
    else:
        w_x = per_gate(init.lecun_normal(), key_x, input_size)
        w_h = per_gate(init.orthogonal(), key_h, hidden_size)
    biases = (b_x, b_h) if bias else (None, None)
    scales = (jnp.ones(3 * hidden_size, draw),) * 2 if layer_norm else (None, None)
    params = GRUParams(w_x, w_h, *biases, *scales, spec=spec)
    return jax.tree.map(lambda v: v.astype(dtype), params)
