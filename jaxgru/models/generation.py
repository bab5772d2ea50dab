"""Sampling from token models."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgru.core.cell import project, split_recurrent, step
from jaxgru.core.checks import is_traced, require_count, require_flags
from jaxgru.core.matmul import state_dtype
from jaxgru.core.noise import Noise, require_noise
from jaxgru.losses import require_labels
from jaxgru.models.outputs import token_logits
from jaxgru.models.parameters import TokenParams, apply_head, embed, require_model
from jaxgru.stacks.forms import Bidirectional


def generate(
    params: TokenParams,
    key: jax.Array,
    prompt: jax.Array,
    num_steps: int,
    *,
    mask: jax.Array | None = None,
    h0: Any = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    residual: bool = False,
    noise: Noise | None = None,
) -> tuple[Any, jax.Array]:
    """(h_last, tokens): continues a prompt, each token drawn from softmax(logits / temperature).

    Compiled once for each prompt shape, num_steps, residual, noise and set of filters in
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
      noise: as the model was trained with; the mean of its zoneout acts.

    Returns:
      h_last, the state before the last token is read, so that a call with that token as prompt and
      h_last as h0 goes on; and tokens [num_steps, ...] int32.

    Raises:
      ValueError: a token is outside [0, V), a prompt is empty or masked throughout, another value
        is out of its range, or a layer is bidirectional.
      TypeError: the prompt holds no integers.

    Cost: the products of one step of each layer and of the head a token. Where V is at most
    num_steps, what the first layer makes of each token's input is made once, 3VH numbers, and
    looked up.

    >>> from jaxgru.models import init_token_model
    >>> params = init_token_model(jax.random.key(0), 5, 3)
    >>> _, tokens = generate(params, jax.random.key(1), jnp.array([1]), 4, top_k=2)
    >>> tokens.shape
    (4,)
    """
    require_model("generate", params, TokenParams, "concat")
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
    noise = require_noise("generate", noise, None, True)
    greedy = not is_traced(temperature) and temperature == 0
    filters = (
        None if greedy else jnp.float32(temperature),
        None if top_k is None else jnp.int32(top_k),
        None if top_p is None else jnp.float32(top_p),
    )
    return _generate(params, key, prompt, mask, h0, filters, num_steps, residual, noise)


@functools.partial(jax.jit, static_argnames=("num_steps", "residual", "noise"))
def _generate(params, key, prompt, mask, h0, filters, num_steps, residual, noise):
    """`generate` of checked arguments. What is the same in every step is made before the loop."""
    h, logits = token_logits(
        params, prompt, h0, mask=mask, residual=residual, noise=noise, deterministic=True
    )
    recurrents, zoneout = [split_recurrent(p) for p in params.layers], noise.zoneout
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
                a = tuple(rows[token] for rows in table)
            wide = h.astype(state_dtype(h.dtype))
            h_t = step(recurrent, a, wide)[0]
            h_t = ((1 - zoneout) * h_t + zoneout * wide if zoneout else h_t).astype(h.dtype)
            y = h_t + y if residual and h_next else h_t
            h_next.append(h_t)
        token_next = _draw(key, apply_head(params, y), *filters)
        return (tuple(h_next), token_next), token_next

    keys = jax.random.split(key, num_steps)
    first = _draw(keys[0], logits[-1], *filters)
    (h, _), rest = lax.scan(body, (h, first), keys[1:])
    return h, jnp.concatenate([first[None], rest])


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
        least = jnp.take(jnp.sort(logits, descending=True), place[None], axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = jnp.sort(logits, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        chosen = (before < top_p) | (top_p >= 1)  # the first always is
        least = jnp.where(chosen, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    sampled = jax.random.categorical(key, logits)
    return jnp.where(temperature > 0, sampled.astype(jnp.int32), likeliest)
