"""Zhiliang Tian's numbered equations (1)-(50), for both readings of their products.

The matrix form (7) computes W x; the index form (8) sums W_ij x_i over i, which is W^T x. z weighs
the candidate. Every printed gradient is that of sum_j h_j, so the upstream gradient is 1. With a
general upstream gradient delta, which belongs inside the innermost bracket::

    v_c = delta * z * tanh'(t)    v_z = delta * (h~ - h) * s'(tz)    v_r = (U^T v_c) * h * s'(tr)
    dW = v_c x^T    dU = v_c (r * h)^T    and so on; all matrices are transposed in the index form
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxgru
from experiments.derivation.draws import draw
from experiments.derivation.verdicts import (
    Row,
    attempt,
    evaluate,
    largest_error,
    relative_error,
)

LABEL = "Tian 2016"
TITLE = "Recurrent Unit and Gated Recurrent Unit (Zhiliang Tian, 2016)"
SIZE, NUM_STEPS = 4, 6  # all matrices of the document are N x N
GATES = {"W": "c", "U": "c", "Wz": "z", "Uz": "z", "Wr": "r", "Ur": "r"}
SINGLE = 1e-6  # the largest error that counts as exact in float32


class Reading(NamedTuple):
    """A meaning of the product of a weight and a vector, with its transpose and its gradient."""

    name: str
    apply: Callable
    transpose: Callable
    outer: Callable  # (v, c) -> the gradient of w, where v is the cotangent of apply(w, c)


MATRIX = Reading(
    "matrix form", lambda w, c: w @ c, lambda w, v: w.T @ v, lambda v, c: np.outer(v, c)
)
INDEX = Reading("index form", lambda w, c: w.T @ c, lambda w, v: w @ v, lambda v, c: np.outer(c, v))
READINGS = (MATRIX, INDEX)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def sigmoid_slope(a):
    """(18) as printed."""
    return np.exp(-a) / (1 + np.exp(-a)) ** 2


def tanh_slope(a):
    """(16) as printed."""
    return 4 / (np.exp(a) + np.exp(-a)) ** 2


def cell(weights, x, h, reading, nudges=None, read=None):
    """(11)-(14) in JAX: h_t.

    The nudges, zeros by default, are added to z, r and h~. `read` replaces r if it is given.
    """
    zero = jnp.zeros_like(h)
    nudges = nudges or {"z": zero, "r": zero, "h~": zero}
    apply = reading.apply
    r = jax.nn.sigmoid(apply(weights["Wr"], x) + apply(weights["Ur"], h)) + nudges["r"]
    r = r if read is None else read
    z = jax.nn.sigmoid(apply(weights["Wz"], x) + apply(weights["Uz"], h)) + nudges["z"]
    t = apply(weights["W"], x) + apply(weights["U"], r * h)
    candidate = jnp.tanh(t) + nudges["h~"]
    return z * candidate + (1 - z) * h


def forward(weights, x, h, reading):
    """{letter: value} of one step: the inputs, z, r, h~, h_t, the slopes and the weights."""
    apply = reading.apply
    tz = apply(weights["Wz"], x) + apply(weights["Uz"], h)
    tr = apply(weights["Wr"], x) + apply(weights["Ur"], h)
    z, r = sigmoid(tz), sigmoid(tr)
    t = apply(weights["W"], x) + apply(weights["U"], r * h)
    candidate = np.tanh(t)
    return {
        "x": x, "h": h, "z": z, "r": r, "hc": candidate, "ht": z * candidate + (1 - z) * h,
        "dt": tanh_slope(t), "dz": sigmoid_slope(tz), "dr": sigmoid_slope(tr), **weights,
    }  # fmt: skip


def vectors(v, delta, reading):
    """The cotangents v_c, v_z and v_r of t, tz and tr."""
    v_c = delta * v["z"] * v["dt"]
    v_z = delta * (v["hc"] - v["h"]) * v["dz"]
    return {"c": v_c, "z": v_z, "r": reading.transpose(v["U"], v_c) * v["h"] * v["dr"]}


def column_of(name, v):
    """The vector that the weight of this name multiplies: x, h or r * h."""
    return v["x"] if name.startswith("W") else v["r"] * v["h"] if name == "U" else v["h"]


def backward(v, delta, reading):
    """The corrected equations: every gradient of delta . h_t."""
    outer, transpose, slopes = reading.outer, reading.transpose, vectors(v, delta, reading)
    gradients = {name: outer(slopes[gate], column_of(name, v)) for name, gate in GATES.items()}
    gradients["x"] = sum(transpose(v[name], slopes[GATES[name]]) for name in ("Wz", "Wr", "W"))
    through = transpose(v["U"], slopes["c"]) * v["r"]
    gates = transpose(v["Uz"], slopes["z"]) + transpose(v["Ur"], slopes["r"])
    gradients["h"] = delta * (1 - v["z"]) + gates + through
    return gradients


def autodiff(weights, x, h, delta, reading):
    """JAX's gradients of delta . h_t with respect to weights, x and h, and to z, r and h~."""
    nudges = {name: np.zeros_like(h) for name in ("z", "r", "h~")}
    arguments = jax.tree.map(jnp.asarray, (weights, x, h, nudges))

    def loss(weights, x, h, nudges):
        return jnp.sum(delta * cell(weights, x, h, reading, nudges))

    of_weights, of_x, of_h, of_nudges = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arguments)
    return {**of_weights, "x": of_x, "h": of_h}, of_nudges


