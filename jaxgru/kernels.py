"""The recurrence as one GPU kernel: the whole sequence forward, the whole sequence backward.

Only what is sequential is in here, as in the scans of `jaxgru.recurrence`: the projected inputs and
the local derivatives come in, states and cotangents go out, and every weight gradient is a bulk
product outside. `jaxgru.tiles` says how a layer is cut. Each warpgroup owns 64 hidden units of a few
rows of the batch; w_h stays in shared memory, the state (or its cotangent) in registers as float32,
and at each step::

    put       the operand of its units, where all slices read it
    product   of its weights and the operands of all slices, on the tensor cores, sums in float32;
              meanwhile it fetches what the next step reads
    gates     elementwise, in registers

Masks, resets, cuts and zoneout cost the kernels nothing but a flag for resets: a held step is one
with a_z = +-inf, so that z keeps all of the state, and in the backward they are folded into the
local derivatives.

For Hopper GPUs, through Pallas and Mosaic; JAX's interpreter of such kernels runs the same bodies on
a CPU. JAX calls that API unstable: versions 0.10.2 and 0.11.2 are known to take these kernels.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.chip import Chip
from jaxgru.cell import ACTIVATIONS, Coefficients, Gates
from jaxgru.parameters import GRUParams, GRUSpec
from jaxgru.products import blocks, state_dtype
from jaxgru.tiles import (
    UNITS,
    Tiles,
    cut,
    flags_to_tiles,
    from_tiles,
    split_terms,
    to_tiles,
    weights_to_tiles,
)

Array = jax.Array
Backend = Literal["scan", "fused", "interpreted"]
_F32 = jnp.float32


def forward(
    params: GRUParams,
    spec: GRUSpec,
    h0: Array,
    a: Sequence[Array],
    mask: Array | None,
    resets: Array | None,
    tap: Array | None,
    scale: Array | None,
    *,
    kept: float,
    reverse: bool,
    keep_gates: bool,
    dtype: Any,
    interpreted: bool,
) -> tuple[Array, tuple[Array, Gates | None]]:
    """h_last and (hs, gates or None), as the scan of `step` over the projected inputs a gives them.

    All arrays [T, ..., H] but h0 and scale; a mask may be [T, ..., 1]. hs are in `dtype`. The z of
    the gates is that of a step that holds where the mask does.
    """
    before, batch = spec.reset == "before", h0.shape[:-1]
    if mask is not None:  # z = 1 (or 0, where it is the candidate's share) keeps the state as it is
        held = jnp.full_like(a[1], jnp.inf if spec.update == "keep" else -jnp.inf)
        a = (a[0], jnp.where(mask, a[1], held), a[2])
    tiles = _cut(h0, params.w_h.dtype, 2 if before else 1)
    if not h0.size or not len(a[0]):
        empty = [v.astype(_F32) for v in a]
        gates = Gates(*empty, None if before else empty[2]) if keep_gates else None
        return h0, (a[0].astype(dtype), gates)
    constants = {"h0": _pack(h0, tiles)}
    if not before and params.b_h is not None:
        b_q = blocks(params.b_h)[2][None]
        constants["b_q"] = _pack(jnp.broadcast_to(b_q, (tiles.batch_size, b_q.size)), tiles)
    if scale is not None:
        constants["scale"] = _pack(scale, tiles)
    live = None
    if resets is not None:
        live = flags_to_tiles(1 - resets.reshape(len(resets), -1).astype(_F32), tiles)
    lead = (len(a[0]), tiles.tiles, tiles.slices)
    block = (UNITS, tiles.rows)
    outputs = {"hs": (dtype, (*lead, *block)), "h_last": (_F32, (*lead[1:], *block))}
    if keep_gates:
        outputs["gates"] = (_F32, (*lead, 3 if before else 4, *block))
    found = _launch(
        functools.partial(_forward_body, spec, kept, tap is not None),
        tiles,
        [1, 1] if before else [1],
        _transposed_gates(params.w_h),
        constants,
        _pack_steps([*a] if tap is None else [*a, tap], tiles),
        live,
        outputs,
        reverse=reverse,
        interpreted=interpreted,
    )
    gates = None
    if keep_gates:
        each = [_unpack(v, tiles, batch) for v in jnp.unstack(found["gates"], axis=3)]
        gates = Gates(*each) if not before else Gates(*each, None)
    return _unpack(found["h_last"], tiles, batch), (_unpack(found["hs"], tiles, batch), gates)


def backward(
    params: GRUParams,
    spec: GRUSpec,
    dh_last: Array,
    c: Coefficients,
    dhs: Array | None,
    mask: Array | None,
    resets: Array | None,
    cuts: Array | None,
    scale: Array | None,
    *,
    kept: float,
    reverse: bool,
    interpreted: bool,
) -> tuple[Array, tuple[Array, Array | None]]:
    """dh before the first step; and of each step the whole cotangent of h_t, and dp where "before".

    All in float32, arrays [T, ..., H] but dh_last and scale; reverse is that of the forward sweep.
    """
    before, batch = spec.reset == "before", dh_last.shape[:-1]
    c = _fold_flags(c, mask, resets, cuts, kept)
    k_r, k_z, *k_q = c.slopes if before else jnp.unstack(c.slopes[0], axis=-2)
    per_step = [c.k, k_r, k_z, c.a, c.reset] if before else [c.k, k_r, k_z, *k_q]
    if dhs is not None:
        per_step.append(dhs)
    tiles = _cut(dh_last, params.w_h.dtype, 3)
    if not dh_last.size or not len(c.k):
        empty = c.k.astype(_F32)
        return dh_last, (empty, empty if before else None)
    constants = {"h0": _pack(dh_last, tiles)}
    if scale is not None:
        constants["scale"] = _pack(scale, tiles)
    shape = (len(c.k), tiles.tiles, tiles.slices, UNITS, tiles.rows)
    outputs = {"hs": (_F32, shape), "h_last": (_F32, shape[1:])}
    if before:
        outputs["dp"] = (_F32, shape)
    found = _launch(
        functools.partial(_backward_body, before, dhs is not None),
        tiles,
        [1, 2] if before else [3],
        jnp.stack(blocks(params.w_h)),
        constants,
        _pack_steps(per_step, tiles),
        None,
        outputs,
        reverse=not reverse,
        interpreted=interpreted,
    )
    dp = _unpack(found["dp"], tiles, batch) if before else None
    return _unpack(found["h_last"], tiles, batch), (_unpack(found["hs"], tiles, batch), dp)


def _cut(h, dtype, groups):
    """The cut for a state [..., H]."""
    return cut(h.shape[-1], math.prod(h.shape[:-1]), dtype, groups)


def _pack(v, cut):
    """A state [..., H] as float32 blocks [tiles, S, 64, N]."""
    return to_tiles(v.astype(_F32).reshape(cut.batch_size, cut.hidden_size), cut)


def _pack_steps(values, cut):
    """Arrays [T, ..., H] as float32 blocks [T, tiles, S, count, 64, N]."""
    shape = (len(values[0]), cut.batch_size, cut.hidden_size)
    return jnp.stack([to_tiles(v.astype(_F32).reshape(shape), cut) for v in values], axis=3)


def _unpack(v, cut, batch):
    """The inverse of either, for one array."""
    lead = v.shape[:-4]
    return from_tiles(v, cut).reshape(*lead, *batch, cut.hidden_size)


def _transposed_gates(w):
    """[3, out, in] of w_h [in, 3 out]."""
    return jnp.stack([part.T for part in blocks(w)])


def _sigmoid(a):
    """Mosaic has no logistic function of its own."""
    return 0.5 * jnp.tanh(0.5 * a) + 0.5


def _fold_flags(c, mask, resets, cuts, kept):
    """The local derivatives of a step that holds, resets, or cuts its gradient, as the sweep needs.

    Held: K = 1 and the others 0; a share that is kept goes to K; reset or cut: dh_{t-1} is 0, but
    not dp, which the gradient of w_hn needs.
    """
    before, zero, one = c.reset is not None, jnp.zeros_like(c.k), jnp.ones_like(c.k)
    slopes = list(c.slopes) if before else list(jnp.unstack(c.slopes[0], axis=-2))
    k, k_a, reset = c.k, c.a, c.reset
    scaled = [1] if before else list(range(len(slopes)))  # R is dp's where "before", not dh's
    if kept:
        k, k_a = (1 - kept) * k + kept, (1 - kept) * k_a
        slopes = [(1 - kept) * v if i in scaled else v for i, v in enumerate(slopes)]
    if mask is not None:
        k, k_a = jnp.where(mask, k, one), jnp.where(mask, k_a, zero)
        slopes = [jnp.where(mask, v, zero) if i in scaled else v for i, v in enumerate(slopes)]
    for flag in (resets, cuts):
        if flag is not None:
            flag = flag.reshape(flag.shape + (1,) * (k.ndim - flag.ndim))
            k, slopes = jnp.where(flag, zero, k), [jnp.where(flag, zero, v) for v in slopes]
            reset = jnp.where(flag, zero, reset) if before else None
    return Coefficients(k, k_a, tuple(slopes) if before else (jnp.stack(slopes, axis=-2),), reset)


def _forward_body(spec, kept, has_tap, boards, at, h, inputs, live, fetch):
    """h_t from h_{t-1}, [64, N], and the blocks of the step; the next step's blocks.

    boards hold what the products read: h, and r h where "before".
    """
    a_r, a_z, a_n, *tap = inputs
    h = h if live is None else jnp.where(live, h, jnp.zeros_like(h))
    read = h if "scale" not in at.constants else h * at.constants["scale"]
    boards[0].put([read])
    if spec.reset == "before":
        (v_r, v_z), fetched = boards[0].product([[0], [1]], fetch)
        r, z = _sigmoid(a_r + v_r), _sigmoid(a_z + v_z)
        boards[1].put([r * read])
        (v_n,), _ = boards[1].product([[2]])
        n, gates = ACTIVATIONS[spec.activation](a_n + v_n), ()
    else:
        (v_r, v_z, q), fetched = boards[0].product([[0], [1], [2]], fetch)
        r, z = _sigmoid(a_r + v_r), _sigmoid(a_z + v_z)
        q = q if "b_q" not in at.constants else q + at.constants["b_q"]
        n, gates = ACTIVATIONS[spec.activation](a_n + r * q), (q,)
    new = z * h + (1 - z) * n if spec.update == "keep" else (1 - z) * h + z * n
    new = h + (1 - kept) * (new - h) if kept else new
    new = new + tap[0] if has_tap else new
    at.write("hs", new)
    at.write("gates", r, z, n, *gates)
    return new, fetched


def _backward_body(before, has_dhs, boards, at, dh, inputs, live, fetch):
    """dh_{t-1} from what later steps add to dh_t, [64, N], and the blocks of the step."""
    del live
    dh = dh + inputs[-1] if has_dhs else dh
    scale = at.constants.get("scale")
    at.write("hs", dh)
    if before:
        k, k_r, k_z, k_a, r = inputs[:5]
        boards[0].put([dh * k_a])
        (dp,), _ = boards[0].product([[2]])
        at.write("dp", dp)
        boards[1].put([dp * k_r, dh * k_z])
        (dread,), fetched = boards[1].product([[0, 1]], fetch)
        dread = dread + dp * r
    else:
        k, k_r, k_z, k_q = inputs[:4]
        boards[0].put([dh * k_r, dh * k_z, dh * k_q])
        (dread,), fetched = boards[0].product([[0, 1, 2]], fetch)
    return dh * k + (dread if scale is None else dread * scale), fetched


def _launch(
    body, cut, groups, w, constants, per_step, live, outputs, *, reverse, interpreted
) -> dict[str, Array]:
    """Runs a body over all steps, tiles and slices; the outputs by name.

    groups: of each board, how many operands lie on it. w [3, out, in]. per_step [T, tiles, S, count,
    64, N], live [T, tiles, N] or None. outputs: name -> dtype and shape, [T, tiles, S, ...] but for
    h_last, which is the last carry.
    """
    chip = Chip(cut, interpreted)
    inputs = {"w": weights_to_tiles(w, cut), "x": per_step, **constants}
    if live is not None:
        inputs["live"] = live
    results = {name: jax.ShapeDtypeStruct(s, dtype) for name, (dtype, s) in outputs.items()}
    if chip.wire == "memory":  # through which operands go round
        for i, count in enumerate(groups):
            shape = (cut.tiles, cut.terms, count, cut.slices, UNITS, cut.rows)
            results[f"wire{i}"] = jax.ShapeDtypeStruct(shape, cut.dtype)
    names = [*inputs, *results]

    def kernel(*refs, weights, loaded, **boards):
        named = dict(zip(names, refs))
        boards = [
            _Board(chip, weights, named.get(f"wire{i}"), **boards[f"board{i}"])
            for i in range(len(groups))
        ]
        _run(chip, body, named, weights, loaded, boards, reverse)

    scratch = {
        "weights": chip.weights(cut.terms),
        "loaded": chip.barrier(math.prod(inputs["w"].shape[1:4]), cut.warpgroups),
        **{f"board{i}": chip.board(count) for i, count in enumerate(groups)},
    }
    run = jax.custom_jvp(chip.kernel(kernel, list(results.values()), scratch))
    run.defjvp(_refuse_derivative)
    return dict(zip(results, run(*inputs.values())))


def _refuse_derivative(primals, tangents):
    raise NotImplementedError(
        "gru: backend='fused' has first derivatives in reverse mode alone, and the derivative of one "
        "of them was asked for; use backend='scan', with gradient='tangent' for every mode and order."
    )


def _run(chip, body, refs, weights, loaded, boards, reverse):
    """One warpgroup's part: its weights once, then its units of its tile, step after step."""
    cut, num_steps = chip.cut, refs["x"].shape[0]
    tile, s, own = chip.place()
    blocks_of_w = [(p, g, k) for p in range(cut.terms) for g in range(3) for k in range(cut.slices)]
    for at in blocks_of_w:
        chip.fetch(refs["w"].at[(s, *at)], weights.at[(own, *at)], loaded.at[own])
    for board in boards:
        board.open()
    chip.wait(loaded.at[own])
    constants = {n: chip.load(refs[n].at[tile, s]) for n in ("b_q", "scale") if n in refs}

    def step_at(i):
        return num_steps - 1 - i if reverse else i

    def load_step(i):
        t = step_at(jnp.minimum(i, jnp.int32(num_steps - 1)))
        x = tuple(chip.load(refs["x"].at[t, tile, s, n]) for n in range(refs["x"].shape[3]))
        return x, chip.load_row(refs["live"].at[t, tile]) if "live" in refs else None

    def step(i, carry):
        h, x, live = carry

        def write(name, *values):
            if name in refs:
                target = refs[name].at[step_at(i), tile, s]
                for n, v in enumerate(values):
                    block = target if len(target.shape) == 2 else target.at[n]
                    block[...] = v.astype(block.dtype)

        live = None if live is None else chip.spread(live) > 0.5
        h, (x, live) = body(
            boards, _Step(write, constants), h, x, live, lambda: load_step(i + jnp.int32(1))
        )
        return h, x, live

    first = (chip.load(refs["h0"].at[tile, s]), *load_step(jnp.int32(0)))
    h, *_ = lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), step, first)
    refs["h_last"].at[tile, s][...] = h
    for board in boards:
        board.close()


