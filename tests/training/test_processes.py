"""Several processes on this machine train as one: gloo between them, each with its rows.

Where the number of processes is all that matters, threads take their place.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import data_parallel
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import survivor
from conftest import assert_close
from jax.experimental import multihost_utils

from experiments import char_lm, communication, data, distributed
from jaxgru import training

ROOT = pathlib.Path(__file__).resolve().parents[2]
SECONDS = 240  # for a whole group; it takes about ten
# Sums over rows in another order, and then four updates; 2e-7 and 4e-16 are what they come to.
TOLERANCES = {"float32": 1e-6, "float64": 1e-14}


def run_processes(commands, num_devices=1, meanwhile=lambda processes: None):
    """(return code, stdout, stderr) of commands that run at once; none outlives the test."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compilation is nearly all of the time
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, *command], env=environment, cwd=ROOT, **pipes)
        for command in commands
    ]
    try:
        meanwhile(processes)
        texts = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, *text) for process, text in zip(processes, texts)]


def free_address():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{opened.getsockname()[1]}"


def train(folder, num_processes, num_devices):
    """What each process of a group left, by name."""
    address, script = free_address(), str(ROOT / "tests" / "training" / "data_parallel.py")
    commands = [[script, folder, address, num_processes, i] for i in range(num_processes)]
    done = run_processes([[str(word) for word in command] for command in commands], num_devices)
    assert [code for code, *_ in done] == [0] * num_processes, done
    found = []
    for i in range(num_processes):
        with np.load(pathlib.Path(folder) / f"{i}.npz") as file:
            found.append(dict(file))
    return found


def on_one_device():
    """The same updates in this process, without a layout, in the names of the files."""
    named = {}
    for dtype in TOLERANCES:
        with jax.enable_x64(dtype == "float64"):
            losses, norms, params, _, batch = data_parallel.run(dtype=jnp.dtype(dtype))
        parts = {"losses 0": losses, "norms 0": norms, "batch 0": batch}
        parts |= {f"params {i}": leaf for i, leaf in enumerate(params)}
        named |= {f"{dtype} {name}": part for name, part in parts.items()}
    return named


def require_same_bytes(one, other):
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name


