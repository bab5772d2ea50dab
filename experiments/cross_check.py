"""Compares the package's handwritten derivatives with autodiff and finite differences.

    python -m experiments.cross_check                          # the package's own rules
    python -m experiments.cross_check --full                   # every point: half an hour
    python -m experiments.cross_check --mutate                 # are seeded faults in them caught?

`python -m jaxgru.checks` does the same for a function of yours.

The package's grid is reset x update x activation x direction x gradient of `gru`, both with a mask
and resets and without them. `--full` checks all of it. By default, all directions and gradients are
checked only for tanh with mask and resets. For tanh without them, and for the other activations
with them, only the forward direction is checked, with residuals="gates" and with
gradient="tangent". The dtype is then float64 only. `gru_cell` is compared with `gru` over one step,
and a bidirectional `gru_stack` with JAX's own derivative.

`--mutate` seeds one fault at a time into `OWN_RULES`, the rules in `jaxgru.core`, and checks
whether it is caught (see `jaxgru.checks.check_mutants`).

A run folder holds config.json, cross_check.json (all rows; a number that is not finite is null) and
cross_check.txt. The exit code is 0 if everything agrees and no mutant survives, and 1 if not.
"""

import dataclasses
import functools
import itertools
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxgru
from experiments import runs
from jaxgru import checks

ACTIVATIONS = ("tanh", "relu", "sigmoid", "softplus", "identity")
GRADIENTS: dict[str, Any] = {  # part of a point's name -> its gradient
    f"residuals={residuals}{words}": jaxgru.BPTT(residuals, chunk_size)
    for words, chunk_size in (("", None), (" chunk_size=2", 2))
    for residuals in ("gates", "states", "boundaries")
}
GRADIENTS["gradient=tangent"] = jaxgru.Tangent()
FEW_GRADIENTS = ("residuals=gates", "gradient=tangent")
RULES = (
    *("coefficients", "step_vjp", "gates_vjp", "params_vjp", "params_vjp_factors", "inputs_vjp"),
    *("step_jvp", "step_jvp_inputs"),
)
NORM_RULES = ("normalize_vjp", "normalize_jvp", "_project_out")
OWN_RULES = [
    *(f"jaxgru.core.derivatives:{name}" for name in RULES),
    *(f"jaxgru.core.layer_norm:{name}" for name in NORM_RULES),
    "jaxgru.core.flags:Flags.leave_vjp",
    "jaxgru.core.bptt:reverse_scan",
]


Point = tuple[str, Callable[[], checks.GradientReport]]  # the name of a check, and the check


def parse_args(argv):
    parser = runs.make_parser("cross_check", "Cross-checks handwritten derivatives.")
    add = parser.add_argument
    add("--mutate", action="store_true", help="seed faults into the rules: are they caught?")
    add("--full", action="store_true", help="check every point of the grid, in two dtypes")
    add("--smoke", action="store_true", help="seconds: two points of the grid, or one rule")
    add("--out", metavar="FOLDER", help="new or empty run folder (default: runs/cross_check-DATE)")
    add("--seed", type=int, default=0, help="of the random numbers")
    args = parser.parse_args(argv)
    if args.full and (args.smoke or args.mutate):
        parser.error("--full is for the whole grid, without --smoke and --mutate")
    return args


def main(argv=None):
    args = parse_args(argv)
    return runs.run_script("cross_check", lambda: run_all(args))


def run_all(args):
    run = runs.make_run_folder("cross_check", args.out, vars(args))
    report: Any = mutate(args) if args.mutate else check_grid(args)
    print(report)
    rows = [dataclasses.asdict(row) for row in report.rows]
    record = {
        "passed": report.passed,
        "command": sys.argv,
        "device": runs.describe_device(),
        "options": vars(args),
        "mutants" if args.mutate else "rows": rows,
    }
    runs.write_json(run / "cross_check.json", record)
    (run / "cross_check.txt").write_text(f"{report}\n", encoding="utf-8")
    points = "" if args.mutate else f"{len({row['case'] for row in rows})} points; "
    print(f"\n{points}{runs.describe_device()}; run folder: {run}")
    return 0 if report.passed else 1


