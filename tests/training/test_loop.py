"""Runs that are stopped at any point and resume to the same bits; early stopping; logs."""

import errno
import fcntl
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import survivor

from jaxgru import training
from jaxgru.training import (
    Checkpoints,
    Interrupted,
    JsonLines,
    Monitor,
    TensorBoard,
    loop,
    loop_state,
    signals,
)


def truncate(checkpoint):
    """Cuts a byte off one of a checkpoint's files."""
    path = next(path for path in sorted(checkpoint.rglob("*")) if path.is_file())
    path.write_bytes(path.read_bytes()[:-1])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def unflushed(monkeypatch):
    """Nothing waits for the disk: no test here cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda opened: None)


class Crash(Exception):
    """Stands for a death between two updates."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run leaves that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with warnings.catch_warnings():
        fitted = survivor.run(folder, resume=False)
    return survivor.left_by(folder), fitted


def params_of(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params)]


def test_run_has_skips_a_best_and_all_that_could_be_lost(whole):
    (files, records), fitted = whole
    best = int(fitted.best.step)
    assert sorted(files) == [f"step-{step:08}" for step in sorted({best, 50, 55, 60})]
    assert int(fitted.state.skipped) == 5 and 0 < int(fitted.best.step) < 60
    assert [record["update"] for record in records][:5] == [4, 7, 8, 12, 14]
    assert all(np.isfinite(record["loss"]) for record in records)


# At an evaluation and an update that is not finite, and at the end; the slow tier has the others.
STOPS = (7, 60)


@pytest.mark.parametrize(
    "stop",
    [
        stop if stop in STOPS else pytest.param(stop, marks=pytest.mark.slow)
        for stop in range(1, survivor.NUM_UPDATES + 1)
    ],
)
def test_run_stopped_after_any_update_resumes_to_the_same_bits(tmp_path, whole, stop, capsys):
    def end(step):
        if step == stop:
            os.kill(os.getpid(), (signal.SIGTERM, signal.SIGINT)[stop % 2])

    def crash(step):
        if step == stop:
            raise Crash

    with pytest.raises(Interrupted) as stopped:
        survivor.run(tmp_path / "signal", resume=False, on_update=end)
    assert stopped.value.code == (143, 130)[stop % 2]
    assert (tmp_path / "signal/checkpoints" / f"step-{stop:08}").exists()
    name, folder = ("SIGTERM", "SIGINT")[stop % 2], tmp_path / "signal" / "checkpoints"
    assert str(stopped.value) == f"stopped by {name} after update {stop}, saved in {folder}"
    assert capsys.readouterr().err == (
        f"fit: {stopped.value}; run again with Checkpoints(..., resume=True) to continue.\n"
    )
    with pytest.raises(Crash):
        survivor.run(tmp_path / "crash", resume=False, on_update=crash)
    for name in ("signal", "crash"):
        fitted = survivor.run(tmp_path / name)
        files, records = survivor.left_by(tmp_path / name)
        assert records == whole[0][1]
        # Where the stop was saved, one checkpoint more than the others may be among the last.
        assert files["step-00000060"] == whole[0][0]["step-00000060"]
        best = f"step-{int(fitted.best.step):08}"
        assert files[best] == whole[0][0][best]
        for kept in ("state", "best"):
            assert params_of(getattr(fitted, kept)) == params_of(getattr(whole[1], kept))


def test_run_that_has_ended_is_not_trained_on(tmp_path, whole):
    survivor.run(tmp_path, resume=False)
    before = survivor.left_by(tmp_path)

    def crash(step):
        raise Crash

    fitted = survivor.run(tmp_path, on_update=crash)
    assert fitted.records == [] and params_of(fitted.state) == params_of(whole[1].state)
    assert params_of(fitted.best) == params_of(whole[1].best)
    assert survivor.left_by(tmp_path) == before


