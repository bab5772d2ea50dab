"""A small training run that tests stop, kill and resume; `python survivor.py` serves such runs.

Reading a line `FOLDER` it forks a child that goes on with that run in that folder; the child writes
a dot for each update to the standard output and "end" after the last. The imports, which take most
of a short process's life, are made once.
"""

import functools
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from saved_bits import saved_bits

from jaxgru import training

NUM_UPDATES = 60


def loss_fn(params, carry, batch, key):
    """Noisy, with a carry and a NaN now and then: whatever is not kept shows in the end."""
    noise = 0.1 * jax.random.normal(key, (3,))
    loss = jnp.sum((params["w"] - batch + noise) ** 2) + 0.1 * jnp.sum(params["w"]) * carry
    return loss, (0.9 * carry + params["w"][0], {"first": params["w"][0]})


def batches(start):
    rng = np.random.default_rng(5)
    for number in range(NUM_UPDATES):
        batch = rng.normal(size=3).astype(np.float32)
        if number >= start:
            yield np.full_like(batch, np.nan) if number % 13 == 6 else batch


def evaluate(state):
    return {"far": float(jnp.abs(state.params["w"]).sum())}


@functools.cache
def make_train_step():
    optimizer = optax.sgd(0.02, momentum=0.9)
    return training.make_train_step(loss_fn, optimizer), optimizer


def make_state():
    params = {"w": jnp.arange(3.0)}
    return training.init_train_state(
        params, make_train_step()[1], key=jax.random.key(1), carry=jnp.zeros(())
    )


def run(folder, *, resume=True, every=5, on_update=lambda step: None, **options):
    """Trains in a folder, from where it was stopped; on_update(step) is called at each update."""
    folder = pathlib.Path(folder)
    inner, steps = make_train_step()[0], []

    def train_step(state, batch):
        step = int(state.step) + 1
        steps.append(step)
        state, metrics = inner(state, batch)
        on_update(step)
        return state, metrics

    given = {
        "num_updates": NUM_UPDATES,
        "evaluate": evaluate,
        "evaluate_every": 7,
        "monitor": training.Monitor("far"),
        "checkpoints": training.Checkpoints(folder / "checkpoints", every, {"a": 1}, resume=resume),
        "callbacks": [training.JsonLines(folder / "metrics.jsonl", name="run")],
        "log_every": 4,
        "progress": False,
    }
    given |= {"batches": batches} | options
    return training.fit(train_step, make_state(), given.pop("batches"), **given)


def left_by(folder):
    """What a run leaves: the bits of each checkpoint, and the records without their times."""
    folder = pathlib.Path(folder)
    files = {path.name: saved_bits(path) for path in (folder / "checkpoints").glob("step-*")}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    return files, records


def serve():
    for line in sys.stdin:
        if os.fork() == 0:
            run(line.strip(), every=3, on_update=lambda step: os.write(1, b"."))
            os.write(1, b"end")
            os._exit(0)
        os.wait()
        os.write(1, b"\n")


if __name__ == "__main__":
    serve()
