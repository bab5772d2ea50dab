"""The function cell_backward of the article: the backward pass of one step with a softmax head.

The batch is along the columns, and one matrix per gate multiplies [h; x]. z, which the article
calls u, weighs the candidate. With dzy = y^ - Y and da = Wy^T dzy + da_prev of step t + 1::

    dc = da u (1 - c^2)      du = da (c - a_prev) u (1 - u)      p = (Wc^T dc)[:H]
    dr = p a_prev r (1 - r)  da_prev = da (1 - u) + p r + (Wr^T dr + Wu^T du)[:H]
    dW = d [a_prev; x]^T for each gate, with r a_prev for Wc;  db = the sum of d over the batch

This is the gradient of the softmax cross-entropy summed over batch and time.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jaxgru
from experiments.derivation.draws import draw
from experiments.derivation.verdicts import Row, largest_error, relative_error

LABEL = "NumPy article"
TITLE = "Gated Recurrent Unit (GRU), with NumPy code (no author printed)"
INPUT_SIZE, HIDDEN_SIZE, NUM_CLASSES, BATCH_SIZE, NUM_STEPS = 3, 4, 3, 3, 6
PARAMS = ("Wu", "bu", "Wr", "br", "Wc", "bc", "Wy", "by")
GATES = {"u": "update", "r": "reset", "c": "candidate"}


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def draw_problem(generator):
    """(parameters, xs [T, D, B], the initial state [H, B], one-hot targets [T, K, B])."""
    params = {}
    for name in PARAMS:
        size = NUM_CLASSES if name.endswith("y") else HIDDEN_SIZE
        width = HIDDEN_SIZE if name.endswith("y") else HIDDEN_SIZE + INPUT_SIZE
        params[name] = draw(generator, size, width if name.startswith("W") else 1)
    labels = generator.integers(0, NUM_CLASSES, (NUM_STEPS, BATCH_SIZE))
    targets = np.eye(NUM_CLASSES)[labels].transpose(0, 2, 1)
    xs = draw(generator, NUM_STEPS, INPUT_SIZE, BATCH_SIZE)
    return params, xs, draw(generator, HIDDEN_SIZE, BATCH_SIZE), targets


def forward_step(p, x, a_prev):
    """{letter: value} of one step; y is softmax(Wy a + by)."""
    stacked = np.concatenate([a_prev, x])
    u, r = sigmoid(p["Wu"] @ stacked + p["bu"]), sigmoid(p["Wr"] @ stacked + p["br"])
    reset = np.concatenate([r * a_prev, x])
    c = np.tanh(p["Wc"] @ reset + p["bc"])
    a = u * c + (1 - u) * a_prev
    exponentials = np.exp(p["Wy"] @ a + p["by"])
    letters = {"a": a, "a_prev": a_prev, "u": u, "r": r, "c": c, "stacked": stacked, "reset": reset}
    return {**letters, "y": exponentials / exponentials.sum(axis=0)}


def backward_step(p, v, target, da):
    """Every gradient of one step; da comes from the step after."""
    dzy = v["y"] - target
    total = p["Wy"].T @ dzy + da
    dc = total * v["u"] * (1 - v["c"] ** 2)
    du = total * (v["c"] - v["a_prev"]) * v["u"] * (1 - v["u"])
    through_c = p["Wc"].T @ dc
    dr = through_c[:HIDDEN_SIZE] * v["a_prev"] * v["r"] * (1 - v["r"])
    through_gates = p["Wr"].T @ dr + p["Wu"].T @ du
    return {
        "Wu": du @ v["stacked"].T, "bu": row_sum(du), "Wr": dr @ v["stacked"].T, "br": row_sum(dr),
        "Wc": dc @ v["reset"].T, "bc": row_sum(dc), "Wy": dzy @ v["a"].T, "by": row_sum(dzy),
        "x": through_c[HIDDEN_SIZE:] + through_gates[HIDDEN_SIZE:],
        "a_prev": total * (1 - v["u"]) + through_c[:HIDDEN_SIZE] * v["r"]
        + through_gates[:HIDDEN_SIZE],
        "total": total, "u": du, "r": dr, "c": dc,
    }  # fmt: skip


def row_sum(array):
    return array.sum(axis=1, keepdims=True)


def run(problem, da_last=None):
    """(values of every step, gradients of every step, parameter gradients summed over time)."""
    p, xs, a, targets = problem
    trace = []
    for x in xs:
        trace.append(forward_step(p, x, a))
        a = trace[-1]["a"]
    da, steps = np.zeros_like(a) if da_last is None else da_last, []
    for v, target in zip(reversed(trace), reversed(targets)):
        steps.insert(0, {**backward_step(p, v, target, da), "arriving": da})
        da = steps[0]["a_prev"]
    return trace, steps, {name: sum(step[name] for step in steps) for name in PARAMS}


def loss(params, xs, a, targets, nudges):
    """Softmax cross-entropy in JAX, summed over batch and time.

    Zeros (the nudges) are added to each value of a step, to differentiate with respect to it.
    """
    p = params

    def body(a, inputs):
        x, target, nudge = inputs
        stacked = jnp.concatenate([a, x])
        u, r = (
            jax.nn.sigmoid(p[f"W{gate}"] @ stacked + p[f"b{gate}"] + nudge[f"a_{gate}"])
            + nudge[gate]
            for gate in "ur"
        )
        c = jnp.tanh(p["Wc"] @ jnp.concatenate([r * a, x]) + p["bc"] + nudge["a_c"]) + nudge["c"]
        a = u * c + (1 - u) * a + nudge["a"]
        log_y = jax.nn.log_softmax(p["Wy"] @ a + p["by"], axis=0)
        return a, (a, -jnp.sum(target * log_y))

    _, (states, losses) = jax.lax.scan(body, a, (xs, targets, nudges))
    return losses.sum(), states


def autodiff(problem, da_last=None):
    """(the states, JAX's gradients of parameters, inputs, initial state and nudges)."""
    params, xs, a, targets = jax.tree.map(jnp.asarray, problem)
    names = ("u", "r", "c", "a_u", "a_r", "a_c", "a")
    nudges = dict.fromkeys(names, jnp.zeros((NUM_STEPS, *a.shape)))

    def total(params, xs, a, nudges):
        value, states = loss(params, xs, a, targets, nudges)
        return value + (0.0 if da_last is None else jnp.sum(states[-1] * da_last)), states

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))
    gradients, states = gradient(params, xs, a, nudges)
    return states, dict(zip(("params", "xs", "a0", "nudges"), gradients))


