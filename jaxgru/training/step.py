"""A training state and one jitted update of any loss with optax."""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgru.core.checks import is_traced, require_key
from jaxgru.core.matmul import state_dtype
from jaxgru.training.clipping import global_norm
from jaxgru.training.layout import Layout

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any, Any, chex.PRNGKey], tuple[jax.Array, tuple[Any, Metrics]]]
_RESERVED = ("loss", "gradient_norm", "skipped", "update", "seconds")  # names of the records
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
      params: pytree of arrays, which stay usable.
      optimizer: from optax.
      key: a `jax.random.key`, from which each update derives its own.
      carry: the first carry of the loss.

    Returns:
      TrainState with step 0.

    Raises:
      TypeError, ValueError: optimizer is none of optax, or key is not one `jax.random.key`.

    >>> state = init_train_state({"w": jnp.ones(2)}, optax.sgd(0.1), key=jax.random.key(0))
    >>> int(state.step)
    0
    """
    _require_optimizer("init_train_state", optimizer)
    require_key("init_train_state", key)
    params, step, skipped = jax.tree.map(jnp.asarray, params), jnp.int32(0), jnp.int32(0)
    state = TrainState(params, optimizer.init(params), carry, key, step, skipped)
    # Every leaf, since some optimizers store the buffers of the parameters in their state.
    return jax.tree.map(lambda leaf: _strong(jnp.copy(leaf)), state)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, layout: Layout | None = None
) -> TrainStep:
    """Makes one jitted optimizer update, train_step(state, batch) -> (state, metrics).

    An update is skipped if its loss, its gradient, the squares of what it adds to the parameters,
    or a new value of parameters, optimizer state or carry is not finite. A skipped update changes
    only the step, the key and the count of skipped updates. The gradient is checked before the
    optimizer can clip it. Values that were infinite before are ignored, since some
    optimizers initialize their state with infinity.

    An optimizer that has parameters for them is also given the loss (`value`), the gradient
    (`grad`) and functions of the parameters on this batch (`value_fn`, `obj_fn`, `grad_fn`), for
    `optax.lbfgs`, `optax.contrib.sam` and others. Gradients of each example, which
    `optax.contrib.dpsgd` expects, are not made.

    Use optax for clipping of entries (`optax.clip`), accumulation of gradients over several batches
    (`optax.MultiSteps`), schedules and masks, and `clip_by_global_norm` for large gradients.

    Args:
      loss_fn: loss_fn(params, carry, batch, key) -> (loss, (carry, metrics)). The carry is passed
        from batch to batch without a gradient, e.g. a recurrent state or None; it keeps its
        structure, shapes and dtypes. metrics is a dict of real scalars. For another dtype than that
        of the parameters, loss_fn casts them.
      optimizer: from optax.
      layout: the devices; states and batches must come from its `place_state` and `place_batch`.
        None trains on one device.

    Returns:
      The function, which donates the buffers of its state: go on with the state that it returns.
      Its metrics are those of the loss and "loss", "gradient_norm" (before the optimizer) and
      "skipped".

    Raises:
      ValueError: when called, if an earlier call has donated the state; when traced, if the
        optimizer changes the structure, a shape or a dtype of the parameters or of its state, the
        loss does so with the carry, or a metric is not a real scalar or has a reserved name.
      TypeError: loss_fn, optimizer or layout is of another kind; when traced, if the loss is not a
        floating scalar or the loss function returns another structure.

    Cost: one gradient of the loss; donation avoids a second copy of the parameters.

    >>> def loss_fn(params, carry, batch, key):
    ...     return jnp.sum((params - batch) ** 2), (carry, {})
    >>> optimizer = optax.sgd(0.5)
    >>> state = init_train_state(jnp.zeros(2), optimizer, key=jax.random.key(0))
    >>> state, metrics = make_train_step(loss_fn, optimizer)(state, jnp.ones(2))
    >>> state.params.tolist(), float(metrics["loss"])
    ([1.0, 1.0], 2.0)
    """

    if not callable(loss_fn):
        raise TypeError(
            f"make_train_step: loss_fn must be a function, got {type(loss_fn).__name__}; the order "
            "is make_train_step(loss_fn, optimizer)."
        )
    _require_optimizer("make_train_step", optimizer)
    if not isinstance(layout, Layout | None):
        raise TypeError(f"make_train_step: layout must be a Layout, got {type(layout).__name__}.")

    def checked_loss(params, carry, batch, key):
        return _require_result(loss_fn(params, carry, batch, key), carry)

    gradient_fn = jax.value_and_grad(checked_loss, has_aux=True)
    gradient_fn = gradient_fn if layout is None else layout.wrap_gradient(gradient_fn)

    def train_step(state, batch):
        """One update, (state, batch) -> (state, metrics), which donates the given state."""
        key, key_loss = jax.random.split(state.key)
        inputs = state.carry, batch, key_loss
        (loss, (carry, metrics)), grads = gradient_fn(state.params, *inputs)

        extra = _extra_arguments(optimizer, loss, grads, checked_loss, gradient_fn, inputs)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        _require_same("the optimizer must keep params", params, state.params)
        _require_same("the optimizer must keep opt_state", opt_state, state.opt_state)
        old = state.params, state.opt_state, state.carry
        new = jax.tree.map(jnp.asarray, (params, opt_state, carry))
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
    return _CheckedStep(jax.jit(train_step, donate_argnums=(0,)))


class _CheckedStep:
    """A jitted update that refuses a donated state; it copies and prints as a function does.

    The methods of `jax.jit` belong to the class, since `jax.jit` and `jax.vmap` copy the attributes
    of a function and would then lower the function without their own options.
    """

    __wrapped__: Any
    lower, trace, eval_shape, clear_cache = (
        property(operator.attrgetter(f"__wrapped__.{name}"))
        for name in ("lower", "trace", "eval_shape", "clear_cache")
    )

    def __init__(self, jitted):
        functools.update_wrapper(self, jitted, updated=())  # its name, docstring and signature

    def __call__(self, state, batch):
        require_undonated("train_step", state)
        return self.__wrapped__(state, batch)

    def __deepcopy__(self, memo):
        return self

    def __repr__(self):
        return repr(self.__wrapped__)


def require_undonated(function, state):
    """ValueError if an earlier update has donated, and so deleted, arrays of the state."""
    if not any(map(_is_deleted, jax.tree.leaves(state))):
        return
    paths = (path for path, leaf in jax.tree.leaves_with_path(state) if _is_deleted(leaf))
    raise ValueError(
        f"{function}: state must hold its arrays, got state{jax.tree_util.keystr(next(paths))} "
        "donated to an earlier update; pass the state that the update returned, or give each "
        "update a copy of its own, jax.tree.map(jnp.copy, state)."
    )


def _is_deleted(leaf):
    return hasattr(leaf, "is_deleted") and not is_traced(leaf) and leaf.is_deleted()


def _extra_arguments(optimizer, loss, grads, loss_fn, gradient_fn, inputs):
    """The arguments beside gradient, state and params that the optimizer has parameters for."""

    def value_fn(params, obj_fn=None, grad_fn=None):  # a line search passes these on
        return loss_fn(params, *inputs)[0]

    def grad_fn(params, _):
        return gradient_fn(params, *inputs)[1]

    extra = {"value": loss, "grad": grads, "grad_fn": grad_fn}
    extra |= {"value_fn": value_fn, "obj_fn": value_fn}
    parameters = inspect.signature(optimizer.update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return extra
    return {name: value for name, value in extra.items() if name in parameters}


def _strong(x):
    """x without JAX's weak type, which checkpoints do not store."""
    return jnp.asarray(x, x.dtype)