class _Step(NamedTuple):
    """What a body has at hand besides its operands."""

    write: Callable[..., None]  # a name and blocks [64, N], where there is such an output
    constants: dict[str, Any]  # name -> block [64, N]


class _Board:
    """Where all slices lay their operands for all to read: blocks [64, N] in shared memory.

    Filled once a step and read once: `put` waits until everyone has read what was there, `product`
    until everyone has put.
    """

    def __init__(self, chip, weights, wire, buffer, ready, free, arrived=None):
        self.chip, self.weights, self.wire = chip, weights, wire
        self.buffer, self.ready, self.free, self.arrived = buffer, ready, free, arrived

    def open(self):
        """Nothing is there that anyone would have to read."""
        self.chip.arrive(self.free)

    def close(self):
        """No block ends while others read its operands, or write theirs into it."""
        self.chip.wait(self.free)

    def put(self, values):
        """Lays down this slice's operands, one of each group."""
        chip, (tile, s, _) = self.chip, self.chip.place()
        chip.wait(self.free)
        for g, v in enumerate(values):
            for p, term in enumerate(split_terms(v, chip.cut, chip.round_off)):
                chip.send(term, self.buffer.at[p, g], s, self.ready)
        chip.sent(self.ready, self.buffer, self.wire, tile, s)

    def product(self, gates, fetch=None):
        """For each list of gates the sum over groups of weights times operands, [64, N]; and fetch().

        gates[i][g]: the gate whose weights multiply group g. What fetch() loads is under way while
        the tensor cores work.
        """
        chip, cut = self.chip, self.chip.cut
        tile, _, own = chip.place()
        chip.await_operands(self.ready, self.buffer, self.wire, self.arrived, tile)

        def multiply(*sums):
            for p_w, p_v in cut.passes:
                for k in range(cut.slices):
                    for total, of_groups in zip(sums, gates):
                        for g, gate in enumerate(of_groups):
                            w = self.weights.at[own, p_w, gate, k]
                            chip.multiply(total, w, self.buffer.at[p_v, g, k])
            fetched = fetch() if fetch is not None else ()
            return [total[...] for total in sums], fetched

        found, fetched = chip.accumulate(multiply, len(gates))
        chip.arrive(self.free)
        return found, fetched
