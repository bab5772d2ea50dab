"""Models around the recurrence: a token model, its loss, and sampling from it.

x_t = embedding[token_t]  (or its one-hot row)
h_t = gru step(x_t, h_{t-1})
logits_t = h_t w + b
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxgru.arguments import is_traced, require_choice, require_count
from jaxgru.cell import CHO_2014, GRUParams, GRUSpec, gru_cell, init_gru, state_dtype
from jaxgru.recurrence import gru

Array = jax.Array


class TokenParams(NamedTuple):
    """The arrays of a token model with V tokens; embedding None feeds one-hot rows of size V."""

    embedding: Array | None  # [V, E]
    gru: GRUParams
    w: Array  # [H, V]
    b: Array  # [V]


def init_token_model(
    key: Array,
    vocab_size: int,
    hidden_size: int,
    *,
    embedding_size: int | None = None,
    dtype: Any = jnp.float32,
    **gru_options: Any,
) -> TokenParams:
    """Draws a token model: embedding N(0, 1), `init_gru`, head LeCun normal with zero bias.

    Args:
      key: a `jax.random.key`.
      vocab_size: V.
      hidden_size: H.
      embedding_size: E; None feeds the tokens as one-hot rows.
      dtype: of every array.
      **gru_options: bias and scheme, to `init_gru`.

    Returns:
      TokenParams: embedding [V, E] or None, gru, w [H, V], b [V].

    Raises:
      ValueError, TypeError: a size is no positive integer, or as `init_gru`.

    >>> params = init_token_model(jax.random.key(0), 5, 3, embedding_size=2)
    >>> params.embedding.shape, params.gru.w_x.shape, params.w.shape
    ((5, 2), (2, 9), (3, 5))
    """
    require_count("init_token_model", "vocab_size", vocab_size)
    key_embedding, key_gru, key_head = jax.random.split(key, 3)
    embedding = None
    if embedding_size is not None:
        require_count("init_token_model", "embedding_size", embedding_size)
        embedding = jax.random.normal(key_embedding, (vocab_size, embedding_size), dtype)
    input_size = vocab_size if embedding_size is None else embedding_size
    return TokenParams(
        embedding,
        init_gru(key_gru, input_size, hidden_size, dtype=dtype, **gru_options),
        jax.nn.initializers.lecun_normal()(key_head, (hidden_size, vocab_size), dtype),
        jnp.zeros(vocab_size, dtype),
    )


def token_logits(
    params: TokenParams, tokens: Array, h0: Array | None = None, **gru_options: Any
) -> tuple[Array, Array]:
    """(h_last, logits): the unnormalized log-probabilities of the token after each token.

    Args:
      params: of the model.
      tokens: [T, ...] integers in [0, V). Inside jit an index outside is clamped by JAX, so check
        tokens where they are made.
      h0: [..., H]; None for zeros.
      **gru_options: spec, mask, resets, gradient, residuals, ... of `gru`; time is axis 0.

    Returns:
      h_last [..., H] and logits [T, ..., V], float32 for half types.

    Raises:
      TypeError: tokens are no integers.
      ValueError, TypeError: as `gru`.

    Cost: that of `gru`, and HV multiply-adds a token for the head.

    >>> params = init_token_model(jax.random.key(0), 5, 3)
    >>> h_last, logits = token_logits(params, jnp.array([1, 2, 0, 4]))
    >>> h_last.shape, logits.shape
    ((3,), (4, 5))
    """
    _require_tokens("token_logits", tokens)
    h_last, hs = gru(params.gru, _embed(params, tokens), h0, **gru_options)
    return h_last, _head(params, hs)


def token_loss(
    params: TokenParams,
    tokens: Array,
    targets: Array,
    h0: Array | None = None,
    *,
    mask: Array | None = None,
    reduction: str = "mean",
    **gru_options: Any,
) -> tuple[Array, Array]:
    """(loss, h_last): the cross-entropy of the next token, -log softmax(logits)[target], in nats.

    Args:
      params: of the model.
      tokens: [T, ...] integers in [0, V).
      targets: [T, ...] integers in [0, V): the token that follows each token.
      h0: [..., H]; None for zeros. Passing the last call's h_last, outside of what is
        differentiated, is truncated backpropagation through time.
      mask: [T, ...] bool: where it is False the state is held and the target not counted.
      reduction: "mean" over the counted targets (0 if there are none) or their "sum".
      **gru_options: to `gru`.

    Returns:
      loss, a scalar (float32 for half types), and h_last [..., H]: the order that
      `jax.value_and_grad(..., has_aux=True)` wants.

    Raises:
      ValueError: targets do not have the shape of tokens, or the reduction is unknown.
      TypeError: tokens or targets are no integers.

    >>> params = init_token_model(jax.random.key(0), 5, 3)
    >>> params = params._replace(w=jnp.zeros((3, 5)))
    >>> loss, _ = token_loss(params, jnp.array([1, 2]), jnp.array([2, 3]))
    >>> round(float(loss), 4)  # log 5
    1.6094
    """
    require_choice("token_loss", "reduction", reduction, ("mean", "sum"))
    _require_tokens("token_loss", targets, "targets")
    if targets.shape != tokens.shape:
        raise ValueError(
            f"token_loss: targets must have the shape of tokens, {tokens.shape}, "
            f"got {targets.shape}."
        )
    h_last, logits = token_logits(params, tokens, h0, mask=mask, **gru_options)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if mask is not None:
        losses = jnp.where(mask, losses, jnp.zeros_like(losses))
    loss = losses.sum()
    if reduction == "mean":
        count = losses.size if mask is None else jnp.maximum(mask.sum(), 1).astype(loss.dtype)
        loss = loss / max(count, 1) if mask is None else loss / count
    return loss, h_last


def generate(
    params: TokenParams,
    key: Array,
    prompt: Array,
    num_steps: int,
    *,
    h0: Array | None = None,
    temperature: float = 1.0,
    spec: GRUSpec = CHO_2014,
) -> tuple[Array, Array]:
    """(h_last, tokens): continues a prompt, each token drawn from softmax(logits / temperature).

    Compiled once for each prompt shape and num_steps; the whole loop is one program.

    Args:
      params: of the model.
      key: a `jax.random.key`.
      prompt: [P, ...] integers in [0, V), P at least 1.
      num_steps: how many tokens to draw.
      h0: [..., H], the state before the prompt; None for zeros.
      temperature: above 0; 0 takes the likeliest token.
      spec: which equation.

    Returns:
      h_last [..., H], the state before the last token is read, so that a call with that token as
      prompt and h_last as h0 goes on; and tokens [num_steps, ...] int32.

    Raises:
      ValueError: a token is outside [0, V), the prompt is empty, num_steps is below 1, or the
        temperature is negative or not finite.
      TypeError: the prompt holds no integers.

    >>> params = init_token_model(jax.random.key(0), 5, 3)
    >>> _, tokens = generate(params, jax.random.key(1), jnp.array([1]), 4)
    >>> tokens.shape
    (4,)
    """
    _require_tokens("generate", prompt, "prompt")
    require_count("generate", "num_steps", num_steps)
    vocab_size = params.w.shape[1]
    if prompt.ndim < 1 or prompt.shape[0] < 1:
        raise ValueError(f"generate: prompt must hold at least one token, got {prompt.shape}.")
    if not is_traced(prompt):
        values = np.asarray(prompt)
        if values.size and not (values.min() >= 0 and values.max() < vocab_size):
            raise ValueError(
                f"generate: prompt must hold tokens in [0, {vocab_size}), got {values.min()} to "
                f"{values.max()}."
            )
    if not is_traced(temperature) and not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be finite and >= 0, got {temperature}.")
    return _generate(params, key, prompt, h0, jnp.float32(temperature), num_steps, spec)


@functools.partial(jax.jit, static_argnames=("num_steps", "spec"))
def _generate(params, key, prompt, h0, temperature, num_steps, spec):
    h, logits = token_logits(params, prompt, h0, spec=spec)

    def draw(key, logits):
        logits = logits.astype(jnp.float32)
        sampled = jax.random.categorical(key, logits / jnp.where(temperature > 0, temperature, 1))
        return jnp.where(temperature > 0, sampled, logits.argmax(-1)).astype(jnp.int32)

    def body(carry, key):
        h, token = carry
        h = gru_cell(params.gru, _embed(params, token), h, spec=spec)
        token_next = draw(key, _head(params, h))
        return (h, token_next), token_next

    keys = jax.random.split(key, num_steps)
    first = draw(keys[0], logits[-1])
    (h, _), rest = lax.scan(body, (h, first), keys[1:])
    return h, jnp.concatenate([first[None], rest])


def _embed(params, tokens):
    """x = embedding[token], or the one-hot row."""
    if params.embedding is None:
        return jax.nn.one_hot(tokens, params.w.shape[1], dtype=params.w.dtype)
    return params.embedding[tokens]


def _head(params, hs):
    """logits = h w + b, summed in the state dtype: float32 for half types."""
    contract = (((hs.ndim - 1,), (0,)), ((), ()))
    wide = state_dtype(params.w.dtype)
    logits = lax.dot_general(hs, params.w, contract, preferred_element_type=wide)
    return logits + params.b.astype(wide).reshape((1,) * (logits.ndim - 1) + params.b.shape)


def _require_tokens(function, tokens, argument="tokens"):
    """TypeError unless tokens is an integer array."""
    dtype = getattr(tokens, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        found = f"dtype {dtype}" if dtype is not None else type(tokens).__name__
        raise TypeError(f"{function}: {argument} must be an integer array, got {found}.")