@pytest.mark.slow
def test_killed_runs_end_with_the_bits_of_a_run_that_was_not(tmp_path, whole):
    """At least 20 rounds of kill -9, at random moments, also while a checkpoint is written."""
    server = subprocess.Popen(
        [sys.executable, survivor.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),  # the same program each time
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        },
    )
    choose, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        folder, ended = tmp_path / str(runs), False
        folder.mkdir()
        runs += 1
        while not ended:
            server.stdin.write(f"{folder}\n".encode())
            server.stdin.flush()
            updates, patience = 0, choose.randint(1, 25)
            while True:
                shown = server.stdout.read(1)
                updates += shown == b"."
                if shown == b"e":
                    assert server.stdout.read(3) == b"nd\n"
                    ended = True
                    break
                if updates >= patience:
                    time.sleep(choose.uniform(0, 0.004))
                    child = children(server.pid)
                    os.kill(child[0], signal.SIGKILL) if child else None
                    tail = server.stdout.readline()
                    ended = tail.endswith(b"end\n")
                    kills += not ended
                    break
        files, records = survivor.left_by(folder)
        assert records == whole[0][1]
        for name in ("step-00000060", f"step-{int(whole[1].best.step):08}"):
            assert files[name] == whole[0][0][name]
        assert not list((folder / "checkpoints").glob(".jaxgru-*"))
    server.communicate(timeout=60)
    assert server.returncode == 0
    assert kills >= 20


def children(pid):
    return [int(n) for n in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_bad_updates_in_a_row_are_counted_across_a_stop(tmp_path):
    """Of ten bad updates from the 8th on, some come before the stop."""

    def bad_from_eight(start):
        return (np.full(3, np.nan if n >= 7 else 1, np.float32) for n in range(start, 60))

    def end(step):
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"batches": bad_from_eight, "log_every": 1}
    with pytest.raises(Interrupted):
        survivor.run(tmp_path, resume=False, on_update=end, **options)
    with pytest.raises(training.NonFiniteError) as stopped:
        survivor.run(tmp_path, **options)
    assert str(stopped.value) == (
        "fit: loss, gradient or parameters were not finite in the last 10 updates, up to update "
        f"17; the parameters are as before them, and are in {tmp_path / 'checkpoints'}. Lower the "
        "learning rate."
    )
    found = training.find_checkpoint(tmp_path / "checkpoints")
    assert found is not None and found.step == 17 and found.loop["in_row"] == 10


def test_bad_updates_whose_end_cannot_be_saved_stop_the_run_all_the_same(tmp_path, monkeypatch):
    save = loop.save_checkpoint

    def fail(folder, step, *arguments, **options):
        if step > 0:
            raise OSError(28, "No space left on device")
        return save(folder, step, *arguments, **options)

    monkeypatch.setattr(loop, "save_checkpoint", fail)
    bad = {"batches": lambda start: [np.full(3, np.nan, np.float32)] * 60, "log_every": 1}
    bad |= {"evaluate": None, "monitor": None, "evaluate_every": None}
    with (
        pytest.warns(UserWarning, match="update 10 could not be saved .*; training continues"),
        pytest.raises(training.NonFiniteError) as stopped,
    ):
        survivor.run(tmp_path, resume=False, every=50, **bad)
    assert str(stopped.value) == (
        "fit: loss, gradient or parameters were not finite in the last 10 updates, up to update "
        "10; the parameters are as before them. Lower the learning rate."
    )


def test_loop_in_a_thread_trains_without_catching_signals(tmp_path):
    """Python lets the main thread alone set handlers."""
    fitted, before = [], signal.getsignal(signal.SIGTERM)

    def on_update(step):
        assert signal.getsignal(signal.SIGTERM) is before

    def run():
        fitted.append(survivor.run(tmp_path, resume=False, num_updates=2, on_update=on_update))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert int(fitted[0].state.step) == 2


