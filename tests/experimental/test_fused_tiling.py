"""How the fused kernels divide a layer: no number is lost, and what does not fit is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgru.experimental.fused import tiling
from jaxgru.experimental.fused.tiling import UNITS, choose_tiles

HALF = jnp.dtype(jnp.bfloat16)


def test_tiles_hold_every_number_once_and_zeros_elsewhere():
    tiles = choose_tiles(70, 19, HALF, 1)
    v = np.arange(1, 1 + 2 * 19 * 70, dtype=np.float32).reshape(2, 19, 70)
    packed = np.asarray(tiling.to_tiles(v, tiles, 2))
    assert packed.shape == (2, 3, 2, UNITS, 8)
    assert packed[1, 2, 1, 5, 1] == v[1, 2 * 8 + 1, UNITS + 5]
    assert np.count_nonzero(packed) == v.size
    np.testing.assert_array_equal(tiling.from_tiles(packed, tiles, (19,)), v)


def test_resets_are_divided_as_the_rows_of_the_batch():
    tiles = choose_tiles(4, 9, HALF, 1)
    resets = np.zeros((2, 3, 3, 1), bool)
    resets[1, 2, 2] = True
    not_reset = np.asarray(tiling.resets_to_tiles(resets, tiles))
    assert not_reset.shape == (2, 2, 8)
    assert not_reset[1, 1, 0] == 0
    assert np.count_nonzero(not_reset) == 17


def test_weights_are_blocks_by_slices_of_out_and_of_in():
    tiles = choose_tiles(100, 1, HALF, 1)
    w = np.random.default_rng(0).normal(size=(3, 100, 100)).astype(HALF)
    packed = np.asarray(tiling.weights_to_tiles(jnp.asarray(w), tiles))
    assert packed.shape == (2, 1, 3, 2, UNITS, UNITS)
    for out, gate, into in [(0, 0, 0), (1, 2, 0), (0, 1, 1), (1, 1, 1)]:
        block = w[gate, out * UNITS :, into * UNITS :][:UNITS, :UNITS]
        rows, columns = block.shape
        np.testing.assert_array_equal(packed[out, 0, gate, into, :rows, :columns], block)
    assert np.count_nonzero(packed) == np.count_nonzero(w)


SPLITS = {  # of float32, by what jax.default_matmul_precision may be
    1: ["bfloat16", "BF16_BF16_F32"],
    2: [None, "default", "high", "tensorfloat32", "BF16_BF16_F32_X3"],
    3: ["highest", "float32", "BF16_BF16_F32_X6", "BF16_BF16_F32_X9", "F32_F32_F32"],
}


@pytest.mark.parametrize(
    "precision", [name for names in SPLITS.values() for name in names], ids=str
)
def test_splits_are_what_the_precision_of_the_call_asks_for(precision):
    with jax.default_matmul_precision(precision):
        assert precision in SPLITS[tiling.count_splits(jnp.float32)]
        assert tiling.count_splits(HALF) == tiling.count_splits(jnp.float16) == 1


@pytest.mark.parametrize("bits", [8, 16, 24])
def test_splits_add_up_to_as_many_bits_as_they_have(bits):
    """Compiled, too: XLA may leave out a rounding that only conversions ask for."""
    v = np.random.default_rng(1).normal(size=1000) * np.repeat(10.0 ** np.arange(-3.0, 7.0), 100)
    v = v.astype(np.float32)

    @jax.jit
    def split(v):
        round_off = lambda v: lax.reduce_precision(v, 8, 7)  # noqa: E731
        return tiling.split_operand(v, tiles, round_off)

    tiles = choose_tiles(64, 1, jnp.float32, bits // 8)
    splits = split(v)
    assert {t.dtype for t in splits} == {HALF}
    assert len(splits) == bits // 8
    total = sum(np.asarray(t, np.float64) for t in splits)
    error = np.abs(total / np.asarray(v, np.float64) - 1).max()
    assert error <= 2.0**-bits
    assert bits == 24 or error > 2.0 ** -(bits + 3)  # no more splits than asked for


def test_passes_leave_out_only_what_is_below_the_last_split():
    passes = choose_tiles(64, 1, jnp.float32, 3).passes
    assert sorted(passes) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert passes[-1] == (0, 0)  # the largest last: less is rounded away
    assert choose_tiles(64, 1, HALF, 1).passes == [(0, 0)]


@pytest.mark.parametrize(
    "hidden, batch, dtype, want",
    [  # slices, rows, count of tiles, cluster, splits
        (1, 1, HALF, (1, 8, 1, 1, 1)),
        (64, 1056, HALF, (1, 8, 132, 1, 1)),
        (64, 1057, HALF, (1, 16, 67, 1, 1)),
        (64, 5280, HALF, (1, 32, 165, 1, 1)),  # the registers hold no more rows of one slice,
        (128, 5280, HALF, (2, 32, 165, 1, 1)),  # nor of two
        (192, 16, HALF, (3, 8, 2, 1, 1)),
        (193, 16, HALF, (4, 8, 2, 4, 1)),
        (128, 128, jnp.float32, (2, 8, 16, 1, 2)),
        (256, 128, jnp.float32, (4, 8, 16, 4, 2)),
        (320, 192, HALF, (5, 8, 24, 5, 1)),
        (320, 193, HALF, (5, 16, 13, 5, 1)),  # of clusters of five 24 run at once
        (512, 128, HALF, (8, 8, 16, 8, 1)),
        (512, 256, HALF, (8, 8, 32, 8, 1)),  # no room for operands of more rows
    ],
)
def test_division_has_the_smallest_cluster_and_one_wave_of_blocks(hidden, batch, dtype, want):
    found = choose_tiles(hidden, batch, dtype, want[-1])
    got = (found.slices, found.rows, found.count, found.cluster, found.splits)
    assert got == want
    assert found.slices == found.cluster * found.warpgroups


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_operands_of_half_types_keep_their_dtype(dtype):
    assert choose_tiles(8, 8, dtype, 1).dtype == jnp.dtype(dtype)


BFLOAT16 = ", or jax.default_matmul_precision('bfloat16')"
HIGH = ", or jax.default_matmul_precision('high')"


@pytest.mark.parametrize(
    "hidden, dtype, splits, limit, cure",
    [
        (513, HALF, 1, 512, ""),
        (257, jnp.float32, 2, 256, BFLOAT16),
        (512, jnp.float32, 2, 256, BFLOAT16),
        (600, jnp.float32, 2, 256, ""),
        (129, jnp.float32, 3, 128, HIGH),
        (257, jnp.float32, 3, 128, BFLOAT16),
    ],
)
def test_layer_that_does_not_fit_is_refused_with_its_limit_and_cure(
    hidden, dtype, splits, limit, cure
):
    with pytest.raises(ValueError) as caught:
        choose_tiles(hidden, 8, dtype, splits)
    numbers = "1 number" if splits == 1 else f"{splits} numbers"
    assert str(caught.value) == (
        f"HopperKernel: params.w_h must have at most {limit} rows where it stores each "
        f"{jnp.dtype(dtype)} number as {numbers} of 16 bits, since w_h must fit into shared memory "
        f"(230400 bytes a block), got {hidden}; leave BPTT's kernel out{cure}."
    )
    assert choose_tiles(limit, 8, dtype, splits).hidden_size == limit