def check_grid(args):
    """One report of all points, each of which is the case of its rows."""
    from tqdm import tqdm

    rows = []
    for name, check in tqdm([*grid_points(args)], unit="point"):
        rows += [dataclasses.replace(row, case=name) for row in check().rows]
    return checks.GradientReport(tuple(rows))


def mutate(args):
    """The report on all mutants of the rules."""
    options = {"dtypes": ("float64",), "finite_differences": False, "num_cotangents": 1}
    options |= {"key": jax.random.key(args.seed)}
    names = OWN_RULES[1:2] if args.smoke else OWN_RULES
    rules = {name: pkgutil.resolve_name(name) for name in names}
    # The loops are so short here that running them without jit takes less time than compiling.
    with jax.disable_jit():
        points = dict(mutation_points(args, options))
        return checks.check_mutants(rules, points, progress=True)


class Sequences(NamedTuple):
    """Arguments of `jaxgru.gru`: three sequences of five steps.

    The first one ends early, and the second one has a masked step in the middle.
    """

    params: jaxgru.GRUParams
    xs: jax.Array
    h0: jax.Array
    mask: jax.Array
    resets: jax.Array


def draw_sequences(seed: int) -> Sequences:
    keys = jax.random.split(jax.random.key(seed), 3)
    mask = [[1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1], [0, 1, 1]]
    resets = [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]]
    return Sequences(
        jaxgru.init_gru(keys[0], 2, 4, scheme="pytorch"),
        jax.random.normal(keys[1], (5, 3, 2)),
        jax.random.normal(keys[2], (3, 4)),
        jnp.array(mask, bool),
        jnp.array(resets, bool),
    )


def specs_of(activation) -> list[jaxgru.GRUSpec]:
    choices = itertools.product(("before", "after"), ("keep", "write"))
    return [jaxgru.GRUSpec(reset, update, activation) for reset, update in choices]


def grid_choices(args) -> Iterator[tuple[jaxgru.GRUSpec, bool, str, bool]]:
    """Yields (spec, reverse, key of GRADIENTS, masked) for every point."""
    if args.smoke:
        yield jaxgru.CHO_2014, False, FEW_GRADIENTS[0], True
        yield jaxgru.PYTORCH, True, FEW_GRADIENTS[-1], True
        return
    if args.full:
        specs = [spec for activation in ACTIVATIONS for spec in specs_of(activation)]
        yield from itertools.product(specs, (False, True), GRADIENTS, (True, False))
        return
    yield from itertools.product(specs_of("tanh"), (False, True), GRADIENTS, (True,))
    yield from itertools.product(specs_of("tanh"), (False,), FEW_GRADIENTS, (False,))
    others = [spec for activation in ACTIVATIONS[1:] for spec in specs_of(activation)]
    yield from itertools.product(others, (False,), FEW_GRADIENTS, (True,))


def grid_points(args) -> Iterator[Point]:
    arrays = draw_sequences(args.seed)
    options: dict[str, Any] = {"key": jax.random.key(args.seed)}
    if args.smoke:
        options |= {"dtypes": ("float64",), "finite_differences": False, "num_cotangents": 1}
    elif not args.full:
        options["dtypes"] = ("float64",)
    flags = {"mask": arrays.mask, "resets": arrays.resets}
    for spec, reverse, gradient, masked in grid_choices(args):
        grid = {"specs": [spec], "reverses": [reverse]}
        grid["gradients"] = [GRADIENTS[gradient]]
        check = functools.partial(checks.check_gru, *arrays[:3], **grid, **options)
        words = [spec.reset, spec.update, spec.activation, "reverse" if reverse else "forward"]
        name = " ".join([*words, gradient, "mask resets" if masked else "plain"])
        yield name, functools.partial(check, **(flags if masked else {}))
    if not args.smoke:
        yield from cell_and_stack_points(args, arrays, options)


