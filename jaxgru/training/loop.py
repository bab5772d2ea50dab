"""The loop around a train step: records, evaluation, early stopping, checkpoints, signals."""

import contextlib
import pathlib
import signal
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxgru.core.checks import require_choice, require_count
from jaxgru.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    checkpoint_path,
    find_checkpoint,
    find_step,
    has_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from jaxgru.training.lock import locked
from jaxgru.training.logs import Callback, JsonLines, Resumable
from jaxgru.training.loop_state import LoopState, Meter
from jaxgru.training.processes import on_process_zero, same_on_all_processes
from jaxgru.training.signals import stop_signals
from jaxgru.training.step import TrainState, TrainStep


class NonFiniteError(FloatingPointError):
    """Training stopped because updates in a row were not finite; `state` is the last good one."""

    def __init__(self, message: str, state: TrainState):
        super().__init__(message)
        self.state = state


class Interrupted(SystemExit):
    """A signal stopped `fit` after a complete update, which was saved first.

    Uncaught, it ends the process with the code 128 + the signal's number: 143 for SIGTERM, 130 for
    SIGINT (Ctrl-C).
    """

    def __init__(self, number: int, step: int, folder: pathlib.Path):
        super().__init__(128 + number)
        self.signal, self.step, self.folder = signal.Signals(number), step, folder

    def __str__(self) -> str:
        return f"stopped by {self.signal.name} after update {self.step}, which is in {self.folder}"


class Monitor(NamedTuple):
    """Which evaluation is the best, and when to stop for want of a better one."""

    metric: str  # one that `evaluate` returns
    mode: Literal["min", "max"] = "min"
    patience: int | None = None  # evaluations in a row without a better one that stop training
    min_delta: float = 0.0  # how much better counts as better


class Checkpoints(NamedTuple):
    """Where, and how often, `fit` saves all that it needs to resume as if it had not stopped."""

    folder: str | pathlib.Path
    every: int  # updates
    run: dict[str, Any] | None = None  # JSON metadata that must be equal when a run is resumed
    resume: bool = False  # from the newest intact checkpoint; begins where there is none


class Fit(NamedTuple):
    """What `fit` returns."""

    state: TrainState  # after the last update
    records: list[dict[str, Any]]  # of this call's updates
    best: TrainState | None  # of the best evaluation so far; None without a monitor


