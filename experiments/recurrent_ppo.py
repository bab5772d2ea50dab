"""Trains a recurrent agent by PPO on a task that needs memory, and compares rollout and replay.

    python -m experiments.recurrent_ppo                        # the default: about a minute
    python -m experiments.recurrent_ppo --dtype bfloat16
    python -m experiments.recurrent_ppo --longest-delay 80 --steps 128

The task: the first observation of an episode shows one of four cues. Then come blank observations,
a random number of them, and then a signal; the action at the signal earns 1 if it names the cue. An
agent without memory earns a quarter. Each of the parallel environments begins a new episode when
one ends, so episodes have different lengths and may span two rollouts.

PPO (Schulman et al. 2017, arXiv:1707.06347) acts step by step and learns from whole sequences:
`rollout` runs `gru_cell`, and `replay` runs `gru` over the same steps, from the state that the
rollout began with and with resets after the ends of episodes. The loss is made of ratios of
probabilities, new / old. Before the first update after a rollout the parameters are still those
that acted, so every ratio must be 1. The run stops if it is not.

In bfloat16 the ratios are not 1 if `gru_cell` acts: it rounds the state that it returns at every
step, while `gru` keeps its state in float32 from the first step to the last. So with `--dtype
bfloat16` the rollout runs `wide_cell`, whose state is float32, and the state is rounded once
between rollouts, as `gru` takes it. The parameters that are trained are float32 in either case. At
the end the errors of the ratios are measured for all three ways. A run folder holds config.json,
metrics.jsonl, checkpoints, result.json and recurrent_ppo.png.
"""

import argparse
import functools
import itertools
import math
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgru
from experiments import runs
from jaxgru import models, training

SMOKE = {"updates": 20, "environments": 32, "steps": 16, "longest_delay": 2, "hidden_size": 16}
NUM_CUES, MINIBATCHES = 4, 4
DISCOUNT, LAMBDA, CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.99, 0.95, 0.2, 0.5, 0.01
# The largest |ratio - 1| that is taken for rounding. In bfloat16 a sum in another order can round
# the operand of a product to its neighbour.
ROUNDING = {"float32": 1e-5, "bfloat16": 1e-2}


class Episodes(NamedTuple):
    """Where each of B parallel environments is."""

    cue: jax.Array  # [B] int32
    delay: jax.Array  # [B] int32, the number of blank observations
    time: jax.Array  # [B] int32, steps since the episode began


class World(NamedTuple):
    """What one rollout hands to the next."""

    episodes: Episodes
    h: jax.Array  # [B, H] float32, the state of the agent
    done: jax.Array  # [B] bool, whether the step before was the last of its episode


class Steps(NamedTuple):
    """What happened in a rollout, [T, B, ...]."""

    x: jax.Array
    action: jax.Array
    log_prob: jax.Array  # of the action
    value: jax.Array
    reward: jax.Array
    done: jax.Array


def parse_args(argv):
    parser = argparse.ArgumentParser(
        "python -m experiments.recurrent_ppo",
        description="Trains a recurrent agent by PPO on a memory task.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--smoke", action="store_true", help="a tiny run of seconds that tests the script")
    add("--out", metavar="FOLDER", help="new or empty folder; None is runs/recurrent_ppo-DATE")
    add("--updates", type=int, default=100, help="rollouts, each followed by the epochs")
    add("--environments", type=int, default=64, help="parallel environments, a multiple of 4")
    add("--steps", type=int, default=64, help="steps of each environment in a rollout")
    add("--longest-delay", type=int, default=40, help="most blank observations of an episode")
    add("--hidden-size", type=int, default=64, help="size of the GRU's state")
    add("--epochs", type=int, default=4, help="passes over a rollout, in four minibatches each")
    add("--learning-rate", type=float, default=3e-3, help="at the start of a line to 0")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the GRU's products")
    add("--seed", type=int, default=0, help="of weights, episodes and actions")
    runs.add_run_options(parser)
    parser.set_defaults(**(SMOKE if parser.parse_known_args(argv)[0].smoke else {}))
    args = runs.parse_options(parser, argv)
    limits = dict.fromkeys(("updates", "steps", "longest_delay", "hidden_size", "epochs"), 1)
    for name, least in (limits | {"environments": MINIBATCHES, "seed": 0}).items():
        if not least <= getattr(args, name) < 2**32:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} must be from {least} to 2**32 - 1, got {getattr(args, name)}")
    if args.environments % MINIBATCHES:
        parser.error(f"--environments must be a multiple of {MINIBATCHES}, got {args.environments}")
    if not 0 < args.learning_rate < math.inf:
        parser.error(f"--learning-rate must be finite and above 0, got {args.learning_rate}")
    return args


