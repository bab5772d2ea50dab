"""The cross-check as a command: verdicts, files, bad input, and seeded faults in any rule."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cross_check, mutation
from experiments.mutation import Point

# A mutant that is compiled clears the caches of the process, for the next test to fill again.
pytestmark = pytest.mark.usefixtures("uncompiled")

HERE = "test_cross_check"


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
    names = ("--fn", f"{HERE}:{fn}", "--reference", f"{HERE}:{reference}")
    command = [*names, "--inputs", f"{HERE}:{inputs}", "--out", str(folder / fn), *options]
    code = cross_check.main(command)
    path = folder / fn / "cross_check.json"

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
    assert {path.name for path in (tmp_path / fn).iterdir()} == {
        "config.json", "cross_check.json", "cross_check.txt"
    }  # fmt: skip
    assert {"device", "versions", "command", "options"} <= set(found)
    assert {case["dtype"] for case in found["cases"]} == {"float32", "float64"}
    assert all(row["ok"] for row in found["rows"]) and found["points"] == 1
    assert (tmp_path / fn / "cross_check.txt").read_text().strip() in capsys.readouterr().out


def test_wrong_rule_disagrees_and_names_the_leaf(tmp_path, capsys):
    code, found = run(tmp_path, "wrong")
    failed = [row for row in found["rows"] if not row["ok"]]
    assert code == 1
    assert {(row["leaf"], row["reason"]) for row in failed} == {
        ("x", "value"), ("x", "finite-difference")
    }  # fmt: skip
    assert max(row["error"] for row in failed) == pytest.approx(1 / 3, rel=1e-5)
    assert all("DISAGREE" in case["verdict"] for case in found["cases"])
    assert "check_gradients: FAILED" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_null(tmp_path):
    code, found = run(tmp_path, "poisoned")
    failed = [row for row in found["rows"] if row["reason"] == "non-finite"]
    assert code == 1 and failed
    assert all(row["actual"] is None and row["index"] == [1] for row in failed)


def test_raising_rule_is_a_disagreement_with_its_message(tmp_path, capsys):
    assert run(tmp_path, "raising")[0] == 1
    assert "raised RuntimeError: not yet written" in capsys.readouterr().out


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
    assert found["cases"][0]["limit"] == 0.5


def test_other_seed_draws_other_inputs(tmp_path):
    values = []
    for seed in "112":
        options = ("--dtypes", "caller", "--no-finite-differences", "--seed", seed)
        _, found = run(tmp_path / str(len(values)), "right", *options)
        values += [row["actual"] for row in found["rows"][:2] if row["leaf"] == "out['y']"]
    assert values[0] == values[1] != values[2]


# Unusable input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fn": "missing"}, "--fn test_cross_check:missing: test_cross_check has no missing"),
        ({"fn": "HERE"}, "--fn test_cross_check:HERE must be callable, got str"),
        ({"inputs": "Inputs.none"}, "has no Inputs.none"),
        ({"inputs": "Inputs.array"}, "must return a tuple .* for one argument return"),
        ({"inputs": "Inputs.broken"}, "Inputs.broken raised RuntimeError: no data"),
        ({"inputs": "Inputs.two"}, "--reference .*cube raised TypeError"),
        ({"inputs": "Inputs.integers"}, "args must hold real leaves.*cast integers to a floating"),
        ({"inputs": "Inputs.infinite"}, r"x\[1\] = inf in float32; replace"),
    ],
)
def test_unusable_input_is_one_line(options, message, tmp_path, capsys):
    code, _ = run(tmp_path, **{"fn": "right", **options})
    error = capsys.readouterr().err
    assert code == 2
    assert re.match(f"cross_check: .*{message}", error)
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
    assert cross_check.main(["--fn", fn, *names, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "own_functions.py").write_text(
        "import jax.numpy as jnp\nsine = jnp.sin\ndef inputs():\n    return (jnp.ones(2),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(cross_check.sys.path))
    names = ("--fn", "sine", "--reference", "sine", "--inputs", "inputs")
    names = [name if name[0] == "-" else f"own_functions:{name}" for name in names]
    assert cross_check.main([*names, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fn", "a:b"], "--fn needs --reference and --inputs"),
        (["--inputs", "a:b"], "--reference and --inputs need --fn"),
        (["--full", "--smoke"], "--full is for the package's grid, without --smoke"),
        (["--rule", "a:b"], "--rule needs --mutate"),
        (["--dtypes", "float32"], "finite differences need float64"),
        (["--dtypes", "int8"], "invalid choice"),
        (["--num-cotangents", "0"], "--num-cotangents must be at least 1, got 0"),
        (["--tolerance", "float64=nan"], "--tolerance must be NAME=VALUE"),
        (["--tolerance", "tight=1"], "--tolerance must be NAME=VALUE"),
        (["--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_options_are_validated(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cross_check.main(options)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_folder_that_holds_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "right").mkdir()
    (tmp_path / "right" / "note").write_text("mine")
    assert run(tmp_path, "right")[0] == 2
    assert "nothing was overwritten" in capsys.readouterr().err


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
    line = right_bwd.__code__.co_firstlineno + 1
    assert found["mutants"][0]["line"] == line
    assert right_bwd.__code__ is original and mutation._PROBE not in globals()
    assert "11 mutants at 1 points: 7 caught, 0 survived" in capsys.readouterr().out


def test_inputs_blind_to_a_fault_let_mutants_survive(tmp_path):
    code, found = run(tmp_path, "right", "--mutate", inputs="Inputs.zeros")
    assert code == 1
    assert {("3", "4"), ("3 * x", "x")} <= verdicts(found)["survived"]
    assert "indistinct" not in verdicts(found)


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


def test_wrong_rule_is_reported_and_not_mutated(tmp_path, capsys):
    code, found = run(tmp_path, "wrong", "--mutate")
    assert code == 1 and found["mutants"] == []
    assert "must agree before they are mutated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        ("cube", (), "is not a custom_vjp or custom_jvp; name the functions to mutate with"),
        ("of_lambda", (), "must be written as a def"),
        ("without_rule", (), "call its defvjp first"),
        ("right", ("--rule", f"{HERE}:right"), "must name a function"),
    ],
)
def test_rule_that_cannot_be_mutated(fn, options, message, tmp_path, capsys):
    assert run(tmp_path, fn, "--mutate", *options)[0] == 2
    assert message in capsys.readouterr().err


def test_rule_gets_its_own_code_back_after_an_exception():
    def interrupted():
        raise KeyboardInterrupt

    original = right_bwd.__code__
    rule = mutation.read_rule("right_bwd", right_bwd)
    mutant = mutation.make_mutants(rule)[0]
    with pytest.raises(KeyboardInterrupt):
        mutation.try_mutant(mutant, [Point("", interrupted)])
    assert right_bwd.__code__ is original and mutation._PROBE not in globals()


@pytest.mark.slow
def test_jitted_function_runs_every_mutant_and_then_the_rule_again(tmp_path):
    x = jnp.linspace(0.1, 1.0, 4)
    gradient = jax.grad(lambda x: jitted(x, False)["y"].sum())
    with jax.disable_jit(False):
        before = gradient(x)
        code, found = run(tmp_path, "jitted", "--mutate", "--rule", f"{HERE}:right_bwd")
        assert code == 0 and len(verdicts(found)["caught"]) == 7
        assert (gradient(x) == before).all()


# The package's own grid


def test_grid_in_short_agrees(tmp_path, capsys):
    options = ["--dtypes", "float64", "--no-finite-differences", "--num-cotangents", "1"]
    with jax.disable_jit(False):
        assert cross_check.main(["--smoke", *options, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "cross_check.json").read_text())
    assert [case["case"] for case in found["cases"]] == [
        "before keep tanh forward residuals=gates mask resets",
        "after keep tanh reverse gradient=tangent mask resets",
    ]
    assert all(0 < case["autodiff"] < 1e-10 for case in found["cases"])
    assert "2 points" in capsys.readouterr().out


def test_grid_holds_every_choice():
    with jax.disable_jit(False):
        short, full = (
            [*cross_check.grid_points(cross_check.parse_args(options))]
            for options in ([], ["--full"])
        )
    names = {point.name for point in full}
    assert len(names) == len(full) == 2 * 2 * 5 * 2 * 7 * 2 + 6
    assert {point.name for point in short} < names and len(short) == 102
