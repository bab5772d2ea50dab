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

from jaxgru.core.checks import require_count
from jaxgru.core.matmul import state_dtype
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
    step: Array  # int32, updates asked for, which is the number of batches drawn
    skipped: Array  # int32, updates left out because the loss or a gradient was not finite
    average: Any = None  # exponential moving average of params, where it was asked for


def init_train_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    key: chex.PRNGKey,
    carry: Any = None,
    average: bool = False,
) -> TrainState:
    """The state before the first update.

    Args:
      params: pytree of arrays; the state holds copies, since the train step donates its buffers.
      optimizer: from optax.
      key: a `jax.random.key`; each update draws its own from it.
      carry: the first carry of the loss; copied too.
      average: keep a moving average of the parameters beside them, in float32 at least, which
        starts as they do; for the `average_decay` of `make_train_step`.

    Returns:
      TrainState with step 0.

    >>> state = init_train_state({"w": jnp.ones(2)}, optax.sgd(0.1), key=jax.random.key(0))
    >>> int(state.step)
    0
    """
    params, carry = jax.tree.map(_strong, jax.tree.map(jnp.copy, (params, carry)))
    key = jnp.copy(key)
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    # Some optimizers keep the parameters' own buffers in their state.
    opt_state = jax.tree.map(_strong, jax.tree.map(jnp.copy, optimizer.init(params)))
    averaged = jax.tree.map(lambda p: p.astype(_wide(p)), params) if average else None
    averaged = jax.tree.map(jnp.copy, averaged)
    return TrainState(params, opt_state, carry, key, step, skipped, averaged)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip_value: float | None = None,
    clip_norm: float | None = None,
    compute_dtype: Any = None,
    loss_scale: float = 1.0,
    average_decay: float | None = None,
    donate: bool = True,
    layout: Layout | None = None,
) -> TrainStep:
    """One jitted optimizer update: train_step(state, batch) -> (state, metrics).

    An update whose loss, gradient, gradient norm or resulting parameters, optimizer state or carry
    are not finite changes nothing but step, key and the count of skipped updates. The gradient is
    checked before it is clipped, since a clip turns inf into NaN or into a number; its norm after,
    since entries of 1e30 in float32 have finite values and squares that no optimizer survives.
    Clipped here, they do no harm: the norm is taken of the entries over the largest one, and so
    overflows only where it is itself too large a number; `optax.clip_by_global_norm` makes zeros of
    them.

    Args:
      loss_fn: loss_fn(params, carry, batch, key) -> (loss, (carry, metrics)).
      optimizer: from optax, with its schedule.
      accumulate: parts of a batch. Above 1, every leaf of a batch has them as its leading axis;
        the loss takes one after another, with the carry running through and a key each, and the
        one update follows the mean of their gradients. Memory is that of a part. Loss and metrics
        are means over the parts.
      clip_value: the largest absolute value of a gradient's entry; None for any.
      clip_norm: the largest norm of the whole gradient, which keeps its direction; None for any.
      compute_dtype: the floating dtype that the loss sees params, carry and batch in, e.g.
        bfloat16. Parameters, optimizer state, carry and gradients keep their own, float32.
      loss_scale: the loss is multiplied by it before, and the gradient divided by it after
        differentiation, so that float16 gradients do not underflow; a power of 2.
      average_decay: d of average <- d average + (1 - d) params after each update that is not
        skipped; for a state made with average=True.
      donate: reuse the state's buffers for the new state; the old one is then gone.
      layout: trains on its devices; give it states and batches that its `place_state` and
        `place_batch` have laid there. None trains on one.

    Returns:
      The function. Its metrics are those of the loss, and "loss", "gradient_norm" (before any
      clipping) and "skipped".

    Raises:
      ValueError: an argument is out of its range; when traced, where the optimizer's updates
        change a parameter's shape or dtype, the loss the carry's, a metric is no scalar or has a
        name that records use, a batch has no axis of parts, or the state has no average to keep
        or one that nobody keeps.
      TypeError: accumulate is no integer, compute_dtype no floating dtype, or, when traced, the
        loss returns something else.

    Cost: one gradient of the loss; parameters are held once where buffers are donated.

    >>> def loss_fn(params, carry, batch, key):
    ...     return jnp.sum((params - batch) ** 2), (carry, {})
    >>> optimizer = optax.sgd(0.5)
    >>> state = init_train_state(jnp.zeros(2), optimizer, key=jax.random.key(0))
    >>> state, metrics = make_train_step(loss_fn, optimizer)(state, jnp.ones(2))
    >>> state.params.tolist(), float(metrics["loss"])
    ([1.0, 1.0], 2.0)
    """
    require_count("make_train_step", "accumulate", accumulate)
    for name, value in (("clip_value", clip_value), ("clip_norm", clip_norm)):
        if value is not None and not value > 0:
            raise ValueError(f"make_train_step: {name} must be above 0 or None, got {value}.")
    if not 0 < loss_scale < float("inf"):
        raise ValueError(
            f"make_train_step: loss_scale must be finite and above 0, got {loss_scale}."
        )
    if average_decay is not None and not 0 <= average_decay < 1:
        raise ValueError(
            f"make_train_step: average_decay must be at least 0 and below 1, got {average_decay}."
        )
    if compute_dtype is not None and not jnp.issubdtype(compute_dtype, jnp.floating):
        raise TypeError(
            f"make_train_step: compute_dtype must be a floating dtype, got {compute_dtype!r}."
        )

    def scaled_loss(params, carry, batch, key):
        """The loss in compute_dtype; all that leaves it has the dtypes that came."""
        inside_params, inside_carry, batch = _cast((params, carry, batch), compute_dtype)
        returned = loss_fn(inside_params, inside_carry, batch, key)
        loss, new_carry, metrics = _require_result(returned, inside_carry)
        if compute_dtype is not None:
            new_carry = jax.tree.map(lambda new, old: new.astype(old.dtype), new_carry, carry)
            loss, metrics = _cast((loss, metrics), jnp.float32)
        return loss * loss_scale, (loss, new_carry, metrics)

    def differentiate(params, carry, batch, key):
        """((loss, carry, metrics), gradient) of one part."""
        grads, (loss, carry, metrics) = jax.grad(scaled_loss, has_aux=True)(
            params, carry, batch, key
        )
        if loss_scale != 1:
            grads = jax.tree.map(lambda g: g / loss_scale, grads)
        return (loss, carry, metrics), grads

    def differentiate_parts(params, carry, batch, key):
        """The same of a whole batch: means over its parts, the carry running through."""
        _require_parts(batch, accumulate)

        def body(sums, part):
            carry, *sums = sums
            (loss, carry, metrics), grads = differentiate(params, carry, *part)
            taken = grads, loss, jax.tree.map(lambda m: m.astype(_wide(m)), metrics)
            return (carry, *jax.tree.map(jnp.add, tuple(sums), taken)), None

        keys = jax.random.split(key, accumulate)
        first = jax.tree.map(lambda x: x[0], (batch, keys))
        (loss, _, metrics), grads = jax.eval_shape(differentiate, params, carry, *first)
        metrics = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, _wide(m)), metrics)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, loss, metrics))
        (carry, *sums), _ = jax.lax.scan(body, (carry, *zeros), (batch, keys))
        grads, loss, metrics = jax.tree.map(lambda x: x / accumulate, tuple(sums))
        return (loss, carry, metrics), grads

    gradient_fn = differentiate if accumulate == 1 else differentiate_parts
    gradient_fn = gradient_fn if layout is None else layout.wrap_gradient(gradient_fn)

    def train_step(state, batch):
        _require_average(state, average_decay)
        key, key_loss = jax.random.split(state.key)
        (loss, carry, metrics), grads = gradient_fn(state.params, state.carry, batch, key_loss)
        leaves = [loss, *jax.tree.leaves(grads)]
        norm = _safe_norm(grads)
        grads = _clip(grads, clip_value, clip_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        _require_same_shapes(params, state.params)
        leaves += [_square_sum(grads), *jax.tree.leaves(params)]
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
        old = (state.opt_state, state.carry)
        finite &= _stays_finite((opt_state, carry), old)
        average = state.average
        if average_decay is not None:
            wide = jax.tree.map(lambda p, a: p.astype(a.dtype), params, average)
            average = optax.incremental_update(wide, average, 1 - average_decay)
        params, opt_state, carry, average = jax.tree.map(
            lambda new, old: _strong(jnp.where(finite, new, old)),
            (params, opt_state, carry, average),
            (state.params, *old, state.average),
        )
        skipped = state.skipped + (1 - finite.astype(jnp.int32))
        state = TrainState(params, opt_state, carry, key, state.step + 1, skipped, average)
        return state, {**metrics, "loss": loss, "gradient_norm": norm, "skipped": skipped}

    train_step = train_step if layout is None else layout.wrap_step(train_step)
    return jax.jit(train_step, donate_argnums=(0,) if donate else ())


def _cast(tree, dtype):
    """The tree with its floating leaves in that dtype; as it is where dtype is None."""
    if dtype is None:
        return tree
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        jax.tree.map(jnp.asarray, tree),
    )


