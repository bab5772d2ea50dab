"""Recurrent PPO: its task, its advantages and loss, and that rollout and replay are one policy."""

import functools
import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import recurrent_ppo as ppo
from jaxgru import models

pytestmark = pytest.mark.usefixtures("saved_programs")
ARGS = ppo.parse_args(["--smoke", "--environments", "12", "--longest-delay", "5"])
WAYS = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "wide": (jnp.bfloat16, jnp.float32),
}


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("ppo") / "run"
    with jax.numpy_dtype_promotion("standard"):  # for optax.adam
        assert ppo.main(["--smoke", "--out", str(run)]) == 0
    return run


def play(policy, steps):
    """Acts in the environments; the observations, actions, rewards and ends of every step."""
    observe, act = jax.jit(ppo.observe), jax.jit(functools.partial(ppo.act, args=ARGS))
    world, seen = ppo.init_world(jax.random.key(0), ARGS), []
    for key in jax.random.split(jax.random.key(1), steps):
        x = np.asarray(observe(world))
        action = policy(x)
        world, reward = act(key, world=world, action=jnp.asarray(action, jnp.int32))
        seen.append((x, action, np.asarray(reward), np.asarray(world.done)))
    return [np.stack(values) for values in zip(*seen)]


def test_only_memory_of_the_cue_earns_the_reward():
    remembered = np.zeros(ARGS.environments, int)

    def remember(x):
        shown = x[:, : ppo.NUM_CUES].any(axis=1)
        remembered[shown] = x[shown, : ppo.NUM_CUES].argmax(axis=1)
        return remembered.copy()

    x, _, reward, done = play(remember, 60)
    np.testing.assert_array_equal(reward, done)  # always right, and rewarded nowhere else
    _, action, reward, done = play(lambda x: (remember(x) + 1) % ppo.NUM_CUES, 60)
    assert done.any() and not reward.any() and len(set(action.ravel())) == ppo.NUM_CUES
    cue, signal = x[..., : ppo.NUM_CUES].sum(axis=-1), x[..., ppo.NUM_CUES]
    np.testing.assert_array_equal(signal, done)
    np.testing.assert_array_equal(cue[1:], done[:-1])  # a cue follows the end of an episode
    ends = [np.flatnonzero(column) for column in done.T]
    lengths = np.concatenate([np.diff(column) for column in ends])
    assert set(lengths) == {3, 4, 5, 6, 7}  # a cue, one to five blanks, and the signal


def test_advantages_are_discounted_sums_that_stop_at_the_ends_of_episodes():
    draw, shape = np.random.default_rng(0), (9, 4)
    reward, value = draw.normal(size=shape), draw.normal(size=shape)
    done, value_after = draw.random(shape) < 0.3, draw.normal(size=4)
    wanted, values = np.zeros(shape), np.vstack([value, value_after])
    for column in range(4):
        for start in range(9):
            weight = 1.0
            for t in range(start, 9):
                going_on = 0.0 if done[t, column] else ppo.DISCOUNT
                error = reward[t, column] + going_on * values[t + 1, column] - values[t, column]
                wanted[start, column] += weight * error
                weight *= going_on * ppo.LAMBDA
    zeros = jnp.zeros(shape)
    steps = ppo.Steps(zeros, zeros, zeros, *map(jnp.float32, (value, reward)), jnp.asarray(done))
    got = jax.jit(ppo.estimate_advantages)(steps, jnp.float32(value_after))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def rollouts():
    """The second of two rollouts in a row, for each way to act: (agent, dtype, its results)."""
    keys = jax.random.split(jax.random.key(0), 4)
    agent = models.init_sequence_model(keys[0], ppo.NUM_CUES + 1, 16, ppo.NUM_CUES + 1)
    agent = jax.tree.map(lambda v: 2 * v, agent)  # as decided as a trained one

    def twice(dtype, state_dtype):
        run = jax.jit(functools.partial(ppo.rollout, ARGS, dtype, agent))
        _, world, _ = run(ppo.init_world(keys[1], ARGS, state_dtype), keys[2])
        h0, _, steps = run(world, keys[3])
        return steps, h0, world.done

    return {way: (agent, chosen[0], twice(*chosen)) for way, chosen in WAYS.items()}


@pytest.mark.parametrize(("way", "least", "most"), [
    ("float32", 0, 2e-6), ("bfloat16", 3e-3, 0.3), ("wide", 0, 2e-6),
])  # fmt: skip
def test_ratio_before_the_first_update_is_1_but_for_a_state_rounded_at_every_step(
    rollouts, way, least, most
):
    agent, dtype, (steps, h0, done_before) = rollouts[way]
    assert done_before.any() and not done_before.all() and np.abs(h0.astype(jnp.float32)).max() > 0
    ratios = ppo.replay(dtype, agent, steps, h0, done_before)[2]
    assert least <= float(jnp.abs(ratios - 1).max()) <= most


