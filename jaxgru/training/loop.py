"""The training loop: records, evaluation, early stopping, checkpoints and signals."""

import contextlib
import pathlib
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxgru.atomic_files import remove_leftovers
from jaxgru.core.checks import require_choice, require_count
from jaxgru.training.checkpoints import (
    CheckpointError,
    find_checkpoint,
    find_step,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from jaxgru.training.logs import Callback, JsonLines
from jaxgru.training.loop_state import LoopState, Meter
from jaxgru.training.processes import locked, on_process_zero, same_on_all_processes
from jaxgru.training.signals import stop_signals
from jaxgru.training.step import TrainState, TrainStep, require_undonated

_MAX_SKIPPED_IN_ROW = 10


class NonFiniteError(FloatingPointError):
    """Ten or more updates in a row were not finite; `state` holds the last finite parameters."""

    def __init__(self, message: str, state: TrainState):
        super().__init__(message)
        self.state = state


class Interrupted(SystemExit):
    """A signal stopped `fit` after a complete update, whose checkpoint is saved.

    If it is not caught, the process exits with code 128 + the signal's number: 143 for SIGTERM, 130
    for SIGINT (Ctrl-C).
    """

    def __init__(self, number: int, step: int, folder: pathlib.Path):
        super().__init__(128 + number)
        self.signal, self.step, self.folder = signal.Signals(number), step, folder

    def __str__(self) -> str:
        return f"stopped by {self.signal.name} after update {self.step}, saved in {self.folder}"


class Monitor(NamedTuple):
    """Selects the best evaluation, and stops early if it has a patience."""

    metric: str  # a name that `evaluate` returns
    mode: Literal["min", "max"] = "min"
    patience: int | None = None  # stop after this many evaluations in a row without improvement
    min_delta: float = 0.0  # smallest difference that counts as an improvement


class Checkpoints(NamedTuple):
    """Where and how often `fit` saves its state."""

    folder: str | pathlib.Path
    every: int  # updates
    run: dict[str, Any] | None = None  # JSON metadata that must be equal when a run resumes
    resume: bool = False  # from the newest intact checkpoint, if there is one


class Fit(NamedTuple):
    """The result of `fit`."""

    state: TrainState  # after the last update
    records: list[dict[str, Any]]  # of this call's updates; metrics.jsonl has those before a resume
    best: TrainState | None  # at the best evaluation so far; None without a monitor


def fit(
    train_step: TrainStep, state: TrainState, batches: Callable[[int], Iterable[Any]], *,
    num_updates: int, evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int | None = None, monitor: Monitor | None = None,
    checkpoints: Checkpoints | None = None, callbacks: Iterable[Callback] | None = None,
    log_every: int = 10, items_per_update: int | None = None, items_name: str = "items",
    progress: bool = True,
) -> Fit:  # fmt: skip
    """Trains until state.step is num_updates, with one batch per update.

    With checkpoints, a run that is killed at any point and resumed ends with the same bits as an
    uninterrupted run. On SIGTERM or Ctrl-C, `fit` finishes the current update, saves a checkpoint
    and raises `Interrupted`, which exits, with a line on stderr. A second signal, at least a second
    later, exits immediately. With several processes, a SIGTERM to one of them stops all after the
    same update. Only process 0 calls callbacks and shows the progress bar.

    Args:
      train_step: from `make_train_step`.
      state: the initial state, which the first update donates: go on with the returned one.
      batches: batches(n) returns the batches from number n on, counted from 0. n is state.step, or
        that of the checkpoint.
      num_updates: the total number of updates, at least 1; state.step counts towards it.
      evaluate: evaluate(state) -> dict of numbers.
      evaluate_every: updates between evaluations; there is always one after the last update.
      monitor: selects the state of the best evaluation, and stops early if it has a patience.
      checkpoints: saves the state at intervals and after every best evaluation.
      callbacks: see `Callback`; by default, a `JsonLines` writes metrics.jsonl beside checkpoints.
      log_every: updates between records; the loop waits for the device only for a record.
      items_per_update: items in a batch, for the rate in the records.
      items_name: name of the items, e.g. "characters".
      progress: shows a progress bar; without tqdm, which the extra `experiments` installs, there
        is only a warning.

    Returns:
      Fit(state, records, best). A record is a dict of "update", "seconds" (of training, without
      evaluations), the means of the step's metrics over its finite values since the last record
      (but "skipped" is a total), f"{items_name}_per_second", and what evaluate returned.

    Raises:
      ValueError: a count is below 1, num_updates is below state.step, an option lacks one that it
        needs, state was donated, there are too few batches (what was trained is saved), evaluate
        does not return the monitor's metric or returns a name of the record, or `save_checkpoint`
        refuses checkpoints.run.
      TypeError: an argument is of another kind, or `save_checkpoint` refuses state or
        checkpoints.run.
      CheckpointError: the checkpoint belongs to another model, run or monitor, or every checkpoint
        is damaged.
      OSError: the folder of checkpoints is in use, holds another run (a checkpoint of another step
        than state.step, without resume), or cannot be written at the start or the end. In between,
        `fit` only warns.
      NonFiniteError: see there; it is raised when a record is made, and its state is saved too.
      Interrupted: SIGTERM or Ctrl-C.
      ImportError: Orbax is missing but checkpoints is set.
    """
    _require_kinds(train_step, state, batches, evaluate, monitor, checkpoints, callbacks)
    counts = {"num_updates": num_updates, "log_every": log_every, "evaluate_every": evaluate_every}
    _require_values(counts, state, evaluate, monitor, checkpoints)
    with contextlib.ExitStack() as stack:
        called = _open_folder(stack, checkpoints, callbacks)
        state, loop, best, seconds = _begin(state, monitor, checkpoints, called, num_updates)
        start, records, unsaved = int(state.step), [], None
        updates = range(start + 1, 1 + (start if loop.is_exhausted(monitor) else num_updates))
        numbered = zip(updates, batches(start))
        meter = Meter(loop, seconds, items_per_update, items_name)
        asked_to_stop = stack.enter_context(stop_signals(checkpoints is not None))
        called += _progress_bar(stack, start, num_updates) if progress else []
        for update, batch in numbered:
            state, metrics = train_step(state, batch)
            loop.pending.append(metrics)
            last = update == num_updates
            due = last or (evaluate_every is not None and update % evaluate_every == 0)
            improved = failed = False
            if due or update % log_every == 0:
                records.append(record := meter.read(update))
                failed = loop.in_row >= _MAX_SKIPPED_IN_ROW
                if due and evaluate is not None and not failed:
                    record |= (found := _evaluated(evaluate(state), record))
                    improved = monitor is not None and loop.judge(monitor, found, update)
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
                raise _non_finite_error(loop, update, state, checkpoints if saved else None)
            if ends:
                break
        else:
            if updates:
                raise _too_few_batches(num_updates, start, checkpoints, state, loop, unsaved)
        stop = asked_to_stop(None)  # also during the last evaluation or save
    if stop is not None and checkpoints is not None:
        raise _interrupted(stop, state, checkpoints)
    return Fit(state, records, best)


def _open_folder(stack, checkpoints, callbacks) -> list[Callback]:
    """Locks and tidies the folder of checkpoints; returns the callbacks that this process calls."""
    if checkpoints is not None:
        folder = pathlib.Path(checkpoints.folder)
        stack.enter_context(locked(folder))
        on_process_zero(lambda: remove_leftovers(folder))
        if callbacks is None:
            callbacks = [JsonLines(folder / "metrics.jsonl")]
    return list(callbacks or ()) if jax.process_index() == 0 else []


def _interrupted(number, state, checkpoints):
    """The error, which is also shown, since Python shows no SystemExit that has a code."""
    error = Interrupted(number, int(state.step), pathlib.Path(checkpoints.folder))
    if jax.process_index() == 0:
        cure = "run again with Checkpoints(..., resume=True) to continue"
        print(f"fit: {error}; {cure}.", file=sys.stderr)
    return error


def _too_few_batches(num_updates, start, checkpoints, state, loop, unsaved):
    """The error; what was trained is saved first."""
    last, where = int(state.step), ""
    if checkpoints is not None and last > start:
        try:
            _save(checkpoints, last, state, loop, unsaved, required=True)
            where = f"; the state after them is saved in {checkpoints.folder}"
        except OSError as error:
            where = f"; {error}"
    return ValueError(f"fit: batches must last for {num_updates} updates, got {last}{where}.")


def _non_finite_error(loop, update, state, saved_in):
    where = f", and are in {saved_in.folder}" if saved_in else ""
    return NonFiniteError(
        f"fit: loss, gradient or parameters were not finite in the last {loop.in_row} updates, up "
        f"to update {update}; the parameters are as before them{where}. Lower the learning rate.",
        state,
    )


def _require_kinds(train_step, state, batches, evaluate, monitor, checkpoints, callbacks):
    """TypeError naming the argument of `fit` that is of another kind."""
    evaluates = evaluate is None or callable(evaluate)
    listed = callbacks is None or isinstance(callbacks, Iterable)
    for fits, name, value, wanted in (
        (callable(train_step), "train_step", train_step, "function, e.g. from make_train_step"),
        (isinstance(state, TrainState), "state", state, "TrainState, e.g. from init_train_state"),
        (callable(batches), "batches", batches, "function, batches(n), of the number of its first "
         "batch"),
        (evaluates, "evaluate", evaluate, "function, evaluate(state)"),
        (isinstance(monitor, Monitor | None), "monitor", monitor,
         "Monitor, e.g. Monitor('validation_loss')"),
        (isinstance(checkpoints, Checkpoints | None), "checkpoints", checkpoints,
         "Checkpoints(folder, every)"),
        (listed, "callbacks", callbacks, "list of functions"),
    ):  # fmt: skip
        if not fits:
            raise TypeError(f"fit: {name} must be a {wanted}, got {type(value).__name__}.")


def _require_values(counts, state, evaluate, monitor, checkpoints):
    """TypeError or ValueError naming the argument of `fit` that is not what it must be."""
    if monitor is not None:
        require_choice("fit", "monitor.mode", monitor.mode, ("min", "max"))
        if evaluate is None:
            raise ValueError("fit: monitor must be given with evaluate, which computes its metric.")
        if monitor.patience is not None and counts["evaluate_every"] is None:
            raise ValueError(
                "fit: monitor.patience must be given with evaluate_every, got None; without it, "
                "only the last update is evaluated."
            )
        counts |= {"monitor.patience": monitor.patience}
    if evaluate is None and counts["evaluate_every"] is not None:
        raise ValueError("fit: evaluate_every must be given with evaluate, got None; pass both.")
    if checkpoints is not None:
        counts |= {"checkpoints.every": checkpoints.every}
    for name, value in counts.items():
        if value is not None or name not in ("evaluate_every", "monitor.patience"):
            require_count("fit", name, value)
    require_undonated("fit", state)
    _require_more_updates(counts["num_updates"], state)


def _require_more_updates(num_updates, state):
    if num_updates < int(state.step):
        raise ValueError(
            f"fit: num_updates must be at least state.step, {int(state.step)}, got {num_updates}."
        )


def _begin(state, monitor, checkpoints, callbacks, num_updates):
    """(state, loop, best state, seconds of training) of a new or a resumed run."""
    loop, best, seconds = LoopState(skipped=int(state.skipped)), None, 0.0
    steps = [] if checkpoints is None else [n for n, _ in list_checkpoints(checkpoints.folder)]
    if checkpoints is not None and checkpoints.resume and steps:
        state, loop, best = _restore(checkpoints, state, monitor)
        step = int(state.step)
        try:
            last = on_process_zero(
                lambda: [c.resume(step) for c in callbacks if hasattr(c, "resume")]
            )
        except ValueError as error:
            raise CheckpointError(f"fit: the log cannot be continued: {error}") from error
        seconds = max((r.get("seconds", 0.0) for r in last or () if r), default=0.0)
    elif checkpoints is not None:
        # A call that failed in its first update left no more than the checkpoint of its start.
        if {*steps} - {int(state.step)}:
            raise FileExistsError(
                f"fit: {checkpoints.folder} holds the checkpoints of another run; resume it with "
                "Checkpoints(..., resume=True) or choose another folder. Nothing was overwritten."
            )
        # A folder that cannot be written fails before training.
        _save(checkpoints, int(state.step), state, loop, None, required=True)
    _require_more_updates(num_updates, state)
    return state, loop, best, seconds


def _restore(checkpoints, state, monitor):
    """(state, loop, best state) of the newest intact checkpoint."""
    found = find_checkpoint(checkpoints.folder)
    if not same_on_all_processes(found and found.step):
        raise CheckpointError(
            f"fit: {checkpoints.folder} must be one folder shared by all processes, got different "
            "checkpoints in them."
        )
    if found is None:
        raise CheckpointError(
            f"fit: {checkpoints.folder} must hold an intact checkpoint, got only damaged ones; "
            "choose another folder to start a new run. Nothing was overwritten."
        )

    def load(checkpoint):
        return load_checkpoint(checkpoint.path, state, run=checkpoints.run or {})

    newest = load(found)
    try:
        loop = LoopState.from_json(found.loop)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"fit: {found.path} must be a checkpoint of fit: {error}") from error
    if loop.by is not None and monitor is not None and loop.by != [monitor.metric, monitor.mode]:
        raise CheckpointError(
            f"fit: monitor must have the metric and mode of the resumed run, {loop.by}, got "
            f"{[monitor.metric, monitor.mode]}."
        )
    if loop.best_step is None or monitor is None:
        return newest, loop, None
    if loop.best_step != found.step:
        best = find_step(checkpoints.folder, loop.best_step)
        if best is not None:
            return newest, loop, load(best)
        warnings.warn(
            f"fit: the best checkpoint, of update {loop.best_step}, is missing or damaged; the "
            "newest replaces it until the next evaluation",
            stacklevel=4,
        )
        loop.best, loop.best_step = None, None
    return newest, loop, jax.tree.map(jnp.copy, newest)


