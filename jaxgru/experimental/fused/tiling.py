"""How the fused kernels divide a layer among a GPU's blocks, shared memory and tensor cores.

A slice is 64 hidden units; one warpgroup computes all gates of a slice. A tile is a few rows of the
batch; the warpgroup computes all rows of a tile at once. The tensor cores multiply the 64 units by
the rows of the tile, so a small batch is padded to 8 rows instead of 64, and elementwise operations
are [64, rows].

The weights of a slice stay in shared memory for the whole sequence. All slices of a layer share one
block where they fit; otherwise each slice has a block of its own, and the blocks form a cluster.

A float32 product is a sum of bfloat16 products: each operand is split into the sum of `splits`
bfloat16 numbers, and the products of splits i and j with i + j < splits are added up.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

UNITS = 64  # hidden units of a slice: the rows of one tensor core product
_SHARED_BYTES = 232448 - 2048  # of a Hopper block, minus what barriers and alignment need
_MULTIPROCESSORS = 132  # each runs one of these blocks at a time
_GPCS, _BLOCKS_PER_GPC = 8, 16  # graphics processing clusters; a cluster lies within one of them
_MAX_CLUSTER = 8  # the largest cluster, in blocks, that every Hopper GPU can launch
_OPERANDS = 3  # arrays [B, H] in shared memory at once, in the backward kernel
_MAX_ROWS = {1: 32, 2: 32, 3: 16}  # by warpgroups a block: what its registers hold
# The names of JAX's matmul precision that mean so many splits of float32; the others mean two.
_ONE_SPLIT = ("bfloat16", "BF16_BF16_F32")
_THREE_SPLITS = ("highest", "float32", "BF16_BF16_F32_X6", "BF16_BF16_F32_X9", "F32_F32_F32")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a layer is divided: static, and the same for every call with the same sizes."""

    hidden_size: int  # H
    batch_size: int  # B
    slices: int  # S = ceil(H / 64)
    rows: int  # N, of a tile
    count: int  # of tiles, ceil(B / N)
    cluster: int  # blocks of a cluster: 1, or S
    splits: int  # of an operand
    dtype: Any  # of a split

    @property
    def warpgroups(self) -> int:
        """Slices of one block."""
        return self.slices // self.cluster

    @property
    def passes(self) -> list[tuple[int, int]]:
        """The pairs of splits that are multiplied, the smallest products first."""
        pairs = [(i, j) for i in range(self.splits) for j in range(self.splits)]
        return sorted((p for p in pairs if sum(p) < self.splits), key=sum, reverse=True)


def count_splits(dtype: Any) -> int:
    """Splits of an operand: 1 for half types; for float32 2, or what JAX's precision asks for."""
    if jnp.finfo(dtype).bits < 32:
        return 1
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return 1 if precision in _ONE_SPLIT else 3 if precision in _THREE_SPLITS else 2


