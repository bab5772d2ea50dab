"""Compares handwritten derivatives with autodiff and finite differences, from the command line.

    python -m experiments.cross_check                          # this package's own rules
    python -m experiments.cross_check --full                   # every point: half an hour
    python -m experiments.cross_check --mutate                 # are seeded faults in them caught?
    python -m experiments.cross_check --fn my.layers:fast --reference my.layers:plain \\
        --inputs my.layers:example [--mutate]

A function is named MODULE:NAME, where NAME may contain dots for attributes; modules in the current
folder can be imported. `--inputs` names a function without arguments, or of one `jax.random.key`,
that returns the tuple of positional arguments of both functions. The check is
`jaxgru.checks.check_gradients`, which says what it compares.

The package's grid is reset x update x activation x direction x gradient of `gru`, both with a mask
and resets and without them. `--full` checks all of it. By default, all directions and gradients are
checked only for tanh with mask and resets. For tanh without them, and for the other activations
with them, only the forward direction is checked, with residuals="gates" and with
gradient="tangent". The dtype is then float64 only. `gru_cell` is compared with `gru` over one step,
and a bidirectional `gru_stack` with JAX's own derivative.

`--mutate` seeds one fault at a time into derivative rules and checks whether it is caught (see
`experiments.mutation`). The rules are those of `--rule`, or those of `--fn`'s `custom_vjp` or
`custom_jvp`, or else `OWN_RULES`, the package's own in `jaxgru.core`.

A run folder holds config.json, cross_check.json (all rows; a number that is not finite is null) and
cross_check.txt. The exit code is 0 if everything agrees and no mutant survives, 1 if not, and 2 if
the input cannot be used.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxgru
from experiments import mutation, runs
from experiments.data import DataError
from experiments.mutation import Point
from jaxgru import checks

DTYPES = ("caller", "float64", "float32", "bfloat16", "float16")
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


class Pair(NamedTuple):
    """The function under test, its reference and their inputs, from the command line."""

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: tuple[Any, ...]


class Raised(NamedTuple):
    """An exception that was raised at a point; it takes the place of a report."""

    message: str


def parse_args(argv):
    parser = argparse.ArgumentParser(
        "python -m experiments.cross_check", description="Cross-checks handwritten derivatives."
    )
    add = parser.add_argument
    add("--fn", metavar="MODULE:NAME", help="function with the derivative rule under test")
    add("--reference", metavar="MODULE:NAME", help="plain function that JAX differentiates")
    add("--inputs", metavar="MODULE:NAME", help="() or (key) -> tuple of their arguments")
    add("--mutate", action="store_true", help="seed faults into the rules: are they caught?")
    add("--rule", metavar="MODULE:NAME", action="append", default=[],
        help="rule to mutate; repeatable")  # fmt: skip
    add("--full", action="store_true", help="check every point of the package's grid")
    add("--smoke", action="store_true", help="seconds: two points of the grid, or one rule")
    add("--out", metavar="FOLDER", help="new or empty run folder (default: runs/cross_check-DATE)")
    add("--dtypes", nargs="+", choices=DTYPES,
        help="default: caller and float64; for the default grid only float64")  # fmt: skip
    add("--finite-differences", action=argparse.BooleanOptionalAction, default=True)
    add("--num-cotangents", type=int, default=3, help="random cotangents per check")
    add("--num-coordinates", type=int, default=8, help="entries per leaf for finite differences")
    add("--tolerance", metavar="NAME=VALUE", action="append", default=[],
        help="of a dtype or finite-difference, relative to the largest entry")  # fmt: skip
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.fn and not (args.reference and args.inputs):
        parser.error("--fn needs --reference and --inputs as well")
    if not args.fn and (args.reference or args.inputs):
        parser.error("--reference and --inputs need --fn")
    if args.full and (args.smoke or args.fn or args.mutate):
        parser.error("--full is for the package's grid, without --smoke, --fn and --mutate")
    if args.smoke and args.fn:
        parser.error("--smoke is for the package's own rules, without --fn")
    if args.rule and not args.mutate:
        parser.error("--rule needs --mutate")
    if args.dtypes is None:
        args.dtypes = ["caller", "float64"] if args.fn or args.full or args.smoke else ["float64"]
    if args.finite_differences and "float64" not in args.dtypes:
        parser.error("finite differences need float64 in --dtypes: add it, "
                     "or pass --no-finite-differences")  # fmt: skip
    for name, least in (("num_cotangents", 1), ("num_coordinates", 1), ("seed", 0)):
        if getattr(args, name) < least:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} must be at least {least}, got {getattr(args, name)}")
    if args.seed >= 2**32:
        parser.error(f"--seed must be below 2**32, got {args.seed}")
    args.tolerance = dict(_parse_tolerance(parser, text) for text in args.tolerance)
    return args


def _parse_tolerance(parser: argparse.ArgumentParser, text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    names = [*DTYPES[1:], "finite-difference"]
    with contextlib.suppress(ValueError):
        if name in names and 0 < float(value) < math.inf:
            return name, float(value)
    parser.error(f"--tolerance must be NAME=VALUE with a NAME of {names} and a finite VALUE "
                 f"above 0, got {text}")  # fmt: skip


def main(argv=None):
    args = parse_args(argv)
    return runs.run_script("cross_check", lambda: run_all(args))


def run_all(args):
    pair = load_pair(args) if args.fn else None
    rules = load_rules(args, pair) if args.mutate else []
    run = runs.make_run_folder("cross_check", args.out, vars(args))
    print(runs.describe_device(), flush=True)
    if args.mutate:
        text, record = mutate(args, pair, rules)
    else:
        text, record = check_all(args, pair)
    header = {
        "passed": record["passed"],
        "command": sys.argv,
        "device": runs.describe_device(),
        "versions": {"python": sys.version.split()[0], "jax": jax.__version__,
                     "numpy": np.__version__},
        "options": vars(args),
    }  # fmt: skip
    runs.write_json(run / "cross_check.json", header | record)
    (run / "cross_check.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"run folder: {run}")
    return 0 if record["passed"] else 1


def load(option: str, text: str) -> Any:
    """The callable MODULE:NAME.

    Raises:
      DataError: the module cannot be imported, or has no such callable.
    """
    module_name, _, path = text.partition(":")
    if not module_name or not path:
        raise DataError(f"{option} must be MODULE:NAME, got {text}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything when it is imported
        raise DataError(
            f"{option} {text}: importing {module_name} raised {_one_line(error)}"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise DataError(f"{option} {text}: {module_name} has no {path}")
        found = getattr(found, name)
    if not callable(found):
        raise DataError(f"{option} {text} must be callable, got {type(found).__name__}")
    return found


def _one_line(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"


def load_pair(args) -> Pair:
    fn, reference = load("--fn", args.fn), load("--reference", args.reference)
    factory, arguments = load("--inputs", args.inputs), ()
    try:
        inspect.signature(factory).bind()
    except TypeError:
        arguments = (jax.random.key(args.seed),)
    except ValueError:
        pass  # a built-in callable without a signature
    try:
        inputs = factory(*arguments)
    except Exception as error:  # the user's function may raise anything
        raise DataError(f"--inputs {args.inputs} raised {_one_line(error)}") from error
    if not isinstance(inputs, tuple) or hasattr(inputs, "_fields"):
        kind, cure = type(inputs).__name__, "for one argument return (argument,)"
        need = "must return a tuple of positional arguments"
        raise DataError(f"--inputs {args.inputs} {need}, got {kind}; {cure}")
    try:
        reference(*inputs)
    except Exception as error:  # the arguments do not fit it, or it has a bug
        name = f"--reference {args.reference}"
        raise DataError(f"{name} raised {_one_line(error)} on the inputs") from error
    return Pair(args.fn, fn, reference, inputs)


def load_rules(args, pair: Pair | None) -> list[mutation.Rule]:
    if args.rule or not pair:
        names = args.rule or (OWN_RULES[1:2] if args.smoke else OWN_RULES)
        return [mutation.read_rule(name, load("--rule", name)) for name in dict.fromkeys(names)]
    found: Any = pair.fn
    while not isinstance(found, jax.custom_vjp | jax.custom_jvp):
        found = getattr(found, "func", None) or getattr(found, "__wrapped__", None)
        if found is None:
            need = "is not a custom_vjp or custom_jvp; name the functions to mutate with --rule"
            raise DataError(f"--fn {pair.name} {need}")
    role, define = ("bwd", "vjp") if isinstance(found, jax.custom_vjp) else ("jvp", "jvp")
    rule = getattr(found, role)
    if rule is None:
        raise DataError(f"--fn {pair.name} has no rule; call its def{define} first")
    return [mutation.read_rule(getattr(rule, "__qualname__", role), rule)]


def check_options(args) -> dict[str, Any]:
    return {
        "dtypes": tuple(args.dtypes),
        "finite_differences": args.finite_differences,
        "num_cotangents": args.num_cotangents,
        "num_coordinates": args.num_coordinates,
        "tolerances": args.tolerance,
        "key": jax.random.key(args.seed),
    }


def check_all(args, pair: Pair | None) -> tuple[str, dict[str, Any]]:
    """(text, record) of the check of one pair, or of the package's grid."""
    if pair:
        check = functools.partial(checks.check_gradients, *pair[1:3], *pair.inputs)
        points = [Point(pair.name, functools.partial(check, **check_options(args)))]
    else:
        points = list(grid_points(args))
    from tqdm import tqdm

    results: dict[str, checks.GradientReport | Raised] = {}
    for point in tqdm(points, unit="point", disable=len(points) == 1, file=sys.stderr):
        results[point.name] = run_point(point)
    cases = [case for name, found in results.items() for case in summarize(name, found)]
    rows = [
        dataclasses.asdict(dataclasses.replace(row, case=name)) | {"ok": row.ok}
        for name, found in results.items()
        if isinstance(found, checks.GradientReport)
        for row in found.rows
    ]
    failed = len({case["case"] for case in cases if case["verdict"] != "agree"})
    record = {"passed": not failed, "points": len(points), "cases": cases, "rows": rows}
    parts = [str(f) for f in results.values() if not isinstance(f, Raised) and (pair or not f)]
    if not pair or any(isinstance(found, Raised) for found in results.values()):
        parts = [case_table(cases), *parts]
    counts = f"{len(points)} points, {len(rows)} comparisons"
    return "\n\n".join([*parts, f"cross_check: {counts}, {failed} points disagree"]), record


