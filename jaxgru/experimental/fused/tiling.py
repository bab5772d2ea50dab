"""How the fused kernels cut a layer into pieces that a GPU's shared memory and tensor cores take.

Sixty-four hidden units are a slice, which one warpgroup computes for all gates; a few rows of the
batch are a tile, which it computes at once. The tensor cores multiply 64 units by the rows of a
tile, so a small batch is padded to 8 and not to 64, and everything elementwise is [64, rows].

The weights of a slice stay in shared memory for the whole sequence. All slices of a layer lie in
one block where they fit, else each has a block of its own and the blocks are a cluster.

Products of float32 are sums of bfloat16 products: each operand is a sum of `terms` bfloat16
numbers, and the products of terms i and j with i + j < terms are added up.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
UNITS = 64  # hidden units of a slice: the rows of a tensor core's product
_SHARED_BYTES = 232448 - 2048  # of a block on Hopper, less what barriers and alignment take
_BLOCKS = 132  # that run at once: one a multiprocessor
_PARTS, _PART = 8, 16  # the chip's parts, and blocks of each: a cluster lies in one part
_MAX_CLUSTER = 8  # blocks that every Hopper GPU can join
_OPERANDS = 3  # [B, H] that lie in shared memory at once, in the backward
_MAX_ROWS = {1: 32, 2: 32, 3: 16}  # by warpgroups a block: what its registers hold
# By JAX's precision of products. What is not named is two terms: 16 bits, in three passes.
_TERMS = {
    "bfloat16": 1,
    "BF16_BF16_F32": 1,
    "highest": 3,
    "float32": 3,
    "BF16_BF16_F32_X6": 3,
    "BF16_BF16_F32_X9": 3,
    "F32_F32_F32": 3,
}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A layer's cut: static, and the same on every call with the same sizes."""

    hidden_size: int  # H
    batch_size: int  # B
    slices: int  # S = ceil(H / 64)
    rows: int  # N, of a tile
    count: int  # of tiles, ceil(B / N)
    cluster: int  # blocks of a cluster: 1, or S
    terms: int  # of an operand
    dtype: Any  # of a term

    @property
    def warpgroups(self) -> int:
        """Slices of one block."""
        return self.slices // self.cluster

    @property
    def passes(self) -> list[tuple[int, int]]:
        """The pairs of terms that are multiplied, the small ones first."""
        pairs = [(i, j) for i in range(self.terms) for j in range(self.terms)]
        return sorted((p for p in pairs if sum(p) < self.terms), key=sum, reverse=True)


def count_terms(dtype: Any) -> int:
    """Terms of an operand: one of a half type; of float32 two, unless JAX's precision says else."""
    if jnp.finfo(dtype).bits < 32:
        return 1
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return _TERMS.get(precision, 2)


def cut(hidden_size: int, batch_size: int, dtype: Any, terms: int) -> Tiles:
    """The cut whose weights and operands fit, of the forward and of the backward.

    ValueError where none does, naming the largest hidden size that would.
    """
    slices = max(1, math.ceil(hidden_size / UNITS))
    cluster = next((c for c in (1, slices) if _fits(slices, c, 8, terms)), None)
    if cluster is None:
        raise ValueError(_too_large(hidden_size, dtype, terms))
    at_once = _BLOCKS if cluster == 1 else _PARTS * (_PART // cluster)
    wanted = 8 * max(1, math.ceil(batch_size / at_once / 8))
    choices = [n for n in range(8, wanted + 1, 8) if _fits(slices, cluster, n, terms)]
    rows, count = choices[-1], math.ceil(batch_size / choices[-1])
    operand = jnp.dtype(dtype if jnp.finfo(dtype).bits < 32 else jnp.bfloat16)
    return Tiles(hidden_size, batch_size, slices, rows, count, cluster, terms, operand)


def _fits(slices, cluster, rows, terms):
    """Whether a block holds its slices' weights and all operands, in 2 bytes a number."""
    warpgroups = slices // cluster
    if cluster > _MAX_CLUSTER or rows > _MAX_ROWS.get(warpgroups, 0):
        return False
    weights = 3 * warpgroups * UNITS * slices * UNITS
    return 2 * terms * (weights + _OPERANDS * slices * UNITS * rows) <= _SHARED_BYTES


def _too_large(hidden_size, dtype, terms):
    """What to say where a hidden size does not fit."""
    largest = UNITS * max(s for s in range(1, _MAX_CLUSTER + 1) if _fits(s, s, 8, terms))
    slices = math.ceil(hidden_size / UNITS)
    cure = "use backend='scan'"
    for fewer, precision in ((2, "high"), (1, "bfloat16")):
        if fewer < terms and slices <= _MAX_CLUSTER and _fits(slices, slices, 8, fewer):
            cure += f", or jax.default_matmul_precision({precision!r})"
            break
    return (
        f"gru: params.w_h must have at most {largest} rows where backend='fused' takes "
        f"{jnp.dtype(dtype)} as {terms} term{'s' * (terms > 1)} of 16 bits, since it keeps w_h in "
        f"shared memory ({_SHARED_BYTES} bytes a block), got {hidden_size}; {cure}."
    )


def _padding(tiles):
    """How many rows and units are added."""
    rows, units = tiles.count * tiles.rows, tiles.slices * UNITS
    return rows - tiles.batch_size, units - tiles.hidden_size


def to_tiles(v: Array, tiles: Tiles) -> Array:
    """[..., B, H] as [..., tiles, S, 64, N], zeros where there is nothing."""
    lead = v.shape[:-2]
    missing = (
        tiles.count * tiles.rows - tiles.batch_size,
        tiles.slices * UNITS - tiles.hidden_size,
    )
    v = jnp.pad(v, [(0, 0)] * len(lead) + [(0, count) for count in missing])
    v = v.reshape(*lead, tiles.count, tiles.rows, tiles.slices, UNITS)
    return jnp.moveaxis(v, -3, -1)


def from_tiles(v: Array, tiles: Tiles) -> Array:
    """The inverse of `to_tiles`."""
    lead = v.shape[:-4]
    v = jnp.moveaxis(v, -1, -3).reshape(*lead, tiles.count * tiles.rows, tiles.slices * UNITS)
    return v[..., : tiles.batch_size, : tiles.hidden_size]


def flags_to_tiles(v: Array, tiles: Tiles) -> Array:
    """[T, B] as [T, tiles, N], zeros where there is nothing."""
    v = jnp.pad(v, [(0, 0), (0, _padding(tiles)[0])])
    return v.reshape(v.shape[0], tiles.count, tiles.rows)


def weights_to_tiles(w: Array, tiles: Tiles) -> Array:
    """The gates' matrices [3, out, in] as [S, terms, 3, S, 64, 64], by slices of out and of in."""
    missing = _padding(tiles)[1]
    w = jnp.pad(w, [(0, 0), (0, missing), (0, missing)])
    w = w.reshape(3, tiles.slices, UNITS, tiles.slices, UNITS).transpose(1, 0, 3, 2, 4)
    return jnp.stack(split_terms(w, tiles, lambda v: lax.reduce_precision(v, 8, 7)), axis=1)


def split_terms(v: Array, tiles: Tiles, round_off: Callable[[Array], Array]) -> list[Array]:
    """v as a sum of terms, the largest first: each is what rounding takes of what is left.

    round_off(v) is v rounded to a term's bits, still in v's dtype: XLA is free to leave out a
    conversion to bfloat16 and back.
    """
    terms = []
    for last in range(tiles.terms - 1, -1, -1):
        terms.append(v.astype(tiles.dtype))
        v = v - round_off(v) if last else v
    return terms