class Side(NamedTuple):
    """One reading: its values, and autodiff's gradients for delta = 1 and for a general delta."""

    reading: Reading
    v: dict
    ones: dict
    general: dict
    nudged: dict  # the gradients with respect to z, r and h~, for delta = 1
    nudged_general: dict  # the same for a general delta


def rows(generator):
    """Rows for every numbered equation that can be checked, in the order of the document."""
    weights = {name: draw(generator, SIZE, SIZE) for name in GATES}
    x, h, delta = draw(generator, 3, SIZE)
    sides = []
    for reading in READINGS:
        ones, nudged = autodiff(weights, x, h, np.ones(SIZE), reading)
        general, nudged_general = autodiff(weights, x, h, delta, reading)
        v = forward(weights, x, h, reading)
        sides.append(Side(reading, v, ones, general, nudged, nudged_general))
    return [
        *forward_rows(generator, weights, x, h, sides),
        *slope_rows(),
        *single_precision_rows(),
        *candidate_rows(sides, delta),
        *weight_rows(sides, delta),
        *chain_rows(sides, delta),
        *matrix_law_rows(generator),
        *label_rows(sides),
        *input_rows(sides),
        *state_rows(sides, delta),
        *parenthesis_rows(sides[0]),
        *time_rows(generator, weights, h),
    ]


def forward_rows(generator, weights, x, h, sides):
    """(1)-(14): the two readings, the sizes, and the effect of r = 0."""
    w = weights["W"]
    yield Row("(1), (2)", "W^T x + b, then W x + b", "NOTATION", relative_error(w.T @ x, w @ x),
              "one convention: W := W^T",
              relative_error(np.einsum("ji,i->j", w, x), w @ x))  # fmt: skip
    matrix, index = (side.v for side in sides)
    for place, name, products in (
        ("(5), (6)", "z", (("Wz", "x"), ("Uz", "h"))),
        ("(7), (8)", "hc", (("W", "x"), ("U", "rh"))),
        ("(9), (10)", "r", (("Wr", "x"), ("Ur", "h"))),
    ):
        columns = {"x": x, "h": h, "rh": matrix["r"] * h}
        total = sum(np.einsum("ji,i->j", weights[w], columns[c]) for w, c in products)
        summed = np.tanh(total) if name == "hc" else sigmoid(total)
        yield Row(place, "W x = sum_i W_ij x_i", "WRONG", relative_error(index[name], matrix[name]),
                  "sum_i W_ji x_i", relative_error(summed, matrix[name]))  # fmt: skip
    for side, place in zip(sides, ("(3), (11)-(14)", "(4), index form")):
        true = cell(jax.tree.map(jnp.asarray, weights), x, jnp.asarray(h), side.reading)
        yield Row(place, "h_t", "OK", relative_error(side.v["ht"], true))
    yield size_row(generator)
    yield reset_row(sides[0])


