"""Breaks random lines of jaxgru, one at a time, and says which test of the fast tier notices.

    python tests/random_faults.py --count 40 --seed 0 --out runs/faults

A line is drawn from all lines of the package that can be broken, whatever is on it, and one of the
changes that `changes_of` lists for it is drawn then. The fault is made in a copy of the tracked
files; the working tree stays as it is. The doctests of the module and the test files that guard it
run in their fast tier until a test fails. A fault that these do not notice counts as missed, even
though another file might notice it.

The table at the end and OUT/faults.json name, for each fault, the test that caught it. The command
exits with 1 when fewer than 95 % are caught.
"""

import argparse
import ast
import concurrent.futures
import copy
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
TIMEOUT = 400  # seconds for one file of tests; one that takes longer hangs, which is noticed

# Faults.

OPPOSITES = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE,
    ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Pow: ast.Mult,
}  # fmt: skip


class Fault(NamedTuple):
    """One changed expression or statement of a file."""

    path: str
    line: int
    before: str
    after: str
    source: str  # the text of the file with the fault in it


def changes_of(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Pairs of a node to replace and what replaces it."""
    match node:
        case ast.Compare(left, [operator], right) if type(operator) in OPPOSITES:
            yield node, ast.Compare(left, [OPPOSITES[type(operator)]()], right)
        case ast.BoolOp(operator, values):
            yield node, ast.BoolOp(OPPOSITES[type(operator)](), values)
        case ast.BinOp(left, operator, right) if type(operator) in OPPOSITES:
            if not isinstance(left, ast.JoinedStr) and not isinstance(right, ast.JoinedStr):
                yield node, ast.BinOp(left, OPPOSITES[type(operator)](), right)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield node, operand
        case ast.IfExp(test, body, orelse):
            yield node, ast.IfExp(test, orelse, body)
        case ast.Constant(bool() as value):
            yield node, ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield node, ast.Constant(value + 1)
        case ast.Constant(str() as value) if re.search(r"\w", value):
            first_word = re.sub(r"\w+", "changed", value, count=1)
            yield node, ast.Constant(first_word)
        case ast.Tuple([one, other, *rest], ast.Load()):
            if ast.dump(one) != ast.dump(other):
                yield node, ast.Tuple([other, one, *rest], ast.Load())
        case ast.Call(function, [one, other, *rest], keywords):
            if ast.dump(one) != ast.dump(other):
                yield node, ast.Call(function, [other, one, *rest], keywords)
        case ast.If(test, body, orelse) | ast.While(test, body, orelse):
            negated = ast.UnaryOp(ast.Not(), test)
            yield test, negated
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise():
            yield node, ast.Pass()
        case ast.Return(ast.expr()):
            yield node, ast.Return(ast.Constant(None))


def is_left_out(node: ast.AST) -> bool:
    """Whether nothing inside can be broken: text for people, imports and types."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    is_names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    return is_text or is_names or isinstance(node, ast.Import | ast.ImportFrom | ast.match_case)


def nodes_of(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may be broken, in the order of the file."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not is_left_out(child):
                yield child
                yield from nodes_of(child)


class Replace(ast.NodeTransformer):
    """A tree with one node replaced."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def list_lines(root: pathlib.Path) -> list[tuple[str, int]]:
    """Every line of the package that can be broken."""
    lines = set()
    for path in sorted((root / "jaxgru").rglob("*.py")):
        for node in nodes_of(ast.parse(path.read_text())):
            for old, _ in changes_of(node):
                lines.add((str(path.relative_to(root)), old.lineno))
    return sorted(lines)


def draw_fault(root: pathlib.Path, line: tuple[str, int], draw: random.Random) -> Fault:
    """One fault of a line."""
    source = (root / line[0]).read_text()
    tree = ast.parse(source)
    found = [
        change
        for node in nodes_of(tree)
        for change in changes_of(node)
        if change[0].lineno == line[1]
    ]
    old, new = draw.choice(found)
    before, after = ast.unparse(old), ast.unparse(new)
    tree = Replace(old, copy.deepcopy(new)).visit(tree)
    return Fault(*line, before, after, ast.unparse(ast.fix_missing_locations(tree)))


# Which test files guard which modules; test_api.py and a module's own doctests guard all of them.

GUARDS = {  # the first part of a path below jaxgru/ -> test files below tests/
    "core/checks": "core/test_argument_checks core/test_recurrence test_stacks",
    "initializers": "core/test_cell core/test_parameters test_stacks",
    "masks": "core/test_recurrence test_stacks test_models",
    "core/parameters": "core/test_recurrence core/test_cell test_stacks test_models",
    "core": "core/test_cell core/test_gradients core/test_recurrence core/test_noise "
    "core/test_cost core/test_transforms test_stacks experimental/test_fused_kernels",
    "stacks": "test_stacks core/test_transforms diagnostics/test_diagnostics",
    "losses": "test_losses test_models",
    "models": "test_models interop/test_onnx_files interop/test_safetensors",
    "experimental": "experimental/test_fused_tiling experimental/test_fused_kernels",
    "diagnostics": "diagnostics/test_diagnostics diagnostics/test_agreement "
    "experiments/test_gradient_flow core/test_cost",
    "checks/mut": "checks/test_checks_command",
    "checks/__main__": "checks/test_checks_command",
    "checks": "checks/test_check_gradients diagnostics/test_agreement core/test_faults",
    "interop": "interop/test_interop interop/test_onnx_files interop/test_safetensors "
    "interop/test_interop_command",
    "atomic_files": "training/test_checkpoints interop/test_safetensors",
    "training/layout": "training/test_layout training/test_step training/test_processes",
    "training/step": "training/test_step training/test_optimizers training/test_loop "
    "training/test_layout",
    "training/clipping": "training/test_step",
    "training": "training/test_loop training/test_checkpoints training/test_step "
    "training/test_processes experiments/test_char_lm",
}


def tests_of(path: str) -> list[str]:
    """The doctests of a module, the test files that guard it, and test_api.py."""
    place = path.removeprefix("jaxgru/")
    guards = next((GUARDS[start] for start in GUARDS if place.startswith(start)), "")
    return [path, *(f"tests/{name}.py" for name in guards.split()), "tests/test_api.py"]


# Runs.


def run_pytest(root: pathlib.Path, arguments: list[str]):
    """The given tests of the fast tier in a copy of the project."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *arguments],
        cwd=root, env=environment, capture_output=True, text=True,
        timeout=TIMEOUT,
    )  # fmt: skip


def copy_project(target: pathlib.Path) -> pathlib.Path:
    """The tracked files, as they are in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def find_failure(root: pathlib.Path, arguments: list[str]) -> str | None:
    """The first test that fails, or None."""
    try:
        done = run_pytest(root, ["-x", "--numprocesses=0", *arguments])
    except subprocess.TimeoutExpired:
        return "the time limit"
    if done.returncode in (0, 5):  # no test failed, or there is none
        return None
    if done.returncode == 4:
        sys.exit(f"random_faults: pytest cannot run {arguments}: {done.stderr}")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    said = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
    return failed[0] if failed else said[-1]


def try_fault(root: pathlib.Path, fault: Fault) -> dict[str, object]:
    """What became of a fault; the copy is mended afterwards."""
    path, start = root / fault.path, time.monotonic()
    tests = tests_of(fault.path)
    intact = path.read_text()
    path.write_text(fault.source)
    try:
        by = next(filter(None, (find_failure(root, [test]) for test in tests)), None)
    finally:
        path.write_text(intact)
    return {
        **fault._replace(source="")._asdict(),
        "caught_by": by,
        "asked": tests,
        "seconds": round(time.monotonic() - start, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=40, help="faults (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--workers", type=int, default=2, help="faults at once (default 2)")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "faults")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    draw = random.Random(args.seed)
    chosen = draw.sample(list_lines(ROOT), args.count)
    faults = [draw_fault(ROOT, line, draw) for line in chosen]
    outcomes: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        copies = [copy_project(pathlib.Path(folder) / str(n)) for n in range(args.workers)]
        free = list(copies)

        def try_one(fault: Fault) -> dict[str, object]:
            root = free.pop()
            try:
                return try_fault(root, fault)
            finally:
                free.append(root)

        with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
            running = [pool.submit(try_one, fault) for fault in faults]
            for done in concurrent.futures.as_completed(running):
                outcome = done.result()
                outcomes.append(outcome)
                (args.out / "faults.json").write_text(json.dumps(outcomes, indent=1))
                change = f"{outcome['before']}  ->  {outcome['after']}"
                print(f"{outcome['path']}:{outcome['line']}  {change:.100}")
                print(f"    {outcome['caught_by'] or 'NOT CAUGHT'}", flush=True)
    caught = sum(outcome["caught_by"] is not None for outcome in outcomes)
    print(f"random_faults: {caught} of {len(outcomes)} caught, seed {args.seed}")
    return 0 if caught >= 0.95 * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
