"""Losses of a sequence from logits or outputs, and how their entries become one number.

With entries l[t, ...] and a mask m of real steps (1 everywhere without one), B sequences::

    "none"           m * l, [T, ...]
    "sum"            sum m l
    "mean"           sum m l / sum m
    "batch_mean"     sum m l / B
    "sequence_mean"  1/B sum_b (sum_t m l / sum_t m)

Where no step counts, 0 / 0 is 0. `axis` says where time is; a loss per sequence instead of per step
(many to one) has none, axis=None, and there "batch_mean" and "sequence_mean" are 1/B sum m l. The
gradient, and with it the right learning rate and clip, scales with the reduction: from "mean" to
"sum" it grows by the number of real steps. Half types are summed, and returned, in float32.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgru.core.checks import is_traced, require_choice, require_flags, require_float
from jaxgru.core.matmul import state_dtype

__all__ = [
    "bernoulli_loss",
    "categorical_loss",
    "squared_loss",
]

Array = jax.Array
Reduction = Literal["none", "sum", "mean", "batch_mean", "sequence_mean"]


def categorical_loss(
    logits: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    reduction: Reduction = "mean",
    axis: int | None = 0,
) -> Array:
    """-log softmax(logits)[label], in nats: one of K classes.

    Args:
      logits: [..., K], with a leading T where the loss is of every step.
      labels: [...] integers in [0, K). Inside jit others cannot be refused: from -K to -1 they
        count from the end, beyond that the loss is NaN; mask what has no label.
      mask: [...] bool, True where an entry counts; what the others hold, NaN included, changes
        nothing.
      reduction: see `jaxgru.losses`.
      axis: of time in [...]; None where there is none.

    Returns:
      A scalar, or [...] for reduction="none"; float32 for half types.

    Raises:
      ValueError: shapes do not fit, or the reduction is unknown.
      TypeError: logits are not floating, labels no integers, or the mask no bool.

    Source: `optax.softmax_cross_entropy_with_integer_labels`.

    >>> round(float(categorical_loss(jnp.zeros((2, 5)), jnp.array([0, 3]))), 4)  # log 5
    1.6094
    """
    require_float("categorical_loss", "logits", logits)
    require_labels("categorical_loss", "labels", labels)
    _require_shape("categorical_loss", "labels", labels, logits.shape[:-1])
    _require_options("categorical_loss", mask, logits.shape[:-1], reduction)
    logits, labels = _blank(mask, logits), _blank(mask, labels)
    if not is_traced(labels) and labels.size:
        values = np.asarray(labels)
        if not (values.min() >= 0 and values.max() < logits.shape[-1]):
            raise ValueError(
                f"categorical_loss: labels must lie in [0, {logits.shape[-1]}) where they count, "
                f"got {values.min()} to {values.max()}; mask what has no label."
            )
    losses = optax.softmax_cross_entropy_with_integer_labels(_wide(logits), labels)
    return _reduce("categorical_loss", losses, mask, reduction, axis)


def bernoulli_loss(
    logits: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    reduction: Reduction = "mean",
    axis: int | None = 0,
) -> Array:
    """-sum_k y_k log s(o_k) + (1 - y_k) log s(-o_k), in nats: K independent labels.

    Args:
      logits: o [..., K].
      targets: y [..., K] in the dtype of the logits, each entry in [0, 1].
      mask: [...] bool, True where an entry counts.
      reduction: see `jaxgru.losses`; the sum over k is always taken.
      axis: of time in [...]; None where there is none.

    Returns:
      A scalar, or [...] for reduction="none"; float32 for half types.

    Raises:
      ValueError: shapes do not fit, or the reduction is unknown.
      TypeError: logits and targets are not of one floating dtype, or the mask no bool.

    Source: `optax.sigmoid_binary_cross_entropy`.

    >>> loss = bernoulli_loss(jnp.zeros((3, 88)), jnp.ones((3, 88)))
    >>> round(float(loss), 2)  # 88 log 2
    61.0
    """
    _require_pair("bernoulli_loss", "logits", logits, targets, mask, reduction)
    logits, targets = _blank(mask, logits), _blank(mask, targets)
    losses = optax.sigmoid_binary_cross_entropy(_wide(logits), _wide(targets)).sum(axis=-1)
    return _reduce("bernoulli_loss", losses, mask, reduction, axis)


def squared_loss(
    outputs: Array,
    targets: Array,
    mask: Array | None = None,
    *,
    form: Literal["mean", "half_sum"] = "mean",
    reduction: Reduction = "mean",
    axis: int | None = 0,
) -> Array:
    """1/K sum_k (o_k - y_k)^2, or 1/2 sum_k (o_k - y_k)^2.

    Args:
      outputs: o [..., K].
      targets: y [..., K], in the dtype of the outputs.
      mask: [...] bool, True where an entry counts.
      form: "mean" over the K outputs, or "half_sum": half the sum over them, the form of "Back
        Propagation Through Time in Many-to-Many type", section 9.5, eqs. 9.18 to 9.20, whose total
        is reduction="sum".
      reduction: see `jaxgru.losses`.
      axis: of time in [...]; None where there is none.

    Returns:
      A scalar, or [...] for reduction="none"; float32 for half types.

    Raises:
      ValueError: shapes do not fit, or a choice is unknown.
      TypeError: outputs and targets are not of one floating dtype, or the mask no bool.

    Source: `optax.squared_error` and `optax.l2_loss`.

    >>> outputs, targets = jnp.ones((4, 2)), jnp.zeros((4, 2))
    >>> float(squared_loss(outputs, targets, form="half_sum", reduction="sum"))
    4.0
    """
    require_choice("squared_loss", "form", form, ("mean", "half_sum"))
    _require_pair("squared_loss", "outputs", outputs, targets, mask, reduction)
    outputs, targets = _wide(_blank(mask, outputs)), _wide(_blank(mask, targets))
    if form == "half_sum":
        losses = optax.l2_loss(outputs, targets).sum(axis=-1)
    else:
        losses = optax.squared_error(outputs, targets).mean(axis=-1)
    return _reduce("squared_loss", losses, mask, reduction, axis)


def require_labels(function: str, argument: str, labels: Any) -> None:
    """TypeError unless labels is an integer array."""
    dtype = getattr(labels, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        found = f"dtype {dtype}" if dtype is not None else type(labels).__name__
        raise TypeError(f"{function}: {argument} must be an integer array, got {found}.")


def _reduce(function, losses, mask, reduction, axis):
    """The reductions of the module's docstring."""
    losses = losses if mask is None else jnp.where(mask, losses, jnp.zeros_like(losses))
    counted = jnp.ones_like(losses) if mask is None else mask.astype(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / jnp.maximum(counted.sum(), 1)
    if axis is None:
        return losses.sum() / max(losses.size, 1)
    if not -losses.ndim <= axis < losses.ndim:
        raise ValueError(
            f"{function}: axis must name the axis of time of the losses for reduction="
            f"{reduction!r}, or be None, got {axis} for shape {losses.shape}."
        )
    sums = losses.sum(axis=axis)
    if reduction == "sequence_mean":
        sums = sums / jnp.maximum(counted.sum(axis=axis), 1)
    return sums.sum() / max(sums.size, 1)


def _wide(values):
    """Half types as float32."""
    return values.astype(state_dtype(values.dtype))


def _blank(mask, values):
    """Values with zeros where nothing counts: 0 * NaN is NaN, in the gradient too."""
    if mask is None:
        return values
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return jnp.where(mask, values, jnp.zeros_like(values))


def _require_pair(function, argument, values, targets, mask, reduction):
    """Checks of a loss between two arrays of one shape and dtype."""
    require_float(function, argument, values)
    require_float(function, "targets", targets)
    if targets.dtype != values.dtype:
        raise TypeError(
            f"{function}: targets must have the dtype of {argument}, {values.dtype}, "
            f"got {targets.dtype}; cast one of them."
        )
    if values.ndim < 1:
        raise ValueError(f"{function}: {argument} must have shape [..., K], got {values.shape}.")
    _require_shape(function, "targets", targets, values.shape)
    _require_options(function, mask, values.shape[:-1], reduction)


def _require_shape(function, argument, value, shape):
    if value.shape != shape:
        raise ValueError(f"{function}: {argument} must have shape {shape}, got {value.shape}.")


def _require_options(function, mask, shape, reduction):
    require_choice(function, "reduction", reduction, get_args(Reduction))
    require_flags(function, {"mask": mask}, shape, "one entry a loss")
