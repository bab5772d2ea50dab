"""The GRU in NumPy float64, one row and one step at a time, and its backpropagation through time.

Typed from Cho et al. 2014 (arXiv:1406.1078), eqs. 5-8, Chung et al. 2014 (arXiv:1412.3555),
section 3.2, and the equation in the documentation of `torch.nn.GRU`. Vectors are columns and every
gate has matrices of its own, W [H, I] and U [H, H], as there. Nothing here knows JAX or jaxgru.
"""

import dataclasses
import itertools

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
    """Dicts over r, z, n: W, U, b, c (biases of input and state), g, e (scales of layer norm)."""

    NAMES = ("W", "U", "b", "c", "g", "e")
    ARRAYS = ("w_x", "w_h", "b_x", "b_h", "g_x", "g_h")  # what the package calls them

    def __init__(self, w_x, w_h, b_x, b_h, g_x=None, g_h=None):
        size = w_h.shape[0]
        for name, packed in zip(self.NAMES, (w_x, w_h, b_x, b_h, g_x, g_h)):
            table = {}
            for place, gate in enumerate("rzn"):
                columns = slice(place * size, (place + 1) * size)
                if packed is None:
                    table[gate] = None if name in "ge" else np.zeros(size)
                else:
                    table[gate] = np.array(packed, np.float64)[..., columns].T
            setattr(self, name, table)

    def zeros(self):
        """The same tables, filled with zeros: where gradients are summed."""
        blank = object.__new__(Weights)
        for name in self.NAMES:
            table = getattr(self, name)
            zeros = {g: None if v is None else np.zeros_like(v) for g, v in table.items()}
            setattr(blank, name, zeros)
        return blank

    def packed(self):
        """w_x, w_h, b_x, b_h, g_x, g_h with the gates side by side; None for an absent scale."""
        tables = [[getattr(self, name)[gate] for gate in "rzn"] for name in self.NAMES]
        return tuple(
            None if parts[0] is None else np.concatenate([v.T for v in parts], axis=-1)
            for parts in tables
        )


def normalized(v, scale):
    """Layer normalization of a vector (Ba et al. 2016, arXiv:1607.06450, eq. 4).

    Returns the result, its Jacobian as a matrix, and the vector before the scale.
    """
    if scale is None:
        return v, np.eye(v.size), None
    centre = np.eye(v.size) - 1.0 / v.size
    deviation = np.sqrt((centre @ v) @ (centre @ v) / v.size + 1e-5)
    y = centre @ v / deviation
    jacobian = np.diag(scale) @ (centre - np.outer(y, y) / v.size) / deviation
    return scale * y, jacobian, y


def one_step(weights, equation, x, h, dropout=None):
    """h' of one row, and what its derivative needs; dropout multiplies what U reads of h."""
    W, U, b, c = weights.W, weights.U, weights.b, weights.c
    f, _ = ACTIVATIONS[equation.activation]
    read = h if dropout is None else dropout * h
    of_x = {gate: normalized(W[gate] @ x, weights.g[gate]) for gate in "rzn"}
    of_h = {gate: normalized(U[gate] @ read, weights.e[gate]) for gate in "rz"}
    r = sigmoid(of_x["r"][0] + b["r"] + of_h["r"][0] + c["r"])
    z = sigmoid(of_x["z"][0] + b["z"] + of_h["z"][0] + c["z"])
    if equation.reset == "before":
        of_h["n"] = normalized(U["n"] @ (r * read), weights.e["n"])
        a_n = of_x["n"][0] + b["n"] + of_h["n"][0] + c["n"]
    else:
        of_h["n"] = normalized(U["n"] @ read, weights.e["n"])
        a_n = of_x["n"][0] + b["n"] + r * (of_h["n"][0] + c["n"])
    n = f(a_n)
    new = z * h + (1.0 - z) * n if equation.update == "keep" else (1.0 - z) * h + z * n
    return new, (x, h, dropout, r, z, n, a_n, of_x, of_h)