def run_point(point: Point) -> checks.GradientReport | Raised:
    """The report of a point, or what its functions raised.

    Raises:
      DataError: `check_gradients` refused the inputs.
    """
    try:
        return point.check()
    except Exception as error:
        if str(error).startswith("check_gradients: "):
            raise DataError(_one_line(error)) from error
        return Raised(_one_line(error))


def summarize(name: str, found: checks.GradientReport | Raised) -> list[dict[str, Any]]:
    """For each dtype: the largest error and limit for each reference, and the verdict."""
    if isinstance(found, Raised):
        no_errors = dict.fromkeys(("autodiff", "limit", "finite_difference", "its_limit"))
        return [{"case": name, "dtype": "-", **no_errors, "verdict": f"raised {found.message}"}]
    cases = []
    for dtype in dict.fromkeys(row.dtype for row in found.rows):
        rows = [row for row in found.rows if row.dtype == dtype]

        def worst(reference, rows=rows):
            return max((row.error for row in rows if row.reference == reference), default=None)

        def limit(reference, rows=rows):
            return max((row.tolerance for row in rows if row.reference == reference), default=None)

        reasons = sorted({row.reason for row in rows if not row.ok})
        cases.append({
            "case": name, "dtype": dtype, "autodiff": worst("autodiff"),
            "limit": limit("autodiff"), "finite_difference": worst("finite-difference"),
            "its_limit": limit("finite-difference"),
            "verdict": f"DISAGREE ({', '.join(reasons)})" if reasons else "agree",
        })  # fmt: skip
    return cases


