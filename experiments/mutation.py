"""Mutation tests of handwritten derivative rules: does a check catch one wrong operation?

A mutant is the source of a rule with one node of its syntax tree changed::

    a + b  ->  a - b,  a,  b        a - b  ->  a + b        a @ b  ->  -(a @ b)
    a * b  ->  a,  b                a / b  ->  a * b        a ** b ->  a
    -a     ->  a                    c      ->  c + 1        return a, b  ->  return b, a

where c is a number. Its code replaces `__code__` of the rule during the checks. So a module, a
`custom_vjp` or a closure that holds the rule runs the mutant. The changed node reports when JAX
evaluates it during tracing. A mutant is

* "caught" if a check disagrees or an exception is raised,
* "not reached" if no check evaluates its node,
* "indistinct" if it passes every check and also returns the same as the rule when both are called
  with random numbers. These calls repeat those of the checks, with every floating-point argument
  replaced. Either the mutant is equivalent (x + 0 is x, and `zip` ignores the end of a longer
  list), or it differs only for inputs that neither the checks nor the random numbers contain,
* "survived" otherwise: the checks do not show that fault.
"""

import __future__

import ast
import contextlib
import copy
import functools
import inspect
import itertools
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from experiments.data import DataError
from jaxgru.checks import GradientReport

VERDICTS = ("caught", "survived", "indistinct", "not reached")

_PROBE = "__mutation_probe__"
_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


Site = tuple[str, int]  # the name of a rule, and the number of one of its nodes


class Point(NamedTuple):
    """One check of the rules, with a choice of inputs and options."""

    name: str
    check: Callable[[], GradientReport]


class Rule(NamedTuple):
    """A function with its syntax tree."""

    name: str
    function: Any  # a types.FunctionType, which pyright would treat as a method
    tree: ast.FunctionDef
    first_line: int  # line of the file where its source begins


class Mutant(NamedTuple):
    """A rule with one node changed."""

    rule: Rule
    site: int  # index of the node in `_sites`
    line: int
    original: str
    mutated: str
    change: ast.expr  # what the node becomes


class Outcome(NamedTuple):
    """The result for one mutant."""

    function: str
    line: int
    original: str
    mutated: str
    verdict: str  # one of VERDICTS
    error: float | None  # the largest error of the checks; None if nothing could be compared
    by: str  # the point that caught it, and the exception if one was raised there


def read_rule(name: str, rule: Any) -> Rule:
    """Parses a rule; decorators, defaults and annotations are removed from its tree.

    Raises:
      DataError: it is not a plain function, or its source is not available.
    """
    if hasattr(rule, "lower"):  # a function under jax.jit
        rule = inspect.unwrap(rule)
    if not inspect.isfunction(rule):
        raise DataError(f"--rule must name a function, got {name}, a {type(rule).__name__}")
    if rule.__module__.startswith("jax."):
        cure = "with --rule, name your own functions that it calls"
        raise DataError(f"{name} is JAX's own function {rule.__qualname__}; {cure}")
    try:
        lines, first_line = inspect.getsourcelines(rule)
        statement = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, SyntaxError, TypeError) as error:
        raise DataError(f"{name}: its source cannot be read ({error})") from error
    if not isinstance(statement, ast.FunctionDef) or statement.name != rule.__code__.co_name:
        raise DataError(f"{name} must be written as a def of its own to be mutated")
    arguments = statement.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    statement.decorator_list, statement.returns = [], None
    tree = _Expanded().visit(statement)
    return Rule(name, rule, ast.fix_missing_locations(tree), first_line)


