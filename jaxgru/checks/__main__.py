"""Compares a function's derivative rule with autodiff and finite differences of a plain function.

    python -m jaxgru.checks --fn my.layers:fast --reference my.layers:plain \\
        --inputs my.layers:example [--mutate]

A function is named MODULE:NAME, where NAME may contain dots for attributes; modules in the current
folder can be imported. --inputs names a function without arguments, or of one `jax.random.key`,
that returns the tuple of positional arguments of both functions. The check is
`jaxgru.checks.check_gradients`, which says what it compares.

--mutate changes one operation at a time in the rule, and tells whether the check with these inputs
notices it. The rules are those of --rule, or the one of --fn's `custom_vjp` or `custom_jvp`. This
is `jaxgru.checks.check_mutants`, for float64 with one random cotangent, without finite differences.

The report is printed, and begins with its verdict. The exit code is 0 if everything agrees and no
mutant survives, 1 if not, and 2 if the input cannot be used, such as a rule that the check does not
call. --json also writes all rows to a file, in which a number that is not finite is null.
"""

import argparse
import dataclasses
import functools
import importlib
import inspect
import json
import math
import operator
import pathlib
import platform
import sys
from typing import Any

import jax

from jaxgru.checks.gradients import check_gradients
from jaxgru.checks.mutation import check_mutants

DTYPES = ("caller", "float64", "float32", "bfloat16", "float16")
# What is compared by default, and always with --mutate.
COMPARED = {
    "dtypes": ("caller", "float64"),
    "finite_differences": True,
    "num_cotangents": 3,
    "num_coordinates": 8,
}
MUTATING = {"dtypes": ("float64",), "finite_differences": False, "num_cotangents": 1}


class InputError(Exception):
    """What cannot be used; its message is one line for the user."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parse_args(argv)
    try:
        if args.json and args.json.exists():
            raise InputError(f"--json {args.json} exists; nothing was overwritten")
        if args.json and not args.json.parent.is_dir():
            raise InputError(f"--json must be in a folder that exists, got {args.json}")
        text, passed, rows = run(args)
        print(text)
        if args.json:
            write_json(args, passed, rows)
    except (InputError, OSError) as error:
        print(f"jaxgru.checks: {error}", file=sys.stderr)
        return 2
    return 0 if passed else 1


def parse_args(argv):
    """The options of the command; exits with code 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxgru.checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Any = functools.partial(parser.add_argument, metavar="MODULE:NAME")
    add("--fn", required=True, help="function with the derivative rule under test")
    add("--reference", required=True, help="plain function that JAX differentiates")
    add("--inputs", required=True, help="() or (key) -> tuple of their arguments")
    add("--rule", action="append", default=[], help="rule to mutate; repeatable")
    add = parser.add_argument
    add("--mutate", action="store_true", help="is a wrong operation in the rule noticed?")
    add("--json", metavar="FILE", type=pathlib.Path, help="new file for all rows")
    add("--dtypes", nargs="+", choices=DTYPES, help="(default: caller float64)")
    add("--finite-differences", action=argparse.BooleanOptionalAction,
        help="compare with finite differences, too (default: yes)")  # fmt: skip
    add("--num-cotangents", type=int, help="random cotangents (default: 3)")
    add("--num-coordinates", type=int,
        help="entries per leaf for finite differences (default: 8)")  # fmt: skip
    add("--tolerance", metavar="NAME=VALUE", type=_tolerance, action="append", default=[],
        help="of a dtype or finite-difference, relative to the largest entry")  # fmt: skip
    add("--seed", type=int, default=0, help="of the inputs and the cotangents (default: 0)")
    args = parser.parse_args(argv)
    if args.rule and not args.mutate:
        parser.error("--rule needs --mutate")
    for name, default in COMPARED.items():
        if getattr(args, name) is None:
            setattr(args, name, MUTATING.get(name) if args.mutate else default)
        elif args.mutate:
            parser.error(f"--{name.replace('_', '-')} is not for --mutate, which fixes it")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be at least 0 and below 2**32, got {args.seed}")
    return args


def _tolerance(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text}") from None


