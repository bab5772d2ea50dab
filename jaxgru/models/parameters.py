"""The parameters of models: a stack, and a linear head on its outputs."""

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxgru.core.checks import (
    require_choice,
    require_count,
    require_dtype,
    require_float,
    require_key,
)
from jaxgru.core.matmul import like_row, matmul
from jaxgru.core.parameters import CHO_2014, GRUSpec
from jaxgru.initializers import Scheme
from jaxgru.stacks.checks import require_grus
from jaxgru.stacks.create import init_stack
from jaxgru.stacks.forms import Layer, Merge, directions_of, output_size_of


class SequenceParams(NamedTuple):
    """The arrays of a model with K outputs."""

    layers: tuple[Layer, ...]
    w: jax.Array  # [H, K], H the size of the top layer's outputs
    b: jax.Array  # [K]


class TokenParams(NamedTuple):
    """The arrays of a token model with V tokens; embedding None feeds one-hot rows of size V."""

    embedding: jax.Array | None  # [V, E]
    layers: tuple[Layer, ...]
    w: jax.Array  # [H, V]
    b: jax.Array  # [V]


# `jax.export` writes functions of models to files.
for _kind in (SequenceParams, TokenParams):
    jax.export.register_namedtuple_serialization(_kind, serialized_name=f"jaxgru.{_kind.__name__}")


def init_sequence_model(
    key: jax.Array, input_size: int, hidden_size: int | Sequence[int], output_size: int,
    num_layers: int | None = None, *, spec: GRUSpec = CHO_2014, bidirectional: bool = False,
    merge: Merge = "concat", bias: bool = True, layer_norm: bool = False,
    scheme: Scheme = "orthogonal", dtype: Any = jnp.float32,
) -> SequenceParams:  # fmt: skip
    """Draws a model: `init_stack`, and a head drawn LeCun normal with zero bias.

    Args:
      output_size: K.
      key, input_size, hidden_size, num_layers, spec, bidirectional, merge, bias, layer_norm,
        scheme, dtype: as in `init_stack`.

    Returns:
      SequenceParams: layers, w [H, K] ([2H, K] for two directions side by side), b [K].

    Raises:
      ValueError, TypeError: a size is no positive integer, or as `init_stack`.

    >>> params = init_sequence_model(jax.random.key(0), 2, 3, 1, bidirectional=True)
    >>> params.w.shape
    (6, 1)
    """
    require_key("init_sequence_model", key)
    require_count("init_sequence_model", "output_size", output_size)
    key_layers, key_head = jax.random.split(key)
    layers = init_stack(
        key_layers, input_size, hidden_size, num_layers, spec=spec, bidirectional=bidirectional,
        merge=merge, bias=bias, layer_norm=layer_norm, scheme=scheme, dtype=dtype,
    )  # fmt: skip
    return SequenceParams(layers, *_init_head(key_head, layers, output_size, merge, dtype))


def init_token_model(
    key: jax.Array, vocab_size: int, hidden_size: int | Sequence[int],
    num_layers: int | None = None, *, embedding_size: int | None = None,
    spec: GRUSpec = CHO_2014, bidirectional: bool = False, merge: Merge = "concat",
    bias: bool = True, layer_norm: bool = False, scheme: Scheme = "orthogonal",
    dtype: Any = jnp.float32,
) -> TokenParams:  # fmt: skip
    """Draws a token model: embedding N(0, 1), `init_stack`, head LeCun normal with zero bias.

    Args:
      vocab_size: V.
      embedding_size: E; None feeds the tokens as one-hot rows.
      key, hidden_size, num_layers, spec, bidirectional, merge, bias, layer_norm, scheme, dtype: as
        in `init_stack`.

    Returns:
      TokenParams: embedding [V, E] or None, layers, w [H, V], b [V].

    Raises:
      ValueError, TypeError: a size is no positive integer, or as `init_stack`.

    >>> params = init_token_model(jax.random.key(0), 5, 3, embedding_size=2)
    >>> params.embedding.shape, params.layers[0].w_x.shape, params.w.shape
    ((5, 2), (2, 9), (3, 5))
    """
    require_key("init_token_model", key)
    require_count("init_token_model", "vocab_size", vocab_size)
    dtype = require_dtype("init_token_model", dtype)
    key_embedding, key_layers, key_head = jax.random.split(key, 3)
    embedding, input_size = None, vocab_size
    if embedding_size is not None:
        require_count("init_token_model", "embedding_size", embedding_size)
        embedding = jax.random.normal(key_embedding, (vocab_size, embedding_size), dtype)
        input_size = embedding_size
    layers = init_stack(
        key_layers, input_size, hidden_size, num_layers, spec=spec, bidirectional=bidirectional,
        merge=merge, bias=bias, layer_norm=layer_norm, scheme=scheme, dtype=dtype,
    )  # fmt: skip
    return TokenParams(embedding, layers, *_init_head(key_head, layers, vocab_size, merge, dtype))


