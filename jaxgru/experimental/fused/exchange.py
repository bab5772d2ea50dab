"""The shared-memory buffers through which the slices of a layer exchange operands at each step.

Every slice multiplies its weights by the operands of all slices. A buffer holds one block [64, N]
for each split, group of operands and slice. `write` first waits until every slice has read the
previous operands; `multiply` first waits until every slice has written. The class depends on where
the slices are: in one block, or in a cluster whose blocks store into each other's shared memory.
JAX's interpreter does not support those stores; there, operands pass through the device's memory.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxgru.experimental.fused.hopper import HopperOps
from jaxgru.experimental.fused.tiling import UNITS, split_operand


class OperandBuffer:
    """The buffer of slices that share one block."""

    def __init__(self, ops: HopperOps, weights: Any, *, operands: Any, ready: Any, free: Any):
        self.ops, self.weights = ops, weights
        self.operands, self.ready, self.free = operands, ready, free

    @staticmethod
    def barrier(ops: HopperOps) -> Any:
        """An mbarrier at which every writer and reader arrives."""
        return ops.barrier(ops.tiles.warpgroups)

    @classmethod
    def scratch(cls, ops: HopperOps, groups: int) -> dict[str, Any]:
        """The shared memory and mbarriers of a buffer with that many operands a slice."""
        shape = (ops.tiles.splits, groups, ops.tiles.slices)
        return {
            "operands": ops.operand_buffer(shape),
            "ready": cls.barrier(ops),
            "free": cls.barrier(ops),
        }

    @classmethod
    def global_memory(cls, ops: HopperOps, groups: int) -> jax.ShapeDtypeStruct | None:
        """The device memory that the buffer needs, if any."""
        del ops, groups

    def open(self) -> None:
        """Marks the buffer as free: it holds nothing to be read yet."""
        self.ops.arrive(self.free)

    def close(self) -> None:
        """Waits until no slice reads from this block's memory, or writes to it, any more."""
        self.ops.wait(self.free)

    def write(self, values: Sequence[Any]) -> None:
        """Writes this slice's operands [64, N], one for each group."""
        _, s, _ = self.ops.indices()
        self.ops.wait(self.free)
        for g, v in enumerate(values):
            for p, split in enumerate(split_operand(v, self.ops.tiles, self.ops.round_to_split)):
                self._store(self.ops.operand_layout(split), self.operands.at[p, g, s])
        self._signal_ready()

    def multiply(
        self, gates: Sequence[Sequence[int]], fetch: Callable[[], Any] | None = None
    ) -> tuple[list[Any], Any]:
        """Sums of weights times operands, [64, N], one for each list of gates; and fetch().

        gates[i][g] is the gate whose weights multiply group g in sum i. What fetch() loads arrives
        while the tensor cores work.
        """
        ops, tiles = self.ops, self.ops.tiles
        *_, own = ops.indices()
        self._wait_ready()
        ops.report_reads(self.operands)

        def accumulate(*sums):
            fetched = fetch() if fetch is not None else ()
            for p_w, p_v in tiles.passes:
                for k in range(tiles.slices):
                    for total, of_groups in zip(sums, gates):
                        for g, gate in enumerate(of_groups):
                            w = self.weights.at[own, p_w, gate, k]
                            ops.multiply(total, w, self.operands.at[p_v, g, k])
            return [total[...] for total in sums], fetched

        found, fetched = ops.accumulate(accumulate, len(gates))
        self._signal_free()
        return found, fetched

    def _store(self, split, slot):
        """Stores a split where its readers expect it."""
        self.ops.store(split, slot)

    def _signal_ready(self):
        """Signals that this slice has written its operands."""
        self.ops.commit()
        self.ops.arrive(self.ready)

    def _wait_ready(self):
        """Waits until all slices have written their operands."""
        self.ops.wait(self.ready)

    def _signal_free(self):
        """Signals that this slice has read the operands of all slices."""
        self.ops.arrive(self.free)


class ClusterBuffer(OperandBuffer):
    """Each block of a cluster has its own copy of the operands, into which all blocks store."""

    @staticmethod
    def barrier(ops: HopperOps) -> Any:
        return ops.cluster_barrier()

    def _store(self, split, slot):
        self.ops.store_in_cluster(split, slot)

    def _signal_ready(self):
        self.ops.fence_cluster()
        super()._signal_ready()

    def _wait_ready(self):
        super()._wait_ready()
        self.ops.commit()  # makes what other blocks stored visible to the tensor cores

    def _signal_free(self):
        # One thread of the four warps signals each block, so all four must have finished.
        self.ops.commit()
        super()._signal_free()


class InterpretedClusterBuffer(ClusterBuffer):
    """The same for JAX's interpreter: operands pass through the device's memory."""

    def __init__(self, ops: HopperOps, weights: Any, *, gmem: Any, copied: Any, **scratch: Any):
        super().__init__(ops, weights, **scratch)
        self.gmem, self.copied = gmem, copied

    @classmethod
    def scratch(cls, ops: HopperOps, groups: int) -> dict[str, Any]:
        count = ops.tiles.splits * groups * ops.tiles.slices
        return {**super().scratch(ops, groups), "copied": ops.barrier(count)}

    @classmethod
    def global_memory(cls, ops: HopperOps, groups: int) -> jax.ShapeDtypeStruct:
        tiles = ops.tiles
        shape = (tiles.count, tiles.splits, groups, tiles.slices, tiles.rows, UNITS)
        return jax.ShapeDtypeStruct(shape, tiles.dtype)

    def _store(self, split, slot):
        self.ops.store(split, slot)

    def _signal_ready(self):
        tile, s, _ = self.ops.indices()
        self.ops.commit()
        for at in itertools.product(*map(range, self.operands.shape[:2])):
            self.ops.copy_out(self.operands.at[(*at, s)], self.gmem.at[(tile, *at, s)])
        self.ops.wait_copied_out()
        self.ops.arrive(self.ready)

    def _wait_ready(self):
        tile, *_ = self.ops.indices()
        self.ops.wait(self.ready)
        for at in itertools.product(*map(range, self.operands.shape[:3])):
            self.ops.copy_in(self.gmem.at[(tile, *at)], self.operands.at[at], self.copied)
        self.ops.wait(self.copied)


def buffer_class(ops: HopperOps) -> type[OperandBuffer]:
    """The buffer that kernels with these operations need."""
    if ops.tiles.cluster == 1:
        return OperandBuffer
    return InterpretedClusterBuffer if ops.interpreted else ClusterBuffer
