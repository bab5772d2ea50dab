"""The shared-memory buffers through which the slices of a layer exchange operands at each step.

Every slice multiplies its weights by the operands of all slices. A buffer holds one block [N, 64]
for each split, group of operands and slice. The blocks of a cluster have a copy each, into which
all of them store. JAX's interpreter has no such stores; there, operands pass through device memory.

All buffers of a kernel share one barrier. `write` ends with an arrival and `multiply` begins with
the wait for it, so every slice reads what all have written. Before a slice writes to a buffer
again, all must have read it. Where a kernel uses two buffers in turn, the barrier of the other one
proves that; a buffer that is the only one has another arrival and wait for it.
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
    """A buffer with so many operands a slice as its groups."""

    ops: HopperOps
    weights: Any
    barrier: Any  # of `HopperOps.barrier`
    only: bool  # whether the kernel has no other buffer
    operands: Any
    device_copy: Any = None
    copied: Any = None  # the mbarrier of copies from it

    @classmethod
    def scratch(cls, ops: HopperOps, groups: int) -> dict[str, Any]:
        """The shared memory of a buffer with that many operands a slice."""
        return {"operands": ops.operand_buffer(groups)}

    @classmethod
    def device_memory(cls, ops: HopperOps, groups: int) -> jax.ShapeDtypeStruct | None:
        """The array in device memory through which operands pass, if any."""

    def open(self) -> None:
        """Tells that this slice has nothing left to read."""
        if self.only:
            self.ops.arrive(self.barrier)

    def close(self) -> None:
        """Waits until no slice has anything left to read."""
        if self.only:
            self.ops.wait(self.barrier)

    def write(self, values: Sequence[Any]) -> None:
        """Writes this slice's operands [64, N], one for each group."""
        _, s, _ = self.ops.indices()
        self.close()
        for g, v in enumerate(values):
            for p, split in enumerate(split_operand(v, self.ops.tiles, self.ops.round_to_split)):
                self.ops.store(split, self.operands.at[p, g, s])
        self.ops.gpu.commit_smem()  # makes the operands visible to tensor cores and copies
        self._publish()
        self.ops.arrive(self.barrier)

    def multiply(
        self, gates: Sequence[Sequence[int]], fetch: Callable[[], Any] | None = None
    ) -> tuple[list[Any], Any]:
        """Sums of weights times operands, [64, N], one for each list of gates; and fetch().

        gates[i][g] is the gate whose weights multiply group g in sum i. What fetch() loads arrives
        while the tensor cores work.
        """
        ops, tiles = self.ops, self.ops.tiles
        *_, warpgroup = ops.indices()
        ops.wait(self.barrier)
        self._receive()
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

        results = ops.accumulate(accumulate, len(gates))
        self.open()
        return results

    def _publish(self):
        """Passes on what this slice wrote, beyond its shared memory."""

    def _receive(self):
        """Makes what other blocks stored here visible to the tensor cores."""
        if self.ops.tiles.cluster > 1:
            self.ops.gpu.commit_smem()


class InterpretedClusterBuffer(OperandBuffer):
    """The buffer of a cluster in JAX's interpreter: operands pass through device memory."""

    @classmethod
    def scratch(cls, ops: HopperOps, groups: int) -> dict[str, Any]:
        copies = ops.tiles.splits * groups * ops.tiles.slices
        return {**super().scratch(ops, groups), "copied": ops.gpu.Barrier(num_arrivals=copies)}

    @classmethod
    def device_memory(cls, ops: HopperOps, groups: int) -> jax.ShapeDtypeStruct:
        tiles = ops.tiles
        shape = (tiles.count, tiles.splits, groups, tiles.slices, tiles.rows, UNITS)
        return jax.ShapeDtypeStruct(shape, tiles.dtype)

    def _publish(self):
        (tile, s, _), gpu = self.ops.indices(), self.ops.gpu
        for at in np.ndindex(self.operands.shape[:2]):
            gpu.copy_smem_to_gmem(self.operands.at[(*at, s)], self.device_copy.at[(tile, *at, s)])
        gpu.wait_smem_to_gmem(0)

    def _receive(self):
        (tile, *_), gpu = self.ops.indices(), self.ops.gpu
        for at in np.ndindex(self.operands.shape[:3]):
            gpu.copy_gmem_to_smem(
                self.device_copy.at[(tile, *at)], self.operands.at[at], self.copied
            )
        gpu.barrier_wait(self.copied)


def buffer_class(ops: HopperOps) -> type[OperandBuffer]:
    """The buffer that kernels with these operations need."""
    in_cluster = ops.tiles.cluster > 1
    return InterpretedClusterBuffer if ops.interpreted and in_cluster else OperandBuffer
