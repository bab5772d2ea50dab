"""Section 9.5: the recursion (9.22) for dh^(t), and the parameter gradients it refers to.

z weighs the candidate, there are biases, a head y = g(h V + c) at each of T + 1 steps, and half the
sum of squared errors as the loss. With row vectors, tU for the transpose of U, and
a = dh z tanh'::

    dh^(t) = dense + (dh (h^ - h) s'_z) tU_z + (a tU) r + ((a tU) h s'_r) tU_r + dh (1 - z)

Adjacent vectors are multiplied elementwise. All terms but dense are those of step t + 1.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jaxgru
from experiments.derivation.draws import draw
from experiments.derivation.verdicts import Row, attempt, largest_error, relative_error

LABEL = "many-to-many 9.5"
TITLE = "Back Propagation Through Time in Many-to-Many type, section 9.5 (no author printed)"
INPUT_SIZE, HIDDEN_SIZE, OUTPUT_SIZE, NUM_STEPS = 3, 4, 2, 6
RECURRENT = ("Wz", "Uz", "bz", "Wr", "Ur", "br", "W", "U", "b")
PARAMS = (*RECURRENT, "V", "c")
HEADS = {
    "identity": (lambda o: o, np.ones_like, lambda o: o),
    "tanh": (np.tanh, lambda o: 1 - np.tanh(o) ** 2, jnp.tanh),
}


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def draw_problem(generator):
    """(parameters for row vectors, xs [T + 1, D], the initial state, targets [T + 1, K])."""
    rows_of = {"W": INPUT_SIZE, "U": HIDDEN_SIZE, "V": HIDDEN_SIZE}
    params = {}
    for name in PARAMS:
        columns = OUTPUT_SIZE if name in ("V", "c") else HIDDEN_SIZE
        shape = (rows_of[name[0]], columns) if name[0] in rows_of else (columns,)
        params[name] = draw(generator, *shape)
    xs, targets = draw(generator, NUM_STEPS, INPUT_SIZE), draw(generator, NUM_STEPS, OUTPUT_SIZE)
    return params, xs, draw(generator, HIDDEN_SIZE), targets


def cell(p, x, reads):
    """One step in JAX; `reads` holds a copy of the state for each path: z, r, candidate, kept."""
    z = jax.nn.sigmoid(x @ p["Wz"] + reads["z"] @ p["Uz"] + p["bz"])
    r = jax.nn.sigmoid(x @ p["Wr"] + reads["r"] @ p["Ur"] + p["br"])
    candidate = jnp.tanh(x @ p["W"] + (r * reads["candidate"]) @ p["U"] + p["b"])
    return (1 - z) * reads["kept"] + z * candidate


def loss(p, xs, h, nudges, targets, g, dense_from=0):
    """(9.18) from step dense_from on; zeros (the nudges) are added to every h^(t)."""

    def body(h, inputs):
        h = cell(p, inputs[0], dict.fromkeys(("z", "r", "candidate", "kept"), h)) + inputs[1]
        return h, g(h @ p["V"] + p["c"])

    outputs = jax.lax.scan(body, h, (xs, nudges))[1]
    return 0.5 * jnp.sum((outputs[dense_from:] - targets[dense_from:]) ** 2)


def autodiff(problem, g, dense_from=0):
    """(the loss, JAX's gradients of parameters, the initial state and every h^(t))."""
    params, xs, h, targets = jax.tree.map(jnp.asarray, problem)
    nudges = jnp.zeros((NUM_STEPS, HIDDEN_SIZE))
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3)), static_argnums=(5, 6))
    return gradient(params, xs, h, nudges, targets, g, dense_from)


def forward(problem, g):
    """{letter: value} of (9.17) at every step."""
    p, xs, h, _ = problem
    trace = []
    for x in xs:
        z = sigmoid(x @ p["Wz"] + h @ p["Uz"] + p["bz"])
        r = sigmoid(x @ p["Wr"] + h @ p["Ur"] + p["br"])
        candidate = np.tanh(x @ p["W"] + (r * h) @ p["U"] + p["b"])
        h_t = (1 - z) * h + z * candidate
        o = h_t @ p["V"] + p["c"]
        trace.append({"x": x, "h": h, "z": z, "r": r, "hc": candidate, "ht": h_t, "o": o})
        trace[-1]["y"] = g(o)
        h = h_t
    return trace


