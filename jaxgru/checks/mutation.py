"""Mutation tests of handwritten derivative rules: does a check catch one wrong operation?

The code of a mutant replaces `__code__` of the rule during the checks. So a module, a `custom_vjp`
or a closure that holds the rule runs the mutant. The changed node reports when JAX evaluates it
during tracing.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxgru.checks.mutants import PROBE, Mutant, Rule, compile_rule, make_mutants, read_rule
from jaxgru.checks.report import GradientReport, align, is_kind, shorten

_VERDICTS = ("caught", "survived", "indistinct", "not reached")
_LEGEND = {
    "survived": "Survived: these inputs do not show the fault; other inputs are needed.",
    "indistinct": "Indistinct: for random arguments, too, the mutant returns what the rule "
    "returns. It is equivalent, or differs only for other inputs.",
    "not reached": "Not reached: no check evaluates the expression.",
}


@dataclasses.dataclass(frozen=True)
class MutantRow:
    """The result for one mutant of a rule.

    `verdict` is "caught" if a check disagrees or an exception is raised; "not reached" if no check
    evaluates the changed node; "indistinct" if the mutant passes every check and also returns what
    the rule returns when the checks' calls are repeated with random floating-point arguments: it is
    equivalent (x + 0 is x, and `zip` ignores the end of a longer list), or differs only for inputs
    that neither contain; and "survived" otherwise: the checks do not show that fault.
    """

    function: str  # the name of the rule
    line: int
    original: str
    mutated: str
    verdict: str
    error: float | None  # the largest error of the checks; None if nothing could be compared
    by: str  # the check that caught it, and the exception if one was raised there


@dataclasses.dataclass(frozen=True)
class MutantReport:
    """The results for all mutants. It is true if there is a mutant and none survives.

    It prints as a verdict and a line for each mutant, those that were not caught first.
    """

    rows: tuple[MutantRow, ...]
    num_checks: int

    @property
    def passed(self) -> bool:
        """True if there is a mutant and each is caught, indistinct or not reached."""
        return bool(self.rows) and all(row.verdict != "survived" for row in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        verdicts = [row.verdict for row in self.rows]
        counts = ", ".join(f"{verdicts.count(name)} {name}" for name in _VERDICTS)
        verdict = "passed" if self.passed else "FAILED"
        sizes = {"mutant": len(self.rows), "check": self.num_checks}
        both = " in ".join(f"{n} {noun}{'' if n == 1 else 's'}" for noun, n in sizes.items())
        head = f"check_mutants: {verdict}, {both}: {counts}."
        lines = [["verdict", "function", "line", "original", "mutated", "error", "by"]]
        order = ("survived", "not reached", "indistinct", "caught")
        for row in sorted(self.rows, key=lambda row: order.index(row.verdict)):
            error = "-" if row.error is None else f"{row.error:.1e}"
            short = [shorten(text, 48) for text in (row.original, row.mutated)]
            lines.append([row.verdict, row.function, str(row.line), *short, error, row.by])
        legend = [_LEGEND[name] for name in _LEGEND if name in verdicts]
        return "\n".join([head, *legend, "", *align(lines)])


Check = Callable[[], GradientReport]


def check_mutants(
    rules: Mapping[str, Callable[..., Any]], checks: Mapping[str, Check], *, progress: bool = False
) -> MutantReport:
    """Changes one operation at a time in derivative rules, and tries whether a check notices it.

    For a rule g and each mutant g' of its source: `check()` must be false, or raise, with g' in the
    place of g. Comparisons, conditions and forward functions are not changed. The checks together
    must reach a mutant of every rule.

    Args:
      rules: names to plain functions, such as those given to `defvjp`, and functions they call.
      checks: names to functions without arguments that return a `GradientReport`. They are tried
        in turn until one catches the mutant.
      progress: shows a progress bar, if tqdm is installed.

    Returns:
      A `MutantReport`. It is false if a mutant survives: the checks are blind to that fault.

    Raises:
      AssertionError: a check disagrees for the rules as they are.
      ValueError: a rule is not a plain function of yours, its source is not available, or the
        checks reach none of its mutants.
      Exception: what a check raises for the rules as they are.

    Cost: each check runs once, then every mutant runs the checks that evaluate its node. JAX's
    caches are cleared for each mutant, because they may hold traces of other code.

    >>> import jax, jax.numpy as jnp
    >>> from jaxgru.checks import check_gradients
    >>> def sine_bwd(x, dy):
    ...     return (dy * jnp.cos(x),)
    >>> sine = jax.custom_vjp(jnp.sin)
    >>> sine.defvjp(lambda x: (jnp.sin(x), x), sine_bwd)
    >>> check = lambda: check_gradients(sine, jnp.sin, jnp.array([0.5, 1.0]))
    >>> bool(check_mutants({"sine_bwd": sine_bwd}, {"two angles": check}))
    True
    """
    parsed = [read_rule(name, rule) for name, rule in rules.items()]
    sites: dict[str, set[Any]] = {}
    for name, check in _show(checks.items(), "check", progress):
        sites[name] = set()
        report = record_sites(parsed, check, sites[name])
        if not report:
            raise AssertionError(
                f"check_mutants: FAILED, {name} must agree before the rules are mutated.\n\n"
                f"{report}"
            )
    mutants = [mutant for rule in parsed for mutant in make_mutants(rule)]
    for rule in parsed:
        # Of a rule without mutants, the site None says that it was called.
        changed = {mutant.site for mutant in mutants if mutant.rule is rule} or {None}
        if not any((rule.name, site) in reached for reached in sites.values() for site in changed):
            raise ValueError(
                f"check_mutants: rules must be called by a check, got {rule.name}; "
                "add a check of a function that calls it, or leave it out."
            )
    rows = []
    for mutant in _show(mutants, "mutant", progress):
        site = (mutant.rule.name, mutant.site)
        reaching = {name: check for name, check in checks.items() if site in sites[name]}
        rows.append(try_mutant(mutant, reaching))
    return MutantReport(tuple(rows), len(checks))


def _show(values: Iterable[Any], unit: str, progress: bool) -> Iterable[Any]:
    """The values, with a progress bar if it is wanted and tqdm is installed."""
    if progress:
        with contextlib.suppress(ImportError):
            tqdm = importlib.import_module("tqdm").tqdm
            return tqdm(values, unit=unit, file=sys.stderr)
    return values


@contextlib.contextmanager
def _installed(codes: Sequence[tuple[types.FunctionType, types.CodeType]], probe: Callable):
    """A context in which the functions run other code; their own is restored at the end."""
    originals = [(function, function.__code__) for function, _ in codes]
    _clear_traces()
    try:
        for function, code in codes:
            function.__globals__[PROBE], function.__code__ = probe, code
        yield
    finally:
        for function, code in originals:
            function.__code__ = code
            function.__globals__.pop(PROBE, None)
        _clear_traces()


def _clear_traces() -> None:
    """Clears JAX's caches, which may hold a trace of other code, unless jit is disabled."""
    if not jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        jax.clear_caches()


