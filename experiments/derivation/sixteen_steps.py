"""Reverse-mode differentiation of the sixteen unary and binary steps of one GRU step.

`TAPE` lists the steps. The forward pass computes the output of each step. The backward pass goes
through the steps in reverse order, and the rule of each operation gives the cotangents of its
inputs. Cotangents of a value that is used more than once, also by several time steps, are added.
The document uses column vectors, no biases, and any activation f::

    z = s(W_zh h_tm1 + W_zx x)            h~  = f(W_h (r * h_tm1) + W_x x)
    r = s(W_rh h_tm1 + W_rx x)            h_t = z * h_tm1 + (1 - z) * h~
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxgru
from experiments.derivation.draws import draw
from experiments.derivation.verdicts import Row, largest_error, relative_error

LABEL = "sixteen steps"
TITLE = "Feedforward and Backward Propagation in Gated Recurrent Unit (GRU) (no author printed)"
INPUT_SIZE, HIDDEN_SIZE, NUM_STEPS = 3, 4, 6


class Step(NamedTuple):
    """One line of the tape: output = operation(inputs)."""

    equation: int
    output: str
    operation: str
    inputs: tuple[str, ...]


class Operation(NamedTuple):
    """What a step computes, and its transpose: the cotangent of each input, given dv."""

    forward: Callable
    backward: Callable  # (dv, *inputs)
    text: str
    transposed: tuple[str, ...]  # texts of the cotangents of the inputs


class Activation(NamedTuple):
    """f and f' as functions of the argument, and JAX's own f."""

    value: Callable
    slope: Callable
    reference: Callable


TAPE = (
    Step(5, "g1", "matvec", ("W_zh", "h_tm1")),
    Step(6, "g2", "matvec", ("W_zx", "x")),
    Step(7, "g3", "add", ("g1", "g2")),
    Step(8, "z", "sigmoid", ("g3",)),
    Step(9, "g4", "matvec", ("W_rh", "h_tm1")),
    Step(10, "g5", "matvec", ("W_rx", "x")),
    Step(11, "g6", "add", ("g4", "g5")),
    Step(12, "r", "sigmoid", ("g6",)),
    Step(13, "g7", "hadamard", ("r", "h_tm1")),
    Step(14, "g8", "matvec", ("W_h", "g7")),
    Step(15, "g9", "matvec", ("W_x", "x")),
    Step(16, "g10", "add", ("g8", "g9")),
    Step(17, "h~", "f", ("g10",)),
    Step(18, "g11", "hadamard", ("z", "h_tm1")),
    Step(19, "g12", "rest", ("z", "h~")),
    Step(20, "h_t", "add", ("g11", "g12")),
)
WEIGHTS = ("W_zh", "W_zx", "W_rh", "W_rx", "W_h", "W_x")
VALUES = ("h_tm1", "x", *(step.output for step in TAPE))


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def sigmoid_slope(a):
    return sigmoid(a) * sigmoid(-a)


ACTIVATIONS = {
    "tanh": Activation(np.tanh, lambda a: 1 - np.tanh(a) ** 2, jnp.tanh),
    "relu": Activation(
        lambda a: np.maximum(a, 0), lambda a: np.where(a > 0, 1.0, 0.0), jax.nn.relu
    ),
    "sigmoid": Activation(sigmoid, sigmoid_slope, jax.nn.sigmoid),
    "softplus": Activation(lambda a: np.logaddexp(a, 0), sigmoid, jax.nn.softplus),
    "identity": Activation(lambda a: a, np.ones_like, lambda a: a),
    "silu": Activation(
        lambda a: a * sigmoid(a), lambda a: sigmoid(a) + a * sigmoid_slope(a), jax.nn.silu
    ),
}  # silu is not monotonic, so its slope is not a function of its value
OPERATIONS = {
    "matvec": Operation(
        lambda w, v: w @ v,
        lambda du, w, v: (np.outer(du, v), w.T @ du),
        "{0} {1}",
        ("d{out} {1}^T", "{0}^T d{out}"),
    ),
    "add": Operation(
        lambda a, b: a + b, lambda du, a, b: (du, du), "{0} + {1}", ("d{out}", "d{out}")
    ),
    "hadamard": Operation(
        lambda a, b: a * b,
        lambda du, a, b: (du * b, du * a),
        "{0} * {1}",
        ("d{out} * {1}", "d{out} * {0}"),
    ),
    "rest": Operation(
        lambda a, b: (1 - a) * b,
        lambda du, a, b: (-du * b, du * (1 - a)),
        "(1 - {0}) * {1}",
        ("-d{out} * {1}", "d{out} * (1 - {0})"),
    ),
    "sigmoid": Operation(
        sigmoid,
        lambda du, a: (du * sigmoid_slope(a),),
        "s({0})",
        ("d{out} * {out} * (1 - {out})",),
    ),
}


def operations_of(activation: str) -> dict[str, Operation]:
    """The operations of the tape, with this activation as f."""
    f = ACTIVATIONS[activation]
    rule = Operation(f.value, lambda du, a: (du * f.slope(a),), "f({0})", ("d{out} * f'({0})",))
    return {**OPERATIONS, "f": rule}


def run_forward(operations, weights, x, h_tm1):
    """Runs the tape forward; returns {name: value} for one GRU step."""
    values = {**weights, "x": x, "h_tm1": h_tm1}
    for step in TAPE:
        inputs = (values[name] for name in step.inputs)
        values[step.output] = operations[step.operation].forward(*inputs)
    return values


def run_backward(operations, values, dh_t, forget=()):
    """Runs the tape backward; returns {name: cotangent} for one GRU step.

    For names in `forget`, a new cotangent replaces the previous one instead of being added.
    """
    cotangents = {"h_t": dh_t}
    for step in reversed(TAPE):
        inputs = (values[name] for name in step.inputs)
        parts = operations[step.operation].backward(cotangents[step.output], *inputs)
        for name, part in zip(step.inputs, parts):
            added = name in cotangents and name not in forget
            cotangents[name] = cotangents[name] + part if added else part
    return cotangents


class Problem(NamedTuple):
    """Random weights, inputs [T, D], a first state and an upstream gradient dL/dh_t [T, H]."""

    weights: dict[str, np.ndarray]
    xs: np.ndarray
    h0: np.ndarray
    upstream: np.ndarray


def draw_problem(generator, num_steps):
    sizes = {name: INPUT_SIZE if name.endswith("x") else HIDDEN_SIZE for name in WEIGHTS}
    return Problem(
        {name: draw(generator, HIDDEN_SIZE, size) for name, size in sizes.items()},
        draw(generator, num_steps, INPUT_SIZE),
        draw(generator, HIDDEN_SIZE),
        draw(generator, num_steps, HIDDEN_SIZE),
    )


def run_tape(operations, problem, forget=()):
    """(values of every time step, cotangents of every time step, gradients summed over time)."""
    h, trace, carried = problem.h0, [], np.zeros(HIDDEN_SIZE)
    for x in problem.xs:
        trace.append(run_forward(operations, problem.weights, x, h))
        h = trace[-1]["h_t"]
    cotangents, total = [], {name: np.zeros_like(w) for name, w in problem.weights.items()}
    for values, dh_t in zip(reversed(trace), reversed(problem.upstream)):
        cotangents.insert(0, run_backward(operations, values, dh_t + carried, forget))
        carried = cotangents[0]["h_tm1"]
        total = {name: total[name] + cotangents[0][name] for name in WEIGHTS}
    return trace, cotangents, total


def equations(weights, x, h_tm1, nudges, f):
    """(1)-(4) with a name for every sub-expression.

    Zeros are added to each (its nudge), so that JAX can differentiate with respect to it.
    """
    values = {}

    def name(key, value):
        values[key] = value + nudges[key]
        return values[key]

    w = {key: name(key, weights[key]) for key in WEIGHTS}
    x, h = name("x", x), name("h_tm1", h_tm1)
    g3 = name("g3", name("g1", w["W_zh"] @ h) + name("g2", w["W_zx"] @ x))
    z = name("z", jax.nn.sigmoid(g3))
    g6 = name("g6", name("g4", w["W_rh"] @ h) + name("g5", w["W_rx"] @ x))
    r = name("r", jax.nn.sigmoid(g6))
    g10 = name("g10", name("g8", w["W_h"] @ name("g7", r * h)) + name("g9", w["W_x"] @ x))
    candidate = name("h~", f(g10))
    name("h_t", name("g11", z * h) + name("g12", (1 - z) * candidate))
    return values


def run_autodiff(problem, activation):
    """The same as `run_tape`, by JAX's gradients of sum_t dL/dh_t . h_t."""
    index = list(ACTIVATIONS).index(activation)
    gradients, trace = jax.device_get(_gradients(problem, index))
    tables = trace, gradients[1]
    steps = range(len(problem.xs))
    return *([{k: v[t] for k, v in table.items()} for t in steps] for table in tables), gradients[0]


