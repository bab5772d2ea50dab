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

import numpy as np

from jaxgru.experimental.fused.operations import HopperOps
from jaxgru.experimental.fused.tiling import split_operand


@dataclasses.dataclass
class OperandBuffer:
    """A buffer, seen from one slice."""

    ops: HopperOps
    weights: Any
    barrier: Any  # of `HopperOps.barrier`
    only: bool  # whether the kernel has no other buffer
    operands: Any  # in shared memory
    device_copy: Any  # through which they pass, or None

    def signal_read(self) -> None:
        """Tells all slices that this one has nothing left to read."""
        if self.only:
            self.ops.arrive(self.barrier)

    def wait_read(self) -> None:
        """Waits until no slice has anything left to read."""
        if self.only:
            self.ops.wait(self.barrier)

    def write(self, values: Sequence[Any]) -> None:
        """Writes this slice's operands [64, N], one for each group."""
        tile, *_ = self.ops.indices()
        shared = self.operands if self.device_copy is None else self.device_copy.at[tile]
        self.wait_read()
        for g, v in enumerate(values):
            for p, split in enumerate(split_operand(v, self.ops.tiles, self.ops.round_to_split)):
                self.ops.store(split, shared, p, g)
        self.ops.gpu.commit_smem()  # makes the operands visible to the tensor cores
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
        self.signal_read()
        return results

    def _receive(self):
        """Makes what other blocks stored visible to the tensor cores."""
        if self.device_copy is not None:
            tile, *_ = self.ops.indices()
            for at in np.ndindex(self.operands.shape[:3]):
                self.operands.at[at][...] = self.device_copy.at[(tile, *at)][...]
        if self.ops.tiles.cluster > 1:
            self.ops.gpu.commit_smem()
