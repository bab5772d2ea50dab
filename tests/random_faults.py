"""Breaks random lines of jaxgru, one at a time, and says which test of the fast tier notices.

    pip install -e ".[test]" coverage
    python tests/random_faults.py --count 40 --seed 0 --out runs/faults

A line is drawn from all lines of the package that can be broken, whatever is on it, and one of the
changes that `changes_of` lists for it is drawn then. The fault is made in a copy of the tracked
files; the working tree stays as it is. The tests that execute the line run, the quickest first,
until one fails; if none does, all tests of their files run. A line that only an import executes has
no tests of its own, and the whole tier runs. Which test executes which line is recorded once, in
OUT/lines.json, by a run of the whole tier.

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
TIMEOUT = 1200  # seconds for one run of tests; one that takes longer hangs, which is noticed

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
    source: str  # the whole file with the fault in it


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


# Which test executes which line: this file is a plugin of pytest for that run.


def pytest_configure(config):
    import coverage

    target = pathlib.Path(os.environ["RANDOM_FAULTS_LINES"])
    config.recorded_lines = coverage.Coverage(
        data_file=str(target / f"coverage.{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"),
        source=["jaxgru"],
        config_file=False,
        messages=False,
    )
    config.recorded_lines.start()


def pytest_runtest_logstart(nodeid, location):
    import coverage

    current = coverage.Coverage.current()
    if current is not None:
        current.switch_context(nodeid)


def pytest_runtest_logreport(report):
    if report.when == "call" and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(pathlib.Path(os.environ["RANDOM_FAULTS_LINES"]) / "seconds", "a") as file:
            file.write(json.dumps([report.nodeid, report.duration]) + "\n")


def pytest_unconfigure(config):
    config.recorded_lines.stop()
    config.recorded_lines.save()


def record_lines(root: pathlib.Path, out: pathlib.Path) -> dict[str, dict[str, list[str]]]:
    """File -> line -> the tests that execute it, the quickest first; read from OUT if it is there.

    Raises:
      SystemExit: a test of the unbroken tier fails.
    """
    target = out / "lines.json"
    if target.exists():
        return json.loads(target.read_text())
    import coverage

    with tempfile.TemporaryDirectory() as folder:
        done = run_pytest(root, ["-p", "random_faults"], RANDOM_FAULTS_LINES=folder)
        if done.returncode:
            sys.exit(f"random_faults: the unbroken tests fail\n{done.stdout[-4000:]}")
        seconds = dict(map(json.loads, (pathlib.Path(folder) / "seconds").open()))
        found: dict[str, dict[str, list[str]]] = {}
        for data_file in pathlib.Path(folder).glob("coverage.*"):
            data = coverage.CoverageData(basename=str(data_file))
            data.read()
            for path in data.measured_files():
                lines = found.setdefault(str(pathlib.Path(path).relative_to(root)), {})
                for line, tests in data.contexts_by_lineno(path).items():
                    lines.setdefault(str(line), []).extend(test for test in tests if test)
    for lines in found.values():
        for tests in lines.values():
            tests.sort(key=lambda test: seconds.get(test, 0.0))
    target.write_text(json.dumps(found))
    return found


# Runs.


def run_pytest(root: pathlib.Path, arguments: list[str], **variables: str):
    """The fast tier, or the given tests of it, in a copy of the project."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--durations=0", *arguments],
        cwd=root, env={**environment, **variables}, capture_output=True, text=True,
        timeout=TIMEOUT,
    )  # fmt: skip


def copy_project(target: pathlib.Path) -> pathlib.Path:
    """The tracked files, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
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
    if done.returncode in (0, 5):
        return None
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    return failed[0] if failed else (done.stdout + done.stderr).strip().splitlines()[-1]


def try_fault(root: pathlib.Path, fault: Fault, tests: list[str]) -> dict[str, object]:
    """What became of a fault; the copy is mended afterwards."""
    path, start = root / fault.path, time.monotonic()
    intact = path.read_text()
    path.write_text(fault.source)
    try:
        by = find_failure(root, tests)
        if by is None and tests:
            by = find_failure(root, sorted({test.partition("::")[0] for test in tests}))
    finally:
        path.write_text(intact)
    return {
        **fault._replace(source="")._asdict(),
        "caught_by": by,
        "tests_of_the_line": len(tests),
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
        recorded = record_lines(copies[0], args.out)
        free = list(copies)

        def try_one(fault: Fault) -> dict[str, object]:
            root = free.pop()
            try:
                return try_fault(root, fault, recorded.get(fault.path, {}).get(str(fault.line), []))
            finally:
                free.append(root)

        with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
            for outcome in pool.map(try_one, faults):
                outcomes.append(outcome)
                (args.out / "faults.json").write_text(json.dumps(outcomes, indent=1))
                place = f"{outcome['path']}:{outcome['line']}"
                change = f"{outcome['before']}  ->  {outcome['after']}"
                print(f"{place:32} {change:.100}\n{'':8}{outcome['caught_by'] or 'NOT CAUGHT'}",
                      flush=True)  # fmt: skip
    caught = sum(outcome["caught_by"] is not None for outcome in outcomes)
    print(f"random_faults: {caught} of {len(outcomes)} caught, seed {args.seed}")
    return 0 if caught >= 0.95 * len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