def one_step_back(weights, equation, saved, g, total):
    """The cotangents of x and h given g, that of h'; those of the weights are added to total."""
    x, h, dropout, r, z, n, a_n, of_x, of_h = saved
    W, U = weights.W, weights.U
    read = h if dropout is None else dropout * h
    _, slope = ACTIVATIONS[equation.activation]
    if equation.update == "keep":
        dz, dn, dh = g * (h - n), g * (1.0 - z), g * z
    else:
        dz, dn, dh = g * (n - h), g * z, g * (1.0 - z)
    da = {"n": dn * slope(a_n), "z": dz * z * (1.0 - z)}
    dread = np.zeros_like(h)
    if equation.reset == "before":
        du = {"n": da["n"]}
        dv_n = of_h["n"][1].T @ du["n"]
        dp = U["n"].T @ dv_n
        dr, dread = dp * read, dread + dp * r
        total.U["n"] += np.outer(dv_n, r * read)
    else:
        du = {"n": da["n"] * r}
        dv_n = of_h["n"][1].T @ du["n"]
        dr, dread = da["n"] * (of_h["n"][0] + weights.c["n"]), dread + U["n"].T @ dv_n
        total.U["n"] += np.outer(dv_n, read)
    da["r"] = dr * r * (1.0 - r)
    du["r"], du["z"] = da["r"], da["z"]
    for gate in "rz":
        dv = of_h[gate][1].T @ du[gate]
        dread = dread + U[gate].T @ dv
        total.U[gate] += np.outer(dv, read)
    dx = np.zeros_like(x)
    for gate in "rzn":
        total.b[gate] += da[gate]
        total.c[gate] += du[gate]
        dv = of_x[gate][1].T @ da[gate]
        dx += W[gate].T @ dv
        total.W[gate] += np.outer(dv, x)
        if weights.g[gate] is not None:
            total.g[gate] += da[gate] * of_x[gate][2]
        if weights.e[gate] is not None:
            total.e[gate] += du[gate] * of_h[gate][2]
    return dx, dh + (dread if dropout is None else dropout * dread)


def forward(
    arrays, equation, xs, h0, mask=None, resets=None, reverse=False, dropout=None, zoneout=None
):
    """(h_last, hs, tape) of a sequence [T, ..., I].

    tape[row][t] is (reset, the share of the old state in the new one, saved or None).

    dropout [..., H] multiplies what U reads of the state. zoneout is None, or the share of the old
    state that each unit keeps: a number, or 0s and 1s [T, ..., H].
    """
    weights = Weights(*(getattr(arrays, name) for name in Weights.ARRAYS))
    xs, h0 = np.array(xs, np.float64), np.array(h0, np.float64)
    hs = np.zeros((xs.shape[0], *h0.shape))
    share = np.broadcast_to(np.float64(0.0 if zoneout is None else zoneout), hs.shape)
    h_last, tape = h0.copy(), {}
    for row in np.ndindex(h0.shape[:-1]):
        h, tape[row] = h0[row], {}
        row_scale = None if dropout is None else np.array(dropout, np.float64)[row]
        order = range(xs.shape[0])
        for t in reversed(order) if reverse else order:
            start_anew = resets is not None and bool(resets[(t, *row)])
            h = np.zeros_like(h) if start_anew else h
            saved, old = None, share[(t, *row)]
            if mask is None or bool(mask[(t, *row)]):
                new, saved = one_step(weights, equation, xs[(t, *row)], h, row_scale)
                h = old * h + (1.0 - old) * new
            tape[row][t] = (start_anew, old, saved)
            hs[(t, *row)] = h
        h_last[row] = h
    return h_last, hs, tape


