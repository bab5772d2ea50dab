"""The layers of jaxgru and of the plain scans, and the programs that are made from a layer.

A `Layer` holds what the benchmarks need of a JAX library: the conversion of weights from jaxgru's
layout and back, functions for a sequence and for sequences of different lengths, and a function for
one step.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks.problems import (
    CharModel,
    Problem,
    Program,
    Reset,
    Result,
    Task,
    as_result,
    compile_program,
    training_step,
)
from jaxgru import GRUParams, gru, gru_cell, length_mask
from jaxgru.models import generate

Array = jax.Array
Generate = Callable[[CharModel], tuple[Callable[..., Any], tuple]]
STEPS_PER_CALL = 300  # in a timed call of the task "step"


class Layer(NamedTuple):
    """How a JAX library stores and runs a GRU layer.

    `unpack` takes weights or gradients, so it must be the transpose of `pack`. Both only move
    numbers and change signs; a bias that `pack` sums from b_x and b_h becomes b_x in `unpack`.
    """

    pack: Callable[[GRUParams], Any]
    unpack: Callable[[Any], dict[str, Any]]  # w_x, w_h, b_x, and b_hn [H] if there is one
    run: Callable[[Any, Array, Array], tuple[Array, Array]]  # weights, xs, h0 -> h_last, hs
    cell: Callable[[Any, Array, Array], Array] | None  # weights, x [B, D], h [B, H] -> h
    batch_major: bool = False  # xs [B, T, D] and hs [B, T, H]
    generate: Generate | None = None  # the library's own loop; if None, a scan over the cell
    padded: Callable[..., tuple[Array, Array]] | None = None  # as run, and lengths [B]


def build(layer: Layer, task: Task, problem: Problem | CharModel, compiles: int = 1) -> Program:
    """The program of a task; the arrays are converted here, which is not timed."""
    if isinstance(problem, CharModel):
        return _generation(layer, problem)
    if task == "step":
        return _steps(layer, problem)
    weights = layer.pack(problem.params)
    xs, dhs = (_swap(layer, v) for v in (problem.xs, problem.dhs))
    if task == "forward":

        def read_forward(result) -> Result:
            return as_result(h_last=result[0], hs=_swap(layer, result[1]))

        return compile_program(layer.run, (weights, xs, problem.h0), read_forward, compiles)

    def read_training(result) -> Result:
        value, (dweights, dxs, dh0) = result
        return as_result(value=value, **layer.unpack(dweights), xs=_swap(layer, dxs), h0=dh0)

    def padded_step(weights, xs, h0, dh_last, dhs, lengths):
        assert layer.padded is not None
        run = functools.partial(layer.padded, lengths=lengths)
        return training_step(run)(weights, xs, h0, dh_last, dhs)

    arguments = (weights, xs, problem.h0, problem.dh_last, dhs)
    if problem.lengths is None:
        return compile_program(training_step(layer.run), arguments, read_training, compiles)
    return compile_program(padded_step, (*arguments, problem.lengths), read_training, compiles)


def build_cut(layer: Layer, task: Task, problem: Problem, compiles: int = 1) -> Program:
    """The training step without the steps that are padding in every sequence."""
    assert problem.lengths is not None
    longest, num_steps = int(problem.lengths.max()), len(problem.xs)
    cut = problem._replace(xs=problem.xs[:longest], dhs=problem.dhs[:longest])
    program = build(layer, task, cut, compiles)

    def read(result) -> Result:
        found = program.read(result)
        return {**found, "xs": np.pad(found["xs"], ((0, num_steps - longest), (0, 0), (0, 0)))}

    return program._replace(read=read)


def _swap(layer: Layer, v: Array) -> Array:
    """Converts [T, B, ...] to the layer's own order of axes, or back."""
    return jnp.swapaxes(v, 0, 1) if layer.batch_major else v


def _steps(layer: Layer, problem: Problem) -> Program:
    """The layer's jitted step, called from Python in a loop that passes the state on."""
    assert layer.cell is not None
    cell, weights, x = jax.jit(layer.cell), layer.pack(problem.params), problem.xs[0]

    def call():
        h = problem.h0
        for _ in range(STEPS_PER_CALL):
            h = cell(weights, x, h)
        return jax.block_until_ready(h)

    return Program(call, lambda h: as_result(h=h), repeats=STEPS_PER_CALL)


def _generation(layer: Layer, model: CharModel) -> Program:
    """Greedy generation in one jitted loop: embedding, step, head, argmax."""
    function, arguments = (layer.generate or functools.partial(_scan_cell, layer))(model)

    def call():
        return jax.block_until_ready(function(*arguments))

    return Program(call, lambda tokens: as_result(tokens=tokens))


