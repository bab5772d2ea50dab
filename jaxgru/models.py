"""Models around a stack: sequences in, outputs of every step or of the last; tokens; sampling.

many to many:  o_t = y_t w + b                  many to one:  o = y_last w + b
tokens:        x_t = embedding[token_t]  (or its one-hot row),  logits_t = y_t w + b

with y the outputs of `gru_stack`, and y_last those after the last real step (of both directions).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgru.core.cell import project, split_recurrent, step
from jaxgru.core.checks import (
    is_traced,
    require_choice,
    require_count,
    require_dtype,
    require_flags,
    require_rates,
)
from jaxgru.core.matmul import state_dtype
from jaxgru.core.noise import drop
from jaxgru.losses import Reduction, categorical_loss, require_labels
from jaxgru.stacks import Bidirectional, Layer, Merge, gru_stack, init_stack, output_size_of

__all__ = [
    "SequenceParams",
    "TokenParams",
    "final_outputs",
    "generate",
    "init_sequence_model",
    "init_token_model",
    "sequence_outputs",
    "token_logits",
    "token_loss",
]

Array = jax.Array


class SequenceParams(NamedTuple):
    """The arrays of a model with K outputs."""

    layers: tuple[Layer, ...]
    w: Array  # [H, K], H the size of the top layer's outputs
    b: Array  # [K]


class TokenParams(NamedTuple):
    """The arrays of a token model with V tokens; embedding None feeds one-hot rows of size V."""

    embedding: Array | None  # [V, E]
    layers: tuple[Layer, ...]
    w: Array  # [H, V]
    b: Array  # [V]


def init_sequence_model(
    key: Array,
    input_size: int,
    hidden_size: int | Sequence[int],
    output_size: int,
    *,
    dtype: Any = jnp.float32,
    **stack_options: Any,
) -> SequenceParams:
    """Draws a model: `init_stack`, head LeCun normal with zero bias.

    Args:
      key: a `jax.random.key`.
      input_size: I.
      hidden_size: H of every layer, or a sequence with each layer's own.
      output_size: K.
      dtype: of every array.
      **stack_options: num_layers, bidirectional, merge, bias, layer_norm, scheme, to `init_stack`.

    Returns:
      SequenceParams: layers, w [H, K] ([2H, K] for two directions side by side), b [K].

    Raises:
      ValueError, TypeError: a size is no positive integer, or as `init_stack`.

    >>> params = init_sequence_model(jax.random.key(0), 2, 3, 1, bidirectional=True)
    >>> params.w.shape
    (6, 1)
    """
    require_count("init_sequence_model", "output_size", output_size)
    key_layers, key_head = jax.random.split(key)
    layers = init_stack(key_layers, input_size, hidden_size, dtype=dtype, **stack_options)
    w, b = _init_head(key_head, layers, output_size, stack_options.get("merge", "concat"), dtype)
    return SequenceParams(layers, w, b)


def sequence_outputs(
    params: SequenceParams, xs: Array, h0: Any = None, **stack_options: Any
) -> tuple[Any, Array]:
    """(h_last, outputs), many to many: one output a step.

    Args:
      params: of the model.
      xs: [T, ..., I].
      h0: in the form of `init_state`; None for zeros.
      **stack_options: mask, resets, dropout, key, merge, gradient, axis, ... of `gru_stack`.

    Returns:
      h_last, as `gru_stack`, and outputs [T, ..., K], float32 for half types.

    Raises:
      ValueError, TypeError: as `gru_stack`.

    >>> params = init_sequence_model(jax.random.key(0), 2, 3, 1)
    >>> h_last, outputs = sequence_outputs(params, jnp.ones((5, 4, 2)))
    >>> outputs.shape
    (5, 4, 1)
    """
    require_head("sequence_outputs", params, SequenceParams, stack_options.get("merge", "concat"))
    h_last, ys = gru_stack(params.layers, xs, h0, **stack_options)
    return h_last, _head(params, ys)


def final_outputs(
    params: SequenceParams,
    xs: Array,
    h0: Any = None,
    *,
    merge: Merge = "concat",
    residual: bool = False,
    output_dropout: float = 0.0,
    key: Array | None = None,
    deterministic: bool = False,
    **stack_options: Any,
) -> tuple[Any, Array]:
    """(h_last, outputs), many to one: one output a sequence, after its last real step.

    The head reads the top layer's last state (of both directions: forward's after the last step
    beside, or plus, backward's after the first); with residual, the sum of that over the layers.

    Args:
      params: of the model.
      xs: [T, ..., I].
      h0: in the form of `init_state`; None for zeros.
      merge: "concat" or "sum", as `gru_stack`.
      residual: as `gru_stack`.
      output_dropout: rate in [0, 1) of the dropout of what the head reads.
      key: a `jax.random.key`, needed where a rate acts.
      deterministic: as `gru_stack`.
      **stack_options: mask, resets, dropout, gradient, axis, ... of `gru_stack`.

    Returns:
      h_last, as `gru_stack`, and outputs [..., K], float32 for half types.

    Raises:
      ValueError, TypeError: as `gru_stack`.

    >>> params = init_sequence_model(jax.random.key(0), 2, 3, 1, bidirectional=True)
    >>> h_last, outputs = final_outputs(params, jnp.ones((5, 4, 2)))
    >>> outputs.shape
    (4, 1)
    """
    require_head("final_outputs", params, SequenceParams, merge)
    require_rates("final_outputs", {"output_dropout": output_dropout}, key, deterministic)
    key = None if deterministic else key
    stack_key, head_key = (None, None) if key is None else jax.random.split(key)
    options = {"merge": merge, "residual": residual, "deterministic": deterministic}
    h_last, _ = gru_stack(params.layers, xs, h0, key=stack_key, **options, **stack_options)

    def join(h):
        if not isinstance(h, tuple):
            return h
        return h[0] + h[1] if merge == "sum" else jnp.concatenate(h, axis=-1)

    finals = [join(h) for h in h_last]
    final = functools.reduce(jnp.add, finals) if residual else finals[-1]
    return h_last, _head(params, drop(head_key, final, output_dropout))


def init_token_model(
    key: Array,
    vocab_size: int,
    hidden_size: int | Sequence[int],
    *,
    embedding_size: int | None = None,
    dtype: Any = jnp.float32,
    **stack_options: Any,
) -> TokenParams:
    """Draws a token model: embedding N(0, 1), `init_stack`, head LeCun normal with zero bias.

    Args:
      key: a `jax.random.key`.
      vocab_size: V.
      hidden_size: H of every layer, or a sequence with each layer's own.
      embedding_size: E; None feeds the tokens as one-hot rows.
      dtype: of every array.
      **stack_options: num_layers, bias, layer_norm, scheme, ... to `init_stack`.

    Returns:
      TokenParams: embedding [V, E] or None, layers, w [H, V], b [V].

    Raises:
      ValueError, TypeError: a size is no positive integer, or as `init_stack`.

    >>> params = init_token_model(jax.random.key(0), 5, 3, embedding_size=2)
    >>> params.embedding.shape, params.layers[0].w_x.shape, params.w.shape
    ((5, 2), (2, 9), (3, 5))
    """
    require_count("init_token_model", "vocab_size", vocab_size)
    dtype = require_dtype("init_token_model", dtype)
    key_embedding, key_layers, key_head = jax.random.split(key, 3)
    embedding = None
    if embedding_size is not None:
        require_count("init_token_model", "embedding_size", embedding_size)
        embedding = jax.random.normal(key_embedding, (vocab_size, embedding_size), dtype)
    input_size = vocab_size if embedding_size is None else embedding_size
    layers = init_stack(key_layers, input_size, hidden_size, dtype=dtype, **stack_options)
    w, b = _init_head(key_head, layers, vocab_size, stack_options.get("merge", "concat"), dtype)
    return TokenParams(embedding, layers, w, b)


def token_logits(
    params: TokenParams, tokens: Array, h0: Any = None, **stack_options: Any
) -> tuple[Any, Array]:
    """(h_last, logits): the unnormalized log-probabilities of the token after each token.

    Args:
      params: of the model.
      tokens: [T, ...] integers in [0, V). Inside jit an index outside is clamped by JAX, so check
        tokens where they are made.
      h0: in the form of `init_state`; None for zeros.
      **stack_options: mask, resets, dropout, key, axis, ... of `gru_stack`.

    Returns:
      h_last, as `gru_stack`, and logits [T, ..., V], float32 for half types.

    Raises:
      TypeError: tokens are no integers.
      ValueError, TypeError: as `gru_stack`.

    Cost: that of `gru_stack`, and HV multiply-adds a token for the head.

    >>> params = init_token_model(jax.random.key(0), 5, 3)
    >>> h_last, logits = token_logits(params, jnp.array([1, 2, 0, 4]))
    >>> h_last[0].shape, logits.shape
    ((3,), (4, 5))
    """
    require_head("token_logits", params, TokenParams, stack_options.get("merge", "concat"))
    require_labels("token_logits", "tokens", tokens)
    h_last, ys = gru_stack(params.layers, _embed(params, tokens), h0, **stack_options)
    return h_last, _head(params, ys)


def token_loss(
    params: TokenParams,
    tokens: Array,
    targets: Array,
    h0: Any = None,
    *,
    mask: Array | None = None,
    reduction: Reduction = "mean",
    **stack_options: Any,
) -> tuple[Array, Any]:
    """(loss, h_last): the cross-entropy of the next token, -log softmax(logits)[target], in nats.

    Args:
      params: of the model.
      tokens: [T, ...] integers in [0, V).
      targets: [T, ...] integers in [0, V): the token that follows each token.
      h0: in the form of `init_state`; None for zeros. Passing the last call's h_last, outside of
        what is differentiated, is truncated backpropagation through time.
      mask: [T, ...] bool: where it is False the state is held and the target not counted.
      reduction: "mean" over the counted targets (0 if there are none), "sum", ... as
        `jaxgru.losses` has them.
      **stack_options: to `gru_stack`.

    Returns:
      loss, a scalar ([T, ...] for reduction="none"; float32 for half types), and h_last, as
      `gru_stack`: the order that `jax.value_and_grad(..., has_aux=True)` wants.

    Raises:
      ValueError: targets do not have the shape of tokens, or the reduction is unknown.
      TypeError: tokens or targets are no integers.

    >>> params = init_token_model(jax.random.key(0), 5, 3)
    >>> params = params._replace(w=jnp.zeros((3, 5)))
    >>> loss, _ = token_loss(params, jnp.array([1, 2]), jnp.array([2, 3]))
    >>> round(float(loss), 4)  # log 5
    1.6094
    """
    require_choice("token_loss", "reduction", reduction, get_args(Reduction))
    require_labels("token_loss", "targets", targets)
    if targets.shape != tokens.shape:
        raise ValueError(
            f"token_loss: targets must have the shape of tokens, {tokens.shape}, "
            f"got {targets.shape}."
        )
    h_last, logits = token_logits(params, tokens, h0, mask=mask, **stack_options)
    axis = stack_options.get("axis", 0)
    return categorical_loss(logits, targets, mask, reduction=reduction, axis=axis), h_last


def generate(
    params: TokenParams,
    key: Array,
    prompt: Array,
    num_steps: int,
    *,
    mask: Array | None = None,
    h0: Any = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    residual: bool = False,
    zoneout: float = 0.0,
) -> tuple[Any, Array]:
    """(h_last, tokens): continues a prompt, each token drawn from softmax(logits / temperature).

    Compiled once for each prompt shape, num_steps, residual, zoneout and set of filters in
    use (temperature=0 is one); the whole loop is one program, and temperature, top_k and top_p may
    change from call to call.

    Args:
      params: of the model.
      key: a `jax.random.key`.
      prompt: [P, ...] integers in [0, V), P at least 1; one token of a result is tokens[-1:].
      num_steps: how many tokens to draw.
      mask: [P, ...] bool for prompts of several lengths, True on their tokens; None for all.
      h0: the state before the prompt, in the form of `init_state`; None for zeros.
      temperature: above 0; 0 takes the likeliest token (greedy).
      top_k: draws from the k likeliest tokens (and those as likely as the k-th); None for all.
      top_p: draws from the fewest likeliest tokens whose probabilities add up to at least p
        (Holtzman et al. 2020, arXiv:1904.09751, eq. 2), and those as likely as the last of them,
        after top_k; None for all.
      residual: as the model was trained with.
      zoneout: as the model was trained with; its mean is used.

    Returns:
      h_last, the state before the last token is read, so that a call with that token as prompt and
      h_last as h0 goes on; and tokens [num_steps, ...] int32.

    Raises:
      ValueError: a token is outside [0, V), the prompt is empty, num_steps or top_k is below 1,
        top_p is outside (0, 1], a prompt has no token under the mask, the temperature is negative
        or not finite, or a layer is bidirectional.
      TypeError: the prompt holds no integers.

    Cost: the products of one step of each layer and of the head a token. Where V is at most
    num_steps, what the first layer makes of each token's input is made once, 3VH numbers, and
    looked up.

    >>> params = init_token_model(jax.random.key(0), 5, 3)
    >>> _, tokens = generate(params, jax.random.key(1), jnp.array([1]), 4, top_k=2)
    >>> tokens.shape
    (4,)
    """
    require_head("generate", params, TokenParams, "concat")
    if any(isinstance(layer, Bidirectional) for layer in params.layers):
        raise ValueError(
            "generate: params must hold layers of one direction, got a Bidirectional, whose "
            "outputs depend on later tokens."
        )
    require_labels("generate", "prompt", prompt)
    require_count("generate", "num_steps", num_steps)
    vocab_size = params.w.shape[1]
    if prompt.ndim < 1 or prompt.shape[0] < 1:
        raise ValueError(f"generate: prompt must hold at least one token, got {prompt.shape}.")
    require_flags("generate", {"mask": mask}, prompt.shape, "that of prompt")
    if mask is not None and not is_traced(mask) and not np.asarray(mask).any(axis=0).all():
        raise ValueError("generate: mask must be True on a token of every prompt, got none of one.")
    if not is_traced(prompt):
        values = np.asarray(prompt)
        if values.size and not (values.min() >= 0 and values.max() < vocab_size):
            raise ValueError(
                f"generate: prompt must hold tokens in [0, {vocab_size}), got {values.min()} to "
                f"{values.max()}."
            )
    if not is_traced(temperature) and not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature must be finite and >= 0, got {temperature}.")
    if top_k is not None and not is_traced(top_k):
        require_count("generate", "top_k", top_k)
    if top_p is not None and not is_traced(top_p) and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}.")
    greedy = not is_traced(temperature) and temperature == 0
    filters = (
        None if greedy else jnp.float32(temperature),
        None if top_k is None else jnp.int32(top_k),
        None if top_p is None else jnp.float32(top_p),
    )
    equation = (("residual", residual), ("zoneout", zoneout))
    return _generate(params, key, prompt, mask, h0, filters, num_steps, equation)


@functools.partial(jax.jit, static_argnames=("num_steps", "equation"))
def _generate(params, key, prompt, mask, h0, filters, num_steps, equation):
    options = dict(equation)
    h, logits = token_logits(  # held after the last token
        params, prompt, h0, mask=mask, deterministic=True, **options
    )
    run_step = _prepare_steps(params, num_steps, **options)

    def body(carry, key):
        h, token = carry
        h, y = run_step(h, token)
        token_next = _draw(key, _head(params, y), *filters)
        return (h, token_next), token_next

    keys = jax.random.split(key, num_steps)
    first = _draw(keys[0], logits[-1], *filters)
    (h, _), rest = lax.scan(body, (h, first), keys[1:])
    return h, jnp.concatenate([first[None], rest])


def _prepare_steps(params, num_steps, residual, zoneout):
    """(h, token) -> (h, y), one step of all layers with everything made beforehand that can be.

    That is the pieces of w_h and, for a vocabulary of no more tokens than there are steps, what the
    first layer makes of every token's input: a row is then looked up instead of multiplied.
    """
    first, recurrents = params.layers[0], [split_recurrent(p) for p in params.layers]
    vocab_size, table = params.w.shape[1], None
    if vocab_size <= num_steps:
        table = project(first, _embed(params, jnp.arange(vocab_size)))

    def run_step(states, token):
        y, h_next = _embed(params, token), []
        for layer, recurrent, h in zip(params.layers, recurrents, states):
            if table is None or h_next:
                a = project(layer, y)
            else:
                a = tuple(rows[token] for rows in table)
            wide = h.astype(state_dtype(h.dtype))
            h_t = step(recurrent, a, wide)[0]
            h_t = ((1 - zoneout) * h_t + zoneout * wide if zoneout else h_t).astype(h.dtype)
            y = h_t + y if residual and h_next else h_t
            h_next.append(h_t)
        return tuple(h_next), y

    return run_step


def _draw(key, logits, temperature, top_k, top_p):
    """A token from softmax(logits / temperature) under the filters; the likeliest where it is 0."""
    likeliest = logits.argmax(-1).astype(jnp.int32)
    if temperature is None:  # known to be 0
        return likeliest
    logits = logits.astype(jnp.float32)
    logits = logits - logits.max(axis=-1, keepdims=True)  # a small temperature makes no infinity
    logits = logits / jnp.where(temperature > 0, temperature, 1)
    if top_k is not None:
        place = jnp.minimum(top_k, logits.shape[-1]) - 1
        logits = _at_least(logits, jnp.take(_descending(logits), place[None], axis=-1))
    if top_p is not None:
        ordered = _descending(logits)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        chosen = (before < top_p) | (top_p >= 1)  # the first always is
        kept = jnp.where(chosen, ordered, jnp.inf)
        logits = _at_least(logits, kept.min(axis=-1, keepdims=True))
    sampled = jax.random.categorical(key, logits)
    return jnp.where(temperature > 0, sampled.astype(jnp.int32), likeliest)


def _descending(logits):
    return -jnp.sort(-logits, axis=-1)


def _at_least(logits, threshold):
    """Logits below the threshold become -inf."""
    return jnp.where(logits < threshold, -jnp.inf, logits)


def _embed(params, tokens):
    """x = embedding[token], or the one-hot row."""
    if params.embedding is None:
        return jax.nn.one_hot(tokens, params.w.shape[1], dtype=params.w.dtype)
    return jnp.asarray(params.embedding)[tokens]  # NumPy does not index by traced ones


def _head(params, hs):
    """logits = h w + b, summed in the state dtype: float32 for half types."""
    contract = (((hs.ndim - 1,), (0,)), ((), ()))
    wide = state_dtype(params.w.dtype)
    logits = lax.dot_general(hs, params.w, contract, preferred_element_type=wide)
    return logits + params.b.astype(wide).reshape((1,) * (logits.ndim - 1) + params.b.shape)


def require_head(function, params, kind, merge):
    """TypeError or ValueError unless params are of that kind and their head fits their layers."""
    if not isinstance(params, kind):
        raise TypeError(
            f"{function}: params must be a {kind.__name__}, got {type(params).__name__}."
        )
    size = output_size_of(params.layers[-1], merge)
    if params.w.shape[0] != size:
        raise ValueError(
            f"{function}: params.w must have {size} rows (the outputs of the top layer, "
            f"merge={merge!r}), got {params.w.shape[0]}; pass the merge that it was made with."
        )


def _init_head(key, layers, output_size, merge, dtype):
    """w, LeCun normal, and b, zero, on the outputs of the top layer."""
    shape = (output_size_of(layers[-1], merge), output_size)
    return jax.nn.initializers.lecun_normal()(key, shape, dtype), jnp.zeros(output_size, dtype)
