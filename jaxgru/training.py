"""Training of any loss with optax: a state, one jitted update, a loop, and files of weights.

Knows no model. A loss is a function

    loss_fn(params, carry, batch, key) -> (loss, (carry, metrics))

where carry is whatever runs from one batch to the next without a gradient (a recurrent state, or
None) and metrics is a dict of scalars.
"""

import contextlib
import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgru.arguments import require_count
from jaxgru.layout import Layout
from jaxgru.whole_files import write_whole

Array = jax.Array
LossFn = Callable[[Any, Any, Any, chex.PRNGKey], tuple[Array, tuple[Any, dict[str, Array]]]]


class NonFiniteError(FloatingPointError):
    """Training stopped because updates in a row were not finite; `state` is the last good one."""

    def __init__(self, message: str, state: "TrainState"):
        super().__init__(message)
        self.state = state


class TrainState(NamedTuple):
    """All that an update reads and writes, arrays only."""

    params: Any
    opt_state: optax.OptState
    carry: Any  # what runs from batch to batch, e.g. a recurrent state
    key: chex.PRNGKey
    step: Array  # int32, updates asked for
    skipped: Array  # int32, updates left out because the loss or a gradient was not finite


def init_train_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    *,
    key: chex.PRNGKey,
    carry: Any = None,
) -> TrainState:
    """The state before the first update.

    Args:
      params: pytree of arrays; the state holds copies, since the train step donates its buffers.
      optimizer: from optax.
      key: a `jax.random.key`; each update draws its own from it.
      carry: the first carry of the loss; copied too.

    Returns:
      TrainState with step 0.

    >>> state = init_train_state({"w": jnp.ones(2)}, optax.sgd(0.1), key=jax.random.key(0))
    >>> int(state.step)
    0
    """
    params, carry, key = jax.tree.map(jnp.copy, (params, carry, key))
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    # Some optimizers keep the parameters' own buffers in their state.
    opt_state = jax.tree.map(jnp.copy, optimizer.init(params))
    return TrainState(params, opt_state, carry, key, step, skipped)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    donate: bool = True,
    layout: Layout | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """One jitted optimizer update: train_step(state, batch) -> (state, metrics).

    An update whose loss, gradient, gradient norm or resulting parameters are not finite changes
    nothing but step, key and the count of skipped updates. The gradient is checked as it is, since
    a clip turns inf into NaN; its norm, since entries of 1e30 in float32 have finite values and
    squares that no optimizer survives.

    Args:
      loss_fn: loss_fn(params, carry, batch, key) -> (loss, (carry, metrics)).
      optimizer: from optax, with its clipping and schedule.
      donate: reuse the state's buffers for the new state; the old one is then gone.
      layout: trains on its devices; give it states and batches that its `place_state` and
        `place_batch` have laid there. None trains on one.

    Returns:
      The function. Its metrics are those of the loss, and "loss", "gradient_norm" (before any
      clipping) and "skipped".

    Raises:
      ValueError: when traced, where the optimizer's updates change a parameter's shape or dtype.

    Cost: one gradient of the loss; parameters are held once where buffers are donated.

    >>> def loss_fn(params, carry, batch, key):
    ...     return jnp.sum((params - batch) ** 2), (carry, {})
    >>> optimizer = optax.sgd(0.5)
    >>> state = init_train_state(jnp.zeros(2), optimizer, key=jax.random.key(0))
    >>> state, metrics = make_train_step(loss_fn, optimizer)(state, jnp.ones(2))
    >>> state.params.tolist(), float(metrics["loss"])
    ([1.0, 1.0], 2.0)
    """

    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    gradient_fn = gradient_fn if layout is None else layout.wrap_gradient(gradient_fn)

    def train_step(state, batch):
        key, key_loss = jax.random.split(state.key)
        (loss, (carry, metrics)), grads = gradient_fn(state.params, state.carry, batch, key_loss)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        _require_same_shapes(params, state.params)
        leaves = [loss, norm, *jax.tree.leaves((grads, params))]
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
        params, opt_state, carry = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, carry),
            (state.params, state.opt_state, state.carry),
        )
        skipped = state.skipped + (1 - finite.astype(jnp.int32))
        state = TrainState(params, opt_state, carry, key, state.step + 1, skipped)
        return state, {**metrics, "loss": loss, "gradient_norm": norm, "skipped": skipped}

    train_step = train_step if layout is None else layout.wrap_step(train_step)
    return jax.jit(train_step, donate_argnums=(0,) if donate else ())


