"""What a GRU and its gradient do over a sequence: gradient flow, gates, Jacobians, RTRL.

These functions examine the plain network, without dropout and zoneout, and run under `jax.jit`.
Functions of a layer or stack return one result for a `GRUParams`, a `Bidirectional` of two, and a
tuple of these for a stack. The arguments that they share are described at `gradient_flow`.
"""

from jaxgru.diagnostics.example_norms import example_gradient_norms
from jaxgru.diagnostics.flow import GradientFlow, Paths, credit_reach, gradient_flow, gradient_paths
from jaxgru.diagnostics.gates import GateStatistics, GateValues, gate_statistics, gate_values
from jaxgru.diagnostics.influence import RTRLResult, RTRLState, rtrl
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
    "GateStatistics", "GateValues", "GradientFlow", "Paths", "RTRLResult", "RTRLState",
    "credit_reach", "example_gradient_norms", "gate_statistics", "gate_values", "gradient_flow",
    "gradient_paths", "jacobian_products", "lyapunov_exponents", "rtrl", "sequence_jacobians",
    "singular_values", "step_jacobian", "step_jacobian_bound", "step_jacobian_diagonal",
]  # fmt: skip