def size_row(generator):
    """W is N x D, and N x N only if input and state have the same size."""
    wide = SIZE + 1
    weights = {
        name: draw(generator, SIZE, wide if name.startswith("W") else SIZE) for name in GATES
    }
    x, h, delta = draw(generator, wide), *draw(generator, 2, SIZE)
    want, _ = autodiff(weights, x, h, delta, MATRIX)
    fixed = largest_error(backward(forward(weights, x, h, MATRIX), delta, MATRIX), want)
    printed = attempt("W @ x", np.zeros(SIZE), W=weights["U"], x=x)
    return Row("2.3.2-2.3.4", "W is N x N, D = N + 1", "ILL-FORMED", printed, "W is N x D", fixed)


def reset_row(side):
    """With r = 0 the candidate does not depend on h, but (1 - z) * h and z still do."""
    v, zero = side.v, jnp.zeros(SIZE)
    weights = {name: jnp.asarray(v[name]) for name in GATES}
    jacobian = jax.jit(jax.jacobian(lambda h: cell(weights, v["x"], h, MATRIX, read=zero)))(v["h"])
    candidate = np.tanh(v["W"] @ v["x"])
    fixed = np.diag(1 - v["z"]) + np.diag((candidate - v["h"]) * v["dz"]) @ v["Uz"]
    printed = relative_error(np.zeros((SIZE, SIZE)), jacobian)
    cure = "only the candidate forgets"
    error = relative_error(fixed, jacobian)
    return Row("2.3.4, r = 0", "forgets all of h", "TEXT", printed, cure, error)


def slope_rows():
    """(15)-(18) without overflow, and where exp or its square overflows."""
    a = np.linspace(-4, 4, 9)

    def reference(function):
        return jax.vmap(jax.grad(function))(jnp.asarray(a))

    exponentials = (np.exp(a) - np.exp(-a)) / (np.exp(a) + np.exp(-a))
    yield Row("(15)", "tanh, |x| <= 4", "OK", relative_error(exponentials, jnp.tanh(a)))
    yield Row("(16)", "tanh'", "OK", relative_error(tanh_slope(a), reference(jnp.tanh)))
    yield Row("(17)", "s", "OK", relative_error(sigmoid(a), jax.nn.sigmoid(a)))
    error = relative_error(sigmoid_slope(a), reference(jax.nn.sigmoid))
    yield Row("(18)", "s', |x| <= 4", "OK", error)
    with np.errstate(all="ignore"):
        x = np.asarray(710.0)
        printed = relative_error((np.exp(x) - np.exp(-x)) / (np.exp(x) + np.exp(-x)), 1.0)
        error = relative_error(np.tanh(x), jnp.tanh(x))
        yield Row("(15), x = 710", "inf / inf", "UNSAFE", printed, "tanh", error)
        yield Row(
            "(17), x = -1000", "1 / inf", "OK", relative_error(sigmoid(np.asarray(-1e3)), 0.0)
        )
        for x, says in ((-360.0, "square overflows to 0"), (-710.0, "inf / inf^2")):
            z = math.exp(x) / (1 + math.exp(x))
            printed = relative_error(sigmoid_slope(np.asarray(x)), math.exp(x))
            error = relative_error(z * (1 - z), math.exp(x))
            yield Row(f"(18), x = {x:.0f}", says, "UNSAFE", printed, "z (1 - z)", error)


def single_precision_rows():
    """The same overflows in float32, which occur at an eighth of the argument."""

    def single(x):
        return np.asarray(x, np.float32)

    with np.errstate(all="ignore"):
        up, down = np.exp(single(100)), np.exp(single(-100))
        printed = relative_error((up - down) / (up + down), 1.0)
        error = relative_error(np.tanh(single(100)), 1.0)
        place = "(15), float32 x = 100"
        yield Row(place, "inf / inf", "UNSAFE", printed, "tanh", error, SINGLE)
        printed = relative_error(sigmoid_slope(single(-60)), math.exp(-60))
        z = sigmoid(single(-60))
        error = relative_error(z * (1 - z), math.exp(-60))
        place, says = "(18), float32 x = -60", "square overflows to 0"
        yield Row(place, says, "UNSAFE", printed, "z (1 - z)", error, SINGLE)
        printed = relative_error(sigmoid_slope(single(-100)), math.exp(-100))
        z = np.exp(single(-80))
        error = relative_error(z * (1 - z), math.exp(-80))
        place, cure = "(18), float32 x = -100", "z (1 - z), here at x = -80"
        yield Row(place, "inf / inf^2", "UNSAFE", printed, cure, error, SINGLE)