@pytest.mark.parametrize("wrong", ["done_before", "h0", "done"])
def test_ratio_shows_a_replay_with_wrong_resets_or_state(rollouts, wrong):
    agent, dtype, (steps, h0, done_before) = rollouts["float32"]
    changed = {"steps": steps, "h0": h0, "done_before": done_before}
    if wrong == "done":
        changed["steps"] = steps._replace(done=jnp.zeros_like(steps.done))
    else:
        changed[wrong] = jnp.zeros_like(changed[wrong])
    ratios = ppo.replay(dtype, agent, **changed)[2]
    assert float(jnp.abs(ratios - 1).max()) > 0.01


def test_run_stops_where_rollout_and_replay_differ(tmp_path, monkeypatch, capsys):
    ppo.require_equal_policies(ARGS, None, {"update": 1, "ratio_error": 3e-6})
    with pytest.raises(
        ppo.runs.CheckError, match=r"update 2: \|ratio - 1\| = nan before it learns"
    ):
        ppo.require_equal_policies(ARGS, None, {"update": 2, "ratio_error": np.nan})

    def forgetful(dtype, agent, steps, h0, done_before):
        return replay(
            dtype, agent, steps._replace(done=jnp.zeros_like(steps.done)), h0, done_before
        )

    replay = ppo.replay
    monkeypatch.setattr(ppo, "replay", forgetful)
    with jax.numpy_dtype_promotion("standard"):  # for optax.adam
        assert ppo.main(["--smoke", "--out", str(tmp_path / "run")]) == 1
    message = r"^recurrent_ppo: update 1: \|ratio - 1\| = [0-9.]+ before it learns$"
    shown = capsys.readouterr().err
    assert re.search(message, shown, flags=re.M) and "Traceback" not in shown


def test_smoke_run_is_compiled_with_little_optimization(monkeypatch):
    found = []
    monkeypatch.setattr(ppo.runs, "run_script", lambda *args, smoke: found.append(smoke))
    ppo.main(["--smoke"])
    ppo.main([])
    assert found == [True, False]


def test_loss_is_the_clipped_one_of_the_paper(rollouts):
    agent, dtype, (steps, h0, done_before) = rollouts["float32"]
    draw = np.random.default_rng(0)
    advantages = draw.normal(size=steps.reward.shape).astype(np.float32)
    old = np.asarray(steps.log_prob) + draw.normal(size=advantages.shape).astype(np.float32) / 3
    log_probs, values, _ = map(np.asarray, ppo.replay(dtype, agent, steps, h0, done_before))
    loss, metrics = ppo.ppo_loss(
        agent, dtype, steps._replace(log_prob=jnp.asarray(old)), jnp.asarray(advantages), h0,
        done_before,
    )  # fmt: skip
    scaled = (advantages - advantages.mean()) / advantages.std()
    ratio = np.exp(np.asarray(steps.log_prob) - old)
    assert (ratio > 1.2).any() and (ratio < 0.8).any()
    policy = np.where(scaled > 0, np.minimum(ratio, 1.2), np.maximum(ratio, 0.8)) * scaled
    squares = (values - np.asarray(steps.value) - advantages) ** 2
    entropy = -(np.exp(log_probs) * log_probs).sum(axis=-1).mean()
    wanted = -policy.mean() + 0.5 * squares.mean() - 0.01 * entropy
    np.testing.assert_allclose(loss, wanted, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)


@pytest.mark.slow
def test_agent_of_the_smoke_run_learns_to_remember(smoke_run):
    records = [json.loads(line) for line in (smoke_run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((smoke_run / "result.json").read_text())
    assert records[0]["correct"] < 0.5 and result["correct_in_the_last_tenth"] > 0.85
    assert result["largest_ratio_error"] < 1e-5
    errors = {way: max(found) for way, found in result["ratio_errors"].items()}
    assert errors["bfloat16, bfloat16 state"] > 100 * errors["bfloat16, float32 state"]
    files = {"checkpoints", "config.json", "metrics.jsonl", "result.json", "recurrent_ppo.png"}
    assert {path.name for path in smoke_run.iterdir()} == files
    assert (smoke_run / "recurrent_ppo.png").stat().st_size > 20_000


@pytest.mark.slow
def test_stopped_and_resumed_run_is_the_uninterrupted_one(smoke_run, tmp_path, monkeypatch):
    def stop(args, state, record):
        if record["update"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with jax.numpy_dtype_promotion("standard"):
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "require_equal_policies", stop)
            assert ppo.main(["--smoke", "--out", str(tmp_path / "run")]) == 128 + signal.SIGTERM
        assert ppo.main(["--resume", str(tmp_path / "run")]) == 0
    got, wanted = ((run / "result.json").read_bytes() for run in (tmp_path / "run", smoke_run))
    assert got == wanted


@pytest.mark.parametrize(("arguments", "message"), [
    (["--updates", "0"], "--updates must be from 1 to 2**32 - 1, got 0"),
    (["--seed", "-1"], "--seed must be from 0 to 2**32 - 1, got -1"),
    (["--environments", "6"], "--environments must be a multiple of 4, got 6"),
    (["--dtype", "float16"], "invalid choice: 'float16'"),
])  # fmt: skip
def test_bad_option_exits_with_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        ppo.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