def case_table(cases: list[dict[str, Any]]) -> str:
    names = ("case", "dtype", "autodiff", "limit", "finite_difference", "its_limit", "verdict")
    lines = [[name.replace("_", " ") for name in names]]
    for case in cases:
        numbers = (case[name] for name in names[2:-1])
        texts = ["-" if number is None else f"{number:.1e}" for number in numbers]
        lines.append([case["case"], case["dtype"], *texts, case["verdict"]])
    return mutation.align(lines)


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
    arrays, options = draw_sequences(args.seed), check_options(args)
    flags = {"mask": arrays.mask, "resets": arrays.resets}
    for spec, reverse, gradient, masked in grid_choices(args):
        grid = {"specs": [spec], "reverses": [reverse]}
        grid["gradients"] = [GRADIENTS[gradient]]
        check = functools.partial(checks.check_gru, *arrays[:3], **grid, **options)
        words = [spec.reset, spec.update, spec.activation, "reverse" if reverse else "forward"]
        name = " ".join([*words, gradient, "mask resets" if masked else "plain"])
        yield Point(name, functools.partial(check, **(flags if masked else {})))
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
        yield Point(f"{spec.reset} {spec.update} {spec.activation} gru_cell", check)
    stack = jaxgru.init_stack(jax.random.key(args.seed), 2, 3, 2, bidirectional=True)
    for gradient in FEW_GRADIENTS:
        run = functools.partial(jaxgru.gru_stack, mask=arrays.mask, resets=arrays.resets)
        pair = (functools.partial(run, gradient=g) for g in (GRADIENTS[gradient], "autodiff"))
        check = functools.partial(checks.check_gradients, *pair, stack, arrays.xs, **options)
        yield Point(f"gru_stack bidirectional {gradient}", check)


