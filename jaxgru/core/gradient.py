"""The derivative rules of `gru` and their options."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

from jaxgru.core.checks import require_choice, require_count

Residuals = Literal["gates", "states", "boundaries"]


class Kernel:
    """Runs the recurrence in place of `lax.scan`: the base class of experimental kernels.

    A kernel is static: hashable, and equal kernels compute the same. Its methods:

    prepare(params, xs): returns the kernel for one call of `gru`. It records JAX's settings, since
      they may differ when the backward pass is traced. ValueError for an unsupported call.
    forward: computes what `jaxgru.core.scan.scan_steps` does, from the same arguments.
    backward: computes what `jaxgru.core.bptt.reverse_scan` does, from the same arguments.
    """

    prepare: Callable[..., "Kernel"]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def _require_counts(rule, *names):
    """Each named field must be a positive integer, or None if None is its default."""
    for name in names:
        value, default = getattr(rule, name), getattr(type(rule), name)
        if value is not None or default is not None:
            require_count(type(rule).__name__, name, value)


@dataclasses.dataclass(frozen=True)
class BPTT:
    """Backpropagation through time by the handwritten `custom_vjp`: reverse mode, the fastest.

    Forward mode (`jax.jvp`, `jax.jacfwd`) is a TypeError: use `Tangent` there.
    residuals, chunk_size and unroll change memory and time; values and gradients change by rounding
    only. Where one is None, `jaxgru/core/chunks.py` chooses it by the sizes and the device that the
    program is compiled for.

    Attributes:
      residuals: what the forward pass saves for the backward pass. "gates": hs and r, z, n (and q,
        for reset="after"). "states": hs; the gates are recomputed, a chunk at once. "boundaries":
        the state at the start of each chunk; the forward pass is recomputed.
      chunk_size: steps per chunk; T need not be a multiple of it. For symbolic sizes None means
        one chunk, and "boundaries" then saves no memory.
      unroll: steps of the loop that one iteration runs, as in `lax.scan`.
      truncate: truncated backpropagation: no gradient flows from one window of `truncate` steps
        back to the window before it. Values do not change. None: no truncation.
      kernel: runs the sequence in place of `lax.scan`: see `jaxgru.experimental.fused`.

    Raises:
      ValueError: a value is out of its range.
      TypeError: a count is not an integer, or kernel is not a `Kernel`.

    >>> BPTT(residuals="states", chunk_size=64).residuals
    'states'
    """

    residuals: Residuals | None = None
    chunk_size: int | None = None
    unroll: int | None = None
    truncate: int | None = None
    kernel: Kernel | None = None

    def __post_init__(self):
        _require_counts(self, "chunk_size", "unroll", "truncate")
        if self.residuals is not None:
            require_choice("BPTT", "residuals", self.residuals, get_args(Residuals))
        if self.kernel is not None and not isinstance(self.kernel, Kernel):
            raise TypeError(
                "BPTT: kernel must be a Kernel of jaxgru.experimental or None, got "
                f"{self.kernel!r}."
            )
        if self.kernel is not None and self.unroll not in (None, 1):
            raise ValueError(
                "BPTT: unroll must be 1 with a kernel, which has no loop of XLA to unroll, got "
                f"{self.unroll}; leave it out."
            )


@dataclasses.dataclass(frozen=True)
class _ScanOptions:
    unroll: int = 1
    truncate: int | None = None

    def __post_init__(self):
        _require_counts(self, "unroll", "truncate")


class Tangent(_ScanOptions):
    """The handwritten `custom_jvp`, for forward mode; JAX transposes it for reverse mode.

    Its fields are `unroll`, which is 1 by default on every device, and `truncate`, as in `BPTT`.
    """


class Autodiff(_ScanOptions):
    """JAX's own derivative of the scan: the reference for the other two.

    Its fields are `unroll`, which is 1 by default on every device, and `truncate`, as in `BPTT`.
    """


Rule = BPTT | Tangent | Autodiff
Gradient = Literal["bptt", "tangent", "autodiff"] | Rule
_NAMED = {"bptt": BPTT(), "tangent": Tangent(), "autodiff": Autodiff()}


def as_rule(function: str, gradient: Any) -> Rule:
    """The rule that `gradient=` names; ValueError or TypeError if it names none."""
    if isinstance(gradient, Rule):
        return gradient
    if isinstance(gradient, str):
        cure = f"; pass BPTT({gradient!r})" if gradient in get_args(Residuals) else ""
        require_choice(function, "gradient", gradient, tuple(_NAMED), cure)
        return _NAMED[gradient]
    is_class = isinstance(gradient, type) and issubclass(gradient, Rule)
    cure = f"; call it: {gradient.__name__}()" if is_class else ""
    raise TypeError(
        f"{function}: gradient must be one of {', '.join(map(repr, _NAMED))}, or a BPTT, a Tangent "
        f"or an Autodiff, got {gradient!r}{cure}."
    )
