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

JAX calls Pallas for Mosaic GPU unstable: versions 0.10.2 and 0.11.2 are known to compile these
kernels.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgru.core.cell import ACTIVATIONS, Gates, drop_state
from jaxgru.core.gradient import Kernel
from jaxgru.core.matmul import blocks
from jaxgru.core.sharding import cast_to_common_varying_axes
from jaxgru.experimental.fused.exchange import OperandBuffer
from jaxgru.experimental.fused.operations import HopperOps
from jaxgru.experimental.fused.tiling import (
    UNITS,
    choose_tiles,
    from_tiles,
    resets_to_tiles,
    to_tiles,
    weights_to_tiles,
)

_F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class FusedKernels(Kernel):
    """Both kernels with the static choices of a call: what `HopperKernel.prepare` returns."""

    interpret: bool
    splits: int  # bfloat16 numbers that stand for one operand

    def forward(self, config, recurrent, h, a, inputs, save_gates):
        """What `jaxgru.core.scan.scan_steps` computes: h after the chunk, and (hs, gates or None).

        On a masked step, the z among the gates is the one that keeps the state.
        """
        spec, flags = recurrent.spec, inputs.flags
        before = spec.reset == "before"
        if flags.mask is not None:  # z = 1 (or 0, where z is the candidate's share) keeps the state
            masked = jnp.full_like(a[1], jnp.inf if spec.update == "keep" else -jnp.inf)
            a = (a[0], jnp.where(flags.mask, a[1], masked), a[2])
        b_q = None if recurrent.b_q is None else jnp.broadcast_to(recurrent.b_q, h.shape)
        gates = ("r", "z", "n") if before else ("r", "z", "n", "q")
        h, found = _launch(
            self,
            "gru_forward",
            functools.partial(_forward_body, spec, flags.zoneout),
            [1, 1] if before else [1],
            jnp.stack([w.T for w in blocks(jnp.concatenate(recurrent.w, axis=-1))]),
            h,
            {"b_q": b_q, "dropout": recurrent.dropout},
            [*a, inputs.tap],
            flags.resets,
            {"hs": inputs.xs.dtype, **(dict.fromkeys(gates, _F32) if save_gates else {})},
            reverse=config.reverse,
        )
        if not save_gates:
            return h, (found["hs"], None)
        return h, (found["hs"], Gates(found["r"], found["z"], found["n"], found.get("q")))

    def backward(self, config, transposed, g, c, dhs, inputs):
        """What `jaxgru.core.bptt.reverse_scan` computes: g after the loop, and (dnew, dp, dtap)."""
        before = c.Q is None
        names = ("dhs", "dp") if before else ("dhs",)
        g, found = _launch(
            self,
            "gru_backward",
            functools.partial(_backward_body, before, dhs is not None),
            [1, 2] if before else [3],
            jnp.stack(blocks(jnp.concatenate(transposed.w, axis=0).T)),
            g,
            {"dropout": transposed.dropout},
            [*_fold_flags(c, inputs.flags), dhs],
            None,
            dict.fromkeys(names, _F32),
            reverse=not config.reverse,
        )
        dhs = found["dhs"]
        dtap = None if inputs.tap is None else dhs
        return g, (inputs.flags.leave_vjp(dhs)[0], found.get("dp"), dtap)


def _fold_flags(c, flags):
    """The local derivatives of steps that are masked, reset, or cut the gradient.

    They are K, R, Z, A, r for "before", and K, R, Z, Q for "after". On a masked step K = 1 and the
    others that multiply dnew are 0; zoneout's mean adds to K. On a reset or cut step dh_{t-1} is 0,
    but dp is not: the gradient of w_hn needs it.
    """

    def leave(v, of_h_tm1=0.0):
        return flags.leave(v, jnp.full_like(v, of_h_tm1))

    enter = flags.enter_linear
    k, k_z = enter(leave(c.K, 1.0)), enter(leave(c.Z))
    if c.Q is not None:
        return [k, enter(leave(c.R)), k_z, enter(leave(c.Q))]
    return [k, enter(c.R), k_z, leave(c.A), enter(c.r)]  # R and r multiply dp