@pytest.mark.parametrize("pause", [0.99, 1.0])
def test_signal_that_comes_again_a_second_later_acts_as_without_fit(tmp_path, monkeypatch, pause):
    """`timeout` sends the same signal twice at once, to its child and to the group of that."""
    clock = [0.0]
    monkeypatch.setattr(signals, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    def twice(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            clock[0] += pause
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt if pause == 1 else Interrupted):
        survivor.run(tmp_path, resume=False, on_update=twice)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signal_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        end = {"on_update": lambda step: os.kill(os.getpid(), signal.SIGINT)}
        assert int(survivor.run(tmp_path, resume=False, num_updates=3, **end).state.step) == 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_signal_during_the_last_evaluation_stops_the_script_too(tmp_path):
    def evaluate(state):
        os.kill(os.getpid(), signal.SIGTERM)
        return survivor.evaluate(state)

    options = {"num_updates": 7, "resume": False}
    with pytest.raises(Interrupted) as stopped:
        survivor.run(tmp_path, evaluate=evaluate, **options)
    assert (stopped.value.step, stopped.value.signal) == (7, signal.SIGTERM)
    assert stopped.value.folder == tmp_path / "checkpoints"
    fitted = survivor.run(tmp_path, num_updates=7)
    assert int(fitted.state.step) == int(fitted.best.step) == 7 and fitted.records == []


def test_what_stands_in_the_way_of_saving_shows_before_training(tmp_path):
    def train(step):
        raise Crash

    for number, (options, error) in enumerate(
        [
            ({"run": {"x": object()}}, TypeError),
            ({"run": {"x": np.nan}}, ValueError),
        ]
    ):
        checkpoints = Checkpoints(tmp_path / str(number), 5, **options)
        with pytest.raises(error):
            survivor.run(tmp_path, checkpoints=checkpoints, on_update=train)


def test_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path):
    survivor.run(tmp_path, resume=False, num_updates=9)
    for path in (tmp_path / "checkpoints").glob("step-*"):
        truncate(path)
    before = contents(tmp_path)
    with (
        pytest.warns(UserWarning, match="checkpoint skipped"),
        pytest.raises(training.CheckpointError) as refused,
    ):
        survivor.run(tmp_path)
    assert str(refused.value) == (
        f"fit: {tmp_path / 'checkpoints'} must hold an intact checkpoint, got only damaged ones; "
        "choose another folder to start a new run. Nothing was overwritten."
    )
    assert contents(tmp_path) == before


def test_log_of_an_earlier_run_is_kept_where_there_is_no_checkpoint(tmp_path):
    survivor.run(tmp_path, resume=False, num_updates=9)
    logged = survivor.left_by(tmp_path)[1]
    shutil.rmtree(tmp_path / "checkpoints")
    survivor.run(tmp_path, num_updates=5)
    assert survivor.left_by(tmp_path)[1][: len(logged)] == logged


def test_best_that_could_not_be_saved_in_its_time_is_saved_later(tmp_path, whole, monkeypatch):
    best, save = int(whole[1].best.step), loop.save_checkpoint
    failures = []

    def fail(folder, step, *arguments, **options):
        if step == best and not failures:
            failures.append(step)
            raise OSError(28, "No space left on device")
        return save(folder, step, *arguments, **options)

    monkeypatch.setattr(loop, "save_checkpoint", fail)
    with pytest.warns(UserWarning) as told:
        survivor.run(tmp_path, resume=False)
    assert [str(warning.message) for warning in told] == [
        f"fit: update {best} could not be saved in {tmp_path / 'checkpoints'}: [Errno 28] No space "
        "left on device; training continues"
    ]
    assert told[0].filename == survivor.__file__
    name = f"step-{best:08}"
    assert failures and survivor.left_by(tmp_path)[0][name] == whole[0][0][name]


def test_each_checkpoint_is_written_once(tmp_path, monkeypatch):
    """Also that of a best evaluation."""
    written, save = [], loop.save_checkpoint

    def count(folder, step, *arguments, **options):
        written.append(step)
        return save(folder, step, *arguments, **options)

    monkeypatch.setattr(loop, "save_checkpoint", count)
    best = survivor.run(tmp_path, resume=False, num_updates=14).best
    assert int(best.step) in (7, 14) and written == [0, 5, 7, 10, 14]


def test_checkpoint_whose_replacement_was_cut_short_is_found_again(tmp_path):
    survivor.run(tmp_path, resume=False, num_updates=2)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "step-00000000")
    (folder / "step-00000002").rename(folder / ".jaxgru-step-00000002.tmp.replaced")
    with pytest.raises(FileExistsError):
        survivor.run(tmp_path, resume=False)
    assert survivor.run(tmp_path, num_updates=2).records == []  # it resumes, and has ended


def test_run_goes_on_only_with_its_own_monitor_and_for_as_long(tmp_path):
    survivor.run(tmp_path, resume=False, num_updates=9)
    step, state = survivor.make_train_step()[0], survivor.make_state()
    own = training.save_checkpoint(tmp_path / "own", 3, state, loop={"epoch": 1})

    def go_on():
        checkpoints = Checkpoints(tmp_path / "own", 3, resume=True)
        options = {"num_updates": 9, "progress": False, "checkpoints": checkpoints}
        return training.fit(step, state, survivor.batches, **options)

    for call, error, message in (
        (
            lambda: survivor.run(tmp_path, monitor=Monitor("far", "max")),
            training.CheckpointError,
            "monitor must have the metric and mode of the resumed run, ['far', 'min'], got ['far', "
            "'max'].",
        ),
        (
            lambda: survivor.run(tmp_path, num_updates=8),
            ValueError,
            "num_updates must be at least state.step, 9, got 8.",
        ),
        (go_on, training.CheckpointError, f"{own} must be a checkpoint of fit: 'pending'"),
    ):
        with pytest.raises(error) as refused:
            call()
        assert str(refused.value) == f"fit: {message}"