@jax.jit  # one compilation for every f
def _gradients(problem, index):
    f = functools.partial(jax.lax.switch, index, [f.reference for f in ACTIVATIONS.values()])

    def loss(weights, nudges):
        def body(h, inputs):
            values = equations(weights, inputs[0], h, inputs[1], f)
            return values["h_t"], values

        _, trace = jax.lax.scan(body, problem.h0, (problem.xs, nudges))
        return jnp.sum(trace["h_t"] * problem.upstream), trace

    shapes = {name: (INPUT_SIZE if name == "x" else HIDDEN_SIZE,) for name in VALUES}
    shapes |= {name: w.shape for name, w in problem.weights.items()}
    nudges = {name: jnp.zeros((len(problem.xs), *shape)) for name, shape in shapes.items()}
    return jax.grad(loss, argnums=(0, 1), has_aux=True)(problem.weights, nudges)


def select(table, names):
    return {name: table[name] for name in names}


def errors_of(got, want):
    """The largest errors of values, cotangents and weight gradients."""
    forward, backward = (
        max(largest_error(*tables) for tables in zip(got[side], want[side])) for side in (0, 1)
    )
    return forward, backward, largest_error(got[2], want[2])


def rows(generator, activation="tanh"):
    """The rows of the document, and the values and cotangents of one step by tape and autodiff.

    That is the last time step, which gets no cotangent from a later one.
    """
    operations, problem = operations_of(activation), draw_problem(generator, NUM_STEPS)
    got, want = run_tape(operations, problem), run_autodiff(problem, activation)
    sides = [(side[0][-1], side[1][-1]) for side in (got, want)]
    result = [
        *step_rows(operations, *sides),
        *forgetting_rows(operations, problem, *sides),
        *time_rows(operations, problem, got, want),
        *activation_rows(problem),
        *package_rows(problem),
    ]
    return result, sides


