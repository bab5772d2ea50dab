"""A training state and one jitted update of any loss with optax."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxgru.core.matmul import state_dtype
from jaxgru.training.clipping import global_norm
from jaxgru.training.layout import Layout

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any, Any, chex.PRNGKey], tuple[jax.Array, tuple[Any, Metrics]]]
TrainStep = Callable[["TrainState", Any], tuple["TrainState", Metrics]]


class TrainState(NamedTuple):
    """The arrays that an update reads and writes."""

    params: Any
    opt_state: optax.OptState
    carry: Any  # passed from batch to batch, e.g. a recurrent state
    key: chex.PRNGKey
    step: jax.Array  # int32, number of batches used, including those of skipped updates
    skipped: jax.Array  # int32, number of updates skipped because a value was not finite


def init_train_state(
    params: Any, optimizer: optax.GradientTransformation, *, key: chex.PRNGKey, carry: Any = None
) -> TrainState:
    """Makes the state before the first update, from copies, since the train step donates buffers.

    Args:
      params: pytree of arrays.
      optimizer: from optax.
      key: a `jax.random.key`, from which each update derives its own.
      carry: the first carry of the loss.

    Returns:
      TrainState with step 0.

    >>> state = init_train_state({"w": jnp.ones(2)}, optax.sgd(0.1), key=jax.random.key(0))
    >>> int(state.step)
    0
    """
    params, carry = jax.tree.map(_strong, jax.tree.map(jnp.copy, (params, carry)))
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    # Some optimizers store the buffers of the parameters in their state.
    opt_state = jax.tree.map(_strong, jax.tree.map(jnp.copy, optimizer.init(params)))
    return TrainState(params, opt_state, carry, jnp.copy(key), step, skipped)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, layout: Layout | None = None
) -> TrainStep:
    """Makes one jitted optimizer update, train_step(state, batch) -> (state, metrics).

    An update is skipped if its loss, its gradient, the squares of what it adds to the parameters,
    or a new value of parameters, optimizer state or carry is not finite. A skipped update changes
    only the step, the key and the count of skipped updates. The gradient is checked before the
    optimizer can clip it. Values that were infinite before are ignored: some optimizers start so.

    Use optax for clipping of entries (`optax.clip`), accumulation of gradients over several batches
    (`optax.MultiSteps`), schedules and masks, and `clip_by_global_norm` for large gradients.

    Args:
      loss_fn: loss_fn(params, carry, batch, key) -> (loss, (carry, metrics)). The carry is passed
        from batch to batch without a gradient, e.g. a recurrent state or None; metrics is a dict of
        scalars. For another dtype than that of the parameters, loss_fn casts them.
      optimizer: from optax.
      layout: the devices; states and batches must come from its `place_state` and `place_batch`.
        None trains on one device.

    Returns:
      The function, which donates the buffers of its state. Its metrics are those of the loss and
      "loss", "gradient_norm" (before the optimizer) and "skipped".

    Raises:
      ValueError: when traced, if the optimizer changes a parameter's shape or dtype, the loss
        changes the carry's shapes, or a metric is not a scalar or has a reserved name.
      TypeError: when traced, if the loss returns another structure.

    Cost: one gradient of the loss; donation avoids a second copy of the parameters.

    >>> def loss_fn(params, carry, batch, key):
    ...     return jnp.sum((params - batch) ** 2), (carry, {})
    >>> optimizer = optax.sgd(0.5)
    >>> state = init_train_state(jnp.zeros(2), optimizer, key=jax.random.key(0))
    >>> state, metrics = make_train_step(loss_fn, optimizer)(state, jnp.ones(2))
    >>> state.params.tolist(), float(metrics["loss"])
    ([1.0, 1.0], 2.0)
    """

    def checked_loss(params, carry, batch, key):
        return _require_result(loss_fn(params, carry, batch, key), carry)

    gradient_fn = jax.value_and_grad(checked_loss, has_aux=True)
    gradient_fn = gradient_fn if layout is None else layout.wrap_gradient(gradient_fn)

    def train_step(state, batch):
        key, key_loss = jax.random.split(state.key)
        inputs = state.carry, batch, key_loss
        (loss, (carry, metrics)), grads = gradient_fn(state.params, *inputs)

        def value_fn(params, obj_fn=None, grad_fn=None):  # a line search passes these on
            return checked_loss(params, *inputs)[0]

        def grad_fn(params, _):
            return gradient_fn(params, *inputs)[1]

        extra = {"value": loss, "grad": grads, "value_fn": value_fn, "obj_fn": value_fn}
        extra = _accepted(optimizer.update, extra | {"grad_fn": grad_fn})
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        _require_same_shapes(params, state.params)
        old = state.params, state.opt_state, state.carry
        new = params, opt_state, carry
        # The squares also refuse huge finite updates, such as 1e30, which would ruin parameters.
        squares = jax.tree.map(lambda u: jnp.square(u.astype(state_dtype(u.dtype))), updates)
        finite = _is_finite((loss, grads, squares), new, old)
        params, opt_state, carry = jax.tree.map(
            lambda new, old: _strong(jnp.where(finite, new, old)), new, old
        )
        skipped = state.skipped + (1 - finite.astype(jnp.int32))
        metrics |= {"loss": loss, "gradient_norm": global_norm(grads), "skipped": skipped}
        return TrainState(params, opt_state, carry, key, state.step + 1, skipped), metrics

    train_step = train_step if layout is None else layout.wrap_step(train_step)
    return jax.jit(train_step, donate_argnums=(0,))


def _accepted(function, arguments):
    """The arguments that the function has parameters for."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _strong(x):
    """x without JAX's weak type, which checkpoints do not store."""
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.astype(x.dtype)


def _is_finite(tree, new, old):
    """Whether the tree is finite, and no finite number of `old` became infinite or NaN."""
    finite = [jnp.isfinite(leaf) for leaf in jax.tree.leaves(tree)]
    finite += [
        jnp.isfinite(a) | ~jnp.isfinite(b)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old))
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    return jnp.stack([entries.all() for entries in finite]).all()


def _require_result(returned, carry):
    """Checks the result of a loss function and makes arrays of its metrics."""
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
        raise ValueError(f"{form} with metric names that are not reserved, got {sorted(taken)}.")
    metrics = {name: jnp.asarray(value) for name, value in metrics.items()}
    for name, value in metrics.items():
        if value.ndim:
            raise ValueError(f"{form} with scalar metrics, got {name}{list(value.shape)}.")
    return loss, (new, metrics)


def _require_same_shapes(params, old):
    """Raises ValueError if `optax.apply_updates` broadcast or cast a parameter."""
    for (path, new), leaf in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(old)):
        if new.shape != leaf.shape or new.dtype != leaf.dtype:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"train_step: the optimizer must keep params{name} as {leaf.dtype}"
                f"{list(leaf.shape)}, got {new.dtype}{list(new.shape)}."
            )