def assert_trained_as_one_device(group):
    for name, wanted in on_one_device().items():
        limit = TOLERANCES["float32" if "norms" in name else name.split()[0]]  # norms are float32
        for process in group:
            assert_close(process[name], wanted, limit, name)
    rows = [process.pop("float32 rows 0") for process in group]
    assert {part.shape[2] for part in rows} == {data_parallel.BATCH_SIZE // len(group)}
    inputs = data_parallel.read()[0]
    np.testing.assert_array_equal(np.concatenate(rows, axis=2), inputs)  # each row, once
    for process in group:
        del process["float64 rows 0"]
        np.testing.assert_array_equal(process["float32 batch 0"], inputs[0])
        require_same_bytes(process, group[0])


@pytest.mark.slow
def test_two_processes_train_as_one_device_does_and_the_same_each_time(tmp_path):
    first, second = (train(tmp_path, 2, num_devices=2) for _ in range(2))
    for one, other in zip(first, second):
        require_same_bytes(one, other)
    assert_trained_as_one_device(first)


@pytest.mark.slow
def test_four_processes_train_as_one_device_does(tmp_path):
    assert_trained_as_one_device(train(tmp_path, 4, num_devices=1))


# The same rules, with threads for processes.


class PlainCheckpointer:
    """Stands for Orbax's, which asks for real processes: process 0 writes all."""

    def __init__(self, handler):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def save(self, path, args):
        if jax.process_index() == 0:
            path.mkdir()
            np.savez(path / "arrays.npz", **args.item)

    def restore(self, path, args):
        with np.load(path / "arrays.npz") as file:
            return dict(file)


class Group:
    """Two threads that jaxgru takes for two processes.

    `reached` is the update at which JAX tells both of a SIGTERM. A thread whose partner does not
    come to where it waits fails after a minute.
    """

    def __init__(self, monkeypatch, reached=None):
        self.own, self.slots = threading.local(), [None, None]
        self.barrier = threading.Barrier(2, timeout=60)
        monkeypatch.setattr(ocp, "Checkpointer", PlainCheckpointer)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: getattr(self.own, "index", 0))
        monkeypatch.setattr(multihost_utils, "process_allgather", self.gather)
        monkeypatch.setattr(
            multihost_utils, "broadcast_one_to_all", lambda value: self.gather(value)[0]
        )
        monkeypatch.setattr(
            multihost_utils, "reached_preemption_sync_point", lambda update: update == reached
        )

    def gather(self, value):
        self.slots[self.own.index] = np.asarray(value)
        self.barrier.wait()
        found = np.stack(self.slots)
        self.barrier.wait()
        return found

    def run(self, function):
        """What function(index) returned or raised, in each."""
        found = [None, None]

        def start(index):
            self.own.index = index
            try:
                found[index] = function(index)
            except BaseException as error:
                found[index] = error

        threads = [threading.Thread(target=start, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


OTHER = "OSError('on_all_processes: another process failed; see its error message.')"


def test_error_of_one_process_stops_all(monkeypatch):
    def fail(index, failing):
        if index == failing:
            raise KeyError("its own")
        return index

    group = Group(monkeypatch)

    def run(failing):
        return group.run(lambda i: training.on_all_processes(lambda: fail(i, failing)))

    assert run(failing=None) == [0, 1]
    assert [repr(error) for error in run(failing=0)] == ["KeyError('its own')", OTHER]
    assert [repr(error) for error in run(failing=1)] == [OTHER, "KeyError('its own')"]


def test_process_zero_acts_alone_and_its_error_stops_all(monkeypatch):
    group, acted = Group(monkeypatch), []

    def act(index):
        acted.append(index)
        return "done"

    assert group.run(lambda i: training.on_process_zero(lambda: act(i))) == ["done", None]
    assert acted == [0]

    def fail():
        raise KeyError("its own")

    errors = group.run(lambda index: training.on_process_zero(fail))
    assert [repr(error) for error in errors] == ["KeyError('its own')", OTHER]


def test_value_of_process_zero_is_that_of_all_bit_for_bit(monkeypatch):
    values = [1 / 3, float("inf"), {"path": "ü" * 300}, None]
    assert [training.broadcast_from_process_zero(value) for value in values] == values
    group = Group(monkeypatch)
    for value in values:
        received = group.run(
            lambda i, value=value: training.broadcast_from_process_zero(value if i == 0 else "x")
        )
        assert received == [value, value]


def test_processes_know_whether_all_have_the_same(monkeypatch):
    assert training.same_on_all_processes(3)
    group = Group(monkeypatch)
    assert group.run(lambda index: training.same_on_all_processes({"a": [1]})) == [True, True]
    assert group.run(training.same_on_all_processes) == [False, False]


def test_loops_of_two_processes_judge_stop_and_go_on_alike(tmp_path, monkeypatch, capsys):
    """Each evaluates to other numbers; the first one's decide, and it alone writes and speaks."""
    group = Group(monkeypatch, reached=12)
    called = []

    def run(index, resume=True):
        return survivor.run(
            tmp_path,
            resume=resume,
            num_updates=20,
            evaluate=lambda state: {"far": float(state.step) * (-1 if index else 1)},
            callbacks=[log, lambda state, record: called.append(index)],
            progress=True,
        )

    log = training.JsonLines(tmp_path / "metrics.jsonl")
    survivor.make_train_step()  # once, and not in two threads at once
    for stopped in group.run(lambda index: run(index, resume=False)):
        assert isinstance(stopped, training.Interrupted), stopped
        assert (stopped.code, stopped.step) == (143, 12)
    assert set(called) == {0}
    assert capsys.readouterr().err.count(" 0/20 [") == 1
    found = training.find_checkpoint(tmp_path / "checkpoints")
    assert found is not None and (found.step, found.best_step) == (12, 7)
    for fitted in group.run(run):
        assert (int(fitted.state.step), int(fitted.best.step)) == (20, 7)
    updates = [record["update"] for record in training.read_json_lines(tmp_path / "metrics.jsonl")]
    assert updates == [4, 7, 8, 12, 14, 16, 20]


def test_no_process_writes_where_the_disk_of_one_is_full(tmp_path, monkeypatch):
    """Orbax's processes would wait for the one that cannot."""
    group, asked, written = Group(monkeypatch), [], []

    def reserve(file, start, size):
        asked.append((start, size))
        if jax.process_index() == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    monkeypatch.setattr(PlainCheckpointer, "save", lambda *given, **options: written.append(given))
    state = {"x": jnp.ones(5)}
    errors = group.run(lambda index: training.save_checkpoint(tmp_path, 1, state))
    assert [repr(error) for error in errors] == [OTHER, "OSError(28, 'No space left on device')"]
    assert asked == [(0, 20 + 2**20)] * 2 and written == [] and list(tmp_path.iterdir()) == []


def test_folder_that_processes_do_not_share_is_refused(tmp_path, monkeypatch):
    survivor.run(tmp_path / "0", num_updates=5)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    shutil.rmtree(tmp_path / "1" / "checkpoints" / "step-00000005")
    refused = Group(monkeypatch).run(lambda index: survivor.run(tmp_path / str(index)))
    for index, error in enumerate(refused):
        assert isinstance(error, training.CheckpointError), error
        assert str(error) == (
            f"fit: {tmp_path / str(index) / 'checkpoints'} must be one folder shared by all "
            "processes, got different checkpoints in them."
        )


# Stopping and going on.


@pytest.mark.slow
def test_sigterm_to_one_process_saves_all_and_another_layout_goes_on(tmp_path):
    """Parameters lie divided over two processes when they are saved; then one device has all.

    The disk of process 0 is full for a while, which stops neither.
    """
    address, script = free_address(), str(ROOT / "tests" / "training" / "data_parallel.py")
    commands = [[script, str(tmp_path), address, "2", str(i), "two"] for i in range(2)]
    log = tmp_path / "two.jsonl"

    def stop(processes):
        while not log.exists() or len(log.read_text().splitlines()) < 7:
            assert processes[1].poll() is None, processes[1].communicate()
            time.sleep(0.02)
        processes[1].send_signal(signal.SIGTERM)

    done = run_processes(commands, meanwhile=stop)
    assert [code for code, *_ in done] == [143, 143], done
    for _, _, shown in done:
        assert "update 5 could not be saved" in shown and "training continues" in shown
    found = training.find_checkpoint(tmp_path / "two")
    assert found is not None and 7 <= found.step < 32
    assert len(log.read_text().splitlines()) == found.step
    resumed = data_parallel.fit(tmp_path, "two")
    whole = data_parallel.fit(tmp_path, "one")
    assert int(resumed.state.step) == int(whole.state.step) == 32
    assert_close(resumed.state.params, whole.state.params, 3e-6, "after 32 updates")
    assert int(resumed.best.step) == int(whole.best.step)
    records = [training.read_json_lines(tmp_path / f"{name}.jsonl") for name in ("two", "one")]
    assert [record["update"] for record in records[0]] == list(range(1, 33))
    for one, other in zip(*records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


# The experiment.


def arguments_of(folder, out):
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return ["--smoke", "--text", str(text), "--prompt", "the", "--out", str(folder / out)]


def in_two(folder, out):
    group = ("--coordinator", free_address(), "--num-processes", "2", "--process-id")
    command = ["-m", "experiments.char_lm", *arguments_of(folder, out), *group]
    return [[*command, str(i)] for i in range(2)]


@pytest.mark.slow
def test_char_lm_is_the_same_in_two_processes_on_four_devices_and_on_one(
    tmp_path, monkeypatch, capsys
):
    two = run_processes(in_two(tmp_path, "two"))
    assert [code for code, *_ in two] == [0, 0], two
    assert "2 devices, 2 processes" in two[0][1]
    assert "run folder" not in two[1][1]  # process 0 alone speaks
    monkeypatch.setattr(char_lm.report, "cross_check", lambda *arguments: True)  # done above
    devices, make, shards = jax.devices(), training.make_train_step, []

    def make_and_tell(*arguments, layout):
        shards.append(layout.num_shards)
        return make(*arguments, layout=layout)

    monkeypatch.setattr(training, "make_train_step", make_and_tell)
    for run, some in (("four", devices), ("one", devices[:1])):
        monkeypatch.setattr(jax, "devices", lambda some=some: some)
        with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
            assert char_lm.main(arguments_of(tmp_path, run)) == 0
        assert ("4 devices" in capsys.readouterr().out) == (run == "four")
    assert shards == [4, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "two", "four", "one"}
    for run in ("two", "four"):
        for got, wanted in zip(records(tmp_path / run), records(tmp_path / "one"), strict=True):
            assert set(got) == set(wanted)
            for name in got:
                if "second" not in name:
                    assert got[name] == pytest.approx(wanted[name], rel=1e-5), (run, name)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_processes_stop_where_one_cannot_go_on(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "keep").write_text("mine")
    main, other = run_processes(in_two(tmp_path, "used"))
    assert main[0] == other[0] == 2
    assert "nothing was overwritten" in main[2]
    assert "another process failed; see its error message" in other[2]


def test_batch_that_does_not_divide_is_refused_by_several_processes_and_fits_one(monkeypatch):
    assert distributed.make_layout(6).num_shards == 2  # of four devices
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        data.DataError, match="--batch-size must be a multiple of the 4 devices, got 6"
    ):
        distributed.make_layout(6)


def test_half_an_address_is_refused(tmp_path, capsys):
    assert char_lm.main([*arguments_of(tmp_path, "run"), "--num-processes", "2"]) == 2
    message = "--coordinator, --num-processes and --process-id belong together"
    assert message in capsys.readouterr().err


# The estimate on paper.


def test_tables_of_the_readme_are_those_of_the_script():
    readme = (ROOT / "experiments" / "training.md").read_text()
    for line in (*communication.data_parallel_table(), *communication.hidden_table()):
        assert line in readme, line


def test_estimate_counts_bytes_and_operations_as_defined():
    assert communication.parameter_bytes(2) == 4 * (12 + 12 + 6 + 6)
    assert communication.sent_bytes(4, 100) == 150
    rows, hidden, steps = 3, 1024, communication.NUM_STEPS
    operations = 3 * 6 * steps * rows * hidden * (hidden + hidden)
    assert communication.product_seconds(rows) == operations / communication.PEAK