def fit(
    train_step: TrainStep,
    state: TrainState,
    batches: Callable[[int], Iterable[Any]],
    *,
    num_updates: int,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    monitor: Monitor | None = None,
    checkpoints: Checkpoints | None = None,
    callbacks: Iterable[Callback] | None = None,
    log_every: int = 10,
    items_per_update: int | None = None,
    items_name: str = "items",
    progress: bool = True,
) -> Fit:
    """Trains until state.step is num_updates, one batch an update, and reports as it goes.

    With checkpoints, a run that is killed at any point and resumed ends with the same bits as one
    that was not: parameters, optimizer state, key, carry, best evaluation, counters and the means
    that were being taken are saved, and the batches continue where they were.

    On SIGTERM or Ctrl-C, `fit` finishes the current update, saves a checkpoint and raises
    `Interrupted`, which exits. A second signal, a second later or more, exits immediately. With
    several processes a SIGTERM to any of them stops all after the same update. Process 0 alone
    calls callbacks and shows the bar.

    Args:
      train_step: from `make_train_step`.
      state: where to start; the train step donates its buffers.
      batches: batches(n) gives the batches from the n-th on, counted from 0, at least as many as
        there are updates left; n is state.step, or that of the checkpoint.
      num_updates: the total, those that state.step counts among them; at least 1.
      evaluate: evaluate(state) -> dict, called every evaluate_every updates and after the last.
      evaluate_every: updates between evaluations, with a record each; None for the end alone.
      monitor: keep the best state by an evaluation, and stop early if it has a patience.
      checkpoints: save the state; after every best evaluation too.
      callbacks: each is called with (state, record) whenever a record is made. Copy what you keep:
        the state's buffers are donated to the next update. None for a `JsonLines` that writes
        metrics.jsonl into the folder of checkpoints, if there is one.
      log_every: updates between records; the loop waits for the device only then.
      items_per_update: items of a batch, for records of their rate.
      items_name: what the items are, e.g. "characters".
      progress: show a bar by tqdm, which the extra `experiments` installs.

    Returns:
      Fit(state, records, best). A record is a dict of "update", "seconds" (of training, without
      evaluations), the means of the step's metrics since the last record ("skipped" is a total;
      values that are not finite are left out of a mean), f"{items_name}_per_second", and what
      evaluate returned.

    Raises:
      ValueError: batches ended early, a count is below 1, num_updates is below state.step,
        evaluate does not return the monitor's metric, or returns what the record has already.
      CheckpointError: the checkpoint is of another model, run or monitor, or none of those there
        is intact.
      TypeError: a count is no integer.
      OSError: the folder of checkpoints is in use, holds another run, or cannot be written at the
        start or the end. In between, `fit` warns and goes on.
      NonFiniteError: the last ten updates or more were skipped as not finite. This is checked when
        a record is made; `state` of the error, which is saved, holds the parameters from before
        them.
      Interrupted: a signal asked to stop.
      ImportError: progress is asked for and tqdm is missing, or checkpoints and Orbax.
    """
    _require_arguments(locals())
    with contextlib.ExitStack() as stack:
        if checkpoints is not None:
            stack.enter_context(locked(checkpoints.folder))
        called = _callbacks(callbacks, checkpoints)
        state, loop, best, seconds = _begin(state, monitor, checkpoints, called, num_updates)
        start, records, unsaved = int(state.step), [], None
        remaining = iter(batches(start))
        meter = Meter(loop, seconds, items_per_update, items_name)
        asked_to_stop = stack.enter_context(stop_signals(checkpoints is not None))
        shown = progress and jax.process_index() == 0
        called.append(stack.enter_context(_progress_bar(start, num_updates, shown)))
        for update in range(start + 1, num_updates + 1):
            if loop.is_exhausted(monitor):
                break
            state, metrics = train_step(state, _next_batch(remaining, update, num_updates))
            loop.pending.append(metrics)
            last = update == num_updates
            due = last or (evaluate_every is not None and update % evaluate_every == 0)
            improved = failed = False
            if due or update % log_every == 0:
                records.append(record := meter.read(update))
                failed = loop.in_row >= _MAX_SKIPPED_IN_ROW
                if due and evaluate is not None and not failed:
                    record |= _evaluated(evaluate(state), record)
                    improved = monitor is not None and loop.judge(monitor, record)
                for callback in called:
                    callback(state, record)
                meter.start()
            stop = asked_to_stop(update)  # after the evaluation, which may be long
            ends = last or failed or stop is not None or loop.is_exhausted(monitor)
            if improved:
                best = jax.tree.map(jnp.copy, state)
                unsaved = best, loop.to_json()
            saved = False
            if checkpoints is not None and (ends or improved or update % checkpoints.every == 0):
                with meter.paused():
                    required = ends and not failed
                    saved = _save(checkpoints, update, state, loop, unsaved, required=required)
            if failed:
                raise _non_finite_error(state, loop, update, checkpoints if saved else None)
            if stop is not None:
                break
        stop = asked_to_stop(None)
        if stop is not None and checkpoints is not None:  # during the last evaluation or save too
            raise Interrupted(stop, int(state.step), pathlib.Path(checkpoints.folder))
    return Fit(state, records, best)


_END = object()
_MAX_SKIPPED_IN_ROW = 10


def _require_arguments(given):
    """ValueError or TypeError where an argument of `fit` is unusable."""
    checkpoints, monitor = given["checkpoints"], given["monitor"]
    counts = {name: given[name] for name in ("num_updates", "log_every", "evaluate_every")}
    if checkpoints is not None:
        counts["checkpoints.every"] = checkpoints.every
    if monitor is not None:
        counts["monitor.patience"] = monitor.patience
        require_choice("fit", "monitor.mode", monitor.mode, ("min", "max"))
        if given["evaluate"] is None:
            raise ValueError("fit: monitor must go with evaluate, which makes its metric.")
    for name, value in counts.items():
        if value is not None or name in ("num_updates", "log_every"):
            require_count("fit", name, value)
    if not callable(given["batches"]):
        raise TypeError(
            "fit: batches must be a function that gives the batches from the n-th on, got "
            f"{type(given['batches']).__name__}."
        )


def _callbacks(callbacks, checkpoints) -> list[Callback]:
    """Those that this process is to call."""
    if jax.process_index() != 0:
        return []
    if callbacks is None and checkpoints is not None:
        return [JsonLines(pathlib.Path(checkpoints.folder) / "metrics.jsonl")]
    return list(callbacks or ())


def _begin(state, monitor, checkpoints, callbacks, num_updates):
    """(state, loop, best state, seconds of training) of a new or a resumed run."""
    loop, best, seconds = LoopState(skipped=int(state.skipped)), None, 0.0
    if checkpoints is not None and has_checkpoints(checkpoints.folder):
        if not checkpoints.resume:
            raise FileExistsError(
                f"{checkpoints.folder} holds the checkpoints of another run; resume it or give "
                "another folder. Nothing was overwritten"
            )
        state, loop, best = _restore(checkpoints, state, monitor)
        seconds = _resume_callbacks(callbacks, int(state.step))
    elif checkpoints is not None:  # what stands in the way of saving shows before training
        _save(checkpoints, int(state.step), state, loop, None, required=True)
    if num_updates < int(state.step):
        raise ValueError(
            f"fit: num_updates must be at least state.step, {int(state.step)}, got {num_updates}."
        )
    return state, loop, best, seconds


