"""The operations of a fused kernel that are more than one function of Pallas for Mosaic GPU.

The interpreter of JAX 0.10 supports neither clusters nor transposed reads of shared memory: there,
operands are stored untransposed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgru.core.sharding import varying_axes
from jaxgru.experimental.fused.tiling import UNITS, Tiles

_SWIZZLE = 128  # bytes: a row of 64 units of two bytes
_WARPGROUPS, _BLOCKS, _TILES = "warpgroup", "block", "tile"


class HopperOps:
    """The operations of a kernel for a given division of a layer; `gpu` is the module of Pallas."""

    def __init__(self, tiles: Tiles, interpreted: bool):
        self.tiles, self.interpreted, self.gpu = tiles, interpreted, _mosaic()
        self._jax_0_10 = not hasattr(self.gpu, "InterpretGPUParams")
        self._untransposed = interpreted and self._jax_0_10
        self._stores_remotely = tiles.cluster > 1 and not interpreted
        if tiles.cluster > 1 and self._untransposed:
            raise NotImplementedError(
                f"HopperKernel: interpret=True must find all of w_h in one block with JAX "
                f"{jax.__version__}, whose interpreter has no clusters, got "
                f"H={tiles.hidden_size}, which takes {tiles.cluster} blocks; use JAX 0.11."
            )

    def kernel(self, body: Callable[..., None], results: list[Any], scratch: dict[str, Any]):
        """The kernel that runs the body for each tile and slice."""
        semantics, cluster = self.gpu.LoweringSemantics.Warpgroup, {}
        if self.tiles.cluster > 1:
            cluster = {"cluster": (self.tiles.cluster,), "cluster_names": (_BLOCKS,)}
        return self.gpu.kernel(
            body,
            out_type=results,
            scratch_types=scratch,
            compiler_params=self.gpu.CompilerParams(lowering_semantics=semantics),
            grid=(self.tiles.count,),
            grid_names=(_TILES,),
            num_threads=self.tiles.warpgroups,
            thread_name=_WARPGROUPS,
            interpret=_interpreter_params(self.gpu) if self.interpreted else None,
            **cluster,
        )

    def shared_memory(self, *shape: int) -> Any:
        """Shared memory for blocks of splits, which the last two sizes are."""
        return self.gpu.SMEM(shape, self.tiles.dtype, transforms=self._transforms())

    def operand_buffer(self, groups: int) -> Any:
        """Shared memory for so many operands of every slice, in blocks [N, 64]."""
        tiles = self.tiles
        block = (UNITS, tiles.rows) if self._untransposed else (tiles.rows, UNITS)
        return self.shared_memory(tiles.splits, groups, tiles.slices, *block)

    def device_copy(self, groups: int) -> jax.ShapeDtypeStruct | None:
        """The array in device memory through which the operands of a cluster pass, if any."""
        tiles = self.tiles
        if tiles.cluster == 1 or self._stores_remotely:
            return None
        shape = (tiles.count, tiles.splits, groups, tiles.slices, tiles.rows, UNITS)
        return jax.ShapeDtypeStruct(shape, tiles.dtype)

    def barrier(self) -> Any:
        """The barrier of all slices of the layer; a cluster has one in hardware, so None."""
        if self._stores_remotely:
            return None
        if self.tiles.cluster > 1:
            return self.gpu.ClusterBarrier(collective_axes=(_BLOCKS,))
        return self.gpu.Barrier(num_arrivals=self.tiles.warpgroups)

    def arrive(self, barrier: Any) -> None:
        """Arrives at the barrier of all slices, after this thread's stores.

        In PTX the arrivals and waits of `ClusterBarrier` have the scope of one block, which orders
        no stores between blocks. The scope of these is the cluster.
        """
        if self._stores_remotely:
            self._instruct("barrier.cluster.arrive.release.aligned;")
        else:
            self.gpu.barrier_arrive(barrier)

    def wait(self, barrier: Any) -> None:
        """Waits until every slice has arrived at the barrier, and sees what each stored before."""
        if self._stores_remotely:
            self._instruct("barrier.cluster.wait.acquire.aligned;")
        else:
            self.gpu.barrier_wait(barrier)

    def indices(self) -> tuple[Any, Any, Any]:
        """The tile and slice that this warpgroup computes, and the slice's index in its block."""
        warpgroup = lax.axis_index(_WARPGROUPS)
        s = warpgroup if self.tiles.cluster == 1 else lax.axis_index(_BLOCKS)
        return lax.axis_index(_TILES), s, warpgroup

    def load(self, ref: Any) -> Any:
        """Loads a block [64, N], or a row [N], of device memory in the register layout of sums."""
        if self._untransposed:
            v = ref[...]
        else:
            layout = self.gpu.Layout.WGMMA
            layout = layout.reduce(0) if len(ref.shape) == 1 else layout
            index = [()] if self._jax_0_10 else []  # later versions take it in the reference only
            v = self.gpu.load(ref, *index, layout=layout, optimized=False)
        # Inside `jax.shard_map` a loaded value varies over the mesh, but Pallas does not track this
        # through operations, and a loop carry must not change its type.
        return v * 1 if varying_axes(v) else v

    def write(self, v: Any, ref: Any) -> None:
        """Writes a block [64, N] to device memory, in the dtype of that array.

        Since JAX 0.12 a write narrower than a memory sector needs `optimized=False`.
        """
        v = v.astype(ref.dtype)
        if hasattr(self.gpu, "store"):
            self.gpu.store(ref, v, optimized=False)
        else:
            ref[...] = v

    def round_to_split(self, v: Any) -> Any:
        """v rounded to the dtype of a split; the barrier stops XLA from removing the rounding."""
        return lax.optimization_barrier(v.astype(self.tiles.dtype)).astype(v.dtype)

    def store(self, split: Any, operands: Any, p: int, g: int) -> None:
        """Stores this slice's split p [64, N] of group g: in every block of a cluster.

        In the layout of operands, two units of one row are one word of a thread.
        """
        slot = operands.at[p, g, self.indices()[1]]
        if self._untransposed:
            slot[...] = split
            return
        layout = self.gpu.Layout.WGMMA_TRANSPOSED
        split = self.gpu.layout_cast(split, layout)
        if self._stores_remotely:
            types = (layout, self.gpu.RefType(self._transforms()))
            store = functools.partial(_store_in_cluster, self.tiles.cluster, p, g)
            self.gpu.inline_mgpu(arg_types=types)(store)(split, operands)
        else:
            self._columns(slot)[...] = split

    def report_reads(self, operands: Any) -> None:
        """In the interpreter, reads the operands: its race detection ignores tensor core reads."""
        if self.interpreted:
            for at in np.ndindex(operands.shape[:-2]):
                operands.at[at][...]

    def accumulate(self, body: Callable[..., Any], count: int) -> Any:
        """body(*sums) with `count` sums [64, N] that start at zero, in float32 registers."""
        from jax.experimental import pallas

        sums = [self.gpu.ACC((UNITS, self.tiles.rows), jnp.float32)] * count
        return pallas.run_scoped(body, *sums)

    def multiply(self, total: Any, w: Any, operand: Any) -> None:
        """Adds the product of weights [64, 64] and an operand [64, N] to a sum."""
        self.gpu.wgmma(total, w, self._columns(operand))

    def _columns(self, ref):
        """The operand as [64, N]: shared memory holds it as [N, 64]."""
        return ref if self._untransposed else ref.transpose((1, 0))

    def _instruct(self, ptx):
        """Emits an instruction that Pallas lacks; no access to memory moves past it."""
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        def emit(_):
            nothing = ir.Type.parse("!llvm.void")
            llvm.inline_asm(nothing, [], ptx, "~{memory}", has_side_effects=True)

        self.gpu.inline_mgpu()(emit)()

    def _transforms(self):
        if self._untransposed:
            return ()
        return (self.gpu.TilingTransform((8, UNITS)), self.gpu.SwizzleTransform(_SWIZZLE))


