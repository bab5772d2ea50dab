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
    Format,
    find_checkpoint,
    find_step,
    has_checkpoints,
    load_checkpoint,
    locked,
    save_checkpoint,
)
from jaxgru.training.logs import Callback, JsonLines, Resumable
from jaxgru.training.loop_state import LoopState, Meter
from jaxgru.training.processes import by_first, same_everywhere
from jaxgru.training.signals import stop_signals
from jaxgru.training.step import TrainState, TrainStep


class NonFiniteError(FloatingPointError):
    """Training stopped because updates in a row were not finite; `state` is the last good one."""

    def __init__(self, message: str, state: TrainState):
        super().__init__(message)
        self.state = state


class Interrupted(SystemExit):
    """A signal stopped `fit` after a whole update, which was saved first.

    Uncaught, it ends the process with the code 128 + the signal's number: 143 for SIGTERM, 130 for
    SIGINT (Ctrl-C).
    """

    def __init__(self, number: int, step: int, folder: pathlib.Path):
        super().__init__(128 + number)
        self.signal, self.step, self.folder = signal.Signals(number), step, folder

    def __str__(self) -> str:
        return f"stopped by {self.signal.name} after update {self.step}, which is in {self.folder}"


class Monitor(NamedTuple):
    """Which evaluation is best, and when there has been none for too long."""

    metric: str  # one that `evaluate` returns
    mode: Literal["min", "max"] = "min"
    patience: int | None = None  # evaluations in a row without a better one that stop training
    min_delta: float = 0.0  # how much better counts as better


class Checkpoints(NamedTuple):
    """Where, and how often, `fit` saves all that it needs to go on as if it had not stopped."""

    folder: str | pathlib.Path
    every: int  # updates
    run: dict[str, Any] | None = None  # JSON facts that must be the same on resuming
    resume: bool = False  # go on from the newest whole checkpoint, or begin where there is none
    keep: int = 3  # of the last, and the best beside them
    format: Format = "npz"


class Fit(NamedTuple):
    """What `fit` returns."""

    state: TrainState  # after the last update
    records: list[dict[str, Any]]  # of this call's updates
    best: TrainState | None  # of the best evaluation so far; None without a monitor


