"""A small training run under any layout, and what it leaves; as a script, one of its processes.

    python tests/training/data_parallel.py FOLDER HOST:PORT NUM_PROCESSES PROCESS_ID [NAME]

writes FOLDER/PROCESS_ID.npz: of every run its losses, parameters and the rows it read. With a name
it trains instead, slowly, until it is stopped or has ended, with its checkpoints in FOLDER/NAME.
"""

import functools
import resource
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgru
from experiments import data
from jaxgru import training

BATCH_SIZE, NUM_STEPS, VOCAB_SIZE, HIDDEN_SIZE = 8, 6, 7, 8
BATCH_AXES = (1, 1, None)
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, 200).astype(np.int32)


class Run(NamedTuple):
    """What a run leaves, whole and on the host."""

    losses: np.ndarray
    norms: np.ndarray
    params: list[np.ndarray]
    rows: np.ndarray  # [batches, T, rows]: the inputs that this process read
    batch: np.ndarray  # [T, B]: the first batch as the devices have it, together


def loss_fn(params, carry, batch, key):
    """Of a linear readout, with dropout: a draw that depends on the layout would be seen."""
    tokens, targets, start = batch
    xs, ys = (jax.nn.one_hot(v, VOCAB_SIZE, dtype=carry.dtype) for v in (tokens, targets))
    h0 = jnp.where(start, jnp.zeros_like(carry), carry)
    h_last, hs = jaxgru.gru(params["gru"], xs, h0, noise=jaxgru.Noise(0.2), key=key)
    loss = jnp.mean((hs @ params["w"] - ys) ** 2)
    return loss, (h_last, {"squared_error": loss})


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5, momentum=0.9))


@functools.cache
def make_train_step(layout=None):
    """Made once, so that runs of the same layout and dtypes are compiled once."""
    return training.make_train_step(loss_fn, OPTIMIZER, layout=layout)


def make_state(dtype=jnp.float32):
    """The state before the first update."""
    shapes = (
        (VOCAB_SIZE, 3 * HIDDEN_SIZE),
        (HIDDEN_SIZE, 3 * HIDDEN_SIZE),
        (HIDDEN_SIZE, VOCAB_SIZE),
    )
    # Not of `init_gru`, which would take longer to compile than the updates.
    draw = np.random.default_rng(1).normal
    w_x, w_h, w = (jnp.asarray(draw(0, 0.5, shape), dtype) for shape in shapes)
    bias = jnp.zeros(3 * HIDDEN_SIZE, dtype)
    params = {"gru": jaxgru.GRUParams(w_x, w_h, bias, bias, spec=jaxgru.CHO_2014), "w": w}
    h0 = jnp.zeros((BATCH_SIZE, HIDDEN_SIZE), dtype)
    return training.init_train_state(params, OPTIMIZER, key=jax.random.key(1), carry=h0)


def read(rows=slice(None)):
    """(inputs, targets) of these streams."""
    return data.streams(TOKENS, BATCH_SIZE, NUM_STEPS, rows=rows)


def run(layout=None, dtype=jnp.float32):
    """Four updates, on one device where there is no layout."""
    state, train_step = make_state(dtype), make_train_step(layout)
    inputs, targets = read(layout.process_rows(BATCH_SIZE) if layout else slice(None))
    state = layout.place_state(state) if layout else state
    losses, norms, first = [], [], None
    for batch in data.epochs(inputs, targets, 1):
        batch = layout.place_batch(batch) if layout else batch
        first = batch[0] if first is None else first
        state, metrics = train_step(state, batch)
        losses.append(metrics["loss"])
        norms.append(metrics["gradient_norm"])
    params, first = (
        (state.params, first) if layout is None else layout.gather((state.params, first))
    )
    return Run(
        *(np.asarray(jax.device_get(values)) for values in (losses, norms)),
        [np.asarray(leaf) for leaf in jax.tree.leaves(params)],
        inputs,
        np.asarray(first),
    )


def fit(folder, name, layout=None, seconds=0.0, full=()):
    """Goes on with the run whose checkpoints are in a folder, on one device without a layout.

    For process 0 alone the disk is full during the updates of `full`.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    state, inner = make_state(), make_train_step(layout)
    inputs, targets = read(layout.process_rows(BATCH_SIZE) if layout else slice(None))

    def train_step(state, batch):
        time.sleep(seconds)
        if full and jax.process_index() == 0:
            room = 100 if int(state.step) + 1 in full else limit[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        return inner(state, batch)

    def batches(start):
        drawn = data.epochs(inputs, targets, 8, start)
        return map(layout.place_batch, drawn) if layout else drawn

    return training.fit(
        train_step,
        layout.place_state(state) if layout else state,
        batches,
        num_updates=32,
        evaluate=lambda state: {"norm": float(optax.tree.norm(state.params))},
        evaluate_every=6,
        monitor=training.Monitor("norm"),
        checkpoints=training.Checkpoints(f"{folder}/{name}", 5, resume=True),
        callbacks=[training.JsonLines(f"{folder}/{name}.jsonl")],
        log_every=1,
        progress=False,
    )


def layouts():
    """Layouts over all devices of all processes, each with the dtype of its run."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    return {
        "float32": training.Layout(mesh, batch_axes=BATCH_AXES),
        "float64": training.Layout(mesh, hidden="data", batch_axes=BATCH_AXES),
    }


def main(folder, address, num_processes, process_id, name=None):
    jax.distributed.initialize(address, int(num_processes), int(process_id))
    if name is not None:
        fit(folder, name, layouts()["float64"], seconds=0.1, full=range(4, 7))
        return
    results = {}
    for dtype, layout in layouts().items():
        with jax.enable_x64(dtype == "float64"):
            for field, value in run(layout, jnp.dtype(dtype))._asdict().items():
                parts = value if isinstance(value, list) else [value]
                results |= {f"{dtype} {field} {i}": part for i, part in enumerate(parts)}
    np.savez(f"{folder}/{process_id}.npz", **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