def fit(
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]],
    state: TrainState,
    batches: Iterable[Any],
    *,
    num_updates: int,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    callbacks: Iterable[Callable[[TrainState, dict[str, float]], None]] = (),
    log_every: int = 10,
    items_per_update: int | None = None,
    items_name: str = "items",
    progress: bool = True,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Runs num_updates updates, one batch each, and reports as it goes.

    Args:
      train_step: from `make_train_step`.
      state: where to start; its buffers are donated by the train step.
      batches: as many as there are updates, or more.
      num_updates: at least 1.
      evaluate: evaluate(state) -> dict, called every evaluate_every updates and after the last.
      evaluate_every: updates between evaluations, with a record each; None for the end alone.
      callbacks: each is called with (state, record) whenever a record is made. Copy what is kept:
        the state's buffers are donated to the next update.
      log_every: updates between records; the loop waits for the device only then.
      items_per_update: items of a batch, for records of their rate.
      items_name: what the items are, e.g. "characters".
      progress: a bar by tqdm, which the extra `experiments` installs.

    Returns:
      The state after the last update, and the records: dicts of "update", "seconds" (of training,
      evaluations left out), the means of the step's metrics since the last record ("skipped" is a
      total; values that are not finite are left out of a mean), f"{items_name}_per_second", and
      what evaluate returned.

    Raises:
      ValueError: batches ended early, or a count is below 1.
      TypeError: a count is no integer.
      NonFiniteError: the last ten updates or more were skipped as not finite. Checked when a record
        is made; `state` of the error holds the parameters from before them.
      ImportError: progress is asked for and tqdm is missing.
    """
    counts = {"num_updates": num_updates, "log_every": log_every}
    counts.update({} if evaluate_every is None else {"evaluate_every": evaluate_every})
    for name, value in counts.items():
        require_count("fit", name, value)
    meter = _Meter(int(state.skipped), items_per_update, items_name)
    batches, callbacks, records = iter(batches), list(callbacks), []
    with _progress_bar(num_updates, progress) as bar:
        for update in range(1, num_updates + 1):
            batch = next(batches, _END)
            if batch is _END:
                raise ValueError(f"fit: batches must hold {num_updates}, got {update - 1}.")
            state, metrics = train_step(state, batch)
            meter.pending.append(metrics)
            last = update == num_updates
            due = last or (evaluate_every is not None and update % evaluate_every == 0)
            if not (due or update % log_every == 0):
                continue
            record = meter.read(update)
            if meter.in_row >= _MAX_SKIPPED_IN_ROW:
                raise NonFiniteError(
                    f"fit: loss, gradient or parameters were not finite in the last {meter.in_row} "
                    f"updates, up to update {update}; the parameters are as before them. Lower the "
                    "learning rate.",
                    state,
                )
            if due and evaluate is not None:
                record.update(evaluate(state))
            records.append(record)
            for callback in callbacks:
                callback(state, record)
            bar(record)
            meter.start()
    return state, records


def save_arrays(path: str | os.PathLike, tree: Any, metadata: dict[str, Any]) -> None:
    """Writes a pytree of arrays and a dict of JSON values into one .npz file.

    The file appears whole or not at all: a temporary file in the same folder is written, flushed
    to the disk and renamed. An existing file is replaced.

    Args:
      path: of the file.
      tree: pytree of arrays; leaves are named by their path in it.
      metadata: values that `json` can write.

    Raises:
      OSError: the file cannot be written.
      TypeError: metadata holds what JSON cannot.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}
    dtypes = {name: str(array.dtype) for name, array in arrays.items()}
    # NumPy reads its own dtypes only: bfloat16 travels as bits with its name beside it.
    plain = {
        name: array if array.dtype.kind in "biufc" else array.view(np.uint16)
        for name, array in arrays.items()
    }
    header = json.dumps({"format": _FORMAT, "dtypes": dtypes, "metadata": metadata})
    write_whole(
        path,
        lambda file: np.savez(file, **{_HEADER: np.array(header)}, **plain),  # pyright: ignore[reportArgumentType]
    )


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a file that `save_arrays` wrote.

    Args:
      path: of the file.

    Returns:
      The dict.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no such file, or damaged.
    """
    return _read(path)[0]["metadata"]


def load_arrays(path: str | os.PathLike, like: Any) -> Any:
    """The pytree of a file that `save_arrays` wrote; runs no code of the file.

    Args:
      path: of the file.
      like: a pytree of arrays, or of `jax.ShapeDtypeStruct`, of the structure, shapes and dtypes
        that the file must hold.

    Returns:
      The pytree, its leaves jax arrays.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is no such file, is damaged, or holds other names, shapes or dtypes.
    """
    header, arrays = _read(path)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(key) for key, _ in leaves]
    missing, surplus = sorted(set(names) - set(arrays)), sorted(set(arrays) - set(names))
    if missing or surplus:
        raise ValueError(
            f"load_arrays: {path} must hold the leaves of `like`, got missing {missing} and "
            f"surplus {surplus}."
        )
    loaded = []
    for name, (_, leaf) in zip(names, leaves):
        array, dtype = arrays[name], jnp.dtype(header["dtypes"][name])
        array = array if array.dtype == dtype else array.view(dtype)
        if array.shape != leaf.shape or dtype != leaf.dtype:
            raise ValueError(
                f"load_arrays: {name} of {path} must be {leaf.dtype}{list(leaf.shape)}, got "
                f"{dtype}{list(array.shape)}."
            )
        loaded.append(jnp.asarray(array))
    return jax.tree_util.tree_unflatten(treedef, loaded)


_END = object()
_FORMAT = "jaxgru arrays 1"
_HEADER = "jaxgru"
_DAMAGE = (zipfile.BadZipFile, zlib.error)
_MAX_SKIPPED_IN_ROW = 10


def _read(path):
    """(header, arrays) of a file; ValueError where it is damaged or another's."""
    with open(path, "rb") as opened:
        try:
            with np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(str(arrays.pop(_HEADER)))
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']!r}")
            if set(header["dtypes"]) != set(arrays) or not isinstance(header["metadata"], dict):
                raise ValueError("its header does not fit its arrays")
        except (
            KeyError,
            TypeError,
            ValueError,
            EOFError,
            OSError,
            RuntimeError,
            *_DAMAGE,
        ) as error:
            message = f"{os.fspath(path)} must be a whole {_FORMAT!r} file: {error}"
            raise ValueError(message) from error
    return header, arrays