def _forward_body(spec, zoneout, buffers, constants, write, h, inputs, fetch):
    """h_t from what the step reads of h_{t-1}, [64, N], and its inputs; and fetch().

    The buffers hold what the products read: h, and r h for "before".
    """
    a_r, a_z, a_n, *tap = inputs
    read = drop_state(h, constants.get("dropout"))
    buffers[0].write([read])
    if spec.reset == "before":
        (v_r, v_z), fetched = buffers[0].multiply([[0], [1]], fetch)
        r, z = jax.nn.sigmoid(a_r + v_r), jax.nn.sigmoid(a_z + v_z)
        buffers[1].write([r * read])
        (v_n,), _ = buffers[1].multiply([[2]])
        a_n = a_n + v_n
    else:
        (v_r, v_z, v_n), fetched = buffers[0].multiply([[0], [1], [2]], fetch)
        r, z = jax.nn.sigmoid(a_r + v_r), jax.nn.sigmoid(a_z + v_z)
        v_n = v_n if "b_q" not in constants else v_n + constants["b_q"]
        a_n = a_n + r * v_n
        write("q", v_n)
    n = _ACTIVATIONS[spec.activation](a_n)
    new = z * h + (1 - z) * n if spec.update == "keep" else (1 - z) * h + z * n
    new = h + (1 - zoneout) * (new - h) if zoneout else new
    masked = a_z == (jnp.inf if spec.update == "keep" else -jnp.inf)
    new = jnp.where(masked, h, new)  # z h + (1 - z) n is not h where n or h is not finite
    new = new + tap[0] if tap else new
    for name, v in (("hs", new), ("r", r), ("z", z), ("n", n)):
        write(name, v)
    return new, fetched


def _backward_body(before, has_dhs, buffers, constants, write, dh, inputs, fetch):
    """dh_{t-1} from the part of dh_t that later steps give, [64, N], and a step's inputs; fetch().

    The buffers hold what the products read: dh A, then [dp R | dh Z] for "before"; otherwise
    [dh R | dh Z | dh Q].
    """
    if has_dhs:
        *inputs, dh_t = inputs
        dh = dh + dh_t
    write("dhs", dh)
    if before:
        k, k_r, k_z, k_a, r = inputs
        buffers[0].write([dh * k_a])
        (dp,), _ = buffers[0].multiply([[2]])
        write("dp", dp)
        buffers[1].write([dp * k_r, dh * k_z])
        (dread,), fetched = buffers[1].multiply([[0, 1]], fetch)
        dread = dread + dp * r
    else:
        k, k_r, k_z, k_q = inputs
        buffers[0].write([dh * k_r, dh * k_z, dh * k_q])
        (dread,), fetched = buffers[0].multiply([[0, 1, 2]], fetch)
    return dh * k + drop_state(dread, constants.get("dropout")), fetched


def _softplus(a):
    """log(1 + e^a). Mosaic has no log1p; with u = 1 + y rounded, log1p(y) = log(u) y / (u - 1)."""
    y = jnp.exp(-jnp.abs(a))
    u = 1 + y
    small = u == 1
    log1p = jnp.where(small, y, jnp.log(u) * y / jnp.where(small, jnp.ones_like(u), u - 1))
    return jnp.maximum(a, jnp.zeros_like(a)) + log1p


# Mosaic does not accept a function with a custom derivative, as these two of jax.nn are.
_ACTIVATIONS = {name: f for name, (f, _) in ACTIVATIONS.items()} | {
    "relu": lambda a: jnp.maximum(a, jnp.zeros_like(a)),
    "softplus": _softplus,
}


def _launch(
    kernels, name, body, groups, w, initial, constants, per_step, resets, outputs, *, reverse
):
    """Runs a body over all steps, tiles and slices; returns the final carry, and outputs by name.

    Args:
      groups: the number of operands a slice in each buffer.
      w: [3, out, in].
      initial: the carry before the first step, [..., H].
      constants: name -> [..., H], or None for none.
      per_step: [T, ..., H] each, or None for none.
      resets: [T, ..., 1] or None.
      outputs: name -> dtype, whose result is [T, ..., H].
    """
    batch, num_steps = initial.shape[:-1], len(per_step[0])
    tiles = choose_tiles(initial.shape[-1], math.prod(batch), w.dtype, kernels.splits)
    per_step = [to_tiles(v, tiles, num_steps) for v in per_step if v is not None]
    inputs = {"w": weights_to_tiles(w, tiles), "x": jnp.stack(per_step, axis=3)}
    constants = {"initial": initial, **constants}
    inputs |= {name: to_tiles(v, tiles) for name, v in constants.items() if v is not None}
    if resets is not None:
        inputs["not_reset"] = resets_to_tiles(resets, tiles)
    block = (tiles.count, tiles.slices, UNITS, tiles.rows)
    results = {n: jax.ShapeDtypeStruct((num_steps, *block), d) for n, d in outputs.items()}
    results["final"] = jax.ShapeDtypeStruct(block, _F32)
    if initial.size and num_steps:
        ops = HopperOps(tiles, kernels.interpret)
        found = _call_kernel(ops, name, body, groups, inputs, results, reverse)
    else:
        found = {**jax.tree.map(jnp.zeros_like, results), "final": inputs["initial"]}
    found = cast_to_common_varying_axes(found, inputs)
    found = {name: from_tiles(found[name], tiles, batch) for name in results}
    return found.pop("final"), found