def _wide(x):
    """The dtype that sums of x are taken in: float32 at least."""
    return state_dtype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32


def _widest(leaves):
    return jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in leaves) else jnp.float32


def _strong(x):
    """x without JAX's weak type, which no file keeps."""
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.astype(x.dtype)


def _stays_finite(new, old):
    """True unless a number became none: some optimizers begin with infinity."""
    kept = [
        (jnp.isfinite(a) | ~jnp.isfinite(b)).all()
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old))
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    return jnp.stack([jnp.array(True), *kept]).all()


def _square_sum(grads):
    leaves = jax.tree.leaves(grads)
    return sum(jnp.sum(jnp.square(g.astype(_widest(leaves)))) for g in leaves)


def _safe_norm(grads):
    """The norm of all entries, of numbers between 0 and 1 where squares would overflow."""
    leaves = jax.tree.leaves(grads)
    wide = [g.astype(_widest(leaves)) for g in leaves]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g), initial=0) for g in wide]), initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(_square_sum([g / unit for g in wide]))


def _clip(grads, clip_value, clip_norm):
    """The gradient with its entries, and then its norm, clipped."""
    if clip_value is not None:
        grads = jax.tree.map(lambda g: jnp.clip(g, -clip_value, clip_value), grads)
    if clip_norm is None:
        return grads
    norm = _safe_norm(grads)
    # Divided first: clip_norm / norm may be too small a number.
    return jax.tree.map(lambda g: jnp.where(norm > clip_norm, _over(g, norm) * clip_norm, g), grads)


def _over(g, norm):
    return (g.astype(norm.dtype) / norm).astype(g.dtype)


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


def _require_parts(batch, accumulate):
    """ValueError where a leaf of the batch has another leading axis than its parts."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.ndim == 0 or leaf.shape[0] != accumulate:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"train_step: batch{name} must have the {accumulate} parts of accumulate as its "
                f"leading axis, got shape {list(leaf.shape)}."
            )


def _require_average(state, average_decay):
    """ValueError where the state has an average that nobody keeps, or none to keep."""
    if (state.average is None) != (average_decay is None):
        has = "none" if state.average is None else "one"
        raise ValueError(
            f"train_step: the average of the state and average_decay={average_decay} must go "
            f"together, got a state with {has}; give init_train_state average=True and "
            "make_train_step an average_decay, or neither."
        )


def _require_same_shapes(params, old):
    """ValueError where an update, which `optax.apply_updates` would broadcast, changed params."""
    for (path, new), leaf in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(old)):
        if new.shape != leaf.shape or new.dtype != leaf.dtype:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"train_step: the optimizer must keep params{name} as {leaf.dtype}"
                f"{list(leaf.shape)}, got {new.dtype}{list(new.shape)}."
            )