def test_run_whose_log_is_damaged_is_refused(tmp_path):
    survivor.run(tmp_path, resume=False, num_updates=9)
    log = tmp_path / "metrics.jsonl"
    log.write_text("no JSON\n" + log.read_text())
    with pytest.raises(training.CheckpointError) as refused:
        survivor.run(tmp_path)
    assert str(refused.value) == (
        f"fit: the log cannot be continued: read_json_lines: {log} must hold one JSON object per "
        "line, got line 1: Expecting value: line 1 column 1 (char 0); remove that line."
    )


def test_signals_are_left_alone_without_checkpoints_and_given_back_after(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    options = {"on_update": lambda step: seen.append(signal.getsignal(signal.SIGTERM))}
    survivor.run(tmp_path, checkpoints=None, num_updates=1, **options)
    survivor.run(tmp_path, resume=False, num_updates=2, **options)
    assert seen[0] is before and seen[1] is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_run_in_a_folder_is_refused(tmp_path):
    def run_again(step):
        if step == 2:
            survivor.run(tmp_path)

    with pytest.raises(OSError) as refused:
        survivor.run(tmp_path, resume=False, on_update=run_again)
    assert str(refused.value) == (
        f"fit: {tmp_path / 'checkpoints'} is in use by the run of process {os.getpid()}; wait "
        "until it ends or choose another folder."
    )


def test_file_system_without_locks_is_warned_of_where_fit_is_called(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning) as told:
        fitted = survivor.run(tmp_path, resume=False, num_updates=2)
    assert int(fitted.state.step) == 2
    assert [str(warning.message) for warning in told] == [
        f"fit: {tmp_path / 'checkpoints'} could not be locked ([Errno {errno.ENOLCK}] No locks "
        "available): make sure that no other run uses it"
    ]
    assert told[0].filename == survivor.__file__


def test_folder_of_another_run_is_never_written_to(tmp_path):
    survivor.run(tmp_path, resume=False, num_updates=5)
    before = survivor.left_by(tmp_path)
    folder = tmp_path / "checkpoints"
    with pytest.raises(FileExistsError) as refused:
        survivor.run(tmp_path, checkpoints=Checkpoints(folder, 5, {"a": 1}))
    assert str(refused.value) == (
        f"fit: {folder} holds the checkpoints of another run; resume it with Checkpoints(..., "
        "resume=True) or choose another folder. Nothing was overwritten."
    )
    for run, difference in (({"a": 2}, "a must be 2, got 1"), (None, "a must be null, got 1")):
        with pytest.raises(training.CheckpointError) as refused:
            survivor.run(tmp_path, checkpoints=Checkpoints(folder, 5, run, resume=True))
        assert str(refused.value) == (
            f"load_checkpoint: {folder / 'step-00000005'} belongs to another run: {difference}. "
            "Resume with the values it was saved with, or choose a new folder."
        )
    assert survivor.left_by(tmp_path) == before


def test_call_that_failed_in_its_first_update_can_be_made_again(tmp_path, whole):
    def fail(step):
        raise Crash

    with pytest.raises(Crash):
        survivor.run(tmp_path, resume=False, on_update=fail)
    with pytest.raises(ValueError, match="num_updates must be at least 1, got 0"):
        survivor.run(tmp_path / "empty", resume=False, num_updates=0)
    assert not (tmp_path / "empty").exists()
    survivor.run(tmp_path, resume=False)
    assert survivor.left_by(tmp_path) == whole[0]


def test_num_updates_below_that_of_the_state_is_refused_before_anything_is_written(tmp_path):
    state = survivor.make_state()._replace(step=jnp.int32(7))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 5)
    with pytest.raises(ValueError) as refused:
        training.fit(
            survivor.make_train_step()[0], state, survivor.batches, num_updates=6,
            checkpoints=checkpoints, progress=False,
        )  # fmt: skip
    assert str(refused.value) == "fit: num_updates must be at least state.step, 7, got 6."
    assert list(tmp_path.iterdir()) == []


