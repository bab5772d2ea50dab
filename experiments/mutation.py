"""Mutation tests of handwritten derivative rules: does a check notice one wrong operation?

A mutant is a rule's own source with one node changed::

    a + b  ->  a - b,  a,  b        a - b  ->  a + b        a @ b  ->  -(a @ b)
    a * b  ->  a,  b                a / b  ->  a * b        a ** b ->  a
    -a     ->  a                    c      ->  c + 1        return a, b  ->  return b, a

with c a number. Its code takes the place of the rule's own, so that whoever holds the rule, a
module, a `custom_vjp` or a closure, runs the mutant, until the rule gets its own code back. The
changed node reports that it is evaluated, while JAX traces. A mutant is

* "caught" if a check disagrees or anything raises,
* "not reached" if no check evaluates its node,
* "indistinct" if it passes every check and, called by itself with random numbers in place of every
  floating argument of every call there was, returns what the rule returns: then it is equivalent
  (`zip` drops what a longer list adds, x + 0 is x) or acts where neither points nor numbers go,
* "survived" otherwise: the checks are blind to that fault.
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


Site = tuple[str, int]  # a rule's name, and the number of one of its nodes


class Point(NamedTuple):
    """One check of the rules under some choice of inputs and options."""

    name: str
    check: Callable[[], GradientReport]


class Rule(NamedTuple):
    """A function with its source, taken apart."""

    name: str
    function: Any  # a types.FunctionType, which pyright would bind to the tuple
    tree: ast.FunctionDef
    first_line: int  # of the source in its file


class Mutant(NamedTuple):
    """A rule with one node changed."""

    rule: Rule
    site: int  # of the node among `_sites`
    line: int
    original: str
    mutated: str
    change: ast.expr  # what the node becomes


class Outcome(NamedTuple):
    """What became of a mutant."""

    function: str
    line: int
    original: str
    mutated: str
    verdict: str  # one of VERDICTS
    error: float | None  # largest one seen; None where nothing could be compared
    by: str  # the point that caught it, and what was raised there


def read_rule(name: str, rule: Any) -> Rule:
    """The rule's source as a tree, without decorators, defaults and annotations.

    Raises:
      DataError: it is not a plain function, or its source cannot be had.
    """
    if hasattr(rule, "lower"):
        rule = inspect.unwrap(rule)  # of jax.jit
    if not inspect.isfunction(rule):
        raise DataError(f"--rule must name a function, got {name}, a {type(rule).__name__}")
    if rule.__module__.startswith("jax."):
        cure = "name the functions of your own that it runs with --rule"
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
    """x += y written out as x = x + y, so that its operation is a node like any other."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not isinstance(node.target, ast.Name):
            return node
        value = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        both = ast.Assign([node.target], ast.copy_location(value, node))
        return ast.copy_location(both, node)


def make_mutants(rule: Rule) -> list[Mutant]:
    """Every mutant of a rule, in the order of its lines."""
    mutants = []
    for site, node in enumerate(_sites(rule.tree)):
        line = rule.first_line + node.lineno - 1
        for shown, change in _changes(node):
            texts = ast.unparse(node), ast.unparse(shown)
            if texts[0] != texts[1]:  # as where `return a, a` is swapped
                mutants.append(Mutant(rule, site, line, *texts, change))
    return sorted(mutants, key=lambda mutant: mutant.line)


def _sites(tree: ast.AST) -> list[ast.expr]:
    """The nodes that may be changed, in a fixed order."""
    left_out: set[ast.AST] = set()  # a pattern takes no call, and text is no mathematics
    for node in ast.walk(tree):
        if isinstance(node, ast.match_case):
            left_out.update(ast.walk(node.pattern))
        elif isinstance(node, ast.JoinedStr):
            left_out.update(ast.walk(node))
    swaps = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.expr)]
    return [node for node in nodes if node not in left_out and _is_site(node, swaps)]


def _is_site(node: ast.expr, returned: Sequence[ast.expr | None]) -> bool:
    if isinstance(node, ast.Tuple):
        return node in returned and len(node.elts) > 1
    return any(True for _ in _changes(node))