def rows(generator):
    """Rows for every statement about the code that can be checked."""
    problem = draw_problem(generator)
    got, want = run(problem), autodiff(problem)
    return [
        *backward_rows(got, want),
        *name_rows(got, want),
        *reduction_rows(got[2], want[1]["params"]),
        final_state_row(generator, problem),
        *clip_rows(got[2]),
        *entropy_rows(),
        package_row(problem, got),
    ]


def backward_rows(got, want):
    """Rows for the forward pass and everything that cell_backward returns."""
    trace, steps, total = got
    states = np.stack([v["a"] for v in trace])
    yield Row("forward", "a_t, all steps", "OK", relative_error(states, want[0]))
    for name in PARAMS:
        error = relative_error(total[name], want[1]["params"][name])
        yield Row(f"cell_backward d{name}", "summed loss", "OK", error)
    dxs = np.stack([step["x"] for step in steps])
    yield Row("dxt", "dL/dx_t, never returned", "OK", relative_error(dxs, want[1]["xs"]))
    error = relative_error(steps[0]["a_prev"], want[1]["a0"])
    yield Row("last dat_prev", "dL/da_0, discarded", "OK", error)


def name_rows(got, want):
    """Gradients with misleading names: those of pre-activations, and of a_t without the head."""
    step, nudges = got[1][-1], want[1]["nudges"]
    for name, gate in (("dcct", "c"), ("dut", "u"), ("drt", "r")):
        printed, fixed = (
            relative_error(step[gate], nudges[key][-1]) for key in (gate, f"a_{gate}")
        )
        cure = "of its pre-activation"
        yield Row(name, f"of the {GATES[gate]}", "NOTATION", printed, cure, fixed)
    step, true = got[1][0], want[1]["nudges"]["a"][0]
    printed, fixed = (relative_error(step[key], true) for key in ("arriving", "total"))
    yield Row("dat, docstring", "gradient of a_t", "TEXT", printed, "+ Wy^T dzy", fixed)