def _is_finite(tree, new, old):
    """Whether the tree is finite, and no finite number of `old` became infinite or NaN."""
    finite = [jnp.isfinite(leaf) for leaf in jax.tree.leaves(tree)]
    finite += [
        jnp.isfinite(a) | ~jnp.isfinite(b)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old))
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    return jnp.stack([entries.all() for entries in finite]).all()


def _require_optimizer(function, optimizer):
    """TypeError unless it has the methods of a gradient transformation."""
    if not all(callable(getattr(optimizer, name, None)) for name in ("init", "update")):
        raise TypeError(
            f"{function}: optimizer must be an optax.GradientTransformation, got "
            f"{type(optimizer).__name__}; make one, e.g. optax.adam(1e-3)."
        )


def _require_result(returned, carry):
    """Checks the result of a loss function and makes arrays of its metrics."""
    form = "train_step: loss_fn must return (loss, (carry, metrics))"
    try:
        loss, (new, metrics) = returned
    except (TypeError, ValueError):
        raise TypeError(f"{form}, got {type(returned).__name__}.") from None
    if not _is_scalar(loss, jnp.floating):
        raise TypeError(f"{form} with a floating scalar loss, got {_kind(loss)}; e.g. take a mean.")
    if not isinstance(metrics, dict):
        raise TypeError(f"{form} with metrics a dict of scalars, got {type(metrics).__name__}.")
    _require_same("loss_fn must keep carry", new, carry)
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ValueError(f"{form} with strings as the names of metrics, got {name!r}.")
        if name in _RESERVED or name.endswith("_per_second"):
            raise ValueError(f"{form} with metric names that are not reserved, got {name!r}.")
        if not any(_is_scalar(value, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
            raise ValueError(f"{form} with real scalars as metrics, got {name!r}: {_kind(value)}.")
    return loss, (new, {name: jnp.asarray(value) for name, value in metrics.items()})


def _is_scalar(x, kind):
    if not isinstance(x, float | int | jax.Array | np.ndarray | np.generic):
        return False
    return jnp.shape(x) == () and jnp.issubdtype(getattr(x, "dtype", type(x)), kind)


def _kind(x):
    return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else type(x).__name__


def _require_same(subject, new, old):
    """ValueError unless structure, shapes and dtypes of a tree are as in the state before."""
    structures = jax.tree.structure(new), jax.tree.structure(old)
    if structures[0] != structures[1]:
        cure = "; give init_train_state the first carry" if old is None else ""
        raise ValueError(
            f"train_step: {subject} with the structure {structures[1]}, got {structures[0]}{cure}."
        )
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(old)):
        a = jnp.asarray(a)
        # A number of Python's has no dtype of its own.
        dtype = jnp.result_type(a, b) if getattr(a, "weak_type", False) else a.dtype
        if a.shape != b.shape or dtype != b.dtype:
            raise ValueError(
                f"train_step: {subject}{jax.tree_util.keystr(path)} as {_kind(b)}, got {_kind(a)}; "
                "cast it or change its shape."
            )
