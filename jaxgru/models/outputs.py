"""The outputs of models: of every step, of the last one, and the loss of token models."""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxgru.core.checks import require_choice, require_shape
from jaxgru.core.gradient import Gradient
from jaxgru.core.noise import Noise, Rate
from jaxgru.losses import Reduction, categorical_loss, require_labels
from jaxgru.models.parameters import SequenceParams, TokenParams, apply_head, embed, require_model
from jaxgru.stacks.checks import StackConfig, require_call
from jaxgru.stacks.dropout import Dropout, drop
from jaxgru.stacks.forms import Bidirectional, Merge
from jaxgru.stacks.run import check_and_run, draw_keys, merge_directions, run_stack

ROOT = "params.layers"  # what messages call the layers


def sequence_outputs(
    params: SequenceParams, xs: jax.Array, h0: Any = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, merge: Merge = "concat",
    residual: bool = False, dropout: Rate | Dropout = 0.0, reverse: bool = False, axis: int = 0,
    gradient: Gradient = "bptt", noise: Noise | None = None, key: jax.Array | None = None,
    deterministic: bool = False, first_step: int | jax.Array = 0, tap: Any = None,
) -> tuple[Any, jax.Array]:  # fmt: skip
    """Runs a model with one output for each step, many to many, and returns (h_last, outputs).

    Args:
      params: of the model.
      xs: [T, ..., I].
      h0, mask, resets, merge, residual, dropout, reverse, axis, gradient, noise, key,
        deterministic, first_step, tap: as in `gru_stack`.

    Returns:
      h_last, as `gru_stack`, and outputs [T, ..., K], float32 for half types.

    Raises:
      ValueError, TypeError: as `gru_stack`.

    >>> from jaxgru.models import init_sequence_model
    >>> params = init_sequence_model(jax.random.key(0), 2, 3, 1)
    >>> h_last, outputs = sequence_outputs(params, jnp.ones((5, 4, 2)))
    >>> outputs.shape
    (5, 4, 1)
    """
    function = "sequence_outputs"
    require_model(function, params, SequenceParams, merge)
    config = StackConfig(merge, residual, dropout, reverse, gradient, noise, deterministic, ROOT)
    h_last, ys = check_and_run(
        function, params.layers, xs, h0, mask, resets, config, key, axis, first_step, tap
    )
    return h_last, apply_head(params, ys)


def final_outputs(
    params: SequenceParams, xs: jax.Array, h0: Any = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, merge: Merge = "concat",
    residual: bool = False, dropout: Rate | Dropout = 0.0, reverse: bool = False, axis: int = 0,
    gradient: Gradient = "bptt", noise: Noise | None = None, key: jax.Array | None = None,
    deterministic: bool = False, first_step: int | jax.Array = 0, tap: Any = None,
) -> tuple[Any, jax.Array]:  # fmt: skip
    """Runs a model with one output for each sequence, many to one, and returns (h_last, outputs).

    The head reads the last state of the top layer; of a bidirectional layer, the forward state
    after the last valid step and the backward state after the first, concatenated or summed. With
    residual it reads the sum of the last states of all layers.

    Args:
      params: of the model.
      xs: [T, ..., I].
      h0, mask, resets, merge, residual, dropout, reverse, axis, gradient, noise, key,
        deterministic, first_step, tap: as in `gru_stack`, with the same draws from key; the output
        rate of dropout acts on what the head reads.

    Returns:
      h_last, as `gru_stack`, and outputs [..., K], float32 for half types.

    Raises:
      ValueError, TypeError: as `gru_stack`.

    >>> from jaxgru.models import init_sequence_model
    >>> params = init_sequence_model(jax.random.key(0), 2, 3, 1, bidirectional=True)
    >>> h_last, outputs = final_outputs(params, jnp.ones((5, 4, 2)))
    >>> outputs.shape
    (4, 1)
    """
    require_model("final_outputs", params, SequenceParams, merge)
    config = StackConfig(merge, residual, dropout, reverse, gradient, noise, deterministic, ROOT)
    config, _, arrays = require_call(
        "final_outputs", params.layers, xs, h0, mask, resets, config, key, axis, first_step, tap
    )
    h_last, _ = run_stack(config, params.layers, h0, key, first_step, *arrays)
    head_key = draw_keys(config, params.layers, key)[-1]
    finals = [merge_directions(merge, *h) if isinstance(h, Bidirectional) else h for h in h_last]
    final = functools.reduce(jnp.add, finals) if residual else finals[-1]
    return h_last, apply_head(params, drop(head_key, final[None], config.dropout.output)[0])