def _evaluated(found, record):
    if not isinstance(found, dict):
        raise TypeError(
            f"fit: evaluate must return a dict of numbers, got {type(found).__name__}; e.g. "
            "return {'validation_loss': loss}."
        )
    if clash := sorted(set(found) & set(record)):
        raise ValueError(
            f"fit: evaluate must return names that the record does not use, got {clash}; rename "
            "them, e.g. validation_loss."
        )
    return found


def _save(checkpoints, update, state, loop, unsaved, *, required):
    """Saves and returns True; a failure raises OSError if required, else it warns.

    unsaved is the best state with its counters. It is saved first, if saving it failed earlier.
    """
    folder, best_step = checkpoints.folder, loop.best_step
    options = {"run": checkpoints.run, "best_step": best_step}
    try:
        if unsaved is not None and best_step not in {update, *dict(list_checkpoints(folder))}:
            best, counters = unsaved
            save_checkpoint(folder, best_step, best, loop=counters, **options)
        save_checkpoint(folder, update, state, loop=loop.to_json(), **options)
    except OSError as error:
        message = f"fit: update {update} could not be saved in {folder}: {error}"
        if required:
            raise type(error)(message) from error
        warnings.warn(f"{message}; training continues", stacklevel=3)
        return False
    return True


def _progress_bar(stack, start, num_updates):
    """A list of the callback that updates a bar, which the stack closes; empty without tqdm."""
    if jax.process_index() != 0:
        return []
    try:
        from tqdm import tqdm
    except ImportError:
        warnings.warn(
            "fit: progress=True needs tqdm, so no progress is shown; install tqdm or pass "
            "progress=False",
            stacklevel=3,
        )
        return []
    bar = stack.enter_context(
        tqdm(total=num_updates, initial=start, unit="update", dynamic_ncols=True)
    )
    values = {}

    def show(state, record):
        hidden = {"update", "seconds", "gradient_norm", "" if record["skipped"] else "skipped"}
        values.update({k: f"{v:.4g}" for k, v in record.items() if k not in hidden})
        bar.update(record["update"] - bar.n)
        bar.set_postfix(values)

    return [show]