def terms(p, v, dh):
    """The four corrected terms of (9.22): the paths z, candidate, r and kept."""
    a = dh * v["z"] * (1 - v["hc"] ** 2)
    s_z, s_r = v["z"] * (1 - v["z"]), v["r"] * (1 - v["r"])
    return {
        "z": (dh * (v["hc"] - v["h"]) * s_z) @ p["Uz"].T,
        "candidate": (a @ p["U"].T) * v["r"],
        "r": ((a @ p["U"].T) * v["h"] * s_r) @ p["Ur"].T,
        "kept": dh * (1 - v["z"]),
    }


def parentheses_first(p, v, dh):
    """Terms 2 and 3 with the brackets (r tU) and (h tU) evaluated first."""
    a, s_r = dh * v["z"] * (1 - v["hc"] ** 2), v["r"] * (1 - v["r"])
    second = {"candidate": a * (v["r"] @ p["U"].T)}
    return {**terms(p, v, dh), **second, "r": (a * (v["h"] @ p["U"].T) * s_r) @ p["Ur"].T}


def left_to_right(p, v, dh):
    """Terms 2 and 3 evaluated from left to right."""
    a, s_r = dh * v["z"] * (1 - v["hc"] ** 2), v["r"] * (1 - v["r"])
    second = {"candidate": (a * v["r"]) @ p["U"].T}
    return {**terms(p, v, dh), **second, "r": (((a * v["h"]) @ p["U"].T) * s_r) @ p["Ur"].T}


def scaled_matrices(p, v, dh):
    """Terms 2 and 3 with (r tU) and (h tU) as the matrices tU diag(r) and tU diag(h)."""
    a, s_r = dh * v["z"] * (1 - v["hc"] ** 2), v["r"] * (1 - v["r"])
    second = {"candidate": a @ (p["U"].T @ np.diag(v["r"]))}
    third = {"r": (a @ (p["U"].T @ np.diag(v["h"])) * s_r) @ p["Ur"].T}
    return {**terms(p, v, dh), **second, **third}


def columns_untransposed(p, v, dh):
    """Weights for column vectors, W := tW, with 1-D arrays and `v @ tU` where tU v is meant."""
    column = {name: p[name].T for name in ("Uz", "Ur", "U")}
    return terms({**p, **column}, v, dh)


def dense(p, v, target, slope):
    """(9.21) for row vectors: [(y - Y) g'] tV."""
    return ((v["y"] - target) * slope(v["o"])) @ p["V"].T


def recursion(problem, trace, slope, rule=terms, dense_from=0):
    """(dh^(t) [T + 1, H] by (9.22), the gradient of the initial state)."""
    p, _, _, targets = problem
    dh, carried = [], np.zeros(HIDDEN_SIZE)
    for t in reversed(range(NUM_STEPS)):
        local = dense(p, trace[t], targets[t], slope) if t >= dense_from else 0.0
        dh.insert(0, local + carried)
        carried = sum(rule(p, trace[t], dh[0]).values())
    return np.stack(dh), carried


def rebuild(problem, trace, dhs, slope):
    """(9.8)-(9.16) and those of the head: every parameter gradient, from dh^(t)."""
    p, _, _, targets = problem
    total = {name: np.zeros_like(p[name]) for name in PARAMS}
    for v, dh, target in zip(trace, dhs, targets):
        a_z = dh * (v["hc"] - v["h"]) * v["z"] * (1 - v["z"])
        a_c = dh * v["z"] * (1 - v["hc"] ** 2)
        a_r = (a_c @ p["U"].T) * v["h"] * v["r"] * (1 - v["r"])
        o = (v["y"] - target) * slope(v["o"])
        for gate, a, read in (("z", a_z, v["h"]), ("r", a_r, v["h"]), ("", a_c, v["r"] * v["h"])):
            total[f"W{gate}"] += np.outer(v["x"], a)
            total[f"U{gate}"] += np.outer(read, a)
            total[f"b{gate}"] += a
        total["V"] += np.outer(v["ht"], o)
        total["c"] += o
    return total


def rows(generator):
    """Rows for every equation of the section that can be checked, in its order."""
    problem = draw_problem(generator)
    wants = {g: autodiff(problem, functions[2]) for g, functions in HEADS.items()}
    return [
        *forward_rows(problem, wants),
        *dense_rows(problem, wants),
        *term_rows(problem),
        *recursion_rows(problem, wants["tanh"]),
        pair_row(problem),
        *gradient_rows(problem, wants),
        package_row(problem),
    ]