def token_logits(
    params: TokenParams, tokens: jax.Array, h0: Any = None, *,
    mask: jax.Array | None = None, resets: jax.Array | None = None, merge: Merge = "concat",
    residual: bool = False, dropout: Rate | Dropout = 0.0, reverse: bool = False, axis: int = 0,
    gradient: Gradient = "bptt", noise: Noise | None = None, key: jax.Array | None = None,
    deterministic: bool = False, first_step: int | jax.Array = 0, tap: Any = None,
) -> tuple[Any, jax.Array]:  # fmt: skip
    """Runs a token model and returns (h_last, logits of the token after each token).

    Args:
      params: of the model.
      tokens: [T, ...] integers in [0, V), of any integer dtype. Inside jit other tokens cannot be
        refused: from such a token on, the logits and the state of its sequence are NaN. Masked
        tokens may have any value.
      h0, mask, resets, merge, residual, dropout, reverse, axis, gradient, noise, key,
        deterministic, first_step, tap: as in `gru_stack`; axis is one of those of the logits.

    Returns:
      h_last, as `gru_stack`, and logits [T, ..., V], float32 for half types.

    Raises:
      ValueError: outside jit, a token is outside of [0, V); or as `gru_stack`.
      TypeError: tokens are no integers, or as `gru_stack`.

    Cost: that of `gru_stack`, and HV multiply-adds a token for the head.

    >>> from jaxgru.models import init_token_model
    >>> params = init_token_model(jax.random.key(0), 5, 3)
    >>> h_last, logits = token_logits(params, jnp.array([1, 2, 0, 4]))
    >>> h_last[0].shape, logits.shape
    ((3,), (4, 5))
    """
    function = "token_logits"
    require_model(function, params, TokenParams, merge)
    xs = embed(params, require_labels(function, "tokens", tokens, params.w.shape[1], mask))
    config = StackConfig(merge, residual, dropout, reverse, gradient, noise, deterministic, ROOT)
    h_last, ys = check_and_run(
        function, params.layers, xs, h0, mask, resets, config, key, axis, first_step, tap
    )
    return h_last, apply_head(params, ys)


def token_loss(
    params: TokenParams, tokens: jax.Array, targets: jax.Array, h0: Any = None, *,
    reduction: Reduction = "mean",
    mask: jax.Array | None = None, resets: jax.Array | None = None, merge: Merge = "concat",
    residual: bool = False, dropout: Rate | Dropout = 0.0, reverse: bool = False, axis: int = 0,
    gradient: Gradient = "bptt", noise: Noise | None = None, key: jax.Array | None = None,
    deterministic: bool = False, first_step: int | jax.Array = 0, tap: Any = None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Returns (loss, h_last); the loss is the cross-entropy of the next token, in nats.

    Args:
      params: of the model.
      tokens: [T, ...] integers in [0, V), as in `token_logits`.
      targets: [T, ...] integers in [0, V), the token that follows each token. Inside jit a target
        outside of [0, V) makes its entry, and so the loss, NaN.
      h0: in the form of `init_state`; None for zeros. For truncated backpropagation through time,
        pass the last call's h_last, from outside of what is differentiated.
      reduction: "mean" over the counted targets (0 if there are none), "sum", ... as in
        `jaxgru.losses`.
      mask, resets, merge, residual, dropout, reverse, axis, gradient, noise, key, deterministic,
        first_step, tap: as in `token_logits`; targets at masked steps are not counted.

    Returns:
      loss, a scalar ([T, ...] for reduction="none"; float32 for half types), and h_last, as
      `gru_stack`: the order that `jax.value_and_grad(..., has_aux=True)` wants.

    Raises:
      ValueError: targets do not have the shape of tokens, the reduction is unknown, outside jit a
        token or a target that counts is outside of [0, V), or as `gru_stack`.
      TypeError: tokens or targets are no integers, or as `gru_stack`.

    >>> from jaxgru.models import init_token_model
    >>> params = init_token_model(jax.random.key(0), 5, 3)
    >>> params = params._replace(w=jnp.zeros((3, 5)))
    >>> loss, _ = token_loss(params, jnp.array([1, 2]), jnp.array([2, 3]))
    >>> round(float(loss), 4)  # log 5
    1.6094
    """
    function = "token_loss"
    require_model(function, params, TokenParams, merge)
    require_choice(function, "reduction", reduction, get_args(Reduction))
    count = params.w.shape[1]
    tokens = require_labels(function, "tokens", tokens, count, mask)
    if hasattr(targets, "shape"):
        require_shape(function, "targets", targets, tokens.shape, "that of tokens")
    targets = require_labels(function, "targets", targets, count, mask)
    xs = embed(params, tokens)
    config = StackConfig(merge, residual, dropout, reverse, gradient, noise, deterministic, ROOT)
    h_last, ys = check_and_run(
        function, params.layers, xs, h0, mask, resets, config, key, axis, first_step, tap
    )
    logits = apply_head(params, ys)
    axis = axis % logits.ndim  # the losses have one axis less
    return categorical_loss(logits, targets, mask, reduction=reduction, axis=axis), h_last
