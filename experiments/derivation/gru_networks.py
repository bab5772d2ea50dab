"""The article's Jacobian dh_t/dh_{t-1}, its product over time, and its three cases.

The article uses column vectors, one matrix for each gate that multiplies [h; x], and no biases. In
its box z weighs the candidate; in the formula below the box and in the rest of the article z weighs
the previous state, as here::

    dh_t/dh = diag(z) + diag(1 - z) dh~/dh + diag((h - h~) z (1 - z)) U_z
    dh~/dh  = diag(1 - h~^2) U (diag(r) + diag(h r (1 - r)) U_r)

The printed Jacobian lacks both paths through the gates, which have the factors z (1 - z) and
r (1 - r). So it is right only in the limit of saturated gates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxgru
from experiments.derivation.draws import draw
from experiments.derivation.verdicts import (
    EXACT,
    Row,
    absolute_error,
    attempt,
    largest_error,
    relative_error,
)

LABEL = "GRU networks"
TITLE = "Gated Recurrent Unit Networks (no author printed)"
INPUT_SIZE, HIDDEN_SIZE, OUTPUT_SIZE, NUM_STEPS = 3, 4, 3, 8
SHIFTS = (0, 2, 4, 8, 16, 32)
SATURATED = 40.0  # s(-40) = 4e-18


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def cell(weights, x, h, keep, shift=(0.0, 0.0)):
    """h_t and h~ in JAX; shift is added to the pre-activations of z and r."""
    stacked = jnp.concatenate([h, x])
    z = jax.nn.sigmoid(weights["z"] @ stacked + shift[0])
    r = jax.nn.sigmoid(weights["r"] @ stacked + shift[1])
    candidate = jnp.tanh(weights["h"] @ jnp.concatenate([r * h, x]))
    return (z * h + (1 - z) * candidate if keep else (1 - z) * h + z * candidate), candidate


def values_of(weights, x, h, shift=(0.0, 0.0)):
    """{letter: value} of gates and candidate; 1 - z is s(-a), which is exact when z saturates."""
    stacked = np.concatenate([h, x])
    a_z, a_r = weights["z"] @ stacked + shift[0], weights["r"] @ stacked + shift[1]
    z, r = sigmoid(a_z), sigmoid(a_r)
    candidate = np.tanh(weights["h"] @ np.concatenate([r * h, x]))
    letters = {"x": x, "h": h, "z": z, "r": r, "hc": candidate, "rest": sigmoid(-a_z)}
    return {**letters, "dr": r * sigmoid(-a_r)}


def candidate_jacobian(weights, v, gates=True):
    """dh~/dh, with or without the path through r."""
    u, u_r = weights["h"][:, :HIDDEN_SIZE], weights["r"][:, :HIDDEN_SIZE]
    inner = np.diag(v["r"]) + (np.diag(v["h"] * v["dr"]) @ u_r if gates else 0.0)
    return np.diag(1 - v["hc"] ** 2) @ u @ inner


def jacobian(weights, v, keep=True, gates=True, inner_gates=None):
    """dh_t/dh, with or without the path through z, and through r inside the candidate."""
    inner = candidate_jacobian(weights, v, gates if inner_gates is None else inner_gates)
    kept, written = (v["z"], v["rest"]) if keep else (v["rest"], v["z"])
    slope = (v["h"] - v["hc"] if keep else v["hc"] - v["h"]) * v["z"] * v["rest"]
    through_z = np.diag(slope) @ weights["z"][:, :HIDDEN_SIZE] if gates else 0.0
    return np.diag(kept) + np.diag(written) @ inner + through_z


def autodiff(weights, x, h, keep=True, shift=(0.0, 0.0)):
    """(dh_t/dh, dh~/dh) by JAX."""
    return _jacobians(weights, x, h, keep, jnp.asarray(shift))


@functools.partial(jax.jit, static_argnames="keep")
def _jacobians(weights, x, h, keep, shift):
    return jax.jacobian(lambda h: cell(weights, x, h, keep, shift))(h)


def rows(generator):
    """Rows for every statement of the article that can be checked, in its order."""
    columns = HIDDEN_SIZE + INPUT_SIZE
    weights = {gate: draw(generator, HIDDEN_SIZE, columns, low=0.3, high=0.9) for gate in "zrh"}
    head = draw(generator, OUTPUT_SIZE, HIDDEN_SIZE)
    xs, h0 = draw(generator, NUM_STEPS, INPUT_SIZE), draw(generator, HIDDEN_SIZE)
    targets = np.eye(OUTPUT_SIZE)[generator.integers(0, OUTPUT_SIZE, NUM_STEPS)]
    return [
        *forward_rows(weights, xs[0], h0),
        *loss_rows(weights, head, xs, h0, targets),
        *jacobian_rows(weights, xs[0], h0),
        product_row(weights, xs, h0),
        *case_rows(generator, weights, xs[0], h0),
        *shift_rows(weights, xs[0], h0),
        package_row(weights, xs, h0),
    ]


def forward_rows(weights, x, h):
    """The box and the formula for h_t, and the elementwise products with weights."""
    v = values_of(weights, x, h)
    turned = values_of({**weights, "z": -weights["z"]}, x, h)
    box = (1 - v["z"]) * h + v["z"] * v["hc"]
    later = turned["z"] * h + (1 - turned["z"]) * turned["hc"]
    true = cell(weights, jnp.asarray(x), jnp.asarray(h), keep=False)[0]
    printed = relative_error(v["z"] * h + (1 - v["z"]) * v["hc"], true)
    fixed = max(relative_error(box, true), relative_error(later, true))
    yield Row("h_t, box and formula", "both", "WRONG", printed, "one, or W_z := -W_z", fixed)
    u, w = weights["h"][:, :HIDDEN_SIZE], weights["h"][:, HIDDEN_SIZE:]
    want = cell(weights, jnp.asarray(x), jnp.asarray(h), keep=True)[1]
    for place, weight in (("h~, W a matrix", w), ("h~, W a vector", w[:, 0])):
        values = {"W": weight, "x": x, "p": v["r"] * h}
        printed, cure = (
            attempt("W * x + W * p", np.zeros(HIDDEN_SIZE), **values),
            "W_x x + W_h (r h)",
        )
        fixed = relative_error(np.tanh(w @ x + u @ (v["r"] * h)), want)
        yield Row(place, "W * x + W * (r h)", "ILL-FORMED", printed, cure, fixed)
    printed = attempt("ones - z", v["z"], ones=np.ones(INPUT_SIZE), z=v["z"])
    fixed = relative_error(np.ones(HIDDEN_SIZE) - v["z"], v["rest"])
    yield Row("vector of ones", "as wide as the input", "ILL-FORMED", printed, "as h", fixed)


def run(weights, head, xs, h0, targets):
    """E_t [T] in JAX."""

    def body(h, inputs):
        h = cell(weights, inputs[0], h, keep=True)[0]
        return h, -jnp.sum(inputs[1] * jax.nn.log_softmax(head @ h))

    return jax.lax.scan(body, h0, (xs, targets))[1]


def loss_rows(weights, head, xs, h0, targets):
    """E_t, its sum, and the chain rule through time for the weights of the three gates."""
    arguments = jax.tree.map(jnp.asarray, (weights, head, xs, h0, targets))
    losses, per_step = run(*arguments), jax.jit(jax.jacobian(run))(*arguments)
    total = jax.jit(jax.grad(lambda *arguments: run(*arguments).sum()))(*arguments)
    trace, h = [], h0
    for x in xs:
        trace.append(values_of(weights, x, h))
        h = trace[-1]["z"] * h + trace[-1]["rest"] * trace[-1]["hc"]
        trace[-1]["ht"] = h
    softmax = np.exp(head @ h) / np.exp(head @ h).sum()
    vector = -targets[-1] * np.log(softmax)
    printed = attempt("vector", losses[-1], vector=vector)
    fixed, cure = relative_error(vector.sum(), losses[-1]), "-sum_k y_k log y^_k"
    yield Row("E_t", "-y log y^, a vector", "NOTATION", printed, cure, fixed)
    yield Row("E = sum_t E_t", "dE/dW = sum_t dE_t/dW", "OK",
              largest_error({gate: per_step[gate].sum(0) for gate in "zrh"}, total))  # fmt: skip
    upstream = head.T @ (softmax - targets[-1])
    want = {gate: per_step[gate][-1] for gate in "zrh"}
    parts = immediate_parts(weights, trace, upstream)
    fixed = largest_error({gate: sum(part[gate] for part in parts) for gate in "zrh"}, want)
    zeros = {gate: np.zeros_like(w) for gate, w in weights.items()}
    cure = "sum over k of (prod dh_j/dh_j-1) d+h_k/dW"
    for says, guess in (("one product, down to dh_0/dW = 0", zeros), ("only k = 1", parts[0])):
        yield Row("dE_t/dW", says, "WRONG", largest_error(guess, want), cure, fixed)


def immediate_parts(weights, trace, upstream):
    """For each k, (dE_t/dh_t) (prod_{j > k} dh_j/dh_{j-1}) d+h_k/dW.

    d+ is the derivative with respect to the use of W at step k only.
    """
    parts, g = [], upstream
    for v in reversed(trace):
        a = g * v["rest"] * (1 - v["hc"] ** 2)
        a_z = g * (v["h"] - v["hc"]) * v["z"] * v["rest"]
        a_r = (weights["h"][:, :HIDDEN_SIZE].T @ a) * v["h"] * v["dr"]
        read = np.concatenate([v["h"], v["x"]])
        reset = np.concatenate([v["r"] * v["h"], v["x"]])
        part = {"z": np.outer(a_z, read), "r": np.outer(a_r, read), "h": np.outer(a, reset)}
        parts.insert(0, part)
        g = g @ jacobian(weights, v)
    return parts


def jacobian_rows(weights, x, h):
    """dh_t/dh and dh~/dh with and without the paths through the gates, for both updates."""
    v = values_of(weights, x, h)
    (keep, inner), (write, _) = autodiff(weights, x, h), autodiff(weights, x, h, keep=False)
    fixed = relative_error(jacobian(weights, v), keep)
    says, cure = "z + (1 - z) dh~/dh", "+ diag((h - h~) z (1 - z)) U_z"
    for place, inner_gates in (("dh_t/dh, printed dh~/dh", False), ("dh_t/dh, exact dh~/dh", True)):
        printed = relative_error(jacobian(weights, v, gates=False, inner_gates=inner_gates), keep)
        yield Row(place, says, "WRONG", printed, cure, fixed)
    fixed = relative_error(jacobian(weights, v, keep=False), write)
    cure = "diag(1 - z) + diag(z) dh~/dh + diag((h~ - h) z (1 - z)) U_z"
    printed = relative_error(jacobian(weights, v, gates=False), write)
    yield Row("dh_t/dh, box's h_t", says, "WRONG", printed, cure, fixed)
    printed = relative_error(jacobian(weights, v, keep=False, gates=False), write)
    says = "1 - z + z dh~/dh"
    yield Row("dh_t/dh, box, no gate paths", says, "WRONG", printed, cure, fixed)
    printed = relative_error(candidate_jacobian(weights, v, gates=False), inner)
    fixed = relative_error(candidate_jacobian(weights, v), inner)
    cure = "(1 - h~^2) U (r + h r (1 - r) U_r)"
    yield Row("dh~/dh", "(1 - h~^2) (W r)", "WRONG", printed, cure, fixed)


def product_row(weights, xs, h):
    """The product of the Jacobians over the steps, and its spectral norm."""

    def last(h):
        return jax.lax.scan(lambda h, x: (cell(weights, x, h, True)[0], None), h, jnp.asarray(xs))[
            0
        ]

    want, start = jax.jit(jax.jacobian(last))(jnp.asarray(h)), np.eye(HIDDEN_SIZE)
    printed, fixed = start, start
    for x in xs:
        v = values_of(weights, x, h)
        printed, fixed = jacobian(weights, v, gates=False) @ printed, jacobian(weights, v) @ fixed
        h = v["z"] * h + v["rest"] * v["hc"]
    norms = [np.linalg.norm(product, 2) for product in (printed, fixed)]
    says = f"spectral norm {norms[0]:.3f}"
    cure, error = f"spectral norm {norms[1]:.3f}", relative_error(fixed, want)
    place = f"product over {NUM_STEPS} steps"
    return Row(place, says, "WRONG", relative_error(printed, want), cure, error)


def case_rows(generator, weights, x, h):
    """The cases as limits for saturated gates; errors are absolute where the limit is 0."""
    v = values_of(weights, x, h)
    printed = absolute_error(v["z"], np.round(v["z"]))
    rounds = [float(sigmoid(np.asarray(a))) for a in (36.0, 37.0)]
    fixed = 0.0 if rounds[0] < 1 == rounds[1] else 1.0
    cure = "inside (0, 1); rounded to 1 above 36.7"
    yield Row("values of the gates", "either 0 or 1", "TEXT", printed, cure, fixed)
    kept, inner = autodiff(weights, x, h, shift=(SATURATED, 0.0))
    identity = np.eye(HIDDEN_SIZE)
    printed, fixed = relative_error(identity, inner), relative_error(identity, kept)
    yield Row("case 1, z = 1", "dh~/dh = z = 1", "WRONG", printed, "dh_t/dh = I, z -> 1", fixed)
    closed = autodiff(weights, x, h, shift=(-SATURATED, -SATURATED))[0]
    error = absolute_error(np.zeros_like(identity), closed)
    yield Row("case 2A, z = r = 0", "0, in the limit", "OK", error)
    orthogonal = np.linalg.qr(generator.normal(size=(HIDDEN_SIZE, HIDDEN_SIZE)))[0]
    turned = {**weights, "h": np.concatenate([orthogonal, weights["h"][:, HIDDEN_SIZE:]], axis=1)}
    shift = (-SATURATED, SATURATED)
    for place, w, says in (("case 2B, z = 0, r = 1", weights, "(absent)"),
                           ("case 2B, U orthogonal", turned, "closer to 1")):  # fmt: skip
        open_reset, v = autodiff(w, x, h, shift=shift)[0], values_of(w, x, h, shift)
        limit = np.diag(1 - v["hc"] ** 2) @ w["h"][:, :HIDDEN_SIZE]
        error, singular = absolute_error(limit, open_reset), np.linalg.svd(open_reset)[1]
        if w is weights:
            yield Row(place, says, "MISSING", None, "diag(1 - h~^2) U", error)
        else:
            cure = "singular values " + " ".join(f"{value:.2f}" for value in singular)
            yield Row(place, says, "TEXT", absolute_error(singular, np.ones(4)), cure, error)


def shift_rows(weights, x, h):
    """max|printed - true| of dh_t/dh when the pre-activations of z and r are shifted by -s."""
    for s in SHIFTS:
        shift = (-float(s), -float(s))
        v, want = values_of(weights, x, h, shift), autodiff(weights, x, h, shift=shift)[0]
        printed = absolute_error(jacobian(weights, v, gates=False), want)
        fixed = absolute_error(jacobian(weights, v), want)
        place, says = f"gate shift s = {s}", "gate paths neglected"
        if s == SHIFTS[-1]:
            yield Row(place, says, "OK", printed, limit=EXACT)
        else:
            verdict = "WRONG" if s <= 4 else "LIMIT"
            yield Row(place, says, verdict, printed, "both gate paths", fixed)


def package_row(weights, xs, h0):
    """Compares the product of the corrected Jacobians with the Jacobian of `jaxgru.gru`."""
    w_h = [weights[gate][:, :HIDDEN_SIZE].T for gate in "rzh"]
    w_x = [weights[gate][:, HIDDEN_SIZE:].T for gate in "rzh"]
    arrays = [jnp.asarray(np.concatenate(blocks, axis=1)) for blocks in (w_x, w_h)]
    params, product, h = (
        jaxgru.GRUParams(arrays[0], arrays[1], None, None, spec=jaxgru.CHO_2014),
        np.eye(HIDDEN_SIZE),
        h0,
    )
    for x in xs:
        v = values_of(weights, x, h)
        product = jacobian(weights, v) @ product
        h = v["z"] * h + v["rest"] * v["hc"]

    def last(h0):
        return jaxgru.gru(params, jnp.asarray(xs), h0)[0]

    error = relative_error(product, jax.jit(jax.jacrev(last))(jnp.asarray(h0)))
    return Row("this package", "product = Jacobian of gru with CHO_2014", "OK", error)