def _scan_cell(layer: Layer, model: CharModel):
    """Greedy generation by a scan over the library's cell, which carries state and character."""
    assert layer.cell is not None and model.params.embedding is not None
    cell = layer.cell

    @jax.jit
    def write(weights, embedding, w, b, first):
        def body(carry, _):
            h, token = carry
            h = cell(weights, embedding[token], h)
            token = jnp.argmax(h @ w + b[None], axis=-1).astype(first.dtype)
            return (h, token), token

        h0 = jnp.zeros((1, w.shape[0]), w.dtype)
        return lax.scan(body, (h0, first), None, length=model.num_tokens)[1][:, 0]

    params = model.params
    (layer_params,) = params.layers
    assert isinstance(layer_params, GRUParams)
    first = jnp.full((1,), model.first, jnp.int32)
    return write, (layer.pack(layer_params), params.embedding, params.w, params.b, first)


def our_layer(reset: Reset, gradient: Any = "bptt") -> Layer:
    """A layer of `jaxgru.gru`; with the default gradient also `gru_cell` and `generate`."""

    def write(model: CharModel):
        key, prompt = jax.random.key(0), jnp.full((1, 1), model.first, jnp.int32)
        run = functools.partial(generate, temperature=0.0)

        def tokens(params):
            return run(params, key, prompt, model.num_tokens)[1][:, 0]

        return tokens, (model.params,)

    return Layer(
        pack=lambda params: params,
        unpack=unpack_ours,
        run=functools.partial(gru, gradient=gradient),
        padded=lambda params, xs, h0, lengths: gru(
            params, xs, h0, mask=length_mask(lengths, len(xs)), gradient=gradient
        ),
        cell=gru_cell if gradient == "bptt" else None,
        generate=write if gradient == "bptt" else None,
    )


def unpack_ours(params: GRUParams) -> dict[str, Any]:
    """The leaves in jaxgru's layout; b_hn is the candidate block of b_h for both resets."""
    b_h = params.b_h
    b_hn = None if b_h is None else b_h[2 * params.w_h.shape[0] :]
    return {"w_x": params.w_x, "w_h": params.w_h, "b_x": params.b_x, "b_hn": b_hn}


def plain_layer(reset: Reset, *, hoist: bool) -> Layer:
    """A scan over the textbook cell; it shares only the layout of weights with jaxgru.

    The step projects the input, with one product for all gates, and splits the weights, as in
    Equinox and Haiku. With `hoist` both are done before the loop.
    """

    def step(params, blocks, x, h):
        if hoist:
            return _textbook_step(blocks, x, h, reset)
        return _textbook_step(_split(params, reset), project(params, x), h, reset)

    def run(params, xs, h0):
        blocks = _split(params, reset)

        def body(h, x):
            h = step(params, blocks, x, h)
            return h, h

        return lax.scan(body, h0, project(params, xs) if hoist else xs)

    def padded(params, xs, h0, lengths):
        blocks = _split(params, reset)

        def body(h, inputs):
            x, t = inputs
            h = jnp.where((t < lengths)[:, None], step(params, blocks, x, h), h)
            return h, h

        return lax.scan(body, h0, (project(params, xs) if hoist else xs, jnp.arange(len(xs))))

    def project(params, xs):
        return xs @ params.w_x + params.b_x.reshape((1,) * (xs.ndim - 1) + (-1,))

    def cell(params, x, h):
        return _textbook_step(_split(params, reset), project(params, x), h, reset)

    single = None if hoist else cell
    return Layer(lambda params: params, unpack_ours, run, single, padded=padded)


def _split(params, reset):
    """(weight, bias) of each product with the state: one for r | z | n, or r | z and n apart."""
    w_h, b_h = params.w_h, params.b_h[None]
    if reset == "after":
        return ((w_h, b_h),)
    two = 2 * w_h.shape[0]
    return (w_h[:, :two], b_h[:, :two]), (w_h[:, two:], b_h[:, two:])


def _textbook_step(blocks, a, h, reset):
    """h' = z h + (1 - z) n from the projected input a [B, 3H], with blocks r | z | n."""
    two = 2 * h.shape[-1]
    if reset == "after":
        ((w, b),) = blocks
        u = h @ w + b
        r, z = jnp.split(jax.nn.sigmoid(a[:, :two] + u[:, :two]), 2, axis=-1)
        n = jnp.tanh(a[:, two:] + r * u[:, two:])
    else:
        (w_rz, b_rz), (w_n, b_n) = blocks
        r, z = jnp.split(jax.nn.sigmoid(a[:, :two] + h @ w_rz + b_rz), 2, axis=-1)
        n = jnp.tanh(a[:, two:] + (r * h) @ w_n + b_n)
    return z * h + (1 - z) * n