def candidate_rows(sides, delta):
    """(19)-(23), (27), (28): derivatives with respect to h~ and z, and the entries of dW."""
    v, index = sides[0].v, sides[1].v
    for place, got, name in (("(19), (20)", v["z"], "h~"), ("(27), (28)", v["hc"] - v["h"], "z")):
        says = "dh/dh~ = z" if name == "h~" else "dh/dz = h~ - h"
        yield Row(place, says, "OK", relative_error(got, sides[0].nudged[name]))
    for place, side in zip(("(21)", "(22)"), sides):
        printed = relative_error(side.reading.outer(side.v["dt"], side.v["x"]), side.ones["W"])
        fixed = relative_error(backward(side.v, delta, side.reading)["W"], side.general["W"])
        yield Row(place, "first factor dh/dh", "WRONG", printed, "dh/dh~", fixed)
    printed = relative_error(np.einsum("j,i->ij", v["z"] * v["dt"], v["x"]), sides[0].ones["W"])
    entries = np.einsum("j,i->ij", index["z"] * index["dt"], index["x"])
    fixed = relative_error(entries, sides[1].ones["W"])
    cure = "only the index form (8)"
    yield Row("(23), matrix form", "dh/dW_ij = z_j tanh'_j x_i", "NOTATION", printed, cure, fixed)
    entries = np.einsum("j,i->ji", v["z"] * v["dt"], v["x"])
    fixed = relative_error(entries, sides[0].ones["W"])
    yield Row("(23), subscripts", "dh/dW_ij", "NOTATION", printed, "matrix form: dh/dW_ji", fixed)


def weight_rows(sides, delta):
    """(column v){c, ..., c} as a matrix product, as a broadcast, and as v c^T or c v^T.

    The last row of each weight has delta outside the bracket.
    """
    places = {"W": "(25)", "U": "(26)", "Wz": "(30)", "Uz": "(31)", "Wr": "(43)", "Ur": "(44)"}
    for name, place in places.items():
        for side in sides:
            v, reading = side.v, side.reading
            slopes = vectors(v, np.ones(SIZE), reading)[GATES[name]]
            columns = np.stack([column_of(name, v)] * SIZE, axis=1)
            fixed = max(
                relative_error(backward(v, np.ones(SIZE), reading)[name], side.ones[name]),
                relative_error(backward(v, delta, reading)[name], side.general[name]),
            )
            where = f"{place} d{name}, {reading.name}"
            cure = "v c^T" if reading is MATRIX else "c v^T = {c, ..., c} diag(v)"
            want, values = side.ones[name], {"v": slopes[:, None], "C": columns}
            yield Row(where, "(v){c, ..., c}", "ILL-FORMED", attempt("v @ C", want, **values),
                      cure, fixed)  # fmt: skip
            printed = relative_error(values["v"] * columns, want)
            yield Row(where, "v_i c_i", "WRONG", printed, cure, fixed)
        side = sides[0]
        v, slopes = side.v, vectors(side.v, np.ones(SIZE), MATRIX)[GATES[name]]
        error = relative_error(np.outer(delta * slopes, column_of(name, v)), side.general[name])
        if GATES[name] == "r":
            fixed = relative_error(backward(v, delta, MATRIX)[name], side.general[name])
            place, cure = f"{place}, delta", "delta inside: U^T(delta * ..)"
            yield Row(place, "delta * v", "WRONG", error, cure, fixed)
        else:
            yield Row(f"{place}, delta", "delta * v", "OK", error)


