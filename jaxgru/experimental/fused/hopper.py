"""`HopperKernel`: the fused kernels in place of the scans of `gru`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxgru.core.gradient import Kernel
from jaxgru.core.sharding import on_auto_mesh, varying_axes
from jaxgru.experimental.fused.kernels import FusedKernels
from jaxgru.experimental.fused.tiling import count_splits


@dataclasses.dataclass(frozen=True)
class HopperKernel(Kernel):
    """One kernel for the whole sequence forward, one backward, for NVIDIA's Hopper GPUs.

    Experimental: it has run in JAX's interpreter alone. Pass it as
    `gru(params, xs, gradient=BPTT(kernel=HopperKernel()))`. It has first derivatives only. Arrays
    that several devices share need `jax.shard_map` around the call.

    w_h stays in the GPU's shared memory, so H may be at most 512 for half types and 256 for
    float32, whose product is three products of bfloat16 (16 bits an operand). It is one, and H at
    most 512, under `jax.default_matmul_precision("bfloat16")`; six (24 bits), and H at most 128,
    under "highest". The residuals are "states" by default, and the whole sequence is one chunk.

    Attributes:
      interpret: runs the kernels in JAX's interpreter on one CPU device, for tests; slow, and not
        inside `jax.checkpoint`.

    Raises:
      ValueError: when called, the parameters have a layer-norm scale, a size is symbolic, or H does
        not fit (the error says what does). On another device JAX refuses to compile the kernel.
      TypeError: when called, the arrays are float64.
      NotImplementedError: a second derivative, or what JAX's interpreter cannot do.
    """

    interpret: bool = False

    def prepare(self, params: Any, xs: Any) -> FusedKernels:
        """The kernels with the precision that JAX's settings ask for now."""
        cure = "leave BPTT's kernel out"
        if xs.dtype == jnp.float64:
            raise TypeError(
                f"HopperKernel: xs must be float32, bfloat16 or float16, since tensor cores sum in "
                f"float32, got float64; {cure}."
            )
        mesh = jax.sharding.get_abstract_mesh()
        sharding = getattr(jax.typeof(xs), "sharding", None)
        if on_auto_mesh() or (sharding is not None and any(sharding.spec)):
            raise ValueError(
                "HopperKernel: gru must be called inside jax.shard_map where a mesh shards arrays, "
                f"since XLA cannot shard a kernel, got the mesh {mesh.shape}; {cure}."
            )
        if self.interpret and any(mesh.shape[name] > 1 for name in varying_axes(xs)):
            raise NotImplementedError(
                f"HopperKernel: interpret=True must run on one device, got the mesh {mesh.shape}: "
                f"JAX's interpreter runs one kernel at a time; {cure}."
            )
        if params.g_x is not None or params.g_h is not None:
            raise ValueError(
                "HopperKernel: params must have no layer-norm scales, since the kernels have no "
                f"layer normalization, got g_x or g_h; {cure}."
            )
        if not all(isinstance(size, int) for size in xs.shape):
            raise ValueError(
                "HopperKernel: xs must have a concrete shape, since the kernels divide it into "
                f"tiles, got {xs.shape}; {cure}."
            )
        return FusedKernels(self.interpret, count_splits(xs.dtype))
