"""A training state and one jitted update of any loss with optax.

Knows no model. A loss is a function

    loss_fn(params, carry, batch, key) -> (loss, (carry, metrics))

where carry is whatever runs from one batch to the next without a gradient (a recurrent state, or
None) and metrics is a dict of scalars.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxgru.core.matmul import state_dtype
from jaxgru.training.clipping import global_norm
from jaxgru.training.layout import Layout

Array = jax.Array
LossFn = Callable[[Any, Any, Any, chex.PRNGKey], tuple[Array, tuple[Any, dict[str, Array]]]]
TrainStep = Callable[["TrainState", Any], tuple["TrainState", dict[str, Array]]]


class TrainState(NamedTuple):
    """All that an update reads and writes, arrays only."""

    params: Any
    opt_state: optax.OptState
    carry: Any  # what runs from batch to batch, e.g. a recurrent state
    key: chex.PRNGKey
    step: Array  # int32, the number of batches drawn, skipped updates included
    skipped: Array  # int32, the number of updates skipped because something was not finite


def init_train_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    key: chex.PRNGKey,
    carry: Any = None,
) -> TrainState:
    """The state before the first update.

    Args:
      params: pytree of arrays; the state holds copies, since the train step donates its buffers.
      optimizer: from optax.
      key: a `jax.random.key`; each update draws its own from it.
      carry: the first carry of the loss; copied too.

    Returns:
      TrainState with step 0.

    >>> state = init_train_state({"w": jnp.ones(2)}, optax.sgd(0.1), key=jax.random.key(0))
    >>> int(state.step)
    0
    """
    params, carry = jax.tree.map(_strong, jax.tree.map(jnp.copy, (params, carry)))
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    # Some optimizers keep the parameters' own buffers in their state.
    opt_state = jax.tree.map(_strong, jax.tree.map(jnp.copy, optimizer.init(params)))
    return TrainState(params, opt_state, carry, jnp.copy(key), step, skipped)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    layout: Layout | None = None,
) -> TrainStep:
    """One jitted optimizer update: train_step(state, batch) -> (state, metrics).

    An update is skipped if its loss, gradient, or any parameter, optimizer state or carry that it
    would write is not finite, or if the squares of what the optimizer would add to a parameter are
    not: then it changes nothing but step, key and the count of skipped updates. The gradient is
    checked before the optimizer sees it, so a clip cannot turn infinity into a number first. An
    infinity that the state held before counts for nothing: some optimizers begin with one.

    What optax does is composed there: `optax.clip` of entries, `optax.MultiSteps` to accumulate
    gradients over several batches, schedules, masks. For the global norm take
    `jaxgru.training.clip_by_global_norm`, which also clips a gradient of 1e30. A loss in another
    dtype than the parameters casts them itself.

    Args:
      loss_fn: loss_fn(params, carry, batch, key) -> (loss, (carry, metrics)).
      optimizer: from optax.
      layout: trains on its devices; give it states and batches that its `place_state` and
        `place_batch` have laid there. None trains on one.

    Returns:
      The function. It donates the buffers of the state that it is given, which is then gone. Its
      metrics are those of the loss, and "loss", "gradient_norm" (before the optimizer) and
      "skipped".

    Raises:
      ValueError: when traced, where the optimizer's updates change a parameter's shape or dtype,
        the loss the carry's, or a metric is no scalar or has a name that records use.
      TypeError: when traced, where the loss returns something else.

    Cost: one gradient of the loss; parameters are held once, since buffers are donated.

    >>> def loss_fn(params, carry, batch, key):
    ...     return jnp.sum((params - batch) ** 2), (carry, {})
    >>> optimizer = optax.sgd(0.5)
    >>> state = init_train_state(jnp.zeros(2), optimizer, key=jax.random.key(0))
    >>> state, metrics = make_train_step(loss_fn, optimizer)(state, jnp.ones(2))
    >>> state.params.tolist(), float(metrics["loss"])
    ([1.0, 1.0], 2.0)
    """

    def checked_loss(params, carry, batch, key):
        loss, carry, metrics = _require_result(loss_fn(params, carry, batch, key), carry)
        return loss, (carry, metrics)

    gradient_fn = jax.value_and_grad(checked_loss, has_aux=True)
    gradient_fn = gradient_fn if layout is None else layout.wrap_gradient(gradient_fn)

    def train_step(state, batch):
        key, key_loss = jax.random.split(state.key)
        (loss, (carry, metrics)), grads = gradient_fn(state.params, state.carry, batch, key_loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        _require_same_shapes(params, state.params)
        old = state.params, state.opt_state, state.carry
        new = params, opt_state, carry
        # A finite update of 1e30 ruins the parameters as surely as an infinite one.
        squares = jax.tree.map(lambda u: jnp.square(u.astype(state_dtype(u.dtype))), updates)
        finite = _is_finite((loss, grads, squares)) & _stays_finite(new, old)
        params, opt_state, carry = jax.tree.map(
            lambda new, old: _strong(jnp.where(finite, new, old)), new, old
        )
        skipped = state.skipped + (1 - finite.astype(jnp.int32))
        metrics |= {"loss": loss, "gradient_norm": global_norm(grads), "skipped": skipped}
        return TrainState(params, opt_state, carry, key, state.step + 1, skipped), metrics

    train_step = train_step if layout is None else layout.wrap_step(train_step)
    return jax.jit(train_step, donate_argnums=(0,))


def _strong(x):
    """x without JAX's weak type, which no file keeps."""
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.astype(x.dtype)


def _is_finite(tree):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _stays_finite(new, old):
    """True unless a finite number became one that is not."""
    kept = [
        (jnp.isfinite(a) | ~jnp.isfinite(b)).all()
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old))
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    return jnp.stack([jnp.array(True), *kept]).all()


def _require_result(returned, carry):
    """(loss, carry, metrics); TypeError or ValueError where a loss returns something else."""
    form = "train_step: loss_fn must return (loss, (carry, metrics))"
    try:
        loss, (new, metrics) = returned
    except (TypeError, ValueError):
        raise TypeError(f"{form}, got {type(returned).__name__}.") from None
    if not isinstance(metrics, dict):
        raise TypeError(f"{form} with metrics a dict of scalars, got {type(metrics).__name__}.")
    forms = [jax.tree.map(jnp.shape, tree) for tree in (carry, new)]
    if forms[0] != forms[1] or jax.tree.structure(carry) != jax.tree.structure(new):
        raise ValueError(f"{form} with a carry of the state's shapes, {forms[0]}, got {forms[1]}.")
    taken = {"loss", "gradient_norm", "skipped", "update", "seconds"} & set(metrics)
    if taken:
        raise ValueError(f"{form} with metrics of names of their own, got {sorted(taken)}.")
    metrics = {name: jnp.asarray(value) for name, value in metrics.items()}
    for name, value in metrics.items():
        if value.ndim:
            raise ValueError(f"{form} with scalar metrics, got {name} of {list(value.shape)}.")
    return loss, new, metrics


def _require_same_shapes(params, old):
    """ValueError where an update, which `optax.apply_updates` would broadcast, changed params."""
    for (path, new), leaf in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(old)):
        if new.shape != leaf.shape or new.dtype != leaf.dtype:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"train_step: the optimizer must keep params{name} as {leaf.dtype}"
                f"{list(leaf.shape)}, got {new.dtype}{list(new.shape)}."
            )
