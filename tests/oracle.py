"""The GRU in NumPy float64, one row and one step at a time, and its backpropagation through time.

Typed from Cho et al. 2014 (arXiv:1406.1078), eqs. 5-8, Chung et al. 2014 (arXiv:1412.3555),
section 3.2, and the equation in the documentation of `torch.nn.GRU`. Vectors are columns and every
gate has matrices of its own, W [H, I] and U [H, H], as there. Nothing here knows JAX or jaxgru.
"""

import dataclasses

import numpy as np


def sigmoid(a):
    return 1.0 / (1.0 + np.exp(-a))


# f and f', both as functions of the pre-activation.
ACTIVATIONS = {
    "tanh": (np.tanh, lambda a: 1.0 / np.cosh(a) ** 2),
    "relu": (lambda a: np.maximum(a, 0.0), lambda a: np.where(a > 0.0, 1.0, 0.0)),
    "sigmoid": (sigmoid, lambda a: sigmoid(a) * sigmoid(-a)),
    "softplus": (lambda a: np.logaddexp(0.0, a), sigmoid),
    "identity": (lambda a: a, np.ones_like),
}


@dataclasses.dataclass
class Equation:
    """Which GRU: the reset gate before or after U_n, z keeping or writing, and f."""

    reset: str
    update: str
    activation: str = "tanh"


class Weights:
    """W, U, b (of the input) and c (of the state), each a dict over the gates r, z, n."""

    def __init__(self, w_x, w_h, b_x, b_h):
        size = w_h.shape[0]
        self.W, self.U, self.b, self.c = {}, {}, {}, {}
        for place, gate in enumerate("rzn"):
            columns = slice(place * size, (place + 1) * size)
            self.W[gate] = np.array(w_x, np.float64)[:, columns].T
            self.U[gate] = np.array(w_h, np.float64)[:, columns].T
            self.b[gate] = np.zeros(size) if b_x is None else np.array(b_x, np.float64)[columns]
            self.c[gate] = np.zeros(size) if b_h is None else np.array(b_h, np.float64)[columns]

    def zeros(self):
        """The same tables, filled with zeros: where gradients are summed."""
        blank = object.__new__(Weights)
        for name in ("W", "U", "b", "c"):
            setattr(blank, name, {g: np.zeros_like(v) for g, v in getattr(self, name).items()})
        return blank

    def packed(self):
        """w_x, w_h, b_x, b_h with the gates side by side."""
        return tuple(
            np.concatenate([table[gate].T for gate in "rzn"], axis=-1)
            for table in (self.W, self.U, self.b, self.c)
        )


def one_step(weights, equation, x, h):
    """h' of one row, and what its derivative needs."""
    W, U, b, c = weights.W, weights.U, weights.b, weights.c
    f, _ = ACTIVATIONS[equation.activation]
    r = sigmoid(W["r"] @ x + b["r"] + U["r"] @ h + c["r"])
    z = sigmoid(W["z"] @ x + b["z"] + U["z"] @ h + c["z"])
    if equation.reset == "before":
        a_n = W["n"] @ x + b["n"] + U["n"] @ (r * h) + c["n"]
    else:
        a_n = W["n"] @ x + b["n"] + r * (U["n"] @ h + c["n"])
    n = f(a_n)
    new = z * h + (1.0 - z) * n if equation.update == "keep" else (1.0 - z) * h + z * n
    return new, (x, h, r, z, n, a_n)


def one_step_back(weights, equation, saved, g, total):
    """The cotangents of x and h given g, that of h'; those of the weights are added to total."""
    x, h, r, z, n, a_n = saved
    U = weights.U
    _, slope = ACTIVATIONS[equation.activation]
    if equation.update == "keep":
        dz, dn, dh = g * (h - n), g * (1.0 - z), g * z
    else:
        dz, dn, dh = g * (n - h), g * z, g * (1.0 - z)
    da = {"n": dn * slope(a_n), "z": dz * z * (1.0 - z)}
    if equation.reset == "before":
        dp = U["n"].T @ da["n"]
        dr, dh = dp * h, dh + dp * r
        total.U["n"] += np.outer(da["n"], r * h)
        total.c["n"] += da["n"]
    else:
        dq = da["n"] * r
        dr, dh = da["n"] * (U["n"] @ h + weights.c["n"]), dh + U["n"].T @ dq
        total.U["n"] += np.outer(dq, h)
        total.c["n"] += dq
    da["r"] = dr * r * (1.0 - r)
    for gate in "rz":
        dh = dh + U[gate].T @ da[gate]
        total.U[gate] += np.outer(da[gate], h)
        total.c[gate] += da[gate]
    dx = np.zeros_like(x)
    for gate in "rzn":
        dx += weights.W[gate].T @ da[gate]
        total.W[gate] += np.outer(da[gate], x)
        total.b[gate] += da[gate]
    return dx, dh


def forward(arrays, equation, xs, h0, mask=None, resets=None, reverse=False):
    """(h_last, hs, tape) of a sequence [T, ..., I]; tape[row][t] is (reset, saved or None)."""
    weights = Weights(*arrays)
    xs, h0 = np.array(xs, np.float64), np.array(h0, np.float64)
    hs = np.zeros((xs.shape[0], *h0.shape))
    h_last, tape = h0.copy(), {}
    for row in np.ndindex(h0.shape[:-1]):
        h, tape[row] = h0[row], {}
        order = range(xs.shape[0])
        for t in reversed(order) if reverse else order:
            start_anew = resets is not None and bool(resets[(t, *row)])
            h = np.zeros_like(h) if start_anew else h
            saved = None
            if mask is None or bool(mask[(t, *row)]):
                h, saved = one_step(weights, equation, xs[(t, *row)], h)
            tape[row][t] = (start_anew, saved)
            hs[(t, *row)] = h
        h_last[row] = h
    return h_last, hs, tape


def backward(arrays, equation, xs, tape, dh_last, dhs):
    """(w_x, w_h, b_x, b_h), xs and h0 cotangents: the tape played from its end, row by row."""
    weights = Weights(*arrays)
    total = weights.zeros()
    dxs, dh0 = np.zeros(np.shape(xs)), np.array(dh_last, np.float64)
    for row, steps in tape.items():
        dh = np.array(dh_last, np.float64)[row]
        for t, (start_anew, saved) in reversed(list(steps.items())):
            dh = dh + np.array(dhs, np.float64)[(t, *row)]
            if saved is not None:
                dxs[(t, *row)], dh = one_step_back(weights, equation, saved, dh, total)
            dh = np.zeros_like(dh) if start_anew else dh
        dh0[row] = dh
    return total.packed(), dxs, dh0
