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

In bfloat16 that takes a float32 state in the rollout, since `gru` keeps its state in float32 from
the first step to the last; `gru_cell` would round a bfloat16 state at every step. Between rollouts
the state is rounded once, as `gru` takes it. The trained parameters are float32 in either case. At
the end the errors of the ratios are measured for all three ways to act. A run folder holds
config.json, metrics.jsonl, checkpoints, result.json and recurrent_ppo.png.
"""

import functools
import itertools
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
NUM_CUES, EPOCHS, MINIBATCHES, LEARNING_RATE = 4, 4, 4, 3e-3  # the rate falls to 0 on a line
DISCOUNT, LAMBDA, CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.99, 0.95, 0.2, 0.5, 0.01
# The largest |ratio - 1| that is taken for rounding. In bfloat16 a sum in another order can round
# the operand of a product to its neighbour.
ROUNDING = {"float32": 1e-5, "bfloat16": 1e-2}


class World(NamedTuple):
    """B parallel environments, and the agent in them, between two steps."""

    cue: jax.Array  # [B]
    delay: jax.Array  # [B], the number of blank observations
    time: jax.Array  # [B], steps since the episode began
    done: jax.Array  # [B] bool, whether the step before was the last of its episode
    h: jax.Array  # [B, H], the state of the agent


class Steps(NamedTuple):
    """What happened in a rollout, [T, B, ...]."""

    x: jax.Array
    action: jax.Array
    log_prob: jax.Array  # of the action
    value: jax.Array
    reward: jax.Array
    done: jax.Array


def parse_args(argv):
    parser = runs.make_parser("recurrent_ppo", "Trains a recurrent agent by PPO on a memory task.")
    add = parser.add_argument
    add("--smoke", action="store_true", help="a tiny run of seconds that tests the script")
    add("--out", metavar="FOLDER", help="new or empty folder (default: runs/recurrent_ppo-DATE)")
    add("--updates", type=int, default=100, help="rollouts, each read in 4 epochs of 4 minibatches")
    add("--environments", type=int, default=64, help="parallel environments, a multiple of 4")
    add("--steps", type=int, default=64, help="steps of each environment in a rollout")
    add("--longest-delay", type=int, default=40, help="most blank observations of an episode")
    add("--hidden-size", type=int, default=64, help="size of the GRU's state")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the GRU's products")
    add("--seed", type=int, default=0, help="of weights, episodes and actions")
    runs.add_run_options(parser)
    parser.set_defaults(**(SMOKE if runs.parse_first(parser, argv).smoke else {}))
    args = runs.parse_options(parser, argv)
    for name in ("updates", "environments", "steps", "longest_delay", "hidden_size", "seed"):
        least, found, option = int(name != "seed"), getattr(args, name), name.replace("_", "-")
        if not least <= found < 2**32:
            parser.error(f"--{option} must be from {least} to 2**32 - 1, got {found}")
    if args.environments % MINIBATCHES:
        parser.error(f"--environments must be a multiple of {MINIBATCHES}, got {args.environments}")
    return args


def main(argv=None):
    args = parse_args(argv)
    return runs.run_script("recurrent_ppo", lambda: train(args), smoke=args.smoke)


@jax.default_matmul_precision("highest")  # a GPU's TF32 would round operands, too
def train(args):
    run = runs.open_run("recurrent_ppo", args)
    print(runs.describe_device(), flush=True)
    keys = jax.random.split(jax.random.key(args.seed), 3)
    # From the observation to the logits of the actions and the value.
    agent = models.init_sequence_model(keys[0], NUM_CUES + 1, args.hidden_size, NUM_CUES + 1)
    schedule = optax.linear_schedule(LEARNING_RATE, 0.0, args.updates * EPOCHS * MINIBATCHES)
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
    )
    records = runs.read_records(run)
    correct, errors = ([record[name] for record in records] for name in ("correct", "ratio_error"))
    result = {
        "correct_in_the_last_tenth": float(np.mean(correct[-every:])),
        "largest_ratio_error": max(errors),
        "ratio_errors": compare_states(args, state.params),
    }
    runs.write_json(run / "result.json", result)
    plot(run / "recurrent_ppo.png", correct, result["ratio_errors"])
    for way, found in result["ratio_errors"].items():
        print(f"largest |ratio - 1| of the trained agent, {way:<26}{max(found):.0e}")
    print(
        f"before each update at most {max(errors):.0e}\n"
        f"correct in the last tenth of the updates: {result['correct_in_the_last_tenth']:.1%}, "
        f"without memory {1 / NUM_CUES:.0%}\nrun folder: {run}"
    )
    return 0


def init_world(key, args, state_dtype=jnp.float32):
    h = jnp.zeros((args.environments, args.hidden_size), state_dtype)
    return World(*new_episodes(key, args), jnp.zeros(args.environments, bool), h)


def new_episodes(key, args):
    """(cue, delay, time) of the environments, each at the beginning of an episode."""
    (key_cue, key_delay), shape = jax.random.split(key), (args.environments,)
    cue = jax.random.randint(key_cue, shape, 0, NUM_CUES)
    delay = jax.random.randint(key_delay, shape, 1, args.longest_delay + 1)
    return cue, delay, jnp.zeros(shape, jnp.int32)


def observe(world):
    """x [B, NUM_CUES + 1]: the cue, one-hot, at the first step, and the signal at the last."""
    shown = jnp.where(world.time == 0, world.cue, -1)  # one_hot of -1 is zeros
    signal = (world.time > world.delay).astype(jnp.float32)
    return jnp.concatenate([jax.nn.one_hot(shown, NUM_CUES), signal[:, None]], axis=-1)


def act(key, args, world, action):
    """(world, reward [B]) after an action; where an episode is done, a new one begins."""
    done = world.time > world.delay
    reward = (done & (action == world.cue)).astype(jnp.float32)
    new, going_on = new_episodes(key, args), (world.cue, world.delay, world.time + 1)
    cue, delay, time = (jnp.where(done, *pair) for pair in zip(new, going_on))
    return World(cue, delay, time, done, world.h), reward


def advance(dtype, agent, world):
    """(x, h, log-probabilities, value) at the present observation."""
    x, h = observe(world), jnp.where(world.done[:, None], 0.0, world.h)
    h = jaxgru.gru_cell(cast(agent.layers[0], dtype), x.astype(dtype), h)
    return x, h, *read_head(agent, h.astype(dtype))


def rollout(args, dtype, agent, world, key):
    """(h0, world, steps): T steps of the agent, whose actions are drawn from its policy."""

    def body(world, key):
        key_action, key_episodes = jax.random.split(key)
        x, h, log_probs, value = advance(dtype, agent, world)
        action = jax.random.categorical(key_action, log_probs)
        after, reward = act(key_episodes, args, world, action)
        steps = Steps(x, action, log_prob_of(action, log_probs), value, reward, after.done)
        return after._replace(h=h), steps

    h0 = world.h.astype(dtype)  # `replay` begins with the same
    world = world._replace(h=h0.astype(world.h.dtype))
    return h0, *jax.lax.scan(body, world, jax.random.split(key, args.steps))


def replay(dtype, agent, steps, h0, done_before):
    """(log-probabilities, values, ratios) of all steps, from `gru` over the whole sequence."""
    resets = jaxgru.resets_from_dones(steps.done, done_before)
    layer, xs = cast(agent.layers[0], dtype), steps.x.astype(dtype)
    log_probs, values = read_head(agent, jaxgru.gru(layer, xs, h0, resets=resets)[1])
    return log_probs, values, jnp.exp(log_prob_of(steps.action, log_probs) - steps.log_prob)


def cast(params, dtype):
    return jax.tree.map(lambda v: v.astype(dtype), params)


def read_head(agent, h):
    """(log-probabilities [..., NUM_CUES], value [...]), float32."""
    outputs = h.astype(jnp.float32) @ agent.w
    outputs += jnp.broadcast_to(agent.b, outputs.shape)
    return jax.nn.log_softmax(outputs[..., :NUM_CUES]), outputs[..., NUM_CUES]


def log_prob_of(action, log_probs):
    return jnp.take_along_axis(log_probs, action[..., None], axis=-1)[..., 0]


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
    log_probs, values, ratio = replay(dtype, agent, steps, h0, done_before)
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

    def train_step(state, _):
        key, key_rollout, key_order = jax.random.split(state.key, 3)
        agent, done_before = state.params, state.carry.done
        h0, world, steps = rollout(args, dtype, agent, state.carry, key_rollout)
        advantages = estimate_advantages(steps, advance(dtype, agent, world)[-1])

        def learn(learner, chosen):
            agent, opt_state = learner
            chosen_steps = jax.tree.map(lambda v: v[:, chosen], (steps, advantages))
            batch = (*chosen_steps, h0[chosen], done_before[chosen])
            grads, metrics = jax.grad(ppo_loss, has_aux=True)(agent, dtype, *batch)
            updates, opt_state = optimizer.update(grads, opt_state, agent)
            return (optax.apply_updates(agent, updates), opt_state), metrics

        keys = jax.random.split(key_order, EPOCHS)
        orders = jax.vmap(lambda key: jax.random.permutation(key, args.environments))(keys)
        orders = orders.reshape(EPOCHS * MINIBATCHES, -1)
        learner, metrics = jax.lax.scan(learn, (agent, state.opt_state), orders)
        metrics = jax.tree.map(jnp.mean, metrics) | {"skipped": state.skipped}
        metrics["correct"] = steps.reward.sum() / jnp.maximum(steps.done.sum(), 1)
        ratios = replay(dtype, agent, steps, h0, done_before)[2]
        metrics["ratio_error"] = jnp.abs(ratios - 1).max()
        return training.TrainState(*learner, world, key, state.step + 1, state.skipped), metrics

    return jax.jit(train_step, donate_argnums=0)


def require_equal_policies(args, state, record):
    """A callback of `fit`: the policy that acted is that which the first update starts from."""
    update, error = record["update"], record["ratio_error"]
    if not error <= ROUNDING[args.dtype]:
        raise runs.CheckError(f"update {update}: |ratio - 1| = {error} before it learns")


def compare_states(args, agent):
    """The largest |ratio - 1| at each step of a rollout, for three ways to act."""

    def measure(dtype, state_dtype):
        keys = jax.random.split(jax.random.key(args.seed), 3)
        world = rollout(args, dtype, agent, init_world(keys[0], args, state_dtype), keys[1])[1]
        h0, _, steps = rollout(args, dtype, agent, world, keys[2])
        ratios = replay(dtype, agent, steps, h0, world.done)[2]
        return jnp.abs(ratios - 1).max(axis=1).tolist()

    return {
        "float32": measure(jnp.float32, jnp.float32),
        "bfloat16, bfloat16 state": measure(jnp.bfloat16, jnp.bfloat16),
        "bfloat16, float32 state": measure(jnp.bfloat16, jnp.float32),
    }


def plot(path, correct, ratio_errors):
    """Plots the correct answers by update, and the errors of the ratios by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    learning, ratios = figure.subplots(1, 2)
    learning.plot(range(1, len(correct) + 1), 100 * np.array(correct), label="agent")
    learning.axhline(100 / NUM_CUES, color="black", linestyle="--", label="without memory")
    learning.set(xlabel="update", ylabel="correct answers, %", title="Learning", ylim=(0, 103))
    learning.legend()
    for (way, errors), style in zip(ratio_errors.items(), ("-", "-", "--")):
        ratios.plot(errors, style, label=f"{way}: at most {max(errors):.0e}")
    title = "Rollout and replay by the trained agent"
    ratios.set(xlabel="step of the rollout", ylabel="largest |ratio - 1|", title=title)
    ratios.set_yscale("log")
    ratios.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
