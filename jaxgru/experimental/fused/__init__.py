"""The recurrence as one kernel for NVIDIA's Hopper GPUs: `BPTT(kernel=HopperKernel())`."""

from jaxgru.core.gradient import Kernel
from jaxgru.experimental.fused.hopper import HopperKernel

__all__ = ["HopperKernel", "Kernel"]