def fit(
    train_step: TrainStep,
    state: TrainState,
    batches: Iterable[Any] | Callable[[int], Iterable[Any]],
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
    """Updates until state.step is num_updates, one batch each, and reports as it goes.

    With checkpoints, a run that is killed at any point and resumed ends in the same bytes as one
    that was not: parameters, optimizer state, key, carry, best evaluation, counters and the means
    that were being taken, all are kept, and batches go on where they were. SIGTERM and SIGINT let
    the update end, save, and raise `Interrupted`; another one a second later, or more, acts as it
    would without `fit`.
    In several processes SIGTERM to any of them stops all after the same update; process 0 alone
    calls callbacks and shows the bar.

    Args:
      train_step: from `make_train_step`.
      state: where to start; its buffers are donated by the train step.
      batches: as many as there are updates, or more; or a function that gives them from the n-th
        on, n counted from 0, which checkpoints need.
      num_updates: the total, those that state.step counts among them; at least 1.
      evaluate: evaluate(state) -> dict, called every evaluate_every updates and after the last.
      evaluate_every: updates between evaluations, with a record each; None for the end alone.
      monitor: keep the best state by an evaluation, and stop early where it has a patience.
      checkpoints: save the state; after every best evaluation too.
      callbacks: each is called with (state, record) whenever a record is made. Copy what is kept:
        the state's buffers are donated to the next update. None for a `JsonLines` that writes
        metrics.jsonl into the folder of checkpoints, where there is one.
      log_every: updates between records; the loop waits for the device only then.
      items_per_update: items of a batch, for records of their rate.
      items_name: what the items are, e.g. "characters".
      progress: a bar by tqdm, which the extra `experiments` installs.

    Returns:
      Fit(state, records, best). A record is a dict of "update", "seconds" (of training, evaluations
      left out), the means of the step's metrics since the last record ("skipped" is a total; values
      that are not finite are left out of a mean), f"{items_name}_per_second", and what evaluate
      returned.

    Raises:
      ValueError: batches ended early, a count is below 1, num_updates is below state.step,
        evaluate does not return the monitor's metric, or returns what the record has already.
      CheckpointError: the checkpoint is of another model, run or monitor, or none of those there
        is whole.
      TypeError: a count is no integer, or batches is no function and checkpoints are kept.
      OSError: the folder of checkpoints is in use, holds another run, or cannot be written at the
        start or the end; in between, that is warned of and training goes on.
      NonFiniteError: the last ten updates or more were skipped as not finite. Checked when a record
        is made; `state` of the error, which is saved, holds the parameters from before them.
      Interrupted: a signal asked to stop.
      ImportError: progress is asked for and tqdm is missing, or Orbax.
    """
    _require_arguments(locals())
    if callbacks is None and checkpoints is not None:
        callbacks = [JsonLines(pathlib.Path(checkpoints.folder) / "metrics.jsonl")]
    callbacks = list(callbacks or ()) if jax.process_index() == 0 else []
    with contextlib.ExitStack() as stack:
        loop, best, seconds = LoopState(skipped=int(state.skipped)), None, 0.0
        if checkpoints is not None:
            stack.enter_context(locked(checkpoints.folder, new=not checkpoints.resume))
            if has_checkpoints(checkpoints.folder):
                state, loop, best = _restore(checkpoints, state, loop, monitor)
                seconds = _resume_callbacks(callbacks, int(state.step))
            else:  # what stands in the way of saving shows before training
                _save(checkpoints, int(state.step), state, loop, None, required=True)
        start = int(state.step)
        if num_updates < start:
            raise ValueError(
                f"fit: num_updates must be at least state.step, {start}, got {num_updates}."
            )
        if callable(batches):
            batches = batches(start)
        batches, records = iter(batches), []
        meter = Meter(loop, seconds, items_per_update, items_name)
        asked_to_stop = stack.enter_context(stop_signals(checkpoints is not None))
        shown = progress and jax.process_index() == 0
        bar = stack.enter_context(_progress_bar(start, num_updates, shown))
        kept = None
        for update in range(start + 1, num_updates + 1):
            if loop.is_exhausted(monitor):
                break
            batch = next(batches, _END)
            if batch is _END:
                raise ValueError(f"fit: batches must hold {num_updates}, got {update - 1}.")
            state, metrics = train_step(state, batch)
            loop.pending.append(metrics)
            last = update == num_updates
            due = last or (evaluate_every is not None and update % evaluate_every == 0)
            improved = failed = False
            if due or update % log_every == 0:
                record = meter.read(update)
                failed = loop.in_row >= _MAX_SKIPPED_IN_ROW
                if due and evaluate is not None and not failed:
                    record |= _evaluated(evaluate(state), record)
                    improved = monitor is not None and loop.judge(monitor, record)
                records.append(record)
                for callback in callbacks:
                    callback(state, record)
                bar(record)
                meter.start()
            stop = asked_to_stop(update)  # after the evaluation, which may be long
            ends = last or failed or stop is not None or loop.is_exhausted(monitor)
            saved = False
            if improved:
                best = jax.tree.map(jnp.copy, state)
                kept = best, dict(loop.facts())
            if checkpoints is not None and (ends or improved or update % checkpoints.every == 0):
                with meter.paused():
                    required = ends and not failed
                    saved = _save(checkpoints, update, state, loop, kept, required=required)
            if failed:
                where = f", and are in {checkpoints.folder}" if checkpoints and saved else ""
                raise NonFiniteError(
                    "fit: loss, gradient or parameters were not finite in the last "
                    f"{loop.in_row} updates, up to update {update}; the parameters are as before "
                    f"them{where}. Lower the learning rate.",
                    state,
                )
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
        counts |= {"checkpoints.every": checkpoints.every, "checkpoints.keep": checkpoints.keep}
        if not callable(given["batches"]):
            raise TypeError(
                "fit: batches must be a function that gives the batches from the n-th on where "
                f"checkpoints are kept, got {type(given['batches']).__name__}."
            )
    if monitor is not None:
        counts["monitor.patience"] = monitor.patience
        require_choice("fit", "monitor.mode", monitor.mode, ("min", "max"))
        if given["evaluate"] is None:
            raise ValueError("fit: monitor must go with evaluate, which makes its metric.")
    for name, value in counts.items():
        if value is not None or name in ("num_updates", "log_every"):
            require_count("fit", name, value)


def _restore(checkpoints, state, loop, monitor):
    """(state, loop, best state) of the newest checkpoint; CheckpointError where none is whole."""
    found = find_checkpoint(checkpoints.folder)
    if not same_everywhere(found.step if found else -1):
        raise CheckpointError(
            f"fit: {checkpoints.folder} must be a folder that all processes share, got different "
            "checkpoints in them."
        )
    if found is None:
        raise CheckpointError(
            f"fit: none of the checkpoints in {checkpoints.folder} is whole; give another folder "
            "to begin anew. Nothing was overwritten."
        )

    def load(checkpoint: Checkpoint):
        return load_checkpoint(checkpoint.path, state, run=checkpoints.run or {})

    newest = load(found)
    try:
        loop = LoopState.of_facts(found.loop)
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
    if best is None:
        warnings.warn(
            f"fit: the best checkpoint, of update {loop.best_step}, is lost; the newest stands in "
            "for it until the next evaluation",
            stacklevel=3,
        )
        loop.best, loop.best_step = None, None
        return newest, loop, jax.tree.map(jnp.copy, newest)
    return newest, loop, load(best)


def _resume_callbacks(callbacks, update):
    """Seconds of training up to that update, by the logs."""
    left = []

    def resume():
        for callback in callbacks:
            if isinstance(callback, Resumable):
                left.append(callback.resume(update))

    try:
        by_first(resume)
    except ValueError as error:
        raise CheckpointError(f"fit: {error}") from error
    return max((record.get("seconds", 0.0) for record in left if record), default=0.0)


def _evaluated(found, record):
    """What evaluate returned; ValueError where the record has some of it already."""
    clash = sorted(set(found) & set(record))
    if clash:
        raise ValueError(
            f"fit: evaluate must return names that the record has not, got {clash}; call them "
            "validation_..., say."
        )
    return found


def _save(checkpoints, update, state, loop, kept, *, required):
    """True where it saved; a failure is an OSError where required, else a warning.

    kept, the best state and its facts, is saved first where that failed in its own time.
    """
    options = {"run": checkpoints.run, "keep": checkpoints.keep, "format": checkpoints.format}
    try:
        best_step = loop.best_step
        if kept is not None and best_step != update:
            path = pathlib.Path(checkpoints.folder) / f"step-{best_step:08}.{checkpoints.format}"
            if not path.exists():
                best, facts = kept
                save_checkpoint(
                    checkpoints.folder, best_step, best, loop=facts, best_step=best_step, **options
                )
        save_checkpoint(
            checkpoints.folder, update, state, loop=loop.facts(), best_step=best_step, **options
        )
    except OSError as error:
        message = f"fit: update {update} could not be saved in {checkpoints.folder}: {error}"
        if required:
            raise type(error)(message) from error
        warnings.warn(f"{message}; training goes on", stacklevel=3)
        return False
    return True


@contextlib.contextmanager
def _progress_bar(start, num_updates, shown):
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

    with tqdm(total=num_updates, initial=start, unit="update", dynamic_ncols=True) as bar:

        def show(record):
            hidden = {"update", "seconds", "gradient_norm"}
            hidden |= set() if record["skipped"] else {"skipped"}
            values.update({k: f"{v:.4g}" for k, v in record.items() if k not in hidden})
            bar.update(record["update"] - bar.n)
            bar.set_postfix(values)

        yield show