def cell_and_stack_points(args, arrays: Sequences, options) -> Iterator[Point]:
    """Points for `gru_cell` and for a bidirectional `gru_stack`.

    The reference of the cell is `gru` over one step, that of the stack is gradient="autodiff".
    """
    for spec in specs_of("tanh"):

        def one_step(params, x, h):
            return jaxgru.gru(params, x[None], h, gradient="autodiff")[0]

        pair = jaxgru.gru_cell, one_step
        inputs = (dataclasses.replace(arrays.params, spec=spec), arrays.xs[0], arrays.h0)
        check = functools.partial(checks.check_gradients, *pair, *inputs, **options)
        yield f"{spec.reset} {spec.update} {spec.activation} gru_cell", check
    stack = jaxgru.init_stack(jax.random.key(args.seed), 2, 3, 2, bidirectional=True)
    for gradient in FEW_GRADIENTS:
        run = functools.partial(jaxgru.gru_stack, mask=arrays.mask, resets=arrays.resets)
        pair = (functools.partial(run, gradient=g) for g in (GRADIENTS[gradient], "autodiff"))
        check = functools.partial(checks.check_gradients, *pair, stack, arrays.xs, **options)
        yield f"gru_stack bidirectional {gradient}", check


def mutation_points(args, options) -> Iterator[Point]:
    """Points that together evaluate every expression of the package's rules.

    They are every equation and gradient on a batch with mask and resets; zoneout; a single sequence
    with layer norm and recurrent dropout; and constant parameters, which have no tangents.
    """
    arrays = draw_sequences(args.seed)
    flags: dict[str, Any] = {"mask": arrays.mask[2:], "resets": arrays.resets[2:]}
    batch = arrays.params, arrays.xs[2:], arrays.h0
    params = jaxgru.init_gru(jax.random.key(args.seed), 2, 4, scheme="pytorch", layer_norm=True)
    scale = jnp.linspace(0.5, 1.5, 12)
    params = dataclasses.replace(params, g_x=scale, g_h=scale[::-1])
    single = params, arrays.xs[2:, 0], arrays.h0[0]
    dropout: dict[str, Any] = {"noise": jaxgru.Noise(0.4), "key": jax.random.key(args.seed)}

    def point(name, spec, gradient, run, inputs):
        pair = [functools.partial(run, spec, gradient=g) for g in (gradient, "autodiff")]
        check = functools.partial(checks.check_gradients, *pair, *inputs, **options)
        return f"{spec.reset} {spec.update} {gradient} {name}".rstrip(), check

    def with_flags(spec, params, xs, h0, gradient, **more):
        params = dataclasses.replace(params, spec=spec)
        return weighted_sum(jaxgru.gru(params, xs, h0, gradient=gradient, **flags, **more))

    def with_layer_norm(spec, params, xs, h0, gradient):
        params = dataclasses.replace(params, spec=spec)
        return weighted_sum(jaxgru.gru(params, xs, h0, gradient=gradient, **dropout))

    def with_constant_params(spec, xs, h0, gradient):
        params = dataclasses.replace(batch[0], spec=spec)
        params = jax.tree.map(lambda v: v.astype(xs.dtype), params)
        return weighted_sum(jaxgru.gru(params, xs, h0, gradient=gradient))

    choices = list(itertools.product(("bptt", "tangent"), specs_of("tanh")))
    yield from (point("", spec, gradient, with_flags, batch) for gradient, spec in choices)
    if args.smoke:
        return
    zoneout = {"noise": jaxgru.Noise(zoneout=0.3), "deterministic": True}
    yield from (
        point("zoneout", spec, gradient, functools.partial(with_flags, **zoneout), batch)
        for gradient, spec in choices[:2]
    )
    yield from (
        point("layer norm", spec, gradient, with_layer_norm, single) for gradient, spec in choices
    )
    for spec in specs_of("tanh")[::2]:
        yield point("constant parameters", spec, "tangent", with_constant_params, batch[1:])


def weighted_sum(outputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The sum of all outputs with weights of both signs, since a scalar needs few cotangents."""
    total = [jnp.vdot(jnp.cos(1.0 + jnp.arange(v.size, dtype=v.dtype)), v) for v in outputs]
    return total[0] + total[1]


if __name__ == "__main__":
    sys.exit(main())