def _restore(checkpoints, state, monitor):
    """(state, loop, best state) of the newest intact checkpoint."""
    found = find_checkpoint(checkpoints.folder)
    if not same_on_all_processes(found and found.step):
        raise CheckpointError(
            f"fit: {checkpoints.folder} must be a folder that all processes share, got different "
            "checkpoints in them."
        )
    if found is None:
        raise CheckpointError(
            f"fit: {checkpoints.folder} must hold an intact checkpoint, got damaged ones alone; "
            "give another folder to begin anew. Nothing was overwritten."
        )

    def load(checkpoint: Checkpoint):
        return load_checkpoint(checkpoint.path, state, run=checkpoints.run or {})

    newest = load(found)
    try:
        loop = LoopState.from_json(found.loop)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"fit: {found.path} must be one that fit has written: {error}"
        ) from error
    if loop.by is not None and monitor is not None and loop.by != [monitor.metric, monitor.mode]:
        raise CheckpointError(
            f"fit: monitor must be what the run was made with, {loop.by}, got "
            f"{[monitor.metric, monitor.mode]}."
        )
    if loop.best_step is None:
        return newest, loop, None
    if loop.best_step == found.step:
        return newest, loop, jax.tree.map(jnp.copy, newest)
    best = find_step(checkpoints.folder, loop.best_step)
    if best is not None:
        return newest, loop, load(best)
    warnings.warn(
        f"fit: the best checkpoint, of update {loop.best_step}, is lost; the newest stands in for "
        "it until the next evaluation",
        stacklevel=4,
    )
    loop.best, loop.best_step = None, None
    return newest, loop, jax.tree.map(jnp.copy, newest)


def _resume_callbacks(callbacks, update):
    """Seconds of training up to that update, by the logs."""

    def resume():
        return [c.resume(update) for c in callbacks if isinstance(c, Resumable)]

    try:
        last = on_process_zero(resume) or []
    except ValueError as error:
        raise CheckpointError(f"fit: {error}") from error
    return max((record.get("seconds", 0.0) for record in last if record), default=0.0)


def _next_batch(batches, update, num_updates):
    """The next batch; ValueError where there is none."""
    batch = next(batches, _END)
    if batch is _END:
        raise ValueError(f"fit: batches must hold {num_updates}, got {update - 1}.")
    return batch


def _evaluated(found, record):
    """What evaluate returned; ValueError where the record has some of it already."""
    clash = sorted(set(found) & set(record))
    if clash:
        raise ValueError(
            f"fit: evaluate must return names that the record has not, got {clash}; call them "
            "validation_..., say."
        )
    return found


def _save(checkpoints, update, state, loop, unsaved, *, required):
    """True where it saved; a failure is an OSError where required, else a warning.

    unsaved, the best state and its counters, is saved first where that failed in its own time.
    """
    folder, best_step = pathlib.Path(checkpoints.folder), loop.best_step
    options = {"run": checkpoints.run, "best_step": best_step}
    try:
        if unsaved is not None and not checkpoint_path(folder, best_step).exists():
            best, counters = unsaved
            save_checkpoint(folder, best_step, best, loop=counters, **options)
        save_checkpoint(folder, update, state, loop=loop.to_json(), **options)
    except OSError as error:
        message = f"fit: update {update} could not be saved in {checkpoints.folder}: {error}"
        if required:
            raise type(error)(message) from error
        warnings.warn(f"{message}; training goes on", stacklevel=3)
        return False
    return True


def _non_finite_error(state, loop, update, checkpoints):
    where = f", and are in {checkpoints.folder}" if checkpoints else ""
    return NonFiniteError(
        f"fit: loss, gradient or parameters were not finite in the last {loop.in_row} updates, up "
        f"to update {update}; the parameters are as before them{where}. Lower the learning rate.",
        state,
    )


@contextlib.contextmanager
def _progress_bar(start, num_updates, shown):
    """A callback that moves the bar, or one that does nothing."""
    if not shown:
        yield lambda state, record: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "fit: progress=True needs tqdm; install jaxgru[experiments] or pass progress=False."
        ) from error
    values = {}

    with tqdm(total=num_updates, initial=start, unit="update", dynamic_ncols=True) as bar:

        def show(state, record):
            hidden = {"update", "seconds", "gradient_norm"}
            hidden |= set() if record["skipped"] else {"skipped"}
            values.update({k: f"{v:.4g}" for k, v in record.items() if k not in hidden})
            bar.update(record["update"] - bar.n)
            bar.set_postfix(values)

        yield show
