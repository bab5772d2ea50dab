"""The shared-memory buffers through which the slices of a layer exchange operands at each step.

Every slice multiplies its weights by the operands of all slices. A buffer holds one block [N, 64]
for each split, group of operands and slice. `write` first waits until every slice has read the
previous operands; `multiply` first waits until every slice has written. The class depends on where
the slices are: in one block, or in a cluster whose blocks store into each other's shared memory.
JAX's interpreter does not support those stores; there, operands pass through device memory.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxgru.experimental.fused.hopper import HopperOps
from jaxgru.experimental.fused.tiling import UNITS, split_operand


@dataclasses.dataclass
class OperandBuffer:
    """The buffer of slices that share one block."""

    ops: HopperOps
    weights: Any
    operands: Any
    ready: Any  # the mbarrier at which a slice arrives when it has written its operands
    free: Any  # the mbarrier at which a slice arrives when it has read all operands
    device_copy: Any = None
    copied: Any = None  # the mbarrier of copies from it

    @classmethod
    def scratch(cls, ops: HopperOps, groups: int) -> dict[str, Any]:
        """The shared memory and mbarriers of a buffer with that many operands a slice."""
        barriers = {"ready": ops.barrier(), "free": ops.barrier()}
        return {"operands": ops.operand_buffer(groups), **barriers}

    @classmethod
    def device_memory(cls, ops: HopperOps, groups: int) -> jax.ShapeDtypeStruct | None:
        """The array in device memory through which operands pass, if any."""

    def open(self) -> None:
        """Marks the buffer as free: it holds nothing to be read yet."""
        self.ops.gpu.barrier_arrive(self.free)

    def close(self) -> None:
        """Waits until no slice reads from this block's memory, or writes to it, any more."""
        self.ops.gpu.barrier_wait(self.free)

    def write(self, values: Sequence[Any]) -> None:
        """Writes this slice's operands [64, N], one for each group."""
        _, s, _ = self.ops.indices()
        self.ops.gpu.barrier_wait(self.free)
        for g, v in enumerate(values):
            for p, split in enumerate(split_operand(v, self.ops.tiles, self.ops.round_to_split)):
                self.ops.store(split, self.operands.at[p, g, s])
        self._signal_ready()

    def multiply(
        self, gates: Sequence[Sequence[int]], fetch: Callable[[], Any] | None = None
    ) -> tuple[list[Any], Any]:
        """Sums of weights times operands, [64, N], one for each list of gates; and fetch().

        gates[i][g] is the gate whose weights multiply group g in sum i. What fetch() loads arrives
        while the tensor cores work.
        """
        ops, tiles = self.ops, self.ops.tiles
        *_, warpgroup = ops.indices()
        self._wait_ready()
        ops.report_reads(self.operands)

        def accumulate(*sums):
            fetched = fetch() if fetch is not None else ()
            for p_w, p_v in tiles.passes:
                for k in range(tiles.slices):
                    for total, of_groups in zip(sums, gates):
                        for g, gate in enumerate(of_groups):
                            w = self.weights.at[warpgroup, p_w, gate, k]
                            ops.multiply(total, w, self.operands.at[p_v, g, k])
            return [total[...] for total in sums], fetched

        found, fetched = ops.accumulate(accumulate, len(gates))
        self._signal_free()
        return found, fetched

    def _signal_ready(self):
        self.ops.gpu.commit_smem()  # makes the operands visible to tensor cores and copies
        self.ops.gpu.barrier_arrive(self.ready)

    def _wait_ready(self):
        self.ops.gpu.barrier_wait(self.ready)

    def _signal_free(self):
        self.ops.gpu.barrier_arrive(self.free)


class ClusterBuffer(OperandBuffer):
    """Each block of a cluster has its own copy of the operands, into which all blocks store."""

    def _signal_ready(self):
        self.ops.fence_cluster()
        super()._signal_ready()

    def _wait_ready(self):
        super()._wait_ready()
        self.ops.gpu.commit_smem()  # makes what other blocks stored visible to the tensor cores

    def _signal_free(self):
        # One thread of the four warps signals each block, so all four must have finished.
        self.ops.gpu.commit_smem()
        super()._signal_free()


class InterpretedClusterBuffer(ClusterBuffer):
    """The same for JAX's interpreter: operands pass through device memory."""

    @classmethod
    def scratch(cls, ops: HopperOps, groups: int) -> dict[str, Any]:
        copies = ops.tiles.splits * groups * ops.tiles.slices
        return {**super().scratch(ops, groups), "copied": ops.gpu.Barrier(num_arrivals=copies)}

    @classmethod
    def device_memory(cls, ops: HopperOps, groups: int) -> jax.ShapeDtypeStruct:
        tiles = ops.tiles
        shape = (tiles.count, tiles.splits, groups, tiles.slices, tiles.rows, UNITS)
        return jax.ShapeDtypeStruct(shape, tiles.dtype)

    def _signal_ready(self):
        (tile, s, _), gpu = self.ops.indices(), self.ops.gpu
        gpu.commit_smem()
        for at in np.ndindex(self.operands.shape[:2]):
            gpu.copy_smem_to_gmem(self.operands.at[(*at, s)], self.device_copy.at[(tile, *at, s)])
        gpu.wait_smem_to_gmem(0)
        gpu.barrier_arrive(self.ready)

    def _wait_ready(self):
        (tile, *_), gpu = self.ops.indices(), self.ops.gpu
        gpu.barrier_wait(self.ready)
        for at in np.ndindex(self.operands.shape[:3]):
            gpu.copy_gmem_to_smem(
                self.device_copy.at[(tile, *at)], self.operands.at[at], self.copied
            )
        gpu.barrier_wait(self.copied)


def buffer_class(ops: HopperOps) -> type[OperandBuffer]:
    """The buffer that kernels with these operations need."""
    if ops.tiles.cluster == 1:
        return OperandBuffer
    return InterpretedClusterBuffer if ops.interpreted else ClusterBuffer
