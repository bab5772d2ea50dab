"""Losses of a sequence from logits or outputs, and their reductions to one number.

With entries l[t, ...], a mask m of the entries that count (1 everywhere without one), and B
sequences::

    "none"           m * l, [T, ...]
    "sum"            sum m l
    "mean"           sum m l / sum m
    "batch_mean"     sum m l / B
    "sequence_mean"  1/B sum_b (sum_t m l / sum_t m)

If no entry counts, 0 / 0 is taken as 0. The size of the gradient depends on the reduction; choose
the learning rate and the clipping norm for it.

The entries are computed by optax, in float32 for half types. All losses share these options:

    mask       [...] bool, True where an entry counts; other entries, also NaN, change nothing
    reduction  one of the five above
    axis       the axis of time in [...], "first" for axis 0; None if the loss is one entry for each
               sequence (many to one), where "batch_mean" and "sequence_mean" are 1/B sum m l. Where
               [...] has one axis, these two need axis=0 (time) or axis=None (sequences).

They raise ValueError if a shape does not fit or a choice is unknown, and TypeError if an array has
the wrong dtype.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgru.core.checks import (
    is_traced,
    require_choice,
    require_flags,
    require_float,
    require_shape,
)
from jaxgru.core.matmul import state_dtype

__all__ = ["bernoulli_loss", "categorical_loss", "squared_loss"]

Reduction = Literal["none", "sum", "mean", "batch_mean", "sequence_mean"]
Axis = int | Literal["first"] | None


def categorical_loss(
    logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, *,
    reduction: Reduction = "mean", axis: Axis = "first",
) -> jax.Array:  # fmt: skip
    """Computes -log softmax(logits)[label], in nats, for one of K classes.

    Args:
      logits: [..., K], with a leading T if every step has a loss.
      labels: [...] integers in [0, K), of any integer dtype. Inside jit other labels cannot be
        refused: each makes its entry, and so the loss, NaN. Mask entries without a label.
      mask, reduction, axis: see `jaxgru.losses`.

    Returns:
      A scalar, or [...] for reduction="none"; float32 for half types.

    Raises:
      ValueError, TypeError: see `jaxgru.losses`; ValueError also for a label outside of [0, K).

    >>> round(float(categorical_loss(jnp.zeros((2, 5)), jnp.array([0, 3]))), 4)  # log 5
    1.6094
    """
    logits = _read("categorical_loss", "logits", logits, mask, reduction)
    labels = require_labels("categorical_loss", "labels", labels, logits.shape[-1], mask)
    require_shape("categorical_loss", "labels", labels, logits.shape[:-1], "one for each loss")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _reduce("categorical_loss", losses, mask, reduction, axis)


def bernoulli_loss(
    logits: jax.Array, targets: jax.Array, mask: jax.Array | None = None, *,
    reduction: Reduction = "mean", axis: Axis = "first",
) -> jax.Array:  # fmt: skip
    """Computes -sum_k y_k log s(o_k) + (1 - y_k) log s(-o_k), in nats, for K independent labels.

    Args:
      logits: o [..., K].
      targets: y [..., K] in the dtype of the logits, each entry in [0, 1].
      mask, reduction, axis: see `jaxgru.losses`; the sum over k is always taken.

    Returns:
      A scalar, or [...] for reduction="none"; float32 for half types.

    Raises:
      ValueError, TypeError: see `jaxgru.losses`.

    >>> round(float(bernoulli_loss(jnp.zeros((3, 88)), jnp.ones((3, 88)))), 2)  # 88 log 2
    61.0
    """
    logits, targets = _read_pair("bernoulli_loss", "logits", logits, targets, mask, reduction)
    losses = optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)
    return _reduce("bernoulli_loss", losses, mask, reduction, axis)


def squared_loss(
    outputs: jax.Array, targets: jax.Array, mask: jax.Array | None = None, *,
    form: Literal["mean", "half_sum"] = "mean", reduction: Reduction = "mean",
    axis: Axis = "first",
) -> jax.Array:  # fmt: skip
    """Computes 1/K sum_k (o_k - y_k)^2, or 1/2 sum_k (o_k - y_k)^2.

    Args:
      outputs: o [..., K].
      targets: y [..., K], in the dtype of the outputs.
      form: "mean" over the K outputs, or "half_sum", half the sum over them. "half_sum" with
        reduction="sum" is the total of "Back Propagation Through Time in Many-to-Many type",
        section 9.5, eqs. 9.18 to 9.20.
      mask, reduction, axis: see `jaxgru.losses`.

    Returns:
      A scalar, or [...] for reduction="none"; float32 for half types.

    Raises:
      ValueError, TypeError: see `jaxgru.losses`.

    >>> outputs, targets = jnp.ones((4, 2)), jnp.zeros((4, 2))
    >>> float(squared_loss(outputs, targets, form="half_sum", reduction="sum"))
    4.0
    """
    require_choice("squared_loss", "form", form, ("mean", "half_sum"))
    outputs, targets = _read_pair("squared_loss", "outputs", outputs, targets, mask, reduction)
    if form == "half_sum":
        losses = optax.l2_loss(outputs, targets).sum(axis=-1)
    else:
        losses = optax.squared_error(outputs, targets).mean(axis=-1)
    return _reduce("squared_loss", losses, mask, reduction, axis)


def require_labels(
    function: str, argument: str, labels: Any, count: int, mask: Any = None
) -> jax.Array:
    """The labels as int32: 0 where they are masked, count where they are outside of [0, count).

    TypeError unless labels is an integer array; ValueError where a label that is not masked is
    outside of [0, count), if it can be read, which is outside jit only.
    """
    dtype = getattr(labels, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        found = f"dtype {dtype}" if dtype is not None else type(labels).__name__
        raise TypeError(f"{function}: {argument} must be an integer array, got {found}.")
    require_flags(function, {"mask": mask}, labels.shape, f"that of {argument}")
    if is_readable(labels) and is_readable(mask):
        values = np.asarray(labels) if mask is None else np.asarray(labels)[np.asarray(mask)]
        if values.size and not (values.min() >= 0 and values.max() < count):
            raise ValueError(
                f"{function}: {argument} must be in [0, {count}), got {values.min()} to "
                f"{values.max()}; mask entries that do not count."
            )
    xp = jnp if isinstance(labels, jax.Array) else np  # jnp.asarray would wrap 64 bits
    labels = labels.astype(np.int32) if dtype.itemsize < 4 else labels  # count may be above 127
    labels = xp.where((labels < 0) | (labels >= count), count, labels).astype(np.int32)
    return _zero_masked(mask, jnp.asarray(labels))


def is_readable(value: Any) -> bool:
    """Whether the value is known here: it is not traced, and no other process holds a part."""
    return not is_traced(value) and getattr(value, "is_fully_addressable", True)


def _reduce(function, losses, mask, reduction, axis):
    """The reductions of the module's docstring."""
    losses = _zero_masked(mask, losses)
    counts = jnp.ones_like(losses) if mask is None else mask.astype(losses.dtype)
    if reduction in ("none", "sum"):
        return losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        return losses.sum() / jnp.maximum(counts.sum(), 1)
    if axis == "first":
        if losses.ndim == 1:
            raise ValueError(
                f"{function}: axis must be given for reduction={reduction!r} of losses with one "
                "axis, got none; pass axis=0 if it is the time of one sequence, axis=None if each "
                "loss is that of a sequence."
            )
        axis = 0
    if axis is not None:
        if not isinstance(axis, int) or not -losses.ndim <= axis < losses.ndim:
            raise ValueError(
                f"{function}: axis must name the axis of time of the losses for reduction="
                f"{reduction!r}, or be None, got {axis!r} for shape {losses.shape}."
            )
        losses, counts = losses.sum(axis=axis), counts.sum(axis=axis)
    if reduction == "sequence_mean":
        losses = losses / jnp.maximum(counts, 1)
    return losses.sum() / max(losses.size, 1)


def _zero_masked(mask, values):
    """The values with zeros where the mask is False: 0 * NaN is NaN, also in the gradient."""
    if mask is None:
        return values
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    return jnp.where(mask, values, jnp.zeros_like(values))


def _read(function, argument, values, mask, reduction):
    """The checked array, zero where it is masked, half types as float32; checks the options too."""
    require_float(function, argument, values)
    if values.ndim < 1:
        raise ValueError(f"{function}: {argument} must have shape [..., K], got {values.shape}.")
    require_choice(function, "reduction", reduction, get_args(Reduction))
    require_flags(function, {"mask": mask}, values.shape[:-1], "one for each loss")
    return _zero_masked(mask, values.astype(state_dtype(values.dtype)))


def _read_pair(function, argument, values, targets, mask, reduction):
    """The two arrays of a loss, as `_read` returns them."""
    read = _read(function, argument, values, mask, reduction)
    require_float(function, "targets", targets)
    if targets.dtype != values.dtype:
        raise TypeError(
            f"{function}: targets must have the dtype of {argument}, {values.dtype}, "
            f"got {targets.dtype}; cast one of them."
        )
    require_shape(function, "targets", targets, values.shape, f"that of {argument}")
    return read, _read(function, "targets", targets, mask, reduction)
