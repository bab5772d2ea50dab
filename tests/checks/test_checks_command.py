"""`python -m jaxgru.checks`: verdicts, files, bad input, and seeded faults in any rule."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgru.checks import check_gradients, check_mutants, mutants, mutation
from jaxgru.checks.__main__ import main

# A mutant that is compiled clears the caches of the process, for the next test to fill again.
pytestmark = pytest.mark.usefixtures("uncompiled")

HERE = "test_checks_command"


def cube(x, dead=False):
    """Reference."""
    return {"y": x**3, "n": jnp.arange(3)}


def make_cube(rule):
    fn = jax.custom_vjp(cube, nondiff_argnums=(1,))
    fn.defvjp(lambda x, dead: (cube(x), x), rule)
    return fn


def right_bwd(dead, x, d):
    slope = 3 * x * x
    if dead:
        slope = slope + 7
    return (d["y"] * slope,)


def wrong_bwd(dead, x, d):
    return (d["y"] * 2 * x * x,)


def make_factor(factor):
    def closed_bwd(dead, x, d):
        scale = 2.0
        scale *= factor
        return (d["y"] * scale * x**2,)

    return closed_bwd


def long_bwd(dead, x, d):
    return ((x - x + 3 * x * x) * d["y"],)


def raising_bwd(dead, x, d):
    raise RuntimeError("not yet written")


def poisoned_bwd(dead, x, d):
    return (d["y"] * (3 * x * x).at[1].set(jnp.nan),)


right, wrong = make_cube(right_bwd), make_cube(wrong_bwd)
closed, long = make_cube(make_factor(1.5)), make_cube(long_bwd)
raising, poisoned = make_cube(raising_bwd), make_cube(poisoned_bwd)
of_lambda = make_cube(lambda dead, x, d: (d["y"] * 3 * x * x,))
jitted = jax.jit(right, static_argnums=1)
without_rule = jax.custom_vjp(cube)


@jax.custom_jvp
def tangent(x, dead=False):
    return cube(x)


@tangent.defjvp
def tangent_jvp(primals, tangents):
    x = primals[0]
    out = cube(x)
    n = jnp.zeros(3, jax.dtypes.float0)
    return out, {"y": 3 * x * x * tangents[0], "n": n}


def other_structure(x, dead=False):
    return x**3


class Inputs:
    @staticmethod
    def random(key):
        draw = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        return (jnp.asarray(draw.normal(size=4).astype(np.float32)),)

    @staticmethod
    def zeros():
        return (jnp.zeros(4),)

    @staticmethod
    def integers():
        return (jnp.arange(4),)

    @staticmethod
    def infinite():
        return (jnp.array([1.0, jnp.inf]),)

    @staticmethod
    def array():
        return jnp.ones(4)

    @staticmethod
    def broken():
        raise RuntimeError("no data")

    @staticmethod
    def two():
        return jnp.ones(4), False, 3


def run(folder, fn, *options, inputs="Inputs.random", reference="cube"):
    """(exit code, contents of the file of --json)."""
    names = ("--fn", f"{HERE}:{fn}", "--reference", f"{HERE}:{reference}")
    path = folder / f"{fn}.json"
    code = main([*names, "--inputs", f"{HERE}:{inputs}", "--json", str(path), *options])

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(path.read_text(), parse_constant=refuse) if path.exists() else {}
    assert code == 2 or found["passed"] == (code == 0)
    return code, found


# Verdicts and files


@pytest.mark.parametrize("fn", ["right", "tangent", "jitted"])
def test_right_rule_agrees(fn, tmp_path, capsys):
    with jax.disable_jit(fn != "jitted"):
        code, found = run(tmp_path, fn)
    assert code == 0
    assert {"device", "versions", "command", "options"} <= set(found)
    assert {row["dtype"] for row in found["rows"]} == {"float32", "float64"}
    assert all(row["ok"] for row in found["rows"])
    assert capsys.readouterr().out.startswith("check_gradients: passed")


OWN = """
import jax
import jax.numpy as jnp
from experiments import scale

def plain(x):
    return scale * x * x

fast = jax.custom_vjp(plain)

def fast_bwd(x, d):
    return (2 * scale * x * d,)