def main(argv=None):
    args = parse_args(argv)
    with jax.default_matmul_precision("highest"):  # a GPU's TF32 would round operands, too
        return runs.run_script("recurrent_ppo", lambda: train(args))


def train(args):
    run = runs.open_run("recurrent_ppo", args)
    print(runs.describe_device(), flush=True)
    keys = jax.random.split(jax.random.key(args.seed), 3)
    # From the observation to the logits of the actions and the value.
    agent = models.init_sequence_model(keys[0], NUM_CUES + 1, args.hidden_size, NUM_CUES + 1)
    num_minibatches = args.updates * args.epochs * MINIBATCHES
    schedule = optax.linear_schedule(args.learning_rate, 0.0, num_minibatches)
    optimizer = optax.chain(training.clip_by_global_norm(0.5), optax.adam(schedule))
    world, every = init_world(keys[1], args), max(1, args.updates // 10)
    state, *_ = training.fit(
        make_train_step(args, optimizer),
        training.init_train_state(agent, optimizer, key=keys[2], carry=world),
        lambda start: itertools.repeat(None, args.updates - start),
        num_updates=args.updates,
        checkpoints=runs.checkpoints_of(run, args, every),
        callbacks=[*runs.loggers(run, args), functools.partial(require_equal_policies, args)],
        log_every=1,
        items_per_update=args.steps * args.environments,
        items_name="steps",
    )
    records = runs.read_records(run)
    result = {
        "correct_in_the_last_tenth": float(np.mean([r["correct"] for r in records[-every:]])),
        "chance": 1 / NUM_CUES,
        "largest_ratio_error": max(r["ratio_error"] for r in records),
        "ratio_errors": compare_cells(args, state.params),
        "device": runs.describe_device(),
    }
    runs.write_json(run / "result.json", result)
    plot(run / "recurrent_ppo.png", records, result)
    for way, errors in result["ratio_errors"].items():
        print(f"largest |ratio - 1| of the trained agent, {way:<24}{max(errors):.0e}")
    print(f"before each update at most {result['largest_ratio_error']:.0e}")
    correct, chance = result["correct_in_the_last_tenth"], result["chance"]
    print(f"correct in the last tenth of the updates: {correct:.1%}, without memory {chance:.0%}")
    print(f"run folder: {run}")
    return 0


def init_world(key, args):
    h = jnp.zeros((args.environments, args.hidden_size))
    return World(new_episodes(key, args), h, jnp.zeros(args.environments, bool))


def new_episodes(key, args):
    key_cue, key_delay = jax.random.split(key)
    shape = (args.environments,)
    cue = jax.random.randint(key_cue, shape, 0, NUM_CUES)
    delay = jax.random.randint(key_delay, shape, 1, args.longest_delay + 1)
    return Episodes(cue, delay, jnp.zeros(shape, jnp.int32))


def observe(episodes):
    """x [B, NUM_CUES + 1]: the cue, one-hot, at the first step, and the signal at the last."""
    shown = jnp.where(episodes.time == 0, episodes.cue, -1)  # one_hot of -1 is zeros
    signal = (episodes.time > episodes.delay).astype(jnp.float32)
    return jnp.concatenate([jax.nn.one_hot(shown, NUM_CUES), signal[:, None]], axis=-1)


def act(key, args, episodes, action):
    """(episodes, reward [B], done [B]) after an action; where one is done, a new one begins."""
    done = episodes.time > episodes.delay
    reward = (done & (action == episodes.cue)).astype(jnp.float32)
    later = episodes._replace(time=episodes.time + 1)
    new = new_episodes(key, args)
    return jax.tree.map(lambda a, b: jnp.where(done, a, b), new, later), reward, done


def narrow_cell(params, x, h):
    """`gru_cell`, whose state has the dtype of the parameters; h comes and goes as float32."""
    return jaxgru.gru_cell(params, x, h.astype(x.dtype)).astype(jnp.float32)


def wide_cell(params, x, h):
    """The step of `gru_cell` with a state in float32 for half types too, as it is inside of `gru`.

    Only the operands of products have the dtype of the parameters; sums and gates are float32.
    """

    def product(v, w):
        return jnp.dot(v.astype(w.dtype), w, preferred_element_type=jnp.float32)

    a = product(x, params.w_x)
    for b in (params.b_x, params.b_h):
        a += jnp.broadcast_to(b.astype(a.dtype), a.shape)
    a_r, a_z, a_n = jnp.split(a, 3, axis=-1)
    w_r, w_z, w_n = jnp.split(params.w_h, 3, axis=-1)
    r, z = jax.nn.sigmoid(a_r + product(h, w_r)), jax.nn.sigmoid(a_z + product(h, w_z))
    return z * h + (1 - z) * jnp.tanh(a_n + product(r * h, w_n))


def advance(cell, dtype, agent, world):
    """(x, h, log-probabilities, value) at the present observation."""
    x, h = observe(world.episodes), jnp.where(world.done[:, None], 0.0, world.h)
    h = cell(cast(agent.layers[0], dtype), x.astype(dtype), h)
    return x, h, *read_head(agent, h.astype(dtype))


def rollout(args, cell, dtype, agent, world, key):
    """(h0, world, steps): T steps of the agent, whose actions are drawn from its policy."""

    def body(world, key):
        key_action, key_episodes = jax.random.split(key)
        x, h, log_probs, value = advance(cell, dtype, agent, world)
        action = jax.random.categorical(key_action, log_probs)
        episodes, reward, done = act(key_episodes, args, world.episodes, action)
        log_prob = log_prob_of(action, log_probs)
        return World(episodes, h, done), Steps(x, action, log_prob, value, reward, done)

    h0 = world.h.astype(dtype)  # `replay` begins with the same
    world = world._replace(h=h0.astype(jnp.float32))
    return h0, *jax.lax.scan(body, world, jax.random.split(key, args.steps))


def replay(dtype, agent, steps, h0, done_before):
    """(log-probabilities, values) of all steps, from `gru` over the whole sequence."""
    resets = jaxgru.resets_from_dones(steps.done, done_before)
    xs = steps.x.astype(dtype)
    return read_head(agent, jaxgru.gru(cast(agent.layers[0], dtype), xs, h0, resets=resets)[1])


def cast(params, dtype):
    return jax.tree.map(lambda v: v.astype(dtype), params)


def read_head(agent, h):
    """(log-probabilities [..., NUM_CUES], value [...]), float32."""
    outputs = h.astype(jnp.float32) @ agent.w
    outputs += jnp.broadcast_to(agent.b, outputs.shape)
    return jax.nn.log_softmax(outputs[..., :NUM_CUES]), outputs[..., NUM_CUES]


def log_prob_of(action, log_probs):
    return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]