def forward_rows(problem, wants):
    """(9.17) as printed, compared with consistent column and row vectors; the loss."""
    p, xs, h, targets = problem
    v = forward(problem, np.tanh)[0]
    column = {name: w.T for name, w in p.items()}
    as_columns = {"W": column["W"], "U": column["U"], "x": xs[0][:, None], "b": p["b"][:, None],
                  "p": (v["r"] * h)[:, None]}  # fmt: skip
    printed = attempt("W @ x + p @ U + b", np.zeros((HIDDEN_SIZE, 1)), **as_columns)
    fixed = column["W"] @ xs[0] + column["U"] @ (v["r"] * h) + p["b"]
    z = sigmoid(column["Wz"] @ xs[0] + column["Uz"] @ h + p["bz"])
    consistent = max(relative_error(np.tanh(fixed), v["hc"]), relative_error(z, v["z"]))
    place, cure = "(9.17), columns", "W x + U (r h)"
    yield Row(place, "W x + (r h) U", "ILL-FORMED", printed, cure, consistent)
    literal = np.tanh(column["W"] @ xs[0] + (v["r"] * h) @ column["U"] + p["b"])
    printed = relative_error(literal, v["hc"])
    yield Row("(9.17), 1-D arrays", "W x + (r h) U", "WRONG", printed, cure, consistent)
    for g, (value, _, _) in HEADS.items():
        losses = [0.5 * np.sum((v["y"] - y) ** 2) for v, y in zip(forward(problem, value), targets)]
        error = relative_error(sum(losses), wants[g][0])
        yield Row(f"(9.18)-(9.20), g = {g}", "L = sum_t L^(t)", "OK", error)


def dense_rows(problem, wants):
    """(9.21), which is also (9.22) at t = T; it is wrong without g'."""
    p, _, _, targets = problem
    for g, (value, slope, _) in HEADS.items():
        v, want = forward(problem, value)[-1], wants[g][1][2][-1]
        error = relative_error(dense(p, v, targets[-1], slope), want)
        yield Row(f"(9.21), (9.22) t = T, g = {g}", "[(y - Y) g'] tV", "OK", error)
        if g == "tanh":
            printed = relative_error(dense(p, v, targets[-1], np.ones_like), want)
            columns = p["V"] @ ((v["y"] - targets[-1]) * slope(v["o"]))
            fixed = relative_error(columns, want)
            yield Row("(9.21), g' dropped", "(y - Y) tV", "NOTATION", printed, "keep g'", fixed)


def term_rows(problem):
    """The four terms one by one, as JAX differentiates each path of the state by itself."""
    p, xs, h, _ = problem
    v, dh = forward(problem, np.tanh)[0], np.linspace(-1.0, 1.3, HIDDEN_SIZE)
    reads = dict.fromkeys(("z", "r", "candidate", "kept"), jnp.asarray(h))
    params = jax.tree.map(jnp.asarray, p)
    want = jax.vjp(lambda reads: cell(params, xs[0], reads), reads)[1](jnp.asarray(dh))[0]
    got = terms(p, v, dh)
    for number, path, text in ((1, "z", "dh (h^ - h) s' tU_z"), (4, "kept", "dh (1 - z)")):
        error = relative_error(got[path], want[path])
        yield Row(f"(9.22) term {number}", text, "OK", error)
    for number, path, text, cure in (
        (2, "candidate", "a (r tU)", "(a tU) r"),
        (3, "r", "a (h tU) s' tU_r", "((a tU) h s') tU_r"),
    ):
        fixed = relative_error(got[path], want[path])
        for says, rule in (("brackets first", parentheses_first), ("left to right", left_to_right)):
            printed = relative_error(rule(p, v, dh)[path], want[path])
            place = f"(9.22) term {number}, {says}"
            yield Row(place, text, "WRONG", printed, cure, fixed)
        error = relative_error(scaled_matrices(p, v, dh)[path], want[path])
        yield Row(f"(9.22) term {number}, matrices", "(r tU) := tU diag(r)", "OK", error)