def backward(arrays, equation, xs, tape, dh_last, dhs, truncate=None):
    """Cotangents of the arrays, xs and h0: the tape played from its end, row by row.

    truncate cuts the gradient of the state between a valid step and the one before it where they
    are in different windows [0, truncate), [truncate, 2 truncate), ...
    """
    weights = Weights(*(getattr(arrays, name) for name in Weights.ARRAYS))
    total = weights.zeros()
    dxs, dh0 = np.zeros(np.shape(xs)), np.array(dh_last, np.float64)
    for row, steps in tape.items():
        dh = np.array(dh_last, np.float64)[row]
        real = [t for t, (_, _, saved) in steps.items() if saved is not None]
        pairs = itertools.pairwise(real) if truncate else ()
        cuts = {t for before, t in pairs if before // truncate != t // truncate}
        for t, (start_anew, old, saved) in reversed(steps.items()):
            dh = dh + np.array(dhs, np.float64)[(t, *row)]
            if saved is not None:
                new = (1.0 - old) * dh
                dxs[(t, *row)], through = one_step_back(weights, equation, saved, new, total)
                dh = old * dh + through
            dh = np.zeros_like(dh) if start_anew or t in cuts else dh
        dh0[row] = dh
    return total.packed(), dxs, dh0


def directions(layer):
    """The one or two sets of arrays of a layer; two are a tuple of two."""
    return layer if isinstance(layer, tuple) and len(layer) == 2 else (layer,)


def parted(resets):
    """Resets of the backward direction: a parting before step t comes after step t - 1."""
    return None if resets is None else np.concatenate([resets[1:], np.zeros_like(resets[:1])])


def stack_forward(layers, equation, xs, h0, mask, resets, merge, residual, noise):
    """(h_last, ys, tape) of a stack; layers and h0 hold an entry, or a pair of them, per layer.

    noise has, per layer, (what multiplies its input, [(dropout, zoneout) of each direction]).
    """
    y, lasts, tape = np.array(xs, np.float64), [], []
    for number, (layer, start, (factor, drawn)) in enumerate(zip(layers, h0, noise)):
        inputs = y if factor is None else y * np.array(factor, np.float64)
        runs = []
        for place, (arrays, (dropout, zoneout)) in enumerate(zip(directions(layer), drawn)):
            flags = (mask, parted(resets) if place else resets, bool(place))
            begin = directions(start)[place]
            runs.append(forward(arrays, equation, inputs, begin, *flags, dropout, zoneout))
        tape.append((inputs, [run[2] for run in runs]))
        hs = [run[1] for run in runs]
        out = sum(hs) if merge == "sum" else np.concatenate(hs, axis=-1)
        y = out + y if residual and number else out
        last = tuple(run[0] for run in runs)
        lasts.append(last if len(last) == 2 else last[0])
    return tuple(lasts), y, tape


def stack_backward(layers, equation, tape, dlasts, dy, merge, residual, noise):
    """Cotangents of the layers' arrays, of xs and of h0, from the top layer down."""
    dlayers, dh0s = [], []
    for number in reversed(range(len(layers))):
        inputs, tapes = tape[number]
        factor, arrays = noise[number][0], directions(layers[number])
        sizes = np.cumsum([a.w_h.shape[0] for a in arrays])[:-1]
        douts = [dy] * len(arrays) if merge == "sum" else np.split(dy, sizes, axis=-1)
        results = [
            backward(a, equation, inputs, t, dlast, dout)
            for a, t, dlast, dout in zip(arrays, tapes, directions(dlasts[number]), douts)
        ]
        dinputs = sum(result[1] for result in results)
        dinputs = dinputs if factor is None else dinputs * np.array(factor, np.float64)
        dy = dinputs + dy if residual and number else dinputs
        for found, place in ((dlayers, 0), (dh0s, 2)):
            parts = tuple(result[place] for result in results)
            found.append(parts if len(parts) == 2 else parts[0])
    return tuple(reversed(dlayers)), dy, tuple(reversed(dh0s))
