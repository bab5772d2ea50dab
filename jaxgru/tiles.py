"""How the fused kernels cut a layer into pieces that a GPU's shared memory and tensor cores take.

Sixty-four hidden units are a slice, which one warpgroup computes for all its gates; a few rows of
the batch are a tile, which it computes at once. The tensor cores multiply 64 units by the rows of a
tile, so a small batch is padded to 8 and not to 64, and everything elementwise is [64, rows].

The weights of a slice stay in shared memory for the whole sequence. All slices of a layer lie in one
block where they fit, else each has a block of its own and the blocks are a cluster.

Products of float32 are sums of bfloat16 products: each operand is a sum of `terms` bfloat16 numbers,
and the products of terms i and j with i + j < terms are added up.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

UNITS = 64  # hidden units of a slice: the rows of a tensor core's product
_SHARED_BYTES = 232448 - 2048  # of a block on Hopper, less what barriers and alignment take
_BLOCKS = 132  # that run at once: one a multiprocessor
_MAX_CLUSTER = 8  # blocks that every Hopper GPU can join
_MAX_WARPGROUPS = 3  # of a block, so that each thread keeps 168 registers
_MAX_ROWS = {1: 32, 2: 32, 3: 16}  # by warpgroups a block: what its registers hold
# Operands of one term are as exact as their dtype; two carry 16 bits, three 24.
_TERMS = {"default": 1, "fastest": 1, "bfloat16": 1, "highest": 3, "float32": 3}


class Tiles(NamedTuple):
    """A layer's cut: static, and the same on every call with the same sizes."""

    hidden_size: int  # H
    batch_size: int  # B
    slices: int  # S = ceil(H / 64)
    rows: int  # N, of a tile
    tiles: int  # ceil(B / N)
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
    """Terms of an operand: one of a half type; of float32 two, or what JAX's precision asks for."""
    if jnp.finfo(dtype).bits < 32:
        return 1
    return _TERMS.get(jax.config.jax_default_matmul_precision or "high", 2)  # pyright: ignore


def cut(hidden_size: int, batch_size: int, dtype: Any, groups: int) -> Tiles:
    """The cut whose weights and operands fit; `groups` is how many [B, H] operands lie side by side.

    ValueError where none does, naming the largest hidden size that would.
    """
    terms = count_terms(dtype)
    slices = max(1, math.ceil(hidden_size / UNITS))
    cluster = next((c for c in (1, slices) if _fits(slices, c, 8, terms, groups)), None)
    if cluster is None:
        raise ValueError(_too_large(hidden_size, dtype, terms, groups))
    at_once = max(1, _BLOCKS // cluster)
    wanted = 8 * max(1, math.ceil(batch_size / at_once / 8))
    choices = [n for n in range(8, wanted + 1, 8) if _fits(slices, cluster, n, terms, groups)]
    rows, operand = choices[-1], dtype if terms == 1 and jnp.finfo(dtype).bits < 32 else jnp.bfloat16
    tiles = math.ceil(batch_size / rows)
    return Tiles(hidden_size, batch_size, slices, rows, tiles, cluster, terms, jnp.dtype(operand))


def _fits(slices, cluster, rows, terms, groups):
    """Whether a block holds its slices' weights and all operands, in 2 bytes a number."""
    warpgroups = slices // cluster
    if cluster > _MAX_CLUSTER or rows > _MAX_ROWS.get(warpgroups, 0):
        return False
    weights = 3 * warpgroups * UNITS * slices * UNITS
    return 2 * terms * (weights + groups * slices * UNITS * rows) <= _SHARED_BYTES


def _too_large(hidden_size, dtype, terms, groups):
    """What to say where a hidden size does not fit."""
    largest = max(s for s in range(1, 17) if _fits(s, s, 8, terms, groups)) * UNITS
    cure = "use backend='scan'"
    if terms > 1:
        cure += (
            ", or fewer bits: bfloat16 parameters, or jax.default_matmul_precision('bfloat16')"
            + (" or 'high'" if terms > 2 else "")
        )
    return (
        f"gru: params.w_h must have at most {largest} rows for backend='fused' with {jnp.dtype(dtype)}"
        f" in {terms} bfloat16 term{'s' * (terms > 1)} (its weights stay in shared memory, "
        f"{_SHARED_BYTES} bytes a block), got {hidden_size}; {cure}."
    )


def to_tiles(v: Array, cut: Tiles) -> Array:
    """[..., B, H] as [..., tiles, S, 64, N], zeros where there is nothing."""
    lead = v.shape[:-2]
    missing = (cut.tiles * cut.rows - cut.batch_size, cut.slices * UNITS - cut.hidden_size)
    v = jnp.pad(v, [(0, 0)] * len(lead) + [(0, count) for count in missing])
    v = v.reshape(*lead, cut.tiles, cut.rows, cut.slices, UNITS)
    return jnp.moveaxis(v, -3, -1)


def from_tiles(v: Array, cut: Tiles) -> Array:
    """The inverse of `to_tiles`."""
    lead = v.shape[:-4]
    v = jnp.moveaxis(v, -1, -3).reshape(*lead, cut.tiles * cut.rows, cut.slices * UNITS)
    return v[..., : cut.batch_size, : cut.hidden_size]


def flags_to_tiles(v: Array, cut: Tiles) -> Array:
    """[T, B] as [T, tiles, N], zeros where there is nothing."""
    v = jnp.pad(v, [(0, 0), (0, cut.tiles * cut.rows - cut.batch_size)])
    return v.reshape(v.shape[0], cut.tiles, cut.rows)


def weights_to_tiles(w: Array, cut: Tiles) -> Array:
    """The matrices [3, out, in] of the gates as [S, terms, 3, S, 64, 64], by slices of out and in."""
    missing = cut.slices * UNITS - cut.hidden_size
    w = jnp.pad(w, [(0, 0), (0, missing), (0, missing)])
    w = w.reshape(3, cut.slices, UNITS, cut.slices, UNITS).transpose(1, 0, 3, 2, 4)
    return jnp.stack(split_terms(w, cut, lambda v: lax.reduce_precision(v, 8, 7)), axis=1)


def split_terms(v: Array, cut: Tiles, round_off) -> list[Array]:
    """v as a sum of terms, the largest first: each is what rounding takes of what is left.

    round_off(v) is v rounded to a term's bits, still in v's dtype: XLA is free to leave out a
    conversion to bfloat16 and back.
    """
    terms = []
    for last in range(cut.terms - 1, -1, -1):
        terms.append(v.astype(cut.dtype))
        v = v - round_off(v) if last else v
    return terms
