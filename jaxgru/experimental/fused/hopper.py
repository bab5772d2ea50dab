"""What a fused kernel asks of a Hopper GPU, by Pallas and Mosaic or by their interpreter on a CPU.

The interpreter of JAX 0.10 knows neither clusters nor blocks that are read transposed: blocks lie
the other way round there.
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


class Chip:
    """The operations of a kernel with a given cut; most are for use inside it."""

    def __init__(self, tiles: Tiles, interpreted: bool):
        self.tiles, self.interpreted, self._gpu = tiles, interpreted, _mosaic()
        self._old = not hasattr(self._gpu, "InterpretGPUParams")  # JAX 0.10
        self._upright = interpreted and self._old  # nothing is read transposed
        if tiles.cluster > 1 and self._upright:
            raise NotImplementedError(
                f"gru: backend='interpreted' must find all of w_h in one block with JAX "
                f"{jax.__version__}, whose interpreter knows no clusters, got "
                f"H={tiles.hidden_size}, which takes {tiles.cluster} blocks; use JAX 0.11."
            )

    def kernel(self, body: Callable[..., None], results: list[Any], scratch: dict[str, Any]):
        """The kernel that runs the body for every tile and slice."""
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

    def weights(self) -> Any:
        """Shared memory for the weights of a block's slices, in blocks [64, 64]."""
        shape = (self.tiles.warpgroups, self.tiles.terms, 3, self.tiles.slices, UNITS, UNITS)
        return self._gpu.SMEM(shape, self.tiles.dtype, transforms=self._transforms())

    def operands(self, shape: tuple[int, ...]) -> Any:
        """Shared memory for so many operands [64, N]."""
        block = (UNITS, self.tiles.rows) if self._upright else (self.tiles.rows, UNITS)
        shape = (*shape, *block)
        return self._gpu.SMEM(shape, self.tiles.dtype, transforms=self._transforms())

    def barrier(self, num_arrivals: int) -> Any:
        """A barrier of one block."""
        return self._gpu.Barrier(num_arrivals=num_arrivals)

    def barriers(self, num_arrivals: int, count: int) -> Any:
        """Several of them."""
        return self._gpu.Barrier(num_arrivals=num_arrivals, num_barriers=count)

    def cluster_barrier(self) -> Any:
        """A barrier at which each block of a cluster arrives once."""
        return self._gpu.ClusterBarrier(collective_axes=(_MEMBERS,))

    def place(self) -> tuple[Any, Any, Any]:
        """The tile and the slice that are computed, and the slice's number in its block."""
        own = lax.axis_index(_WARPGROUPS)
        member = own if self.tiles.cluster == 1 else lax.axis_index(_MEMBERS)
        return lax.axis_index(_TILES), member, own

    def load(self, ref: Any) -> Any:
        """A block [64, N] of the device's memory, laid out over the threads as sums are."""
        return self._load(ref, self._gpu.Layout.WGMMA)

    def load_row(self, ref: Any) -> Any:
        """A row [N] of the device's memory, laid out as the columns of a block."""
        return self._load(ref, self._gpu.Layout.WGMMA.reduce(0))

    def save(self, v: Any, ref: Any) -> None:
        """Writes a block [64, N] to the device's memory, in the dtype that is there.

        From JAX 0.12 on a write that is less than a sector wide has to be asked for.
        """
        v = v.astype(ref.dtype)
        if hasattr(self._gpu, "store"):
            self._gpu.store(ref, v, optimized=False)
        else:
            ref[...] = v

    def spread(self, row: Any) -> Any:
        """The row [N] as a block [64, N]."""
        return lax.broadcast_in_dim(row, (UNITS, self.tiles.rows), (1,))

    def fetch(self, source: Any, target: Any, barrier: Any) -> None:
        """Starts to copy the device's memory to shared memory: an arrival at the barrier."""
        self._gpu.copy_gmem_to_smem(source, target, barrier)

    def wait(self, barrier: Any) -> None:
        """Waits for the barrier's next completion."""
        self._gpu.barrier_wait(barrier)

    def arrive(self, barrier: Any) -> None:
        """One of the arrivals that complete a barrier."""
        self._gpu.barrier_arrive(barrier)

    def round_off(self, v: Any) -> Any:
        """v rounded to the dtype of a term; the barrier keeps XLA from leaving the rounding out."""
        return lax.optimization_barrier(v.astype(self.tiles.dtype)).astype(v.dtype)

    def by_rows(self, term: Any) -> Any:
        """The block with two units of one row in each thread, one word, as operands lie."""
        if self._upright:
            return term
        return self._gpu.layout_cast(term, self._gpu.Layout.WGMMA_TRANSPOSED)

    def store(self, term: Any, slot: Any) -> None:
        """Writes an operand to this block's shared memory."""
        self._columns(slot)[...] = term

    def store_in_cluster(self, term: Any, slot: Any) -> None:
        """Writes an operand to the same place of every block of the cluster."""
        types = (self._gpu.Layout.WGMMA_TRANSPOSED, self._gpu.RefType(self._transforms()))
        store = functools.partial(_store_in_cluster, self.tiles.cluster)
        self._gpu.inline_mgpu(arg_types=types)(store)(term, slot)

    def fence_cluster(self) -> None:
        """What this thread stored is there for the cluster before anything it does next."""
        self._gpu.inline_mgpu()(_fence_cluster)()

    def commit(self) -> None:
        """The warpgroup's stores, and those it knows of, are there for tensor cores and copies."""
        self._gpu.commit_smem()

    def send_out(self, source: Any, target: Any) -> None:
        """Starts to copy shared memory to the device's memory."""
        self._gpu.copy_smem_to_gmem(source, target)

    def await_sent(self) -> None:
        """Waits until all that was sent out is there."""
        self._gpu.wait_smem_to_gmem(0)

    def show_reads(self, buffer: Any) -> None:
        """The interpreter's search for races leaves out what tensor cores read: reads it, there."""
        if self.interpreted:
            for at in itertools.product(*map(range, buffer.shape[:-2])):
                buffer.at[at][...]

    def accumulate(self, body: Callable[..., Any], count: int) -> Any:
        """body(*sums) with so many sums [64, N] of zeros, in float32 registers."""
        from jax.experimental import pallas

        sums = [self._gpu.ACC((UNITS, self.tiles.rows), jnp.float32)] * count
        return pallas.run_scoped(body, *sums)

    def multiply(self, total: Any, w: Any, operand: Any) -> None:
        """Adds the product of a block of weights [64, 64] and of an operand [64, N] to a sum."""
        self._gpu.wgmma(total, w, self._columns(operand))

    def _load(self, ref, layout):
        if self._upright:
            v = ref[...]
        else:
            index = ((),) if self._old else ()  # JAX 0.11 wants it in the reference alone
            v = self._gpu.load(ref, *index, layout=layout, optimized=False)
        # Inside `jax.shard_map` what is read varies over the mesh, but not what is computed from
        # it: Pallas does not track that. A carry must not change its type.
        return v * 1 if varying_axes(v) else v

    def _columns(self, ref):
        """The operand with units in front: in shared memory it has the batch in front."""
        return ref if self._upright else ref.transpose((1, 0))

    def _transforms(self):
        if self._upright:
            return ()
        return (self._gpu.TilingTransform((8, UNITS)), self._gpu.SwizzleTransform(_SWIZZLE))