def _call_kernel(ops, name, body, groups, inputs, results, reverse):
    """The results by name, for arrays in tiles."""
    copies = {f"copy{i}": ops.device_copy(count) for i, count in enumerate(groups)}
    results = results | {name: copy for name, copy in copies.items() if copy is not None}
    names = [*inputs, *results]

    def kernel(*refs, weights, loaded, barrier, operands):
        refs, only = dict(zip(names, refs)), len(groups) == 1
        buffers = [
            OperandBuffer(ops, weights, barrier, only, of_buffer, refs.get(copy))
            for of_buffer, copy in zip(operands, copies)
        ]
        _run(ops, body, refs, weights, loaded, buffers, reverse)

    scratch = {
        "weights": ops.shared_memory(ops.tiles.warpgroups, *inputs["w"].shape[1:]),
        "loaded": ops.gpu.Barrier(
            num_arrivals=math.prod(inputs["w"].shape[1:4]), num_barriers=ops.tiles.warpgroups
        ),
        "barrier": ops.barrier(),
        "operands": [ops.operand_buffer(count) for count in groups],
    }
    kernel.__name__ = name  # in profiles
    run = jax.custom_jvp(ops.kernel(kernel, list(results.values()), scratch))
    run.defjvp(_refuse_derivative)
    return dict(zip(results, run(*inputs.values())))


def _refuse_derivative(primals, tangents):
    raise NotImplementedError(
        "HopperKernel: it has first derivatives in reverse mode only, and a derivative of its "
        "kernels was requested; use gradient='tangent' for every order."
    )


def _run(ops, body, refs, weights, loaded, buffers, reverse):
    """The work of one warpgroup: it loads its weights once, then runs its tile step by step."""
    num_steps = refs["x"].shape[0]
    tile, s, warpgroup = ops.indices()
    for at in np.ndindex(refs["w"].shape[1:4]):
        source, target = refs["w"].at[(s, *at)], weights.at[(warpgroup, *at)]
        ops.gpu.copy_gmem_to_smem(source, target, loaded.at[warpgroup])
    for buffer in buffers:
        buffer.signal_read()  # it holds nothing yet
    ops.gpu.barrier_wait(loaded.at[warpgroup])
    constants = {n: ops.load(refs[n].at[tile, s]) for n in ("b_q", "dropout") if n in refs}

    def time(i):
        return num_steps - 1 - i if reverse else i

    def load_step(i):
        t = time(jnp.minimum(i, jnp.int32(num_steps - 1)))
        x = [ops.load(refs["x"].at[t, tile, s, n]) for n in range(refs["x"].shape[3])]
        return x, ops.load(refs["not_reset"].at[t, tile]) if "not_reset" in refs else None

    def step(i, carry):
        h, x, not_reset = carry

        def write(name, v):
            """Writes a block [64, N] to an output; nothing where there is no such output."""
            if name in refs:
                ops.write(v, refs[name].at[time(i), tile, s])

        if not_reset is not None:
            not_reset = lax.broadcast_in_dim(not_reset, h.shape, (1,)) > 0.5
            h = jnp.where(not_reset, h, jnp.zeros_like(h))
        h, (x, not_reset) = body(
            buffers, constants, write, h, x, lambda: load_step(i + jnp.int32(1))
        )
        return h, x, not_reset

    first = (ops.load(refs["initial"].at[tile, s]), *load_step(jnp.int32(0)))
    h, *_ = lax.fori_loop(jnp.int32(0), jnp.int32(num_steps), step, first)
    refs["final"].at[tile, s][...] = h
    for buffer in buffers:
        buffer.wait_read()
