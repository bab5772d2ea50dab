"""The recurrence as one GPU kernel: the whole sequence forward, the whole sequence backward.

Only what is sequential is in here, as in the scans of `jaxgru.core`: the projected inputs and
the local derivatives come in, states and cotangents go out, and every weight gradient is a bulk
product outside. `tiling` says how a layer is cut. Each warpgroup owns 64 hidden units of a
few rows of the batch; w_h stays in shared memory, the state (or its cotangent) in registers as
float32, and at each step::

    put       the operand of its units, where all slices read it
    product   of its weights and the operands of all slices, on the tensor cores, sums in float32;
              meanwhile it fetches what the next step reads
    gates     elementwise, in registers

Masks, resets, cuts and zoneout cost the kernels nothing but a flag for resets: a held step is one
with a_z = +-inf, so that z keeps all of the state, and in the backward they are folded into the
local derivatives.

For Hopper GPUs, through Pallas and Mosaic; JAX's interpreter of such kernels runs the same bodies
on a CPU. JAX calls that API unstable: versions 0.10.2 and 0.11.2 are known to take these kernels.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.cell import ACTIVATIONS, Gates
from jaxgru.core.derivatives import Coefficients
from jaxgru.core.matmul import blocks
from jaxgru.core.parameters import GRUParams
from jaxgru.core.sharding import on_auto_mesh, vary_alike, varying_axes
from jaxgru.experimental.fused.exchange import board_kind
from jaxgru.experimental.fused.hopper import Chip
from jaxgru.experimental.fused.tiling import (
    UNITS,
    cut,
    flags_to_tiles,
    from_tiles,
    to_tiles,
    weights_to_tiles,
)

Array = jax.Array
Backend = Literal["scan", "fused", "interpreted"]
_F32 = jnp.float32


def require_fused(
    backend: Backend, gradient: str, unroll: int, params: GRUParams, xs: Array
) -> None:
    """An error that names the cure where the kernels do not compute what is asked of `gru`."""
    cure = "use backend='scan'"
    if gradient != "bptt":
        raise ValueError(
            f"gru: gradient must be 'bptt' with backend={backend!r}, whose kernels have that "
            f"derivative alone, got {gradient!r}; {cure}."
        )
    if unroll != 1:
        raise ValueError(
            f"gru: unroll must be 1 with backend={backend!r}, which has no loop of XLA's to "
            f"unroll, got {unroll}; leave it out."
        )
    if xs.dtype == jnp.float64:
        raise TypeError(
            f"gru: xs must be float32, bfloat16 or float16 with backend={backend!r}: tensor cores "
            f"add up float32 numbers at most, got float64; {cure}."
        )
    mesh = jax.sharding.get_abstract_mesh()
    sharding = getattr(jax.typeof(xs), "sharding", None)
    if on_auto_mesh() or (sharding is not None and any(sharding.spec)):
        raise ValueError(
            f"gru: backend={backend!r} must be called inside jax.shard_map where a mesh divides "
            f"arrays, got the mesh {mesh.shape}, over which a kernel cannot be divided; {cure}."
        )
    if backend == "interpreted" and any(mesh.shape[name] > 1 for name in varying_axes(xs)):
        raise NotImplementedError(
            f"gru: backend='interpreted' must run on one device, got the mesh {mesh.shape}: JAX's "
            f"interpreter runs one kernel at a time; {cure}."
        )
    if params.g_x is not None or params.g_h is not None:
        raise ValueError(
            f"gru: params must have no gains with backend={backend!r}, whose kernels have no layer "
            f"normalization, got g_x and g_h; {cure}."
        )
    if not all(isinstance(size, int) for size in xs.shape):
        raise ValueError(
            f"gru: xs must have sizes that are known with backend={backend!r}, which cuts them "
            f"into tiles, got {xs.shape}; {cure}."
        )


def fused_forward(
    static: Any,
    params: GRUParams,
    h0: Array,
    a: Sequence[Array],
    steps: Any,
    scale: Array | None,
    keep_gates: bool,
) -> tuple[Array, tuple[Array, Gates | None]]:
    """h_last and (hs, gates or None) as the scan of `step` over the projected inputs gives them.

    static holds kept, reverse, backend and terms, and steps the xs, mask, resets and tap.
    The z of the gates is that of a step that holds wherever the mask does.
    """
    before, keep = params.spec.reset == "before", params.spec.update == "keep"
    batch, num_steps = h0.shape[:-1], len(steps.xs)
    if steps.mask is not None:  # z = 1 (or 0, where z is the candidate's share) keeps the state
        held = jnp.full_like(a[1], jnp.inf if keep else -jnp.inf)
        a = (a[0], jnp.where(steps.mask, a[1], held), a[2])
    tiles = _cut(h0, params.w_h.dtype, static.terms)
    if not h0.size or not num_steps:
        gates = Gates(a[0], a[1], a[2], None if before else a[2]) if keep_gates else None
        return h0, (a[0].astype(steps.xs.dtype), gates)
    constants = {"h0": h0}
    if not before and params.b_h is not None:
        constants["b_q"] = jnp.broadcast_to(blocks(params.b_h)[2], h0.shape)
    if scale is not None:
        constants["scale"] = scale
    outputs: dict[str, Any] = {"hs": (steps.xs.dtype, ())}
    if keep_gates:
        outputs["gates"] = (_F32, (3 if before else 4,))
    found = _launch(
        "gru_forward",
        functools.partial(_forward_body, params.spec, static.kept),
        Chip(tiles, static.backend == "interpreted"),
        [1, 1] if before else [1],
        jnp.stack([w.T for w in blocks(params.w_h)]),
        constants,
        [*a] if steps.tap is None else [*a, steps.tap],
        steps.resets,
        outputs,
        reverse=static.reverse,
    )
    found = {name: _unpack(v, tiles, batch) for name, v in found.items()}
    gates = None
    if keep_gates:
        r, z, n, *q = jnp.unstack(found["gates"], axis=1)
        gates = Gates(r, z, n, None if before else q[0])
    return found["last"], (found["hs"], gates)


def fused_backward(
    static: Any,
    params: GRUParams,
    dh_last: Array,
    c: Coefficients,
    dhs: Array | None,
    steps: Any,
    scale: Array | None,
) -> tuple[Array, tuple[Array, Array | None]]:
    """dh before the first step; and of each step the whole cotangent of h_t, and dp where "before".

    static and steps as in `fused_forward`, and the cuts of steps; all in float32.
    """
    before, batch = c.reset is not None, dh_last.shape[:-1]
    k, k_a, slopes, reset = _fold_flags(c, steps, static.kept)
    per_step = [k, *slopes, k_a, reset] if before else [k, *slopes]
    if dhs is not None:
        per_step.append(dhs)
    tiles = _cut(dh_last, params.w_h.dtype, static.terms)
    if not dh_last.size or not len(k):
        return dh_last, (k, k if before else None)
    constants = {"h0": dh_last}
    if scale is not None:
        constants["scale"] = scale
    outputs = {"dhs": (_F32, ())}
    if before:
        outputs["dp"] = (_F32, ())
    found = _launch(
        "gru_backward",
        functools.partial(_backward_body, before, dhs is not None),
        Chip(tiles, static.backend == "interpreted"),
        [1, 2] if before else [3],
        jnp.stack(blocks(params.w_h)),
        constants,
        per_step,
        None,
        outputs,
        reverse=not static.reverse,
    )
    found = {name: _unpack(v, tiles, batch) for name, v in found.items()}
    return found["last"], (found["dhs"], found.get("dp"))


def _cut(h, dtype, terms):
    """The cut for a state [..., H]."""
    return cut(h.shape[-1], math.prod(h.shape[:-1]), dtype, terms)


def _pack(v, tiles):
    """A state [..., H] as float32 blocks [tiles, S, 64, N]."""
    return to_tiles(v.astype(_F32).reshape(tiles.batch_size, tiles.hidden_size), tiles)


def _pack_steps(values, tiles):
    """Arrays [T, ..., H] as float32 blocks [T, tiles, S, count, 64, N]."""
    shape = (len(values[0]), tiles.batch_size, tiles.hidden_size)
    return jnp.stack([to_tiles(v.astype(_F32).reshape(shape), tiles) for v in values], axis=3)


def _pack_resets(resets, tiles):
    """Resets [T, ..., 1] as [T, tiles, N] of 1 where the state lives on and 0 where it is reset."""
    live = 1 - resets.reshape(len(resets), tiles.batch_size).astype(_F32)
    return flags_to_tiles(live, tiles)


def _unpack(v, tiles, batch):
    """Blocks [T, count, tiles, S, 64, N], with fewer axes in front or none, as [..., *batch, H]."""
    return from_tiles(v, tiles).reshape(*v.shape[:-4], *batch, tiles.hidden_size)


def _fold_flags(c, steps, kept):
    """K, A, slopes and r (where "before") of a step that holds, resets, or cuts its gradient.

    Held: K = 1 and the others 0; a share that is kept goes to K. Reset or cut: dh_{t-1} is 0, but
    dp is not, which the gradient of w_hn needs.
    """
    k, k_a, reset, before = c.k, c.a, c.reset, c.reset is not None
    slopes = c.slopes if before else jnp.unstack(c.slopes[0], axis=-2)
    zero, one = jnp.zeros_like(k), jnp.ones_like(k)

    def of_dh(rule, slopes):
        """The rule on all slopes that are multiplied by dh: R is by dp, where "before"."""
        return [v if before and i == 0 else rule(v) for i, v in enumerate(slopes)]

    if kept:
        k, k_a = (1 - kept) * k + kept, (1 - kept) * k_a
        slopes = of_dh(lambda v: (1 - kept) * v, slopes)
    if steps.mask is not None:
        k, k_a = jnp.where(steps.mask, k, one), jnp.where(steps.mask, k_a, zero)
        slopes = of_dh(lambda v: jnp.where(steps.mask, v, zero), slopes)
    for flag in (steps.resets, steps.cuts):
        if flag is not None:
            flag = flag.reshape(flag.shape + (1,) * (k.ndim - flag.ndim))
            k, slopes = jnp.where(flag, zero, k), [jnp.where(flag, zero, v) for v in slopes]
            reset = None if reset is None else jnp.where(flag, zero, reset)
    return k, k_a, slopes, reset


def _forward_body(spec, kept, boards, at, h, inputs, live, fetch):
    """h_t from h_{t-1}, [64, N], and the blocks of a step; and what fetch() has of the next one.

    The boards hold what the products read: h, and r h where "before".
    """
    a_r, a_z, a_n, *tap = inputs
    h = h if live is None else jnp.where(live, h, jnp.zeros_like(h))
    read = h if "scale" not in at.constants else h * at.constants["scale"]
    boards[0].put([read])
    if spec.reset == "before":
        (v_r, v_z), fetched = boards[0].product([[0], [1]], fetch)
        r, z = jax.nn.sigmoid(a_r + v_r), jax.nn.sigmoid(a_z + v_z)
        boards[1].put([r * read])
        (v_n,), _ = boards[1].product([[2]])
        a_n, q = a_n + v_n, ()
    else:
        (v_r, v_z, v_n), fetched = boards[0].product([[0], [1], [2]], fetch)
        r, z = jax.nn.sigmoid(a_r + v_r), jax.nn.sigmoid(a_z + v_z)
        v_n = v_n if "b_q" not in at.constants else v_n + at.constants["b_q"]
        a_n, q = a_n + r * v_n, (v_n,)
    n = _ACTIVATIONS[spec.activation](a_n)
    new = z * h + (1 - z) * n if spec.update == "keep" else (1 - z) * h + z * n
    new = h + (1 - kept) * (new - h) if kept else new
    held = a_z == (jnp.inf if spec.update == "keep" else -jnp.inf)
    new = jnp.where(held, h, new)  # z h + (1 - z) n is not h where n or h is not finite
    new = new + tap[0] if tap else new
    at.write("hs", new)
    at.write("gates", r, z, n, *q)
    return new, fetched


def _backward_body(before, has_dhs, boards, at, dh, inputs, live, fetch):
    """dh_{t-1} from what later steps add to dh_t, [64, N], and the blocks of a step; and fetch().

    The boards hold what the products read: dh A, then [dp R | dh Z] where "before"; else
    [dh R | dh Z | dh Q].
    """
    del live
    if has_dhs:
        *inputs, dh_t = inputs
        dh = dh + dh_t
    at.write("dhs", dh)
    if before:
        k, k_r, k_z, k_a, r = inputs
        boards[0].put([dh * k_a])
        (dp,), _ = boards[0].product([[2]])
        at.write("dp", dp)
        boards[1].put([dp * k_r, dh * k_z])
        (dread,), fetched = boards[1].product([[0, 1]], fetch)
        dread = dread + dp * r
    else:
        k, k_r, k_z, k_q = inputs
        boards[0].put([dh * k_r, dh * k_z, dh * k_q])
        (dread,), fetched = boards[0].product([[0, 1, 2]], fetch)
    dread = dread if "scale" not in at.constants else dread * at.constants["scale"]
    return dh * k + dread, fetched


def _softplus(a):
    """log(1 + e^a). Mosaic has no log1p: log(u) y / (u - 1) is it, where u = 1 + y is rounded."""
    y = jnp.exp(-jnp.abs(a))
    u = 1 + y
    small = u == 1
    log1p = jnp.where(small, y, jnp.log(u) * y / jnp.where(small, jnp.ones_like(u), u - 1))
    return jnp.maximum(a, jnp.zeros_like(a)) + log1p


# Mosaic takes no function with derivatives of its own, as jax.nn's two are.
_ACTIVATIONS = ACTIVATIONS | {
    "relu": lambda a: jnp.maximum(a, jnp.zeros_like(a)),
    "softplus": _softplus,
}


def _launch(name, body, chip, groups, w, constants, per_step, resets, outputs, *, reverse):
    """Runs a body over all steps, tiles and slices; the outputs, and the last carry, by name.

    groups: of each board, how many operands lie on it. w [3, out, in]. constants [..., H], of which
    h0 is the first carry; per_step [T, ..., H], resets [T, ..., 1] or None. outputs: name -> dtype
    and, of several blocks a step, their count; [T, count, tiles, S, 64, N] come back.
    """
    tiles, block = chip.tiles, (UNITS, chip.tiles.rows)
    inputs = {"w": weights_to_tiles(w, tiles), "x": _pack_steps(per_step, tiles)}
    inputs |= {name: _pack(v, tiles) for name, v in constants.items()}
    if resets is not None:
        inputs["live"] = _pack_resets(resets, tiles)
    place, num_steps = (tiles.count, tiles.slices), len(per_step[0])
    results = {
        output: jax.ShapeDtypeStruct((num_steps, *count, *place, *block), dtype)
        for output, (dtype, count) in outputs.items()
    }
    results["last"] = jax.ShapeDtypeStruct((*place, *block), _F32)
    kind = board_kind(chip)
    wires = [kind.wire(chip, count) for count in groups]
    results |= {f"wire{i}": wire for i, wire in enumerate(wires) if wire is not None}
    names = [*inputs, *results]

    def kernel(*refs, weights, loaded, **scratch):
        refs = dict(zip(names, refs))
        boards = []
        for i, wire in enumerate(wires):
            extra = {} if wire is None else {"wire": refs[f"wire{i}"]}
            boards.append(kind(chip, weights, **scratch[f"board{i}"], **extra))
        _run(chip, body, refs, weights, loaded, boards, reverse)

    scratch = {
        "weights": chip.weights(),
        "loaded": chip.barriers(math.prod(inputs["w"].shape[1:4]), tiles.warpgroups),
        **{f"board{i}": kind.scratch(chip, count) for i, count in enumerate(groups)},
    }
    kernel.__name__ = name  # in profiles
    run = jax.custom_jvp(chip.kernel(kernel, list(results.values()), scratch))
    run.defjvp(_refuse_derivative)
    found = dict(zip(results, run(*inputs.values())))
    return vary_alike({name: found[name] for name in (*outputs, "last")}, list(inputs.values()))


def _refuse_derivative(primals, tangents):
    raise NotImplementedError(
        "gru: backend='fused' has first derivatives in reverse mode alone, and the derivative of "
        "one of them was asked for; use backend='scan', with gradient='tangent' for every order."
    )


def _run(chip, body, refs, weights, loaded, boards, reverse):
    """One warpgroup's part: its weights once, then its units of its tile, step after step."""
    num_steps = refs["x"].shape[0]
    tile, s, own = chip.place()
    for at in itertools.product(*map(range, refs["w"].shape[1:4])):
        chip.fetch(refs["w"].at[(s, *at)], weights.at[(own, *at)], loaded.at[own])
    for board in boards:
        board.open()
    chip.wait(loaded.at[own])
    constants = {n: chip.load(refs[n].at[tile, s]) for n in ("b_q", "scale") if n in refs}

    def time(i):
        return num_steps - 1 - i if reverse else i

    def load_step(i):
        t = time(jnp.minimum(i, jnp.int32(num_steps - 1)))
        x = [chip.load(refs["x"].at[t, tile, s, n]) for n in range(refs["x"].shape[3])]
        return x, chip.load_row(refs["live"].at[t, tile]) if "live" in refs else None

    def step(i, carry):
        h, x, live = carry

        def write(name, *values):
            for n, v in enumerate(values if name in refs else ()):
                at = (tile, s) if refs[name].ndim == 5 else (n, tile, s)
                chip.save(v, refs[name].at[(time(i), *at)])

        live = None if live is None else chip.spread(live) > 0.5
        at = _Step(write, constants)
        h, (x, live) = body(boards, at, h, x, live, lambda: load_step(i + jnp.int32(1)))
        return h, x, live

    first = (chip.load(refs["h0"].at[tile, s]), *load_step(jnp.int32(0)))
    h, *_ = lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), step, first)
    refs["last"].at[tile, s][...] = h
    for board in boards:
        board.close()


class _Step(NamedTuple):
    """What a body has at hand besides its operands."""

    write: Callable[..., None]  # a name and blocks [64, N], where there is such an output
    constants: dict[str, Any]  # name -> block [64, N]