def step_rows(operations, tape, autodiff):
    """Rows for each value, then for every cotangent in the order of the backward pass."""
    (values, cotangents), (true_values, true_cotangents) = tape, autodiff
    for step in TAPE:
        text = f"{step.output} = {operations[step.operation].text.format(*step.inputs)}"
        error = relative_error(values[step.output], true_values[step.output])
        yield Row(f"({step.equation})", text, "OK", error)
    seen = set()
    for step in reversed(TAPE):
        for name, rule in zip(step.inputs, operations[step.operation].transposed):
            text = f"d{name} {'+=' if name in seen else '='} "
            text += rule.format(*step.inputs, out=step.output)
            seen.add(name)
            error = relative_error(cotangents[name], true_cotangents[name])
            yield Row(f"({step.equation}) gives d{name}", "(absent)", "MISSING", None, text, error)


def forgetting_rows(operations, problem, tape, autodiff):
    """z, h_tm1 and x are used more than once: assigning their cotangents keeps only one path."""
    for name, place in (("z", "after (18)"), ("h_tm1", "(13), (9), (5)"), ("x", "(10), (6)")):
        true = autodiff[1][name]
        assigned = run_tape(operations, problem, forget=(name,))[1][-1][name]
        printed, fixed = relative_error(assigned, true), relative_error(tape[1][name], true)
        yield Row(place, f"= for d{name}", "MISSING", printed, f"d{name} += each time", fixed)


def time_rows(operations, problem, got, want):
    """For T > 1, every dW is summed over time, and dh_tm1 is passed to the step before."""
    errors = errors_of(got, want)
    printed = largest_error(select(got[1][-1], WEIGHTS), want[2])
    says = f"complete; T = {NUM_STEPS}, last step's dW"
    yield Row("closing line", says, "TEXT", printed, "dW += over time", errors[2])
    single_step = run_backward(operations, got[0][0], problem.upstream[0])
    printed = relative_error(single_step["h_tm1"], want[1][0]["h_tm1"])
    cure = "dh_t = dL/dh_t + dh_tm1 of step t + 1"
    yield Row("closing line, dh", "dh_tm1 not carried", "TEXT", printed, cure, max(errors[:2]))


