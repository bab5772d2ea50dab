"""Mutants of functions: the source of a rule with one node of its syntax tree changed.

    a + b  ->  a - b,  a,  b        a - b  ->  a + b        a @ b  ->  -(a @ b)
    a * b  ->  a,  b                a / b  ->  a * b        a ** b ->  a
    -a     ->  a                    c      ->  c + 1        return a, b  ->  return b, a

where c is a number. Comparisons and the conditions of `if` and `while` are not changed.
"""

import __future__

import ast
import copy
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

PROBE = "__mutation_probe__"
_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


class Rule(NamedTuple):
    """A function with its syntax tree."""

    name: str
    function: Any  # a types.FunctionType, which pyright would treat as a method
    tree: ast.FunctionDef
    first_line: int  # line of the file where its source begins


class Mutant(NamedTuple):
    """A rule with one node changed."""

    rule: Rule
    site: int  # index of the node in the tree
    line: int
    original: str
    mutated: str
    change: ast.expr  # what the node becomes


def read_rule(name: str, rule: Any) -> Rule:
    """Parses a rule; decorators, defaults and annotations are removed from its tree.

    Raises:
      ValueError: it is not a plain function, or its source is not available.
    """
    if hasattr(rule, "lower"):  # a function under jax.jit
        rule = inspect.unwrap(rule)
    need = "rules must be plain functions"
    _require(inspect.isfunction(rule), f"{need}, got {name}, a {type(rule).__name__}")
    need, cure = "rules must be your own functions", "name those of your functions that it calls"
    own = not rule.__module__.startswith("jax.")
    _require(own, f"{need}, got {name}, which is JAX's {rule.__qualname__}; {cure}")
    try:
        lines, first_line = inspect.getsourcelines(rule)
        statement: Any = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"check_mutants: rules must have a source file, got {name}: {error}."
        ) from error
    found = isinstance(statement, ast.FunctionDef) and statement.name == rule.__code__.co_name
    _require(found, f"rules must each be written as a def, got {name}")
    arguments = statement.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    statement.decorator_list, statement.returns = [], None
    tree = _Expanded().visit(statement)
    return Rule(name, rule, ast.fix_missing_locations(tree), first_line)


def _require(condition, message):
    if not condition:
        raise ValueError(f"check_mutants: {message}.")


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
    # Not changed: patterns, where Python allows no call, f-strings, comparisons and conditions.
    excluded: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.match_case):
            excluded.update(ast.walk(node.pattern))
        elif isinstance(node, ast.JoinedStr | ast.Compare):
            excluded.update(ast.walk(node))
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            excluded.update(ast.walk(node.test))
    returned = {node.value for node in ast.walk(tree) if isinstance(node, ast.Return)}
    excluded |= {v for v in ast.walk(tree) if isinstance(v, ast.Tuple) and v not in returned}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.expr)]
    return [node for node in nodes if node not in excluded and any(_changes(node))]


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
        return ast.Call(ast.Name(PROBE, ast.Load()), [*place, inner], [])


def compile_rule(rule: Rule, mutant: Mutant | None = None) -> types.CodeType:
    """The compiled mutant; without one, the rule itself with a probe around every site."""
    tree = copy.deepcopy(rule.tree)
    sites = _sites(tree)
    changes: dict[Any, tuple[int, Any]] = {node: (n, None) for n, node in enumerate(sites)}
    if mutant is not None:
        changes = {sites[mutant.site]: (mutant.site, copy.deepcopy(mutant.change))}
    original = rule.function.__code__
    # The rule is compiled inside a function that defines its free variables.
    module: Any = ast.parse(f"def factory({', '.join(original.co_freevars)}): pass")
    tree = _Probed(rule.name, changes).visit(tree)
    tree.body.insert(0, ast.parse(f"{PROBE}({rule.name!r}, None, locals())").body[0])
    module.body[0].body = [tree]
    ast.fix_missing_locations(module)
    flags = original.co_flags & _FUTURE
    code = compile(module, f"<mutant of {rule.name}>", "exec", flags, dont_inherit=True)
    for name in ("factory", original.co_name):
        inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
        code = next(const for const in inner if const.co_name == name)
    need = "rules must name their free variables in their source"
    _require(code.co_freevars == original.co_freevars, f"{need}, got {rule.name}")
    return code
