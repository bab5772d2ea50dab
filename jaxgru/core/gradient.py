"""How a GRU is differentiated: the derivative rule and its options, as one static value."""

import dataclasses
from typing import Any, Literal, get_args

from jaxgru.core.checks import require_choice, require_count

Residuals = Literal["gates", "states", "boundaries"]


class Kernel:
    """Runs the recurrence in place of `lax.scan`: the base class of those in `jaxgru.experimental`.

    A kernel is static: hashable, and equal to another one that does the same.
    """

    def prepare(self, params: Any, xs: Any) -> "Kernel":
        """The kernel for one call of `gru`; ValueError where it cannot compute what is asked.

        What the backward pass must know of JAX's settings is stored here, since they may have
        changed when that is traced.
        """
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `jaxgru.core.scan.scan_chunk` computes."""
        raise NotImplementedError

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """What `jaxgru.core.bptt.reverse_scan` computes."""
        raise NotImplementedError


def _require_counts(rule, *names):
    """Every field must be a positive integer; all but unroll may be None."""
    for name in names:
        value = getattr(rule, name)
        if value is not None or name == "unroll":
            require_count(type(rule).__name__, name, value)


@dataclasses.dataclass(frozen=True)
class BPTT:
    """Backpropagation through time by the handwritten `custom_vjp`: reverse mode, the fastest.

    JAX raises a TypeError for forward mode: use `Tangent` there. residuals, chunk_size and unroll
    change memory and time; values and gradients change by rounding only.

    Attributes:
      residuals: what the forward pass saves for the backward pass. "gates": hs and r, z, n (and q,
        for reset="after"). "states": hs; the gates are recomputed in bulk products. "boundaries":
        one state a chunk; the chunk is recomputed. None chooses "states" where T B H is above 2^19
        and I + H at most 256, since recomputing the gates is then faster than storing them, and
        "gates" elsewhere, also where a size is symbolic. With a kernel None chooses "states".
      chunk_size: steps that are differentiated at once; T need not be a multiple of it. None
        chooses by size: the whole sequence where a size is symbolic ("boundaries" then reduces no
        memory), and on a mesh with Auto axes unless residuals is "boundaries".
      unroll: steps of the loop that one iteration runs, as in `lax.scan`.
      truncate: truncated backpropagation: steps are divided into windows [0, truncate), ... and the
        gradient of the state is cut between them. Values do not change. None cuts nothing.
      kernel: runs the sequence in place of `lax.scan`: see `jaxgru.experimental.fused`.

    Raises:
      ValueError: a value is out of its range.
      TypeError: a count is no integer, or kernel no `Kernel`.

    >>> BPTT(residuals="states", chunk_size=64).residuals
    'states'
    """

    residuals: Residuals | None = None
    chunk_size: int | None = None
    unroll: int = 1
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
        if self.kernel is not None and self.unroll != 1:
            raise ValueError(
                f"BPTT: unroll must be 1 with a kernel, which has no loop of XLA to unroll, got "
                f"{self.unroll}; leave it out."
            )


@dataclasses.dataclass(frozen=True)
class _OfScan:
    unroll: int = 1
    truncate: int | None = None

    def __post_init__(self):
        _require_counts(self, "unroll", "truncate")


class Tangent(_OfScan):
    """The handwritten `custom_jvp`: every mode and order of derivative.

    Use it for `jax.jvp`, `jax.jacfwd`, `jax.linearize` and `jax.hessian`. JAX transposes it for
    reverse mode. Its fields `unroll` and `truncate` are those of `BPTT`.
    """


class Autodiff(_OfScan):
    """JAX's own derivative of the scan: the reference for the other two.

    Its fields `unroll` and `truncate` are those of `BPTT`.
    """


Rule = BPTT | Tangent | Autodiff
Gradient = Literal["bptt", "tangent", "autodiff"] | Rule
_NAMED = {"bptt": BPTT(), "tangent": Tangent(), "autodiff": Autodiff()}


def as_rule(function: str, gradient: Any) -> Rule:
    """The rule that `gradient=` names; ValueError or TypeError where it names none."""
    if isinstance(gradient, Rule):
        return gradient
    if isinstance(gradient, str):
        require_choice(function, "gradient", gradient, tuple(_NAMED))
        return _NAMED[gradient]
    called = isinstance(gradient, type) and issubclass(gradient, Rule)
    cure = f"; call it: {gradient.__name__}()" if called else ""
    raise TypeError(
        f"{function}: gradient must be one of {', '.join(map(repr, _NAMED))}, or a BPTT, a Tangent "
        f"or an Autodiff, got {gradient!r}{cure}."
    )