def _store_in_cluster(cluster, _, term, board):
    """Stores a term [64, N] on the board [N, 64] of every block of the cluster."""
    from jax.experimental.mosaic import gpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects.gpu import Dimension

    for member in range(cluster):
        index = gpu.c(member, ir.IndexType.get())
        remote = gpu.get_cluster_ref(board, Dimension.x, index)
        columns = gpu.memref_transpose(remote, (1, 0, 3, 2))  # of tiles, and in them
        term.store_tiled(columns, swizzle=_SWIZZLE, optimized=False)


def _fence_cluster(_):
    """The fence, which Pallas has not."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    nothing = ir.Type.parse("!llvm.void")
    llvm.inline_asm(nothing, [], "fence.acq_rel.cluster;", "", has_side_effects=True)


def _mosaic() -> Any:
    """JAX's module of GPU kernels; ImportError that says what to do where it is missing or old."""
    try:
        from jax.experimental.pallas import mosaic_gpu

        for name in ("kernel", "load", "inline_mgpu", "RefType", "ClusterBarrier"):
            getattr(mosaic_gpu, name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"gru: backend='fused' needs jax.experimental.pallas.mosaic_gpu of JAX 0.10.2 or 0.11, "
            f"got JAX {jax.__version__} ({error}); use backend='scan', or another JAX."
        ) from error
    return mosaic_gpu


def _interpreter_params(gpu: Any) -> Any:
    """The interpreter's options: it looks for races. JAX 0.10 has not made them public."""
    if hasattr(gpu, "InterpretGPUParams"):
        return gpu.InterpretGPUParams(detect_races=True)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)