def test_best_is_none_without_a_monitor_also_when_a_run_resumes(tmp_path, whole):
    with pytest.raises(Crash):
        survivor.run(tmp_path, resume=False, on_update=crash_at(20))
    fitted = survivor.run(tmp_path, monitor=None, num_updates=30)
    assert fitted.best is None and int(fitted.state.step) == 30
    best = survivor.run(tmp_path).best  # what was monitored before is not lost
    assert params_of(best) == params_of(whole[1].best)


def crash_at(number):
    def crash(step):
        if step == number:
            raise Crash

    return crash


def test_metric_that_is_added_before_a_run_resumes_is_recorded_from_there_on(tmp_path):
    """The checkpoint of update 5 holds the metrics of two updates that have no record yet."""
    step = survivor.make_train_step()[0]

    def train(crash, add=()):
        def train_step(state, batch):
            state, metrics = step(state, batch)
            crash(int(state.step))
            return state, metrics | dict.fromkeys(add, 2.0)

        return training.fit(
            train_step, survivor.make_state(), survivor.batches, num_updates=6, log_every=3,
            checkpoints=Checkpoints(tmp_path, 5, resume=True), progress=False,
        )  # fmt: skip

    with pytest.raises(Crash):
        train(crash_at(6))
    [record] = train(lambda step: None, add=["new"]).records
    assert (record["update"], record["new"]) == (6, 2.0) and np.isfinite(record["loss"])


def test_what_was_trained_is_saved_where_the_batches_end_too_early(tmp_path, whole, monkeypatch):
    def batches(start):
        return itertools.islice(survivor.batches(start), 12)

    start = "fit: batches must last for 60 updates, got"
    folder = tmp_path / "checkpoints"
    with pytest.raises(ValueError) as refused:
        survivor.run(tmp_path, resume=False, batches=batches)
    assert str(refused.value) == f"{start} 12; the state after them is saved in {folder}."
    with pytest.raises(ValueError) as refused:
        survivor.run(tmp_path, batches=lambda start: [])
    assert str(refused.value) == f"{start} 12."
    with monkeypatch.context() as patch, pytest.raises(ValueError) as refused:
        patch.setattr(loop, "save_checkpoint", lambda *given, **options: _full_disk())
        survivor.run(tmp_path, batches=lambda start: itertools.islice(batches(start), 1))
    assert str(refused.value) == (
        f"{start} 13; fit: update 13 could not be saved in {folder}: [Errno 28] No space left on "
        "device."
    )
    survivor.run(tmp_path)
    assert survivor.left_by(tmp_path)[1] == whole[0][1]


def _full_disk():
    raise OSError(28, "No space left on device")


def test_damaged_last_checkpoint_is_passed_over(tmp_path, whole):
    survivor.run(tmp_path, resume=False, num_updates=40)
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    truncate(newest)
    with pytest.warns(UserWarning, match="checkpoint skipped: .*step-00000040 must be an intact"):
        survivor.run(tmp_path)
    assert survivor.left_by(tmp_path)[0].keys() == whole[0][0].keys()
    last = "step-00000060"
    assert survivor.left_by(tmp_path)[0][last] == whole[0][0][last]


def test_loss_of_the_best_checkpoint_is_warned_of(tmp_path):
    best = survivor.run(tmp_path, resume=False, num_updates=50).best
    shutil.rmtree(tmp_path / "checkpoints" / f"step-{int(best.step):08}")
    with pytest.warns(UserWarning) as told:
        fitted = survivor.run(tmp_path)
    assert [str(warning.message) for warning in told] == [
        f"fit: the best checkpoint, of update {int(best.step)}, is missing or damaged; the newest "
        "replaces it until the next evaluation"
    ]
    assert told[0].filename == survivor.__file__
    assert int(fitted.best.step) > 50