def chain_rows(sides, delta):
    """(32)-(35): derivatives with respect to r."""
    v, want = sides[0].v, sides[0].nudged["r"]
    chain = (v["z"] * v["dt"]) @ v["U"] @ np.diag(v["h"])
    yield Row("(32)-(34)", "row z * tanh', U, diag(h)", "OK", relative_error(chain, want))
    yield Row(
        "(35)", "(U^T(z * tanh')) * h", "OK", relative_error(chain_to_r(v, 1.0, MATRIX), want)
    )
    v, want = sides[1].v, sides[1].nudged["r"]
    printed = relative_error(chain_to_r(v, 1.0, MATRIX), want)
    fixed = relative_error(chain_to_r(v, 1.0, INDEX), want)
    yield Row("(35), index form", "U^T", "NOTATION", printed, "U", fixed)
    v, want = sides[0].v, sides[0].nudged_general["r"]
    printed = relative_error(delta * chain_to_r(v, 1.0, MATRIX), want)
    fixed = relative_error(chain_to_r(v, delta, MATRIX), want)
    yield Row("(35), delta", "delta * (..)", "NOTATION", printed, "(U^T(delta * ..)) * h", fixed)


def chain_to_r(v, delta, reading):
    """(U^T(delta * z * tanh')) * h, with U for the index form."""
    return reading.transpose(v["U"], delta * v["z"] * v["dt"]) * v["h"]


def matrix_law_rows(generator):
    """(36)-(41): y = W^T x, where W is N x M."""
    w, x, dx = draw(generator, 3, 5), *draw(generator, 2, 3)
    w_square = draw(generator, 3, 3)
    jacobian = jax.jacobian(lambda x: jnp.asarray(w).T @ x)(x)
    yield Row("(36), (38)", "dy/dx = W^T", "OK", relative_error(w.T, jacobian))
    subscripts = {"W": w, "rows": np.arange(5)[:, None], "columns": np.arange(3)[None, :]}
    printed = attempt("W[rows, columns]", jacobian, **subscripts)
    fixed = relative_error(evaluate("W[columns, rows]", **subscripts), jacobian)
    yield Row("(37), N != M", "dy_k/dx_i = W_ki", "ILL-FORMED", printed, "W_ik", fixed)
    square = jax.jacobian(lambda x: jnp.asarray(w_square).T @ x)(x)
    fixed = relative_error(w_square.T, square)
    yield Row("(37), N = M", "W_ki", "WRONG", relative_error(w_square, square), "W_ik", fixed)
    dy = draw(generator, 5)
    true_dx = jax.vjp(lambda x: jnp.asarray(w).T @ x, x)[1](jnp.asarray(dy))[0]
    tangent = jax.jvp(lambda x: jnp.asarray(w).T @ x, (x,), (dx,))[1]
    printed, fixed = relative_error(w.T @ true_dx, dy), relative_error(w.T @ dx, tangent)
    yield Row("(39)", "Delta(y) = W^T Delta(x)", "WRONG", printed, "only for tangents", fixed)
    yield Row("(40), (41)", "dJ/dx = W dJ/dy", "OK", relative_error(w @ dy, true_dx))
    dy = dy[:3]
    true_dx = jax.vjp(lambda x: jnp.asarray(w_square) @ x, x)[1](jnp.asarray(dy))[0]
    printed, fixed = (
        relative_error(w_square @ dy, true_dx),
        relative_error(w_square.T @ dy, true_dx),
    )
    yield Row("(41), y = W x", "dJ/dx = W dJ/dy", "NOTATION", printed, "W^T dJ/dy", fixed)


def label_rows(sides):
    """(42): the right-hand side is the gradient of Wr."""
    gradient = backward(sides[0].v, np.ones(SIZE), MATRIX)["Wr"]
    printed, fixed = (relative_error(gradient, sides[0].ones[name]) for name in ("Wz", "Wr"))
    yield Row("(42)", "left side dh/dWz", "WRONG", printed, "dh/dWr", fixed)


def products(v, names, reading, inner=None):
    """The transposed products with the cotangents for delta = 1, for z, r and c.

    `inner` is the reading of U inside the cotangent of r.
    """
    slopes = vectors(v, np.ones(SIZE), inner or reading)
    return [reading.transpose(v[name], slopes[gate]) for name, gate in zip(names, "zrc")]