def reduction_rows(total, want):
    """With a mean over the batch, or over batch and time, every gradient is divided by B or TB."""
    for name, count in (("batch", BATCH_SIZE), ("batch and time", BATCH_SIZE * NUM_STEPS)):
        mean = {key: value / count for key, value in want.items()}
        fixed = largest_error({key: value / count for key, value in total.items()}, mean)
        place, cure = f"loss, mean over {name}", f"divided by {count}"
        yield Row(place, "the same code", "NOTATION", largest_error(total, mean), cure, fixed)


def final_state_row(generator, problem):
    """dat = 0 at the end is right for this loss, but not for a loss on the final state."""
    cotangent = draw(generator, HIDDEN_SIZE, BATCH_SIZE)
    want = autodiff(problem, cotangent)[1]["params"]
    printed, fixed = (largest_error(run(problem, da)[2], want) for da in (None, cotangent))
    says = "dat = zeros, loss on the final state"
    return Row("backward, start", says, "NOTATION", printed, "dat = its cotangent", fixed)


def clip_rows(total):
    """1 - cosine between the gradient and the clipped one; the threshold is the median size."""
    flat = np.concatenate([value.ravel() for value in total.values()])
    threshold = float(np.median(np.abs(flat)))

    def clip(gradient, threshold):
        return np.clip(gradient, -threshold, threshold)

    def change_of_direction(clipped):
        norms = np.linalg.norm(flat) * np.linalg.norm(clipped)
        return abs(1 - float(flat @ clipped / norms))

    printed = change_of_direction(clip(flat, threshold))
    norm = float(np.linalg.norm(flat))
    fixed = change_of_direction(flat * min(1.0, threshold / norm))
    says = f"by value, cos {1 - printed:.2f}"
    yield Row("clip, direction", says, "MISSING", printed, "by norm, cos 1", fixed)
    clipped = clip(flat, threshold) / BATCH_SIZE
    printed = relative_error(clip(flat / BATCH_SIZE, threshold), clipped)
    fixed = relative_error(clip(flat / BATCH_SIZE, threshold / BATCH_SIZE), clipped)
    cure = "threshold / B with a mean"
    yield Row("clip, scale", "one threshold", "MISSING", printed, cure, fixed)


def entropy_rows():
    """-sum Y log y^ is NaN if a probability underflows: 0 * -inf."""
    logits, label = np.array([0.0, 800.0, 1.0]), 1
    shifted = logits - logits.max()
    with np.errstate(all="ignore"):
        probabilities = np.exp(shifted) / np.exp(shifted).sum()
        naive = -np.sum(np.eye(3)[label] * np.log(probabilities))
    want = jaxgru.losses.categorical_loss(jnp.asarray(logits)[None], jnp.asarray([label]))
    fixed = relative_error(np.log(np.exp(shifted).sum()) - shifted[label], want)
    printed, cure = relative_error(naive, want), "log-softmax of the logits"
    yield Row("cross-entropy", "-sum Y log y^ with y^ = 0", "UNSAFE", printed, cure, fixed)


def package_row(problem, got):
    """Compares the code's gradients with those of `jaxgru.gru`, whose blocks are r | z | c."""
    p, xs, a, targets = problem

    def pack(table, part):
        cut = slice(HIDDEN_SIZE) if part == "h" else slice(HIDDEN_SIZE, None)
        names = ("r", "u", "c")
        if part == "b":
            return jnp.concatenate([table[f"b{gate}"][:, 0] for gate in names])
        return jnp.concatenate([table[f"W{gate}"][:, cut].T for gate in names], axis=1)

    def loss_fn(params):
        xs_rows, h0 = (jnp.asarray(v).swapaxes(-1, -2) for v in (xs, a))
        hs = jaxgru.gru(params, xs_rows, h0)[1]
        logits = jnp.asarray(p["Wy"]) @ hs.swapaxes(-1, -2)
        logits = logits + jnp.broadcast_to(p["by"], logits.shape)
        return -jnp.sum(targets * jax.nn.log_softmax(logits, axis=1))

    params = jaxgru.GRUParams(
        pack(p, "x"), pack(p, "h"), pack(p, "b"), None, spec=jaxgru.CHUNG_2014
    )
    gradient = jax.jit(jax.grad(loss_fn))(params)
    want = {"x": gradient.w_x, "h": gradient.w_h, "b": gradient.b_x}
    error = largest_error({part: pack(got[2], part) for part in "xhb"}, want)
    return Row("this package", "dW = the gradient of gru with CHUNG_2014", "OK", error)