def record_sites(rules: Sequence[Rule], check: Check, reached: set[Any]) -> GradientReport:
    """Checks the unchanged rules; adds each (rule name, site) that they evaluate to `reached`."""

    def probe(rule, site, value):
        reached.add((rule, site))
        return value

    with _installed([(rule.function, compile_rule(rule)) for rule in rules], probe):
        return check()


def try_mutant(mutant: Mutant, checks: Mapping[str, Check]) -> MutantRow:
    """Runs the checks in turn until one catches the mutant."""
    rule, code = mutant.rule, compile_rule(mutant.rule, mutant)
    calls: dict[str, dict[str, Any]] = {}
    reached, errors = set(), []
    verdict, by = "survived", ""

    def abstract(leaf):
        random = isinstance(leaf, jax.Array | np.ndarray) and is_kind(leaf, jnp.floating)
        if random or isinstance(leaf, Tracer):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return leaf

    def probe(rule_name, site, value):
        if site is not None:
            reached.add(site)
            return value
        arguments = {name: value[name] for name in inspect.signature(rule.function).parameters}
        arguments = jax.tree.map(abstract, arguments)
        calls[str(arguments)] = arguments

    with _installed([(rule.function, code)], probe):
        for name, check in checks.items():
            try:
                report = check()
            except Exception as error:  # a mutant may raise anything
                verdict, by = "caught", f"{name}: {type(error).__name__}"
                break
            errors.append(report.max_error())
            if not report:
                verdict, by = "caught", name
                break
    if verdict == "survived" and not reached:
        verdict = "not reached"
    elif verdict == "survived" and _is_indistinct(rule, code, list(calls.values())):
        verdict = "indistinct"
    texts = (mutant.line, mutant.original, mutant.mutated)
    return MutantRow(rule.name, *texts, verdict, max(errors, default=None), by)


def _is_indistinct(rule: Rule, code: types.CodeType, calls: list[dict[str, Any]]) -> bool:
    """Whether rule and mutant return the same for random arguments, for all recorded calls."""
    function = rule.function
    names = {**function.__globals__, PROBE: lambda rule_name, site, value: value}
    changed = types.FunctionType(code, names, closure=function.__closure__)
    generator = np.random.default_rng(0)
    # Positive numbers are for logarithms and roots, numbers of both signs for conditions.
    draws = (lambda shape: generator.uniform(0.25, 0.75, shape), generator.standard_normal)

    def fill(draw, leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        values = draw(leaf.shape) if is_kind(leaf, jnp.floating) else draw(leaf.shape) > 0.5
        return jnp.asarray(np.asarray(values).astype(leaf.dtype))

    try:
        with jax.enable_x64(True):
            for call, draw in itertools.product(calls, draws):
                arguments = jax.tree.map(functools.partial(fill, draw), call)
                bound = inspect.signature(function).bind_partial()
                bound.arguments.update(arguments)
                results = [f(*bound.args, **bound.kwargs) for f in (function, changed)]
                leaves, structures = zip(*map(jax.tree.flatten, results))
                same = map(functools.partial(np.array_equal, equal_nan=True), *leaves)
                if structures[0] != structures[1] or not all(same):
                    return False
    except Exception:  # one of the two refuses such arguments, or the results have no values
        return False
    return bool(calls)