def ratio_errors(dtype, agent, steps, h0, done_before):
    """|ratio - 1| [T, B] of a rollout and its replay by the same agent."""
    log_probs, _ = replay(dtype, agent, steps, h0, done_before)
    return jnp.abs(jnp.exp(log_prob_of(steps.action, log_probs) - steps.log_prob) - 1)


def estimate_advantages(steps, value_after):
    """The generalized advantages [T, B] (Schulman et al. 2016, arXiv:1506.02438)."""

    def body(carry, step):
        advantage, value_after = carry
        kept = DISCOUNT * (1 - step.done.astype(jnp.float32))  # nothing counts after an end
        advantage = step.reward + kept * (value_after + LAMBDA * advantage) - step.value
        return (advantage, step.value), advantage

    return jax.lax.scan(body, (jnp.zeros_like(value_after), value_after), steps, reverse=True)[1]


def ppo_loss(agent, dtype, steps, advantages, h0, done_before):
    """The clipped loss of the policy, with those of value and entropy; and metrics."""
    log_probs, values = replay(dtype, agent, steps, h0, done_before)
    ratio = jnp.exp(log_prob_of(steps.action, log_probs) - steps.log_prob)
    scaled = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    policy_loss = -jnp.minimum(ratio * scaled, clipped * scaled).mean()
    value_loss = jnp.square(values - (steps.value + advantages)).mean()
    entropy = -(jnp.exp(log_probs) * log_probs).sum(axis=-1).mean()
    loss = policy_loss + VALUE_WEIGHT * value_loss - ENTROPY_WEIGHT * entropy
    return loss, {"loss": loss, "value_loss": value_loss, "entropy": entropy}