fast.defvjp(lambda x: (plain(x), x), fast_bwd)
slow = jax.custom_vjp(plain)
slow.defvjp(lambda x: (plain(x), x), lambda x, d: (scale * x * d,))

def inputs():
    return (jnp.array([0.5, 2.0]),)
"""


def test_command_runs_in_a_folder_with_an_experiments_package_of_its_own(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("scale = 3")
    (tmp_path / "own.py").write_text(OWN)
    root = pathlib.Path(__file__).resolve().parents[2]
    (tmp_path / "tqdm.py").write_text("raise ImportError('tqdm is an extra')")

    def command(fn, *options):
        names = ("--fn", fn, "--reference", "own:plain", "--inputs", "own:inputs")
        return subprocess.run(
            [sys.executable, "-m", "jaxgru.checks", *names, *options], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
        )  # fmt: skip

    done = command("own:fast", "--mutate")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("check_mutants: passed, 7 mutants in 1 check: 7 caught, 0 surv")
    done = command("own:slow")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("check_gradients: FAILED")


def test_wrong_rule_disagrees_and_names_the_leaf(tmp_path, capsys):
    code, found = run(tmp_path, "wrong")
    failed = [row for row in found["rows"] if not row["ok"]]
    assert code == 1
    assert {(row["leaf"], row["reason"]) for row in failed} == {
        ("x", "value"), ("x", "finite-difference")
    }  # fmt: skip
    assert max(row["error"] for row in failed) == pytest.approx(1 / 3, rel=1e-5)
    assert {row["dtype"] for row in failed} == {"float32", "float64"}
    assert capsys.readouterr().out.startswith("check_gradients: FAILED")


def test_numbers_that_are_not_finite_are_null(tmp_path):
    code, found = run(tmp_path, "poisoned")
    failed = [row for row in found["rows"] if row["reason"] == "non-finite"]
    assert code == 1 and failed
    assert all(row["actual"] is None and row["index"] == [1] for row in failed)


def test_raising_rule_is_a_disagreement_with_its_message(tmp_path, capsys):
    assert run(tmp_path, "raising")[0] == 1
    message = f"jaxgru.checks: FAILED, {HERE}:raising raised RuntimeError: not yet written\n"
    assert capsys.readouterr().out == message


def test_other_structure_says_what_to_change(tmp_path, capsys):
    assert run(tmp_path, "other_structure")[0] == 1
    assert "make it return the same pytree" in capsys.readouterr().out


def test_options_reach_the_check(tmp_path):
    options = ("--dtypes", "float64", "--no-finite-differences", "--num-cotangents", "1")
    code, found = run(tmp_path, "wrong", *options, "--tolerance", "float64=0.5")
    assert code == 0
    assert {row["dtype"] for row in found["rows"]} == {"float64"}
    assert "finite-difference" not in {row["reference"] for row in found["rows"]}
    assert "random[1]" not in {row["cotangent"] for row in found["rows"]}
    assert {row["tolerance"] for row in found["rows"]} == {0.0, 0.5}


def test_other_seed_draws_other_inputs(tmp_path):
    values = []
    for seed in "112":
        options = ("--dtypes", "caller", "--no-finite-differences", "--seed", seed)
        (folder := tmp_path / str(len(values))).mkdir()
        _, found = run(folder, "right", *options)
        values += [row["actual"] for row in found["rows"][:2] if row["leaf"] == "out['y']"]
    assert values[0] == values[1] != values[2]


# Unusable input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fn": "missing"}, "--fn test_checks_command:missing: test_checks_command has no missing"),
        ({"fn": "HERE"}, "--fn test_checks_command:HERE must be callable, got str"),
        ({"inputs": "Inputs.none"}, "has no Inputs.none"),
        ({"inputs": "Inputs.array"}, "must return a tuple .* for one argument return"),
        ({"inputs": "Inputs.broken"}, "Inputs.broken raised RuntimeError: no data"),
        ({"inputs": "Inputs.two"}, "--reference .*cube on the inputs raised TypeError"),
        ({"inputs": "Inputs.integers"}, "args must hold real leaves.*cast integers to a floating"),
        ({"inputs": "Inputs.infinite"}, r"x\[1\] = inf in float32; replace"),
    ],
)
def test_unusable_input_is_one_line(options, message, tmp_path, capsys):
    code, _ = run(tmp_path, **{"fn": "right", **options})
    error = capsys.readouterr().err
    assert code == 2
    assert re.match(f"jaxgru.checks: .*{message}", error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        ("no_such_module:fn", "importing no_such_module raised ModuleNotFoundError"),
        ("right", "--fn must be MODULE:NAME, got right"),
    ],
)
def test_name_that_cannot_be_loaded(fn, message, tmp_path, capsys):
    names = ["--reference", f"{HERE}:cube", "--inputs", f"{HERE}:Inputs.zeros"]
    assert main(["--fn", fn, *names]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fn", "a:b"], "the following arguments are required: --reference, --inputs"),
        (["--rule", "a:b"], "--rule needs --mutate"),
        (["--dtypes", "int8"], "invalid choice"),
        (["--tolerance", "float64"], "argument --tolerance: must be NAME=VALUE, got float64\n"),
        (["--tolerance", "float64=a"], "argument --tolerance: must be NAME=VALUE, got float64=a\n"),
        (["--mutate", "--dtypes", "float64"], "--dtypes is not for --mutate, which fixes it"),
        (["--mutate", "--no-finite-differences"], "--finite-differences is not for --mutate"),
        (["--mutate", "--num-cotangents", "1"], "--num-cotangents is not for --mutate"),
        (["--mutate", "--num-coordinates", "8"], "--num-coordinates is not for --mutate"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--seed", str(2**32)], "--seed must be at least 0 and below 2**32"),
    ],
)
def test_options_are_validated(options, message, capsys):
    names = [] if "--fn" in options else ["--fn", "a:b", "--reference", "a:b", "--inputs", "a:b"]
    with pytest.raises(SystemExit) as caught:
        main([*names, *options])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtypes", "float32"], "dtypes must hold 'float64' for finite differences"),
        (["--tolerance", "float64=nan"], "tolerances['float64'] must be positive, got nan"),
    ],
)
def test_what_the_check_refuses_is_one_line(options, message, tmp_path, capsys):
    assert run(tmp_path, "right", *options) == (2, {})
    error = capsys.readouterr().err
    assert error.startswith("jaxgru.checks: ") and message in error and error.count("\n") == 1


def test_no_file_is_overwritten(tmp_path, capsys):
    (tmp_path / "right.json").write_text(json.dumps({"passed": None}))
    assert run(tmp_path, "right") == (2, {"passed": None})
    assert "nothing was overwritten" in capsys.readouterr().err
    assert run(tmp_path / "none", "right") == (2, {})
    error = capsys.readouterr()
    assert "--json must be in a folder that exists, got" in error.err and not error.out


# Mutants


def verdicts(found):
    counts = {}
    for row in found["mutants"]:
        counts.setdefault(row["verdict"], set()).add((row["original"], row["mutated"]))
    return counts


def test_mutants_of_a_right_rule_are_caught_and_its_dead_branch_is_not_reached(tmp_path, capsys):
    original = right_bwd.__code__
    code, found = run(tmp_path, "right", "--mutate")
    assert code == 0
    assert verdicts(found) == {
        "caught": {
            ("3 * x", "3"), ("3 * x", "x"), ("3", "4"), ("3 * x * x", "3 * x"),
            ("3 * x * x", "x"), ("d['y'] * slope", "d['y']"), ("d['y'] * slope", "slope"),
        },
        "not reached": {
            ("slope + 7", "slope - 7"), ("slope + 7", "slope"), ("slope + 7", "7"), ("7", "8"),
        },
    }  # fmt: skip
    used = {"dtypes": ["float64"], "num_cotangents": 1, "finite_differences": False}
    assert found["options"].items() >= {**used, "num_coordinates": None}.items()
    line = right_bwd.__code__.co_firstlineno + 1
    assert found["mutants"][0]["line"] == line
    assert right_bwd.__code__ is original and mutants.PROBE not in globals()
    printed = capsys.readouterr().out
    assert printed.startswith("check_mutants: passed, 11 mutants in 1 check: 7 caught, 0 survived")


def test_inputs_blind_to_a_fault_let_mutants_survive(tmp_path, capsys):
    code, found = run(tmp_path, "right", "--mutate", inputs="Inputs.zeros")
    assert code == 1
    assert {("3", "4"), ("3 * x", "x")} <= verdicts(found)["survived"]
    assert "indistinct" not in verdicts(found)
    assert capsys.readouterr().out.startswith("check_mutants: FAILED, 11 mutants")


def test_mutants_that_change_nothing_are_distinguished_from_survivors(tmp_path):
    code, found = run(tmp_path, "long", "--mutate")
    assert code == 0
    assert verdicts(found)["indistinct"] == {("x - x + 3 * x * x", "3 * x * x")}


@pytest.mark.parametrize("fn", ["closed", "tangent"])
def test_rule_that_is_closed_over_values_or_a_tangent_is_mutated(fn, tmp_path):
    code, found = run(tmp_path, fn, "--mutate")
    texts = verdicts(found)["caught"]
    assert code == 0 and set(verdicts(found)) == {"caught"}
    assert fn == "tangent" or {("scale * factor", "scale"), ("x ** 2", "x")} <= texts


def test_python_number_among_the_arguments_of_a_rule_is_kept():
    def scaled_bwd(scale, x, d):
        return (d * 2 * x * scale,)

    scaled = jax.custom_vjp(lambda x, scale: scale * x * x, nondiff_argnums=(1,))
    scaled.defvjp(lambda x, scale: (scale * x * x, x), scaled_bwd)

    def check():
        return check_gradients(
            lambda x: scaled(x, 0.5), lambda x: 0.5 * x * x, jnp.zeros(2), dtypes="float64"
        )

    found = {
        (row.mutated, row.verdict) for row in check_mutants({"": scaled_bwd}, {"": check}).rows
    }
    assert ("3", "survived") in found and ("scale", "caught") in found


def test_wrong_rule_is_reported_and_not_mutated(tmp_path, capsys):
    code, found = run(tmp_path, "wrong", "--mutate")
    assert code == 1 and found["mutants"] == []
    message = f"check_mutants: FAILED, {HERE}:wrong must agree before the rules are mutated"
    assert capsys.readouterr().out.startswith(message)


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        ("cube", (), "is not a custom_vjp or custom_jvp; name the functions to mutate with"),
        ("of_lambda", (), "rules must each be written as a def"),
        ("without_rule", (), "call its defvjp first"),
        ("right", ("--rule", f"{HERE}:right"), "rules must be plain functions, got"),
        (
            "right",
            ("--rule", f"{HERE}:right_bwd", "--rule", f"{HERE}:long_bwd"),
            f"check_mutants: rules must be called by a check, got {HERE}:long_bwd; add a check",
        ),
    ],
)
def test_rule_that_cannot_be_mutated(fn, options, message, tmp_path, capsys):
    assert run(tmp_path, fn, "--mutate", *options)[0] == 2
    assert message in capsys.readouterr().err


def conditional(x, n):
    while n > 2:
        n = n - 3
    if n + 4:
        x = -x if x.ndim - 5 else x
    return x * (x > 6)


def test_comparisons_and_conditions_are_not_changed():
    made = mutants.make_mutants(mutants.read_rule("conditional", conditional))
    assert {mutant.original for mutant in made} == {"n - 3", "3", "-x", "x * (x > 6)"}


def test_rule_gets_its_own_code_back_after_an_exception():
    def interrupted():
        raise KeyboardInterrupt

    original = right_bwd.__code__
    mutant = mutants.make_mutants(mutants.read_rule("right_bwd", right_bwd))[0]
    with pytest.raises(KeyboardInterrupt):
        mutation.try_mutant(mutant, {"": interrupted})
    assert right_bwd.__code__ is original and mutants.PROBE not in globals()


@pytest.mark.slow
def test_jitted_function_runs_every_mutant_and_then_the_rule_again(tmp_path):
    x = jnp.linspace(0.1, 1.0, 4)
    gradient = jax.grad(lambda x: jitted(x, False)["y"].sum())
    with jax.disable_jit(False):
        before = gradient(x)
        code, found = run(tmp_path, "jitted", "--mutate", "--rule", f"{HERE}:right_bwd")
        assert code == 0 and len(verdicts(found)["caught"]) == 7
        assert (gradient(x) == before).all()