def _changes(node: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """What a node may become: as it is shown, and as it is run."""
    match node:
        case ast.BinOp(left, operation, right):
            for other in _OTHER_OPERATIONS.get(type(operation), ()):
                changed = ast.BinOp(left, other(), right)
                yield changed, changed
            for position in _OPERANDS.get(type(operation), ()):
                # Both are still evaluated: the code keeps its free variables.
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
    """The tree with chosen nodes changed and wrapped: `probe(rule, site, node)`."""

    def __init__(self, rule: str, changes: dict[Any, tuple[int, Any]]):
        self.rule = rule
        self.changes = changes  # node -> its site and what it becomes, None for itself

    def visit(self, node: ast.AST) -> Any:
        if node not in self.changes:
            return self.generic_visit(node)
        site, change = self.changes[node]
        inner: Any = self.generic_visit(node) if change is None else change
        place = [ast.Constant(self.rule), ast.Constant(site)]
        return ast.Call(ast.Name(_PROBE, ast.Load()), [*place, inner], [])


def _compile(rule: Rule, mutant: Mutant | None = None) -> types.CodeType:
    """The code of a mutant, or of the rule itself with a probe around every node."""
    tree = copy.deepcopy(rule.tree)
    sites = _sites(tree)
    if mutant is None:
        changes: dict[Any, tuple[int, Any]]
        changes = {node: (site, None) for site, node in enumerate(sites)}
    else:
        changes = {sites[mutant.site]: (mutant.site, copy.deepcopy(mutant.change))}
    original = rule.function.__code__
    # Inside another function, so that its free variables are free again.
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
    """The functions run other code inside; they get their own back whatever happens."""
    originals = [(function, function.__code__) for function, _ in codes]
    _forget_traces()
    try:
        for function, code in codes:
            function.__globals__[_PROBE], function.__code__ = probe, code
        yield
    finally:
        for function, code in originals:
            function.__code__ = code
            function.__globals__.pop(_PROBE, None)
        _forget_traces()


def _forget_traces() -> None:
    """Without jit nothing keeps a trace, and clearing would have every operation compiled anew."""
    if not jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        jax.clear_caches()


def watch(rules: Sequence[Rule], point: Point, reached: set[Site]) -> GradientReport:
    """The report of the unchanged rules; adds to reached every node that they evaluate."""

    def probe(rule, site, value):
        reached.add((rule, site))
        return value

    with _installed([(rule.function, _compile(rule)) for rule in rules], probe):
        return point.check()


def try_all(
    rules: Sequence[Rule], points: Sequence[Point], sites: Sequence[set[Site]]
) -> list[Outcome]:
    """Every mutant of the rules, each at the points whose sites hold its node."""
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
        arguments = jax.tree.map(_forget_value, arguments)
        calls[str(arguments)] = arguments

    with _installed([(rule.function, code)], probe):
        for point in points:
            try:
                report = point.check()
            except Exception as error:  # whatever a wrong shape or index leads to
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


def _forget_value(leaf: Any) -> Any:
    """Shape and dtype of a traced or floating array; anything else as it is."""
    is_array = isinstance(leaf, jax.Array | np.ndarray)
    if isinstance(leaf, Tracer) or (is_array and jnp.issubdtype(leaf.dtype, jnp.floating)):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def _is_indistinct(rule: Rule, code: types.CodeType, calls: list[dict[str, Any]]) -> bool:
    """Whether rule and mutant return the same for random arguments of the forms of all calls."""
    function = rule.function
    names = {**function.__globals__, _PROBE: lambda rule_name, site, value: value}
    changed = types.FunctionType(code, names, closure=function.__closure__)
    generator = np.random.default_rng(0)
    # Positive ones for what has logarithms and roots, all signs for what has conditions.
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
    except Exception:  # one of the two refuses such arguments, or cannot be compared
        return False
    return bool(calls)


def _fill(draw: Callable[[tuple[int, ...]], np.ndarray], leaf: Any) -> Any:
    """An array of the described shape and dtype, drawn anew; anything else as it is."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    values = draw(leaf.shape)
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.asarray(np.asarray(values if floating else values > 0.5).astype(leaf.dtype))


def table(outcomes: list[Outcome], num_points: int) -> str:
    """One line a mutant, those that were not caught first, and the totals."""
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
        "survived": "A survivor is a fault that these inputs do not show: other ones are needed.",
        "indistinct": "Indistinct: it returns what the rule does for random arguments, too, so it "
        "is equivalent, or acts where neither they nor the inputs go.",
        "not reached": "Not reached: no point evaluates that expression.",
    }
    return "\n".join([align(lines), "", total, *(notes[n] for n in notes if n in verdicts)])


def align(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