def make_train_step(args, optimizer):
    """A step for `fit`: a rollout, and the epochs over its minibatches of environments."""
    dtype = jnp.dtype(args.dtype)
    cell = narrow_cell if dtype == jnp.float32 else wide_cell

    def train_step(state, _):
        key, key_rollout, key_order = jax.random.split(state.key, 3)
        agent, done_before = state.params, state.carry.done
        h0, world, steps = rollout(args, cell, dtype, agent, state.carry, key_rollout)
        advantages = estimate_advantages(steps, advance(cell, dtype, agent, world)[-1])

        def learn(learner, chosen):
            agent, opt_state = learner
            chosen_steps = jax.tree.map(lambda v: v[:, chosen], (steps, advantages))
            batch = (*chosen_steps, h0[chosen], done_before[chosen])
            grads, metrics = jax.grad(ppo_loss, has_aux=True)(agent, dtype, *batch)
            updates, opt_state = optimizer.update(grads, opt_state, agent)
            return (optax.apply_updates(agent, updates), opt_state), metrics

        keys = jax.random.split(key_order, args.epochs)
        orders = jax.vmap(lambda key: jax.random.permutation(key, args.environments))(keys)
        orders = orders.reshape(args.epochs * MINIBATCHES, -1)
        learner, metrics = jax.lax.scan(learn, (agent, state.opt_state), orders)
        metrics = jax.tree.map(jnp.mean, metrics) | {"skipped": state.skipped}
        metrics["correct"] = steps.reward.sum() / jnp.maximum(steps.done.sum(), 1)
        metrics["ratio_error"] = ratio_errors(dtype, agent, steps, h0, done_before).max()
        return training.TrainState(*learner, world, key, state.step + 1, state.skipped), metrics

    return jax.jit(train_step, donate_argnums=0)


def require_equal_policies(args, state, record):
    """A callback of `fit`: the policy that acted is that which the first update starts from."""
    update, error = record["update"], record["ratio_error"]
    assert error <= ROUNDING[args.dtype], f"update {update}: |ratio - 1| = {error} before it learns"


def compare_cells(args, agent):
    """The largest |ratio - 1| at each step of a rollout, for three ways to act."""

    def measure(cell, dtype):
        keys = jax.random.split(jax.random.key(args.seed), 3)
        _, world, _ = rollout(args, cell, dtype, agent, init_world(keys[0], args), keys[1])
        h0, _, steps = rollout(args, cell, dtype, agent, world, keys[2])
        return ratio_errors(dtype, agent, steps, h0, world.done).max(axis=1).tolist()

    return {
        "float32, gru_cell": measure(narrow_cell, jnp.float32),
        "bfloat16, gru_cell": measure(narrow_cell, jnp.bfloat16),
        "bfloat16, float32 state": measure(wide_cell, jnp.bfloat16),
    }


def plot(path, records, result):
    """Plots the correct answers by update, and the errors of the ratios by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    learning, ratios = figure.subplots(1, 2)
    updates = [record["update"] for record in records]
    learning.plot(updates, [100 * record["correct"] for record in records], label="agent")
    chance = 100 * result["chance"]
    learning.axhline(chance, color="black", linestyle="--", label=f"without memory: {chance:.0f} %")
    learning.set(xlabel="update", ylabel="correct answers, %", title="Learning", ylim=(0, 103))
    for (way, errors), style in zip(result["ratio_errors"].items(), ("-", "-", "--")):
        ratios.plot(errors, style, label=f"{way}: at most {max(errors):.0e}")
    ratios.set(xlabel="step of the rollout", ylabel="largest |ratio - 1|")
    ratios.set(title="Rollout and replay by the trained agent")
    ratios.set_ylim(top=1.4 * ratios.get_ylim()[1])  # room for the legend
    for axes in (learning, ratios):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right" if axes is learning else "upper left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