def input_rows(sides):
    """(45)-(47): derivatives with respect to x."""
    names, (matrix, index) = ("Wz", "Wr", "W"), sides
    v, want = matrix.v, matrix.ones["x"]
    through_z, through_r, through_c = products(v, names, MATRIX)
    fixed = relative_error(through_z + through_r + through_c, want)
    printed = relative_error(through_z + through_r + v["W"].T @ v["dt"], want)
    yield Row("(45)", "last path dh/dh", "NOTATION", printed, "dh/dh~, r fixed in dh~/dx", fixed)
    spurious = v["Wz"].T @ ((v["ht"] - v["h"]) * v["dz"])
    printed = relative_error(spurious + through_r + through_c, want)
    yield Row("(46)", "(h_t - h) * s'(tz)", "WRONG", printed, "(h~ - h) * s'(tz)", fixed)
    printed = relative_error(sum(products(v, names, INDEX, MATRIX)), want)
    cure = "Wz^T(..) + Wr^T(..) + W^T(..)"
    yield Row("(47), matrix form", "Wz(..) + Wr(..) + W(..)", "WRONG", printed, cure, fixed)
    v, want = index.v, index.ones["x"]
    printed = relative_error(sum(products(v, names, INDEX, MATRIX)), want)
    fixed = relative_error(sum(products(v, names, INDEX)), want)
    yield Row("(47), index form", "U^T inside", "WRONG", printed, "U inside", fixed)


def state_rows(sides, delta):
    """(48)-(50): derivatives with respect to the state before."""
    names, (matrix, index) = ("Uz", "Ur", "U"), sides
    v, want = matrix.v, matrix.ones["h"]
    weights = {name: jnp.asarray(v[name]) for name in GATES}
    jacobian = jax.jit(jax.jacobian(lambda h: cell(weights, v["x"], h, MATRIX)))(v["h"])
    fixed = relative_error(state_jacobian(v), jacobian)
    yield Row("(48)", "(garbled)", "MISSING", None, "diag(1 - z) + paths through z, r, h~", fixed)
    fixed = relative_error(backward(v, np.ones(SIZE), MATRIX)["h"], want)
    through_z, through_r, through_c = products(v, names, MATRIX)
    spurious = v["Uz"].T @ ((v["ht"] - v["h"]) * v["dz"])
    printed = relative_error((1 - v["z"]) + spurious + through_r + through_c * v["r"], want)
    yield Row("(49)", "(h_t - h) * s'(tz)", "WRONG", printed, "(h~ - h) * s'(tz)", fixed)
    for side, cure in ((matrix, "every U transposed"), (index, "no U transposed")):
        through_z, through_r, through_c = products(side.v, names, INDEX, MATRIX)
        total = (1 - side.v["z"]) + through_z + through_r + through_c * side.v["r"]
        printed, place = relative_error(total, side.ones["h"]), f"(50), {side.reading.name}"
        fixed = largest_error(backward(side.v, delta, side.reading), side.general)
        yield Row(place, "Uz(..), Ur(.. U^T ..), U(..) r", "WRONG", printed, cure, fixed)
    after = delta * backward(v, np.ones(SIZE), MATRIX)["h"]
    printed = relative_error(after, matrix.general["h"])
    fixed = relative_error(backward(v, delta, MATRIX)["h"], matrix.general["h"])
    yield Row("(50), delta", "delta * (..)", "WRONG", printed, "delta inside every bracket", fixed)


def state_jacobian(v):
    """dh_t/dh = diag(1-z) + (dh/dz)(dz/dh) + (dh/dr)(dr/dh) + (dh/dh~)(dh~/dh).

    In the last term r is held fixed.
    """
    candidate = np.diag(v["z"] * v["dt"]) @ v["U"]
    through_z = np.diag((v["hc"] - v["h"]) * v["dz"]) @ v["Uz"]
    through_r = candidate @ np.diag(v["h"] * v["dr"]) @ v["Ur"]
    return np.diag(1 - v["z"]) + through_z + through_r + candidate @ np.diag(v["r"])