class _Expanded(ast.NodeTransformer):
    """Replaces x += y by x = x + y, so that its operation can be changed too."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not isinstance(node.target, ast.Name):
            return node
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        both = ast.Assign([node.target], ast.copy_location(value, node))
        return ast.copy_location(both, node)


def make_mutants(rule: Rule) -> list[Mutant]:
    """Every mutant of a rule, in the order of the lines."""
    mutants = []
    for site, node in enumerate(_sites(rule.tree)):
        line = rule.first_line + node.lineno - 1
        for shown, change in _changes(node):
            texts = ast.unparse(node), ast.unparse(shown)
            if texts[0] != texts[1]:  # swapping `return a, a` changes nothing
                mutants.append(Mutant(rule, site, line, *texts, change))
    return sorted(mutants, key=lambda mutant: mutant.line)


def _sites(tree: ast.AST) -> list[ast.expr]:
    """The nodes that may be changed, in a fixed order."""
    excluded: set[ast.AST] = set()  # patterns, where Python allows no call, and f-strings
    for node in ast.walk(tree):
        if isinstance(node, ast.match_case):
            excluded.update(ast.walk(node.pattern))
        elif isinstance(node, ast.JoinedStr):
            excluded.update(ast.walk(node))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.expr)]
    return [node for node in nodes if node not in excluded and _is_site(node, returned)]


def _is_site(node: ast.expr, returned: Sequence[ast.expr | None]) -> bool:
    if isinstance(node, ast.Tuple):
        return node in returned and len(node.elts) > 1
    return any(True for _ in _changes(node))


def _changes(node: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yields each change of a node twice: as it is printed, and as it is compiled."""
    match node:
        case ast.BinOp(left, operation, right):
            for other in _OTHER_OPERATIONS.get(type(operation), ()):
                changed = ast.BinOp(left, other(), right)
                yield changed, changed
            for position in _OPERANDS.get(type(operation), ()):
                # Both operands are still evaluated, so that the code keeps its free variables.
                pair, index = ast.Tuple([left, right], ast.Load()), ast.Constant(position)
                yield (left, right)[position], ast.Subscript(pair, index, ast.Load())
            if isinstance(operation, ast.MatMult):
                negated = ast.UnaryOp(ast.USub(), node)
                yield negated, negated
        case ast.UnaryOp(ast.USub(), operand):
            yield operand, operand
        case ast.Constant(int() | float() as value) if not isinstance(value, bool):
            yield ast.Constant(value + 1), ast.Constant(value + 1)
        case ast.Tuple(elements):
            for i in range(len(elements) - 1):
                order = [*elements[:i], elements[i + 1], elements[i], *elements[i + 2 :]]
                yield ast.Tuple(order, ast.Load()), ast.Tuple(order, ast.Load())


_OTHER_OPERATIONS = {ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Div: (ast.Mult,)}
_OPERANDS = {ast.Add: (0, 1), ast.Mult: (0, 1), ast.Pow: (0,)}


class _Probed(ast.NodeTransformer):
    """Changes the chosen nodes of a tree, and wraps each: `probe(rule, site, node)`."""

    def __init__(self, rule: str, changes: dict[Any, tuple[int, Any]]):
        self.rule = rule
        self.changes = changes  # node -> its site and its replacement; None leaves it as it is

    def visit(self, node: ast.AST) -> Any:
        if node not in self.changes:
            return self.generic_visit(node)
        site, change = self.changes[node]
        inner: Any = self.generic_visit(node) if change is None else change
        place = [ast.Constant(self.rule), ast.Constant(site)]
        return ast.Call(ast.Name(_PROBE, ast.Load()), [*place, inner], [])


def _compile(rule: Rule, mutant: Mutant | None = None) -> types.CodeType:
    """The compiled mutant; without one, the rule itself with a probe around every site."""
    tree = copy.deepcopy(rule.tree)
    sites = _sites(tree)
    if mutant is None:
        changes: dict[Any, tuple[int, Any]]
        changes = {node: (site, None) for site, node in enumerate(sites)}
    else:
        changes = {sites[mutant.site]: (mutant.site, copy.deepcopy(mutant.change))}
    original = rule.function.__code__
    # The rule is compiled inside a function that defines its free variables.
    module = ast.parse(f"def factory({', '.join(original.co_freevars)}): pass")
    factory = module.body[0]
    assert isinstance(factory, ast.FunctionDef)
    tree = _Probed(rule.name, changes).visit(tree)
    tree.body.insert(0, ast.parse(f"{_PROBE}({rule.name!r}, None, locals())").body[0])
    factory.body = [tree]
    ast.fix_missing_locations(module)
    flags = original.co_flags & _FUTURE
    code = compile(module, f"<mutant of {rule.name}>", "exec", flags, dont_inherit=True)
    for name in ("factory", original.co_name):
        inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
        code = next(const for const in inner if const.co_name == name)
    if code.co_freevars != original.co_freevars:
        raise DataError(f"{rule.name} has free variables that its source does not name")
    return code


@contextlib.contextmanager
def _installed(codes: Sequence[tuple[types.FunctionType, types.CodeType]], probe: Callable):
    """A context in which the functions run other code; their own is restored at the end."""
    originals = [(function, function.__code__) for function, _ in codes]
    _clear_traces()
    try:
        for function, code in codes:
            function.__globals__[_PROBE], function.__code__ = probe, code
        yield
    finally:
        for function, code in originals:
            function.__code__ = code
            function.__globals__.pop(_PROBE, None)
        _clear_traces()


def _clear_traces() -> None:
    """Clears JAX's caches, which may hold a trace of other code.

    Without jit there are no such traces, and all single operations would be compiled again.
    """
    if not jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        jax.clear_caches()