def test_checkpoint_that_cannot_be_written_stops_no_training_but_the_end_does(tmp_path, whole):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step):
        room = 100 if 18 <= step < 32 else limit[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))

    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            survivor.run(tmp_path, resume=False, on_update=fill)
        messages = [str(w.message) for w in told]
        saves = [m for m in messages if m.startswith("fit: update ")]
        logs = [m for m in messages if m.startswith("JsonLines: a record could not be written")]
        assert len(saves) + len(logs) == len(messages) and len(saves) >= 3 and len(logs) >= 3
        assert saves[0] == (
            f"fit: update 20 could not be saved in {tmp_path / 'checkpoints'}: "
            f"save_checkpoint: {tmp_path / 'checkpoints' / 'step-00000020'} could not be written: "
            + saves[0].split("could not be written: ")[1]
        )
        assert survivor.left_by(tmp_path) == whole[0]
        (tmp_path / "b").mkdir()
        with (
            pytest.raises(OSError, match=r"fit: update 20 could not be saved in .*too large"),
            pytest.warns(UserWarning, match="JsonLines"),
        ):
            survivor.run(tmp_path / "b", resume=False, num_updates=20, on_update=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    files, records = survivor.left_by(tmp_path / "b")
    assert "step-00000015" in files
    assert [r["update"] for r in records] == [4, 7, 8, 12, 14, 16]


@pytest.mark.parametrize(
    ("monitor", "values", "stopped", "best"),
    [
        (Monitor("v", patience=2), [3, 2, 2, 2, 1, 0], 4, 2),
        (Monitor("v", patience=2), [3, 2, 2, 1, 1, 1], 6, 4),
        (Monitor("v", "max", patience=3), [1, 2, 0, 0, 1, 3], 5, 2),
        (Monitor("v", patience=1, min_delta=0.5), [3, 2.5, 0, 0, 0, 0], 2, 1),
        (Monitor("v", patience=1, min_delta=0.5), [3, 2.25, 0, 0, 0, 0], 4, 3),
        (Monitor("v", patience=4), [np.nan, np.nan, 5, np.nan, 6, 7], 6, 3),
        (Monitor("v"), [1, 2, 3, 4, 5, 6], 6, 1),
        (Monitor("v", "max"), [-1, -2, np.inf, 4, 5, 6], 6, 3),
    ],
)
def test_training_stops_early_and_keeps_the_best(tmp_path, monitor, values, stopped, best):
    for folder, pause in (("a", None), ("b", 2)):
        left = dict(enumerate(values, 1))

        def evaluate(state, left=left):
            return {"v": left[int(state.step)]}

        def stop(step, pause=pause):
            if step == pause:
                raise Crash

        options = {"evaluate": evaluate, "evaluate_every": 1, "num_updates": 6, "every": 1}
        options["monitor"] = monitor
        if pause is None:
            options["checkpoints"] = None
        else:
            with pytest.raises(Crash):
                survivor.run(tmp_path / folder, resume=False, on_update=stop, **options)
        fitted = survivor.run(tmp_path / folder, **options)
        assert (int(fitted.state.step), int(fitted.best.step)) == (stopped, best)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"monitor": Monitor("loss_")},
            "monitor.metric must be a name that evaluate returns, one of ['far'], got 'loss_'.",
        ),
        (
            {"monitor": Monitor("loss")},  # the loss of training would be no evaluation
            "monitor.metric must be a name that evaluate returns, one of ['far'], got 'loss'.",
        ),
        (
            {"monitor": Monitor("far", patience=1), "evaluate_every": None},
            "monitor.patience must be given with evaluate_every, got None; without it, only the "
            "last update is evaluated.",
        ),
        (
            {"evaluate": None, "monitor": None},
            "evaluate_every must be given with evaluate, got None; pass both.",
        ),
        ({"evaluate": None}, "monitor must be given with evaluate, which computes its metric."),
        (
            {"monitor": Monitor("far", "least")},
            "monitor.mode must be one of 'min', 'max', got 'least'.",
        ),
        ({"monitor": Monitor("far", patience=0)}, "monitor.patience must be at least 1, got 0."),
        ({"checkpoints": 0}, "checkpoints.every must be at least 1, got 0."),
        (
            {"evaluate": lambda state: {"loss": 1.0, "far": 1.0, "first": 0.0}},
            "evaluate must return names that the record does not use, got ['first', 'loss']; "
            "rename them, e.g. validation_loss.",
        ),
    ],
)
def test_bad_argument_is_refused(tmp_path, options, message):
    if "checkpoints" in options:
        options = {"checkpoints": Checkpoints(tmp_path, options["checkpoints"])}
    with pytest.raises(ValueError) as refused:
        survivor.run(tmp_path, resume=False, **options)
    assert str(refused.value) == f"fit: {message}"


def test_records_are_lines_of_json_beside_the_checkpoints_unless_told(tmp_path):
    fitted = survivor.run(tmp_path, resume=False, num_updates=9, callbacks=None)
    logged = training.read_json_lines(tmp_path / "checkpoints" / "metrics.jsonl")
    assert logged == training.json_values(fitted.records) and len(logged) == 4
    survivor.run(tmp_path / "b", resume=False, num_updates=2, callbacks=[])
    assert not list((tmp_path / "b").rglob("*.jsonl"))