def _init_head(key, layers, output_size, merge, dtype):
    """w, LeCun normal, and b, zero, on the outputs of the top layer."""
    shape = (output_size_of(layers[-1], merge), output_size)
    return jax.nn.initializers.lecun_normal()(key, shape, dtype), jnp.zeros(output_size, dtype)


def apply_head(params: SequenceParams | TokenParams, hs: jax.Array) -> jax.Array:
    """h w + b, summed in the state dtype: float32 for half types."""
    outputs = matmul(hs, params.w)
    return outputs + like_row(params.b, outputs)


def embed(params: TokenParams, tokens: jax.Array) -> jax.Array:
    """x = embedding[token], or the one-hot row; NaN for a token outside of [0, V)."""
    if params.embedding is not None:
        return look_up(jnp.asarray(params.embedding), tokens)
    count, dtype = params.w.shape[1], params.w.dtype
    rows = jax.nn.one_hot(tokens, count, dtype=dtype)
    legal = (tokens >= 0) & (tokens < count)
    return jnp.where(legal[..., None], rows, jnp.full((), jnp.nan, dtype))


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """table[token]; NaN for a token that has no row."""
    options = {"mode": "fill", "fill_value": jnp.nan, "wrap_negative_indices": False}
    sharding = getattr(jax.typeof(tokens), "sharding", None)
    if sharding is not None and any(axis is not None for axis in sharding.spec):  # explicit axes
        rows = jax.P(*sharding.spec, *[None] * (table.ndim - 1))
        options["out_sharding"] = jax.NamedSharding(sharding.mesh, rows)
    return table.at[tokens].get(**options)


def require_model(function: str, params: Any, kind: type, merge: Merge) -> None:
    """TypeError or ValueError unless params are of that kind and their arrays fit each other."""
    if not isinstance(params, kind):
        raise TypeError(
            f"{function}: params must be a {kind.__name__}, got {type(params).__name__}."
        )
    require_choice(function, "merge", merge, get_args(Merge))
    require_grus(function, params.layers, stack=True, root="params.layers")
    size, w_x = output_size_of(params.layers[-1], merge), directions_of(params.layers[0])[0].w_x
    shape = np.shape(params.w)
    if len(shape) != 2 or shape[0] != size:
        found = shape[0] if len(shape) == 2 else f"shape {shape}"
        raise ValueError(
            f"{function}: params.w must have {size} rows (the outputs of the top layer, "
            f"merge={merge!r}), got {found}; pass the merge that it was made with."
        )
    columns, rows = "the columns of params.w", "the rows of the first layer's w_x"
    shapes = {"w": (shape, ""), "b": (shape[1:], columns)}
    # Without an embedding a token model reads one-hot rows, of size V.
    if kind is TokenParams and (params.embedding is not None or shape[1] != w_x.shape[0]):
        shapes["embedding"] = ((shape[1], w_x.shape[0]), f"{columns}, then {rows}")
    for name, (wanted, meaning) in shapes.items():
        value = getattr(params, name)
        if np.shape(value) != wanted:
            raise ValueError(
                f"{function}: params.{name} must have shape {wanted} ({meaning}), got "
                f"{'None' if value is None else np.shape(value)}."
            )
        if getattr(value, "dtype", w_x.dtype) != w_x.dtype:
            raise TypeError(
                f"{function}: params.{name} must have the dtype of the layers, {w_x.dtype}, got "
                f"{value.dtype}; cast one of them."
            )
        require_float(function, f"params.{name}", value)
