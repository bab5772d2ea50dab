"""What a GRU and its gradient do over a sequence: gradient flow, gates, Jacobians, RTRL.

These functions examine the plain network, without dropout and zoneout, and change no value of it.
They run under `jax.jit`. Functions of a layer or stack return one result for a `GRUParams`, a
`Bidirectional` of two, and a tuple of these for a stack. The arguments that they share are

    params           a `GRUParams`, a `Bidirectional`, or a sequence of these
    xs               [T, ..., I]
    h0               as in `gru_stack`, or as in `gru` for a single layer; None for zeros
    mask, resets     [T, ...] bool, as in `gru`
    merge, residual  as in `gru_stack`
    reverse          as in `gru`; the step "before" t is then t + 1

and they raise ValueError if a shape does not fit, a choice is unknown, or a number in params, h0 or
the valid steps of xs is not finite (inside jit numbers are not checked), and TypeError if an
argument has the wrong kind or dtype. A loss function must return one floating number.
"""

from jaxgru.diagnostics.example_norms import example_gradient_norms
from jaxgru.diagnostics.flow import GradientFlow, Paths, credit_reach, gradient_flow, gradient_paths
from jaxgru.diagnostics.gates import GateStatistics, GateValues, gate_statistics, gate_values
from jaxgru.diagnostics.influence import rtrl
from jaxgru.diagnostics.jacobians import (
    jacobian_products,
    lyapunov_exponents,
    sequence_jacobians,
    singular_values,
    step_jacobian,
    step_jacobian_bound,
    step_jacobian_diagonal,
)

__all__ = [
    "GateStatistics", "GateValues", "GradientFlow", "Paths", "credit_reach",
    "example_gradient_norms", "gate_statistics", "gate_values", "gradient_flow", "gradient_paths",
    "jacobian_products", "lyapunov_exponents", "rtrl", "sequence_jacobians", "singular_values",
    "step_jacobian", "step_jacobian_bound", "step_jacobian_diagonal",
]  # fmt: skip