def run(args: argparse.Namespace) -> tuple[str, bool, list[dict[str, Any]]]:
    """(text, whether everything agrees, rows) of the check or of the mutants."""
    fn, reference = load("--fn", args.fn), load("--reference", args.reference)
    inputs = load_inputs(args, reference)
    rules = load_rules(args, fn) if args.mutate else {}
    options = {"key": jax.random.key(args.seed), "tolerances": dict(args.tolerance)}
    options |= {name: getattr(args, name) for name in (MUTATING if args.mutate else COMPARED)}
    check = functools.partial(check_gradients, fn, reference, *inputs, **options)
    try:
        report: Any = check_mutants(rules, {args.fn: check}, progress=True) if rules else check()
    except Exception as error:  # the user's function may raise anything
        refused = str(error).startswith(("check_gradients: ", "check_mutants: "))
        if refused and isinstance(error, AssertionError):
            return str(error), False, []
        if refused:
            raise InputError(_one_line(error)) from error
        return f"jaxgru.checks: FAILED, {args.fn} raised {_one_line(error)}", False, []
    rows = [dataclasses.asdict(row) for row in report.rows]
    if not args.mutate:
        rows = [row | {"ok": not row["reason"]} for row in rows]
    return str(report), report.passed, rows


def load(option: str, text: str) -> Any:
    """The callable MODULE:NAME; InputError if there is none."""
    module_name, _, path = text.partition(":")
    if not module_name or not path:
        raise InputError(f"{option} must be MODULE:NAME, got {text}")
    what = f"{option} {text}: importing {module_name}"
    found = attempt(what, importlib.import_module, module_name)
    try:
        found = operator.attrgetter(path)(found)
    except AttributeError as error:
        raise InputError(f"{option} {text}: {module_name} has no {path}") from error
    if not callable(found):
        raise InputError(f"{option} {text} must be callable, got {type(found).__name__}")
    return found


def load_inputs(args: argparse.Namespace, reference: Any) -> tuple[Any, ...]:
    """What the function of --inputs returns, if the reference accepts it."""
    factory, arguments = load("--inputs", args.inputs), ()
    try:
        inspect.signature(factory).bind()
    except TypeError:
        arguments = (jax.random.key(args.seed),)
    except ValueError:
        pass  # a built-in callable without a signature
    inputs = attempt(f"--inputs {args.inputs}", factory, *arguments)
    if not isinstance(inputs, tuple) or hasattr(inputs, "_fields"):
        kind, cure = type(inputs).__name__, "for one argument return (argument,)"
        need = "must return a tuple of positional arguments"
        raise InputError(f"--inputs {args.inputs} {need}, got {kind}; {cure}")
    attempt(f"--reference {args.reference} on the inputs", reference, *inputs)
    return inputs


def attempt(what: str, function: Any, *arguments: Any) -> Any:
    """What the function returns; InputError if it raises."""
    try:
        return function(*arguments)
    except Exception as error:  # a module or function of the user may raise anything
        raise InputError(f"{what} raised {_one_line(error)}") from error


def load_rules(args: argparse.Namespace, fn: Any) -> dict[str, Any]:
    """The functions of --rule by name, or the rule of fn."""
    if args.rule:
        return {name: load("--rule", name) for name in args.rule}
    while not isinstance(fn, jax.custom_vjp | jax.custom_jvp):
        fn = getattr(fn, "func", None) or getattr(fn, "__wrapped__", None)
        if fn is None:
            need = "is not a custom_vjp or custom_jvp; name the functions to mutate with --rule"
            raise InputError(f"--fn {args.fn} {need}")
    role, define = ("bwd", "vjp") if isinstance(fn, jax.custom_vjp) else ("jvp", "jvp")
    rule: Any = getattr(fn, role)
    if rule is None:
        raise InputError(f"--fn {args.fn} has no rule; call its def{define} first")
    return {getattr(rule, "__qualname__", role): rule}


def _one_line(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}"


def write_json(args: argparse.Namespace, passed: bool, rows: list[dict[str, Any]]) -> None:
    """Writes the verdict, the rows, and what they were computed with, to the file of --json."""
    device = jax.devices()[0]
    record = {
        "passed": passed,
        "command": sys.argv,
        "device": f"{device.platform} ({device.device_kind})",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "options": vars(args) | {"json": str(args.json)},
        "mutants" if args.mutate else "rows": [
            {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in row.items()
            }
            for row in rows
        ],
    }
    with open(args.json, "x", encoding="utf-8") as file:
        json.dump(record, file, indent=1, allow_nan=False, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
