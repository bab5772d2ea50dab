"""Sampling from token models."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgru.core.cell import project, split_recurrent, step
from jaxgru.core.checks import is_traced, require_axis, require_count, require_key
from jaxgru.core.flags import Flags
from jaxgru.core.gradient import BPTT
from jaxgru.core.matmul import state_dtype
from jaxgru.core.noise import Noise, as_constant, require_noise
from jaxgru.losses import is_readable, require_labels
from jaxgru.models.outputs import ROOT
from jaxgru.models.parameters import TokenParams, apply_head, embed, look_up, require_model
from jaxgru.stacks.checks import StackConfig, require_layers, require_one_way
from jaxgru.stacks.dropout import Dropout
from jaxgru.stacks.forms import directions_of
from jaxgru.stacks.run import run_stack


def generate(
    params: TokenParams, key: jax.Array, prompt: jax.Array, num_steps: int, *,
    mask: jax.Array | None = None, h0: Any = None, axis: int = 0,
    temperature: float | jax.Array = 1.0, top_k: int | None = None, top_p: float | None = None,
    stop_token: int | None = None, residual: bool = False, noise: Noise | None = None,
) -> tuple[Any, jax.Array]:  # fmt: skip
    """(h_last, tokens): continues a prompt, each token drawn from softmax(logits / temperature).

    Compiled once for each prompt shape, num_steps, axis, residual, noise and set of filters in
    use (temperature=0 is one, and one temperature for each prompt another); the whole loop is one
    program, and temperature, top_k, top_p and stop_token may change from call to call.

    Args:
      params: of the model.
      key: a `jax.random.key`.
      prompt: [P, ...] integers in [0, V), time first, P at least 1; to continue a result, pass
        tokens[-1:] as prompt and h_last as h0. Masked tokens may have any value.
      num_steps: how many tokens to draw.
      mask: [P, ...] bool for prompts of several lengths, True on their tokens; None for all.
      h0: the state before the prompt, in the form of `init_state`; None for zeros.
      axis: the axis of time in prompt, mask and tokens; 1 for [B, P].
      temperature: at least 0; 0 takes the likeliest token (greedy). An array [...], the batch axes
        of prompt, has one for each prompt.
      top_k: draws from the k likeliest tokens (and those as likely as the k-th); None for all.
      top_p: draws from the fewest likeliest tokens whose probabilities add up to at least p
        (Holtzman et al. 2020, arXiv:1904.09751, eq. 2), and those as likely as the last of them,
        after top_k; None for all.
      stop_token: in [0, V). After a sequence has drawn it, all its tokens are stop_token, and its
        state stays as it is; a call that continues reads it as any token. None stops none.
      residual: as the model was trained with.
      noise: as the model was trained with; the mean of its zoneout acts.

    Returns:
      h_last, the state before the last token is read, or before the first stop_token of a sequence
      that has stopped; and tokens [num_steps, ...] int32. Inside jit, where nothing can be
      refused, tokens are -1 from the first on whose logits are NaN or infinite.

    Raises:
      ValueError: a token that counts is outside of [0, V), a prompt is empty or masked throughout,
        another value is out of its range, an array of params does not fit the others, a layer is
        bidirectional, or h0 does not fit.
      TypeError: the prompt holds no integers, key is no key, or another argument is of another
        kind.
      FloatingPointError: outside jit, logits are NaN or infinite.

    Cost: the products of one step of each layer and of the head a token. Where V is at most
    num_steps, what the first layer makes of each token's input is made once, 3VH numbers, and
    looked up. Outside jit it waits for the tokens.

    >>> from jaxgru.models import init_token_model
    >>> params = init_token_model(jax.random.key(0), 5, 3)
    >>> _, tokens = generate(params, jax.random.key(1), jnp.array([1]), 4, top_k=2)
    >>> tokens.shape
    (4,)
    """
    function = "generate"
    require_model(function, params, TokenParams, "concat")
    require_one_way(function, params.layers, ", whose outputs depend on later tokens", ROOT)
    require_key(function, key)
    require_count(function, "num_steps", num_steps)
    vocab_size, w_x = params.w.shape[1], directions_of(params.layers[0])[0].w_x
    prompt = require_labels(function, "prompt", prompt, vocab_size, mask)
    if prompt.ndim:
        axis = require_axis(function, axis, (*prompt.shape, w_x.shape[0]))
    if not prompt.ndim or prompt.shape[axis] < 1:
        raise ValueError(f"{function}: prompt must hold at least one token, got {prompt.shape}.")
    xs = jax.ShapeDtypeStruct((*prompt.shape, w_x.shape[0]), w_x.dtype)
    require_layers(function, params.layers, xs, h0, residual=residual, axis=axis, root=ROOT)
    if mask is not None and is_readable(mask) and not np.asarray(mask).any(axis=axis).all():
        raise ValueError(
            f"{function}: mask must be True on a token of every prompt, got none of one."
        )
    batch = (*prompt.shape[:axis], *prompt.shape[axis + 1 :])
    filters = _require_filters(temperature, top_k, top_p, stop_token, vocab_size, batch)
    noise = require_noise(function, noise, None, True)
    config = StackConfig("concat", residual, Dropout(), False, BPTT(), noise, True)
    h_last, tokens = _generate(params, key, prompt, mask, h0, filters, num_steps, axis, config)
    if is_readable(tokens) and (np.asarray(tokens) < 0).any():
        raise FloatingPointError(
            f"{function}: logits must be finite, got NaN or infinity; check params and h0."
        )
    return h_last, tokens


def _require_filters(temperature, top_k, top_p, stop_token, vocab_size, batch):
    """(temperature, top_k, top_p, stop_token) as arrays: None for a greedy temperature."""
    greedy = False
    if np.shape(temperature) not in ((), batch):
        raise ValueError(
            f"generate: temperature must be a number or have shape {batch} (one for each prompt), "
            f"got {np.shape(temperature)}."
        )
    if not is_traced(temperature):
        values = np.asarray(temperature)
        if not jnp.issubdtype(values.dtype, np.number):
            raise TypeError(f"generate: temperature must be a number, got {temperature!r}.")
        if not ((values >= 0) & (values < np.inf)).all():
            raise ValueError(f"generate: temperature must be finite and >= 0, got {temperature}.")
        greedy = not values.any()
    if top_k is not None and not is_traced(top_k):
        require_count("generate", "top_k", top_k)
    if top_p is not None and not is_traced(top_p) and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}.")
    if stop_token is not None and not is_traced(stop_token):
        require_count("generate", "stop_token", stop_token, 0)
        if stop_token >= vocab_size:
            raise ValueError(
                f"generate: stop_token must be in [0, {vocab_size}), got {stop_token}."
            )
    return (
        None if greedy else jnp.asarray(temperature).astype(jnp.float32),
        None if top_k is None else jnp.int32(top_k),
        None if top_p is None else jnp.float32(top_p),
        None if stop_token is None else jnp.int32(stop_token),
    )


@functools.partial(jax.jit, static_argnames=("num_steps", "axis"))
def _generate(params, key, prompt, mask, h0, filters, num_steps, axis, config):
    """`generate` of checked arguments. What is the same in every step is made before the loop."""
    *filters, stop_token = filters
    prompt, mask = jax.tree.map(lambda v: jnp.moveaxis(v, axis, 0), (prompt, mask))
    h, ys = run_stack(config, params.layers, h0, None, 0, embed(params, prompt), mask, None)
    recurrents = [split_recurrent(p) for p in params.layers]
    flags = Flags(zoneout=as_constant(config.noise.zoneout))
    vocab_size, table = params.w.shape[1], None
    if vocab_size <= num_steps:  # a row is then looked up instead of multiplied
        table = project(params.layers[0], embed(params, jnp.arange(vocab_size)))

    def body(carry, key):
        (states, token), h_next = carry, []
        y = embed(params, token)
        for layer, recurrent, h in zip(params.layers, recurrents, states):
            if table is None or h_next:
                a = project(layer, y)
            else:
                a = tuple(look_up(rows, token) for rows in table)
            wide = h.astype(state_dtype(h.dtype))
            h_t = flags.leave(step(recurrent, a, wide)[0], wide).astype(h.dtype)
            y = h_t + y if config.residual and h_next else h_t
            h_next.append(h_t)
        token_next = _draw(key, apply_head(params, y), *filters)
        if stop_token is not None:
            stopped = token == stop_token
            h_next = [jnp.where(stopped[..., None], h, h_t) for h, h_t in zip(states, h_next)]
            token_next = jnp.where(stopped, token, token_next)
        return (tuple(h_next), token_next), token_next

    keys = jax.random.split(key, num_steps)
    first = _draw(keys[0], apply_head(params, ys[-1]), *filters)
    (h, _), rest = lax.scan(body, (h, first), keys[1:])
    return h, jnp.moveaxis(jnp.concatenate([first[None], rest]), 0, axis)


def _draw(key, logits, temperature, top_k, top_p):
    """A token from softmax(logits / temperature) under the filters; the likeliest where it is 0.

    -1 where the largest logit is not finite; argmax takes NaN for the largest.
    """
    likeliest = token = logits.argmax(-1).astype(jnp.int32)
    largest = jnp.take_along_axis(logits, likeliest[..., None], axis=-1)
    if temperature is not None:  # None is known to be 0
        logits = (logits - largest).astype(jnp.float32)  # a small temperature makes no infinity
        scale = jnp.where(temperature > 0, temperature, 1)
        logits = _filter(logits / (scale[..., None] if scale.ndim else scale), top_k, top_p)
        sampled = jax.random.categorical(key, logits).astype(jnp.int32)
        token = jnp.where(temperature > 0, sampled, likeliest)
    return jnp.where(jnp.isfinite(largest[..., 0]), token, -1)


def _filter(logits, top_k, top_p):
    """The logits, -inf where a token must not be drawn. The likeliest token always may be."""
    if top_k is not None:
        place = jnp.clip(top_k, 1, logits.shape[-1]) - 1
        least = jnp.take(jnp.sort(logits, descending=True), place[None], axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # 0 for the first alone
        chosen = (before < jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)) | (top_p >= 1)
        least = jnp.where(chosen, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