def record_sites(rules: Sequence[Rule], point: Point, reached: set[Site]) -> GradientReport:
    """Checks the unchanged rules; adds every site that they evaluate to `reached`."""

    def probe(rule, site, value):
        reached.add((rule, site))
        return value

    with _installed([(rule.function, _compile(rule)) for rule in rules], probe):
        return point.check()


def try_all(
    rules: Sequence[Rule], points: Sequence[Point], sites: Sequence[set[Site]]
) -> list[Outcome]:
    """Tries every mutant of the rules at the points that evaluate its node.

    `sites` holds the sites that each point evaluates.
    """
    from tqdm import tqdm

    outcomes = []
    mutants = [mutant for rule in rules for mutant in make_mutants(rule)]
    for mutant in tqdm(mutants, unit="mutant", file=sys.stderr):
        site = (mutant.rule.name, mutant.site)
        reaching = [point for point, found in zip(points, sites) if site in found]
        outcomes.append(try_mutant(mutant, reaching))
    return outcomes


def try_mutant(mutant: Mutant, points: Sequence[Point]) -> Outcome:
    """Runs the points in turn until one catches the mutant."""
    rule, code = mutant.rule, _compile(mutant.rule, mutant)
    calls: dict[str, dict[str, Any]] = {}
    reached, errors = set(), []
    verdict, by = "survived", ""

    def probe(rule_name, site, value):
        if site is not None:
            reached.add(site)
            return value
        arguments = {name: value[name] for name in inspect.signature(rule.function).parameters}
        arguments = jax.tree.map(_abstract, arguments)
        calls[str(arguments)] = arguments

    with _installed([(rule.function, code)], probe):
        for point in points:
            try:
                report = point.check()
            except Exception as error:  # a mutant may raise anything
                verdict, by = "caught", f"{point.name}: {type(error).__name__}"
                break
            errors.append(report.max_error())
            if not report:
                verdict, by = "caught", point.name
                break
    if verdict == "survived" and not reached:
        verdict = "not reached"
    elif verdict == "survived" and _is_indistinct(rule, code, list(calls.values())):
        verdict = "indistinct"
    texts = (mutant.line, mutant.original, mutant.mutated)
    return Outcome(rule.name, *texts, verdict, max(errors, default=None), by)


def _abstract(leaf: Any) -> Any:
    """The shape and dtype of a traced or floating-point array; other values are unchanged."""
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    if isinstance(leaf, Tracer) or (is_array and jnp.issubdtype(leaf.dtype, jnp.floating)):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def _is_indistinct(rule: Rule, code: types.CodeType, calls: list[dict[str, Any]]) -> bool:
    """Whether rule and mutant return the same for random arguments, for all recorded calls."""
    function = rule.function
    names = {**function.__globals__, _PROBE: lambda rule_name, site, value: value}
    changed = types.FunctionType(code, names, closure=function.__closure__)
    generator = np.random.default_rng(0)
    # Positive numbers are for logarithms and roots, numbers of both signs for conditions.
    draws = (lambda shape: generator.uniform(0.25, 0.75, shape), generator.standard_normal)
    try:
        with jax.enable_x64(True):
            for call, draw in itertools.product(calls, draws):
                arguments = jax.tree.map(functools.partial(_fill, draw), call)
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


def _fill(draw: Callable[[tuple[int, ...]], np.ndarray], leaf: Any) -> Any:
    """A random array of the given shape and dtype; other values are unchanged."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    values = draw(leaf.shape)
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.asarray(np.asarray(values if floating else values > 0.5).astype(leaf.dtype))


def table(outcomes: list[Outcome], num_points: int) -> str:
    """One line per mutant, those that were not caught first, and the totals."""
    lines = [["verdict", "function", "line", "original", "mutated", "error", "by"]]
    order = ("survived", "not reached", "indistinct", "caught")
    for outcome in sorted(outcomes, key=lambda outcome: order.index(outcome.verdict)):
        error = "-" if outcome.error is None else f"{outcome.error:.1e}"
        texts = (outcome.original, outcome.mutated)
        short = [text if len(text) <= 48 else f"{text[:45]}..." for text in texts]
        line = [outcome.verdict, outcome.function, str(outcome.line), *short, error, outcome.by]
        lines.append(line)
    verdicts = [outcome.verdict for outcome in outcomes]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in VERDICTS)
    total = f"cross_check: {len(outcomes)} mutants at {num_points} points: {counts}"
    notes = {
        "survived": "Survived: these inputs do not show the fault; other inputs are needed.",
        "indistinct": "Indistinct: for random arguments, too, the mutant returns what the rule "
        "returns. It is equivalent, or differs only for other inputs.",
        "not reached": "Not reached: no point evaluates the expression.",
    }
    return "\n".join([align(lines), "", total, *(notes[n] for n in notes if n in verdicts)])


def align(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