class _Meter:
    """Loss, rate and skipped updates between two records."""

    def __init__(self, skipped, items_per_update, items_name):
        self.skipped, self.items_per_update = skipped, items_per_update
        self.rate, self.seconds, self.in_row = f"{items_name}_per_second", 0.0, 0
        self.start()

    def start(self):
        self.pending, self.began = [], time.perf_counter()

    def read(self, update):
        """The record up to this update; waits for the device."""
        host = jax.device_get(self.pending)
        elapsed = time.perf_counter() - self.began
        self.seconds += elapsed
        record = {"update": update, "seconds": self.seconds}
        for name in host[-1]:
            values = np.asarray([metrics[name] for metrics in host], np.float64)
            finite = values[np.isfinite(values)]
            record[name] = float(finite.mean()) if finite.size else float("nan")
        record["skipped"] = int(host[-1]["skipped"])
        if self.items_per_update is not None:
            record[self.rate] = self.items_per_update * len(host) / elapsed
        for metrics in host:
            self.in_row = self.in_row + 1 if metrics["skipped"] > self.skipped else 0
            self.skipped = int(metrics["skipped"])
        return record


def _require_same_shapes(params, old):
    """ValueError where an update, which `optax.apply_updates` would broadcast, changed params."""
    for (path, new), leaf in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(old)):
        if new.shape != leaf.shape or new.dtype != leaf.dtype:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"train_step: the optimizer must keep params{name} as {leaf.dtype}"
                f"{list(leaf.shape)}, got {new.dtype}{list(new.shape)}."
            )


@contextlib.contextmanager
def _progress_bar(num_updates, shown):
    """A function of a record that moves the bar, or one that does nothing."""
    if not shown:
        yield lambda record: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "fit: progress=True needs tqdm; install jaxgru[experiments] or pass progress=False."
        ) from error
    values = {}

    with tqdm(total=num_updates, unit="update", dynamic_ncols=True) as bar:

        def show(record):
            hidden = {"update", "seconds", "gradient_norm"}
            hidden |= set() if record["skipped"] else {"skipped"}
            values.update({k: f"{v:.4g}" for k, v in record.items() if k not in hidden})
            bar.update(record["update"] - bar.n)
            bar.set_postfix(values)

        yield show