def choose_tiles(hidden_size: int, batch_size: int, dtype: Any, splits: int) -> Tiles:
    """The division whose weights and operands fit, for the forward and the backward kernel.

    Raises:
      ValueError: none fits; the message names the largest hidden size that would.
    """
    slices = max(1, math.ceil(hidden_size / UNITS))
    cluster = next((c for c in (1, slices) if _fits(slices, c, 8, splits)), None)
    if cluster is None:
        raise ValueError(_too_large(hidden_size, dtype, splits))
    at_once = _MULTIPROCESSORS if cluster == 1 else _GPCS * (_BLOCKS_PER_GPC // cluster)
    wanted = 8 * max(1, math.ceil(batch_size / at_once / 8))
    choices = [n for n in range(8, wanted + 1, 8) if _fits(slices, cluster, n, splits)]
    rows, count = choices[-1], math.ceil(batch_size / choices[-1])
    operand = jnp.dtype(dtype if jnp.finfo(dtype).bits < 32 else jnp.bfloat16)
    return Tiles(hidden_size, batch_size, slices, rows, count, cluster, splits, operand)


def _fits(slices, cluster, rows, splits):
    """Whether a block holds the weights of its slices and all operands, 2 bytes a number."""
    warpgroups = slices // cluster
    if cluster > _MAX_CLUSTER or rows > _MAX_ROWS.get(warpgroups, 0):
        return False
    weights = 3 * warpgroups * UNITS * slices * UNITS
    return 2 * splits * (weights + _OPERANDS * slices * UNITS * rows) <= _SHARED_BYTES


def _too_large(hidden_size, dtype, splits):
    """The message for a hidden size that does not fit."""
    largest = UNITS * max(s for s in range(1, _MAX_CLUSTER + 1) if _fits(s, s, 8, splits))
    slices = math.ceil(hidden_size / UNITS)
    cure = "leave BPTT's kernel out"
    for fewer, precision in ((2, "high"), (1, "bfloat16")):
        if fewer < splits and slices <= _MAX_CLUSTER and _fits(slices, slices, 8, fewer):
            cure += f", or jax.default_matmul_precision({precision!r})"
            break
    return (
        f"HopperKernel: params.w_h must have at most {largest} rows where it stores each "
        f"{jnp.dtype(dtype)} number as {splits} number{'s' * (splits > 1)} of 16 bits, since w_h "
        f"must fit into shared memory ({_SHARED_BYTES} bytes a block), got {hidden_size}; {cure}."
    )


def _padding(tiles):
    """How many rows and units are added to fill the tiles and slices."""
    rows, units = tiles.count * tiles.rows, tiles.slices * UNITS
    return rows - tiles.batch_size, units - tiles.hidden_size


def to_tiles(v: jax.Array, tiles: Tiles, *leading: int) -> jax.Array:
    """[*leading, ..., H] as float32 blocks [*leading, tiles, S, 64, N], padded with zeros."""
    v = v.astype(jnp.float32).reshape(*leading, tiles.batch_size, tiles.hidden_size)
    v = jnp.pad(v, [(0, 0)] * len(leading) + [(0, count) for count in _padding(tiles)])
    v = v.reshape(*leading, tiles.count, tiles.rows, tiles.slices, UNITS)
    return jnp.moveaxis(v, -3, -1)


def from_tiles(v: jax.Array, tiles: Tiles, batch: tuple[int, ...]) -> jax.Array:
    """Blocks [*leading, tiles, S, 64, N] as [*leading, *batch, H]: the inverse of `to_tiles`."""
    leading = v.shape[:-4]
    v = jnp.moveaxis(v, -1, -3).reshape(*leading, tiles.count * tiles.rows, tiles.slices * UNITS)
    v = v[..., : tiles.batch_size, : tiles.hidden_size]
    return v.reshape(*leading, *batch, tiles.hidden_size)


def resets_to_tiles(resets: jax.Array, tiles: Tiles) -> jax.Array:
    """Resets [T, ..., 1] as [T, tiles, N]: 1 where a state is not reset, 0 elsewhere."""
    not_reset = 1 - resets.reshape(len(resets), tiles.batch_size).astype(jnp.float32)
    not_reset = jnp.pad(not_reset, [(0, 0), (0, _padding(tiles)[0])])
    return not_reset.reshape(len(resets), tiles.count, tiles.rows)


def weights_to_tiles(w: jax.Array, tiles: Tiles) -> jax.Array:
    """The gates' matrices [3, out, in] as [S of out, splits, 3, S of in, 64, 64]."""
    units = _padding(tiles)[1]
    w = jnp.pad(w, [(0, 0), (0, units), (0, units)])
    w = w.reshape(3, tiles.slices, UNITS, tiles.slices, UNITS).transpose(1, 0, 3, 2, 4)
    return jnp.stack(split_operand(w, tiles, lambda v: lax.reduce_precision(v, 8, 7)), axis=1)


def split_operand(
    v: jax.Array, tiles: Tiles, round_off: Callable[[jax.Array], jax.Array]
) -> list[jax.Array]:
    """v as a sum of splits, the largest first: each is the rounded rest of those before it.

    round_off(v) is v rounded to the bits of a split, still in v's dtype. XLA may remove a mere
    conversion to bfloat16 and back.
    """
    splits = []
    for last in range(tiles.splits - 1, -1, -1):
        splits.append(v.astype(tiles.dtype))
        v = v - round_off(v) if last else v
    return splits