def mutate(args, pair: Pair | None, rules) -> tuple[str, dict[str, Any]]:
    """(text, record) of all mutants of the rules, after a check that the rules are right."""
    options = {"dtypes": ("float64",), "finite_differences": False, "num_cotangents": 1}
    from tqdm import tqdm

    options |= {"key": jax.random.key(args.seed), "tolerances": args.tolerance}
    if pair:
        check = functools.partial(checks.check_gradients, *pair[1:3], *pair.inputs, **options)
        points = [Point(pair.name, check)]
    else:
        points = list(mutation_points(args, options))
    # The loops are so short here that running them without jit takes less time than compiling.
    with contextlib.nullcontext() if pair else jax.disable_jit():
        sites: list[set[mutation.Site]] = []
        for point in tqdm(points, unit="point", file=sys.stderr):
            reached: set[mutation.Site] = set()
            check = functools.partial(mutation.record_sites, rules, point, reached)
            report = run_point(Point(point.name, check))
            sites.append(reached)
            if isinstance(report, Raised) or not report:
                head = f"{point.name}: the rules must agree before they are mutated"
                record = {"passed": False, "points": len(points), "mutants": []}
                return f"{head}\n\n{report}", record
        outcomes = mutation.try_all(rules, points, sites)
    survived = any(outcome.verdict == "survived" for outcome in outcomes)
    rows = [outcome._asdict() for outcome in outcomes]
    record = {"passed": not survived, "points": len(points), "mutants": rows}
    return mutation.table(outcomes, len(points)), record


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
        return Point(f"{spec.reset} {spec.update} {gradient} {name}", check)

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