def parenthesis_rows(side):
    """(30), (33), (46), (47), (50): the printed equations close a bracket without opening it."""
    v, ones = side.v, np.ones(SIZE)
    vz, ut = "((hc - h) * dz)", "(U.T @ (z * dt))"
    for place, printed, fixed, want in (
        ("(30)", "(hc - h) * dz) @ X", f"{vz}[:, None] * x", side.ones["Wz"]),
        ("(33)", "(z * dt) @ (U @ (r * h)) / (r * h))", f"{ut} * h", side.nudged["r"]),
        ("(46)", f"{vz} @ Wz + {ut} * h * dr) @ Wr + (z * dt) @ W",
         f"{vz} @ Wz + ({ut} * h * dr) @ Wr + (z * dt) @ W", side.ones["x"]),
        ("(47)", f"Wz @ {vz} + Wr @ {ut} * h * dr) + W @ (z * dt)",
         f"Wz.T @ {vz} + Wr.T @ ({ut} * h * dr) + W.T @ (z * dt)", side.ones["x"]),
        ("(50)", f"1 - z + Uz @ (hc - h) * dz) + Ur @ ({ut} * h * dr) + (U @ (z * dt)) * r",
         f"1 - z + Uz.T @ {vz} + Ur.T @ ({ut} * h * dr) + {ut} * r", side.ones["h"]),
    ):  # fmt: skip
        error = attempt(fixed, want, **v, ones=ones)
        printed = attempt(printed, want, **v)
        yield Row(f"{place}, parentheses", "unbalanced", "ILL-FORMED", printed, "balanced", error)


def time_rows(generator, weights, h0):
    """Section 3.3 covers one step; over T steps, every dW is summed and dh is passed on."""
    xs, upstream = draw(generator, 2, NUM_STEPS, SIZE)
    for reading in READINGS:
        last, total = chain(weights, xs, h0, upstream, reading)
        want = chain_autodiff(weights, xs, h0, upstream, reading)
        printed = largest_error(
            {name: last[name] for name in GATES}, {name: want[name] for name in GATES}
        )
        place, cure = f"3.3, {reading.name}", "dW += over time, dh carried"
        fixed, says = largest_error(total, want), f"one step, T = {NUM_STEPS}"
        yield Row(place, says, "MISSING", printed, cure, fixed)
    yield package_row(weights, xs, h0, upstream)


def chain(weights, xs, h0, upstream, reading):
    """The corrected equations over T steps: (gradients of the last step, summed gradients)."""
    h, trace = h0, []
    for x in xs:
        trace.append(forward(weights, x, h, reading))
        h = trace[-1]["ht"]
    carried, steps = np.zeros(SIZE), []
    for v, delta in zip(reversed(trace), reversed(upstream)):
        steps.append(backward(v, delta + carried, reading))
        carried = steps[-1]["h"]
    total = {name: sum(step[name] for step in steps) for name in GATES}
    return steps[0], {**total, "h": carried, "x": np.stack([step["x"] for step in steps[::-1]])}


def chain_autodiff(weights, xs, h0, upstream, reading):
    """JAX's gradients of sum_t upstream_t . h_t."""

    def loss(weights, xs, h):
        def body(h, x):
            h = cell(weights, x, h, reading)
            return h, h

        return jnp.sum(jax.lax.scan(body, h, xs)[1] * upstream)

    arguments = jax.tree.map(jnp.asarray, (weights, xs, h0))
    of_weights, of_xs, of_h = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    return {**of_weights, "x": of_xs, "h": of_h}


def package_row(weights, xs, h0, upstream):
    """Compares the equations over T steps with the gradient of `jaxgru.gru`, blocks r | z | c."""
    _, total = chain(weights, xs, h0, upstream, MATRIX)

    def packed(table):
        blocks = {"w_x": ("Wr", "Wz", "W"), "w_h": ("Ur", "Uz", "U")}
        return {key: jnp.concatenate([table[w].T for w in row], 1) for key, row in blocks.items()}

    def loss(params, xs, h0):
        return jnp.sum(jaxgru.gru(params, xs, h0)[1] * upstream)

    params = jaxgru.GRUParams(**packed(weights), b_x=None, b_h=None, spec=jaxgru.CHUNG_2014)
    arguments = params, jnp.asarray(xs), jnp.asarray(h0)
    of_params, of_xs, of_h0 = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    want = {"w_x": of_params.w_x, "w_h": of_params.w_h, "x": of_xs, "h": of_h0}
    got = {**packed(total), "x": total["x"], "h": total["h"]}
    says = "3.3 corrected = gru with CHUNG_2014"
    return Row("this package", says, "OK", largest_error(got, want))