def test_batches_that_cannot_be_found_again_are_refused(tmp_path):
    step, state = survivor.make_train_step()[0], survivor.make_state()
    with pytest.raises(TypeError) as refused:
        training.fit(step, state, [1], num_updates=1)
    assert str(refused.value) == (
        "fit: batches must be a function, batches(n), of the number of its first batch, got list."
    )


def test_records_count_the_seconds_of_training_alone(tmp_path, monkeypatch):
    """An update takes a second, an evaluation ten, and a checkpoint a hundred."""
    clock, save, step = [0.0], loop.save_checkpoint, survivor.make_train_step()[0]
    monkeypatch.setattr(loop_state, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def taking(seconds, function):
        def timed(*arguments, **options):
            clock[0] += seconds
            return function(*arguments, **options)

        return timed

    monkeypatch.setattr(loop, "save_checkpoint", taking(100, save))

    def run(num_updates, resume):
        return training.fit(
            taking(1, step), survivor.make_state(), survivor.batches, num_updates=num_updates,
            evaluate=taking(10, survivor.evaluate), evaluate_every=4, log_every=6,
            checkpoints=Checkpoints(tmp_path, 3, resume=resume), items_per_update=5,
            items_name="rows", progress=False,
        ).records  # fmt: skip

    first, second = run(5, resume=False), run(10, resume=True)
    assert [(record["update"], record["seconds"]) for record in (*first, *second)] == [
        (4, 4.0), (5, 5.0), (6, 6.0), (8, 8.0), (10, 10.0),
    ]  # fmt: skip
    assert {record["rows_per_second"] for record in (*first, *second)} == {5.0}


def test_rate_of_a_resumed_run_counts_its_own_updates(tmp_path, monkeypatch):
    """The mean of the record goes over the updates before the stop too."""
    clock, step = [0.0], survivor.make_train_step()[0]
    monkeypatch.setattr(loop_state, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    def timed(state, batch):
        if int(state.step) == 5 and not clock[0] >= 100:
            clock[0] = 100.0
            raise Crash
        clock[0] += 0.5
        return step(state, batch)

    def run(resume):
        checkpoints = Checkpoints(tmp_path, 3, resume=resume)
        options = {"num_updates": 8, "log_every": 8, "items_per_update": 3, "progress": False}
        return training.fit(
            timed, survivor.make_state(), survivor.batches, checkpoints=checkpoints, **options
        )

    with pytest.raises(Crash):
        run(False)
    [record] = run(True).records
    assert record["seconds"] == 2.5 and record["items_per_second"] == 6.0
    losses = []
    state = survivor.make_state()
    for batch, _ in zip(survivor.batches(0), range(8)):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert record["loss"] == np.nanmean(losses)


def test_log_drops_its_own_later_records_and_a_truncated_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logs = [JsonLines(path, model=name) for name in ("a", "b")]
    for update in (1, 2, 3):
        for log in logs:
            log(None, {"update": update, "loss": np.inf if update == 2 else 1.5})
    path.write_text(path.read_text() + '{"model": "b", "upd')
    assert logs[0].resume(1) == {"model": "a", "update": 1, "loss": 1.5}
    assert logs[0].resume(1) == {"model": "a", "update": 1, "loss": 1.5}
    kept = [(record["model"], record["update"]) for record in training.read_json_lines(path)]
    assert kept == [("a", 1), ("b", 1), ("b", 2), ("b", 3)]
    assert json.loads(path.read_text().splitlines()[2]) == {"model": "b", "update": 2, "loss": None}
    assert logs[0].resume(0) is None
    assert JsonLines(tmp_path / "none.jsonl").resume(5) is None
    log = JsonLines(tmp_path / "new" / "folder" / "x.jsonl")
    log(None, {"update": 1, "a": jnp.float32(0.5), "b": np.int64(3), "c": np.bool_(True)})
    assert training.read_json_lines(log.path) == [{"update": 1, "a": 0.5, "b": 3, "c": True}]
    log.waiting = "of before\n"
    log.resume(0)
    log(None, {"update": 1})
    assert training.read_json_lines(log.path) == [{"update": 1}]
    assert not (tmp_path / "none.jsonl").exists()
    path.write_bytes('{"a": "b\u2028c"}\n'.encode() + b'{"a": "\xe2')
    assert training.read_json_lines(path) == [{"a": "b\u2028c"}]
    path.write_text('{"update": 1}\n[]\n')
    with pytest.raises(ValueError) as refused:
        JsonLines(path).resume(1)
    assert str(refused.value) == (
        f"read_json_lines: {path} must hold one JSON object per line, got line 2: it is a list; "
        "remove that line."
    )
    path.write_text('{"update": 1}\nnot JSON\n{"update": 2}\n')
    with pytest.raises(ValueError) as refused:
        training.read_json_lines(path)
    assert str(refused.value) == (
        f"read_json_lines: {path} must hold one JSON object per line, got line 2: Expecting value: "
        "line 1 column 1 (char 0); remove that line."
    )


def test_records_that_could_not_be_written_come_with_the_next(tmp_path):
    log = JsonLines(tmp_path / "file" / "x.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning) as told:
        log(None, {"update": 1})
    assert str(told[0].message) == (
        "JsonLines: a record could not be written, and is written with the next: [Errno 17] File "
        f"exists: '{tmp_path / 'file'}'"
    )
    assert told[0].filename == __file__
    (tmp_path / "file").unlink()
    log(None, {"update": 2})
    assert training.read_json_lines(log.path) == [{"update": 1}, {"update": 2}]


def test_line_that_was_half_written_is_taken_back(tmp_path):
    log, limit = JsonLines(tmp_path / "x.jsonl"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for update, before in ((1, ""), (3, '{"update": 1}\n{"update": 2}\n')):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limit[1]))
        try:
            with pytest.warns(UserWarning, match="File too large"):
                log(None, {"update": update})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert log.path.read_text() == before
        log(None, {"update": update + 1})
    assert [record["update"] for record in training.read_json_lines(log.path)] == [1, 2, 3, 4]


def events(folder):
    """(step, tag, value) of each scalar in TensorBoard's files, and the steps where runs began."""
    from tensorboardX.proto.event_pb2 import Event

    found, starts = [], []
    for path in sorted(folder.iterdir()):
        content, position = path.read_bytes(), 0
        while position < len(content):
            (size,) = struct.unpack_from("<Q", content, position)
            event = Event.FromString(content[position + 12 : position + 12 + size])
            position += size + 16
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            if event.HasField("session_log"):
                starts.append(event.step)
    return found, starts


def test_tensorboard_shows_the_records(tmp_path):
    log = TensorBoard(tmp_path / "tb")
    log(None, {"update": 4, "loss": 0.5, "note": "text"})
    again = TensorBoard(tmp_path / "tb")
    again.resume(4)
    again(None, {"update": 8, "loss": 0.25})
    log.writer.close()
    again.writer.close()
    scalars, starts = events(tmp_path / "tb")
    assert sorted(scalars) == [(4, "loss", 0.5), (8, "loss", 0.25)]
    assert starts == [5]


def test_tensorboard_has_the_records_within_ten_seconds_and_one_file_a_writer(tmp_path):
    log, opened = TensorBoard(tmp_path), []

    def write(folder, **options):
        opened.append((folder, options.pop("filename_suffix"), options))
        return types.SimpleNamespace(add_scalar=lambda *arguments: None)

    log.package = types.SimpleNamespace(SummaryWriter=write)
    log(None, {"update": 1, "loss": 0.5})
    log(None, {"update": 2, "loss": 0.5})
    log.resume(7)
    assert [(folder, options) for folder, _, options in opened] == [
        (str(tmp_path), {"flush_secs": 10}),
        (str(tmp_path), {"flush_secs": 10, "purge_step": 8}),
    ]
    suffixes = {suffix for _, suffix, _ in opened}
    assert len(suffixes) == 2 and all(suffix[0] == "." for suffix in suffixes)


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError) as missing:
        TensorBoard(tmp_path)
    assert str(missing.value) == "TensorBoard: needs tensorboardX; install jaxgru[tensorboard]."


def test_update_counts_go_on_from_the_state():
    step, state = survivor.make_train_step()[0], survivor.make_state()
    options = {"progress": False, "log_every": 2}
    first = training.fit(step, state, survivor.batches, num_updates=4, **options)
    second = training.fit(step, first.state, survivor.batches, num_updates=8, **options)
    assert [record["update"] for record in second.records] == [6, 8]
    assert second.best is None and int(second.state.step) == 8
    assert jnp.isfinite(second.state.params["w"]).all()
