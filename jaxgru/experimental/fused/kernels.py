"""The recurrence as one GPU kernel: the whole sequence forward, the whole sequence backward.

A kernel does only what is sequential, as do the scans of `jaxgru.core`. The projected inputs and
the local derivatives are its inputs; states and cotangents are its outputs; every weight gradient
is a bulk product outside it. `tiling` describes how a layer is divided. A warpgroup computes 64
hidden units of a few rows of the batch. w_h stays in shared memory, and the state (or its
cotangent) in registers, as float32. Each step has three parts:

    write      the warpgroup writes its operand to shared memory, where all slices read it
    multiply   its weights by the operands of all slices, on the tensor cores, sums in float32;
               meanwhile it loads the inputs of the next step
    gates      elementwise, in registers

The kernels have one flag, for resets. A masked step is one with a_z = +-inf, so that z keeps the
whole state. In the backward pass masks, resets, cuts and zoneout are part of the local derivatives.

The kernels are for Hopper GPUs, through Pallas and Mosaic; JAX's interpreter of such kernels runs
the same bodies on a CPU. JAX calls that API unstable: versions 0.10.2 and 0.11.2 are known to
compile these kernels.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgru.core.cell import ACTIVATIONS, Gates, Recurrent
from jaxgru.core.derivatives import Coefficients
from jaxgru.core.flags import Flags, choose
from jaxgru.core.matmul import blocks
from jaxgru.core.scan import Inputs
from jaxgru.core.sharding import cast_to_common_varying_axes
from jaxgru.experimental.fused.exchange import buffer_class
from jaxgru.experimental.fused.hopper import HopperOps
from jaxgru.experimental.fused.tiling import (
    UNITS,
    choose_tiles,
    pack_resets,
    pack_state,
    pack_steps,
    unpack,
    weights_to_tiles,
)

Array = jax.Array
_F32 = jnp.float32


def fused_forward(
    setting: "Setting",
    recurrent: Recurrent,
    h0: Array,
    a: Sequence[Array],
    inputs: Inputs,
    scale: Array | None,
    save_gates: bool,
) -> tuple[Array, tuple[Array, Gates | None]]:
    """What `jaxgru.core.scan.scan_chunk` returns; the chunk is the whole sequence.

    On a masked step, the z among the gates is the one that keeps the state.
    """
    spec, flags = recurrent.spec, inputs.flags
    before, keep = spec.reset == "before", spec.update == "keep"
    batch, num_steps = h0.shape[:-1], len(inputs.xs)
    if flags.mask is not None:  # z = 1 (or 0, where z is the candidate's share) keeps the state
        masked = jnp.full_like(a[1], jnp.inf if keep else -jnp.inf)
        a = (a[0], jnp.where(flags.mask, a[1], masked), a[2])
    w_h = jnp.concatenate(recurrent.w, axis=-1)
    tiles = _tiles(h0, w_h.dtype, setting.splits)
    if not h0.size or not num_steps:
        gates = Gates(a[0], a[1], a[2], None if before else a[2]) if save_gates else None
        return h0, (a[0].astype(inputs.xs.dtype), gates)
    constants = {"h0": h0}
    if recurrent.b_q is not None:
        constants["b_q"] = jnp.broadcast_to(recurrent.b_q, h0.shape)
    if scale is not None:
        constants["scale"] = scale
    outputs: dict[str, Any] = {"hs": (inputs.xs.dtype, ())}
    if save_gates:
        outputs["gates"] = (_F32, (3 if before else 4,))
    found = _launch(
        "gru_forward",
        functools.partial(_forward_body, spec, flags.zoneout_mean),
        HopperOps(tiles, setting.interpret),
        [1, 1] if before else [1],
        jnp.stack([w.T for w in blocks(w_h)]),
        constants,
        [*a] if inputs.tap is None else [*a, inputs.tap],
        flags.resets,
        outputs,
        reverse=setting.reverse,
    )
    found = {name: unpack(v, tiles, batch) for name, v in found.items()}
    gates = None
    if save_gates:
        r, z, n, *q = jnp.unstack(found["gates"], axis=1)
        gates = Gates(r, z, n, None if before else q[0])
    return found["last"], (found["hs"], gates)


def fused_backward(
    setting: "Setting",
    transposed: Recurrent,
    g: Array,
    c: Coefficients,
    dhs: Array | None,
    flags: Flags,
    scale: Array | None,
) -> tuple[Array, tuple[Array, Array | None]]:
    """g before the first step; for each step the whole cotangent of h_t, and dp for "before"."""
    before, batch = c.gate_r is not None, g.shape[:-1]
    k, k_a, slopes, reset = _fold_flags(c, flags)
    per_step = [k, *slopes, k_a, reset] if before else [k, *slopes]
    if dhs is not None:
        per_step.append(dhs)
    w_h = jnp.concatenate(transposed.w, axis=0).T
    tiles = _tiles(g, w_h.dtype, setting.splits)
    if not g.size or not len(k):
        return g, (k, k if before else None)
    constants = {"h0": g}
    if scale is not None:
        constants["scale"] = scale
    outputs = {"dhs": (_F32, ())}
    if before:
        outputs["dp"] = (_F32, ())
    found = _launch(
        "gru_backward",
        functools.partial(_backward_body, before, dhs is not None),
        HopperOps(tiles, setting.interpret),
        [1, 2] if before else [3],
        jnp.stack(blocks(w_h)),
        constants,
        per_step,
        None,
        outputs,
        reverse=not setting.reverse,
    )
    found = {name: unpack(v, tiles, batch) for name, v in found.items()}
    return found["last"], (found["dhs"], found.get("dp"))


class Setting(NamedTuple):
    """The static choices of a call."""

    reverse: bool
    interpret: bool
    splits: int  # bfloat16 numbers that stand for one operand


def _tiles(h, dtype, splits):
    """The tiles for a state [..., H]."""
    return choose_tiles(h.shape[-1], math.prod(h.shape[:-1]), dtype, splits)


def _fold_flags(c, flags):
    """K, A, slopes and r (for "before") of steps that are masked, reset, or cut the gradient.

    On a masked step K = 1 and the others are 0; zoneout's mean adds to K. On a reset or cut step
    dh_{t-1} is 0, but dp is not: the gradient of w_hn needs it.
    """
    k, k_a, reset, before = c.k, c.a, c.gate_r, c.gate_r is not None
    slopes = [c.r, c.z] if before else [c.r, c.z, c.q]

    def of_dh(rule, slopes):
        """The rule on all slopes that multiply dh; for "before", R multiplies dp instead."""
        return [v if before and i == 0 else rule(v) for i, v in enumerate(slopes)]

    if share := flags.zoneout_mean:
        k, k_a = (1 - share) * k + share, (1 - share) * k_a
        slopes = of_dh(lambda v: (1 - share) * v, slopes)
    if flags.mask is not None:
        k, k_a = choose(flags.mask, k, jnp.ones_like(k)), choose(flags.mask, k_a, jnp.zeros_like(k))
        slopes = of_dh(lambda v: choose(flags.mask, v, jnp.zeros_like(v)), slopes)
    k, slopes = flags.enter_linear(k), [flags.enter_linear(v) for v in slopes]
    return k, k_a, slopes, None if reset is None else flags.enter_linear(reset)


def _forward_body(spec, kept, buffers, at, h, inputs, not_reset, fetch):
    """h_t from h_{t-1}, [64, N], and the inputs of a step; and what fetch() loads of the next one.

    The buffers hold what the products read: h, and r h for "before".
    """
    a_r, a_z, a_n, *tap = inputs
    h = h if not_reset is None else jnp.where(not_reset, h, jnp.zeros_like(h))
    read = h if "scale" not in at.constants else h * at.constants["scale"]
    buffers[0].write([read])
    if spec.reset == "before":
        (v_r, v_z), fetched = buffers[0].multiply([[0], [1]], fetch)
        r, z = jax.nn.sigmoid(a_r + v_r), jax.nn.sigmoid(a_z + v_z)
        buffers[1].write([r * read])
        (v_n,), _ = buffers[1].multiply([[2]])
        a_n, q = a_n + v_n, ()
    else:
        (v_r, v_z, v_n), fetched = buffers[0].multiply([[0], [1], [2]], fetch)
        r, z = jax.nn.sigmoid(a_r + v_r), jax.nn.sigmoid(a_z + v_z)
        v_n = v_n if "b_q" not in at.constants else v_n + at.constants["b_q"]
        a_n, q = a_n + r * v_n, (v_n,)
    n = _ACTIVATIONS[spec.activation](a_n)
    new = z * h + (1 - z) * n if spec.update == "keep" else (1 - z) * h + z * n
    new = h + (1 - kept) * (new - h) if kept else new
    masked = a_z == (jnp.inf if spec.update == "keep" else -jnp.inf)
    new = jnp.where(masked, h, new)  # z h + (1 - z) n is not h where n or h is not finite
    new = new + tap[0] if tap else new
    at.write("hs", new)
    at.write("gates", r, z, n, *q)
    return new, fetched


def _backward_body(before, has_dhs, buffers, at, dh, inputs, not_reset, fetch):
    """dh_{t-1} from the part of dh_t that later steps give, [64, N], and a step's inputs; fetch().

    The buffers hold what the products read: dh A, then [dp R | dh Z] for "before"; otherwise
    [dh R | dh Z | dh Q].
    """
    del not_reset
    if has_dhs:
        *inputs, dh_t = inputs
        dh = dh + dh_t
    at.write("dhs", dh)
    if before:
        k, k_r, k_z, k_a, r = inputs
        buffers[0].write([dh * k_a])
        (dp,), _ = buffers[0].multiply([[2]])
        at.write("dp", dp)
        buffers[1].write([dp * k_r, dh * k_z])
        (dread,), fetched = buffers[1].multiply([[0, 1]], fetch)
        dread = dread + dp * r
    else:
        k, k_r, k_z, k_q = inputs
        buffers[0].write([dh * k_r, dh * k_z, dh * k_q])
        (dread,), fetched = buffers[0].multiply([[0, 1, 2]], fetch)
    dread = dread if "scale" not in at.constants else dread * at.constants["scale"]
    return dh * k + dread, fetched


def _softplus(a):
    """log(1 + e^a). Mosaic has no log1p; with u = 1 + y rounded, log1p(y) = log(u) y / (u - 1)."""
    y = jnp.exp(-jnp.abs(a))
    u = 1 + y
    small = u == 1
    log1p = jnp.where(small, y, jnp.log(u) * y / jnp.where(small, jnp.ones_like(u), u - 1))
    return jnp.maximum(a, jnp.zeros_like(a)) + log1p


# Mosaic does not accept a function with a custom derivative, as these two of jax.nn are.
_ACTIVATIONS = ACTIVATIONS | {
    "relu": lambda a: jnp.maximum(a, jnp.zeros_like(a)),
    "softplus": _softplus,
}


def _launch(name, body, ops, groups, w, constants, per_step, resets, outputs, *, reverse):
    """Runs a body over all steps, tiles and slices; returns the outputs and the last carry by name.

    Args:
      groups: the number of operands a slice in each buffer.
      w: [3, out, in].
      constants: name -> [..., H]; h0 is the first carry.
      per_step: [T, ..., H] each.
      resets: [T, ..., 1] or None.
      outputs: name -> dtype, and (count,) if a step writes several blocks; the results are
        [T, count, tiles, S, 64, N].
    """
    tiles, block = ops.tiles, (UNITS, ops.tiles.rows)
    inputs = {"w": weights_to_tiles(w, tiles), "x": pack_steps(per_step, tiles)}
    inputs |= {name: pack_state(v, tiles) for name, v in constants.items()}
    if resets is not None:
        inputs["not_reset"] = pack_resets(resets, tiles)
    place, num_steps = (tiles.count, tiles.slices), len(per_step[0])
    results = {
        output: jax.ShapeDtypeStruct((num_steps, *count, *place, *block), dtype)
        for output, (dtype, count) in outputs.items()
    }
    results["last"] = jax.ShapeDtypeStruct((*place, *block), _F32)
    kind = buffer_class(ops)
    gmems = [kind.global_memory(ops, count) for count in groups]
    results |= {f"gmem{i}": gmem for i, gmem in enumerate(gmems) if gmem is not None}
    names = [*inputs, *results]

    def kernel(*refs, weights, loaded, **scratch):
        refs = dict(zip(names, refs))
        buffers = []
        for i, gmem in enumerate(gmems):
            extra = {} if gmem is None else {"gmem": refs[f"gmem{i}"]}
            buffers.append(kind(ops, weights, **scratch[f"buffer{i}"], **extra))
        _run(ops, body, refs, weights, loaded, buffers, reverse)

    scratch = {
        "weights": ops.weight_buffer(),
        "loaded": ops.barriers(math.prod(inputs["w"].shape[1:4]), tiles.warpgroups),
        **{f"buffer{i}": kind.scratch(ops, count) for i, count in enumerate(groups)},
    }
    kernel.__name__ = name  # in profiles
    run = jax.custom_jvp(ops.kernel(kernel, list(results.values()), scratch))
    run.defjvp(_refuse_derivative)
    found = dict(zip(results, run(*inputs.values())))
    return cast_to_common_varying_axes(
        {name: found[name] for name in (*outputs, "last")}, list(inputs.values())
    )


def _refuse_derivative(primals, tangents):
    raise NotImplementedError(
        "HopperKernel: it has first derivatives in reverse mode only, and a derivative of its "
        "kernels was requested; use gradient='tangent' for every order."
    )


def _run(ops, body, refs, weights, loaded, buffers, reverse):
    """The work of one warpgroup: it loads its weights once, then runs its tile step by step."""
    num_steps = refs["x"].shape[0]
    tile, s, own = ops.indices()
    for at in itertools.product(*map(range, refs["w"].shape[1:4])):
        ops.copy_in(refs["w"].at[(s, *at)], weights.at[(own, *at)], loaded.at[own])
    for buffer in buffers:
        buffer.open()
    ops.wait(loaded.at[own])
    constants = {n: ops.load(refs[n].at[tile, s]) for n in ("b_q", "scale") if n in refs}

    def time(i):
        return num_steps - 1 - i if reverse else i

    def load_step(i):
        t = time(jnp.minimum(i, jnp.int32(num_steps - 1)))
        x = [ops.load(refs["x"].at[t, tile, s, n]) for n in range(refs["x"].shape[3])]
        return x, ops.load_row(refs["not_reset"].at[t, tile]) if "not_reset" in refs else None

    def step(i, carry):
        h, x, not_reset = carry

        def write(name, *values):
            for n, v in enumerate(values if name in refs else ()):
                at = (tile, s) if refs[name].ndim == 5 else (n, tile, s)
                ops.write(v, refs[name].at[(time(i), *at)])

        if not_reset is not None:
            not_reset = ops.broadcast_row(not_reset) > 0.5
        at = _Step(write, constants)
        h, (x, not_reset) = body(buffers, at, h, x, not_reset, lambda: load_step(i + jnp.int32(1)))
        return h, x, not_reset

    first = (ops.load(refs["h0"].at[tile, s]), *load_step(jnp.int32(0)))
    h, *_ = lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), step, first)
    refs["last"].at[tile, s][...] = h
    for buffer in buffers:
        buffer.close()


class _Step(NamedTuple):
    """What a body uses besides its operands."""

    write: Callable[..., None]  # a name and blocks [64, N]; does nothing without such an output
    constants: dict[str, Any]  # name -> block [64, N]
