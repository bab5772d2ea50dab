"""The Hopper GPU operations of a fused kernel, through Pallas and Mosaic or JAX's interpreter.

The interpreter of JAX 0.10 supports neither clusters nor transposed reads of shared memory: there,
operands are stored untransposed.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.sharding import varying_axes
from jaxgru.experimental.fused.tiling import UNITS, Tiles

_SWIZZLE = 128  # bytes: a row of 64 units of two bytes
_WARPGROUPS, _MEMBERS, _TILES = "warpgroup", "member", "tile"


class HopperOps:
    """The operations of a kernel for a given division of a layer; most are called inside it."""

    def __init__(self, tiles: Tiles, interpreted: bool):
        self.tiles, self.interpreted, self._gpu = tiles, interpreted, _mosaic()
        self._jax_0_10 = not hasattr(self._gpu, "InterpretGPUParams")
        self._untransposed = interpreted and self._jax_0_10
        if tiles.cluster > 1 and self._untransposed:
            raise NotImplementedError(
                f"HopperKernel: interpret=True must find all of w_h in one block with JAX "
                f"{jax.__version__}, whose interpreter has no clusters, got "
                f"H={tiles.hidden_size}, which takes {tiles.cluster} blocks; use JAX 0.11."
            )

    def kernel(self, body: Callable[..., None], results: list[Any], scratch: dict[str, Any]):
        """The kernel that runs the body for each tile and slice."""
        cluster: dict[str, Any] = {}
        if self.tiles.cluster > 1:
            cluster = {"cluster": (self.tiles.cluster,), "cluster_names": (_MEMBERS,)}
        return self._gpu.kernel(
            body,
            out_type=results,
            scratch_types=scratch,
            compiler_params=self._gpu.CompilerParams(
                lowering_semantics=self._gpu.LoweringSemantics.Warpgroup
            ),
            grid=(self.tiles.count,),
            grid_names=(_TILES,),
            num_threads=self.tiles.warpgroups,
            thread_name=_WARPGROUPS,
            interpret=_interpreter_params(self._gpu) if self.interpreted else None,
            **cluster,
        )

    def weight_buffer(self) -> Any:
        """Shared memory for the weights of a block's slices, in blocks [64, 64]."""
        shape = (self.tiles.warpgroups, self.tiles.splits, 3, self.tiles.slices, UNITS, UNITS)
        return self._gpu.SMEM(shape, self.tiles.dtype, transforms=self._transforms())

    def operand_buffer(self, shape: tuple[int, ...]) -> Any:
        """Shared memory for an array, of this shape, of operands [64, N]."""
        block = (UNITS, self.tiles.rows) if self._untransposed else (self.tiles.rows, UNITS)
        shape = (*shape, *block)
        return self._gpu.SMEM(shape, self.tiles.dtype, transforms=self._transforms())

    def barrier(self, num_arrivals: int) -> Any:
        """An mbarrier of one block."""
        return self._gpu.Barrier(num_arrivals=num_arrivals)

    def barriers(self, num_arrivals: int, count: int) -> Any:
        """An array of mbarriers of one block."""
        return self._gpu.Barrier(num_arrivals=num_arrivals, num_barriers=count)

    def cluster_barrier(self) -> Any:
        """An mbarrier at which each block of a cluster arrives once."""
        return self._gpu.ClusterBarrier(collective_axes=(_MEMBERS,))

    def indices(self) -> tuple[Any, Any, Any]:
        """The tile and slice that this warpgroup computes, and the slice's index in its block."""
        own = lax.axis_index(_WARPGROUPS)
        member = own if self.tiles.cluster == 1 else lax.axis_index(_MEMBERS)
        return lax.axis_index(_TILES), member, own

    def load(self, ref: Any) -> Any:
        """Loads a block [64, N] of the device's memory, in the register layout of the sums."""
        return self._load(ref, self._gpu.Layout.WGMMA)

    def load_row(self, ref: Any) -> Any:
        """Loads a row [N] of the device's memory, in the layout of a block's columns."""
        return self._load(ref, self._gpu.Layout.WGMMA.reduce(0))

    def write(self, v: Any, ref: Any) -> None:
        """Writes a block [64, N] to the device's memory, in the dtype of that array.

        Since JAX 0.12 a write narrower than a memory sector needs `optimized=False`.
        """
        v = v.astype(ref.dtype)
        if hasattr(self._gpu, "store"):
            self._gpu.store(ref, v, optimized=False)
        else:
            ref[...] = v

    def broadcast_row(self, row: Any) -> Any:
        """The row [N] as a block [64, N]."""
        return lax.broadcast_in_dim(row, (UNITS, self.tiles.rows), (1,))

    def copy_in(self, source: Any, target: Any, barrier: Any) -> None:
        """Starts a copy from device to shared memory, whose end is an arrival at the mbarrier."""
        self._gpu.copy_gmem_to_smem(source, target, barrier)

    def wait(self, barrier: Any) -> None:
        """Waits until the mbarrier completes its next phase."""
        self._gpu.barrier_wait(barrier)

    def arrive(self, barrier: Any) -> None:
        """Arrives at the mbarrier once."""
        self._gpu.barrier_arrive(barrier)

    def round_to_split(self, v: Any) -> Any:
        """v rounded to the dtype of a split; the barrier stops XLA from removing the rounding."""
        return lax.optimization_barrier(v.astype(self.tiles.dtype)).astype(v.dtype)

    def operand_layout(self, split: Any) -> Any:
        """The block in the layout of operands: two units of one row are one word of a thread."""
        if self._untransposed:
            return split
        return self._gpu.layout_cast(split, self._gpu.Layout.WGMMA_TRANSPOSED)

    def store(self, split: Any, slot: Any) -> None:
        """Stores an operand in this block's shared memory."""
        self._columns(slot)[...] = split

    def store_in_cluster(self, split: Any, slot: Any) -> None:
        """Stores an operand in the same slot of every block of the cluster."""
        types = (self._gpu.Layout.WGMMA_TRANSPOSED, self._gpu.RefType(self._transforms()))
        store = functools.partial(_store_in_cluster, self.tiles.cluster)
        self._gpu.inline_mgpu(arg_types=types)(store)(split, slot)

    def fence_cluster(self) -> None:
        """Orders this thread's stores before its next operations, for the whole cluster."""
        self._gpu.inline_mgpu()(_fence_cluster)()

    def commit(self) -> None:
        """Makes stores that the warpgroup has done or seen visible to tensor cores and copies."""
        self._gpu.commit_smem()

    def copy_out(self, source: Any, target: Any) -> None:
        """Starts a copy from shared to device memory."""
        self._gpu.copy_smem_to_gmem(source, target)

    def wait_copied_out(self) -> None:
        """Waits until all copies to device memory have ended."""
        self._gpu.wait_smem_to_gmem(0)

    def report_reads(self, operands: Any) -> None:
        """In the interpreter, reads the operands: its race detection ignores tensor core reads."""
        if self.interpreted:
            for at in itertools.product(*map(range, operands.shape[:-2])):
                operands.at[at][...]

    def accumulate(self, body: Callable[..., Any], count: int) -> Any:
        """body(*sums) with `count` sums [64, N] that start at zero, in float32 registers."""
        from jax.experimental import pallas

        sums = [self._gpu.ACC((UNITS, self.tiles.rows), jnp.float32)] * count
        return pallas.run_scoped(body, *sums)

    def multiply(self, total: Any, w: Any, operand: Any) -> None:
        """Adds the product of weights [64, 64] and an operand [64, N] to a sum."""
        self._gpu.wgmma(total, w, self._columns(operand))

    def _load(self, ref, layout):
        if self._untransposed:
            v = ref[...]
        else:
            index = (
                ((),) if self._jax_0_10 else ()
            )  # JAX 0.11 takes the index in the reference only
            v = self._gpu.load(ref, *index, layout=layout, optimized=False)
        # Inside `jax.shard_map` a loaded value varies over the mesh, but Pallas does not track this
        # through operations, and a loop carry must not change its type.
        return v * 1 if varying_axes(v) else v

    def _columns(self, ref):
        """The operand as [64, N]: shared memory holds it as [N, 64]."""
        return ref if self._untransposed else ref.transpose((1, 0))

    def _transforms(self):
        if self._untransposed:
            return ()
        return (self._gpu.TilingTransform((8, UNITS)), self._gpu.SwizzleTransform(_SWIZZLE))


def _store_in_cluster(cluster, _, split, slot):
    """Stores a split [64, N] in the slot [N, 64] of every block of the cluster."""
    from jax.experimental.mosaic import gpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects.gpu import Dimension

    for member in range(cluster):
        index = gpu.c(member, ir.IndexType.get())
        remote = gpu.get_cluster_ref(slot, Dimension.x, index)
        columns = gpu.memref_transpose(remote, (1, 0, 3, 2))  # the order of tiles, and each tile
        split.store_tiled(columns, swizzle=_SWIZZLE, optimized=False)


def _fence_cluster(_):
    """The fence instruction, for which Pallas has no function."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    nothing = ir.Type.parse("!llvm.void")
    llvm.inline_asm(nothing, [], "fence.acq_rel.cluster;", "", has_side_effects=True)


def _mosaic() -> Any:
    """JAX's module of GPU kernels.

    Raises:
      ImportError: it is missing or too old; the message names the cure.
    """
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