def activation_rows(problem):
    """For general f the factor is f'(g10); 1 - h~^2 is right only for tanh."""
    says, cure = "dg10 = dh~ * (1 - h~^2)", "dg10 = dh~ * f'(g10)"
    for name in ACTIVATIONS:
        want = run_autodiff(problem, name)
        fixed = max(errors_of(run_tape(operations_of(name), problem), want))
        place, printed = f"(17), f = {name}", tanh_rule_error(problem, name, want)
        if name == "tanh":
            yield Row(place, says, "OK", max(printed, fixed))
        else:
            yield Row(place, says, "NOTATION", printed, cure, fixed)


def tanh_rule_error(problem, name, want):
    """The error of the gradients if step (17) uses 1 - h~^2 for f', for any f."""
    value = ACTIVATIONS[name].value
    operations = operations_of(name)
    rule = operations["f"]._replace(backward=lambda du, a: (du * (1 - value(a) ** 2),))
    return largest_error(run_tape({**operations, "f": rule}, problem)[2], want[2])


def package_rows(problem):
    """Compares the tape with this package, and the package's three specs with each other."""
    trace, _, total = run_tape(operations_of("tanh"), problem)
    states = np.stack([values["h_t"] for values in trace])
    params = pack(problem.weights)
    keep = run_package(params, problem, jaxgru.CHO_2014)
    yield Row("this package", "h_t = gru with CHO_2014", "OK", relative_error(states, keep[0]))
    error = relative_error(stacked(pack(total)), keep[1])
    yield Row("this package, dW", "dW = the gradient of gru with CHO_2014", "OK", error)
    names = ("W_zh", "W_zx")
    signs = {name: -1.0 if name in names else 1.0 for name in WEIGHTS}
    flip = pack({name: sign * problem.weights[name] for name, sign in signs.items()})
    write = run_package(flip, problem, jaxgru.CHUNG_2014)
    turned = stacked(pack({name: signs[name] * total[name] for name in WEIGHTS}))
    error = max(relative_error(write[0], states), relative_error(turned, write[1]))
    printed = relative_error(run_package(params, problem, jaxgru.CHUNG_2014)[0], states)
    cure = "the same with W_zh, W_zx negated"
    yield Row("keep or write", "same weights, same model", "NOTATION", printed, cure, error)
    printed = relative_error(run_package(params, problem, jaxgru.PYTORCH)[0], states)
    diagonal = pack({**problem.weights, "W_h": np.diag(np.diag(problem.weights["W_h"]))})
    before, after = (
        run_package(diagonal, problem, s)[0] for s in (jaxgru.CHO_2014, jaxgru.PYTORCH)
    )
    cure, error = "equal for a diagonal W_h", relative_error(after, before)
    yield Row("reset before or after", "same weights, same model", "NOTATION", printed, cure, error)


def pack(weights):
    """The weights in the layout of this package: [I, 3H] and [H, 3H] with blocks r | z | n."""
    w_x = np.concatenate([weights[name].T for name in ("W_rx", "W_zx", "W_x")], axis=1)
    w_h = np.concatenate([weights[name].T for name in ("W_rh", "W_zh", "W_h")], axis=1)
    return jaxgru.GRUParams(jnp.asarray(w_x), jnp.asarray(w_h), None, None, spec=jaxgru.CHO_2014)


def stacked(params):
    """The weights of the input and of the state, concatenated along the rows."""
    return jnp.concatenate([params.w_x, params.w_h])


@functools.partial(jax.jit, static_argnames="spec")
def run_package(params, problem, spec):
    """(the states [T, H] of `jaxgru.gru`, the gradient of upstream . states, stacked)."""

    def loss(params):
        with_spec = dataclasses.replace(params, spec=spec)
        hs = jaxgru.gru(with_spec, problem.xs, problem.h0)[1]
        return jnp.sum(hs * problem.upstream), hs

    gradient, hs = jax.grad(loss, has_aux=True)(params)
    return hs, stacked(gradient)