def _store_in_cluster(cluster, p, g, _, split, operands):
    """Stores a split [64, N] in its slot [N, 64] in every block of the cluster.

    One mapped address for each block, not for each slot, takes fewer registers.
    """
    from jax.experimental.mosaic import gpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects.gpu import Dimension, cluster_block_id

    for block in range(cluster):
        index = gpu.c(block, ir.IndexType.get())
        remote = gpu.get_cluster_ref(operands, Dimension.x, index, generic=False)
        slot = gpu.memref_slice(remote, (p, g, cluster_block_id(Dimension.x)))
        columns = gpu.memref_transpose(slot, (1, 0, 3, 2))  # the order of tiles, and each tile
        split.store_tiled(columns, swizzle=_SWIZZLE, optimized=False)


def _mosaic() -> Any:
    """JAX's module of GPU kernels; ImportError, with the cure, where it is missing or too old."""
    try:
        from jax.experimental.pallas import mosaic_gpu

        for name in ("kernel", "load", "inline_mgpu", "RefType", "ClusterBarrier"):
            getattr(mosaic_gpu, name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"HopperKernel: it needs jax.experimental.pallas.mosaic_gpu of JAX 0.10.2 or 0.11, "
            f"got JAX {jax.__version__} ({error}); leave BPTT's kernel out, or use another JAX."
        ) from error
    return mosaic_gpu


def _interpreter_params(gpu: Any) -> Any:
    """The interpreter's options, with race detection on; they are private in JAX 0.10."""
    if hasattr(gpu, "InterpretGPUParams"):
        return gpu.InterpretGPUParams(detect_races=True)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)
