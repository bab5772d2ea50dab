"""What a call costs, counted in the compiled program, not timed: no speed is lost unseen.

The counts are of XLA's own listing for one CPU: instructions of the loop bodies, the products among
them, and the bytes it sets aside. Fewer is welcome: then lower the number here.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import HAS_EMITTERS, flat

import jaxgru
from jaxgru import CHO_2014, PYTORCH, init_gru
from jaxgru.diagnostics import rtrl

gru = flat(jaxgru.gru)

T, B, I_SIZE, H = 64, 4, 8, 16
STATES = T * B * H  # numbers in hs
FLOAT = 4
pytestmark = pytest.mark.usefixtures("optimized")
EQUATIONS = pytest.mark.parametrize("spec", [CHO_2014, PYTORCH], ids=["before", "after"])


def make_arguments(num_steps=T):
    keys = jax.random.split(jax.random.key(0), 3)
    params = init_gru(keys[0], I_SIZE, H, scheme="pytorch")
    xs = jax.random.normal(keys[1], (num_steps, B, I_SIZE))
    return params, xs, jax.random.normal(keys[2], (B, H))


def training(last_only=False, argnums=(0, 1, 2), **options):
    """The gradients of a loss of every output, or of the last state alone."""

    def loss(params, xs, h0):
        h_last, hs = gru(params, xs, h0, **options)
        return jnp.sum(jnp.sin(h_last)) + (0.0 if last_only else jnp.sum(jnp.cos(hs)))

    return jax.grad(loss, argnums=argnums)


def compile_for(function, num_steps=T, arguments=None):
    """As it is for users: with the fusion emitters that conftest.py turns off."""
    options = {"xla_cpu_use_fusion_emitters": True} if HAS_EMITTERS else None
    arguments = make_arguments(num_steps) if arguments is None else arguments
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)


def temporaries(function, num_steps=T):
    """Bytes that XLA sets aside beside arguments and results."""
    return compile_for(function, num_steps).memory_analysis().temp_size_in_bytes


def read_computations(text):
    """name -> the lines of its body, of a listing by `compiled.as_text()`."""
    found, name = {}, None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line)
        if head:
            name = head.group(1)
            found[name] = []
        elif name and line.startswith("}"):
            name = None
        elif name:
            found[name].append(line.strip())
    return found


def innermost_loops(function, num_steps=T):
    """For each loop without a loop in it: its instructions, and those of what they call."""
    computations = read_computations(compile_for(function, num_steps).as_text())
    every_line = "\n".join("\n".join(lines) for lines in computations.values())
    loops = []
    for body in sorted(set(re.findall(r"body=%?([\w.\-]+)", every_line))):
        lines = computations[body]
        if any(" while(" in line for line in lines):
            continue
        called = re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", "\n".join(lines))
        loops.append((lines, [line for name in called for line in computations[name]]))
    return loops


def count(lines, operation):
    return sum(f" {operation}(" in line for line in lines)


def kernels(lines):
    """Instructions that run something: no parameter, constant, tuple or change of view."""
    free = ("parameter(", "constant(", "get-tuple-element(", "tuple(", "bitcast(")
    return [line for line in lines if not any(f" {name}" in line for name in free)]


@EQUATIONS
def test_loops_hold_the_least_products(spec):
    """One product of width 3H a step where the reset gate acts after it, two where before."""
    products = 1 if spec.reset == "after" else 2
    forward = innermost_loops(functools.partial(gru, spec=spec))
    assert [count(lines + fused, "dot") for lines, fused in forward] == [products]
    both = innermost_loops(training(spec=spec, residuals="gates"))
    assert [count(lines + fused, "dot") for lines, fused in both] == [products, products]


@EQUATIONS
@pytest.mark.parametrize("chunk_size", [T, 8], ids=["whole", "chunks"])
def test_no_loop_cuts_or_turns_a_weight_or_a_projection(spec, chunk_size):
    """A slice of w_h, its transpose, or one of a [T, B, 3H] array would be made at every step.

    XLA can also fold a transpose into the product, which then reads the weight the slow way.
    """
    loops = innermost_loops(training(spec=spec, residuals="gates", chunk_size=chunk_size))
    assert len(loops) == 2
    for lines, fused in loops:
        sizes = []
        for line in kernels(lines + fused):
            made = re.match(r"(?:ROOT )?%?[\w.\-]+ = f32\[([\d,]*)\]\{[\d,]*\} ([\w\-]+)\(", line)
            if made and made.group(2) == "dot":
                assert "lhs_contracting_dims={1}, rhs_contracting_dims={0}" in line
            elif made and "dynamic-update-slice" not in line:
                sizes.append(math.prod(map(int, filter(None, made.group(1).split(",")))))
                assert made.group(2) != "dynamic-slice" or f"{B},{3 * H}]" not in line, line
        assert len(sizes) > 10 and max(sizes) < H * H


@EQUATIONS
def test_loops_run_few_kernels(spec):
    """Each is a call of a microsecond or so: at small sizes their number is the speed."""
    before = spec.reset == "before"
    (lines, _) = innermost_loops(functools.partial(gru, spec=spec))[0]
    assert len(kernels(lines)) <= (8 if before else 5), lines
    counts = sorted(len(kernels(lines)) for lines, _ in innermost_loops(training(spec=spec)))
    assert counts[0] <= 10 and counts[1] <= 14, counts


@EQUATIONS
@pytest.mark.parametrize("residuals", ["gates", "states", "boundaries"])
def test_residuals_are_what_the_docstring_says(spec, residuals):
    arguments = make_arguments()
    run = functools.partial(gru, spec=spec, residuals=residuals, chunk_size=8)
    saved = jax.tree.leaves(jax.vjp(run, *arguments)[1])
    given = {v.unsafe_buffer_pointer() for v in jax.tree.leaves(arguments)}
    saved = [v for v in saved if v.ndim == 3 and v.unsafe_buffer_pointer() not in given]
    whole = sum(v.shape == (T, B, H) for v in saved)
    gates = 4 if spec.reset == "after" else 3
    assert whole == {"gates": 1 + gates, "states": 1, "boundaries": 0}[residuals]
    starts = [(T // 8, B, H)] if residuals == "boundaries" else []
    assert [v.shape for v in saved if v.shape != (T, B, H)] == starts


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(CHO_2014, id="before", marks=pytest.mark.slow),
        pytest.param(PYTORCH, id="after"),
    ],
)
def test_temporaries_shrink_with_the_residuals(spec):
    """In units of hs, for a loss of the last state, so that nothing else needs hs."""
    steps, unit = 8 * T, 8 * STATES * FLOAT

    def in_states(**options):
        return temporaries(training(True, spec=spec, **options), steps) / unit

    gates = 4 if spec.reset == "after" else 3
    assert 1 + gates < in_states(residuals="gates", chunk_size=8) < 1.5 + gates
    assert 1 < in_states(residuals="states", chunk_size=8) < 1.5
    assert in_states(residuals="boundaries", chunk_size=8) < 0.6
    assert in_states(gradient="autodiff") > 10


def test_boundaries_of_a_many_to_one_loss_grow_as_the_square_root_of_time():
    """T / K + K states with K near sqrt(T): sixteen times the steps, four times the memory."""
    function = training(last_only=True, argnums=(0, 2), residuals="boundaries")
    short, long = (temporaries(function, num_steps) for num_steps in (1024, 16384))
    assert long < 5 * short
    assert long < 0.2 * 16384 * B * H * FLOAT  # of what hs alone would take


def test_memory_of_rtrl_does_not_grow_with_time():
    """What it sets aside is the influence and the gradient, beside the sequences themselves."""
    params, *_ = make_arguments()

    def set_aside(num_steps):
        xs, targets = (jnp.zeros((num_steps, B, size)) for size in (I_SIZE, H))
        run = functools.partial(rtrl, lambda h, y: jnp.sum((h - y) ** 2))
        compiled = compile_for(run, arguments=(params, xs, targets))
        return compiled.memory_analysis().temp_size_in_bytes

    assert set_aside(1024) <= set_aside(64) + 1024


def test_gradients_that_nobody_wants_cost_no_product():
    """Without xs among the arguments of jax.grad the product with w_x^T is left out."""
    counts = []
    for argnums in ((0, 1), (0,)):
        text = compile_for(training(argnums=argnums)).as_text()
        counts.append(count(text.splitlines(), "dot"))
    assert counts[1] == counts[0] - 1


def test_default_residuals_follow_the_sizes():
    """Gates are recomputed where T B H > 2^19 and I + H <= 256, and saved elsewhere."""

    def saved(num_steps, batch, inputs, hidden):
        """How many arrays [T, B, H]: hs alone, or hs and r, z, n."""
        params = init_gru(jax.random.key(0), inputs, hidden)
        xs = jax.ShapeDtypeStruct((num_steps, batch, inputs), jnp.float32)
        leaves = jax.tree.leaves(jax.eval_shape(lambda xs: jax.vjp(gru, params, xs)[1], xs))
        return sum(v.shape == (num_steps, batch, hidden) for v in leaves)

    assert saved(1025, 8, 192, 64) == 1
    assert saved(1024, 8, 192, 64) == 4
    assert saved(1025, 8, 193, 64) == 4


def test_chunks_of_padding_are_skipped_and_nothing_else_is_conditional():
    """One branch forward and one backward where there is a mask and more than one chunk."""
    mask = jnp.arange(T)[:, None] < jnp.array([[3, 0, 9, 1]])

    def conditionals(**options):
        return count(compile_for(training(**options)).as_text().splitlines(), "conditional")

    assert conditionals(mask=mask, chunk_size=8) == 2
    assert conditionals(mask=mask) == 0
    assert conditionals(chunk_size=8) == 0