def recursion_rows(problem, want):
    """(9.22) over all steps, for each reading of its terms 2 and 3."""
    value, slope, _ = HEADS["tanh"]
    trace = forward(problem, value)
    fixed = relative_error(recursion(problem, trace, slope)[0], want[1][2])
    for says, rule in (
        ("brackets first", parentheses_first),
        ("left to right", left_to_right),
        ("columns, v @ tU", columns_untransposed),
    ):
        printed = relative_error(recursion(problem, trace, slope, rule)[0], want[1][2])
        yield Row("(9.22), all t", says, "WRONG", printed, "the factor after tU", fixed)
    fixed = relative_error(recursion(problem, trace, slope)[1], want[1][1])
    yield Row("dh^(-1)", "(not given)", "MISSING", None, "the four terms at t = 0", fixed)


def pair_row(problem):
    """With W x + (r h) U taken literally, the path of the candidate needs U; (9.22) has tU."""
    p, xs, h, _ = problem
    v, column = forward(problem, np.tanh)[0], {name: w.T for name, w in p.items()}
    dh = np.linspace(-1.0, 1.3, HIDDEN_SIZE)

    def literal(h):
        return jnp.tanh(column["W"] @ xs[0] + (v["r"] * h) @ column["U"] + p["b"])

    candidate, transpose = jax.vjp(literal, jnp.asarray(h))
    want = transpose(jnp.asarray(dh))[0]
    a = dh * (1 - np.asarray(candidate) ** 2)
    printed = relative_error((column["U"].T @ a) * v["r"], want)
    fixed = relative_error((column["U"] @ a) * v["r"], want)
    return Row("(9.17) with (9.22)", "(r h) U and tU", "WRONG", printed, "U, not tU", fixed)


def gradient_rows(problem, wants):
    """The equations that (9.22) refers to: (9.7) for one output at the end, and the gradients."""
    value, slope, reference = HEADS["identity"]
    trace = forward(problem, value)
    got = recursion(problem, trace, slope, dense_from=NUM_STEPS - 1)[0]
    error = relative_error(got, autodiff(problem, reference, NUM_STEPS - 1)[1][2])
    yield Row("(9.7)", "(not given)", "MISSING", None, "(9.22), dense only at t = T", error)
    cures = {"W": "sum_t tx a", "U": "sum_t th a", "b": "sum_t a", "V": "sum_t th do",
             "c": "sum_t do"}  # fmt: skip
    for g, (value, slope, _) in HEADS.items():
        trace = forward(problem, value)
        total = rebuild(problem, trace, recursion(problem, trace, slope)[0], slope)
        for name in PARAMS:
            error = relative_error(total[name], wants[g][1][0][name])
            gate = {"z": "_z", "r": "_r", "": "_c"}[name[1:]] if name in RECURRENT else ""
            text = f"d{name} = {cures[name[0]]}{gate}".replace(
                "th", "t(r h)" if name == "U" else "th"
            )
            place = "(9.8)-(9.16)" if name in RECURRENT else "head"
            yield Row(f"{place} d{name}, g = {g}", "(not given)", "MISSING", None, text, error)


def package_row(problem):
    """Compares the reconstructed gradients with those of `jaxgru.gru`, with blocks r | z | c."""
    p, xs, h0, targets = problem
    value, slope, _ = HEADS["identity"]
    trace = forward(problem, value)
    dhs, dh0 = recursion(problem, trace, slope)
    total = rebuild(problem, trace, dhs, slope)

    def pack(table):
        names = (("Wr", "Wz", "W"), ("Ur", "Uz", "U"), ("br", "bz", "b"))
        return [jnp.concatenate([table[name] for name in row], axis=-1) for row in names]

    def loss_fn(params, h0):
        hs = jaxgru.gru(params, jnp.asarray(xs), h0)[1]
        outputs = hs @ p["V"] + jnp.broadcast_to(p["c"], targets.shape)
        return 0.5 * jnp.sum((outputs - targets) ** 2)

    params = jaxgru.GRUParams(
        **dict(zip(("w_x", "w_h", "b_x"), pack(p))), b_h=None, spec=jaxgru.CHUNG_2014
    )
    of_params, of_h0 = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))(params, jnp.asarray(h0))
    got = {**dict(zip(("w_x", "w_h", "b_x"), pack(total))), "h0": dh0}
    true = {name: getattr(of_params, name) for name in ("w_x", "w_h", "b_x")}
    error = largest_error(got, {**true, "h0": of_h0})
    return Row("this package", "rebuilt = gru with CHUNG_2014", "OK", error)
