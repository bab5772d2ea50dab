"""The figure of gradient flow: its values agree with autodiff, and bad input is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgru
from experiments import char_lm, memory_tasks
from experiments.gradient_flow import __main__ as gradient_flow
from experiments.gradient_flow import observe, report
from jaxgru import diagnostics

pytestmark = pytest.mark.usefixtures("saved_programs")

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory, text_file):
    run = tmp_path_factory.mktemp("flow") / "run"
    options = ["--smoke", "--text", str(text_file), "--text-updates", "20"]
    assert gradient_flow.main([*options, "--out", str(run)]) == 0
    return run


@pytest.mark.slow
def test_smoke_run_leaves_picture_numbers_and_metrics(smoke_run):
    found = json.loads((smoke_run / "gradient_flow.json").read_text())
    assert (smoke_run / "gradient_flow.png").stat().st_size > 50_000
    assert len((smoke_run / "metrics.jsonl").read_text().splitlines()) > 8
    for name in ("adding", "text"):
        models = found["tasks"][name]["models"]
        assert set(models) == {"GRU", "tanh RNN"}
        for record in models.values():
            assert record["before"]["credit"] != record["after"]["credit"]
            assert record["after"]["distance"] == list(range(12))[::-1]
        after = models["GRU"]["after"]
        shares = np.array([after["paths"][path] for path in report.PATH_LABELS])
        np.testing.assert_allclose(shares.sum(axis=0), 1, atol=1e-5)
        assert all(abs(sum(gate) - 1) < 1e-6 for gate in after["gates"].values())


def test_cases_tend_to_their_limits_and_the_printed_jacobian_is_wrong_in_between(monkeypatch):
    monkeypatch.setattr(observe, "SHIFTS", (0.0, 12.0))
    cases = observe.saturation_cases(0, hidden_size=8)
    for name in ("1: z to 1", "2A: z to 0, r to 0", "2B: z to 0, r to 1"):
        for error, least in (("printed_error", 0.05), ("distance_to_limit", 0.3)):
            between, saturated = cases[name][error]
            assert between > least and saturated < 1e-3
    assert abs(cases["1: z to 1"]["largest_singular_value"][1] - 1) < 1e-3
    assert cases["2A: z to 0, r to 0"]["largest_singular_value"][1] < 1e-3


def test_printed_jacobian_is_autodiffs_with_gates_held_fixed(x64):
    draw = np.random.default_rng(0)
    shapes = ((2, 9), (3, 9), (9,), (9,))
    params = jaxgru.GRUParams(
        *(jnp.asarray(draw.uniform(-0.6, 0.6, shape)) for shape in shapes), spec=jaxgru.CHO_2014
    )
    x, h = jnp.asarray(draw.normal(size=2)), jnp.array([0.3, -0.5, 0.8])
    gates = jax.tree.map(lambda v: v[0], diagnostics.gate_values(params, x[None], h))
    w_n, b_n = params.w_h[:, 6:], (params.b_x + params.b_h)[6:]

    def frozen(h):
        n = jnp.tanh(x @ params.w_x[:, 6:] + (gates.reset * h) @ w_n + b_n)
        return gates.kept * h + (1 - gates.kept) * n

    wanted = jax.jit(jax.jacrev(frozen))(h)
    np.testing.assert_allclose(observe.printed_jacobian(params, gates), wanted, atol=1e-14)


@pytest.mark.slow
def test_vanilla_network_is_seen_as_autodiff_sees_it():
    key = jax.random.key(0)
    args = gradient_flow.parse_args(["--smoke"])
    task = memory_tasks.TASKS["adding"]
    params = memory_tasks.init_vanilla(key, task, args, 5)._replace(b_h=jnp.full(8, 0.2))
    xs = jax.random.normal(key, (5, 2, 2))

    def last(h, t, b):
        for x in xs[t:, b]:
            h = jnp.tanh(x @ params.w_x + h @ params.w_h + params.b_h)
        return ((h @ params.w + params.b) ** 2).sum()

    seen = observe._observe_vanilla(params, xs, lambda outputs: (outputs**2).sum(-1))
    h = jnp.tanh(xs[0, 1] @ params.w_x + params.b_h)
    wanted = jnp.linalg.norm(jax.grad(last)(h, 1, 1))
    np.testing.assert_allclose(seen["credit"][0, 1], wanted, rtol=1e-5)
    jacobian = jax.jacrev(lambda h: jnp.tanh(xs[1, 1] @ params.w_x + h @ params.w_h + params.b_h))
    values = jnp.linalg.svd(jacobian(h), compute_uv=False)
    np.testing.assert_allclose(seen["singular_values"][1, 1], values, rtol=1e-4)


@pytest.fixture(scope="module")
def model_run(tmp_path_factory, text_file):
    run = tmp_path_factory.mktemp("model") / "run"
    options = ["--smoke", "--text", str(text_file), "--spec", "pytorch", "--batch-size", "2"]
    options += ["--skip-check", "--num-steps", "16"]
    assert char_lm.main([*options, "--out", str(run)]) == 0
    return run


@pytest.mark.slow
def test_saved_character_model_is_observed_before_and_after_training(tmp_path, model_run, capsys):
    out = tmp_path / "flow"
    command = ["--run", str(model_run), "--num-steps", "10", "--out", str(out)]
    assert gradient_flow.main(command) == 0
    found = json.loads((out / "gradient_flow.json").read_text())["tasks"]["run"]
    record = found["models"]["GRU"]
    assert record["before"]["credit"] != record["after"]["credit"]
    assert record["after"]["printed_error"] is None  # the article's Jacobian is of reset before
    assert "character model (reset after, update keep)" in found["title"]
    assert (out / "gradient_flow.png").exists()

    assert gradient_flow.main(["--run", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "is not a run folder of char_lm: it has no" in capsys.readouterr().err
    long = [*command[:2], "--num-steps", "5000", "--out", str(tmp_path / "y")]
    assert gradient_flow.main(long) == 2
    assert "lower --num-steps" in capsys.readouterr().err and not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-steps", "1"], "--num-steps must be at least 2, got 1"),
        (["--smoke", "--adding-updates", "0"], "--text-updates must not both be 0"),
        (["--gru-learning-rate", "nan"], "--gru-learning-rate must be finite and above 0"),
        (["--seed", str(2**32)], r"--seed must be below 2**32"),
    ],
)
def test_bad_option_is_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        gradient_flow.main(options)
    assert message in capsys.readouterr().err


def test_text_that_is_too_short_is_refused(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("abc")
    out = tmp_path / "run"
    assert gradient_flow.main(["--text", str(tmp_path / "short.txt"), "--out", str(out)]) == 2
    assert "at least 20 sequences of 101" in capsys.readouterr().err and not out.exists()
