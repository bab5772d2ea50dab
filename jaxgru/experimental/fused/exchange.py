"""Where the slices of a layer lay the operands that all of them multiply, once a step.

A board is shared memory of blocks [64, N], one for each term, group of operands and slice. `put`
waits until everyone has read what was there, `product` until everyone has put. Which board a kernel
has follows from where its slices are: in one block, or in a cluster of blocks that store on each
other's boards. JAX's interpreter knows no such stores; there a cluster's operands go round by the
device's memory.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxgru.experimental.fused.hopper import Chip
from jaxgru.experimental.fused.tiling import UNITS, split_terms


class Board:
    """The board of slices that share one block."""

    def __init__(self, chip: Chip, weights: Any, *, buffer: Any, ready: Any, free: Any):
        self.chip, self.weights = chip, weights
        self.buffer, self.ready, self.free = buffer, ready, free

    @staticmethod
    def barrier(chip: Chip) -> Any:
        """Of everyone who puts and reads."""
        return chip.barrier(chip.tiles.warpgroups)

    @classmethod
    def scratch(cls, chip: Chip, groups: int) -> dict[str, Any]:
        """What a board of so many operands a slice needs of shared memory."""
        shape = (chip.tiles.terms, groups, chip.tiles.slices)
        return {
            "buffer": chip.operands(shape),
            "ready": cls.barrier(chip),
            "free": cls.barrier(chip),
        }

    @classmethod
    def wire(cls, chip: Chip, groups: int) -> jax.ShapeDtypeStruct | None:
        """What it needs of the device's memory."""
        del chip, groups

    def open(self) -> None:
        """Nothing is there that anyone would have to read."""
        self.chip.arrive(self.free)

    def close(self) -> None:
        """No block ends while others read its operands, or write theirs into it."""
        self.chip.wait(self.free)

    def put(self, values: Sequence[Any]) -> None:
        """Lays down this slice's operands [64, N], one of each group."""
        _, s, _ = self.chip.place()
        self.chip.wait(self.free)
        for g, v in enumerate(values):
            for p, term in enumerate(split_terms(v, self.chip.tiles, self.chip.round_off)):
                self._send(self.chip.by_rows(term), self.buffer.at[p, g, s])
        self._publish()

    def product(
        self, gates: Sequence[Sequence[int]], fetch: Callable[[], Any] | None = None
    ) -> tuple[list[Any], Any]:
        """For each list of gates the sum of weights times operands, [64, N]; and fetch().

        gates[i][g] is the gate whose weights multiply group g in sum i. What fetch() loads is under
        way while the tensor cores work.
        """
        chip, tiles = self.chip, self.chip.tiles
        *_, own = chip.place()
        self._collect()
        chip.show_reads(self.buffer)

        def multiply(*sums):
            fetched = fetch() if fetch is not None else ()
            for p_w, p_v in tiles.passes:
                for k in range(tiles.slices):
                    for total, of_groups in zip(sums, gates):
                        for g, gate in enumerate(of_groups):
                            w = self.weights.at[own, p_w, gate, k]
                            chip.multiply(total, w, self.buffer.at[p_v, g, k])
            return [total[...] for total in sums], fetched

        found, fetched = chip.accumulate(multiply, len(gates))
        self._release()
        return found, fetched

    def _send(self, term, slot):
        """Puts a term where its readers look."""
        self.chip.store(term, slot)

    def _publish(self):
        """Says that this slice's operands are there."""
        self.chip.commit()
        self.chip.arrive(self.ready)

    def _collect(self):
        """Waits until the operands of all slices are there."""
        self.chip.wait(self.ready)

    def _release(self):
        """Says that this slice has read them."""
        self.chip.arrive(self.free)


class ClusterBoard(Board):
    """A block's own copy of the board of its cluster, on which all of its blocks store."""

    @staticmethod
    def barrier(chip: Chip) -> Any:
        return chip.cluster_barrier()

    def _send(self, term, slot):
        self.chip.store_in_cluster(term, slot)

    def _publish(self):
        self.chip.fence_cluster()
        super()._publish()

    def _collect(self):
        super()._collect()
        self.chip.commit()  # what other blocks stored is then the tensor cores' to read

    def _release(self):
        # A single thread of the four warps tells each block, and all of them must be done.
        self.chip.commit()
        super()._release()


class MemoryBoard(ClusterBoard):
    """The same for the interpreter: operands go round by the device's memory, the wire."""

    def __init__(self, chip: Chip, weights: Any, *, wire: Any, arrived: Any, **scratch: Any):
        super().__init__(chip, weights, **scratch)
        self.by_memory, self.arrived = wire, arrived

    @classmethod
    def scratch(cls, chip: Chip, groups: int) -> dict[str, Any]:
        count = chip.tiles.terms * groups * chip.tiles.slices
        return {**super().scratch(chip, groups), "arrived": chip.barrier(count)}

    @classmethod
    def wire(cls, chip: Chip, groups: int) -> jax.ShapeDtypeStruct:
        tiles = chip.tiles
        shape = (tiles.count, tiles.terms, groups, tiles.slices, tiles.rows, UNITS)
        return jax.ShapeDtypeStruct(shape, tiles.dtype)

    def _send(self, term, slot):
        self.chip.store(term, slot)

    def _publish(self):
        tile, s, _ = self.chip.place()
        self.chip.commit()
        for at in itertools.product(*map(range, self.buffer.shape[:2])):
            self.chip.send_out(self.buffer.at[(*at, s)], self.by_memory.at[(tile, *at, s)])
        self.chip.await_sent()
        self.chip.arrive(self.ready)

    def _collect(self):
        tile, *_ = self.chip.place()
        self.chip.wait(self.ready)
        for at in itertools.product(*map(range, self.buffer.shape[:3])):
            self.chip.fetch(self.by_memory.at[(tile, *at)], self.buffer.at[at], self.arrived)
        self.chip.wait(self.arrived)


def board_kind(chip: Chip) -> type[Board]:
    """The board of a chip's kernels."""
    if chip.tiles.cluster == 1:
        return Board
    return MemoryBoard if chip.interpreted else ClusterBoard
